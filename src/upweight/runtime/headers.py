"""Small files that say what others hold: JSON that upweight writes, TOML that a user may edit.

    {"schema": 2, "n": 60000, …, "digest": "9f86…"}

What is read has the keys and types that are asked for, or is refused by the name of the file and
the key. JSON carries the hash of its own contents: what was edited or damaged is not believed.
"""

import dataclasses
import enum
import json
import math
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from upweight.errors import StaleStore
from upweight.runtime.atomic import contents, write_whole
from upweight.runtime.fingerprint import digest

T = TypeVar("T")

WORDS = {
    bool: "true or false",
    int: "a whole number below 2⁶³",
    float: "a finite number",
    str: "a text",
}
NAMES = {**WORDS, dict: "a table", list: "a list", type(None): "null"}


class Misfit(ValueError):
    """A value that is not what is asked for."""

    def __init__(self, key: str, required: str, given: str) -> None:
        super().__init__(f"{key}: {required}, not {given}")
        self.key, self.required, self.given = key, required, given


def write_json(path: Path, schema: int, fields: Mapping[str, Any]) -> None:
    """Write a header with its schema and the hash of its contents.

    Raises:
        NotWritten: The disk is full or not writable.
    """
    told = json.loads(json.dumps({"schema": schema, **fields}))  # as it will be read
    text = json.dumps({**told, "digest": own_digest(told)}, indent=1, ensure_ascii=False)
    # Half of a character that was cut is written as JSON writes it: \ud83d.
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: Path, schema: int, kind: type[T], way_out: str) -> T:
    """What `write_json` wrote, without its schema and its hash.

    Raises:
        FileNotFoundError: There is none.
        StaleStore: It is not what was written, or of another version.
    """

    def parsed(told: bytes) -> Any:
        return json.loads(told.decode("utf-8"), object_pairs_hook=_unrepeated)

    fields = _parsed(path, parsed, way_out)
    try:
        told = fitting(fields, dict[str, Any], "")
        found = told.pop("digest", None)
        result = _of_schema(told, schema, kind)
        if found != own_digest(told):
            raise Misfit("digest", "the hash of what the file says", "another")
    except Misfit as misfit:
        raise stale(path, misfit, way_out) from misfit
    return result


def read_toml(path: Path, schema: int, kind: type[T], way_out: str) -> T:
    """A file that a user may have edited; otherwise as `read_json`.

    Raises:
        FileNotFoundError, StaleStore: As there.
    """
    # Editors on Windows put a mark before the text.
    fields = _parsed(path, lambda told: tomllib.loads(told.decode("utf-8-sig")), way_out)
    try:
        return _of_schema(fields, schema, kind)
    except Misfit as misfit:
        raise stale(path, misfit, way_out) from misfit


def fitting(value: Any, kind: Any, key: str) -> Any:
    """A parsed value as a type: a dataclass of tables, a tuple of lists, an enum of its names.

    Args:
        value: From JSON or TOML.
        kind: A dataclass, an enum, `str`, `int`, `float`, `bool`, `Any`, a mapping, list or tuple
            of such, or one of them or None.
        key: Where it is, for the message.

    Raises:
        Misfit: It is something else.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (other,) = (each for each in arguments if each is not type(None))
        return fitting(value, other, key)
    if dataclasses.is_dataclass(kind):
        return _built(value, kind, key)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if not isinstance(value, str) or value not in kind.__members__:
            raise _misfit(value, f"one of {', '.join(kind.__members__)}", key)
        return kind[value]
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _misfit(value, "a table", key)
        return {k: fitting(v, arguments[1], _inside(key, k)) for k, v in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _misfit(value, "a list", key)
        return origin(fitting(v, arguments[0], f"{key}[{k}]") for k, v in enumerate(value))
    if not _is(value, kind):
        raise _misfit(value, WORDS[kind], key)
    return float(value) if kind is float else value


def own_digest(fields: Mapping[str, Any]) -> str:
    """The hash of parsed JSON, however it was laid out."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))  # ASCII
    return digest(text)


def _of_schema(fields: Mapping[str, Any], schema: int, kind: Any) -> Any:
    if fields.get("schema") != schema:
        given = f"{fields['schema']!r:.40}" if "schema" in fields else "missing"
        raise Misfit("schema", f"{schema}, which this version of upweight writes", given)
    return fitting({k: v for k, v in fields.items() if k != "schema"}, kind, "")


def _built(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(value, "a table", key)
    types_of = typing.get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise Misfit(_inside(key, name), "a key that this version of upweight knows", "another")
    for name, each in fields.items():
        has_default = each.default is not each.default_factory  # both MISSING where there is none
        if name not in value and not has_default:
            raise Misfit(_inside(key, name), "there", "missing")
    return kind(**{k: fitting(v, types_of[k], _inside(key, k)) for k, v in value.items()})


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a scalar type: true is no number, and numbers have bounds."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**63
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 2**1000 and math.isfinite(value)
    return isinstance(value, kind) if isinstance(kind, type) else False


def _parsed(path: Path, parse: Callable[[bytes], Any], way_out: str) -> Any:
    try:
        return parse(contents(path))
    except FileNotFoundError:
        raise
    except (RecursionError, ValueError, OSError) as error:  # of what cannot be parsed, or read
        empty = isinstance(error, ValueError) and path.stat().st_size == 0
        misfit = Misfit("", "what upweight writes", "nothing" if empty else f"{error}")
        raise stale(path, misfit, way_out) from error


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _misfit(value: Any, required: str, key: str) -> Misfit:
    kind = next((words for k, words in NAMES.items() if isinstance(value, k)), "something else")
    shown = repr(value)[:60] if isinstance(value, str | int | float) else kind
    return Misfit(key, required, shown)


def _inside(key: str, name: str) -> str:
    name = name if len(name) < 60 else f"{name[:60]}…"
    return f"{key}.{name}" if key else name


def stale(path: Path, misfit: Misfit, way_out: str) -> StaleStore:
    """The error about a value of a file that is not what is asked for."""
    where = f"`{misfit.key}` in {path.name}" if misfit.key else path.name
    return StaleStore(
        f"{where} must be {misfit.required}.",
        f"{path}, where it is {misfit.given}." if misfit.key else f"{path}: {misfit.given}.",
        "a file edited by hand, damaged, cut off, copied from elsewhere, or of another version of "
        "upweight.",
        way_out,
    )
