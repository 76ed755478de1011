"""Arrays, tables and lists as users hold them: the numbers in their order, or what is none."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import upweight as uw
from upweight.errors import DataError, ShapeError
from upweight.task.data import as_data

N = 6
X = torch.arange(2.0 * N).double().reshape(N, 2)
Y = torch.arange(N) % 2
TASK = uw.Task(torch.nn.Linear(2, 2).double(), uw.CrossEntropy(), uw.L2(1.0))


def whole(data):
    return as_data(data).batch(0, N)


def norm(task, data):
    return float(uw.Influence().fit(task, data).attribute(data).values.norm())


def close(number):
    return pytest.approx(number, rel=1e-12)


def frame(**columns):
    return pd.DataFrame(columns or {"a": X[:, 0].numpy(), "b": X[:, 1].numpy()})


# -- tables ---------------------------------------------------------------------------------------

YES = np.array([True, False] * 3)


@pytest.mark.parametrize(
    "column",
    [
        YES,
        pd.array(YES, dtype="boolean"),
        pd.array(np.arange(N), dtype="Int64"),
        pd.array(np.arange(N), dtype="UInt8"),
        pd.array(np.arange(N) / 4, dtype="Float64"),
        pd.array(np.arange(N) / 4, dtype="Float32"),
        pd.array(np.arange(N), dtype=pd.SparseDtype("int")),
        np.array([True, 1, 2.5, 0, False, 3], dtype=object),
        np.arange(N, dtype=np.int8),
    ],
    ids=lambda c: str(c.dtype),
)
def test_columns_of_numbers_and_of_yes_and_no(column):
    expected = torch.tensor([float(x) for x in column]).double()
    x, y = whole((frame(a=column, b=X[:, 1].numpy()), Y))
    assert x.dtype == torch.float64 and y is not Y
    assert torch.equal(x, torch.stack([expected, X[:, 1]], dim=1))
    (alone, _) = whole((pd.Series(column, index=range(9, 9 + N)), Y))
    assert torch.equal(alone.double(), expected)


def test_dtypes_of_tables_are_kept():
    x, y = whole((frame().astype("float32"), pd.Series(Y.numpy(), dtype="Int32")))
    assert x.dtype == torch.float32 and y.dtype == torch.int32
    assert whole((frame(a=YES, b=~YES), Y))[0].dtype == torch.bool


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean", object])
@pytest.mark.parametrize("nothing", [None, pd.NA])
def test_a_missing_value_is_named_by_column_and_row(dtype, nothing):
    column = pd.Series([1, 0, 1, nothing, 1, nothing], dtype=dtype, index=list("uvwxyz"))
    table = pd.DataFrame({"age": X[:, 0].numpy(), "smoker": column.to_numpy()}, index=column.index)
    table["smoker"] = column
    with pytest.raises(DataError, match=r"2 missing values in column 'smoker'.*row 'x'"):
        as_data((table, Y))
    with pytest.raises(DataError, match=r"2 missing values in data\[1\].*row 'x'"):
        as_data((X, column))


@pytest.mark.parametrize(
    "column",
    [
        pd.Categorical(list("abcabc")),
        np.array(list("abcabc"), dtype=object),
        pd.array(list("abcabc"), dtype="string"),
        pd.to_datetime(["2020-01-01"] * N),
        np.array(["a", None] * 3, dtype=object),
    ],
    ids=["category", "object", "string", "date", "text and None"],
)
def test_columns_that_hold_no_numbers_are_named(column):
    table = frame(age=np.arange(N), city=column)
    with pytest.raises(DataError, match=r"1 of 2 columns of data\[0\].*'city'"):
        as_data((table, Y))
    with pytest.raises(DataError, match="must be numbers"):
        as_data((X, table["city"]))
    assert torch.equal(whole((table.drop(columns=["city"]), Y))[0][:, 0], torch.arange(N))


def test_the_way_out_for_categories_and_class_names():
    classes = ["cat", "dog"]
    y = np.array(classes)[Y]
    expected = norm(TASK, (X, Y))
    with pytest.raises(DataError, match=r"'cat'(.|\n)*classes\.index\(name\) for name in y"):
        as_data((X, y))
    codes = np.array([classes.index(name) for name in y])
    assert norm(TASK, (X, codes)) == close(expected)
    with pytest.raises(DataError, match=r"'cat', 'dog'(.|\n)*y\.cat\.codes\.to_numpy"):
        as_data((X, pd.Series(y, dtype="category")))
    assert norm(TASK, (X, pd.Series(y, dtype="category").cat.codes.to_numpy())) == close(expected)


def test_tables_are_paired_by_position_and_refused_where_their_index_says_otherwise():
    x, y = frame(), pd.Series(Y.numpy())
    assert norm(TASK, (x, y)) == close(norm(TASK, (X, Y)))
    # Both shuffled together, as a split leaves them.
    order = [4, 1, 0, 5, 2, 3]
    together = whole((x.iloc[order], y.iloc[order]))
    assert torch.equal(together[0], X[order]) and torch.equal(together[1], Y[order])
    shuffled = y.iloc[order]
    with pytest.raises(DataError, match=r"row 0 is 0 in data\[0\] and 4 in data\[1\](.|\n)*order"):
        as_data((x, shuffled))
    assert torch.equal(whole((x, shuffled.loc[x.index]))[1], Y)
    assert torch.equal(whole((x, shuffled.to_numpy()))[1], Y[order])
    with pytest.raises(DataError, match=r"'r0' in data\['labels'\](.|\n)*another split"):
        as_data({"x": x, "labels": y.rename(lambda k: f"r{k}")})
    with pytest.raises(ShapeError, match=r"\(6, 2\)"):
        as_data((x, y[:3]))


# -- arrays of other kinds ------------------------------------------------------------------------


def test_arrays_of_objects_are_numbers_where_all_entries_are():
    x, _ = whole((np.array(X.tolist(), dtype=object), Y))
    assert torch.equal(x, X)
    rows = np.empty(N, dtype=object)
    rows[:] = list(X.numpy())
    assert torch.equal(whole((rows, Y))[0], X)
    bad = np.array(X.tolist(), dtype=object)
    bad[3, 1] = None
    with pytest.raises(DataError, match=r"None in data\[0\] at \[3, 1\](.|\n)*missing"):
        as_data((bad, Y))
    rows[4] = np.ones(5)
    with pytest.raises(DataError, match=r"example 0 \(2,\), example 4 \(5,\)"):
        as_data((rows, Y))


@pytest.mark.parametrize(
    "values",
    [
        np.ma.masked_equal(np.arange(N), 3),
        pd.array([0, 1, 2, None, 4, None], dtype="Int64"),
        pd.array([True, False, True, None, True, None], dtype="boolean"),
    ],
    ids=["masked", "Int64", "boolean"],
)
def test_missing_entries_of_an_array_do_not_become_numbers(values):
    with pytest.raises(DataError, match=r"missing values in data\[1\], the first at \[3\]"):
        as_data((X, values))
    assert len(whole((X, values[[0, 1, 2, 4, 0, 1]] if values[5] is pd.NA else X))) == 2


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_unsigned_numbers_score_as_int64_ones(dtype):
    """PyTorch holds these dtypes and can take no rows of them."""
    tokens = torch.arange(2 * N).reshape(N, 2) % 5
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(5, 2), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    ).double()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1.0))

    def values(data):
        return uw.Influence(uw.GGN()).fit(task, data).attribute(data).values

    x, y = tokens.numpy().astype(dtype), Y.numpy().astype(dtype)
    pairs = list(zip(x, y, strict=True))
    forms = {
        "NumPy": (x, y),
        "tensors": (torch.from_numpy(x), torch.from_numpy(y)),
        "table": (pd.DataFrame(x), pd.Series(y)),
        "dataset": pairs,
        "own collate": DataLoader(
            pairs,
            collate_fn=lambda some: [
                torch.from_numpy(np.stack(a)) for a in zip(*some, strict=True)
            ],
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that is not at its minimum
        expected = values((tokens, Y))
        assert expected.abs().min() > 0
        for name, form in forms.items():
            assert torch.equal(values(form), expected), name
            assert as_data(form).take([2, 0])[1].dtype == torch.int64, name


@pytest.mark.parametrize("hold", [np.asarray, torch.from_numpy, pd.Series])
def test_unsigned_numbers_that_no_int64_holds_are_refused(hold):
    y = np.array([0, 2**64 - 1, 0, 2**63, 0, 2**63 - 1], dtype=np.uint64)
    with pytest.raises(DataError, match=r"18446744073709551615 in data\[1\] at \[1\]"):
        as_data((X, hold(y)))
    kept = whole((X, hold(np.where(y > 2**63 - 1, 0, y).astype(np.uint64))))[1]
    assert kept.max() == 2**63 - 1
    numbered = np.unique(y, return_inverse=True)[1]  # the ways out
    assert whole((X, numbered))[1].tolist() == [0, 3, 0, 2, 0, 1]
    assert whole((X, y.astype(np.int64)))[1][1] == -1


def test_sparse_arrays_are_refused_with_how_to_write_them_out():
    with pytest.raises(DataError, match=r"X\.to_dense\(\)"):
        as_data((X.to_sparse(), Y))
    sparse = pytest.importorskip("scipy.sparse").csr_matrix(X.numpy())
    with pytest.raises(DataError, match=r"X\.toarray\(\)"):
        as_data((sparse, Y))
    for dense in (X.to_sparse().to_dense(), sparse.toarray()):
        assert torch.equal(whole((dense, Y))[0], X)


def test_class_names_in_a_dict_are_not_left_out():
    with pytest.raises(DataError, match=r"data\['labels'\](.|\n)*'dog'(.|\n)*classes\.index"):
        as_data({"input": X, "labels": ["dog", "cat"] * 3})


def test_a_structured_array_is_passed_by_its_names():
    a = np.zeros(N, dtype=[("x", float, 2), ("labels", int)])
    a["x"], a["labels"] = X, Y
    with pytest.raises(DataError, match=r"a\[name\] for name in a\.dtype\.names"):
        as_data((a, Y))
    batch = whole({name: a[name] for name in a.dtype.names})
    assert torch.equal(batch["x"], X) and torch.equal(batch["labels"], Y)


def test_lists_of_numbers_in_a_dict_are_arrays():
    batch = whole({"x": X.tolist(), "labels": Y.tolist()})
    assert torch.equal(batch["x"], X) and torch.equal(batch["labels"], Y)
    with pytest.raises(DataError, match=r"'ids'.*example 0 \(1,\), example 1 \(2,\)"):
        as_data({"ids": [[1], [2, 3], [4]], "labels": [0, 1, 0]})


@pytest.mark.parametrize(
    "part", [None, 3, "cat", TensorDataset(X), [0, 1, 0, 1, 0, 1]], ids=lambda p: type(p).__name__
)
def test_a_part_that_is_no_array_is_named(part):
    with pytest.raises(DataError, match=r"data\[1\](\[0\])? of type"):
        as_data((X, part))
    with pytest.raises(DataError, match=r"data\['train'\] of type TensorDataset"):
        as_data({"train": TensorDataset(X, Y), "test": TensorDataset(X, Y)})


# -- containers -----------------------------------------------------------------------------------


def test_targets_in_a_dict():
    both = lambda f, y: uw.CrossEntropy()(f, y["a"]) + uw.CrossEntropy()(f, y["b"])  # noqa: E731
    twice = lambda f, y: 2 * uw.CrossEntropy()(f, y)  # noqa: E731
    found, expected = (
        norm(uw.Task(TASK.model, loss, uw.L2(1.0)), (X, y))
        for loss, y in ((both, {"a": Y, "b": Y}), (twice, Y))
    )
    assert found == close(expected)


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2).double()

    def forward(self, x, mask):
        return self.linear(x if mask is None else x * mask)


@pytest.mark.parametrize(
    "data",
    [
        {"mask": None, "x": X, "labels": Y},
        [{"mask": None, "x": X[i], "labels": Y[i]} for i in range(N)],
    ],
    ids=["arrays", "examples"],
)
def test_an_entry_that_is_none_stays_none(data):
    model = Masked()
    batch = as_data(data).take([3, 0])
    assert batch["mask"] is None and torch.equal(batch["x"], X[[3, 0]])
    assert len(as_data(data)) == N
    found = norm(uw.Task(model, uw.CrossEntropy(), uw.L2(1.0)), data)
    assert found == close(norm(uw.Task(model.linear, uw.CrossEntropy(), uw.L2(1.0)), (X, Y)))


@pytest.mark.parametrize("form", [list, np.array, pd.Series], ids=str)
def test_names_beside_arrays_are_left_out_and_said(form):
    names = form([f"row {i}" for i in range(N)])
    with pytest.warns(UserWarning, match="'name' was left out"):
        data = as_data({"input": X, "name": names, "labels": Y})
    assert sorted(data.take([0])) == ["input", "labels"]
    fitted = uw.Influence().fit(TASK, data)
    scores = fitted.attribute((X, Y))
    assert float(scores.values.norm()) == close(norm(TASK, (X, Y)))
    assert any("'name' was left out" in note for note in scores.provenance.notes)


def test_a_list_of_inputs_is_never_read_as_columns():
    inputs = [X[:2], X[2:4]]
    with pytest.raises(DataError, match=r"2 arrays, all of shape \(2, 2\)"):
        as_data(inputs)
    with pytest.raises(DataError, match=r"2 arrays, all of shape \(2, 2\)"):
        as_data((inputs, Y[:2]))
    with pytest.raises(ShapeError, match="one array per example"):
        as_data((list(X), Y))
    with pytest.raises(DataError, match="6 arrays"):
        as_data(list(X))
    assert torch.equal(whole((torch.stack(list(X)), Y))[0], X)
    # Two inputs of each example, where nothing else can be meant.
    (first, second), _ = whole(([X, X + 1], Y))
    assert torch.equal(second - first, torch.ones_like(X))


# -- data sets of examples ------------------------------------------------------------------------


def test_data_sets_made_of_others():
    both = ConcatDataset([TensorDataset(X[:4], Y[:4]), TensorDataset(X[4:], Y[4:])])
    for data in (both, Subset(both, range(N)), DataLoader(both, batch_size=4)):
        assert torch.equal(whole(data)[0], X)


def test_lists_of_numbers_in_examples_are_arrays():
    """The default format of `datasets.Dataset`."""
    listed = [{"x": X[i].tolist(), "labels": int(Y[i])} for i in range(N)]
    batch = whole(listed)
    assert torch.equal(batch["x"], X) and torch.equal(batch["labels"], Y)
    pairs = [(X[i].tolist(), int(Y[i])) for i in range(N)]
    assert torch.equal(whole(pairs)[0], X)


def test_a_dataset_of_the_datasets_library():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input": X.tolist(), "labels": Y.tolist()})
    expected = norm(TASK, (X, Y))
    for data in (table, DataLoader(table, batch_size=4), table[:]):
        assert norm(TASK, data) == close(expected)


LENGTHS = [3, 2, 3, 4, 2, 3]
RAGGED = {
    "tensors": [(torch.ones(t, 2).double(), Y[i]) for i, t in enumerate(LENGTHS)],
    "arrays": [{"x": np.ones((t, 2)), "labels": 1} for t in LENGTHS],
    "lists": [{"x": [[1.0, 1.0]] * t, "labels": 1} for t in LENGTHS],
    "rows of a list": [([[1.0], [1.0, 2.0]], 1)] * 3,
}


@pytest.mark.parametrize("form", RAGGED)
@pytest.mark.parametrize("loader", [lambda data: data, DataLoader], ids=["as it is", "loader"])
def test_examples_of_different_lengths_are_named(form, loader):
    data = as_data(loader(RAGGED[form]))
    with pytest.raises(DataError, match=r"entry .* example 0 .*(\n.*)*collate_fn=pad"):
        data.batch(0, len(data))


def test_the_way_out_of_different_lengths():
    """Padded labels of −100 do not count: the loss is that of the examples one by one."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        (torch.randn(t, 2, generator=generator).double(), torch.arange(t) % 2) for t in LENGTHS
    ]

    def pad(rows):
        fill = torch.nn.utils.rnn.pad_sequence
        xs, ys = zip(*rows, strict=True)
        return fill(xs, batch_first=True), fill(ys, batch_first=True, padding_value=-100)

    data = as_data(DataLoader(examples, collate_fn=pad))
    together = TASK.losses(TASK.theta(), data.batch(0, N))
    alone = torch.cat([TASK.losses(TASK.theta(), data.take([i])) for i in range(N)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert bool(uw.Influence().fit(TASK, data).attribute(data).values.isfinite().all())


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([(X[0], 1), (X[1], None)], "entry 1 of type NoneType, int(.|\n)*lack this entry"),
        ([(X[0], object()), (X[1], object())], "entry 1 of type object"),
        ([(X[0], 1), (X[1],)], "2 entries and one of 1 entries"),
        ([{"x": X[0], "y": 1}, {"x": X[1]}], r"keys \['x', 'y'\] and one of keys \['x'\]"),
        ([None, (X[1], 1)], "of type NoneType, tuple"),
        ([object()] * 2, "the examples of type object"),
    ],
    ids=["a None", "objects", "fewer", "keys", "no example", "an object"],
)
def test_examples_that_do_not_go_together(examples, said):
    with pytest.raises(DataError, match=said):
        as_data(examples).batch(0, 2)
