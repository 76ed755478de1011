"""Text ↔ spec, in the grammar of `repr`: `parse(repr(spec)) == spec`.

    spec     = Name "(" arguments ")"  |  Name            a name alone has no arguments
    argument = [keyword "="] value
    value    = spec | number | "-" number | string | True | False | None | tuple | list

Read with `ast`, never evaluated. This is the one place where a name in a text stands for an
algorithm. Lists become tuples, which is what specs hold.
"""

import ast
import difflib
import inspect
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from upweight.curvature.blockwise import Blockwise
from upweight.curvature.diagonal import Diagonal
from upweight.curvature.ekfac import EKFAC
from upweight.curvature.empirical_fisher import EmpiricalFisher
from upweight.curvature.estimators import Expand, Reduce
from upweight.curvature.fisher import Fisher
from upweight.curvature.ggn import GGN
from upweight.curvature.hessian import Hessian
from upweight.curvature.kfac import KFAC
from upweight.curvature.labels import Expected, Observed, Sampled
from upweight.errors import SpecError, UpweightError, message
from upweight.linalg.block_cg import BlockCG
from upweight.linalg.cg import CG
from upweight.linalg.cholesky import Cholesky
from upweight.linalg.damping import Absolute, Evidence, Relative
from upweight.linalg.minres import MINRES
from upweight.linalg.solve import Auto
from upweight.methods.influence import Influence
from upweight.task.losses import (
    Bernoulli,
    CrossEntropy,
    Poisson,
    SmoothHinge,
    SquaredError,
    Weighted,
)
from upweight.task.measures import Logit, LogProb, Loss, Margin
from upweight.task.penalties import L2, NoPenalty, SumToZero
from upweight.training.newton import Newton
from upweight.training.optimizers import SGD, Adam, AdamW
from upweight.training.pbrf import PBRF
from upweight.training.schedules import Constant, Cosine, LinearDecay, Stepwise
from upweight.training.training import Training

REGISTRY: dict[str, tuple[type, ...]] = {
    "method": (Influence,),
    "curvature": (
        Hessian, GGN, Fisher, EmpiricalFisher, EKFAC, KFAC, Diagonal, Blockwise,
    ),
    "labels": (Sampled, Expected, Observed),
    "sharing": (Expand, Reduce),
    "damping": (Absolute, Relative, Evidence),
    "solver": (Auto, Cholesky, CG, BlockCG, MINRES),
    "measure": (Loss, Margin, LogProb, Logit),
    "loss": (CrossEntropy, SquaredError, Bernoulli, Poisson, SmoothHinge, Weighted),
    "penalty": (L2, NoPenalty, SumToZero),
    "recipe": (Training, Newton, PBRF),
    "optimizer": (SGD, Adam, AdamW),
    "schedule": (Constant, Cosine, LinearDecay, Stepwise),
}  # fmt: skip
"""Every spec that a text may name, by what it is."""

SPECS = {spec.__name__: spec for specs in REGISTRY.values() for spec in specs}

LONGEST = 10_000
"""Characters; Python's own parser has limits of its own beyond."""


def parse(text: str, kind: str | None = None) -> Any:
    """The spec that a text describes.

    Args:
        text: As `repr(spec)` writes it.
        kind: One of the kinds of `REGISTRY`, where only that will do.

    Raises:
        SpecError: A word is unknown, an argument does not fit, or the text is not of the grammar;
            says where.

    Example:
        >>> parse("Influence(EKFAC(), damping=Relative(0.1))").curvature == EKFAC()
        True
    """
    reader = _Reader(text)
    spec = reader.spec()
    if kind is not None and type(spec) not in REGISTRY[kind]:
        reader.refuse(
            reader.tree(),
            f"This must be a {kind}.",
            f"the {kind_of(spec)} {type(spec).__name__}",
            f"a {kind_of(spec)} given by itself where it is part of a {kind}.",
            _known(kind),
        )
    return spec


def kind_of(spec: Any) -> str:
    """Under which kind the registry lists a spec."""
    return next((k for k, specs in REGISTRY.items() if type(spec) in specs), "value")


class _Reader:
    """One text, so that errors can point into it."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()

    def tree(self) -> ast.expr:
        if len(self.text) > LONGEST:
            raise SpecError(
                message(
                    f"A spec is a text of at most {LONGEST} characters.",
                    f"{len(self.text)} characters.",
                    "a file's contents in place of a spec.",
                    'for example "Influence(EKFAC(), damping=Relative(0.1))".',
                )
            )
        try:
            return ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            self._refuse_at(
                error.lineno or 1,
                max(0, (error.offset or 1) - 1),
                1,
                "A spec is written as in Python: Name(argument, keyword=value).",
                error.msg,
                "a parenthesis or a quote that is missing, or that the shell took away.",
                "put the whole text in double quotes: "
                '--method "Influence(EKFAC(), damping=Relative(0.1))".',
            )
        except (ValueError, MemoryError, RecursionError) as error:  # null bytes; nested too deep
            raise SpecError(
                message(
                    "A spec is written as in Python: Name(argument, keyword=value).",
                    f"{self.text[:60]!r}: {error or type(error).__name__}.",
                    "a text that is no spec.",
                    'for example "Influence(EKFAC(), damping=Relative(0.1))".',
                )
            ) from error

    def spec(self) -> Any:
        node = self.tree()
        if not isinstance(node, ast.Call | ast.Name):
            self.refuse(
                node,
                "A spec starts with a name.",
                "something else",
                "a value by itself.",
                'for example "Influence(EKFAC(), damping=Relative(0.1))".',
            )
        return self.value(node)

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.made(node, node, [], [])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.made(node.func, node, node.args, node.keywords)
        if isinstance(node, ast.Constant) and isinstance(
            node.value, bool | int | float | str | None
        ):
            return node.value
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.value(part) for part in node.elts)
        if (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and isinstance(node.operand, ast.Constant)
            and isinstance(node.operand.value, int | float)
        ):
            return -node.operand.value
        self.refuse(
            node,
            "A value is a spec, a number, a text, True, False, None or a tuple of these.",
            f"a Python expression ({type(node).__name__})",
            "code where a finished value is meant: nothing is evaluated.",
            "write the value itself, or name an object of yours as project.py:name.",
        )

    def made(
        self,
        name: ast.Name,
        node: ast.expr,
        arguments: Sequence[ast.expr],
        keywords: Sequence[ast.keyword],
    ) -> Any:
        spec = SPECS.get(name.id)
        if spec is None:
            near = difflib.get_close_matches(name.id, SPECS, n=3, cutoff=0.5)
            self.refuse(
                name,
                "Every name must be one of upweight's specs.",
                f"the unknown name {name.id}",
                f"a misspelling; the nearest is {' or '.join(near)}."
                if near
                else "another library's name, or a variable of your own.",
                _known(),
            )
        fields = inspect.signature(spec).parameters
        given: dict[str, tuple[ast.expr, Any]] = {}
        for position, part in enumerate(arguments):
            if position >= len(fields):
                self.refuse(part, *_too_many(spec))
            given[list(fields)[position]] = part, self.value(part)
        for keyword in keywords:
            if keyword.arg is None or keyword.arg not in fields or keyword.arg in given:
                self.refuse(keyword, *_no_such_argument(spec, keyword.arg, given))
            given[keyword.arg] = keyword.value, self.value(keyword.value)
        hints = typing.get_type_hints(spec)
        for field, (part, value) in given.items():
            if not _fits(value, hints[field]):
                self.refuse(
                    part,
                    f"{field} of {spec.__name__} must be {_in_words(hints[field])}.",
                    f"{value!r}, a {kind_of(value)}",
                    "another part of the method in its place.",
                    f"{spec.__name__}{inspect.signature(spec).replace(return_annotation=_NONE)}",
                )
        missing = [
            field for field, p in fields.items() if p.default is p.empty and field not in given
        ]
        if missing:
            self.refuse(
                node,
                f"{spec.__name__} needs {' and '.join(missing)}.",
                f"no {missing[0]}",
                "a number with no default, because none would be right everywhere.",
                f"for example {spec.__name__}({missing[0]}=…).",
            )
        try:
            return spec(**{field: value for field, (_, value) in given.items()})
        except UpweightError as error:
            error.add_note(self._pointer(*self._place(node)))
            raise

    def refuse(
        self, node: ast.expr | ast.keyword, required: str, given: str, cause: str, way_out: str
    ) -> NoReturn:
        line, column, width = self._place(node)
        self._refuse_at(line, column, width, required, given, cause, way_out)

    def _refuse_at(
        self,
        line: int,
        column: int,
        width: int,
        required: str,
        given: str,
        cause: str,
        way_out: str,
    ) -> NoReturn:
        where = f"{given}, at character {column + 1}:\n{self._pointer(line, column, width)}"
        raise SpecError(message(required, where, cause, way_out)) from None

    def _place(self, node: ast.expr | ast.keyword) -> tuple[int, int, int]:
        """Line, column and width in characters; `ast` counts bytes."""
        line = self._lines()[node.lineno - 1].encode()
        start = len(line[: node.col_offset].decode())
        end = node.end_col_offset if node.end_lineno == node.lineno else len(line)
        return node.lineno, start, max(1, len(line[:end].decode()) - start)

    def _lines(self) -> list[str]:
        """As Python's parser ends them."""
        return re.split("\r\n?|\n", self.text)

    def _pointer(self, line: int, column: int, width: int) -> str:
        text = self._lines()[line - 1]
        return f"    {text}\n    {' ' * column}{'^' * width}"


_NONE = inspect.Signature.empty


def _known(kind: str | None = None) -> str:
    """What may be written, by kind."""
    kinds = REGISTRY if kind is None else {kind: REGISTRY[kind]}
    listed = [f"{k}: {', '.join(s.__name__ for s in specs)}" for k, specs in kinds.items()]
    return "use one of these.\n    " + "\n    ".join(listed)


def _too_many(spec: type) -> tuple[str, str, str, str]:
    fields = list(inspect.signature(spec).parameters)
    return (
        f"{spec.__name__} takes {len(fields)} arguments: {', '.join(fields) or 'none'}.",
        "one more",
        "an argument of another spec.",
        "move it to the spec that it belongs to.",
    )


def _no_such_argument(
    spec: type, name: str | None, given: dict[str, Any]
) -> tuple[str, str, str, str]:
    fields = list(inspect.signature(spec).parameters)
    near = difflib.get_close_matches(name or "", fields, n=1, cutoff=0.5)
    twice = name in given
    return (
        f"{spec.__name__} takes {', '.join(fields) or 'no arguments'}, each once.",
        f"{name} a second time" if twice else f"the unknown argument {name}",
        "a value given both by its place and by its name."
        if twice
        else f"a misspelling of {near[0]}."
        if near
        else "an argument of another spec.",
        "give each argument once, by the names above.",
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a field's annotation asks for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(each) and all(map(_fits, value, each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False):  # a method has a `fit` as a curvature has
        return isinstance(value, REGISTRY[hint.__name__.lower()])
    return isinstance(value, origin or hint)


def _in_words(hint: Any) -> str:
    """An annotation as a reader would say it: "a Curvature", "a Damping or float"."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_in_words(one) for one in inner)
    if hint is type(None):
        return "None"
    name = str(hint) if inner else hint.__name__
    return f"a {name}" if name != "int" else "an int"
