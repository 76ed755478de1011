"""What can go wrong, and what the user can do about it.

    UpweightError
    ├── ShapeError            sizes that must agree do not            (ValueError)
    ├── DtypeError            dtypes that must agree do not           (TypeError)
    ├── SpecError             a hyperparameter has no such value      (ValueError)
    ├── DataError             the data cannot be indexed or are empty (ValueError)
    ├── ScalarLoss            a loss was reduced over the batch       (ValueError)
    ├── NonFinite             NaN or infinity, named by example       (ValueError)
    ├── NonDeterministic      the model gives another answer twice    (RuntimeError)
    ├── NotDifferentiable     no gradient reaches the parameters      (RuntimeError)
    ├── ModelChanged          the model changed after the fit         (RuntimeError)
    ├── DataChanged           an example changed after the fit        (RuntimeError)
    ├── NotPositiveDefinite   a factorization needs H + λI ≻ 0        (ValueError)
    ├── NotConverged          an iterative solver stopped early       (RuntimeError)
    ├── NotStationary         θ does not minimize the objective       (ValueError)
    ├── UnsupportedModel      no rule for this model or estimator     (TypeError)
    ├── NotOffered            this method has no such question        (AttributeError)
    ├── MissingContext        loaded scores lack their model or data  (RuntimeError)
    ├── StaleStore            files on disk belong to another run     (ValueError)
    ├── InUse                 another process works in the folder     (RuntimeError)
    ├── NotWritten            a file cannot be written                (OSError)
    ├── MissingPackage        a package that this needs is not there  (ImportError)
    └── ProjectError          a file of the user's cannot be run      (RuntimeError)

Every message has four parts: what was required, what was given, the usual cause, the way out.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


def message(required: str, given: str, cause: str, way_out: str) -> str:
    """Join the four parts of an error message into one text."""
    return f"{required}\n  Given: {given}\n  Usual cause: {cause}\n  Way out: {way_out}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a row, for a message or note: the first few of many."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def nearest(given: object, names: Iterable[str]) -> str:
    """The name that is most like what was given, for a way out: it holds it, or is spelled so."""
    known, said = list(names), str(given).lower()
    holding = [name for name in known if said and said in name.lower()]
    lower = {name.lower(): name for name in known}
    alike = difflib.get_close_matches(said, lower, n=1, cutoff=0.4)
    return holding[0] if holding else lower[alike[0]] if alike else known[-1]


class AssumptionWarning(UserWarning):
    """Numbers of a computation deny what its result assumes; also in `provenance.notes`.

    Or `Scores.predict` returns sizes that nothing supports; why is also in `Scores.against_sizes`.
    """


class UpweightError(Exception):
    """Any error that upweight raises on purpose.

    Args:
        parts: The four parts of the message, or its whole text.
    """

    def __init__(self, *parts: str) -> None:
        # Also after `copy` and `pickle`, which give back the whole text.
        super().__init__(message(*parts) if len(parts) == 4 else parts[0])


class ShapeError(UpweightError, ValueError):
    """Sizes that must agree do not."""


class DtypeError(UpweightError, TypeError):
    """Dtypes that must agree do not."""


class SpecError(UpweightError, ValueError):
    """A hyperparameter has a value that means nothing."""


class DataError(UpweightError, ValueError):
    """The data cannot be indexed in a fixed order, or are empty."""


class ScalarLoss(UpweightError, ValueError):
    """A loss or measure was reduced over the batch, so examples cannot be separated."""


class NonFinite(UpweightError, ValueError):
    """A value that must be finite is NaN or infinite."""


class NonDeterministic(UpweightError, RuntimeError):
    """The model answers differently for the same input, or couples the examples of a batch."""


class NotDifferentiable(UpweightError, RuntimeError):
    """No gradient reaches the parameters or the inputs."""


class ModelChanged(UpweightError, RuntimeError):
    """The model or its objective is no longer what the method was fitted to."""


class DataChanged(UpweightError, RuntimeError):
    """A training example is no longer what it was when the method was fitted."""


class NotPositiveDefinite(UpweightError, ValueError):
    """A factorization needs a positive definite matrix and was given another."""

    def __init__(self, *parts: str, smallest: float | None = None) -> None:
        super().__init__(*parts)
        self.smallest = smallest


class NotConverged(UpweightError, RuntimeError):
    """An iterative solver stopped before its tolerance; `.solution` holds what it reached."""

    def __init__(self, *parts: str, solution: Any = None) -> None:
        super().__init__(*parts)
        self.solution = solution


class NotStationary(UpweightError, ValueError):
    """The parameters do not minimize the objective they were said to minimize."""


class UnsupportedModel(UpweightError, TypeError):
    """The model, layer or estimator has no translation."""


class NotOffered(UpweightError, AttributeError):
    """A fitted method does not answer this question; another one does."""


class MissingContext(UpweightError, RuntimeError):
    """The scores no longer carry the model and data that the request needs."""


class StaleStore(UpweightError, ValueError):
    """Files on disk were written for another model, data set or specification."""


class InUse(UpweightError, RuntimeError):
    """Another process works on the same files."""


class NotWritten(UpweightError, OSError):
    """A file cannot be written: the disk is full, or not ours to write."""


class MissingPackage(UpweightError, ImportError):
    """A package that upweight does not need for itself is not installed."""


class ProjectError(UpweightError, RuntimeError):
    """A file of the user's does not define what was asked for, or raised an error."""
