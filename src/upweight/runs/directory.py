"""Run: the directory of one question, and its states.

new  ──create──►  unfinished  ──work──►  finished          a kill leaves one of these, never a mix
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from upweight.errors import StaleStore, message
from upweight.runs.record import Record
from upweight.runtime.lock import FILES as LOCKS
from upweight.runtime.lock import locked
from upweight.runtime.whole import write_whole
from upweight.scores import Scores

OWN = {
    "run.toml", "factors", "scores", "shown", "retrained", "evaluation.json", "report.html",
    "log.txt",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run directory.

    Args:
        path: The directory.
    """

    path: Path

    @classmethod
    def named(cls, path: Path) -> "Run":
        """The run of a directory, or of its run.toml.

        Raises:
            StaleStore: There is no run.
        """
        run = cls(path.parent if path.name == "run.toml" else path)
        if not run.toml.exists():
            raise StaleStore(
                message(
                    "A run is a directory with a run.toml in it.",
                    f"{path}, which {'has none' if path.exists() else 'does not exist'}.",
                    "another directory, or an attribute that was stopped before it began.",
                    "name the --out of an `upweight attribute …`.",
                )
            )
        return run

    @property
    def toml(self) -> Path:
        """What the run asks."""
        return self.path / "run.toml"

    @property
    def factors(self) -> Path:
        """The curvature."""
        return self.path / "factors"

    @property
    def scores(self) -> Path:
        """The scores."""
        return self.path / "scores"

    @property
    def shown(self) -> Path:
        """What a page shows of the data."""
        return self.path / "shown"

    @property
    def retrained(self) -> Path:
        """Models trained for comparison."""
        return self.path / "retrained"

    @property
    def evaluation(self) -> Path:
        """What comparison with retraining found."""
        return self.path / "evaluation.json"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    @property
    def record(self) -> Record | None:
        """What run.toml says; None for a new directory."""
        return Record.read(self.toml) if self.toml.exists() else None

    @property
    def has_work(self) -> bool:
        """Whether anything was computed here; until then the question may still change."""
        return next(self.path.rglob("*.safetensors"), None) is not None

    @property
    def is_finished(self) -> bool:
        """Whether all scores are there."""
        return any(path.exists() for path in Scores.headers(self.scores))

    @contextlib.contextmanager
    def held(self, purpose: str) -> Iterator[None]:
        """The only process that writes here, for a while.

        Raises:
            InUse: Another process works here.
            StaleStore: The directory holds things that are not a run's.
            OSError: The directory cannot be made.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in self.path.iterdir() if not _is_own(p)]
        if others and not self.toml.exists():
            raise StaleStore(
                message(
                    "A run has a directory of its own.",
                    f"{self.path}, which holds {', '.join(sorted(others)[:5])}.",
                    "--out that names the directory of the project.",
                    f"name a new one, for example --out {self.path / 'run'}",
                )
            )
        with locked(self.path, purpose):
            # By writers that were killed, who number them; a view that stages a copy does not.
            for left_over in self.path.rglob("*.[0-9]*.part"):
                left_over.unlink(missing_ok=True)
            yield

    def log(self, text: str) -> None:
        """Add a line to log.txt."""
        line = f"{datetime.now().isoformat(' ', 'seconds')}  {text}\n"
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line)

    @property
    def provenance(self) -> dict[str, Any]:
        """How the finished scores came about, without reading them."""
        header = next(path for path in Scores.headers(self.scores) if path.exists())
        return json.loads(header.read_text(encoding="utf-8"))["provenance"]

    def load(self) -> Scores:
        """The finished scores, without their live task and data.

        Raises:
            StaleStore: They are not finished, or damaged.
        """
        self.require_finished()
        return Scores.load(self.scores)

    def require_finished(self) -> None:
        """Refuse a run whose scores are not all there.

        Raises:
            StaleStore: So.
        """
        if not self.is_finished:
            raise StaleStore(
                message(
                    "This needs a finished run.",
                    f"{self.path}, whose scores are not all there.",
                    "an attribute that was interrupted.",
                    f"finish it: upweight rerun {self.toml} --project FILE.py; without the option "
                    "it says which files.",
                )
            )

    def evaluations(self) -> dict[str, Any]:
        """What comparisons found, the latest last; empty where there was none."""
        if not self.evaluation.exists():
            return {}
        return json.loads(self.evaluation.read_text(encoding="utf-8"))

    def keep_evaluation(self, name: str, facts: dict[str, Any]) -> None:
        """Keep what a comparison found, in place of an earlier one of its name."""
        kept = {k: v for k, v in self.evaluations().items() if k != name} | {name: facts}
        write_whole(self.evaluation, json.dumps(kept, indent=1).encode())

    def digests(self) -> dict[str, str]:
        """A hash of each file of scores: equal for scores that are equal bit for bit."""
        found = {}
        for path in sorted(self.scores.glob("*.safetensors")):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def _is_own(path: Path) -> bool:
    return path.name in OWN or path.name in LOCKS or path.suffix == ".part"
