"""What each row does to a regression: the numbers, their table and their figures.

    kind                 across             up                          lines
    "influence"          leverage           studentized residual        2p/n, 3p/n; t quantiles; D
    "leverage_resid2"    normalized r²      leverage                    the means of both
    "cooks_distance"     row                Dᵢ                          4/n; 0.5 and 1 where reached
    "dfbetas"            row                DFBETAS of a coefficient    ±2/√n
    "dffits"             row                DFFITS                      ±2 √(p/n)
    "leverage"           row                hᵢ                          2p/n, 3p/n
    "studentized"        row                studentized residual        t quantiles at 5 %

Lines are the usual ones (Belsley, Kuh & Welsch 1980, chapter 2; Cook's 0.5 and 1 as R draws them).
They are conventions for where to look, not tests: of many rows some are beyond them by chance.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Axes, DataFrame
from upweight.errors import SpecError, listed, nearest
from upweight.evaluation.bootstrap import NORMAL
from upweight.notation import count, readable
from upweight.plot import LOWERED, NEUTRAL, RAISED, axes

CONTOURS = (0.5, 1.0)
"""Cook's distances that have a contour."""

LARGEST_BUBBLE = 900.0
"""Area of the largest Cook's distance, in square points."""

SHOWN = 5
"""Rows of the short form."""


@dataclass(frozen=True, eq=False, repr=False)
class Diagnostics:
    """What each row does to a regression. One entry (or row) per observation.

    Args:
        beta, names: β̂ `[p]`, and what its entries are called.
        rows: Labels of the observations; their positions unless given.
        scale: φ: the residual variance for `SquaredError`, 1 otherwise, or what was given.
        leverage: hᵢ, between 0 and 1; they sum to p.
        residuals: yᵢ − μᵢ.
        pearson: Pearson residuals.
        studentized: Internally studentized residuals.
        studentized_external: With the variance of the others; None where φ is not estimated.
        loo_residuals: (yᵢ − μᵢ) / (Vᵢ (1 − hᵢ)), on the scale of η: for least squares yᵢ less its
            prediction without row i (PRESS), otherwise the same for the working response.
        cooks_distance: Dᵢ.
        dffits, dffits_internal: Change of the row's own η in its standard errors, t √(h/(1 − h)),
            by the external residual where there is one, and by the internal.
        dfbeta: β̂ − β̂₋ᵢ, `[n, p]`.
        dfbetas: The same in standard errors of β̂ (without row i where φ is estimated).
        covariance_ratio: det cov(β̂₋ᵢ)/det cov(β̂); None where φ is not estimated.
        influence_curve: ICᵢ = dβ̂/dε, `[n, p]`.
        covariance: φ M⁻¹, the model's own covariance of β̂.
        covariance_jackknife: V_IJ, which does not trust the model's variance.
        notes: What was warned of.
    """

    beta: Float[Tensor, " p"]
    names: tuple[str, ...]
    rows: tuple[Hashable, ...]
    scale: float
    leverage: Float[Tensor, " n"]
    residuals: Float[Tensor, " n"]
    pearson: Float[Tensor, " n"]
    studentized: Float[Tensor, " n"]
    studentized_external: Float[Tensor, " n"] | None
    loo_residuals: Float[Tensor, " n"]
    cooks_distance: Float[Tensor, " n"]
    dffits: Float[Tensor, " n"]
    dffits_internal: Float[Tensor, " n"]
    dfbeta: Float[Tensor, "n p"]
    dfbetas: Float[Tensor, "n p"]
    covariance_ratio: Float[Tensor, " n"] | None
    influence_curve: Float[Tensor, "n p"]
    covariance: Float[Tensor, "p p"]
    covariance_jackknife: Float[Tensor, "p p"]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """What was fitted, and the rows of the largest Cook's distance."""
        order = self.cooks_distance.argsort(descending=True, stable=True)[:SHOWN].tolist()
        residual = self.studentized
        if self.studentized_external is not None:
            residual = self.studentized_external
        labels = [str(self.rows[i])[:32] for i in order]
        width = max(3, *map(len, labels))
        lines = [
            f"Diagnostics of {count(len(self.rows), 'row')} and {count(len(self.names), 'column')} "
            f"({listed(list(self.names), 6)}), φ = {readable(self.scale)}",
            f"{'row':<{width}}  Cook's distance  leverage  studentized  most moved (DFBETAS)",
        ]
        for i, label in zip(order, labels, strict=True):
            k = int(self.dfbetas[i].abs().argmax())
            cook, lever, t, moved = (
                readable(float(v))
                for v in (self.cooks_distance[i], self.leverage[i], residual[i], self.dfbetas[i, k])
            )
            lines.append(
                f"{label:<{width}}  {cook:>15}  {lever:>8}  {t:>11}  {self.names[k]} ({moved})"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rest = len(self.rows) - SHOWN
        said = [] if rest <= 0 else [f"and {count(rest, 'row')} of smaller Cook's distance"]
        notes = "".join(f"<p>{escape(text)}</p>" for text in (*said, *self.notes))
        heading = f"<p>{escape(repr(self).splitlines()[0])}</p>"
        return heading + str(self.table(SHOWN).to_html(float_format=readable)) + notes

    def table(self, most: int | None = None, by: str = "cooks_distance") -> "DataFrame":
        """The rows of the largest |values| of one column of `to_pandas`, the largest first.

        Args:
            most: How many; None: all.
            by: The column, such as "leverage", "dffits" or "dfbetas_NAME".

        Raises:
            SpecError: There is no such column.
        """
        whole = self.to_pandas()
        if by not in whole.columns:
            raise SpecError(
                "The rows are sorted by a column of the table.",
                f"by={by!r}.",
                "a name of another package.",
                f"one of {listed(list(whole.columns), 20)}.",
            )
        ordered = whole.loc[:, by].abs().argsort(kind="stable")[::-1]
        shown = [
            *("cooks_distance", "leverage", "studentized", "studentized_external", "dffits"),
            *(f"dfbetas_{name}" for name in self.names),
        ]
        columns = [name for name in dict.fromkeys([by, *shown]) if name in whole.columns]
        return whole.iloc[ordered.to_numpy()[:most]][columns]

    def plot(
        self,
        kind: str = "influence",
        *,
        coefficient: str | int | None = None,
        label: int = 8,
        ax: "Axes | None" = None,
    ) -> "Axes":
        """A figure with the usual reference lines; rows beyond them are named.

        Args:
            kind: "influence": studentized residuals against leverage, with the area of Cook's
                distance. "leverage_resid2": leverage against squared normalized residuals.
                "cooks_distance", "dfbetas", "dffits", "leverage", "studentized": of each row.
            coefficient: Of "dfbetas": its name or place; None draws all.
            label: The most rows that are named.
            ax: Where to draw; None: new Axes, neither shown nor saved.

        Raises:
            SpecError: There is no such kind or coefficient.
        """
        return drawn(self, kind, coefficient, label, ax)

    def to_pandas(self) -> "DataFrame":
        """A table with a row per observation, by its label; DFBETAS in columns `dfbetas_NAME`."""
        from upweight.runtime.tables import pd

        columns = {
            name: value.numpy()
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.ndim == 1 and name != "beta"
        }
        for k, name in enumerate(self.names):
            columns[f"dfbetas_{name}"] = self.dfbetas[:, k].numpy()
        # tupleize_cols: labels that are tuples stay one label each.
        return pd.DataFrame(columns, index=pd.Index(self.rows, name="row", tupleize_cols=False))


def drawn(
    found: Diagnostics, kind: str, coefficient: str | int | None, label: int, ax: "Axes | None"
) -> "Axes":
    """One figure; see `Diagnostics.plot`."""
    if kind not in KINDS:
        raise SpecError(
            f"kind is one of {listed(list(KINDS), 12)}.",
            f"{kind!r}.",
            "a name of another package.",
            f"plot({nearest(kind, KINDS)!r}).",
        )
    if coefficient is not None and kind != "dfbetas":
        raise SpecError(
            "A coefficient is asked of kind='dfbetas' only.",
            f"coefficient={coefficient!r} with kind={kind!r}.",
            "an argument of another figure.",
            f"plot('dfbetas', coefficient={coefficient!r}), or leave it out.",
        )
    if not (isinstance(label, int) and label >= 0):
        raise SpecError(
            "label counts the rows that are named, at least 0.", f"{label!r}.",
            "a list of rows, or True.", "label=5.",
        )  # fmt: skip
    ax = axes(ax)
    ax.margins(0.12)
    if kind == "influence":
        _influence(found, label, ax)
    elif kind == "leverage_resid2":
        _leverage_resid2(found, label, ax)
    elif kind == "dfbetas":
        _dfbetas(found, coefficient, label, ax)
    else:
        _index(found, *_of_rows(found, kind), label, ax)
    return ax


def _influence(found: Diagnostics, label: int, ax: "Axes") -> None:
    h, cook = found.leverage.numpy(), found.cooks_distance.numpy()
    t, name = _studentized(found)
    areas = LARGEST_BUBBLE * cook / max(float(cook.max()), 1e-300) + 4
    ax.scatter(h, t, s=areas, color=NEUTRAL, alpha=0.6, edgecolor="white", linewidth=0.5)
    bound = _quantile(found)
    _lines(ax.axhline, (-bound, bound))
    _lines(ax.axvline, _high(found))
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if _has_contours(found):
        _contours(found, ax)
    beyond = (np.abs(t) > bound) | (h > _high(found)[0])
    _named(found, h, t, np.where(beyond, cook, -1.0), label, ax, np.sqrt(areas) / 2)
    ax.set(xlabel="leverage", ylabel=name, title="Influence (area: Cook's distance)")


def _leverage_resid2(found: Diagnostics, label: int, ax: "Axes") -> None:
    h = found.leverage.numpy()
    r = _plain_residuals(found)
    squared = ((r - r.mean()) / r.std()) ** 2
    ax.scatter(squared, h, s=18, color=NEUTRAL, alpha=0.8)
    _lines(ax.axhline, (float(h.mean()),))
    _lines(ax.axvline, (float(squared.mean()),))
    beyond = (h > _high(found)[0]) | (squared > NORMAL**2)
    size = np.maximum(h / h.max(), squared / squared.max())
    _named(found, squared, h, np.where(beyond, size, -1.0), label, ax)
    ax.set(
        xlabel="normalized residual, squared",
        ylabel="leverage",
        title="Leverage against residuals (lines: means)",
    )


def _of_rows(found: Diagnostics, kind: str) -> tuple[np.ndarray, Sequence[float], str]:
    """A number of each row, where its lines are, and what it is called."""
    if kind == "cooks_distance":
        cook = found.cooks_distance.numpy()
        reached = [level for level in CONTOURS if level <= 1.2 * cook.max()]
        return cook, (4 / len(cook), *reached), "Cook's distance"
    if kind == "leverage":
        return found.leverage.numpy(), _high(found), "leverage"
    if kind == "dffits":
        bound = 2 * (len(found.names) / len(found.rows)) ** 0.5
        return found.dffits.numpy(), (-bound, bound), "DFFITS"
    bound = _quantile(found)
    t, name = _studentized(found)
    return t, (-bound, bound), name


def _dfbetas(found: Diagnostics, coefficient: str | int | None, label: int, ax: "Axes") -> None:
    bound = 2 / len(found.rows) ** 0.5
    if coefficient is not None:
        k = place(found.names, coefficient)
        name = f"DFBETAS of {found.names[k]}"
        _index(found, found.dfbetas[:, k].numpy(), (-bound, bound), name, label, ax)
        return
    values = found.dfbetas.numpy()
    for k, name in enumerate(found.names):
        ax.plot(values[:, k], "o", color=f"C{k % 10}", label=name, markersize=3.5, alpha=0.8)
    _lines(ax.axhline, (-bound, bound))
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    largest = np.abs(values).argmax(axis=1)
    up = values[np.arange(len(values)), largest]
    beyond = np.where(np.abs(up) > bound, np.abs(up), -1.0)
    _named(found, np.arange(len(values)), up, beyond, label, ax)
    ax.legend()
    ax.set(xlabel="row", ylabel="DFBETAS", title="Each row's pull on the coefficients")


def place(names: Sequence[str], coefficient: str | int) -> int:
    """Where a coefficient is, by its name or place.

    Raises:
        SpecError: There is none, or the name is that of several.
    """
    if isinstance(coefficient, str) and list(names).count(coefficient) == 1:
        return list(names).index(coefficient)
    if isinstance(coefficient, int) and not isinstance(coefficient, bool):
        if -len(names) <= coefficient < len(names):
            return coefficient % len(names)
    raise SpecError(
        "coefficient names one column of the fit, or gives its place.",
        f"{coefficient!r}, of a fit with {listed(list(names), 12)}.",
        "a column that was renamed, transformed or dummy-coded by the formula, or left out.",
        f"coefficient={nearest(coefficient, names)!r}.",
    )


KINDS = (
    "influence",
    "leverage_resid2",
    "cooks_distance",
    "dfbetas",
    "dffits",
    "leverage",
    "studentized",
)


def _index(
    found: Diagnostics,
    values: np.ndarray,
    bounds: Sequence[float],
    name: str,
    label: int,
    ax: "Axes",
) -> None:
    """A stem for each row, those beyond the nearest line in another colour."""
    nearest = min(abs(b) for b in bounds)
    beyond = np.abs(values) > nearest
    x = np.arange(len(values))
    ax.vlines(x, 0, values, color=np.where(beyond, RAISED, "0.6").tolist(), linewidth=1)
    ax.scatter(x, values, s=14, color=np.where(beyond, RAISED, NEUTRAL).tolist())
    ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    _lines(ax.axhline, bounds)
    _named(found, x, values, np.where(beyond, np.abs(values), -1.0), label, ax)
    ax.set(xlabel="row", ylabel=name)


def _lines(draw: Callable[..., object], places: Sequence[float]) -> None:
    for value in places:
        draw(value, color="0.4", linewidth=0.8, linestyle="--", zorder=0)


def _contours(found: Diagnostics, ax: "Axes") -> None:
    """Where D is 0.5 and 1: t² = D p (1 − h)/h; by the external residual where that is drawn."""
    n, p = len(found.rows), len(found.names)
    low, high = float(found.leverage.min()), float(found.leverage.max())
    h = np.linspace(max(low, 1e-3 * high), min(0.999, 1.15 * high), 200)
    bottom, top = ax.get_ylim()
    for level in CONTOURS:
        squared = level * p * (1 - h) / h
        if found.studentized_external is not None:
            inside = squared < n - p
            squared = np.where(inside, squared, np.nan)
            squared = squared * (n - p - 1) / (n - p - squared)
        root = np.sqrt(squared)
        for t in (root, -root):
            ax.plot(h, t, color=LOWERED, linewidth=0.8, linestyle=":")
        shown = np.flatnonzero(root <= top)
        if len(shown):
            at = shown[-1]
            ax.annotate(f"{level:g}", (h[at], root[at]), color=LOWERED, fontsize=8)
    ax.set_ylim(bottom, top)


def _has_contours(found: Diagnostics) -> bool:
    """Whether D is a function of what is drawn; with other links it is of the score's residual."""
    h, t = found.leverage, found.studentized
    expected = t.square() * h / ((1 - h) * len(found.names))
    return bool(np.allclose(expected.numpy(), found.cooks_distance.numpy(), rtol=1e-6))


def _studentized(found: Diagnostics) -> tuple[np.ndarray, str]:
    if found.studentized_external is not None:
        return found.studentized_external.numpy(), "studentized residual (external)"
    return found.studentized.numpy(), "studentized Pearson residual"


def _plain_residuals(found: Diagnostics) -> np.ndarray:
    """What statsmodels takes: of least squares the residual, of others the Pearson residual."""
    return (found.residuals if found.studentized_external is not None else found.pearson).numpy()


def _quantile(found: Diagnostics) -> float:
    """That of t at 5 %, on both sides together."""
    import scipy.special

    return float(scipy.special.stdtrit(len(found.rows) - len(found.names), 0.975))


def _high(found: Diagnostics) -> tuple[float, float]:
    share = len(found.names) / len(found.rows)
    return 2 * share, 3 * share


def _named(
    found: Diagnostics,
    x: np.ndarray,
    y: np.ndarray,
    size: np.ndarray,
    most: int,
    ax: "Axes",
    away: np.ndarray | None = None,
) -> None:
    """Labels at the rows of the largest sizes; none where the size is below 0."""
    middle = (float(x.min()) + float(x.max())) / 2
    for i in np.argsort(-size, kind="stable")[:most]:
        if size[i] < 0:
            break
        off = 3 + (0.0 if away is None else float(away[i]))
        up = 0.0 if away is not None else off if y[i] >= 0 else -off
        left = float(x[i]) > middle
        ax.annotate(
            str(found.rows[i]),
            (float(x[i]), float(y[i])),
            xytext=(-off if left else off, up),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center" if away is not None else "bottom" if y[i] >= 0 else "top",
            fontsize=8,
        )
