"""Capture: δ is what autograd says it is, and the model comes back as it was lent."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import upweight as uw
from tests.gradients import layer_market
from tests.gradients.layer_market import Chain, gradient_rows
from tests.market import draw, initialized, labels
from tests.reference import dense
from upweight.errors import NotDifferentiable, UnsupportedModel
from upweight.gradients.hooks import Call, Capture
from upweight.gradients.passes import GradientPass, without_rounding
from upweight.gradients.planning import plan
from upweight.task.data import as_data

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def chain(model=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    model = initialized(model or Chain(), g).eval()
    return uw.Task(model, uw.CrossEntropy()), (draw(g, 6, 3), labels(g, 6, 2))


LAYERS = {"body": ("weight", "bias"), "head": ("weight", "bias")}


def test_inputs_and_deltas():
    task, batch = chain()
    with Capture(task, task.theta(), LAYERS) as capture:
        outputs, targets = capture.forward(batch)
        body, head = capture.backward(task.loss(outputs, targets))
    hidden = task.model.body(batch[0])
    logits = task.model.head(torch.tanh(hidden))
    hidden.retain_grad()
    logits.retain_grad()
    task.loss(logits, batch[1]).sum().backward()
    task.model.zero_grad()
    torch.testing.assert_close(body.args[0], batch[0], **EXACT)
    torch.testing.assert_close(head.args[0], torch.tanh(hidden), **EXACT)
    torch.testing.assert_close(body.delta, hidden.grad, **EXACT)
    torch.testing.assert_close(head.delta, logits.grad, **EXACT)


def test_other_cotangents_on_the_same_graph():
    task, batch = chain()
    v = draw(torch.Generator().manual_seed(1), 6, 2)
    with Capture(task, task.theta(), LAYERS) as capture:
        outputs, _ = capture.forward(batch)
        capture.backward(outputs)
        first = capture.backward(outputs, v)
        second = capture.backward(outputs, -2.0 * v)
    torch.testing.assert_close(first[1].delta, v, **EXACT)
    torch.testing.assert_close(second[0].delta, -2.0 * first[0].delta, **EXACT)


def test_uses_that_do_not_matter_are_left_out():
    task, batch = chain(layer_market.Detached())
    with Capture(task, task.theta(), {**LAYERS, "spare": ("weight", "bias")}) as capture:
        outputs, _ = capture.forward(batch)
        assert [call.layer for call in capture.backward(outputs)] == ["body", "head"]


def test_parameters_used_elsewhere_are_named():
    task, batch = chain(layer_market.UsedBare())
    with Capture(task, task.theta(), LAYERS) as capture:
        outputs, _ = capture.forward(batch)
        capture.backward(outputs)
        assert capture.bypassed == ("body.weight",)


# -- the model comes back as it was lent ----------------------------------------------------------


def snapshot(model):
    return {
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [
            [len(value) for key, value in sorted(vars(m).items()) if "hooks" in key and value]
            for m in model.modules()
        ],
        "identities": [id(p) for m in model.modules() for p in m._parameters.values()],
        "random": torch.get_rng_state().tolist(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_returned(model, state, before):
    now = model.state_dict()
    assert state.keys() == now.keys()
    assert all(torch.equal(state[key], now[key]) for key in state)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", layer_market.BUILDERS)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_the_model_is_left_as_it_was(name):
    case = layer_market.case(name)
    model = case.task.model
    state, before = copy.deepcopy(model.state_dict()), snapshot(model)
    made = plan(case.task, case.task.theta(), case.data)
    gradient_rows(made, case.data.batch(0, len(case.data)))
    assert_returned(model, state, before)


class Raises(Chain):
    """Raises in the middle, inside of a layer or between layers, when told to."""

    def __init__(self, where):
        super().__init__()
        self.where, self.is_armed = where, False
        if where == "before":
            self.head.register_forward_pre_hook(self.burn)
        if where == "after":
            self.head.register_forward_hook(self.burn)

    def burn(self, *_):
        if self.is_armed:
            raise RuntimeError("no")

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        if self.where == "between":
            self.burn()
        if self.where == "inside" and self.is_armed:
            hidden = hidden[:, :1]  # of a width that the head does not take
        return self.head(hidden)


@pytest.mark.parametrize("direct", [False, True], ids=["by the task", "by itself"])
@pytest.mark.parametrize("where", ["before", "after", "between", "inside"])
def test_the_model_is_left_as_it_was_when_forward_raises(where, direct):
    task, batch = chain(Raises(where))
    model = task.model
    made = plan(task, task.theta(), as_data(batch))
    state, before = copy.deepcopy(model.state_dict()), snapshot(model)

    def function(params, batch):
        model.is_armed = True
        try:
            # A measure may call the model itself, with its parameters in their places.
            return task.loss(model(batch[0]), batch[1]) if direct else task.losses(params, batch)
        finally:
            model.is_armed = False

    with pytest.raises(RuntimeError), GradientPass(made, made.task.theta()) as gradients:
        gradients.of(function, batch, len(batch[0]))
    assert_returned(model, state, before)


def test_gradients_of_a_function_that_calls_the_model_itself():
    task, batch = chain()
    made = plan(task, task.theta(), as_data(batch))
    found = gradient_rows(made, batch, lambda params, b: task.loss(task.model(b[0]), b[1]))
    torch.testing.assert_close(found, dense.gradients(task, batch), **EXACT)
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())


# -- where autograd does not record ---------------------------------------------------------------


class WithoutGrad(Chain):
    def __init__(self, context):
        super().__init__()
        self.context = context

    def forward(self, x):
        with self.context():
            hidden = torch.tanh(self.body(x))
        return self.head(hidden.clone())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_run_without_autograd_are_refused_by_name(context):
    task, batch = chain(WithoutGrad(context))
    with pytest.raises(UnsupportedModel, match=r"body runs under torch.no_grad(.|\n)*params="):
        plan(task, task.theta(), as_data(batch))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_run_without_autograd_may_be_left_out(context):
    _, batch = chain()
    model = initialized(WithoutGrad(context), torch.Generator().manual_seed(0)).eval()
    task = uw.Task(model, uw.CrossEntropy(), params="head.*")
    found = gradient_rows(plan(task, task.theta(), as_data(batch)), batch)
    torch.testing.assert_close(found, dense.gradients(task, batch), **EXACT)


def test_a_caller_under_no_grad():
    task, batch = chain()
    expected = dense.gradients(task, batch)
    with torch.no_grad():
        found = gradient_rows(plan(task, task.theta(), as_data(batch)), batch)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_caller_in_inference_mode_is_refused_by_name():
    task, batch = chain()
    made = plan(task, task.theta(), as_data(batch))
    with (
        torch.inference_mode(),
        pytest.raises(
            NotDifferentiable, match=r"inside torch.inference_mode(.|\n)*leave inference"
        ),
        GradientPass(made, made.task.theta()),
    ):
        pass


class Checkpointed(Chain):
    """A part of the model run again in the backward pass, to save memory."""

    def __init__(self, use_reentrant, is_first):
        super().__init__()
        self.middle = nn.Linear(3, 3)
        self.use_reentrant, self.is_first = use_reentrant, is_first

    def part(self, x):
        return torch.tanh(self.middle(torch.tanh(self.body(x))))

    def forward(self, x):
        x = x if self.is_first else torch.tanh(self.body(x))
        return self.head(checkpoint(self.part, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("is_first", [True, False])
def test_checkpointing(is_first):
    task, batch = chain(Checkpointed(False, is_first))
    state, before = copy.deepcopy(task.model.state_dict()), snapshot(task.model)
    found = gradient_rows(plan(task, task.theta(), as_data(batch)), batch)
    torch.testing.assert_close(found, dense.gradients(task, batch), **EXACT)
    assert_returned(task.model, state, before)


def test_checkpointing_beside_parameters_without_a_rule():
    class Gained(Checkpointed):
        def __init__(self):
            super().__init__(False, False)
            self.gain = nn.Parameter(torch.ones(3))

        def part(self, x):
            return super().part(x) * self.gain

    task, batch = chain(Gained())
    made = plan(task, task.theta(), as_data(batch))
    assert made.by_function == ("gain",)
    torch.testing.assert_close(gradient_rows(made, batch), dense.gradients(task, batch), **EXACT)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("is_first", [True, False])
def test_reentrant_checkpointing_is_refused_by_name(is_first):
    task, batch = chain(Checkpointed(True, is_first))
    with pytest.raises(UnsupportedModel, match=r"use_reentrant=True(.|\n)*use_reentrant=False"):
        plan(task, task.theta(), as_data(batch))


@pytest.mark.parametrize("axis", [0, 1])
def test_an_example_whose_delta_is_rounding_throughout_a_layer_has_none(axis):
    """By the largest δ of the example in any layer: a layer with small ones keeps them."""
    one = torch.ones(2, 3, 4, dtype=torch.float64)
    large, small = one.clone(), 1e-9 * one
    small[0] = 1e-17  # of an example that has 1 elsewhere
    large[1] = 1e-9  # as small as all that this example has
    given = [x if axis == 0 else x.movedim(0, 1) for x in (large, small)]
    calls = [Call(name, (), {}, x) for name, x in zip("ab", given, strict=True)]
    first, second = without_rounding(calls, {"a": axis, "b": axis}, 2)
    assert torch.equal(first.delta, given[0])
    expected = small.clone()
    expected[0] = 0.0
    assert torch.equal(second.delta if axis == 0 else second.delta.movedim(1, 0), expected)
    # Flattened, an example has several rows.
    flat = [Call("a", (), {}, large.flatten(0, 1)), Call("b", (), {}, small.flatten(0, 1))]
    assert torch.equal(without_rounding(flat, {"a": 0, "b": 0}, 2)[1].delta, expected.flatten(0, 1))
