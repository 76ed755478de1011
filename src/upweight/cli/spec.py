"""Text ↔ spec, in the grammar of `repr`: `parse(repr(spec)) == spec`.

    spec     = Name "(" arguments ")"  |  Name            a name alone has no arguments
    Name     = EKFAC, CG, ...  |  uw.EKFAC, uw.solvers.CG, ...
    argument = [keyword "="] value
    value    = spec | number | "-" number | string | True | False | None | tuple | list

Read with `ast`, never evaluated. This is the one place where a name in a text stands for an
algorithm. Lists become tuples, which is what specs hold.
"""

import ast
import difflib
import inspect
import operator
import re
import types
import typing
from typing import Any

import upweight
from upweight.errors import SpecError, UpweightError

WORDS = {
    "method": "Influence GradientDot GradientCosine KNNShapley DataShapley FeatureSimilarity "
    "BM25 Random TrainingLoss Ensemble Averaged Stacked Datamodels TracIn SOURCE LoGra TRAK "
    "MAGIC DataInf ASTRA BIF RepresenterPoints LeaveOneOut SubsampledInfluence",
    "curvature": "Hessian GGN Fisher EmpiricalFisher EKFAC KFAC Diagonal Blockwise",
    "labels": "labels.Sampled labels.Expected labels.Observed",
    "sharing": "curvature.Expand curvature.Reduce",
    "damping": "Absolute Relative Evidence FromTraining",
    "solver": "solvers.Auto solvers.Cholesky solvers.CG solvers.BlockCG solvers.MINRES "
    "solvers.Neumann solvers.LiSSA solvers.Nystrom solvers.Lanczos",
    "measure": "Loss Margin LogProb Logit",
    "loss": "CrossEntropy SquaredError AbsoluteError Huber Bernoulli Poisson SmoothHinge Weighted "
    "task.torch_losses.Rescaled task.torch_losses.LogProbabilities",
    "penalty": "L2 NoPenalty SumToZero",
    "recipe": "Training training.Newton training.PBRF",
    "optimizer": "SGD Adam AdamW",
    "schedule": "training.Constant training.Cosine training.LinearDecay training.Stepwise",
}
"""Every spec that a text may name, by kind, as a name within `upweight`."""

REGISTRY: dict[str, tuple[type, ...]] = {
    kind: tuple(operator.attrgetter(word)(upweight) for word in words.split())
    for kind, words in WORDS.items()
}

PATHS = {word: word.rpartition(".")[2] for words in WORDS.values() for word in words.split()}
"""A spec's place within `upweight` → its name: both may be written."""

SPECS = {spec.__name__: spec for specs in REGISTRY.values() for spec in specs}

LONGEST = 10_000
"""Characters; Python's own parser has limits of its own beyond."""

EXAMPLE = '"Influence(EKFAC(), damping=Relative(0.1))"'


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
    text = text.strip()
    tree = _tree(text)
    spec = _value(text, tree)
    if type(spec) not in (SPECS.values() if kind is None else REGISTRY[kind]):
        raise _refused(
            text,
            tree,
            f"This must be a {kind or 'spec'}.",
            f"{spec!r:.80}, a {kind_of(spec)}",
            "a part given in place of the whole.",
            _known(kind) if kind else f"a spec starts with a name: {EXAMPLE}.",
        )
    return spec


def kind_of(spec: Any) -> str:
    """Under which kind the registry lists a spec."""
    return next((k for k, specs in REGISTRY.items() if type(spec) in specs), "value")


def _tree(text: str) -> ast.expr:
    try:
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        given = f"{text[:60]!r}: {error or type(error).__name__}"  # null bytes; nested too deep
        if isinstance(error, SyntaxError):
            place = error.lineno or 1, max(0, (error.offset or 1) - 1), 1
            given = f"{error.msg}, {_pointer(text, *place)}"
        raise SpecError(
            "A spec is written as in Python: Name(argument, keyword=value).",
            given,
            "a parenthesis or a quote that is missing, or that the shell removed.",
            f"put the whole text in double quotes: --method {EXAMPLE}.",
        ) from None


def _value(text: str, node: ast.expr) -> Any:
    match node:
        case ast.Name() | ast.Attribute():
            return _value(text, ast.copy_location(ast.Call(node, [], []), node))
        case ast.Call(func=ast.Name() | ast.Attribute() as name):
            return _built(text, node, name)
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Tuple() | ast.List():
            return tuple(_value(text, part) for part in node.elts)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
    raise _refused(
        text,
        node,
        "A value is a spec, a number, a string, True, False, None or a tuple of these.",
        f"a Python expression ({type(node).__name__})",
        "code where a finished value is meant: nothing is evaluated.",
        "write the value itself, or name an object of yours as project.py:name.",
    )


def _built(text: str, node: ast.Call, name: ast.Name | ast.Attribute) -> Any:
    said = ast.unparse(name)
    spec = SPECS.get(PATHS.get(re.sub(r"^(uw|upweight)\.", "", said), said))
    if spec is None:
        near = difflib.get_close_matches(said.rpartition(".")[2], SPECS, n=3, cutoff=0.5)
        raise _refused(
            text,
            name,
            "Every name must be one of upweight's specs.",
            f"the unknown name {said}",
            f"a misspelling; the nearest is {' or '.join(near)}."
            if near
            else "another library's name, or a variable of your own.",
            _known(),
        )
    fields = inspect.signature(spec).parameters
    signature = inspect.Signature([p.replace(annotation=p.empty) for p in fields.values()])
    keywords: dict[Any, ast.expr] = {keyword.arg: keyword.value for keyword in node.keywords}
    try:
        if len(keywords) < len(node.keywords):
            raise TypeError("an argument given twice")
        given = signature.bind(*node.args, **keywords).arguments
    except TypeError as error:
        unknown = [each for each in keywords if each and each not in fields]
        near = [m for each in unknown for m in difflib.get_close_matches(each, fields, n=1)]
        raise _refused(
            text,
            node,
            f"The arguments must be those of {spec.__name__}{signature}.",
            f"{error}",
            f"a misspelling of {near[0]}."
            if near
            else "one left out, one of another spec, or one given by position and by name.",
            "give each of these at most once, and those without a default.",
        ) from None
    hints = typing.get_type_hints(spec)
    values = {field: _value(text, part) for field, part in given.items()}
    for field, value in values.items():
        if not _fits(value, hints[field]):
            words = re.sub(r"\w+\.", "", inspect.formatannotation(hints[field]))
            raise _refused(
                text,
                given[field],
                f"{field} of {spec.__name__} must be {words.replace(' | ', ' or ')}.",
                f"{value!r}, a {kind_of(value)}",
                "a value of another argument.",
                f"{spec.__name__}{signature}",
            )
    try:
        return spec(**values)
    except UpweightError as error:
        error.add_note(_pointer(text, *_place(text, node)))
        raise


def _refused(
    text: str, node: ast.expr, required: str, given: str, cause: str, way_out: str
) -> SpecError:
    where = f"{given}, {_pointer(text, *_place(text, node))}"
    return SpecError(required, where, cause, way_out)


def _place(text: str, node: ast.expr) -> tuple[int, int, int]:
    """Line, column and width in characters; `ast` counts bytes."""
    line = _lines(text)[node.lineno - 1].encode()
    start = len(line[: node.col_offset].decode())
    end = node.end_col_offset if node.end_lineno == node.lineno else len(line)
    return node.lineno, start, max(1, len(line[:end].decode()) - start)


def _pointer(text: str, line: int, column: int, width: int) -> str:
    shown = _lines(text)[line - 1]
    return f"at character {column + 1}:\n    {shown}\n    {' ' * column}{'^' * width}"


def _lines(text: str) -> list[str]:
    """As Python's parser ends them."""
    return re.split("\r\n?|\n", text)


def _known(kind: str | None = None) -> str:
    """What may be written, by kind."""
    names = {k: ", ".join(s.__name__ for s in REGISTRY[k]) for k in ([kind] if kind else REGISTRY)}
    return "\n    ".join(["use one of these.", *(f"{k}: {specs}" for k, specs in names.items())])


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a field's annotation asks for."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
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
