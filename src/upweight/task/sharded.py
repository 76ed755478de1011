"""A model whose parameters are split over processes by `fully_shard`: whole weights while they run.

Each process keeps its part of every parameter. A part of the model that was given to `fully_shard`
is a unit: before it runs its weights are gathered from all processes, and afterwards they are
freed. What autograd would keep of them for the backward pass is gathered again there. So a process
has the whole weights of one unit and of those around it at a time.

The hooks of `fully_shard` itself are off meanwhile: they want every process to run forwards and
backwards equally often, and processes that share out examples do not (`upweight.runtime.turns`).
The numbers are those of the whole model: weights are gathered, and no sum is taken.

θ as a flat vector does not exist in any process. A placeholder for θ has its length, and NaN for
entries, which take no memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight._typing import Params
from upweight.errors import UnsupportedModel, listed
from upweight.runtime.ranks import Ranks
from upweight.runtime.turns import Turns

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SPLIT_STATE = "__composable_api_state_key"
"""How the attributes begin in which `fully_shard` keeps what it is doing."""

ALIGNED = 16
"""Bytes: where each tensor begins in what is sent."""

NUDGE = "upweight_nudge"
"""The attribute of a storage that says that it is of a placeholder for θ: (eps, seed)."""

BY_LAYER = (
    "ask methods that go by layer, such as Influence(EKFAC(), damping=Relative(0.1)), with "
    "attribute, self_influence, query_tokens or an Index"
)

WHOLE = (
    "make the model again without it and load the whole weights: "
    "plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True))), from torch.distributed.checkpoint.state_dict."
)


def is_split(parameter: Any) -> bool:
    """Whether a process has only a part of a parameter."""
    return type(parameter).__name__ == "DTensor"


def own_part(parameter: Tensor) -> Tensor:
    """What this process has of a parameter."""
    if not is_split(parameter):
        return parameter
    with torch.no_grad():
        part: Tensor = parameter.to_local()  # type: ignore[attr-defined]
    return part


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module: that which `fully_shard` put another in the place of."""
    kind = type(module)
    is_unit = any(k.__name__ == "FSDPModule" for k in kind.__mro__[1:2])
    return kind.__mro__[2] if is_unit else kind


def require_whole(model: nn.Module) -> None:
    """Refuse parameters that are split otherwise than by `fully_shard` over one row of processes.

    Raises:
        UnsupportedModel: With how to have them whole.
    """
    units = _units(model)
    known = {id(p) for unit in units for p in unit.parameters}
    split = {name: p for name, p in model.named_parameters() if is_split(p)}
    other = [name for name, p in split.items() if id(p) not in known or not _is_plain(p)]
    other += [
        name or "the model"
        for name, module in model.named_modules()
        if type(module).__name__ == "FullyShardedDataParallel"
    ]
    if other:
        raise UnsupportedModel(
            "Every process must have the whole of each parameter, or its part by fully_shard.",
            f"{listed(other)}, split over processes in another way.",
            "FullyShardedDataParallel or parallelize_module, or fully_shard with a mesh of "
            "several axes, used in training.",
            WHOLE,
        )
    mixed = [unit.name or "the model" for unit in units if _casts(unit.module)]
    if mixed:
        raise UnsupportedModel(
            "A model that is split over processes must compute in the dtype of its parameters.",
            f"a MixedPrecisionPolicy of {listed(mixed)}.",
            "the policy of training, fully_shard(…, mp_policy=…).",
            "leave mp_policy out, and load the weights in the dtype to compute in; or use "
            "torch.autocast in Task(forward=…).",
        )
    groups = {p.device_mesh.get_group() for p in split.values()}  # type: ignore[attr-defined]
    if len(groups) > 1:
        raise UnsupportedModel(
            "All parameters must be split over the same processes.",
            f"{len(groups)} groups of processes.",
            "fully_shard with another mesh for some parts of the model.",
            "one mesh for all of them; or " + WHOLE,
        )


def _is_plain(parameter: Any) -> bool:
    """Split along one axis, over one row of processes, where the parameter is."""
    mesh, (first, *more) = parameter.device_mesh, parameter.placements
    return (
        mesh.ndim == 1
        and not more
        and first.is_shard()
        and type(first).__name__ == "Shard"
        and mesh.device_type == parameter.device.type
    )


def _casts(module: nn.Module) -> bool:
    policy = getattr(module._get_fsdp_state(), "_mp_policy", None)  # type: ignore[operator]
    dtypes = (getattr(policy, name, None) for name in ("param_dtype", "output_dtype"))
    return any(dtype is not None for dtype in dtypes)


@dataclass(frozen=True, eq=False)
class _Unit:
    """A module that was given to `fully_shard`, and the parameters that are gathered for it.

    Args:
        name: The module's.
        places: Of each parameter, where modules hold it, by module and name in it.
    """

    name: str
    module: nn.Module
    parameters: tuple[Any, ...]
    places: tuple[tuple[tuple[nn.Module, str], ...], ...]

    @cached_property
    def layout(self) -> tuple[list["_Parts"], int]:
        """How the parameters lie in what each process sends, and how many bytes that is."""
        return _parts(self.parameters, self.parameters[0].device_mesh.size())


def _units(model: nn.Module) -> tuple[_Unit, ...]:
    """In the order of `named_modules`."""
    starts = [(n, m) for n, m in model.named_modules() if kind_of(m) is not type(m)]
    heads = {id(module) for _, module in starts}

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        yield module
        for child in module.children():
            if id(child) not in heads:
                yield from inside(child)

    units = []
    for name, start in starts:
        found: dict[int, tuple[Any, dict[tuple[int, str], tuple[nn.Module, str]]]] = {}
        for module in inside(start):
            for last, p in module._parameters.items():
                if is_split(p):
                    found.setdefault(id(p), (p, {}))[1][id(module), last] = (module, last)
        held = tuple(found.values())
        units.append(
            _Unit(
                name,
                start,
                tuple(p for p, _ in held),
                tuple(tuple(at.values()) for _, at in held),
            )
        )
    return tuple(unit for unit in units if unit.parameters)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A tensor that autograd keeps, as a part of a weight that is gathered again."""

    unit: int
    parameter: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Whole(torch.autograd.Function):
    """A whole weight, whose derivative is that of its placeholder."""

    @staticmethod
    def forward(ctx: Any, instead: Tensor, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def stands_in(value: Any) -> bool:
    """Whether a tensor is a placeholder for θ, or for a part of it."""
    return _nudge(value) is not None


def _nudge(value: Any) -> tuple[float, int] | None:
    """By how much a placeholder changes the weights, and the seed of the signs; None: a tensor."""
    if not isinstance(value, Tensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    found: tuple[float, int] | None = getattr(value.untyped_storage(), NUDGE, None)
    return found


def _placeholder(
    size: int, dtype: torch.dtype, device: torch.device, nudge: tuple[float, int] = (0.0, 0)
) -> Float[Tensor, " p"]:
    """One NaN in memory, as long as θ. Its views are of the same storage, and so known as well."""
    one = torch.full((1,), math.nan, dtype=dtype, device=device)
    setattr(one.untyped_storage(), NUDGE, nudge)
    return one.expand(size)


def nudged(theta: Float[Tensor, " p"], eps: float, seed: int) -> Float[Tensor, " p"]:
    """A placeholder for θ with every parameter changed by eps of it, up or down."""
    return _placeholder(len(theta), theta.dtype, theta.device, (eps, seed))


def _at(instead: Tensor, whole: Tensor, k: int) -> Tensor:
    """A whole weight where there is a placeholder for θ."""
    eps, seed = _nudge(instead) or (0.0, 0)
    if eps:
        generator = torch.Generator(device=whole.device).manual_seed(seed << 32 | k)
        signs = torch.randint(0, 2, whole.shape, generator=generator, device=whole.device)
        whole = whole * (1 + eps * (2 * signs - 1).to(whole))
    found: Tensor = _Whole.apply(instead, whole) if instead.requires_grad else whole  # type: ignore[no-untyped-call]
    return found


@dataclass(eq=False)
class Sharded:
    """The split parameters of a model.

    Args:
        model: With units of `fully_shard`.
        units: What is gathered at a time.
    """

    model: nn.Module
    units: tuple[_Unit, ...]
    _out: list[tuple[int, list[Tensor]]] = field(default_factory=list)
    """The units that run, and their weights."""
    _stored: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Which weight a storage is of."""
    _keeping: int = 0
    _last: tuple[int, list[Tensor]] | None = None
    _depth: int = 0
    _seen: Callable[[Tensor], Tensor] = lambda x: x

    @classmethod
    def of(cls, model: nn.Module) -> "Sharded | None":
        """None where every process has the whole of each parameter, or none that is known here."""
        units = _units(model) if any(is_split(p) for p in model.parameters()) else ()
        return cls(model, units) if units else None

    def theta(self, size: int, dtype: torch.dtype) -> Float[Tensor, " p"]:
        """A placeholder for θ."""
        return _placeholder(size, dtype, self.units[0].parameters[0].device)

    # -- gathering weights ------------------------------------------------------------------------

    @cached_property
    def split(self) -> tuple[tuple[str, Tensor], ...]:
        """The parameters by name, also while `fully_shard` has whole ones in their place."""
        found = {}
        for unit in self.units:
            for p, ((module, last), *_) in zip(unit.parameters, unit.places, strict=True):
                path = next(n for n, m in unit.module.named_modules() if m is module)
                found[id(p)] = (".".join(filter(None, (unit.name, path, last))), p)
        return tuple(found.values())

    @cached_property
    def _named(self) -> dict[str, Tensor]:
        return dict(self.split)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.split}

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """The unit of each parameter, and its place there."""
        return {
            id(p): (number, k)
            for number, unit in enumerate(self.units)
            for k, p in enumerate(unit.parameters)
        }

    @property
    def _some(self) -> Tensor:
        return own_part(self.units[0].parameters[0])

    @property
    def group(self) -> "ProcessGroup":
        """The processes that have the parts."""
        found: ProcessGroup = self.units[0].parameters[0].device_mesh.get_group()
        return found

    @cached_property
    def _turns(self) -> Turns[list[Tensor]]:
        # Steps back come first and from the last unit on, then those forward from the first on: so
        # processes that do the same thing, one ahead of the other, come to do it together.
        count = len(self.units)
        return Turns(self.group, self._some.device, 2 * count, self._together)

    def _together(self, step: int) -> list[Tensor]:
        count = len(self.units)
        return _gathered(self.units[step - count if step >= count else count - 1 - step])

    def _weights(self, number: int, *, back: bool = False) -> list[Tensor]:
        """The whole weights of a unit. All processes come here, if only to help."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        for unit, weights in self._out:
            if unit == number:
                return weights
        self._last = None  # before the next is there
        count = len(self.units)
        found = self._turns.take(count - 1 - number if back else count + number)
        if self._keeping:
            self._last = (number, found)
        return found

    def whole(self, name: str, instead: Tensor) -> Tensor:
        """All of one parameter; `instead` where it is not split.

        Nothing that `fully_shard` has gathered is read: reading it would prevent its memory from
        being freed.
        """
        parameter = self._named.get(name)
        return instead.detach() if parameter is None else self._whole(parameter)

    def _whole(self, parameter: Tensor) -> Tensor:
        number, k = self._places[id(parameter)]
        return self._weights(number)[k]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """The weights of the unit that was gathered last stay at hand. They must not change."""
        self._keeping += 1
        try:
            yield
        finally:
            self._keeping -= 1
            if not self._keeping:
                self._last = None

    @contextmanager
    def filled(self, module: nn.Module) -> Iterator[None]:
        """A module holds its weights whole, and so do its parts."""
        taken = [
            (each, last, p)
            for each in module.modules()
            for last, p in each._parameters.items()
            if is_split(p)
        ]
        try:
            for each, last, p in taken:
                each._parameters[last] = self._whole(p)  # type: ignore[assignment,arg-type]
            yield
        finally:
            for each, last, p in taken:
                each._parameters[last] = p

    # -- running the model ------------------------------------------------------------------------

    @contextmanager
    def running(self, chosen: Params) -> Iterator[None]:
        """The model may be called: each unit with its whole weights.

        Args:
            chosen: θ by name: placeholders, or weights for some of the parameters.

        Raises:
            UnsupportedModel: Weights are given for all of them, which no process has; or the model
                was split anew.
        """
        self._require_own(chosen)
        with ExitStack() as stack:
            for module in self.model.modules():
                stack.enter_context(_without_own_hooks(module))
            for number, unit in enumerate(self.units):
                enter = partial(self._enter, number, chosen)
                for handle in (
                    unit.module.register_forward_pre_hook(enter, prepend=True),
                    unit.module.register_forward_hook(
                        partial(self._leave, number), always_call=True
                    ),
                ):
                    stack.callback(handle.remove)
            stack.callback(self._forget)
            # torch.func allows no such hooks; weights then stay until the pass is over.
            if torch._C._functorch.peek_interpreter_stack() is None:
                hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, self._kept)
                stack.enter_context(hooks)
            yield

    def _require_own(self, chosen: Params) -> None:
        split = {name: p for name, p in self.model.named_parameters() if is_split(p)}
        strange = [name for name, p in split.items() if id(p) not in self._places]
        if strange:
            raise UnsupportedModel(
                "A model must be split over processes as it was when its Task was made.",
                f"{listed(strange)}, split since.",
                "fully_shard after Task(…), or a Task made between a forward and a backward pass.",
                "call model.reshard(), and make the Task after fully_shard.",
            )
        given = [chosen[name] for name in split if name in chosen]
        if given and not any(map(stands_in, given)):
            raise UnsupportedModel(
                "A model that is split over processes runs with its own weights only.",
                "other weights, or derivatives by all of θ at once.",
                "a method or verb that moves θ, or takes it as one vector.",
                WHOLE,
            )

    def _enter(self, number: int, chosen: Params, module: nn.Module, _: Any) -> None:
        unit, weights = self.units[number], self._weights(number)
        self._out.append((number, weights))
        for k, (p, whole) in enumerate(zip(unit.parameters, weights, strict=True)):
            self._stored[whole.untyped_storage().data_ptr()] = (number, k)
            given = chosen.get(self._names[id(p)])
            value = whole
            if given is not None:
                value = _at(given, whole, k) if stands_in(given) else given
            for owner, last in unit.places[k]:
                owner._parameters[last] = value  # type: ignore[assignment]

    def _leave(self, number: int, *_: Any) -> None:
        if not self._out or self._out[-1][0] != number:  # it raised before it had them
            return
        weights = self._out.pop()[1]
        unit = self.units[number]
        for p, places in zip(unit.parameters, unit.places, strict=True):
            for owner, last in places:
                owner._parameters[last] = p
        if all(other != number for other, _ in self._out):
            for whole in weights:
                self._stored.pop(whole.untyped_storage().data_ptr(), None)

    def _forget(self) -> None:
        self._out.clear()
        self._stored.clear()

    def _keep(self, x: Tensor) -> Any:
        if x.layout is not torch.strided:
            return x
        found = self._stored.get(x.untyped_storage().data_ptr())
        if found is None:
            return self._seen(x)
        return _Kept(*found, x.shape, x.stride(), int(x.storage_offset()))

    def _kept(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Kept):
            return kept  # type: ignore[no-any-return]
        with torch.no_grad():
            weight = self._weights(kept.unit, back=True)[kept.parameter]
            return weight.as_strided(kept.shape, kept.stride, kept.offset)

    @contextmanager
    def saving(self, seen: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """`seen` is shown what autograd keeps: of hooks within hooks only the inner are called."""
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
            self._seen = seen
            try:
                yield
            finally:
                self._seen = lambda x: x

    # -- processes together -----------------------------------------------------------------------

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """All processes leave together; those that have no more to do help the others."""
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._turns.meet()
        finally:
            self._depth -= 1

    def help(self) -> None:
        """Take part in what another process needs, while waiting for what it makes."""
        self._turns.help()

    def shares(self, ranks: Ranks) -> Ranks:
        """Ranks that have helped each other to where they add up what each of them has.

        Raises:
            UnsupportedModel: They are not the processes that have the parts of the model.
        """
        if ranks.group is None:
            return ranks
        import torch.distributed as dist

        own, given = (dist.get_process_group_ranks(g) for g in (self.group, ranks.group))
        if own != given:
            raise UnsupportedModel(
                "The processes that share the work must be those that the model is split over.",
                f"ranks {given} share the work, and {own} have the parameters.",
                "fully_shard over some of the processes only, or Resources(group=…) of others.",
                "Resources(group=mesh.get_group()), with the mesh that fully_shard was given.",
            )
        return Ranks(ranks.group, self._turns.meet)


@dataclass(frozen=True)
class _Parts:
    """How the parts of a parameter lie in what the processes send.

    Args:
        start: Byte at which each of them begins.
        shapes: Of the part of each process.
        dim: The axis that is split.
    """

    start: int
    shapes: tuple[tuple[int, ...], ...]
    dim: int


def _parts(parameters: Sequence[Any], size: int) -> tuple[list[_Parts], int]:
    """Of some parameters and that many processes, and how many bytes each sends."""
    found, start = [], 0
    for p in parameters:
        dim = p.placements[0].dim
        # Each has as much of the axis as the others, or what is left.
        most = -(-p.shape[dim] // size)
        lengths = [max(0, min(most, p.shape[dim] - rank * most)) for rank in range(size)]
        shapes = [(*p.shape[:dim], length, *p.shape[dim + 1 :]) for length in lengths]
        found.append(_Parts(start, tuple(shapes), dim))
        start += -(-math.prod(shapes[0]) * p.itemsize // ALIGNED) * ALIGNED
    return found, start


def _gathered(unit: _Unit) -> list[Tensor]:
    """The whole parameters of a unit, by one `all_gather` of the bytes of all parts."""
    import torch.distributed as dist

    group = unit.parameters[0].device_mesh.get_group()
    layout, count = unit.layout
    # Whatever is watched in the model: this is none of it.
    with torch.no_grad(), torch._C.DisableTorchFunction():
        own = [own_part(p) for p in unit.parameters]
        mine = torch.zeros(count, dtype=torch.uint8, device=own[0].device)
        for part, at in zip(own, layout, strict=True):
            held = part.contiguous().reshape(-1).view(torch.uint8)
            mine[at.start : at.start + len(held)] = held
        every = [torch.empty_like(mine) for _ in layout[0].shapes]
        dist.all_gather(every, mine, group=group)
        pairs = zip(own, layout, strict=True)
        return [torch.cat(_cut(every, part, at), dim=at.dim) for part, at in pairs]


def _cut(every: Sequence[Tensor], like: Tensor, at: _Parts) -> list[Tensor]:
    """The parts of a parameter in what each process sent."""
    found = []
    for buffer, shape in zip(every, at.shapes, strict=True):
        stop = at.start + math.prod(shape) * like.itemsize
        found.append(buffer[at.start : stop].view(like.dtype).reshape(shape))
    return found


@contextmanager
def _without_own_hooks(module: nn.Module) -> Iterator[None]:
    """The hooks of `fully_shard` are off, and afterwards where they were among the others."""
    before = [(hooks, dict(hooks)) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    own = [{k for k, hook in held.items() if _is_own(hook)} for _, held in before]
    if not any(own):
        yield
        return
    for (hooks, _), some in zip(before, own, strict=True):
        for k in some:
            del hooks[k]
    try:
        yield
    finally:
        for (hooks, held), some in zip(before, own, strict=True):
            now = dict(hooks)
            hooks.clear()
            hooks.update({k: hook for k, hook in held.items() if k in now or k in some})
            hooks.update(now)


def _is_own(hook: Any) -> bool:
    where = getattr(hook, "__module__", None) or getattr(
        getattr(hook, "func", None), "__module__", ""
    )
    return str(where).startswith("torch.distributed.fsdp.")


def require_own_weights(sharded: Sharded | None, what: str, instead: str) -> None:
    """Refuse, by an UnsupportedModel, what needs θ as one vector where it is split."""
    if sharded is None:
        return
    raise UnsupportedModel(
        f"{what} needs the whole of each parameter in every process.",
        f"{len(sharded._places)} parameters, split over processes by fully_shard.",
        "a model that was made for training on several devices.",
        f"{instead}; or {WHOLE}",
    )
