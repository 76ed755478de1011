"""evaluation.json: what comparisons with retraining found of the scores of a run.

RUN/run.toml     RUN/scores/     RUN/evaluation.json  {"of": hash of the scores, "halves": {…}}
"""

from pathlib import Path
from typing import Any

from upweight.errors import StaleStore
from upweight.runtime.headers import read_json, write_json

NAME, SCHEMA = "evaluation.json", 1

HALVES = "halves"
"""The comparison by random subsets, which gives the verdict."""

WAY_OUT = (
    "ask whoever gave you the run for it; or delete that file and evaluate again, `upweight "
    "evaluate RUN --project FILE.py`, of a network with its --recipe FILE.py:NAME: the models that "
    "were trained are kept."
)


def beside(scores: Path) -> Path:
    """The file of the run that a folder of scores is in; it exists if there was a comparison."""
    run = scores.absolute().parent
    is_run = scores.absolute() == run / "scores" and (run / "run.toml").exists()
    return (run if is_run else scores) / NAME


def read(path: Path, of: str) -> dict[str, Any]:
    """What was found by the name of the comparison, the latest last; empty where there was none.

    Args:
        path: The file.
        of: The hash of the scores that it must be of.

    Raises:
        StaleStore: The file is damaged, or of other scores.
    """
    if not path.exists():
        return {}
    kept = read_json(path, SCHEMA, dict[str, Any], WAY_OUT)
    if kept.pop("of", None) != of:
        raise StaleStore(
            "A comparison is of the scores that a run holds.",
            f"{path}, which is of others, or does not say of which.",
            "a file copied from another run, or scores computed again since.",
            WAY_OUT,
        )
    return kept


def write(path: Path, of: str, name: str, facts: dict[str, Any]) -> None:
    """Keep what a comparison found, in place of an earlier one of its name."""
    kept = {k: v for k, v in read(path, of).items() if k != name} | {name: facts}
    write_json(path, SCHEMA, {**kept, "of": of})
