"""How the task of statsmodels results reads rows: by the names of the columns, or by a formula."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from statsmodels.regression.linear_model import OLS

from upweight._typing import Batch
from upweight.adapters.statsmodels_regression import columns_of, loss_of, offsets_of
from upweight.adapters.statsmodels_regression import rows_of as labels_of
from upweight.adapters.support import AdapterReader, TranslatedData, numbers, require_same_index
from upweight.errors import DataError, ShapeError, message
from upweight.notation import count
from upweight.runtime.fingerprint import digest
from upweight.task.likelihoods import Likelihood
from upweight.task.losses import Bernoulli
from upweight.task.rows import Rows, row_name

CHECKED = 5
"""Rows of the fit on which a left side is evaluated again."""

NAMELESS = "exog came without names: its columns were taken in the order of the fit"


def translated(
    results: Any, exog: Any, endog: Any = None, offset: Any = None, exposure: Any = None
) -> TranslatedData:
    """Examples for the task of supported results; see `upweight.adapters.statsmodels.data`."""
    loss, names = loss_of(results), list(columns_of(results.model))
    if endog is None:
        endog = _response(results, exog)
        own = results.model.endog_names
        if not _has_formula(results) and isinstance(own, str):
            exog = exog.drop(columns=own)
    _require_left_side(results, endog)
    for name, part in (("endog", endog), ("offset", offset), ("exposure", exposure)):
        require_same_index(exog, part, "exog", name)
    columns, given = _names(exog), exog
    notes: tuple[str, ...] = ()
    if columns is not None and columns != names and _has_formula(results):
        exog = _by_formula(results, exog)
    elif columns is not None and _has_names(results.model):
        _require_columns(columns, names)
    elif columns is None and _has_names(results.model):
        notes = (NAMELESS,)
    X, y = _numbers("exog", exog), _numbers("endog", endog)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    binomial = loss == Bernoulli() or (isinstance(loss, Likelihood) and loss.variance == "binomial")
    counted = y.ndim == 2 and y.shape[1] == 2 and binomial
    if X.ndim != 2 or X.shape[1] != len(names) or len(y) != len(X) or not (counted or y.ndim == 1):
        raise ShapeError(
            f"Queries need exog [q, {len(names)}] and endog [q] (binomial counts: [q, 2]).",
            f"exog {X.shape}, endog {y.shape}.",
            "a constant that was not added, or a single row without its first axis.",
            f"give the columns of the fit: {', '.join(names)}.",
        )
    shift = _shift(results.model, {"offset": offset, "exposure": exposure}, len(X))
    weights = np.ones(len(y))
    if counted:
        weights = y.sum(axis=1)
        if not np.all(weights > 0):
            raise DataError(
                "A query of successes and failures needs at least one trial.",
                f"{weights[~(weights > 0)][0]} trials at row {int(np.argmin(weights > 0))}.",
                "empty groups.",
                "leave them out.",
            )
        y = y[:, 0] / weights
    rows = rows_of(results, given if len(given) == len(X) else exog, endog)
    return TranslatedData(arrays_of(X, y, weights, shift), notes, rows, origin_of(results))


def rows_of(results: Any, exog: Any, endog: Any = None) -> Rows | None:
    """What a frame calls its rows and columns; of an array what the fit calls its columns."""
    names = list(map(str, results.model.exog_names)) if _has_names(results.model) else None
    if _has_formula(results) and _names(exog) is not None:
        formula = results.model.formula
        read = [c for c in exog.columns if re.search(rf"(?<!\w){re.escape(str(c))}(?!\w)", formula)]
        exog = exog[read]
    return Rows.of(exog, endog, names)


def fitted_rows(results: Any) -> Rows | None:
    """The rows of the fit: of a formula as in its data frame, in the units of that."""
    model = results.model
    labels, n = labels_of(model), len(model.exog)
    frame = getattr(model.data, "frame", None)
    if frame is None or not frame.index.is_unique or not set(labels) <= set(frame.index):
        frame = model.data.orig_exog if _has_names(model) else model.exog
    else:
        frame = frame.loc[list(labels)]
    found = None if len(frame) != n else rows_of(results, frame)
    ids = None if labels == tuple(range(n)) else labels
    return Rows(ids) if found is None else replace(found, ids=ids)


def arrays_of(X: np.ndarray, y: np.ndarray, weights: np.ndarray, offset: np.ndarray | None) -> Any:
    """(X, (y, v)), or (X, o, (y, v)), as tensors."""
    inputs, responses, v = (torch.from_numpy(np.array(a)) for a in (X, y[:, None], weights))
    if offset is None:
        return inputs, (responses, v)
    return inputs, torch.from_numpy(np.array(offset)), (responses, v)


def origin_of(results: Any) -> str:
    """A hash of the model's kind, columns and coefficients."""
    model = results.model
    kind = f"{type(model).__qualname__} {loss_of(results)!r} {sorted(offsets_of(model))}"
    beta = np.array(results.params, dtype=np.float64)
    return digest(kind, repr(list(map(str, model.exog_names))), torch.from_numpy(beta))


@dataclass(frozen=True, eq=False)
class Reader(AdapterReader):
    """Reads by the names and the formula of the results."""

    results: Any

    @property
    def coefficients(self) -> Mapping[str, tuple[str, int]]:
        names = list(columns_of(self.results.model))
        return {name: ("weight", k) for k, name in enumerate(names) if names.count(name) == 1}

    def translate(self, given: Any) -> TranslatedData:
        if isinstance(given, tuple | list) and len(given) == 2:
            return translated(self.results, *given)
        if isinstance(given, tuple) and len(given) == 1:
            return translated(self.results, given[0])
        if _names(given) is not None:
            return translated(self.results, given)
        raise DataError(
            "Data for the task of statsmodels results are (exog, endog), or the data frame of "
            "its formula.",
            f"a {type(given).__name__}.",
            "a Dataset, DataLoader or dict.",
            "pass (exog, endog) with the columns of the fit; with an offset or exposure "
            "smx.data(results, exog, endog, exposure=...).",
        )

    def relabeled(self, example: Batch, label: Any) -> Batch:
        """Another response, one number, with the weight that the row has."""
        assert isinstance(example, tuple)
        *inputs, (y, v) = example
        new = _numbers("label", label)
        if new.size != 1:
            raise ShapeError(
                "A new response is one number; of binomial counts, the share of successes.",
                f"shape {new.shape}.",
                "several labels at once, or successes and failures.",
                "pass successes / trials.",
            )
        return (*inputs, (torch.from_numpy(new.reshape(1, 1)).to(y), v))


def _names(exog: Any) -> list[str] | None:
    return [str(name) for name in exog.columns] if hasattr(exog, "columns") else None


def _has_names(model: Any) -> bool:
    """Whether the columns of the fit were named by the user, not numbered by statsmodels."""
    return hasattr(model.data.orig_exog, "columns")


def _has_formula(results: Any) -> bool:
    return hasattr(results.model, "formula")


def _by_formula(results: Any, frame: Any) -> Any:
    """exog of a data frame, with the categories and transformations of the fit."""
    names = list(columns_of(results.model))
    if set(names) == set(_names(frame) or ()):
        _require_columns(_names(frame) or [], names)
    try:
        exog, _ = results._transform_predict_exog(frame)
    except Exception as error:  # patsy and formulaic have errors of their own
        raise DataError(
            f"The frame must hold what the formula reads: {results.model.formula}.",
            f"the columns {(_names(frame) or [])[:10]}. statsmodels says: "
            f"{str(error).strip().splitlines()[-1]}",
            "a column missing or renamed, or a category that the fit did not see.",
            f"pass those columns, or exog with the columns {', '.join(names)}.",
        ) from error
    values = np.asarray(exog, dtype=np.float64)
    if len(values) != len(frame) or not np.isfinite(values).all():
        # A frame of exog keeps the index of the rows that it has.
        kept = set(getattr(exog, "index", ()))
        lost = [i for i, label in enumerate(frame.index) if label not in kept]
        if len(values) == len(frame):
            lost = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
        first = f", first {row_name(Rows.of(frame), lost[0])}" if lost else ""
        raise DataError(
            "Every query must have all that the formula reads.",
            f"{count(len(frame), 'row')}, {len(lost)} of them with missing or infinite values"
            f"{first}.",
            "missing values, which a fit leaves out.",
            "leave these rows out: frame.dropna(), or dropna(subset=[...]) of the columns that the "
            "formula reads.",
        )
    return exog


def _response(results: Any, frame: Any) -> Any:
    """The response that a frame holds: its columns, or what a formula's left side makes of them."""
    model, columns = results.model, _names(frame) or ()
    names = model.endog_names
    if set([names] if isinstance(names, str) else names) <= set(columns):
        return frame[names]
    if _has_formula(results) and columns and isinstance(names, str):
        made = _left_side(model, frame)
        if made is not None:
            return made
    raise DataError(
        "Queries need their responses.",
        f"exog alone, of type {type(frame).__name__}"
        + (f", without a column {names!r}." if columns else "."),
        "endog that was left out, or a formula whose left side is made by a function of yours.",
        "pass endog, numbers as in results.model.endog; to ask about predictions, for which "
        "none is known yet, give zeros and measure=upweight.Logit(0), which looks at none.",
    )


def _left_side(model: Any, frame: Any) -> np.ndarray | None:
    """What the left side of the formula, one number of each row, makes of a frame; None: unknown.

    It is asked of rows of the fit as well: what it makes of some must not depend on the others, as
    that of standardize(y) does.
    """
    labels, own = list(labels_of(model))[:CHECKED], getattr(model.data, "frame", None)
    if own is None or not own.index.is_unique or not set(labels) <= set(own.index):
        return None
    left = f"{str(model.formula).split('~', 1)[0].strip()} ~ 1"
    try:
        known, made = (OLS.from_formula(left, rows).endog for rows in (own.loc[labels], frame))
    except Exception:  # patsy and formulaic have errors of their own
        return None
    is_same = known.shape == (len(labels),) and np.allclose(
        known, np.asarray(model.endog).reshape(-1)[: len(labels)], rtol=1e-12, atol=0
    )
    return np.asarray(made) if is_same and made.shape == (len(frame),) else None


def _require_left_side(results: Any, endog: Any) -> None:
    """Refuse the column that a formula's left side transforms, in place of what it makes of it."""
    given, needed = getattr(endog, "name", None), results.model.endog_names
    if not (_has_formula(results) and isinstance(given, str) and isinstance(needed, str)):
        return
    if given != needed and re.search(rf"\b{re.escape(given)}\b", needed):
        raise DataError(
            f"endog must be the left side of the formula, {needed}.",
            f"a column named {given!r}.",
            "the column itself, or transformed values that kept its name.",
            f"pass the values of {needed} without a name: np.asarray(...).",
        )


def _require_columns(columns: list[str], names: list[str]) -> None:
    if columns == names:
        return
    reordered = sorted(columns) == sorted(names)
    raise (DataError if reordered else ShapeError)(
        message(
            f"The columns of exog must be those of the fit, in their order: {', '.join(names)}.",
            f"{', '.join(columns[:10])}.",
            "columns that were reordered since."
            if reordered
            else "a constant that was not added, or columns dropped or renamed since.",
            f"pass exog[{names}]."
            if reordered
            else "give the columns of the fit; a constant is added by sm.add_constant(exog, "
            'has_constant="add").',
        )
    )


def _shift(model: Any, given: dict[str, Any], q: int) -> np.ndarray | None:
    """o of each query: what the fit was given by name must be given by name."""
    fitted = offsets_of(model)
    for name, value in given.items():
        if (value is None) == (name in fitted):
            needed = name in fitted
            raise DataError(
                f"Queries need an {name} of their own where the fit had one, and only there.",
                f"{'none' if needed else 'one'}, for a fit {'with' if needed else 'without'}.",
                "rows passed by themselves, as (exog, endog)."
                if needed
                else "an offset or exposure of another model.",
                f"smx.data(results, exog, endog, {name}=...)." if needed else "leave it out.",
            )
    if not fitted:
        return None
    parts = []
    for name in fitted:
        value = _numbers(name, given[name])
        value = np.full(q, value) if value.ndim == 0 else value.reshape(-1)
        if (
            value.shape != (q,)
            or not (np.isfinite(value) & ((value > 0) | (name == "offset"))).all()
        ):
            raise DataError(
                f"{name} must be {q} finite numbers{' above 0' if name == 'exposure' else ''}.",
                f"shape {value.shape}, smallest {value.min(initial=np.inf)}.",
                "values of other rows, missing ones, or an exposure that was logged already.",
                "pass one for each query, as it was given to the fit.",
            )
        parts.append(np.log(value) if name == "exposure" else value)
    return np.sum(parts, axis=0)


def _numbers(name: str, values: Any) -> np.ndarray:
    return numbers(
        values,
        f"{name} must be numbers, as the fit had them.",
        "text or categories, a missing value, or rows of different lengths.",
        "encode them as in results.model.exog and results.model.endog; or fit by a formula, whose "
        "data frame is read as the fit read it.",
    )
