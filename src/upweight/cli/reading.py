"""Which files did the user's code read? Weights and data that no option names are told by this.

Seen are files that Python opens while the objects are loaded, and files whose names stand in the
user's code, for libraries that open files by themselves. What is opened later, as by a data set
that reads an image when it is asked for it, is not.
"""

import ast
import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST = 50
"""Files that are told."""

HASHED_BYTES = 4_000_000_000
"""Files are hashed up to so much together; of the rest the size is told."""

CODE = {".py", ".pyc", ".pyi", ".so", ".pyd", ".dll", ".pth", ".zip"}
SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib")


@dataclass(frozen=True)
class Seen:
    """Files that were opened, by their places.

    Args:
        read: For reading.
        written: For writing.
    """

    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)


_watching: list[Seen] = []
_installed = False


@contextlib.contextmanager
def reading(found: Seen) -> Iterator[None]:
    """Add the files that are opened in the meantime."""
    global _installed
    if not _installed:
        sys.addaudithook(_opened)  # for as long as the process lives; it does nothing by itself
        _installed = True
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


def named_in(sources: Iterable[Path], folders: Iterable[Path]) -> set[str]:
    """Files whose names stand in some code as texts, as seen from some folders."""
    found, folders = set(), list(folders)
    for source in sources:
        try:
            tree = ast.parse(source.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                 and isinstance(node.value, str) and 0 < len(node.value) < 256}  # fmt: skip
        for text in texts:
            for folder in folders:
                with contextlib.suppress(OSError, ValueError):
                    if (folder / text).is_file():
                        found.add(os.path.abspath(folder / text))
    return found


def told(paths: Iterable[str], folders: Iterable[Path]) -> dict[str, str]:
    """Data files by name, each with its hash, or its size where they are large.

    A name counts from the project's folder; of a file elsewhere it is the last part alone.
    """
    here = [*(str(folder) for folder in folders), str(Path.cwd())]
    room, names = HASHED_BYTES, {}
    for text in sorted(set(paths)):
        path = Path(os.path.realpath(text))
        if not path.is_file() or _is_code(path):
            continue
        folder = next((each for each in here if Path(text).is_relative_to(each)), None)
        name = Path(text).name if folder is None else Path(text).relative_to(folder).as_posix()
        size = path.stat().st_size
        if size <= room:
            room -= size
            with path.open("rb") as file:
                names[name] = f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
        else:
            names[name] = f"{size} bytes"
        if len(names) == MOST:
            break
    return names


def _is_code(path: Path) -> bool:
    """Whether a file is code, or a library's or the system's."""
    libraries = {sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[1])}
    return (
        path.suffix in CODE
        or bool({"site-packages", "dist-packages"} & set(path.parts))
        or any(path.is_relative_to(folder) for folder in (*libraries, *SYSTEM))
    )
