"""Models in which the rows of a layer are not simply the examples of the batch.

The plan sees a few examples; what it cannot see there must not become a wrong number later.
"""

import warnings

import pytest
import torch
from torch import nn

import upweight as uw
from tests.gradients.layer_market import gradient_rows, rows
from tests.market import draw, initialized, labels
from tests.reference import dense
from upweight.errors import ScalarLoss, UnsupportedModel
from upweight.gradients.passes import GradientPass
from upweight.gradients.planning import plan
from upweight.task.data import as_data

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)


class ExpertPerExample(Three):
    def forward(self, x):
        chosen = x[:, 0] > 0
        out = torch.zeros_like(x)
        out[chosen], out[~chosen] = self.a(x[chosen]), self.b(x[~chosen])
        return self.head(out.tanh())


class ExpertPerToken(Three):
    def forward(self, x):
        flat = x.reshape(-1, 4)
        out = ExpertPerExample.forward(self, flat)
        return out.reshape(*x.shape[:-1], 3).mean(dim=1)


class Rare(Three):
    """A layer that few examples need, and no batch without them runs."""

    def forward(self, x):
        chosen = x[:, 0] > 0.9
        out = x.clone()
        if chosen.any():
            out[chosen] = self.a(x[chosen])
        return self.head(self.b(out).tanh())


class Capacity(Three):
    """Each expert takes two tokens of each example, one of them in another order."""

    def forward(self, x):
        rank = x[..., 0].argsort(dim=1).argsort(dim=1)
        low, high = (rank < 2).flatten().nonzero()[:, 0], (rank >= 2).flatten().nonzero()[:, 0]
        flat = x.reshape(-1, 4)
        low = low[flat[low, 0].argsort()]
        order = torch.cat([low, high]).argsort()
        out = torch.cat([self.a(flat[low]), self.b(flat[high])])[order]
        return self.head(out.reshape(x.shape).tanh().mean(dim=1))


class Sorted(Three):
    """A layer that sees the examples in another order."""

    def forward(self, x):
        order = x[:, 0].argsort()
        hidden = self.a(x[order])[order.argsort()]
        return self.head(self.b(hidden.tanh()))


class Where(Three):
    """Both layers run on everything; what each example uses differs."""

    def forward(self, x):
        return self.head(torch.where(x[:, :1] > 0, self.a(x), self.b(x)).tanh())


class InParts(Three):
    """The batch in parts of at most four: of one part where the plan looks."""

    def forward(self, x):
        return self.head(torch.cat([self.b(self.a(part)) for part in x.split(4)]).tanh())


class TokensInParts(Three):
    """Parts whose tokens could be shared out evenly among the wrong examples."""

    def forward(self, x):
        hidden = torch.cat([self.b(self.a(part)) for part in x.split(10)])
        return self.head(hidden.tanh().mean(dim=1))


class Halves(Three):
    def forward(self, x):
        return self.head(torch.cat([self.b(self.a(half)) for half in x.chunk(2)]).tanh())


class TwiceAfterEachOther(Three):
    """[x, −x] on one axis: all first copies, then all second."""

    def forward(self, x):
        out = self.b(self.a(torch.cat([x, -x])).tanh())
        return self.head(out[: len(x)] - 0.5 * out[len(x) :])


class TwiceSideBySide(Three):
    """The copies of an example beside each other."""

    def forward(self, x):
        both = torch.stack([x, -x], dim=1).reshape(-1, 4)
        out = self.b(self.a(both).tanh()).reshape(-1, 2, 4)
        return self.head(out[:, 0] - 0.5 * out[:, 1])


class OneByOne(Three):
    """Layers called without a batch axis."""

    def forward(self, x):
        return torch.stack([self.head(self.b(self.a(row)).tanh()) for row in x])


class Depth(Three):
    """As many steps as the batch needs, of which an example takes its own number."""

    def forward(self, x):
        steps = 1 + (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        for step in range(int(steps.max())):
            x = torch.where((step < steps)[:, None], self.a(x).tanh(), x)
        return self.head(self.b(x).tanh())


class Unpadded(Three):
    """Padding taken out before a layer, and put back after it."""

    def forward(self, x):
        kept = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[kept] = self.b(self.a(x[kept]))
        return self.head(out.tanh().mean(dim=1))


class Packed(Three):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LSTM(4, 4, batch_first=True), nn.Identity()

    def forward(self, x):
        lengths = 1 + (x[:, 1:, 0] > 0).sum(dim=1)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.a(packed)[1][0][-1])


class InPlace(Three):
    """Outputs of layers written to."""

    def forward(self, x):
        hidden = self.a(x)
        hidden += self.b(x)
        hidden[:, 0] = 0.0
        return self.head(hidden.tanh_())


class Bags(Three):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.EmbeddingBag(7, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.b(self.a((x.abs() * 3).long().clamp(max=6).reshape(len(x), -1))))


VECTORS, SEQUENCES = (20, 4), (20, 4, 4)
MODELS = {
    ExpertPerExample: VECTORS,
    ExpertPerToken: SEQUENCES,
    Rare: VECTORS,
    Capacity: SEQUENCES,
    Sorted: VECTORS,
    Where: VECTORS,
    InParts: VECTORS,
    TokensInParts: SEQUENCES,
    Halves: VECTORS,
    TwiceAfterEachOther: VECTORS,
    TwiceSideBySide: VECTORS,
    OneByOne: VECTORS,
    Depth: VECTORS,
    Unpadded: SEQUENCES,
    Packed: SEQUENCES,
    InPlace: VECTORS,
    Bags: VECTORS,
}


def routed(kind):
    g = torch.Generator().manual_seed(0)
    task = uw.Task(initialized(kind(), g).eval(), uw.CrossEntropy())
    return task, as_data((draw(g, *MODELS[kind]), labels(g, 20, 3)))


# Besides PyTorch's on slow batching: the warning that examples are taken one at a time.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:examples are taken one at a time:UserWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", [20, 8, 3, 1])
def test_no_gradient_is_wrong(kind, size):
    task, data = routed(kind)
    made, expected = plan(task, task.theta(), data), dense.gradients(task, data)
    with GradientPass(made, made.task.theta()) as gradients:
        found = [
            rows(made, gradients.of(task.losses, batch, stop - start))
            for start, stop, batch in data.batches(size)
        ]
    torch.testing.assert_close(torch.cat(found), expected, **EXACT)


@pytest.mark.parametrize("kind", [Where, TwiceSideBySide, Depth, InPlace])
def test_what_keeps_the_order_of_examples_needs_no_detour(kind):
    task, data = routed(kind)
    made = plan(task, task.theta(), data)
    assert not made.by_function
    assert not made.one_by_one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_rows(made, data.batch(0, 20))


ROUTED = [ExpertPerExample, ExpertPerToken, Capacity, Sorted, InParts, TokensInParts,
          TwiceAfterEachOther, Unpadded]  # fmt: skip


@pytest.mark.parametrize("kind", ROUTED)
def test_rows_in_another_order_or_number_tell_whose_they_are(kind):
    """By further backward passes, also where the plan saw them in order: of more than 16 examples
    in two digits."""
    task, data = routed(kind)
    made = plan(task, task.theta(), data)
    assert not made.by_function and not made.one_by_one and not made.notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradient_rows(made, data.batch(0, 20))
    torch.testing.assert_close(found, dense.gradients(task, data), **EXACT)


class OneOfTwo(Three):
    """Of two experts one sees as many rows as could be shared out evenly, the other does not."""

    def forward(self, x):
        flat = x.reshape(-1, 4)
        chosen = flat[:, 0] > 0
        out = torch.zeros_like(flat)
        out[chosen], out[~chosen] = self.a(flat[chosen]), self.b(flat[~chosen])
        return self.head(out.reshape(x.shape).tanh().mean(dim=1))


def test_each_layer_of_a_batch_is_looked_at():
    """Also where one of them tells at once that its rows cannot be shared out evenly."""
    g = torch.Generator().manual_seed(0)
    task = uw.Task(initialized(OneOfTwo(), g).eval(), uw.CrossEntropy())
    # In order where the plan looks; of two examples (1, 1) rows come to the first, then (2, 0).
    X = draw(g, 12, 3, 4)
    counts = torch.tensor([1, 1, 2, 0, 3, 1, 0, 2, 1, 3, 0, 1])
    X[..., 0] = torch.where(torch.arange(3) < counts[:, None], 1.0, -1.0)
    data = as_data((X, labels(g, 12, 3)))
    made, expected = plan(task, task.theta(), data), dense.gradients(task, data)
    with GradientPass(made, task.theta()) as gradients:
        for size in (2, 3, 4, 5):
            for start, stop, batch in data.batches(size):
                found = rows(made, gradients.of(task.losses, batch, stop - start))
                torch.testing.assert_close(found, expected[start:stop], **EXACT)


class Coupled(Three):
    """Rows of a layer that belong to two examples each, in batches that the plan did not see."""

    def forward(self, x):
        return self.head(self.a(x.reshape(-1, 8)[:, :4] if len(x) > 3 else x).tanh()).repeat(
            2 if len(x) > 3 else 1, 1
        )


def test_rows_of_several_examples_are_noticed_and_said():
    task, data = routed(InParts)
    task = uw.Task(initialized(Coupled(), torch.Generator().manual_seed(0)).eval(), task.loss)
    made = plan(task, task.theta(), data)
    with pytest.warns(UserWarning, match="one at a time, because the examples .* separated in a"):
        gradient_rows(made, data.batch(0, 20))


@pytest.mark.filterwarnings("ignore:examples are taken one at a time:UserWarning")
@pytest.mark.parametrize("kind", [InParts, ExpertPerExample])
def test_several_heads_where_examples_are_taken_one_at_a_time(kind):
    task, data = routed(kind)
    made, batch = plan(task, task.theta(), data), data.batch(0, 20)
    scale = torch.arange(1.0, 21.0)

    def head(outputs, targets, extra):
        return extra * task.loss(outputs, targets)

    with GradientPass(made, made.task.theta()) as gradients:
        found = gradients.of_heads(
            batch, len(scale), lambda f, y: [(head, scale), (head, scale**2)]
        )
        first, second = (rows(made, factors) for factors in found)
    expected = dense.gradients(task, data)
    torch.testing.assert_close(first, scale[:, None] * expected, **EXACT)
    torch.testing.assert_close(second, scale[:, None] ** 2 * expected, **EXACT)


class BypassedBySome(Three):
    """Few examples use a layer's weight outside of the layer, and only their batches do."""

    def forward(self, x):
        hidden = self.b(self.a(x))
        chosen = x[:, :1] > 1.5
        if chosen.any():
            hidden = hidden + chosen * (x @ self.a.weight)
        return self.head(hidden.tanh())


def test_a_weight_that_few_examples_use_elsewhere_is_refused_when_they_come():
    g = torch.Generator().manual_seed(0)
    task = uw.Task(initialized(BypassedBySome(), g).eval(), uw.CrossEntropy())
    X = draw(g, 20, 4).clamp(max=1.0)
    X[7, 0] = 2.0
    data = as_data((X, labels(g, 20, 3)))
    made, expected = plan(task, task.theta(), data), dense.gradients(task, data)
    torch.testing.assert_close(gradient_rows(made, data.batch(0, 5)), expected[:5], **EXACT)
    with pytest.raises(
        UnsupportedModel, match=r"a.weight, which something else uses(.|\n)*params="
    ):
        gradient_rows(made, data.batch(5, 10))


def test_a_measure_that_reads_parameters_is_refused():
    task, data = routed(Where)
    made = plan(task, task.theta(), data)

    def measure(params, batch):
        return task.losses(params, batch) + params["a.weight"].square().sum()

    with pytest.raises(UnsupportedModel, match=r"a.weight(.|\n)*through the model's outputs"):
        gradient_rows(made, data.batch(0, 5), measure)


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda x: x[:3]])
def test_one_value_per_example_is_required(reduce):
    task, data = routed(Where)
    made = plan(task, task.theta(), data)
    with pytest.raises(ScalarLoss, match=r"shape \(5,\)(.|\n)*Given: shape \((3,)?\)"):
        gradient_rows(made, data.batch(0, 5), lambda p, b: reduce(task.losses(p, b)))
