"""Scores on disk: what is written is what is read, and an interrupted pass goes on."""

import pytest
import torch

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
    with pytest.raises(StaleStore, match="give another folder"):
        shards_in(tmp_path, method="b")


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


def test_a_pass_goes_on_with_the_settings_that_it_was_begun_with(tmp_path):
    ScoreShards.open(tmp_path, 7, 5, {"method": "a"}, {"together": 5})
    again = ScoreShards.open(tmp_path, 7, 5, {"method": "a"}, {"together": 3})
    assert again.settings == {"together": 5}
