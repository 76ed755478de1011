"""Scores: rankings, predictions, groups, tables and files."""

import dataclasses
import json
import math
import re
import time

import numpy as np
import pytest
import torch

import upweight as uw
from tests.market import problem, train_in_place
from upweight.cli.spec import parse
from upweight.errors import (
    AssumptionWarning,
    DataError,
    MissingContext,
    NonFinite,
    NotWritten,
    ShapeError,
    SpecError,
    StaleStore,
    UpweightError,
)
from upweight.facts import Fact
from upweight.provenance import Context, Provenance
from upweight.report import summary
from upweight.runtime.store import Store
from upweight.scores import Scores, TopScores, Unit, stored_in
from upweight.verdict import Verdict

VALUES = torch.tensor([[3.0, -1.0, 0.0, 2.0, -4.0], [0.0, 0.0, 0.0, 1e-9, 0.0]]).double()
SOURCE = Provenance("Influence()", "loss", "Loss()", 5, 2, 3, "float64", "cpu", {"x": 1.5})
KEPT = torch.tensor([[0], [1]]), torch.tensor([[1.0], [2.0]])


def scores(values=VALUES, unit=Unit.DERIVATIVE, **options):
    return Scores(values, unit, SOURCE, **options)


# -- top ----------------------------------------------------------------------------------------


def test_top_lists_what_raises_and_what_lowers():
    top = scores().top(2, query=0)
    assert (top.raises, top.raises_by) == ((0, 3), (3.0, 2.0))
    assert (top.lowers, top.lowers_by) == ((4, 1), (-4.0, -1.0))
    assert top.query == 0 and "raises the loss  0    +3.00" in str(top)


def test_top_has_defaults():
    assert scores().top() == scores().top(10, 0) == scores().top(query=0)
    kept = TopScores(*KEPT, *KEPT, Unit.DERIVATIVE, SOURCE)
    assert kept.top(query=1) == kept.top(1, 1)


def test_top_never_lists_the_other_sign():
    assert scores().top(9, query=0).raises == (0, 3)
    second = scores().top(9, query=1)
    assert second.raises == (3,) and second.lowers == ()
    assert scores().top(0, query=0).raises == ()


@pytest.mark.parametrize("k", [-3, 1.5, "2", True])
def test_top_of_a_count_that_is_none(k):
    for ranked in (scores(), TopScores(*KEPT, *KEPT, Unit.DERIVATIVE, SOURCE)):
        with pytest.raises(SpecError, match="0 or more"):
            ranked.top(k, 0)


def test_top_breaks_ties_by_place():
    assert scores(torch.ones(1, 4)).top(2, query=0).raises == (0, 1)


@pytest.mark.parametrize("query", [2, -1, -3, 0.5, "0", True, None])
def test_a_query_that_is_not_there(query):
    for ask in (
        lambda: scores().top(1, query),
        lambda: scores().plot.histogram(query),
        lambda: summary(scores(), query=query),
    ):
        with pytest.raises(ShapeError, match=r"one of the 2 scored(.|\n)*0…1"):
            ask()
    with pytest.raises(ShapeError, match="0…1"):
        TopScores(*KEPT, *KEPT, Unit.DERIVATIVE, SOURCE).top(1, query)


# -- predict and removal ------------------------------------------------------------------


def test_predict_is_the_sum_over_changed_weights():
    torch.testing.assert_close(scores().predict(drop=[0, 4]), torch.tensor([1.0, 0.0]).double())
    weights = torch.tensor([1.0, 1.5, 1.0, 0.0, 3.0]).double()
    expected = VALUES @ (weights - 1)
    torch.testing.assert_close(scores().predict(weights=weights), expected)
    assert scores().predict().tolist() == [0.0, 0.0]


def linear_model(size=60):
    """A convex task at its minimum, and its data."""
    x, y = torch.randn(size, 3), torch.randint(2, (size, 1)).double()
    task = uw.Task(torch.nn.Linear(3, 1), uw.Bernoulli(), uw.L2(0.1))
    train_in_place(task, (x, y))
    return task, (x, y), (x[:4], y[:4])


SIZES = "read the order and not the size"


@pytest.mark.filterwarnings("error::upweight.errors.AssumptionWarning")
def test_a_prediction_warns_exactly_where_nothing_supports_its_size():
    task, train, queries = linear_model()
    exact = uw.Influence(uw.Hessian()).fit(task, train).attribute(queries)
    damped = uw.Influence(uw.Hessian(), damping=0.1).fit(task, train).attribute(queries)
    by_layer = uw.Influence(uw.KFAC(), damping=0.1).fit(task, train).attribute(queries)
    assert not exact.against_sizes
    exact.predict(drop=[1])
    exact.predict(weights=torch.ones(60))
    for found, why in (
        (damped, "damping changes sizes"),
        (damped.group("ab" * 30), "damping changes sizes"),
        (by_layer, "the method is not known to be exact"),
    ):
        for asked in ({"drop": [1]}, {"weights": torch.ones(found.values.shape[1])}):
            with pytest.warns(AssumptionWarning, match=f"{SIZES}: {why}.*check") as seen:
                found.predict(**asked)
            assert seen[0].filename == __file__


@pytest.mark.filterwarnings("error::upweight.errors.AssumptionWarning")
@pytest.mark.parametrize("strength, verdict", [(1.0, Verdict.SIZE), (30.0, Verdict.ORDER)])
def test_a_check_decides_and_its_scores_know_it_on_disk_as_well(strength, verdict, tmp_path):
    task, train, queries = linear_model()
    found = uw.Influence(uw.Hessian(), damping=1e-3).fit(task, train).attribute(queries)
    found = dataclasses.replace(found, values=strength * found.values)
    checked = uw.check(found, uw.training.Newton(), subsets=16)
    assert checked.verdict is verdict and found.checks == [checked]
    found.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores"), Scores.open(tmp_path / "scores")
    for known in (found, found.group("ab" * 30), *loaded):
        assert (not known.against_sizes) == (verdict is Verdict.SIZE)
        if verdict is Verdict.SIZE:
            known.predict(drop=[0])
        else:
            with pytest.warns(AssumptionWarning, match="said “Order only”: .*too large by"):
                known.predict(drop=[0])
        assert summary(known).startswith(f"{verdict}: {checked.reason}.")


@pytest.mark.filterwarnings("error::upweight.errors.AssumptionWarning")
def test_sizes_that_were_measured_by_training_again_are_predicted_without_a_warning():
    task, train, queries = linear_model(24)
    newton, inner = uw.training.Newton(), uw.Influence(uw.Hessian(), damping=0.1)
    stacked = uw.Stacked((inner,), subsets=16, seeds=2, by_layer=False)
    for method in (uw.LeaveOneOut(), stacked):
        found = method.fit(task, train, history=newton).attribute(queries)
        found.predict(drop=[0])
        assert "trained again" in summary(found)
    found.predict(drop=range(12))
    for drop in (range(4), range(20)):
        with pytest.warns(AssumptionWarning, match="random drops of 50 % of the data"):
            found.predict(drop=drop)
    halves = uw.SubsampledInfluence(subsets=40).fit(task, train, history=newton)
    with pytest.warns(AssumptionWarning, match="removals from 50"):
        halves.attribute(queries).predict(drop=[0])


def test_dropping_is_the_weight_zero():
    weights = torch.ones(5).double()
    weights[[1, 3]] = 0
    torch.testing.assert_close(scores().predict(drop=[1, 3]), scores().predict(weights=weights))
    torch.testing.assert_close(
        scores().predict(drop=np.array([1, 3])), scores().predict(weights=weights)
    )


def test_removal_is_the_prediction_of_each_group():
    removed = scores().removal()
    torch.testing.assert_close(removed.values, -VALUES)
    assert removed.how == "first order" and removed.groups == ((0,), (1,), (2,), (3,), (4,))
    together = scores().removal([[0, 3], 1, [False, False, True, False, True]])
    assert together.groups == ((0, 3), (1,), (2, 4))
    for k, group in enumerate(together.groups):
        torch.testing.assert_close(together.values[:, k], scores().predict(drop=group))


def test_effects_of_some_groups_in_any_order():
    removed = scores().removal([[0, 3], 1])
    assert torch.equal(removed.of([1, (3, 0)]).values, removed.values[:, [1, 0]])
    assert removed.of([1]).groups == ((1,),)
    with pytest.raises(ShapeError, match=r"asked for \[\(2,\)\]"):
        removed.of([1, 2])


def test_effects_are_a_finite_matrix_with_a_column_for_each_group():
    good = scores().removal()
    for change in ({"groups": ((0,),)}, {"values": -VALUES[0]}, {"linear": -VALUES[:1]}):
        with pytest.raises(ShapeError, match=r"\[q, e\]"):
            dataclasses.replace(good, **change)
    for name in ("values", "linear"):
        with pytest.raises(NonFinite, match="query 0, group 1"):
            dataclasses.replace(good, **{name: torch.where(VALUES == -1.0, math.inf, VALUES)})
    with pytest.raises(MissingContext, match="attach"):
        good.require_context()


def test_groups_have_no_removals_of_examples():
    with pytest.raises(ShapeError, match="in order"):
        scores().group("abbbb").removal()


# -- at a prompt ----------------------------------------------------------------------------------


def test_scores_introduce_themselves_in_five_lines_and_effects_in_three():
    past = Fact("Solver", "bad", 1.0, "m", 2.0, "it stopped early")
    facts = (past, Fact("Damping", "0"), Fact("Fine", "", 1, "", 0))
    made = dataclasses.replace(SOURCE, facts=facts, notes=("a",), measure="<m>")
    for shown, unit, more in (
        (Scores(VALUES, Unit.DERIVATIVE, made), "2 queries × 5 training examples, ∂m/∂w", 2),
        (Scores(VALUES, Unit.DERIVATIVE, made).removal([0]), "2 queries × 1 removal, Δm, first", 0),
    ):
        first, second, third, *others = repr(shown).splitlines()
        assert unit in first and "<m>" in first and second == "  method: Influence()"
        assert third.split() == "health: it stopped early; 1 note in provenance.notes".split()
        assert len(others) == more
        table = shown._repr_html_()
        assert table.count("<th") >= 2 + more and "&lt;m&gt;" in table and "<m>" not in table
        assert "<script" not in table and ("raises the measurement" in table) == bool(more)
    assert "health: the method checks nothing of itself" in repr(scores())


def test_scores_name_their_strongest_pair():
    place = int(VALUES.abs().argmax())
    q, i = divmod(place, VALUES.shape[1])
    assert f"training example {i} on query {q}: " in repr(scores())
    assert ".top(query=0)" in repr(scores())
    grouped = scores().group("abbbb")
    assert any(f"group {name} on query" in repr(grouped) for name in "ab")
    empty = dataclasses.replace(scores(), values=VALUES[:0])
    assert "strongest: none" in repr(empty)


def test_a_mask_drops_where_it_is_true():
    mask = [True, False, False, True, False]
    expected = scores().predict(drop=[0, 3])
    for form in (mask, np.array(mask), torch.tensor(mask)):
        assert torch.equal(scores().predict(drop=form), expected)
    assert scores().predict(drop=[False] * 5).tolist() == [0.0, 0.0]


def test_weights_in_a_list_are_weights():
    weights = [1.0, 1.5, 1.0, 0.0, 3.0]
    expected = scores().predict(weights=torch.tensor(weights).double())
    given = dict(enumerate(weights))
    for form in (np.array(weights), (w for w in weights), map(float, weights), given.values()):
        assert torch.equal(scores().predict(weights=form), expected)
    for form in (given, set(range(5))):  # their own order is no order of the columns
        with pytest.raises(ShapeError, match="no numbers"):
            scores().predict(weights=form)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_weights_that_are_not_finite(weight):
    with pytest.raises(NonFinite, match="column 3"):
        scores().predict(weights=torch.tensor([1, 1, 1, weight, 1]).double())


def test_dropping_beside_weights_is_refused():
    with pytest.raises(SpecError, match="either"):
        scores().predict(drop=[0], weights=torch.ones(5).double())


@pytest.mark.parametrize("drop", [[5], [-1], [0, 0], [1.9], [True, False]])
def test_dropping_what_is_not_there_or_twice(drop):
    with pytest.raises(ShapeError, match="0…4"):
        scores().predict(drop=drop)


def test_weights_of_another_length():
    with pytest.raises(ShapeError, match="no numbers"):
        scores().predict(weights=["a"] * 5)
    with pytest.raises(ShapeError, match=r"\(5,\)"):
        scores().predict(weights=torch.ones(4))


def test_ranks_and_values_predict_nothing():
    for unit, words in ((Unit.RANK, "only rank"), (Unit.VALUE, "share out a total")):
        ranks = scores(unit=unit)
        for act in (ranks.predict, ranks.removal):
            with pytest.raises(UpweightError, match=words):
                act()
        assert ranks.top(1, 0).raises == (0,)


# -- group --------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["b", "a", "b", "a", "c"], torch.tensor([1, 0, 1, 0, 2])])
def test_groups_are_sums(labels):
    grouped = scores().group(labels)
    expected = torch.tensor([[1.0, 3.0, -4.0], [1e-9, 0.0, 0.0]]).double()
    torch.testing.assert_close(grouped.values, expected)
    assert grouped.columns in (("a", "b", "c"), ("0", "1", "2"))
    assert grouped.unit is Unit.DERIVATIVE


def test_as_many_groups_as_columns_are_the_columns():
    """20 000 labels of their own: work that grows with their square would take half a minute."""
    n = 20_000
    values = torch.arange(2.0 * n).double().reshape(2, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    grouped = scores(values).group([f"{i:05}" for i in order.tolist()])
    assert time.process_time() - started < 2.0
    assert torch.equal(grouped.values[:, order], values)


def test_errors_of_groups_add_in_squares():
    error = torch.full_like(VALUES, 2.0)
    grouped = scores(error=error).group("abbbb")
    torch.testing.assert_close(grouped.error[0], torch.tensor([2.0, 4.0]).double())


@pytest.mark.parametrize(
    "labels, named",
    [
        ([1, "1", 2, 2, "1"], "1 of type int and '1' of type str"),
        ([None, "a", "None", "a", "a"], "None of type NoneType and 'None' of type str"),
        (["True", np.bool_(True), "a", "a", "a"], "'True' of type str and True of type bool"),
    ],
)
def test_labels_that_differ_and_read_alike_are_refused(labels, named):
    with pytest.raises(DataError, match=named):
        scores().group(labels)
    one = scores().group([str(label) for label in labels])  # the way out
    assert one.columns == tuple(sorted({str(label) for label in labels}))


def test_labels_of_several_types_that_are_equal_are_one():
    assert scores().group([1, np.int8(1), torch.tensor(1), 2, np.int64(2)]).columns == ("1", "2")
    assert scores().group([float("nan"), np.float32("nan"), 1.5, 1.5, 1.5]).columns == (
        "1.5",
        "nan",
    )


def test_grouping_needs_a_label_per_column():
    with pytest.raises(ShapeError, match="5"):
        scores().group([0, 1])


# -- what scores refuse to be ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"values": VALUES[0]}, {"error": VALUES[:1]}, {"columns": ("a",)}],
    ids=["vector", "errors", "columns"],
)
def test_shapes_that_disagree(options):
    with pytest.raises(ShapeError, match=r"\[q, n\]"):
        scores(**options)


def test_scores_are_finite():
    values = VALUES.clone()
    values[1, 2] = math.inf
    with pytest.raises(NonFinite, match="query 1, column 2"):
        scores(values)


def test_scores_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores().unit = Unit.RANK


def test_context_must_be_there_when_asked_for():
    with pytest.raises(MissingContext, match="attach"):
        scores().require_context()
    p = problem("softmax")
    data = uw.as_data(p.train)
    context = Context(p.task, data, data, uw.Loss())
    assert scores().attach(context).require_context() is context


def test_loaded_scores_are_checked_as_the_error_says(tmp_path):
    p = problem("softmax")
    fitted = uw.Influence().fit(p.task, p.train)
    fitted.attribute(p.queries).save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    way_out = "scores.attach(upweight.provenance.Context(task, train, queries, measure))"
    with pytest.raises(MissingContext, match=re.escape(way_out)):
        uw.check(loaded, uw.training.Newton(), subsets=8)
    names = {"task": p.task, "train": p.train, "queries": p.queries, "measure": uw.Loss()}
    whole = eval(way_out, {"scores": loaded, "upweight": uw} | names)
    assert len(uw.check(whole, uw.training.Newton(), subsets=8).lds.predicted) == 8


# -- files --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    error = VALUES.abs() + 0.5
    return scores(error=error, columns=tuple("abcde")).save(tmp_path / "run")


def test_what_was_saved_is_loaded(saved):
    loaded = Scores.load(saved)
    assert torch.equal(loaded.values, VALUES) and torch.equal(loaded.error, VALUES.abs() + 0.5)
    assert loaded.columns == tuple("abcde") and loaded.unit is Unit.DERIVATIVE
    assert loaded.provenance == SOURCE and loaded.context is None


def test_scores_of_a_method_survive(tmp_path):
    p = problem("softmax")
    found = uw.Influence(damping=0.1).fit(p.task, p.train).attribute(p.queries)
    loaded = Scores.load(found.save(tmp_path))
    assert torch.equal(loaded.values, found.values)
    assert loaded.provenance == found.provenance
    assert parse(loaded.provenance.method) == uw.Influence(damping=0.1)
    assert loaded.provenance.n == p.n and loaded.provenance.q == 5 and loaded.provenance.p == 12


def test_a_second_save_replaces_the_first(saved):
    scores(2 * VALUES).save(saved)
    assert torch.equal(Scores.load(saved).values, 2 * VALUES)
    assert len(list(saved.iterdir())) == 3
    scores(VALUES[:1]).save(saved)  # of another shape
    assert torch.equal(Scores.load(saved).values, VALUES[:1])
    assert len(list(saved.iterdir())) == 3


def test_float32_and_sliced_values_survive(tmp_path):
    values = torch.arange(12.0).reshape(4, 3).mT
    assert torch.equal(Scores.load(scores(values).save(tmp_path)).values, values)


def test_no_pickle_is_written(saved):
    """Each file is what it says it is, to the last byte: JSON, and a safetensors table."""
    contents = tile(saved).read_bytes()
    length = int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8 : 8 + length])
    assert sorted(header) == ["__metadata__", "error", "values"]
    assert len(contents) == 8 + length + 2 * VALUES.numel() * 8
    for name in ("manifest.json", "finished.json"):
        json.loads((saved / name).read_text(encoding="utf-8"))


def tile(folder):
    (found,) = folder.glob("tile-*.safetensors")
    return found


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def spoil_header(path):
    data = bytearray(path.read_bytes())
    data[10] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [flip_last_byte, cut, spoil_header])
def test_damaged_tensors_are_stale(saved, damage):
    damage(tile(saved))
    with pytest.raises(StaleStore, match="must be what was written"):
        Scores.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"facts": {}},
        {"shards": {}},
        {"schema": 99},
        {"digest": "0"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_header_is_stale(saved, change):
    path = saved / "finished.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(header | change), encoding="utf-8")
    with pytest.raises(StaleStore):
        Scores.load(saved)


def test_a_header_of_another_run_is_stale(saved, tmp_path):
    other = scores(3 * VALUES).save(tmp_path / "other")
    (saved / "finished.json").write_bytes((other / "finished.json").read_bytes())
    with pytest.raises(StaleStore, match="other numbers than finished"):
        Scores.load(saved)


def test_scores_are_not_saved_over_something_else(saved, tmp_path):
    Store.open(tmp_path / "other", {"model": "m"}).write("state", {"x": torch.zeros(1)})
    with pytest.raises(StaleStore, match=r"(?s)another model, scores.*give another folder"):
        scores().save(tmp_path / "other")
    with pytest.raises(StaleStore, match=r"another model, scores, shape\."):
        Store.open(saved, {"model": "m"})


def test_scores_that_are_opened_are_those_that_are_loaded(saved):
    held, opened = Scores.load(saved), Scores.open(saved)
    pairs = zip(repr(opened).splitlines(), f"Stored{held!r}".splitlines(), strict=True)
    assert [one.split(":")[0] for one, other in pairs if one != other] == ["  strongest"]
    assert len(opened) == 2
    assert opened.top(3, 1) == held.top(3, 1)
    assert torch.equal(opened.predict(drop=[1, 3]), held.predict(drop=[1, 3]))
    w = torch.tensor([1.0, 0.5, 0, 1, 2])
    assert torch.equal(opened.predict(weights=w), held.predict(weights=w))
    plain = scores()
    plain.save(saved)
    opened = Scores.open(saved)
    assert torch.equal(opened.removal().values, plain.removal().values)
    assert torch.equal(opened.group("abbbb").values, plain.group("abbbb").values)


@pytest.mark.parametrize("read", [Scores.load, Scores.open, stored_in])
def test_scores_that_nobody_finished_are_refused(saved, read):
    (saved / "finished.json").unlink()
    with pytest.raises(ShapeError, match=r"(?s)some of it is missing.*attribute\(…, into=Shards"):
        read(saved)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_scores_of_nothing_survive(shape, tmp_path):
    scores(torch.zeros(shape)).save(tmp_path)
    assert Scores.load(tmp_path).values.shape == Scores.open(tmp_path).values.shape == shape


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Scores.load(tmp_path)


# -- tables -------------------------------------------------------------------------------------


def test_to_pandas():
    pandas = pytest.importorskip("pandas")
    frame = scores().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape == (2, 5) and frame.loc[0, 4] == -4.0
    assert (frame.index.name, frame.columns.name) == ("query", "example")
    grouped = scores().group("abbbb").to_pandas()
    assert list(grouped.columns) == ["a", "b"] and grouped.columns.name == "group"
    assert grouped.loc[0, "b"] == -3.0


def test_a_full_disk_leaves_what_was_saved(saved, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    before = Scores.load(saved)
    found = scores(2 * VALUES)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(NotWritten, match=r"(?s)safetensors: No space.*still in memory"):
            found.save(saved)
    assert torch.equal(Scores.load(saved).values, before.values)
    assert not list(saved.glob("*.part"))
    assert torch.equal(Scores.load(found.save(tmp_path / "elsewhere")).values, 2 * VALUES)
    assert torch.equal(Scores.load(found.save(saved)).values, 2 * VALUES)


def test_names_that_no_encoding_holds_are_kept_in_files_and_marked_in_tables(tmp_path):
    """Half of an emoji, as of a text that was cut."""
    pytest.importorskip("pandas")
    cut = "cut \ud83d"
    grouped = scores().group([cut, "b", cut, "b", "c"])
    grouped.save(tmp_path)
    assert Scores.load(tmp_path).columns == grouped.columns == ("b", "c", cut)
    assert grouped.to_pandas().to_csv().splitlines()[0] == "query,b,c,cut \ufffd"


def test_the_quoting_of_formulas_is_what_the_docstring_says():
    pytest.importorskip("pandas")
    frame = scores().group(["=1+1", "b", "@x", "-2", "+3"]).to_pandas()
    (line,) = [line for line in Scores.to_pandas.__doc__.splitlines() if "frame.columns" in line]
    exec(line.strip(), {"frame": frame})
    assert set(frame.columns) == {"'=1+1", "b", "'@x", "'-2", "'+3"}
