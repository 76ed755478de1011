"""Law 3, of padded batches: how far an example is padded changes nothing, nor where it is put.

Sequences of several lengths, with padding that no loss counts: as short as it can be, eight
positions longer, and to the longest of each batch, for batches of several sizes. Losses, gradients
and covariances are the same to 1e-12, scores to 1e-10.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw
from tests.gradients.layer_market import gradient_rows
from tests.laws.subjects import assert_same, attributed
from tests.market import Tied, draw, initialized
from upweight.gradients.planning import plan
from upweight.task.data import Data

VOCABULARY, LENGTHS, N = 5, (5, 3, 1, 6, 2, 6, 4), 7


class Conv1D(nn.Module):
    """As transformers has it: y = x W + b with W [i, o]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def per_token(*middle, vocabulary=VOCABULARY, width=3):
    return nn.Sequential(nn.Embedding(vocabulary, width), nn.Tanh(), *middle)


class Causal(nn.Module):
    """Learned positions and one block of causal attention."""

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, 4), nn.Embedding(40, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 4, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x):
        t = x.shape[1]
        mask = torch.full((t, t), -torch.inf).triu(1).to(self.head.weight)
        h = self.token(x) + self.place(torch.arange(t))
        return self.head(self.block(h, src_mask=mask))


class Along(nn.Module):
    """A layer of channels first over the past of each position."""

    def __init__(self, layer, past):
        super().__init__()
        self.embedding, self.layer, self.past = nn.Embedding(VOCABULARY, 2), layer, past
        self.head = nn.Linear(3, VOCABULARY)

    def forward(self, x):
        h = F.pad(self.embedding(x).mT, (self.past, 0))
        return self.head(torch.tanh(self.layer(h)[..., : x.shape[1]].mT))


class Pooled(nn.Module):
    """One answer per sequence: the mean over the positions that are no padding."""

    def __init__(self):
        super().__init__()
        self.body = per_token(nn.Linear(3, 3), nn.Tanh())
        self.head = nn.Linear(3, 2)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].to(self.head.weight)
        h = (self.body(input_ids) * mask).sum(dim=1) / mask.sum(dim=1)
        return self.head(h)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(VOCABULARY, 2), nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, VOCABULARY)

    def forward(self, x):
        return self.head(self.cell(self.embedding(x))[0])


def classes(x, y, mask):
    return x, torch.where(mask, y, -100)


def narrow(x, y, mask):
    """Labels of one byte, padded with 255."""
    return x, torch.where(mask, y, 255).to(torch.uint8)


def probabilities(x, y, mask):
    soft = 0.5 * F.one_hot(y, VOCABULARY) + 0.1
    return x, (soft * mask[..., None]).double()


def weighted(x, y, mask):
    return x, (y, (0.5 + 0.1 * x) * mask)


def squares(x, y, mask):
    found = torch.stack([y.sin(), (y + x).cos()], dim=-1).double()
    return x, (found, mask[..., None].expand_as(found).double())


def pooled(x, y, mask):
    return {"input_ids": x, "attention_mask": mask.long(), "labels": y.sum(dim=1) % 2}


def logits():
    return per_token(nn.Linear(3, VOCABULARY))


def numbers():
    return per_token(nn.Linear(3, 2))


# name: the model, its loss, how examples become a batch
MARKET = {
    "per token": (logits, uw.CrossEntropy(), classes),
    "uint8 labels": (logits, uw.CrossEntropy(ignore_index=255), narrow),
    "class probabilities": (logits, uw.CrossEntropy(), probabilities),
    "weighted positions": (logits, uw.Weighted(uw.CrossEntropy()), weighted),
    "squares": (numbers, uw.Weighted(uw.SquaredError()), squares),
    "Conv1D": (
        lambda: per_token(Conv1D(4, 3), nn.Tanh(), Conv1D(VOCABULARY, 4)),
        uw.CrossEntropy(),
        classes,
    ),
    "tied": (lambda: Tied(VOCABULARY), uw.CrossEntropy(), classes),
    "attention": (Causal, uw.CrossEntropy(), classes),
    "convolution": (lambda: Along(nn.Conv1d(2, 3, 3), 2), uw.CrossEntropy(), classes),
    "transposed convolution": (
        lambda: Along(nn.ConvTranspose1d(2, 3, 3), 0),
        uw.CrossEntropy(),
        classes,
    ),
    "recurrent": (Recurrent, uw.CrossEntropy(), classes),
    "pooled": (Pooled, uw.CrossEntropy(), pooled),
}


@dataclass(frozen=True, eq=False)
class Padded(Data):
    """Sequences, padded to the longest of a batch and by so many positions more.

    Args:
        make: From tokens, targets and which of them count to a batch.
        more: Further positions.
        on_left: Whether they come before.
        to: What a batch is padded to at least.
    """

    make: object
    more: int = 0
    on_left: bool = False
    to: int = 0

    def __len__(self):
        return N

    def take(self, indices):
        t = max(self.to, *(LENGTHS[i] for i in indices)) + self.more
        rows = [self._row(i, t) for i in indices]
        return self.make(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def _row(self, i, t):
        g = torch.Generator().manual_seed(i)
        x, y = (torch.randint(VOCABULARY, (LENGTHS[i],), generator=g) for _ in range(2))
        rest = t - len(x)
        sides = (rest, 0) if self.on_left else (0, rest)
        # Padding looks like a token of its own, as the tokenizers of language models have it.
        return (
            F.pad(x, sides, value=VOCABULARY - 1),
            F.pad(y, sides),
            F.pad(torch.ones_like(x, dtype=torch.bool), sides),
        )


def built(name, dtype=torch.float64):
    model, loss, make = MARKET[name]
    task = uw.Task(initialized(model(), torch.Generator().manual_seed(3)).to(dtype), loss)
    task.model.eval()
    return task, make


# Each position by itself, or by a mean over those that count: padding may come first as well.
FREE = {
    "per token",
    "uint8 labels",
    "class probabilities",
    "weighted positions",
    "squares",
    "Conv1D",
    "pooled",
}


def padded(name, make):
    """The same data, padded otherwise."""
    found = {"shortest": Padded(make), "by eight": Padded(make, 8), "common": Padded(make, to=6)}
    if name not in FREE:
        return found
    return found | {"on the left": Padded(make, 3, on_left=True)}


LABELS = {
    "sampled": uw.labels.Sampled(2, 5),
    "expected": uw.labels.Expected(most=100),
    "observed": uw.labels.Observed(),
}
LAYERED = {"Diagonal, sampled": uw.Diagonal(LABELS["sampled"])}
for which, labels in LABELS.items():
    LAYERED[f"KFAC, {which}"] = uw.KFAC(labels)
    LAYERED[f"KFAC, {which}, reduced"] = uw.KFAC(labels, uw.curvature.Reduce())
    LAYERED[f"EKFAC, {which}"] = uw.EKFAC(labels)
DIRECT = {
    "Hessian": uw.Hessian(),
    "GGN": uw.GGN(),
    "Fisher": uw.Fisher(2, 5),
    "EmpiricalFisher": uw.EmpiricalFisher(),
}


@pytest.mark.filterwarnings("ignore:examples are taken one at a time")
@pytest.mark.parametrize("name", MARKET)
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_losses_and_gradients(name, dtype, rtol):
    task, make = built(name, dtype)
    if make is probabilities and dtype == torch.float32:
        return  # float64 targets
    sets, found = padded(name, make), {}
    made = plan(task, task.theta(), sets["common"])
    for kind, data in sets.items():
        batch = data.take(range(N))
        found[kind] = task.losses(task.theta(), batch), gradient_rows(made, batch)
    for i in (1, 2):
        alone = gradient_rows(made, sets["shortest"].take([i]))
        assert_same(alone, found["common"][1][[i]], rtol)
    for losses, gradients in found.values():
        assert_same(losses, found["common"][0], rtol)
        assert_same(gradients, found["common"][1], rtol)


def layered(name):
    """The methods that are asked of this problem: all of one, and one of kinds of labels or layers.

    EKFAC has its bases from what KFAC learns.
    """
    if name == "pooled":
        return LAYERED
    if name == "Conv1D":
        return "KFAC, sampled", "EKFAC, observed"
    return ("KFAC, sampled",) if MARKET[name][0] in (logits, numbers) else ("EKFAC, sampled",)


@pytest.mark.filterwarnings("ignore:examples are taken one at a time")
@pytest.mark.parametrize("name, method", [(n, m) for n in MARKET for m in layered(n)])
def test_curvatures_by_layer(name, method, monkeypatch):
    task, make = built(name)
    spec = uw.Influence(LAYERED[method], damping=0.1, tolerance=0)
    queries = Padded(make, to=6)
    found = {}
    for kind, data in padded(name, make).items():
        # Each batch is padded to the longest of two, where it is padded no further.
        monkeypatch.setattr(
            "upweight.curvature.layerwise.MOST_EXAMPLES", 2 if kind == "shortest" else N
        )
        fitted = spec.fit(task, data)
        scores = attributed(fitted, queries).values
        found[kind] = fitted.scorer.curvature.operator().dense(), scores
    curvature, scores = found["common"]
    assert bool((scores != 0).any())
    for other_curvature, other_scores in found.values():
        assert_same(other_curvature, curvature, 1e-12 if method.startswith("KFAC") else 1e-10)
        assert_same(other_scores, scores, 1e-10)


@pytest.mark.parametrize("name", ["per token", "squares", "pooled"])
@pytest.mark.parametrize("curvature", DIRECT)
def test_curvatures_written_out(name, curvature, monkeypatch):
    task, make = built(name)
    found = []
    for data in padded(name, make).values():
        # Each example by itself, but where all are padded to one length.
        monkeypatch.setattr("upweight.task.data.WORKING_BYTES", 10**9 if data.to else 1)
        found.append(DIRECT[curvature].fit(task, data, task.theta()).dense())
    for matrix in found[1:]:
        assert_same(matrix, found[0], 1e-12)


@pytest.mark.parametrize("labels", LABELS)
def test_a_transposed_map_is_a_linear_map(labels):
    """GPT-2's Conv1D and nn.Linear of the same numbers give the same scores."""
    found = []
    for kind in (Conv1D, nn.Linear):
        sizes = [(4, 3), (VOCABULARY, 4)]
        maps = [kind(*s) if kind is Conv1D else kind(*reversed(s)) for s in sizes]
        model = per_token(maps[0], nn.Tanh(), maps[1]).double()
        g = torch.Generator().manual_seed(3)
        model[0].weight.data.copy_(draw(g, VOCABULARY, 3))
        for (o, i), layer in zip(sizes, maps, strict=True):
            weight = draw(g, o, i)
            layer.weight.data.copy_(weight.T if kind is Conv1D else weight)
            layer.bias.data.copy_(draw(g, o))
        task = uw.Task(model.eval(), uw.CrossEntropy())
        fitted = uw.Influence(uw.EKFAC(LABELS[labels]), damping=0.1).fit(task, Padded(classes))
        found.append((attributed(fitted, Padded(classes)).values, fitted.self_influence()))
    for ours, linear in zip(*found, strict=True):
        assert_same(ours, linear, 1e-12)


@pytest.mark.filterwarnings("ignore:examples are taken one at a time")
@pytest.mark.parametrize("name", ["per token", "attention", "Conv1D", "convolution", "pooled"])
def test_scores_in_single_precision(name):
    """To 1e-5 of their norm, with drawn labels: rounding is what is left."""
    task, make = built(name, torch.float32)
    spec, queries = uw.Influence(uw.EKFAC(), damping=0.1), Padded(make, to=6)
    sets = padded(name, make)
    found = {kind: attributed(spec.fit(task, data), queries).values for kind, data in sets.items()}
    for scores in found.values():
        assert float((scores - found["common"]).norm() / found["common"].norm()) < 1e-5


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", [uw.KFAC, uw.EKFAC])
def test_images_padded_in_two_directions(labels, kind):
    """One convolution, whose own padding is what an image is padded with."""
    g = torch.Generator().manual_seed(4)
    x, y = draw(g, N, 1, 3, 4), torch.randint(3, (N, 3, 4), generator=g)
    y[1, 2], y[3, :, 3] = -100, -100
    model = initialized(nn.Conv2d(1, 3, 3, padding=1), g).eval()
    found = []
    for right, below in ((0, 0), (2, 0), (2, 2)):
        sides = (0, right, 0, below)
        data = F.pad(x, sides), F.pad(y, sides, value=-100)
        spec = uw.Influence(kind(LABELS[labels]), damping=0.1, tolerance=0)
        fitted = spec.fit(uw.Task(model, uw.CrossEntropy(axis=1)), data)
        found.append((fitted.scorer.curvature.operator().dense(), attributed(fitted, data).values))
    for curvature, scores in found[1:]:
        assert_same(curvature, found[0][0], 1e-10)
        assert_same(scores, found[0][1], 1e-10)
