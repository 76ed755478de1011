"""Which code may a run run? Only what the command line names: a run directory is data.

run.toml names files of the project, and anybody may have written it. A name in it is looked up
among the files that the user named, by `--project` or in another option, by its file name alone;
where the run says that the file lies is never followed.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from upweight.errors import ProjectError, message
from upweight.runs.directory import Run
from upweight.runs.record import Record
from upweight.runtime.fingerprint import sha256


@dataclass(frozen=True)
class Named:
    """Where the code of a run is taken from."""

    files: Mapping[str, str]  # the file or module for each name in run.toml or of the user's
    folder: Path  # the working directory in which the project was asked


project_option = click.option(
    "--project", "projects", multiple=True, metavar="FILE.py",
    help="A file of the project, whose code may then run; names in run.toml run nothing.",
)  # fmt: skip
"""Of the verbs that can run a run's code."""


def named(run: Run, projects: Iterable[str], references: Iterable[str], command: str) -> Named:
    """Take the code of a run from the files that the user named.

    Args:
        run: The run.
        projects: Files and modules that the user named.
        references: Objects that the user named, as `file.py:name`; their files are named too.
        command: What the user typed, for the way out.

    Raises:
        ProjectError: The run asks for a file that the user has not named, or that two are named of.
    """
    record = run.record
    own = {source: _absolute(source) for source in (r.rpartition(":")[0] for r in references)}
    given = [*map(_absolute, projects), *own.values()]
    paths = {Path(each).resolve(): Path(each) for each in given if Path(each).is_absolute()}
    files, folder = dict(own), Path.cwd()
    for source in record.asked:
        fitting = [path for path in paths.values() if path.name == Path(source).name]
        if len(fitting) > 1:  # of those that the user named, the one that lies where the run says
            place = (run.path / record.directory / source).resolve()
            fitting = [path for path in fitting if path.resolve() == place] or fitting
        if len(fitting) == 1:
            files[source] = str(fitting[0])
        elif not fitting and source in given:
            files[source] = source  # a module
        else:
            raise ProjectError(_not_named(run, record, fitting, given, command))
    # Relative names of data count from where attribute was called: the folder that the first name
    # counted from. It is one that the user's own file lies in.
    source = record.task.rpartition(":")[0]
    parts, file = Path(source).parts, Path(files[source])
    relative = file.is_absolute() and not Path(source).is_absolute() and ".." not in parts
    if relative and file.is_file() and file.parts[-len(parts) :] == parts:
        folder = file.parents[len(parts) - 1]
    return Named(files, folder)


def _absolute(source: str) -> str:
    """A file that the user named, as seen from any folder; a module as it is."""
    path = Path(source)
    return str(path.absolute()) if path.suffix == ".py" or path.is_file() else source


def to_ask_for(record: Record, run: Run | None = None) -> list[str]:
    """What somebody who has the run alone needs of its owner, a line each.

    With the run, each file that lies packed in it says so.
    """
    sources = {name: f"sha256 {digest}" for name, digest in record.sources.items()}
    made = record.environment or record.versions
    libraries = ", ".join(f"{name} {version}" for name, version in made.items())
    files = {**sources, **record.files}
    if run is not None:
        files = {name: f"{facts}{_packed(run, record, name)}" for name, facts in files.items()}
    return [
        *(f"{name}  {facts}" for name, facts in files.items()),
        f"made with {libraries}, {record.threads} threads",
    ]


def has_packed(run: Run, record: Record, name: str) -> bool:
    """Whether a file with the hash that run.toml keeps lies packed in the run."""
    path, told = run.packed(name), _hash(record, name)
    if path is None or told is None:
        return False
    return sha256(Path(path)) == told


def _hash(record: Record, name: str) -> str | None:
    known = record.files.get(name, "")
    kept = known.removeprefix("sha256 ")[:64] if known.startswith("sha256 ") else None
    return record.sources.get(name, kept)


def _packed(run: Run, record: Record, name: str) -> str:
    path = run.packed(name)
    if path is None:
        return ""
    if _hash(record, name) is None:
        return f"; there is {path}, of which run.toml keeps no hash"
    same = has_packed(run, record, name)
    return f"; {path} is that file" if same else f"; {path} is another file"


def _not_named(
    run: Run, record: Record, fitting: Sequence[Path], given: Sequence[str], command: str
) -> str:
    asked = record.asked
    objects = [f"{source}:{name}" for source, names in asked.items() for name in names]
    places = {source: run.place_of(record, source) for source in asked}
    known = {source: record.sources.get(Path(source).name) for source in asked}
    lines = [
        f"{run.toml}, which asks for {', '.join(objects)}",
        *(f"{place}: {_state(Path(place), known[source])}" for source, place in places.items()),
    ]
    names = {Path(source).name for source in asked}
    others = [name for name in (*record.sources, *record.files) if name not in names]
    if others:
        more = f" and {len(others) - 10} others" if len(others) > 10 else ""
        lines.append(f"it also read {', '.join(others[:10])}{more}")
    cause = "a run directory is data, which anybody may have written: its names run nothing."
    if len(fitting) > 1:
        lines.append(f"named are {' and '.join(map(str, fitting))}, of one name")
        cause = "two projects on one command line."
    elif given:
        lines.append(f"named is {', '.join(given)}")
        cause = "another file, or a run of several files, of which each is to be named."
    return message(
        "A run's code runs only where you name its file.",
        "\n    ".join(lines) + ".",
        cause,
        f"if you trust these files: {command} {shlex.join(run.naming(record))}\n"
        "    What you do not have, ask the owner of the run for; `upweight report` and `upweight "
        "view` of a finished run need none of it.",
    )


def _state(path: Path, known: str | None) -> str:
    """Whether a file is the one that the run was made with."""
    recorded = f"recorded as sha256 {known}" if known else "of which run.toml keeps no hash"
    if not path.is_file():
        return f"not found, {recorded}"
    if known is None:
        return recorded
    same = sha256(path) == known
    return "there, and as it was" if same else f"there, but edited since; {recorded}"
