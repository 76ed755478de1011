"""`upweight`: the table of verbs, and the entry point."""

import sys

import click

from upweight.cli.attribute import attribute, rerun
from upweight.cli.demonstration import demo
from upweight.cli.doctor import doctor
from upweight.cli.evaluate import evaluate, report
from upweight.cli.plan import plan
from upweight.cli.view import view
from upweight.runtime.versions import library_versions


class Verbs(click.Group):
    """Verbs in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(library_versions()["upweight"], prog_name="upweight")
def cli() -> None:
    """Which training examples made the model do that, and what would change without them?"""


for verb in (demo, doctor, plan, attribute, evaluate, report, view, rerun):
    cli.add_command(verb)


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
