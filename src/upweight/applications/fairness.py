"""Which training rows make a classifier treat groups differently, and what undoing it costs.

group_gaps.py    the gap, with a derivative and as counted
gap_causes.py    which rows it comes from
gap_repair.py    the least change that closes it, refitted, with its price
least_change.py  the linear program of that
other_labels.py  changed labels
"""

from upweight.applications.gap_causes import Cause, Causes, GroupCauses, causes
from upweight.applications.gap_repair import Point, Repair, repair
from upweight.applications.group_gaps import Gap, HardGap, gap, hard_gap

__all__ = [
    "Cause",
    "Causes",
    "Gap",
    "GroupCauses",
    "HardGap",
    "Point",
    "Repair",
    "causes",
    "gap",
    "hard_gap",
    "repair",
]
