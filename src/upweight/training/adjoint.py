"""Training backwards: what the end of a run says of the state before a step, and of its weights.

    state_{t+1} = rule(state_t, g),      g = ∇J_B(θ_t, w)

    u     = (∂rule/∂g)ᵀ λ_{t+1}
    λ_t   = (∂rule/∂state_t)ᵀ λ_{t+1} + (H u, 0, …)          H = ∇²J_B(θ_t)
    ∂/∂wᵢ = (share/|B|) ⟨u, ∇ℓᵢ(θ_t)⟩,   i ∈ B_t

One pullback of u through the gradient gives H u and all ∂/∂wᵢ of the batch. With a Gauss-Newton
matrix in place of H it is

    H u ≈ Jᵀ Λ (J u) + ∇²R u,     ∂/∂wᵢ = ⟨(J u)ᵢ, δᵢ⟩       J = ∂f/∂θ, δ = ∂J_B/∂f, Λ = ∂²J_B/∂f²

The forward pass of a step, with what is drawn in it, is shared by the adjoints of all queries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.curvature.curvature import no_second_derivative
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.errors import UnsupportedModel
from upweight.gradients.autograd import agrees, attempted, first_line, lacks_graph
from upweight.gradients.functional import as_dense
from upweight.training.optimizers import Optimizer, OptimizerState
from upweight.training.steps import Step, TrainingState
from upweight.training.trainer import TrainingTrainer

AT_ONCE = 16
"""Adjoints in one pass backwards: more take more memory and hardly less time."""


@dataclass(frozen=True, eq=False)
class _Linearized:
    """∇J_B at a state, and what goes back through it.

    Args:
        gradient: g.
        graph: What is differentiated again, by parameter.
        pullback: u ↦ (H u, (share/|B|) ⟨u, ∇ℓᵢ⟩), all rows of u together or one after the other.
    """

    gradient: Float[Tensor, " p"]
    graph: Sequence[Tensor]
    pullback: Callable[
        [Float[Tensor, "q p"], bool], tuple[Float[Tensor, "q p"], Float[Tensor, "q b"]]
    ]


def back_over(
    trainer: TrainingTrainer,
    step: Step,
    state: TrainingState,
    adjoint: Sequence[Float[Tensor, "q p"]],
    curvature: Hessian | GGN,
    together: bool = True,
) -> Float[Tensor, "q b"]:
    """λ_{t+1} becomes λ_t in place; what comes back is the derivative in the weights of the batch.

    `adjoint` has λ of θ and of each of the optimizer's memories, in their order; they go back
    `together`, from `goes_together`, or one after the other. H is that of `curvature`.

    Cost: a forward and a backward pass over the batch for all, and for each adjoint about twice as
    much; memory for the activations of `AT_ONCE` batches.
    """
    at = _linearized(trainer, step, state, curvature)
    partials = _partials(trainer.spec.optimizer, state, at.gradient, step.lr)
    slopes = []
    for part in zip(*(torch.split(x, AT_ONCE) for x in adjoint), strict=True):
        before = [_combined(diagonals, part) for diagonals in partials]
        through, some = at.pullback(before[-1], together)
        before[0] += through
        for kept, new in zip(part, before, strict=False):
            kept.copy_(new)
        slopes.append(some)
    return torch.cat(slopes)


def goes_together(
    trainer: TrainingTrainer, step: Step, state: TrainingState, curvature: Hessian | GGN
) -> tuple[bool, tuple[str, ...]]:
    """Whether PyTorch takes several adjoints back over a step together, with a note if it does not.

    Raises:
        UnsupportedModel: An operation has no second derivative.

    Cost: a step with two adjoints, twice.
    """
    at = _linearized(trainer, step, state, curvature)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, trainer.task.layout.size, generator=generator, dtype=torch.float64)
    u = u.to(state.theta)
    plain, missing = attempted(lambda: torch.cat(at.pullback(u, False), dim=1))
    if plain is None or any(map(lacks_graph, at.graph)):
        said = "A function is marked once_differentiable."
        if missing is not None:
            said = f"PyTorch says: {first_line(missing)}"
        raise UnsupportedModel(no_second_derivative(said, _WAY_OUT)) from missing
    fast, refused = attempted(lambda: torch.cat(at.pullback(u, True), dim=1))
    if agrees(fast, plain):
        return True, ()
    why = "it gives others together" if fast is not None else first_line(refused)
    return False, (f"adjoints one after the other, because of torch.vmap: {why}",)


_WAY_OUT = (
    "use MAGIC(GGN()), which differentiates the loss alone twice; or GradientDot() or "
    "Influence(EKFAC(), …), which need first derivatives only."
)


# -- the rule -------------------------------------------------------------------------------------


def _partials(
    rule: Optimizer, state: TrainingState, gradient: Float[Tensor, " p"], lr: float
) -> list[list[Float[Tensor, " p"] | None]]:
    """∂output/∂input of a rule that works entry by entry: diagonals, None where one is 0.

    Returns:
        A row for each of θ, the memories and g; in it one for each of θ and the memories after.
    """
    leaves = [x.detach().requires_grad_() for x in (*state.tensors, gradient)]
    memories = dict(zip(state.optimizer.memories, leaves[1:-1], strict=True))
    with torch.enable_grad():
        theta, after = rule.step(
            leaves[0], leaves[-1], OptimizerState(state.optimizer.steps, memories), lr
        )
        sums = [x.sum() for x in (theta, *after.memories.values())]
    columns = [torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) for x in sums]
    return [list(row) for row in zip(*columns, strict=True)]


def _combined(
    diagonals: Sequence[Float[Tensor, " p"] | None], adjoint: Sequence[Float[Tensor, "q p"]]
) -> Float[Tensor, "q p"]:
    total = None
    for diagonal, rows in zip(diagonals, adjoint, strict=True):
        if diagonal is not None:
            total = rows * diagonal if total is None else total.addcmul_(rows, diagonal)
    return torch.zeros_like(adjoint[0]) if total is None else total


# -- the gradient ---------------------------------------------------------------------------------


def _linearized(
    trainer: TrainingTrainer, step: Step, state: TrainingState, curvature: Hessian | GGN
) -> _Linearized:
    linearize = _by_gauss_newton if isinstance(curvature, GGN) else _by_hessian
    with trainer.drawing(step):
        return linearize(trainer, step, state)


def _by_hessian(trainer: TrainingTrainer, step: Step, state: TrainingState) -> _Linearized:
    layout = trainer.task.layout
    params, weights = _leaves(trainer, state), step.weights.detach().clone().requires_grad_()
    parts = trainer.gradient(replace(step, weights=weights), params, create_graph=True)
    gradient = layout.flatten({k: x.detach() for k, x in zip(params, parts, strict=True)})

    def pullback(u: Float[Tensor, "q p"], together: bool) -> tuple[Tensor, Tensor]:
        rows = list(layout.unflatten(u).values())
        *of_params, of_weights = _pulled(parts, [*params.values(), weights], rows, together)
        return layout.flatten(dict(zip(params, of_params, strict=True))), of_weights

    return _Linearized(gradient, parts, pullback)


def _by_gauss_newton(trainer: TrainingTrainer, step: Step, state: TrainingState) -> _Linearized:
    task, layout = trainer.task, trainer.task.layout
    params, weights = _leaves(trainer, state), step.weights.detach().clone().requires_grad_()
    leaves = list(params.values())
    with torch.enable_grad():
        f, targets = task.outputs(params, trainer.batch(step))
        top = f.detach().clone().requires_grad_()
        value = step.share * (weights * task.losses_of(top, targets)).mean()
        deltas = torch.autograd.grad(value, [top], create_graph=True)
        beside = trainer.beside(params)
        rest: Sequence[Tensor] = [torch.zeros_like(x) for x in leaves]
        if beside.requires_grad:
            rest = torch.autograd.grad(beside, leaves, create_graph=True, materialize_grads=True)
        # Jᵀv is linear in v, so its own pullback at u is J u.
        v = torch.zeros_like(f, requires_grad=True)
        transposed = torch.autograd.grad(f, leaves, v, create_graph=True, materialize_grads=True)
    data = torch.autograd.grad(
        f, leaves, deltas[0].detach(), retain_graph=True, materialize_grads=True
    )
    parts = [(x + y).detach() for x, y in zip(data, rest, strict=True)]

    def pullback(u: Float[Tensor, "q p"], together: bool) -> tuple[Tensor, Tensor]:
        rows = list(layout.unflatten(u).values())
        outputs = _pulled(transposed, [v], rows, together)
        of_outputs, of_weights = _pulled(deltas, [top, weights], outputs, together)
        through = _pulled([f], leaves, [of_outputs], together)
        beside = _pulled(rest, leaves, rows, together)
        both = [x + y for x, y in zip(through, beside, strict=True)]
        return layout.flatten(dict(zip(params, both, strict=True))), of_weights

    gradient = layout.flatten(dict(zip(params, parts, strict=True)))
    return _Linearized(gradient, transposed, pullback)


def _leaves(trainer: TrainingTrainer, state: TrainingState) -> Mapping[str, Tensor]:
    named = trainer.task.layout.unflatten(state.theta)
    return {name: x.detach().requires_grad_() for name, x in named.items()}


def _pulled(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Float[Tensor, "q ..."]],
    together: bool,
) -> list[Float[Tensor, "q ..."]]:
    """Σ_k (∂output_k/∂input)ᵀ cotangent_k for each input, of q cotangents together or in turn."""
    q = len(cotangents[0])
    pairs = [(x, y) for x, y in zip(outputs, cotangents, strict=True) if x.requires_grad]
    if not pairs:
        return [x.new_zeros(q, *x.shape) for x in inputs]
    values, rows = zip(*pairs, strict=True)
    pull = partial(torch.autograd.grad, values, inputs, retain_graph=True, allow_unused=True)
    found: Sequence[Tensor | None]
    if together and q > 1:
        found = pull(rows, is_grads_batched=True)
    else:
        singles = [pull([row[k] for row in rows]) for k in range(q)]
        found = [None if x[0] is None else torch.stack(x) for x in zip(*singles, strict=True)]
    return [
        of.new_zeros(q, *of.shape) if x is None else as_dense(x)
        for x, of in zip(found, inputs, strict=True)
    ]
