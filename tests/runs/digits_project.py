"""A network on bundled digits: enough batches for many places to stop at. Trained in a blink."""

import torch
from torch import nn

import upweight as uw

digits = uw.data.mnist_subset()


def rows(images, labels, every):
    """Every eighth pixel of some images: the state that is kept on the way stays small."""
    x = torch.tensor(images[::every], dtype=torch.get_default_dtype()).reshape(-1, 784)
    return x[:, ::8] / 255, torch.tensor(labels[::every])


train = rows(digits.X, digits.y, 10)
test = rows(digits.X_test, digits.y_test, 50)


def network():
    return nn.Sequential(nn.Linear(98, 32), nn.ReLU(), nn.Linear(32, 10))


recipe = uw.Training(network, uw.SGD(lr=0.1, momentum=0.9), epochs=2, batch=50, seed=0)
untrained = uw.Task(network(), uw.CrossEntropy())
task = uw.Task(recipe.trained(untrained, train), uw.CrossEntropy(), uw.L2(1e-3))
