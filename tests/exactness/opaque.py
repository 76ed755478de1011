"""The same models, unrecognizable: what a fast path computes, by the path for any model."""

import copy

from torch import nn

import upweight as uw
from upweight.gradients.linear import linear_form
from upweight.task.data import as_data


class OpaqueLinear(nn.Linear):
    """A linear map that is not exactly `nn.Linear`, so that nothing is assumed of it."""


def opaque(task, train):
    """The task with its linear maps replaced by opaque ones of the same numbers."""
    model = copy.deepcopy(task.model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OpaqueLinear
    found = uw.Task(model, task.loss, task.penalty, task.params, task.forward)
    assert linear_form(found, found.theta(), as_data(train).batch(0, 2)) is None
    return found
