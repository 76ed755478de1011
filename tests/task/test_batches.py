"""How examples lie in a batch: found from several together and each alone, and cut by that."""

import dataclasses
import re
from collections import namedtuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from upweight.errors import ShapeError
from upweight.task.batches import Form, Listed, cut, form, leaves, mapped
from upweight.task.data import IndexedData, as_data

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Fields:
    x: torch.Tensor
    names: list[str]


X = torch.arange(12.0).reshape(6, 2)


def rows(indices):
    return X[list(indices)]


CUTTABLE = {
    "a tuple": lambda i: (rows(i), rows(i)[:, 0]),
    "a dict": lambda i: {"x": rows(i), "more": [rows(i), {"y": rows(i)}]},
    "a named tuple": lambda i: Pair(rows(i), rows(i)),
    "a dataclass": lambda i: Fields(rows(i), [f"u{k}" for k in i]),
    "strings": lambda i: {"id": [f"u{k}" for k in i], "x": rows(i)},
    "bags": lambda i: ([X[: 1 + k] for k in i], rows(i)),
    "constants": lambda i: {"x": rows(i), "scale": torch.tensor(0.5), "v": None, "kind": "a"},
    "padded to the longest": lambda i: (torch.zeros(len(i), 2 + max(i)), rows(i)),
}


@pytest.mark.parametrize("name", CUTTABLE)
def test_an_example_is_what_is_read_alone(name):
    data = IndexedData(range(6), lambda some: CUTTABLE[name](list(some)))
    assert data.form.uncut is None
    assert data.together(4) == 4
    batch = data.take([1, 4, 5])
    for k, i in enumerate([1, 4, 5]):
        found, alone = cut(batch, slice(k, k + 1), 3), data.take([i])
        assert type(found) is type(alone)
        for a, b in zip(leaves(found), leaves(alone), strict=True):
            if name == "bags" and isinstance(a, Listed):
                assert len(a) == len(b) == 1
                assert torch.equal(a[0], b[0])
            elif not isinstance(a, torch.Tensor):
                assert a == b
            elif name != "padded to the longest":
                assert torch.equal(a, b)


UNCUT = {
    "nodes": (lambda i: (torch.cat([X[: 1 + k] for k in i]), rows(i)), r"batch\[0\] has shape"),
    "packed": (lambda i: (pack_sequence([X[: 6 - k] for k in i]), rows(i)), "PackedSequence"),
    "a size": (lambda i: {"n": len(i), "x": rows(i)}, r"batch\['n'\], a int"),
    "a mean": (lambda i: (rows(i), rows(i).mean()), "belongs to the whole batch"),
    "samples": (lambda i: tuple((X[k], X[k]) for k in i), "other parts"),
    "transposed": (lambda i: (rows(i).T, rows(i)), r"has shape \(2, 3\)"),
    "another key": (lambda i: {"x": rows(i), **({"y": 1} if len(i) > 1 else {})}, "other parts"),
}


@pytest.mark.parametrize("name", UNCUT)
def test_what_cannot_be_cut_is_read_alone_and_said(name):
    collate, why = UNCUT[name]
    data = IndexedData(range(6), lambda some: collate(list(some)))
    assert data.together(4) == 1
    assert [(start, stop) for start, stop, _ in data.batches(4)] == [(k, k + 1) for k in range(6)]
    assert data.subset([2, 3]).together(2) == 1
    assert re.search(f"read one at a time, because .*{why}", data.form_notes[0])


def test_arrays_are_cut_without_being_read():
    data = as_data((X, X[:, 0]))
    assert data.form == Form()
    assert data.form_notes == ()


def test_a_part_of_another_length_is_refused():
    with pytest.raises(ShapeError, match=r"3 entries.*\n  Given: shape \(6, 2\)"):
        cut((X[:3], X), slice(0, 1), 3)


def test_a_list_of_parts_is_not_one_of_examples():
    """Three inputs and three examples: only the comparison with one example tells."""
    found = form(lambda i: [rows(i), rows(i), rows(i)], 6)
    assert found == Form()
    listed = form(lambda i: {"x": [X[k] for k in i]}, 6).marked({"x": [X[0], X[1]]})
    assert type(listed["x"]) is Listed
    assert len(leaves(listed)) == 1


def test_mapping_keeps_the_kinds_of_containers():
    batch = {"a": (X, [X]), "b": Pair(X, None), "c": Fields(X, ["u"])}
    found = mapped(lambda leaf: leaf, batch)
    assert type(found["b"]) is Pair
    assert type(found["c"]) is Fields
    assert found["c"] is not batch["c"]
    assert found["a"][1][0] is X
