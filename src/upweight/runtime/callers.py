"""Which line of the user's a warning is about."""

import inspect
import warnings

PACKAGE = __file__.rpartition("runtime")[0]


def warn(note: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called the outermost function of this package."""
    frame, frames = inspect.currentframe(), []
    while frame is not None:  # `inspect.stack` would look for the source of each
        frames.append(frame.f_code.co_filename)
        frame = frame.f_back
    frames.reverse()
    inside = next(k for k, name in enumerate(frames) if name.startswith(PACKAGE))
    warnings.warn(note, category, stacklevel=len(frames) - inside + 1)
