"""statsmodels results as upweight tasks, and their diagnostics.

    results                                   loss                      weights v
    OLS, WLS, GLM Gaussian (identity)         SquaredError              prior weights
    GLS                                       SquaredError              1/σ², or whitened rows
    Logit, GLM Binomial (logit)               Bernoulli                 trials × prior weights
    Poisson, GLM Poisson (log)                Poisson                   prior weights
    Probit, GLM Binomial (probit, cloglog,    Likelihood                trials × prior weights
      log)
    GLM Gamma, inverse Gaussian, Tweedie,     Likelihood                prior weights
      negative binomial (α fixed)
    NegativeBinomial (nb2, α estimated)       DispersedCounts           1

η = X β + o, where o is the offset plus the logarithm of the exposure of the fit, if it had them.
The intercept is a column of exog, as statsmodels keeps it; nothing is penalized. H is that of
the mean loss, by the observed information: the covariance that statsmodels reports is φ/n times its
inverse, or that of the expected information where a GLM with another link was fitted by iteratively
reweighted least squares.

A row is an example, however many observations its trials or freq_weights say it stands for. The
task reads queries as `data` does: `(exog, endog)`, or the data frame of a formula.
"""

import dataclasses
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from upweight.runtime.packages import missing

try:
    import statsmodels  # noqa: F401  what the imports below would not find
except ImportError as error:
    raise missing("A fitted regression", "statsmodels", "statsmodels", error) from error

from upweight._typing import Batch
from upweight.adapters.stationarity import judged
from upweight.adapters.statsmodels_reader import (
    Reader,
    arrays_of,
    fitted_rows,
    origin_of,
    translated,
)
from upweight.adapters.statsmodels_refit import Refit
from upweight.adapters.statsmodels_regression import (
    dropped,
    loss_of,
    regression_of,
    robust_notes,
    supports,
    trials_left_out,
    whitened_notes,
)
from upweight.adapters.support import Support, TranslatedData, linear_map
from upweight.applications.regression import glm_diagnostics, require_full_rank
from upweight.applications.regression_result import Diagnostics
from upweight.applications.robustness_coefficient import fragile
from upweight.errors import UnsupportedModel
from upweight.task.data import Data
from upweight.task.likelihoods import DispersedLinear, Likelihood
from upweight.task.losses import Weighted
from upweight.task.task import Task, call_model

__all__ = ["Refit", "Support", "data", "diagnostics", "fragile", "recipe", "supports", "task"]


def diagnostics(results: Any) -> Diagnostics:
    """Leverage, Cook's distance, DFBETAS, DFFITS, the influence curve and more, for each row.

    Rows are labeled as in the data frame that was fitted, or by their position in the arrays,
    before statsmodels left out those with missing values. The scale is that of the fit: estimated
    for least squares, 1 for the others, or what `fit(scale=...)` made of it. An offset or exposure
    is part of η and stays with its row. Of a fit with robust standard errors (cov_type) the
    diagnostics are those of the plain fit, with a warning that is kept in `notes`. Where α is
    estimated (NegativeBinomial) it is held at its estimate, with such a warning.

    Raises:
        UnsupportedModel: `supports` says no, with its reason; or the fit had freq_weights.
        UpweightError: See `upweight.applications.regression.glm_diagnostics`.
    """
    found = regression_of(results)
    if found.repeated:
        raise UnsupportedModel(
            "Diagnostics of single observations need one row for each of them.",
            "a GLM with freq_weights, whose rows stand for several observations.",
            "a table of counts of equal rows.",
            "repeat the rows and fit again; or use var_weights if that is what was meant; or "
            "task(results), for which removing a row removes all it stands for.",
        )
    notes = whitened_notes(found) + robust_notes(results, "standard errors")
    loss = found.loss
    if found.alpha is not None:
        loss = Likelihood("negative binomial", "log", found.alpha)
        notes += (
            f"α is held at its estimate of {found.alpha:.4g}, as in a GLM of that family: without "
            "a row it would move too, as it does by task(results) and fitted.removal",
        )
    wrong = trials_left_out(results)
    if wrong:
        notes += (
            f"the scale of the fit is {wrong}: statsmodels' scale='X2' leaves out the numbers of "
            "trials, and DFBETAS, DFFITS and Cook's distance are in its unit; fit shares with "
            "var_weights=trials",
        )
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    computed = glm_diagnostics(
        found.X,
        found.y,
        found.beta,
        loss,
        found.weights,
        found.names,
        found.scale,
        found.rows,
        found.offset,
        "expected" if found.expected else "observed",
    )
    return dataclasses.replace(computed, notes=notes)


def task(results: Any, *, tolerance: float = 1.0) -> tuple[Task, Data]:
    """The fitted model as a task, with its training data.

    Args:
        results: Fitted results; see `supports`.
        tolerance: How far the estimate may be from its minimum, in typical removals of one row. A
            tenth of it is passed over in silence; between the two there is a warning and a note in
            the provenance.

    Raises:
        UnsupportedModel: `supports` says no, with its reason.
        NotPositiveDefinite: The columns depend on each other.
        NotStationary: The estimate is farther from the minimum than `tolerance`, or there is no
            minimum: classes that are separated, a group whose counts are all 0.
    """
    found = regression_of(results)
    require_full_rank(found.X, found.weights)
    weight = torch.from_numpy(found.beta)[None]
    model: Any = linear_map(weight, None)
    if found.alpha is not None:
        model = DispersedLinear(found.X.shape[1]).eval()
        with torch.no_grad():
            model.weight.copy_(weight)
            model.alpha.fill_(found.alpha)
    arrays = arrays_of(found.X, found.y, found.weights, found.offset)
    forward = call_model if found.offset is None else shifted
    loss = Weighted(found.loss)
    train = TranslatedData(arrays, (), fitted_rows(results), origin_of(results))
    name = f"this {type(results.model).__name__} fit"
    notes = judged(Task(model, loss, forward=forward), train, tolerance, name)
    left_out = dropped(results.model)
    if left_out:
        notes.append(
            f"statsmodels left out {len(left_out)} rows with missing values: example i is the i-th "
            "row of model.exog"
        )
    if found.repeated:
        notes.append("a row with freq_weights is one example: removing it removes all its copies")
    notes += [*whitened_notes(found), *robust_notes(results, "scores")]
    train = dataclasses.replace(train, notes=tuple(notes))
    reader = Reader(train, "smx.data(results, exog, endog)", results)
    return Task(model, loss, forward=forward, reads=reader), train


def shifted(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """η = Xβ + o and the targets; what the model gives beside η is left as it is."""
    assert isinstance(batch, tuple)
    X, offset, targets = batch
    outputs = model(X)
    return outputs + F.pad(offset[:, None], (0, outputs.shape[1] - 1)), targets


def data(
    results: Any, exog: Any, endog: Any = None, *, offset: Any = None, exposure: Any = None
) -> Data:
    """Queries for the task of `results`: rows of exog (with the constant) and their responses.

    A query weighs 1, or its number of trials where endog has two columns.

    Args:
        results: Fitted results; see `supports`.
        exog: `[q, p]`, columns as in the fit; those of a frame are held to its names, an array has
            none and is taken by place, which a note says. Of a model with a formula also the data
            frame that the formula reads.
        endog: `[q]`; for a binomial GLM also `[q, 2]`, successes and failures. None: the column of
            the formula's frame.
        offset: `[q]`, where the fit was given one.
        exposure: `[q]`, where the fit was given one; not its logarithm.

    Raises:
        UnsupportedModel: `supports` says no, with its reason.
        ShapeError: Other columns than those of the fit, or as many responses as rows.
        DataError: Columns in another order; something that is no number; a row of successes and
            failures without any trial; an offset or exposure that is missing, or that the fit did
            not have.
    """
    return translated(results, exog, endog, offset, exposure)


def recipe(results: Any) -> Refit:
    """How to fit `results` again under other data weights; of what `supports` says yes to."""
    loss_of(results)
    return Refit()
