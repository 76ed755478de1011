"""Low precision: factors are float32 at least, and differ from autograd's by the layers' rounding.

The reference is autograd in the same precision, example by example, whose last step rounds to the
parameters' dtype; factors are not rounded. Observed: at most 1.6 eps of the dtype that the layers
compute in, relative to each example's gradient (0.0031 in bfloat16); 4 eps are allowed. A row
counted for another example is off by about 1.
"""

import functools

import pytest
import torch
from torch import nn

import upweight as uw
from tests.gradients.layer_market import (
    Attend,
    Decoder,
    Encoder,
    Translator,
    gradient_rows,
    rows,
)
from tests.market import draw, labels
from tests.reference import dense
from upweight.gradients.passes import GradientPass
from upweight.gradients.planning import plan
from upweight.task.data import as_data

HALF = [torch.bfloat16, torch.float16]


def perceptron():
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def convolutional():
    layers = [nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(nn.Unflatten(1, (1, 8)), *layers)


MODELS = {
    "perceptron": (perceptron, [(8,)]),
    "convolutional": (convolutional, [(8,)]),
    "decoder": (lambda: Decoder(width=8), None),
    "encoder": (lambda: Encoder(batch_first=True, masked=True), [(5, 4)]),
    "decoder layer": (lambda: Translator(batch_first=True), [(5, 4), (2, 3)]),
    # Attention whose keys come from a linear map, in another dtype than its queries under autocast.
    "attention": (lambda: Attend(batch_first=True, cross=True, masked=True), [(5, 4)]),
}


def precise(name, dtype=torch.float32):
    build, inputs = MODELS[name]
    g = torch.Generator().manual_seed(0)
    model = build().eval().to(dtype)
    if inputs is None:
        x = torch.randint(6, (12, 5), generator=g)
        return model, (x, x)
    return model, (*(draw(g, 12, *shape).to(dtype) for shape in inputs), labels(g, 12, 3))


def assert_near(found, expected, dtype):
    assert found.dtype == torch.float32
    error = (found - expected.float()).norm(dim=1) / expected.float().norm(dim=1)
    assert float(error.max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_models_in_low_precision(name, dtype):
    model, data = precise(name, dtype)
    task = uw.Task(model, uw.CrossEntropy())
    made = plan(task, task.theta(), as_data(data))
    assert made.by_function == ()
    assert_near(gradient_rows(made, data), dense.gradients(task, data), dtype)


@pytest.mark.parametrize("cast_outputs", [True, False], ids=["float32 out", "low out"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_in_forward(name, dtype, cast_outputs):
    model, data = precise(name)

    def forward(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(*batch[:-1])
        return outputs.float() if cast_outputs else outputs, batch[-1]

    task = uw.Task(model, uw.CrossEntropy(), forward=forward)
    made = plan(task, task.theta(), as_data(data))
    assert made.by_function == ()
    assert_near(gradient_rows(made, data), dense.gradients(task, data), dtype)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_around_the_call(name):
    model, data = precise(name)
    task = uw.Task(model, uw.CrossEntropy())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = plan(task, task.theta(), as_data(data))
        with GradientPass(made, made.task.theta()) as gradients:
            factors = gradients.of(task.losses, data, len(data[0]))
        expected = dense.gradients(task, data)
    # The factors are float32 all the same; in there, their products would not be.
    assert_near(rows(made, factors), expected, torch.bfloat16)


def test_a_wrong_rule_is_noticed_in_low_precision_too():
    def doubled(x, module):
        return nn.functional.linear(x, module.weight * 2.0, module.bias)

    _, data = precise("perceptron", torch.bfloat16)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].forward = functools.partial(doubled, module=model[0])
    task = uw.Task(model.bfloat16().eval(), uw.CrossEntropy())
    made = plan(task, task.theta(), as_data(data))
    assert set(made.by_function) == {"0.weight", "0.bias"}
    assert_near(gradient_rows(made, data), dense.gradients(task, data), torch.bfloat16)
