"""Handwritten digits and a small convolutional network, by the command line alone.

    upweight doctor project.py:task --train project.py:train
    upweight plan project.py:task --train project.py:train --queries project.py:test
    upweight attribute project.py:task --train project.py:train --queries project.py:test \
        --measure "Margin()" --top 3 --out run
    upweight evaluate run --recipe project.py:recipe --lds 8
    upweight report run

The digits come with upweight (MNIST). The network is trained once, and kept in weights.safetensors.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import upweight as uw

WEIGHTS = Path(__file__).with_name("weights.safetensors")
digits = uw.data.mnist_subset()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(784, 10),
    )


def tensors(images, labels, every: int) -> tuple[Tensor, Tensor]:
    X = torch.tensor(images[::every], dtype=torch.float32)[:, None] / 255
    return X, torch.tensor(labels[::every])


train = tensors(digits.X, digits.y, every=5)
test = tensors(digits.X_test, digits.y_test, every=20)
recipe = uw.Training(network, uw.SGD(lr=0.03, momentum=0.9), epochs=10, batch=50, seed=0)


def task() -> uw.Task:
    trained = uw.Task(network(), uw.CrossEntropy(), uw.L2(1e-3))
    if not WEIGHTS.exists():
        save_file(recipe.trained(trained, train).state_dict(), WEIGHTS)
    trained.model.load_state_dict(load_file(WEIGHTS))
    return uw.Task(trained.model.eval(), trained.loss, trained.penalty)
