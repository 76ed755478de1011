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
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import NotConverged, ShapeError, SpecError, StaleStore
from upweight.runtime.fingerprint import digest
from upweight.runtime.headers import read_json, write_json
from upweight.runtime.tensors import read_tensors, stale, write_tensors
from upweight.runtime.versions import library_versions
from upweight.runtime.whole import make_folder, remove_left_over
from upweight.task.identity import described, subject
from upweight.training.optimizers import Optimizer, OptimizerState
from upweight.training.steps import Step, TrainingState
from upweight.training.trainer import TrainingTrainer

SCHEMA = 1

WAY_OUT = "give another folder, or delete this one and record the training again."


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
        found: Optimizer = self.recipe.optimizer
        return found

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
        deterministic kernels).
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
        path, of = Path(folder), fingerprint(self.trainer, self.weights)
        make_folder(path)
        remove_left_over(path)
        write_tensors(path / "weights.safetensors", {"weights": self.weights}, {"of": of})
        digests = {}
        for t in self.kept:
            state = self.states[t]
            tensors = {"theta": state.theta, **_named(state.optimizer.memories)}
            about = {"of": of, "step": str(t)}
            digests[str(t)] = write_tensors(path / _file(t), tensors, about)
        versions = {k: v for k, v in library_versions().items() if k != "python"}
        manifest = {"of": of, "steps": len(self), "versions": versions, "states": digests}
        write_json(path / "manifest.json", SCHEMA, manifest)

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
        raise NotConverged(
            "Training must end in finite parameters.",
            f"{trainer.spec!r}, whose parameters became NaN or infinite.",
            "a learning rate that is too large, or NaN in the data.",
            "lower the learning rate.",
            solution=found,
        )
    return found


def read(trainer: TrainingTrainer, folder: Folder) -> Trajectory:
    """What `Trajectory.save` wrote, of the same recipe, task and data.

    Raises:
        FileNotFoundError: There is none.
        StaleStore: It is of another recipe, task or data, or damaged.
    """
    path = Path(folder)
    manifest = read_json(path / "manifest.json", SCHEMA, _Manifest, WAY_OUT)
    tensors, about = read_tensors(path / "weights.safetensors", WAY_OUT)
    of = fingerprint(trainer, tensors.get("weights", torch.empty(0)))
    if {"of": of} != about or manifest.of != of:
        raise StaleStore(
            "A trajectory must be of this recipe, task and data.",
            f"{path}, recorded of others.",
            "another learning rate or seed, data that changed, or a recipe without init whose "
            "task starts elsewhere.",
            WAY_OUT,
        )
    now = {k: v for k, v in library_versions().items() if k != "python"}
    if manifest.versions != now:
        warnings.warn(
            f"the trajectory in {path} was recorded with {manifest.versions}, and these are {now}: "
            "what is replayed agrees to rounding, not to the bit",
            UserWarning,
            stacklevel=3,
        )
    weights = trainer.placed(tensors["weights"])
    kept = tuple(sorted(int(t) for t in manifest.states))
    return Trajectory(trainer, weights, _OnDisk(path, of, kept, trainer))


@dataclass(frozen=True)
class _Manifest:
    of: str
    steps: int
    versions: dict[str, str]
    states: dict[str, str]


@dataclass(frozen=True)
class _OnDisk(Mapping[int, TrainingState]):
    """States in files, each read and checked when it is asked for."""

    folder: Path
    of: str
    kept: tuple[int, ...]
    trainer: TrainingTrainer

    def __iter__(self) -> Iterator[int]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, t: int) -> TrainingState:
        if t not in self.kept:
            raise KeyError(t)
        path = self.folder / _file(t)
        tensors, about = read_tensors(path, WAY_OUT)
        names = {"theta", *_named(dict.fromkeys(self.trainer.spec.optimizer.memories))}
        if about != {"of": self.of, "step": str(t)} or set(tensors) != names:
            raise StaleStore(stale(path, "the state of something else", WAY_OUT))
        placed = {name: self.trainer.placed(x) for name, x in tensors.items()}
        memories = {name: placed[f"memory.{name}"] for name in self.trainer.spec.optimizer.memories}
        return TrainingState(placed["theta"], OptimizerState(t, memories))


def fingerprint(trainer: TrainingTrainer, weights: Float[Tensor, " n"]) -> str:
    """The hash of what a run of training depends on.

    Raises:
        SpecError: A part cannot be told from another of its kind.
    """
    about = {**subject(trainer.task, trainer.train), "recipe": described(trainer.spec)}
    parts = [f"{name}: {text}" for name, text in sorted(about.items())]
    center = trainer.center if trainer.spec.proximity else trainer.center[:0]
    return digest(str(SCHEMA), *parts, described(trainer.terms), center, weights.cpu().double())


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


def _named(memories: Mapping[str, Any]) -> dict[str, Any]:
    return {f"memory.{name}": x for name, x in memories.items()}


def _file(t: int) -> str:
    return f"state-{t:09d}.safetensors"
