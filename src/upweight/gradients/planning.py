"""Which rule gives which parameter's gradient? Assigned by running the model, then checked.

A few examples show which layers run and on which axis each sees the examples. The check: Σᵢ cᵢ gᵢ
with unequal cᵢ, from the factors, must be the gradient that autograd gives for Σᵢ cᵢ ℓᵢ. A
parameter that fails, or whose layer has no rule, is left to `torch.func`, and the plan says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight._typing import Batch
from upweight.errors import UnsupportedModel, message
from upweight.gradients.blocks import Block, MatrixBlock, Plan, Source, VectorBlock
from upweight.gradients.factored import Factors, Rows, Tokens
from upweight.gradients.hooks import Capture
from upweight.gradients.layers import Rule, rule_for
from upweight.gradients.passes import GradientPass
from upweight.task.data import Data
from upweight.task.task import Task

PROBE = 3
"""Examples to plan with: in batches of two sizes, to see their axis; with weights, to check."""


def plan(task: Task, data: Data) -> Plan:
    """Assign every chosen parameter to a block, and check the gradients that come of it.

    Args:
        task: What was trained.
        data: Training data; a few examples of them are run.

    Raises:
        UnsupportedModel: A parameter has neither a layer rule nor a gradient by `torch.func`.

    Cost: a few forward and backward passes over three examples.
    """
    owners, unruled = _owners(task)
    layers = {source.layer for sources in owners.values() for source in sources}
    axes = _axes(task, data, layers)
    notes = [_unruled_note(task.model, name, why) for name, why in unruled.items()]
    for name, sources in list(owners.items()):
        lost = [s.layer for s in sources if s.layer not in axes]
        if lost:
            del owners[name]
            notes.append(_note(name, f"{lost[0]} does not see the examples one by one"))
    made = _planned(task, owners, axes, tuple(notes))
    wrong = _mismatches(made, data)
    if wrong:
        for name in wrong:
            owners.pop(name, None)
            notes.append(_note(name, "its layers' gradients differ from autograd's"))
        made = _planned(task, owners, axes, tuple(notes))
        left = _mismatches(made, data)
        if left:
            raise UnsupportedModel(_unmatched(left))
    return made


def _owners(task: Task) -> tuple[dict[str, tuple[Source, ...]], dict[str, str]]:
    """The layers that use each chosen parameter; and parameters that some use has no rule for."""
    model = task.model
    names = {id(p): name for name, p in model.named_parameters() if name in task.layout.names}
    owners: dict[str, list[Source]] = {}
    unruled: dict[str, str] = {}
    claimed: set[tuple[int, str]] = set()
    for layer, module in model.named_modules():
        rule = rule_for(module)
        roles = rule.parameters(module) if rule else ()
        for role in roles:
            *path, last = role.split(".")
            owner = module.get_submodule(".".join(path))
            claimed.add((id(owner), last))
            name = names.get(id(owner._parameters[last]))
            if name is not None:
                owners.setdefault(name, []).append(Source(layer, role))
    for layer, module in model.named_modules():
        for role, parameter in module._parameters.items():
            if parameter is None or (id(module), role) in claimed or id(parameter) not in names:
                continue
            unruled[names[id(parameter)]] = f"{type(module).__name__} ({layer or 'the model'})"
    kept = {name: tuple(s) for name, s in owners.items() if name not in unruled}
    return _without_double_claims(kept), unruled


def _without_double_claims(
    owners: dict[str, tuple[Source, ...]],
) -> dict[str, tuple[Source, ...]]:
    """A module inside one whose rule speaks for it (attention's out_proj) has no say of its own."""
    spoken = {
        f"{s.layer}.{s.role}".lstrip(".").rpartition(".")[0]
        for sources in owners.values()
        for s in sources
        if "." in s.role
    }
    return {
        name: tuple(s for s in sources if "." in s.role or s.layer not in spoken)
        for name, sources in owners.items()
    }


def _probe(task: Task, data: Data, size: int) -> Batch:
    return task.to_device(data.take([0] * size))


def _axes(task: Task, data: Data, layers: set[str]) -> dict[str, int]:
    """On which axis each layer sees the examples: the one that grows with the batch."""
    shapes: list[dict[str, list[Any]]] = []
    with Capture(task, tuple(layers)) as capture:
        for size in (PROBE - 1, PROBE):
            outputs, targets = capture.forward(_probe(task, data, size))
            seen: dict[str, list[Any]] = {}
            for call in capture.backward(task.loss(outputs, targets)):
                inputs = [x.shape for x in (*call.args, *call.kwargs.values()) if _is_input(x)]
                seen.setdefault(call.layer, []).append((call.delta.shape, inputs[:1]))
            shapes.append(seen)
    axes = {}
    for layer in layers:
        small, large = shapes[0].get(layer, []), shapes[1].get(layer, [])
        found = {
            _axis(s, b)
            for (s_out, s_in), (b_out, b_in) in zip(small, large, strict=False)
            for s, b in ((s_out, b_out), *zip(s_in, b_in, strict=False))
        }
        axis = found.pop() if len(small) == len(large) and len(found) == 1 else None
        if axis is not None:
            axes[layer] = axis
    return axes


def _is_input(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0


def _axis(small: torch.Size, large: torch.Size) -> int | None:
    if len(small) != len(large):
        return None
    grown = [k for k, (s, b) in enumerate(zip(small, large, strict=True)) if s != b]
    if len(grown) != 1:
        return None
    k = grown[0]
    proportional = small[k] * PROBE == large[k] * (PROBE - 1)
    if k == 0 and proportional:
        return 0
    return 1 if k == 1 and small[k] == PROBE - 1 and large[k] == PROBE else None


def _planned(
    task: Task,
    owners: Mapping[str, tuple[Source, ...]],
    axes: Mapping[str, int],
    notes: tuple[str, ...],
) -> Plan:
    """Blocks for the parameters whose layers have rules, and for the rest."""
    layout = task.layout
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    rules = {
        s.layer: rule_for(task.model.get_submodule(s.layer)) for o in owners.values() for s in o
    }
    biases = _joined_biases(owners, rules)
    blocks: list[Block] = []
    sources: dict[str, tuple[Source, ...]] = {}
    vectors: dict[tuple[str, ...], list[str]] = {}
    for name in layout.names:
        if name in biases.values():
            continue
        where = owners.get(name)
        if where is not None and len(shapes[name]) > 1 and _has_matrix(task.model, where):
            made, of = _matrix_blocks(task.model, name, biases.get(name), shapes[name], where)
            blocks.extend(made)
            sources.update(of)
        else:
            # The gains and biases of one layer are taken together.
            key = (name,) if where is None else tuple(s.layer for s in where)
            vectors.setdefault(key, []).append(name)
            if where is not None:
                sources[name] = where
    for members in vectors.values():
        size = sum(layout.slices[k].stop - layout.slices[k].start for k in members)
        blocks.append(VectorBlock(tuple(members), (size,)))
    order = {name: k for k, name in enumerate(layout.names)}
    blocks.sort(key=lambda block: order[block.parameters[0]])
    return Plan(
        task,
        tuple(blocks),
        {layer: axis for layer, axis in axes.items() if layer in rules},
        sources,
        tuple(name for name in layout.names if name not in owners),
        notes,
    )


def _joined_biases(
    owners: Mapping[str, tuple[Source, ...]], rules: Mapping[str, Rule | None]
) -> dict[str, str]:
    """Weights whose bias is used exactly where the weight is, and may be its last column."""
    where = {sources: name for name, sources in owners.items()}
    joined = {}
    for name, sources in owners.items():
        partners = [
            Source(s.layer, rule.joined[s.role])
            for s in sources
            if (rule := rules[s.layer]) is not None and s.role in rule.joined
        ]
        bias = where.get(tuple(partners)) if len(partners) == len(sources) else None
        if bias is not None:
            joined[name] = bias
    return joined


def _has_matrix(model: nn.Module, sources: Sequence[Source]) -> bool:
    """Whether the rules give outer products for this parameter: not for a norm's gain."""
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    return not any(isinstance(model.get_submodule(s.layer), norms) for s in sources)


def _matrix_blocks(
    model: nn.Module,
    name: str,
    bias: str | None,
    shape: tuple[int, ...],
    where: tuple[Source, ...],
) -> tuple[list[Block], dict[str, tuple[Source, ...]]]:
    """A block for a weight, or one for each group of a convolution."""
    groups = getattr(model.get_submodule(where[0].layer), "groups", 1)
    outputs, inputs = shape[0], 1
    for extent in shape[1:]:
        inputs *= extent
    width = inputs + (bias is not None)
    if groups == 1:
        return [MatrixBlock(name, name, bias, (outputs, width), (0, outputs))], {name: where}
    size = outputs // groups
    blocks: list[Block] = []
    sources = {}
    for k in range(groups):
        rows = (k * size, (k + 1) * size)
        made = MatrixBlock(f"{name}[{rows[0]}:{rows[1]}]", name, bias, (size, width), rows)
        blocks.append(made)
        sources[made.name] = tuple(Source(s.layer, f"{s.role}[{k}]") for s in where)
    return blocks, sources


def _mismatches(made: Plan, data: Data) -> list[str]:
    """Parameters whose Σᵢ cᵢ gᵢ is not what autograd gives for Σᵢ cᵢ ℓᵢ."""
    task = made.task
    size = min(PROBE, len(data))
    batch = task.to_device(data.take(list(range(size))))
    weights = torch.tensor([1.0, -0.5, 2.25], device=task.layout.device)[:size]
    params = {k: v.clone().requires_grad_() for k, v in task.named(task.theta()).items()}
    with torch.enable_grad():
        losses = task.loss(*task.call(params, batch))
        truth = torch.autograd.grad(losses, list(params.values()), weights.to(losses))
    with GradientPass(made) as gradients:
        factors = gradients.of(lambda p, b: task.loss(*task.call(p, b)), batch)
    flat = torch.cat([g.flatten() for g in truth]).to(made.dtype)
    # Both round as the layers do; a wrong axis or order is off by far more than this.
    slack = torch.finfo(min((losses.dtype, task.layout.dtype), key=lambda d: d.itemsize)).eps ** 0.5
    scale = float(flat.norm())
    wrong = []
    for block, part in zip(made.blocks, factors, strict=True):
        expected = flat[block.index(task.layout).to(flat.device)]
        c = weights.to(made.dtype)
        scaled: Factors = (
            Tokens(part.left * c[:, None, None], part.right)
            if isinstance(part, Tokens)
            else Rows(part.values * c[:, None])
        )
        error = float((scaled.total().flatten() - expected).norm())
        if not error <= slack * (float(expected.norm()) + slack * scale):
            wrong += [k for k in block.parameters if k not in made.by_function]
    return wrong


def _note(name: str, why: str) -> str:
    return f"{name}: per-example gradients by torch.func, because {why}"


def _unruled_note(model: nn.Module, name: str, where: str) -> str:
    return _note(name, f"{where} has no layer rule for it")


def _unmatched(names: Sequence[str]) -> str:
    return message(
        "Per-example gradients must add up to the gradient of the total.",
        f"gradients of {', '.join(names[:5])} that do not.",
        "a model whose examples depend on each other, or that answers differently each time.",
        'call model.eval(), or leave these parameters out with Task(params="pattern").',
    )
