"""Which method? A pure function of what is known, over a table.

    choose(facts) -> Choice(method, why, …)

The table is in order of preference: the first row that applies, fits into memory and is expected to
end within the budget is chosen. Where none ends in time the quickest is, and the choice says so.
Models are trained anew only where a budget is given that is longer than `PATIENCE`.

Networks are never given their Hessian: away from a minimum it is indefinite, and the solver for
that, MINRES, may take as many products as there are parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from upweight.curvature.ekfac import EKFAC
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.errors import UnsupportedModel
from upweight.labels import Expected, Observed
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Absolute, Damping, Relative
from upweight.methods.averaged import Averaged
from upweight.methods.ensemble import Ensemble
from upweight.methods.influence import Influence
from upweight.methods.method import Method
from upweight.methods.source import SOURCE
from upweight.methods.stacked import Stacked
from upweight.notation import in_short

PATIENCE = 10.0
"""Seconds that a choice may take where no budget is given."""

MOST_OUTPUTS = 16
"""Backward passes per example that the expectation over labels may take."""

SLIGHT = Relative(1e-5)
"""For a singular Hessian of a convex objective: at its minimum no gradient lies in the flat
directions, so that a slight damping changes no score; in float32 rounding forbids a smaller one."""

USUAL = Relative(0.1)
"""The custom for EK-FAC (Grosse et al. 2023)."""

LEARNED = 0.02
"""λ of the GGN for each label of an example, where nothing is known of training: 1/λ is what usual
trainings have of step size × steps. Its rank correlation is within .05 of the best λ's on ten
networks; the mean eigenvalue of a model that is sure of its labels is up to hundreds of times too
small (`benchmarks/damping.py`)."""

FIRST = 0.5
"""Seconds of the first fit of a process besides passes and products."""

AGAIN = 0.15
"""The same of each further one: 0.12 on an MLP of 64 units and 0.15 on a small CNN, with questions;
0.27 with 512 units, whose decompositions take the rest."""

SEGMENTS = 3
"""Of training, for SOURCE: with more its order is hardly better (docs/methods/source.md)."""

HALVES = (40, 16, 10)
"""Models of random halves, for stacking; fewer where the budget is shorter. Of ten the order had
.83 to .97 of what can be had on four networks of the benchmark (docs/methods/ensemble.md)."""


BOTH = "SOURCE and the GGN"
"""The name of a row."""

ROUGH = 0.1
"""Relative residual of the GGN's systems where its scores are averaged with others. On the
benchmark's networks their order is that of a residual of 0.01 to within .01 of LDS."""

PRODUCTS, ROUGH_PRODUCTS = 30, 12
"""With the GGN, for a residual of 0.01 and of `ROUGH`: 11 to 75 and 5 to 19 on MLPs with tanh and
ReLU, CNNs and a GPT of two blocks, preconditioned by EK-FAC."""

PRODUCT = 2.0
"""Of such a product, in forward and backward passes for each vector: 0.8 on the MLPs, 1.1 to 2.5 on
the CNNs, whose convolutions take longer to be differentiated twice, 1.5 to 2 on the GPT."""

SINGLE = 3e-8
"""Seconds for each number of the gradients of single examples: 2e-8 to 5e-8 on all of these. On the
MLPs that is 300 passes that sum them, and on the GPT 3."""

DAMPINGS = (0.1, 1.0)
"""Relative, of EK-FAC at the ends of halves. On two networks with batch normalization a second one
adds up to .05 to the LDS, a third or fourth at most .01 (docs/methods/ensemble.md)."""


PER_DIRECTION, MANY, LEAST = 64, 16, 128
"""Where an example has many labels, EK-FAC learns from so many of them for each direction of the
model's widest layer, and from so many examples at least: scores correlate with those from all
examples by .996 or more (decision 0048)."""


def stacked(halves: int) -> Stacked:
    """Each third of each half's training, seen from its end by SOURCE, by layer."""
    methods = tuple(
        Ensemble(SOURCE(SEGMENTS, states=1, segment=k), halves, 0.5) for k in range(SEGMENTS)
    )
    return Stacked(methods, halves, 0.5, seeds=halves)


def ggn_by_cg(damping: Damping, rtol: float = 1e-2) -> Influence:
    """The GGN of a network, solved by conjugate gradients for each query."""
    return Influence(GGN(), CG(rtol=rtol, preconditioner=EKFAC()), damping)


def stacked_ends(halves: int) -> Stacked:
    """The end of each half's training, seen by EK-FAC, by layer."""
    methods = tuple(
        Ensemble(Influence(EKFAC(), damping=Relative(damping)), halves, 0.5) for damping in DAMPINGS
    )
    return Stacked(methods, halves, 0.5, seeds=halves)


@dataclass(frozen=True)
class Facts:
    """What is known before a method is chosen.

    Args:
        parameters: p.
        outputs: Numbers in the model's output for one example.
        examples: n.
        queries: q.
        linear: Whether f is linear in θ.
        convex: Whether ℓ is known to be convex in f.
        curved: Whether ℓ has a second derivative in f that is not 0 everywhere.
        likelihood: Whether labels can be drawn from the model.
        epoch_seconds: A forward and backward pass over the training data.
        slower: A pass with the gradients of single examples, over it: 1 where a layer rule has them
            of many examples at once, and as much as calls cost where they are taken one at a time.
        products_per_second: Multiply-adds of a matrix product in float64.
        memory_bytes: What a matrix may take.
        budget_seconds: What the answer may take.
        recipe: Whether it is known how to train the model again, step by step.
        function: Whether it is known by a function, which says what training ends in and no steps.
        trajectory: Whether the steps of its training are known.
        training_seconds: One training by the recipe.
        half_seconds: The same on half of the data, of as many as train at once; of a function this
            alone is timed.
        layers: Modules with parameters.
        labels: Of an example, each with a loss −log p of classes; None: another kind of loss.
        directions: Of the widest side of a weight; infinite where it is not known how many
            examples come to each, as to experts.
        by_query: Whether a number of each query is asked, rather than one of the whole model.
        refused: Why the recipe cannot train this model; empty where it can.
        resolved: λ = 1/(step size × steps) of its training, below which it resolved no eigenvalue;
            None: not known.
        failed: Names of rows that were tried and could not be used.
    """

    parameters: int
    outputs: int
    examples: int
    queries: int
    linear: bool
    convex: bool
    curved: bool = True
    likelihood: bool = True
    epoch_seconds: float = 0.01
    slower: float = 1.0
    products_per_second: float = 2e10
    memory_bytes: int = 2**32
    budget_seconds: float = PATIENCE
    recipe: bool = False
    function: bool = False
    trajectory: bool = False
    training_seconds: float = 0.0
    half_seconds: float = 0.0
    layers: int = 1
    labels: float | None = None
    directions: float = math.inf
    by_query: bool = True
    refused: str = ""
    resolved: float | None = None
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A method, and when to take it.

    Args:
        name: In words.
        method: The spec.
        applies: To which models and losses, and with what of their training.
        why: A clause for who asks.
        seconds: Expected, roughly: it is held against the budget, and never shown as a promise.
        bytes: Of what is formed in memory at once.
        measured_as: Its name in the standing benchmark, `benchmarks/fidelity.py`; empty: none.
    """

    name: str
    method: Callable[[Facts], Method]
    applies: Callable[[Facts], bool]
    why: str
    seconds: Callable[[Facts], float]
    bytes: Callable[[Facts], float] = lambda f: 0.0
    measured_as: str = ""


@dataclass(frozen=True)
class Choice:
    """A method, and why.

    Args:
        name: Of the row.
        method: The spec.
        why: A clause.
        seconds: Expected, roughly; NaN: not known.
        measured_as: Its name in the standing benchmark.
        bytes: Of what is formed in memory at once, roughly; 0: not known.
    """

    name: str
    method: Method
    why: str
    seconds: float = 0.0
    measured_as: str = ""
    bytes: float = 0.0

    def __str__(self) -> str:
        return f"chose {in_short(self.method)}: {self.why}"


def _dense_seconds(f: Facts) -> float:
    """p² per example, of a linear map or per output; a factorization; a solve per query.

    Gradients of single examples of a network take some hundred times a pass that sums them.
    """
    per_example = f.parameters**2 * (1 if f.linear else f.outputs)
    work = f.examples * per_example + f.parameters**3 / 3 + f.queries * f.parameters**2
    single = 0.0 if f.linear else (300 + 20 * f.outputs) * f.epoch_seconds
    return 0.5 + work / f.products_per_second + single


def _cg_seconds(f: Facts, products: int = PRODUCTS) -> float:
    """So many products with the GGN, but no more than p, for each query and the gradient of J.

    Each comes with EK-FAC's inverse, of at most 4 p^1.5 multiply-adds; and the gradients of single
    examples are written once.
    """
    steps, vectors = min(products, f.parameters), f.queries + 1
    step = PRODUCT * (vectors + 1) * f.epoch_seconds  # what the vectors share is about one more
    step += vectors * 4 * f.parameters**1.5 / f.products_per_second
    return _ekfac_seconds(f) + SINGLE * f.examples * f.parameters + steps * step


def _cg_bytes(f: Facts) -> float:
    """What CG keeps of all queries."""
    return 40.0 * f.parameters * f.queries


def _linear_cg_seconds(f: Facts) -> float:
    """Some 200 products with the Hessian of a linear map for each query, but no more than p."""
    steps = min(200, f.parameters)
    return 1 + 2 * steps * f.examples * f.parameters * f.queries / f.products_per_second


def _ekfac_seconds(f: Facts, passes: float = 8, besides: float = FIRST) -> float:
    """Some passes over the data, and each query's product with each gradient, in float32.

    Within a factor of three of what the tasks of the benchmark took.
    """
    return besides + passes * f.slower * f.epoch_seconds + _products_seconds(f)


def _products_seconds(f: Facts) -> float:
    """Of each query's p numbers with each example's, in float32."""
    return f.queries * f.examples * f.parameters / (2 * f.products_per_second)


def _ekfac(f: Facts) -> EKFAC:
    """From as many examples as are enough; from all where that is more than half of them."""
    if f.labels is None or f.labels < MANY or not math.isfinite(f.directions):
        return EKFAC()
    enough = max(LEAST, math.ceil(PER_DIRECTION * f.directions / f.labels))
    return EKFAC(examples=enough if 2 * enough <= f.examples else None)


def _partial_seconds(f: Facts) -> float:
    """Half of the passes of EK-FAC are those that learn it."""
    part = _ekfac(f).examples
    return _ekfac_seconds(f, 4 + 4 * (1.0 if part is None else part / f.examples))


def _source_seconds(f: Facts) -> float:
    """A fit and a pass for each of two states of each segment, and the run where it is not kept."""
    fits = 2 * SEGMENTS * _ekfac_seconds(f, besides=AGAIN)
    return FIRST + fits + (0.0 if f.trajectory else f.training_seconds)


def _stacked_seconds(f: Facts, halves: int) -> float:
    """The trainings, and a fit and a pass at one state of each segment of each member.

    To take queries through the segments is as much again as their products with the examples: 9.5 s
    beside 10 on an MLP of the benchmark.
    """
    fit = _ekfac_seconds(f, 4, besides=AGAIN)
    return FIRST + halves * (f.half_seconds + SEGMENTS * (fit + _products_seconds(f)))


def _ends_seconds(f: Facts, halves: int) -> float:
    """The trainings, of which the first is made twice, and a fit and passes at the end of each."""
    fit = _ekfac_seconds(f, besides=AGAIN)
    return f.half_seconds + FIRST + halves * (f.half_seconds + fit)


def _stacked_bytes(f: Facts, halves: int, methods: int, kept: int) -> float:
    """A q × n matrix by layer of each method, of a member and of the sum; `kept` · p per half."""
    predictors = (methods + 2) * f.layers * f.queries * f.examples
    return 8.0 * (predictors + halves * kept * f.parameters)


def _matrix(f: Facts) -> float:
    """H in float64, and its factor."""
    return 16.0 * f.parameters**2


def _is_convex(f: Facts) -> bool:
    return f.linear and f.convex and f.curved


def _ggn(f: Facts) -> bool:
    return f.convex and f.curved and not f.linear


def _usual(f: Facts) -> Damping:
    """λ of the GGN where nothing is known of training."""
    # Without classes there is no unit of the loss, so λ follows the curvature.
    return Relative(1.0) if f.labels is None else Absolute(float(f"{LEARNED * f.labels:.2g}"))


def _halves(f: Facts) -> bool:
    """Whether models of halves may be stacked, where it is known how to train them."""
    return f.likelihood and f.by_query and f.budget_seconds > PATIENCE


def _stacked_row(halves: int) -> Row:
    return Row(
        f"stacked over {halves} halves",
        lambda f: stacked(halves),
        lambda f: f.recipe and _halves(f),
        f"the budget allows {halves} trainings on halves of the data, which say how scores combine "
        "and how large they are",
        lambda f: _stacked_seconds(f, halves),
        lambda f: _stacked_bytes(f, halves, SEGMENTS, SEGMENTS),
        f"upweight stacked SOURCE, {halves} halves",
    )


def _ends_row(halves: int) -> Row:
    return Row(
        f"stacked over the ends of {halves} halves",
        lambda f: stacked_ends(halves),
        lambda f: f.function and _halves(f),
        f"the budget allows {halves} trainings on halves of the data by a function, which say how "
        "scores combine and how large they are",
        lambda f: _ends_seconds(f, halves),
        lambda f: _stacked_bytes(f, halves, len(DAMPINGS), 2),
    )


def _with_ggn(row: Row) -> Row:
    """The same stack with the GGN of the model that is asked about as one more method."""

    def method(f: Facts) -> Method:
        plain = row.method(f)
        assert isinstance(plain, Stacked)
        return replace(plain, methods=(*plain.methods, ggn_by_cg(_usual(f), ROUGH)))

    return Row(
        f"{row.name}, beside the GGN",
        method,
        lambda f: row.applies(f) and _ggn(f),
        f"{row.why}; and there is time for products with the GGN of the model",
        lambda f: row.seconds(f) + _cg_seconds(f, ROUGH_PRODUCTS),
        # A predictor of each layer, and what CG keeps.
        lambda f: row.bytes(f) + 8.0 * f.layers * f.queries * f.examples + _cg_bytes(f),
        f"{row.measured_as}, beside the GGN" if row.measured_as else "",
    )


def _rows_of(halves: int) -> tuple[Row, ...]:
    """Stacks over so many, each with the GGN first."""
    plain = (_stacked_row(halves), _ends_row(halves))
    return tuple(each for row in plain for each in (_with_ggn(row), row))


ROWS: tuple[Row, ...] = (
    Row(
        "exact Hessian",
        lambda f: Influence(Hessian(), Cholesky()),
        _is_convex,
        "the model is linear in its parameters and its loss convex, so the Hessian is exact",
        _dense_seconds,
        _matrix,
        "upweight Hessian",
    ),
    Row(
        "exact Hessian, slightly damped",
        lambda f: Influence(Hessian(), Cholesky(), SLIGHT),
        lambda f: _is_convex(f) and "exact Hessian" in f.failed,
        "the model is linear and its loss convex, but its Hessian is singular; so slight a damping "
        "changes no score of a model at its minimum",
        _dense_seconds,
        _matrix,
        "upweight Hessian",
    ),
    Row(
        "exact Hessian by CG",
        lambda f: Influence(Hessian(), CG()),
        _is_convex,
        "the model is linear and its loss convex, so products with its Hessian are exact",
        _linear_cg_seconds,
    ),
    Row(
        "exact Hessian by CG, damped",
        lambda f: Influence(Hessian(), CG(), Relative(1e-3)),
        lambda f: _is_convex(f) and "exact Hessian by CG" in f.failed,
        "the model is linear and its loss convex, but its Hessian is singular, so a thousandth of "
        "its mean eigenvalue is added",
        _linear_cg_seconds,
    ),
    *(row for halves in HALVES for row in _rows_of(halves)),
    Row(
        BOTH,
        lambda f: Averaged((SOURCE(SEGMENTS), ggn_by_cg(_usual(f), ROUGH))),
        lambda f: _ggn(f) and f.likelihood and (f.recipe or f.trajectory),
        "the steps of its training are known, and there is time for products with its GGN: the "
        "mean of what both say ranks about as well as the better of them wherever it was measured",
        lambda f: _source_seconds(f) + _cg_seconds(f, ROUGH_PRODUCTS),
        lambda f: 16.0 * (SEGMENTS * f.parameters + f.queries * f.examples) + _cg_bytes(f),
        "upweight SOURCE and GGN",
    ),
    Row(
        "SOURCE",
        lambda f: SOURCE(SEGMENTS),
        lambda f: f.likelihood and (f.recipe or f.trajectory),
        "the steps of its training are known: by SGD a better order than EK-FAC's on most of the "
        "benchmark, and by Adam one as good or better, with sizes that are too large",
        _source_seconds,
        lambda f: 8.0 * 2 * SEGMENTS * f.parameters,
        "upweight SOURCE, 3 segments",
    ),
    Row(
        "GGN by CG, λ of training",
        lambda f: ggn_by_cg(Absolute(f.resolved or 0.0)),
        lambda f: _ggn(f) and f.likelihood and f.resolved is not None,
        "a network, and what training by SGD is said of it: λ = 1/(step size × steps), below which "
        "that resolves nothing",
        _cg_seconds,
        _cg_bytes,
        "upweight GGN, λ of training",
    ),
    Row(
        "GGN",
        lambda f: Influence(GGN(), Cholesky(), _usual(f)),
        lambda f: _ggn(f) and f.resolved is None,
        "a network with few enough parameters for its GGN as a matrix",
        _dense_seconds,
        _matrix,
        "upweight GGN, usual λ",
    ),
    Row(
        "GGN by CG",
        lambda f: ggn_by_cg(_usual(f)),
        lambda f: _ggn(f) and f.likelihood and f.resolved is None,
        "a network, and time for products with its GGN for each query: a better order than by "
        "layer, and nearer sizes",
        _cg_seconds,
        _cg_bytes,
        "upweight GGN, usual λ",
    ),
    Row(
        "EK-FAC, λ of training",
        lambda f: Influence(_ekfac(f), damping=Absolute(f.resolved or 0.0)),
        lambda f: f.likelihood and f.resolved is not None,
        "a network, and what training by SGD is said of it: λ = 1/(step size × steps)",
        _partial_seconds,
        measured_as="upweight EK-FAC, λ of training",
    ),
    Row(
        "EK-FAC",
        lambda f: Influence(_ekfac(f), damping=USUAL),
        lambda f: f.likelihood,
        "a network: a block of curvature per layer, and one pass over the data for all queries",
        _partial_seconds,
        measured_as="upweight EK-FAC",
    ),
    Row(
        "EK-FAC in expectation",
        lambda f: Influence(EKFAC(Expected()), damping=USUAL),
        lambda f: f.convex and f.curved and f.outputs <= MOST_OUTPUTS,
        "a loss that is convex but of which no labels can be drawn: a pass per output in their "
        "place",
        lambda f: _ekfac_seconds(f, 8 * f.outputs),
    ),
    Row(
        "EK-FAC of the data's labels",
        lambda f: Influence(EKFAC(Observed()), damping=USUAL),
        lambda f: True,
        "a loss of which nothing is known but its gradient, so the curvature is the empirical "
        "Fisher of the data's own labels",
        _ekfac_seconds,
    ),
)
"""In order of preference."""


def choose(facts: Facts) -> Choice:
    """The first row of the table that applies, fits into memory and ends within the budget.

    Raises:
        UnsupportedModel: Every row that applies was tried and failed.
    """
    able = [row for row in ROWS if row.applies(facts) and row.name not in facts.failed]
    if not able:
        raise UnsupportedModel(
            "Some method must be able to solve its systems for this model.",
            f"all of these failed: {', '.join(facts.failed)}.",
            "gradients that are 0 or not finite, or parameters that no example reaches.",
            "look at the losses; or choose by hand, attribute(..., method=Influence(EKFAC(), "
            "damping=...)) with a larger damping.",
        )
    for row in able:
        is_small = row.bytes(facts) <= facts.memory_bytes
        if is_small and row.seconds(facts) <= facts.budget_seconds:
            return _made(row, facts, row.why)
    quickest = min(
        able, key=lambda row: (row.bytes(facts) > facts.memory_bytes, row.seconds(facts))
    )
    late = f"nothing ends within {facts.budget_seconds:.3g} s, and this is the quickest"
    return _made(quickest, facts, f"{quickest.why}; {late}")


def named(name: str, why: str, facts: Facts) -> Choice:
    """The row of that name, whatever the facts allow now: as it was chosen before."""
    return _made(next(row for row in ROWS if row.name == name), replace(facts, failed=()), why)


def alike(choice: Choice) -> tuple[str, ...]:
    """The rows that would fail as one did: what halves do not tell, fewer do not either."""
    if choice.name == BOTH:
        return (BOTH, "SOURCE")
    if not isinstance(choice.method, Stacked):
        return (choice.name,)
    return tuple(row.name for halves in HALVES for row in _rows_of(halves))


def known_as(method: Method) -> str:
    """What the standing benchmark calls a method of the table; empty for others."""
    row = _row_of(method)
    return "" if row is None else row.measured_as


def given(method: Method, facts: Facts) -> Choice:
    """A method that was named: with what the table knows of it, if it is there."""
    row, why = _row_of(method), "it was given"
    if row is None:
        return Choice(type(method).__name__, method, why, math.nan)
    seconds, bytes_ = row.seconds(facts), row.bytes(facts)
    return Choice(row.name, method, why, seconds, row.measured_as, bytes_)


def _row_of(method: Method) -> Row | None:
    lam = getattr(getattr(method, "damping", None), "value", None)
    told = Facts(1, 1, 1, 1, linear=False, convex=True)
    every = (told, replace(told, labels=1.0), replace(told, resolved=lam))
    found = (row for facts in every for row in ROWS if row.method(facts) == method)
    return next(found, None)


def _made(row: Row, facts: Facts, why: str) -> Choice:
    if facts.failed:
        why += f" ({', '.join(facts.failed)}: could not be used)"
    seconds, bytes_ = row.seconds(facts), row.bytes(facts)
    return Choice(row.name, row.method(facts), why, seconds, row.measured_as, bytes_)
