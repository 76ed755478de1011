"""What a fit by layers answers: extremes, groups, shares of layers and tokens; and what it refuses.

Each answer is the same as one made from the whole matrix of scores.
"""

import copy
import functools

import pytest
import torch
from torch import nn

import upweight as uw
from tests.fitted import at
from tests.laws.subjects import assert_same
from tests.market import draw, initialized, labels, problem, tokens
from tests.reference import dense
from upweight.errors import (
    DataError,
    ModelChanged,
    NonDeterministic,
    NonFinite,
    NotDifferentiable,
    NotPositiveDefinite,
    ShapeError,
    SpecError,
)
from upweight.scores import TopScores
from upweight.task.data import Data, as_data

METHOD = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
PROBLEMS = ["softmax", "mlp_tanh", "tied", "dict_batch"]


@functools.cache
def fitted(name, memory=None):
    p = problem(name)
    return METHOD.fit(p.task, p.train, resources=uw.Resources(memory_bytes=memory))


@functools.cache
def scores(name):
    return at(fitted(name), 0).attribute(problem(name).queries)


# -- answers that are made from scores --------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 100])
@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("name", ["mlp_tanh", "tied"])
def test_top_is_the_ends_of_the_sorted_scores(name, memory, k):
    """With one byte of memory a query and an example at a time: extremes are merged."""
    p, values = problem(name), at(fitted(name, memory), 0).attribute(problem(name).queries)
    found = at(fitted(name, memory), 0).attribute(p.queries, into=uw.Top(k))
    assert isinstance(found, TopScores) and len(found) == len(values)
    kept = min(k, p.n)
    ordered = values.values.sort(dim=1, descending=True).values
    torch.testing.assert_close(found.raises_by, ordered[:, :kept], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.lowers_by, ordered.flip(1)[:, :kept], rtol=1e-10, atol=1e-13)
    for places, numbers in ((found.raises, found.raises_by), (found.lowers, found.lowers_by)):
        assert all(len(set(row.tolist())) == kept for row in places)
        there = values.values.gather(1, places)
        torch.testing.assert_close(there, numbers, rtol=1e-10, atol=1e-13)
    assert found.unit is uw.Unit.DERIVATIVE


def test_rankings_are_those_of_scores():
    p = problem("mlp_tanh")
    found, expected = (
        at(fitted("mlp_tanh"), 0).attribute(p.queries, into=uw.Top(6)),
        scores("mlp_tanh"),
    )
    for query in (0, 3):
        for k in (1, 6):
            mine, theirs = found.top(k, query), expected.top(k, query)
            assert (mine.raises, mine.lowers) == (theirs.raises, theirs.lowers)
            assert mine.raises_by == pytest.approx(theirs.raises_by, rel=1e-10)
            assert all(v > 0 for v in mine.raises_by) and all(v < 0 for v in mine.lowers_by)
    for k, query in ((7, 0), (1, 4), (1, -1)):
        with pytest.raises(ShapeError, match=rf"Kept are 6 examples (.|\n)*k={k}, query={query}"):
            found.top(k, query)


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("name", PROBLEMS)
def test_groups_are_those_of_scores(name, memory):
    p = problem(name)
    labels = [f"group {i % 3}" for i in range(p.n)]
    found = at(fitted(name, memory), 0).attribute(p.queries, into=uw.GroupSums(labels))
    method = at(fitted(name, memory), 0).attribute(p.queries)
    expected = method.group(labels)
    assert found.columns == expected.columns == ("group 0", "group 1", "group 2")
    assert_same(found.values, expected.values, 1e-10)
    numbers = at(fitted(name), 0).attribute(p.queries, into=uw.GroupSums(torch.arange(p.n) % 2))
    assert numbers.columns == ("0", "1")


@pytest.mark.parametrize("name", PROBLEMS)
def test_shares_of_layers_add_up(name):
    p, method = problem(name), fitted(name)
    shares = at(method, 0).attribute(p.queries, into=uw.PerLayer())
    assert list(shares) == [block.name for block in method.scorer.curvature.blocks]
    assert_same(sum(s.values for s in shares.values()), scores(name).values, 1e-10)
    m, g = dense.measure_gradients(p.task, p.task.loss, p.queries), dense.gradients(p.task, p.train)
    for block in method.scorer.curvature.blocks:
        index = block.block.index(p.task.layout)
        H = block.eigen.dense() + block.damping * torch.eye(len(index))
        expected = -(m[:, index] @ torch.linalg.solve(H, g[:, index].T)) / p.n
        assert_same(shares[block.name].values, expected, 1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_self_influence_is_the_diagonal(name):
    p = problem(name)
    expected = at(fitted(name), 0).attribute(p.train).values.diagonal()
    assert_same(fitted(name).self_influence(), expected, 1e-10)


# -- tokens -----------------------------------------------------------------------------------


class Sequence(nn.Module):
    """An embedding, two maps of each position and a gain; class of the whole, or of positions."""

    def __init__(self, pooled):
        super().__init__()
        self.pooled = pooled
        self.embedding, self.mix = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 4)

    def forward(self, x):
        h = torch.tanh(self.mix(self.embedding(x)))
        h = self.norm(h + h.cumsum(dim=1))
        return self.head(h.mean(dim=1) if self.pooled else h)


@functools.cache
def sequence(kind):
    g = torch.Generator().manual_seed(4)
    if kind == "tied":
        p = problem("tied")
        return p.task, p.train, p.queries
    loss = uw.CrossEntropy() if kind == "pooled" else uw.CrossEntropy(axis=-1)
    task = uw.Task(initialized(Sequence(kind == "pooled"), g), loss, uw.L2(0.01))
    y, w = (labels(g, n, 4) if kind == "pooled" else tokens(g, n) for n in (7, 3))
    return task, (tokens(g, 7, vocabulary=5), y), (tokens(g, 3, vocabulary=5), w)


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("kind", ["pooled", "per position", "tied"])
def test_shares_of_tokens_and_the_rest_are_the_score(kind, memory):
    task, train, queries = sequence(kind)
    method = METHOD.fit(task, train, resources=uw.Resources(memory_bytes=memory))
    chosen = [4, 0, 6]
    shares, rest = method.attribute(queries, into=uw.PerToken(chosen))
    assert shares.shape == (3, 3, 4) and rest.shape == (3, 3)
    expected = at(method, 0).attribute(queries).values[:, chosen]
    assert_same(shares.sum(dim=2) + rest, expected, 1e-10)
    assert bool((shares != 0).any())
    assert bool((rest != 0).any()) == (kind != "tied")


def test_a_share_of_a_token_is_what_its_position_adds():
    """δ_tᵀ (H + λ)⁻¹∇m a_t, with one weight as θ: against the gradient of one position's loss."""
    task, train, queries = sequence("per position")
    only = uw.Task(task.model, task.loss, params="head.weight")
    method = METHOD.fit(only, train)
    shares, rest = method.attribute(queries, into=uw.PerToken(range(7)))
    assert not bool(rest.any())
    m = dense.measure_gradients(only, task.loss, queries)
    H = method.scorer.curvature.operator().dense() + method.scorer.curvature.blocks[
        0
    ].damping * torch.eye(12)
    for t in range(4):  # the head sees each position alone: others do not count
        y = torch.full_like(train[1], -100)
        y[:, t] = train[1][:, t]
        g = dense.gradients(only, (train[0], y))
        assert_same(shares[:, :, t], -(m @ torch.linalg.solve(H, g.T)) / 7, 1e-9)


@pytest.mark.parametrize("chosen", [[], [7], [-1, 2]])
def test_tokens_of_examples_that_are_not_there_are_refused(chosen):
    task, train, queries = sequence("pooled")
    with pytest.raises(ShapeError, match=r"indices in 0…6"):
        METHOD.fit(task, train).attribute(queries, into=uw.PerToken(chosen))


def test_a_finer_grid_has_no_share_in_the_positions_of_a_coarser():
    """16 positions of the first convolution are not four uses at each of 4 of the second."""
    g = torch.Generator().manual_seed(3)
    layers = [nn.Conv2d(1, 2, 1), nn.AvgPool2d(2), nn.Tanh(), nn.Conv2d(2, 3, 1), nn.Flatten()]
    model = initialized(nn.Sequential(*layers, nn.Linear(12, 3)), g)
    train, queries = ((draw(g, n, 1, 4, 4), labels(g, n, 3)) for n in (7, 3))
    method = METHOD.fit(uw.Task(model, uw.CrossEntropy()), train)
    shares, rest = method.attribute(queries, into=uw.PerToken([2, 5]))
    layer = at(method, 0).attribute(queries, into=uw.PerLayer())
    assert shares.shape == (3, 2, 4)
    assert_same(shares.sum(dim=2), layer["3.weight"].values[:, [2, 5]], 1e-10)
    others = sum(layer[name].values for name in ("0.weight", "5.weight"))
    assert_same(rest, others[:, [2, 5]], 1e-10)


def test_tokens_of_a_model_without_positions_are_refused():
    p = problem("mlp_tanh")
    with pytest.raises(ShapeError, match=r"uses every weight once(.|\n)*PerLayer"):
        fitted("mlp_tanh").attribute(p.queries, into=uw.PerToken([0]))


# -- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, 5000])
@pytest.mark.parametrize("tolerance", [0, 0.01])
def test_several_jobs_give_the_same_scores(memory, tolerance):
    p = problem("tied")
    few = at(fitted("tied", memory), tolerance).attribute(p.queries)
    whole = at(METHOD.fit(p.task, p.train), 0).attribute(p.queries)
    error = (few.values - whole.values).norm(dim=1) / whole.values.norm(dim=1)
    assert float(error.max()) <= 5 * tolerance + 1e-10
    passes = [n for n in few.provenance.notes if "passes over the training data" in n]
    assert (len(passes) == 1) == (memory == 1)
    assert not any("passes over" in n for n in whole.provenance.notes)


def test_a_query_without_a_gradient_scores_zero_whatever_its_company():
    """One query of padding alone, also where memory gives each query a pass of its own."""
    p = problem("padded_sequences")
    x, y = p.queries
    y = y.clone()
    y[1] = -100
    for memory in (None, 1):
        for tolerance in (0, 0.01):
            found = at(fitted("padded_sequences", memory), tolerance).attribute((x, y))
            assert not bool(found.values[1].any())
            assert bool(found.values[[0, 2]].any(dim=1).all())


# -- health -----------------------------------------------------------------------------------


def test_row_sums_exceed_by_the_gradient_that_is_left():
    """Σᵢ S = −∇mᵀ (H + λ)⁻¹ (∇J − ∇R): the excess is |∇mᵀ (H + λ)⁻¹ ∇J|, law 2 off a minimum."""
    p = problem("attention")
    method = METHOD.fit(p.task, p.train)
    health = at(method, 0).attribute(p.queries).provenance.health
    gradient = dense.gradients(p.task, p.train).mean(dim=0) + dense.penalty_gradient(p.task)
    H = method.scorer.curvature.operator().dense()
    for block in method.scorer.curvature.blocks:
        index = block.block.index(p.task.layout)
        H[index, index] += block.damping
    step = torch.linalg.solve(H, gradient)
    m = dense.measure_gradients(p.task, p.task.loss, p.queries)
    excess = (m @ step).abs()
    assert health["row_sum_excess"] == pytest.approx(float(excess.max()), rel=1e-9)
    assert health["row_sum_excess"] > 1e-3
    values = at(method, 0).attribute(p.queries).values
    relative = float((excess / values.abs().sum(dim=1)).max())
    assert health["row_sum_excess_relative"] == pytest.approx(relative, rel=1e-9)
    assert method.stationarity["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert method.stationarity["decrement"] == pytest.approx(float(0.5 * gradient @ step), rel=1e-9)
    trained = at(fitted("mlp_tanh"), 0).attribute(problem("mlp_tanh").queries)
    assert trained.provenance.health["row_sum_excess_relative"] < 1e-10


def test_health_holds_damping_against_the_spectrum():
    method = fitted("mlp_tanh")
    health = scores("mlp_tanh").provenance.health
    values = [block.eigenvalues.flatten() for block in method.scorer.curvature.blocks]
    assert health["mean_eigenvalue"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-9)
    assert list(health["blocks"]) == ["0.weight", "2.weight"]
    for block, own in zip(method.scorer.curvature.blocks, values, strict=True):
        found = health["blocks"][block.name]
        assert found["entries"] == len(own)
        assert found["mean_eigenvalue"] == pytest.approx(float(own.mean()), rel=1e-9)
        assert found["largest_eigenvalue"] == pytest.approx(float(own.max()), rel=1e-9)
        assert found["damping"] == pytest.approx(0.1 * float(own.mean()), rel=1e-9)
        assert found["below_damping"] == pytest.approx(
            float((own < found["damping"]).double().mean())
        )
        assert found["mean_eigenvalue_error"] == 0


def test_scores_that_are_all_zero_are_scores():
    """A perfect fit: every training gradient is zero, while the Fisher and the queries are not."""
    g = torch.Generator().manual_seed(0)
    model = initialized(nn.Linear(3, 2), g)
    x = draw(g, 8, 3)
    with torch.no_grad():
        train = (x, model(x))
    method = METHOD.fit(uw.Task(model, uw.SquaredError()), train)
    for tolerance in (0, 0.01):
        found = at(method, tolerance).attribute((draw(g, 2, 3), draw(g, 2, 2)))
        assert not bool(found.values.any())
        assert found.provenance.health["row_sum_excess"] < 1e-12
        assert found.provenance.health["row_sum_excess_relative"] == 0


# -- a part of the examples -------------------------------------------------------------------


@functools.cache
def many():
    """A population of 600 whose examples differ much in ‖g‖²."""
    g = torch.Generator().manual_seed(9)
    model = initialized(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), g)
    X = draw(g, 600, 4) * (0.5 * draw(g, 600, 1)).exp()
    return uw.Task(model, uw.CrossEntropy()), (X, labels(g, 600, 3))


@pytest.mark.parametrize("which", [uw.labels.Observed(), uw.labels.Expected()], ids=repr)
def test_the_error_of_a_subsample_is_the_spread_over_subsamples(which):
    """Over 200 random orders of the data, of which every sixth example is seen.

    The mean of the stated errors is within 20 % of the standard deviation of the mean eigenvalue,
    whose own standard error is 5 %, and three of four means are within 1.5 errors of the truth.
    """
    task, (X, y) = many()
    whole = uw.Diagonal(which).fit_blocks(task, as_data((X, y)), task.theta()).blocks
    truth = torch.tensor([float(b.eigenvalues.mean()) for b in whole])
    assert all(b.mean_error == 0 for b in whole)
    spec, means, errors = uw.Diagonal(which, examples=100), [], []
    for seed in range(60):
        order = torch.randperm(600, generator=torch.Generator().manual_seed(seed))
        blocks = spec.fit_blocks(task, as_data((X[order], y[order])), task.theta()).blocks
        means.append([float(b.eigenvalues.mean()) for b in blocks])
        errors.append([b.mean_error for b in blocks])
    means, errors = torch.tensor(means), torch.tensor(errors)
    spread = means.std(dim=0) / truth
    assert bool((errors.mean(dim=0) / spread - 1).abs().max() < 0.3)
    within = ((means / truth - 1).abs() < 1.5 * errors).double().mean(dim=0)
    assert bool((within > 0.75).all())


def bounded():
    """A network and 200 examples, of which EKFAC(examples=20) learns from every tenth."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    X = draw(generator, 200, 5)
    y = torch.randint(0, 3, (200,), generator=generator)
    method = uw.Influence(uw.EKFAC(examples=20), damping=uw.Relative(0.1))
    return uw.Task(initialized(model, generator), uw.CrossEntropy()), X, y, method


@pytest.mark.parametrize("ask", ["attribute", "self_influence"])
def test_examples_that_are_not_learned_from_are_checked_when_they_are_scored(ask):
    task, X, y, method = bounded()
    wrong, missing = y.clone(), X.clone()
    wrong[77], missing[77, 0] = 5, torch.nan
    for data, error, words in (
        ((X, wrong), DataError, "targets in 0…2"),
        ((missing, y), NonFinite, "example 77, loss nan, whose inputs"),
    ):
        fitted = method.fit(task, data)
        with pytest.raises(error, match=words):
            fitted.self_influence() if ask == "self_influence" else fitted.attribute((X[:3], y[:3]))


def test_which_examples_are_learned_from_is_said_in_one_place():
    method = uw.EKFAC(examples=20)
    assert method.places(200) == list(range(0, 200, 10))
    assert method.places(20) is None and uw.EKFAC().places(200) is None
    with pytest.raises(DataError, match="at least one example"):
        uw.EKFAC(examples=0).places(200)


def test_scores_do_not_depend_on_which_losses_are_known():
    task, X, y, method = bounded()
    later, before = method.fit(task, (X, y)), method.fit(task, (X, y))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(task.model(X), y, reduction="none")
    torch.testing.assert_close(before.losses, expected)
    assert "of 20 examples" in repr(later) and "of 20 examples" not in repr(before)
    found, other = (fitted.attribute((X[:3], y[:3])) for fitted in (later, before))
    assert found.values.equal(other.values)
    assert found.provenance.health == other.provenance.health
    torch.testing.assert_close(later.losses, expected)
    assert "of 32 examples" not in repr(later)


def test_a_subsample_is_noted_and_its_error_reported():
    task, train = many()
    method = uw.Influence(uw.EKFAC(examples=100), damping=uw.Relative(0.1)).fit(task, train)
    note = "curvature from 100 of 600 training examples, evenly spaced"
    assert note in method.notes
    health = method.attribute((train[0][:2], train[1][:2])).provenance.health
    assert all(0.01 < b["mean_eigenvalue_error"] < 1 for b in health["blocks"].values())
    assert len(method.attribute((train[0][:2], train[1][:2])).values[0]) == 600


def test_a_subsample_is_those_examples():
    task, (X, y) = many()
    part = (
        uw.EKFAC(uw.labels.Observed(), examples=7).fit(task, as_data((X, y)), task.theta()).dense()
    )
    chosen = [0, 85, 171, 257, 342, 428, 514]
    own = (
        uw.EKFAC(uw.labels.Observed())
        .fit(task, as_data((X[chosen], y[chosen])), task.theta())
        .dense()
    )
    torch.testing.assert_close(part, own, rtol=1e-12, atol=1e-12)
    more = uw.EKFAC(uw.labels.Observed(), examples=1000).fit_blocks(
        task, as_data((X, y)), task.theta()
    )
    assert not any("evenly spaced" in note for note in more.notes)
    with pytest.raises(DataError, match="examples=0"):
        uw.EKFAC(examples=0).fit(task, as_data((X, y)), task.theta())


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, 5, float("nan")])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(SpecError, match=f"tolerance={tolerance!r}"):
        uw.Influence(uw.EKFAC(), tolerance=tolerance)


@pytest.mark.parametrize("k", [0, -3])
def test_no_examples_to_keep_are_refused(k):
    with pytest.raises(SpecError, match=rf"k={k}\."):
        fitted("softmax").attribute(problem("softmax").queries, into=uw.Top(k))


def test_labels_of_another_length_are_refused():
    p = problem("softmax")
    with pytest.raises(ShapeError, match=rf"{p.n}\.(.|\n)*{p.n - 1} labels"):
        fitted("softmax").attribute(p.queries, into=uw.GroupSums([0] * (p.n - 1)))


def constant(outputs, targets):
    return 0.0 * outputs.sum(dim=1) + 3.0


@pytest.mark.parametrize("memory", [None, 1])
def test_a_measure_without_a_gradient_is_refused(memory):
    p = problem("softmax")
    with pytest.raises(NotDifferentiable, match=r"gradients of exactly 0 for all 5 queries"):
        fitted("softmax", memory).attribute(p.queries, constant)


def test_an_infinite_loss_is_refused():
    p = problem("softmax")
    X = p.train[0].clone()
    X[5, 0] = torch.nan
    with pytest.raises(NonFinite, match="5"):
        METHOD.fit(p.task, (X, p.train[1]))
    x = p.queries[0].clone()
    x[2] = torch.inf
    with pytest.raises(NonFinite, match="2"):
        fitted("softmax").attribute((x, p.queries[1]))


def test_no_data_are_refused():
    p = problem("softmax")
    with pytest.raises(DataError, match=r"(?i)at least one|empty|no examples"):
        METHOD.fit(p.task, (p.train[0][:0], p.train[1][:0]))
    with pytest.raises(DataError, match=r"(?i)at least one|empty|no examples"):
        fitted("softmax").attribute((p.queries[0][:0], p.queries[1][:0]))


QUESTIONS = {
    "attribute": lambda fitted, queries: fitted.attribute(queries),
    "top": lambda fitted, queries: fitted.attribute(queries, into=uw.Top(1)),
    "by layer": lambda fitted, queries: fitted.attribute(queries, into=uw.PerLayer()),
    "self-influence": lambda fitted, queries: fitted.self_influence(),
    "removal": lambda fitted, queries: fitted.removal(queries, groups=[0]),
    "removal step": lambda fitted, queries: fitted.removal_step([0]),
    "parameters": lambda fitted, queries: fitted.parameter_influence(0),
    "outputs": lambda fitted, queries: fitted.loo_outputs(),
    "stationarity": lambda fitted, queries: fitted.stationarity,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_model_that_moved_is_refused(question):
    p = problem("softmax")
    task = uw.Task(copy.deepcopy(p.task.model), p.task.loss, p.task.penalty)
    method = METHOD.fit(task, p.train)
    task.model.weight.data[0, 0] += 0.25
    with pytest.raises(ModelChanged, match=r"differ by up to 2\.50e-01"):
        QUESTIONS[question](method, p.queries)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spec", [uw.EKFAC(), uw.KFAC()], ids=["EKFAC", "KFAC"])
@pytest.mark.parametrize("kind", ["zero", "sum"])
def test_a_singular_curvature_is_refused_at_once(kind, spec, dtype):
    """An input that is always zero or the sum of others, with no damping and no penalty.

    In the eigenbasis its second moment is rounding squared, 1e-32, and no exact zero: an inverse of
    it would answer with numbers of the order of 1.
    """
    g = torch.Generator().manual_seed(0)
    X = draw(g, 9, 3)
    X[:, 1] = 0.0 if kind == "zero" else X[:, 0] + X[:, 2]
    model = initialized(nn.Linear(3, 2), g).to(dtype)
    train = (X.to(dtype), draw(g, 9, 2).to(dtype))
    task = uw.Task(model, uw.SquaredError())
    with pytest.raises(NotPositiveDefinite, match=r"2 of 8 eigenvalues that are(.|\n)*Relative"):
        uw.Influence(spec).fit(task, train)
    assert uw.Influence(spec, damping=1e-6).fit(task, train).attribute(train).values.shape == (9, 9)


def test_dropout_in_training_mode_is_refused():
    g = torch.Generator().manual_seed(0)
    model = initialized(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)), g)
    train = (draw(g, 9, 3), labels(g, 9, 2))
    model.train()
    with pytest.raises(NonDeterministic, match=r"eval\(\)"):
        METHOD.fit(uw.Task(model, uw.CrossEntropy()), train)
    model.eval()
    assert METHOD.fit(uw.Task(model, uw.CrossEntropy()), train).attribute(train).values.shape == (
        9,
        9,
    )


# -- progress ---------------------------------------------------------------------------------


class Read(Data):
    """Data that count what is read of them."""

    def __init__(self, data):
        self.data, self.examples = data, 0

    def __len__(self):
        return len(self.data)

    def take(self, indices):
        self.examples += len(indices)
        return self.data.take(indices)


def test_every_pass_over_the_data_is_announced(monkeypatch, tmp_path):
    """What is read beside the bars is a few examples to plan, probe and choose with."""
    g = torch.Generator().manual_seed(0)
    n, announced = 3000, {}

    class Bar:
        def __init__(self, desc, **options):
            self.desc = desc

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, count):
            announced[self.desc] = announced.get(self.desc, 0) + count

    monkeypatch.setattr("upweight.runtime.progress.tqdm", Bar)
    monkeypatch.setattr("upweight.runtime.progress._has_bars", lambda: True)
    train = Read(as_data((draw(g, n, 2), labels(g, n, 3))))
    queries = (draw(g, 2, 2), labels(g, 2, 3))
    model = initialized(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), g)
    method = uw.Influence(uw.EKFAC(examples=1500), damping=0.1)
    fitted = method.fit(
        uw.Task(model, uw.CrossEntropy()), train, resources=uw.Resources(folder=tmp_path / "fit")
    )
    fitted.attribute(queries)
    fitted.attribute(queries, into=uw.Top(2))
    fitted.attribute(queries, into=uw.GroupSums([0] * n))
    fitted.attribute(queries, into=uw.PerLayer())
    fitted.attribute(queries, into=uw.Shards(tmp_path / "scores"))
    fitted.self_influence()
    _ = fitted.stationarity
    assert {name for name, count in announced.items() if count >= 1500} == {
        "hashing the data", "curvature, pass 1 of 2", "curvature, pass 2 of 2",
        "checking training data", "scores", "self-influence", "stationarity",
    }  # fmt: skip
    # The second pass reads what the first kept.
    others = ("queries", "checking queries", "curvature, pass 2 of 2")
    of_data = sum(count for name, count in announced.items() if name not in others)
    # Samples of examples are no passes: those that kernels are chosen with, and the first check's.
    assert 0 <= train.examples - of_data < n + 100
