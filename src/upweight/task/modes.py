"""Can a model be looked into, and which of its modules answer otherwise in training mode?

A model in training mode is refused where that matters: θ̂ is then not one fixed function of each
example. Layers of PyTorch are known; code of a user's own counts where it reads `training`.
"""

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from upweight.errors import UnsupportedModel
from upweight.task.lent import in_eval_mode
from upweight.task.sharded import Sharded, require_whole


def acting_in_training(model: nn.Module) -> list[str]:
    """The modules in training mode whose outputs depend on it, by name and type."""
    return [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module.training and _acts(module)
    ]


def evaluated(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model in eval mode, without a change to it, and what is to be said of that."""
    if not acting_in_training(model) or Sharded.of(model) is not None:
        return model, ()
    try:
        found = in_eval_mode(model)
    except Exception:  # a module that cannot be copied: refused, with model.eval() as the way out
        return model, ()
    return found, training_notes(model)


def training_notes(model: nn.Module) -> tuple[str, ...]:
    """What is to be said of a model in training mode that is asked as it is in eval mode."""
    acting = acting_in_training(model)
    if not acting:
        return ()
    layers = "1 layer answers" if len(acting) == 1 else f"{len(acting)} layers answer"
    return (
        f"the model is in training mode, where {layers} otherwise (first "
        f"{acting[0]}): scores are of it in eval mode, as it predicts; your model stays as it is",
    )


def require_modules(model: nn.Module) -> None:
    """Refuse a model that cannot be looked into: its attributes, its layers.

    Raises:
        UnsupportedModel: A TorchScript module, DataParallel over several devices, or parameters
            that are split over processes otherwise than by `fully_shard`.
    """
    require_whole(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                "The model must be made of Python modules: they are watched at work.",
                f"{name or 'the model'}, a torch.jit script.",
                "a model exported with torch.jit.script or torch.jit.trace.",
                "use the module that was exported, with its weights loaded "
                "(module.load_state_dict(script.state_dict())).",
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise UnsupportedModel(
                "The examples of a batch must stay together on one device.",
                f"{name or 'the model'}, a DataParallel over {len(module.device_ids)} devices.",
                "the wrapper that was used in training.",
                "pass the module inside of it, model.module.",
            )


def _acts(module: nn.Module) -> bool:
    if any(map(_reads_training, _hooks(module))):
        return True
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, _BatchNorm | nn.RReLU):
        return True
    if isinstance(module, _NormBase):  # InstanceNorm
        return bool(module.track_running_stats)
    return any(
        _reads_training(function)
        for kind in type(module).__mro__
        # What is in torch.nn and not named above leaves it to the modules that it holds.
        if not kind.__module__.startswith(
            ("torch.nn.modules.", "torch.distributed.fsdp", "builtins")
        )
        for name, function in vars(kind).items()
        if name not in ("train", "eval")
    )


def _hooks(module: nn.Module) -> Iterator[Any]:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in hooks.values():
            function = getattr(hook, "__func__", hook)
            yield function if isinstance(function, types.FunctionType) else type(hook).__call__


def _reads_training(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return isinstance(code, types.CodeType) and _names_training(code)


def _names_training(code: types.CodeType) -> bool:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return "training" in code.co_names or any(map(_names_training, inner))
