"""Method: a spec of an estimator of S, that a task and its training data make a `Fitted`."""

import abc
import time
import warnings
from typing import Any, ClassVar, final

from upweight.errors import SpecError
from upweight.methods import health
from upweight.methods.fitted import Fitted
from upweight.methods.fitting import Fitting
from upweight.methods.scorer import Scorer
from upweight.runtime.resources import Resources
from upweight.scores import Unit
from upweight.task.check import require_answerable
from upweight.task.modes import require_modules
from upweight.task.sharded import BY_LAYER, require_own_weights
from upweight.task.snapshot import Snapshot, written
from upweight.task.task import Task, require_task
from upweight.training.function import as_recipe


class Method(abc.ABC):
    """Hyperparameters only: a frozen dataclass whose repr is Python for an equal one.

    A method supplies its unit and `prepare`; checks of model and data, streaming, memory, progress,
    provenance, health and resuming are written once, here and in `Fitted`. One that needs to know
    how the model was trained sets `takes_history`, and says so where it is given none; one that
    can do without sets `history_is_optional` as well.
    """

    takes_history: ClassVar[bool] = False
    history_is_optional: ClassVar[bool] = False
    """Whether it can do without one."""
    takes_run: ClassVar[bool] = False
    """Whether its history is one run of training that ended at the model."""

    of_all_data: ClassVar[bool] = False
    """Whether that run must be of all of the data, each with weight 1."""

    goes_by_layer: bool = False
    """Whether it needs θ a layer at a time only, so that each process may have a part of it."""

    @property
    def is_of_one_model(self) -> bool:
        """Whether it looks at one model, or at the training of one, or can do with that."""
        return not self.takes_history or self.takes_run or self.history_is_optional

    @property
    @abc.abstractmethod
    def unit(self) -> Unit:
        """What its scores mean."""

    @abc.abstractmethod
    def prepare(self, fitting: Fitting) -> Scorer:
        """Learn from the training data what every query needs.

        Raises:
            UpweightError: The method cannot answer for this model or these data.
        """

    @final
    def fit(
        self, task: Task, train: Any, *, history: Any = None, resources: Resources | None = None
    ) -> Fitted:
        """Check the task on its training data, and learn from them what every query needs.

        Args:
            task: What was trained.
            train: The training set, as for `as_data`.
            history: How it was trained, for methods that need it: a `Trajectory`, a recipe, or
                several models.
            resources: What may be used, and where to keep what takes long; None: the defaults.

        Raises:
            UpweightError: One of the checks of `upweight.task.check`, or what the method cannot
                answer, with the way out.

        Cost: the method's, and a forward pass over the training data, unless it has a pass of its
        own over all of them or learns from some of them, as `EKFAC(examples=…)` does: then the
        others are checked when they are scored.
        """
        started = time.perf_counter()
        require_task(task)
        require_modules(task.model)
        used = Resources() if resources is None else resources
        if task.sharded is not None:
            if not self.goes_by_layer:
                require_own_weights(task.sharded, repr(self), BY_LAYER)
            used = used.sharing(task.sharded.shares(used.ranks))
        with task.in_step():
            data, before = task.training(train), Snapshot.of(task)
            # Of the data as they come: a random data set meets a message that knows the cause.
            probe = require_answerable(task, data, "training data")
            for note in probe.notes:
                warnings.warn(note, UserWarning, stacklevel=2)
            data = data.watched()
            history = as_recipe(history)
            if history is not None and not self.takes_history:
                raise SpecError(
                    "A history is for methods that look at how the model was trained.",
                    f"history={type(history).__name__} for {self!r}, which looks at θ̂ alone.",
                    "an argument left from another method.",
                    "leave it out.",
                )
            fitting = Fitting(task, data, task.held_theta(), probe, used, history)
            scorer = self.prepare(fitting)
            losses = fitting.losses
            if not fitting.looks_later:
                losses.all()
            return Fitted(
                spec=self,
                task=task,
                train=data,
                theta=fitting.theta,
                snapshot=Snapshot.of(task).settled(before, written(task, data), losses.known),
                looked_at=losses,
                scorer=scorer,
                resources=used,
                history=history,
                seconds={"fit": time.perf_counter() - started, **scorer.seconds},
                notes=(
                    *data.notes,
                    *data.form_notes,
                    *probe.notes,
                    *scorer.notes,
                    *health.precision_notes(task, data),
                ),
            )
