"""Rows that taught a backdoor, against the truth, a gradient by hand and refits."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import poisoning
from upweight.applications.poisoning import cleanse, suspects
from upweight.errors import DataError, NonFinite, NotConverged, ShapeError, SpecError
from upweight.evaluation.bootstrap import Estimate, wilson
from upweight.task.recipe import Trained
from upweight.testing.attacks import Patch, backdoor, perturb_training
from upweight.training.newton import Newton

TRIGGER = Patch(3, 3, 1, 1, 1.0)


def clusters(n, seed):
    """Three classes of 4 × 4 images, dark in the corner where the trigger goes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    X = 0.15 * torch.rand(n, 4, 4, generator=draw).double()
    X[torch.arange(n), y] += 0.5
    X[:, 3, 3] = 0
    return X, y


def setting(poison=12, method=None, n=240, dtype=torch.float64):
    X, y = clusters(n, 0)
    rows = (y != 0).nonzero()[:poison, 0].tolist()
    attack = backdoor(X, y, rows, 0, TRIGGER)
    train = (attack.X.to(dtype), attack.y)
    torch.manual_seed(0)
    blank = uw.Task(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype), uw.CrossEntropy(), uw.L2(1e-4)
    )
    recipe = uw.Training(None, uw.SGD(0.5, momentum=0.9), epochs=20, batch=60)
    task = uw.Task(recipe.trained(blank, train), uw.CrossEntropy(), uw.L2(1e-4))
    fitted = (method or uw.GradientDot()).fit(task, train)
    test = clusters(300, 1)
    test = (test[0].to(dtype), test[1])
    return attack, fitted, blank_recipe(blank), test, (TRIGGER(test[0]), test[1])


@dataclasses.dataclass(frozen=True)
class Start:
    """An initialization, for a recipe that must not start at θ̂."""

    state: dict

    def __call__(self):
        made = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        made = made.to(next(iter(self.state.values())).dtype)
        made.load_state_dict(self.state)
        return made


def blank_recipe(task):
    state = {k: v.clone() for k, v in task.model.state_dict().items()}
    return uw.Training(Start(state), uw.SGD(0.5, momentum=0.9), epochs=20, batch=60)


def first(pair, mask, k=5):
    return tuple(each[mask][:k] for each in pair)


@pytest.mark.parametrize(
    "method",
    [uw.GradientDot(), uw.GradientCosine(), uw.Influence(uw.EKFAC(), damping=uw.Relative(1.0))],
    ids=["dot", "cosine", "ekfac"],
)
def test_planted_rows_come_first_and_a_refit_confirms(method):
    attack, fitted, recipe, test, triggered = setting(method=method)
    before = {k: v.clone() for k, v in fitted.task.model.state_dict().items()}
    other = test[1] != 0
    found = holds(suspects(fitted, first(triggered, other), first(test, other)))
    assert found.target == 0 and found.hits == 5
    truth = found.against(attack.poisoned)
    assert truth.auroc.value > 0.97 and truth.within_class.value > 0.97, str(truth)
    done = holds(cleanse(recipe, found, triggered, test, counts=[3, 12, 18]))
    assert done.is_confirmed and done.chosen.count in (12, 18)
    assert done.before.success.value > 0.9 > 0.05 > done.chosen.success.value
    assert done.control.success.value > 0.5
    for name, value in fitted.task.model.state_dict().items():
        assert torch.equal(value, before[name])
    # What is reported is what the model without these rows does on the second half.
    weights = torch.ones(1, 240).double()
    weights[0, list(done.chosen.rows)] = 0
    model = fitted.task.moved_to(recipe.prepare(fitted.task, fitted.train)(weights).theta[0]).model
    assert_close(fitted.task.moved_to(done.theta).model[1].weight, model[1].weight)
    accuracy = (model(test[0]).argmax(1) == test[1]).double().mean()
    assert done.chosen.accuracy == pytest.approx(float(accuracy))


def test_the_contrast_is_the_gradient_product_by_hand():
    _, fitted, _, test, triggered = setting()
    other = test[1] != 0
    x, clean = first(triggered, other), first(test, other)
    found = suspects(fitted, x, clean)
    model, n = fitted.task.model, 240

    def z(inputs):
        outputs = model(inputs)
        return outputs[:, 0] - outputs.mean(dim=1)

    m = (z(x[0]) - z(clean[0])).mean()
    assert found.value == pytest.approx(float(m.detach()))
    pull = torch.cat([g.flatten() for g in torch.autograd.grad(m, list(model.parameters()))])
    batch = fitted.train.batch(0, n)
    for i in (0, 1, 100):
        loss = nn.functional.cross_entropy(model(batch[0][i : i + 1]), batch[1][i : i + 1])
        push = torch.autograd.grad(loss, list(model.parameters()))
        by_hand = -pull @ torch.cat([g.flatten() for g in push]) / n
        assert float(found.predicted[i]) == pytest.approx(float(by_hand))


def test_states_are_averaged_by_their_norm():
    _, fitted, _, test, triggered = setting()
    other = test[1] != 0
    asked = first(triggered, other), first(test, other)
    start = fitted.theta * 0.1
    both = suspects(fitted, *asked, history=[start])
    task = fitted.task.moved_to(start)
    alone = suspects(uw.GradientDot().fit(task, fitted.train), *asked, target=0)
    here = suspects(fitted, *asked)
    unit = [each.predicted / each.predicted.norm() for each in (here, alone)]
    assert_close(both.predicted, (unit[0] + unit[1]) / 2)
    assert "1 other" in holds(both).verdict


def test_without_an_attack_nothing_is_cleansed():
    _, fitted, recipe, test, triggered = setting(poison=1)
    found = holds(suspects(fitted, first(triggered, test[1] == 1), target=0))
    done = holds(cleanse(recipe, found, triggered, test, counts=[2]))
    assert not done.is_confirmed and "no attack" in done.verdict
    assert done.predicted == [None]


def test_predicted_changes_of_a_derivative_stand_beside_the_refit():
    _, fitted, recipe, test, triggered = setting(method=uw.Influence(uw.Hessian()))
    other = test[1] != 0
    found = suspects(fitted, first(triggered, other), first(test, other))
    done = holds(cleanse(recipe, [found], triggered, test, counts=[1, 2]))
    assert done.predicted[0] == pytest.approx(-float(found.predicted.max()))
    assert done.actual[0] < 0 and not done.is_confirmed


@dataclasses.dataclass(frozen=True)
class Failing:
    """A recipe that fails where more than `most` rows are removed."""

    recipe: uw.Training
    most: int

    def prepare(self, task, train):
        trainer = self.recipe.prepare(task, train)

        def trained(weights):
            made = trainer(weights)
            if int((weights == 0).sum()) > self.most:
                return Trained(made.theta, made.gradient_norms, {0: "diverged"})
            return made

        return trained


def test_fits_that_fail_are_named_and_the_others_kept():
    _, fitted, recipe, test, triggered = setting()
    other = test[1] != 0
    found = suspects(fitted, first(triggered, other), first(test, other))
    done = holds(cleanse(Failing(recipe, 12), found, triggered, test, counts=[12, 18]))
    assert [each.count for each in done.curve] == [12] and "diverged" in str(done)
    with pytest.raises(NotConverged, match="diverged"):
        cleanse(Failing(recipe, -1), found, triggered, test, counts=[12])


def test_one_half_chooses_and_the_other_reports():
    """A count is never chosen by the images that report: the rule reads `chosen_on` alone."""
    _, fitted, recipe, test, triggered = setting()
    other = test[1] != 0
    found = suspects(fitted, first(triggered, other), first(test, other))
    done = cleanse(recipe, found, triggered, test, counts=[3, 12])
    assert done.sizes == (100, 100, 300)  # 200 triggered images are of another class
    swapped = [
        dataclasses.replace(each, chosen_on=wilson(0, 100), success=wilson(50, 50))
        for each in done.curve
    ]
    assert poisoning._chosen(swapped, 0.05) == 0


def test_wilson_is_that_of_statsmodels():
    from statsmodels.stats.proportion import proportion_confint

    for hits, count in ((0, 40), (3, 50), (40, 40)):
        made = wilson(hits, count)
        low, high = proportion_confint(hits, count, method="wilson")
        assert (made.low, made.high) == pytest.approx((low, high))


def test_bad_questions_and_their_ways_out():
    _, fitted, recipe, test, triggered = setting()
    other = test[1] != 0
    x, clean = first(triggered, other), first(test, other)
    with pytest.raises(ShapeError, match="clean original"):
        suspects(fitted, x, first(test, other, 4))
    for target in (3, 1.5, "1"):
        with pytest.raises(ShapeError, match="one of 0…2"):
            suspects(fitted, x, clean, target=target)
    found = suspects(fitted, x, clean)
    for counts in ([0], [240], [], [2.5], ["a"]):
        with pytest.raises(SpecError, match="numbers of rows"):
            cleanse(recipe, found, triggered, test, counts=counts)
    with pytest.raises(SpecError, match="percent"):
        cleanse(recipe, found, triggered, test, limit=5)
    for ranking in ([], None):
        with pytest.raises(SpecError, match="one attack"):
            cleanse(recipe, ranking, triggered, test)
    with pytest.raises(SpecError, match=r"upweight.Training\(...\)"):
        cleanse(None, found, triggered, test)
    with pytest.raises(DataError, match="true classes"):
        cleanse(recipe, found, (triggered[0], torch.zeros_like(triggered[1])), test)
    with pytest.raises(DataError, match="clean=\\(x, y\\)"):
        cleanse(recipe, found, triggered, first(test, other, 0))
    missing = test[0].clone()
    missing[7] = torch.nan
    with pytest.raises(NonFinite, match="first 7"):
        cleanse(recipe, found, triggered, (missing, test[1]))
    assert cleanse(recipe, found, triggered, test, counts=[12]).is_confirmed
    with pytest.raises(DataError, match="does so already"):
        backdoor(*clusters(30, 0), [0], 0, TRIGGER)


@pytest.mark.parametrize("kind", ["hinge", "one-hot", "squared"])
def test_classes_are_read_by_the_loss_or_refused(kind):
    """Labels −1 and 1 are classes 0 and 1; a vector of probabilities is no class."""
    X, y = clusters(60, 0)
    X, yes = X.flatten(1), (y == 1).double()
    logits = 2 if kind == "one-hot" else 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, logits), *([nn.Flatten(0)] if logits == 1 else []))
    loss = {"hinge": uw.SmoothHinge(), "one-hot": uw.CrossEntropy(), "squared": uw.SquaredError()}
    labels = torch.stack([1 - yes, yes], dim=1) if logits == 2 else 2 * yes - 1
    task = uw.Task(model.double(), loss[kind], uw.L2(0.1))
    fitted = uw.GradientDot().fit(task, (X, labels))
    if kind != "hinge":
        with pytest.raises(DataError, match="one class each"):
            suspects(fitted, (X[:5] + 1, labels[:5]), target=1)
        return
    found = suspects(fitted, (X[:5] + 1, labels[:5]), target=1)
    assert found.labels.tolist() == yes.long().tolist()
    cleansed = cleanse(Newton(), found, (X + 1, labels), (X, labels), counts=[3])
    assert cleansed.sizes[0] + cleansed.sizes[1] == int((yes == 0).sum())
    theta = Newton().prepare(task, fitted.train)(torch.ones(1, 60).double()).theta[0]
    right = (X @ theta[:16] + theta[16] > 0) == (yes == 1)
    assert cleansed.before.accuracy == pytest.approx(float(right.double().mean()))


def test_an_accuracy_that_no_image_changed_is_known_as_well_as_their_number_tells():
    _, fitted, recipe, test, triggered = setting()
    other = test[1] != 0
    found = suspects(fitted, first(triggered, other), first(test, other))
    done = cleanse(recipe, found, triggered, test, counts=[12])
    most = wilson(0, 300).high
    assert done.before.accuracy == done.chosen.accuracy == 1.0
    assert done.before.lost == Estimate(0, 0, 0)
    assert done.chosen.lost == Estimate(0, -most, most)


def test_float32_and_a_single_query():
    attack, fitted, _, test, triggered = setting(dtype=torch.float32)
    other = test[1] != 0
    found = holds(suspects(fitted, first(triggered, other, 1), first(test, other, 1)))
    assert found.against(attack.poisoned).auroc.value > 0.9
    found = holds(suspects(fitted, first(triggered, other, 1), measure=uw.Loss()))
    assert found.asked == "Loss()"


def test_changed_training_images_stay_within_8_bits_and_raise_the_loss():
    draw = torch.Generator().manual_seed(0)
    X = (torch.rand(12, 20, generator=draw).double() * 255).round() / 255
    y = (torch.arange(12) % 2).double()[:, None]
    blank = uw.Task(nn.Linear(20, 1).double(), uw.Bernoulli(), uw.L2(1e-2))
    from upweight.task.data import as_data

    made = Newton().prepare(blank, as_data((X, y)))(torch.ones(1, 12).double())
    fitted = uw.Influence(uw.Hessian()).fit(blank.moved_to(made.theta[0]), (X, y))
    query = (torch.rand(1, 20, generator=draw).double(), torch.ones(1, 1).double())
    found = perturb_training(fitted, query, 3, 8.4 / 255, recipe=Newton(), steps=3)
    shades = found.X * 255
    assert_close(shades, shades.round(), atol=1e-9, rtol=0)
    assert found.largest * 255 == pytest.approx(8)  # not 8.4, which rounding would leave at 8 or 9
    assert found.after > found.before
    assert len(found.rows) == 3
    kept = [i for i in range(12) if i not in found.rows]
    assert torch.equal(found.X[kept], X[kept])
    with pytest.raises(SpecError, match="1/255"):
        perturb_training(fitted, query, 3, 0.001, recipe=Newton())
