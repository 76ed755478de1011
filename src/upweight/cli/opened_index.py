"""An index as live objects: the model and the data from where the user names them.

    --hf FOLDER            a model of transformers in a folder of this machine; runs no code of it
    --project FILE.py      the user's own task, whose code runs

An index names its model and its data, and no name in it runs anything or reads anything but a file
of texts whose hash it has.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from upweight.cli.project import Project, opened
from upweight.cli.question import spec_or_object, with_training_data
from upweight.cli.spec import parse
from upweight.errors import DataError, ProjectError, SpecError, StaleStore
from upweight.index.index import Index
from upweight.methods.method import Method
from upweight.runs.indexed import FACTORS, IndexRecord, Source, file_source
from upweight.runs.record import is_reference
from upweight.runtime.atomic import make_folder
from upweight.runtime.fingerprint import sha256
from upweight.runtime.lock import claimed
from upweight.runtime.resources import Resources
from upweight.task.data import Data
from upweight.task.task import Task

FIT = "fit"
"""The part of the work that one process does while others wait."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model that an index is of.

    Args:
        task: Of it.
        tokenizer: That its texts are read with; None: its examples are no texts.
        column, length: Of texts.
        project: The user's files, where the task is theirs.
    """

    task: Task
    tokenizer: Any
    column: str
    length: int
    project: Project | None = None

    def texts(self, given: Any) -> Data:
        """Texts, or the path of a file of them, as examples.

        Raises:
            SpecError: The task does not know how to read a text.
            DataError: There is no such file or column.
        """
        if self.tokenizer is None:
            raise SpecError(
                "A text needs the tokenizer of the model.",
                "a task that has none.",
                "a model of images or rows, or a task that is not of "
                "upweight.adapters.transformers.",
                "name an object of your project in its place: --queries project.py:test; or make "
                "the task by upweight.adapters.transformers.causal_lm(model, tokenizer).",
            )
        from upweight.adapters import transformers as adapter

        if isinstance(given, Path):
            rows = adapter.lines_of(given)
            first = rows[0] if rows else None
            if isinstance(first, dict) and isinstance(first.get(self.column), list):
                return adapter.chat(rows, self.tokenizer, self.column, self.length)
            given = rows
        return adapter.text(given, self.tokenizer, self.column, self.length)

    def queries(self, given: Any) -> Data:
        """Texts to ask about, as queries.

        Raises:
            DataError: One has no token that is predicted.
            UpweightError: As for `texts`.
        """
        asked = self.texts(given)
        for q in range(len(asked)):
            ids = tokens_of(asked, q) or ()
            if len(ids) < 2:
                raise DataError(
                    "A text that is asked about has a token that others predict.",
                    f"{text_of(asked, q, self.tokenizer)!r}, {len(ids)} token.",
                    "a single word, whose loss is 0 whatever the model.",
                    "ask about a sentence with the word in it.",
                )
        return self.task.queries(asked)

    def examples(self, given: str) -> Data:
        """Examples from what a command line names: `file.py:name`, or a file of texts."""
        if is_object(given):
            if self.project is None:
                raise SpecError(
                    "An object of yours comes with a project.",
                    f"{given!r} beside --hf.",
                    "a mixture of the two ways to name a model.",
                    "a file of texts, --data train.jsonl; or project.py in place of --hf.",
                )
            return self.task.training(self.project.load(given))
        return self.texts(Path(given))


def is_object(text: str) -> bool:
    """Whether a text names an object of the user's."""
    source, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and not Path(text).exists() and len(source) > 1


def model_of_folder(folder: Path, column: str, length: int, device: str) -> Model:
    """A model of transformers, from its folder."""
    from upweight.adapters import transformers_folder

    task, tokenizer = transformers_folder.from_folder(folder, device=device)
    config = getattr(task.model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or length
    return Model(task, tokenizer, column, min(length, most))


def model_of_task(task: Task, column: str, length: int, project: Project) -> Model:
    """The user's own task."""
    return Model(task, getattr(task.reads, "tokenizer", None), column, length, project)


def method_of(text: str, project: Project | None) -> Method:
    """A method from its spec, or an object of the user's; a SpecError where it is none."""
    found = parse(text, "method") if project is None else spec_or_object(project, text, "method")
    if not isinstance(found, Method):
        raise SpecError(
            "--method is a method.",
            f"{text!r}, a {type(found).__name__}.",
            "another object of the project.",
            '--method "Influence(EKFAC(), damping=Relative(0.1))".',
        )
    return found


def fitted_in(folder: Path, method: Method, model: Model, train: Data) -> Any:
    """A method fitted to the data, from what the index has kept of it."""
    make_folder(folder / FACTORS)
    with claimed(folder, FIT, wait=True):
        return method.fit(model.task, train, resources=Resources(folder=folder / FACTORS))


@dataclass(frozen=True, eq=False)
class OpenedIndex:
    """An index with the model that was named for it, and the examples of each of its sources."""

    folder: Path
    record: IndexRecord
    model: Model
    index: Index
    data: tuple[Data, ...]

    def example(self, i: int) -> tuple[str, str]:
        """Where an example comes from, and its text; empty where examples are no texts."""
        start = 0
        for source, data in zip(self.record.sources, self.data, strict=True):
            if i < start + len(data):
                name = source.name if is_object(source.name) else Path(source.name).name
                return f"{name} {i - start}", text_of(data, i - start, self.model.tokenizer)
            start += len(data)
        raise IndexError(i)


def text_of(data: Data, i: int, tokenizer: Any) -> str:
    """The text of an example, as the model has seen it: cut where its tokens were."""
    ids = tokens_of(data, i)
    if tokenizer is None or ids is None:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def tokens_of(data: Data, i: int) -> list[int] | None:
    """The tokens of an example, without padding; None where it has none."""
    batch = data.take([i])
    if not isinstance(batch, dict) or "input_ids" not in batch:
        return None
    ids, mask = batch["input_ids"][0], batch.get("attention_mask")
    return list((ids if mask is None else ids[mask[0].bool()]).tolist())


@contextlib.contextmanager
def opened_index(
    folder: Path,
    projects: Sequence[str],
    hf: Path | None,
    given: Sequence[Path],
    device: str,
    typed: str,
) -> Iterator[OpenedIndex]:
    """An index with its model and data, as the user names them.

    Args:
        folder: Of the index.
        projects: Files of the project.
        hf: The folder of a model.
        given: Files of texts, where they have moved; in the order of the index.
        device: Where the model works.
        typed: The command so far, for the way out.

    Raises:
        ProjectError: The model is not named.
        StaleStore: A file of texts is not where it was and as it was, or the model is another.
    """
    record = IndexRecord.read(folder)
    _require_named(record, projects, hf, typed)
    files = _files(record, folder, given, typed)
    with contextlib.ExitStack() as stack:
        if hf is not None and not record.task:
            model = model_of_folder(hf, record.column, record.length, device)
            train = model.examples(files[0])
        else:
            project = stack.enter_context(opened(only=_only(record, projects)))
            task, train = with_training_data(project, record.task, files[0])
            model = model_of_task(task, record.column, record.length, project)
        method = method_of(record.method, model.project)
        rest = [model.examples(each) for each in files[1:]]
        fitted = fitted_in(folder, method, model, train)
        index = Index.load(folder, fitted, train, *rest)
        yield OpenedIndex(folder, record, model, index, (train, *rest))


def _only(record: IndexRecord, projects: Sequence[str]) -> dict[str, str]:
    """The file that stands for each that the index names: by its file name, as for a run."""
    found = {}
    others = filter(is_reference, [record.method])
    objects = (each.name for each in record.sources if not each.sha256)
    for text in [record.task, *others, *objects]:
        source = text.rpartition(":")[0]
        same = [p for p in projects if Path(p).name == Path(source).name or p == source]
        if len(same) != 1:
            raise ProjectError(
                "The code of an index runs only where you name its file.",
                f"the index asks for {text}; named are {', '.join(projects) or 'none'}.",
                "another file, or two of one name.",
                f"if you trust it: --project {shlex.quote(Path(source).name)}, once for each file.",
            )
        found[source] = same[0]
    return found


def _require_named(
    record: IndexRecord, projects: Sequence[str], hf: Path | None, typed: str
) -> None:
    if record.task and not projects:
        raise ProjectError(
            "The code of an index runs only where you name its file.",
            f"an index of {record.task}.",
            "an index is data, which anybody may have written: its names run nothing.",
            f"if you trust this file: {typed} --project "
            f"{shlex.quote(record.task.rpartition(':')[0])}",
        )
    if not record.task and hf is None:
        raise ProjectError(
            "The model of an index is the one that you name.",
            f"an index of the model in {record.model}, as seen from the index.",
            "an index is data, which anybody may have written: its names load nothing.",
            f"{typed} --hf FOLDER, the folder of that model.",
        )


def _files(record: IndexRecord, folder: Path, given: Sequence[Path], typed: str) -> list[str]:
    """Where each source is now, as it was."""
    found, moved = [], {sha256(path): path for path in given if path.is_file()}
    for source in record.sources:
        if not source.sha256:
            found.append(source.name)
            continue
        path = moved.get(source.sha256) or folder / source.name
        is_known = source.sha256 in moved  # hashed above
        if not is_known and (not path.is_file() or sha256(path) != source.sha256):
            state = "which is not there" if not path.is_file() else "which is another file now"
            raise StaleStore(
                "The scores of an index are taken from the texts that it was built on.",
                f"{path}, {state}.",
                "texts that were moved, edited or appended to.",
                f"put back the file, or name where it is: {typed} --data FILE; new texts are "
                "appended by `upweight index extend`.",
            )
        found.append(str(path))
    return found


def source_of(given: str, folder: Path, rows: int) -> Source:
    """What index.toml says of some examples."""
    if is_object(given):
        return Source(given, "", rows)
    return file_source(Path(given), folder, rows)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options by which a model is named for an index that exists."""
    options = [
        click.option(
            "--hf", metavar="FOLDER", type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="The folder of the model of transformers that the index is of.",
        ),
        click.option(
            "--data", "given", metavar="FILE", multiple=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Where a file of its texts is now, if it has moved.",
        ),
        click.option(
            "--project", "projects", multiple=True, metavar="FILE.py",
            help="A file of the project, whose code may then run.",
        ),
        click.option(
            "--device", default="cpu", show_default=True, help="Where an --hf model works."
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function
