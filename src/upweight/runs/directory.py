"""Run: the directory of one question, and its states.

new  ──create──►  unfinished  ──work──►  finished          a kill leaves one of these, never a mix
"""

import contextlib
import json
import os
import shlex
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from upweight.errors import ShapeError, StaleStore
from upweight.runs.question import fingerprints_of
from upweight.runs.record import CONTENTS, Record, is_reference
from upweight.runtime import evaluations
from upweight.runtime.atomic import append, make_folder, remove_left_over, require_own
from upweight.runtime.lock import CLAIM, claimed, locked
from upweight.runtime.lock import FILES as LOCKS
from upweight.runtime.store import MANIFEST
from upweight.scores import Scores, stored_in

OWN = {
    "run.toml", "factors", "scores", "shown", "retrained", evaluations.NAME, "report.html",
    "log.txt",
}  # fmt: skip


PROJECT = "project"
"""The folder of the project's files in a run that was packed."""


class Run:
    """A run directory.

    Args:
        path: The directory.
        projects: Files that the user named, for the commands that messages name.
    """

    def __init__(self, path: Path, projects: tuple[str, ...] = ()) -> None:
        self.path = path
        self.projects = projects
        self.toml = path / "run.toml"
        self.factors = path / "factors"
        self.scores = path / "scores"
        self.shown = path / "shown"
        self.retrained = path / "retrained"
        self.evaluation = path / evaluations.NAME
        self.report = path / "report.html"

    @classmethod
    def named(cls, path: Path, projects: Iterable[str] = ()) -> "Run":
        """The run of a directory or its run.toml; a StaleStore where it is none or has links."""
        run = cls(path.parent if path.name == "run.toml" else path, tuple(projects))
        if not run.toml.exists():
            is_packed = path.is_file() and zipfile.is_zipfile(path)
            raise StaleStore(
                "A run is a directory with a run.toml in it.",
                f"{path}, which {'has none' if path.exists() else 'does not exist'}.",
                "a packed run that was not unpacked."
                if is_packed
                else "another directory, or an attribute that was stopped before it began.",
                f"{shlex.join(['unzip', str(path)])}, and name the directory that it makes."
                if is_packed
                else "name the --out of an `upweight attribute …`.",
            )
        require_own(run.path)
        return run

    @property
    def record(self) -> Record:
        """What run.toml says."""
        return Record.read(self.toml)

    @property
    def has_work(self) -> bool:
        """Whether anything was computed here; until then the question may still change."""
        return next(self.path.rglob("*.safetensors"), None) is not None

    @property
    def is_finished(self) -> bool:
        """Whether all scores are there."""
        with contextlib.suppress(FileNotFoundError, ShapeError):
            stored_in(self.scores)
            return True
        return False

    @contextlib.contextmanager
    def held(self, purpose: str) -> Iterator[None]:
        """The only process that writes here, for a while.

        Raises:
            InUse: Another process works here.
            StaleStore: The directory holds things that are not a run's, or links.
            NotWritten: The directory cannot be made.
        """
        self._require_own_folder()
        with locked(self.path, purpose):
            for folder, _, _ in os.walk(self.path):
                remove_left_over(Path(folder))
            yield

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """One after the other of several processes that write here at the same time.

        Raises:
            StaleStore: As for `held`.
            NotWritten: The directory cannot be made.
        """
        self._require_own_folder()
        with claimed(self.path, "together", wait=True):
            yield

    def _require_own_folder(self) -> None:
        make_folder(self.path)
        own = {*OWN, *LOCKS}
        passing = {".part", CLAIM}
        others = [
            p.name for p in self.path.iterdir() if p.name not in own and p.suffix not in passing
        ]
        if others and not self.toml.exists():
            raise StaleStore(
                "A run has a directory of its own.",
                f"{self.path}, which holds {', '.join(sorted(others)[:5])}.",
                "--out that names the directory of the project.",
                f"name a new one, for example --out {self.path / 'run'}",
            )
        require_own(self.path)

    def begin_anew(self) -> None:
        """Remove what was computed so far, for who holds the run and takes another method.

        Raises:
            OSError: Something cannot be removed.
        """
        for folder in (self.scores, self.factors):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)

    def log(self, text: str) -> None:
        """Add a line to log.txt."""
        line = f"{datetime.now().isoformat(' ', 'seconds')}  {text}\n"
        append(self.path / "log.txt", line)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the finished scores came about, without reading them."""
        return asdict(stored_in(self.scores)[1].provenance)

    def load(self) -> Scores:
        """The finished scores, without their live task and data. Raises as `require_finished`."""
        self.require_finished()
        return Scores.load(self.scores)

    def open(self) -> Scores:
        """The same, each compared with its hash, and read when it is asked for."""
        self.require_finished()
        return Scores.open(self.scores)

    def require_finished(self) -> None:
        """Raise StaleStore where scores are missing, or not of what run.toml asks."""
        if not self.is_finished:
            raise StaleStore(
                "This needs a finished run.",
                f"{self.path}, whose scores are not all there.",
                "an attribute that was interrupted, or files of scores that were removed.",
                f"finish it, if you trust its files: {self.command('rerun')}",
            )
        self._require_own_scores()

    def _require_own_scores(self) -> None:
        record, (scores, told) = self.record, stored_in(self.scores)
        found, file = told.provenance, self.scores / MANIFEST
        try:
            of = fingerprints_of(scores.description)
        except KeyError:
            of = dict.fromkeys(CONTENTS, "not recorded")
        stored = {name: scores.begun.get(name, "nothing") for name in record.begun}
        if not is_reference(record.method):  # what a method of the user's says is its own matter
            stored |= {name: getattr(found, name) for name in ("n", "q", "p", "method")}
        if not is_reference(record.measure):
            stored["measure"] = found.measure
        others = [name for name in CONTENTS if of.get(name) != record.fingerprints.get(name)]
        edited = _differences(stored, asdict(record))
        if not others and not edited:
            return
        if others:
            given = f"{file}, which is of another {', '.join(others)} than {self.toml}"
            cause = "scores copied from another run, or a run.toml edited by hand."
            way_out = (
                "put back the one that was changed; or delete the folder "
                f"{self.scores} and compute them again: {self.command('rerun')}"
            )
        else:
            given = f"{self.toml}, which says otherwise: {file} has {'; '.join(edited)}"
            cause = "a run.toml edited by hand: the scores are of the same model, data and method."
            way_out = "write that in run.toml again; or start a new run with another --out."
        required = "The scores of a run are of what its run.toml asks."
        raise StaleStore(required, f"{given}.", cause, way_out)

    def naming(self, record: Record) -> list[str]:
        """The options that name the project of this run, as seen from the current folder."""
        return [
            part for source in record.asked for part in ("--project", self.place_of(record, source))
        ]

    def place_of(self, record: Record, source: str) -> str:
        """Where the user, else run.toml, says that a file lies; to print it, not to follow it."""
        fitting = [each for each in self.projects if Path(each).name == Path(source).name]
        if len(fitting) == 1:
            return fitting[0]
        if (packed := self.packed(source)) is not None:
            return packed
        path = self.path / record.directory / source
        is_remote = str(path).startswith(("\\\\", "//"))  # of Windows: asking would tell who asks
        try:
            if Path(source).suffix != ".py" or is_remote or not path.is_file():
                return source
        except OSError:  # no name that a file can have
            return source
        try:
            return os.path.relpath(path.resolve(), Path.cwd())
        except ValueError:  # another drive
            return str(path)

    def packed(self, name: str) -> str | None:
        """Where `upweight pack` has put a file of the project, from the current folder, if it did.

        The name is one of run.toml, which anybody may have written: only what lies in the folder
        of the run counts, and no link does.
        """
        folder = self.path / PROJECT
        path = folder / name
        try:
            inside = path.resolve().is_relative_to(folder.resolve()) and not folder.is_symlink()
            if not inside or not path.is_file():
                return None
            return os.path.relpath(path, Path.cwd())
        except (OSError, ValueError):
            return None

    def command(self, verb: str) -> str:
        """A command about this run that names its project."""
        return shlex.join(["upweight", verb, str(self.path), *self.naming(self.record)])

    def evaluations(self) -> dict[str, Any]:
        """What comparisons of these scores found, the latest last; empty where there was none.

        Raises:
            StaleStore: The file is damaged, or of other scores.
        """
        if not self.evaluation.exists():  # the scores need not be there yet
            return {}
        return evaluations.read(self.evaluation, stored_in(self.scores)[0].digest)

    def keep_evaluation(self, name: str, facts: dict[str, Any]) -> None:
        """Keep what a comparison found, in place of an earlier one of its name."""
        of = stored_in(self.scores)[0].digest
        evaluations.write(self.evaluation, of, name, facts)


def _differences(stored: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """What was stored of a record, as it would stand in run.toml, where that says otherwise."""
    found = []
    for name, value in stored.items():
        other = told.get(name)
        if isinstance(value, Mapping):
            inside = _differences(value, other if isinstance(other, Mapping) else {})
            found += [f"{name}.{line}" for line in inside]
        elif value != other:
            found.append(f"{name} = {json.dumps(value)}, not {other}")
    return found
