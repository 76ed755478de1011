"""A run too large for one file, served to the browser of this machine: the same page, by asking.

    serve(Scores.open("runs/cifar/scores"), Display(train, queries))     http://127.0.0.1:…/?token=…

Loopback only, read-only, and no path is ever taken from an address. Of the scores only what is
looked at is read.
"""

from upweight.view.server import Server, serve

__all__ = ["Server", "serve"]
