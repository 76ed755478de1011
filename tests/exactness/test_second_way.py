"""Models that `torch.func` cannot run, or not on a batch: the values are those of plain loops."""

import copy
import dataclasses
import functools
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate

import upweight as uw
from tests.fitted import at
from tests.laws.subjects import assert_same
from tests.market import draw, initialized, labels, names, problem
from tests.reference import dense
from upweight.cli.spec import parse
from upweight.errors import DtypeError, UnsupportedModel
from upweight.methods import remainder
from upweight.task.data import as_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

N = 5
DAMPING = 3.0
CURVATURES = {"Hessian": dense.hessian, "GGN": dense.ggn, "EmpiricalFisher": dense.empirical_fisher}
BUILT = {}


def case(without=()):
    """Register a task with its data; `without` are the curvatures that are refused."""

    def register(build):
        BUILT[build.__name__] = (build, frozenset(without))
        return build

    return register


def built(name):
    g = torch.Generator().manual_seed(len(name))
    task, train = BUILT[name][0](g)
    initialized(task.model.eval(), g)
    return task, train


def mlp(*between):
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 2))


# -- operations without a rule ------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(2, 1, batch_first=True), nn.Linear(1, 2)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


@case()
def lstm(g):
    return uw.Task(Recurrent(nn.LSTM), uw.CrossEntropy()), (draw(g, N, 4, 2), labels(g, N, 2))


@case()
def gru(g):
    return uw.Task(Recurrent(nn.GRU), uw.CrossEntropy()), (draw(g, N, 4, 2), labels(g, N, 2))


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(2, 1, batch_first=True), nn.Linear(1, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(torch.cat(tuple(self.body(packed)[1][0]), 1))


@case()
def packed_in_forward(g):
    lengths = torch.randint(1, 5, (N,), generator=g)
    train = (draw(g, N, 4, 2), lengths, labels(g, N, 2))
    return uw.Task(Packing(), uw.CrossEntropy()), train


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 2, batch_first=True)
        self.embed, self.body = nn.Embedding(5, 4), nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        padding = x == 0
        states = self.body(self.embed(x), src_key_padding_mask=padding)
        return self.head(states.masked_fill(padding[..., None], 0).sum(1))


@case()
def padded_encoder(g):
    x = torch.randint(1, 5, (N, 4), generator=g)
    x[::2, 3:] = 0
    return uw.Task(Encoder(), uw.CrossEntropy()), (x, labels(g, N, 2))


class Item(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        z = self.body(x)
        return self.head(torch.tanh(z * 0 if x.abs().max().item() > 1e9 else z))


@case()
def reads_a_number(g):
    return uw.Task(Item(), uw.CrossEntropy()), (draw(g, N, 3), labels(g, N, 2))


class BooleanMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.stack([torch.tanh(self.embed(r[r != 0])).mean(0) for r in x]))


@case()
def boolean_mask(g):
    x = torch.randint(1, 9, (N, 4), generator=g)
    x[::2, 2:] = 0
    return uw.Task(BooleanMask(), uw.CrossEntropy()), (x, labels(g, N, 2))


@case()
def prelu(g):
    return uw.Task(mlp(nn.PReLU()), uw.CrossEntropy()), (draw(g, N, 3), labels(g, N, 2))


@case(without=["Hessian"])
def hardsigmoid(g):
    return uw.Task(mlp(nn.Hardsigmoid()), uw.CrossEntropy()), (draw(g, N, 3), labels(g, N, 2))


@case(without=["Hessian"])
def embedding_bag(g):
    model = nn.Sequential(nn.EmbeddingBag(9, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randint(9, (N, 4), generator=g)
    return uw.Task(model, uw.CrossEntropy()), (x, labels(g, N, 2))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class SquareOnce(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class HalfDifferentiated(torch.autograd.Function):
    """x times the sum of its entries, whose own derivative is left out."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sum(dim=1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].sum(dim=1, keepdim=True)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def through(function):
    def build(g):
        model = mlp(Applied(function))
        return uw.Task(model, uw.CrossEntropy()), (draw(g, N, 3), labels(g, N, 2))

    return build


BUILT["old_function"] = through(Square.apply), frozenset()
BUILT["reversal"] = through(Reversal.apply), frozenset()
BUILT["straight_through"] = through(lambda h: h + (h.round() - h).detach()), frozenset()
BUILT["data_in_forward"] = through(lambda h: h * h.data), frozenset()
BUILT["once_differentiable"] = through(SquareOnce.apply), frozenset(["Hessian"])
BUILT["checkpointed"] = (
    through(lambda h: checkpoint(torch.tanh, h, use_reentrant=False)),
    frozenset(),
)


class Logs(nn.Linear):
    def forward(self, x):
        return F.log_softmax(super().forward(x), -1)


def ctc(outputs, targets):
    b, t = len(outputs), outputs.shape[1]
    lengths = torch.full((b,), t), torch.full((b,), targets.shape[1])
    return F.ctc_loss(outputs.transpose(0, 1), targets, *lengths, reduction="none")


@case(without=["Hessian", "GGN"])
def connectionist(g):
    y = 1 + torch.randint(3, (N, 2), generator=g)
    return uw.Task(Logs(3, 4), ctc), (draw(g, N, 5, 3), y)


# -- examples that are not rows of tensors ------------------------------------------------------


def loader(examples, collate):
    return DataLoader(examples, batch_size=3, collate_fn=collate)


def pairs(g):
    x, y = draw(g, N, 3), labels(g, N, 2)
    return [(x[i], y[i]) for i in range(N)]


def ragged(g):
    x, y = draw(g, N, 4, 3), labels(g, N, 2)
    return [(x[i, : 1 + i % 4], y[i]) for i in range(N)]


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, bags):
        return torch.stack([self.head(torch.tanh(self.body(b)).mean(0)) for b in bags])


@case()
def list_of_bags(g):
    def collate(some):
        return [x for x, _ in some], torch.stack([y for _, y in some])

    return uw.Task(Bags(), uw.CrossEntropy()), loader(ragged(g), collate)


class PackedFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(3, 1), nn.Linear(1, 2)

    def forward(self, x):
        return self.head(self.body(x)[1][0])


@case()
def packed_batches(g):
    def collate(some):
        packed = pack_sequence([x for x, _ in some], enforce_sorted=False)
        return packed, torch.stack([y for _, y in some])

    return uw.Task(PackedFirst(), uw.CrossEntropy()), loader(ragged(g), collate)


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, edges, graph):
        h = torch.tanh(self.body(x))
        h = h.index_add(0, edges[1], h[edges[0]])
        pooled = h.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, h)
        return self.head(pooled)


@case()
def graphs(g):
    def collate(some):
        sizes = [len(x) for x, _ in some]
        starts = [sum(sizes[:k]) for k in range(len(some))]
        edges = [torch.stack([torch.zeros(n).long(), torch.arange(n)]) + s
                 for n, s in zip(sizes, starts, strict=True)]  # fmt: skip
        graph = torch.repeat_interleave(torch.arange(len(some)), torch.tensor(sizes))
        x = torch.cat([x for x, _ in some])
        return x, torch.cat(edges, dim=1), graph, torch.stack([y for _, y in some])

    return uw.Task(Graphs(), uw.CrossEntropy()), loader(ragged(g), collate)


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    y: torch.Tensor


class Named(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def by_field(model, batch):
    return model(batch.x), batch.y


@case()
def dataclasses_of_tensors(g):
    train = loader(pairs(g), lambda some: Fields(*default_collate(some)))
    return uw.Task(mlp(nn.Tanh()), uw.CrossEntropy(), forward=by_field), train


@case()
def named_tuples(g):
    train = loader(pairs(g), lambda some: Named(*default_collate(some)))
    return uw.Task(mlp(nn.Tanh()), uw.CrossEntropy(), forward=by_field), train


@case()
def a_number_first(g):
    train = loader(pairs(g), lambda some: (torch.tensor(0.5).double(), *default_collate(some)))

    def forward(model, batch):
        return batch[0] * model(batch[1]), batch[2]

    return uw.Task(mlp(nn.Tanh()), uw.CrossEntropy(), forward=forward), train


@case()
def string_ids(g):
    """What the ids stand for is looked up in forward: each example must meet its own."""
    y = labels(g, N, 2)
    known = {f"u{i}": row for i, row in enumerate(draw(g, N, 3))}

    def forward(model, batch):
        return model(torch.stack([known[i] for i in batch["id"]])), batch["labels"]

    examples = [{"id": f"u{i}", "labels": y[i]} for i in range(N)]
    return uw.Task(mlp(nn.Tanh()), uw.CrossEntropy(), forward=forward), examples


@case()
def metadata_of_the_batch(g):
    def collate(some):
        x, y = default_collate(some)
        return {"size": len(some), "source": None, "x": x, "labels": y}

    def forward(model, batch):
        assert batch["size"] == len(batch["x"])
        return model(batch["x"]), batch["labels"]

    train = loader(pairs(g), collate)
    return uw.Task(mlp(nn.Tanh()), uw.CrossEntropy(), forward=forward), train


# -- the tests ----------------------------------------------------------------------------------

QUERIES = [1, 2]


@functools.cache
def gradients(name):
    """gᵢ by loops, each with a graph of its own."""
    return dense.gradients(*built(name))


def scores_with(name, H):
    return -(gradients(name)[QUERIES] @ torch.linalg.solve(H, gradients(name).T)) / N


@pytest.mark.parametrize("name", BUILT)
def test_matrices_products_and_scores_are_those_of_loops(name):
    task, train = built(name)
    v = draw(torch.Generator().manual_seed(1), 2, task.layout.size)
    for curvature, reference in CURVATURES.items():
        if curvature in BUILT[name][1]:
            continue
        expected = reference(task, train) + 50.0 * torch.eye(task.layout.size).double()
        method = uw.Influence(getattr(uw, curvature)(), uw.solvers.Cholesky(), damping=50.0)
        fitted = method.fit(task, train)
        assert_same(fitted.scorer.operator.dense(), expected, 1e-10)
        assert_same(fitted.scorer.operator.mv(v), v @ expected, 1e-10)
        found = fitted.attribute(as_data(train).subset(QUERIES)).values
        assert_same(found, scores_with(name, expected), 1e-10)


@pytest.mark.parametrize("name", BUILT)
def test_layerwise_scores_are_those_of_their_own_curvature(name):
    """−(1/n) ∇mᵀ (⊕ (H_l + λ_l))⁻¹ g, with gradients by loops."""
    task, train = built(name)
    fitted = uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=0.1).fit(task, train)
    found = at(fitted, 0).attribute(as_data(train).subset(QUERIES)).values
    H = fitted.scorer.curvature.operator().dense() + 0.1 * torch.eye(task.layout.size).double()
    assert_same(found, scores_with(name, H), 1e-10)


REFUSED = [(n, c) for n, (_, without) in BUILT.items() for c in sorted(without)]


@pytest.mark.parametrize(("name", "curvature"), REFUSED)
def test_what_has_no_second_derivative_is_refused_by_name(name, curvature):
    task, train = built(name)
    with pytest.raises(UnsupportedModel, match=r"(?s)second derivative.*EKFAC\("):
        uw.Influence(getattr(uw, curvature)(), damping=DAMPING).fit(task, train)


def test_gradients_of_no_function_have_no_hessian():
    task, train = through(HalfDifferentiated.apply)(torch.Generator().manual_seed(0))
    initialized(task.model, torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedModel, match="symmetric"):
        uw.Influence(uw.Hessian(), damping=DAMPING).fit(task, train)
    # The way out that it names.
    for spec in (uw.GGN(), uw.EKFAC()):
        fitted = uw.Influence(spec, damping=DAMPING).fit(task, train)
        assert fitted.attribute(train).values.shape == (N, N)


def test_the_choice_is_noted_and_an_own_error_is_not_swallowed():
    task, train = built("old_function")
    notes = uw.Influence(uw.Hessian(), damping=50.0).fit(task, train).attribute(train)
    text = " ".join(notes.provenance.notes)
    assert "double backward, because torch.func cannot run the model" in text
    assert "per-example gradients by layer" in text

    class Fails(nn.Linear):
        calls = 0

        def forward(self, x):
            Fails.calls += 1
            if Fails.calls > 12:
                raise KeyError("a table of the user's")
            return super().forward(x).sigmoid()

    task = uw.Task(Fails(3, 2).double(), uw.CrossEntropy())
    with pytest.raises(KeyError, match="a table of the user's"):
        uw.Influence(uw.Hessian(), damping=50.0).fit(task, built("prelu")[1])


@pytest.mark.parametrize("name", names(without=("linear",)))
def test_models_that_torch_func_can_run_stay_with_it(name):
    p = problem(name)
    for spec in (uw.Hessian(), uw.GGN()):
        assert spec.fit(p.task, as_data(p.train), p.task.theta()).notes == ()


def test_everything_else_goes_the_second_way_too():
    """Removals, self-influence, measures, changed inputs, and training by Newton's method."""
    task, train = built("lstm")
    fitted = uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), damping=50.0).fit(task, train)
    H = dense.hessian(task, train) + 50.0 * torch.eye(task.layout.size).double()
    g = dense.gradients(task, train)
    assert_same(fitted.self_influence(), -(g @ torch.linalg.inv(H) * g).sum(1) / N, 1e-10)

    def squared(outputs, targets):
        return outputs.square().sum(dim=1)

    queries = (train[0][:2], train[1][:2])
    found = fitted.attribute(queries, squared).values
    assert_same(found, dense.scores(task, train, queries, squared, H), 1e-10)
    step = fitted.removal_step([1, 3])
    kept = as_data(train).subset([0, 2, 4])
    less = dense.hessian(task, kept) * 3 / N + 50.0 * torch.eye(task.layout.size).double()
    expected = torch.linalg.solve(less, (g[1] + g[3]) / N)
    assert_same(task.layout.flatten(step), expected, 1e-10)

    moved = (train[0].clone(), train[1])
    direction = draw(torch.Generator().manual_seed(2), 4, 2)
    eps = 1e-5
    slopes = []
    for sign in (1, -1):
        moved[0][0] = train[0][0] + sign * eps * direction
        slopes.append(dense.gradients(task, as_data(moved).subset([0]))[0])
    change = -torch.linalg.solve(H, (slopes[0] - slopes[1]) / (2 * eps)) / N
    found = (fitted.input_influence(0, queries) * direction).sum(dim=(1, 2))
    assert_same(found, dense.gradients(task, queries) @ change, 1e-8)

    strong = uw.Task(task.model, task.loss, uw.L2(3.0))
    theta = uw.training.Newton().prepare(strong, as_data(train)).center
    there = dense.Replica(strong, train, theta)
    value = torch.stack([there.loss(i) for i in range(N)]).mean() + there.penalty()
    assert float(there.gradient(value).norm()) < 1e-9


@pytest.mark.parametrize("name", ["data_in_forward", "old_function"])
def test_a_change_of_an_input_is_that_of_gradients_of_loops(name):
    task, (x, y) = built(name)
    fitted = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=0.5).fit(task, (x, y))
    direction, eps, slopes = draw(torch.Generator().manual_seed(2), 3), 1e-5, []
    for sign in (1, -1):
        moved = x.clone()
        moved[0] += sign * eps * direction
        slopes.append(dense.gradients(task, (moved[:1], y[:1]))[0])
    H = dense.ggn(task, (x, y)) + 0.5 * torch.eye(task.layout.size).double()
    change = -torch.linalg.solve(H, (slopes[0] - slopes[1]) / (2 * eps)) / N
    found = fitted.input_influence(0, (x[:2], y[:2])) @ direction
    assert_same(found, dense.gradients(task, (x[:2], y[:2])) @ change, 1e-8)


def test_a_change_of_an_input_through_what_is_differentiated_once_is_refused():
    task, train = built("once_differentiable")
    fitted = uw.Influence(uw.GGN(), damping=0.5).fit(task, train)
    with pytest.raises(UnsupportedModel, match="once_differentiable"):
        fitted.input_influence(0, train)


def test_what_a_removal_misses_is_told_by_gradients_of_loops(monkeypatch):
    monkeypatch.setattr(remainder, "LIMIT", -1.0)
    task, train = built("packed_in_forward")
    fitted = uw.Influence(uw.GGN(), uw.solvers.Cholesky(), damping=0.5).fit(task, train)
    (note,) = [
        n for n in fitted.removal(train, groups=[[1, 3]]).provenance.notes if "does not end" in n
    ]
    H = dense.ggn(task, train) + 0.5 * torch.eye(task.layout.size).double()
    g = dense.gradients(task, train)
    step, gone = task.layout.flatten(fitted.removal_step([1, 3])), (g[1] + g[3]) / N
    there = dense.Replica(task, train, task.theta() + step)
    after = sum(there.gradient(there.loss(i)) for i in (0, 2, 4)) / N
    left = after - g.mean(dim=0) + 0.5 * step
    length = [(v @ torch.linalg.solve(H, v)).sqrt() for v in (left, gone)]
    assert f"1+3 ({float(length[0] / length[1]):.2g})" in note


@pytest.mark.parametrize("name", ["packed_batches", "dataclasses_of_tensors", "string_ids"])
def test_retraining_and_reports_take_such_batches(name, tmp_path):
    task, train = built(name)
    scores = uw.Influence(uw.EKFAC(), damping=0.1).fit(task, train).attribute(train)

    def init():
        return copy.deepcopy(task.model)

    found = uw.evaluation.loo(scores, uw.Training(init=init, epochs=1), examples=range(3))
    assert "3 removals" in str(found)
    page = tmp_path / "page.html"
    uw.report.html(scores, page, uw.report.Display(train, train))
    assert page.stat().st_size > 0


@pytest.mark.parametrize("bag", [False, True], ids=["embedding", "bag"])
def test_sparse_gradients_are_dense_ones(bag):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(9, (N, 4), generator=g), labels(g, N, 2)
    values = []
    for sparse in (False, True):
        first = (nn.EmbeddingBag if bag else nn.Embedding)(9, 2, sparse=sparse)
        rest = [nn.Tanh()] if bag else [nn.Flatten(), nn.Tanh()]
        model = nn.Sequential(first, *rest, nn.Linear(2 if bag else 8, 2))
        initialized(model, torch.Generator().manual_seed(1))
        task = uw.Task(model, uw.CrossEntropy())
        for spec in (uw.GGN(), uw.EmpiricalFisher(), uw.EKFAC()):
            fitted = uw.Influence(spec, damping=0.5).fit(task, (x, y))
            values.append(fitted.attribute((x[:2], y[:2])).values)
        assert first.sparse is sparse
    for dense_values, sparse_values in zip(values[:3], values[3:], strict=True):
        assert_same(sparse_values, dense_values, 1e-12)


class BySlice(nn.Module):
    """Weight norm by its formula, to compare PyTorch's with."""

    def __init__(self, model, head):
        super().__init__()
        self.g, self.v = nn.Parameter(model[0].clone()), nn.Parameter(model[1].clone())
        self.bias, self.head = nn.Parameter(model[2].clone()), copy.deepcopy(head)

    def forward(self, x):
        weight = self.v * (self.g / self.v.norm(dim=1, keepdim=True))
        return self.head(torch.tanh(F.linear(x, weight, self.bias)))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_hessian_of_weight_norm_is_that_of_its_formula(old):
    """PyTorch's own second derivative takes the norm for a constant."""
    g = torch.Generator().manual_seed(0)
    normed = (nn.utils.weight_norm if old else parametrizations.weight_norm)(nn.Linear(3, 4))
    model = initialized(nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 2)), g)
    parts = (
        (normed.weight_g, normed.weight_v)
        if old
        else (normed.parametrizations.weight.original0, normed.parametrizations.weight.original1)
    )
    formula = BySlice((*parts, normed.bias), model[2])
    train = (draw(g, N, 3), labels(g, N, 2))
    values = []
    for one in (model, formula):
        task = uw.Task(one, uw.CrossEntropy())
        method = uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), damping=50.0)
        values.append(method.fit(task, train).attribute(train).values)
    assert_same(values[0], values[1], 1e-10)


# -- what a message advises ------------------------------------------------------------------------


def advised(error):
    """The curvatures that a way out names."""
    way = str(error.value).partition("Way out:")[2]
    return [parse(word) for word in re.findall(r"\w+\((?:(?:labels=)?Observed\(\))?\)", way)
            if word.startswith(("GGN", "EKFAC", "EmpiricalFisher"))]  # fmt: skip


@pytest.mark.parametrize(
    "curvature",
    [uw.EKFAC(), uw.EKFAC(uw.labels.Expected()), uw.Fisher(), uw.GGN(), uw.Hessian()],
    ids=repr,
)
def test_every_curvature_that_is_advised_for_ctc_runs(curvature):
    task, train = built("connectionist")
    with pytest.raises(UnsupportedModel) as error:
        uw.Influence(curvature, damping=DAMPING).fit(task, train)
    ways = advised(error)
    assert len(ways) == 2
    for way in ways:
        uw.Influence(way, damping=DAMPING).fit(task, train).attribute(train)


def test_a_loss_that_is_no_likelihood_and_has_second_derivatives_may_take_the_ggn():
    def loss(f, y):
        return (f - y).square().square().sum(dim=1)

    g = torch.Generator().manual_seed(0)
    task, train = uw.Task(initialized(mlp(nn.Tanh()), g), loss), (draw(g, N, 3), draw(g, N, 2))
    with pytest.raises(UnsupportedModel) as error:
        uw.Influence(uw.EKFAC(), damping=DAMPING).fit(task, train)
    assert uw.GGN() in advised(error)
    for way in advised(error):
        uw.Influence(way, damping=DAMPING).fit(task, train).attribute(train)


class Autocast(nn.Module):
    """Computes in bfloat16 and returns float32."""

    def __init__(self):
        super().__init__()
        self.inner, self.enabled = mlp(nn.Tanh()), True

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.inner(x).float()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_reduced_precision_in_forward_is_named_where_it_makes_the_hessian_asymmetric():
    g = torch.Generator().manual_seed(0)
    model = initialized(Autocast(), g).float().eval()
    task = uw.Task(model, uw.CrossEntropy())
    train = draw(g, 40, 3).float(), labels(g, 40, 2)
    with pytest.raises(DtypeError, match=r"computes in torch.bfloat16(.|\n)*autocast") as error:
        uw.Influence(uw.Hessian(), damping=DAMPING).fit(task, train)
    assert advised(error) == [uw.GGN(), uw.EKFAC()]
    for curvature in advised(error):
        scores = uw.Influence(curvature, damping=DAMPING).fit(task, train).attribute(train)
        assert any("the model computes in bfloat16" in note for note in scores.provenance.notes)
    model.enabled = False
    scores = uw.Influence(uw.Hessian(), damping=DAMPING).fit(task, train).attribute(train)
    assert not any("bfloat16" in note for note in scores.provenance.notes)
