"""S[q, i] = −(1/n) ⟨(ΦᵀΦ/n + λI)⁻¹ P∇m_q, φᵢ⟩ ∂ℓᵢ/∂f with φᵢ = P∇fᵢ: TRAK.

Park, Georgiev, Ilyas, Leclerc & Madry (2023), "TRAK: attributing model behavior at scale", §3.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight._typing import Batch, Params
from upweight.errors import SpecError, UnsupportedModel
from upweight.gradients.projections import sketch
from upweight.linalg.damping import Damping, Relative, as_damping
from upweight.methods.fitting import Fitting
from upweight.methods.members import thetas_given
from upweight.methods.method import Method
from upweight.methods.projected import ProjectedScorer, member, require_count
from upweight.runtime.progress import progress
from upweight.scores import Unit
from upweight.task.data import batch_size
from upweight.task.losses import CrossEntropy, Weighted

PARALLEL = 1e-6
"""How far ∂ℓ/∂(outputs) may be from a multiple of ∂f/∂(outputs), relative to it, by rounding."""


@dataclass(frozen=True)
class TRAK(Method):
    """A linear model in the place of the network: its gradients at θ̂, projected, are the inputs.

        S[q, i] = −(1/n) ⟨(ΦᵀΦ/n + λI)⁻¹ P∇m_q, φᵢ⟩ ∂ℓᵢ/∂f,   φᵢ = P∇fᵢ

    Park et al. (2023), Eq. 13. f is what the loss is a function of: the output where there is one
    (regression, one logit), the margin log p/(1 − p) of the right class where there are several
    (then ∂ℓ/∂f = −(1 − p)), and log p for sequences and soft labels (∂ℓ/∂f = −1). With several
    members θ_k, S is the mean of ⟨(Φ_kᵀΦ_k/n + λI)⁻¹ P∇m_q(θ_k), φᵢ(θ_k)⟩ times the mean of ∂ℓᵢ/∂f.

    P is a sketch of d numbers of all of θ, with E⟨Pa, Pb⟩ = ⟨a, b⟩, and nothing of size p × d.

    Args:
        dim: d; None, and any d from p on: P = I.
        damping: λ, in units of the eigenvalues of ΦᵀΦ/n. The paper has none and d below n; the mean
            eigenvalue was better on each of four networks that we measured. It is the default for
            that reason: what is measured on these four was seen when it was chosen.
        threshold: Scores are moved towards 0 by so much, and are 0 below it (the paper's step 4).
        seed: Of the draws of P.

    `fit(..., history=members)` takes models of the task's kind, their state dicts or flat θ. θ̂ is a
    member only where it is among them; without a history it is the only one.

    Unit: `RANK`. The paper leaves ∂²ℓ/∂f² out of ΦᵀΦ, so sizes are off by about its mean.
    Exact when: P = I, one member, f linear in θ and ∂²ℓ/∂f² = 1 (least squares): it is then
    `Influence(GGN(), damping=λ)`, without the penalty in H.
    Cost: per member, one pass over the training data and a forward pass, n d² products for ΦᵀΦ and
    d numbers an example to keep; then q n d.

    Raises:
        SpecError: d is no positive number, or the threshold is negative.
        UnsupportedModel: The loss is no function of one number (at fit).
    """

    dim: int | None = 2048
    damping: Damping | float = field(default_factory=lambda: Relative(1.0))
    threshold: float = 0.0
    seed: int = 0

    takes_history = True
    history_is_optional = True
    unit = Unit.RANK

    def __post_init__(self) -> None:
        as_damping(self.damping)
        if self.dim is not None:
            require_count("dim", self.dim, "TRAK")
        if not self.threshold >= 0:
            raise SpecError(
                "A threshold is what scores are moved towards 0 by.",
                f"threshold={self.threshold!r}.",
                "a sign slip.",
                "0.0 leaves scores as they are.",
            )

    def prepare(self, fitting: Fitting) -> ProjectedScorer:
        task, data = fitting.task, fitting.data
        fitting.checked_losses()
        thetas = members(fitting)
        made = fitting.plan
        projection = sketch(made, self.dim, self.seed)
        output, called = model_output(fitting)

        def function(params: Params, batch: Batch) -> Tensor:
            return output(*task.call(params, batch))

        found, notes, at_once = [], [*made.notes, f"f is {called}"], 1
        for theta in thetas:
            one, at_once, told = member(
                fitting,
                theta,
                function,
                projection,
                as_damping(self.damping),
                {"ΦᵀΦ/n": slice(0, projection.width)},
                kept_as=f"{called}, a sketch of {self.dim}, seed {self.seed}",
                slopes=slopes(fitting, theta, output),
            )
            found.append(one)
            notes += told
        return ProjectedScorer(
            task=task,
            train=data,
            projection=projection,
            members=tuple(found),
            threshold=self.threshold,
            memory_bytes=fitting.resources.memory_bytes,
            at_once=at_once,
            notes=tuple(dict.fromkeys(notes)),
        )


Output = Callable[[Tensor, Any], Float[Tensor, " b"]]


def model_output(fitting: Fitting) -> tuple[Output, str]:
    """f as a function of outputs and targets, and what it is called."""
    task, data = fitting.task, fitting.data
    with torch.no_grad():
        outputs, targets = task.outputs(
            fitting.theta, task.to_device(data.batch(0, data.together(1)))
        )
    if outputs[0].numel() == 1:
        return (lambda outputs, _: outputs.reshape(len(outputs))), "the output"
    loss = task.loss
    if isinstance(loss, Weighted):
        loss, targets = loss.base, targets[0]
    is_class = isinstance(loss, CrossEntropy) and not targets.is_floating_point()
    if is_class and targets.ndim == 1:
        return task.loss.margin, "the margin log p/(1 − p)"
    return task.loss.log_prob, "log p"


def slopes(fitting: Fitting, theta: Float[Tensor, " p"], output: Output) -> Float[Tensor, " n"]:
    """∂ℓᵢ/∂f of every training example, from ∂ℓ/∂(outputs) = ∂ℓ/∂f ∂f/∂(outputs).

    Raises:
        UnsupportedModel: The one is no multiple of the other.

    Cost: a forward pass.
    """
    task, data = fitting.task, fitting.data
    size, found = data.together(batch_size(1, theta.element_size())), []
    for start, _, batch in progress(data.batches(size), len(data), "outputs"):
        with torch.no_grad():
            outputs, targets = task.call(theta, task.to_device(batch))
        # In float64: 1 − p of an example that the model is sure of is 0 in float32.
        outputs = outputs.detach().double().requires_grad_()
        with torch.enable_grad():
            by_loss, by_output = (
                torch.autograd.grad(f(outputs, targets).sum(), outputs)[0].flatten(1)
                for f in (task.losses_of, output)
            )
        squares = by_output.square().sum(dim=1)
        slope = torch.where(squares > 0, (by_loss * by_output).sum(dim=1) / squares, 0.0)
        rest = (by_loss - slope[:, None] * by_output).norm(dim=1)
        # Where 1 − p is 1e-12, so is the rounding of what it is the difference of.
        wrong = rest > PARALLEL * (by_loss.norm(dim=1) + 1e-3)
        if bool(wrong.any()):
            raise UnsupportedModel(
                "TRAK needs a loss that is a function of one number of the model.",
                f"{task.loss!r}, whose slope in the outputs is no multiple of that of one number "
                f"for training example {start + int(wrong.nonzero()[0])}.",
                "several outputs with a loss of its own each, or unequal weights of positions.",
                "use LoGra(...), which takes gradients of the loss, or Influence(EKFAC(), ...).",
            )
        found.append(slope)
    return torch.cat(found)


def members(fitting: Fitting) -> list[Float[Tensor, " p"]]:
    """θ of every member: those of the history, or θ̂ alone.

    Raises:
        SpecError: The history is none of several models that differ in θ alone.
    """
    if fitting.history is None:
        return [fitting.theta]
    return thetas_given(fitting.task, fitting.history)
