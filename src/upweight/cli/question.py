"""What a run is asked, from options or from run.toml, as live objects.

The texts of an `Asked` become a `Question`, and that becomes a `Record`. A method or a measure is a
spec, or an object of the user's.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from upweight.cli.named import Named
from upweight.cli.project import Project, opened
from upweight.cli.screen import say
from upweight.cli.spec import SPECS, parse
from upweight.errors import SpecError, StaleStore, message
from upweight.evaluation.check import seconds_of
from upweight.front.attribute import solvable
from upweight.front.choice import PATIENCE
from upweight.front.facts import facts_of
from upweight.front.opened import is_model
from upweight.front.opened import opened as task_of
from upweight.methods.method import Method
from upweight.runs.directory import Run
from upweight.runs.environment import environment
from upweight.runs.question import Question
from upweight.runs.record import Record, is_reference, relative_to
from upweight.runtime.versions import library_versions
from upweight.task.data import Data
from upweight.task.measures import as_measure
from upweight.task.sharded import require_own_weights
from upweight.task.task import Task
from upweight.training.training import Training

UNITS = ("", "K", "M", "G", "T")

NAMES = {
    "task": ("task", "model"),
    "train": ("train", "train_set", "training_data"),
    "queries": ("queries", "test", "test_set"),
}
"""What objects are called in a file that is named without them, the first that is there."""


@dataclass(frozen=True)
class Asked:
    """A question in texts.

    Args:
        task: As `file.py:name`, or `file.py` alone: then `task` in it, or `model`. Of a model that
            is no task, `loss` and `penalty` in the same file are its own.
        train: As `file.py:name`. None: `train` in the file of the task.
        queries: The same; None: `queries`, or `test`.
        method: A spec, or as `file.py:name`. None: chosen from what is known.
        measure: A spec, or as `file.py:name`.
        memory_bytes: What a batch may take; None: a share of what is free.
        budget: What the answer may take, where the method is chosen.
        recipe: How the model was trained, a spec or as `file.py:name`. None: `recipe` in the file
            of the task, if there is one, for a method that needs it.
    """

    task: str
    train: str | None
    queries: str | None
    method: str | None
    measure: str
    memory_bytes: int | None = None
    budget: str | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        texts = {"method": self.method, "measure": self.measure, "recipe": self.recipe}
        for kind, text in texts.items():
            if text is not None and not is_reference(text):
                parse(text, kind)  # an error in it is told before anything is loaded

    def found(self, project: Project) -> "Asked":
        """The same with every object named, as the file has them.

        Raises:
            SpecError, ProjectError: There is none of the usual names.
        """
        source, colon, _ = self.task.rpartition(":")
        names = {"train": self.train, "queries": self.queries}
        if not colon:
            source, names = self.task, {"task": None, **names}
        missing: dict[str, Any] = {
            part: project.reference(source, NAMES[part])
            for part, name in names.items()
            if name is None
        }
        return replace(self, **missing)

    def question(self, project: Project) -> Question:
        """The live objects; the method is chosen where none is given, and said."""
        named = self.found(project)
        assert named.train is not None and named.queries is not None
        measure = spec_or_object(project, self.measure, "measure")
        if not callable(measure):
            raise SpecError(_not_a("measure", self.measure, measure, "a function"))
        task, train = with_training_data(project, named.task, named.train)
        require_own_weights(
            task.sharded,
            "A command",
            "call it from Python, method.fit(task, train, resources=Resources(group=…)).attribute("
            "queries, into=Shards(folder)), which Scores.load(folder) reads",
        )
        queries = task.queries(project.load(named.queries))
        if self.method is None:
            method = self._chosen(project, named.task, task, train, queries)
        else:
            method = spec_or_object(project, self.method, "method")
        if not isinstance(method, Method):
            raise SpecError(_not_a("method", self.method or "", method, "Influence(...)"))
        how = self.known_training(project, method)
        history = spec_or_object(project, how, "recipe") if how else None
        return Question(task, train, queries, method, as_measure(measure), history)

    def known_training(self, project: Project, method: Method) -> str:
        """What names the recipe, for a method that looks at training; empty: it is told nothing.

        A method that was asked for and has no use for a `--recipe` refuses it.

        Raises:
            SpecError: The method needs one, and there is none.
        """
        if self.method is None and not method.takes_history:  # it was chosen by the recipe
            return ""
        if self.recipe is not None or not method.takes_history or method.history_is_optional:
            return self.recipe or ""
        source = self.found(project).task.rpartition(":")[0]
        if not project.defines(source, "recipe"):
            raise SpecError(
                "This method looks at how the model was trained.",
                f"{method!r}, no --recipe, and no `recipe` in {source}.",
                "a recipe that is in another file, or is called otherwise.",
                "--recipe FILE.py:NAME, or write recipe = upweight.Training(...) beside the task, "
                "by which its model was trained; other methods look at the model alone.",
            )
        return f"{source}:recipe"

    def _chosen(
        self, project: Project, reference: str, task: Task, train: Data, queries: Data
    ) -> Method:
        if self.recipe is None:
            recipe = project.beside(reference, "recipe")
        else:
            recipe = spec_or_object(project, self.recipe, "recipe")
        # Halves are not trained from here: a function, which would be timed for that, says nothing.
        recipe = recipe if isinstance(recipe, Training) else None
        budget = PATIENCE if self.budget is None else seconds_of(self.budget)
        facts = facts_of(task, train, len(queries), recipe, None, budget, self.memory_bytes)
        choice = solvable(facts, task, train)
        say(str(choice))
        return choice.method

    def record(self, project: Project, question: Question, run: Run) -> Record:
        """What run.toml is to say."""
        named = self.found(project)
        assert named.train is not None and named.queries is not None
        return Record(
            directory=relative_to(Path.cwd(), run.path),
            task=named.task,
            train=named.train,
            queries=named.queries,
            method=_text(question.method, self.method or ""),
            measure=_text(question.measure, self.measure),
            memory_bytes=self.memory_bytes or 0,
            threads=torch.get_num_threads(),
            n=len(question.train),
            q=len(question.queries),
            p=question.task.layout.size,
            fingerprints=question.fingerprints(),
            sources=project.sources(),
            versions=library_versions(),
            environment=environment(question.task.layout.device),
            files=project.files(),
            recipe=self.known_training(project, question.method),
        )


@contextlib.contextmanager
def reopened(run: Run, code: Named) -> Iterator[tuple[Project, Record, Question]]:
    """The question of a run, from the files that the user named, if its objects are the same.

    Raises:
        StaleStore: The model, data or measure changed.
    """
    record = run.record
    with contextlib.chdir(code.folder), opened(only=code.files) as project:
        names = (record.task, record.train, record.queries, record.method, record.measure)
        question = Asked(*names, recipe=record.recipe or None).question(project)
        now = {
            "n": len(question.train),
            "q": len(question.queries),
            "p": question.task.layout.size,
        }
        counted = [
            f"{name} is {count}, and run.toml says {getattr(record, name)}"
            for name, count in now.items()
            if count != getattr(record, name)
        ]
        changed = [*record.changed(question.fingerprints()), *counted]
        require_same(run, changed, record, project)
        yield project, record, question


def require_same(run: Run, differences: list[str], record: Record, project: Project) -> None:
    """Refuse two questions in one directory by a StaleStore; say where only code changed."""
    now = project.sources()
    edited = [name for name, digest in record.sources.items() if now.get(name) != digest]
    if differences:
        upgraded = [
            f"{name} is {version} and was {record.versions.get(name)}"
            for name, version in library_versions().items()
            if version != record.versions.get(name)
        ]
        changed = [*differences, *(f"{name} was edited since" for name in edited), *upgraded]
        raise StaleStore(
            "A run directory belongs to one question about one model.",
            "\n    ".join([f"{run.path}, where", *changed]),
            "the same --out for two questions; training that went on, or that starts anew "
            "without a seed whenever the file is loaded.",
            "put back what this run was asked of, or ask anew: `upweight attribute` with "
            "another --out; a file that trains should keep the weights, and load them when "
            "there are some.",
        )
    if edited:
        say(f"note: {', '.join(edited)} changed since; model, data and measure are the same")


def loaded_task(project: Project, reference: str) -> Task:
    """A task of the user's."""
    task = project.load(reference)
    if not isinstance(task, Task):
        raise SpecError(_not_a("task", reference, task, "upweight.Task(model, loss)"))
    return task


def with_training_data(project: Project, reference: str, train: str) -> tuple[Task, Data]:
    """A task of the user's and its training data; of a model, with the loss beside it.

    Raises:
        SpecError: It is neither, or the loss of a network is missing.
    """
    found = project.load(reference)
    if not is_model(found):
        task = loaded_task(project, reference)
        return task, task.training(project.load(train))
    loss, penalty = (project.beside(reference, name) for name in ("loss", "penalty"))
    made = task_of(found, project.load(train), loss, penalty)
    return made.task, made.train


def spec_or_object(project: Project, text: str, kind: str) -> Any:
    """What a text says, or the object that it names."""
    return project.load(text) if is_reference(text) else parse(text, kind)


def question_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `attribute` and `plan`."""
    options = [
        click.argument("task", metavar="FILE.py[:TASK]"),
        click.option(
            "--train", metavar="FILE.py:NAME",
            help="The training set.  [default: train in the same file]",
        ),
        click.option(
            "--queries", metavar="FILE.py:NAME",
            help="What to ask about.  [default: queries, or test, in the same file]",
        ),
        click.option(
            "--method", metavar="SPEC",
            help="How to attribute: a spec, or an object of yours.  [default: chosen for the "
            "model; the choice and its reason are printed]",
        ),
        click.option(
            "--recipe", metavar="SPEC",
            help="How the model was trained, for a method that looks at it, such as SOURCE(): a "
            "spec, or an object of yours.  [default: recipe in the file of the task]",
        ),
        click.option(
            "--budget", metavar="TIME",
            help="Time that the chosen method may take, roughly: '2 min'.  [default: 10 s]",
        ),
        click.option(
            "--measure", default="Loss()", show_default=True, metavar="SPEC",
            help="What to ask: Loss(), Margin(), LogProb(), Logit(3), or a function of yours.",
        ),
        click.option(
            "--memory", "memory_bytes", type=Bytes(), metavar="SIZE",
            help="Memory for a batch, such as 2GB.  [default: a share of what is free]",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """A size such as 500MB or 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().upper().removesuffix("B")
        base = 1024 if text.endswith("I") else 1000
        text = text.removesuffix("I")
        unit = text[-1:] if text[-1:] in UNITS else ""
        try:
            count = float(text.removesuffix(unit)) * base ** UNITS.index(unit)
        except ValueError:
            count = 0
        if count < 1:
            self.fail(f"{value!r} is no size; say 500MB, 2GB or 2GiB", param, ctx)
        return int(count)


def _text(value: Any, given: str) -> str:
    """A spec in full, seeds and defaults included; a name where it is an object of the user's."""
    return repr(value) if type(value) in SPECS.values() else given


def _not_a(kind: str, text: str, value: Any, example: str) -> str:
    return message(
        f"{text} must be a {kind}.",
        f"an object of type {type(value).__name__}.",
        "the name of another object.",
        f"name one that is, for example, {example}.",
    )
