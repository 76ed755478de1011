"""One rule per layer type: from what a layer saw to the gradients of its parameters.

    Linear          g_W = Σ_t δ_t ⊗ a_t                      g_b = Σ_t δ_t
    Conv            the same, a_t the patch under output position t
    ConvTranspose   g_W = Σ_t a_t ⊗ (patch of δ over input position t)
    Embedding       g_W = Σ_t e(token_t) ⊗ δ_t
    *Norm           g_γ = Σ_t δ_t ∘ x̂_t                      g_β = Σ_t δ_t
    attention       its projections, each as a Linear
    experts         each as a Linear of the tokens that are routed to it
    x W             of a parameter outside of any layer, or a stack of them: each as a Linear
    any other       of one input and without parts: vmap(grad) of ⟨δ, layer(a)⟩, the layer alone

A rule says which parameters of its module it accounts for. Parameters of modules that have layers
inside of them, of layers of several inputs, and parameters from which a module computes its weight
are found where they meet the examples (`broadcast.py`), or else (weight norm) left to `torch.func`
on the whole model. A new layer type is one function here and
one line in `RULES`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from upweight.gradients.convolved import Convolved, Window
from upweight.gradients.factored import (
    Factors,
    Lookups,
    Rows,
    Summed,
    Tokens,
    any_nonzero,
)
from upweight.gradients.hooks import Call
from upweight.task.lent import with_backward_pass
from upweight.task.sharded import kind_of

PRODUCT = "product"
"""What a parameter is in a product of its own; `product[k]` for part k of a stack."""

Contributions = Mapping[str, Factors]
"""Gradients by the parameter's name within its module; `weight[k]` for group k of a convolution."""


@dataclass(frozen=True)
class Examples:
    """Where the examples of a batch lie in what a layer sees.

    Args:
        size: b.
        axis: Their axis, 0 or 1. On axis 0 each may take several consecutive places (`[b·t, i]`).
        dtype: What factors are formed in: at least float32, whatever the layer computes in.
    """

    size: int
    axis: int
    dtype: torch.dtype

    def first(self, x: Tensor) -> Tensor:
        """Examples on axis 0."""
        return x if self.axis == 0 else x.movedim(1, 0)

    def tokens(self, x: Tensor) -> Tensor:
        """`[b, t, i]`: features last, everything between the examples and them on one axis."""
        return self.first(x).reshape(self.size, -1, x.shape[-1]).to(self.dtype)

    def apart(self, x: Tensor) -> Tensor:
        """`[b, ...]`, each entry laid out as the layer takes it."""
        if self.axis == 1:
            return x.movedim(1, 0).unsqueeze(2)
        return x.reshape(self.size, -1, *x.shape[1:])

    def channels(self, x: Tensor) -> Tensor:
        """`[b, t, i]` from `[b, i, ...]`: channels second, positions after them."""
        flat = x.reshape(len(x), x.shape[1], -1).mT
        return flat.reshape(self.size, -1, x.shape[1]).to(self.dtype)


@dataclass(frozen=True)
class Rule:
    """How one layer type gives its gradients.

    Args:
        parameters: The names that the rule accounts for, in a given module; none: no rule for it.
        gradients: Module, call and where its examples lie, to contributions.
        joined: Weights whose bias is one more column, g_b = Σ_t left_t: weight to bias.
        has_factors: Whether weights get `Tokens`, or `Rows` like biases.
        has_one_input: Whether it takes calls with one tensor only.
        is_transposed: Whether weights are kept as [i, o]; factors are those of [o, i].
        is_stacked: Whether weights are [k, o, i] (or [k, i, o]): `weight[j]` for each of k.
        reads: Whether the values of the module's parameters are read.
    """

    parameters: Callable[[Any], tuple[str, ...]]
    gradients: Callable[[Any, Call, Examples], Contributions]
    joined: Mapping[str, str] = field(default_factory=dict)
    has_factors: bool = True
    has_one_input: bool = False
    is_transposed: bool = False
    is_stacked: bool = False
    reads: bool = False


def _own(*names: str) -> Callable[[nn.Module], tuple[str, ...]]:
    """Those of the names that are parameters of the module itself, not computed from others."""

    def parameters(module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in names if module._parameters.get(name) is not None)

    return parameters


# -- linear and embedding -------------------------------------------------------------------------


def _linear(module: nn.Module, call: Call, examples: Examples) -> Contributions:
    left = examples.tokens(call.delta)
    right = call.once("tokens", lambda: examples.tokens(_input(call)))
    return {"weight": Tokens(left, right), "bias": Summed(left)}


def _embedding_parameters(module: nn.Embedding) -> tuple[str, ...]:
    # scale_grad_by_freq couples the examples of a batch, max_norm rewrites the weight in forward.
    rewritten = module.scale_grad_by_freq or module.max_norm is not None
    return () if rewritten else _own("weight")(module)


def _embedding(module: nn.Embedding, call: Call, examples: Examples) -> Contributions:
    delta = examples.tokens(call.delta)
    index = examples.first(_input(call)).reshape(examples.size, -1)
    if module.padding_idx is not None:
        delta = delta * (index != module.padding_idx)[..., None]
    return {"weight": Lookups(index.long(), module.num_embeddings, delta)}


# -- convolutions ---------------------------------------------------------------------------------


def _conv(module: Any, call: Call, examples: Examples) -> Contributions:
    def inputs() -> Tensor:
        x = _padded(module, _input(call)).to(examples.dtype)
        return x.reshape(examples.size, -1, *x.shape[1:])

    left = examples.channels(call.delta)
    window = Window(module.kernel_size, module.stride, module.dilation)
    convolved = Convolved(left, call.once("inputs", inputs), window)
    if module.groups == 1:
        return {"weight": convolved, "bias": Summed(left)}
    right = call.once("patches", lambda: convolved.right)
    return {**_groups(left, right, module.groups), "bias": Summed(left)}


def _padded(module: Any, x: Tensor) -> Tensor:
    """The input with the module's own padding around it."""
    if module.padding_mode != "zeros":
        return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    if module.padding == "valid":
        return x
    if module.padding == "same":
        return F.pad(x, module._reversed_padding_repeated_twice)
    return F.pad(x, [side for p in reversed(module.padding) for side in (p, p)])


def _conv_transpose(module: Any, call: Call, examples: Examples) -> Contributions:
    # The adjoint of a convolution: δ takes the place of its input, x that of its output.
    delta = F.pad(call.delta, [side for p in reversed(module.padding) for side in (p, p)])
    right = Window(module.kernel_size, module.stride, module.dilation).patches(delta)
    x = _input(call)
    # output_padding adds rows that no kernel reaches from a further input position.
    positions = math.prod(x.shape[2:])
    if right.shape[1] != positions:
        right = _first_positions(right, delta, module, x)
    right = right.reshape(examples.size, -1, right.shape[-1]).to(examples.dtype)
    # δ is on the right here: what it has none of is told on the left.
    left = examples.channels(x) * any_nonzero(right)[..., None]
    bias = Rows(examples.channels(call.delta).sum(dim=1))
    return {**_groups(left, right, module.groups), "bias": bias}


def _first_positions(right: Tensor, delta: Tensor, module: Any, x: Tensor) -> Tensor:
    """The patches of the input's own positions, where output padding leaves room for more."""
    counts = [
        (size - step * (k - 1) - 1) // s + 1
        for size, k, s, step in zip(
            delta.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    ]
    grid = right.reshape(len(right), *counts, right.shape[-1])
    inside = tuple(slice(size) for size in x.shape[2:])
    return grid[(slice(None), *inside)].reshape(len(right), -1, right.shape[-1])


def _groups(left: Tensor, right: Tensor, groups: int) -> dict[str, Factors]:
    """One block per group of channels: each output sees only its own group's inputs."""
    if groups == 1:
        return {"weight": Tokens(left, right)}
    lefts, rights = left.chunk(groups, dim=2), right.chunk(groups, dim=2)
    return {
        f"weight[{k}]": Tokens(left, right)
        for k, (left, right) in enumerate(zip(lefts, rights, strict=True))
    }


# -- normalization --------------------------------------------------------------------------------


def _layer_norm(module: Any, call: Call, examples: Examples) -> Contributions:
    x = _input(call)
    if isinstance(module, nn.LayerNorm):
        normal = F.layer_norm(x.to(examples.dtype), module.normalized_shape, None, None, module.eps)
    else:  # in its own dtype, on which a default eps depends
        normal = F.rms_norm(x, module.normalized_shape, None, module.eps)
    features = len(module.normalized_shape)
    delta = examples.tokens(call.delta.flatten(-features))
    scaled = delta * examples.tokens(normal.flatten(-features))
    return {"weight": Rows(scaled.sum(dim=1)), "bias": Rows(delta.sum(dim=1))}


def _channel_norm(module: Any, call: Call, examples: Examples) -> Contributions:
    """GroupNorm, BatchNorm and InstanceNorm: a gain per channel, on axis 1."""
    x = _input(call).to(examples.dtype)
    if isinstance(module, nn.GroupNorm):
        normal = F.group_norm(x, module.num_groups, None, None, module.eps)
    elif isinstance(module, _InstanceNorm) and (module.training or module.running_mean is None):
        normal = F.instance_norm(x, eps=module.eps)
    else:
        mean, variance = module.running_mean.to(x), module.running_var.to(x)
        normal = F.batch_norm(x, mean, variance, eps=module.eps)
    delta = examples.channels(call.delta)
    scaled = delta * examples.channels(normal)
    return {"weight": Rows(scaled.sum(dim=1)), "bias": Rows(delta.sum(dim=1))}


def _fixed_statistics(module: Any) -> tuple[str, ...]:
    # Without running statistics the examples of a batch depend on each other.
    return _own("weight", "bias")(module) if module.track_running_stats else ()


# -- attention ------------------------------------------------------------------------------------


def _attention_parameters(module: nn.MultiheadAttention) -> tuple[str, ...]:
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return ()
    own = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
    out = tuple(f"out_proj.{name}" for name in _own("weight", "bias")(module.out_proj))
    return (*_own(*own)(module), *out)


def _attention(module: nn.MultiheadAttention, call: Call, examples: Examples) -> Contributions:
    """The module holds its projections as bare parameters, so the step between them runs again."""
    given = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments

    def cast(x: Tensor) -> Tensor:
        return x.detach().to(examples.dtype) if x.is_floating_point() else x

    # In the dtype of the factors throughout: under autocast the inputs may come in another dtype
    # than the weights, and δ in a third.
    inputs = [given[name] for name in ("query", "key", "value")]
    is_self = all(_same(inputs[0], x) for x in inputs[1:])
    given = {k: cast(x) if isinstance(x, Tensor) else x for k, x in given.items()}
    sources = [given[name] for name in ("query", "key", "value")]
    if module.in_proj_weight is not None:
        weights = cast(module.in_proj_weight).chunk(3)
    else:
        weights = tuple(
            cast(w) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        )
    bias = module.in_proj_bias
    biases = (None,) * 3 if bias is None else cast(bias).chunk(3)
    with torch.enable_grad():
        projected = [
            F.linear(x, w, b).requires_grad_()
            for x, w, b in zip(sources, weights, biases, strict=True)
        ]
        context = _context(module, projected, given)
    deltas = torch.autograd.grad(
        context, projected, cast(call.delta) @ cast(module.out_proj.weight)
    )
    left, delta = [examples.tokens(d) for d in deltas], examples.tokens(call.delta)
    right = [examples.tokens(x) for x in sources]
    in_bias = torch.cat([x.sum(dim=1) for x in left], dim=-1)
    contributions: dict[str, Factors] = {
        "in_proj_bias": Rows(in_bias),
        "out_proj.weight": Tokens(delta, examples.tokens(context.detach())),
        "out_proj.bias": Rows(delta.sum(dim=1)),
    }
    if module.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return contributions | {
            name: Tokens(x, a) for name, x, a in zip(names, left, right, strict=True)
        }
    if is_self:
        packed = Tokens(torch.cat(left, dim=-1), right[0])
    else:
        width = left[0].shape[-1]
        padded = [F.pad(x, (k * width, (2 - k) * width)) for k, x in enumerate(left)]
        packed = Tokens(torch.cat(padded, dim=1), torch.cat(right, dim=1))
    return contributions | {"in_proj_weight": packed}


def _context(
    module: nn.MultiheadAttention, projected: list[Tensor], given: Mapping[str, Any]
) -> Tensor:
    """softmax(QKᵀ/√d) V for projected queries, keys and values, heads side by side."""
    heads_last = [x.movedim(1, 0) if module.batch_first else x for x in projected]
    eye = torch.eye(module.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
    context, _ = F.multi_head_attention_forward(
        heads_last[0],
        heads_last[1],
        heads_last[2],
        module.embed_dim,
        module.num_heads,
        in_proj_weight=None,
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=eye,
        out_proj_bias=None,
        training=False,
        key_padding_mask=given.get("key_padding_mask"),
        need_weights=False,
        attn_mask=given.get("attn_mask"),
        use_separate_proj_weight=True,
        q_proj_weight=eye,
        k_proj_weight=eye,
        v_proj_weight=eye,
        is_causal=given.get("is_causal", False),
    )
    return context.movedim(1, 0) if module.batch_first else context


def _same(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


# -- experts --------------------------------------------------------------------------------------


def _expert_parameters(module: nn.Module) -> tuple[str, ...]:
    return _own(*(f"{name}{end}" for name in _EXPERT_MAPS for end in ("", "_bias")))(module)


_EXPERT_MAPS = ("gate_up_proj", "up_proj", "down_proj")


def _is_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer as [E, …], as those of transformers do."""
    said = ("num_experts", "has_gate", "has_bias", "is_transposed")
    return (
        all(hasattr(module, name) for name in said)
        and not getattr(module, "has_post_expert_norm", False)
        and all(name in _expert_parameters(module) for name in module._parameters)
        and "down_proj" in module._parameters
    )


def _experts(module: Any, call: Call, examples: Examples) -> Contributions:
    """Each expert's tokens, by example; y = Σ_k w_k D(gate(U x)) over the k experts of a token.

    The step between the two maps runs again, as δ is of the sum over experts only.
    """
    given = (*call.args, *call.kwargs.values())
    x, chosen, weights = (each.reshape(-1, each.shape[-1]) for each in given[:3])
    x, weights, delta = (each.to(examples.dtype) for each in (x, weights, call.delta))
    delta = delta.reshape(len(x), -1)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    per_example = len(x) // examples.size
    found: dict[str, Factors] = {}
    biases: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for k in range(module.num_experts):
        is_chosen = chosen == k
        (rows,) = torch.where(is_chosen.any(dim=1))
        if len(rows) == 0:
            continue
        up, up_bias = _expert_map(module, first, k, examples.dtype)
        down, _ = _expert_map(module, "down_proj", k, examples.dtype)
        with torch.enable_grad():
            hidden = F.linear(x[rows], up, up_bias).requires_grad_()
            inner = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        outer = delta[rows] * (weights * is_chosen)[rows].sum(dim=1, keepdim=True)
        (back,) = torch.autograd.grad(inner, hidden, outer @ down)
        places = places_of(rows // per_example, examples.size)
        for name, left, right in ((first, back, x[rows]), ("down_proj", outer, inner.detach())):
            found[f"{name}[{k}]"] = Tokens(*(_tokens_at(y, places) for y in (left, right)))
            biases.setdefault(f"{name}_bias", []).append((rows, torch.full_like(rows, k), left))
    if module.has_bias:
        for name, parts in biases.items():
            rows, index, left = (torch.cat(each) for each in zip(*parts, strict=True))
            places = places_of(rows // per_example, examples.size)
            at = _tokens_at(index[:, None], places)[..., 0]
            found[name] = Lookups(at, module.num_experts, _tokens_at(left, places))
    return found


def _expert_map(module: Any, name: str, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """An expert's [o, i] and its bias."""
    weight = getattr(module, name)[k].detach().to(dtype)
    bias = getattr(module, f"{name}_bias")[k].detach().to(dtype) if module.has_bias else None
    return (weight.mT if module.is_transposed else weight), bias


Places = tuple[Tensor, int, int]
"""Where each row goes, among b·m places, m of each example; b; m."""


def places_of(example: Tensor, size: int) -> Places:
    """Rows of an example next to each other: as many places as the example with the most has."""
    order = example.argsort(stable=True)
    counts = torch.bincount(example, minlength=size)
    before = counts.cumsum(0) - counts
    rank = torch.empty_like(example)
    rank[order] = torch.arange(len(example), device=example.device)
    most = max(1, int(counts.max()))
    return example * most + rank - before[example], size, most


def placed(x: Tensor, places: Places) -> Tensor:
    """`[b·m, ...]`, 0 where an example has fewer."""
    where, size, most = places
    out = x.new_zeros(size * most, *x.shape[1:])
    out[where] = x
    return out


def _tokens_at(x: Tensor, places: Places) -> Tensor:
    return placed(x, places).reshape(places[1], places[2], -1)


# -- products with a parameter itself -------------------------------------------------------------


def _product(_: nn.Module | None, call: Call, examples: Examples) -> Contributions:
    return {PRODUCT: Tokens(examples.tokens(call.delta), examples.tokens(_input(call)))}


def _stacked_product(_: nn.Module | None, call: Call, examples: Examples) -> Contributions:
    """`[N, k, i]` and `[N, k, o]`: a product for each of k."""

    def by_part(x: Tensor) -> Tensor:
        parts = examples.first(x).reshape(examples.size, -1, *x.shape[-2:])
        return parts.movedim(2, 0).to(examples.dtype).contiguous()

    right = call.once("parts", lambda: by_part(_input(call)))
    # What is not routed to an expert comes to it as zeros: it is none of its positions.
    left = by_part(call.delta) * (right != 0).any(dim=-1, keepdim=True)
    return {f"{PRODUCT}[{k}]": Tokens(left[k], right[k]) for k in range(len(right))}


# -- any other layer ---------------------------------------------------------------------------


def _direct_parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, p in module._parameters.items() if p is not None)


def _itself(module: nn.Module, call: Call, examples: Examples) -> Contributions:
    """The layer's own formula, differentiated for each example by itself."""
    params = {k: p.detach() for k, p in module._parameters.items() if p is not None}
    buffers = {f"layer.{name}": b.detach().clone() for name, b in module.named_buffers()}
    like = next(iter(params.values()))
    leaves, structure = tree_flatten((call.args, call.kwargs))
    (place,) = (k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    x = leaves[place]

    def value(params: Mapping[str, Tensor], x: Tensor, delta: Tensor) -> Tensor:
        args, kwargs = tree_unflatten([*leaves[:place], x, *leaves[place + 1 :]], structure)
        named = {f"layer.{name}": p for name, p in params.items()}
        output = torch.func.functional_call(_Bare(module), {**named, **buffers}, args, kwargs)
        tensor = output if isinstance(output, Tensor) else output[0]
        return (tensor * delta).sum()

    xs = examples.apart(x.to(like.dtype) if x.is_floating_point() else x)
    deltas = examples.apart(call.delta)
    with with_backward_pass(module):
        try:
            found = torch.func.vmap(torch.func.grad(value), (None, 0, 0))(params, xs, deltas)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # no batching rule
            found = _one_by_one(value, params, xs, deltas)
    return {
        name: Rows(g.reshape(examples.size, -1).to(examples.dtype)) for name, g in found.items()
    }


def _one_by_one(
    value: Callable[..., Tensor], params: Mapping[str, Tensor], xs: Tensor, deltas: Tensor
) -> dict[str, Tensor]:
    rows = []
    for x, delta in zip(xs, deltas, strict=True):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            total = value(leaves, x, delta)
        rows.append(torch.autograd.grad(total, list(leaves.values()), materialize_grads=True))
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(params)}


class _Bare(nn.Module):
    """A layer without its hooks: its input has been through them, and δ is of what comes before."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


# -- the table ------------------------------------------------------------------------------------


def _input(call: Call) -> Tensor:
    """A layer's one input, however it was passed."""
    return call.args[0] if call.args else next(iter(call.kwargs.values()))


_LINEAR = Rule(_own("weight", "bias"), _linear, {"weight": "bias"})
_CONV = Rule(_own("weight", "bias"), _conv, {"weight": "bias"})
_CONV_TRANSPOSE = Rule(_own("weight", "bias"), _conv_transpose)
_LAYER_NORM = Rule(_own("weight", "bias"), _layer_norm, has_factors=False)
_RUNNING_NORM = Rule(_fixed_statistics, _channel_norm, has_factors=False)
_CHANNEL_NORM = Rule(_own("weight", "bias"), _channel_norm, has_factors=False)
_PRODUCT = Rule(lambda _: (), _product)
_STACKED_PRODUCT = Rule(lambda _: (), _stacked_product, is_stacked=True)
_ANY_OTHER = Rule(_direct_parameters, _itself, has_factors=False, has_one_input=True, reads=True)

RULES: Mapping[type[nn.Module], Rule] = {
    nn.Linear: _LINEAR,
    nn.Embedding: Rule(_embedding_parameters, _embedding),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.ConvTranspose3d: _CONV_TRANSPOSE,
    nn.LayerNorm: _LAYER_NORM,
    nn.RMSNorm: _LAYER_NORM,
    nn.GroupNorm: _CHANNEL_NORM,
    _InstanceNorm: _CHANNEL_NORM,
    _BatchNorm: _RUNNING_NORM,
    nn.MultiheadAttention: Rule(
        _attention_parameters,
        _attention,
        {"in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias"},
        reads=True,
    ),
}

# Of transformers, which is not imported: GPT-2 has y = x W + b with W [i, o].
_BY_NAME = {
    "transformers.pytorch_utils.Conv1D": dataclasses.replace(_LINEAR, is_transposed=True),
}


_EXPERTS = Rule(_expert_parameters, _experts, is_stacked=True, reads=True)


def rule_at(model: nn.Module, layer: str, products: Mapping[str, bool]) -> Rule | None:
    """The rule of what is watched under a name: a layer, or a parameter in products of its own."""
    if layer not in products:
        return rule_for(model.get_submodule(layer))
    stacked = dict(model.named_parameters())[layer].ndim == 3
    return dataclasses.replace(
        _STACKED_PRODUCT if stacked else _PRODUCT, is_transposed=products[layer]
    )


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a layer, or None where there is none."""
    if _is_experts(module):
        return dataclasses.replace(_EXPERTS, is_transposed=bool(module.is_transposed))
    kind = kind_of(module)
    named = _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    if named is not None:
        return named
    for known, rule in RULES.items():
        if known is nn.Embedding and isinstance(module, nn.Embedding):
            return rule  # whatever it does besides looking up, see `hooks.py`
        same = kind.forward is known.forward or kind is known
        if isinstance(module, known) and (same or isinstance(module, _BatchNorm | _InstanceNorm)):
            return rule
    # A recurrent layer keeps its parameters in a second list, and returns more than one thing.
    if isinstance(module, nn.RNNBase) or any(True for _ in module.children()):
        return None
    return _ANY_OTHER if _direct_parameters(module) else None
