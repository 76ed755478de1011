"""What the bits of a run depend on besides its question: libraries, processor, BLAS.

Two runs of one question have the same bits where all of this is the same, and else the same numbers
to rounding.
"""

import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

from upweight.runtime.versions import library_versions

LIBRARIES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "statsmodels": "statsmodels",
    "transformers": "transformers",
    "torchvision": "torchvision",
}
"""Whose version is told where they are imported: module, and package."""


def environment(device: torch.device) -> dict[str, str]:
    """Libraries that are imported, and the machine, without its name.

    Args:
        device: Where the model is.
    """
    found = dict(library_versions())
    for module, package in LIBRARIES.items():
        if module in sys.modules:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = str(getattr(sys.modules[module], "__version__", "unknown"))
    found["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processor"] = _processor()
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found["BLAS"] = _blas()
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["CUDA"] = str(torch.version.cuda)
    elif device.type != "cpu":
        found["device"] = str(device)
    return found


def differences(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """What two environments have otherwise, as "torch 2.12 → 2.13"."""
    names = dict.fromkeys([*first, *second])
    return [
        f"{name} {first.get(name, 'none')} → {second.get(name, 'none')}"
        for name in names
        if first.get(name) != second.get(name)
    ]


def _processor() -> str:
    """Its model, where the system tells."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in ("model name", "hardware"):
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _blas() -> str:
    told = torch.__config__.show()
    _, found, rest = told.partition("BLAS_INFO=")
    return rest.partition(",")[0].strip() if found else "unknown"
