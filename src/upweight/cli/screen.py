"""What a person sees of a verb: an answer on standard output, everything else on standard error.

    exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 told to end (SIGTERM)

An error is one screen: what was required, what was given, the usual cause, the way out. Its
traceback is shown when asked for.
"""

import contextlib
import functools
import json
import math
import os
import re
import signal
import sys
import threading
import traceback as tracebacks
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from upweight._text import readable
from upweight.errors import UpweightError
from upweight.runtime.ranks import launched_as

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for the tab and the end of a line, and those that reorder a line."""


@dataclass(frozen=True)
class Answer:
    """What a verb found.

    Args:
        text: For a person; empty where the verb has printed it along the way.
        facts: The same as JSON, for `--json`.
        failed: Whether it is an answer with exit code 1.
    """

    text: str
    facts: dict[str, Any]
    failed: bool = False


class Terminated(KeyboardInterrupt):
    """SIGTERM: a launcher whose other process died, or a scheduler, ends this one."""


class Failed(click.ClickException):
    """One screen about an error."""

    def show(self, file: Any = None) -> None:
        click.echo(plain(self.message), err=True)


def require_one_process(name: str) -> None:
    """Refuse to do the work of one process in each process of a launcher."""
    if launched_as()[1] > 1:
        raise click.UsageError(
            f"{name} is the work of one process; torchrun started several, which share "
            "`attribute` and `index build` only"
        )


def verb(function: Callable[..., Answer]) -> Callable[..., None]:
    """Give a verb its two last options, and print what it answers or what went wrong."""

    @click.option("--json", "as_json", is_flag=True, help="Answer in JSON, for machines.")
    @click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def shown(*arguments: Any, as_json: bool, traceback: bool, **options: Any) -> None:
        is_silent = launched_as()[0] > 0  # rank 0 of torchrun speaks for all
        try:
            # With --json, standard output belongs to the machine.
            out = sys.stderr if as_json else sys.stdout
            with _terminable(), _nothing_said(is_silent, out), warnings.catch_warnings():
                warnings.showwarning = _warned
                answer = function(*arguments, **options)
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, click.ClickException | click.exceptions.Exit):
                raise
            if traceback:
                tracebacks.print_exception(error)
            text = _in_words(error)
            if as_json and not is_silent:
                facts = {"error": type(error).__name__, "message": text}
                click.echo(json.dumps(facts))
            failed = Failed(text)
            failed.exit_code = _exit_code(error)  # type: ignore[misc]
            raise failed from error
        if is_silent:
            return
        if as_json:
            click.echo(json.dumps(_strict(answer.facts), indent=1))
        elif answer.text:
            click.echo(plain(answer.text))
        if answer.failed:
            raise click.exceptions.Exit(1)

    return shown


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, with what to do next; by default it says nothing."""
    if threading.current_thread() is not threading.main_thread():  # which alone has handlers
        yield
        return
    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            raise Terminated
        os._exit(128 + number)  # a fork, such as a worker that loads data

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Terminated):
        return 128 + signal.SIGTERM
    return 130 if isinstance(error, KeyboardInterrupt) else 1


@contextlib.contextmanager
def _nothing_said(is_silent: bool, out: TextIO) -> Iterator[None]:
    """What is printed goes to `out`, or nowhere."""
    with contextlib.ExitStack() as stack:
        if is_silent:
            out = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stderr(out))
        stack.enter_context(contextlib.redirect_stdout(out))
        yield


@contextlib.contextmanager
def continued_by(command: str) -> Iterator[None]:
    """Add the command that resumes the work where the user, or a full disk, stops it."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        error.add_note(f"Finished work is kept. To resume: {command}")
        raise


def say(text: str) -> None:
    """Progress, for a person."""
    click.echo(plain(text), file=sys.stderr)


def plain(text: str) -> str:
    """A text without what moves a terminal's cursor or reorders a line: files of others have words.

    Such characters are written as Python writes them.
    """
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], readable(text))


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(rows: list[tuple[Any, ...]]) -> str:
    """Rows of texts, in columns."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)
    return "\n".join(f"  {line}" for line in lines)


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning on a line of its own, with its place where that is the user's."""
    is_own = Path(filename).is_relative_to(Path(__file__).parents[1])
    say(f"warning: {message}" if is_own else f"warning: {filename}:{lineno}: {message}")


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_words(error: BaseException) -> str:
    """An error on one screen."""
    notes = list(getattr(error, "__notes__", []))
    if isinstance(error, KeyboardInterrupt):
        said = "told to end (SIGTERM)" if isinstance(error, Terminated) else "interrupted"
        return "\n".join([said, *(notes or ["run the same command again"])])
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, UpweightError | OSError):
        frame = tracebacks.extract_tb(error.__traceback__)[-1]
        notes.append(f"at {frame.filename}:{frame.lineno}; --traceback shows the rest")
    return "\n  ".join([text, *notes])
