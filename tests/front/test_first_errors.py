"""First guesses that are wrong: each is taken, or refused with a way out that is executed here."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from tests.front.test_attribute import QUERIES, RECIPE, TRAIN, X, Y, network, of_recipe
from upweight.applications.robustness import amip, fragile
from upweight.errors import DataError, NonFinite, NotDifferentiable, SpecError
from upweight.front.attribute import KNOWN

CE = nn.CrossEntropyLoss()


def test_arguments_of_other_names_are_refused_with_their_name_here():
    model, task = of_recipe()
    history = RECIPE.trajectory(task, TRAIN)
    with pytest.raises(SpecError, match=r"trajectory=history") as caught:
        uw.attribute(model, TRAIN, QUERIES, CE, history=history)
    way = re.search(r"(\w+)=history, of upweight\.record", str(caught.value)).group(1)
    assert uw.attribute(model, TRAIN, QUERIES, CE, **{way: history}).values.shape == (5, 40)
    given = {
        "uw": uw,
        "upweight": uw,
        "ask": lambda **k: uw.attribute(model, TRAIN, QUERIES, CE, **k),
    }
    for name in ("damping", "top", "solver"):
        with pytest.raises(SpecError, match=f"{name}=") as caught:
            uw.attribute(model, TRAIN, QUERIES, CE, **{name: 1})
        assert KNOWN[name] in str(caught.value)
        eval(f"ask({KNOWN[name]})", given)
    for call, words in (
        (
            lambda: uw.attribute(model, TRAIN, QUERIES, CE, mesure=uw.Margin()),
            r"measure=… in place",
        ),
        (
            lambda: uw.plan(model, TRAIN, QUERIES, CE, uw.L2(0.1)),
            r"penalty=.*such as|such as penalty=",
        ),
        (lambda: uw.attribute(model, TRAIN), r"missing a required argument: 'queries'"),
    ):
        with pytest.raises(SpecError, match=words) as caught:
            call()
        assert "Way out" in str(caught.value) and caught.value.__cause__ is None


def test_rows_and_labels_one_after_the_other_are_told_how_to_be_given():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, labels = X[:, :2].numpy(), (X[:, 0] > 0.2 * X[:, 1]).numpy()
    model = linear_model.LogisticRegression(tol=1e-8).fit(rows, labels)
    with pytest.raises(
        SpecError, match=r"attribute\(model, \(X, y\), \(X_test, y_test\)\)"
    ) as caught:
        uw.attribute(model, rows, labels, rows[:3])
    assert len(str(caught.value)) < 500  # not the rows themselves
    assert len(uw.attribute(model, (rows, labels), rows[:3])) == 3


def test_the_question_of_a_coefficient_may_be_given_by_its_place():
    sm = pytest.importorskip("statsmodels.api")
    results = sm.OLS(X[:, 3].numpy(), sm.add_constant(X[:, :2].numpy())).fit()
    assert str(amip(results, 1, "significance")) == str(amip(results, 1, target="significance"))
    assert str(fragile(results, 1, "sign")) == str(fragile(results, 1, targets=["sign"]))


def test_a_missing_value_is_told_by_the_id_of_its_row():
    pd = pytest.importorskip("pandas")
    linear_model = pytest.importorskip("sklearn.linear_model")
    smf = pytest.importorskip("statsmodels.formula.api")
    import upweight.adapters.sklearn as sk

    rows = [f"patient-{i}" for i in range(40)]
    frame = pd.DataFrame(X[:, :2].numpy(), columns=["age", "dose"], index=rows)
    labels = pd.Series(np.where(Y > 0, "a", "b"), index=rows)
    bad = frame.iloc[[3, 8]].copy()
    bad.iloc[1, 0] = np.nan
    name = r"'patient-8' \(place 1\)"
    model = linear_model.LogisticRegression(tol=1e-9).fit(frame, labels)
    with pytest.raises(DataError, match=name):
        uw.attribute(model, (frame, labels), bad)
    with pytest.raises(NonFinite, match=name):
        uw.attribute(model, (frame, labels), (bad, labels[bad.index]))
    assert len(uw.attribute(model, (frame, labels), bad.dropna())) == 1
    with pytest.raises(DataError, match="example 1"):
        sk.data(linear_model.LogisticRegression().fit(frame.to_numpy(), labels), bad.to_numpy())
    results = smf.ols("dose ~ age", frame).fit()
    with pytest.raises(DataError, match=name):
        uw.attribute(results, None, bad)
    dirty = torch.where(torch.arange(5)[:, None] == 2, torch.nan, QUERIES[0])
    with pytest.raises(NonFinite, match="example 2, loss nan"):
        uw.attribute(network(), TRAIN, (dirty, QUERIES[1]), CE)


def test_what_no_grad_and_inference_mode_leave_behind():
    model, task = of_recipe()
    expected = uw.attribute(model, TRAIN, QUERIES, CE).values
    with torch.no_grad():  # a notebook that was switched to it for evaluation
        assert torch.equal(uw.attribute(model, TRAIN, QUERIES, CE).values, expected)
        assert uw.plan(model, TRAIN, QUERIES, CE).seconds > 0
    with torch.inference_mode():
        train = tuple(x.clone() for x in TRAIN)
        made = network()
        made.load_state_dict(model.state_dict())
        with pytest.raises(NotDifferentiable, match="leave inference mode"):
            RECIPE.trained(task, TRAIN)
    assert torch.equal(uw.attribute(model, train, QUERIES, CE).values, expected)
    RECIPE.trained(task, train)
    with pytest.raises(NotDifferentiable, match=r"0\.weight.*inference_mode") as caught:
        uw.attribute(made, TRAIN, QUERIES, CE)
    way = re.search(r"fresh\.load_state_dict\(.*\)", str(caught.value)).group()
    fresh = network()
    eval(way, {"fresh": fresh, "model": made})
    assert torch.equal(uw.attribute(fresh.eval(), TRAIN, QUERIES, CE).values, expected)
