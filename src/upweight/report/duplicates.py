"""Training examples that are the same, or nearly: by their inputs alone, never by the model.

    same      equal bytes of the input (texts: equal but for case and spacing), over all examples
    near      largest cosine between a = (x − x̄)/‖x − x̄‖ and the same of other training examples

Of long texts a beginning is read, at most 20 000 characters and of many texts fewer; what follows
is not counted, and texts are the same only if it is equal character by character.

x̄ is the mean over an image's own pixels, or over a text's word counts hashed to 1024 numbers; in
tables each column is first brought to mean 0 and deviation 1 over the training set. Images are
averaged down to 32 × 32. Neighbours are searched for the candidates given, among all examples whose
inputs can be read; the pairs found are the nearest there are, which need not be near.
"""

import hashlib
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upweight.report.sprite import as_images

WORDS = 1024
"""Numbers that the word counts of a text are hashed to."""

SIDE = 32
"""Pixels that images are averaged down to before they are compared."""

OPERATIONS = 2e10
"""Multiplications spent on neighbours: a second or two. Past it there are fewer candidates."""

CHARACTERS = 40_000_000
"""Characters of all texts together whose words are counted: some seconds."""

LONGEST, SHORTEST = 20_000, 1_000
"""Characters of one text whose words are counted, at most and in any case."""

CANDIDATES = 300
PAIRS = 24
"""Pairs and sets that are told, at most."""

BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Duplicates:
    """What was found.

    Args:
        same: Sets of examples with equal inputs: different labels first, then the largest.
        sets: How many such sets there are, told or not.
        extra: How many examples could go without losing an input.
        near: (example, its nearest other), nearest first; without equal inputs.
        cosines: Of those.
        candidates: For how many examples the nearest other was searched.
        among: Among how many.
        read: Characters of each text whose words were counted; None where every text was counted
            whole, and for what is no text.
    """

    same: tuple[tuple[int, ...], ...]
    sets: int
    extra: int
    near: tuple[tuple[int, ...], ...]
    cosines: tuple[float, ...]
    candidates: int
    among: int
    read: int | None = None


def duplicates(
    inputs: "Tensor | Sequence[str]", labels: Sequence[str] | None, candidates: Sequence[int]
) -> Duplicates:
    """Equal and nearly equal inputs.

    `inputs` are an array `[n, …]` or n texts, `candidates` those for which the nearest other is
    searched, the most important first.

    Cost: one hash of every input, at most `CHARACTERS` characters of texts split into words, or
    `SHORTEST` of each, and at most `OPERATIONS` multiplications.
    """
    read = LONGEST
    if not isinstance(inputs, Tensor):
        read = max(SHORTEST, min(LONGEST, CHARACTERS // max(1, len(inputs))))
    hashes = list(_hashes(inputs, read))
    places: dict[bytes, list[int]] = defaultdict(list)
    for i, name in enumerate(hashes):
        places[name].append(i)
    same = [tuple(group) for group in places.values() if len(group) > 1]

    def order(group: tuple[int, ...]) -> tuple[bool, int, int]:
        conflict = labels is not None and len({labels[i] for i in group}) > 1
        return not conflict, -len(group), group[0]

    rows = _rows(inputs, read)
    width = len(rows([0])[0])
    n = len(hashes)
    room = int(OPERATIONS / (n * max(1, width)))
    chosen = list(dict.fromkeys(candidates))[: min(CANDIDATES, room)]
    near = _nearest(rows, hashes, places, chosen)[:PAIRS] if len(chosen) and n > 1 else []
    return Duplicates(
        tuple(sorted(same, key=order)[:PAIRS]),
        len(same),
        sum(len(group) - 1 for group in same),
        tuple((i, j) for i, j, _ in near),
        tuple(cosine for *_, cosine in near),
        len(chosen),
        n,
        read if not isinstance(inputs, Tensor) and any(len(t) > read for t in inputs) else None,
    )


def _hashes(inputs: "Tensor | Sequence[str]", read: int) -> Iterator[bytes]:
    if not isinstance(inputs, Tensor):
        for text in map(str, inputs):
            head, rest = " ".join(text[:read].lower().split()), text[read:].rstrip()
            # Half a surrogate pair, as of a text that was cut, is a character like any other here.
            told = f"{head}\0{rest}".encode("utf-8", "surrogatepass")
            yield hashlib.blake2b(told, digest_size=16).digest()
        return
    for start in range(0, len(inputs), BLOCK):
        rows = inputs[start : start + BLOCK].detach().cpu()
        # NumPy has no bfloat16; float32 holds each of its numbers.
        rows = rows.float() if rows.dtype is torch.bfloat16 else rows
        block = np.ascontiguousarray(rows.numpy())
        for row in block.reshape(len(block), -1):
            yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _rows(
    inputs: "Tensor | Sequence[str]", read: int
) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Examples as unit vectors."""
    if not isinstance(inputs, Tensor):
        return lambda some: _units(np.stack([_counts(inputs[i], read) for i in some]))
    if as_images(np.empty((1, *inputs.shape[1:]))) is not None:
        return lambda some: _units(_small(inputs[list(some)]))
    flat = inputs.reshape(len(inputs), -1)
    # Of at most some thousand rows, evenly spread: a column's scale needs no more.
    sample = flat[:: max(1, len(flat) // 10_000)].double()
    mean, spread = sample.mean(dim=0), sample.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, torch.ones(()).to(spread))
    return lambda some: _units(((flat[list(some)].double() - mean) / spread).cpu().numpy(), False)


def _counts(text: str, read: int) -> NDArray[np.float64]:
    counts = np.zeros(WORDS)
    for word in re.findall(r"\w+", str(text)[:read].lower()):
        counts[zlib.crc32(word.encode()) % WORDS] += 1
    return np.sqrt(counts)  # a word said ten times counts about three times


def _small(images: Tensor) -> NDArray[np.float64]:
    values = images.detach().cpu().float()
    array = as_images(values.numpy())
    assert array is not None
    channels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))
    if max(channels.shape[2:]) > SIDE:
        height, width = (min(SIDE, side) for side in channels.shape[2:])
        channels = torch.nn.functional.adaptive_avg_pool2d(channels, (height, width))
    return channels.reshape(len(channels), -1).double().numpy()


def _units(values: NDArray[np.float64], centered: bool = True) -> NDArray[np.float32]:
    if centered:
        values = values - values.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def _nearest(
    rows: Callable[[Sequence[int]], NDArray[np.float32]],
    hashes: Sequence[bytes],
    twins: Mapping[bytes, Sequence[int]],
    chosen: Sequence[int],
) -> list[tuple[int, int, float]]:
    mine = rows(chosen)
    best, partner = np.full(len(chosen), -np.inf), np.full(len(chosen), -1)
    for start in range(0, len(hashes), BLOCK):
        stop = min(start + BLOCK, len(hashes))
        found = mine @ rows(range(start, stop)).T
        for row, i in enumerate(chosen):
            own = [j - start for j in twins[hashes[i]] if start <= j < stop]
            found[row, own] = -np.inf
        column = found.argmax(axis=1)
        value = found[np.arange(len(chosen)), column]
        better = value > best
        best[better], partner[better] = value[better], column[better] + start
    pairs: dict[tuple[int, int], tuple[int, int, float]] = {}
    for i, j, cosine in zip(chosen, partner.tolist(), best.tolist(), strict=True):
        if j >= 0:
            pairs.setdefault((min(i, j), max(i, j)), (i, j, min(1.0, cosine)))
    return sorted(pairs.values(), key=lambda pair: -pair[2])
