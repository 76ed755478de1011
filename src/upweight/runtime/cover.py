"""Which files together hold the scores of some queries with every training example?

Files may overlap: runs with other memory, or at the same time, cut the work in other places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shard:
    """One file: scores of the queries first … last − 1 with the examples start … stop − 1."""

    first: int
    last: int
    start: int
    stop: int
    path: Path


def covering(shards: Sequence[Shard], first: int, last: int) -> list[tuple[Shard, int]]:
    """Files one behind the other with these queries, and from which example each is needed."""
    mine = [s for s in shards if s.first <= first and last <= s.last]
    found: list[tuple[Shard, int]] = []
    while True:
        end = reach(found)
        further = [s for s in mine if s.start <= end < s.stop]
        if not further:
            return found
        found.append((max(further, key=lambda s: s.stop), end))


def reach(found: Sequence[tuple[Shard, int]]) -> int:
    """The first example that is not covered."""
    return found[-1][0].stop if found else 0


def gaps(shards: Sequence[Shard], first: int, last: int, n: int) -> list[tuple[int, int]]:
    """Ranges of the n examples whose scores with these queries are in no file."""
    found, end = [], 0
    for shard in sorted(shards, key=lambda s: s.start):
        if shard.first <= first and last <= shard.last:
            if shard.start > end:
                found.append((end, shard.start))
            end = max(end, shard.stop)
    return found + ([(end, n)] if end < n else [])
