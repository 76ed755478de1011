"""The API reference has every public name, once, by the place where it is defined."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

from upweight import _public, errors

PAGES = Path(__file__).parents[1] / "docs" / "reference"
FOLDERS = (
    "adapters.lightning",
    "adapters.sklearn",
    "adapters.statsmodels",
    "adapters.transformers",
    "applications",
    "testing",
    "view",
)


def public(module):
    """Classes and functions that a module offers, those of its public modules among them."""
    for name in getattr(module, "__all__", None) or vars(module):
        thing = getattr(module, name)
        if isinstance(thing, ModuleType) and hasattr(module, "__all__"):
            yield from public(thing)
        elif inspect.isclass(thing) or inspect.isfunction(thing):
            if hasattr(module, "__all__") or (
                thing.__module__ == module.__name__ and not name.startswith("_")
            ):
                yield f"{thing.__module__}.{name}"


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: (\S+)$", "".join(p.read_text() for p in PAGES.glob("*.md")), re.M)
    for name in shown:
        module, _, thing = name.rpartition(".")
        assert hasattr(importlib.import_module(module), thing), name
    modules = (_public, *(importlib.import_module(f"upweight.{folder}") for folder in FOLDERS))
    wanted = {name for module in modules for name in public(module)}
    own = ("message", "listed", "nearest")  # for those who raise errors
    wanted -= {f"upweight.errors.{name}" for name in own}
    assert wanted <= set(shown)
    assert len(shown) == len(set(shown))


def test_every_error_is_on_the_page_about_messages():
    said = (PAGES.parent / "messages.md").read_text(encoding="utf-8")
    own = [
        name
        for name, thing in vars(errors).items()
        if inspect.isclass(thing) and thing.__module__ == errors.__name__
    ]
    assert [name for name in own if f"`{name}`" not in said and name != "UpweightError"] == []
