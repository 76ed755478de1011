"""Which rule gives each layer's gradients: a `Plan` in words."""

from dataclasses import dataclass

from upweight.gradients.blocks import Block, MatrixBlock, Plan


@dataclass(frozen=True)
class LayerUse:
    """How the gradients of some parameters are obtained.

    Args:
        parameters: Their names.
        layer: The type of the layer.
        shape: Of the block that they make.
        rule: In words.
    """

    parameters: str
    layer: str
    shape: tuple[int, ...]
    rule: str


def layer_uses(plan: Plan) -> list[LayerUse]:
    """A row for each block of a plan."""
    return [
        LayerUse(" + ".join(block.parameters), _layer(plan, block), block.shape, _rule(plan, block))
        for block in plan.blocks
    ]


def _layer(plan: Plan, block: Block) -> str:
    module = block.parameters[0].rpartition(".")[0]
    return type(plan.task.model.get_submodule(module)).__name__


def _rule(plan: Plan, block: Block) -> str:
    if set(block.parameters) & set(plan.by_function):
        return "torch.func, a gradient per example"
    if isinstance(block, MatrixBlock):
        return "layer rule, outer products δ aᵀ"
    return "layer rule, a vector per example"
