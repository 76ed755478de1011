"""`upweight`: parse, run a verb, turn our errors into one screen of text."""

import sys
from pathlib import Path

import click

from upweight.errors import UpweightError
from upweight.scores import library_versions


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(library_versions()["upweight"], prog_name="upweight")
def cli() -> None:
    """Which training examples made the model do that, and what would change without them?"""


@cli.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("upweight-demo"),
    show_default=True,
    help="Directory for report.html, summary.json and the scores.",
)
def demo(out: Path) -> None:
    """Explain a digit classifier, and check the explanation by retraining.

    Trains softmax regression on 5 000 real digits that come with the package, finds which training
    images raised and lowered the loss on the test images it gets most wrong, then removes 60 of
    them, one at a time, and retrains to see whether the predicted change comes true.

    \b
    Example:
        upweight demo --out digits && open digits/report.html
    """
    from upweight.cli.demo import run

    run(out)


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to start over", err=True)
        sys.exit(130)
    except (UpweightError, OSError) as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
