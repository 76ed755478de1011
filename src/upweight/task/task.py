"""Task: what was trained.

    J(θ, w) = (1/n) Σᵢ wᵢ ℓ(f(θ, xᵢ), yᵢ) + R(θ)

A `Task` binds the model f, the loss ℓ, the penalty R and the choice of parameters θ. It is frozen,
and the model is only ever called functionally: it comes back exactly as it was lent.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Batch, Forward, Params
from upweight.errors import DataError, ScalarLoss, UnsupportedModel
from upweight.task.arrays import TARGET_KEYS
from upweight.task.batches import mapped
from upweight.task.data import Data, as_data
from upweight.task.lent import copied, differentiable, lent, with_backward_pass
from upweight.task.losses import Loss
from upweight.task.params import Layout
from upweight.task.penalties import Penalty, as_penalty
from upweight.task.sharded import BY_LAYER, Sharded, is_split, require_own_weights, stands_in
from upweight.task.torch_losses import as_loss

_V = TypeVar("_V", bound=Callable[..., Any])


def call_model(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Outputs and targets of a batch, as most models take it.

    A tuple `(x1, ..., y)` is `model(x1, ...)` against y. A dict is `model(**inputs)` against its
    one key among labels, label, targets, target, y. An output with logits, by attribute or by key,
    stands for these. A dict for a causal language model of `transformers`, which shifts its labels
    inside, is taken as by `next_token`.
    """
    shifts = isinstance(batch, dict) and shifts_labels(model)
    return (next_token if shifts else _called)(model, batch)


def next_token(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """As `call_model`, with the outputs at position t against the label at t + 1.

    For language models whose batches hold labels = input_ids: outputs `[b, t, c]` and labels
    `[b, t]` become `[b, t − 1, c]` and `[b, t − 1]`.
    """
    outputs, targets = _called(model, batch)
    return outputs[:, :-1], targets[:, 1:]


def bare(model: nn.Module) -> nn.Module:
    """The model inside of what compiles it, runs it in parallel or adds adapters to it."""
    for name in ("module", "_orig_mod"):
        inner = model._modules.get(name)
        if inner is not None and len(model._modules) == 1:
            return bare(inner)
    own = getattr(model, "get_base_model", None)  # of peft
    return bare(own()) if callable(own) else model


def shifts_labels(model: nn.Module) -> bool:
    """By the names that `transformers` gives; what they compute is checked as well."""
    names = [kind.__name__ for kind in type(bare(model)).__mro__]
    return any(
        name.endswith(("ForCausalLM", "LMHeadModel")) and not name.endswith("WithLMHeadModel")
        for name in names
    )


def without_cache(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, and a word to keep no cache where it would do harm.

    A row may hold several sequences, each with `position_ids` from 0 on. Models of `transformers`
    keep their attention apart where there is no attention mask and no cache, as in training. And
    models that take a `state` (RWKV) write the next one over what a gradient needs.
    """
    takes = inspect.signature(bare(model).forward).parameters
    by_positions = "position_ids" in inputs and "attention_mask" not in inputs
    if "use_cache" in inputs or "use_cache" not in takes or not (by_positions or "state" in takes):
        return inputs
    return {**inputs, "use_cache": False}


def _called(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    inputs, targets = _parts(batch)
    if isinstance(inputs, dict):
        outputs = model(**without_cache(model, inputs))
    else:
        outputs = model(*inputs)
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs), targets
    return getattr(outputs, "logits", outputs), targets


def _parts(batch: Batch) -> tuple[dict[str, Any] | tuple[Any, ...], Any]:
    """The model's inputs, and the targets."""
    if isinstance(batch, dict):
        keys = [key for key in TARGET_KEYS if key in batch]
        if len(keys) != 1:
            raise DataError(
                f"A dict batch must hold its targets under exactly one of {TARGET_KEYS}.",
                f"the keys {sorted(batch)}.",
                "another name for the targets.",
                "rename the key, or say how to call the model with "
                "Task(forward=lambda model, batch: (outputs, targets)).",
            )
        return {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]
    if isinstance(batch, tuple) and len(batch) >= 2:
        return batch[:-1], batch[-1]
    raise DataError(
        "A batch must be (inputs..., targets) or a dict.",
        f"a {type(batch).__name__}{_length(batch)}.",
        "inputs without targets.",
        "give the data as (X, y), or say how to call the model with Task(forward=...).",
    )


def _length(batch: Any) -> str:
    return f" of {len(batch)}" if isinstance(batch, tuple) else ""


class Reader(Protocol):
    """How the data of a model that was translated from another library become its examples.

    Such a model is known to its user by other rows and labels than it computes with: rows before a
    pipeline's transformations, classes by name. Whatever reaches its task is read in that way.
    What a class that inherits from this one does not say is that nothing has a name of its own.
    """

    fits_own_data: bool
    """Whether the task is of its own training data only."""

    @property
    def has_own_loss(self) -> bool:
        """Whether the model computes the loss by itself: another one is an error."""
        return False

    @property
    def classes(self) -> tuple[Any, ...] | None:
        """The labels, as the user knows them; None where they are no names."""
        return None

    @property
    def coefficients(self) -> Mapping[str, tuple[str, int]]:
        """By the names that the user knows: the parameter, and the place on its last axis."""
        return {}

    def training(self, given: Any) -> Data:
        """The training data, with the weights they have in the objective."""
        ...

    def queries(self, given: Any) -> Data:
        """Queries."""
        ...

    def relabeled(self, example: Batch, label: Any) -> Batch:
        """A batch of one training example with another label, given as the user knows it."""
        ...


@dataclass(frozen=True)
class Task:
    """What was trained: the model, its loss and penalty, and which parameters.

    Args:
        model: The trained model, in eval mode. Never changed.
        loss: ℓ(outputs, targets) -> [b], unreduced: one of ours or any function.
        penalty: R(θ), added to the mean loss. `L2(λ)` is (λ/2) ‖θ‖².
        params: Globs of parameter names that make up θ. Frozen parameters are never part of it.
        forward: How to get `(outputs, targets)` from `(model, batch)`; see `call_model`.
        reads: How data become examples of the model; set by adapters. None: see `as_data`.

    Raises:
        UnsupportedModel: The model is no PyTorch module, or no trainable parameter is chosen.
        DtypeError: The chosen parameters differ in dtype.

    Example:
        >>> task = Task(model, loss=CrossEntropy(), penalty=L2(0.01))
    """

    model: nn.Module
    loss: Loss
    penalty: Penalty
    params: tuple[str, ...]
    forward: Forward
    layout: Layout = field(repr=False)
    reads: Reader | None = field(repr=False, compare=False)
    sharded: Sharded | None = field(repr=False, compare=False)

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Callable[[Tensor, Any], Tensor],
        penalty: Penalty | Callable[[Params], Tensor] | None = None,
        params: str | tuple[str, ...] = "*",
        forward: Forward | None = None,
        reads: Reader | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UnsupportedModel(
                "The model of a Task must be a PyTorch module.",
                f"an object of type {type(model).__name__}.",
                "a fitted estimator or a results object of another library, or a function.",
                _way_to_a_task(model),
            )
        patterns = (params,) if isinstance(params, str) else tuple(params)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "loss", as_loss(loss))
        object.__setattr__(self, "penalty", as_penalty(penalty))
        object.__setattr__(self, "params", patterns)
        object.__setattr__(self, "forward", forward or call_model)
        object.__setattr__(self, "layout", Layout.of(model, patterns))
        object.__setattr__(self, "reads", reads)
        object.__setattr__(self, "sharded", Sharded.of(model))

    def training(self, given: Any) -> Data:
        """Training data from what the user holds: by `reads`, or see `as_data`."""
        return as_data(given) if self.reads is None else self.reads.training(given)

    def queries(self, given: Any) -> Data:
        """Queries from what the user holds: by `reads`, or see `as_data`."""
        return as_data(given) if self.reads is None else self.reads.queries(given)

    def theta(self) -> Float[Tensor, " p"]:
        """θ̂: a copy of the model's chosen parameters as one flat vector.

        Raises:
            UnsupportedModel: No process has the whole of it.
        """
        require_own_weights(self.sharded, "This question", BY_LAYER)
        named = dict(self.model.named_parameters())
        return self.layout.flatten({name: named[name].detach() for name in self.layout.names})

    def held_theta(self) -> Float[Tensor, " p"]:
        """θ̂, or a placeholder for θ where parameters are split over processes.

        See `upweight.task.sharded`.
        """
        if self.sharded is None:
            return self.theta()
        return self.sharded.theta(self.layout.size, self.layout.dtype)

    def whole(self, theta: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """θ, also where there is a placeholder for it: for what is freed at once."""
        if self.sharded is None or not stands_in(theta):
            return theta
        named = dict(self.model.named_parameters())
        found = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
        with self.sharded.keeping():
            for name, where in self.layout.slices.items():
                found[where] = self.sharded.whole(name, named[name]).flatten()
        return found

    def leaves(self, params: Params | Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Parameters by name, as leaves to take derivatives by, each of its own."""
        # One leaf per parameter: a sparse gradient cannot go back through a slice of θ.
        return {
            k: (v.detach() if self.stands_in(v) else v.clone()).requires_grad_()
            for k, v in self.named(params).items()
        }

    def stands_in(self, value: Tensor) -> bool:
        """Whether a tensor is a placeholder for θ or a part of it, and has no values."""
        return self.sharded is not None and stands_in(value)

    def moved_to(
        self, theta: Float[Tensor, " p"], others: Mapping[str, Tensor] | None = None
    ) -> "Task":
        """The same task with a copy of its model at θ, and with what else of it is given by name.

        `others` are running statistics and frozen layers, which are no part of θ.
        """
        model = copied(self.model)
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, value in {**self.layout.unflatten(theta), **(others or {})}.items():
                named[name].copy_(value)
        return Task(model, self.loss, self.penalty, self.params, self.forward, self.reads)

    def with_others(self, others: Mapping[str, Tensor]) -> "Task":
        """The same task with these running statistics and frozen layers; itself where none is."""
        return self.moved_to(self.theta(), others) if others else self

    def called(self, forward: Forward) -> "Task":
        """The same task with another way to call its model."""
        return Task(self.model, self.loss, self.penalty, self.params, forward, self.reads)

    def named(self, params: Params | Float[Tensor, " p"]) -> Params:
        """Parameters by name, from either form."""
        return self.layout.unflatten(params) if isinstance(params, Tensor) else params

    def to_device(self, batch: Batch) -> Batch:
        """The batch on the device of the parameters; dtypes are left as they are."""
        device = self.layout.device

        def placed(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_inference():
                x = x.clone()  # autograd saves no tensor that was made in inference mode
            # Packed sequences and batches of graphs are no tensors but move as they do.
            return x.to(device) if callable(getattr(x, "to", None)) else x

        moved: Batch = mapped(placed, batch)
        return moved

    def outputs(self, params: Params | Float[Tensor, " p"], batch: Batch) -> tuple[Any, Any]:
        """f(θ, x) and the targets of a batch, for derivatives of any kind and order."""
        with differentiable(self.model):
            return self.call(params, batch)

    def call(self, params: Params | Float[Tensor, " p"], batch: Batch) -> tuple[Any, Any]:
        """As `outputs`, with whatever kernels PyTorch prefers: for plain first derivatives.

        Buffers are read, never written, and what forward writes into attributes is undone.
        """
        chosen = self.named(params)
        names = {id(p): name for name, p in self.model.named_parameters()}
        values: dict[str, Tensor] = {}
        # By place, each once: `functional_call` restores a module that is registered under two
        # names to the tensors it was lent, so it must not be left to find the names by itself.
        for path, module in self.model.named_modules(prefix="model"):
            for last, p in module._parameters.items():
                if p is None or (self.sharded is not None and is_split(p)):
                    continue  # a unit has its weights while it runs
                given = chosen.get(names[id(p)])
                is_own = given is None or self.stands_in(given)
                values[f"{path}.{last}"] = p.detach() if is_own else given  # type: ignore[assignment]
            for last, b in module._buffers.items():
                if b is not None:
                    # Copies: a module that updates one in place must not touch the user's.
                    values[f"{path}.{last}"] = b.detach().clone()
        records = torch.is_grad_enabled()
        # Always recorded, for a model that takes derivatives itself (forces from an energy).
        with (
            lent(self.model),
            with_backward_pass(self.model),
            torch.enable_grad(),
            self.running(chosen),
        ):
            found: tuple[Any, Any] = torch.func.functional_call(
                _Call(self.model, self.forward), values, (batch,), tie_weights=False
            )
        return found if records else mapped(_detached, found)

    def targets(self, batch: Batch) -> Any:
        """The targets of a batch, where `forward` is known to read them from it; otherwise None.

        Cost: none; the model is not run.
        """
        if self.forward is not call_model and self.forward is not next_token:
            return None
        targets = _parts(batch)[1]
        shifts = isinstance(batch, dict) and shifts_labels(self.model)
        return targets[:, 1:] if shifts or self.forward is next_token else targets

    @property
    def meanwhile(self) -> Callable[[], None] | None:
        """What to do while another of these processes makes something; None: nothing."""
        return None if self.sharded is None else self.sharded.help

    @contextmanager
    def backwards(self, params: Params) -> Iterator[None]:
        """For a backward pass over what `call` gave, which may run parts of the model again."""
        if self.sharded is None:
            yield
            return
        with lent(self.model), self.sharded.keeping(), self.running(params):
            yield

    def saving(self, seen: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
        """Where each tensor that autograd keeps is shown first, weights that are split excepted."""
        if self.sharded is None:
            return torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x)
        return self.sharded.saving(seen)

    def in_step(self) -> AbstractContextManager[None]:
        """All processes that the model is split over leave together."""
        return nullcontext() if self.sharded is None else self.sharded.in_step()

    def running(self, params: Params) -> AbstractContextManager[None]:
        """Where parts of the model are gathered from several processes, while it runs."""
        return nullcontext() if self.sharded is None else self.sharded.running(params)

    def losses(self, params: Params | Float[Tensor, " p"], batch: Batch) -> Float[Tensor, " b"]:
        """ℓ of each example of a batch, unreduced.

        Raises:
            ScalarLoss: The loss did not return one value per example.
        """
        return self.losses_of(*self.outputs(params, batch))

    def losses_of(self, outputs: Tensor, targets: Any) -> Float[Tensor, " b"]:
        """ℓ of each example, from the model's outputs.

        Raises:
            ScalarLoss: The loss did not return one value per example.
        """
        losses = self.loss(outputs, targets)
        size = len(outputs)
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            is_tensor = isinstance(losses, Tensor)
            shape = f"shape {tuple(losses.shape)}" if is_tensor else type(losses).__name__
            raise ScalarLoss(
                f"A loss must return one value per example: shape ({size},).",
                f"{self.loss!r} returned {shape}.",
                "a loss that takes the mean or sum over the batch.",
                "pass a loss of torch.nn itself, such as torch.nn.CrossEntropyLoss(), or one of "
                'upweight; or in the function reduction="none", and a sum over every axis but the '
                "first.",
            )
        return losses

    def output_gradient(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c"]:
        """δ = ∂ℓ/∂f, in the dtype of the outputs as autograd has it, whatever that of the targets.

        Targets in float64 beside a float32 model are compared in float64 and rounded here.
        """
        return self.loss.gradient(outputs, targets).to(outputs.dtype)

    def output_hessian(self, outputs: Tensor, targets: Any) -> Float[Tensor, "b c c"]:
        """Λ = ∂²ℓ/∂f², in the dtype of the outputs."""
        return self.loss.hessian(outputs, targets).to(outputs.dtype)

    def output_hessian_product(
        self, outputs: Tensor, targets: Any, vectors: Float[Tensor, "k b c"]
    ) -> Float[Tensor, "k b c"]:
        """Λ u without Λ, in the dtype of the outputs."""
        return self.loss.hessian_product(outputs, targets, vectors).to(outputs.dtype)

    def objective(
        self, theta: Float[Tensor, " p"], batch: Batch, weights: Float[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """J(θ, w) when the batch is the whole training set."""
        params = self.named(theta)
        mean = (weights * self.losses(params, batch)).mean()
        return mean + self.penalty(params, self.layout)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def in_step(verb: _V) -> _V:
    """A verb of what has a task, which all processes that a model is split over leave together."""

    @functools.wraps(verb)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.task.in_step():
            return verb(self, *args, **kwargs)

    return called  # type: ignore[return-value]


def require_task(task: Any) -> None:
    """Refuse, by an UnsupportedModel, what is no task, such as an estimator in its place."""
    if isinstance(task, tuple) and any(isinstance(each, Task) for each in task):
        raise UnsupportedModel(
            "What was trained is said by an upweight.Task.",
            f"a tuple of {' and '.join(type(each).__name__ for each in task)}.",
            "what task(…) of an adapter returns, as one argument.",
            "task, train = sk.task(…); then fit(task, train).",
        )
    is_checkpoint = isinstance(task, Mapping | str | PathLike)
    if is_checkpoint:
        inside = sorted(map(str, task))[:4] if isinstance(task, Mapping) else None
        raise UnsupportedModel(
            "What was trained is said by a model: a torch.nn.Module, or an upweight.Task.",
            f"the path {str(task)!r}." if inside is None else f"a dict of {', '.join(inside)}, ….",
            "a checkpoint in place of the model whose weights it holds.",
            "model = Net(); model.load_state_dict(torch.load('best.pt', weights_only=True)); "
            "model.eval(). Of a checkpoint with more in it the weights are an entry, often "
            "['model'] or ['state_dict'].",
        )
    if not isinstance(task, Task):
        raise UnsupportedModel(
            "What was trained is said by an upweight.Task.",
            f"an object of type {type(task).__name__}.",
            "the model itself in place of its task.",
            _way_to_a_task(task),
        )


def _way_to_a_task(model: Any) -> str:
    if type(model).__module__.startswith("statsmodels."):
        return (
            "import upweight.adapters.statsmodels as smx; task, train = smx.task(results), of what "
            "model.fit() returned."
        )
    if hasattr(model, "get_params") and hasattr(model, "fit"):
        return (
            "import upweight.adapters.sklearn as sk; task, train = sk.task(estimator, X, y), with "
            "the X and y that it was fitted on."
        )
    return (
        "upweight.Task(model, loss) of a torch.nn.Module and the loss it was trained with; "
        "upweight.adapters.sklearn and upweight.adapters.statsmodels make tasks of fitted "
        "estimators."
    )


class _Call(nn.Module):
    """Lets `functional_call` reach a user's `forward(model, batch)`."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, batch: Batch) -> tuple[Any, Any]:
        return self._forward(self.model, batch)
