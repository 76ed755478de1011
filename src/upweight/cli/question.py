"""What a run is asked, from options or from run.toml, as live objects.

The texts of an `Asked` become a `Posed` with its `Question`, and that becomes a `Record`. A method
or a measure is a spec, or an object of the user's.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch

from upweight.cli.named import Named
from upweight.cli.project import Project, is_maker, opened
from upweight.cli.screen import say
from upweight.cli.spec import SPECS, parse
from upweight.errors import SpecError, StaleStore, UpweightError, message
from upweight.front.attribute import Asked as Chosen
from upweight.front.attribute import at_the_end, history_of, is_unusable, of_opened, solvable
from upweight.front.opened import Opened, is_model
from upweight.front.opened import opened as task_of
from upweight.methods.method import Method
from upweight.runs.directory import Run
from upweight.runs.environment import environment
from upweight.runs.question import Question
from upweight.runs.record import Record, is_reference, relative_to
from upweight.runtime.resources import Resources
from upweight.runtime.versions import library_versions
from upweight.task.data import Data
from upweight.task.measures import as_measure
from upweight.task.sharded import require_own_weights
from upweight.task.task import Task
from upweight.training.function import as_recipe
from upweight.training.history import History

UNITS = ("", "K", "M", "G", "T")

LOSS = "Loss()"

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
        measure: A spec, or as `file.py:name`. None: `measure` in the file of the task, if there is
            one, else the loss.
        memory_bytes: What a batch may take; None: a share of what is free.
        budget: What the answer may take, where the method is chosen.
        recipe: How the model was trained, a spec or as `file.py:name`. None: `recipe` and
            `trajectory` in the file of the task, where they are there.
    """

    task: str
    train: str | None
    queries: str | None
    method: str | None
    measure: str | None
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
        if self.measure is None:
            is_there = project.defines(source, "measure")
            missing["measure"] = f"{source}:measure" if is_there else LOSS
        return replace(self, **missing)

    def posed(self, project: Project, is_shared: bool = False) -> "Posed":
        """The live objects; the method is chosen where none is given, and said.

        Where several processes share the work, of methods that look at the trained model alone:
        others are fitted by each process in full, and cannot give way to the next on the way.

        Raises:
            UpweightError: There is no such object, or it is none of its kind.
        """
        named = self.found(project)
        assert named.train is not None and named.queries is not None and named.measure is not None
        measure = spec_or_object(project, named.measure, "measure")
        if not callable(measure):
            raise SpecError(_not_a("measure", named.measure, measure, 'a function, or "Margin()"'))
        if self.measure is None and named.measure != LOSS:
            say(f"asks {named.measure}, which is there by its name; --measure names another")
        measure = as_measure(measure)
        task, train = with_training_data(project, named.task, named.train)
        require_own_weights(
            task.sharded,
            "A command",
            "call it from Python, method.fit(task, train, resources=Resources(group=…)).attribute("
            "queries, into=Shards(folder)), which Scores.load(folder) reads",
        )
        queries = task.queries(project.load(named.queries))
        if self.method is None:
            return named._chosen(project, task, train, queries, measure, is_shared)
        method = spec_or_object(project, self.method, "method")
        if not isinstance(method, Method):
            raise SpecError(_not_a("method", self.method, method, "Influence(...)"))
        how = named.known_training(project, method)
        history = None
        if how:
            recipe, trajectory = _recipe_or_trajectory(spec_or_object(project, how, "recipe"))
            history = history_of(method, recipe, trajectory)
        question = Question(task, train, queries, method, measure, history)
        return Posed(replace(named, recipe=how or None), question)

    def known_training(self, project: Project, method: Method) -> str:
        """What names the recipe, for a method that was asked for; empty: it is told nothing.

        Of a trajectory and a recipe beside the task the first is of this model's own training, and
        the second of any model's. A method that has no use for a `--recipe` refuses it.

        Raises:
            SpecError: The method needs one, and there is none.
        """
        if self.recipe is not None or not method.takes_history or method.history_is_optional:
            return self.recipe or ""
        there, source = self._beside(project), self.task.rpartition(":")[0]
        if not there:
            raise SpecError(
                "This method looks at how the model was trained.",
                f"{method!r}, no --recipe, and no `recipe` or `trajectory` in {source}.",
                "a recipe that is in another file, or is called otherwise.",
                "--recipe FILE.py:NAME, or write recipe = upweight.Training(...) beside the task, "
                "by which its model was trained; other methods look at the model alone.",
            )
        first = "trajectory" if method.takes_run else "recipe"
        return there.get(first) or next(iter(there.values()))

    def _beside(self, project: Project) -> dict[str, str]:
        """What the file of the task says of training: `recipe`, `trajectory`, as `file.py:name`."""
        source, found = self.task.rpartition(":")[0], {}
        for name in ("recipe", "trajectory"):
            if project.defines(source, name):
                value = project.named(f"{source}:{name}")
                # A list of losses may be called a trajectory too.
                is_one = isinstance(value, History) or is_maker(value)
                if is_one if name == "trajectory" else value is not None:
                    found[name] = f"{source}:{name}"
        return found

    def _chosen(
        self, project: Project, task: Task, train: Data, queries: Data, measure: Any,
        is_shared: bool,
    ) -> "Posed":  # fmt: skip
        """The method that `upweight.attribute` would choose, with what it would be fitted with."""
        if self.recipe is not None:
            value = spec_or_object(project, self.recipe, "recipe")
            names = dict.fromkeys(("recipe", "trajectory"), self.recipe)
            recipe, trajectory = _recipe_or_trajectory(value)
        else:
            names = self._beside(project)
            loaded = {name: project.load(reference) for name, reference in names.items()}
            recipe, trajectory = loaded.get("recipe"), loaded.get("trajectory")
        found = of_opened(
            Opened(task, train, None), queries, measure, recipe, trajectory, self.budget,
            resources=Resources(memory_bytes=self.memory_bytes),
        )  # fmt: skip
        chosen = solvable(at_the_end(found) if is_shared else found)
        say(chosen.line)
        return Posed.of_choice(self, chosen, names)


@dataclass(frozen=True, eq=False)
class Posed:
    """A question in live objects, with their names.

    Args:
        named: The texts, every object named; `recipe` is what the method is fitted with, if it is.
        question: The live objects.
        chosen: How the method was chosen; None where it was given.
        names: Of what is known of training, as `file.py:name` or a spec.
    """

    named: Asked
    question: Question
    chosen: Chosen | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_choice(cls, named: Asked, chosen: Chosen, names: Mapping[str, str]) -> "Posed":
        """With the method of a choice."""
        history, queries = chosen.history, chosen.queries
        assert queries is not None
        is_trajectory = history is chosen.trajectory or "recipe" not in names
        how = None if history is None else names["trajectory" if is_trajectory else "recipe"]
        question = Question(
            chosen.opened.task, chosen.opened.train, queries, chosen.choice.method, chosen.measure,
            history,
        )  # fmt: skip
        return cls(replace(named, recipe=how), question, chosen, names)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the method was chosen, and what was said and did not count."""
        return () if self.chosen is None else (str(self.chosen.choice), *self.chosen.notes)

    def otherwise(self, error: UpweightError, seconds: float) -> "Posed":
        """With the next method, where the one that was chosen failed; it is said.

        Raises:
            UpweightError: It was given, or every method failed.
        """
        if self.chosen is None or not is_unusable(self.question.method, error):
            raise error
        chosen = solvable(self.chosen.otherwise(error, seconds))
        say(chosen.line)
        return self.of_choice(self.named, chosen, self.names)

    def record(self, project: Project, run: Run) -> Record:
        """What run.toml is to say."""
        named, question = self.named, self.question
        assert named.train is not None and named.queries is not None and named.measure is not None
        return Record(
            directory=relative_to(Path.cwd(), run.path),
            task=named.task,
            train=named.train,
            queries=named.queries,
            method=_text(question.method, named.method or ""),
            measure=_text(question.measure, named.measure),
            memory_bytes=named.memory_bytes or 0,
            threads=torch.get_num_threads(),
            n=len(question.train),
            q=len(question.queries),
            p=question.task.layout.size,
            fingerprints=question.fingerprints(),
            sources=project.sources(),
            versions=library_versions(),
            environment=environment(question.task.layout.device),
            files=project.files(),
            recipe=named.recipe or "",
            notes=self.notes,
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
        question = Asked(*names, recipe=record.recipe or None).posed(project).question
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


def _recipe_or_trajectory(value: Any) -> tuple[Any, Any]:
    """What --recipe names: a recipe alone, or the steps of a run with its recipe, if it has one."""
    if isinstance(value, History):
        return getattr(value, "recipe", None), value
    return as_recipe(value), None


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
            help="How the model was trained: a spec, or a recipe or trajectory of yours. By it the "
            "method is chosen, and one that looks at training, such as SOURCE(), is fitted.  "
            "[default: recipe and trajectory in the file of the task]",
        ),
        click.option(
            "--budget", metavar="TIME",
            help="Time that the chosen method may take, roughly: '2 min'.  [default: 10 s]",
        ),
        click.option(
            "--measure", metavar="SPEC",
            help="What to ask: Loss(), Margin(), LogProb(), Logit(3), or a function of yours.  "
            "[default: measure in the file of the task, else Loss()]",
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
