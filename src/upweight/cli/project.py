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
import hashlib
import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upweight.cli.reading import Seen, named_in, reading, told
from upweight.errors import ProjectError, SpecError, UpweightError, message

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
            ProjectError: There is no such file or name, or the user's code raised.
        """
        with reading(self.seen):
            value = self.named(reference)
            is_function = isinstance(
                value, types.FunctionType | types.MethodType | functools.partial
            )
            if is_function and not _required(value):
                with _told(f"{reference} raised", self.folders):
                    return value()
            return value

    def named(self, reference: str) -> Any:
        """The object that a reference names, as it is.

        Raises:
            ProjectError: As for `load`.
        """
        source, colon, name = reference.rpartition(":")
        if not colon or not source or not name.isidentifier():
            raise SpecError(
                message(
                    "An object of yours is named as file.py:name or package.module:name.",
                    f"{reference!r}.",
                    "a file without the name of the object in it.",
                    f"for example {source or reference or 'project.py'}:task",
                )
            )
        if self.only is not None:
            source = self.only[source]
        key = str(Path(source).resolve())  # ./project.py is project.py
        if key not in self.modules:
            self.modules[key] = self._module(source)
        defined = vars(self.modules[key])
        if name not in defined:
            raise ProjectError(_no_such_name(source, name, defined))
        return defined[name]

    def sources(self) -> dict[str, str]:
        """The hash of every file of the user's that was run, neighbors included."""
        found = {}
        for name in self._own():
            path, folder = _file(name), self._folder(name)
            if path is not None and folder is not None and path.is_relative_to(folder):
                relative = path.relative_to(folder).as_posix()
                found[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
        return dict(sorted(found.items()))

    def files(self) -> dict[str, str]:
        """The hash of every file of data that was read while objects were loaded."""
        own = [path for name in self._own() if (path := _file(name)) is not None]
        places = [*self.folders, Path.cwd()]
        found = (self.seen.read | named_in(own, places)) - self.seen.written
        return told(found, self.folders)

    def _own(self) -> list[str]:
        """The loaded modules that are the user's."""
        return [name for name in list(sys.modules) if self._folder(name) is not None]

    def _folder(self, name: str) -> Path | None:
        """The user's folder that a module was found in by its name, if it was."""
        top = name.partition(".")[0]
        path = _file(top)
        if path is None or top == "upweight":
            return None
        home = path.parent.parent if path.name == "__init__.py" else path.parent
        return home if home in self.folders else None

    def _module(self, source: str) -> types.ModuleType:
        path = Path(source)
        is_file = path.suffix == ".py" or path.is_file()
        self._enter(path.resolve().parent if is_file else Path.cwd())
        with _told(f"{source} could not be loaded", self.folders):
            return _run(path) if is_file else _imported(source)

    def _enter(self, folder: Path) -> None:
        if folder not in self.folders:
            self.folders.insert(0, folder)
            sys.path.insert(0, str(folder))


@contextlib.contextmanager
def opened(only: Mapping[str, str] | None = None) -> Iterator[Project]:
    """A project for the time of one command. What its code prints goes to standard error.

    Args:
        only: As for `Project`.

    Raises:
        ProjectError: An error came out of the user's code, at any time: says where.
    """
    project, path, modules = Project(only=only), list(sys.path), dict(sys.modules)
    try:
        with contextlib.redirect_stdout(sys.stderr), _told("Your code raised", project.folders):
            yield project
    finally:
        for name in project._own():
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
            message(
                "The module must be installed, or lie in the current folder.",
                f"{name}; there is no module {error.name}.",
                "another current folder, or a file named without its .py.",
                "name the file: project.py:task.",
            )
        ) from error


def _required(function: Any) -> list[str]:
    """The arguments that a function cannot do without."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _file(name: str) -> Path | None:
    path = getattr(sys.modules.get(name), "__file__", None)
    return Path(path).resolve() if isinstance(path, str) else None


@contextlib.contextmanager
def _told(what: str, folders: list[Path]) -> Iterator[None]:
    """Turn whatever comes out of the user's code into an error that says where."""
    try:
        yield
    except UpweightError as error:
        places = _places(error, folders)
        if places and not isinstance(error, ProjectError) and not hasattr(error, "__notes__"):
            error.add_note(f"at {places[-1]}")
        raise
    except (Exception, SystemExit) as error:
        places = _places(error, folders)
        if not places:
            raise
        name = "sys.exit" if isinstance(error, SystemExit) else type(error).__name__
        text = str(error) or "no message"
        if isinstance(error, SyntaxError):
            text = f"{error.msg}\n      {(error.text or '').strip()}"
        raise ProjectError(
            message(
                f"{what}.",
                f"{name}: {text}\n    " + "\n    ".join(f"at {p}" for p in places[-MOST_FRAMES:]),
                "an error in that code, or data it does not find.",
                "mend it there and run the same command again; --traceback shows everything.",
            )
        ) from error


def _places(error: BaseException, folders: list[Path]) -> list[str]:
    """Where in the user's files an error passed through, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    found = [
        f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
        for frame in frames
        if _is_within(frame.filename, folders)
    ]
    if isinstance(error, SyntaxError) and _is_within(error.filename or "", folders):
        found.append(f"{error.filename}:{error.lineno}")
    return found


def _is_within(filename: str, folders: list[Path]) -> bool:
    if filename.startswith("<"):  # code made at run time
        return False
    path = Path(filename).resolve()
    own = Path(__file__).resolve().parents[1]
    return (
        not path.is_relative_to(own)
        and not {"site-packages", "dist-packages"} & set(path.parts)
        and any(path.is_relative_to(folder) for folder in folders)
    )


def _no_such_file(path: Path) -> str:
    there = sorted(p.name for p in path.resolve().parent.glob("*.py"))
    near = difflib.get_close_matches(path.name, there, n=1)
    return message(
        "The file must exist.",
        f"{path}, in {Path.cwd()}.",
        f"a misspelling of {near[0]}." if near else "another current folder.",
        f"there are {', '.join(there[:10])}." if there else "give the path to your file.",
    )


def _is_elsewhere(value: Any, name: str) -> bool:
    """Whether it is a class or function that the file has imported."""
    is_code = inspect.isclass(value) or inspect.isroutine(value)
    return is_code and getattr(value, "__module__", None) != name


def _no_such_name(source: str, name: str, defined: dict[str, Any]) -> str:
    own = [
        key
        for key, value in defined.items()
        if not key.startswith("_")
        and not inspect.ismodule(value)
        and not _is_elsewhere(value, defined["__name__"])
    ]
    near = difflib.get_close_matches(name, own, n=1)
    return message(
        f"{source} must define {name}.",
        f"{source}, which defines {', '.join(own[:20]) or 'nothing'}.",
        f"a misspelling of {near[0]}." if near else "an object under another name.",
        f"name one of those, or add `{name} = …` or `def {name}(): …`.",
    )
