"""Trajectory: the steps that training took, each of which can be taken again to the same bits.

    state t+1 = advance(step t, state t)          t = 0 … T − 1;  state T holds θ(w)

What a step does (batch, weights, learning rate, seed) is known without training, and costs nothing
to hold. Of the states some are kept: the first, the last, and those that were asked for. Any other
is replayed from the nearest before it.

How estimators use it, for a trajectory h:

    TracIn    Σ over kept t of  η_t ⟨∇m(θ_t), ∇ℓᵢ(θ_t)⟩
                  h.kept, h.state(t).theta, h.step(t).lr; every step instead: h.replay()
    SOURCE    segments of the run, each with a mean curvature and the sum of its learning rates
                  h.kept as the ends and middles of segments; Σ lr over h.steps(begin, end);
                  h.state(t).optimizer.memories has Adam's averages, h.recipe the momentum
    MAGIC     ∂m(θ_T)/∂w by going backwards: λ_t = (∂ state t+1 / ∂ state t)ᵀ λ_{t+1}
                  for begin, end of h.segments() from the last: pairs = list(h.replay(begin, end)),
                  then backwards through them (`adjoint.py`). √T states are kept and √T are held
                  while a segment is gone through.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import NotConverged, ShapeError, SpecError, message
from upweight.runtime.fingerprint import digest
from upweight.runtime.store import Store
from upweight.runtime.versions import library_versions
from upweight.task.identity import described, subject
from upweight.training.optimizers import Optimizer, OptimizerState
from upweight.training.steps import Step, TrainingState
from upweight.training.trainer import TrainingTrainer

STATE = "state-"

AGAIN = "recipe.trajectory(task, train).save(folder)"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One run of training. Made by `Training.trajectory`, or read by `Training.read_trajectory`.

    Args:
        trainer: What trains: the recipe, the task as it starts and the data.
        weights: w, one number per training example.
        states: The kept states by t, 0 and T among them; in memory, or read from a folder when
            asked for.
    """

    trainer: TrainingTrainer
    weights: Float[Tensor, " n"]
    states: Mapping[int, TrainingState]

    def __len__(self) -> int:
        """T, the number of steps."""
        return self.trainer.length(self.weights)

    @property
    def recipe(self) -> Any:
        """How the model was trained."""
        return self.trainer.spec

    @property
    def optimizer(self) -> Optimizer:
        """The recipe's update rule."""
        return self.recipe.optimizer

    @property
    def theta(self) -> Float[Tensor, " p"]:
        """θ_T, the trained parameters."""
        return self.states[len(self)].theta

    @property
    def kept(self) -> tuple[int, ...]:
        """Each t of which the state is kept, in order: from 0 to T."""
        return tuple(sorted(self.states))

    @property
    def nbytes(self) -> int:
        """Memory of the kept states where none is on disk."""
        each = sum(x.nbytes for x in self.states[0].tensors)
        return len(self.states) * each

    def segments(self) -> tuple[tuple[int, int], ...]:
        """From each kept state to the next."""
        return tuple(zip(self.kept, self.kept[1:], strict=False))

    def step(self, t: int) -> Step:
        """What step t does, 0 ≤ t < T."""
        return next(self.steps(t, t + 1))

    def steps(self, begin: int = 0, end: int | None = None) -> Iterator[Step]:
        """Steps begin … end − 1, without any training.

        Raises:
            ShapeError: They are not among 0 … T − 1.
        """
        return self.trainer.steps(self.weights, begin, self._end(begin, end))

    def state(self, t: int) -> TrainingState:
        """The state before step t, 0 ≤ t ≤ T; of T, the end.

        Cost: the steps from the nearest kept state before it.
        """
        self._end(t, t)
        nearest = self.states[max(k for k in self.kept if k <= t)]
        return next(self.trainer.states(self.weights, (t,), nearest))

    def replay(
        self, begin: int = 0, end: int | None = None
    ) -> Iterator[tuple[Step, TrainingState]]:
        """Each of the steps begin … end − 1 with the state before it, by taking them again.

        To the same bits as the run itself, with the same number of threads (on a GPU, with
        deterministic kernels); to rounding where the model was trained beside others, as those of
        `subset_models(…, runs=True)` may be.
        """
        end = self._end(begin, end)
        if begin < end:
            nearest = self.states[max(k for k in self.kept if k <= begin)]
            states = self.trainer.states(self.weights, range(begin, end), nearest)
            yield from zip(self.steps(begin, end), states, strict=True)

    def advance(self, step: Step, state: TrainingState) -> TrainingState:
        """The state after a step; differentiable, see `TrainingTrainer.advance`."""
        return self.trainer.advance(step, state)

    def save(self, folder: Folder) -> None:
        """Write the kept states to a folder, a file for each, and last a manifest.

        Raises:
            NotWritten: The disk is full or not writable.
            SpecError: The recipe, the model or the data do not say what they are.
        """
        shards = {"weights": {"weights": self.weights}}
        for t in self.kept:
            shards[_name(t)] = _tensors(self.states[t])
        about = identity(self.trainer, self.weights)
        Store.replace(folder, about, shards, {"steps": len(self), "versions": _versions()})

    def _end(self, begin: int, end: int | None) -> int:
        end = len(self) if end is None else end
        if not 0 <= begin <= end <= len(self):
            raise ShapeError(
                f"Steps of this trajectory are 0 … {len(self) - 1}, and states 0 … {len(self)}.",
                f"{begin} to {end}.",
                "epochs in place of steps, or a trajectory of another recipe.",
                f"count steps: an epoch has {len(self) // self.recipe.epochs}.",
            )
        return end


def recorded(
    trainer: TrainingTrainer,
    weights: Float[Tensor, " n"] | None,
    every: int | Sequence[int] | None,
) -> Trajectory:
    """Train, and keep some of the states.

    Raises:
        ShapeError: There is not one weight per example, or a step to keep is not of the run.
        SpecError: There is no step between the states to keep, or no example has a weight.
        NotConverged: The parameters became NaN or infinite.
    """
    n = len(trainer.train)
    w = torch.ones(n) if weights is None else weights.detach()
    if tuple(w.shape) != (n,) or not bool(w.isfinite().all()):
        raise ShapeError(
            f"A trajectory has one finite weight per training example: [{n}].",
            f"shape {tuple(w.shape)}.",
            "one row of many, or weights of another data set.",
            "start from torch.ones(len(train)).",
        )
    w = trainer.placed(w).clone()
    total = trainer.length(w)
    if total == 0:
        raise SpecError(
            "A trajectory needs at least one example with a weight.",
            "weights that are all 0, of a recipe with skip_absent=True.",
            "a removal of everything.",
            "leave weights of some examples above 0, or train with skip_absent=False.",
        )
    wanted = _chosen(every, total)
    states = {state.step: state for state in trainer.states(w, wanted)}
    found = Trajectory(trainer, w, states)
    if not bool(found.theta.isfinite().all()):
        raise NotConverged(_diverged(trainer), solution=found)
    return found


def _diverged(trainer: TrainingTrainer) -> str:
    return message(
        "Training must end in finite parameters.",
        f"{trainer.spec!r}, whose parameters became NaN or infinite.",
        "a learning rate that is too large, or NaN in the data.",
        "lower the learning rate.",
    )


def recorded_together(
    trainer: TrainingTrainer, weights: Float[Tensor, "s n"], every: int | Sequence[int] | None
) -> list[dict[int, TrainingState]]:
    """The states of each of some models that train at once.

    Raises:
        NotConverged: The parameters of one became NaN or infinite.
    """
    if len(weights) == 1:
        return [dict(recorded(trainer, weights[0], every).states)]
    kept: list[dict[int, TrainingState]] = [{} for _ in weights]
    total = trainer.length(weights)
    for state in trainer.states(weights, _chosen(every, total)):
        for states, own in zip(kept, state.by_model(), strict=True):
            states[state.step] = own
    for states in kept:
        if not bool(states[total].theta.isfinite().all()):
            raise NotConverged(_diverged(trainer), solution=states)
    return kept


def read(trainer: TrainingTrainer, folder: Folder) -> Trajectory:
    """What `Trajectory.save` wrote, of the same recipe, task and data.

    Raises:
        FileNotFoundError: There is none.
        StaleStore: It is of another recipe, task or data, or damaged.
        ShapeError: Some of it is missing.
    """
    store = Store.load(folder, AGAIN)
    weights = store.read("weights")["weights"]
    store.require(identity(trainer, weights))
    then, now = store.require_finished()["versions"], _versions()
    if then != now:
        warnings.warn(
            f"the trajectory in {folder} was recorded with {then}, and these are {now}: "
            "what is replayed agrees to rounding, not to the bit",
            UserWarning,
            stacklevel=3,
        )
    return Trajectory(trainer, trainer.placed(weights), _OnDisk(store, trainer))


@dataclass(frozen=True)
class _OnDisk(Mapping[int, TrainingState]):
    """States in a store, each read and compared when it is asked for."""

    store: Store
    trainer: TrainingTrainer

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(n[len(STATE) :]) for n in self.store.names() if n.startswith(STATE)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, t: int) -> TrainingState:
        if t not in list(self):
            raise KeyError(t)
        return _state(self.trainer, t, self.store.read(_name(t)))


def packed(states: Mapping[int, TrainingState]) -> dict[str, Tensor]:
    """States as named tensors on the CPU, for a single file."""
    every = ((t, name, x) for t, state in states.items() for name, x in _tensors(state).items())
    return {f"{_name(t)}.{name}": x.detach().cpu() for t, name, x in every}


def unpacked(trainer: TrainingTrainer, tensors: Mapping[str, Tensor]) -> dict[int, TrainingState]:
    """The states again, where the trainer works."""
    own: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        number, _, rest = name.removeprefix(STATE).partition(".")
        own.setdefault(int(number), {})[rest] = x
    return {t: _state(trainer, t, own[t]) for t in sorted(own)}


def identity(trainer: TrainingTrainer, weights: Float[Tensor, " n"]) -> dict[str, str]:
    """What a run of training depends on.

    Raises:
        SpecError: A part cannot be distinguished from another of its kind.
    """
    about = {"recipe": described(trainer.spec), "terms": described(trainer.terms)}
    if trainer.spec.proximity:
        about["center"] = digest(trainer.center)
    about["weights"] = digest(weights.cpu().double())
    return {**subject(trainer.task, trainer.train), **about}


def _chosen(every: int | Sequence[int] | None, total: int) -> set[int]:
    """Which states are kept."""
    if every is None:
        every = math.ceil(math.sqrt(total)) or 1
    whole = [every] if isinstance(every, int) else list(every)
    if isinstance(every, int) and every >= 1:
        return {*range(0, total, every), total}
    if isinstance(every, int) or not all(0 <= t <= total for t in whole):
        raise SpecError(
            f"The states to keep are every k-th, k ≥ 1, or a list of numbers in 0 … {total}.",
            f"every={every!r}.",
            "epochs in place of steps, or steps of a longer run.",
            f"every={total} keeps the first and the last, every=None about the square root of "
            "their number.",
        )
    return {0, *whole, total}


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    memories = {f"memory.{name}": x for name, x in state.optimizer.memories.items()}
    return {"theta": state.theta, **memories}


def _state(trainer: TrainingTrainer, t: int, tensors: Mapping[str, Tensor]) -> TrainingState:
    placed = {name: trainer.placed(x) for name, x in tensors.items()}
    memories = {name: placed[f"memory.{name}"] for name in trainer.spec.optimizer.memories}
    return TrainingState(placed["theta"], OptimizerState(t, memories))


def _name(t: int) -> str:
    return f"{STATE}{t:09d}"


def _versions() -> dict[str, str]:
    return {k: v for k, v in library_versions().items() if k != "python"}
