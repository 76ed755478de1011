"""The user's objects, by `file.py:name` or `package.module:name`.

    with opened() as project:
        task = project.load("project.py:task")

A name stands for an object, or for a function without arguments that makes it. Each file is run
once, as Python runs a script: its folder comes first on `sys.path`, so that it finds its neighbors.
When the command is over, `sys.path` and `sys.modules` are as they were, but for libraries.
"""

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upweight.cli.reading import Seen, data_files, folder_of, named_in, reading
from upweight.errors import ProjectError, SpecError, UpweightError, message
from upweight.runtime.fingerprint import sha256

WEIGHTS = ("weights", "weight", "w", "data_weights", "sample_weight")
"""What the first argument of a recipe is called, a function of data weights."""

MOST_FRAMES = 4
"""Places in the user's code that an error shows: the innermost ones."""


@dataclass
class Project:
    """What has been loaded during one command.

    Args:
        folders: Where the user's files lie, the first loaded last.
        modules: Those files, run, by their places.
        only: The file or module that stands for each source, where only these may run.
        seen: Files that were opened meanwhile.
    """

    folders: list[Path] = field(default_factory=list)
    modules: dict[str, types.ModuleType] = field(default_factory=dict)
    only: Mapping[str, str] | None = None
    seen: Seen = field(default_factory=Seen)

    def load(self, reference: str) -> Any:
        """The object, made if the name is that of a function without arguments.

        Raises:
            SpecError: It is no `file.py:name`.
            ProjectError: There is no such file or name, or the user's code raised.
        """
        with reading(self.seen):
            value = self.named(reference)
            if is_maker(value):
                with _located(f"{reference} raised", self.folders):
                    return value()
            return value

    def named(self, reference: str) -> Any:
        """The object that a reference names, as it is. Raises as `load`."""
        source, colon, name = reference.rpartition(":")
        if not colon or not source or not name.isidentifier():
            raise SpecError(
                "An object of yours is named as file.py:name or package.module:name.",
                f"{reference!r}.",
                "a file without the name of the object, or a name without its file.",
                f"for example {_as_reference(reference)}",
            )
        defined, source = self._defined(source)
        if name not in defined:
            raise ProjectError(_no_such_name(source, name, defined))
        return defined[name]

    def reference(self, source: str, names: Sequence[str]) -> str:
        """The first of these names that a file defines, as `file.py:name`.

        Raises:
            ProjectError: It defines none of them.
        """
        with reading(self.seen):
            defined, path = self._defined(source)
        for name in names:
            if name in defined:
                return f"{source}:{name}"
        raise ProjectError(_no_such_name(path, names[0], defined))

    def defines(self, source: str, name: str) -> bool:
        """Whether a file defines an object of that name."""
        with reading(self.seen):
            defined, _ = self._defined(source)
        return name in defined

    def beside(self, reference: str, name: str) -> Any:
        """The object of that name in the file of another one; None where there is none."""
        source = reference.rpartition(":")[0]
        return self.load(f"{source}:{name}") if self.defines(source, name) else None

    def _defined(self, source: str) -> tuple[dict[str, Any], str]:
        """What a source defines, and the file or module that stands for it."""
        if self.only is not None:
            source = self.only[source]
        key = str(Path(source).resolve())  # ./project.py is project.py
        if key not in self.modules:
            self.modules[key] = self._module(source)
        return vars(self.modules[key]), source

    def sources(self) -> dict[str, str]:
        """The hash of every file of the user's that was run, neighbors included."""
        found = {
            path.relative_to(folder).as_posix(): sha256(path) for _, path, folder in self._own()
        }
        return dict(sorted(found.items()))

    def files(self) -> dict[str, str]:
        """The hash of every file of data that was read while objects were loaded."""
        own = [path for _, path, _ in self._own()]
        found = (self.seen.read | named_in(own, [*self.folders, Path.cwd()])) - self.seen.written
        return data_files(found, self.folders)

    def _own(self) -> list[tuple[str, Path, Path]]:
        """The loaded modules that are the user's, each with its file and the folder it is under."""
        found = []
        for name, module in sys.modules.items():
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and os.path.isabs(file):  # that of torch.ops is not
                folder = folder_of(file, self.folders)
                if folder is not None:
                    found.append((name, Path(file), folder))
        return found

    def _module(self, source: str) -> types.ModuleType:
        path = Path(source)
        is_file = path.suffix == ".py" or path.is_file()
        folder = path.resolve().parent if is_file else Path.cwd()
        if folder not in self.folders:
            self.folders.insert(0, folder)
            sys.path.insert(0, str(folder))
        with _located(f"{source} could not be loaded", self.folders):
            return _run(path) if is_file else _imported(source)


@contextlib.contextmanager
def opened(only: Mapping[str, str] | None = None) -> Iterator[Project]:
    """A project for the time of one command. What its code prints goes to standard error.

    Raises:
        ProjectError: An error came out of the user's code, at any time: says where.
    """
    project, path, modules = Project(only=only), list(sys.path), dict(sys.modules)
    try:
        with contextlib.redirect_stdout(sys.stderr), _located("Your code raised", project.folders):
            yield project
    finally:
        for name, *_ in project._own():
            if sys.modules[name] is not modules.get(name):
                del sys.modules[name]
        # Files of the user's may have taken the place of something else.
        sys.modules.update({k: m for k, m in modules.items() if k not in sys.modules})
        sys.path[:] = path


def _run(path: Path) -> types.ModuleType:
    """A file as a module of its own name; a name that is taken already gets an underscore."""
    if not path.is_file():
        raise ProjectError(_no_such_file(path))
    name = path.stem
    if name in sys.modules or name in sys.stdlib_module_names:
        name += "_"
    module = types.ModuleType(name)
    module.__file__ = str(path.resolve())
    sys.modules[name] = module
    # Not by the import system, which would keep byte code beside the user's file.
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


def _imported(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # found, but it imports something that is not
        raise ProjectError(
            "The module must be installed, or lie in the current folder.",
            f"{name}; there is no module {error.name}.",
            "another current folder, or a file named without its .py.",
            "name the file: project.py:task.",
        ) from error


def is_maker(value: Any) -> bool:
    """Whether it is a function that can be called without arguments.

    A function of data weights is a recipe, also where these have a default: it is not called.
    """
    try:
        signature = inspect.signature(value)
        signature.bind()
    except (TypeError, ValueError):
        return False
    if next(iter(signature.parameters), "") in WEIGHTS:
        return False
    return isinstance(value, types.FunctionType | types.MethodType | functools.partial)


@contextlib.contextmanager
def _located(what: str, folders: list[Path]) -> Iterator[None]:
    """Turn whatever comes out of the user's code into an error that says where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [
            f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
            for frame in frames
            if folder_of(frame.filename, folders)
        ]
        name, text = type(error).__name__, str(error) or "no message"
        if isinstance(error, SyntaxError):
            text = f"{error.msg}\n      {(error.text or '').strip()}"
            if folder_of(error.filename, folders):
                places.append(f"{error.filename}:{error.lineno}")
        if isinstance(error, UpweightError):
            is_located = isinstance(error, ProjectError) or hasattr(error, "__notes__")
            if places and not is_located:
                error.add_note(f"at {places[-1]}")
            raise
        if not places:
            raise
        name = "sys.exit" if isinstance(error, SystemExit) else name
        raise ProjectError(
            f"{what}.",
            "\n    at ".join([f"{name}: {text}", *places[-MOST_FRAMES:]]),
            "an error in that code, or data it does not find.",
            "correct it there and run the same command again; --traceback shows everything.",
        ) from error


def _as_reference(given: str) -> str:
    """What was meant by a file without a name, or by a name without its file."""
    source, colon, name = given.rpartition(":")
    if colon and source:
        return f"{source}:task"
    is_name = name.isidentifier()
    return f"project.py:{name}" if is_name else f"{name or 'project.py'}:task"


def _no_such_file(path: Path) -> str:
    there = sorted(p.name for p in path.resolve().parent.glob("*.py"))
    near = difflib.get_close_matches(path.name, there, n=1)
    return message(
        "The file must exist.",
        f"{path}, in {Path.cwd()}.",
        f"a misspelling of {near[0]}." if near else "another current folder.",
        f"there are {', '.join(there[:10])}." if there else "give the path to your file.",
    )


def _no_such_name(source: str, name: str, defined: dict[str, Any]) -> str:
    def is_imported(value: Any) -> bool:
        is_code = inspect.isclass(value) or inspect.isroutine(value)
        elsewhere = getattr(value, "__module__", None) != defined["__name__"]
        return inspect.ismodule(value) or (is_code and elsewhere)

    own = [k for k, v in defined.items() if not k.startswith("_") and not is_imported(v)]
    near = difflib.get_close_matches(name, own, n=1)
    return message(
        f"{source} must define {name}.",
        f"{source}, which defines {', '.join(own[:20]) or 'nothing'}.",
        f"a misspelling of {near[0]}." if near else "an object under another name.",
        f"name one of those, or add `{name} = …` or `def {name}(): …`.",
    )
