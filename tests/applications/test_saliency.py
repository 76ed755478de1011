import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.applications.outcomes import holds
from upweight.applications import saliency
from upweight.errors import (
    DtypeError,
    MissingPackage,
    NotOffered,
    ShapeError,
    SpecError,
    UnsupportedModel,
    UpweightError,
)

PLAIN = [
    name
    for name, kind in saliency.METHODS.items()
    if kind.__module__.endswith("attributions") and name != "tcav"
]

IMPORTING = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
"""shap and lime use what Matplotlib is about to deprecate as they are imported."""


def rows(n, p=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, p, generator=draw).double()
    return X, (X[:, 0] + 0.5 * torch.randn(n, generator=draw) > 0).long()


def smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def pooled(activation=nn.ReLU):
    """A small convolutional network that ends in pooling and a linear layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), activation(), nn.Conv2d(4, 3, 3), activation()]
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)]
    return nn.Sequential(*layers, *end).double()


def images(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=draw).double(), torch.arange(n) % 2


@pytest.fixture(scope="module")
def fitted():
    train, model = rows(30), smooth()
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.05))
    return uw.Influence(uw.GGN(), damping=0.1).fit(task, train)


@pytest.fixture(scope="module")
def convolutional():
    task = uw.Task(pooled(), uw.CrossEntropy())
    return uw.Influence(uw.EKFAC(), damping=0.1).fit(task, images(12))


def moved(fitted, i):
    """dθ̂/dwᵢ, by name."""
    return {k: v / len(fitted.train) for k, v in fitted.parameter_influence(i).items()}


def score_at(fitted, i, y):
    """x ↦ S(x, i) by autograd."""
    model, u = fitted.task.model, moved(fitted, i)
    params = {k: v.detach() for k, v in model.named_parameters()}

    def S(x):
        def loss(p):
            outputs = torch.func.functional_call(model, p, (x[None],))
            return nn.functional.cross_entropy(outputs, y[None])

        slopes = torch.func.grad(loss)(params)
        return sum((slopes[k] * u[k]).sum() for k in u)

    return S


def test_the_map_of_a_score_is_the_gradient_of_the_score(fitted):
    X, y = rows(3, seed=1)
    got = saliency.score(fitted, (X, y), 4, "gradient")
    scores = fitted.attribute((X, y)).values[:, 4]
    for k in range(3):
        S = score_at(fitted, 4, y[k])
        assert float(S(X[k])) == pytest.approx(float(scores[k]), rel=1e-9)
        want = torch.func.grad(S)(X[k])
        assert float((got.values[k] - want).abs().max()) < 1e-6 * float(want.abs().max())


def test_integrated_gradients_of_a_score_are_those_by_autograd(fitted):
    X, y = rows(1, seed=2)
    got = saliency.score(fitted, (X, y), 4, saliency.IntegratedGradients(steps=40))
    S = score_at(fitted, 4, y[0])
    t = (torch.arange(4000).double() + 0.5) / 4000  # the midpoint rule
    slopes = torch.func.vmap(torch.func.grad(S))(t[:, None] * X).mean(dim=0)
    assert float((got.values[0] - X[0] * slopes).abs().max()) < 1e-6 * float(slopes.abs().max())
    assert float(got.totals[0]) == pytest.approx(float(S(X[0]) - S(0 * X[0])), rel=1e-6)
    assert float(got.errors[0]) < 1e-6


@pytest.mark.parametrize("measure", [uw.Loss(), uw.Margin()])
@pytest.mark.parametrize("curvature", [uw.Hessian(), uw.EKFAC()])
def test_the_gradient_in_the_training_input_is_input_influence(measure, curvature):
    task = uw.Task(smooth(), uw.CrossEntropy(), uw.L2(0.05))
    fit = uw.Influence(curvature, damping=1.0).fit(task, rows(30))
    queries = rows(2, seed=1)
    got = saliency.score(fit, queries, 7, "gradient", side="train", measure=measure)
    want = fit.input_influence(7, queries, measure)
    torch.testing.assert_close(got.values, want, rtol=1e-6, atol=1e-12)


def test_both_sides_add_up_to_the_same_kind_of_difference(fitted):
    """S(q, xᵢ) − S(q, x₀) by scores of an example that is replaced."""
    queries = rows(1, seed=1)
    got = saliency.score(fitted, queries, 7, side="train")
    X, y = (part[7:8] for part in rows(30))
    gradient = fitted.scorer.solve(_gradient(fitted, queries)[None])[0]
    want = [-float(gradient @ _gradient(fitted, (x, y))) / 30 for x in (X, 0 * X)]
    assert float(got.totals[0]) == pytest.approx(want[0] - want[1], rel=1e-6)
    assert float(got.sums[0]) == pytest.approx(want[0] - want[1], rel=1e-6)


def _gradient(fitted, batch):
    return torch.func.grad(lambda t: fitted.task.losses(t, batch).sum())(fitted.theta)


@pytest.mark.parametrize("name", [n for n in PLAIN if "cam" not in n])
def test_of_a_linear_model_every_map_is_its_coefficients(name):
    model = nn.Linear(4, 3).double()
    X, y = rows(2)
    baseline = torch.tensor([0.1, -0.2, 0.3, 0.0])
    got = saliency.output(
        uw.Task(model, uw.CrossEntropy()), (X, y), name, target=2, baseline=baseline
    )
    w = model.weight[2].detach().expand(2, 4)
    want = w * (X - baseline.double())
    if name in ("gradient", "smoothgrad"):
        want = w
    if name == "saliency":
        want = w.abs()
    torch.testing.assert_close(got.values, want)
    if name == "additive":
        assert "not additive" not in " ".join(got.notes)
    holds(got, figure=name == "gradient")


@pytest.mark.parametrize("name", [*PLAIN, "tcav"])
def test_every_plain_method_maps_images_and_scores(name, convolutional):
    X, y = images(12)
    method = saliency.TCAV(X[y == 0], X[y == 1]) if name == "tcav" else name
    before = {k: v.clone() for k, v in convolutional.task.model.state_dict().items()}
    for got in (
        saliency.output(convolutional.task, (X[:2], y[:2]), method),
        saliency.score(convolutional, (X[:1], y[:1]), 3, method),
        saliency.score(convolutional, (X[:1], y[:1]), 3, method, side="train"),
    ):
        assert got.values.shape == (len(got.values), 1, 8, 8) and bool(got.values.any())
        holds(got, figure=False)
    after = convolutional.task.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(module._forward_hooks for module in convolutional.task.model.modules())


def test_deletion_and_additive_are_what_they_say():
    task, (X, y) = uw.Task(pooled(), uw.CrossEntropy()), images(1)
    f = lambda x: task.model(x)[0, 1].item()  # noqa: E731
    without, alone = X.clone(), torch.zeros_like(X)
    without[..., 4:8, 0:4] = 0
    alone[..., 4:8, 0:4] = X[..., 4:8, 0:4]
    deleted = saliency.output(task, (X, y), "deletion", target=1).values
    added = saliency.output(task, (X, y), "additive", target=1).values
    assert float(deleted[0, 0, 4:8, 0:4].sum()) == pytest.approx(f(X) - f(without))
    assert float(added[0, 0, 4:8, 0:4].sum()) == pytest.approx(f(alone) - f(0 * X))


def test_the_map_of_a_pooled_network_is_its_activations_by_hand():
    """Zhou et al.: Σ_k w_k A_k, of which Grad-CAM is the positive part over positions."""
    model, (X, y) = pooled(), images(1)
    task = uw.Task(model, uw.CrossEntropy())
    A = model[:4](X)
    want = (model[6].weight[1].reshape(1, -1, 1, 1) * A).sum(dim=1, keepdim=True)
    fine = nn.functional.interpolate(want, size=(8, 8), mode="bilinear") / (4 * 4)
    cam = saliency.output(task, (X, y), "cam", target=1)
    torch.testing.assert_close(cam.values, fine.detach())
    both = saliency.output(task, (X, y), "grad-cam", target=1)
    torch.testing.assert_close(both.values, cam.values.clamp(min=0))


def test_an_activation_that_is_used_twice_has_the_map_of_its_last_use():
    """One `relu` for all layers, as many networks have it."""
    apart, (X, y) = pooled(), images(1)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = apart[0], apart[2], apart[6]
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.last(self.relu(self.second(self.relu(self.first(x)))).mean(dim=(2, 3)))

    shared, apart = (uw.Task(model, uw.CrossEntropy()) for model in (Shared(), apart))
    for name in ("cam", "grad-cam"):
        got = saliency.output(shared, (X, y), name, target=1).values
        torch.testing.assert_close(got, saliency.output(apart, (X, y), name, target=1).values)


def test_a_network_without_pooling_has_no_class_activation_map():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)).double()
    task = uw.Task(model, uw.CrossEntropy())
    with pytest.raises(NotOffered, match=r"not a mean over positions(.|\n)*grad-cam"):
        saliency.output(task, images(1), "cam")
    assert bool(saliency.output(task, images(1), "grad-cam").values.isfinite().all())
    vectors = uw.Task(smooth(), uw.CrossEntropy())
    with pytest.raises(NotOffered, match="integrated-gradients"):
        saliency.output(vectors, rows(1), "grad-cam")


def test_integrated_gradients_miss_the_jumps_of_a_score_and_say_so(convolutional):
    X, y = images(4, seed=3)
    got = saliency.score(convolutional, (X, y), 3)
    assert float(got.errors.max()) > 0.02
    assert any("jump" in note for note in got.notes)
    fine = saliency.IntegratedGradients(steps=1000)
    assert float(saliency.output(convolutional.task, (X, y), fine).errors.max()) < 0.02
    assert float(saliency.score(convolutional, (X, y), 3, fine).errors.max()) > 0.02
    task = uw.Task(pooled(nn.Softplus), uw.CrossEntropy())
    bent = uw.Influence(uw.EKFAC(), damping=0.1).fit(task, images(12))
    assert float(saliency.score(bent, (X, y), 3).errors.max()) < 1e-4


# -- the mass of a map ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradient", "integrated-gradients", "smoothgrad", "deletion"])
def test_the_influence_on_a_mass_is_the_mass_of_the_map_of_a_score(name, fitted):
    queries = rows(2, seed=1)
    region = torch.tensor([True, False, True, False])
    mass = saliency.Mass(name, region, target=uw.Loss())
    scores = fitted.attribute(queries, mass).values
    got = saliency.score(fitted, queries, 5, name).mass(region)
    torch.testing.assert_close(scores[:, 5], got, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", ["gradient", "integrated-gradients", "deletion"])
def test_by_layer_a_mass_is_asked_as_a_functional_and_never_wrong(name):
    task = uw.Task(smooth(), uw.CrossEntropy())
    fit = uw.Influence(uw.EKFAC(), damping=1.0).fit(task, rows(30))
    queries, region = rows(2, seed=1), torch.tensor([True, False, True, False])
    mass = saliency.Mass(name, region, target=uw.Loss())
    if name == "deletion":  # values alone: the layers see rows, and whose each is
        direct = fit.attribute(queries, mass).values
        torch.testing.assert_close(direct, fit.attribute(queries, mass.functional).values)
    else:
        with pytest.raises(UpweightError):
            fit.attribute(queries, mass)
    got = fit.attribute(queries, mass.functional).values[:, 5]
    want = saliency.score(fit, queries, 5, name).mass(region)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("share", [False, True])
def test_retraining_confirms_who_makes_the_model_look_there(share):
    X, y = rows(60)
    task = uw.Task(nn.Linear(4, 2).double(), uw.CrossEntropy(), uw.L2(0.05))
    newton = uw.training.Newton()
    trainer = newton.prepare(task, task.training((X, y)))
    task = task.moved_to(trainer(torch.ones(1, 60).double()).theta[0])
    fit = uw.Influence(uw.Hessian()).fit(task, (X, y))
    region = torch.tensor([True, False, False, False])
    mass = saliency.Mass("input-x-gradient", region, share, target=1)
    queries = rows(3, seed=1)
    weights = torch.ones(20, 60).double()
    groups = [list(range(k, 60, 20)) for k in range(20)]
    for row, group in zip(weights, groups, strict=True):
        row[group] = 0
    actual = uw.training.retrain(newton, task, (X, y), weights, queries, mass).change.T
    predicted = -torch.stack(
        [fit.attribute(queries, mass).values[:, group].sum(dim=1) for group in groups], dim=1
    )
    for one, two in zip(predicted, actual, strict=True):
        assert float(torch.corrcoef(torch.stack([one, two]))[0, 1]) > 0.95


def test_a_baseline_may_be_an_array(fitted):
    queries, mean = rows(1, seed=1), rows(30)[0].mean(dim=0)
    want, got = (saliency.output(fitted.task, queries, baseline=b) for b in (mean, mean.numpy()))
    assert torch.equal(got.values, want.values)
    region = torch.tensor([True, False, True, False])
    of_tensor, of_array = (
        saliency.Mass("input-x-gradient", region, baseline=b) for b in (mean, mean.numpy())
    )
    assert repr(of_array) == repr(of_tensor)
    asked = (fitted.attribute(queries, mass).values for mass in (of_tensor, of_array))
    assert torch.equal(*asked)


@IMPORTING
@pytest.mark.parametrize("name", ["smoothgrad", "lime", "shap"])
def test_a_map_that_is_drawn_says_that_its_entries_are_estimates(name):
    if name != "smoothgrad":
        pytest.importorskip(name)
    task = uw.Task(smooth(), uw.CrossEntropy())
    assert "another seed=" in str(saliency.output(task, rows(1), name))
    assert "another seed=" not in str(saliency.output(task, rows(1), "gradient"))


def test_masses_of_other_regions_are_other_measures():
    ends = torch.tensor([True, False]), torch.tensor([False, True])
    names = [repr(saliency.Mass("gradient", end)) for end in ends]
    assert names[0] != names[1] and names[0] == repr(saliency.Mass("gradient", ends[0].clone()))
    with pytest.raises(SpecError, match=r"score\(fitted, queries, example, method\).mass"):
        saliency.Mass("grad-cam", ends[0])


# -- packages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deeplift", "lrp", "deep-taylor", "guided-backprop"])
def test_every_method_of_captum_maps_outputs_and_scores(name, convolutional):
    pytest.importorskip("captum")
    X, y = images(1, seed=3)
    for got in (
        saliency.output(convolutional.task, (X, y), name),
        saliency.score(convolutional, (X, y), 3, name),
        saliency.score(convolutional, (X, y), 3, name, side="train"),
    ):
        holds(got, figure=False)
        if name == "deeplift":
            assert float(got.errors.max()) < 1e-6
    assert not any(hasattr(m, "rule") for m in convolutional.task.model.modules())


def test_layerwise_relevance_of_rectifiers_is_input_times_gradient():
    """Ancona et al. (2018), Proposition 1."""
    pytest.importorskip("captum")
    task, queries = uw.Task(pooled(), uw.CrossEntropy()), images(2)
    got = saliency.output(task, queries, "lrp")
    want = saliency.output(task, queries, "input-x-gradient")
    torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-8)


def test_deconvolution_and_guided_backpropagation_by_hand():
    """One rectifier: W₁ᵀ relu(v), and W₁ᵀ relu(v ∘ [z > 0]), v what passes back."""
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    task, X = uw.Task(model, uw.CrossEntropy()), rows(1)[0]
    W, v = model[0].weight.detach(), model[2].weight[0].detach()
    on = (model[0](X)[0] > 0).double()
    given = (X, torch.zeros(1, dtype=torch.long))
    deconvolved = saliency.output(task, given, "deconvolution").values[0]
    guided = saliency.output(task, given, captum.GuidedBackprop).values[0]
    torch.testing.assert_close(deconvolved, v.clamp(min=0) @ W)
    torch.testing.assert_close(guided, (v.clamp(min=0) * on) @ W)
    named = saliency.output(task, given, "guided-backprop").values[0]
    torch.testing.assert_close(named, guided)


class Functional(nn.Module):
    """Rectifiers that are no modules."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("name", ["deeplift", "guided-backprop", "deconvolution", "lrp"])
def test_rectifiers_out_of_sight_are_refused_not_ignored(name):
    pytest.importorskip("captum")
    task = uw.Task(Functional().double(), uw.CrossEntropy())
    with pytest.raises(UnsupportedModel, match="1 calls of ReLU as a function"):
        saliency.output(task, rows(1), name)
    saliency.output(task, rows(1), "integrated-gradients")


@IMPORTING
def test_shapley_values_are_those_by_enumeration():
    pytest.importorskip("shap")
    model, (X, y) = smooth(), rows(1)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    got = saliency.output(
        uw.Task(model, uw.CrossEntropy()), (X, y), saliency.SHAP(orders=100), target=0
    )
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    want = torch.zeros(4).double()
    for order in itertools.permutations(range(4)):
        x, last = torch.zeros(1, 4).double(), model(torch.zeros(1, 4).double())[0, 0].item()
        for j in order:
            x[0, j] = X[0, j]
            now = model(x)[0, 0].item()
            want[j] += (now - last) / math.factorial(4)
            last = now
    assert float(got.errors[0]) < 1e-9
    assert float((got.values[0] - want).abs().max()) < 0.03 * float(want.abs().max())


@IMPORTING
def test_lime_of_a_linear_model_is_nearly_its_terms():
    pytest.importorskip("lime")
    model, (X, y) = nn.Linear(4, 2).double(), rows(1)
    method = saliency.LIME(samples=4000, width=10.0)
    got = saliency.output(uw.Task(model, uw.CrossEntropy()), (X, y), method, target=1)
    want = model.weight[1].detach() * X[0]
    torch.testing.assert_close(got.values[0], want, rtol=0.01, atol=1e-3)  # of a ridge


@pytest.mark.parametrize("name, package", [("lrp", "captum"), ("lime", "lime"), ("shap", "shap")])
def test_a_missing_package_is_named_with_its_extra(name, package, monkeypatch, convolutional):
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=r"pip install 'upweight\[explain\]'"):
        saliency.output(convolutional.task, images(1), name)


# -- bad input, and the page ----------------------------------------------------------------------


def test_bad_input_says_the_way_out(fitted):
    queries = rows(1, seed=1)
    with pytest.raises(SpecError, match="'integrated-gradients'"):
        saliency.output(fitted.task, queries, "grad")
    with pytest.raises(SpecError, match=r"TCAV\(concept="):
        saliency.output(fitted.task, queries, "tcav")
    with pytest.raises(SpecError, match='side="train"'):
        saliency.score(fitted, queries, 0, side="test")
    with pytest.raises(ShapeError, match=r"baseline=X.mean\(dim=0\)"):
        saliency.output(fitted.task, queries, baseline=torch.zeros(1, 4))
    saliency.output(fitted.task, queries, baseline=rows(30)[0].mean(dim=0))
    with pytest.raises(ShapeError, match=r"torch.zeros\(\(4,\), dtype=torch.bool\)"):
        fitted.attribute(queries, saliency.Mass("gradient", torch.ones(4)))
    with pytest.raises(ShapeError):
        saliency.score(fitted, queries, 30)
    with pytest.raises(ShapeError, match="one training example"):
        saliency.score(fitted, queries, [1, 2])
    with pytest.raises(SpecError, match="a number, or an input"):
        saliency.output(fitted.task, queries, baseline="mean")
    with pytest.raises(SpecError, match="whole number"):
        saliency.IntegratedGradients(steps=0)
    words = uw.Task(nn.Sequential(nn.EmbeddingBag(5, 4), nn.Linear(4, 2)), uw.CrossEntropy())
    with pytest.raises(DtypeError, match="embeddings"):
        saliency.output(words, (torch.ones(1, 3).long(), torch.zeros(1).long()))


def test_a_method_without_a_movement_of_theta_says_so():
    task = uw.Task(smooth(), uw.CrossEntropy())
    fit = uw.GradientCosine().fit(task, rows(10))
    with pytest.raises(NotOffered):
        saliency.score(fit, rows(1), 0)


@IMPORTING
def test_both_views_are_one_page_that_says_what_it_cannot(fitted, convolutional, tmp_path):
    views = saliency.views(fitted, rows(1, seed=1), ["gradient", "cam"], top=3)
    assert set(views.unanswered) == {"cam"}
    path = uw.report.explain(views, tmp_path / "page.html", shape=(2, 2), classes=["no", "yes"])
    page = path.read_text(encoding="utf-8")
    assert ("needs a layer with an output" in page and "target yes" in page) or "target no" in page
    with pytest.raises(ShapeError, match=r"shape=\(1, n\)"):
        uw.report.explain(views, path, shape=(3, 3))
    uw.report.explain(views, path, shape=(1, 4))
    X, y = images(1, seed=5)
    every = saliency.views(convolutional, (X, y), top=2)
    assert [row.name for row in every.rows] == list(saliency.METHODS)
    assert every.examples[0] == int(convolutional.attribute((X, y)).values[0].abs().argmax())
    assert "tcav" not in every.unanswered
    uw.report.explain(every, path)
    with pytest.raises(SpecError, match=r"outcomes\(map, path\)"):
        uw.report.explain(fitted, path)
    with pytest.raises(ShapeError, match=r"X_test\[:1\]"):
        saliency.views(fitted, rows(2))
