"""Losses: values against torch.nn.functional, derivatives against autograd, samples against p."""

import math
from operator import itemgetter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import upweight as uw
from tests.market import draw, labels, pseudo_huber
from upweight.errors import DataError, DtypeError, ShapeError, SpecError, UnsupportedModel
from upweight.task.losses import CustomLoss
from upweight.task.torch_losses import as_loss


def g(seed=0):
    return torch.Generator().manual_seed(seed)


def ignored(targets, *places):
    targets = targets.clone()
    for place in places:
        targets[place] = -100
    return targets


def signs(n, *more):
    return 2.0 * torch.randint(2, (n, *more), generator=g(3)).double() - 1.0


# name: (loss, outputs, targets, the value as PyTorch has it)
def cases():
    f, y = 2 * draw(g(), 6, 3), labels(g(1), 6, 3)
    seq, tok = draw(g(2), 4, 5, 3), ignored(torch.randint(3, (4, 5), generator=g(3)), (0, 1), (2,))
    soft = draw(g(4), 6, 3).softmax(dim=1) * torch.linspace(0.2, 1, 6).double()[:, None]
    f1, f2, y2 = 2 * draw(g(5), 6), 2 * draw(g(6), 6, 2), labels(g(7), 12, 2).double().reshape(6, 2)
    counts = torch.poisson(torch.ones(6, 2).double(), generator=g(8))
    v = draw(g(9), 6).abs()
    per_token, per_output = draw(g(10), 4, 5).abs(), draw(g(11), 6, 2).abs()
    hinge = F.softplus(1 - signs(6, 2) * f2, beta=1 / 0.3, threshold=1e9)
    return {
        "classes": (uw.CrossEntropy(), f, y, F.cross_entropy(f, y, reduction="none")),
        "ignored classes": (
            uw.CrossEntropy(),
            f,
            ignored(y, 1),
            F.cross_entropy(f, ignored(y, 1), reduction="none"),
        ),
        "another ignore_index": (
            uw.CrossEntropy(ignore_index=2),
            f,
            y,
            F.cross_entropy(f, y, reduction="none", ignore_index=2),
        ),
        "sequences": (
            uw.CrossEntropy(),
            seq,
            tok,
            F.cross_entropy(seq.mT, tok, reduction="none").sum(dim=1),
        ),
        "probabilities": (uw.CrossEntropy(), f, soft, F.cross_entropy(f, soft, reduction="none")),
        "int32 classes": (
            uw.CrossEntropy(),
            f,
            y.int(),
            F.cross_entropy(f, y, reduction="none"),
        ),
        "uint8 classes": (
            uw.CrossEntropy(),
            256 * draw(g(12), 3, 300),
            torch.tensor([156, 255, 0], dtype=torch.uint8),
            F.cross_entropy(
                256 * draw(g(12), 3, 300), torch.tensor([156, 255, 0]), reduction="none"
            ),
        ),
        "uint8 classes, 255 ignored": (
            uw.CrossEntropy(ignore_index=255),
            draw(g(12), 3, 300),
            torch.tensor([156, 255, 0], dtype=torch.uint8),
            F.cross_entropy(
                draw(g(12), 3, 300),
                torch.tensor([156, 255, 0]),
                reduction="none",
                ignore_index=255,
            ),
        ),
        "bool classes": (
            uw.CrossEntropy(),
            f,
            y > 0,
            F.cross_entropy(f, (y > 0).long(), reduction="none"),
        ),
        "logits [b]": (
            uw.Bernoulli(),
            f1,
            y2[:, 0],
            F.binary_cross_entropy_with_logits(f1, y2[:, 0], reduction="none"),
        ),
        "logits [b, c]": (
            uw.Bernoulli(),
            f2,
            y2,
            F.binary_cross_entropy_with_logits(f2, y2, reduction="none").sum(dim=1),
        ),
        "squares": (
            uw.SquaredError(),
            f2,
            y2,
            0.5 * F.mse_loss(f2, y2, reduction="none").sum(dim=1),
        ),
        "squares [b]": (
            uw.SquaredError(),
            f1,
            y2[:, 0],
            0.5 * F.mse_loss(f1, y2[:, 0], reduction="none"),
        ),
        "counts": (
            uw.Poisson(),
            f2,
            counts,
            F.poisson_nll_loss(f2, counts, log_input=True, reduction="none").sum(dim=1),
        ),
        "hinge": (uw.SmoothHinge(0.3), f2, signs(6, 2), hinge.sum(dim=1)),
        "weighted": (
            uw.Weighted(uw.CrossEntropy()),
            f,
            (y, v),
            v * F.cross_entropy(f, y, reduction="none"),
        ),
        "weighted positions": (
            uw.Weighted(uw.CrossEntropy()),
            seq,
            (tok, per_token),
            (per_token * F.cross_entropy(seq.mT, tok, reduction="none")).sum(dim=1),
        ),
        "weighted squares": (
            uw.Weighted(uw.SquaredError()),
            f2,
            (y2, per_output),
            (per_output * 0.5 * (f2 - y2) ** 2).sum(dim=1),
        ),
        "custom": (as_loss(pseudo_huber), f2, y2, pseudo_huber(f2, y2)),
    }


CASES = cases()
WEIGHTED = uw.Weighted(uw.CrossEntropy())


def derivatives(loss, outputs, targets):
    """Gradient and Hessian in f by loops over autograd, one example at a time."""
    gradients, hessians = [], []
    for i in range(len(outputs)):
        f = outputs[i : i + 1].detach().clone().requires_grad_(True)
        y = tree_map(itemgetter(slice(i, i + 1)), targets)
        (slope,) = torch.autograd.grad(loss(f, y)[0], f, create_graph=True)
        rows = [
            torch.autograd.grad(entry, f, retain_graph=True)[0].reshape(-1)
            if entry.requires_grad
            else torch.zeros(f.numel()).double()
            for entry in slope.reshape(-1)
        ]
        gradients.append(slope.detach().reshape(-1))
        hessians.append(torch.stack(rows))
    return torch.stack(gradients), torch.stack(hessians)


@pytest.mark.parametrize("name", CASES)
def test_values(name):
    loss, outputs, targets, expected = CASES[name]
    loss.check(outputs, targets)
    found = loss(outputs, targets)
    assert found.shape == (len(outputs),)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_in_the_outputs(name):
    loss, outputs, targets, _ = CASES[name]
    gradient, hessian = derivatives(loss, outputs, targets)
    torch.testing.assert_close(loss.gradient(outputs, targets), gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.hessian(outputs, targets), hessian, rtol=1e-10, atol=1e-12)
    if loss.convex:
        assert float(torch.linalg.eigvalsh(hessian).min()) >= -1e-12


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_finite_far_out(name):
    """Logits of ±1000 are ordinary for separable data."""
    loss, outputs, targets, _ = CASES[name]
    if isinstance(loss, uw.Poisson):
        return  # e^1000 is infinite: that is the model's answer
    far = 1000.0 * outputs.sign()
    for value in (loss(far, targets), loss.gradient(far, targets), loss.hessian(far, targets)):
        assert bool(value.isfinite().all())


SHORT = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(
    "loss", [uw.CrossEntropy(), uw.Bernoulli(), uw.SmoothHinge(), uw.Poisson()]
)
def test_integers_of_any_dtype_are_the_same_targets(loss, dtype):
    """Everything that a loss says, from 0 and 1, and from 1 alone where 0 is no target."""
    f = draw(g(1), 6, 2)
    y = torch.ones(6, 2) if loss == uw.SmoothHinge() else labels(g(2), 12, 2).reshape(6, 2)
    if loss == uw.CrossEntropy():
        y = y[:, 0]
    wide = y.long() if loss == uw.CrossEntropy() else y.double()
    short = y.to(dtype)
    if loss == uw.SmoothHinge() and dtype == torch.bool:
        return  # −1 and 1
    loss.check(f, short)
    for name in ("__call__", "gradient", "hessian", "log_prob", "margin"):
        try:
            expected = getattr(loss, name)(f, wide)
        except UnsupportedModel:
            continue
        torch.testing.assert_close(getattr(loss, name)(f, short), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype, f", [(torch.float64, 60.0), (torch.float32, 30.0)])
@pytest.mark.parametrize("y", [0.0, 1.0, 0.25])
def test_yes_and_no_keep_the_digits_of_a_sure_answer(dtype, f, y):
    """ℓ(f, y) = ℓ(−f, 1 − y), and of a sure right answer it is e⁻ᶠ, which is not 0."""
    one = uw.Bernoulli()(torch.tensor([f], dtype=dtype), torch.tensor([y], dtype=dtype))
    other = uw.Bernoulli()(torch.tensor([-f], dtype=dtype), torch.tensor([1 - y], dtype=dtype))
    assert torch.equal(one, other)
    expected = (1 - y) * f + math.exp(-f)
    assert float(one) == pytest.approx(expected, rel=1e-6)


def test_log_probabilities():
    f, y = CASES["classes"][1:3]
    expected = torch.distributions.Categorical(logits=f).log_prob(y)
    torch.testing.assert_close(uw.CrossEntropy().log_prob(f, y), expected)
    f, y = CASES["logits [b, c]"][1:3]
    expected = torch.distributions.Bernoulli(logits=f).log_prob(y).sum(dim=1)
    torch.testing.assert_close(uw.Bernoulli().log_prob(f, y), expected)
    f, y = CASES["counts"][1:3]
    expected = torch.distributions.Poisson(f.exp()).log_prob(y).sum(dim=1)
    torch.testing.assert_close(uw.Poisson().log_prob(f, y), expected)
    f, y = CASES["squares"][1:3]
    difference = uw.SquaredError().log_prob(f, y) - torch.distributions.Normal(f, 1.0).log_prob(
        y
    ).sum(dim=1)
    constant = torch.full_like(difference, math.log(2 * math.pi))  # two outputs, ½ log 2π each
    torch.testing.assert_close(difference, constant)
    f, y = CASES["classes"][1:3]
    weighted = uw.Weighted(uw.CrossEntropy()).log_prob(f, (y, torch.zeros(6)))
    torch.testing.assert_close(weighted, uw.CrossEntropy().log_prob(f, y))


def test_margins():
    """log p − log(1 − p) of the right answer."""
    f, y = CASES["classes"][1:3]
    p = f.softmax(dim=1).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(uw.CrossEntropy().margin(f, y), (p / (1 - p)).log())
    f, y = CASES["logits [b]"][1:3]
    p = torch.where(y == 1, f.sigmoid(), 1 - f.sigmoid())
    torch.testing.assert_close(uw.Bernoulli().margin(f, y), (p / (1 - p)).log())
    f, y = CASES["hinge"][1:3]
    torch.testing.assert_close(uw.SmoothHinge().margin(f, y), (f * y).sum(dim=1))
    weighted = uw.Weighted(uw.CrossEntropy())
    f, targets = CASES["weighted"][1:3]
    torch.testing.assert_close(weighted.margin(f, targets), uw.CrossEntropy().margin(f, targets[0]))


def test_margin_of_a_sequence_leaves_padding_out():
    f, y = CASES["sequences"][1:3]
    margins = uw.CrossEntropy().margin(f, y)
    assert float(margins[2]) == 0  # nothing but padding
    p = f.softmax(dim=2).gather(2, y.clamp_min(0)[..., None])[..., 0]
    expected = ((p / (1 - p)).log() * (y != -100)).sum(dim=1)
    torch.testing.assert_close(margins, expected)


def test_the_margin_is_finite_where_the_probability_rounds_to_one():
    f = torch.tensor([[800.0, 0.0, -800.0]]).double()
    margin = uw.CrossEntropy().margin(f, torch.tensor([0]))
    torch.testing.assert_close(margin, torch.tensor([800.0]).double())


@pytest.mark.parametrize(
    "loss, outputs, targets, mean",
    [
        (uw.CrossEntropy(), torch.tensor([0.0, 1.0, -1.0]), torch.tensor(0), None),
        (uw.Bernoulli(), torch.tensor([0.7]), torch.tensor([0.0]), torch.tensor([0.7]).sigmoid()),
        (uw.SquaredError(), torch.tensor([0.7]), torch.tensor([0.0]), torch.tensor([0.7])),
        (uw.Poisson(), torch.tensor([0.7]), torch.tensor([0.0]), torch.tensor([0.7]).exp()),
        (uw.Poisson(), torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([9.0]).exp()),
    ],
    ids=repr,
)
def test_samples_have_the_models_mean(loss, outputs, targets, mean):
    n = 4000
    many, where = outputs.double().expand(n, -1), targets.expand(n, *targets.shape)
    drawn = loss.sample(many, where, g(5))
    loss.check(many, drawn)
    if mean is None:
        drawn, mean = F.one_hot(drawn, 3).double(), outputs.double().softmax(dim=0)
    error = drawn.std(dim=0) / n**0.5
    assert bool(((drawn.mean(dim=0) - mean).abs() <= 4 * error).all())
    assert torch.equal(loss.sample(many, where, g(5)), loss.sample(many, where, g(5)))
    assert not torch.equal(loss.sample(many, where, g(5)), loss.sample(many, where, g(6)))


def test_samples_leave_padding_out():
    f, y = CASES["sequences"][1:3]
    drawn = uw.CrossEntropy().sample(f, y, g())
    assert torch.equal(drawn == -100, y == -100)


@pytest.mark.parametrize(
    "loss, outputs, targets, error, text",
    [
        (uw.CrossEntropy(), (4, 3), torch.tensor([0, 1, 2, 3]), DataError, r"0…2 for 3 classes"),
        (uw.CrossEntropy(), (4, 3), torch.tensor([0, 1, -1, 2]), DataError, r"\[-1\]"),
        (uw.CrossEntropy(), (4, 3), torch.zeros(4, 1).long(), ShapeError, r"\(4, 1\)"),
        (uw.CrossEntropy(), (4,), torch.zeros(4).long(), ShapeError, "Bernoulli"),
        (uw.CrossEntropy(), (4, 3), torch.zeros(4), ShapeError, "class probabilities"),
        (uw.Bernoulli(), (4, 1), torch.zeros(4), ShapeError, r"reshape the targets to \[b, 1\]"),
        (uw.Bernoulli(), (4,), torch.tensor([0.0, 1, 2, 0]), DataError, r"in \[0, 1\]"),
        (uw.SquaredError(), (4,), torch.zeros(4, 1), ShapeError, "broadcasting"),
        (uw.SquaredError(), (4,), torch.zeros(4).long(), DtypeError, "torch.int64"),
        (uw.Poisson(), (4,), torch.tensor([0.0, -1, 2, 0]), DataError, "at least 0"),
        (WEIGHTED, (4, 3), (torch.zeros(4).long(), torch.ones(4, 1)), ShapeError, r"\(4, 1\)"),
        (WEIGHTED, (4, 3), (torch.zeros(4).long(), torch.ones(3)), ShapeError, r"\(3,\)"),
        (uw.SmoothHinge(), (4,), torch.tensor([0.0, 1, 1, 1]), DataError, "{−1, \\+1}"),
        (uw.Weighted(uw.Bernoulli()), (4,), torch.zeros(4), DataError, r"\(y, v\)"),
        (
            uw.Weighted(uw.Bernoulli()),
            (4,),
            (torch.zeros(4), torch.tensor([1.0, -1, 1, 1])),
            DataError,
            "v ≥ 0",
        ),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss, outputs, targets, error, text):
    with pytest.raises(error, match=text):
        loss.check(torch.zeros(outputs), targets)


@pytest.mark.parametrize("what", ["log_prob", "margin"])
def test_a_loss_without_a_likelihood_says_so(what):
    loss = CustomLoss(pseudo_huber)
    f, y = CASES["custom"][1:3]
    with pytest.raises(UnsupportedModel, match="defines none"):
        getattr(loss, what)(f, y)
    with pytest.raises(UnsupportedModel, match="margin"):
        uw.CrossEntropy().margin(*CASES["probabilities"][1:3])
    with pytest.raises(UnsupportedModel, match="defines none"):
        uw.SmoothHinge().sample(*CASES["hinge"][1:3], g())


# -- where the classes are ------------------------------------------------------------------------


def segmentation(size):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 1, size, size, generator=g, dtype=torch.float64)
    y = torch.randint(4, (8, size, size), generator=g)
    return nn.Conv2d(1, 4, 3, padding=1).double().eval(), (x, y)


def classes_last(model, batch):
    return model(batch[0]).movedim(1, -1), batch[1]


LABELS = [uw.labels.Sampled(), uw.labels.Expected(), uw.labels.Observed()]


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize(
    "curvature",
    [uw.Hessian(), uw.GGN(), *(uw.EKFAC(labels=labels) for labels in LABELS)],
    ids=lambda c: repr(c)[:24],
)
def test_classes_on_axis_1_are_those_on_the_last_axis_moved(size, curvature):
    model, data = segmentation(size)
    queries = tuple(part[:2] for part in data)

    def scores(loss, forward=None):
        task = uw.Task(model, loss, forward=forward)
        fitted = uw.Influence(curvature, damping=1.0, tolerance=0).fit(task, data)
        return fitted.attribute(queries, uw.Margin()).values

    expected = scores(uw.CrossEntropy(axis=-1), classes_last)
    torch.testing.assert_close(scores(uw.CrossEntropy(axis=1)), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "size, match",
    [(5, r"have them on axis 1(.|\n)*axis=1"), (4, "may be on axis 1 or on the last")],
)
def test_classes_that_may_be_on_another_axis_are_refused(size, match):
    model, data = segmentation(size)
    with pytest.raises(ShapeError, match=match):
        uw.Influence(damping=1.0).fit(uw.Task(model, uw.CrossEntropy()), data)


def test_sequences_that_are_all_as_long_as_there_are_classes_need_the_axis():
    """Where only some batches are, the others tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 4)).double().eval()
    ids = torch.arange(40).reshape(10, 4) % 5
    y = ids % 4

    def scores(loss, data):
        fitted = uw.Influence(uw.GGN(), damping=1.0).fit(uw.Task(model, loss), data)
        return fitted.attribute(data).values

    with pytest.raises(ShapeError, match=r"axis=-1"):
        scores(uw.CrossEntropy(), (ids, y))
    scores(uw.CrossEntropy(axis=-1), (ids, y))

    def padded(items):
        n = max(len(x) for x, _ in items)
        return tuple(
            torch.stack([F.pad(part, (0, n - len(part)), value=fill) for part in column])
            for column, fill in zip(zip(*items, strict=True), (0, -100), strict=True)
        )

    ragged = [(ids[i, : 4 - i % 2], y[i, : 4 - i % 2]) for i in range(10)]
    loader = torch.utils.data.DataLoader(ragged, batch_size=2, collate_fn=padded)
    assert torch.equal(scores(uw.CrossEntropy(), loader), scores(uw.CrossEntropy(axis=-1), loader))


def test_weights_per_position_need_classes_last_and_the_way_out_works():
    model, (x, y) = segmentation(5)
    v = torch.ones(8, 5, 5, dtype=torch.float64)
    outputs = model(x).detach()
    with pytest.raises(ShapeError, match=r"movedim\(1, -1\)"):
        uw.Weighted(uw.CrossEntropy(axis=1)).check(outputs, (y, v))
    moved = outputs.movedim(1, -1)
    loss = uw.Weighted(uw.CrossEntropy(axis=-1))
    loss.check(moved, (y, v))
    torch.testing.assert_close(loss(moved, (y, v)), uw.CrossEntropy(axis=1)(outputs, y))


def test_probabilities_have_the_axis_of_the_outputs():
    outputs = torch.randn(3, 4, 5, 2)
    p = torch.randn(3, 4, 5, 2).softmax(dim=1)
    expected = uw.CrossEntropy()(outputs.movedim(1, -1), p.movedim(1, -1))
    with pytest.raises(ShapeError, match="have them on axis 1"):
        uw.CrossEntropy().check(outputs, p)
    loss = uw.CrossEntropy(axis=1)
    loss.check(outputs, p)
    torch.testing.assert_close(loss(outputs, p), expected)


def test_the_axis_of_the_examples_holds_no_classes():
    with pytest.raises(SpecError, match="axis=0"):
        uw.CrossEntropy(axis=0)


@pytest.mark.parametrize(
    ("loss", "field"),
    [(uw.CrossEntropy, "weight"), (uw.Bernoulli, "weight"), (uw.Bernoulli, "pos_weight")],
)
def test_weights_as_tensors_and_arrays_are_refused_and_the_way_out_works(loss, field):
    tensor = torch.tensor([1.0, 2.0])
    for weights in (tensor, tensor.numpy()):  # as the losses of torch.nn have them
        with pytest.raises(SpecError, match=rf"tensor or an array(.|\n)*{field}=tuple") as caught:
            loss(**{field: weights})
        way = str(caught.value).partition("Way out: ")[2].removesuffix(".")
        made = eval(way, {loss.__name__: loss, "weights": weights})
        assert getattr(made, field) == (1.0, 2.0)
