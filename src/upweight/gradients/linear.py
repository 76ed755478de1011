"""Recognize f(θ, x) = W z(x) + b + o(x), where z and o hold no chosen parameter.

Softmax, logistic, Poisson and linear regression are of this form, and so is the last layer of a
frozen network. Then everything about θ factors through z and the c outputs:

    gᵢ = δᵢ ⊗ zᵢ        Jᵢ = I_c ⊗ zᵢ        Hᵢ = Λᵢ ⊗ zᵢ zᵢᵀ

with δ = ∂ℓ/∂f, Λ = ∂²ℓ/∂f² and z extended by a 1 for the bias. Nothing of size p is formed per
example.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from upweight._typing import Batch, Params
from upweight.task.batches import tensors
from upweight.task.task import Task


@dataclass(frozen=True)
class LinearForm:
    """Which module is the linear map, and where its parameters lie in θ.

    Args:
        module: Name of the `nn.Linear` inside the model.
        weight: Name of W in the layout, or None when W is not part of θ.
        bias: Name of b in the layout, or None when there is none or it is not part of θ.
        inputs: Length of z without the 1.
        outputs: c.
    """

    module: str
    weight: str | None
    bias: str | None
    inputs: int
    outputs: int

    @property
    def width(self) -> int:
        """Length of z, with the 1 for the bias where b is part of θ."""
        return (self.inputs if self.weight else 0) + (1 if self.bias else 0)

    def features(self, task: Task, batch: Batch) -> Float[Tensor, "b i"]:
        """z(x) of a batch, extended by the 1. It is the same at every θ."""
        with torch.no_grad():
            captured, _, _ = _run(task, {}, batch, self.module, replacement=None)
        z = captured.reshape(len(captured), -1)
        one = z.new_ones(len(z), 1)
        parts = ([z] if self.weight else []) + ([one] if self.bias else [])
        return torch.cat(parts, dim=1)

    def matrix(self, vector: Shaped[Tensor, "*k p"]) -> Shaped[Tensor, "*k c i"]:
        """A flat vector (or its indices) as rows over z, one per output: `[W | b]`."""
        lead = vector.shape[:-1]
        if not self.bias:
            return vector.reshape(*lead, self.outputs, self.inputs)
        if not self.weight:
            return vector[..., None]
        # nn.Linear registers its weight before its bias, and the layout keeps that order.
        cut = self.outputs * self.inputs
        weight = vector[..., :cut].reshape(*lead, self.outputs, self.inputs)
        return torch.cat([weight, vector[..., cut:, None]], dim=-1)

    def flatten(self, matrix: Float[Tensor, "*k c i"]) -> Float[Tensor, "*k p"]:
        """The inverse of `matrix`."""
        lead = matrix.shape[:-2]
        # Lengths are spelled out: a reshape cannot infer them for an empty batch of vectors.
        if not (self.bias and self.weight):
            return matrix.reshape(*lead, self.outputs * self.width)
        weight = matrix[..., :-1].reshape(*lead, self.outputs * self.inputs)
        return torch.cat([weight, matrix[..., -1]], dim=-1)


def linear_form(task: Task, theta: Float[Tensor, " p"], probe: Batch) -> LinearForm | None:
    """The linear form of the task's model, or None if it has none.

    All chosen parameters must belong to one `nn.Linear` that runs once per forward pass, whose
    input does not depend on them and whose output *is* the model's output up to its shape and to
    an addend without them (an offset, a skip connection); nor may the targets depend on them. That
    is tested by putting random numbers in the place of the map's output and asking that they come
    out as they are, plus what comes out for zeros: any activation or scaling after it would show.
    """
    owner = _owner(task)
    if owner is None:
        return None
    name, linear = owner
    layout = task.layout
    prefix = f"{name}." if name else ""
    weight = f"{prefix}weight" if f"{prefix}weight" in layout.names else None
    bias = f"{prefix}bias" if f"{prefix}bias" in layout.names else None
    form = LinearForm(name, weight, bias, linear.in_features, linear.out_features)
    size = len(task.losses(theta, probe))
    generator = torch.Generator(device=layout.device).manual_seed(0)
    offset: Tensor | float = 0.0
    for scale in (0.0, 1.0, 1e3):
        random = scale * torch.empty(
            size, linear.out_features, dtype=layout.dtype, device=layout.device
        ).normal_(generator=generator)
        try:
            # What is added must be the same at another θ, even where no gradient tells.
            at = theta if scale > 0 else 2 * theta + 1
            params = {k: v.detach().requires_grad_() for k, v in layout.unflatten(at).items()}
            captured, outputs, targets = _run(task, params, probe, name, random)
        except (RuntimeError, LookupError):
            return None
        constant = not any(x.requires_grad for x in tensors((captured, outputs, targets)))
        if not constant or captured.numel() != size * linear.in_features:
            return None
        if outputs.numel() != random.numel():
            return None
        if scale == 0.0:
            offset = outputs.detach().reshape_as(random)
        elif not torch.equal(outputs.detach().reshape_as(random), random + offset):
            return None
    return form


def _owner(task: Task) -> tuple[str, nn.Linear] | None:
    """The one `nn.Linear` whose W and b are all of θ, shared with no other module.

    Not one with a forward hook of the user's, which may change its output; nor one whose weight is
    computed from another parameter (spectral norm).
    """
    named = dict(task.model.named_parameters())
    chosen = {id(named[name]) for name in task.layout.names}
    owners = [
        (name, module)
        for name, module in task.model.named_modules(remove_duplicate=False)
        if any(id(p) in chosen for p in module.parameters(recurse=False))
    ]
    if len(owners) != 1 or type(owners[0][1]) is not nn.Linear:
        return None
    name, module = owners[0]
    # `matrix` and `flatten` rely on W lying before b, the order in which nn.Linear registers them.
    held = [id(p) for p in (module.weight, module.bias) if id(p) in chosen]
    in_order = [id(named[chosen_name]) for chosen_name in task.layout.names] == held
    return (name, module) if in_order and not module._forward_hooks else None


def _run(
    task: Task, params: Params, batch: Batch, module: str, replacement: Tensor | None
) -> tuple[Tensor, Tensor, Any]:
    """One forward pass: the linear map's input, the model's output and the targets.

    With a replacement the linear map's output is exchanged for it. The hooks live inside this call.

    Raises:
        LookupError: The module did not run exactly once.
    """
    seen: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return output if replacement is None else replacement.reshape_as(output)

    handle = task.model.get_submodule(module).register_forward_hook(hook)
    try:
        outputs, targets = task.outputs(params, batch)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise LookupError(module)
    return seen[0], outputs, targets
