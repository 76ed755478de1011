"""Data in every form that users hold them: the same examples in the same order."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import upweight as uw
from tests.market import problem
from upweight.errors import DataError, ShapeError
from upweight.task.data import Data, as_data, batch_size, read_data

N = 7
X = torch.arange(N * 2).reshape(N, 2).double()
Y = torch.arange(N) % 3


class Pairs(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], Y[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def strided(array):
    """The same numbers behind a negative stride."""
    return np.ascontiguousarray(array[::-1])[::-1]


x, y = X.numpy(), Y.numpy()
FORMS = {
    "tensors": (X, Y),
    "list of tensors": [X, Y],
    "NumPy": (x, y),
    "NumPy, read-only": (read_only(x), read_only(y)),
    "NumPy, negative strides": (strided(x), strided(y)),
    "NumPy, Fortran order": (np.asfortranarray(x), y),
    "tensor and NumPy": (X, y),
    "tensors that require grad": (X.clone().requires_grad_(True), Y),
    "dataset": Pairs(),
    "TensorDataset": TensorDataset(X, Y),
    "list of pairs": [(X[i], Y[i]) for i in range(N)],
    "loader in order": DataLoader(Pairs(), batch_size=3),
    "data": as_data((X, Y)),
    "subset of everything": as_data((X, Y)).subset(range(N)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_examples_in_the_same_order(form):
    data = as_data(FORMS[form])
    assert isinstance(data, Data) and len(data) == N and data.notes == ()
    for indices in ([0], [4, 1, 1], range(2, 5), torch.tensor([6, 0])):
        inputs, targets = data.take(indices)
        assert isinstance(data.take(indices), tuple)
        index = torch.as_tensor(list(indices))
        assert torch.equal(inputs, X[index]) and torch.equal(targets, Y[index])
        assert not inputs.requires_grad
    inputs, targets = data.batch(2, 6)
    assert torch.equal(inputs, X[2:6]) and torch.equal(targets, Y[2:6])


@pytest.mark.parametrize("form", ["tensors", "dataset", "subset of everything"])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_cover_everything_once(form, size):
    seen = list(as_data(FORMS[form]).batches(size))
    assert [start for start, _, _ in seen] == list(range(0, N, size))
    assert torch.equal(torch.cat([batch[0] for _, _, batch in seen]), X)
    assert all(len(batch[0]) == stop - start for start, stop, batch in seen)


def test_subsets_of_subsets():
    data = as_data((X, Y)).subset([6, 2, 4]).subset([2, 0])
    assert len(data) == 2 and data.take([0, 1])[1].tolist() == Y[[4, 6]].tolist()


def test_a_subset_by_a_mask():
    data = as_data((X, Y)).subset(Y == 1)
    assert torch.equal(data.batch(0, 2)[0], X[[1, 4]])


@pytest.mark.parametrize("chosen", [[-1], [N], [0.5], [True, False], ["0"]], ids=str)
@pytest.mark.parametrize("form", ["tensors", "dataset"])
def test_a_subset_of_what_is_not_there(form, chosen):
    with pytest.raises(ShapeError, match=r"0…6|for each: 7"):
        as_data(FORMS[form]).subset(chosen)


def test_dtypes_are_kept():
    data = as_data((x.astype(np.float32), y.astype(np.int32)))
    inputs, targets = data.batch(0, N)
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int32


def test_float32_arrays_under_a_float64_model_are_refused_with_the_way_out():
    p = problem("softmax")
    inputs, targets = p.train
    with pytest.raises(uw.errors.DtypeError, match=r"X\.astype\('float64'\)"):
        uw.Influence().fit(p.task, (inputs.float().numpy(), targets.numpy()))


def test_users_arrays_are_not_written_to():
    before = x.copy()
    p = problem("ridge")
    arrays = [strided(a.numpy().copy()) for a in p.train]
    kept = [a.copy() for a in arrays]
    uw.Influence().fit(p.task, tuple(arrays)).attribute(tuple(arrays))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, kept, strict=True))
    as_data((x, y)).take([0])[0].zero_()
    assert np.array_equal(x, before)


def test_dicts():
    data = as_data({"x": X, "z": x, "labels": Y})
    batch = data.take([3, 0])
    assert sorted(batch) == ["labels", "x", "z"]
    assert torch.equal(batch["z"], X[[3, 0]])
    dataset = [{"x": X[i], "labels": Y[i]} for i in range(N)]
    batch = as_data(dataset).take([3, 0])
    assert type(batch) is dict and torch.equal(batch["x"], X[[3, 0]])


def test_nested_targets():
    data = as_data((X, (Y, X[:, 0])))
    inputs, (targets, weights) = data.take([5])
    assert inputs.shape == (1, 2) and targets.item() == Y[5] and weights.item() == X[5, 0]


def test_every_form_gives_the_same_scores():
    p = problem("logistic")
    X, y = p.train
    expected = uw.Influence().fit(p.task, (X, y)).attribute(p.queries).values
    forms = [
        [X, y],
        (X.numpy(), y.numpy()),
        TensorDataset(X, y),
        DataLoader(TensorDataset(X, y), batch_size=4),
    ]
    for form in forms:
        found = uw.Influence().fit(p.task, form).attribute(p.queries).values
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# -- loaders ------------------------------------------------------------------------------------


def test_a_shuffled_loader_is_used_in_order_and_says_so():
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    with pytest.warns(
        UserWarning, match=r"shuffling \(RandomSampler\) was left out: example i is dataset"
    ):
        data = as_data(loader)
    assert torch.equal(data.batch(0, N)[0], X)
    assert len(data.notes) == 1


def test_the_note_is_kept_in_provenance():
    p = problem("logistic")
    loader = DataLoader(TensorDataset(*p.train), batch_size=4, shuffle=True)
    with pytest.warns(UserWarning, match="left out"):
        scores = uw.Influence().fit(p.task, loader).attribute(p.queries)
    assert any("(RandomSampler) was left out" in note for note in scores.provenance.notes)


def test_drop_last_is_said():
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, drop_last=True)
    with pytest.warns(UserWarning, match="drop_last was left out"):
        assert len(as_data(loader)) == N
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_data(DataLoader(TensorDataset(X, Y), batch_size=7, drop_last=True))


def test_a_loaders_collate_function_is_used():
    def collate(pairs):
        return torch.stack([a for a, _ in pairs]) + 1.0, torch.stack([b for _, b in pairs])

    data = as_data(DataLoader(Pairs(), batch_size=2, collate_fn=collate))
    assert torch.equal(data.take([0, 3])[0], X[[0, 3]] + 1.0)


class ByTwo(torch.utils.data.BatchSampler):
    """A batch sampler of the user's own."""


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler([0, 2])},
        {"sampler": WeightedRandomSampler([1.0] * N, N)},
        {"sampler": torch.utils.data.RandomSampler(Y, replacement=True)},
        {"sampler": torch.utils.data.RandomSampler(Y, num_samples=3)},
        {"batch_size": None},
        {"batch_sampler": ByTwo(torch.utils.data.SequentialSampler(Y), 2, False)},
    ],
    ids=["subset", "weighted", "with replacement", "fewer", "unbatched", "batch sampler"],
)
def test_loaders_that_skip_or_repeat_examples_are_refused(options):
    with pytest.raises(DataError, match="every example of its dataset once"):
        as_data(DataLoader(TensorDataset(X, Y), **options))


def test_a_subset_of_a_dataset_is_the_way_out():
    data = as_data(DataLoader(Subset(TensorDataset(X, Y), [5, 2])))
    assert len(data) == 2 and torch.equal(data.batch(0, 2)[0], X[[5, 2]])


# -- what has no index --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thing",
    [
        Stream(),
        DataLoader(Stream()),
        iter([(X, Y)]),
        X,
        x,
        (),
        None,
        3,
        (X, None),
        (X, Y.tolist()),
        [X, Y.tolist()],
    ],
    ids=[
        "stream",
        "loader of it",
        "iterator",
        "tensor",
        "array",
        "empty",
        "None",
        "int",
        "half",
        "list of targets",
        "list in a list",
    ],
)
def test_what_has_no_index_is_refused(thing):
    with pytest.raises((DataError, ShapeError)):
        as_data(thing)


def test_the_way_out_of_a_stream_is_named():
    with pytest.raises(DataError, match=r"list\(stream\) makes a Dataset"):
        as_data(Stream())


@pytest.mark.parametrize(
    "arrays", [(X, Y[:3]), (X, torch.tensor(1)), (X, (Y, X[:2]))], ids=["short", "scalar", "nested"]
)
def test_sizes_that_disagree_are_shown(arrays):
    with pytest.raises(ShapeError, match=r"\(7, 2\)"):
        as_data(arrays)


def test_strings_are_refused():
    with pytest.raises(DataError, match="must be numbers"):
        as_data((x, np.array(list("abcdefg"))))


def test_no_examples():
    p = problem("softmax")
    empty = (torch.zeros(0, 3).double(), torch.zeros(0).long())
    with pytest.raises(DataError, match="training data must hold at least one example"):
        uw.Influence().fit(p.task, empty)
    with pytest.raises(DataError, match="queries must hold at least one example"):
        uw.Influence().fit(p.task, p.train).attribute(empty)


def test_batch_size_follows_the_budget(monkeypatch):
    monkeypatch.setattr("upweight.task.data.WORKING_BYTES", 1000)
    assert batch_size(25, 8) == 5
    assert batch_size(10_000, 8) == 1
    assert batch_size(0, 8, most=17) == 17


def test_one_example_and_what_is_read_once_are_refused_and_the_ways_out_work():
    X, y = torch.randn(6, 3), torch.arange(6)
    examples = [{"x": X[i], "label": int(y[i])} for i in range(6)]
    for given in ((X[3], y[3]), examples[3]):
        with pytest.raises((ShapeError, DataError), match="one example") as caught:
            uw.as_data(given)
        assert "(X[3:4], y[3:4]); of a data set a list, [dataset[3]]" in str(caught.value)
    assert len(uw.as_data((X[3:4], y[3:4]))) == len(uw.as_data([examples[3]])) == 1
    with pytest.raises(DataError, match="can be read once") as caught:
        uw.as_data(iter([(X[:4], y[:4]), (X[4:], y[4:])]))
    assert "[x for batch in stream for x in zip(*batch)]" in str(caught.value)
    stream = iter([(X[:4], y[:4]), (X[4:], y[4:])])
    again = uw.as_data([x for batch in stream for x in zip(*batch, strict=True)])
    assert torch.equal(again.batch(0, 6)[0], X)


def test_data_introduce_themselves_in_a_line():
    X, y = torch.zeros(30, 4), torch.zeros(30)
    data = as_data((X, y))
    assert repr(data) == "ArrayData of 30 examples"
    assert repr(data.subset([3, 4])) == "Subset of 2 examples"
    loader = DataLoader(TensorDataset(X, y), 8, shuffle=True)
    assert repr(read_data(loader)).startswith("IndexedData of 30 examples; the DataLoader's")
