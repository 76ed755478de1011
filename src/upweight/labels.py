"""Whose labels a curvature sees: expected under the model, drawn from it, or those observed."""

from upweight.curvature.labels import Expected, Observed, Sampled

__all__ = ["Expected", "Observed", "Sampled"]
