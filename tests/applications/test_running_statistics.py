"""Refits whose models have running statistics of their own, against loops by hand in PyTorch."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import acquisition, debugging, fairness, poisoning, selection, unlearning
from upweight.applications.calibration import calibration
from upweight.applications.held_out import Refits
from upweight.applications.reweighting import Walk
from upweight.applications.selection import Trial
from upweight.applications.subject import subject_of
from upweight.errors import SpecError
from upweight.testing.attacks import perturb_training
from upweight.training import FromFunction
from upweight.training.subset_models import subset_models

N, CLASSES = 60, 3
EKFAC = uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=0.1, tolerance=0)


def drawn(n, seed):
    """Three classes that overlap; the last input is 0 but for noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    X = 0.7 * torch.randn(n, 4, generator=draw, dtype=torch.float64)
    X[torch.arange(n), y] += 1.5
    return X * torch.tensor([1, 1, 1, 0.2]).double(), y


def loop(X, y, outputs=CLASSES, steps=25):
    """A function from data weights to a model: rows of weight 0 are in no batch."""

    def fit(weights):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, outputs)
        ).double()
        optimizer, stays = torch.optim.SGD(model.parameters(), 0.5), weights > 0
        for _ in range(steps):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(model(X[stays]), y[stays], reduction="none")
            ((weights[stays] * losses).sum() / len(X)).backward()
            optimizer.step()
        return model.eval()

    return fit


def without(rows, n=N):
    weights = torch.ones(n, dtype=torch.float64)
    weights[list(rows)] = 0
    return weights


def is_right(model, data):
    with torch.no_grad():
        return (model(data[0]).argmax(dim=1) == data[1]).double()


def losses(model, data):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none")


def statistics(model):
    return {name: x for name, x in model.named_buffers() if "running" in name}


def same(found, model):
    """Whether a task's model is another, its running statistics included."""
    expected = {k: x for k, x in model.state_dict().items() if "num_batches" not in k}
    state = found.state_dict()
    for name, x in expected.items():
        assert_close(state[name], x, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def noisy():
    """Some labels are wrong."""
    X, y = drawn(N, 0)
    y[::7] = (y[::7] + 1) % CLASSES
    fit = loop(X, y)
    model = fit(without(()))
    return fit, model, EKFAC.fit(uw.Task(model, uw.CrossEntropy()), (X, y)), (X, y)


@pytest.fixture(scope="module")
def attacked():
    """A trigger in the last input, in eight rows that are called class 0."""
    X, y = drawn(N, 0)
    rows = (y != 0).nonzero()[:8, 0].tolist()
    X[rows, 3], y[rows] = 3.0, 0
    fit = loop(X, y)
    method = uw.GradientDot().fit(uw.Task(fit(without(())), uw.CrossEntropy()), (X, y))
    clean = drawn(90, 1)
    triggered = (clean[0].clone(), clean[1])
    triggered[0][:, 3] = 3.0
    return fit, method, clean, triggered


def test_cleansed_models_are_measured_with_their_own(attacked, tmp_path):
    fit, method, clean, triggered = attacked
    others = clean[1] != 0
    found = poisoning.suspects(
        method, [x[others][:6] for x in triggered], [x[others][:6] for x in clean]
    )
    whole = fit(without(()))

    def contrast(model):
        def raised(x):
            outputs = model(x[others][:6])
            return outputs[:, 0] - outputs.mean(dim=1)

        with torch.no_grad():
            return float((raised(triggered[0]) - raised(clean[0])).mean())

    for folder in (None, tmp_path, tmp_path):  # what is read from the folder is the same
        done = holds(
            poisoning.cleanse(
                fit, found, triggered, clean, [4, 8], resources=uw.Resources(folder=folder)
            )
        )
        assert done.before.accuracy == pytest.approx(float(is_right(whole, clean).mean()))
        for one in (*done.curve, done.control):
            model = fit(without(one.rows))
            right = is_right(model, clean)
            assert one.accuracy == pytest.approx(float(right.mean()))
            assert one.lost.value == pytest.approx(float((is_right(whole, clean) - right).mean()))
            assert one.actual == pytest.approx(contrast(model) - contrast(whole), rel=1e-9)
            # Both halves together are all triggered images of other classes.
            with torch.no_grad():
                hits = float((model(triggered[0][others]).argmax(dim=1) == 0).double().mean())
            assert one.success.value + one.chosen_on.value == pytest.approx(2 * hits)
        chosen = fit(without(done.chosen.rows))
        same(method.task.moved_to(done.theta, done.others).model, chosen)
        assert sorted(done.others) == sorted(statistics(chosen))


@pytest.mark.parametrize("given", ["models", "state dicts", "subset models"])
def test_suspects_are_ranked_at_other_models_with_their_own(attacked, given):
    fit, method, clean, triggered = attacked
    others = clean[1] != 0
    asked = [[x[others][:6] for x in data] for data in (triggered, clean)]
    recipe, (X, y) = FromFunction(fit, twice=False), method.train.batch(0, N)
    halves = subset_models(recipe, method.task, method.train, 2)
    members = [fit(w) for w in halves.weights]
    history = {
        "models": members, "state dicts": [m.state_dict() for m in members],
        "subset models": halves,
    }  # fmt: skip
    found = poisoning.suspects(method, *asked, history=history[given])
    expected = []
    for model in (method.task.model, *members):
        at = uw.GradientDot().fit(uw.Task(model, uw.CrossEntropy()), (X, y))
        here = poisoning.suspects(at, *asked, target=found.target).predicted
        expected.append(here / here.norm())
    assert_close(found.predicted, torch.stack(expected).mean(dim=0), rtol=1e-10, atol=1e-14)


def test_changed_training_images_are_trained_on_with_their_own():
    X, y = drawn(N, 0)
    X = X.sigmoid()
    model = loop(X, y)(without(()))
    fitted = EKFAC.fit(uw.Task(model, uw.CrossEntropy()), (X, y))
    query, epsilon = tuple(x[:1] for x in drawn(3, 1)), 8 / 255

    def changed(steps):
        return perturb_training(fitted, query, 3, epsilon, recipe=Loop(), steps=steps, candidates=5)

    first, second = changed(1), changed(2)
    for found in (first, second):
        refit = loop(found.X, y)(without(()))
        same(fitted.task.moved_to(found.theta, found.others).model, refit)
        assert found.after == pytest.approx(float(losses(refit, query)), rel=1e-9)
        assert sorted(found.others) == sorted(statistics(refit))
    # The second step goes up the slope of the refit after the first.
    after = EKFAC.fit(uw.Task(loop(first.X, y)(without(())), uw.CrossEntropy()), (first.X, y))
    for i in first.rows:
        slope = after.input_influence(i, query)[0].sign()
        moved = second.X[i] - first.X[i]
        assert bool((moved * slope >= -1e-12).all()) and bool((moved != 0).any())


def test_kept_rows_are_judged_by_models_with_their_own(noisy):
    fit, model, fitted, _ = noisy
    found = holds(
        selection.subset(
            fitted, 0.6, "drop", validation=drawn(40, 2), test=drawn(50, 3), recipe=fit
        )
    )
    kept = set(range(N)) - set(found.rows.tolist())
    expected = losses(fit(without(kept)), drawn(50, 3))
    assert_close(found.kept.losses, expected, rtol=1e-10, atol=1e-12)
    change = expected - losses(model, drawn(50, 3))
    assert found.actual.value == pytest.approx(float(change.mean()), rel=1e-9)
    assert found.kept.accuracy.value == pytest.approx(
        float(is_right(fit(without(kept)), drawn(50, 3)).mean())
    )


def test_rounds_of_a_selection_go_on_from_models_with_their_own(noisy):
    """With next to no step what is predicted is the change up to the last refit but one."""
    fit, model, fitted, data = noisy
    method = uw.Influence(uw.EKFAC(uw.labels.Expected()), damping=1e9, tolerance=0)
    subject = subject_of(method.fit(fitted.task, data), recipe=fit)
    guide, queries = (uw.as_data(drawn(30, seed)) for seed in (2, 3))
    trial = Trial(Refits(subject, "A test"), 36, 0)
    before = trial.chosen("iterated", guide).before
    weights = before.train.weights
    assert 36 < int(weights.sum()) < N
    expected = losses(fit(weights), drawn(30, 3)) - losses(model, drawn(30, 3))
    assert_close(trial.predicted("iterated", guide, queries), expected, rtol=0, atol=1e-7)
    same(before.task.model, fit(weights))


def test_paths_of_weights_are_of_models_with_their_own(noisy):
    fit, _, fitted, (X, y) = noisy
    refits = Refits(subject_of(fitted, recipe=fit), "A test")
    walk, guide = Walk(refits, "exact", 0.1, 2), uw.as_data(drawn(30, 2))
    points = walk.points(guide, without(()), refits.attempted(without(())))
    assert len(points) == 3
    own = [fit(w) for w, _ in points]
    expected = torch.stack([losses(model, drawn(30, 3)) for model in own])
    found = walk.losses(points, uw.as_data(drawn(30, 3)))
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # The slope of a look-ahead is −⟨∇L, ∇ℓᵢ⟩/n of that model.
    w, model = points[2]
    slope = Walk(refits, "lookahead", 0.1, 1).slope(guide, w, model)

    def gradient(inputs, labels):
        loss = nn.functional.cross_entropy(own[2](inputs), labels)
        parts = torch.autograd.grad(loss, list(own[2].parameters()))
        return torch.cat([part.flatten() for part in parts])

    clean = gradient(*drawn(30, 2))
    by_hand = torch.stack([-gradient(X[i : i + 1], y[i : i + 1]) @ clean / N for i in range(N)])
    assert_close(slope, by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["exact", "lookahead"])
def test_weights_are_judged_by_models_with_their_own(noisy, rule):
    fit, model, fitted, _ = noisy
    splits = {"validation": drawn(30, 2), "test": drawn(50, 3)}
    found = holds(selection.reweight(fitted, fit, **splits, steps=2, radius=0.1, rule=rule))
    own = {"equal weights": model, "these": fit(found.w)}
    for name, each in own.items():
        expected = losses(each, splits["test"])
        assert_close(found.models[name].losses, expected, rtol=1e-10, atol=1e-12)
    start = losses(model, splits["validation"]).mean()
    if found.start == "equal weights":
        assert found.path[0].validation_loss == pytest.approx(float(start), rel=1e-9)
    reached = losses(own["these"], splits["validation"]).mean()
    assert found.path[found.steps].validation_loss == pytest.approx(float(reached), rel=1e-9)


def outputs(model, inputs):
    with torch.no_grad():
        return model(inputs)


def test_unlearning_is_held_against_a_refit_with_its_own(noisy):
    fit, model, fitted, (X, y) = noisy
    gone, (inputs, labels) = [0, 7, 14, 21], drawn(40, 2)
    got = holds(unlearning.without(fitted, gone, queries=(inputs, labels), recipe=fit))
    refit = fit(without(gone))
    step = fitted.task.layout.flatten(fitted.removal_step(gone))
    with torch.no_grad():
        start, end = (
            torch.cat([p.flatten() for p in each.parameters()]) for each in (model, refit)
        )
    assert_close(got.actual, end - start, rtol=1e-10, atol=1e-12)
    assert got.distance == pytest.approx(float((end - start - step).norm()), rel=1e-9)
    # θ₋ has the running statistics of θ̂, the refit its own.
    moved = loop(X, y, steps=0)(without(()))
    moved.load_state_dict(model.state_dict())
    nn.utils.vector_to_parameters(start + step, moved.parameters())
    same(got.model, moved)
    was = outputs(model, inputs)
    assert_close(got.change.outputs, outputs(moved, inputs) - was, rtol=1e-9, atol=1e-12)
    assert_close(got.change.refit_outputs, outputs(refit, inputs) - was, rtol=1e-9, atol=1e-12)
    for told, data in (
        (got.change.losses, (inputs, labels)),
        (got.change.forgotten, (X[gone], y[gone])),
    ):
        expected = [float(losses(each, data).mean()) for each in (model, moved, refit)]
        assert told == pytest.approx(expected, rel=1e-9)
    told = [note for note in got.notes if "the refit has its own 1.running_mean" in note]
    assert len(told) == 1 and got.drift == 0
    assert not any("with all the data" in note for note in got.notes)


def test_a_recipe_that_ends_with_other_statistics_is_told(noisy):
    fit, _, fitted, _ = noisy

    def shifted(weights):
        model = fit(weights)
        model[1].running_mean += 0.1
        return model

    got = holds(unlearning.without(fitted, [0, 7], recipe=shifted))
    assert any("even with all the data the recipe ends with 1.running" in n for n in got.notes)


@pytest.mark.parametrize("folder", [False, True])
def test_dropped_rows_are_judged_by_models_with_their_own(noisy, tmp_path, folder):
    fit, model, fitted, _ = noisy
    suspects = debugging.suspects(fitted, recipe=fit)
    gone, test = suspects.order[:5].tolist(), drawn(50, 3)
    using = uw.Resources(folder=tmp_path) if folder else None
    for _ in range(1 + folder):  # what is read from the folder is the same
        found = holds(suspects.apply(dict.fromkeys(gone, "drop"), test, resources=using))
        refit = fit(without(gone))
        for told, each in ((found.before, model), (found.after, refit)):
            expected = [float(x.mean()) for x in (losses(each, test), is_right(each, test))]
            assert told == pytest.approx(expected, rel=1e-9)
        change = losses(refit, test) - losses(model, test)
        assert found.actual.loss.value == pytest.approx(float(change.mean()), rel=1e-9)


@pytest.mark.parametrize("trusted", [False, True])
def test_labels_are_judged_by_a_refit_with_its_own(noisy, trusted):
    fit, _, fitted, (X, y) = noisy
    held = drawn(40, 2) if trusted else None
    first = debugging.suspects(fitted, validation=held, by="label", recipe=fit)
    gone = (first.proposals != first.labels).nonzero()[:, 0].tolist()
    assert 0 < len(gone) < N
    found = debugging.suspects(fitted, validation=held, by="label", recipe=fit, refit=True)
    refit = fit(without(gone))
    each = -outputs(refit, X).log_softmax(dim=1)
    if trusted:
        each = calibration(-outputs(refit, held[0]).log_softmax(dim=1), held[1])(each)
    rows = torch.arange(N)
    others = each.clone()
    others[rows, y] = torch.inf
    expected = each[rows, y] - others.min(dim=1).values
    assert_close(found.suspicion, expected, rtol=1e-9, atol=1e-11)
    assert found.left_out == len(gone) and torch.equal(found.proposals, each.argmin(dim=1))


def people(n, seed, share=0.0):
    """Two groups, told apart by an input; some good labels of one of them are held back."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    group, y = torch.arange(n) % 2, (X[:, 0] > 0).long()
    X[:, 1] = group + 0.3 * X[:, 1]
    held = (group == 1) & (y == 1) & (torch.rand(n, generator=draw) < share)
    return X, torch.where(held, 0, y), group.tolist()


@pytest.fixture(scope="module")
def unfair():
    X, y, groups = people(N, 0, 0.6)
    fit = loop(X, y, outputs=2)
    model = fit(without(()))
    return fit, model, EKFAC.fit(uw.Task(model, uw.CrossEntropy()), (X, y)), groups


def gaps(model, data):
    """Difference of the mean probability, and of the share of decisions, between the groups."""
    p, group = outputs(model, data[0]).softmax(dim=1)[:, 1], torch.tensor(data[2])
    return [float(x[group == 1].mean() - x[group == 0].mean()) for x in (p, (p > 0.5).double())]


def test_causes_of_a_gap_are_refitted_with_their_own(unfair):
    fit, model, fitted, groups = unfair
    data = people(80, 1)
    gap = fairness.gap("demographic_parity", data[2])
    found = holds(fairness.causes(fitted, data[:2], gap, recipe=fit))
    soft, hard = gaps(model, data)
    assert found.soft == pytest.approx(soft, rel=1e-9) and found.rows
    refit = fit(without(found.rows))
    assert found.actual == pytest.approx(gaps(refit, data)[0] - soft, rel=1e-9)
    names = ["one" if group else "other" for group in groups]
    for cause in found.by(names, refits=2).causes:
        rows = [i for i in range(N) if names[i] == cause.name]
        refit = gaps(fit(without(rows)), data)
        assert cause.actual == pytest.approx(refit[0] - soft, rel=1e-9)
        assert cause.hard == pytest.approx(refit[1] - hard, rel=1e-9)


@pytest.mark.parametrize("how", ["weights", "remove"])
def test_a_gap_is_closed_by_models_with_their_own(unfair, how):
    fit, model, fitted, _ = unfair
    data, test = people(80, 1), people(90, 2)
    gap = fairness.gap("demographic_parity", data[2])
    asked = {"test": test[:2], "test_groups": test[2], "recipe": fit}
    found = holds(fairness.repair(fitted, data[:2], gap, **asked, how=how))
    assert len(found.frontier) > 1
    for point in found.frontier:
        refit = fit(point.weights)
        soft, hard = gaps(refit, data)
        assert point.actual == pytest.approx(soft, rel=1e-9)
        assert point.validation.value == pytest.approx(hard, rel=1e-9)
        assert point.test.value == pytest.approx(gaps(refit, test)[1], rel=1e-9)
        right = is_right(refit, test)
        assert point.accuracy == pytest.approx(float(right.mean()))
        rise = losses(refit, test) - losses(model, test)
        assert point.loss_price.value == pytest.approx(float(rise.mean()), rel=1e-9)


def test_a_function_has_its_own_labels(unfair):
    """Refitted to changed ones it would be the model as it was; the way out has been seen."""
    fit, _, fitted, _ = unfair
    data, test = people(80, 1), people(90, 2)
    gap = fairness.gap("demographic_parity", data[2])
    asked = {"test": test[:2], "test_groups": test[2], "recipe": fit}
    with pytest.raises(SpecError, match=r'(?s)weights alone.*how="weights" or how="remove"'):
        fairness.repair(fitted, data[:2], gap, **asked, how="relabel")


@dataclass(frozen=True)
class Loop:
    """The loop on the data that it is given."""

    def prepare(self, task, train):
        X, y = train.batch(0, len(train))
        return FromFunction(loop(X, y), twice=False).prepare(task, train)


def test_acquired_labels_are_judged_by_models_with_their_own():
    start, pool, held, test = drawn(21, 0), drawn(36, 1), drawn(24, 2), drawn(60, 3)
    X, y = (torch.cat([a, b]) for a, b in zip(start, pool, strict=True))
    task = uw.Task(loop(*start, steps=0)(without((), 21)), uw.CrossEntropy())
    asked = {"strategies": ("expected gain", "entropy"), "batch": 4, "rounds": 2, "repeats": 1}
    data = (start, pool[0], pool[1], held, test)
    with pytest.raises(SpecError, match=r"(?s)data of its own.*prepare\(task, train\)"):
        acquisition.curve(loop(X, y), task, *data, **asked)
    found = holds(acquisition.curve(Loop(), task, *data, **asked, method=EKFAC))
    for s, name in enumerate(found.strategies):
        before = None
        for r in range(3):
            rows = [*range(21), *found.bought[s, 0, : 4 * r].tolist()]
            model = loop(X[rows], y[rows])(without((), len(rows)))
            assert torch.equal(found.right[s, 0, r], is_right(model, test).bool())
            if name == "expected gain":
                both = [torch.cat(pair) for pair in zip((X[rows], y[rows]), held, strict=True)]
                joint = loop(*both)(without((), len(both[1])))
                expected = is_right(joint, test).bool()
                assert torch.equal(found.right_with_validation[s, 0, r], expected)
            now = float(losses(model, held).mean())
            if r:
                assert float(found.actual[s, 0, r - 1]) == pytest.approx(now - before, rel=1e-8)
            before = now
            if r == 2:
                break
            left = torch.tensor([i for i in range(len(X)) if i not in rows])
            if name == "entropy":
                p = outputs(model, X[left]).softmax(dim=1)
                order = -(p * p.log()).sum(dim=1)
            else:
                fitted = EKFAC.fit(uw.Task(model, uw.CrossEntropy()), (X[rows], y[rows]))
                order = -acquisition.rank(fitted, X[left], held, batch=4).predicted
                assert float(found.predicted[s, 0, r]) == pytest.approx(
                    -float(order.topk(4).values.sum()), rel=1e-7
                )
            chosen = set(left[order.topk(4).indices].tolist())
            assert chosen == set(found.bought[s, 0, 4 * r : 4 * r + 4].tolist())
