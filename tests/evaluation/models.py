"""Retrained models that are numbers only, for tests of what is read off them."""

import torch

from upweight.effects import Effects
from upweight.provenance import Provenance
from upweight.scores import Scores, Unit
from upweight.training import Retrained


def retrained(values, baseline=None):
    """What `retrain` would return for these measurements."""
    values = torch.as_tensor(values)
    baseline = torch.zeros(values.shape[1]) if baseline is None else torch.as_tensor(baseline)
    return Retrained(values, baseline, baseline, torch.zeros(len(values)), 0.0, 0, 0.0)


def scored(values, unit=Unit.DERIVATIVE, columns=None):
    """Scores of these numbers."""
    q, n = values.shape
    about = Provenance("by hand", "", "", n, q, 1, "float64", "cpu")
    return Scores(values, unit, about, columns=columns)


def effects(scores):
    """The same predictions, as effects of single removals."""
    groups = tuple((i,) for i in range(scores.values.shape[1]))
    return Effects(-scores.values, groups, "by hand", scores.provenance)


def additive(scores, weights, baseline=None):
    """A world where effects add up: m(w) = m(1) + Σ S (w − 1)."""
    baseline = torch.zeros(len(scores)) if baseline is None else baseline
    return retrained(baseline + (weights - 1) @ scores.T, baseline)
