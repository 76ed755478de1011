"""`transformers.Trainer`: its steps recorded while it trains, and its task, data and recipe.

    J_B = Σ_m (s_m/D_m) Σ_{i∈m} ℓᵢ          the batches m of a step, of which a loss is taken each
    fᵢ  = min(1, c/‖g‖) |B| s_m/D_m         what ℓᵢ is multiplied with in the mean over the step

D_m is what the model's own loss divides the sum of its batch by: examples, or labels that count, of
the batch or of all of the step. s_m is what Trainer multiplies that loss with, 1/(number of
batches) where it is no mean over the step yet. Both are read off the passes: whatever Trainer does
in this version is what is recorded.
"""

import copy
import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Folder
from upweight.adapters.loops import Clipped, Order, require_one_process, spread
from upweight.adapters.transformers_data import Collated
from upweight.adapters.transformers_kinds import kind, per_token
from upweight.errors import DataError, SpecError, StaleStore, message
from upweight.runtime.generators import own_random_numbers
from upweight.runtime.packages import missing
from upweight.task.data import Data, IndexedData
from upweight.task.lent import copied
from upweight.task.losses import CrossEntropy
from upweight.task.task import Task, bare
from upweight.training.function import FromFunction
from upweight.training.record import Recorded, Run, read_record, recording

SUMS_TOKENS = ("causal_lm", "masked_lm", "seq2seq")
"""Adapters whose ℓᵢ is a sum over the labels of an example."""


@functools.cache
def _callback() -> Any:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise missing("A training", "transformers", "transformers", error) from error

    return type("Recorder", (Recorder, TrainerCallback), {})


class Recorder:
    """A `TrainerCallback` that writes the steps of `Trainer.train()` to a folder, as `uw.record`.

    Recorded are the learning rate, the optimizer's settings and the indices of the examples of each
    step, what clipping left of its gradient, what Trainer multiplies each loss with, and some
    states: θ and the optimizer's memories. `TracIn`, `SOURCE` and `FromTraining()` read them.

        >>> recorder = hf.Recorder("run")
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[recorder])
        >>> trainer.train()
        >>> fitted = uw.TracIn().fit(task, data, history=recorder.history(task))

    States are kept every `every`-th step, at the end of each epoch and at each checkpoint of
    Trainer: `trainer.train(resume_from_checkpoint=True)` goes on with the folder.

    Args:
        folder: A new one, or that of a run that is resumed from one of Trainer's checkpoints.
        every: States to keep: every k-th. None: every ⌈√T⌉-th of T steps.

    Raises:
        SpecError: When training begins: several processes or devices, fp16, or an optimizer other
            than SGD, Adam or AdamW with one learning rate. At a step of several batches: a loss of
            the user's own, whose share of the step cannot be seen.
        DataError: The data are streamed, or batches are put together by another sampler.
        StaleStore: The folder holds a run that is not resumed, or has no state of the checkpoint.

    Cost: a file of θ and the optimizer's memories for each state; norms of the gradients of biases
    and scales at each step where gradients are clipped.

    What is drawn in training, dropout and noise on embeddings, is not recorded: with it a step
    cannot be taken again to the bit. Masks drawn by a collate function are refused by
    `from_trainer`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Recorder":
        """An instance that is a `TrainerCallback` as well: transformers is imported here."""
        return object.__new__(_callback() if cls is Recorder else cls)

    def __init__(self, folder: Folder, every: int | None = None) -> None:
        self.folder, self.every = Path(folder), every
        self.end: int | None = None
        """The step that Trainer put the model back to, load_best_model_at_end=True."""
        self._run: Run | None = None
        self._closing: list[Callable[[], None]] = []
        self._indices: list[Tensor] = []

    def history(self, task: Task) -> Recorded:
        """The run, for `fit(task, train, history=)`: up to the state of the model.

        Args:
            task: Of the trained model.

        Raises:
            UpweightError: As for `upweight.training.read_record`.
        """
        return read_record(task, self.folder, self.end)

    def close(self) -> None:
        """Take all hooks away. Training that ends does so itself; not where it was interrupted."""
        while self._closing:
            self._closing.pop()()
        self._run = None

    # -- what Trainer calls ------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Open the folder and look on."""
        self.close()
        require_one_process(max(args.world_size, args.n_gpu))
        if args.fp16:
            raise SpecError(
                "A recorded run takes each step of the optimizer, with gradients as they are.",
                "fp16=True, which scales gradients and leaves steps out.",
                "mixed precision with a gradient scaler.",
                "bf16=True, or float32.",
            )
        model, rule = given["model"], given["optimizer"]
        rule = getattr(rule, "optimizer", rule)  # accelerate wraps it
        loader, taken = given["train_dataloader"], state.global_step
        a_step = args.gradient_accumulation_steps
        skipped = 0
        if taken and not args.ignore_data_skip:
            skipped = taken % max(1, -(-len(loader) // a_step)) * a_step
        order = Order(loader, skipped)
        self._closing.append(order.close)
        try:
            every = max(1, math.isqrt(max(0, state.max_steps - 1)) + 1)
            every = self.every if self.every is not None else every
            clipped = None
            if args.max_grad_norm and args.max_grad_norm > 0:
                clipped = Clipped(model.parameters(), rule)
                self._closing.append(clipped.close)
            self._passes = _Passes(model)
            self._closing.append(self._passes.close)
            run = recording(model, rule, self.folder, every, taken, AGAIN)
            run.__enter__()
            self._closing.append(lambda: run.__exit__(KeyboardInterrupt))
        except BaseException:
            self.close()
            raise
        self._order, self._clipped, self._run, self.end = order, clipped, run, None
        self._indices = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A batch of a step that has several."""
        if self._run is not None:
            self._batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The last batch of a step, and the step."""
        if self._run is None:
            return
        self._batch()
        found = self._passes.scales([len(some) for some in self._indices])
        b, left = sum(map(len, self._indices)), self._clipped.factor if self._clipped else 1.0
        factors = spread(self._indices, [b * scale * left for scale in found])
        self._run.step(*self._indices, factors=factors)
        self._indices = []

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep what training may be resumed from."""
        self._keep()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the end, before Trainer puts the best model in its place."""
        self._keep()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look away."""
        if self._run is not None:
            is_back = args.load_best_model_at_end and state.best_model_checkpoint is not None
            best = Path(state.best_model_checkpoint).name.rpartition("-")[2] if is_back else ""
            self.end = int(best) if best.isdigit() else None
        self.close()

    def _batch(self) -> None:
        self._indices.append(self._order.take())
        self._passes.batch_ends()

    def _keep(self) -> None:
        if self._run is not None and self._run.taken:
            self._run.keep()


@dataclass(eq=False)
class _Pass:
    """A forward pass in training."""

    own: Tensor | None
    """Labels that count; None: one for each example."""
    told: Any
    """Of all batches of the step, as Trainer counted."""
    loss: Tensor | None
    total: Float[Tensor, ""] | None
    """Σ ℓᵢ of the batch, where it decides."""
    scale: Tensor | None = None
    """What Trainer multiplied the loss with."""


class _Passes:
    """What the loss of each batch is divided by, and multiplied with."""

    def __init__(self, model: nn.Module) -> None:
        self._kind = kind(model)
        self._sums = self._kind in SUMS_TOKENS or (
            self._kind == "classifier" and per_token(bare(model))
        )
        self._batches: list[list[_Pass]] = [[]]
        self._hook = model.register_forward_hook(self._seen, with_kwargs=True)
        self.close = self._hook.remove

    def _seen(self, module: nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        labels, told = given.get("labels"), given.get("num_items_in_batch")
        if not isinstance(loss, Tensor) or not loss.requires_grad or not isinstance(labels, Tensor):
            self._batches[-1].append(_Pass(None, None, None, None))
            return
        shifts = self._kind == "causal_lm"
        kept = labels[..., 1:] if shifts else labels
        own = (kept != -100).sum() if self._sums else None
        total = None
        if told is not None and not labels.is_floating_point():
            logits = output["logits"].detach()
            logits = logits[..., :-1, :] if shifts else logits
            if int(told) != (len(labels) if own is None else int(own)):
                total = F.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), kept.reshape(-1), reduction="sum"
                )
        found = _Pass(own, told, loss.detach(), total)

        def scaled(gradient: Tensor) -> None:
            found.scale = gradient.detach()

        loss.register_hook(scaled)  # type: ignore[no-untyped-call]
        self._batches[-1].append(found)

    def batch_ends(self) -> None:
        """The passes of the next batch follow."""
        self._batches.append([])

    def scales(self, sizes: list[int]) -> list[float]:
        """s_m/D_m of each batch of a step; a SpecError where it cannot be seen."""
        batches, self._batches = self._batches[: len(sizes)], [[]]
        found = []
        for size, passes in zip(sizes, batches, strict=True):
            one = passes[0] if len(passes) == 1 else None
            if one is None or one.scale is None or one.loss is None:
                # A loss of the user's own: of one batch, a mean over its examples.
                if len(sizes) > 1 or self._sums:
                    raise SpecError(_own_loss(len(sizes), self._sums))
                found.append(1 / size)
                continue
            divisor = float(size if one.own is None else one.own)
            if one.total is not None:
                told = float(one.told)
                means = [float(one.total) / d / float(one.loss) - 1 for d in (divisor, told)]
                if min(map(abs, means)) > CLOSE:
                    raise SpecError(_own_loss(len(sizes), self._sums))
                divisor = divisor if abs(means[0]) <= abs(means[1]) else told
            # Without a label that counts the loss has no gradient, whatever it is divided by.
            found.append(float(one.scale) / divisor if divisor else 0.0)
        return found


AGAIN = "trainer.train(resume_from_checkpoint=True) goes on from a checkpoint of Trainer"

CLOSE = 1e-2
"""Relative difference of losses that rounding of half precision may make."""


def _own_loss(batches: int, sums: bool) -> str:
    return message(
        "What each example has in the loss of a step must be seen: the model's own loss, or of one "
        "batch a mean over its examples.",
        f"a loss that is not the model's own, in a step of {batches} batches"
        f"{', over tokens' if sums else ''}.",
        "compute_loss, compute_loss_func or label_smoothing_factor.",
        "record the loop with uw.record(...), whose run.step takes factors=; or, of classes, "
        "gradient_accumulation_steps=1.",
    )


# -- a task, its data and a recipe -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FromTrainer:
    """What a Trainer trained, on what, and how. Made by `from_trainer`.

    Args:
        task: The model with its loss. Weight decay is no part of it: AdamW's is no L2 penalty.
        data: Its training data as Trainer puts them together: columns and collate function.
        history: The recorded run; None without a `Recorder` that has finished.
        recipe: How to train again without some examples: a `FromFunction` over new Trainers from
            the initial weights. None where these are not known.
        notes: What else was found.
    """

    task: Task
    data: Data
    history: Recorded | None
    recipe: FromFunction | None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"FromTrainer: {type(self.task.model).__name__}, {len(self.data)} training examples\n"
            f"  history: {self.history!r}\n"
            f"  recipe: {'training again' if self.recipe is not None else None}"
        )


def parts_of(trainer: Any, task: Task, init: Callable[[], nn.Module] | None) -> FromTrainer:
    """As `from_trainer`, with the task of the model."""
    if trainer.train_dataset is None:
        raise DataError(
            "Scores are of the training data.",
            "a Trainer without train_dataset.",
            "a Trainer that was made to evaluate.",
            "Trainer(..., train_dataset=data); or hf.task(model) with data of your own.",
        )
    if getattr(trainer, "compute_loss_func", None) is not None or _is_overridden(trainer):
        raise SpecError(
            "The loss of a Trainer must be its model's own.",
            f"{type(trainer).__name__} with compute_loss_func or a compute_loss of its own.",
            "weighted classes, distillation, or another objective.",
            "say the loss: uw.Task(trainer.model, uw.CrossEntropy(weight=...)), with "
            "trainer.train_dataset; a Recorder's history(task) takes that task.",
        )
    model, smoothing = task.model, trainer.args.label_smoothing_factor
    notes = []
    if smoothing:
        if not isinstance(task.loss, CrossEntropy):
            raise SpecError(
                "Label smoothing is of classes.",
                f"label_smoothing_factor={smoothing} with {task.loss!r}.",
                "an argument left from another model.",
                "label_smoothing_factor=0.",
            )
        loss = CrossEntropy(axis=task.loss.axis, label_smoothing=smoothing)
        task = Task(model, loss, task.penalty, task.params, task.forward)
    if trainer.args.weight_decay:
        notes.append(
            f"weight decay {trainer.args.weight_decay:g} is the optimizer's own (AdamW), no "
            "penalty: SOURCE takes it from a recorded run, other methods leave it out"
        )
    recorders = [c for c in trainer.callback_handler.callbacks if isinstance(c, Recorder)]
    recorder = recorders[-1] if recorders else None
    history = None
    if recorder is not None:
        try:
            history = recorder.history(task)
        except (FileNotFoundError, StaleStore) as error:
            notes.append(f"no history: {str(error).partition(chr(10))[0]}")
    recipe, start = None, init or getattr(trainer, "model_init", None)
    if start is not None or history is not None:
        recipe = FromFunction(_Retraining(trainer, start, history))
    else:
        notes.append(
            "no recipe: the initial weights are not known; give init=, model_init= of the Trainer, "
            "or record with hf.Recorder(folder)"
        )
    loaded = _data(trainer)
    data: Data = loaded
    if type(trainer.data_collator).__name__ == FLATTENS and task.reads is not None:
        # Positions of each example begin anew, and attention keeps to them: padding is the same.
        data = task.reads.training(loaded.dataset)
        notes.append(
            f"{FLATTENS} puts a batch into one row, without padding: each example is read by itself"
        )
    return FromTrainer(task, data, history, recipe, tuple(notes))


FLATTENS = "DataCollatorWithFlattening"
"""Of transformers: sequences of a batch behind each other in one row."""


def _is_overridden(trainer: Any) -> bool:
    import transformers

    return type(trainer).compute_loss is not transformers.Trainer.compute_loss


def _data(trainer: Any) -> IndexedData:
    if getattr(trainer.data_collator, "mlm", False):
        raise DataError(
            "An example must be the same in every batch.",
            f"{type(trainer.data_collator).__name__}, which draws masks anew each time.",
            "masked language modelling as Trainer does it.",
            "mask each example once: data = hf.text(dataset, tokenizer, masked=0.15), and train "
            "on it with data_collator=data.collate.",
        )
    before = list(trainer.accelerator._dataloaders)
    loader = trainer.get_train_dataloader()  # with the columns that the model takes
    trainer.accelerator._dataloaders[:] = before
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        raise DataError(
            "Training data must have an index: example i is the same one everywhere.",
            "an IterableDataset.",
            "streamed data.",
            "train_dataset=datasets.Dataset.from_generator(...), or a list.",
        )
    return IndexedData(loader.dataset, Collated(loader.collate_fn))


@dataclass(frozen=True, eq=False)
class _Retraining:
    """θ(w) of a new Trainer, on the examples with a weight."""

    trainer: Any = field(repr=False)
    init: Callable[[], nn.Module] | None
    history: Recorded | None = field(repr=False)

    def __call__(self, weights: Float[Tensor, " n"]) -> nn.Module:
        old, present = self.trainer, weights.nonzero()[:, 0].tolist()
        if not present or len(set(weights[present].tolist())) > 1:
            raise SpecError(
                "A Trainer is trained again with examples in or out.",
                f"{len(set(weights.tolist()))} weights from {float(weights.min()):g} to "
                f"{float(weights.max()):g}.",
                "weights of single examples, or all of them out.",
                "subset_weights(...) or removal_weights(...), or a uw.Training recipe, which "
                "weighs losses.",
            )
        data = old.train_dataset
        if len(present) < len(data):
            select = getattr(data, "select", None)
            data = torch.utils.data.Subset(data, present) if select is None else select(present)
        with own_random_numbers(), tempfile.TemporaryDirectory() as folder:
            made = type(old)(
                model=self._model(), args=_quiet(old.args, folder), data_collator=old.data_collator,
                train_dataset=data, processing_class=getattr(old, "processing_class", None),
            )  # fmt: skip
            for each in list(made.callback_handler.callbacks):
                if type(each).__name__ in ("PrinterCallback", "ProgressCallback"):
                    made.remove_callback(each)
            made.train()
            return made.model

    def _model(self) -> nn.Module:
        if self.init is not None:
            from transformers import set_seed

            set_seed(self.trainer.args.seed)
            return self.init()
        assert self.history is not None
        model = copied(self.trainer.model)
        named = dict(model.named_parameters())
        theta = self.history.layout.unflatten(self.history.state(0).theta)
        with torch.no_grad():
            for name, value in theta.items():
                named[name].copy_(value)
        return model.train()


def _quiet(args: Any, folder: str) -> Any:
    """The arguments without anything that writes, prints or evaluates."""
    made = copy.copy(args)
    made.output_dir, made.report_to, made.disable_tqdm = folder, [], True
    made.load_best_model_at_end, made.push_to_hub, made.do_eval = False, False, False
    never = type(args.save_strategy)("no")
    made.save_strategy = never
    made.eval_strategy = made.logging_strategy = type(args.logging_strategy)("no")
    made.resume_from_checkpoint = None
    return made
