"""The gradients of a batch, block by block, as factors.

    with GradientPass(plan) as gradients:
        for factors, block in zip(gradients.of(task.losses, batch), plan.blocks): ...

What the layers saw goes through their rules (`layers.py`); parameters without one get per-example
gradients from `torch.func`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from upweight._typing import Batch, Params
from upweight.errors import NotDifferentiable, UnsupportedModel, message
from upweight.gradients.blocks import Block, MatrixBlock, Plan, Source
from upweight.gradients.factored import Factors, Rows, Tokens
from upweight.gradients.hooks import Call, Capture
from upweight.gradients.layers import Examples, rule_for
from upweight.task.task import Task


class GradientPass:
    """Gradients of batches as factors, block by block, while in its context.

    Args:
        plan: How to obtain them.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._capture = Capture(plan.task, tuple(plan.layers))

    def __enter__(self) -> "GradientPass":
        self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)

    def of(
        self, function: Callable[[Params, Batch], Float[Tensor, " b"]], batch: Batch
    ) -> list[Factors]:
        """∇θ function(θ, batch)ᵢ for each example, in the order of the plan's blocks.

        Args:
            function: One value per example: losses, or a measure.
            batch: Any tree of tensors with the examples first, on the parameters' device.
        """
        values = self._capture.watch(lambda params: function(params, batch))
        self._require_graph(values)
        calls = self._capture.backward(values)
        return self._factors(calls, len(values), function, batch)

    def of_heads(
        self,
        batch: Batch,
        heads: Callable[[Tensor, Any], Iterable[tuple[Callable[..., Tensor], Any]]],
    ) -> Iterator[list[Factors]]:
        """∇θ head(f(θ, x), y, extra)ᵢ for several heads on one forward pass.

        Args:
            batch: As the task takes it.
            heads: From outputs and targets to pairs (head, extra): `head(outputs, targets, extra)`
                gives one value per example, with extra any tree with the examples first.
        """
        task = self.plan.task
        outputs, targets = self._capture.forward(batch)
        for head, extra in heads(outputs.detach(), targets):
            values = head(outputs, targets, extra)
            self._require_graph(values)
            calls = self._capture.backward(values)

            def function(params: Params, pair: Any, head: Any = head) -> Tensor:
                return head(*task.outputs(params, pair[0]), pair[1])

            yield self._factors(calls, len(values), function, (batch, extra))

    def _require_graph(self, values: Tensor) -> None:
        if not self.plan.layers or values.requires_grad:
            return
        raise NotDifferentiable(
            message(
                "The value must depend on the chosen layers through differentiable steps.",
                "a value that no gradient reaches.",
                "a measure that counts (accuracy, argmax, a threshold), or .detach() in forward.",
                "use Margin(), LogProb() or Loss(), which move before the decision does.",
            )
        )

    def _factors(
        self,
        calls: Sequence[Call],
        size: int,
        function: Callable[[Any, Any], Tensor],
        batch: Any,
    ) -> list[Factors]:
        plan = self.plan
        by_role = _contributions(plan.task.model, calls, plan.layers, size, plan.dtype)
        rows = _by_function(plan.task, plan.by_function, function, batch)
        return [self._block(block, by_role, rows, size) for block in plan.blocks]

    def _block(
        self,
        block: Block,
        by_role: Mapping[Source, list[Factors]],
        rows: Mapping[str, Tensor],
        size: int,
    ) -> Factors:
        plan = self.plan
        if isinstance(block, MatrixBlock):
            parts = [p for s in plan.sources[block.name] for p in by_role.get(s, ())]
            return _joined_tokens(parts, block, size, plan)
        pieces = []
        for name in block.parameters:
            if name in rows:
                pieces.append(rows[name].reshape(size, -1).to(plan.dtype))
                continue
            parts = [p for s in plan.sources[name] for p in by_role.get(s, ())]
            slices = plan.task.layout.slices[name]
            zero = torch.zeros(
                size,
                slices.stop - slices.start,
                dtype=plan.dtype,
                device=plan.task.layout.device,
            )
            pieces.append(sum((p.values for p in parts if isinstance(p, Rows)), zero))
        return Rows(torch.cat(pieces, dim=1))


def _contributions(
    model: nn.Module,
    calls: Sequence[Call],
    axes: Mapping[str, int],
    size: int,
    dtype: torch.dtype,
) -> dict[Source, list[Factors]]:
    """What each use of each layer adds to each parameter's gradient."""
    found: dict[Source, list[Factors]] = {}
    for call in calls:
        module = model.get_submodule(call.layer)
        rule = rule_for(module)
        assert rule is not None  # only layers with a rule are watched
        examples = Examples(size, axes[call.layer], dtype)
        for role, factors in rule.gradients(module, call, examples).items():
            found.setdefault(Source(call.layer, role), []).append(factors)
    return found


def _joined_tokens(parts: Sequence[Factors], block: MatrixBlock, size: int, plan: Plan) -> Tokens:
    """All uses of a weight on one axis of positions, with the bias's column of ones."""
    tokens = [p for p in parts if isinstance(p, Tokens)]
    o, i = block.shape
    inputs = i - (block.bias is not None)
    if not tokens:  # no use reached the value: no positions
        none = torch.zeros((), dtype=plan.dtype, device=plan.task.layout.device)
        return Tokens(none.expand(size, 1, o), none.expand(size, 1, i))
    left = tokens[0].left if len(tokens) == 1 else torch.cat([t.left for t in tokens], dim=1)
    right = tokens[0].right if len(tokens) == 1 else torch.cat([t.right for t in tokens], dim=1)
    assert right.shape[-1] == inputs
    if block.bias is not None:
        right = torch.cat([right, right.new_ones(*right.shape[:-1], 1)], dim=-1)
    return Tokens(left, right)


def _by_function(
    task: Task,
    names: Sequence[str],
    function: Callable[[Any, Any], Tensor],
    batch: Any,
) -> dict[str, Tensor]:
    """Per-example gradients of some parameters by `vmap(grad)`, for any way they are used."""
    if not names:
        return {}
    params = task.named(task.theta())
    chosen = {name: params[name] for name in names}
    rest = {name: value for name, value in params.items() if name not in chosen}

    def one(example: Any) -> dict[str, Tensor]:
        as_batch = tree_map(lambda x: x[None] if isinstance(x, Tensor) else x, example)
        return torch.func.grad(lambda c: function({**rest, **c}, as_batch)[0])(chosen)

    try:
        return torch.func.vmap(one)(batch)
    except (RuntimeError, ValueError) as error:
        raise UnsupportedModel(
            message(
                "Parameters without a layer rule need a model that torch.func.vmap can run.",
                f"{', '.join(names[:5])}. PyTorch says: {str(error).splitlines()[0]}",
                "control flow on values, in-place writes into buffers, or operations without a "
                "batching rule.",
                'leave these parameters out with Task(params="pattern"), or use them through one '
                "of the layers of upweight.gradients.layers.",
            )
        ) from error
