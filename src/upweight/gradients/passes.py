"""The gradients of a batch, block by block, as factors.

    with GradientPass(plan, theta) as gradients:
        for factors, block in zip(gradients.of(task.losses, batch), plan.blocks): ...

What the layers saw goes through their rules (`layers.py`); parameters that meet the examples by
broadcasting have theirs from that (`broadcast.py`); what is left gets per-example gradients from
`torch.func`, in batches whose plain gradient reaches it.

Each kind of batch (its size, and the shapes that layers saw in it) is held once to what the rules
rest on: that row t of a layer's output belongs to the example it is counted for. If so, doubling
the loss of example i doubles δ in its rows and nowhere else; a second backward pass with unequal
weights tells, exactly, because they are powers of two. In layers that see some rows only, or in
another order, as experts do, further passes with such weights tell whose each row is. Where an
example's rows cannot be told, the batch is taken one example at a time.
"""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from upweight._typing import Batch, Params
from upweight.errors import NotDifferentiable, ScalarLoss, UnsupportedModel
from upweight.gradients.autograd import first_line
from upweight.gradients.blocks import Block, MatrixBlock, Plan, Source
from upweight.gradients.factored import Factors, Joined, Rows, Tokens, stacked
from upweight.gradients.functional import over_examples
from upweight.gradients.hooks import Call, Capture, inside
from upweight.gradients.layers import Examples, placed, places_of, rule_at, rule_for
from upweight.task.batches import cut

Function = Callable[[Params, Any], Tensor]
"""(θ by name, batch) to one value per example: losses, or a measure."""


AGAIN = 4
"""How often batches of the same shapes are looked at in which a layer sees rows, not examples: so
often those of routed experts are not in order by chance."""


class GradientPass:
    """Gradients of batches as factors, block by block, while in its context.

    Args:
        plan: Which rule gives which gradient.
        theta: θ.
        placed: Kinds of batches of which it is known, for the same functions, that rows are those
            of their examples; more are added.
        clears: Whether an example's δ in a layer that is 0 but for rounding becomes 0: for means
            over positions, in which such a δ would count.
    """

    def __init__(
        self,
        plan: Plan,
        theta: Float[Tensor, " p"],
        placed: set[Any] | None = None,
        clears: bool = False,
    ) -> None:
        self.plan, self.clears = plan, clears
        self._capture = Capture(
            plan.task,
            theta,
            roles(plan),
            plan.repeated,
            plan.broadcast,
            plan.by_function,
            tuple(plan.products),
        )
        self._placed = set[Any]() if placed is None else placed
        self._has_warned = False
        self._is_alone = self._is_routed = False

    def __enter__(self) -> "GradientPass":
        self._capture.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.__exit__(*error)

    def of(
        self, function: Callable[[Params, Batch], Float[Tensor, " b"]], batch: Batch, size: int
    ) -> list[Factors]:
        """∇θ function(θ, batch)ᵢ for each example, in the order of the plan's blocks.

        Raises:
            NotDifferentiable: No gradient reaches the layers.
            ScalarLoss: The function does not give one value per example.
            UnsupportedModel: A parameter is used outside of the layers that account for it.
        """
        if self.plan.one_by_one and size > 1:
            return self._one_by_one(function, batch, size)
        values = self._watched(function, batch, size)
        return self._factors(values, function, batch, size)

    def of_heads(
        self,
        batch: Batch,
        size: int,
        heads: Callable[[Tensor, Any], Iterable[tuple[Callable[..., Tensor], Any]]],
    ) -> Iterator[list[Factors]]:
        """∇θ head(f(θ, x), y, extra)ᵢ for several heads on one forward pass.

        Args:
            batch: As the task takes it.
            size: How many examples it holds.
            heads: From outputs and targets to pairs (head, extra): `head(outputs, targets, extra)`
                gives one value per example, with extra any tree with the examples first.

        Raises:
            NotDifferentiable: No gradient reaches the layers.
            ScalarLoss: A head does not give one value per example.
            UnsupportedModel: A parameter is used outside of the layers that account for it.
        """
        task = self.plan.task
        self._is_alone = self.plan.one_by_one and size > 1
        outputs, targets = self._capture.forward(batch, size)
        for head, extra in heads(outputs.detach(), targets):

            def function(params: Params, pair: Any, head: Any = head) -> Tensor:
                return head(*task.outputs(params, pair[0]), pair[1])

            if self._is_alone:  # no longer on the forward pass above
                yield self._one_by_one(function, (batch, extra), size)
                continue
            with torch.enable_grad():
                values = head(outputs, targets, extra)
            yield self._factors(values, function, (batch, extra), size)

    def _watched(self, function: Function, batch: Any, size: int) -> Tensor:
        return self._capture.watch(lambda params: function(params, batch), size)

    def _factors(self, values: Tensor, function: Function, batch: Any, size: int) -> list[Factors]:
        plan = self.plan
        _require_one_value_each(values, size)
        self._require_graph(values)
        calls = self._capture.backward(values)
        if self._capture.bypassed:
            raise UnsupportedModel(
                "A parameter must be used through the layers that hold it.",
                f"{', '.join(self._capture.bypassed[:5])}, which something else uses too.",
                "a measure or loss that reads parameters themselves, or a forward that uses a "
                "layer's weight outside of it for some examples only.",
                "let the measure depend on parameters through the model's outputs, or leave these "
                'parameters out with Task(params="pattern").',
            )
        rows = self._capture.broadcast_rows()
        lost = {*self._misplaced(values, calls), *(plan.scattered if size > 1 else ())}
        if lost:
            can = scatters(plan)
            told = by_example(self._capture, values, calls, lost) if lost <= can else None
            if told is None:
                of = sorted(lost - plan.scattered) or sorted(lost)
                self._warn(f"the examples of a batch cannot be separated in {', '.join(of[:3])}")
                return self._one_by_one(function, batch, size)
            calls = told
        if self.clears:
            calls = without_rounding(calls, plan.layers, size)
        # Factors keep their dtype where the caller has autocast on.
        with torch.autocast(plan.task.layout.device.type, enabled=False):
            by_role = inside(  # some rules read the parameters of their layer
                plan.task,
                self._capture.params,
                lambda: _contributions(plan, calls, size),
            )
        try:
            rows |= self._by_function(function, batch, size)
        except NoBatchingRule as error:
            self._warn(f"torch.func.vmap cannot run the model on a batch ({error})")
            return self._one_by_one(function, batch, size)
        return [self._block(block, by_role, rows, size) for block in plan.blocks]

    def _one_by_one(self, function: Function, batch: Any, size: int) -> list[Factors]:
        """Each example in a forward pass of its own."""
        self._is_alone = True
        found = []
        for i in range(size):
            single = cut(batch, slice(i, i + 1), size)
            values = self._watched(function, single, 1)
            found.append(self._factors(values, function, single, 1))
        return [stacked(parts) for parts in zip(*found, strict=True)]

    def _warn(self, why: str) -> None:
        if not self._has_warned:
            warnings.warn(f"examples are taken one at a time, because {why}", stacklevel=4)
        self._has_warned = True

    def _require_graph(self, values: Tensor) -> None:
        if not (self.plan.layers or self.plan.broadcast) or values.requires_grad:
            return
        raise NotDifferentiable(
            "The value must depend on the chosen layers through differentiable steps.",
            "a value that no gradient reaches.",
            "a measure that counts (accuracy, argmax, a threshold), or .detach() in forward.",
            "use Margin(), LogProb() or Loss(), which move before the decision does.",
        )

    def _misplaced(self, values: Tensor, calls: Sequence[Call]) -> list[str]:
        """Layers in which rows are not those of the examples they would be counted for."""
        kept = [call for call in calls if call.layer not in self.plan.scattered]
        kind = (len(values), tuple((call.layer, tuple(call.delta.shape)) for call in kept))
        # Where rows are routed by value, the next batch of the same shapes may have others.
        self._is_routed |= bool(self.plan.scattered)
        flat = any(c.delta.shape[0] != len(values) for c in kept if self.plan.layers[c.layer] == 0)
        times = AGAIN if flat else 1
        seen = sum((kind, k) in self._placed for k in range(times))
        if seen == times and not self._is_routed:
            return []
        axes = self.plan.layers
        found = misplaced(self._capture, values, calls, axes, self.plan.scattered)
        if not found:
            self._placed.add((kind, seen))
        self._is_routed |= bool(found)
        return found

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

    def require_batching(self, function: Function, batch: Any, size: int) -> None:
        """Ask that `torch.func` can run a batch, if it has to.

        Raises:
            NoBatchingRule: It cannot.
        """
        self._capture.backward(self._watched(function, batch, size))
        self._by_function(function, batch, size)

    def _by_function(self, function: Function, batch: Any, size: int) -> dict[str, Tensor]:
        """Per-example gradients of the parameters that no layer accounts for, after `backward`."""
        params = {name: p.detach() for name, p in self._capture.params.items()}
        plain, names = self._capture.plain, self.plan.by_function
        if size == 1:
            return {k: plain.get(k, torch.zeros_like(params[k]))[None] for k in names}
        found = {k: torch.zeros_like(params[k]).expand(size, *params[k].shape) for k in names}
        chosen = {name: params.pop(name) for name in names if name in plain}
        if not chosen:
            return found

        def one(example: Any) -> dict[str, Tensor]:
            return torch.func.grad(lambda some: function({**params, **some}, example)[0])(chosen)

        # Fused attention has no rule for vmap; its formula has.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            try:
                return found | over_examples(one, batch, size)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                raise NoBatchingRule(tuple(chosen), first_line(error)) from error


class NoBatchingRule(Exception):
    """`torch.func.vmap` cannot run this model, which these parameters need."""

    def __init__(self, names: tuple[str, ...], why: str) -> None:
        super().__init__(why)
        self.names = names


def roles(plan: Plan) -> dict[str, tuple[str, ...]]:
    """The layers to watch, and the parameters that each accounts for."""
    model = plan.task.model
    covered = set(plan.task.layout.names) - {*plan.by_function, *plan.broadcast}
    names = {id(p): name for name, p in model.named_parameters() if name in covered}
    found = {}
    for layer in plan.layers:
        if layer in plan.products:
            continue
        module = model.get_submodule(layer)
        rule = rule_for(module)
        assert rule is not None  # only layers with a rule are watched
        parameters = {role: _parameter(module, role) for role in rule.parameters(module)}
        found[layer] = tuple(role for role, p in parameters.items() if id(p) in names)
    return found


def _parameter(module: nn.Module, role: str) -> Tensor | None:
    path, _, last = role.rpartition(".")
    return module.get_submodule(path)._parameters[last]


def misplaced(
    capture: Capture,
    values: Tensor,
    calls: Sequence[Call],
    axes: Mapping[str, int],
    scattered: Collection[str] = (),
) -> list[str]:
    """Layers, or broadcast parameters, with rows that are not those of their examples.

    Of those in `scattered` it is not asked.
    """
    size = len(values)
    met = capture.met_calls
    every, axes = [*calls, *met], {**axes, **dict.fromkeys((call.layer for call in met), 0)}
    calls = [call for call in every if call.layer not in scattered]
    found = [c.layer for c in calls if not _has_axis(c, axes[c.layer], size)]
    if size == 1 or len(found) == len(calls):
        return list(dict.fromkeys(found))
    without = set(found)
    calls = [call for call in calls if call.layer not in without]
    # By the golden ratio, so that neighbours differ and no period of the batch is met.
    steps = (torch.arange(size, dtype=torch.float64) * 0.6180339887498949 % 1.0 * 8).floor() - 4
    weights = torch.exp2(steps).to(values)
    again = [*capture.backward(values, weights), *capture.met_calls]
    again = [call for call in again if call.layer not in {*scattered, *without}]
    for call, other in zip(calls, again, strict=True):
        examples = Examples(
            size, axes[call.layer], torch.promote_types(call.delta.dtype, torch.float32)
        )
        once = examples.tokens(call.delta).flatten(1)
        c = weights.to(once)[:, None]
        error = (examples.tokens(other.delta).flatten(1) - c * once).norm(dim=1)
        norm = (c * once).norm(dim=1)
        machine = torch.finfo(call.delta.dtype)
        slack = machine.eps**0.5
        # What underflows cannot be told: in steps of the smallest number, of which c counts 8.
        floor = 64 * machine.smallest_normal * machine.eps * once.shape[1] ** 0.5
        if bool((error > slack * (norm + slack * norm.max()) + floor).any()):
            found.append(call.layer)
    return list(dict.fromkeys(found))


DIGITS = 16
"""As many powers of two as a row's δ is scaled by, to tell that many examples apart at once."""


def by_example(
    capture: Capture, values: Tensor, calls: Sequence[Call], scattered: Collection[str]
) -> list[Call] | None:
    """The calls, with the rows of scattered layers put by example; None: some are not one's own.

    With the loss of example i times 2^d, d a digit of i, so is the δ of each row that is its own
    and no other's, exactly: a pass for each digit of the number of examples. A row without δ adds
    to no gradient, and is left out.
    """
    size = len(values)
    of = {k: call for k, call in enumerate(calls) if call.layer in scattered}
    whose = {k: call.delta.new_zeros(len(call.delta), dtype=torch.long) for k, call in of.items()}
    count = 1
    while count < size:
        digit = torch.arange(size, device=values.device) // count % DIGITS
        again = capture.backward(values, torch.exp2(digit.double() - DIGITS // 2).to(values))
        for k, call in of.items():
            digits = _digits(call.delta, again[k].delta)
            whose[k] += count * digits
            if bool(((digits < 0) | (whose[k] >= size)).any()):
                return None
        count *= DIGITS
    return [_put(c, whose[k], size) if k in of else c for k, c in enumerate(calls)]


def scatters(plan: Plan) -> set[str]:
    """The layers whose rows may lie in any order: rules that take each row by itself."""
    rules = {layer: rule_at(plan.task.model, layer, plan.products) for layer in plan.layers}
    return {
        layer
        for layer, rule in rules.items()
        if plan.layers[layer] == 0
        and layer not in plan.repeated
        and not (rule is None or rule.reads)
    }


def _digits(once: Tensor, scaled: Tensor) -> Tensor:
    """d of each row that was scaled by 2^(d − 8); 0 of a row of zeros, −1 where there is no d."""
    once, scaled = once.flatten(1), scaled.flatten(1)
    norms = torch.linalg.vector_norm(once, dim=1, dtype=torch.float64)
    others = torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64)
    digits = (others / norms).log2().round() + DIGITS // 2
    factors = torch.exp2(digits - DIGITS // 2)[:, None].to(once)
    errors = torch.linalg.vector_norm(scaled - factors * once, dim=1, dtype=torch.float64)
    is_own = (errors <= torch.finfo(once.dtype).eps ** 0.5 * others) & (digits >= 0)
    digits = torch.where(is_own & (digits < DIGITS), digits, -1.0)
    return torch.where((norms == 0) & (others == 0), 0.0, digits).long()


def _put(call: Call, whose: Tensor, size: int) -> Call:
    """A call with its rows put by example, those of zeros left out."""
    (rows,) = torch.where((call.delta != 0).flatten(1).any(dim=1))
    places, count = places_of(whose[rows], size), len(whose)

    def moved(x: Any) -> Any:
        has_rows = isinstance(x, Tensor) and x.ndim > 0 and len(x) == count
        return placed(x[rows], places) if has_rows else x

    args, kwargs = tree_map(moved, (call.args, call.kwargs))
    return Call(call.layer, args, kwargs, moved(call.delta))


CLEARED = 8
"""How many ε of the largest δ of an example, over all layers, those of one may be that are 0 but
for rounding: 1.1 was seen."""


def without_rounding(calls: Sequence[Call], axes: Mapping[str, int], size: int) -> list[Call]:
    """The calls, with zeros in place of an example's δ where these are rounding errors throughout.

    A text of one token attends to itself alone: nothing depends on its queries and keys. Their δ is
    0 or a rounding error, as it happens, by how its batch is padded.
    """
    if not calls:
        return []
    norms = [_norms(call.delta, axes[call.layer], size) for call in calls]
    largest = torch.stack([norm.double() for norm in norms]).amax(dim=0)
    found = []
    for call, norm in zip(calls, norms, strict=True):
        # In half precision ε is no longer small.
        is_long = call.delta.dtype in (torch.float32, torch.float64)
        eps = torch.finfo(call.delta.dtype).eps if is_long else 0.0
        lost = (norm > 0) & (norm <= CLEARED * eps * largest)
        if bool(lost.any()):
            axis = axes[call.layer]
            rows = lost.repeat_interleave(call.delta.shape[axis] // size)
            rows = rows.reshape([-1 if k == axis else 1 for k in range(call.delta.ndim)])
            call = dataclasses.replace(call, delta=call.delta.masked_fill(rows, 0.0))
        found.append(call)
    return found


def _norms(delta: Tensor, axis: int, size: int) -> Float[Tensor, " b"]:
    """‖δᵢ‖ of each example, over all its positions."""
    others = [k for k in range(delta.ndim) if k != axis]
    rows = torch.linalg.vector_norm(delta, dim=others) if others else delta.abs()
    return torch.linalg.vector_norm(rows.reshape(size, -1), dim=1)


def _has_axis(call: Call, axis: int, size: int) -> bool:
    extent = call.delta.shape[axis]
    return extent % size == 0 if axis == 0 else extent == size


def _contributions(plan: Plan, calls: Sequence[Call], size: int) -> dict[Source, list[Factors]]:
    """What each use of each layer adds to each parameter's gradient."""
    task = plan.task
    found: dict[Source, list[Factors]] = {}
    for call in calls:
        rule = rule_at(task.model, call.layer, plan.products)
        assert rule is not None  # only layers with a rule are watched
        module = None if call.layer in plan.products else task.model.get_submodule(call.layer)
        examples = Examples(size, plan.layers[call.layer], plan.dtype)
        is_split = rule.reads and task.sharded is not None
        with task.sharded.filled(module) if is_split else nullcontext():  # type: ignore[union-attr,arg-type]
            contributions = rule.gradients(module, call, examples)
        for role, factors in contributions.items():
            found.setdefault(Source(call.layer, role), []).append(factors)
    return found


def _joined_tokens(parts: Sequence[Factors], block: MatrixBlock, size: int, plan: Plan) -> Tokens:
    """All uses of a weight on one axis of positions, with the bias's column of ones."""
    tokens = [p for p in parts if isinstance(p, Tokens)]
    o, i = block.shape
    if not tokens:  # no use reached the value: no positions
        none = torch.zeros((), dtype=plan.dtype, device=plan.task.layout.device)
        return Tokens(none.expand(size, 1, o), none.expand(size, 1, i))
    if block.bias is not None:
        tokens = [t.with_ones() for t in tokens]
    if len(tokens) == 1:
        return tokens[0]
    return Joined(tokens)


def _require_one_value_each(values: Tensor, size: int) -> None:
    if values.shape != (size,):
        raise ScalarLoss(
            f"There must be one value per example: shape ({size},).",
            f"shape {tuple(values.shape)}.",
            "a loss or measure that takes the mean over the batch, or has a value per output.",
            "sum over every axis but the first.",
        )
