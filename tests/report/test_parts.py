"""The parts that need no page: rankings, histograms, sprites, numbers, checks."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from upweight.errors import NonFinite
from upweight.notation import alike, count, interval, readable
from upweight.report import Display
from upweight.report.evidence import evidence_of
from upweight.report.examples import examples
from upweight.report.sprite import GUTTER, LARGEST_SIDE, as_images, display_range, sheets, sprite
from upweight.report.strongest import histogram, numbers, ranked
from upweight.scores import Unit
from upweight.task.data import as_data


def test_strongest_agrees_with_a_full_sort_and_with_scores_top(run):
    for query in range(3):
        ranking = run.scores.top(3, query)
        effect = numbers(run.scores, query)
        assert ranked(effect, 3) == ranking.raises
        assert ranked(-effect, 3) == ranking.lowers


def test_strongest_breaks_ties_by_column_and_lists_no_zero():
    effect = np.array([0.0, 2.0, 1.0, 2.0, 2.0, -1.0, 0.0])
    assert ranked(effect, 2) == (1, 3)
    assert ranked(effect, 10) == (1, 3, 4, 2)
    assert ranked(-effect, 10) == (5,)


@pytest.mark.parametrize("seed", range(5))
def test_histogram_counts_every_score_on_its_side_of_zero(seed):
    effect = np.random.default_rng(seed).standard_t(2, 1000) + seed - 2
    start, width, counts = histogram(effect)
    edges = start + width * np.arange(len(counts) + 1)
    assert sum(counts) == 1000
    assert np.isclose(edges, 0).any()
    below = sum(c for c, right in zip(counts, edges[1:], strict=True) if right < width / 2)
    assert below == int((effect < 0).sum())
    assert start <= effect.min()
    assert edges[-1] >= effect.max() - 1e-9 * width


def test_histogram_of_zeros_is_one_bin():
    assert histogram(np.zeros(4)) == (0.0, 0.0, [4])


def test_sprite_tiles_are_the_images():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 1), dtype=np.uint8)
    sheet = sprite(images, *display_range(images))
    pixels = np.asarray(Image.open(io.BytesIO(sheet.png)))
    for place, image in enumerate(images):
        top = place // sheet.columns * (4 + 2 * GUTTER) + GUTTER
        left = place % sheet.columns * (3 + 2 * GUTTER) + GUTTER
        np.testing.assert_array_equal(pixels[top : top + 4, left : left + 3], image[..., 0])


def test_many_images_are_sheets_that_are_compressed_where_they_are_too_large(monkeypatch):
    images = np.repeat(np.arange(10, dtype=np.uint8) * 25, 64).reshape(10, 8, 8, 1)
    monkeypatch.setattr("upweight.report.sprite.TILES", 4)
    exact = sheets(images, 0, 255)
    assert [(s.columns, s.rows, s.media) for s in exact] == [
        (2, 2, "image/png"), (2, 2, "image/png"), (2, 1, "image/png"),
    ]  # fmt: skip
    monkeypatch.setattr("upweight.report.sprite.EXACT_BYTES", 10)
    small = sheets(images, 0, 255)
    assert {s.media for s in small} == {"image/webp"}
    pixels = np.asarray(Image.open(io.BytesIO(small[1].png)).convert("L")).astype(int)
    assert abs(pixels[4, 4] - 100) < 12 and abs(pixels[14, 14] - 175) < 12


def test_large_images_become_thumbnails():
    sheet = sprite(np.zeros((1, 3 * LARGEST_SIDE, LARGEST_SIDE, 3), dtype=np.uint8), 0, 255)
    assert (sheet.height, sheet.width) == (LARGEST_SIDE, LARGEST_SIDE // 3)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 5, 4), (2, 5, 4, 1)),
        ((2, 1, 5, 4), (2, 5, 4, 1)),
        ((2, 3, 5, 4), (2, 5, 4, 3)),
        ((2, 5, 4, 3), (2, 5, 4, 3)),
    ],
)
def test_image_layouts(shape, expected):
    images = as_images(np.zeros(shape))
    assert images is not None
    assert images.shape == expected


@pytest.mark.parametrize("shape", [(2, 5), (2, 7, 5, 6), (2, 3, 4, 5, 6)])
def test_other_layouts_are_not_images(shape):
    assert as_images(np.zeros(shape)) is None


def test_one_display_range_for_train_and_queries():
    assert display_range(np.zeros(2, np.uint8), np.ones(2, np.uint8)) == (0, 255)
    assert display_range(np.array([0.2, 0.5]), np.array([0.1, 0.9])) == (0, 1)
    assert display_range(np.array([-2.0, 0.5]), np.array([0.1, 3.0])) == (-2, 3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.01234, "−0.0123"),
        (1.5, "1.50"),
        (6.1e-12, "6.10×10⁻¹²"),
        (12345.0, "12,300"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_readable(value, text):
    assert readable(value) == text


def test_intervals_near_one_keep_the_digits_that_tell_them_from_one():
    assert interval((0.99981, 0.9996, 0.9999)) == "0.9998 [0.9996, 0.9999]"
    assert interval((1.012, math.nan, math.nan)) == "1.012"
    assert interval((math.nan, math.nan, math.nan)) == "–"


def test_counts_agree_in_number():
    assert [count(1, "query"), count(2, "query"), count(5000, "image")] == [
        "1 query",
        "2 queries",
        "5,000 images",
    ]


def test_labels_take_class_names_and_targets_may_carry_weights():
    data = as_data((torch.zeros(3, 2), (torch.tensor([0, 1, 7]), torch.ones(3))))
    assert examples(data, [1, 2], "train", Display(names=("cat", "dog"))).labels == ("dog", "7")


def test_labels_of_dict_batches():
    data = as_data({"x": torch.zeros(2, 4, 4), "labels": torch.tensor([3, 5])})
    shown = examples(data, [1], "train", Display())
    assert (shown.labels, shown.noun) == (("5",), "image")


def test_token_like_inputs_fall_back_to_labels():
    data = as_data((torch.zeros(2, 3, 4, 5, 6), torch.tensor([0.5, 1.0])))
    assert examples(data, [0], "train", Display()).noun == "example"
    assert examples(data, [0], "train", Display()).labels == ("0.5",)


def test_a_retraining_that_diverged_is_refused(make_check):
    diverged = torch.tensor([[0.1], [math.nan], [0.2]])
    with pytest.raises(NonFinite, match=r"nan for \(5,\)"):
        evidence_of([replace(make_check(), actual=diverged)], 3, 10)


def test_rank_scores_keep_their_sign(run):
    ranked = replace(run.scores, unit=Unit.RANK)
    np.testing.assert_array_equal(numbers(ranked, 1), run.scores.values[1].numpy())


def test_notes_that_differ_in_numbers_alone_are_said_once():
    first, others = "3 of 20 are 0.5 % off in 0.weight", ["4 of 20 are 7e-03 % off in 0.weight"]
    unlike = ["3 of 20 are 0.5 % off in 2.weight", "layers.0.bias", "layers.1.bias", "x2", "x3"]
    found = alike([first, *others, first, *unlike])
    assert found == (f"{first} (and 1 other alike, with other numbers)", *unlike)
    again = alike([*found, "5 of 20 are 1 % off in 0.weight"])
    assert again == (f"{first} (and 2 others alike, with other numbers)", *unlike)
    assert alike([]) == ()
