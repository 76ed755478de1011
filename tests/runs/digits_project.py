"""A network on bundled digits: enough batches for many places to stop at. Trained in a blink."""

import torch
from torch import nn

import upweight as uw

digits = uw.data.mnist_subset()
X = torch.tensor(digits.X[::10], dtype=torch.get_default_dtype()).reshape(-1, 784) / 255
train = (X, torch.tensor(digits.y[::10]))
Xq = torch.tensor(digits.X_test[::50], dtype=torch.get_default_dtype()).reshape(-1, 784) / 255
test = (Xq, torch.tensor(digits.y_test[::50]))


def network():
    return nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


recipe = uw.Training(network, uw.SGD(lr=0.1, momentum=0.9), epochs=2, batch=50, seed=0)
untrained = uw.Task(network(), uw.CrossEntropy())
task = uw.Task(recipe.trained(untrained, train), uw.CrossEntropy(), uw.L2(1e-3))
