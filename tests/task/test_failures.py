"""A call that fails is explained by what was seen; every way out is taken."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import upweight as uw
from tests.market import draw
from upweight.errors import (
    DataError,
    DtypeError,
    ScalarLoss,
    ShapeError,
    SpecError,
    UpweightError,
)

N = 8
X, Y = draw(torch.Generator().manual_seed(0), N, 3), torch.arange(N) % 2
CE = uw.CrossEntropy()


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def scores(model, train, queries=None, forward=None, loss=CE):
    task = uw.Task(model, loss, uw.L2(1.0), forward=forward)
    fitted = uw.Influence(uw.GGN()).fit(task, train)
    return fitted.attribute(train if queries is None else queries).values


@pytest.fixture
def right():
    """The scores of the task as it should have been given."""
    return scores(linear(), (X, Y))


def forward_of(error):
    """The function that a message tells to give as Task(forward=...)."""
    text = " ".join(str(error.value).split())
    found = re.search(r"forward=(lambda model, batch: \(.*\))\)\.", text)
    return eval(found.group(1))


# -- the user's own errors ------------------------------------------------------------------------


class Raises(nn.Module):
    """Fails in its own way."""

    def __init__(self, fail):
        super().__init__()
        self.linear, self.fail = nn.Linear(3, 2), fail
        self.double()

    def forward(self, x):
        self.fail(x)
        return self.linear(x)


def raises_value(x):
    raise ValueError("temperature must be positive")


def raises_runtime(x):
    raise RuntimeError("no such table")


def raises_while_handling(x):
    try:
        raises_value(x)
    except ValueError as error:
        raise TypeError("not my kind of input") from error


def asserts(x):
    assert x.ndim == 4, "images please"


def python_type_error(x):
    return len(None)


def python_index_error(x):
    return [][3]


def key_error(x):
    return {}["absent"]


def reraises(x):
    try:
        raises_runtime(x)
    except RuntimeError:
        raise


def not_implemented(x):
    raise NotImplementedError("one day")


@pytest.mark.parametrize(
    ("fail", "kind", "said"),
    [
        (raises_value, ValueError, "temperature must be positive"),
        (raises_runtime, RuntimeError, "no such table"),
        (raises_while_handling, TypeError, "not my kind"),
        (reraises, RuntimeError, "no such table"),
        (asserts, AssertionError, "images please"),
        (python_type_error, TypeError, "NoneType"),
        (python_index_error, IndexError, "list index"),
        (key_error, KeyError, "absent"),
        (not_implemented, NotImplementedError, "one day"),
    ],
)
def test_an_error_of_the_users_own_is_shown_as_it_is(fail, kind, said):
    with pytest.raises(kind, match=said) as caught:
        scores(Raises(fail), (X, Y))
    assert not isinstance(caught.value, UpweightError)
    assert any("(8, 3) torch.float64" in note for note in caught.value.__notes__)
    names = [entry.name for entry in caught.traceback]
    assert fail.__name__ in names  # where it was raised is in the traceback


def test_an_error_of_the_users_own_while_queries_are_asked():
    model = Raises(lambda x: raises_value(x) if float(x.max()) > 1e3 else None)
    fitted = uw.Influence().fit(uw.Task(model, CE, uw.L2(1.0)), (X, Y))
    with pytest.raises(ValueError, match="temperature") as caught:
        fitted.attribute((X + 1e4, Y))
    assert not isinstance(caught.value, UpweightError)


# -- arguments ------------------------------------------------------------------------------------


class Triples(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return X[i], Y[i], i


class Optional(nn.Module):
    """Takes labels too, and would take them in silence."""

    def __init__(self):
        super().__init__()
        self.linear = linear()

    def forward(self, x, labels=None):
        return self.linear(x)


@pytest.mark.parametrize("model", [linear, Optional])
@pytest.mark.parametrize(
    "data", [Triples(), (X, Y, torch.arange(N)), (X, Y, np.arange(N))], ids=["set", "arrays", "np"]
)
def test_inputs_targets_and_places(model, data, right):
    with pytest.raises(DataError, match="each example's place in the data") as caught:
        scores(model(), data)
    torch.testing.assert_close(scores(model(), data, forward=forward_of(caught)), right)


def test_an_argument_too_many_that_is_no_place(right):
    data = (X, Y, torch.ones(N))
    with pytest.raises(ShapeError, match=r"entry 1 is passed as an input, and the last") as caught:
        scores(linear(), data)
    torch.testing.assert_close(scores(linear(), data, forward=forward_of(caught)), right)


def test_an_argument_too_few():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, x, mask):
            return self.linear(x * mask)

    with pytest.raises(ShapeError, match=r"Two\.forward\(x, mask\)(.|\n)*do not hold"):
        scores(Two(), (X, Y))
    with pytest.raises(ShapeError, match=r"does not hold: mask"):
        scores(Two(), {"x": X, "labels": Y})


@pytest.mark.parametrize(
    "data",
    [
        {"features": X, "labels": Y},
        {"input": X, "weight": torch.ones(N), "labels": Y},
        [{"input": X[i], "text": f"row {i}", "labels": Y[i]} for i in range(N)],
    ],
    ids=["another name", "one too many", "text"],
)
def test_entries_that_are_no_argument(data, right):
    with pytest.raises(ShapeError, match=r"Linear\.forward\(input") as caught:
        scores(linear(), data)
    torch.testing.assert_close(scores(linear(), data, forward=forward_of(caught)), right)


class WithDecoder(nn.Module):
    """Makes its decoder's inputs of the labels, as T5 does."""

    def __init__(self):
        super().__init__()
        self.linear = linear()

    def forward(self, x, labels=None):
        if labels is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        out = type("Output", (), {})()
        out.logits = self.linear(x)
        return out


def test_a_model_that_needs_its_targets(right):
    data = {"x": X, "labels": Y}
    with pytest.raises(DataError, match=r"runs with 'labels' and not without") as caught:
        scores(WithDecoder(), data)
    torch.testing.assert_close(scores(WithDecoder(), data, forward=forward_of(caught)), right)


@pytest.mark.parametrize("forward", [lambda batch: batch, lambda model, x, y: x], ids=["1", "3"])
def test_a_forward_of_other_arguments(forward, right):
    with pytest.raises(SpecError, match="a function of the model and a batch") as caught:
        scores(linear(), (X, Y), forward=forward)
    torch.testing.assert_close(scores(linear(), (X, Y), forward=forward_of(caught)), right)


@pytest.mark.parametrize(
    "forward",
    [lambda m, b: m(b[0]), lambda m, b: (m(b[0]), b[1], 1), lambda m, b: None],
    ids=["outputs", "three", "None"],
)
@pytest.mark.parametrize("n", [2, N])
def test_a_forward_that_returns_no_pair(forward, n, right):
    with pytest.raises(ShapeError, match=r"two things: \(outputs, targets\)") as caught:
        scores(linear(), (X[:n], Y[:n]), forward=forward)
    torch.testing.assert_close(scores(linear(), (X, Y), forward=forward_of(caught)), right)


# -- dtypes and shapes ----------------------------------------------------------------------------


def test_inputs_of_another_dtype(right):
    with pytest.raises(DtypeError, match=r"as torch\.float64 the model takes them(.|\n)*X\.astype"):
        scores(linear(), (X.float(), Y))
    with pytest.raises(DtypeError, match=r"as torch\.float64 the model takes them"):
        scores(linear(), ((X > 0), Y))
    with pytest.raises(DtypeError, match=r"X\.to\(torch\.float32\)"):
        scores(linear().float(), (X, Y))
    torch.testing.assert_close(scores(linear(), (X.numpy().astype("float64"), Y)), right)


class Own(nn.Module):
    """Multiplies without a layer of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(linear().weight.detach().T.clone())

    def forward(self, x):
        return x @ self.weight


def test_what_pytorch_says_in_the_users_code_is_explained_too():
    with pytest.raises(DtypeError, match=r"as torch\.float64 the model takes them"):
        scores(Own(), (X.float(), Y))
    with pytest.raises(ShapeError, match=r"\(8, 2\)(.|\n)*cannot be multiplied"):
        scores(Own(), (X[:, :2], Y))


def test_the_layer_that_complains_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(5, 2)).double()
    with pytest.raises(ShapeError, match=r"in 2, Linear\(in_features=5, out_features=2"):
        scores(model, (X, Y))


def test_token_ids():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    ids = torch.arange(N * 3).reshape(N, 3) % 5
    assert bool(scores(model, (ids, Y)).isfinite().all())
    with pytest.raises(DtypeError, match=r"as torch\.int64 the model takes them"):
        scores(model, (ids.double(), Y))
    with pytest.raises(DataError, match=r"outside of 0…4 for 0, Embedding\(5, 4\)"):
        scores(model, (ids + 1, Y))


def test_checks_of_pytorchs_own_layers():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
            self.double()

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    with pytest.raises(ShapeError, match=r"in lstm, LSTM\(3, 4, batch_first=True\)"):
        scores(Recurrent(), (torch.zeros(N, 5, 2).double(), Y))
    attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()
    with pytest.raises(ShapeError, match="embed_dim 4"):
        scores(attention, (torch.zeros(N, 5, 3).double(), Y))


# -- losses and their targets ---------------------------------------------------------------------


@pytest.mark.parametrize("targets", [Y.double(), Y.float(), Y[:, None].double()], ids=str)
def test_class_labels_as_floats(targets, right):
    column = targets.ndim > 1
    with pytest.raises(ShapeError, match=r"class labels that are stored as floats") as caught:
        scores(linear(), (X, targets))
    way = r"y\.squeeze\(-1\)\.long\(\)" if column else r"y\.long\(\)"
    assert re.search(way, str(caught.value))
    torch.testing.assert_close(scores(linear(), (X, targets.reshape(N).long())), right)
    array = targets.numpy().astype("int64")
    assert ("y.astype('int64')[:, 0]" in str(caught.value)) == column
    torch.testing.assert_close(scores(linear(), (X, array[:, 0] if column else array)), right)


def test_labels_for_one_logit():
    one = nn.Linear(3, 1).double()
    for y in (Y, Y.double()):
        with pytest.raises(ShapeError, match=r"Bernoulli\(\)(.|\n)*reshape"):
            scores(one, (X, y))
    targets = eval("y.to(outputs.dtype).reshape(outputs.shape)", {"outputs": one(X), "y": Y})
    assert bool(scores(one, (X, targets), loss=uw.Bernoulli()).isfinite().all())


def test_one_hot_labels_as_integers(right):
    y = torch.eye(2)[Y].long()
    with pytest.raises(ShapeError, match=r"y\.argmax\(-1\)"):
        scores(linear(), (X, y))
    for way in (y.argmax(-1), y.to(torch.float64)):
        torch.testing.assert_close(scores(linear(), (X, way)), right)


def test_missing_and_named_labels():
    with pytest.raises(ShapeError, match="missing labels"):
        scores(linear(), (X, torch.where(Y > 0, torch.nan, 0.0)))
    with pytest.raises(ShapeError, match=r"'a'(.|\n)*classes\.index\(name\)"):
        scores(linear(), [(X[i], "ab"[Y[i]]) for i in range(N)])


def test_a_line_of_the_users_that_does_not_fit_is_named():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, x):
            return self.linear(x) + torch.zeros(5)

    with pytest.raises(ShapeError, match=r"Adds\(\) \(test_failures\.py, line \d+\)"):
        scores(Adds(), (X, Y))


def test_other_floats_are_not_taken_for_labels():
    with pytest.raises(ShapeError, match=r"no class: a regression's target(.|\n)*SquaredError"):
        scores(linear(), (X, Y + 0.5))
    with pytest.raises(ShapeError, match="probabilities of other classes"):
        scores(linear(), (X, torch.ones(N, 3).double() / 3))


@pytest.mark.parametrize(
    ("targets", "said"), [({"a": Y, "b": Y}, "dict of 'a', 'b'"), ((Y, Y), "tuple of 2")]
)
@pytest.mark.parametrize("loss", [CE, uw.Bernoulli(), uw.SquaredError()], ids=repr)
def test_targets_in_a_container(loss, targets, said):
    with pytest.raises(ShapeError, match=rf"one tensor(.|\n)*{said}"):
        loss.check(torch.zeros(N, 2), targets)


def test_boolean_labels(right):
    """The values of 0 and 1."""
    yes = torch.arange(N) % 2 == 1
    torch.testing.assert_close(scores(linear(), (X, yes)), right)
    one = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    expected = scores(one, (X, yes.double()), loss=uw.Bernoulli())
    torch.testing.assert_close(scores(one, (X, yes), loss=uw.Bernoulli()), expected)
    with pytest.raises(DataError, match="−1, "):
        uw.SmoothHinge().check(torch.zeros(N), yes)


@pytest.mark.parametrize(
    ("function", "ours", "targets"),
    [
        (lambda f, y: nn.functional.cross_entropy(f, y, reduction="none"), "CrossEntropy", Y),
        (
            lambda f, y: nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(
                1
            ),
            "Bernoulli",
            torch.stack([Y, 1 - Y], 1).double(),
        ),
    ],
    ids=["cross_entropy", "bce"],
)
def test_a_plain_function_that_is_a_loss_of_ours(function, ours, targets):
    task, data = uw.Task(linear(), function, uw.L2(0.1)), (X, targets)
    with pytest.raises(UpweightError, match=rf"upweight\.{ours}\(\)(.|\n)*Observed") as caught:
        uw.Influence(uw.EKFAC()).fit(task, data)
    assert "are those of" in str(caught.value)
    for way in (
        uw.Influence(uw.EKFAC(labels=uw.labels.Observed())).fit(task, data),
        uw.Influence(uw.EKFAC()).fit(uw.Task(linear(), getattr(uw, ours)(), uw.L2(0.1)), data),
    ):
        assert bool(way.attribute(data).values.isfinite().all())
    with pytest.raises(UpweightError, match=rf"upweight\.{ours}\(\)"):
        uw.Influence().fit(task, data).attribute(data, uw.LogProb())


def test_a_function_that_is_none_of_ours_is_not_taken_for_one():
    task = uw.Task(linear(), lambda f, y: (f[:, 0] - y).abs() ** 3)
    with pytest.raises(UpweightError, match="defines none") as caught:
        uw.Influence(uw.EKFAC()).fit(task, (X, Y))
    assert "are those of" not in str(caught.value)


def LOSS(f, y):
    return torch.nn.functional.cross_entropy(f, y, reduction="none")


@pytest.mark.parametrize(
    ("loss", "targets", "way"),
    [
        (LOSS, Y.double(), "y.long()"),
        (LOSS, Y[:, None], "y.squeeze(-1)"),
        (lambda f, y: LOSS(f, y), Y.int(), "y.long()"),
    ],
    ids=["floats", "column", "int32"],
)
def test_targets_that_a_loss_of_pytorchs_does_not_take(loss, targets, way, right):
    with pytest.raises(DtypeError if "long" in way else ShapeError, match=re.escape(way)):
        scores(linear(), (X, targets), loss=loss)
    converted = eval(way, {"y": targets})
    torch.testing.assert_close(scores(linear(), (X, converted), loss=loss), right)


def test_targets_that_no_conversion_makes_fit():
    with pytest.raises(ShapeError, match=r"outputs \(8, 2\) torch\.float64(.|\n)*PyTorch says"):
        scores(linear(), (X, torch.ones(N, 3).double()), loss=LOSS)


def test_an_error_of_the_users_own_in_a_loss():
    def loss(f, y):
        raise ValueError("no such class weight")

    with pytest.raises(ValueError, match="no such class weight") as caught:
        scores(linear(), (X, Y), loss=loss)
    assert not isinstance(caught.value, UpweightError)


@pytest.mark.parametrize("result", [1.5, None, (X, Y)], ids=["float", "None", "tuple"])
def test_a_loss_or_measure_that_returns_no_tensor(result):
    with pytest.raises(ScalarLoss, match=type(result).__name__):
        scores(linear(), (X, Y), loss=lambda f, y: result)
    fitted = uw.Influence().fit(uw.Task(linear(), CE, uw.L2(1.0)), (X, Y))
    with pytest.raises(ScalarLoss, match=type(result).__name__):
        fitted.attribute((X, Y), lambda f, y: result)


# -- names in place of objects --------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["probability", "coef", None, 3, uw.Margin], ids=str)
def test_a_measure_that_is_none(measure):
    fitted = uw.Influence().fit(uw.Task(linear(), CE, uw.L2(1.0)), (X, Y))
    with pytest.raises(
        SpecError, match=r"lambda outputs, targets: outputs\.softmax\(1\)"
    ) as caught:
        fitted.attribute((X, Y), measure)
    way = re.search(r"lambda outputs.*\]", str(caught.value)).group()
    assert bool(fitted.attribute((X, Y), eval(way)).values.isfinite().all())


@pytest.mark.parametrize("loss", ["cross_entropy", None, nn.CrossEntropyLoss, uw.CrossEntropy])
def test_a_loss_that_is_none(loss):
    with pytest.raises(SpecError, match=r"A loss is an object such as upweight\.CrossEntropy\(\)"):
        uw.Task(linear(), loss)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: uw.Influence("ekfac"), r"curvature=upweight\.EKFAC\(\)"),
        (lambda: uw.Influence(uw.EKFAC), r"curvature=upweight\.EKFAC\(\)"),
        (lambda: uw.Influence(curvature="arnoldi"), r"one of EKFAC\(\)"),
        (lambda: uw.Influence(0.1), "another's place"),
        (lambda: uw.Influence(None), "another's place"),
        (lambda: uw.Influence(solver="cg"), r"solver=upweight\.solvers\.CG\(\)"),
        (lambda: uw.Influence(solver=uw.solvers.CG), r"solver=upweight\.solvers\.CG\(\)"),
    ],
)
def test_a_curvature_or_solver_that_is_none(given, said):
    with pytest.raises(SpecError, match=said) as caught:
        given()
    way = re.search(r"(curvature|solver)=upweight\.(\w+\(\))", str(caught.value))
    if way:
        found = uw.Influence(**{way.group(1): eval(f"uw.{way.group(2)}")})
        assert repr(getattr(found, way.group(1))) == repr(eval(f"uw.{way.group(2)}"))


@pytest.mark.parametrize("damping", ["auto", None, uw.Relative], ids=str)
def test_a_damping_that_is_none(damping):
    with pytest.raises(SpecError, match=r"Relative\(0\.1\)"):
        uw.Influence(damping=damping).fit(uw.Task(linear(), CE), (X, Y))


class MakesFloat32(nn.Module):
    """Forgets that the model may be in another dtype."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.linear(x) @ torch.eye(2, dtype=torch.float32)


def test_a_model_that_runs_in_float32_only():
    model = MakesFloat32()
    with pytest.raises(DtypeError, match=r"torch.float64(.|\n)*in torch.float32 the model runs"):
        scores(model, (X, Y))
    assert scores(model.float(), (X.float(), Y)).isfinite().all()  # the way out
