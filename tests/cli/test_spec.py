"""Text ↔ spec: what is printed is read back, and what cannot be read is pointed at."""

import dataclasses
import inspect

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import upweight as uw
from upweight.cli import spec as grammar
from upweight.cli.spec import REGISTRY, SPECS, parse
from upweight.errors import SpecError
from upweight.task.torch_losses import Rescaled
from upweight.training.schedules import Constant

RESULTS = {
    "Context",
    "Effects",
    "FromFunction",
    "Provenance",
    "Ranking",
    "Scores",
    "Task",
    "TopScores",
}
PYTHON_ONLY = {
    "Coefficient", "Functional", "GroupSums", "Matrix", "PerLayer", "PerToken", "Resources",
    "Shards", "Top",
}  # fmt: skip
"""Public dataclasses that no text can describe: they hold tensors, models or functions."""

positive = st.floats(1e-12, 1e6)
share = st.floats(0, 0.5)
count = st.integers(1, 10_000)
seed = st.integers(0, 2**31)
text = st.text(max_size=5)

labels = st.one_of(
    st.builds(uw.labels.Sampled, count, seed),
    st.builds(uw.labels.Expected, count),
    st.just(uw.labels.Observed()),
)
sharing = st.sampled_from([uw.curvature.Expand(), uw.curvature.Reduce()])
by_layer = st.one_of(
    st.builds(uw.EKFAC, labels, sharing, st.none() | count),
    st.builds(uw.KFAC, labels, sharing, st.none() | count),
    st.builds(uw.Diagonal, labels, st.none() | count),
)
blockwise = st.lists(st.tuples(text, st.just(uw.EKFAC()) | st.just(uw.Diagonal())), min_size=1).map(
    lambda pairs: uw.Blockwise(tuple(pairs))
)
curvature = st.one_of(
    by_layer, blockwise, st.builds(uw.Fisher, count, seed),
    st.sampled_from([uw.Hessian(), uw.GGN(), uw.EmpiricalFisher()]),
)  # fmt: skip
damping = st.one_of(
    st.builds(uw.Absolute, positive), st.builds(uw.Relative, positive), st.just(uw.Evidence())
)
iterative = {"rtol": st.none() | st.floats(1e-12, 0.1), "max_steps": count}
solver = st.one_of(
    st.builds(uw.solvers.Auto, count),
    st.builds(uw.solvers.Cholesky, st.none() | st.floats(1e-12, 0.1)),
    st.builds(uw.solvers.CG, **iterative), st.builds(uw.solvers.BlockCG, **iterative),
    st.builds(uw.solvers.MINRES, **iterative),
)  # fmt: skip
loss = st.one_of(
    st.builds(uw.CrossEntropy, st.integers(-100, 10)), st.builds(uw.SmoothHinge, positive),
    st.sampled_from([uw.SquaredError(), uw.Bernoulli(), uw.Poisson()]),
)  # fmt: skip
schedule = st.one_of(
    st.just(Constant()), st.builds(uw.training.Cosine, share, share),
    st.builds(uw.training.LinearDecay, share, share),
    st.builds(uw.training.Stepwise, st.just((0.25, 0.5)), share),
)  # fmt: skip
betas = st.tuples(share, share)
optimizer = st.one_of(
    st.builds(uw.SGD, positive, share), st.just(uw.SGD(0.1, 0.9, True)),
    st.builds(uw.Adam, positive, betas, positive),
    st.builds(uw.AdamW, positive, betas, positive, share),
)  # fmt: skip
every = st.one_of(
    labels, sharing, curvature, damping, solver, loss, schedule, optimizer,
    st.builds(uw.Weighted, loss),
    st.builds(uw.L2, positive, st.lists(text).map(tuple)), st.just(uw.NoPenalty()),
    st.builds(uw.SumToZero, text, positive),
    st.sampled_from([uw.Loss(), uw.Margin(), uw.LogProb()]),
    st.builds(uw.Logit, st.none() | st.integers(0, 9)),
    st.builds(uw.Influence, curvature, solver, damping | positive),
    st.builds(uw.training.Newton, st.floats(1e-12, 0.1), count, count),
    st.builds(
        uw.Training, st.none(), optimizer, count, count, schedule, seed, st.booleans(), share
    ),
    st.builds(uw.training.PBRF, positive, optimizer, count, count, schedule, seed),
)  # fmt: skip


# The suite's check of annotations draws which entry of a tuple it looks at.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@given(every)
def test_what_is_printed_is_read_back(spec):
    assert parse(repr(spec)) == spec


NEEDED = {
    uw.Absolute: (0.1,), uw.Relative: (0.1,), uw.L2: (0.1,), uw.SumToZero: ("bias",),
    uw.Blockwise: ((("bias", uw.Diagonal()),),), uw.Weighted: (uw.CrossEntropy(),),
    uw.training.PBRF: (0.1,), uw.Ensemble: (uw.Influence(),),
    uw.Stacked: ((uw.GradientDot(), uw.Ensemble(uw.Influence(uw.EKFAC()), at=0.5)),),
    uw.Averaged: ((uw.GradientDot(), uw.SOURCE(3)),),
    uw.DataInf: (uw.Relative(0.1),), uw.BIF: (0.01, 1.0),
    uw.ASTRA: (0.1, uw.KFAC(), 3, None),
    Rescaled: (uw.SquaredError(), 2.0),
}  # fmt: skip
"""Arguments of the specs that have some without a default."""


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_registered_spec_is_read_back(spec):
    made = spec(*NEEDED.get(spec, ()))
    assert parse(repr(made)) == made
    assert parse(repr(made), grammar.kind_of(made)) == made


def test_every_public_spec_can_be_named():
    public = {
        name
        for name in uw.__all__
        if inspect.isclass(getattr(uw, name)) and dataclasses.is_dataclass(getattr(uw, name))
    }
    assert public - RESULTS - PYTHON_ONLY <= set(SPECS)
    assert len(SPECS) == sum(map(len, REGISTRY.values())), "a name twice"


def test_a_spec_may_be_written_as_in_a_script():
    text = "uw.Influence(uw.EKFAC(uw.labels.Observed()), upweight.solvers.CG())"
    assert parse(text) == uw.Influence(uw.EKFAC(uw.labels.Observed()), uw.solvers.CG())
    for other in ("os.Influence()", "uw.training.CG()", "uw.cli.EKFAC()"):
        with pytest.raises(SpecError, match="unknown name"):
            parse(other)


def test_a_name_that_stands_elsewhere_says_where():
    with pytest.raises(AttributeError, match=r"upweight\.solvers\.CG"):
        uw.CG  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute"):
        uw.Nothing  # noqa: B018


def refusal(text):
    try:
        parse(text)
    except SpecError as error:
        return str(error)


@given(st.text(alphabet="aEKFCinflue()=,.'\"[]-01 \n\\é∂", max_size=60) | st.text(max_size=60))
@example("0\r0")  # a line ends there for Python's parser
def test_any_other_text_is_refused_by_a_spec_error(text):
    said = refusal(text)
    assert said is None or "Way out:" in said


def test_a_name_alone_lists_and_negative_numbers_are_read():
    assert parse("Margin") == uw.Margin()
    assert parse("L2(0.1, exclude=['*.bias'])") == uw.L2(0.1, ("*.bias",))
    assert parse("CrossEntropy(-100)") == uw.CrossEntropy(-100)
    assert parse(" Influence(\n EKFAC())  ") == uw.Influence(uw.EKFAC())


@pytest.mark.parametrize(
    "text, under, says",
    [
        ("Influence(EKAFC(), 0.1)", "EKAFC", ["unknown name EKAFC", "EKFAC", "solver: Auto"]),
        (
            "Influence(curvatur=EKFAC())",
            "Influence(curvatur=EKFAC())",
            ["misspelling of curvature"],
        ),
        ("Relative()", "Relative()", ["missing a required argument: 'factor'"]),
        ("Influence(Relative(0.1))", "Relative(0.1)", ["must be Curvature", "a damping"]),
        ("Influence(Influence())", "Influence()", ["must be Curvature", "a method"]),
        ("Influence(EKFAC(), damping='0.1')", "'0.1'", ["must be Damping or float"]),
        ("Sampled(samples=True)", "True", ["must be int"]),
        ("Hessian(1)", "Hessian(1)", ["those of Hessian()", "too many positional"]),
        (
            "Relative(0.1, factor=0.2)",
            "Relative(0.1, factor=0.2)",
            ["multiple values for", "'factor'"],
        ),
        ("Relative(factor=1, factor=2)", "Relative(factor=1, factor=2)", ["given twice"]),
        ("Influence(open('x'))", "open", ["unknown name open"]),
        ("Influence(os.remove('x'))", "os.remove", ["unknown name os.remove", "another library's"]),
        ("Relative(0.1 + 0.1)", "0.1 + 0.1", ["nothing is evaluated"]),
        ("Influence(*[1])", "*[1]", ["nothing is evaluated"]),
        ("0.1", "0.1", ["starts with a name"]),
        ("Influence(**{'a': 1})", "Influence(**{'a': 1})", ["keywords must be strings"]),
        ("L2('é∂', (1,2))", "'é∂'", ["must be float"]),
        ("Relative('é∂', b=1)", "Relative('é∂', b=1)", ["'b'"]),
    ],
)
def test_errors_point_at_the_word(text, under, says):
    with pytest.raises(SpecError) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    place = next(k for k, line in enumerate(lines) if set(line.strip()) == {"^"})
    start = lines[place].index("^")
    assert lines[place - 1][start : start + lines[place].count("^")] == under
    assert all(word in str(caught.value) for word in says)


def test_a_bracket_that_is_missing_is_said_to_be():
    with pytest.raises(SpecError, match="never closed"):
        parse("Influence(EKFAC(), Relative(0.1)")


def test_values_that_a_spec_refuses_are_pointed_at():
    with pytest.raises(SpecError) as caught:
        parse("Influence(EKFAC(), damping=Relative(-1.0))")
    assert "^" * len("Relative(-1.0)") in caught.value.__notes__[0]


def test_another_kind_than_asked_for_is_refused():
    with pytest.raises(SpecError, match=r"must be a method.[\s\S]*EKFAC\(.*, a curvature"):
        parse("EKFAC()", "method")
    assert grammar.kind_of(parse("EKFAC()", "curvature")) == "curvature"
