"""A run too large for one file, served to the browser of this machine: the same page, by asking.

    serve(opened("runs/cifar/scores"), train, queries)      http://127.0.0.1:…/?token=…

Loopback only, read-only, and no path is ever taken from an address. Scores are read from a
memory-mapped copy with one row per query, which is made once.
"""

from upweight.view.answers import Answers
from upweight.view.matrix import keeping, opened
from upweight.view.server import Server, serve

__all__ = ["Answers", "Server", "keeping", "opened", "serve"]
