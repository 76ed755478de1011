"""`upweight ask`: a question of `upweight.applications`, of objects in a file of the user's.

    question = application.function(arguments)        robustness.fragile(results, 'white')
    argument = an object of the file | a spec | a number, a string, a tuple, a list, a dict of these

Read with `ast`, never evaluated: a name stands for an object of the file, or for a spec.
"""

import ast
import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isfunction
from pathlib import Path
from typing import Any

import click

from upweight import applications
from upweight._text import readable
from upweight.applications.outcome import Outcome
from upweight.cli.project import Project, opened
from upweight.cli.screen import Answer, say, verb
from upweight.cli.spec import SPECS, parse
from upweight.errors import SpecError
from upweight.report.outcomes import outcomes
from upweight.runtime.atomic import write_whole

EXAMPLE = "\"robustness.fragile(results, 'white')\""


@click.command()
@click.argument("source", metavar="PROJECT.py")
@click.argument("question")
@click.option("--page", metavar="FILE.html", help="Write the answer as a page.")
@click.option("--table", metavar="FILE.csv", help="Write its table.")
@verb
def ask(source: str, question: str, page: str | None, table: str | None) -> Answer:
    """Ask what scores are for, and confirm it by a refit.

    QUESTION is a function of upweight.applications with its arguments, in which a name stands for
    an object of PROJECT.py: results of statsmodels, a fitted estimator, data.

    \b
    Examples:
        upweight ask project.py "robustness.fragile(results, 'white')"
        upweight ask project.py "cross_validation.loo(model, (X, y))" --page loo.html
        upweight ask project.py "debugging.suspects(model, (X, y))" --table suspects.csv
    """
    with opened() as project:
        asked = Question(question, source, project)
        found = asked.answer()
        shown = found if isinstance(found, tuple | list) else [found]
        answers = [each for each in shown if isinstance(each, Outcome)]
        if page is not None or table is not None:
            _require_outcomes(answers, question)
        if page is not None:
            say(f"page: {outcomes(answers, page, readable(question))}")
        if table is not None:
            text = "".join(each.frame().to_csv(index=False) for each in answers)
            write_whole(Path(table), text.encode())
            say(f"table: {table}")
        text = "\n\n".join(map(str, shown))
        facts = [
            {
                "verdict": each.verdict,
                "is_confirmed": each.is_confirmed,
                "notes": list(each.notes),
                "table": each.frame().to_dict(orient="list"),
            }
            for each in answers
        ]
    return Answer(text, {"question": question, "answers": facts, "text": text})


@dataclass(frozen=True)
class Question:
    """A call of an application, in the user's words.

    Args:
        text: As it was typed.
        source: The file that its names are of.
        project: Which loads them.
    """

    text: str
    source: str
    project: Project

    def answer(self) -> Any:
        """Call it.

        Raises:
            SpecError: It is no call of an application, or a name in it is unknown.
            UpweightError: As the application says.
        """
        try:
            call = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise SpecError(*self._no_call(str(error))) from None
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=application), attr=name)):
                function = self._function(application, name)
            case _:
                raise SpecError(*self._no_call(type(call).__name__))
        named = {each.arg: self._value(each.value) for each in call.keywords if each.arg}
        if len(named) < len(call.keywords):
            raise SpecError(*self._no_call("**: arguments from a dict"))
        return function(*map(self._value, call.args), **named)

    def _function(self, application: str, name: str) -> Callable[..., Any]:
        if application not in applications.__all__:
            raise SpecError(*_unknown("application", application, applications.__all__))
        module = importlib.import_module(f"upweight.applications.{application}")
        functions = [each for each in module.__all__ if isfunction(getattr(module, each))]
        if name not in functions:
            raise SpecError(*_unknown(f"question of {application}", name, functions))
        return getattr(module, name)

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id=name) if self.project.defines(self.source, name):
                return self.project.load(f"{self.source}:{name}")
            case ast.Name(id=name) if name not in SPECS:
                self.project.load(f"{self.source}:{name}")  # says which names there are
            case ast.Name() | ast.Attribute() | ast.Call():
                return parse(ast.unparse(node))
            case ast.Tuple():
                return tuple(map(self._value, node.elts))
            case ast.List():
                return list(map(self._value, node.elts))
            case ast.Dict() if None not in node.keys:
                keys = [self._value(key) for key in node.keys if key is not None]
                return dict(zip(keys, map(self._value, node.values), strict=True))
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise SpecError(
                "An argument is an object of your file, a spec, or a value written out.",
                f"{ast.unparse(node)!r} in {self.text!r}.",
                "an expression: nothing is evaluated.",
                f"give it a name in {self.source}, and use the name here.",
            ) from None

    def _no_call(self, given: str) -> tuple[str, str, str, str]:
        return (
            "A question is a call of a function of upweight.applications.",
            f"{self.text!r}: {given}.",
            "a name without its arguments, or quotes that the shell removed.",
            f"put it in double quotes: {EXAMPLE}.",
        )


def _unknown(what: str, name: str, known: list[str]) -> tuple[str, str, str, str]:
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"There must be such a {what}.",
        f"{name!r}.",
        f"a misspelling of {near[0]}." if near else "another name, or one of another application.",
        f"one of {', '.join(known)}.",
    )


def _require_outcomes(found: list[Outcome], question: str) -> None:
    if not found:
        raise SpecError(
            "A page and a table are of an outcome: an answer with a verdict.",
            f"{question!r}, which returns something else.",
            "a part of an answer, or a number.",
            "leave --page and --table out; the answer is printed.",
        )
