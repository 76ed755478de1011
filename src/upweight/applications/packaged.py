"""Maps by captum, shap and lime: the extra `upweight[explain]`, imported when one is asked for.

captum sets hooks on modules. It is given a plain copy of the model and a fixed combination of its
outputs, so that it never meets a loss; operations that are no modules are out of its sight, which
is why rectifiers are counted first.
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upweight.applications.attributions import Attribution, patches, spread
from upweight.applications.explained import Explained
from upweight.errors import MissingPackage, NotOffered, UnsupportedModel

RECTIFIERS = {torch.relu, torch.relu_, nn.functional.relu, Tensor.relu, Tensor.relu_}

PASSED_ON = (nn.Flatten, nn.Unflatten, nn.Identity)
"""Modules through which relevance passes as it is, and of which captum has no rule."""


@dataclass(frozen=True)
class GuidedBackprop(Attribution):
    """∂m/∂x with only positive gradients passing back through ReLU (Springenberg et al. 2015)."""

    name = "guided-backprop"
    is_linear = False
    kind: ClassVar[str] = "GuidedBackprop"  # of captum.attr

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        with _explain("captum"):
            import captum.attr
        if not require_modules(m, x, self.name):
            raise NotOffered(
                f"{self.name!r} changes how gradients pass back through ReLU.",
                "a model without a ReLU.",
                "another activation, or a linear model.",
                "'gradient', which it would be.",
            )
        method = getattr(captum.attr, self.kind)
        with _hooks_are_set():
            head = m.weighted(m.slopes(None))
            return method(head).attribute(x.clone().requires_grad_()).detach()


@dataclass(frozen=True)
class Deconvolution(GuidedBackprop):
    """∂m/∂x with the rectifiers applied to what passes back (Zeiler & Fergus 2014)."""

    name = "deconvolution"
    kind = "Deconvolution"


@dataclass(frozen=True)
class DeepLIFT(Attribution):
    """Differences from the baseline by the rescale rule (Shrikumar, Greenside & Kundaje 2017).

    Through m by its mean derivative in the outputs, see `Explained.slopes`: it adds up where every
    nonlinear operation is a module that captum knows, used once.
    """

    name = "deeplift"
    adds_up = True
    is_linear = False

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        with _explain("captum"):
            from captum.attr import DeepLift
        require_modules(m, x, self.name)
        head = m.weighted(m.slopes(baseline))
        with _hooks_are_set():
            return DeepLift(head).attribute(x.clone().requires_grad_(), baseline).detach()


@dataclass(frozen=True)
class LRP(Attribution):
    """Layer-wise relevance by the ε rule (Bach et al. 2015, Eq. 58).

    It starts with the relevance of each output f_c ∂m/∂f_c and loses the part of the biases, which
    is what its entries miss of the total.
    """

    name = "lrp"
    adds_up = True
    is_linear = False

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        with _explain("captum"):
            from captum.attr import LRP as Method
            from captum.attr._utils.lrp_rules import EpsilonRule
        require_modules(m, x, self.name)
        with torch.no_grad():
            relevance = m.slopes(None) * m.outputs(x)[0]
            value = float(m.weighted(relevance)(x)[0])
        # captum multiplies by the value of what it is given, so that is 1.
        head = m.weighted(relevance, offset=1.0 - value)
        for module in m.model.modules():
            rule = self._rule(module)
            if rule is not None:
                module.rule = rule
            elif isinstance(module, PASSED_ON):
                module.rule = EpsilonRule()  # type: ignore[assignment]
        try:
            return Method(head).attribute(x.clone().requires_grad_()).detach()
        except (TypeError, RuntimeError) as error:
            raise UnsupportedModel(
                f"{self.name!r} needs a rule of captum for every layer.",
                f"{error}",
                "a layer such as attention, or one that is used twice.",
                "'integrated-gradients' or 'shap', which need none.",
            ) from error

    def total(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        """⟨∂m/∂f, f(x)⟩: the output itself where m is one of them."""
        return (m.slopes(None) * m.outputs(x)[0].detach()).sum()

    def _rule(self, module: nn.Module) -> Any:
        return None


@dataclass(frozen=True)
class DeepTaylor(LRP):
    """Deep Taylor decomposition by the z⁺ rule (Montavon et al. 2017, Eq. 11).

    Relevance goes along positive weights alone; inputs are taken to be nonnegative.
    """

    name = "deep-taylor"

    def _rule(self, module: nn.Module) -> Any:
        from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule

        is_linear = isinstance(module, nn.Linear | nn.Conv2d)
        return Alpha1_Beta0_Rule(set_bias_to_zero=True) if is_linear else None


@dataclass(frozen=True)
class Captum(Attribution):
    """Any class of `captum.attr` that takes a module, called with its defaults.

    Args:
        kind: The class.
    """

    kind: type
    is_linear = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the class."""
        return self.kind.__name__

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        method = self.kind(m.weighted(m.slopes(baseline)))
        takes = inspect.signature(method.attribute).parameters
        more = {"baselines": baseline} if "baselines" in takes else {}
        with _hooks_are_set():
            return method.attribute(x.clone().requires_grad_(), **more).detach()


@dataclass(frozen=True)
class LIME(Attribution):
    """Weights of a ridge regression of m on which patches are there.

    Ribeiro, Singh & Guestrin (2016), by `lime.lime_base`: patches are there with probability ½,
    and draws are weighted by exp(−d²/width²), d the cosine distance to all patches there.

    Args:
        patch: Side of a square in pixels, where x is an image.
        samples: Draws.
        width: Of the kernel.
        seed: Of the draws.
    """

    patch: int = 4
    samples: int = 1000
    width: float = 0.25
    seed: int = 0
    name = "lime"

    @property
    def drawn(self) -> str:
        return f"{self.samples} sets of patches"

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        with _explain("lime"):
            from lime.lime_base import LimeBase
        members = patches(x, self.patch)
        there = np.random.default_rng(self.seed).integers(0, 2, (self.samples, len(members)))
        there[0] = 1  # the input itself, which lime wants first
        share = there.mean(axis=1)
        distances = 1 - np.sqrt(share)  # cosine to the vector of ones
        base = LimeBase(lambda d: np.exp(-(d**2) / self.width**2), random_state=self.seed)
        values = _of_patches(m, x, baseline, members)(there)[:, None]
        _, weights, _, _ = base.explain_instance_with_data(
            there.astype(float), values, distances, 0, len(members), feature_selection="none"
        )
        found = torch.zeros(len(members), dtype=x.dtype, device=x.device)
        for place, weight in weights:
            found[place] = float(weight)
        return spread(found, members)


@dataclass(frozen=True)
class SHAP(Attribution):
    """Shapley values of the patches (Lundberg & Lee 2017), by `shap.PermutationExplainer`.

    A patch that is not there has the baseline. They add up whatever the number of orders is.

    Args:
        patch: Side of a square in pixels, where x is an image.
        orders: Orders in which patches are added, each also backwards.
        seed: Of the orders.
    """

    patch: int = 4
    orders: int = 10
    seed: int = 0
    name = "shap"
    adds_up = True

    @property
    def drawn(self) -> str:
        return f"{self.orders} orders of the patches"

    def raw(self, m: Explained, x: Tensor, baseline: Tensor) -> Tensor:
        with _explain("shap"):
            import shap
        members = patches(x, self.patch)
        p = len(members)
        state = np.random.get_state()  # noqa: NPY002  shap seeds the generator of everybody
        try:
            method = shap.PermutationExplainer(
                _of_patches(m, x, baseline, members), np.zeros((1, p)), seed=self.seed
            )
            found = method(np.ones((1, p)), max_evals=self.orders * (2 * p + 1), silent=True)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return spread(torch.as_tensor(found.values[0]).to(x), members)


def _of_patches(m: Explained, x: Tensor, baseline: Tensor, members: Tensor) -> Any:
    """m as a function of which patches are there, `[k, patches]` of 0 and 1, for NumPy."""
    flat = members.reshape(len(members), -1).to(x.dtype)

    def values(there: Any) -> Any:
        chosen = torch.as_tensor(np.asarray(there, dtype=float)).to(x)
        mask = (chosen @ flat).reshape(len(chosen), *x.shape[1:])
        return m.values(baseline + mask * (x - baseline)).cpu().numpy()

    return values


def require_modules(m: Explained, x: Tensor, name: str) -> int:
    """How many rectifiers run, all of them modules that are used once.

    Raises:
        UnsupportedModel: One is a function, or a module is used twice, which hooks do not see.
    """
    calls: list[nn.Module] = []
    counted = _Rectifiers()
    with ExitStack() as hooks, torch.no_grad():
        for module in m.model.modules():
            if isinstance(module, nn.ReLU):
                hook = module.register_forward_hook(lambda module, *_: calls.append(module))
                hooks.enter_context(hook)
        with counted:
            m.outputs(x)
    if counted.calls > len(calls) or len(set(calls)) < len(calls):
        functions = counted.calls - len(calls)
        raise UnsupportedModel(
            f"{name!r} changes what happens at modules, each used once.",
            f"{functions} calls of ReLU as a function."
            if functions > 0
            else "a ReLU module that is called more than once.",
            "torch.relu(...) in forward, or one self.relu for several layers.",
            "an nn.ReLU() of its own for each place; or 'integrated-gradients', which needs none.",
        )
    return len(calls)


class _Rectifiers(TorchFunctionMode):
    """Counts calls of ReLU, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += function in RECTIFIERS
        return function(*args, **(kwargs or {}))


@contextmanager
def _hooks_are_set() -> Iterator[None]:
    """Without captum's warning that it sets hooks: they are on a copy of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting (forward, )?backward hooks")
        yield


@contextmanager
def _explain(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingPackage(
            f"This map is made by {package}.",
            f"{error}.",
            "an installation without it: upweight itself does not need it.",
            "pip install 'upweight[explain]'; or 'gradient', 'integrated-gradients', 'smoothgrad', "
            "'deletion' and 'grad-cam', which need none.",
        ) from error
