"""`upweight demo`."""

import json
from pathlib import Path

import click

from upweight.cli import demo as softmax
from upweight.cli import network_demo
from upweight.cli.screen import Answer, verb


@click.command()
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
@verb
def demo(out: Path, model: str) -> Answer:
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
    if model == "softmax":
        softmax.run(out)
    else:
        network_demo.run(out, model)
    return Answer("", json.loads((out / "summary.json").read_text(encoding="utf-8")))
