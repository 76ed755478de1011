"""Which versions of what computed these numbers?"""

import importlib.metadata
import platform

import torch


def library_versions() -> dict[str, str]:
    """Of this library, of PyTorch and of Python."""
    try:
        own = importlib.metadata.version("upweight")
    except importlib.metadata.PackageNotFoundError:
        own = "source tree"
    return {"upweight": own, "torch": torch.__version__, "python": platform.python_version()}
