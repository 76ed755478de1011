"""Matrices on disk: what is written is what is read, and an interrupted pass goes on."""

import itertools
import json
import shutil

import pytest
import torch

from tests.runtime.damage import DAMAGES
from upweight.errors import ShapeError, SpecError, StaleStore
from upweight.runtime.matrix import StoredMatrix

SCORES = torch.arange(5 * 7).reshape(5, 7).double()  # [q, n]


def matrix_in(folder, **other):
    return StoredMatrix.open(folder, {"method": "a", **other}, shape=(5, 7))


def add(matrix, first, last, start, stop, values=SCORES):
    matrix.append(first, start, values[first:last, start:stop])


def test_rows_come_back_from_several_groups_of_queries_and_examples(tmp_path):
    matrix = matrix_in(tmp_path)
    for first, last in ((0, 3), (3, 5)):
        for start, stop in ((0, 4), (4, 7)):
            add(matrix, first, last, start, stop)
    for query in range(5):
        assert torch.equal(StoredMatrix.load(tmp_path).row(query), SCORES[query])


OVERLAPPING = (
    (0, 5, 0, 2), (0, 2, 2, 7), (2, 5, 0, 4), (2, 5, 1, 3), (2, 5, 4, 7), (0, 5, 0, 1),
)  # fmt: skip


def test_runs_that_cut_the_work_in_other_places_share_a_folder(tmp_path):
    """With other memory there are other groups of queries and other batches, and all overlap."""
    matrix = matrix_in(tmp_path)
    assert not matrix.is_whole and matrix.missing(0, 5) == [(0, 7)]
    for places in OVERLAPPING:
        add(matrix, *places)
    assert [matrix.missing(*rows) for rows in ((0, 5), (0, 2), (2, 5))] == [[(2, 7)], [], []]
    assert matrix.is_whole
    for query in range(5):
        assert torch.equal(matrix.row(query), SCORES[query])


def test_any_part_is_that_part(tmp_path):
    matrix = matrix_in(tmp_path)
    for places in OVERLAPPING:
        add(matrix, *places)
    for first, last in itertools.combinations_with_replacement(range(6), 2):
        for start, stop in itertools.combinations_with_replacement(range(8), 2):
            found = matrix[first:last, start:stop]
            assert torch.equal(found, SCORES[first:last, start:stop].to(found.dtype))
    for columns in ([6, 0, 3, 3], [2], []):
        assert torch.equal(matrix[1:4, columns].double(), SCORES[1:4, columns])
        assert torch.equal(matrix[2, columns].double(), SCORES[2, columns])
    blocks = list(matrix.blocks())
    assert torch.equal(torch.cat([block for _, block in blocks]), SCORES)
    matrix[0:1].mul_(0)  # of what was read, in no file
    assert torch.equal(matrix[:], SCORES)
    for row in (5, -1):
        with pytest.raises(IndexError):
            matrix[row]


def test_it_grows_by_rows_too(tmp_path):
    """As gradients do, [n, k]: one tile per batch of examples, read back by their places."""
    rows = torch.randn(9, 4)
    stored = StoredMatrix.open(tmp_path, {"model": "m"}, shape=(9, 4))
    for start, stop in ((0, 3), (5, 9)):
        stored.append(start, 0, rows[start:stop])
    assert stored.missing_rows() == [(3, 5)] and not stored.is_whole
    with pytest.raises(ShapeError, match="row 3 without column 0"):
        stored[2:6]
    assert torch.equal(stored[5:8], rows[5:8])
    stored.append(3, 0, rows[3:5])
    assert stored.missing_rows() == [] and stored.is_whole
    assert torch.equal(stored[2:6], rows[2:6])


def test_a_row_that_is_not_finished_is_refused(tmp_path):
    matrix = matrix_in(tmp_path)
    add(matrix, 0, 5, 0, 2)
    with pytest.raises(ShapeError, match=r"(?s)row 1 without column 2.*to finish it"):
        matrix.row(1)
    with pytest.raises(ShapeError, match="row 5"):
        matrix.row(5)


def test_scores_of_something_else_are_refused(tmp_path):
    add(matrix_in(tmp_path), 0, 5, 0, 2)
    with pytest.raises(StaleStore, match=r"(?s)of another method\..*give another folder, or del"):
        matrix_in(tmp_path, method="b")
    with pytest.raises(StaleStore, match=r"of another shape\."):
        StoredMatrix.open(tmp_path, {"method": "a"}, shape=(5, 8))
    assert matrix_in(tmp_path / "another", method="b").missing(0, 5) == [(0, 7)]
    shutil.rmtree(tmp_path)
    assert matrix_in(tmp_path, method="b").missing(0, 5) == [(0, 7)]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    matrix = matrix_in(tmp_path)
    add(matrix, 0, 5, 0, 4)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        add(matrix, 0, 5, 4, 7)
    assert matrix.missing(0, 5) == [(4, 7)]
    assert not list(tmp_path.glob("*.part"))


def test_all_scores_come_back_at_once_with_how_they_came_about(tmp_path):
    matrix = matrix_in(tmp_path)
    add(matrix, 0, 3, 0, 7)
    assert matrix.facts is None
    with pytest.raises(ShapeError, match="row 3 without column 0"):
        matrix.values()
    add(matrix, 3, 5, 0, 7)
    matrix.finish({"unit": "DERIVATIVE"})
    found = StoredMatrix.load(tmp_path)
    assert torch.equal(found.values(), SCORES)
    assert found.facts["unit"] == "DERIVATIVE"


def test_scores_that_do_not_fit_into_memory_are_not_read_at_once(tmp_path, monkeypatch):
    matrix = matrix_in(tmp_path)
    add(matrix, 0, 5, 0, 7)
    monkeypatch.setattr("upweight.runtime.memory.free_bytes", lambda device: 100)
    for read in (lambda: matrix.values(), lambda: matrix[:]):
        with pytest.raises(SpecError, match=r"5 × 7 scores.*\n.*\n.*row\(query\)"):
            read()
    assert torch.equal(matrix.row(2), SCORES[2])


def test_a_pass_goes_on_as_it_was_begun(tmp_path):
    about = {"method": "a"}
    StoredMatrix.open(tmp_path, about, shape=(5, 7), begun={"together": 5})
    again = StoredMatrix.open(tmp_path, about, shape=(5, 7), begun={"together": 3})
    assert again.begun == {"together": 5}


# -- what was altered is noticed ------------------------------------------------------------------

PARTS = ((0, 3, 0, 4), (0, 3, 4, 7), (3, 5, 0, 4), (3, 5, 4, 7))


@pytest.fixture
def written(tmp_path):
    matrix = matrix_in(tmp_path / "scores")
    for places in PARTS:
        add(matrix, *places)
    matrix.finish({"unit": "DERIVATIVE"})
    return tmp_path / "scores"


def files_in(folder):
    return sorted(folder.glob("tile-*.safetensors"))


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_altered_file_is_named_by_whatever_reads_it(written, damage, is_finished):
    if not is_finished:
        (written / "finished.json").unlink()
    file = files_in(written)[0]
    DAMAGES[damage](file)
    for read in (
        lambda matrix: matrix.row(0),
        lambda matrix: matrix.values(),
        lambda matrix: list(matrix.blocks()),
        lambda matrix: matrix.verify(),
        lambda matrix: matrix.finish({}),
    ):
        with pytest.raises(StaleStore, match=rf"(?s){file.name}.*delete the file and ask again"):
            read(StoredMatrix.load(written))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_changes_after_it_was_read_is_noticed(written, damage):
    matrix = StoredMatrix.load(written)
    assert torch.equal(matrix.row(0), SCORES[0])
    DAMAGES[damage](files_in(written)[1])
    with pytest.raises(StaleStore, match="delete the file"):
        matrix.row(0)
    assert torch.equal(matrix.row(4), SCORES[4])


def test_a_file_that_was_read_is_not_read_as_a_whole_again(written, monkeypatch):
    matrix = StoredMatrix.load(written)
    matrix.row(0)
    monkeypatch.setattr("upweight.runtime.store.safe_open", None)
    assert torch.equal(matrix.row(1), SCORES[1])


def test_files_that_changed_places_are_noticed(written):
    first, second = files_in(written)[:2]
    third = written / "third"
    first.rename(third), second.rename(first), third.rename(second)
    with pytest.raises(StaleStore, match=first.name):
        StoredMatrix.load(written).values()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_file_of_another_folder_is_noticed(written, tmp_path, is_finished):
    """Of another question, or another answer to the same."""
    other = matrix_in(tmp_path / "other", method="a" if is_finished else "b")
    add(other, 0, 3, 0, 4, 2 * SCORES)
    if not is_finished:
        (written / "finished.json").unlink()
    files_in(written)[0].write_bytes(files_in(tmp_path / "other")[0].read_bytes())
    with pytest.raises(StaleStore, match=r"something else|than finished"):
        StoredMatrix.load(written).values()


@pytest.mark.parametrize(
    "name",
    [
        "{stem} (1).safetensors",
        "tile-copy.safetensors",
        "tile-0000000003-0000000000-0000000000-0000000004.safetensors",
        "tile-0000000000-0000000006-0000000000-0000000004.safetensors",
        "tile-0000000000-0000000003-0000000004-0000000008.safetensors",
        f"tile-{'9' * 200}.safetensors",
    ],
)
def test_a_file_of_another_name_is_refused_and_may_be_removed(written, name):
    """A finished store knows its files, and reads no other."""
    file = files_in(written)[0]
    copy = written / name.format(stem=file.stem)
    copy.write_bytes(file.read_bytes())
    assert torch.equal(StoredMatrix.load(written).values(), SCORES)
    (written / "finished.json").unlink()
    with pytest.raises(StaleStore, match=r"(?s)a name that is none.*remove it"):
        StoredMatrix.load(written).values()
    copy.unlink()
    assert torch.equal(StoredMatrix.load(written).values(), SCORES)


@pytest.mark.parametrize("change", [{"unit": "RANK"}, {"more": 1}])
def test_another_unit_is_noticed_and_the_header_may_be_deleted(written, change):
    path = written / "finished.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "facts": {**told["facts"], **change}}))
    with pytest.raises(StaleStore, match=r"(?s)`digest` in finished\.json.*delete the file"):
        StoredMatrix.load(written).values()
    path.unlink()
    matrix = StoredMatrix.load(written)
    assert matrix.is_whole and matrix.facts is None and matrix.missing(0, 3) == []
    matrix.finish({"unit": "DERIVATIVE"})
    assert torch.equal(StoredMatrix.load(written).values(), SCORES)


@pytest.mark.parametrize("shape", [[5, 8], [0, 7], [5, 7, 1], [10**30, 7], [5.0, 7]])
def test_another_size_is_noticed_and_the_folder_may_be_deleted(written, shape):
    path = written / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shape": shape}))
    with pytest.raises(StaleStore, match=r"(?s)manifest\.json.*delete the folder"):
        StoredMatrix.load(written)
    shutil.rmtree(written)
    assert matrix_in(written).missing(0, 5) == [(0, 7)]


@pytest.mark.parametrize("k", range(4))
def test_after_its_file_is_deleted_exactly_its_scores_are_missing(written, k):
    """And whoever makes them again makes the folder whole."""
    first, last, start, stop = PARTS[k]
    files_in(written)[k].unlink()
    matrix = StoredMatrix.load(written)
    assert matrix.facts is None and not matrix.is_whole
    with pytest.raises(ShapeError, match=r"(?s)without column.*to finish it"):
        matrix.values()
    assert matrix.missing(first, last) == [(start, stop)]
    add(matrix, *PARTS[k])
    assert matrix.missing(first, last) == [] and matrix.facts is None
    matrix.finish({"unit": "DERIVATIVE"})
    assert torch.equal(StoredMatrix.load(written).values(), SCORES)
