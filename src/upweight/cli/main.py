"""`upweight`: the table of verbs, and the entry point.

A verb's module is imported when the verb is asked for: help and completion need no PyTorch.
"""

import importlib
import sys

import click
from click.shell_completion import CompletionItem

VERBS = {
    "demo": ("demo", "Explain a digit classifier, and check it by retraining."),
    "doctor": ("doctor", "Check this machine, and a model of yours."),
    "plan": ("plan", "Show what attribute would do, and what it would cost."),
    "attribute": ("attribute", "Score every training example for every query."),
    "evaluate": ("evaluate", "Compare the scores with retraining."),
    "report": ("evaluate", "Write the page of a run: one HTML file that opens offline."),
    "show": ("show", "Print the verdict, settings and strongest examples of a run."),
    "ask": ("ask", "Ask what scores are for, and confirm it by a refit."),
    "view": ("view", "Serve a run, or an index, to the browser of this machine, until Ctrl-C."),
    "pack": ("pack", "Put a run, its page and the files of its project into one zip file."),
    "index": ("index", "Keep a row of every example on disk, and ask for those behind a text."),
    "rerun": ("attribute", "Finish an interrupted run, or repeat a finished one."),
}
"""Verbs in the order of use: in which module each is, and the first line of its help."""


BY_RANKS = {"attribute", "index"}
"""Verbs that several processes of torchrun share; of `index` the build."""


class Verbs(click.Group):
    """The verbs of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        found = getattr(importlib.import_module(f"upweight.cli.{VERBS[cmd_name][0]}"), cmd_name)
        if cmd_name not in BY_RANKS:  # the module was loaded with the verb
            importlib.import_module("upweight.cli.screen").require_one_process(cmd_name)
        assert isinstance(found, click.Command)
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=line) for name, (_, line) in VERBS.items()]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [item for item in found if item.value.startswith(incomplete)] + options

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="upweight", prog_name="upweight")
def cli() -> None:
    """Which training examples made the model do that, and what would change without them?"""


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""
    try:
        sys.exit(cli(standalone_mode=False))  # None, or the exit code of an answer
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):  # before a verb began
        click.echo("interrupted; run the same command again", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
