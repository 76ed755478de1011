"""Losses of torch.nn, translated: values, gradients and curvatures are PyTorch's own."""

import functools
import itertools
import re
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.func import jacrev
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss
from torch.testing import assert_close

import upweight as uw
from tests.market import draw, labels
from upweight.cli.spec import parse
from upweight.errors import DataError, DtypeError, ShapeError, SpecError, UnsupportedModel
from upweight.task.draws import Draws
from upweight.task.losses import CustomLoss, Loss
from upweight.task.torch_losses import TRANSLATIONS, Rescaled, as_loss, draws_labels, reduction_note


def hessian(f):
    return jacrev(jacrev(f))


def g(seed):
    return torch.Generator().manual_seed(seed)


F3, Y3 = 2 * draw(g(0), 6, 3), labels(g(1), 6, 3)
IGNORED = torch.where(torch.arange(6) == 2, -100, Y3)
SOFT = draw(g(2), 6, 3).softmax(dim=1)
IMAGES, PIXELS = draw(g(3), 4, 3, 5), labels(g(4), 20, 3).reshape(4, 5)
F2 = 2 * draw(g(5), 6, 2)
YES = labels(g(6), 12, 2).double().reshape(6, 2)
Y2 = F2 + 1.5 * draw(g(7), 6, 2)  # on both sides of every δ
COUNTS = torch.poisson(2 * torch.ones(6, 2).double(), generator=g(8))
W3 = torch.tensor([0.5, 2.0, 1.2]).double()
W2 = torch.tensor([0.3, 1.7]).double()


CASES = {
    "classes": (nn.CrossEntropyLoss, {}, F3, Y3),
    "ignored": (nn.CrossEntropyLoss, {}, F3, IGNORED),
    "class weights": (nn.CrossEntropyLoss, {"weight": W3, "ignore_index": 1}, F3, Y3),
    "smoothing": (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, F3, IGNORED),
    "both": (nn.CrossEntropyLoss, {"weight": W3, "label_smoothing": 0.3}, F3, IGNORED),
    "soft": (nn.CrossEntropyLoss, {"weight": W3, "label_smoothing": 0.3}, F3, SOFT),
    "images": (nn.CrossEntropyLoss, {"weight": W3, "label_smoothing": 0.1}, IMAGES, PIXELS),
    "yes or no": (nn.BCEWithLogitsLoss, {}, F2, YES),
    "weighted yes": (nn.BCEWithLogitsLoss, {"weight": W2, "pos_weight": 3 * W2}, F2, YES),
    "one logit": (nn.BCEWithLogitsLoss, {"pos_weight": W2[:1]}, F2[:, 0], YES[:, 0]),
    "multilabel": (nn.MultiLabelSoftMarginLoss, {"weight": W2}, F2, YES),
    "squares": (nn.MSELoss, {}, F2, Y2),
    "absolute": (nn.L1Loss, {}, F2, Y2),
    "huber": (nn.HuberLoss, {"delta": 0.7}, F2, Y2),
    "smooth": (nn.SmoothL1Loss, {"beta": 0.4}, F2, Y2),
    "smooth of 0": (nn.SmoothL1Loss, {"beta": 0.0}, F2, Y2),
    "poisson": (nn.PoissonNLLLoss, {}, F2, COUNTS),
    "poisson, full": (nn.PoissonNLLLoss, {"full": True}, F2, COUNTS),
}
OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)


def per_example(kind, options, reduction):
    """ℓ of each example as PyTorch has it, one at a time."""
    loss = kind(**options, reduction="none")

    def one(f, y):
        values = loss(f[None], y[None])
        # Of classes the positions are summed; other losses are a mean over outputs where asked.
        is_mean = reduction == "mean" and kind not in OF_CLASSES
        return values.mean() if is_mean else values.sum()

    return one


OF_REGRESSION = ("squares", "absolute", "huber", "smooth", "smooth of 0", "poisson", "yes or no")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name", OF_REGRESSION)
def test_errors_name_the_loss_that_was_given(name, reduction):
    kind, options, outputs, targets = CASES[name]
    loss = as_loss(kind(**options, reduction=reduction))
    with pytest.raises(ShapeError, match=f"^{kind.__name__} needs targets of the same shape"):
        loss.check(outputs[:, :1], targets[:, 0])
    own = getattr(loss, "base", loss)
    ours = type(own)(**{f.name: getattr(own, f.name) for f in fields(own)})
    assert ours == own and repr(ours) == repr(own), "a name is no part of what a loss is"
    with pytest.raises(ShapeError, match=f"^{type(own).__name__} needs targets of the same shape"):
        ours.check(outputs[:, :1], targets[:, 0])
    if "poisson" not in name and name != "yes or no":
        with pytest.raises(DtypeError, match=f"^{kind.__name__} needs floating-point targets"):
            loss.check(outputs, targets.long())
        with pytest.raises(DtypeError, match=f"^{type(own).__name__} needs floating-point"):
            ours.check(outputs, targets.long())
    else:
        with pytest.raises(DataError, match=f"^{kind.__name__} needs targets"):
            loss.check(outputs, -targets - 1)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_curvatures_are_those_of_pytorch(name, reduction):
    kind, options, f, y = CASES[name]
    ours, one = as_loss(kind(**options, reduction=reduction)), per_example(kind, options, reduction)
    ours.check(f, y)
    rows = [(one(a, b), jacrev(one)(a, b), hessian(one)(a, b)) for a, b in zip(f, y, strict=True)]
    value, gradient, curvature = (torch.stack(column) for column in zip(*rows, strict=True))
    assert_close(ours(f, y), value, rtol=1e-12, atol=1e-12)
    assert_close(ours.gradient(f, y), gradient.reshape(len(f), -1), rtol=1e-10, atol=1e-12)
    c = f[0].numel()
    assert_close(ours.hessian(f, y), curvature.reshape(-1, c, c), rtol=1e-10, atol=1e-12)
    assert ours.convex and parse(repr(ours)) == ours
    task = uw.Task(nn.Linear(2, 2), kind(**options, reduction=reduction))
    assert task.loss == ours


@pytest.mark.parametrize("name", CASES)
def test_drawn_labels_have_the_curvature_as_their_second_moment(name):
    """E[δ δᵀ] over ŷ ~ p is Λ; of the absolute error, whose Λ is 0, the Fisher information 1."""
    kind, options, f, y = CASES[name]
    ours = as_loss(kind(**options, reduction="mean"))
    some = int(ours.hessian(f, y).flatten(1).any(dim=1).int().argmax())  # which counts
    f, y, count = f[some : some + 1], y[some : some + 1], 4000
    many, repeated = (x.expand(count, *x.shape[1:]) for x in (f, y))
    deltas = ours.residual(many, repeated, Draws.of(0, 0, torch.arange(count))).reshape(count, -1)
    outer = deltas[:, :, None] * deltas[:, None, :]
    if ours.hessian(f, y).any():
        # Λ of location families varies with y: its mean over ŷ is what is meant.
        base = ours.base if isinstance(ours, Rescaled) else ours
        if isinstance(base, uw.Huber):
            drawn = base.sample(many, repeated, g(11))
            expected = ours.hessian(many, drawn).mean(dim=0)
        else:
            expected = ours.hessian(f, y)[0]
    else:
        expected = torch.eye(deltas.shape[1]).double() / f[0].numel()
    error = outer.std(dim=0) / count**0.5
    assert bool(((outer.mean(dim=0) - expected).abs() <= 4 * error + 0.05 * expected.abs()).all())
    assert draws_labels(ours)


def test_samples_of_huber_and_laplace_follow_their_densities():
    f = torch.zeros(20_000, 1).double()
    for loss, density in (
        (uw.Huber(0.7), lambda r: torch.exp(-uw.Huber(0.7)(r[:, None], torch.zeros(len(r), 1)))),
        (uw.AbsoluteError(), lambda r: torch.exp(-r.abs())),
    ):
        drawn = loss.sample(f, f, g(3))[:, 0]
        grid = torch.linspace(-40, 40, 80_001).double()
        cdf = density(grid).cumsum(0)
        cdf /= cdf[-1].clone()
        for at in (-2.0, -0.6, 0.0, 0.3, 1.5):
            p = float(cdf[(grid <= at).sum() - 1])
            assert abs(float((drawn <= at).double().mean()) - p) < 4 * (p * (1 - p) / 20_000) ** 0.5
        assert_close(loss.sample(f, f, g(3)), loss.sample(f, f, g(3)), rtol=0, atol=0)


def test_log_probabilities_are_cross_entropy_of_the_logits():
    weights = {"weight": W3, "ignore_index": 1}
    ours = as_loss(nn.NLLLoss(**weights))
    theirs = nn.NLLLoss(**weights, reduction="none")
    log_p = F3.log_softmax(dim=1)
    ours.check(log_p, Y3)
    assert_close(ours(log_p, Y3), theirs(log_p, Y3), rtol=1e-12, atol=1e-12)

    def one(f, y, loss):  # as a function of the logits, which the model's last layer hides
        return loss(f.log_softmax(dim=0)[None], y[None])[0]

    for f, y in zip(F3, Y3, strict=True):
        for derivative in (jacrev, hessian):
            found, expected = (derivative(one)(f, y, loss) for loss in (ours, theirs))
            assert_close(found, expected, rtol=1e-10, atol=1e-12)
    curvature = uw.CrossEntropy(weight=tuple(W3.tolist()), ignore_index=1).hessian(F3, Y3)
    assert_close(ours.hessian(log_p, Y3), curvature, rtol=1e-12, atol=1e-12)
    assert parse(repr(ours)) == ours
    with pytest.raises(DataError, match="log-probabilities"):
        ours.check(F3, Y3)


X1, X2, X3 = (draw(g(20 + k), 8, 3) for k in range(3))
SIGNS, SIGN = 2 * labels(g(24), 16, 2).double().reshape(8, 2) - 1, torch.tensor([1, -1] * 4)
ANSWERS, CLASSES = labels(g(25), 24, 2).double().reshape(8, 3), labels(g(26), 8, 3)
RANKED = torch.tensor([[0, 2, -1], [1, -1, 0]]).repeat(4, 1)
LINE = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
TIMES = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (4, 3)), nn.LogSoftmax(2)).double()
SPOKEN = (torch.tensor([[1, 2], [1, 1]] * 4), torch.full((8,), 4), torch.tensor([2, 1] * 4))


def affine(*shape):
    torch.manual_seed(sum(shape))
    return nn.Linear(*shape).double()


class MeanAndVariance(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log = affine(3, 2), affine(3, 2)

    def forward(self, x):
        return self.mean(x), self.log(x).exp()


def outputs(values, reduction):
    """The loss of an example from those of its outputs."""
    values = values.reshape(len(values), -1)
    return values.mean(1) if reduction == "mean" else values.sum(1)


def ctc(log_p, labels, times, counts):
    """−log Σ_π Π_t p_t(π_t) over all paths π that say the labels, one by one."""
    found = []
    for row, said, t, count in zip(log_p, labels, times, counts, strict=True):
        words = said[:count].tolist()
        paths = itertools.product(range(row.shape[1]), repeat=int(t))
        kept = [p for p in paths if [c for c, _ in itertools.groupby(p) if c] == words]
        found.append(-torch.stack([row[range(t), p].sum() for p in kept]).logsumexp(0))
    return torch.stack(found)


def multi_margin(f, y, p, margin, weight):
    right = f.gather(1, y[:, None])
    others = torch.ones_like(f).scatter(1, y[:, None], 0.0)
    return weight[y] * (others * (margin - right + f).relu() ** p).mean(1)


def multilabel_margin(f, y):
    found = []
    for row, given in zip(f, y.tolist(), strict=True):
        named = list(itertools.takewhile(lambda c: c >= 0, given))
        others = [c for c in range(len(row)) if c not in named]
        found.append(sum((1 - (row[c] - row[o])).relu() for c in named for o in others) / len(row))
    return torch.stack(found)


def triplets(m, a, b, c, power, margin):
    near, far = (((m(a) - m(x) + 1e-6).abs() ** power).sum(1) ** (1 / power) for x in (b, c))
    return (near - far + margin).relu()


def mean_of_labels(values, counts, reduction):
    return values / counts if reduction == "mean" else values


def set_reduction(loss, reduction):
    loss.reduction = reduction
    return loss


def binary(f, y, positive=1.0):
    return -(positive * y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f))


def taxicab(a, b):
    return (a - b).abs().sum(1)


YES8, V8 = labels(g(27), 16, 2).double().reshape(8, 2), draw(g(28), 8, 2).exp()
WAYS = {
    "BCELoss": (
        lambda r: nn.BCELoss(weight=W3, reduction=r),
        nn.Sequential(affine(3, 3), nn.Sigmoid()),
        (X1, ANSWERS),
        lambda m, b, r: outputs(-W3 * (b[1] * m(b[0]).log() + (1 - b[1]) * (1 - m(b[0])).log()), r),
    ),
    "GaussianNLLLoss": (
        lambda r: nn.GaussianNLLLoss(full=True, reduction=r),
        MeanAndVariance(),
        (X1, SIGNS),
        lambda m, b, r: outputs(
            -torch.distributions.Normal(m(b[0])[0], m(b[0])[1].sqrt()).log_prob(b[1]), r
        ),
    ),
    "PoissonNLLLoss of rates": (
        lambda r: nn.PoissonNLLLoss(log_input=False, eps=0.0, reduction=r),
        nn.Sequential(affine(3, 3), nn.Softplus()),
        (X1, ANSWERS),
        lambda m, b, r: outputs(m(b[0]) - b[1] * m(b[0]).log(), r),
    ),
    "KLDivLoss": (
        lambda r: nn.KLDivLoss(log_target=True, reduction=r),
        nn.Sequential(affine(3, 3), nn.LogSoftmax(1)),
        (X1, X2.log_softmax(1)),
        lambda m, b, r: outputs(b[1].exp() * (b[1] - m(b[0])), r),
    ),
    "SoftMarginLoss": (
        lambda r: nn.SoftMarginLoss(reduction=r),
        affine(3, 2),
        (X1, SIGNS),
        lambda m, b, r: outputs((-b[1] * m(b[0])).exp().log1p(), r),
    ),
    "SoftMarginLoss of one output": (
        lambda r: nn.SoftMarginLoss(reduction=r),
        LINE,
        (X1, SIGN),
        lambda m, b, r: (-b[1] * m(b[0])).exp().log1p(),
    ),
    "HingeEmbeddingLoss": (
        lambda r: nn.HingeEmbeddingLoss(margin=0.8, reduction=r),
        affine(3, 2),
        (X1, SIGNS),
        lambda m, b, r: outputs(torch.where(b[1] > 0, m(b[0]), (0.8 - m(b[0])).relu()), r),
    ),
    "MultiMarginLoss": (
        lambda r: nn.MultiMarginLoss(p=2, margin=0.7, weight=W3, reduction=r),
        affine(3, 3),
        (X1, CLASSES),
        lambda m, b, r: multi_margin(m(b[0]), b[1], 2, 0.7, W3),
    ),
    "MultiLabelMarginLoss": (
        lambda r: nn.MultiLabelMarginLoss(reduction=r),
        affine(3, 3),
        (X1, RANKED),
        lambda m, b, r: multilabel_margin(m(b[0]), b[1]),
    ),
    "CTCLoss": (
        lambda r: nn.CTCLoss(reduction=r),
        TIMES,
        (X1, SPOKEN),
        lambda m, b, r: mean_of_labels(ctc(m(b[0]), *b[1]), b[1][2], r),
    ),
    "CosineEmbeddingLoss": (
        lambda r: nn.CosineEmbeddingLoss(margin=-0.9, reduction=r),
        affine(3, 2),
        (X1, X2, SIGN),
        lambda m, b, r: torch.where(
            b[2] > 0,
            1 - torch.cosine_similarity(m(b[0]), m(b[1])),
            (torch.cosine_similarity(m(b[0]), m(b[1])) + 0.9).relu(),
        ),
    ),
    "MarginRankingLoss": (
        lambda r: nn.MarginRankingLoss(margin=2.0, reduction=r),
        affine(3, 2),
        (X1, X2, SIGNS),
        lambda m, b, r: outputs((2.0 - b[2] * (m(b[0]) - m(b[1]))).relu(), r),
    ),
    "TripletMarginLoss": (
        lambda r: nn.TripletMarginLoss(margin=2.5, p=3, reduction=r),
        affine(3, 2),
        (X1, X2, X3),
        lambda m, b, r: triplets(m, *b, 3, 2.5),
    ),
    "TripletMarginWithDistanceLoss": (
        lambda r: nn.TripletMarginWithDistanceLoss(distance_function=taxicab, reduction=r),
        affine(3, 2),
        (X1, X2, X3),
        lambda m, b, r: (taxicab(m(b[0]), m(b[1])) - taxicab(m(b[0]), m(b[2])) + 1).relu(),
    ),
    "BCEWithLogitsLoss with a weight for each output": (
        lambda r: nn.BCEWithLogitsLoss(weight=V8, reduction=r),
        affine(3, 2),
        (X1, (YES8, V8)),
        lambda m, b, r: outputs(b[1][1] * binary(m(b[0]), b[1][0]), r),
    ),
    "BCEWithLogitsLoss with a weight for each example": (
        lambda r: nn.BCEWithLogitsLoss(weight=V8[:, :1], pos_weight=W2, reduction=r),
        affine(3, 2),
        (X1, (YES8, V8[:, 0])),
        lambda m, b, r: b[1][1] * outputs(binary(m(b[0]), b[1][0], W2), r),
    ),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # from PyTorch 2.13 on
    LAST = nn.LinearCrossEntropyLoss(3, 3, out_features=(2,), weight=W3, dtype=torch.float64)
    CLASSES2 = labels(g(29), 16, 3).reshape(8, 2)
    WAYS["LinearCrossEntropyLoss"] = (
        lambda r: set_reduction(LAST, r),
        affine(3, 3),
        (X1, CLASSES2),
        lambda m, b, r: -(W3[b[1]] * m(b[0]).log_softmax(1).gather(1, b[1][:, None])[:, 0]).sum(1),
    )


def losses_of_torch(kind=_Loss):
    """Every loss of torch.nn there is in the PyTorch that is installed."""
    for found in kind.__subclasses__():
        if found.__module__.startswith("torch.nn") and not found.__name__.startswith("_"):
            yield found.__name__
        yield from losses_of_torch(found)


def test_every_loss_of_torch_is_translated_or_has_a_way_out():
    names = set(losses_of_torch())
    assert {"CTCLoss", "NLLLoss2d", "TripletMarginWithDistanceLoss"} <= names
    kinds = {kind.__name__ for kind in TRANSLATIONS}
    assert names - kinds == set(WAYS) & names
    assert {name.partition(" ")[0] for name in WAYS} <= names


def way_out_of(loss):
    with pytest.raises(UnsupportedModel) as refused:
        uw.Task(nn.Linear(2, 2), loss)
    return str(refused.value).partition("Way out: ")[2]


def task_in(text):
    """The code of a way out: from "Task(" to the parenthesis that closes it."""
    start = text.index("Task(")
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "(") - (text[end] == ")")
        if depth == 0 and text[end] == ")":
            return text[start : end + 1]
    raise AssertionError(text)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", WAYS)
def test_the_way_out_of_a_refused_loss_has_the_scores_of_the_loss_by_hand(name, reduction):
    make, model, data, hand = WAYS[name]
    loss = make(reduction)
    text = way_out_of(loss)
    names = {"torch": torch, "upweight": uw, "Task": uw.Task, "model": model}
    if "`loss` is the one given" in text:
        names["loss"] = loss
    task = eval(task_in(text), names)
    given = data
    if said := re.search(r"with data (\(X, \(y, v[^)]*\)\))", text):
        given = eval(said[1], {"X": data[0], "y": data[1][0], "v": data[1][1]})
    reference = uw.Task(
        task.model, lambda f, y: f, forward=lambda m, b: (hand(m, b, reduction), None)
    )
    method = uw.GradientDot()
    found = uw.attribute(task, given, given, method=method).values
    expected = uw.attribute(reference, data, data, method=method).values
    assert found.isfinite().all() and found.abs().max() > 1e-3
    assert_close(found, expected, rtol=1e-6, atol=1e-9)
    if reduction == "mean":  # as users call it, the method chosen
        assert uw.attribute(task, given, given).values.isfinite().all()


def test_a_function_of_torch_has_the_way_out_of_its_class():
    by_class = way_out_of(nn.TripletMarginLoss(margin=2.0))
    assert way_out_of(functools.partial(F.triplet_margin_loss, margin=2.0)) == by_class
    assert way_out_of(F.ctc_loss) == way_out_of(nn.CTCLoss())
    unreduced = functools.partial(F.multi_margin_loss, reduction="none")
    assert_close(as_loss(unreduced)(F3, Y3), unreduced(F3, Y3))


def test_losses_of_several_outputs_are_refused_unreduced_as_well():
    for kind in (nn.TripletMarginLoss, nn.CosineEmbeddingLoss, nn.CTCLoss, nn.MarginRankingLoss):
        assert "Task(model, lambda" in way_out_of(kind(reduction="none"))


def plain(f, y):
    return F.softplus(-y * f)


def by_batch(f, y):  # has no rule for vmap
    return plain(f, y) if bool((y.abs() == 1).all()) else f


@pytest.mark.parametrize("function", [plain, by_batch])
def test_a_custom_loss_of_one_output_without_an_axis_has_its_derivatives(function):
    f, y, loss = F2[:, 0], SIGN[:6].double(), CustomLoss(function)
    p = (-y * f).sigmoid()
    assert_close(loss.gradient(f, y), (-y * p)[:, None])
    assert_close(loss.hessian(f, y), (p * (1 - p))[:, None, None])
    u = torch.ones(2, 6, 1).double()
    assert_close(loss.hessian_product(f, y, u), (p * (1 - p))[None, :, None].expand(2, -1, -1))


def test_subclasses_and_unreduced_losses_without_a_translation_stay_functions():
    class Mine(nn.CrossEntropyLoss):
        def forward(self, f, y):
            return 2 * super().forward(f, y)

    mine = as_loss(Mine(reduction="none"))
    assert isinstance(mine, CustomLoss)
    theirs = nn.CrossEntropyLoss(reduction="none")(F3, Y3)
    assert_close(mine(F3, Y3), 2 * theirs)
    assert isinstance(as_loss(nn.MultiMarginLoss(reduction="none")), CustomLoss)
    assert not draws_labels(mine) and not draws_labels(uw.Weighted(mine))
    assert not draws_labels(uw.SmoothHinge()) and draws_labels(uw.Weighted(uw.Bernoulli()))


def test_what_a_reduction_means_is_said_where_it_means_something():
    said = [
        (nn.CrossEntropyLoss(), F3, Y3, ""),
        (nn.CrossEntropyLoss(), IMAGES, PIXELS, "over positions"),
        (nn.CrossEntropyLoss(weight=W3), F3, Y3, "mean weight"),
        (nn.CrossEntropyLoss(reduction="sum"), F3, Y3, "yours their sum"),
        (nn.MSELoss(), F2, Y2, "mean over its outputs"),
        (nn.MSELoss(), F2[:, :1], Y2[:, :1], ""),
        (nn.MSELoss(reduction="none"), F2, Y2, "sum over its outputs"),
        (uw.SquaredError(), F2, Y2, ""),
    ]
    for loss, f, y, words in said:
        found = reduction_note(loss, f, y)
        assert words in found and bool(words) == bool(found)
        other_size = {"over positions", "mean weight", "yours their sum"}
        assert ("learning rate" in found and "factors=" in found) == (words in other_size)


def test_a_mean_over_outputs_is_the_objective_that_was_trained():
    """J with L2(λ) is what MSELoss() with weight decay λ minimizes: its gradient is the same."""
    x, model = draw(g(9), 6, 3), nn.Linear(3, 2).double()
    task = uw.Task(model, nn.MSELoss(), uw.L2(0.3))
    theta = task.theta()
    ours = torch.func.grad(task.objective)(theta, (x, Y2), torch.ones(6).double())
    (
        nn.MSELoss()(model(x), Y2) + 0.15 * sum(p.square().sum() for p in model.parameters())
    ).backward()
    assert_close(ours, task.layout.flatten({n: p.grad for n, p in model.named_parameters()}))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: uw.CrossEntropy(weight=(1.0, -1.0)), SpecError),
        (lambda: uw.CrossEntropy(weight=()), SpecError),
        (lambda: uw.CrossEntropy(label_smoothing=10), SpecError),
        (lambda: uw.Bernoulli(pos_weight=(float("nan"),)), SpecError),
        (lambda: uw.Huber(0.0), SpecError),
        (lambda: Rescaled(uw.Huber(), 0.0), SpecError),
        (lambda: uw.CrossEntropy(weight=(1.0, 2.0)).check(F3, Y3), ShapeError),
        (lambda: as_loss(nn.CrossEntropyLoss()).check(F3, Y3.double()), ShapeError),
        (lambda: uw.Bernoulli(weight=(1.0, 2.0, 3.0)).check(F2, YES), ShapeError),
        (lambda: uw.Bernoulli(weight=(1.0,) * 6).check(F2[:, 0], YES[:, 0]), ShapeError),
    ],
)
def test_parameters_that_mean_nothing_are_refused(make, error):
    with pytest.raises(error, match="Way out"):
        make()


def test_classes_on_the_last_axis_are_told_from_those_on_the_second():
    with pytest.raises(ShapeError, match=r"upweight\.CrossEntropy\(\)"):
        as_loss(nn.CrossEntropyLoss()).check(IMAGES.mT, PIXELS)


def test_a_measure_asks_the_likelihood_without_weights():
    plain = uw.CrossEntropy().log_prob(F3, Y3)
    for options in ({"weight": W3}, {"label_smoothing": 0.2}):
        loss: Loss = as_loss(nn.CrossEntropyLoss(**options))
        assert_close(loss.log_prob(F3, Y3), plain)
        assert_close(loss.margin(F3, Y3), uw.CrossEntropy().margin(F3, Y3))
    assert_close(as_loss(nn.MSELoss()).log_prob(F2, Y2), uw.SquaredError().log_prob(F2, Y2))
