"""Which rule gives which parameter's gradient? Assigned by running the model, then checked.

A few examples show which layers run and on which axis each sees the examples. The check: Σᵢ cᵢ gᵢ
with unequal cᵢ, from the factors, must be the gradient that autograd gives for Σᵢ cᵢ ℓᵢ. What no
layer's rule accounts for is looked for where it meets the examples (`broadcast.py`). What fails is
left to `torch.func`, and the plan says so; where `torch.func` cannot run the model on a batch,
examples are taken one at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from upweight._typing import Batch, Params
from upweight.errors import NonFinite, UnsupportedModel, UpweightError, listed
from upweight.gradients.blocks import Block, MatrixBlock, Plan, Source, VectorBlock
from upweight.gradients.functional import as_dense
from upweight.gradients.hooks import Capture, as_written, inside
from upweight.gradients.layers import PRODUCT, Rule, rule_at, rule_for
from upweight.gradients.passes import (
    GradientPass,
    NoBatchingRule,
    by_example,
    misplaced,
    roles,
    scatters,
)
from upweight.task.data import Data
from upweight.task.lent import lent
from upweight.task.modes import require_modules
from upweight.task.precision import dtypes_in
from upweight.task.task import Task

PROBE = 3
"""Examples to plan with: in batches of two sizes, to see their axis; with weights, to check."""

TOGETHER = 16
"""Examples to measure with what it costs to take them one at a time."""

_Shapes = tuple[torch.Size, ...]
"""Of a call's output and of its input."""


def plan(task: Task, theta: Float[Tensor, " p"], data: Data) -> Plan:
    """Assign every chosen parameter to a block, for any θ; check the gradients that come of it.

    Raises:
        UnsupportedModel: The model cannot be watched (a script, a model split over devices), or a
            parameter has neither a layer rule nor a gradient by `torch.func`.
        NonFinite: A gradient of an example that is tried is NaN or infinite.

    Cost: some forward and backward passes over three examples.
    """
    require_modules(task.model)
    with lent(task.model), as_written():
        return _Planning(task, theta, data).plan()


class _Planning:
    """The steps of `plan`, each of which leaves some parameters to the next way of doing it."""

    def __init__(self, task: Task, theta: Float[Tensor, " p"], data: Data) -> None:
        self.task, self.theta, self.data = task, theta, data
        self.owners, unruled = _owners(task)
        self.ran: set[str] = set()
        self.axes: dict[str, int] = {}
        self.repeated: dict[str, bool] = {}
        self.dtypes = frozenset({task.layout.dtype})
        self.left = {name: f"{where} has no layer rule for it" for name, where in unruled.items()}
        self.broadcast: tuple[str, ...] = ()
        self.products: dict[str, bool] = {}
        self.scattered: frozenset[str] = frozenset()
        self.notes: list[str] = []

    def plan(self) -> Plan:
        self._find_axes()
        self._drop_unused_twins()
        if self.data.form.uncut is not None:
            return self._planned_alone()
        idle = {k: o for k, o in self.owners.items() if any(s.layer not in self.ran for s in o)}
        self._leave_where(lambda s: s.layer not in self.ran, "did not run on the examples tried")
        self._leave_where(
            lambda s: s.layer not in self.axes, "does not see the examples on one of its first axes"
        )
        for name, sources in list(self.owners.items()):
            if len(self._orientations(sources)) > 1:
                self._leave(name, "one layer keeps it as [o, i] and another as [i, o]")
        bypassed, lost = self._watched()
        also = {name: self.owners[name] for name in bypassed if name in self.owners}
        for name in bypassed:
            self._leave(name, "it is also used outside of its layers")
        self._find_products(also)
        whole = dict(self.owners), dict(self.left)
        self._find_scattered(lost, idle)
        self._leave_where(
            lambda s: s.layer in lost and s.layer not in self.scattered,
            "does not keep the examples in their order",
        )
        self._find_broadcast()
        made = self._made()
        alone = self._no_batching_rule(made)
        if alone:
            # One example at a time, every row of a layer is that example's.
            self.owners = {k: s for k, s in whole[0].items() if k not in self.broadcast}
            self.left = {k: why for k, why in self.left.items() if k not in self.owners}
            made = self._one_by_one(made, alone)
        return self._matched(made)

    def _capture(
        self,
        layers: Mapping[str, Sequence[str]],
        repeated: Mapping[str, bool],
        broadcast: Sequence[str] = (),
        products: Sequence[str] | None = None,
    ) -> Capture:
        products = tuple(self.products) if products is None else products
        return Capture(self.task, self.theta, layers, repeated, broadcast, products=products)

    def _one_by_one(self, made: Plan, names: Sequence[str]) -> Plan:
        """The plan that takes examples alone, and a note of what that costs."""
        its, them = ("their", "them") if len(names) > 1 else ("its", "it")
        self.notes.append(
            f"examples are taken one at a time, about {self._times_slower(made)} times slower, "
            f"because of {listed(names, 2)}: there is no layer rule for {its} use, and torch.func "
            f'cannot run the model; Task(params="pattern") can leave {them} out'
        )
        return self._made(one_by_one=True)

    def _times_slower(self, made: Plan) -> int:
        """What examples take alone, over what they take together, forwards and backwards."""
        seconds = {}
        with self._capture(roles(made), made.repeated) as capture:
            for size in (TOGETHER, 1):
                batch = self.task.to_device(self.data.take([0] * size))
                took = []
                for _ in range(3):
                    start = perf_counter()
                    values = capture.watch(partial(_checked, self.task, batch=batch), size)
                    capture.backward(values)
                    values.sum().item()  # waits for a device
                    took.append(perf_counter() - start)
                seconds[size] = min(took)
        return max(1, round(TOGETHER * seconds[1] / seconds[TOGETHER]))

    def _matched(self, made: Plan) -> Plan:
        """The plan without the layers whose gradients are not autograd's."""
        wrong = self._mismatches(made)
        if not wrong:
            return made
        for name in wrong:
            self._leave(name, "its layers' gradients differ from autograd's")
        made = self._made(made.one_by_one)
        if not made.one_by_one and (alone := self._no_batching_rule(made)):
            made = self._one_by_one(made, alone)
        left = self._mismatches(made)
        if left:
            raise UnsupportedModel(
                "Per-example gradients must add up to the gradient of the total.",
                f"gradients of {', '.join(left[:5])} that do not.",
                "a model whose examples depend on each other, or that answers differently each "
                "time.",
                'call model.eval(), or leave these parameters out with Task(params="pattern").',
            )
        return made

    def _planned_alone(self) -> Plan:
        """For examples that are read one at a time: every row of a layer is that example's."""
        self._leave_where(lambda s: s.layer not in self.ran, "did not run on the examples tried")
        # A layer that runs once per part of an example has no axis that grows.
        self.axes = {layer: self.axes.get(layer, 0) for layer in self.ran}
        for name in self._watched()[0]:
            self._leave(name, "it is also used outside of its layers")
        return self._matched(self._made(one_by_one=True))

    def _drop_unused_twins(self) -> None:
        """Of layers that hold the same parameter, those that run account for it."""
        for name, sources in self.owners.items():
            ran = tuple(s for s in sources if s.layer in self.ran)
            self.owners[name] = ran or sources

    def _find_products(self, also: Mapping[str, tuple[Source, ...]]) -> None:
        """Of what is left, the parameters that the examples are multiplied with.

        Args:
            also: The layers of those that are used there as well.
        """
        matrices = {k for k, p in self.task.named(self.theta).items() if p.ndim in (2, 3)}
        candidates = [name for name in self.left if name in matrices]
        found = self._multiplied(candidates) if candidates else {}
        for name, is_io in found.items():
            sources = (*also.get(name, ()), Source(name, PRODUCT))
            self.owners[name], self.axes[name], self.products[name] = sources, 0, is_io
        bypassed, lost = self._watched() if found else ((), [])
        for name in found:
            if name in (*bypassed, *lost) or len(self._orientations(self.owners[name])) > 1:
                self._leave(name, self.left[name])
            else:
                self.left.pop(name)

    def _multiplied(self, candidates: Sequence[str]) -> dict[str, bool]:
        """Those with the examples on the first axis of each product, and whether as [i, o]."""
        turned: dict[str, set[bool]] = {}
        axes: dict[str, set[int | None]] = {}
        made = self._made()
        with self._capture(roles(made), made.repeated, products=candidates) as capture:
            for index in dict.fromkeys((0, len(self.data) - 1)):
                small, large = (self._shapes(capture, index, n) for n in (PROBE - 1, PROBE))
                for name, said in capture.turned.items():
                    turned.setdefault(name, set()).update(said)
                    pairs = (small.get(name, []), large.get(name, []))
                    axes.setdefault(name, set()).update(_axes_of(*pairs))
        return {
            name: said.pop()
            for name, said in turned.items()
            if len(said) == 1 and axes[name] == {0}
        }

    def _find_scattered(
        self, lost: Collection[str], idle: Mapping[str, tuple[Source, ...]]
    ) -> None:
        """Of layers that do not keep the examples in order, those in which each row tells its own.

        Args:
            lost: The layers.
            idle: Parameters of layers that did not run: where examples are routed, others may.
        """
        made = self._made()
        unknown = scatters(made) & set(lost)
        for batch, size in self._probe() if unknown else ():
            with self._capture(roles(made), made.repeated) as capture:
                values = capture.watch(partial(_checked, self.task, batch=batch), size)
                calls = capture.backward(values)
                if by_example(capture, values, calls, unknown) is None:
                    unknown = set()
        self.scattered = frozenset(unknown)
        for name, sources in idle.items() if unknown else ():
            rules = [rule_for(self.task.model.get_submodule(s.layer)) for s in sources]
            if name in self.left and not any(rule is None or rule.reads for rule in rules):
                self.owners[name] = sources
                del self.left[name]
                for s in sources:
                    self.axes.setdefault(s.layer, 0)
                self.scattered |= {s.layer for s in sources} - self.ran

    def _find_broadcast(self) -> None:
        """Of what is left, the parameters that meet the examples by broadcasting and only so."""
        candidates = tuple(self.left)
        while candidates:
            found = self._met(candidates)
            if found == candidates:
                break
            candidates = found
        self.broadcast = candidates

    def _met(self, candidates: tuple[str, ...]) -> tuple[str, ...]:
        """Those that a capture finds so, on each of the examples tried."""
        seen, wrong = set[str](), set[str]()
        made = self._made()
        try:
            with self._capture(roles(made), made.repeated, candidates) as capture:
                for batch, size in self._probe():
                    values = capture.watch(partial(_checked, self.task, batch=batch), size)
                    calls = capture.backward(values)
                    seen |= {name for m in capture.met if m.delta is not None for name in m.names}
                    wrong |= {name for name in candidates if name in capture.bypassed}
                    wrong |= set(misplaced(capture, values, calls, made.layers, made.scattered))
        except (RuntimeError, ValueError, IndexError, TypeError, UpweightError):
            return ()
        return tuple(name for name in candidates if name in seen - wrong)

    def _leave(self, name: str, why: str) -> None:
        if name in self.broadcast:
            self.broadcast = tuple(k for k in self.broadcast if k != name)
            self.left[name] = why
        self.products.pop(name, None)
        if self.owners.pop(name, None) is not None:
            self.left[name] = why

    def _leave_where(self, condition: Callable[[Source], bool], why: str) -> None:
        for name, sources in list(self.owners.items()):
            at = [s.layer for s in sources if condition(s)]
            if at:
                self._leave(name, f"{at[0] or 'the model'} {why}")

    def _probe(self) -> list[tuple[Batch, int]]:
        """A few examples, from all over the data: together if they can be, with their number."""
        last = len(self.data) - 1
        few = sorted({0, last // 2, last})
        return [
            (self.task.to_device(batch), stop - start)
            for start, stop, batch in self.data.subset(few).batches(len(few))
        ]

    def _no_batching_rule(self, made: Plan) -> tuple[str, ...]:
        """The parameters left to `torch.func`, if it cannot run the model on a batch."""
        function = partial(_checked, self.task)
        try:
            for batch, size in self._probe():
                with GradientPass(made, self.theta) as gradients:
                    gradients.require_batching(function, batch, size)
        except NoBatchingRule as error:
            return error.names
        return ()

    def _mismatches(self, made: Plan) -> list[str]:
        """Parameters whose gradients by the plan are not autograd's."""
        wrong = [name for probe in self._probe() for name in _mismatches(made, self.theta, *probe)]
        return list(dict.fromkeys(wrong))

    def _made(self, one_by_one: bool = False) -> Plan:
        axes = {s.layer: self.axes[s.layer] for o in self.owners.values() for s in o}
        repeated = {layer: on_axis for layer, on_axis in self.repeated.items() if layer in axes}
        left = {name: why for name, why in self.left.items() if name not in self.broadcast}
        # Alone, an example's gradient in them is that of the batch.
        notes = () if one_by_one else _notes(left)
        made = _planned(
            self.task, self.owners, axes, (*notes, *self.notes), self.broadcast, self.products
        )
        return dataclasses.replace(
            made,
            repeated=repeated,
            scattered=frozenset(self.scattered & axes.keys()),
            one_by_one=one_by_one,
            computes_in=self.dtypes,
        )

    def _find_axes(self) -> None:
        """On which axis each layer sees the examples: the one that grows with the batch."""
        self.axes, free = self._seen(self.repeated)
        refused: set[str] = set()
        while free:
            # In order: what follows a repeated layer may see the examples by that alone.
            layer, on_axis = next(iter(free.items()))
            attempt = {**self.repeated, layer: on_axis}
            if self._is_same_with(attempt):
                axes, found = self._seen(attempt)
                if layer in axes:
                    self.repeated, self.axes, free = attempt, axes, found
            refused.add(layer)
            free = {name: on_axis for name, on_axis in free.items() if name not in refused}

    def _seen(self, repeated: Mapping[str, bool]) -> tuple[dict[str, int], dict[str, bool]]:
        """Each layer's axis; and the layers whose output is the same for all examples."""
        found: dict[str, set[int | None]] = {}
        free: dict[str, bool] = {}
        with self._capture(self._accounted(), repeated) as capture:
            for index in dict.fromkeys((0, len(self.data) - 1)):
                small, large = (self._shapes(capture, index, n) for n in (PROBE - 1, PROBE))
                for layer in dict.fromkeys((*small, *large)):  # in the order of their calls
                    pairs = (small.get(layer, []), large.get(layer, []))
                    found.setdefault(layer, set()).update(_axes_of(*pairs))
                    if pairs[0] == pairs[1]:
                        free.setdefault(layer, pairs[0][0][0][:1] == (1,))
        self.ran = set(found)
        known = {layer: axes.pop() for layer, axes in found.items() if len(axes) == 1}
        axes = {layer: axis for layer, axis in known.items() if axis is not None}
        return axes, {layer: free[layer] for layer in found if layer in free}

    def _shapes(self, capture: Capture, index: int, size: int) -> dict[str, list[_Shapes]]:
        """The shapes of each call's output and input on copies of one example."""
        batch = self.task.to_device(self.data.take([index] * size))
        values = capture.watch(lambda p: _checked(self.task, p, batch), size)
        shapes: dict[str, list[_Shapes]] = {}
        for call in capture.backward(values):
            if not call.delta.numel():  # no row of this example comes to the layer
                continue
            inputs = [x.shape for x in tree_leaves((call.args, call.kwargs)) if _is_input(x)]
            rule = rule_at(self.task.model, call.layer, dict.fromkeys(capture.turned, False))
            if rule is not None and rule.has_one_input and len(inputs) != 1:
                inputs = [torch.Size()]  # of no axis
            shapes.setdefault(call.layer, []).append((call.delta.shape, *inputs[:1]))
        return shapes

    def _is_same_with(self, repeated: Mapping[str, bool]) -> bool:
        """Whether the model still runs, to the same outputs, with these layers repeated."""
        for batch, size in self._probe():
            expected, _ = self.task.call(self.theta, batch)
            try:
                with self._capture(self._accounted(), repeated) as capture:
                    found, _ = capture.forward(batch, size)
            except (RuntimeError, ValueError, IndexError, TypeError, UpweightError):
                return False
            slack = 100 * torch.finfo(expected.dtype).eps
            if found.shape != expected.shape or not torch.allclose(found, expected, slack, slack):
                return False
        return True

    def _accounted(self) -> dict[str, tuple[str, ...]]:
        """The layers that own parameters, and which."""
        found: dict[str, tuple[str, ...]] = {}
        for sources in self.owners.values():
            for s in sources:
                if s.role == PRODUCT:
                    continue
                found[s.layer] = (*found.get(s.layer, ()), s.role)
        return found

    def _orientations(self, sources: Sequence[Source]) -> set[bool]:
        return _orientations(self.task.model, sources, self.products)

    def _watched(self) -> tuple[tuple[str, ...], list[str]]:
        """Parameters used outside of their layers; layers whose rows are not the examples'."""
        made = self._made()
        bypassed, lost = dict[str, None](), dict[str, None]()
        with self._capture(roles(made), made.repeated) as capture:
            for batch, size in self._probe():
                values = capture.watch(partial(_checked, self.task, batch=batch), size)
                self.dtypes |= dtypes_in(partial(self.task.call, self.theta, batch))
                calls = capture.backward(values)
                bypassed |= dict.fromkeys(capture.bypassed)
                self.dtypes |= {values.dtype, *(c.delta.dtype for c in calls)}
                lost |= dict.fromkeys(
                    misplaced(capture, values, calls, made.layers, made.scattered)
                )
        return tuple(bypassed), list(lost)


def _owners(task: Task) -> tuple[dict[str, tuple[Source, ...]], dict[str, str]]:
    """The layers that use each chosen parameter; and parameters that none has a rule for."""
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
            if names[id(parameter)] in owners:
                continue  # held twice; whether it is used here as well is found out
            unruled[names[id(parameter)]] = f"{type(module).__name__} ({layer or 'the model'})"
    return _without_double_claims({name: tuple(s) for name, s in owners.items()}), unruled


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


def _axes_of(small: Sequence[_Shapes], large: Sequence[_Shapes]) -> set[int | None]:
    """The axes that grow between two batch sizes, over all calls, outputs and inputs."""
    if len(small) != len(large):
        return {None}
    return {
        _axis(s, b)
        for few, more in zip(small, large, strict=True)
        for s, b in zip(few, more, strict=False)
    }


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
    broadcast: tuple[str, ...],
    products: Mapping[str, bool],
) -> Plan:
    """Blocks for the parameters whose layers have rules, and for the rest."""
    layout = task.layout
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    rules = {s.layer: rule_at(task.model, s.layer, products) for o in owners.values() for s in o}
    biases = _joined_biases(owners, rules)
    blocks: list[Block] = []
    sources: dict[str, tuple[Source, ...]] = {}
    vectors: dict[tuple[str, ...], list[str]] = {}
    for name in layout.names:
        if name in biases.values():
            continue
        where = owners.get(name)
        if where is not None and len(shapes[name]) > 1 and _has_factors(where, rules):
            turned = _orientations(task.model, where, products) == {True}
            made, of = _matrix_blocks(
                task.model, name, biases.get(name), shapes[name], where, turned, products
            )
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
        dict(axes),
        sources,
        tuple(name for name in layout.names if name not in owners and name not in broadcast),
        notes,
        broadcast=broadcast,
        products={
            name: products[name] for name in layout.names if name in axes and name in products
        },
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


def _has_factors(sources: Sequence[Source], rules: Mapping[str, Rule | None]) -> bool:
    """Whether the rules of all uses give outer products: not for a norm's gain."""
    return all(rule is not None and rule.has_factors for rule in (rules[s.layer] for s in sources))


def _orientations(
    model: nn.Module, sources: Sequence[Source], products: Mapping[str, bool]
) -> set[bool]:
    """Whether the layers that use a weight keep it transposed."""
    rules = [rule_at(model, s.layer, products) for s in sources]
    return {rule is not None and rule.is_transposed for rule in rules}


def _matrix_blocks(
    model: nn.Module,
    name: str,
    bias: str | None,
    shape: tuple[int, ...],
    where: tuple[Source, ...],
    is_transposed: bool,
    products: Mapping[str, bool],
) -> tuple[list[Block], dict[str, tuple[Source, ...]]]:
    """A block for a weight, or one for each group of a convolution or each expert."""
    at = where[0].layer
    rule = rule_at(model, at, products)
    module = None if at in products else model.get_submodule(at)
    if rule is not None and rule.is_stacked and len(shape) == 3:
        groups, *rest = shape
        size, inputs = reversed(rest) if is_transposed else rest
        outputs = groups * size
    else:
        groups = 1 if rule is not None and rule.is_stacked else getattr(module, "groups", 1)
        first, width = shape[0], math.prod(shape[1:])
        is_transposed = is_transposed and not (rule is not None and rule.is_stacked)
        outputs, inputs = (width, first) if is_transposed else (first, width)
    width = inputs + (bias is not None)
    if groups == 1:
        rows = (0, outputs)
        made = MatrixBlock(name, name, bias, (outputs, width), rows, is_transposed)
        return [made], {name: where}
    size = outputs // groups
    blocks: list[Block] = []
    sources = {}
    for k in range(groups):
        rows = (k * size, (k + 1) * size)
        made = MatrixBlock(
            f"{name}[{rows[0]}:{rows[1]}]", name, bias, (size, width), rows, is_transposed
        )
        blocks.append(made)
        sources[made.name] = tuple(Source(s.layer, f"{s.role}[{k}]") for s in where)
    return blocks, sources


def _checked(task: Task, params: Params, batch: Batch) -> Tensor:
    """What gradients are compared on: ℓᵢ, and outputs too, for a loss may saturate or be masked."""
    outputs, targets = task.call(params, batch)
    losses = task.loss(outputs, targets)
    flat = outputs.reshape(len(outputs), -1)
    unequal = torch.arange(1, flat.shape[1] + 1, device=flat.device).cos().to(flat.dtype)
    return losses + (flat @ unequal).to(losses)


def _eps(dtypes: Iterable[torch.dtype]) -> float:
    """The rounding of the coarsest of these dtypes: autocast computes in less than it is given.

    And of float32, which norms and rotary positions of many models are in whatever they are given.
    """
    return max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32))


def _mismatches(made: Plan, theta: Float[Tensor, " p"], batch: Batch, size: int) -> list[str]:
    """Parameters whose Σᵢ cᵢ gᵢ is not what autograd gives for Σᵢ cᵢ ℓᵢ, but for rounding."""
    task, eps = made.task, _eps(made.computes_in)
    weights = torch.tensor([1.0, -0.5, 2.25], device=task.layout.device)[:size]
    params = task.leaves(theta)
    with torch.enable_grad():
        values = _checked(task, params, batch)
        parts = inside(
            task,
            params,
            lambda: torch.autograd.grad(
                values, list(params.values()), weights.to(values), allow_unused=True
            ),
        )
    truth = [
        torch.zeros_like(p) if g is None else as_dense(g)
        for p, g in zip(params.values(), parts, strict=True)
    ]
    with GradientPass(made, theta) as gradients:
        factors = gradients.of(lambda p, b: _checked(task, p, b), batch, size)
    flat = torch.cat([g.flatten() for g in truth]).to(made.dtype)
    if not bool(flat.isfinite().all()):
        raise NonFinite(
            "The gradients that layers are checked with must be finite.",
            "NaN or infinity in those of the first, middle or last example.",
            "a square root or norm of 0, or gradients that overflow in this dtype.",
            "look at these examples, or use model.float().",
        )
    scale = float(flat.norm())
    wrong = []
    for block, part in zip(made.blocks, factors, strict=True):
        expected = flat[block.index(task.layout).to(flat.device)]
        c = weights.to(made.dtype)
        error = float((part.scaled(c).total().flatten() - expected).norm())
        # Both round as the layers do; a wrong axis or order is off by far more than this. What
        # cancels in the sum (the gradient of a key's bias is 0) rounds as its terms do.
        terms = float(part.absolute().scaled(c.abs()).total().norm())
        if not error <= eps**0.5 * float(expected.norm()) + 10 * eps * (terms + scale):
            wrong += list(block.parameters)
    return wrong


def _notes(left: Mapping[str, str]) -> tuple[str, ...]:
    """What was left to `torch.func`, and why: a note for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return tuple(
        f"{listed(names)}: per-example gradients by torch.func, because {why}"
        for why, names in reasons.items()
    )
