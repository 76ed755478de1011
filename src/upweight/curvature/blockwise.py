"""A curvature of its own for each layer."""

from dataclasses import dataclass

import torch

from upweight.curvature.estimators import Estimator
from upweight.curvature.labels import Labels
from upweight.curvature.layerwise import LayerwiseCurvature
from upweight.errors import SpecError
from upweight.gradients.blocks import Block
from upweight.task.params import matches


@dataclass(frozen=True)
class Blockwise(LayerwiseCurvature):
    """The first curvature whose glob matches one of a block's parameters.

    Args:
        choices: Pairs (glob, spec), for example `(("embed*", Diagonal()), ("*", EKFAC()))`.

    Raises:
        SpecError: No choices, or they disagree about labels or examples, which all share one pass.
    """

    choices: tuple[tuple[str, LayerwiseCurvature], ...]

    def __post_init__(self) -> None:
        shared = {(spec.labels, spec.examples) for _, spec in self.choices}
        if len(shared) != 1:
            raise SpecError(
                "Blockwise needs choices that see the same labels of the same examples.",
                f"{len(self.choices)} choices with {len(shared)} different settings.",
                "a seed, a number of samples or of examples given to one of them only.",
                "give every choice the same labels= and examples=.",
            )

    @property
    def labels(self) -> Labels:  # type: ignore[override]
        return self.choices[0][1].labels

    @property
    def examples(self) -> int | None:  # type: ignore[override]
        return self.choices[0][1].examples

    def estimator(self, block: Block, dtype: torch.dtype, device: torch.device) -> Estimator:
        for pattern, spec in self.choices:
            if any(matches(name, (pattern,)) for name in block.parameters):
                return spec.estimator(block, dtype, device)
        raise SpecError(
            "Blockwise must have a choice for every block.",
            f"none for {block.name} among {[pattern for pattern, _ in self.choices]}.",
            "globs that leave some parameters out.",
            'end with ("*", EKFAC()).',
        )
