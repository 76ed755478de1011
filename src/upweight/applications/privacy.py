"""Privacy: what explanations that show training rows tell of who was trained on.

An explanation of a query x shows the k training rows with the largest |S[x, ·]|, their scores, or
both. Whoever may ask can attack membership, "was x a training row?" (Shokri, Strobel & Zick 2021):

    own row     is x itself among the rows shown, and how near the top?
    ratio       log |S|₁ / |S|₂: how far the first stands above the second
    largest     |S|₁
    loss        −ℓ(x), by who sees the loss and no explanation (Yeom et al. 2018): baseline

`audit` measures them on members and outsiders, for each of several redactions, beside what a
redaction costs. `redacted` makes the explanation that such a redaction publishes. `own_rows` says
which queries of some scores are training rows, so that a page can warn.

Nothing formal is promised: no redaction here bounds what another attack can learn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upweight._typing import Axes, DataFrame
from upweight.applications.outcome import Outcome, as_table
from upweight.applications.right_answers import names_of
from upweight.errors import DataError, NonFinite, SpecError
from upweight.evaluation import mislabel
from upweight.evaluation.bootstrap import Bootstrap, Estimate, estimate
from upweight.methods.fitted import Fitted
from upweight.plot import axes, reaches
from upweight.provenance import Context
from upweight.runtime.selection import places
from upweight.scores import Scores
from upweight.task.data import Data, batch_size
from upweight.task.measures import Loss, measured

__all__ = [
    "Attack", "Explanations", "Leakage", "Redaction", "audit", "own_rows", "redacted",
]  # fmt: skip

RATES = (0.001, 0.01)
"""False-positive rates at which true positives are told (Carlini et al. 2022)."""

NEAR = 0.01
"""Share of the training rows whose nearest other row is within the radius of a near-duplicate."""

PAIRS = 4_000_000
"""Distances that are held together."""


@dataclass(frozen=True)
class Redaction:
    """What of an explanation is published.

    Args:
        records: Whether the rows themselves, or their indices, are shown.
        values: Whether the scores are shown; else only the order.
        digits: Significant digits of the scores; None: all.
        public: Mask of the training rows that may be shown; None: all. The k largest of them are.
        withhold: "near-duplicates" leaves out rows whose input is within `radius` of the query's.
        radius: Euclidean distance. None: the distance within which the nearest other row lies for
            1 % of the training rows. 0 withholds equal inputs only.
    """

    records: bool = True
    values: bool = True
    digits: int | None = None
    public: Any = field(default=None, repr=False)
    withhold: str | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        digits_fit = self.digits is None or self.digits >= 1
        radius_fits = self.radius is None or self.radius >= 0
        if self.withhold not in (None, "near-duplicates") or not (digits_fit and radius_fits):
            raise SpecError(
                'What is withheld is None or "near-duplicates", within a radius ≥ 0; scores are '
                "shown to one significant digit or more.",
                f"{self!r}.",
                "decimals in place of significant digits, or another word.",
                'Redaction(withhold="near-duplicates", digits=2).',
            )


@dataclass(frozen=True, eq=False)
class Explanations:
    """What is published of some queries.

    Args:
        rows: The training rows shown, `[q, k]`, by |S|, largest first; None: no records. −1 where
            fewer than k are left.
        values: Their scores; None: not shown. 0 where fewer are left.
        redaction: What was asked.
        radius: Of near-duplicates; None where they are not withheld.
        withheld: How many rows were withheld as near-duplicates, of each query.
    """

    rows: Int[Tensor, "q k"] | None
    values: Float[Tensor, "q k"] | None
    redaction: Redaction
    radius: float | None
    withheld: Int[Tensor, " q"]


@dataclass(frozen=True)
class Attack:
    """One attack on one redaction.

    Args:
        redaction, name: Which.
        auc: P(a member's statistic is above an outsider's) + ½ P(equal).
        rates: Share of members told at a false-positive rate of at most .1 % and 1 %, ties not
            told, with its interval.
    """

    redaction: str
    name: str
    auc: Estimate
    rates: tuple[Estimate, ...]


@dataclass(frozen=True, eq=False)
class Leakage(Outcome):
    """What the explanations of one fitted method tell of membership.

    Args:
        predicted: AUC of each attack, by (redaction, attack): measured on one fitted model.
        actual: None: the members are known, and nothing is fitted again.
        attacks: All of them; the loss attack once, under "no explanation".
        shown: Share of members, and of outsiders, whose own record is among the k, by redaction.
        revealed: Training rows that the explanations of outsiders alone show, by redaction.
        overlap: Mean number of the k records as without redaction that are still used.
        withheld: Mean number of near-duplicates withheld from a query, by redaction.
        radius: Of near-duplicates.
        k: Rows in an explanation.
        sizes: Members and outsiders asked, and training rows.
    """

    predicted: Mapping[tuple[str, str], float] = field(repr=False)
    attacks: tuple[Attack, ...]
    shown: Mapping[str, tuple[float, float]]
    revealed: Mapping[str, int]
    overlap: Mapping[str, float]
    withheld: Mapping[str, float]
    radius: float | None
    k: int
    sizes: tuple[int, int, int]
    actual: None = None

    def worst(self, redaction: str) -> Attack:
        """The attack whose AUC is farthest from ½ on a redaction.

        Below ½ it tells members by the smaller statistic: their scores are small where their loss
        is.

        Raises:
            SpecError: There is no such redaction.
        """
        found = [each for each in self.attacks if each.redaction == redaction]
        if not found:
            raise SpecError(
                "A redaction is named as it was in the audit.",
                f"{redaction!r}.",
                "another spelling.",
                f"one of {', '.join(map(repr, self.revealed))}.",
            )
        return max(found, key=lambda each: abs(each.auc.value - 0.5))

    title = "what explanations tell of membership"

    @property
    def verdict(self) -> str:
        names = [*self.revealed]
        first, last = names[0], min(names, key=lambda name: abs(self.worst(name).auc.value - 0.5))
        worst, least = self.worst(first), self.worst(last)
        members, outsiders = (100 * share for share in self.shown[first])
        seen = (
            f"{members:.0f} % of members and {outsiders:.0f} % of outsiders see themselves, "
            if members or outsiders
            else ""
        )
        beside = "" if last == first else f"; least by “{last}”: {least.auc.value:.3f}"
        return (
            f"With “{first}” and k = {self.k}, {seen}and the best attack has an AUC of "
            f"{worst.auc:.3f} ({worst.name}){beside}; explanations of {self.sizes[1]} outsiders "
            f"show {self.revealed[first]} of {self.sizes[2]} training rows."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        said = [
            "nothing is promised: these attacks are the ones that were tried, and a redaction "
            "that stops them bounds no other (a copy of x changed by more than the radius gets "
            "x shown again)",
            "members and outsiders must come from one distribution, or a shift between them looks "
            "like leakage",
        ]
        if self.sizes[1] * RATES[0] < 1:
            said.append(
                f"with {self.sizes[1]} outsiders a false-positive rate of {100 * RATES[0]:g} % is "
                "no false positive at all"
            )
        return tuple(said)

    def frame(self) -> "DataFrame":
        """A row per redaction and attack."""
        rows = []
        for each in self.attacks:
            name = each.redaction
            members, outsiders = self.shown.get(name, (None, None))
            rows.append(
                {
                    "redaction": name,
                    "attack": each.name,
                    "auc": each.auc.value,
                    "low": each.auc.low,
                    "high": each.auc.high,
                    **{
                        f"tpr at {100 * rate:g} %": found.value
                        for rate, found in zip(RATES, each.rates, strict=True)
                    },
                    "members shown": members,
                    "outsiders shown": outsiders,
                    "rows revealed": self.revealed.get(name),
                    "overlap": self.overlap.get(name),
                }
            )
        return as_table(rows)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """AUC of every attack with its interval; ½ is a guess."""
        ax = axes(ax)
        place = range(len(self.attacks))
        values = [each.auc.value for each in self.attacks]
        ax.errorbar(values, place, xerr=reaches(each.auc for each in self.attacks), fmt="o")
        ax.axvline(0.5, color="black", linewidth=0.8)
        ax.set_yticks(place, [f"{each.redaction}: {each.name}" for each in self.attacks])
        ax.invert_yaxis()
        ax.set(xlabel="AUC of the membership attack")
        return ax

    def numbers(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "members": self.sizes[0],
            "outsiders": self.sizes[1],
            "n": self.sizes[2],
            "radius": self.radius,
            "attacks": [
                {
                    "redaction": each.redaction,
                    "attack": each.name,
                    "auc": each.auc,
                    "tpr": dict(zip([f"{rate:g}" for rate in RATES], each.rates, strict=True)),
                }
                for each in self.attacks
            ],
            **self._fields("shown", "revealed", "overlap", "withheld"),
        }


def redactions(n: int) -> dict[str, Redaction]:
    """What `audit` compares by default: all is shown first; `public` is every second row."""
    half = torch.arange(n) % 2 == 0
    return {
        "records and values": Redaction(),
        "records only": Redaction(values=False),
        "values only": Redaction(records=False),
        "values to 2 digits": Redaction(records=False, digits=2),
        "records of a public half": Redaction(public=half),
        "equal inputs withheld": Redaction(withhold="near-duplicates", radius=0.0),
        "near-duplicates withheld": Redaction(withhold="near-duplicates"),
        "near-duplicates withheld, records only": Redaction(
            values=False, withhold="near-duplicates"
        ),
    }


def redacted(
    scores: Scores,
    k: int = 5,
    redaction: Redaction | None = None,
    *,
    inputs: Callable[[Any], Tensor] | None = None,
    **asked: Any,
) -> Explanations:
    """The explanation that is published of each query: the k rows of largest |S| that may be.

    Args:
        scores: From `attribute`, with their live data where near-duplicates are withheld.
        k: Rows in an explanation.
        redaction: What is published; or its arguments by name: `withhold="near-duplicates"`,
            `public=mask`, `digits=2`.
        inputs: What two examples are compared by: a batch to `[b, d]`. None: its first tensor.
        **asked: The arguments of a `Redaction`.

    Raises:
        SpecError: k is no number of rows, or both a redaction and its arguments are given.
        ShapeError: The columns are not training rows, or the mask does not fit.
        DataError: The inputs cannot be compared.

    Cost: a sort of the scores; q · n distances to withhold near-duplicates, and n² for the default
    radius.
    """
    if redaction is not None and asked:
        raise SpecError(
            "A redaction is given whole or by its arguments.",
            f"both: {redaction!r} and {', '.join(asked)}.",
            "an argument that should change the redaction.",
            "dataclasses.replace(redaction, digits=2).",
        )
    wanted = Redaction(**asked) if redaction is None else redaction
    scores.require_examples()
    _require_count(k, scores.values.shape[1])
    near = None
    if wanted.withhold is not None:
        context = scores.require_context()
        near = _Near.of(context.train, [context.queries], inputs)
    return _redacted(scores.values[:], k, wanted, near)


def audit(
    fitted: Fitted,
    members: Sequence[int] | Bool[Tensor, " n"],
    outsiders: Any,
    k: int = 5,
    *,
    measure: Any = Loss(),  # noqa: B008  a frozen spec
    redactions: Mapping[str, Redaction] | None = None,
    inputs: Callable[[Any], Tensor] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> Leakage:
    """How well explanations by training rows tell members from outsiders.

    The attacker asks about x with its true label, sees the explanation and knows x.

    Args:
        fitted: The method that explains.
        members: Training rows that are asked about: indices or a mask; drawn at random.
        outsiders: (x, y) of the same distribution that were not trained on.
        k: Rows in an explanation.
        measure: What is explained.
        redactions: What is compared, by name, the first being what is published now. None: all
            shown, records only, values only, values to 2 digits, records of a public half (every
            second row), equal inputs withheld, near-duplicates withheld, with and without values.
        inputs: What two examples are compared by: a batch to `[b, d]`. None: its first tensor.
        bootstrap: How intervals are made: members and outsiders are drawn.

    Returns:
        AUC and true positives at few false ones of each attack, and what each redaction costs.

    Raises:
        DataError: There are no members or outsiders, an outsider is a training row, or the inputs
            cannot be compared.
        ShapeError: There is no such training row, or a mask does not fit.
        UpweightError: From the method.

    Cost: `attribute` of all queries, n² distances of inputs.
    """
    task, train = fitted.task, fitted.train
    inside = places(members, len(train), "Members")
    outside = task.queries(outsiders)
    if not inside or not len(outside):
        raise DataError(
            "An attack tells members from outsiders, and needs both.",
            f"{len(inside)} members and {len(outside)} outsiders.",
            "an empty split.",
            "members=range(500), and held-out examples as outsiders.",
        )
    _require_count(k, len(train))
    parts = [train.subset(inside), outside]
    n, answers = len(train), [fitted.attribute(part, measure).values for part in parts]
    values = torch.cat(answers).cpu()
    is_member = torch.arange(len(values)) < len(inside)
    near = _Near.of(train, parts, inputs)
    own = _own(near, inside, len(outside))
    wanted = _redactions(redactions, n)
    losses = torch.cat([measured(task, fitted.theta, part, Loss()) for part in parts]).cpu()
    attacks = [_attacked("no explanation", "loss", -losses, is_member, bootstrap)]
    _, plain = values.abs().topk(min(k, n), dim=1)
    shown, revealed, overlap, withheld = {}, {}, {}, {}
    for name, redaction in wanted.items():
        seen = _redacted(values, k, redaction, near)
        whole = replace(redaction, records=True, values=True, digits=None)
        used = _redacted(values, k, whole, near).rows
        assert used is not None
        same = (plain[:, :, None] == used[:, None, :]).any(dim=2)
        overlap[name] = float(same.sum(dim=1).double().mean())
        withheld[name] = float(seen.withheld.double().mean())
        shown[name], revealed[name] = (0.0, 0.0), 0
        if seen.rows is not None:
            place = _place(seen.rows, own)
            attacks.append(_attacked(name, "own row", -place, is_member, bootstrap))
            has = (place < seen.rows.shape[1]).double()
            shown[name] = (float(has[is_member].mean()), float(has[~is_member].mean()))
            outer = seen.rows[~is_member]
            revealed[name] = len(set(outer[outer >= 0].tolist()))
        if seen.values is not None:
            size = seen.values.abs().double()
            attacks.append(_attacked(name, "largest", size[:, 0], is_member, bootstrap))
            if k > 1:
                attacks.append(_attacked(name, "ratio", _ratio(size), is_member, bootstrap))
    return Leakage(
        predicted={(each.redaction, each.name): each.auc.value for each in attacks},
        attacks=tuple(attacks),
        shown=shown,
        revealed=revealed,
        overlap=overlap,
        withheld=withheld,
        radius=near.radius,
        k=k,
        sizes=(len(inside), len(outside), n),
    )


def own_rows(scores: Scores) -> tuple[int, ...]:
    """Queries of scores that are training rows, inputs and labels to the bit, or other copies.

    None are told of scores without their live data, nor of those whose columns are groups.

    Cost: one reading of the data.
    """
    context = scores.context
    if scores.columns is not None or not isinstance(context, Context) or context.queries is None:
        return ()
    trained = set(names_of(context.train))
    return tuple(q for q, name in enumerate(names_of(context.queries)) if name in trained)


@dataclass(frozen=True, eq=False)
class _Near:
    """Inputs of the queries and of the training rows, and how near is a duplicate."""

    queries: Float[Tensor, "q d"]
    train: Float[Tensor, "n d"]
    radius: float

    @classmethod
    def of(
        cls, train: Data, queries: Sequence[Data], inputs: Callable[[Any], Tensor] | None
    ) -> "_Near":
        rows = _inputs(train, inputs)
        asked = torch.cat([_inputs(part, inputs) for part in queries])
        if asked.shape[1] != rows.shape[1]:
            raise DataError(
                "Queries and training rows are compared by inputs of one length.",
                f"{asked.shape[1]} and {rows.shape[1]} numbers.",
                "sequences that were padded to different lengths.",
                "inputs=a function of a batch, such as the mean embedding.",
            )
        return cls(asked, rows, _radius(rows))

    def within(self, radius: float) -> Bool[Tensor, "q n"]:
        """Which training rows are within the radius of each query."""
        return torch.cat(
            [_distances(part, self.train) <= radius for part in _split(self.queries, self.train)]
        )


def _radius(rows: Float[Tensor, "n d"]) -> float:
    """Within it lies the nearest other row for a share `NEAR` of the rows; 0 of a single row."""
    if len(rows) < 2:
        return 0.0
    # The smallest distance is that to the row itself.
    nearest = [_distances(part, rows).kthvalue(2, dim=1).values for part in _split(rows, rows)]
    return float(torch.cat(nearest).quantile(NEAR, interpolation="lower"))


def _split(a: Tensor, b: Tensor) -> Sequence[Tensor]:
    return torch.split(a, max(1, PAIRS // max(1, len(b))))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not by the product of matrices, whose rounding would keep equal inputs apart.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _inputs(data: Data, chosen: Callable[[Any], Tensor] | None) -> Float[Tensor, "n d"]:
    parts = []
    for _, _, batch in data.batches(batch_size(1, 8)):
        leaves = tree_leaves(batch) if chosen is None else [chosen(batch)]
        found = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
        if found is None or found.is_complex() or found.ndim < 1:
            raise DataError(
                "Near-duplicates are found by inputs that are numbers.",
                f"a batch of type {type(batch).__name__} without a tensor of numbers.",
                "graphs, texts or objects of a class of one's own.",
                "inputs=a function of a batch that gives [b, d].",
            )
        parts.append(found.detach().cpu().double().reshape(len(found), -1))
    return torch.cat(parts)


def _own(near: _Near, inside: Sequence[int], outsiders: int) -> list[set[int]]:
    """The training rows with the input of each query."""
    equal = near.within(0.0)
    rows = [set(row.nonzero()[:, 0].tolist()) for row in equal]
    for q, i in enumerate(inside):
        rows[q].add(i)
    copies = sum(bool(row) for row in rows[len(inside) :])
    if outsiders and copies == outsiders:
        raise DataError(
            "Outsiders are examples that the model was not trained on.",
            f"all {outsiders} have the input of a training row.",
            "the training data given as outsiders.",
            "pass held-out examples.",
        )
    return rows


def _redacted(
    values: Float[Tensor, "q n"], k: int, redaction: Redaction, near: _Near | None
) -> Explanations:
    q, n = values.shape
    allowed = torch.ones(q, n, dtype=torch.bool)
    if redaction.public is not None:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[places(redaction.public, n, "Public rows")] = True
        allowed &= mask
    radius, withheld = None, torch.zeros(q, dtype=torch.long)
    if redaction.withhold is not None:
        assert near is not None
        radius = near.radius if redaction.radius is None else redaction.radius
        close = near.within(radius)
        allowed &= ~close
        withheld = close.sum(dim=1)
    size = values.cpu().abs().masked_fill(~allowed, -1.0)
    found, rows = size.topk(min(k, n), dim=1)
    gone = found < 0
    rows = rows.masked_fill(gone, -1)
    told = values.cpu().gather(1, rows.clamp(min=0)).masked_fill(gone, 0.0)
    if redaction.digits is not None:
        told = _rounded(told, redaction.digits)
    return Explanations(
        rows if redaction.records else None,
        told if redaction.values else None,
        redaction,
        radius,
        withheld,
    )


def _rounded(values: Tensor, digits: int) -> Tensor:
    """To significant digits."""
    scale = torch.where(values == 0, torch.ones_like(values), values).abs().log10().floor()
    unit = 10.0 ** (scale - (digits - 1))
    return (values / unit).round() * unit


def _place(rows: Int[Tensor, "q k"], own: Sequence[set[int]]) -> Float[Tensor, " q"]:
    """At which place the query's own row is shown; k where it is not."""
    k = rows.shape[1]
    found = [
        next((place for place, i in enumerate(row) if i in mine), k)
        for row, mine in zip(rows.tolist(), own, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def _ratio(size: Float[Tensor, "q k"]) -> Float[Tensor, " q"]:
    """log |S|₁/|S|₂; 0 where both are 0, and the largest number where only the second is."""
    first, second = size[:, 0], size[:, 1]
    return first.clamp(min=1e-300).log() - second.clamp(min=1e-300).log()


def _attacked(
    redaction: str, name: str, statistic: Tensor, members: Bool[Tensor, " q"], how: Bootstrap
) -> Attack:
    """AUC, and true positives where false ones are few."""
    if not bool(statistic.isfinite().all()):
        raise NonFinite(
            "An attack compares finite numbers.",
            f"{int((~statistic.isfinite()).sum())} of the {name} statistic are not.",
            "a loss that overflows.",
            "leave these examples out.",
        )
    auc = mislabel.auroc(statistic, members, how)
    inside, outside = statistic[members], statistic[~members]
    rates = []
    for rate in RATES:
        allowed = int(rate * len(outside))

        def told(a: Tensor, b: Tensor, allowed: int = allowed) -> Tensor:
            # The threshold is drawn with the outsiders: the value that `allowed` of them exceed.
            order = outside.argsort(descending=True)
            passed = b[:, order].cumsum(dim=1) > allowed
            last = passed.double().argmax(dim=1)
            threshold = outside[order][last]
            above = (inside[None] > threshold[:, None]).double()
            return (above * a).sum(dim=1) / a.sum(dim=1)

        rates.append(estimate(told, [len(inside), len(outside)], how))
    return Attack(redaction, name, auc, tuple(rates))


def _redactions(asked: Mapping[str, Redaction] | None, n: int) -> dict[str, Redaction]:
    wanted = redactions(n) if asked is None else dict(asked)
    if not wanted or not all(isinstance(each, Redaction) for each in wanted.values()):
        raise SpecError(
            "An audit compares redactions by name.",
            f"{asked!r}.",
            "a list, or none.",
            'redactions={"now": Redaction(), "soon": Redaction(withhold="near-duplicates")}.',
        )
    return wanted


def _require_count(k: Any, n: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise SpecError(
            f"An explanation shows a number of training rows, from 1 to {n}.",
            f"k={k!r}.",
            "a share of the data, or a training set that is smaller.",
            "k=5.",
        )
