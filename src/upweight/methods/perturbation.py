"""Change a training example instead of its weight: its input, or its label.

Koh & Liang (2017), §2.2: replacing zᵢ by z̃ moves weight 1 from one to the other, so

    Δm_q ≈ S(q, z̃) − S(q, zᵢ) = −(1/n) ∇m_qᵀ (H + λI)⁻¹ [∇ℓ(z̃) − ∇ℓ(zᵢ)]

and for a small change of the input x the derivative is (their Eq. 5, here with the weight's 1/n)

    ∂S[q, i]/∂xᵢ = −(1/n) ∂/∂x ⟨(H + λI)⁻¹ ∇m_q, ∇θ ℓ(θ; x, yᵢ)⟩
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from upweight._typing import Batch
from upweight.errors import DataError, DtypeError, ShapeError, UnsupportedModel, message
from upweight.gradients.autograd import attempted, first_line, lacks_graph, pulled_back
from upweight.task.arrays import TARGET_KEYS
from upweight.task.task import Task


def input_of(example: Batch, key: int | str) -> Tensor:
    """One floating-point input of an example.

    Args:
        example: A batch of one.
        key: Which part: its place in the tuple from 0, or its name in the dict.

    Raises:
        DtypeError: That input is not floating point, so it has no derivative.
        ShapeError: There is no such input.
    """
    named: list[Any] = []  # parts of other batches have neither a place nor a name here
    if isinstance(example, dict | tuple):
        named = sorted(example) if isinstance(example, dict) else list(range(len(example)))
    if key not in named:
        raise ShapeError(
            "The input to perturb must be part of the example.",
            f"input={key!r}; the example has {named}.",
            "another name or place for the input.",
            "name the place in the tuple, counted from 0, or the key in the dict.",
        )
    x = example[key]  # type: ignore[index]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise DtypeError(
            "A perturbation needs a floating-point input.",
            f"{getattr(x, 'dtype', type(x).__name__)}.",
            "token ids or raw bytes, between which there is no derivative.",
            "perturb what the model computes from them (embeddings), or use relabeling or removal.",
        )
    return x


def gradient_products_by_input(
    task: Task,
    theta: Float[Tensor, " p"],
    vectors: Float[Tensor, "q p"],
    example: Batch,
    key: int | str,
) -> Float[Tensor, "q *x"]:
    """∂/∂x ⟨v_q, ∇θ ℓ(θ̂; x, y)⟩ at one example, for each vector.

    Args:
        task: What was trained.
        theta: θ̂.
        vectors: v_q, one per query.
        example: A batch of one.
        key: Which part: its place in the tuple from 0, or its name in the dict.

    Raises:
        DtypeError: That input is not floating point, so it has no derivative.
        ShapeError: There is no such input.
        UnsupportedModel: An operation has no second derivative.
    """
    x = input_of(example, key)

    def product(value: Tensor, v: Tensor) -> Tensor:
        batch = with_part(example, key, value)
        gradient = torch.func.grad(lambda t: task.losses(t, batch)[0])(theta)
        return gradient @ v

    # Unlike autograd it follows x through `.data`, whose value moves with x.
    rows = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0), chunk_size=16)
    found, _ = attempted(lambda: rows(x, vectors)[:, 0])
    return _by_double_backward(task, theta, vectors, example, key, x) if found is None else found


def _by_double_backward(
    task: Task,
    theta: Float[Tensor, " p"],
    vectors: Float[Tensor, "q p"],
    example: Batch,
    key: int | str,
    x: Tensor,
) -> Float[Tensor, "q *x"]:
    """The same by plain autograd, where `torch.func` cannot run the model."""
    value = x.detach().clone().requires_grad_()
    params = task.leaves(theta)
    with torch.enable_grad():
        loss = task.losses(params, with_part(example, key, value))[0]
        gradient = pulled_back(task, params, loss, None, create_graph=True)
    if lacks_graph(gradient):
        raise UnsupportedModel(
            _no_second_derivative("A function is marked once_differentiable, so PyTorch omits it.")
        )
    rows = []
    try:
        for v in vectors:
            (row,) = torch.autograd.grad(
                gradient, value, v, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(row[0])
    except RuntimeError as error:
        why = f"PyTorch says: {first_line(error)}"
        raise UnsupportedModel(_no_second_derivative(why)) from error
    return torch.stack(rows)


def _no_second_derivative(why: str) -> str:
    return message(
        "A change of an input needs second derivatives of every operation.",
        f"a model without them. {why}",
        "an operation whose backward pass PyTorch cannot differentiate.",
        "replace the operation by its formula, or compare scores of the two inputs as training "
        "examples.",
    )


def relabeled(example: Batch, label: object) -> Batch:
    """A batch of one with another target, in the dtype and shape of the old one.

    Raises:
        ShapeError: The new target does not have the old one's shape.
        DtypeError: The new target is a fraction and the old one an integer.
        DataError: A dict has no key that is known to hold targets.
    """
    key, old = _targets(example)
    # A weighted example keeps its weight: only y of (y, v) changes.
    y = old[0] if isinstance(old, tuple | list) else old
    new = torch.as_tensor(label, dtype=y.dtype, device=y.device)
    exact = torch.as_tensor(label, dtype=torch.float64, device=y.device)
    if not y.is_floating_point() and bool((new != exact).any()):
        raise DtypeError(
            f"A new target must be of the old one's kind: {y.dtype}.",
            f"{label!r}.",
            "a probability or a score where the training data hold classes.",
            "pass the index of a class.",
        )
    if new.numel() != y[0].numel():
        raise ShapeError(
            f"A new target must have the shape of the old one: {tuple(y.shape[1:])}.",
            f"shape {tuple(new.shape)}.",
            "several labels at once, or a class index where probabilities were trained on.",
            "pass the target of one example.",
        )
    new = new.reshape(y.shape)
    return with_part(example, key, (new, *old[1:]) if isinstance(old, tuple | list) else new)


def with_targets(batch: Batch, targets: Tensor) -> Batch:
    """A batch with other targets, in the dtype and shape of the old ones; weights stay.

    Raises:
        ShapeError: There is not one target of the old shape per example.
        DataError: As for `relabeled`.
    """
    key, old = _targets(batch)
    y = old[0] if isinstance(old, tuple | list) else old
    if targets.numel() != y.numel():
        raise ShapeError(
            f"New targets must have the shape of the old ones: {tuple(y.shape)}.",
            f"shape {tuple(targets.shape)}.",
            "one class per example where each has several targets, such as probabilities or yes "
            "and no for each of several labels.",
            "give each example one class: integers for CrossEntropy(), 0 or 1 for one logit.",
        )
    new = targets.to(y.device, y.dtype).reshape(y.shape)
    return with_part(batch, key, (new, *old[1:]) if isinstance(old, tuple | list) else new)


def every_label(batch: Batch, size: int, labels: Sequence[int]) -> Batch:
    """Each example of a batch under each label: example i with label c at place i C + c.

    Raises:
        ShapeError, DataError: As for `with_targets`; or an input has no axis of examples.
    """

    def repeated(x: Any) -> Any:
        if x is None:
            return None
        if not isinstance(x, Tensor) or x.shape[:1] != (size,):
            raise DataError(
                "Examples under several labels need inputs with the examples on their first axis.",
                f"a {type(x).__name__} in a batch of {size}.",
                "a collate function that makes an object of its own.",
                "let it return tensors [b, ...].",
            )
        return x.repeat_interleave(len(labels), dim=0)

    several: Batch = tree_map(repeated, batch)
    return with_targets(several, torch.tensor(labels).repeat(size))


def _targets(example: Batch) -> tuple[int | str, Any]:
    """Where the targets of a batch are, and what they are."""
    if isinstance(example, dict):
        key = next((k for k in TARGET_KEYS if k in example), "")
        if not key:
            raise DataError(
                f"Relabeling needs the targets of a dict under one of {TARGET_KEYS}.",
                f"the keys {sorted(example)}.",
                "a forward of one's own that knows them under another name.",
                "rename the key in the data and in forward.",
            )
        return key, example[key]
    if not isinstance(example, tuple):
        raise DataError(
            "Relabeling needs a tuple (inputs..., targets) or a dict.",
            f"a batch of type {type(example).__name__}.",
            "a collate function that makes an object of its own.",
            "let it return a tuple or a dict for this question.",
        )
    return len(example) - 1, example[-1]


def with_part(example: Batch, key: int | str, value: object) -> Batch:
    """The example with another value for one of its parts."""
    if isinstance(example, dict):
        return {**example, key: value}  # type: ignore[dict-item]
    place = int(key)
    parts = [value if j == place else part for j, part in enumerate(example)]
    return type(example)._make(parts) if hasattr(example, "_make") else tuple(parts)
