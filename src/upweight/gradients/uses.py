"""Which rule computes each layer's gradients: a `Plan` in words."""

from typing import Any

from upweight.gradients.blocks import MatrixBlock, Plan


def layer_uses(plan: Plan) -> list[dict[str, Any]]:
    """A row for each block: its parameters, the type of their layer, its shape, and the rule."""
    rows = []
    for block in plan.blocks:
        if set(block.parameters) & set(plan.by_function):
            rule = "torch.func, a gradient per example"
        elif set(block.parameters) & set(plan.broadcast):
            rule = "broadcast over the examples, a vector per example"
        elif isinstance(block, MatrixBlock):
            rule = "layer rule, outer products δ aᵀ"
        else:
            rule = "layer rule, a vector per example"
        module = plan.task.model.get_submodule(block.parameters[0].rpartition(".")[0])
        rows.append(
            {
                "parameters": " + ".join(block.parameters),
                "layer": type(module).__name__,
                "shape": block.shape,
                "rule": rule,
            }
        )
    return rows
