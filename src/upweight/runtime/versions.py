"""Which versions of what computed these numbers?"""

import importlib.metadata
import platform

import torch

FITTING = ("numpy", "scikit-learn", "statsmodels")
"""Packages, beside PyTorch, that fit models."""


def library_versions() -> dict[str, str]:
    """Of this library, of PyTorch and of Python."""
    own = version_of("upweight") or "source tree"
    return {"upweight": own, "torch": torch.__version__, "python": platform.python_version()}


def numeric_versions() -> dict[str, str]:
    """Of all that models are fitted with: what is not installed is left out, nothing imported."""
    known = library_versions()
    fitting = {name: version_of(name) for name in FITTING}
    return {name: known[name] for name in ("upweight", "torch")} | {
        name: version for name, version in fitting.items() if version is not None
    }


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
