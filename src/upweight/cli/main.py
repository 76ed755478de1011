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
@click.option(
    "--model",
    type=click.Choice(["softmax", "mlp", "cnn"]),
    default="softmax",
    show_default=True,
    help="What is trained: softmax regression, a perceptron, a convolutional network.",
)
def demo(out: Path, model: str) -> None:
    """Explain a digit classifier, and check the explanation by retraining.

    Trains on 5 000 real digits that come with the package, finds which training images raised and
    lowered the loss on the test images it gets most wrong, then removes some of them and retrains
    to see whether the predicted change comes true.

    Softmax regression has an exact Hessian: 60 images are removed, one at a time. The networks get
    EK-FAC: sets of 20 images are removed, from three seeds each, because another seed alone moves
    the loss more than one image does.

    \b
    Example:
        upweight demo --out digits && open digits/report.html
        upweight demo --model cnn --out digits-cnn
    """
    from upweight.cli import demo as softmax
    from upweight.cli import network_demo

    if model == "softmax":
        softmax.run(out)
    else:
        network_demo.run(out, model)


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
