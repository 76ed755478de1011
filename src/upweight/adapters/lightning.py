"""`lightning.Trainer`: its steps recorded while it trains.

J_B = (1/k) Σ_m (1/|B_m|) Σ_{i∈m} ℓᵢ      k = accumulate_grad_batches, for fewer batches too
fᵢ  = min(1, c/‖g‖) |B|/(k |B_m|)         what ℓᵢ is multiplied with in the mean over the step
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from upweight._typing import Folder
from upweight.adapters.loops import Clipped, Order, require_one_process, spread
from upweight.errors import MissingPackage, SpecError
from upweight.task.task import Task
from upweight.training.record import Recorded, Run, read_record, recording

__all__ = ["Recorder"]

AGAIN = "trainer.fit(..., ckpt_path=...) goes on from a checkpoint of Lightning"


@functools.cache
def _callback() -> Any:
    # The two names of the library have a Callback each.
    try:
        if "pytorch_lightning" in sys.modules and "lightning" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingPackage(
            "A callback is called by Lightning.",
            f"{error}.",
            "an installation without it: upweight itself does not need it.",
            "pip install lightning; or record a loop of your own with upweight.record(...).",
        ) from error

    return type("Recorder", (Recorder, Callback), {})


class Recorder:
    """A Lightning `Callback` that writes the steps of `Trainer.fit` to a folder, as `uw.record`.

    `training_step` must return the mean of ℓᵢ over the examples of its batch, and the optimizer
    step by itself (automatic optimization). Recorded are learning rate, settings, the indices of
    the examples, and what clipping by norm and accumulation multiply their losses with. States are
    kept every `every`-th step, at the end of each epoch and at each checkpoint.

    Args:
        folder: A new one, or that of a run that is resumed from a checkpoint of Lightning.
        every: States to keep: every k-th.
        module: The part of the LightningModule that the task has, as `"net"`; "": all of it.

    Raises:
        SpecError: When training begins: several devices, optimizers or losses of a step that
            cannot be seen (manual optimization, half precision with a scaler, clipping by value),
            or workers that read ahead of the recording.
        DataError: The data are streamed, or batches are put together by another sampler.
        StaleStore: The folder holds a run that is not resumed, or has no state of the checkpoint.

    Cost: as for `upweight.adapters.transformers.Recorder`.

    Example:
        >>> recorder = Recorder("run", module="net")
        >>> lightning.Trainer(callbacks=[recorder]).fit(model, loader)
        >>> task = uw.Task(model.net.eval(), uw.CrossEntropy())
        >>> fitted = uw.TracIn().fit(task, data, history=recorder.history(task))
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Recorder":
        """An instance that is a `Callback` as well: lightning is imported here."""
        return object.__new__(_callback() if cls is Recorder else cls)

    def __init__(self, folder: Folder, every: int = 100, module: str = "") -> None:
        self.folder, self.every, self.module = Path(folder), every, module
        self._order: Order | None = None
        self._loader: Any = None
        self._run: Run | None = None
        self._closing: list[Callable[[], None]] = []
        self._indices: list[Tensor] = []

    def history(self, task: Task) -> Recorded:
        """The run, for `fit(task, train, history=)`.

        Args:
            task: Of the trained model.

        Raises:
            UpweightError: As for `upweight.training.read_record`.
        """
        return read_record(task, self.folder)

    def close(self) -> None:
        """Take all hooks away."""
        while self._closing:
            self._closing.pop()()
        if self._order is not None:
            self._order.close()
        self._order = self._run = None

    # -- what Lightning calls ----------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at a loader before its workers begin to read."""
        self.close()
        loader = getattr(getattr(trainer.fit_loop, "_data_source", None), "instance", None)
        if isinstance(loader, DataLoader):
            self._watch(loader)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the folder and look on."""
        require_one_process(trainer.world_size)
        clips = trainer.gradient_clip_val
        wrong = (
            "manual optimization"
            if not pl_module.automatic_optimization
            else f"{len(trainer.optimizers)} optimizers"
            if len(trainer.optimizers) != 1
            else f"precision={trainer.precision}, whose scaler leaves steps out"
            if str(trainer.precision).startswith("16")
            else "clipping of each number of a gradient by itself"
            if clips and str(trainer.gradient_clip_algorithm).lower().endswith("value")
            else None
        )
        if wrong is not None:
            self.close()
            raise SpecError(
                "A recorded run has one optimizer, that takes each step with the mean loss.",
                f"{wrong}.",
                "adversarial training, or mixed precision.",
                "precision='32' or 'bf16-mixed', gradient_clip_algorithm='norm'; or "
                "uw.record(...) in a loop of your own.",
            )
        try:
            self._begin(trainer, pl_module, bool(clips))
        except BaseException:
            self.close()
            raise

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch, and the step if it was the last of one."""
        if self._run is None or self._order is None:
            return
        self._indices.append(self._order.take())
        if not self._run.stepped:
            return
        b, k = sum(map(len, self._indices)), trainer.accumulate_grad_batches
        left = self._clipped.factor if self._clipped else 1.0
        factors = spread(self._indices, [left * b / (k * len(some)) for some in self._indices])
        self._run.step(*self._indices, factors=factors)
        self._indices = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Keep what training may be resumed from."""
        self._keep()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the end of an epoch."""
        self._keep()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the end, and look away."""
        self._keep()
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Look away."""
        self.close()

    def _watch(self, loader: Any) -> None:
        self._loader, self._order = loader, Order(loader)

    def _begin(self, trainer: Any, pl_module: Any, clips: bool) -> None:
        loader = trainer.train_dataloader
        if loader is not self._loader or self._order is None:
            if self._order is not None:
                self._order.close()
            if getattr(loader, "num_workers", 0):
                raise SpecError(
                    "The order of the examples is seen from the first batch on.",
                    f"a loader with {loader.num_workers} workers, which have begun to read.",
                    "a train_dataloader() of the module or of a LightningDataModule.",
                    "trainer.fit(model, loader) with the loader itself; or num_workers=0.",
                )
            self._watch(loader)
        (rule,) = trainer.optimizers
        rule = getattr(rule, "_optimizer", rule)
        self._clipped = Clipped(pl_module.parameters(), rule) if clips else None
        if self._clipped is not None:
            self._closing.append(self._clipped.close)
        model = pl_module.get_submodule(self.module)
        run = recording(model, rule, self.folder, self.every, trainer.global_step, AGAIN)
        run.__enter__()
        self._closing.append(lambda: run.__exit__(KeyboardInterrupt))
        self._run, self._indices = run, []

    def _keep(self) -> None:
        if self._run is not None and self._run.taken:
            self._run.keep()
