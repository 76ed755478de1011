"""What changes between fit and question is refused by name: the model, its objective, its data."""

import copy
import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from upweight import EKFAC, GGN, L2, CrossEntropy, Influence, Shards, Task
from upweight.errors import DataChanged, ModelChanged
from upweight.runtime.fingerprint import checksum, digest, item_checksum, row_checksums
from upweight.solvers import Cholesky
from upweight.task.data import as_data

N = 12
METHODS = {
    "by layer": Influence(EKFAC(), damping=0.1),
    "whole": Influence(GGN(), damping=0.1),
}
BOTH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Scaled(nn.Module):
    """A layer with what only a layer of one's own has, and that notes down what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.act = torch.tanh
        self.scale, self.shift, self.calls = torch.ones(4), [0.0, 1.0], 0
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        return self.act(x) * self.scale + self.shift[0]


class Examples(Dataset[Any]):
    """Rows of two arrays, as a data set."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        self.X, self.y, self.n = X, y, len(X)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": self.X[index % N].numpy(), "y": int(self.y[index % N])}


def model() -> nn.Sequential:
    """A frozen body with statistics and two activations, and a trained head."""
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LeakyReLU(), Scaled(), nn.Linear(4, 2)
    net = nn.Sequential(*layers).eval()
    net[0].weight.requires_grad_(False)
    return net


def arrays(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3), torch.arange(n) % 2


def fitted(method: Influence, net: nn.Module, data: Any, **options: Any) -> Any:
    return method.fit(Task(net, CrossEntropy(), L2(0.1), **options), data)


def questions(of: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every verb that a fitted method has, asked of two queries."""
    queries = arrays(2)
    first = {
        "attribute": (queries,),
        "removal": (queries,),
        "self_influence": (),
        "parameter_influence": (0,),
        "removal_step": ([0, 1],),
        "input_influence": (0, queries),
        "relabel_influence": (0, 1, queries),
        "top": (queries, 1),
        "group": (queries, ["a"] * N),
        "by_layer": (queries,),
    }
    for name, arguments in first.items():
        if hasattr(of, name):
            yield name, functools.partial(getattr(of, name), *arguments)


def set_slope(net: nn.Sequential) -> None:
    net[2].negative_slope = 0.2


def set_mean(net: nn.Sequential) -> None:
    net[1].running_mean += 1


def set_frozen(net: nn.Sequential) -> None:
    net[0].weight.data.mul_(3)


def permute_frozen(net: nn.Sequential) -> None:
    net[0].weight.data = net[0].weight.data.flip(0)


def set_function(net: nn.Sequential) -> None:
    net[3].act = torch.sigmoid


def set_plain_tensor(net: nn.Sequential) -> None:
    net[3].scale[1] = 2.0


def set_list(net: nn.Sequential) -> None:
    net[3].shift[0] = 0.5


def replace_layer(net: nn.Sequential) -> None:
    net[2] = nn.ReLU().eval()


def add_hook(net: nn.Sequential) -> None:
    net[2].register_forward_hook(lambda _, __, out: 2 * out)


def train_mode(net: nn.Sequential) -> None:
    net.train()


CHANGES = {
    set_slope: "attribute 2.negative_slope 0.01 → 0.2",
    set_mean: "buffer 1.running_mean",
    set_frozen: "frozen parameter 0.weight",
    permute_frozen: "frozen parameter 0.weight",
    set_function: "attribute 3.act",
    set_plain_tensor: "attribute 3.scale",
    set_list: "attribute 3.shift",
    replace_layer: "module 2 LeakyReLU → ReLU",
    add_hook: "hooks of 2",
    train_mode: r"model.train\(\) was called",
}


@BOTH
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_of_the_model_is_named(method: Influence, change: Any) -> None:
    net = model()
    of = fitted(method, net, arrays(), params=("0.bias", "4.*"))
    change(net)
    with pytest.raises(ModelChanged, match=CHANGES[change]):
        of.attribute(arrays(2))


@BOTH
def test_every_verb_asks_whether_the_model_is_the_same(method: Influence) -> None:
    net = model()
    of = fitted(method, net, arrays(), params="4.*")
    assert len([ask() for _, ask in questions(of)]) >= 5
    set_slope(net)
    for _, ask in questions(of):
        with pytest.raises(ModelChanged, match="negative_slope"):
            ask()


@BOTH
def test_the_ways_out_work(method: Influence) -> None:
    net, data, queries = model(), arrays(), arrays(2)
    of = fitted(method, net, data, params="4.*")
    copied = fitted(method, copy.deepcopy(net), data, params="4.*")
    expected = of.attribute(queries).values
    set_slope(net)
    torch.testing.assert_close(copied.attribute(queries).values, expected)
    again = fitted(method, net, data, params="4.*").attribute(queries).values
    assert not torch.allclose(again, expected)
    net[2].negative_slope = 0.01
    torch.testing.assert_close(of.attribute(queries).values, expected)


@BOTH
def test_what_forward_writes_is_no_change(method: Influence) -> None:
    """Counters and outputs kept on a layer come back as lent; a new name means nothing."""
    net, queries = model(), arrays(2)
    of = fitted(method, net, arrays(), params="4.*")
    calls = net[3].calls
    expected = of.attribute(queries).values
    net.name = "the best so far"  # type: ignore[assignment]
    assert net[3].calls == calls
    torch.testing.assert_close(of.attribute(queries).values, expected)


class Noting(nn.Module):
    """A layer that keeps what it did: counters, its last output, caches in every place."""

    last: Tensor
    lazy: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.size, self.by_size = 0, 0, {}  # type: ignore[var-annotated]
        self.register_buffer("lazy", torch.ones(0), persistent=False)
        self.register_buffer("seen", torch.zeros(()))
        self.last = torch.zeros(())
        self.info = Settings()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.size = len(x)
        self.info.calls += 1
        self.seen += 1
        if len(x) > len(self.lazy):
            self.lazy = torch.ones(len(x))
        self.by_size[len(x)] = torch.ones(len(x))
        self.last = x.detach()
        return x * self.lazy[: len(x), None]


class Settings:
    def __init__(self) -> None:
        self.calls, self.t, self.inner = 0, 1.0, types.SimpleNamespace(t=[1.0])
        self.itself = self


@dataclasses.dataclass
class Options:
    t: float = 1.0
    inner: Any = dataclasses.field(default_factory=Settings)


class Set(nn.Module):
    """A layer with its settings in objects."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg, self.options, self.many = Settings(), Options(), [Settings(), {"a": Options()}]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cfg.t * self.options.t


@BOTH
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
def test_calls_of_the_model_between_fit_and_question_are_no_change(
    method: Influence, called: bool
) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        normed = nn.utils.weight_norm(nn.Linear(3, 4))
    net = nn.Sequential(normed, nn.Tanh(), Noting(), nn.Linear(4, 2)).eval()
    data, queries = arrays(), arrays(2)
    if called:
        net(data[0])
    of = fitted(method, net, data, params="3.*")
    expected = of.attribute(queries).values
    for n in (1, 5, 9):
        net(torch.randn(n, 3))
    assert of.attribute(queries).values.equal(expected)
    normed.weight_v.data *= torch.tensor([1.0, 2.0, 3.0])  # what the weight is computed from
    with pytest.raises(ModelChanged, match="weight_v"):
        of.attribute(queries)


@BOTH
def test_a_hook_is_named_as_the_cause_and_its_way_out_works(method: Influence) -> None:
    net, queries = model(), arrays(2)
    of = fitted(method, net, arrays(), params="4.*")
    expected = of.attribute(queries).values
    handle = net[2].register_forward_hook(lambda _, __, out: 2 * out)
    with pytest.raises(ModelChanged) as raised:
        of.attribute(queries)
    assert "a hook was registered or removed after fit." in str(raised.value)
    assert "handle.remove()" in str(raised.value) and "training" not in str(raised.value)
    handle.remove()
    assert of.attribute(queries).values.equal(expected)


@BOTH
def test_another_dtype_is_named(method: Influence) -> None:
    net = model().double()
    of = fitted(method, net, (arrays()[0].double(), arrays()[1]), params="4.*")
    net.float()
    with pytest.raises(ModelChanged, match=r"parameters of torch.float32, fitted as torch.float64"):
        of.attribute(arrays(2))


SETTINGS: dict[str, Callable[[Any], object]] = {
    r"attribute 1.cfg.t 1.0 → 2.0": lambda s: setattr(s.cfg, "t", 2.0),
    r"attribute 1.cfg.inner.t list\(1.0\) → list\(2.0\)": lambda s: s.cfg.inner.t.__setitem__(
        0, 2.0
    ),
    r"attribute 1.options.t 1.0 → 2.0": lambda s: setattr(s.options, "t", 2.0),
    r"attribute 1.options.inner.t 1.0 → 2.0": lambda s: setattr(s.options.inner, "t", 2.0),
    r"attribute 1.many\[0\].t 1.0 → 2.0": lambda s: setattr(s.many[0], "t", 2.0),
    r"attribute 1.many\[1\]\['a'\].t 1.0 → 2.0": lambda s: setattr(s.many[1]["a"], "t", 2.0),
}


@BOTH
@pytest.mark.parametrize("words", SETTINGS)
def test_settings_kept_in_an_object_are_compared(method: Influence, words: str) -> None:
    net, queries = nn.Sequential(nn.Linear(3, 4), Set(), nn.Linear(4, 2)), arrays(2)
    of = fitted(method, net.eval(), arrays(), params="2.*")
    of.attribute(queries)
    SETTINGS[words](net[1])
    with pytest.raises(ModelChanged, match=words):
        of.attribute(queries)


class Tuned:
    """A loss that says nothing but its address, and has a part that does not show."""

    def __init__(self) -> None:
        self.weight = torch.ones(2)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, self.weight, reduction="none")


class Module(Tuned, nn.Module):
    """A loss whose parts show."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("weight", torch.ones(2))

    forward = Tuned.__call__
    __call__ = nn.Module.__call__


@pytest.mark.parametrize("of_loss", [Module(), Tuned()], ids=["module", "object"])
def test_losses_are_compared_as_far_as_they_say_what_they_are(of_loss: Any) -> None:
    task = Task(model(), of_loss, params="4.*")
    of, queries = Influence(GGN(), damping=0.1).fit(task, arrays()), arrays(2)
    of.attribute(queries)
    if isinstance(of_loss, nn.Module):
        of_loss.weight[0] = 3.0
        with pytest.raises(ModelChanged, match="loss: buffer weight"):
            of.attribute(queries)


def test_a_loss_of_torch_is_copied_and_does_not_change_with_the_original() -> None:
    of_loss = nn.CrossEntropyLoss(torch.ones(2), reduction="none")
    of = Influence(GGN(), damping=0.1).fit(Task(model(), of_loss, params="4.*"), arrays())
    queries = arrays(2)
    before = of.attribute(queries).values
    of_loss.weight[0] = 3.0
    assert torch.equal(of.attribute(queries).values, before)


@BOTH
@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("part", [0, 1])
def test_data_changed_in_place_are_named(method: Influence, as_dataset: bool, part: int) -> None:
    X, y = arrays()
    of = fitted(method, model(), Examples(X, y) if as_dataset else (X, y), params="4.*")
    queries = arrays(2)
    of.attribute(queries)
    if part == 0:
        X[5] *= 1.5
    else:
        y[5] = 1 - y[5]
    with pytest.raises(DataChanged, match="training example 5 is another"):
        of.attribute(queries)
    with pytest.raises(DataChanged, match="training example 5 is another"):
        of.self_influence()


def test_a_residual_that_changed_data_leave_is_not_blamed_on_rounding() -> None:
    """A factorization solves for the data of fit, and its residual is of those of now."""
    X, y = arrays()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    of = fitted(Influence(GGN(), Cholesky(), damping=1.0), net, (X, y))
    X.mul_(3)
    with pytest.raises(DataChanged, match="training example 0 is another, and so are 11 more"):
        of.attribute(arrays(2))


@BOTH
def test_arrays_that_share_memory_with_numpy_are_watched(method: Influence) -> None:
    X, y = (a.numpy() for a in arrays())
    of = fitted(method, model(), (X, y), params="4.*")
    X[0, 0] = np.nextafter(X[0, 0], 9.0)  # the last bit
    with pytest.raises(DataChanged, match="training example 0 is another"):
        of.attribute(arrays(2))


@BOTH
def test_two_labels_that_are_swapped_are_noticed_where_no_loss_moves(method: Influence) -> None:
    """Equal inputs with swapped labels leave the set of losses, and J, as they were."""
    X, y = arrays()
    X[1] = X[0]
    of = fitted(method, model(), (X, y), params="4.*")
    y[[0, 1]] = y[[1, 0]]
    with pytest.raises(DataChanged, match=r"training example [01] is another"):
        of.attribute(arrays(2))


@BOTH
def test_a_data_set_that_grew_is_refused(method: Influence) -> None:
    data = Examples(*arrays())
    of = fitted(method, model(), data, params="4.*")
    data.n += 3
    with pytest.raises(DataChanged, match=r"the 12 examples(.|\n)*Given: 15"):
        of.attribute(arrays(2))


def test_finished_scores_on_disk_are_not_taken_for_a_changed_model(tmp_path: Path) -> None:
    net = model()
    of = fitted(METHODS["by layer"], net, arrays(), params="4.*")
    queries = arrays(2)
    of.attribute(queries, into=Shards(tmp_path))
    set_slope(net)
    with pytest.raises(ModelChanged, match="negative_slope"):
        of.attribute(queries, into=Shards(tmp_path))


def test_padding_by_batch_is_no_change() -> None:
    """A collate function may pad an example otherwise in each batch."""
    items = [(torch.ones(1 + i % 3), torch.tensor(i % 2)) for i in range(6)]

    def pad(some: list[Any]) -> tuple[Tensor, Tensor]:
        rows = nn.utils.rnn.pad_sequence([x for x, _ in some], batch_first=True)
        return rows, torch.stack([y for _, y in some])

    data = as_data(torch.utils.data.DataLoader(items, collate_fn=pad)).watched()  # type: ignore[arg-type]
    assert data.take([0, 1])[0].shape == (2, 2)
    assert data.take([0, 2])[0].shape == (2, 3)
    items[0][0][0] = 2.0
    with pytest.raises(DataChanged, match="training example 0"):
        data.take([0, 2])


def test_watching_leaves_the_users_data_alone() -> None:
    data = as_data(arrays())
    watched = data.watched()
    assert type(watched) is type(data) and data.seen is None and watched.seen is not None
    assert watched.subset([1, 2]).take([0])[0].equal(data.take([1])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (1, 70_000)])
def test_checksums_see_any_change_and_no_copy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (10 * torch.randn(shape)).to(dtype)
    flat = x.reshape(-1)
    other = x.clone().reshape(-1)
    other[2] += 1
    swapped = flat.clone()
    swapped[[0, 1]] = torch.tensor([7, 9]).to(dtype)
    twice = swapped.clone()
    twice[[0, 1]] = swapped[[1, 0]]
    assert checksum(x) == checksum(x.clone())
    assert checksum(x) != checksum(other.reshape(shape))
    assert checksum(swapped) != checksum(twice)
    # Whatever the place in memory that a row is read from.
    rows = x.reshape(x.shape[0], -1)
    assert row_checksums(rows[1:]).equal(row_checksums(rows)[1:])
    assert row_checksums(rows.mT.contiguous().mT).equal(row_checksums(rows))


def test_items_of_any_nesting_have_checksums() -> None:
    def item() -> Any:
        return {"x": np.arange(3), "t": "text", "n": [1, None, torch.tensor(2.0)], "b": True}

    assert item_checksum(item()) == item_checksum(item())
    for key, value in (("x", np.arange(1, 4)), ("t", "texts"), ("n", [2, None, 0]), ("b", False)):
        assert item_checksum(item() | {key: value}) != item_checksum(item())


def test_tensors_of_any_layout_have_checksums() -> None:
    one = torch.zeros(()).expand(1)
    for x in (one, one.expand(3, 1), torch.zeros(2, 0), torch.zeros(0), torch.ones(3, 2).mT):
        assert checksum(x) == checksum(x.clone(memory_format=torch.contiguous_format))
        assert row_checksums(x).shape == (len(x),)
        assert digest(x) == digest(x.clone(memory_format=torch.contiguous_format))
    assert checksum(torch.ones(2, dtype=torch.complex128)) != checksum(1j * torch.ones(2))
    assert item_checksum(torch.ones(2).bfloat16()) != item_checksum(torch.zeros(2).bfloat16())


class Positions(nn.Module):
    """Adds numbers by position from a cache that is made as long as the longest input so far.

    Args:
        scales: Whether a longer cache changes what is added to a shorter input.
    """

    cached: Tensor

    def __init__(self, scales: bool = False) -> None:
        super().__init__()
        self.register_buffer("cached", torch.zeros(1, 0), persistent=False)
        self.plain, self.longest, self.scales = torch.zeros(0, 0), 0, scales
        self.by_length: dict[int, Tensor] = {}
        self.lengths: list[int] = []
        self.objects: dict[int, Any] = {}
        self.lazy: Any = None

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        if t > self.longest:
            self.longest = t
            self.cached = torch.arange(t)[None] / 10.0
            self.plain = torch.ones(t, t)
        if t not in self.by_length:
            self.by_length[t] = torch.ones(t)
            self.objects[t] = [Settings()]
            self.lengths.append(t)
        if t > 5 and self.lazy is None:
            self.lazy = torch.ones(1)
        factor = self.longest if self.scales else 1.0
        added = self.cached[:, :t] * factor * self.by_length[t] * self.plain[:t, 0]
        return torch.stack([x.sum(dim=1), (x * added).sum(dim=1)], dim=1)


def reading(scales: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(Positions(scales), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    net(torch.ones(1, 5))  # what was called before fit, as training does
    return net


def sequences(n: int, t: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, t), torch.arange(n) % 2


@BOTH
def test_a_cache_that_grew_with_a_longer_input_is_noted(method: Influence) -> None:
    """The model was called before fit, so that none of its passes shows that forward writes."""
    net, queries = reading(), sequences(2, 5)
    of = fitted(method, net, sequences(N, 5), params=("1.*", "3.*"))
    expected = of.attribute(queries)
    assert not any("grew" in note for note in expected.provenance.notes)
    net(torch.ones(1, 9))
    for _ in range(2):
        scores = of.attribute(queries)
        assert scores.values.equal(expected.values)
        assert (
            sum("buffer 0.cached" in n and "grew after fit" in n for n in scores.provenance.notes)
            == 1
        )
    assert of.attribute(sequences(2, 9)).values.isfinite().all()
    net[0].cached[0, 1] += 1
    with pytest.raises(ModelChanged, match=r"buffer 0.cached changed"):
        of.attribute(queries)


@BOTH
def test_a_cache_that_grew_and_moved_the_losses_is_refused(method: Influence) -> None:
    net = reading(scales=True)
    of = fitted(method, net, sequences(N, 5), params=("1.*", "3.*"))
    net(torch.ones(1, 9))
    with pytest.raises(ModelChanged, match=r"attribute 0.longest 5 → 9"):
        of.attribute(sequences(2, 5))


NO_GROWTH: dict[str, tuple[Any, Any]] = {
    "other numbers": (torch.ones(1, 5), 2 * torch.ones(1, 9)),
    "shorter": (torch.ones(2, 3), torch.ones(2, 2)),
    "another rank": (torch.ones(2), torch.ones(2, 2)),
    "another dtype": (torch.ones(2), torch.ones(3).half()),
    "less": (3, 2),
    "another entry": ({5: torch.ones(5)}, {5: 2 * torch.ones(5), 9: torch.ones(9)}),
    "another last entry": ([1, 5], [1, 59]),
    "gone": (torch.ones(3), None),
}


@BOTH
@pytest.mark.parametrize("part", NO_GROWTH)
def test_what_is_no_growth_is_refused_where_no_loss_moves(method: Influence, part: str) -> None:
    net = reading()
    before, after = NO_GROWTH[part]
    net[0].unused = before
    of = fitted(method, net, sequences(N, 5), params=("1.*", "3.*"))
    net[0].unused = after
    with pytest.raises(ModelChanged, match=r"attribute 0.unused"):
        of.attribute(sequences(2, 5))


SCALE, TABLE, ACT, COUNT = 1.0, torch.ones(2), torch.tanh, 0
PAIR = (1.0, "tanh")


def helper(x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return x * TABLE[0]


class Chosen:
    """Settings in a class."""

    factor = 1.0


class Named(nn.Module):
    """A layer that reads globals, settings of classes, and a closure through its forward."""

    shift = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(helper(x)) + self.shift + PAIR[0] * Chosen.factor

    def scaled(self, x: Tensor) -> Tensor:
        return ACT(torch.stack([SCALE * part for part in x]))


HERE, THIS = __name__, sys.modules[__name__]
NAMES: dict[str, tuple[Any, str, Any]] = {
    f"global {HERE}.SCALE 1.0 → 2.0": (None, "SCALE", 2.0),
    f"global {HERE}.TABLE changed": (None, "TABLE", torch.tensor([2.0, 1.0])),
    f"global {HERE}.ACT changed": (None, "ACT", torch.sigmoid),
    rf"global {HERE}.PAIR tuple\(1.0, 'tanh'\) → tuple\(2.0, 'tan": (None, "PAIR", (2.0, "tanh")),
    r"global Named.shift 0.0 → 1.0": (Named, "shift", 1.0),
    r"global Chosen.factor 1.0 → 3": (Chosen, "factor", 3),
    rf"global {HERE}.helper\(\) changed": (None, "helper", lambda x: x),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("words", NAMES)
def test_globals_that_forward_reads_are_compared(
    method: Influence, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, value = NAMES[words]
    net, queries = nn.Sequential(nn.Linear(3, 4), Named(), nn.Linear(4, 2)).eval(), arrays(2)
    of = fitted(method, net, arrays(), params="2.*")
    expected, calls = of.attribute(queries).values, COUNT
    net(queries[0])
    assert calls < COUNT  # what the code counts is no change
    assert of.attribute(queries).values.equal(expected)
    monkeypatch.setattr(owner or THIS, name, value)
    with pytest.raises(ModelChanged, match=words):
        of.attribute(queries)
    monkeypatch.undo()
    assert of.attribute(queries).values.equal(expected)


def test_globals_of_forward_and_loss_functions_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shift = 1.0

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return shift * SCALE * nn.functional.cross_entropy(f, y, reduction="none")

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0]) * Chosen.factor, batch[1]

    net, queries = nn.Linear(3, 2), arrays(2)
    of = METHODS["whole"].fit(Task(net, loss, forward=forward), arrays())
    of.attribute(queries)
    for owner, name in ((THIS, "SCALE"), (Chosen, "factor")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, 2.0)
            with pytest.raises(ModelChanged, match=name):
                of.attribute(queries)
    shift = 2.0
    with pytest.raises(ModelChanged, match=r"global .*shift 1.0 → 2.0"):
        of.attribute(queries)
