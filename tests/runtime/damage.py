"""Ways in which a file of numbers stops being what was written."""

import json
import struct

import torch
from safetensors.torch import load_file, save_file


def flipped(path):
    """One bit of the last number."""
    told = bytearray(path.read_bytes())
    told[-1] ^= 1
    path.write_bytes(bytes(told))


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:20])


def emptied(path):
    path.write_bytes(b"")


def replaced(path):
    path.write_bytes(bytes(range(256)) * 4)


def turned_into_a_folder(path):
    path.unlink()
    path.mkdir()


def with_values(change):
    """Well formed, with the same words in its header, and other numbers."""

    def damage(path):
        header = metadata_of(path)
        tensors = load_file(path)
        name = max(tensors, key=lambda name: tensors[name].nbytes)
        save_file({**tensors, name: change(tensors[name]).contiguous()}, path, header)

    return damage


def metadata_of(path):
    told = path.read_bytes()
    (length,) = struct.unpack("<Q", told[:8])
    return json.loads(told[8 : 8 + length]).get("__metadata__", {})


def without_a_hash(path):
    """As versions before hashes wrote them."""
    save_file(load_file(path), path, {"schema": "1"})


def with_header(header):
    def damage(path):
        told = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(told)) + told)

    return damage


def named_twice(path):
    """Its values are there twice, under one name."""
    told = path.read_bytes()
    (length,) = struct.unpack("<Q", told[:8])
    fields = told[8 : 8 + length].decode().rstrip()
    name = next(key for key in json.loads(fields) if key != "__metadata__")
    entry = json.loads(fields)[name]
    size = entry["data_offsets"][1]
    twice = json.dumps({**entry, "data_offsets": [size, 2 * size]})
    header = (fields[:-1] + f',"{name}":{twice}}}').encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + told[8 + length :] * 2)


def edited(values):
    changed = values.clone()
    changed.view(-1)[0] = 99.0
    return changed


ENDLESS = {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}

DAMAGES = {
    "one bit": flipped,
    "cut": cut,
    "cut in the header": cut_in_the_header,
    "empty": emptied,
    "no safetensors": replaced,
    "a folder": turned_into_a_folder,
    "an edited score": with_values(edited),
    "doubled": with_values(lambda v: 2 * v),
    "transposed": with_values(lambda v: v.mT),
    "flattened": with_values(lambda v: v.reshape(-1)),
    "short": with_values(lambda v: v[:-1]),
    "long": with_values(lambda v: torch.cat([v, v])),
    "whole numbers": with_values(lambda v: v.long()),
    "the bits as whole numbers": with_values(lambda v: v.view(torch.int32)),
    "fewer digits": with_values(lambda v: v.half()),
    "NaN": with_values(lambda v: v * torch.nan),
    "no hash": without_a_hash,
    "no tensor": with_header({}),
    "endless and empty": with_header({"values": ENDLESS}),
    "named twice": named_twice,
}
