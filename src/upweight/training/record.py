"""record: a training loop of the user's own, written to disk as it runs.

    with uw.record(model, optimizer, "run", every=100) as run:
        for x, y, indices in loader:
            ...                            # forward, backward
            optimizer.step()
            run.step(indices)              # after it: which training examples this step used

    steps-000000000    learning rates, indices and factors from this step to the next shard
    state-000000100    θ and the optimizer's memories before this step

are the shards of a store (`upweight.runtime.store`), described by parameters and update rule.
What `optimizer.step()` finds is what is recorded: θ_t and the learning rate are read in a hook
before each step, so schedulers may be called wherever they are. The model and the optimizer are
never changed, but by `resume=True`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from upweight._typing import Folder
from upweight.errors import DataError, SpecError, StaleStore, UnsupportedModel, listed
from upweight.runtime.fingerprint import digest
from upweight.runtime.store import MANIFEST, Store, stale
from upweight.task.params import Layout
from upweight.task.task import Task
from upweight.training.optimizers import SGD, Adam, AdamW, Optimizer, OptimizerState
from upweight.training.steps import Step, TrainingState

AGAIN = "record(...), in another folder"

WAY_OUT = "give another folder, or delete this one and record the training again."

RULES: dict[str, type[Optimizer]] = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}

MEMORIES = {
    "momentum": "momentum_buffer",
    "mean": "exp_avg",
    "square": "exp_avg_sq",
    "largest": "max_exp_avg_sq",
}
"""What an optimizer remembers, as `torch.optim` calls it."""


def record(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Folder,
    *,
    every: int = 100,
    resume: bool = False,
) -> "Run":
    """Write the steps of a training loop to a folder, and some of its states.

    Each step is taken to be one of `optimizer` on the mean loss over the examples that `run.step`
    is told, times the factors that it is told, and each such example to be what it is in the data
    that are attributed (no changed copies). Learning rates are read from `optimizer.param_groups`
    at each step.

    Args:
        model: What is trained. Every parameter that requires a gradient must be the optimizer's,
            and which do stays the same.
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`, with one learning rate and the same
            settings for all of its parameters but for weight decay.
        folder: Where to; a new one, or with `resume` that of a run that was stopped.
        every: States to keep: every k-th, besides the first and the last.
        resume: Go on: put the last state that was kept into the model and the optimizer.
            `run.taken` then says how many steps were taken; the loop, its data order, its scheduler
            and its random numbers are the user's to go on with.

    Raises:
        SpecError: The optimizer is another, or has groups with settings of their own but for weight
            decay.
        UnsupportedModel: A parameter is trained by another optimizer.
        StaleStore: The folder holds a run and `resume` is False, or that of another model.
        NotWritten: The disk is full or not writable.

    Cost: a file of parameters and the optimizer's memories for each state; 8 bytes per example and
    step in memory until the next state.
    """
    run, there = _run(model, optimizer, Path(folder), every, resume)
    if there:
        run._go_on()
    return run


def recording(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Folder,
    every: int,
    taken: int,
    again: str,
) -> "Run":
    """As `record`, for a loop of another library, that puts its own states back.

    It has taken `taken` steps: 0 begins a run, more go on with that of the folder, and what it
    holds of later steps is removed. `again` is how the user goes on with a run that was stopped.

    Raises:
        StaleStore: The folder has no state of that step, or it is another than the model's.
        UpweightError: As for `record`.
    """
    if taken == 0:
        return _run(model, optimizer, Path(folder), every, False, again)[0]
    if not (Path(folder) / MANIFEST).exists():
        raise StaleStore(
            "A recorded run begins with its first step.",
            f"{folder}, which holds none, for training that goes on from step {taken}.",
            "training that was begun without the recording, or another folder.",
            "give the folder of the run that was stopped, or train from the beginning.",
        )
    run, _ = _run(model, optimizer, Path(folder), every, True)
    run._rewind(taken)
    return run


def _run(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, every: int, resume: bool,
    again: str = "resume=True goes on from its last state",
) -> "tuple[Run, bool]":  # fmt: skip
    """A run, and whether the folder held it."""
    rule = _rule(optimizer)
    if not (isinstance(every, int) and not isinstance(every, bool) and every >= 1):
        raise SpecError(
            "States are kept every k-th step, k ≥ 1.",
            f"every={every!r}.",
            "a share of the run, or 0 for none.",
            "every=100; the first and the last are always kept.",
        )
    params = _parameters(model, optimizer)
    there = (path / MANIFEST).exists()
    if there and not resume:
        raise StaleStore(
            "A run is recorded into a folder of its own.",
            f"{path}, which holds one.",
            "the same script again, or a run that was stopped.",
            f"{again}; or " + WAY_OUT,
        )
    shapes = {name: list(p.shape) for name, p in params.items()}
    manifest = _Manifest(type(rule).__name__, _settings(rule), shapes, _decays(optimizer, params))
    if there:
        store = Store.load(path, AGAIN)
        found = _Manifest.of(store)
        if (found.rule, found.shapes) != (manifest.rule, manifest.shapes):
            raise StaleStore(
                "A run goes on with the model and the optimizer that it was recorded of.",
                f"{path} of {found.rule} with {len(found.shapes)} parameters, for "
                f"{manifest.rule} with {len(shapes)}.",
                "another model or optimizer.",
                WAY_OUT,
            )
        manifest = found
    else:
        store = Store.open(path, manifest.description, again=AGAIN)
    return Run(model, optimizer, store, every, manifest, params), there


@dataclass(frozen=True)
class _Manifest:
    rule: str
    settings: dict[str, Any]
    shapes: dict[str, list[int]]
    decays: dict[str, float] = field(default_factory=dict)
    """The weight decay of each parameter, where they differ."""

    @property
    def description(self) -> dict[str, str]:
        """What every shard of the run belongs to."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def of(cls, store: Store) -> "_Manifest":
        """That of a store.

        Raises:
            StaleStore: It holds no run.
        """
        try:
            found = cls(**{name: json.loads(text) for name, text in store.description.items()})
            if found.rule in RULES:
                return found
        except (TypeError, ValueError):
            pass
        raise stale(store.directory / MANIFEST, "no recorded run", WAY_OUT)

    def optimizer(self, layout: Layout | None = None) -> Optimizer:
        """The rule; with the layout of θ, a weight decay for each entry where they differ."""
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.settings.items()
        }
        if self.decays and layout is not None:
            each = zip(layout.names, layout.shapes, strict=True)
            full = {name: torch.full(shape, self.decays[name]) for name, shape in each}
            fields["weight_decay"] = layout.flatten(full).to(layout.device, layout.dtype)
        return RULES[self.rule](**fields)


@dataclass(eq=False)
class Run:
    """A recording on its way, of `taken` steps so far. Made by `record`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    store: Store = field(repr=False)
    every: int
    manifest: _Manifest = field(repr=False)
    params: dict[str, nn.Parameter] = field(repr=False)
    taken: int = 0
    _rate: float | None = field(default=None, repr=False)
    _rates: list[float] = field(default_factory=list, repr=False)
    _batches: list[Tensor] = field(default_factory=list, repr=False)
    _factors: list[Tensor] = field(default_factory=list, repr=False)
    _written: int | None = field(default=None, repr=False)
    _hook: Any = field(default=None, repr=False)

    def __enter__(self) -> "Run":
        self._hook = self.optimizer.register_step_pre_hook(self._before)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._hook.remove()
        if kind is not None:  # what is on disk can be gone on from
            return
        if self._rate is not None:
            raise _unpaired("a step without its run.step(...) at the end of the loop")
        if self.taken:
            self.keep()

    @property
    def stepped(self) -> bool:
        """Whether the optimizer has stepped since the last `step`."""
        return self._rate is not None

    def keep(self) -> None:
        """Keep the state after the steps that were taken, besides every k-th; and these steps.

        Raises:
            NotWritten: The disk is full or not writable.
        """
        if self._written == self.taken:
            return
        if self._rates:
            begin = self.taken - len(self._rates)
            tensors = {
                "rates": torch.tensor(self._rates, dtype=torch.float64),
                "sizes": torch.tensor([len(b) for b in self._batches]),
                "indices": torch.cat(self._batches),
            }
            if bool((torch.cat(self._factors) != 1).any()):
                tensors["factors"] = torch.cat(self._factors)
            self.store.write(_steps(begin), tensors)
        tensors = {f"parameter.{name}": p.detach() for name, p in self.params.items()}
        for memory in self.manifest.optimizer().memories:
            for name, p in self.params.items():
                found = self.optimizer.state.get(p, {}).get(MEMORIES[memory])
                tensors[f"{memory}.{name}"] = torch.zeros_like(p) if found is None else found
        self.store.write(_state(self.taken), tensors)
        self._rates, self._batches, self._factors, self._written = [], [], [], self.taken

    def step(
        self,
        *indices: Int[Tensor, " b"] | Sequence[int],
        factors: float | Float[Tensor, " b"] = 1.0,
    ) -> None:
        """The examples of the step that `optimizer.step()` has just taken.

        Args:
            indices: Their places in the training data; of gradients that were accumulated over
                several backward passes, one argument for each: the loss is the mean over them all.
            factors: What the loss of each is multiplied with in that mean, one number or one for
                each: of clipped gradients min(1, c/‖g‖); of a mean over tokens where ℓᵢ is their
                sum, |B|/(number of tokens); of a loss with class weights, whose mean PyTorch
                divides by the weights of the batch, |B|/Σ w_y; of a sum over the batch, |B|.

        Raises:
            DataError: `optimizer.step()` was not called once since the last time, or these are no
                indices or factors.
            NotWritten: The disk is full or not writable.
        """
        if self._rate is None:
            raise _unpaired("run.step(...) without a step of the optimizer before it")
        parts = [torch.as_tensor(some).detach().cpu().reshape(-1) for some in indices]
        every = torch.cat(parts) if parts else torch.empty(0)
        whole = not every.is_floating_point() and every.dtype != torch.bool
        if not len(every) or not whole or int(every.min()) < 0:
            raise DataError(
                "A step has the places of its examples in the training data, from 0.",
                f"{every!r:.80}.",
                "a mask, inputs or labels in the place of indices; or an empty batch.",
                "let the data set hand out (x, y, index), and pass the indices of the batch.",
            )
        each = torch.as_tensor(factors, dtype=torch.float64).detach().cpu()
        each = each.expand(len(every)) if not each.ndim else each
        if each.shape != every.shape or not bool(each.isfinite().all()):
            raise DataError(
                "The loss of each example is multiplied with one finite factor.",
                f"factors of shape {list(each.shape)} for {len(every)} examples.",
                "NaN in the norm of a gradient, or factors of another batch.",
                "factors=min(1.0, c / float(norm)), with the norm that clip_grad_norm_ returns.",
            )
        self._rates.append(self._rate)
        self._batches.append(every.long())
        self._factors.append(each)
        self._rate = None
        self.taken += 1

    def history(self, task: Task) -> "Recorded":
        """What was recorded, for `fit(task, train, history=)`; as `read_record`."""
        return read_record(task, self.store.directory)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._rate is not None:
            raise _unpaired("two steps of the optimizer without run.step(...) between them")
        _require_same_layers(self.model, optimizer, self.params)
        rule = _rule(optimizer)
        decays = _decays(optimizer, self.params)
        if (_settings(rule), decays) != (self.manifest.settings, self.manifest.decays):
            raise SpecError(
                "Settings of the optimizer but its learning rate stay as they are in a run.",
                f"{rule!r} where the run began with {self.manifest.optimizer()!r}.",
                "a schedule of momentum or weight decay, such as OneCycleLR's.",
                "leave momentum as it is (OneCycleLR(cycle_momentum=False)), or record the part "
                "of training with each setting by itself.",
            )
        if self.taken % self.every == 0:
            self.keep()
        self._rate = float(_groups(optimizer)[0]["lr"])

    def _rewind(self, taken: int) -> None:
        """Go on from a state that the user's loop has put into the model."""
        kept = _kept(self.store)
        tensors = self.store.read(_state(taken)) if taken in kept else None
        if tensors is None or not all(
            torch.equal(p.detach().cpu(), tensors[f"parameter.{name}"])
            for name, p in self.params.items()
        ):
            raise StaleStore(
                "A run goes on from a state that was kept of it.",
                f"training that goes on from step {taken}, with "
                f"{listed([str(k) for k in kept])} kept in {self.store.directory}"
                f"{' and other parameters there' if taken in kept else ''}.",
                "a checkpoint that was written before the recording, or of another run.",
                "go on from a checkpoint of the recorded run, or " + WAY_OUT,
            )
        for name in self.store.names():
            kind, _, number = name.partition("-")
            if int(number) > taken or (kind == "steps" and int(number) == taken):
                self.store.path(name).unlink()
        self.taken = self._written = taken

    def _go_on(self) -> None:
        """Put the last state into the model and the optimizer."""
        kept = _kept(self.store)
        if not kept:  # stopped before the first step
            return
        last = kept[-1]
        tensors = self.store.read(_state(last))
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"parameter.{name}"])
                if not last:
                    continue
                state: dict[str, Any] = {
                    MEMORIES[memory]: tensors[f"{memory}.{name}"].to(p, copy=True)
                    for memory in self.manifest.optimizer().memories
                }
                if not isinstance(self.manifest.optimizer(), SGD):
                    state["step"] = torch.tensor(float(last))
                self.optimizer.state[p] = state
        self.taken = self._written = last


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recorded run as a history. Made by `read_record`; states are read when they are asked for.

    Args:
        store: Where it is.
        layout: Which parameters θ has.
        optimizer: The update rule; its lr is that of the first step.
        kept: Each t of which there is a state.
        digest: Of the steps.
    """

    store: Store
    layout: Layout
    optimizer: Optimizer
    kept: tuple[int, ...]
    digest: str

    def __repr__(self) -> str:
        rule = type(self.optimizer).__name__
        place = self.store.directory
        return f"Recorded run: {len(self)} steps of {rule}, {len(self.kept)} states kept, {place}"

    def __len__(self) -> int:
        return self.kept[-1]

    def steps(self, begin: int = 0, end: int | None = None) -> Iterator[Step]:
        """Steps begin … end − 1."""
        end = len(self) if end is None else end
        for first, last in zip(self.kept, self.kept[1:], strict=False):
            if last <= begin or first >= end:
                continue
            found = self.store.read(_steps(first))
            sizes = found["sizes"].tolist()
            batches = torch.split(found["indices"], sizes)
            factors = torch.split(found["factors"], sizes) if "factors" in found else None
            for k, (lr, batch) in enumerate(zip(found["rates"].tolist(), batches, strict=True)):
                if begin <= first + k < end:
                    weights = torch.ones(len(batch), dtype=self.layout.dtype)
                    each = None if factors is None else factors[k]
                    yield Step(first + k, lr, batch, weights, 1.0, 0, each)

    def state(self, t: int) -> TrainingState:
        """The state before step t, one of `kept`.

        Raises:
            SpecError: It was not kept.
        """
        if t not in self.kept:
            raise SpecError(
                "Of a recorded run there are the states that were kept.",
                f"state {t}, with {listed([str(k) for k in self.kept])} kept.",
                "a state between two of them: a loop of the user's own cannot be run again.",
                "record with a smaller every=.",
            )
        found = self.store.read(_state(t))

        def flat(kind: str) -> Tensor:
            vector = self.layout.flatten({n: found[f"{kind}.{n}"] for n in self.layout.names})
            return vector.to(self.layout.device, self.layout.dtype)

        memories = {memory: flat(memory) for memory in self.optimizer.memories}
        return TrainingState(flat("parameter"), OptimizerState(t, memories))

    @property
    def theta(self) -> Tensor:
        """θ_T."""
        return self.state(len(self)).theta


def read_record(task: Task, folder: Folder, end: int | None = None) -> Recorded:
    """What `record` wrote, up to its last state.

    Args:
        task: The task with the trained model.
        folder: As for `record`.
        end: The state to end with, one that was kept: of a model that was put back to it.

    Raises:
        FileNotFoundError: There is none.
        StaleStore: It is of a model with other parameters, is damaged, or has no step yet.
    """
    path, layout = Path(folder), task.layout
    store = Store.load(path, AGAIN)
    manifest = _Manifest.of(store)
    missing = [
        name
        for name, shape in zip(layout.names, layout.shapes, strict=True)
        if manifest.shapes.get(name) != list(shape)
    ]
    if missing:
        raise StaleStore(
            "A recorded run must hold the parameters of the task.",
            f"{path} without {listed(missing)}, or with another shape.",
            "another model; one that is wrapped: names then have a prefix; or layers that were "
            "frozen when it was recorded.",
            "give the task the model that was recorded, with what was frozen frozen, or record the "
            "one of the task.",
        )
    kept = _kept(store)
    if end is not None and end not in kept[1:]:
        raise SpecError(
            "A recorded run ends with a state that was kept.",
            f"end={end}, with {listed([str(k) for k in kept])} kept.",
            "a checkpoint between two of them.",
            "record with a smaller every=.",
        )
    kept = kept if end is None else kept[: kept.index(end) + 1]
    if len(kept) < 2:
        raise StaleStore(
            "A history has a step at least.",
            f"{path} with {len(kept)} states.",
            "a run that was stopped before its second state.",
            "record it to the end; or with a smaller every=.",
        )
    marks = []
    for t in kept[:-1]:
        marks.append(digest(*store.read(_steps(t)).values()))
    return Recorded(store, layout, manifest.optimizer(layout), kept, digest(*marks))


def _kept(store: Store) -> tuple[int, ...]:
    """The states that steps lead to from the first one, without a gap."""
    names = set(store.names())
    there = sorted(int(name.removeprefix("state-")) for name in names if name.startswith("state-"))
    found: list[int] = []
    for t in there:
        if found:
            last = found[-1]
            if _steps(last) not in names or last + len(store.read(_steps(last))["rates"]) != t:
                break
        elif t != 0:
            break
        found.append(t)
    return tuple(found)


def _settings(rule: Optimizer) -> dict[str, Any]:
    fields = asdict(rule)  # type: ignore[call-overload]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _rule(optimizer: torch.optim.Optimizer) -> Optimizer:
    """The update rule of an optimizer of `torch.optim`."""
    name = type(optimizer).__name__
    exact = getattr(torch.optim, name, None) is type(optimizer)
    if name not in RULES or not exact:
        raise SpecError(
            "A recorded run has an optimizer whose steps are known.",
            f"{type(optimizer).__module__}.{name}.",
            "an optimizer of another library, or one of torch.optim that has no rule here.",
            "train with torch.optim.SGD, Adam or AdamW; or use Influence(...), which needs no "
            "history.",
        )
    groups = [{k: v for k, v in g.items() if k not in GROUP_ONLY} for g in _groups(optimizer)]
    differ = sorted({k for g in groups for k in g if g[k] != groups[0].get(k)} - {"weight_decay"})
    if differ:
        raise SpecError(
            "A recorded run has the same settings for all parameters, but for weight decay.",
            f"{len(groups)} parameter groups that differ in {listed(differ)}.",
            "another learning rate for the last layer.",
            "give all groups the same settings; or choose the parameters of one group with "
            "Task(params=...) and train only these.",
        )
    group = groups[0]
    if group.get("maximize") or (name == "Adam" and group.get("decoupled_weight_decay")):
        raise SpecError(
            "A recorded run goes down its loss, by a rule of torch.optim as it is.",
            f"{name} with maximize or decoupled_weight_decay.",
            "a reward, or AdamW under Adam's name.",
            "minimize its negative; use torch.optim.AdamW.",
        )
    most = max(float(g["weight_decay"]) for g in groups)
    fields = {"lr": 1.0, "weight_decay": most}  # rates are the steps'
    if name == "SGD":
        return SGD(
            momentum=float(group["momentum"]), nesterov=bool(group["nesterov"]),
            dampening=float(group["dampening"]), **fields,
        )  # fmt: skip
    b1, b2 = group["betas"]
    return RULES[name](  # type: ignore[call-arg]
        betas=(float(b1), float(b2)), eps=float(group["eps"]), amsgrad=bool(group["amsgrad"]),
        **fields,
    )  # fmt: skip


GROUP_ONLY = {"params", "initial_lr", "foreach", "fused", "capturable", "differentiable"}
"""What groups may differ in: how a step is computed, not which."""


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Those that hold parameters."""
    return [g for g in optimizer.param_groups if g["params"]]


def _decays(
    optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]
) -> dict[str, float]:
    """The weight decay of each parameter, where they differ."""
    of = {id(p): float(g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found = {name: of[id(p)] for name, p in params.items()}
    return found if len(set(found.values())) > 1 else {}


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of the model that are trained, by name; all of them the optimizer's."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    others = [name for name, p in named.items() if p.requires_grad and id(p) not in held]
    strangers = len(held - {id(p) for p in named.values()})
    if others or strangers:
        raise UnsupportedModel(
            "A recorded run has one model, whose parameters are all the optimizer's.",
            f"{listed(others)} of the model that the optimizer has not."
            if others
            else f"{strangers} parameters of the optimizer that are not the model's.",
            "two optimizers or two models in one loop, or layers that were to be frozen.",
            "freeze what is not trained with requires_grad_(False); put several models into one "
            "nn.ModuleDict.",
        )
    return {name: p for name, p in named.items() if id(p) in held and p.requires_grad}


def _require_same_layers(
    model: nn.Module, optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]
) -> None:
    """Refuse a step of other layers: of a frozen one the examples have gradients, and no steps."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    moved = {k for k, p in model.named_parameters() if id(p) in held and p.requires_grad}
    changed = sorted(moved ^ set(params))
    if changed:
        raise SpecError(
            "The layers that are trained stay the same in a run.",
            f"{listed(changed)} frozen or unfrozen since record(...).",
            "layers that are unfrozen in the course of training, or frozen after record(...).",
            "record(...) after requires_grad_ is set; and the part of training with each choice of "
            "layers by itself, into a folder of its own.",
        )


def _unpaired(given: str) -> DataError:
    return DataError(
        "Each step of the optimizer is followed by one run.step(indices).",
        f"{given}.",
        "gradients accumulated over several backward passes with a run.step(...) for each; or a "
        "step that a gradient scaler left out.",
        "call run.step(first, second, …) once after optimizer.step(), with the indices of each "
        "backward pass; not at all where the step was left out.",
    )


def _steps(begin: int) -> str:
    return f"steps-{begin:09d}"


def _state(t: int) -> str:
    return f"state-{t:09d}"
