"""A run too large for one file, served to the browser of this machine: the same page, by asking.

    serve(opened("runs/cifar/scores"), Display(train, queries))      http://127.0.0.1:…/?token=…

Loopback only, read-only, and no path is ever taken from an address. Scores are read from a
memory-mapped copy with one row per query, which is made once.
"""

from upweight.view.matrix import keeping, opened
from upweight.view.server import Server, serve

__all__ = ["Server", "keeping", "opened", "serve"]
