"""Which models were trained already? θ(w) in a folder, so that what was killed goes on.

    weights [s n] of one call  →  a shard named by their hash: θ [s p], ‖∇J‖, failures, others

A call is kept whole, as it was made: what goes on makes the same calls, and has the same models, to
the last digit. A folder belongs to one recipe, task and training set, and another is refused.
`retrain` keeps measurements in place of models, and many questions beside each other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import SpecError
from upweight.runtime.fingerprint import digest
from upweight.runtime.resources import Resources
from upweight.runtime.store import Store
from upweight.runtime.versions import numeric_versions
from upweight.task.data import Data
from upweight.task.identity import described, subject
from upweight.task.recipe import Recipe, Trained, Trainer
from upweight.task.task import Task
from upweight.training.function import as_recipe


def training_identity(recipe: Any, task: Task, train: Data) -> dict[str, str]:
    """Everything that θ(w) depends on but the weights.

    Raises:
        SpecError: A part cannot be distinguished from another of its kind.
    """
    # A class or function that makes a model is told by its name and code, but not by what it calls:
    # what it makes says the rest.
    untrained = getattr(recipe, "untrained", None)
    start = {} if untrained is None else {"untrained": described(untrained(task).model)}
    about = subject(task, train)
    return {
        **start,
        **about,
        "recipe": described(recipe),
        "train": f"{len(train)} examples {about['train']}",
        "versions": repr(numeric_versions()),
    }


@dataclass(frozen=True, eq=False)
class Kept:
    """What was made for rows of weights, by the hash of these; without a store nothing is kept."""

    store: Store | None

    @classmethod
    def of(cls, resources: Resources, about: Callable[[], Mapping[str, str]]) -> "Kept":
        """That of a folder, if there is one, whose contents all depend on `about`.

        Raises:
            StaleStore: The folder holds something else.
            NotWritten: The folder cannot be written.
        """
        if resources.folder is None:
            return cls(None)
        return cls(Store.open(resources.folder, about(), again="the same question"))

    def once(
        self, key: str, weights: Tensor, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """What was made before for these weights, or is now.

        Args:
            key: What else it depends on.
            weights: Or other numbers that say what is made.
            make: () -> named tensors, on the CPU.

        Raises:
            StaleStore: A file is damaged.
            NotWritten: The disk is full or not writable.
        """
        if self.store is None:
            return make()
        name = digest(key, weights.detach().cpu())[:32]
        if self.store.path(name).exists():
            return self.store.read(name)
        made = make()
        self.store.write(name, made)
        return made

    def trainer(self, trainer: Trainer, task: Task, key: str = "") -> Trainer:
        """The same trainer, each of whose calls is made once; itself where nothing is kept.

        Its key tells it from other trainers of the folder.
        """
        return trainer if self.store is None else KeptTrainer(trainer, task, self, key)


@dataclass(frozen=True, eq=False)
class KeptTrainer:
    """w ↦ θ(w), where it was not trained before. Made by `Kept.trainer`."""

    inner: Trainer
    task: Task
    kept: Kept
    key: str

    @property
    def at_once(self) -> int:
        return self.inner.at_once

    def __call__(self, weights: Float[Tensor, "s n"]) -> Trained:
        """θ(w) for each row; a call that was made before is read."""

        def make() -> dict[str, Tensor]:
            found = self.inner(weights)
            told = json.dumps({str(row): why for row, why in found.failures.items()})
            norms = found.gradient_norms.detach().cpu()
            return {
                "theta": found.theta.detach().cpu(),
                "gradient_norms": norms,
                "failures": as_bytes(told),
                **packed_others(found.others),
            }

        found = self.kept.once(self.key, weights, make)
        failures = {int(row): why for row, why in json.loads(as_text(found["failures"])).items()}
        theta = found["theta"].to(self.task.layout.device)
        others = unpacked_others(found, len(theta))
        return Trained(theta, found["gradient_norms"], failures, others)


def kept_trainer(recipe: Recipe, task: Task, train: Data, resources: Resources) -> Trainer:
    """`recipe.prepare(task, train)`; with a folder, models are kept in it and found again.

    Raises:
        SpecError: It is no recipe, and no function from data weights to a trained model.
        StaleStore: The folder holds models of another recipe, task or training set.
        UpweightError: From the recipe.

    Memory: on disk p numbers for each model.
    """
    recipe = as_recipe(recipe)
    if not isinstance(recipe, Recipe):
        raise SpecError(
            "A recipe says how the model is trained.",
            f"{recipe!r}." if recipe is None else f"a {type(recipe).__name__}.",
            "a trained model, or an argument in the place of another.",
            "an upweight.Training(...); uw.training.Newton() for a convex objective; or a function "
            "from data weights to a trained model.",
        )
    kept = Kept.of(resources, lambda: training_identity(recipe, task, train))
    return kept.trainer(recipe.prepare(task, train), task)


def packed_others(others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What of some models is no part of θ, as tensors of one folder."""
    each = enumerate(others)
    return {f"{row} {name}": x.cpu() for row, some in each for name, x in some.items()}


def unpacked_others(found: Mapping[str, Tensor], models: int) -> tuple[dict[str, Tensor], ...]:
    """The same again; empty where no model has any."""
    others = tuple(dict[str, Tensor]() for _ in range(models))
    for key, x in found.items():
        row, of_a_model, name = key.partition(" ")
        if of_a_model:
            others[int(row)][name] = x
    return others if any(others) else ()


def as_bytes(text: str) -> Tensor:
    """A text as a tensor, which a store holds."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def as_text(tensor: Tensor) -> str:
    """The text again."""
    return bytes(tensor.tolist()).decode()
