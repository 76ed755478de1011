"""What the page says of the training set, and the columns that it adds up."""

import base64
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

import upweight as uw
from tests.fitted import at
from upweight.errors import DataError, ShapeError, SpecError
from upweight.report import Display, html, totals, whatif
from upweight.report.duplicates import duplicates
from upweight.report.live import TrainFacts
from upweight.report.shown import content
from upweight.report.strongest import numbers, ranked
from upweight.report.totals import Grouping, grouping
from upweight.report.training import LISTED, classes, training


@pytest.mark.parametrize("block", [1, 7, 10, 25, 10**6])
def test_totals_are_the_sums_whatever_the_blocks(run, monkeypatch, block):
    monkeypatch.setattr(totals, "BLOCK", block)
    scores = run.scores
    parts = {"a": Grouping(("x", "empty", "y"), np.array([0, 2] * 5))}
    found = totals.totals(scores, parts)
    effect = np.stack([numbers(scores, q) for q in range(3)])
    np.testing.assert_allclose(found.signed, effect.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.absolute, np.abs(effect).sum(axis=0), rtol=1e-12)
    expected = np.stack([effect[:, ::2].sum(axis=1), np.zeros(3), effect[:, 1::2].sum(axis=1)], 1)
    np.testing.assert_allclose(found.groups["a"], expected, atol=1e-12)


def test_totals_hold_a_block_and_never_all_scores(run, monkeypatch):
    values = torch.ones(400, 20_000, dtype=torch.float32)
    scores = replace(run.scores, values=values)
    monkeypatch.setattr(totals, "BLOCK", 100_000)
    tracemalloc.start()
    totals.totals(scores, {"a": Grouping(("x", "y"), np.arange(20_000) % 2)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values.nbytes / 4


def test_groups_of_few_values_of_many_and_of_numbers():
    few = grouping(["b", "a", "b"], 3, "source")
    assert (few.names, few.codes.tolist()) == (("a", "b"), [1, 0, 1])
    many = grouping([f"{i:03}" for i in range(300)] + ["000"], 301, "source")
    assert len(many.names) == totals.MOST_GROUPS
    assert many.names[-1] == "101 others"
    assert many.sizes.sum() == 301
    binned = grouping([*np.arange(1000.0), np.nan], 1001, "length")
    assert len(binned.names) == totals.BINS + 1
    assert binned.sizes.tolist() == [100] * totals.BINS + [1]


def test_metadata_of_another_length_are_refused(run):
    run.options = {"metadata": {"source": ["web"] * 9}}
    with pytest.raises(ShapeError, match=r"metadata\['source'\] must[\s\S]*: 10[\s\S]*9 entries"):
        run.write()


def test_embedded_columns_are_what_predict_says(run):
    page = run.write()
    text = re.search(r'id="columns">(.*?)</script>', page)[1]
    whole = run.data()["whole"]
    assert whole == list(range(10))
    held = np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(10, 3)
    for dropped in ([3], [0, 9], [1, 2, 5, 7]):
        expected = run.scores.predict(drop=dropped).numpy()
        np.testing.assert_allclose(held[dropped].astype(float).sum(axis=0), expected, rtol=1e-5)


def test_columns_that_do_not_fit_are_those_of_examples_that_many_queries_show(run, monkeypatch):
    values = torch.zeros(3, 10)
    values[:, 4], values[:2, 6], values[2, 8], values[0, 1] = 1.0, 2.0, 5.0, 4.0
    scores = replace(run.scores, values=values)
    effect = [numbers(scores, q) for q in range(3)]
    ends = [i for row in effect for i in (*ranked(row, 10), *ranked(-row, 10))]
    absolute = values.abs().sum(dim=0).numpy()
    monkeypatch.setattr(whatif, "BUDGET_BYTES", 4 * 3 * 3)
    assert whatif.columns(scores, ends, [], absolute)[0] == [4, 6, 8]
    assert whatif.columns(scores, ends, [9], absolute)[0] == [4, 6, 9]


def test_equal_inputs_are_found_wherever_they_are_and_conflicts_come_first():
    X = torch.arange(20.0).reshape(10, 2)
    X[7] = X[2]
    X[9] = X[5] = X[0]
    found = duplicates(X, ["a"] * 7 + ["b"] + ["a"] * 2, range(10))
    assert found.same == ((2, 7), (0, 5, 9))
    assert (found.sets, found.extra) == (2, 3)


def test_inputs_of_any_dtype_and_of_dicts_are_compared(run):
    X = torch.randn(10, 4, 4)
    X[7] = X[2]
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        assert (2, 7) in duplicates((100 * X).to(dtype), None, range(10)).same
    run.train = {"labels": torch.arange(10) % 3, "pixels": X}
    twins = run.data()["training"]["twins"]
    assert (twins["same"], twins["conflicts"]) == ([[2, 7]], [True])


def test_the_nearest_other_is_the_one_of_largest_cosine():
    draw = np.random.default_rng(0)
    images = torch.from_numpy(draw.random((40, 6, 6)))
    images[31] = images[3] * 0.5 + 0.2  # the same up to brightness and contrast
    found = duplicates(images, None, [3, 8])
    assert found.near[0] == (3, 31)
    assert found.cosines[0] == pytest.approx(1.0, abs=1e-6)
    flat = images.reshape(40, -1).numpy()
    unit = flat - flat.mean(axis=1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit[8]
    cosine[8] = -2
    assert found.near[1] == (8, int(cosine.argmax()))
    assert found.cosines[1] == pytest.approx(cosine.max(), abs=1e-6)


def test_texts_are_equal_but_for_case_and_spacing():
    texts = ["Buy now", "hello there my friend", "buy  NOW", "hello there, my dear friend", "other"]
    found = duplicates(texts, None, range(5))
    assert found.same == ((0, 2),)
    assert found.near[0] == (1, 3)


def test_long_texts_are_compared_by_their_beginning_and_equal_only_as_a_whole():
    head = "one two three " * 2000  # 28 000 characters
    words = "four five six " * 5
    loud = head[:20_000].upper() + head[20_000:]
    texts = [head + words, loud + words, head + words.upper(), head + "seven", "x " * 9]
    found = duplicates(texts, None, range(5))
    assert found.same == ((0, 1),), "case does not count among the first 20 000 characters"
    assert found.read == 20_000
    assert found.cosines[0] == pytest.approx(1.0, abs=1e-5), "what follows is not counted"
    assert duplicates(["short", "text"], None, [0]).read is None


def test_the_words_of_many_long_texts_are_not_all_counted(monkeypatch):
    counted = []
    original = np.sqrt
    monkeypatch.setattr("upweight.report.duplicates.CHARACTERS", 5000)
    monkeypatch.setattr(
        "upweight.report.duplicates.np.sqrt", lambda x: counted.append(x.sum()) or original(x)
    )
    found = duplicates(["a b c d " * 5000, "e f g h " * 5000], None, range(2))
    assert found.read == 2500
    assert max(counted) == 1250, "a word every other character"


def test_half_of_an_emoji_is_a_character_like_any_other():
    assert duplicates(["a \ud83d", "A  \ud83d", "b"], None, range(3)).same == ((0, 1),)


def test_columns_of_a_table_count_alike_whatever_their_units():
    X = torch.tensor([[0.0, 1.0], [0.1, 900.0], [5.0, 2.0], [5.1, 901.0], [2.0, 300.0]])
    scaled = X * torch.tensor([1000.0, 0.001])
    mine, theirs = (duplicates(x, None, range(5)) for x in (X, scaled))
    assert mine.near == theirs.near
    np.testing.assert_allclose(mine.cosines, theirs.cosines, atol=1e-4)


def test_the_matrix_of_classes_holds_means_over_pairs():
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(5, 12))
    codes = draw.integers(0, 3, 12)
    asked = ["a", "b", "a", "c", "b"]
    sums = np.stack([scores[:, codes == g].sum(axis=1) for g in range(3)], axis=1)
    found = classes(Grouping(("a", "b", "c"), codes), sums, asked)
    assert found is not None
    for a in range(3):
        for b, name in enumerate("abc"):
            pairs = scores[[q for q in range(5) if asked[q] == name]][:, codes == a]
            assert found["matrix"][a][b] == pytest.approx(pairs.mean(), rel=1e-4)


def test_suspicious_are_those_of_largest_self_influence_else_of_largest_loss(run):
    losses, own = np.arange(10.0), np.arange(10.0)[::-1].copy()
    found = totals.totals(run.scores, {})
    both = training(found, {}, TrainFacts(losses, own), None, None, ["0"] * 3).data
    assert [row["id"] for row in both["suspicious"]][:3] == [0, 1, 2]
    assert both["ranked_by"] == "self-influence"
    one = training(found, {}, TrainFacts(losses), None, None, ["0"] * 3).data
    assert [row["id"] for row in one["suspicious"]][:3] == [9, 8, 7]
    none = training(found, {}, TrainFacts(), None, None, ["0"] * 3).data
    assert "suspicious" not in none


def test_half_of_the_value_is_held_by_as_many_as_are_said(run):
    scores = replace(run.scores, values=torch.tensor([[10.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]] * 3))
    value = training(totals.totals(scores, {}), {}, TrainFacts(), None, None, [""] * 3).data
    assert (value["value"]["tenth"], value["value"]["half"]) == (1, 1)
    scores = replace(run.scores, values=torch.ones(3, 10))
    value = training(totals.totals(scores, {}), {}, TrainFacts(), None, None, [""] * 3).data
    assert (value["value"]["tenth"], value["value"]["half"]) == (1, 5)


def test_self_influence_and_losses_come_from_the_live_method(run):
    import upweight as uw

    torch.manual_seed(0)
    X, y = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 3
    model = torch.nn.Linear(4, 3).double()
    task = uw.Task(model, loss=uw.CrossEntropy(), penalty=uw.L2(0.1))
    fitted = uw.Influence(uw.GGN(), damping=0.1).fit(task, (X, y))
    run.scores, run.train, run.queries = fitted.attribute((X[:3], y[:3])), (X, y), (X[:3], y[:3])
    rows = run.data()["training"]["suspicious"]
    own, losses = -fitted.self_influence(), task.losses(task.theta(), (X, y))
    assert [row["id"] for row in rows] == own.argsort(descending=True).tolist()
    for row in rows:
        assert row["self"] == pytest.approx(float(own[row["id"]]), rel=1e-4)
        assert row["loss"] == pytest.approx(float(losses[row["id"]]), rel=1e-4)
    run.options = {"self_influence": (), "train_losses": ()}
    assert "suspicious" not in run.data()["training"]


@pytest.mark.parametrize("name", ["train_losses", "self_influence", "train_labels", "train_texts"])
def test_facts_of_another_length_are_refused(run, name):
    run.options = {name: ["1"] * 4 if name in ("train_labels", "train_texts") else [1.0] * 4}
    with pytest.raises(ShapeError, match=rf"{name} must have one[\s\S]*: 10"):
        run.write()


def test_tokens_need_their_numbers(run):
    run.options = {"train_tokens": [["a"]] * 10}
    with pytest.raises(ShapeError, match="only train_tokens"):
        run.write()
    run.options["token_scores"] = lambda q, some: np.zeros((3, 7, 2))
    with pytest.raises(ShapeError, match=r"shares \[\d+, t\](.|\n)*a ndarray"):
        run.write()


def test_renderers_give_content_and_never_markup(run):
    parts = content(["a", {"b": 1.23456}, np.zeros((3, 3), np.uint8)])
    assert [set(part) for part in parts] == [{"text"}, {"pairs"}, {"picture"}]
    assert parts[1]["pairs"] == [["b", "1.235"]]
    with pytest.raises(DataError, match="type object"):
        content(object())
    with pytest.raises(DataError, match=r"shape \(2, 3, 4, 5\)"):
        content(np.zeros((2, 3, 4, 5)))


def test_many_long_texts_share_the_room(run):
    run.options = {"query_texts": ["x" * 10_000] * 3}
    assert {len(q["text"]) for q in run.data()["queries"]} == {4000}


def test_a_dataset_is_read_only_for_what_is_shown_and_to_tell_its_examples_apart(run):
    read = []

    class Photos(torch.utils.data.Dataset):
        def __len__(self):
            return 500

        def __getitem__(self, i):
            read.append(i)
            return torch.full((4, 4), float(i)), i % 2

    values = torch.zeros(3, 500)
    values[:, 300:330] = torch.arange(30.0) + 1
    scores = replace(run.scores, values=values)
    html(scores, run.path, Display(Photos(), run.queries, k=1))
    first, middle, last = 0, 250, 499  # together and alone: how examples lie in a batch
    assert sorted(read) == sorted([*[first, middle, last] * 2, *range(330 - LISTED, 330)])


@pytest.mark.parametrize("measure", [uw.Loss(), uw.Margin()], ids=repr)
def test_shares_of_tokens_are_those_of_the_scores(run, measure):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3), torch.nn.Flatten(), torch.nn.Linear(15, 2)
    ).double()
    ids, y = torch.randint(0, 7, (12, 5)), torch.arange(12) % 2
    train, queries = uw.as_data((ids, y)), uw.as_data((ids[:3], y[:3]))
    task = uw.Task(model, loss=uw.CrossEntropy())
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
    run.scores = at(fitted, 0.0).attribute(queries, measure)
    run.train, run.queries = train, queries
    run.options = {
        "train_tokens": [[f"t{i}" for i in row] for row in ids.tolist()],
        "k": 2,
        "self_influence": (),
    }
    data = run.data()
    side = data["answers"][1]["raised"]
    shown = side["ids"]
    shares, rest = fitted.attribute(queries, measure, into=uw.PerToken(shown))
    total = shares.sum(dim=2) + rest
    np.testing.assert_allclose(total, run.scores.values[:, shown], rtol=1e-8)
    np.testing.assert_allclose(side["rest"], rest[1], rtol=6e-3)
    np.testing.assert_allclose(side["tokens"], shares[1], rtol=6e-3)
    told = {example["id"]: example["tokens"] for example in data["examples"]}
    assert told[shown[0]] == [f"t{i}" for i in ids[shown[0]].tolist()]
    # As the message says: with the measure, from what the method returns; refused with another.
    run.options["token_scores"] = lambda q, some: fitted.attribute(
        queries.subset([q]), measure, into=uw.PerToken(some)
    )
    assert run.data()["answers"][1]["raised"]["tokens"] == side["tokens"]
    other = uw.Loss() if measure == uw.Margin() else uw.Margin()
    run.options["token_scores"] = lambda q, some: fitted.attribute(
        queries.subset([q]), other, into=uw.PerToken(some)
    )
    with pytest.raises(DataError, match=rf"score .* of {type(measure).__name__}\(\)"):
        run.data()
    run.options["token_scores"] = lambda q, some: fitted.attribute(
        queries.subset([q]), into=uw.PerToken(some)
    )[0][0]
    with pytest.raises(ShapeError, match="both parts"):
        run.data()
    del run.options["token_scores"]
    run.options["train_tokens"] = [row[1:] for row in run.options["train_tokens"]]
    with pytest.raises(ShapeError, match="4 tokens for 5 positions, 5 of which"):
        run.data()


class Spoken:
    """A tokenizer of seven words: 0 fills up, 1 begins a text."""

    pad_token_id, eos_token_id, all_special_ids = 0, None, [0, 1]

    def convert_ids_to_tokens(self, numbers):
        return [["[PAD]", "[CLS]", "good", "##ish", "bad", "film", "end"][i] for i in numbers]

    def decode(self, numbers, skip_special_tokens):
        assert skip_special_tokens
        words = self.convert_ids_to_tokens([i for i in numbers if i > 1])
        return " ".join(words).replace(" ##", "")


def test_a_tokenizer_says_texts_and_both_sides_of_a_score_are_shared_out(run):
    torch.manual_seed(0)
    embed, out = torch.nn.Embedding(7, 4).double(), torch.nn.Linear(4, 2).double()

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = embed, out

        def forward(self, input_ids, attention_mask):
            mask = attention_mask[..., None].double()
            return (self.out(torch.tanh(self.embed(input_ids))) * mask).sum(dim=1)

    ids = torch.tensor([[1, 2, 3, 5, 0], [1, 4, 5, 6, 0], [1, 2, 5, 0, 0], [1, 4, 4, 3, 6]] * 3)
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.arange(12) % 2}
    train, queries = uw.as_data(batch), uw.as_data({k: v[:3] for k, v in batch.items()})
    task = uw.Task(Reader(), uw.CrossEntropy())
    fitted = at(uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train), 0.0)
    run.scores = fitted.attribute(queries, uw.Margin())
    run.train, run.queries = train, queries
    run.options = {"tokenizer": Spoken(), "k": 2, "self_influence": ()}
    data = run.data()
    assert [query["text"] for query in data["queries"]] == [
        "goodish film",
        "bad film end",
        "good film",
    ]
    example = next(each for each in data["examples"] if each["tokens"][-1] == " film")
    assert example["tokens"][1:] in ([" good", "ish", " film"], [" good", " film"])
    assert example["special"] == [0] and "predicted" in example
    assert data["answers"][1]["query"]["tokens"] == [" [CLS]", " bad", " film", " end"]
    side = data["answers"][1]["raised"]
    shown = side["ids"]
    # By the tokens of the query: the score is linear in the query's gradient, so the share of a
    # token is what is left of the score where every other use of the weights is a constant.
    found = fitted.query_tokens(queries, uw.Margin(), shown)
    whole = run.scores.values[:, shown]
    np.testing.assert_allclose(found.shares.sum(dim=2) + found.rest, whole, rtol=1e-8)
    np.testing.assert_allclose(side["theirs"], found.shares[1][:, :4], rtol=6e-3, atol=1e-12)
    token = 2

    class OfOneToken(uw.Measure):
        def __call__(self, task, params, batch):
            one = torch.zeros(5, 1, dtype=torch.float64)
            one[token] = 1

            def mixed(name, x):
                value = torch.func.functional_call(
                    getattr(task.model, name),
                    {k.split(".", 1)[1]: v for k, v in params.items() if k.startswith(name)}, (x,),
                )  # fmt: skip
                return one * value + (1 - one) * value.detach()

            mask = batch["attention_mask"][..., None].double()
            outputs = mixed("out", torch.tanh(mixed("embed", batch["input_ids"])))
            return task.loss.margin((outputs * mask).sum(dim=1), batch["labels"])

    alone = fitted.attribute(queries, OfOneToken()).values[:, shown]
    np.testing.assert_allclose(found.shares[:, :, token], alone, rtol=1e-8, atol=1e-12)
    with pytest.raises(SpecError, match="takes a tokenizer of transformers"):
        html(run.scores, run.path, Display(tokenizer=str.split))


def test_of_how_many_together_the_size_is_supported(run):
    def found(columns=None, **health):
        kept = {k: v for k, v in run.scores.provenance.health.items() if k != "beyond_first_order"}
        made = replace(run.scores.provenance, n=1000, health=kept | health)
        return whatif.together(replace(run.scores, provenance=made, columns=columns))

    levels = [[1, 0.05], [10, 0.1], [100, 0.3]]
    assert found(beyond_first_order=levels) == 10
    assert found(beyond_first_order=[[1, 0.5]]) == 0
    assert found(tuple("ab" * 5), beyond_first_order=levels) == 0  # a hundred in each
    assert found(against_sizes="", share_dropped=0.5) == 10
    assert found(against_sizes="no", share_dropped=0.5) == 0
    assert found() is None
