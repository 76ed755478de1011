"""The library gives the numbers of the hundred-line example."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.testing import assert_close

import upweight as uw

PATH = Path(__file__).resolve().parents[2] / "examples" / "00_upweight_in_100_lines.py"


def test_example_and_library_agree():
    spec = importlib.util.spec_from_file_location("hundred_lines", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    Z, y, Zq, yq = example.wine()
    theta = example.train(Z, y, np.ones(len(Z)))
    model = nn.Linear(Z.shape[1], 3, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(theta).reshape(3, -1))
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(example.PENALTY))
    scores = uw.Influence().fit(task, (Z, y)).attribute((Zq, yq))
    expected = torch.tensor(example.scores(theta, Z, y, Zq, yq))
    assert_close(scores.values, expected, rtol=1e-9, atol=1e-12)
