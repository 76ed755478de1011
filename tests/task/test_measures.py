"""What is asked of a query: one number for each, by name or by any function."""

import pytest
import torch

import upweight as uw
from tests.market import problem
from upweight.cli.spec import parse
from upweight.errors import NonFinite, ScalarLoss, SpecError, UpweightError
from upweight.task.data import as_data
from upweight.task.measures import OutputMeasure, as_measure


def asked(measure, name):
    p = problem(name)
    data = as_data(p.queries)
    batch = data.batch(0, len(data))
    return as_measure(measure)(p.task, p.task.named(p.task.theta()), batch), p.task, batch


def test_loss_is_the_tasks_own():
    found, task, batch = asked(uw.Loss(), "softmax")
    torch.testing.assert_close(found, task.losses(task.theta(), batch))


def test_log_prob_and_margin_are_the_losss():
    for name in ("softmax", "logistic", "weighted", "padded_sequences"):
        found, task, batch = asked(uw.LogProb(), name)
        f, y = task.outputs(task.theta(), batch)
        torch.testing.assert_close(found, task.loss.log_prob(f, y))
        found, task, batch = asked(uw.Margin(), name)
        torch.testing.assert_close(found, task.loss.margin(f, y))


def test_logit():
    found, task, batch = asked(uw.Logit(), "softmax")
    f, y = task.outputs(task.theta(), batch)
    torch.testing.assert_close(found, f[torch.arange(len(f)), y])
    found, _, _ = asked(uw.Logit(2), "softmax")
    torch.testing.assert_close(found, f[:, 2])
    for name in ("ridge", "logistic", "logistic_without_bias"):
        found, task, batch = asked(uw.Logit(), name)
        torch.testing.assert_close(found, task.outputs(task.theta(), batch)[0].reshape(-1))


def test_logit_of_a_weighted_target_is_its_class():
    found, task, batch = asked(uw.Logit(), "weighted")
    f, (y, _) = task.outputs(task.theta(), batch)
    torch.testing.assert_close(found, f[torch.arange(len(f)), y])


@pytest.mark.parametrize("name", ["ridge_two_outputs", "soft_targets", "padded_sequences"])
def test_logit_without_an_index_needs_one_class_per_query(name):
    with pytest.raises(UpweightError, match="index"):
        asked(uw.Logit(), name)


@pytest.mark.parametrize("index", [3, -4, 7])
def test_logit_of_an_output_that_is_not_there(index):
    with pytest.raises(UpweightError, match="3 outputs"):
        asked(uw.Logit(index), "softmax")


def test_any_function_of_outputs_and_targets():
    def entropy(outputs, targets, base=2.0):
        p = outputs.softmax(dim=1)
        return -(p * p.log()).sum(dim=1) / torch.log(torch.tensor(base))

    assert isinstance(as_measure(entropy), OutputMeasure)
    found, task, batch = asked(entropy, "softmax")
    torch.testing.assert_close(found, entropy(*task.outputs(task.theta(), batch)))


def test_a_function_of_three_is_a_measure_already():
    def penalized(task, params, batch):
        return task.losses(params, batch) + sum(p.square().sum() for p in params.values())

    assert as_measure(penalized) is penalized
    p = problem("softmax")
    fitted = uw.Influence().fit(p.task, p.train)
    scores = fitted.attribute(p.queries, penalized).values
    norm = uw.Functional(
        lambda task, params, queries, w: task.layout.flatten(params).square().sum()
    )
    expected = fitted.attribute(p.queries).values + fitted.attribute(None, norm).values
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-12)


def test_a_reduced_measure_is_refused():
    p = problem("softmax")
    fitted = uw.Influence().fit(p.task, p.train)
    with pytest.raises(ScalarLoss, match=r"shape \(5,\)"):
        fitted.attribute(p.queries, lambda f, y: f.sum())
    with pytest.raises(ScalarLoss, match=r"shape \(5, 3\)"):
        fitted.attribute(p.queries, lambda f, y: f)


def test_a_measure_that_is_not_finite_names_the_query():
    p = problem("softmax")
    fitted = uw.Influence().fit(p.task, p.train)
    with pytest.raises(NonFinite, match="query 0"):
        fitted.attribute(p.queries, lambda f, y: f.sum(dim=1) * torch.inf)


def test_specs_compare_and_print():
    assert uw.Logit(2) == uw.Logit(2) != uw.Logit(1)
    for measure in (uw.Loss(), uw.LogProb(), uw.Margin(), uw.Logit(3)):
        assert parse(repr(measure)) == measure


def test_a_function_of_the_outputs_alone_is_refused_with_the_two_it_takes():
    with pytest.raises(SpecError, match="outputs and their targets") as caught:
        as_measure(lambda outputs: outputs.sum(1))
    assert "(outputs)" in str(caught.value)
    as_measure(lambda outputs, targets, scale=2.0: scale * outputs.sum(1))
    as_measure(lambda *both: both[0].sum(1))
