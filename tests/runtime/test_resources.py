"""Resources that are changed in one part keep the others."""

from dataclasses import replace

import upweight as uw
from upweight.runtime.ranks import Ranks


def test_a_copy_of_resources_keeps_the_ranks_that_share_the_work(tmp_path):
    """Of a model that is split, ranks help each other before they wait."""
    ranks = Ranks(None, before=lambda: None)
    used = uw.Resources(folder=tmp_path).sharing(ranks)
    assert replace(used, folder=None).ranks is ranks and used.within("part").ranks is ranks
