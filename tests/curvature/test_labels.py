"""Whose labels: the model's in expectation or drawn, or the data's; each against its definition."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import draw, initialized, labels, names, problem
from tests.reference import dense
from upweight.curvature.labels import Expected, Observed, Sampled
from upweight.errors import DtypeError, NotPositiveDefinite, SpecError, UnsupportedModel
from upweight.gradients.factored import Tokens
from upweight.gradients.passes import GradientPass
from upweight.gradients.planning import plan
from upweight.linalg.finite_sum import mean_of
from upweight.task.data import as_data
from upweight.task.losses import Loss


def at(outputs):
    """The places of examples that are the whole data."""
    return torch.arange(len(outputs))


class Gradients:
    """The gradients of one batch under whatever labels."""

    def __init__(self, task, data):
        self.data, self.made = data, plan(task, task.theta(), data)

    def rows(self, which):
        """Under each label, [labels, n, p]."""
        task, found = self.made.task, []
        with GradientPass(self.made, task.theta()) as passes:
            batch = self.data.batch(0, len(self.data))
            parts = passes.of_heads(
                batch, len(self.data), lambda f, y: which.heads(task.loss, f, y, at(f), 0)
            )
            for factors in parts:
                out = torch.zeros(len(self.data), task.layout.size, dtype=self.made.dtype)
                for block, part in zip(self.made.blocks, factors, strict=True):
                    full = part.matrices() if isinstance(part, Tokens) else part.values
                    out[:, block.index(task.layout)] = full.flatten(1)
                found.append(out)
        return torch.stack(found)

    def second_moment(self, which):
        """(1/n) Σ g gᵀ over examples and labels: a curvature with one dense block."""
        g = self.rows(which).flatten(0, 1)
        return mean_of(g.T @ g, len(self.data) * which.per_example)


def second_moment(task, data, which):
    return Gradients(task, data).second_moment(which)


def unpenalized(task):
    return uw.Task(task.model, task.loss, params=task.params, forward=task.forward)


CONVEX = [name for name in names(without=("float32",)) if name != "attention"]


@pytest.mark.parametrize("name", CONVEX)
def test_expected_labels_give_the_gauss_newton_matrix(name):
    p = problem(name)
    task, data = unpenalized(p.task), as_data(p.train)
    found = second_moment(task, data, Expected())
    torch.testing.assert_close(found, dense.ggn(task, p.train), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONVEX[::3])
def test_observed_labels_give_the_empirical_fisher(name):
    p = problem(name)
    task, data = unpenalized(p.task), as_data(p.train)
    found = second_moment(task, data, Observed())
    expected = dense.empirical_fisher(task, p.train)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_expected_labels_reach_the_tails_of_a_confident_model():
    """Probabilities from 1 down to 1e-13: eigenvalues of Λ far below 1e-6 of the largest count."""
    model = nn.Linear(2, 4, bias=False)
    model.weight.data.copy_(torch.tensor([[9.0, 1], [-9, 2], [-2, 0], [-20, -1]]))
    data = as_data((draw(torch.Generator().manual_seed(0), 7, 2), torch.arange(7) % 4))
    task = uw.Task(model, uw.CrossEntropy())
    found = second_moment(task, data, Expected())
    torch.testing.assert_close(found, dense.ggn(task, data), rtol=1e-10, atol=1e-14)


UNBIASED = ["logistic", "softmax", "ridge_two_outputs", "poisson", "tied", "weighted"]


@pytest.mark.parametrize("name", [*UNBIASED, "weighted_positions"])
@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_labels_are_unbiased(name, samples):
    """The mean over 1000 draws is within four standard errors of the expectation, each entry.

    A thousand copies of the data are a thousand draws: they differ by the place of an example.
    """
    p, copies = problem(name), 1000
    task, data = unpenalized(p.task), as_data(p.train)
    expected = second_moment(task, data, Expected())
    g = Gradients(task, data.subset([*range(p.n)] * copies)).rows(Sampled(samples, seed=1))
    g = g.reshape(samples, copies, p.n, -1).movedim(0, 1).flatten(1, 2)
    draws = mean_of(g.mT @ g, p.n * samples)
    bound = 4 * draws.std(dim=0) / copies**0.5 + 1e-12
    assert bool(((draws.mean(dim=0) - expected).abs() <= bound).all())
    observed = second_moment(task, data, Observed())
    assert bool(((observed - expected).abs() > bound).any()), "the data's labels would pass too"


SAMPLED = (uw.CrossEntropy(), uw.Bernoulli(), uw.SquaredError(), uw.Poisson())


def drawn(which, place=0, stream=0, n=70):
    f = draw(torch.Generator().manual_seed(5), n, 6)
    found = which.heads(uw.CrossEntropy(), f[place:], labels_of(n)[place:], at(f)[place:], stream)
    # δ = p − e(ŷ) is negative at the label alone.
    return torch.stack([delta.argmin(dim=1) for _, delta in found])


def labels_of(n):
    return torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("loss", [uw.CrossEntropy(), *SAMPLED[1:]], ids=repr)
@pytest.mark.parametrize("batch", [1, 3, 16, 64])
def test_draws_belong_to_the_place_of_an_example_and_not_to_its_batch(batch, loss):
    """Poisson with rates from 0.05 to 20, where rejections would take a number each of its own."""
    f = draw(torch.Generator().manual_seed(5), 70, 6)
    y = labels_of(70) if loss == uw.CrossEntropy() else torch.zeros_like(f)
    which, parts = Sampled(samples=2, seed=3), []
    for start in range(0, 70, batch):
        part = slice(start, start + batch)
        heads = which.heads(loss, f[part], y[part], at(f)[part], 1)
        parts.append(torch.stack([extra for _, extra in heads]))
    whole = torch.stack([extra for _, extra in which.heads(loss, f, y, at(f), 1)])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(whole[0], whole[1]), "the same draw twice would pass as well"


def test_draws_differ_between_samples_passes_and_seeds():
    """70 draws from 6 classes: equal by chance less than once in 1e30."""
    once = drawn(Sampled(samples=2))
    assert not torch.equal(once[0], once[1])
    assert not torch.equal(once, drawn(Sampled(samples=2, seed=1)))
    assert torch.equal(once, drawn(Sampled(samples=2)))
    assert not torch.equal(once, drawn(Sampled(samples=2), stream=1))
    # Pass k of several samples does not repeat what another pass drew.
    every = torch.cat([drawn(Sampled(samples=3), stream=k) for k in range(3)])
    assert len({tuple(row.tolist()) for row in every}) == 9


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    drawn(Sampled(samples=2))
    assert torch.equal(before, torch.get_rng_state())


class Paired(Loss):
    """Targets (y, v), of which y is drawn: a tree of labels."""

    convex = True

    def __call__(self, outputs, targets):
        y, v = targets
        return v * uw.SquaredError()(outputs, y)

    def sample(self, outputs, targets, generator):
        return uw.SquaredError().sample(outputs, targets[0], generator), targets[1]


def test_labels_may_be_a_tree():
    g = torch.Generator().manual_seed(0)
    n = 35
    v = draw(g, n).abs()
    data = as_data((draw(g, n, 2), (draw(g, n, 1), v)))
    task = uw.Task(nn.Linear(2, 1), Paired())
    g = Gradients(task, data).rows(Sampled(seed=1))[0]
    x = torch.cat([data.batch(0, n)[0], torch.ones(n, 1)], dim=1)
    ratio = g / (v[:, None] * x)  # the noise itself, the same for every parameter
    torch.testing.assert_close(ratio, ratio[:, :1].expand(n, 3), rtol=1e-10, atol=1e-10)
    assert float(ratio[:, 0].std()) > 0.5


class Centred(uw.SquaredError):
    """A subclass whose value is another than its parent's residual knows of."""

    def __call__(self, outputs, targets):
        return 3.0 * super().__call__(outputs, targets)


def test_a_subclass_with_another_value_is_differentiated():
    g = torch.Generator().manual_seed(0)
    data = as_data((draw(g, 9, 2), draw(g, 9, 1)))
    model = initialized(nn.Linear(2, 1), g)
    once = Gradients(uw.Task(model, uw.SquaredError()), data).rows(Sampled(seed=1))
    thrice = Gradients(uw.Task(model, Centred()), data).rows(Sampled(seed=1))
    size = once.abs().mean(), thrice.abs().mean()
    assert 1.5 < float(size[1] / size[0]) < 6, "nine draws of three times the gradient"


SCALES = [
    (torch.float32, 1e8, 1e-3),
    (torch.float32, 1.7e9, 1e-3),
    (torch.bfloat16, 1000.0, 3e-2),
    (torch.float64, 1e15, 1e-10),
]


@pytest.mark.parametrize("kind", ["EKFAC", "Fisher"])
@pytest.mark.parametrize("dtype, scale, rtol", SCALES)
def test_curvatures_of_squared_error_do_not_see_where_targets_lie(dtype, scale, rtol, kind):
    """The residual of a drawn label is the noise, however large outputs and targets are."""
    if kind == "Fisher" and dtype == torch.bfloat16:
        return  # products of a p × p matrix are not for half precision
    g = torch.Generator().manual_seed(2)
    X, y = draw(g, 40, 3).to(dtype), draw(g, 40, 1)
    spec = uw.EKFAC(Sampled(4)) if kind == "EKFAC" else uw.Fisher(4)
    found = []
    for shift in (0.0, scale):
        model = initialized(nn.Linear(3, 1), torch.Generator().manual_seed(3))
        model.bias.data += shift
        task = uw.Task(model.to(dtype), uw.SquaredError())
        data = as_data((X, (y + shift).to(dtype)))
        found.append(spec.fit(task, data, task.theta()).dense())
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=rtol * float(found[0].max()))


def test_labels_that_a_dtype_cannot_hold_are_refused():
    f = torch.full((9, 1), 1e8, dtype=torch.float32)
    with pytest.raises(DtypeError, match=r"1e\+08 in torch.float32(.|\n)*outputs.double\(\)"):
        uw.SquaredError().sample(f, f, torch.Generator())
    noise = uw.SquaredError().sample(f.double(), f.double(), torch.Generator()) - 1e8
    assert 0.1 < float(noise.std()) < 3  # the way out


@pytest.mark.parametrize("log_rate", [20.0, 30.0, 60.0])
def test_counts_of_any_rate_have_its_variance(log_rate):
    """rate − count in float64, and beyond what that holds from the normal distribution."""
    f = torch.full((4000, 1), log_rate, dtype=torch.float32)
    (_, delta), *_ = Sampled().heads(uw.Poisson(), f, f, at(f), 0)
    z = delta.double() / f.double().exp().sqrt()
    assert abs(float(z.mean())) < 4 / 4000**0.5
    assert abs(float(z.square().mean()) - 1) < 4 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residuals_of_short_outputs_are_rounded_once(dtype):
    g = torch.Generator().manual_seed(1)
    f, y = (4 * draw(g, 50, 8)).to(dtype), labels(g, 50, 8)
    for loss, targets in ((uw.CrossEntropy(), y), (uw.Bernoulli(), f), (uw.SquaredError(), f)):
        (_, short), *_ = Sampled().heads(loss, f, targets, at(f), 0)
        (_, full), *_ = Sampled().heads(loss, f.float(), targets, at(f), 0)
        assert short.dtype == dtype
        torch.testing.assert_close(short, full.to(dtype), rtol=0, atol=0)


def test_class_probabilities_weigh_what_they_add_up_to():
    """Positions without a target draw none, and E[δ δᵀ] is Λ."""
    g = torch.Generator().manual_seed(1)
    f = draw(g, 1, 2, 3).expand(4000, 2, 3)
    y = torch.tensor([[0.1, 0.2, 0.1], [0.0, 0.0, 0.0]]).expand(4000, 2, 3)
    (_, delta), *_ = Sampled().heads(uw.CrossEntropy(), f, y, at(f), 0)
    assert not bool(delta[:, 1].any())
    products = delta[:, 0, :, None] * delta[:, 0, None, :]
    expected = uw.CrossEntropy().hessian(f[:1], y[:1])[0].reshape(2, 3, 2, 3)[0, :, 0]
    bound = 4 * products.std(dim=0) / 4000**0.5
    assert bool(((products.mean(dim=0) - expected).abs() <= bound).all())


def test_too_many_outputs_are_refused_with_their_number():
    model = initialized(nn.Linear(2, 9), torch.Generator())
    task = uw.Task(model, uw.CrossEntropy())
    data = as_data((torch.ones(4, 2), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(UnsupportedModel, match=r"9 outputs per example, of shape \(9,\)"):
        uw.EKFAC(labels=Expected(most=8)).fit(task, data, task.theta())
    assert uw.EKFAC(labels=Expected(most=9)).fit(task, data, task.theta()).shape == (27, 27)


def bounded(outputs, targets):
    """1 − exp(−½ ‖f − y‖²): concave far from the target."""
    return 1 - (-0.5 * (outputs - targets).square().sum(dim=1)).exp()


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_a_loss_that_is_not_convex_is_refused_whatever_its_scale(scale):
    g = torch.Generator().manual_seed(1)
    data = as_data((draw(g, 6, 2), 3.0 + draw(g, 6, 2)))
    task = uw.Task(initialized(nn.Linear(2, 2), g), lambda f, y: scale * bounded(f, y))
    with pytest.raises(
        NotPositiveDefinite, match=r"with eigenvalue -(.|\n)*Observed\(\)"
    ) as caught:
        second_moment(task, data, Expected())
    assert caught.value.smallest < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_not_taken_for_a_concave_loss(dtype):
    g = torch.Generator().manual_seed(1)
    f = (4 * draw(g, 50, 8)).to(dtype)
    found = list(Expected().heads(uw.CrossEntropy(), f, labels(g, 50, 8), at(f), 0))
    columns = torch.stack([column for _, column in found], dim=2).double()
    p = f.double().softmax(dim=1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(columns @ columns.mT, expected, rtol=4 * eps, atol=4 * eps)


def test_every_example_gives_as_many_gradients_whatever_its_batch():
    """Λ of a softmax is singular: the column of zeros counts as well, for A is a mean over rows."""
    g = torch.Generator().manual_seed(1)
    f, y = draw(g, 40, 5), labels(g, 40, 5)
    for part in (slice(0, 40), slice(3, 4), slice(17, 19)):
        heads = Expected().heads(uw.CrossEntropy(), f[part], y[part], at(f)[part], 0)
        assert len(list(heads)) == 5


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(samples):
    with pytest.raises(SpecError, match=rf"samples={samples}(.|\n)*Expected\(\)"):
        Sampled(samples)


@pytest.mark.parametrize("name", names(without=("sampled", "float32")))
def test_a_loss_that_cannot_be_sampled_is_refused(name):
    p = problem(name)
    if p.task.loss == uw.CrossEntropy():
        return  # soft targets: hard ones are drawn
    with pytest.raises(UnsupportedModel, match="samples ŷ"):
        uw.EKFAC().fit(p.task, as_data(p.train), p.task.theta())
