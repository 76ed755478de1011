"""The global generators of random numbers, which belong to whoever calls the library."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """The generators of Python, NumPy and PyTorch, on every device, come back as they were.

    For code that seeds or draws from them and is not ours.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
