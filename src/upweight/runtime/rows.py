"""RowStore: rows of numbers on disk, each found again by name. Safe to kill at any instant.

    directory/<fingerprint>/manifest.json            what the rows belong to, in words
    directory/<fingerprint>/<digest>.safetensors     rows that were recorded together

The fingerprint is the hash of a description. Rows made under another description lie in another
folder: they are never mixed up and never overwritten. Every file is whole or not there, and carries
the fingerprint and the hash of its rows. No pickle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upweight.errors import StaleStore
from upweight.runtime.fingerprint import digest
from upweight.runtime.tensors import read_tensors, stale, write_tensors
from upweight.runtime.whole import contents, make_folder, remove_left_over, write_whole

SCHEMA = "2"

WAY_OUT = "delete that file; its rows are made again when they are next asked for."


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
            NotWritten: The folder cannot be written.
        """
        text = json.dumps({"schema": SCHEMA, **description}, indent=1, sort_keys=True)
        store = cls(Path(root) / digest(text)[:32])
        make_folder(store.directory)
        remove_left_over(store.directory)
        manifest = store.directory / "manifest.json"
        if not manifest.exists():
            write_whole(manifest, text.encode())
        elif not manifest.is_file() or contents(manifest) != text.encode():
            given = "a description that is not the one it is named by"
            raise StaleStore(stale(manifest, given, "delete that file; it is written again."))
        return store

    def read(self) -> dict[str, dict[str, Tensor]]:
        """Every recorded row: its name, then its columns.

        Raises:
            StaleStore: A file is damaged.
        """
        rows: dict[str, dict[str, Tensor]] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            columns, about = read_tensors(path, WAY_OUT)
            if about != self._about or "names" not in columns:
                raise StaleStore(stale(path, "rows of something else", WAY_OUT))
            for k, name in enumerate(columns.pop("names")):
                rows[bytes(name.tolist()).hex()] = {key: c[k] for key, c in columns.items()}
        return rows

    def record(self, names: Sequence[str], columns: Mapping[str, Tensor]) -> None:
        """Add rows, all or none of them.

        Args:
            names: One hash in hexadecimal a row.
            columns: Tensors with one entry a row on their first axis.

        Raises:
            NotWritten: The disk is full or not writable. Rows recorded before stay readable.
        """
        if not names:
            return
        coded = torch.tensor([list(bytes.fromhex(name)) for name in names]).byte()
        target = self.directory / f"{digest(*names)[:32]}.safetensors"
        write_tensors(target, {**columns, "names": coded}, self._about)

    @property
    def _about(self) -> dict[str, str]:
        """What every file says it belongs to."""
        return {"schema": SCHEMA, "of": self.directory.name}
