"""Scores on disk: what is written is what is read, and an interrupted pass goes on."""

import json
import shutil

import pytest
import torch

from tests.runtime.damage import DAMAGES
from upweight.errors import ShapeError, SpecError, StaleStore
from upweight.runtime.shards import ScoreShards

SCORES = torch.arange(5 * 7).reshape(5, 7).double()  # [q, n]


def shards_in(folder, **other):
    return ScoreShards.open(folder, 7, 5, {"method": "a", **other})


def test_rows_come_back_from_several_groups_of_queries_and_examples(tmp_path):
    shards = shards_in(tmp_path)
    for first, last in ((0, 3), (3, 5)):
        for start, stop in ((0, 4), (4, 7)):
            shards.append(first, start, SCORES[first:last, start:stop].mT)
    for query in range(5):
        assert torch.equal(ScoreShards.load(tmp_path).row(query), SCORES[query])


def test_done_counts_what_follows_without_a_gap(tmp_path):
    shards = shards_in(tmp_path)
    assert shards.done(0, 5) == 0
    shards.append(0, 0, SCORES[:, :2].mT)
    shards.append(0, 4, SCORES[:, 4:].mT)
    assert shards_in(tmp_path).done(0, 5) == 2


def test_runs_that_cut_the_work_in_other_places_share_a_folder(tmp_path):
    """With other memory there are other groups of queries and other batches, and all overlap."""
    shards = shards_in(tmp_path)
    assert not shards.is_whole
    for first, last, start, stop in (
        (0, 5, 0, 2), (0, 2, 2, 7), (2, 5, 0, 4), (2, 5, 1, 3), (2, 5, 4, 7), (0, 5, 0, 1),
    ):  # fmt: skip
        shards.append(first, start, SCORES[first:last, start:stop].mT)
    assert (shards.done(0, 5), shards.done(0, 2), shards.done(2, 5)) == (2, 7, 7)
    assert shards.is_whole
    for query in range(5):
        assert torch.equal(shards.row(query), SCORES[query])


def test_a_row_that_is_not_finished_is_refused(tmp_path):
    shards = shards_in(tmp_path)
    shards.append(0, 0, SCORES[:, :2].mT)
    with pytest.raises(ShapeError, match="scores of 2 examples on disk"):
        shards.row(1)


def test_scores_of_something_else_are_refused(tmp_path):
    shards_in(tmp_path)
    with pytest.raises(StaleStore, match="give another folder, or delete this one"):
        shards_in(tmp_path, method="b")
    assert shards_in(tmp_path / "another", method="b").done(0, 5) == 0
    shutil.rmtree(tmp_path)
    assert shards_in(tmp_path, method="b").done(0, 5) == 0


def test_a_damaged_file_is_named(tmp_path):
    shards = shards_in(tmp_path)
    shards.append(0, 0, SCORES.mT)
    file = next(tmp_path.glob("scores-*.safetensors"))
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(StaleStore, match=file.name):
        shards.row(0)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    shards = shards_in(tmp_path)
    shards.append(0, 0, SCORES[:, :4].mT)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        shards.append(0, 4, SCORES[:, 4:].mT)
    assert shards.done(0, 5) == 4
    assert not list(tmp_path.glob("*.part"))


def test_all_scores_come_back_at_once_with_how_they_came_about(tmp_path):
    shards = shards_in(tmp_path)
    shards.append(0, 0, SCORES[:3].mT)
    assert shards.header is None
    with pytest.raises(ShapeError, match="query 3 without all of its scores"):
        shards.values()
    shards.append(3, 0, SCORES[3:].mT)
    shards.finish({"unit": "DERIVATIVE"})
    found = ScoreShards.load(tmp_path)
    assert torch.equal(found.values(), SCORES)
    assert found.header["unit"] == "DERIVATIVE"


def test_scores_that_do_not_fit_into_memory_are_not_read_at_once(tmp_path, monkeypatch):
    shards = shards_in(tmp_path)
    shards.append(0, 0, SCORES.mT)
    monkeypatch.setattr("upweight.runtime.memory.free_bytes", lambda device: 100)
    with pytest.raises(SpecError, match=r"5 × 7 scores.*\n.*\n.*row\(query\)"):
        shards.values()
    assert torch.equal(shards.row(2), SCORES[2])


def test_a_pass_goes_on_with_the_settings_that_it_was_begun_with(tmp_path):
    ScoreShards.open(tmp_path, 7, 5, {"method": "a"}, {"together": 5})
    again = ScoreShards.open(tmp_path, 7, 5, {"method": "a"}, {"together": 3})
    assert again.settings == {"together": 5}


# -- what was altered is noticed ------------------------------------------------------------------

PARTS = ((0, 3, 0, 4), (0, 3, 4, 7), (3, 5, 0, 4), (3, 5, 4, 7))


@pytest.fixture
def written(tmp_path):
    shards = shards_in(tmp_path / "scores")
    for first, last, start, stop in PARTS:
        shards.append(first, start, SCORES[first:last, start:stop].mT)
    shards.finish({"unit": "DERIVATIVE"})
    return tmp_path / "scores"


def files_in(folder):
    return sorted(folder.glob("scores-*.safetensors"))


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_altered_file_is_named_by_whatever_reads_it(written, damage, is_finished):
    if not is_finished:
        (written / "finished.json").unlink()
    file = files_in(written)[0]
    DAMAGES[damage](file)
    for read in (
        lambda shards: shards.row(0),
        lambda shards: shards.values(),
        lambda shards: list(shards.pieces()),
        lambda shards: shards.verify(),
        lambda shards: shards.finish({}),
    ):
        with pytest.raises(StaleStore, match=rf"(?s){file.name}.*delete the file and ask again"):
            read(ScoreShards.load(written))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_changes_after_it_was_read_is_noticed(written, damage):
    shards = ScoreShards.load(written)
    assert torch.equal(shards.row(0), SCORES[0])
    DAMAGES[damage](files_in(written)[1])
    with pytest.raises(StaleStore, match="delete the file"):
        shards.row(0)
    assert torch.equal(shards.row(4), SCORES[4])


def test_a_file_that_was_read_is_not_read_as_a_whole_again(written, monkeypatch):
    shards = ScoreShards.load(written)
    shards.row(0)
    monkeypatch.setattr("upweight.runtime.shards.tensors_digest", None)
    assert torch.equal(shards.row(1), SCORES[1])


def test_files_that_changed_places_are_noticed(written):
    first, second = files_in(written)[:2]
    third = written / "third"
    first.rename(third), second.rename(first), third.rename(second)
    with pytest.raises(StaleStore, match=first.name):
        ScoreShards.load(written).values()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_file_of_another_folder_is_noticed(written, tmp_path, is_finished):
    """Of another question, or another answer to the same."""
    description = {"method": "a"} if is_finished else {"method": "b"}
    other = ScoreShards.open(tmp_path / "other", 7, 5, description)
    other.append(0, 0, 2 * SCORES[:3, :4].mT)
    if not is_finished:
        (written / "finished.json").unlink()
    files_in(written)[0].write_bytes(files_in(tmp_path / "other")[0].read_bytes())
    with pytest.raises(StaleStore, match=r"something else|than finished"):
        ScoreShards.load(written).values()


@pytest.mark.parametrize(
    "name",
    [
        "{stem} (1).safetensors",
        "scores-copy.safetensors",
        "scores-0000000003-0000000000-0000000000-0000000004.safetensors",
        "scores-0000000000-0000000006-0000000000-0000000004.safetensors",
        "scores-0000000000-0000000003-0000000004-0000000008.safetensors",
        f"scores-{'9' * 200}.safetensors",
    ],
)
def test_a_file_of_another_name_is_refused_and_may_be_removed(written, name):
    file = files_in(written)[0]
    copy = written / name.format(stem=file.stem)
    copy.write_bytes(file.read_bytes())
    with pytest.raises(StaleStore, match=r"(?s)a name that is none.*remove it"):
        ScoreShards.load(written).values()
    copy.unlink()
    assert torch.equal(ScoreShards.load(written).values(), SCORES)


@pytest.mark.parametrize("change", [{"unit": "RANK"}, {"more": 1}])
def test_another_unit_is_noticed_and_the_header_may_be_deleted(written, change):
    path = written / "finished.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "header": {**told["header"], **change}}))
    with pytest.raises(StaleStore, match=r"(?s)`digest` in finished\.json.*delete the file"):
        ScoreShards.load(written).values()
    path.unlink()
    shards = ScoreShards.load(written)
    assert shards.is_whole and shards.header is None and shards.missing(0, 3) == []
    shards.finish({"unit": "DERIVATIVE"})
    assert torch.equal(ScoreShards.load(written).values(), SCORES)


@pytest.mark.parametrize("change", [{"n": 8}, {"n": 0}, {"q": -1}, {"q": 10**30}, {"q": 5.0}])
def test_another_size_is_noticed_and_the_folder_may_be_deleted(written, change):
    path = written / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StaleStore, match=r"(?s)manifest\.json.*delete the folder"):
        ScoreShards.load(written)
    shutil.rmtree(written)
    assert shards_in(written).missing(0, 5) == [(0, 7)]


@pytest.mark.parametrize("k", range(4))
def test_after_its_file_is_deleted_exactly_its_scores_are_missing(written, k):
    """And whoever makes them again makes the folder whole."""
    first, last, start, stop = PARTS[k]
    files_in(written)[k].unlink()
    shards = ScoreShards.load(written)
    assert shards.header is None and not shards.is_whole
    with pytest.raises(ShapeError, match=r"(?s)without all of its scores.*to finish it"):
        shards.values()
    assert shards.missing(first, last) == [(start, stop)]
    shards.append(first, start, SCORES[first:last, start:stop].mT)
    assert shards.missing(first, last) == [] and shards.header is None
    shards.finish({"unit": "DERIVATIVE"})
    assert torch.equal(ScoreShards.load(written).values(), SCORES)


def test_a_folder_of_saved_scores_is_refused_until_they_are_removed(tmp_path):
    (tmp_path / "scores.json").write_text("{}")
    with pytest.raises(StaleStore, match=r"(?s)scores\.json of the other kind.*remove the kind"):
        shards_in(tmp_path)
    (tmp_path / "scores.json").unlink()
    assert shards_in(tmp_path).done(0, 5) == 0
