"""Random numbers for one purpose: which nobody else draws, in whatever order things are drawn.

With `manual_seed(seed)` itself a user may have drawn the very thing that is looked for. With the
same numbers rows whose labels were flipped would be drawn less often, or lie in the same folds, and
a choice would look better than it is. A purpose has the same numbers whatever was drawn before.
"""

import torch

from upweight.runtime.fingerprint import digest


def stream_seed(what: str, seed: int) -> int:
    """A seed below 2³² of its own for what is drawn."""
    return int(digest(what, str(seed))[:8], 16)


def stream(what: str, seed: int) -> torch.Generator:
    """Random numbers of its own for what is drawn, on the CPU."""
    return torch.Generator().manual_seed(int(digest(what, str(seed))[:12], 16))
