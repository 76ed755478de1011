"""Maps of a number m(x) on its input x: how much each feature has to do with it.

`raw` is what is linear in m wherever the method is; `finished` is what is looked at. Those here
need PyTorch alone; those of captum, shap and lime are in `packaged.py`.

Features that are taken away together are patches: squares of an image, single features of a row.
"""

import abc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from upweight.applications.explained import Explained, Function, nodes
from upweight.errors import NotOffered, ShapeError, SpecError


class Attribution(abc.ABC):
    """A method that maps m(x) on x. Implementations are frozen dataclasses of its settings.

    Attributes:
        name: As in the literature.
        adds_up: Whether the entries of a map are meant to add up to `total`.
        is_linear: Whether the map of m₁ + m₂ is the sum of both maps.
        follows: Whether it asks for values and gradients of m alone, so that derivatives in θ can
            be taken of the map.
        drawn: What is drawn at random, in words: entries are then estimates. "" where nothing is.
    """

    name: ClassVar[str]
    adds_up: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True
    follows: ClassVar[bool] = False

    @property
    def drawn(self) -> str:
        return ""

    @abc.abstractmethod
    def raw(self, m: Any, x: Float[Tensor, "1 *x"], baseline: Float[Tensor, "1 *x"]) -> Tensor:
        """The map `[1, *x]` before `finished`.

        Args:
            m: An `Explained`; of methods that follow any `Function`.
            x: Where.
            baseline: What a feature has where it is taken away.
        """

    def finished(self, raw: Tensor) -> Tensor:
        """The map that is looked at, of its raw form."""
        return raw

    def total(self, m: Any, x: Tensor, baseline: Tensor) -> Tensor:
        """What the raw map adds up to where it adds up: m(x) − m(x₀)."""
        return m.values(x)[0] - m.values(baseline)[0]


# -- by gradients ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradient(Attribution):
    """∂m/∂x (Baehrens et al. 2010)."""

    name = "gradient"
    follows = True

    def raw(self, m: Function, x: Tensor, baseline: Tensor) -> Tensor:
        return m.gradients(x)


@dataclass(frozen=True)
class Saliency(Gradient):
    """|∂m/∂x| (Simonyan, Vedaldi & Zisserman 2014)."""

    name = "saliency"

    def finished(self, raw: Tensor) -> Tensor:
        return raw.abs()


@dataclass(frozen=True)
class InputXGradient(Attribution):
    """(x − x₀) ∘ ∂m/∂x (Shrikumar et al. 2016); adds up where m is linear."""

    name = "input-x-gradient"
    follows = True

    def raw(self, m: Function, x: Tensor, baseline: Tensor) -> Tensor:
        return (x - baseline) * m.gradients(x)


@dataclass(frozen=True)
class IntegratedGradients(Attribution):
    """(x − x₀) ∘ ∫₀¹ ∂m/∂x(x₀ + t (x − x₀)) dt (Sundararajan, Taly & Yan 2017, Eq. 1).

    Args:
        steps: Nodes of the integral (Gauss-Legendre).
    """

    steps: int = 300
    name = "integrated-gradients"
    adds_up = True
    follows = True

    def __post_init__(self) -> None:
        _require_count("IntegratedGradients(steps=)", self.steps)

    def raw(self, m: Function, x: Tensor, baseline: Tensor) -> Tensor:
        places, weights = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in nodes(self.steps, x))
        gradients = m.gradients(baseline + places * (x - baseline))
        return (x - baseline) * (weights * gradients).sum(dim=0, keepdim=True)


@dataclass(frozen=True)
class SmoothGrad(Attribution):
    """The mean of ∂m/∂x over x + noise (Smilkov et al. 2017, Eq. 1).

    Args:
        noise: Standard deviation, as a share of the range of x.
        samples: Draws.
        seed: Of the noise, which is the same whatever m is.
    """

    noise: float = 0.1
    samples: int = 50
    seed: int = 0
    name = "smoothgrad"
    follows = True

    def __post_init__(self) -> None:
        _require_count("SmoothGrad(samples=)", self.samples)

    @property
    def drawn(self) -> str:
        return f"{self.samples} noisy inputs"

    def raw(self, m: Function, x: Tensor, baseline: Tensor) -> Tensor:
        draw = np.random.default_rng(self.seed).standard_normal((self.samples, *x.shape[1:]))
        sigma = self.noise * (x.max() - x.min())
        points = x + sigma * torch.as_tensor(draw, dtype=x.dtype, device=x.device)
        return m.gradients(points).mean(dim=0, keepdim=True)


# -- by taking features away ----------------------------------------------------------------------


@dataclass(frozen=True)
class Deletion(Attribution):
    """m(x) − m(x without the patch), each patch in turn (Zeiler & Fergus 2014, occlusion).

    The first step of the deletion game (Petsiuk, Das & Saenko 2018). The entries of a patch share
    its value equally.

    Args:
        patch: Side of a square in pixels, where x is an image.
    """

    patch: int = 4
    name = "deletion"
    follows = True

    def raw(self, m: Function, x: Tensor, baseline: Tensor) -> Tensor:
        members = patches(x, self.patch)
        without = torch.where(members, baseline, x)
        return spread(m.values(x) - m.values(without), members)


@dataclass(frozen=True)
class Additive(Attribution):
    """m(x₀ with the patch of x) − m(x₀), each patch by itself: the terms of an additive model.

    Exact, and adds up, where m is additive in the patches (Hastie & Tibshirani 1986): a linear
    model, a generalized additive one. How far the terms miss the total says how far it is not.

    Args:
        patch: Side of a square in pixels, where x is an image.
    """

    patch: int = 4
    name = "additive"
    follows = True

    def raw(self, m: Function, x: Tensor, baseline: Tensor) -> Tensor:
        members = patches(x, self.patch)
        alone = torch.where(members, x, baseline)
        return spread(m.values(alone) - m.values(baseline), members)


# -- by the activations of a layer ----------------------------------------------------------------


@dataclass(frozen=True)
class GradCAM(Attribution):
    """relu(Σ_k α_k A_k), α_k the mean of ∂m/∂A_k over positions (Selvaraju et al. 2017, Eqs. 1–2).

    Drawn at the size of x by bilinear interpolation.

    Args:
        layer: Which module's output is A, by name; None: the last with positions.
    """

    layer: str | None = None
    name = "grad-cam"
    is_linear = False

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        layer = layer_of(m, x, self.layer, self.name)
        A, gradients = _activations(m, x, layer)
        alpha = gradients.mean(dim=(2, 3), keepdim=True)
        return resized((alpha * A).sum(dim=1, keepdim=True), x)

    def finished(self, raw: Tensor) -> Tensor:
        return raw.clamp(min=0)


@dataclass(frozen=True)
class CAM(Attribution):
    """Σ_k w_k A_k of a network that ends in global average pooling and one linear layer.

    Zhou et al. (2016), Eq. 2. Whether it ends so is measured: ∂m/∂A is the same at every position,
    and m is affine in A.

    Args:
        layer: As for `GradCAM`.

    Raises:
        NotOffered: The network does not end so.
    """

    layer: str | None = None
    name = "cam"
    is_linear = False

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        layer = layer_of(m, x, self.layer, self.name)
        weights = m.slopes(None)  # of several outputs: a loss is no affine function of A
        head = m.weighted(weights)
        A, gradients = _activations(m, x, layer, head)
        w = gradients.mean(dim=(2, 3), keepdim=True)

        def twice(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            # A module that is used several times gives A at its last use.
            return 2 * A if torch.equal(output, A) else output

        with torch.no_grad():
            with m.model.get_submodule(layer).register_forward_hook(twice):
                doubled = head(x)[0]
            step = doubled - head(x)[0]
        size = float((gradients * A).abs().sum())
        bent = abs(float(step - (gradients * A).sum())) > 1e-6 * size
        if bent or float((gradients - w).abs().max()) > 1e-6 * float(gradients.abs().max()):
            raise NotOffered(
                "A class activation map is of a network that ends in global average pooling and "
                "one linear layer.",
                f"one whose output is {'bent in' if bent else 'not a mean over positions of'} the "
                f"activations of {layer!r}.",
                "fully connected layers over the positions.",
                "'grad-cam', which is the same where both exist.",
            )
        return resized((w * A).sum(dim=1, keepdim=True), x)


@dataclass(frozen=True, eq=False)
class TCAV(Attribution):
    """Σ_k v_k ∂m/∂A_k at each position: sensitivity to a concept (Kim et al. 2018, Eq. 1).

    v is the direction from the mean activations of the other inputs to those of the concept, of
    norm 1. The paper takes the normal of a fitted classifier, which differs from run to run; this
    does not. A positive sum says that more of the concept raises m; the share of queries with one
    is the TCAV score of their class.

    Args:
        concept: Inputs that show the concept, `[k, *x]`.
        others: Inputs that do not.
        layer: As for `GradCAM`.
    """

    concept: Tensor = field(repr=False)
    others: Tensor = field(repr=False)
    layer: str | None = None
    name = "tcav"
    is_linear = False

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        for what, given in (("concept", self.concept), ("others", self.others)):
            if given.ndim != x.ndim or given.shape[1:] != x.shape[1:] or not len(given):
                raise ShapeError(
                    f"TCAV({what}=) holds inputs as the model takes them: [k, "
                    f"{', '.join(map(str, x.shape[1:]))}].",
                    f"{tuple(given.shape)}.",
                    "one input without its first axis, or none.",
                    f"{what}[None] of one input; tens of them tell a direction better.",
                )
        layer = layer_of(m, x, self.layer, self.name)
        _, gradients = _activations(m, x, layer)
        means = [
            _activations(m, inputs.to(x), layer, slope=False)[0].mean(dim=0, keepdim=True)
            for inputs in (self.concept, self.others)
        ]
        v = means[0] - means[1]
        v = v / v.norm()
        return resized((v * gradients).sum(dim=1, keepdim=True), x)


# -- patches --------------------------------------------------------------------------------------


def patches(x: Float[Tensor, "1 *x"], side: int) -> Tensor:
    """Which entries belong to each patch, `[patches, *x]`.

    Squares of the last two axes where x has two or more, all channels together; else one feature
    each.
    """
    _require_count("patch", side)
    shape = x.shape[1:]
    if len(shape) < 2:
        count = x[0].numel()
        return torch.eye(count, dtype=torch.bool, device=x.device).reshape(count, *shape)
    height, width = shape[-2:]
    across = -(-width // side)
    rows = torch.arange(height, device=x.device)[:, None] // side
    columns = torch.arange(width, device=x.device)[None] // side
    label: Int[Tensor, "h w"] = rows * across + columns
    count = int(label.max()) + 1
    found = label[None] == torch.arange(count, device=x.device)[:, None, None]
    return found.reshape(count, *[1] * (len(shape) - 2), height, width).expand(count, *shape)


def spread(values: Float[Tensor, " k"], members: Tensor) -> Float[Tensor, "1 *x"]:
    """Each patch's value, in equal parts over its entries."""
    k = len(members)
    each = values / members.reshape(k, -1).sum(dim=1)
    return (each.reshape(k, *[1] * (members.ndim - 1)) * members).sum(dim=0, keepdim=True)


def resized(coarse: Float[Tensor, "1 1 h w"], x: Float[Tensor, "1 *x"]) -> Tensor:
    """A map of positions at the size of x; its channels, if any, share it equally."""
    shape = x.shape[1:]
    fine = nn.functional.interpolate(coarse, size=shape[-2:], mode="bilinear", align_corners=False)
    channels = x[0].numel() // (shape[-1] * shape[-2])
    return (fine / channels).reshape(1, *[1] * (len(shape) - 2), *shape[-2:]).expand(1, *shape)


# -- activations ----------------------------------------------------------------------------------


def layer_of(m: Explained, x: Tensor, layer: str | None, what: str) -> str:
    """The module whose output is A: the one named, or the last with channels and positions.

    Raises:
        NotOffered: No module's output has positions.
        SpecError: There is no module of that name.
    """
    modules = dict(m.model.named_modules())
    if layer is not None and layer not in modules:
        raise SpecError(
            f"The layer of {what!r} is named as in model.named_modules().",
            f"layer={layer!r}.",
            "the name of a parameter, or an index.",
            f"one of {', '.join(repr(name) for name in [*modules][1:9])}, ….",
        )
    found: list[tuple[str, tuple[int, ...]]] = []

    def seen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.append((name, tuple(output.shape)))

        return hook

    leaves = [name for name, module in modules.items() if name and not [*module.children()]]
    with ExitStack() as hooks, torch.no_grad():
        for name in leaves if layer is None else [layer]:
            hooks.enter_context(modules[name].register_forward_hook(seen(name)))
        m.outputs(x)
    there = [name for name, shape in found if len(shape) == 4 and shape[2] * shape[3] > 1]
    if there and x.ndim >= 3:
        return there[-1]
    raise NotOffered(
        f"{what!r} is a map of positions: it needs a layer with an output [b, channels, h, w].",
        "none in this model." if layer is None else f"another output of {layer!r}.",
        "a model of vectors or sequences.",
        "a map by gradients or by taking features away, such as 'integrated-gradients'.",
    )


def _activations(
    m: Explained, x: Tensor, layer: str, function: nn.Module | None = None, slope: bool = True
) -> tuple[Tensor, Tensor]:
    """A and ∂m/∂A; of another function of x in place of m."""
    held: list[Tensor] = []

    def hold(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    with m.model.get_submodule(layer).register_forward_hook(hold), torch.enable_grad():
        if not slope:
            m.outputs(x)
            return held[-1].detach(), torch.zeros_like(held[-1])
        value = m.measured(*m.outputs(x)) if function is None else function(x)
        (gradient,) = torch.autograd.grad(value.sum(), held[-1], materialize_grads=True)
    return held[-1].detach(), gradient


def shuffled(model: nn.Module, seed: int) -> bool:
    """Permute the entries of each upper weight in place; whether there are any.

    All parameters but those of the first module that has some: their values stay, their places are
    lost (the parameter randomization test of Adebayo et al. 2018, without new values).
    """
    named = list(model.named_parameters())
    first = named[0][0].rpartition(".")[0] if named else ""
    upper = [p for name, p in named if name.rpartition(".")[0] != first]
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for p in upper:
            order = torch.as_tensor(draw.permutation(p.numel()), device=p.device)
            p.copy_(p.reshape(-1)[order].reshape(p.shape))
    return bool(upper)


def _require_count(what: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise SpecError(
            f"{what} is a whole number from 1.",
            f"{given!r}.",
            "a share, or a count that was computed to nothing.",
            "a number such as 4.",
        )
