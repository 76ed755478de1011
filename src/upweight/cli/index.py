"""`upweight index`: rows of training examples on disk, and the examples behind a text."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from upweight.cli.opened_index import (
    Model,
    OpenedIndex,
    fitted_in,
    is_object,
    method_of,
    model_of_folder,
    model_of_task,
    model_options,
    opened_index,
    source_of,
    text_of,
)
from upweight.cli.project import opened
from upweight.cli.question import NAMES, with_training_data
from upweight.cli.screen import (
    Answer,
    continued_by,
    duration,
    require_one_process,
    say,
    size,
    table,
    verb,
)
from upweight.errors import DataError, SpecError
from upweight.index.index import BITS, Index
from upweight.index.verification import UNCORRELATED
from upweight.methods.method import Method
from upweight.runs.forecast import IndexForecast, index_forecast
from upweight.runs.indexed import FACTORS, IndexRecord
from upweight.runs.record import relative_to
from upweight.runtime.atomic import make_folder
from upweight.runtime.ranks import launched, launched_as
from upweight.runtime.resources import Resources
from upweight.runtime.selection import spaced
from upweight.runtime.store import FINISHED
from upweight.runtime.versions import library_versions
from upweight.task.data import Data

METHOD = "Influence(EKFAC(), damping=Relative(0.1))"

LINE = 72
"""Characters of a text in a table."""

ONE_KIND = "ask about --text TEXT (once or more), or about --queries FILE"

OWN_QUERIES, COMPARED = 8, 64
"""Of `verify`: examples that are asked about where nothing else is given, and those compared."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def index() -> None:
    """Keep a row of every example on disk, and ask for those behind a text.

    The rows are made once, by one pass over the data. A question then costs a scan of the rows and
    the gradients of some candidates. See docs/index_on_disk.md.

    \b
    Examples:
        upweight index build --hf model --data train.jsonl --out index
        upweight index top index --hf model --text "The capital of France is Paris."
        upweight view index --hf model
    """


@index.command()
@click.argument("task", metavar="[FILE.py[:TASK]]", required=False)
@click.option(
    "--train", metavar="FILE.py:NAME", help="The examples.  [default: train in the same file]"
)
@click.option(
    "--hf",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="In place of a file of yours: the folder of a model of transformers.",
)
@click.option(
    "--data",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With --hf: a file with a JSON object or text a line.",
)
@click.option("--column", default="text", show_default=True, help="The entry that is the text.")
@click.option(
    "--length",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens per text at most; a text is cut there.",
)
@click.option("--device", default="cpu", show_default=True, help="Where an --hf model works.")
@click.option("--method", default=METHOD, show_default=True, metavar="SPEC", help="Whose scores.")
@click.option(
    "--bytes",
    "bytes_per_example",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Of a row.",
)
@click.option(
    "--bits",
    type=click.IntRange(1, 32),
    default=BITS,
    show_default=True,
    help="Of a number of a row.",
)
@click.option(
    "--shards",
    default="1/1",
    metavar="I/M",
    show_default=True,
    help="Only every M-th shard, from the I-th on: for M jobs of a scheduler.",
)
@click.option("--plan", is_flag=True, help="Say what it would take, and write nothing.")
@click.option(
    "--out",
    metavar="INDEX",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder of the index; made if it does not exist.",
)
@verb
def build(
    task: str | None, train: str | None, hf: Path | None, data: Path | None, column: str,
    length: int, device: str, method: str, bytes_per_example: int, bits: int, shards: str,
    plan: bool, out: Path | None,
) -> Answer:  # fmt: skip
    """Make the rows of every training example.

    The examples are those that the model was trained on: the method is fitted to them. What it
    would take is said first, from a few of them. If interrupted, the same command resumes. Under
    torchrun all processes share the work, and the files are the same.

    \b
    Examples:
        upweight index build --hf model --data train.jsonl --plan
        upweight index build --hf model --data train.jsonl --out index
        upweight index build project.py:task --train project.py:train --bytes 2048 --out index
    """
    if (task is None) == (hf is None):
        raise click.UsageError("name a FILE.py:TASK of yours, or --hf FOLDER with --data FILE")
    if (hf is None) != (data is None):
        raise click.UsageError("--hf and --data go together; beside a FILE.py it is --train")
    if hf is not None and train is not None:
        raise click.UsageError("--train names an object of a FILE.py; with --hf it is --data FILE")
    if out is None and not plan:
        raise click.UsageError("--out INDEX names the folder; --plan writes nothing")
    with contextlib.ExitStack() as stack:
        if hf is not None:
            model = model_of_folder(hf, column, length, device)
            name = str(data)
            examples, named = model.examples(name), ""
        else:
            assert task is not None
            project = stack.enter_context(opened())
            found, colon, _ = task.rpartition(":")
            named = task if colon else project.reference(task, NAMES["task"])
            name = train or project.reference(found if colon else task, NAMES["train"])
            own, examples = with_training_data(project, named, name)
            model = model_of_task(own, column, length, project)
        how = method_of(method, model.project)
        begun = out is not None and any(out.glob("*.safetensors"))
        expected = None
        if plan or not (begun or launched_as()[0]):
            expected = index_forecast(model.task, examples, how, bytes_per_example, bits)
        if plan:
            assert expected is not None
            return Answer(told(expected, method), asdict(expected))
        assert out is not None
        if expected is not None:
            say(told(expected, method))
        make_folder(out)
        made = _built(
            out, IndexRecord(
                repr(how) if model.project is None else method, bytes_per_example, bits,
                (source_of(name, out, len(examples)),), named,
                "" if hf is None else relative_to(hf, out), column, length, library_versions(),
            ), how, model, examples, shards,
        )  # fmt: skip
        naming = _naming(hf, task)
        texts = "--text TEXT" if model.tokenizer else "--queries FILE.py:NAME"
        finished = (out / FINISHED).exists()
        lines = [
            f"{out}: {len(examples)} rows of {made.bytes_per_example} bytes",
            f"  next: upweight index verify {shlex.quote(str(out))} {naming}",
            f"        upweight index top {shlex.quote(str(out))} {naming} {texts}",
        ]
        if model.tokenizer:
            lines.append(f"        upweight view {shlex.quote(str(out))} {naming}")
        if not finished:
            lines = [
                f"{out}: the rows of --shards {shards}; those of other shards are missing",
                "  next: the same command with each other --shards; without it, it makes what is "
                "missing",
            ]
        facts = {"index": str(out), "rows": len(examples), "numbers": made.numbers,
                 "finished": finished,
                 "bytes_per_example": made.bytes_per_example, "seconds": dict(made.seconds),
                 "expected": None if expected is None else asdict(expected)}  # fmt: skip
        return Answer("\n".join(lines), facts)


@index.command()
@click.argument("folder", metavar="INDEX", type=click.Path(exists=True, path_type=Path))
@click.argument("more", metavar="FILE")
@model_options
@verb
def extend(folder: Path, more: str, **named: Any) -> Answer:
    """Append the rows of further examples, at the cost of these.

    FILE has a JSON object or text a line, as the data of `build`; or is FILE.py:NAME of a project.
    If interrupted, the same command resumes.

    \b
    Examples:
        upweight index extend index more.jsonl --hf model
        upweight index extend index project.py:more --project project.py
    """
    with (
        _asked("extend", folder, named, [more]) as found,
        continued_by(_typed("extend", folder, named, [more])),
    ):
        data, made, record = found.model.examples(more), found.index, found.record
        source, before = source_of(more, folder, len(data)), sum(map(len, found.data))
        # An object is read by its name whenever the index is opened: one name, the same examples.
        known = [each.sha256 or each.name for each in record.sources]
        if not len(data):
            raise DataError(
                "An index is extended with at least one example.",
                f"{more}, which holds none.",
                "a filter that left nothing, or another file.",
                "nothing is left to do; name what holds the new examples.",
            )
        if (source.sha256 or source.name) in known:
            raise SpecError(
                "An index is extended with examples that it does not have.",
                f"{more}, whose rows it has.",
                "the same command twice, or the file that it was built on.",
                "nothing is left to do; name a file, or an object of another name, with the new "
                "examples only.",
            )
        if len(made) == before + len(data):  # all that is left to do is to say so
            made.require_examples(data, before)
        else:
            made.extend(data, source=source.name)
        replace(record, sources=(*record.sources, source)).write(folder)
        after = len(made)
    text = f"{folder}: {after - before} rows appended, {after} in all"
    return Answer(text, {"index": str(folder), "appended": after - before, "rows": after})


@index.command()
@click.argument("folder", metavar="INDEX", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="What the model said; several are asked one by one.",
)
@click.option(
    "--queries",
    metavar="FILE",
    help="A file with a JSON object or text a line; or FILE.py:NAME of a project.",
)
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--raises", is_flag=True, help="Those that raise the loss in place of lower it.")
@click.option("--rows-only", is_flag=True, help="Products of rows alone: quicker, and approximate.")
@model_options
@verb
def top(
    folder: Path, texts: tuple[str, ...], queries: str | None, k: int, raises: bool,
    rows_only: bool, **named: Any,
) -> Answer:  # fmt: skip
    """Print the training examples behind a text: those that lower its loss most.

    S is the derivative of the text's loss with respect to the weight of a training example: S < 0
    made the text more likely. The scores are those of the method, from gradients; the rows only
    propose candidates.

    \b
    Examples:
        upweight index top index --hf model --text "The capital of France is Paris." -k 20
        upweight index top index --hf model --queries said.jsonl --json
    """
    words = _asking(texts, queries)
    if not words:
        raise click.UsageError(ONE_KIND)
    with _asked("top", folder, named, words) as found:
        asked = _queries(found, texts, queries)
        best = found.index.top(asked, k, rerank=not rows_only)
        side = "raises" if raises else "lowers"
        parts, facts = [], []
        for q in range(len(asked)):
            about = text_of(asked, q, found.model.tokenizer) or f"query {q}"
            both = {
                "raises": _ranked(found, best.raises[q], best.raises_by[q]),
                "lowers": _ranked(found, best.lowers[q], best.lowers_by[q]),
            }
            facts.append({"query": about, **both})
            rows: list[tuple[Any, ...]] = [("rank", "score", "id", "text")]
            for each in both[side]:
                shown = one_line(each["text"]) or each["source"]
                rows.append((each["rank"], f"{each['score']:+.3g}", each["id"], shown))
            title = "raise the loss of" if raises else "lower the loss of"
            parts.append(f"Examples that {title} “{one_line(about)}” most:\n{table(rows)}")
    notes = "\n".join(f"  note: {note}" for note in best.provenance.notes)
    told = {"index": str(folder), "queries": facts, "notes": list(best.provenance.notes)}
    return Answer("\n\n".join([*parts, notes]), told)


@index.command()
@click.argument("folder", metavar="INDEX", type=click.Path(exists=True, path_type=Path))
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="A query like those to come.")
@click.option("--queries", metavar="FILE", help="As for `top`.")
@click.option(
    "--examples",
    type=click.IntRange(1),
    default=COMPARED,
    show_default=True,
    help="How many are scored from their gradients.",
)
@model_options
@verb
def verify(
    folder: Path, texts: tuple[str, ...], queries: str | None, examples: int, **named: Any
) -> Answer:
    """Measure how well the rows agree with the method's own scores, and how fast they are read.

    What is found is kept in the index, and said with its answers. Without --text or --queries some
    of its own examples are asked about, which are not among those that are compared.

    \b
    Examples:
        upweight index verify index --hf model --queries said.jsonl
    """
    words = [*_asking(texts, queries), "--examples", str(examples)]
    with _asked("verify", folder, named, words) as found:
        n, made = len(found.index), found.index
        compared: int | list[int] = examples
        if texts or queries is not None:
            asked = _queries(found, texts, queries)
        else:
            asked, compared = _own_queries(found, examples)
            say(f"note: no queries are given; asked about {len(asked)} of its own examples")
        agreed = made.verify(asked, compared)
        seconds = made.scan_seconds()
    width = made.bytes_per_example
    spearman, pearson = (
        f"none: {UNCORRELATED}" if r is None else f"{r:.3f}"
        for r in (agreed.spearman, agreed.pearson)
    )
    rows = [
        ("Spearman", spearman),
        ("Pearson", pearson),
        ("slope", f"{agreed.slope:.3f}"),
        (f"recall@{agreed.k}", f"{agreed.recall:.2f}"),
        ("bytes", f"{width} a row, {size(n * width)} for {n} rows"),
        ("scan", f"{n / seconds:,.0f} rows/s, {size(n * width / seconds)}/s".replace(",", " ")),
    ]
    title = (f"{folder}: products of rows against scores of {agreed.queries} queries and "
             f"{agreed.examples} examples")  # fmt: skip
    facts = {"index": str(folder), **asdict(agreed), "bytes_per_example": width,
             "rows": n, "rows_per_second": n / seconds}  # fmt: skip
    return Answer(f"{title}\n{table(rows)}", facts)


def told(expected: IndexForecast, method: str) -> str:
    """What an index would take, stage by stage."""
    n, seconds = expected.n, expected.seconds
    stages = [(name, f"about {duration(each)}") for name, each in seconds.items()]
    rows = [
        ("rows", f"{n} × {expected.bytes_per_example} bytes = {size(expected.rows_bytes)}, "
                 f"{expected.numbers} numbers each"),
        ("beside them", f"factors and bases, about {size(expected.factors_bytes)}"),
        *stages,
        ("together", f"about {duration(sum(seconds.values()))}"),
    ]  # fmt: skip
    return f"index of {method}, timed on {expected.timed} examples\n{table(rows)}"


def one_line(text: str) -> str:
    """A text cut to a line."""
    whole = " ".join(text.split())
    return whole if len(whole) <= LINE else f"{whole[: LINE - 1]}…"


def _built(
    out: Path, record: IndexRecord, method: Method, model: Model, examples: Data, shards: str
) -> Index:
    typed = "the same `upweight index build …`"
    with continued_by(typed), launched() as ranks:
        if ranks.size > 1:
            make_folder(out / FACTORS)
            together = Resources(folder=out / FACTORS, group=ranks.group)
            method.fit(model.task, examples, resources=together)
            ranks.require_same([len(examples)], "the number of examples")
        fitted = fitted_in(out, method, model, examples)  # by ranks: from what they have kept
        made = Index.build(
            fitted, examples, out, record.bytes_per_example, bits=record.bits,
            source=record.sources[0].name, shards=shards,
        )  # fmt: skip
        if ranks.rank == 0:
            record.write(out)
    return made


def _ranked(found: OpenedIndex, ids: Tensor, values: Tensor) -> list[dict[str, Any]]:
    """Each with where it comes from and its text."""
    ranked = []
    for rank, (i, score) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), 1):
        source, text = found.example(i)
        ranked.append({"rank": rank, "id": i, "score": score, "source": source, "text": text})
    return ranked


def _asking(texts: Sequence[str], queries: str | None) -> list[str]:
    """The options that say what is asked about, as they were typed."""
    if texts and queries is not None:
        raise click.UsageError(ONE_KIND)
    told = [part for each in texts for part in ("--text", each)]
    return told if queries is None else ["--queries", queries]


def _queries(found: OpenedIndex, texts: Sequence[str], queries: str | None) -> Data:
    model = found.model
    if queries is not None and is_object(queries):
        return model.task.queries(model.examples(queries))
    return model.queries(list(texts) if queries is None else Path(queries))


def _own_queries(found: OpenedIndex, examples: int) -> tuple[Data, list[int]]:
    """Some of the index's first examples, evenly spaced, and others to compare with."""
    data, n = found.data[0], len(found.index)
    count = min(OWN_QUERIES, max(1, len(data) // 2))
    asked = [(2 * j + 1) * len(data) // (2 * count) for j in range(count)]
    others = [i for i in range(n) if i not in set(asked)] or [0]
    return data.subset(asked), [others[k] for k in spaced(len(others), examples)]


@contextlib.contextmanager
def _asked(
    name: str, folder: Path, named: dict[str, Any], words: Sequence[str]
) -> Iterator[OpenedIndex]:
    require_one_process(f"index {name}")
    typed = _typed(name, folder, {**named, "hf": None, "projects": ()}, words)
    with opened_index(
        folder, named["projects"], named["hf"], named["given"], named["device"], typed
    ) as found:
        yield found


def _typed(name: str, folder: Path, named: dict[str, Any], words: Sequence[str]) -> str:
    """What was typed, for messages."""
    hf = ["--hf", str(named["hf"])] if named["hf"] else []
    projects = [part for each in named["projects"] for part in ("--project", each)]
    data = [part for each in named["given"] for part in ("--data", str(each))]
    return shlex.join(["upweight", "index", name, str(folder), *words, *hf, *projects, *data])


def _naming(hf: Path | None, task: str | None) -> str:
    """How the model of an index is named again."""
    if hf is not None:
        return f"--hf {shlex.quote(str(hf))}"
    source, colon, name = (task or "").rpartition(":")
    return f"--project {shlex.quote(source if colon else name)}"
