"""What the bits of a run depend on besides its question: libraries, processor, BLAS.

Two runs of one question have the same bits where all of this is the same, and else the same numbers
to rounding.
"""

import platform
import re
import sys
from pathlib import Path

import torch

from upweight.runtime.versions import library_versions, version_of

LIBRARIES = {
    "numpy": "numpy", "scipy": "scipy", "sklearn": "scikit-learn", "statsmodels": "statsmodels",
    "transformers": "transformers", "torchvision": "torchvision",
}  # fmt: skip
"""Whose version is recorded where they are imported: module, and package."""


def environment(device: torch.device) -> dict[str, str]:
    """Libraries that are imported, and the machine, without its name."""
    found = dict(library_versions())
    for module, package in LIBRARIES.items():
        if module in sys.modules:
            other = getattr(sys.modules[module], "__version__", "unknown")
            found[package] = version_of(package) or str(other)
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
    """Differences between two environments, as "torch 2.12 → 2.13"."""
    names = dict.fromkeys([*first, *second])
    return [
        f"{name} {first.get(name, 'none')} → {second.get(name, 'none')}"
        for name in names
        if first.get(name) != second.get(name)
    ]


def _processor() -> str:
    """Its model, where the system says."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    found = re.search(r"(?im)^(model name|hardware)\s*:\s*(.*)$", text)
    return found[2].strip() if found else platform.processor() or platform.machine() or "unknown"


def _blas() -> str:
    found = re.search(r"BLAS_INFO=([^,]*)", torch.__config__.show())
    return found[1].strip() if found else "unknown"
