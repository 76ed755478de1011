"""Queries are looked at by the pass that takes their gradients, and no less closely."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upweight as uw
from upweight.errors import NonDeterministic, NonFinite, ShapeError, UpweightError
from upweight.scoring import stream
from upweight.task.check import checked_losses

N, Q, BAD = 50, 40, 17
"""Query 17 is none of the 16 that are asked first."""

pytestmark = pytest.mark.filterwarnings("ignore")
EKFAC = uw.Influence(uw.EKFAC(), damping=0.01, tolerance=0.02)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def data(n: int) -> tuple[Tensor, Tensor]:
    X = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    return X, torch.arange(n) % 2


def fit(method: Any, **resources: Any) -> Any:
    task = uw.Task(network(), uw.CrossEntropy())
    return method.fit(task, data(N), resources=uw.Resources(**resources))


def bad() -> tuple[Tensor, Tensor]:
    X, y = data(Q)
    X[BAD] = torch.nan
    return X, y


def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose losses a pass of its own is made for."""
    made: list[str] = []

    def counted(task: Any, data: Any, role: str, *rest: Any) -> Any:
        made.append(role)
        return checked_losses(task, data, role, *rest)

    monkeypatch.setattr("upweight.methods.fitting.checked_losses", counted)
    return made


@pytest.mark.parametrize("method", [EKFAC, uw.GradientDot(), uw.GradientCosine()], ids=repr)
def test_the_model_is_not_run_on_queries_before_their_gradients(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit(method)
    made = passes(monkeypatch)
    fitted.attribute(data(Q))
    assert made == []
    fitted.attribute(data(Q), uw.Margin())  # whose gradient has no use for the loss
    assert made == ["queries"]


@pytest.mark.parametrize("method", [uw.Influence(uw.GGN(), damping=0.1), uw.TRAK(dim=4)], ids=repr)
def test_other_methods_make_a_pass_of_their_own(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit(method)
    made = passes(monkeypatch)
    fitted.attribute(data(Q))
    assert made == ["queries"]


def test_gradients_at_another_point_say_nothing_of_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = uw.Training(network, uw.SGD(0.1), epochs=2, batch=10)
    task = uw.Task(network(), uw.CrossEntropy())
    path = recipe.trajectory(task, data(N))
    fitted = uw.TracIn().fit(task.moved_to(path.theta), data(N), history=recipe)
    made = passes(monkeypatch)
    fitted.attribute(data(Q))
    assert made == ["queries"]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Training examples whose gradients are taken to choose products."""
    sizes, taken = [], stream._sample

    def counted(curvature: Any, train: Any, losses: Any, size: int, *rest: Any) -> Any:
        sizes.append(size)
        return taken(curvature, train, losses, size, *rest)

    monkeypatch.setattr(stream, "_sample", counted)
    return sizes


@pytest.mark.parametrize("many", [False, True], ids=["one group", "several groups"])
def test_a_bad_query_is_named_before_anything_of_the_training_data(
    many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit(EKFAC, **({"memory_bytes": 20_000} if many else {}))
    sizes = drawn(monkeypatch)
    notes = fitted.attribute(data(Q)).provenance.notes
    assert sizes and any("passes over the training data" in note for note in notes) == many
    sizes.clear()
    with pytest.raises(NonFinite, match=r"over the queries(.|\n)*example 17, loss nan") as caught:
        fitted.attribute(bad())
    assert sizes == []
    with pytest.raises(NonFinite) as before:
        checked_losses(fitted.task, uw.as_data(bad()), "queries")
    assert str(caught.value) == str(before.value)
    with pytest.raises(NonFinite, match="over the queries"):
        fitted.attribute(bad(), uw.Margin())


def test_a_query_that_the_model_does_not_take_is_explained_as_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    ids = torch.randint(0, 5, (N + Q, 2))
    fitted = EKFAC.fit(uw.Task(model, uw.CrossEntropy()), (ids[:N], torch.arange(N) % 2))
    queries = ids[N:].clone(), torch.arange(Q) % 2
    queries[0][BAD] = 5
    with pytest.raises(UpweightError) as before:
        checked_losses(fitted.task, uw.as_data(queries), "queries")
    with pytest.raises(type(before.value)) as caught:
        fitted.attribute(queries)
    assert str(caught.value) == str(before.value)


def test_a_label_out_of_range_is_named() -> None:
    X, y = data(Q)
    y = y.clone()
    y[BAD] = 2
    fitted = fit(EKFAC)
    with pytest.raises(UpweightError) as before:
        checked_losses(fitted.task, uw.as_data((X, y)), "queries")
    with pytest.raises(type(before.value)) as caught:
        fitted.attribute((X, y))
    assert str(caught.value) == str(before.value)


class OfMany(nn.Linear):
    """Which answers otherwise in a batch of more than 20 examples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if len(x) > 20 else 1)


def test_a_query_has_its_own_loss_in_the_pass_of_gradients_too() -> None:
    X, y = data(20)
    fitted = EKFAC.fit(uw.Task(OfMany(4, 2), uw.CrossEntropy()), (X, y))
    fitted.attribute((X, y))
    with pytest.raises(NonDeterministic, match="example 0 of the queries"):
        fitted.attribute(data(Q))


def test_queries_without_one_output_each_are_refused() -> None:
    class Halves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[: len(x) // 2] if len(x) > 20 else x)

    X, y = data(20)
    fitted = EKFAC.fit(uw.Task(Halves(4, 2), uw.CrossEntropy()), (X, y))
    with pytest.raises(ShapeError):
        fitted.attribute(data(Q))
