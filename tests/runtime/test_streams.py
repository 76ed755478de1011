"""Numbers drawn for a purpose are nobody else's, and the same whatever was drawn before."""

import torch

from upweight.runtime.streams import stream, stream_seed


def test_a_purpose_has_numbers_of_its_own():
    def drawn(generator):
        return tuple(torch.randperm(50, generator=generator).tolist())

    first = drawn(stream("folds", 3))
    drawn(stream("halves", 3))
    assert drawn(stream("folds", 3)) == first
    others = [stream("halves", 3), stream("folds", 4), torch.Generator().manual_seed(3)]
    assert len({first, *map(drawn, others)}) == 4
    assert 0 <= stream_seed("folds", 3) < 2**32 and stream_seed("folds", 3) != 3
