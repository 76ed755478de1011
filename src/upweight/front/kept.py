"""Which method was chosen when the question was first asked? A call that goes on takes it again.

A choice depends on how fast the machine was just then. With a folder it is kept there, by what was
asked, so that an interrupted call resumes with the same method.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from upweight.runtime.atomic import make_folder
from upweight.runtime.headers import own_digest
from upweight.runtime.lock import claimed
from upweight.runtime.resources import Resources
from upweight.runtime.store import Store

FOLDER = "choice"


def kept_choice(
    resources: Resources,
    about: Callable[[], Mapping[str, str]],
    choose: Callable[[], Mapping[str, Any]],
) -> Mapping[str, Any]:
    """What was chosen before, or is now, as JSON.

    Args:
        resources: With the folder; without one nothing is kept.
        about: () -> what the choice is for. Choices for other questions lie beside it.
        choose: () -> the choice.

    Raises:
        StaleStore: The file is damaged.
        NotWritten: The folder cannot be written.
    """
    if resources.folder is None:
        return choose()
    told, place = dict(about()), Path(resources.folder) / FOLDER
    folder = place / own_digest(told)[:32]
    make_folder(place)
    with claimed(place, FOLDER, wait=True):  # one process chooses for all that share the folder
        try:
            store = Store.load(folder, "the same question")
        except FileNotFoundError:
            store = Store.open(folder, told, begun=choose(), again="the same question")
    return store.begun
