"""RowStore: rows of numbers on disk, each found again by name. Safe to kill at any instant.

    directory/<fingerprint>/manifest.json            what the rows belong to, in words
    directory/<fingerprint>/<digest>.safetensors     rows that were recorded together

The fingerprint is the hash of a description. Rows made under another description lie in another
folder: they are never mixed up and never overwritten. Every file is written beside its place and
then renamed, so what is there is whole. No pickle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from upweight.errors import StaleStore, message
from upweight.runtime.fingerprint import digest
from upweight.runtime.whole import write_whole

SCHEMA = "1"


@dataclass(frozen=True)
class RowStore:
    """Named rows in one folder. Made by `RowStore.open`.

    Args:
        directory: The folder of one description.
    """

    directory: Path

    @classmethod
    def open(cls, root: str | Path, description: Mapping[str, str]) -> "RowStore":
        """The rows under `root` that belong to this description; none yet for a new one.

        Raises:
            StaleStore: The folder holds another description.
            OSError: The folder cannot be written.
        """
        text = json.dumps({"schema": SCHEMA, **description}, indent=1, sort_keys=True)
        store = cls(Path(root) / digest(text)[:32])
        store.directory.mkdir(parents=True, exist_ok=True)
        manifest = store.directory / "manifest.json"
        if not manifest.exists():
            write_whole(manifest, text.encode())
        elif manifest.read_text(encoding="utf-8") != text:
            raise StaleStore(_stale(manifest, "a description that is not the one it is named by"))
        return store

    def read(self) -> dict[str, dict[str, Tensor]]:
        """Every recorded row: its name, then its columns.

        Raises:
            StaleStore: A file is damaged.
        """
        rows: dict[str, dict[str, Tensor]] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            columns = _columns(path)
            for k, name in enumerate(columns.pop("names")):
                rows[bytes(name.tolist()).hex()] = {key: c[k] for key, c in columns.items()}
        return rows

    def record(self, names: Sequence[str], columns: Mapping[str, Tensor]) -> None:
        """Add rows, all or none of them.

        Args:
            names: One hash in hexadecimal a row.
            columns: Tensors with one entry a row on their first axis.

        Raises:
            OSError: The disk is full or not writable. Rows recorded before stay readable.
        """
        if not names:
            return
        tensors = {key: c.detach().cpu().contiguous() for key, c in columns.items()}
        tensors["names"] = torch.tensor([list(bytes.fromhex(name)) for name in names]).byte()
        metadata = {"schema": SCHEMA, "digest": _digest(tensors)}
        target = self.directory / f"{digest(*names)[:32]}.safetensors"
        write_whole(target, save(tensors, metadata))


def _columns(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise StaleStore(
            _stale(path, f"bytes that are not a safetensors file ({error})")
        ) from error
    if metadata.get("schema") != SCHEMA or metadata.get("digest") != _digest(tensors):
        raise StaleStore(_stale(path, f"schema {metadata.get('schema')} or altered numbers"))
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest(*(part for key in sorted(tensors) for part in (key, tensors[key])))


def _stale(path: Path, given: str) -> str:
    return message(
        f"Recorded rows must be what was written, schema {SCHEMA}.",
        f"{path} with {given}.",
        "a file edited, copied from elsewhere or damaged by the disk.",
        "delete that file; its rows are made again.",
    )
