"""Small models for the layer rules: one layer, one use, or one way of calling a model each.

Not part of the problem market, which every other test runs over. Models are neither trained nor at
a minimum.
"""

import fnmatch
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import upweight as uw
from tests.market import draw, initialized, labels
from upweight.gradients.factored import Tokens
from upweight.gradients.passes import GradientPass
from upweight.gradients.planning import plan
from upweight.task.batches import leaves
from upweight.task.data import as_data


@dataclass(frozen=True, eq=False)
class Case:
    """A task with data, and what is expected of its plan.

    Args:
        by_function: The parameters left to `torch.func`, or to loops.
        has_vmap: Whether `torch.func.vmap` can run the model.
        repeated: Layers without an axis for the examples.
    """

    name: str
    task: uw.Task
    data: object
    by_function: frozenset[str]
    has_vmap: bool
    repeated: frozenset[str]


BUILDERS = {}


def case_named(name, by_function=(), has_vmap=True, repeated=()):
    """Register a case; `by_function` are globs."""

    def register(build):
        assert name not in BUILDERS
        BUILDERS[name] = (build, by_function, has_vmap, repeated)
        return build

    return register


@functools.cache
def case(name):
    """The case of that name."""
    build, patterns, has_vmap, repeated = BUILDERS[name]
    task, data = build(torch.Generator().manual_seed(len(name) + ord(name[0])))
    task.model.eval()
    left = [n for n in task.layout.names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    return Case(name, task, as_data(data), frozenset(left), has_vmap, frozenset(repeated))


@functools.cache
def planned(name):
    """How the gradients of the case of that name are obtained."""
    return plan(case(name).task, case(name).task.theta(), case(name).data)


def rows(made, factors):
    """Factors as rows [b, p] in the order of θ."""
    out = torch.full((len(factors[0]), made.task.layout.size), torch.nan, dtype=made.dtype)
    for block, part in zip(made.blocks, factors, strict=True):
        full = part.matrices() if isinstance(part, Tokens) else part.values
        out[:, block.index(made.task.layout)] = full.flatten(1)
    return out


def gradient_rows(made, batch, function=None, theta=None):
    """∇θ of each example's loss (or of another function) as rows [b, p], at θ̂ or another θ."""
    with GradientPass(made, made.task.theta() if theta is None else theta) as gradients:
        size = len(leaves(batch)[0])
        return rows(made, gradients.of(function or made.task.losses, batch, size))


# -- one layer in a sequence -----------------------------------------------------------------------

IMAGES, GRID, TOKENS = (5, 2, 6, 7), (5, 4, 7, 7), "tokens"

SEQUENCES = {
    "linear": (lambda: [nn.Linear(3, 4)], (5, 3)),
    "linear_without_bias": (lambda: [nn.Linear(3, 4, bias=False)], (5, 3)),
    "linear_over_positions": (lambda: [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)], (5, 4, 3)),
    "linear_over_two_axes": (lambda: [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)], (4, 2, 3, 3)),
    "linear_in_place_activation": (
        lambda: [nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)],
        (5, 3),
    ),
    "conv1d": (lambda: [nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2)], (5, 2, 9)),
    "conv2d_stride": (
        lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2)), nn.ReLU(inplace=True)],
        IMAGES,
    ),
    "conv2d_reflect": (
        lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), padding_mode="reflect")],
        IMAGES,
    ),
    "conv2d_replicate": (
        lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), padding_mode="replicate")],
        IMAGES,
    ),
    "conv2d_circular": (
        lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), padding_mode="circular")],
        IMAGES,
    ),
    "conv2d_valid": (lambda: [nn.Conv2d(2, 4, 3, padding="valid", bias=False)], IMAGES),
    "conv2d_same": (lambda: [nn.Conv2d(2, 4, (3, 4), padding="same", dilation=(1, 2))], IMAGES),
    "conv2d_same_circular": (
        lambda: [nn.Conv2d(2, 4, (3, 2), padding="same", padding_mode="circular")],
        IMAGES,
    ),
    "conv2d_groups": (lambda: [nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False)], GRID),
    "conv2d_groups_bias": (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.Tanh()], GRID),
    "conv2d_depthwise": (lambda: [nn.Conv2d(4, 4, 3, groups=4)], GRID),
    "conv2d_depthwise_multiplied": (lambda: [nn.Conv2d(4, 8, 3, groups=4)], GRID),
    "conv3d": (lambda: [nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=1)], (4, 2, 3, 4, 3)),
    "conv_transpose1d": (
        lambda: [nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1)],
        (4, 2, 4),
    ),
    "conv_transpose2d": (
        lambda: [nn.ConvTranspose2d(2, 3, (2, 3), (3, 2), padding=(0, 1), output_padding=(2, 0))],
        (4, 2, 3, 4),
    ),
    "conv_transpose2d_groups": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2)],
        (4, 4, 3, 4),
    ),
    "conv_transpose3d": (lambda: [nn.ConvTranspose3d(2, 2, 2, stride=2)], (4, 2, 2, 2, 2)),
    "layer_norm": (lambda: [nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)], (5, 3)),
    "layer_norm_two_axes": (lambda: [nn.LayerNorm((3, 4))], (5, 2, 3, 4)),
    "layer_norm_without_bias": (lambda: [nn.LayerNorm(3, bias=False)], (5, 2, 3)),
    "rms_norm": (lambda: [nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)], (5, 3)),
    "rms_norm_eps": (lambda: [nn.RMSNorm(3, eps=0.1)], (5, 2, 3)),
    "group_norm": (lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)], IMAGES),
    "group_norm_flat": (lambda: [nn.Linear(3, 4), nn.GroupNorm(2, 4)], (5, 3)),
    "instance_norm": (lambda: [nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)], IMAGES),
    "instance_norm_tracking": (
        lambda: [nn.InstanceNorm1d(2, affine=True, track_running_stats=True)],
        (5, 2, 6),
    ),
    "batch_norm": (lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)], IMAGES),
    "batch_norm_positions": (lambda: [nn.BatchNorm1d(2)], (5, 2, 6)),
    "embedding": (lambda: [nn.Embedding(7, 3), nn.Linear(3, 2)], TOKENS),
    "embedding_padding": (lambda: [nn.Embedding(7, 3, padding_idx=0), nn.Linear(3, 2)], TOKENS),
    "weight_norm": (
        lambda: [parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)],
        (5, 3),
        ["0.parametrizations.*"],
    ),
    "spectral_norm": (
        lambda: [parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)],
        (5, 3),
        ["0.parametrizations.*"],
    ),
    "prelu": (lambda: [nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)], (5, 3)),
}


def _sequence(layers, shape):
    def build(g):
        torch.manual_seed(0)  # for the power iteration of spectral norm
        model = initialized(nn.Sequential(*layers(), nn.Flatten()), g).eval()
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.copy_(draw(g, *module.running_mean.shape))
                module.running_var.copy_(draw(g, *module.running_var.shape).abs() + 0.5)
        x = torch.randint(7, (5, 4), generator=g) if shape is TOKENS else draw(g, *shape)
        with torch.no_grad():
            classes = model(x).shape[1]
        return uw.Task(model, uw.CrossEntropy()), (x, labels(g, len(x), classes))

    return build


for _name, (_layers, _shape, *_left) in SEQUENCES.items():
    case_named(_name, *_left)(_sequence(_layers, _shape))


# -- attention -------------------------------------------------------------------------------------


class Attend(nn.Module):
    """[b, t, 4] through one attention layer, averaged over positions.

    Args:
        cross: Keys and values from another map of the inputs, of another length.
        masked: Some keys left out for some examples.
        causal: Each position attends to those before it.
        call: Further arguments of each call.
    """

    def __init__(self, cross=False, masked=False, causal=False, call=None, **options):
        super().__init__()
        self.cross, self.masked, self.causal = cross, masked, causal
        self.call = call or {}
        self.layer = nn.MultiheadAttention(4, 2, **options)
        self.other = nn.Linear(4, options.get("kdim", 4)) if cross else None
        self.value = nn.Linear(4, options["vdim"]) if "vdim" in options else None
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        query = torch.tanh(x)
        key = self.other(x)[:, :-1] if self.cross else query
        value = self.value(x)[:, :-1] if self.value else key
        call = dict(self.call)
        if self.masked:
            hidden = x[:, : key.shape[1], 0] > 0
            call["key_padding_mask"] = hidden & (torch.arange(key.shape[1]) > 0)
        if self.causal:
            call["attn_mask"] = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)
            call["is_causal"] = True
        inputs = (query, key, value)
        if not self.layer.batch_first:
            # One tensor three times stays one: that is how self-attention is recognized.
            moved = {id(z): z.movedim(1, 0) for z in inputs}
            inputs = tuple(moved[id(z)] for z in inputs)
        out, _ = self.layer(*inputs, **call)
        return self.head(out.mean(dim=1 if self.layer.batch_first else 0))


ATTENTION = {
    "self": {"batch_first": True},
    "self_sequence_first": {"batch_first": False},
    "self_masked": {"batch_first": True, "masked": True},
    "self_masked_sequence_first": {"batch_first": False, "masked": True},
    "self_causal": {"batch_first": True, "causal": True, "call": {"need_weights": False}},
    "self_causal_sequence_first": {"batch_first": False, "causal": True},
    "self_without_weights": {"batch_first": True, "call": {"need_weights": False}},
    "self_weights_per_head": {"batch_first": True, "call": {"average_attn_weights": False}},
    "self_without_bias": {"batch_first": True, "bias": False},
    "cross": {"batch_first": True, "cross": True},
    "cross_sequence_first": {"batch_first": False, "cross": True, "masked": True},
    "cross_other_widths": {"batch_first": True, "cross": True, "kdim": 5, "vdim": 3},
    "cross_without_bias": {"batch_first": True, "cross": True, "kdim": 5, "vdim": 5, "bias": False},
}

for _name, _options in ATTENTION.items():

    @case_named(f"attention_{_name}")
    def _(g, options=_options):
        task = uw.Task(initialized(Attend(**options), g), uw.CrossEntropy())
        return task, (draw(g, 5, 4, 4), labels(g, 5, 3))


@case_named("attention_bias_kv", by_function=["layer.*"])
def attention_bias_kv(g):
    model = initialized(Attend(batch_first=True, add_bias_kv=True), g)
    return uw.Task(model, uw.CrossEntropy()), (draw(g, 5, 4, 4), labels(g, 5, 3))


@case_named("attention_zero_attn", by_function=["layer.*"])
def attention_zero_attn(g):
    model = initialized(Attend(batch_first=True, add_zero_attn=True), g)
    return uw.Task(model, uw.CrossEntropy()), (draw(g, 5, 4, 4), labels(g, 5, 3))


@case_named("attention_in_part")
def attention_in_part(g):
    """Only the packed projection and the last bias are θ."""
    model = initialized(Attend(batch_first=True), g)
    params = ("layer.in_proj_weight", "layer.out_proj.bias", "head.*")
    task = uw.Task(model, uw.CrossEntropy(), params=params)
    return task, (draw(g, 5, 4, 4), labels(g, 5, 3))


class Handwritten(nn.Module):
    """Causal self-attention from linear maps, heads and fused kernel as most GPTs write it."""

    def __init__(self, width=4, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (
            z.reshape(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).split(d, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, t, d))


class Decoder(nn.Module):
    """A small GPT: tied head, and positions embedded without a batch axis."""

    def __init__(self, vocabulary=6, width=4, length=5, batched_positions=False):
        super().__init__()
        self.batched_positions = batched_positions
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Handwritten(width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        place = torch.arange(tokens.shape[1])
        if self.batched_positions:
            place = place[None]
        x = self.tokens(tokens) + self.positions(place)
        x = x + self.attention(self.norms[0](x))
        return self.head(x + self.mlp(self.norms[1](x)))


def _padded(g, n, t, vocabulary=6):
    x, y = (torch.randint(vocabulary, (n, t), generator=g) for _ in range(2))
    for i in range(n):
        y[i, t - i % (t + 1) :] = -100
    return x, y


@case_named("decoder", repeated=["positions"])
def decoder(g):
    return uw.Task(initialized(Decoder(), g), uw.CrossEntropy()), _padded(g, 7, 5)


@case_named("decoder_positions_of_one_row", repeated=["positions"])
def decoder_positions_of_one_row(g):
    model = initialized(Decoder(batched_positions=True), g)
    return uw.Task(model, uw.CrossEntropy()), _padded(g, 7, 5)


class Encoder(nn.Module):
    """PyTorch's own encoder over [b, t, 4]."""

    def __init__(self, batch_first, masked=False, nested=False, norm_first=False):
        super().__init__()
        self.masked = masked
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.batch_first = batch_first
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        mask = None
        if self.masked:
            mask = (x[..., 0] > 0) & (torch.arange(x.shape[1]) > 0)
        if not self.batch_first:
            x = x.movedim(1, 0)
        hidden = self.encoder(x, src_key_padding_mask=mask)
        if not self.batch_first:
            hidden = hidden.movedim(1, 0)
        if mask is not None:
            hidden = torch.where(mask[..., None], 0.0, hidden)
        return self.head(hidden.mean(dim=1))


ENCODERS = {
    "encoder": {"batch_first": True},
    "encoder_sequence_first": {"batch_first": False},
    "encoder_norm_first": {"batch_first": True, "norm_first": True},
    "encoder_masked": {"batch_first": True, "masked": True},
    # PyTorch packs padded sequences into nested tensors where nothing seems to need gradients.
    "encoder_masked_nested": {"batch_first": True, "masked": True, "nested": True},
}

for _name, _options in ENCODERS.items():

    @case_named(_name, has_vmap="nested" not in _options)
    def _(g, options=_options):
        task = uw.Task(initialized(Encoder(**options), g), uw.CrossEntropy())
        # As many examples as positions: their axes cannot be told apart by size.
        return task, (draw(g, 5, 5, 4), labels(g, 5, 3))


class Translator(nn.Module):
    """PyTorch's own decoder layer: attention to itself and to a memory."""

    def __init__(self, batch_first):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 8, batch_first=batch_first)
        self.memory, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x, source):
        memory = self.memory(source)
        if not self.batch_first:
            x, memory = x.movedim(1, 0), memory.movedim(1, 0)
        return self.head(self.layer(x, memory).mean(dim=1 if self.batch_first else 0))


for _batch_first in (True, False):

    @case_named("decoder_layer" + ("" if _batch_first else "_sequence_first"))
    def _(g, batch_first=_batch_first):
        task = uw.Task(initialized(Translator(batch_first), g), uw.CrossEntropy())
        return task, (draw(g, 5, 3, 4), draw(g, 5, 2, 3), labels(g, 5, 3))


# -- uses ------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two inputs wide 3, a body to be replaced, a head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Repeated(Chain):
    """One layer used twice."""

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class TiedWithOneBias(Chain):
    """Two layers share a weight; one of them adds a bias."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(3, 3, bias=False)
        self.again.weight = self.body.weight

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.body(x)))))


class TiedWithTwoBiases(Chain):
    """Two layers share a weight and have a bias each."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(3, 3)
        self.again.weight = self.body.weight

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.body(x)))))


class TiedThroughout(TiedWithTwoBiases):
    """Two layers share weight and bias."""

    def __init__(self):
        super().__init__()
        self.again.bias = self.body.bias


class Registered(Chain):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.alias = self.body

    def forward(self, x):
        return self.head(torch.tanh(self.alias(torch.tanh(self.body(x)))))


class ByKeyword(Chain):
    """The layer's input passed by name."""

    def forward(self, x):
        return self.head(input=torch.tanh(self.body(input=x)))


class Gained(Chain):
    """A parameter of the model itself, outside of its layers."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)) * self.gain)


class UsedBare(Chain):
    """A layer's weight used outside of the layer too."""

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))) + (x @ self.body.weight)[:, :2]


class Doubling(nn.Linear):
    """Changes what its parent computes."""

    def forward(self, x):
        return 2.0 * super().forward(x)


class Named(nn.Linear):
    """Changes nothing."""


class WithDoubling(Chain):
    def __init__(self):
        super().__init__()
        self.body = Doubling(3, 3)


class WithNamed(Chain):
    def __init__(self):
        super().__init__()
        self.body = Named(3, 3)


class Gain(nn.Module):
    """A layer of the user's own, with parameters and a buffer."""

    def __init__(self, is_strict=False):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.is_strict = is_strict

    def forward(self, x, power=1):
        if self.is_strict and bool((x > 1e3).any()):
            raise ValueError
        return (x * self.scale) ** power * self.gain + (x @ self.shift.T).square() @ self.shift


class WithGain(Chain):
    def __init__(self):
        super().__init__()
        self.own = Gain()

    def forward(self, x):
        return self.head(self.own(torch.tanh(self.body(x)), power=2))


class WithGainHooked(WithGain):
    """A layer of the user's own with hooks on both sides."""

    def __init__(self):
        super().__init__()
        self.own.register_forward_pre_hook(lambda module, args: (args[0] - 1.0,))
        self.own.register_forward_hook(lambda module, args, out: out**3)


class WithGainTwice(WithGain):
    def forward(self, x):
        return self.head(self.own(self.own(torch.tanh(self.body(x)))))


class WithBranch(WithGain):
    """A layer of the user's own that asks for a value, which vmap does not allow."""

    def __init__(self):
        super().__init__()
        self.own = Gain(is_strict=True)


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x, y):
        return self.weight * x + (1 - self.weight) * y


class WithTwoInputs(Chain):
    def __init__(self):
        super().__init__()
        self.mix = Mix()

    def forward(self, x):
        return self.head(self.mix(torch.tanh(self.body(x)), x))


class HookedAfter(Chain):
    """A forward hook of the user's own scales the layer's output."""

    def __init__(self):
        super().__init__()
        self.body.register_forward_hook(lambda module, args, out: 2.0 * out)


class HookedBefore(Chain):
    """A forward pre-hook of the user's own replaces the layer's input."""

    def __init__(self):
        super().__init__()
        self.body.register_forward_pre_hook(lambda module, args: (args[0] ** 2,))


class HookedBackward(Chain):
    """A backward hook of the user's own looks on."""

    def __init__(self):
        super().__init__()
        self.head.register_full_backward_hook(lambda module, gin, gout: None)


class LowRank(Chain):
    """The body frozen, two small maps beside it (LoRA)."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)
        self.body.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) + 0.5 * self.up(self.down(x))))


class Bilinear(Chain):
    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(3, 3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.pair(self.body(x), x)))


class Unused(Chain):
    """A layer that forward leaves out."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Detached(Chain):
    """What a layer gives reaches the output, its gradient does not."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return super().forward(x) + self.spare(x).detach()[:, :2]


USES = {
    "repeated": (Repeated, []),
    "tied_with_one_bias": (TiedWithOneBias, []),
    "tied_with_two_biases": (TiedWithTwoBiases, []),
    "tied_throughout": (TiedThroughout, []),
    "registered_twice": (Registered, []),
    "by_keyword": (ByKeyword, []),
    "gained": (Gained, []),
    "used_bare": (UsedBare, ["body.weight"]),
    "subclass_that_changes_forward": (WithDoubling, []),
    "own_layer": (WithGain, []),
    "own_layer_hooked": (WithGainHooked, []),
    "own_layer_of_two_inputs": (WithTwoInputs, []),
    "own_layer_that_vmap_cannot_run": (WithBranch, []),
    "own_layer_used_twice": (WithGainTwice, []),
    "subclass_that_does_not": (WithNamed, []),
    "hooked_after": (HookedAfter, []),
    "hooked_before": (HookedBefore, []),
    "hooked_backward": (HookedBackward, []),
    "low_rank": (LowRank, []),
    "bilinear": (Bilinear, ["pair.*"]),
    "detached": (Detached, ["spare.*"]),
}

_BY_LOOPS = (
    "hooked_backward",
    "bilinear",
    "registered_twice",
    "own_layer_that_vmap_cannot_run",
)

for _name, (_model, _left) in USES.items():
    # Not the twin for a module of two names either: it is left with what functional_call lent it.
    @case_named(_name, by_function=_left, has_vmap=_name not in _BY_LOOPS)
    def _(g, model=_model):
        task = uw.Task(initialized(model(), g), uw.CrossEntropy())
        return task, (draw(g, 5, 3), labels(g, 5, 2))


for _what in ("weight", "bias"):

    @case_named(f"only_{_what}")
    def _(g, what=_what):
        task = uw.Task(initialized(Chain(), g), uw.CrossEntropy(), params=f"*.{what}")
        return task, (draw(g, 5, 3), labels(g, 5, 2))


@case_named("frozen_between")
def frozen_between(g):
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]
    model = initialized(nn.Sequential(*layers), g)
    model[2].requires_grad_(False)
    return uw.Task(model, uw.CrossEntropy()), (draw(g, 5, 3), labels(g, 5, 2))


@case_named("frozen_weight_beside_trained_bias")
def frozen_weight_beside_trained_bias(g):
    model = initialized(Chain(), g)
    model.body.weight.requires_grad_(False)
    return uw.Task(model, uw.CrossEntropy()), (draw(g, 5, 3), labels(g, 5, 2))


class Flattened(nn.Module):
    """Examples and positions on one axis [b·t, i], examples or positions first."""

    def __init__(self, positions_first):
        super().__init__()
        self.positions_first = positions_first
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = x.movedim(1, 0) if self.positions_first else x
        flat = torch.tanh(self.body(x.reshape(-1, 3)))
        return self.head(flat.reshape(x.shape).mean(dim=0 if self.positions_first else 1))


class Outside(nn.Module):
    """As Mamba does: layers hold parameters, and what computes with them is outside of them.

    A weight times the examples from its left, one by `F.linear` with its bias, a depthwise
    convolution and one of all channels; and a weight that is also used by its own layer.
    """

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.each = nn.Conv1d(4, 4, 2, groups=4, padding=1)
        self.all, self.head = nn.Conv1d(4, 4, 2, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        h = (self.left.weight @ x.mT + self.left.bias[:, None]).tanh()
        weight = self.each.weight.squeeze(1).unsqueeze(1)
        h = F.conv1d(h, weight, self.each.bias, padding=1, groups=4).tanh()
        h = F.conv1d(h, self.all.weight).mT.tanh()
        h = F.linear(h, self.right.weight, self.right.bias).tanh()
        return self.head(self.twice(F.linear(h, self.twice.weight).tanh()).mean(dim=1))


@case_named("outside")
def outside(g):
    task = uw.Task(initialized(Outside(), g), uw.CrossEntropy())
    return task, (draw(g, 5, 4, 3), labels(g, 5, 2))


class Products(nn.Module):
    """Parameters that are multiplied with as they are, in both orientations and in stacks.

    Heads with biases, as of RecurrentGemma; experts to which all tokens come, most as zeros, as of
    Llama 4; a head that is tied to the embedding by its tensor.
    """

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        for name, *shape in (
            ("io", 4, 6), ("oi", 4, 6), ("heads", 2, 2, 2), ("heads_bias", 2, 2), ("up", 3, 4, 5),
            ("down", 3, 5, 4), ("mixed", 2, 2, 2), ("added", 4), ("with_bias", 4, 4),
        ):  # fmt: skip
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, ids):
        h = self.embedding(ids)
        b, t, d = h.shape
        h = h + ((h @ self.io).tanh() @ self.oi.t()).tanh()
        apart = h.reshape(b * t, 2, 2).permute(1, 0, 2)
        gate = torch.baddbmm(self.heads_bias[:, None, :], apart, self.heads)
        h = h * gate.transpose(0, 1).reshape(b, t, d).sigmoid()
        flat = torch.addmm(self.added, h.reshape(-1, d), self.with_bias)
        chosen = (flat[:, :3] == flat[:, :3].amax(dim=1, keepdim=True)) * flat[:, :3].sigmoid()
        routed = flat.repeat(3, 1) * chosen.T.reshape(-1, 1)
        inner = torch.bmm(routed.view(3, -1, d), self.up).tanh()
        h = h + (inner @ self.down).sum(dim=0).reshape(b, t, d)
        h = (h.reshape(b, t, 2, 2).transpose(1, 2) @ self.mixed.mT).transpose(1, 2).reshape(b, t, d)
        return torch.matmul(h, self.embedding.weight.t())


@case_named("products")
def products(g):
    task = uw.Task(initialized(Products(), g), uw.CrossEntropy())
    ids = torch.randint(7, (5, 3), generator=g)
    return task, (ids, ids.roll(1, dims=1))


class Distances(nn.Module):
    """As DeBERTa: maps of a table of distances, the same for all examples, one written over."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.keys, self.queries = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.body(x)
        table = self.table.weight[:5].unsqueeze(0)
        keys, queries = self.keys(table), self.queries(table)
        view = queries.view(*queries.shape[:2], 2, 2)
        view /= 2.0
        scores = h @ keys.mT + h @ queries.mT
        return self.head((scores.tanh() @ x.new_ones(5, 4)).sum(dim=1) * h.mean(dim=1))


@case_named("distances", repeated=["keys", "queries"])
def distances(g):
    task = uw.Task(initialized(Distances(), g), uw.CrossEntropy())
    return task, (draw(g, 5, 4, 3), labels(g, 5, 2))


class WrittenOver(nn.Module):
    """The output of a Linear with a bias on sequences, which is a view, through a view of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.b(self.a(x).tanh())
        heads = hidden.view(*hidden.shape[:2], 2, 2)
        heads *= 0.5
        return self.head(hidden.tanh().mean(dim=1))


@case_named("written_over")
def written_over(g):
    task = uw.Task(initialized(WrittenOver(), g), uw.CrossEntropy())
    return task, (draw(g, 5, 4, 3), labels(g, 5, 2))


@case_named("flattened")
def flattened(g):
    task = uw.Task(initialized(Flattened(False), g), uw.CrossEntropy())
    return task, (draw(g, 5, 4, 3), labels(g, 5, 2))


class GainedPositionsFirst(nn.Module):
    """A scale that meets the examples on their second axis."""

    def __init__(self):
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head((x.movedim(1, 0) * self.gain).tanh().sum(dim=0))


@case_named("gained_positions_first", by_function=["gain"])
def gained_positions_first(g):
    task = uw.Task(initialized(GainedPositionsFirst(), g), uw.CrossEntropy())
    return task, (draw(g, 5, 4, 3), labels(g, 5, 2))


@case_named("flattened_positions_first")
def flattened_positions_first(g):
    task = uw.Task(initialized(Flattened(True), g), uw.CrossEntropy())
    return task, (draw(g, 5, 4, 3), labels(g, 5, 2))


class Recurrent(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


for _kind in (nn.LSTM, nn.GRU, nn.RNN):

    @case_named(_kind.__name__.lower(), by_function=["layer.*"], has_vmap=False)
    def _(g, kind=_kind):
        task = uw.Task(initialized(Recurrent(kind), g), uw.CrossEntropy())
        return task, (draw(g, 5, 3, 3), labels(g, 5, 2))


class Output(dict):
    """What models of transformers return: a mapping whose entries are attributes too."""

    def __getattr__(self, name):
        return self[name]


class Wrapped(Chain):
    def forward(self, inputs, attention_mask):
        hidden = torch.tanh(self.body(inputs)) * attention_mask[..., None]
        return Output(logits=self.head(hidden), hidden=hidden)


@case_named("logits_of_a_dict_batch")
def logits_of_a_dict_batch(g):
    y = labels(g, 20, 2).reshape(5, 4)
    mask = (torch.arange(4) <= torch.arange(5)[:, None]).double()
    y[mask == 0] = -100
    task = uw.Task(initialized(Wrapped(), g), uw.CrossEntropy())
    return task, {"inputs": draw(g, 5, 4, 3), "attention_mask": mask, "labels": y}
