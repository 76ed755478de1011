"""Which files did the user's code read? Weights and data that no option names are found so.

These are files that Python opens while the objects are loaded, and files whose names stand in the
user's code, for libraries that open files by themselves. What is opened later, as by a data set
that reads an image when it is asked for it, is missed.
"""

import ast
import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upweight.runtime.fingerprint import sha256

MOST = 50
"""Files that are listed."""

HASHED_BYTES = 4_000_000_000
"""Files are hashed up to so much together; of the rest the size is listed."""

CODE = {".py", ".pyc", ".pyi", ".so", ".pyd", ".dll", ".pth", ".zip"}
PACKAGES = {"site-packages", "dist-packages"}
OURS = str(Path(__file__).resolve().parents[1])
STANDARD = os.path.dirname(os.path.realpath(os.__file__))
SYSTEM = (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr", "/lib")


@dataclass(frozen=True)
class Seen:
    """Files that were opened for reading and for writing, by their places."""

    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)


_watching: list[Seen] = []


@functools.cache
def _watch() -> None:
    sys.addaudithook(_opened)  # for as long as the process lives; it does nothing by itself


@contextlib.contextmanager
def reading(found: Seen) -> Iterator[None]:
    """Add the files that are opened in the meantime."""
    _watch()
    _watching.append(found)
    try:
        yield
    finally:
        _watching.pop()


def _opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _watching:
        return
    with contextlib.suppress(Exception):  # what is raised here would be raised by `open`
        path, mode, flags = arguments
        writes = set("wax+") & set(mode) if mode else flags & (os.O_WRONLY | os.O_RDWR)
        if isinstance(path, str | bytes | os.PathLike):
            for found in _watching:
                kind = found.written if writes else found.read
                kind.add(os.path.abspath(os.fsdecode(path)))


def named_in(sources: Iterable[Path], folders: Sequence[Path]) -> set[str]:
    """Files whose names stand in some code as texts, as seen from some folders."""
    found = set()
    for source in sources:
        with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
            for node in ast.walk(ast.parse(source.read_bytes())):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(text, str) and 0 < len(text) < 256:
                    found |= {os.path.abspath(folder / text) for folder in folders}
    return {path for path in found if os.path.isfile(path)}


def data_files(paths: Iterable[str], folders: Sequence[Path]) -> dict[str, str]:
    """Data files by name, each with its hash, or its size where they are large.

    A name counts from the project's folder; of a file elsewhere it is the last part alone.
    """
    room, names = HASHED_BYTES, dict[str, str]()
    for text in sorted(set(paths)):
        path = Path(os.path.realpath(text))
        is_system = PACKAGES & set(path.parts) or any(map(path.is_relative_to, (OURS, *SYSTEM)))
        if len(names) == MOST or is_system or path.suffix in CODE or not path.is_file():
            continue
        folder = next((f for f in (*folders, Path.cwd()) if Path(text).is_relative_to(f)), None)
        name = Path(text).relative_to(folder or Path(text).parent).as_posix()
        size = path.stat().st_size
        names[name] = f"{size} bytes"
        if size <= room:
            room -= size
            names[name] = f"sha256 {sha256(path)}"
    return names


@functools.cache
def _resolved(file: str) -> str:
    """Of thousands of modules, asked several times for each command."""
    return os.path.realpath(file)


def folder_of(file: str | None, folders: Sequence[Path]) -> Path | None:
    """The innermost of the user's folders that a file of code is under; None for a library's."""
    if file is None or file.startswith("<"):  # built in, or made at run time
        return None
    file = _resolved(os.path.abspath(file))  # relative to where we are now
    found = [folder for folder in folders if file.startswith(os.path.join(folder, ""))]
    is_library = PACKAGES & set(Path(file).parts) if found else True
    if is_library or file.startswith((os.path.join(OURS, ""), os.path.join(STANDARD, ""))):
        return None
    return max(found, key=lambda folder: len(folder.parts))
