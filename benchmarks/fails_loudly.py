"""What does the library say to bad inputs and broken numerics? A table; nothing may pass silently.

    python benchmarks/fails_loudly.py

Each case is a mistake that a user makes. It must end in an error of upweight's own with its four
parts (required, given, usual cause, way out), or in a warning that is also kept in the provenance.
The process exits with 1 if any case passes silently. The same cases are a test.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import upweight as uw
from upweight.errors import UpweightError
from upweight.task.data import as_data

CASES: dict[str, Callable[[], Any]] = {}
PARTS = ("Given: ", "Usual cause: ", "Way out: ")


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a mistake under the name of its function."""
    CASES[function.__name__.replace("_", " ")] = function
    return function


@dataclass(frozen=True)
class Outcome:
    """How one case ended: "error", "warning" or "silent", and what was said."""

    verdict: str
    said: str


def outcome(function: Callable[[], Any]) -> Outcome:
    """Run one case. An error that is not ours counts as silent: it explains nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = function()
        except UpweightError as error:
            whole = all(part in str(error) for part in PARTS)
            return Outcome("error" if whole else "silent", f"{type(error).__name__}: {error}")
        except Exception as error:
            return Outcome("silent", f"not ours: {type(error).__name__}: {error}")
    kept = isinstance(result, uw.Scores) and bool(result.provenance.notes)
    if caught and kept:
        return Outcome("warning", "; ".join(str(w.message) for w in caught))
    return Outcome("silent", "no error")


# -- a small honest problem to make mistakes with --------------------------------------------------


def rows(n: int = 24, d: int = 3) -> tuple[Tensor, Tensor]:
    """Deterministic inputs and labels of two classes."""
    X = torch.sin(torch.arange(n * d, dtype=torch.float64)).reshape(n, d)
    return X, (X.sum(dim=1) > 0).long()


def linear(d: int = 3, c: int = 2) -> nn.Module:
    """A small linear classifier, trained: nothing but the mistake may be warned of."""
    X, y = rows(d=d)
    task = uw.Task(nn.Linear(d, c).double(), uw.CrossEntropy(), uw.L2(0.1))
    data = as_data((X, y.clamp(max=c - 1)))
    return task.moved_to(uw.Newton().prepare(task, data).center).model.eval()


def attribute(
    model: nn.Module | None = None,
    train: Any = None,
    queries: Any = None,
    *,
    loss: Any = None,
    params: Any = "*",
    method: uw.Influence | None = None,
    measure: Any = None,
    penalty: Any = None,
) -> uw.Scores:
    """The whole path, with one thing wrong."""
    penalty = uw.L2(0.1) if penalty is None else penalty
    task = uw.Task(model or linear(), loss or uw.CrossEntropy(), penalty, params)
    fitted = (method or uw.Influence()).fit(task, rows() if train is None else train)
    return fitted.attribute(rows(4) if queries is None else queries, measure or uw.Loss())


def deep(*tail: nn.Module) -> nn.Module:
    """A small network whose Hessian is indefinite."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *tail, nn.Linear(4, 2)).double().eval()


# -- data ------------------------------------------------------------------------------------------


@case
def NaN_in_training_inputs() -> Any:
    X, y = rows()
    X[5, 1] = torch.nan
    return attribute(train=(X, y))


@case
def infinity_in_a_query() -> Any:
    X, y = rows(4)
    X[2, 0] = torch.inf
    return attribute(queries=(X, y))


@case
def zero_training_examples() -> Any:
    X, y = rows()
    return attribute(train=(X[:0], y[:0]))


@case
def zero_queries() -> Any:
    X, y = rows()
    return attribute(queries=(X[:0], y[:0]))


@case
def one_training_example_without_penalty() -> Any:
    X, y = rows(1)
    return attribute(train=(X, y), penalty=uw.NoPenalty())


@case
def arrays_of_different_lengths() -> Any:
    X, y = rows()
    return attribute(train=(X, y[:-1]))


@case
def inputs_of_the_wrong_width() -> Any:
    X, y = rows(d=4)
    return attribute(train=(X, y))


@case
def float64_inputs_for_a_float32_model() -> Any:
    X, y = rows()
    return attribute(linear().float(), train=(X.numpy(), y.numpy()))


@case
def integer_inputs() -> Any:
    X, y = rows()
    return attribute(train=((X * 255).to(torch.uint8), y))


@case
def text_labels() -> Any:
    X, y = rows()
    return attribute(train=(X.numpy(), np.array(["cat", "dog"])[y.numpy()]))


@case
def labels_out_of_range() -> Any:
    X, y = rows()
    return attribute(train=(X, y + 1))


@case
def labels_as_a_column() -> Any:
    X, y = rows()
    return attribute(train=(X, y[:, None]))


@case
def regression_targets_that_would_broadcast() -> Any:
    X, y = rows()
    return attribute(linear(c=1), train=(X, y.double()), loss=uw.SquaredError())


@case
def signs_for_a_probability_loss() -> Any:
    X, y = rows()
    targets = (2.0 * y - 1)[:, None]
    return attribute(linear(c=1), train=(X, targets), loss=uw.Bernoulli())


@case
def inputs_without_targets() -> Any:
    return attribute(train=rows()[0])


@case
def a_shuffled_loader() -> Any:
    return attribute(train=DataLoader(TensorDataset(*rows()), batch_size=5, shuffle=True))


@case
def a_loader_that_visits_a_subset() -> Any:
    sampler = SubsetRandomSampler(range(10))
    return attribute(train=DataLoader(TensorDataset(*rows()), batch_size=5, sampler=sampler))


@case
def a_stream_without_an_index() -> Any:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(TensorDataset(*rows()))

    return attribute(train=Stream())


@case
def a_dict_without_targets() -> Any:
    return attribute(train={"input": rows()[0]})


# -- model and loss --------------------------------------------------------------------------------


@case
def dropout_in_training_mode() -> Any:
    return attribute(deep(nn.Dropout(0.5)).train(), method=uw.Influence(uw.GGN()))


@case
def batchnorm_in_training_mode() -> Any:
    return attribute(deep(nn.BatchNorm1d(4).double()).train(), method=uw.Influence(uw.GGN()))


@case
def functional_dropout() -> Any:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.linear(x))

    return attribute(Noisy().eval())


@case
def batch_statistics_in_forward() -> Any:
    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x - x.mean(dim=0))

    return attribute(Centered().eval())


@case
def a_loss_reduced_to_a_scalar() -> Any:
    return attribute(loss=nn.CrossEntropyLoss())


@case
def a_measure_reduced_to_a_scalar() -> Any:
    return attribute(measure=lambda outputs, targets: outputs.mean())


@case
def a_measure_with_one_value_for_all_queries() -> Any:
    return attribute(measure=lambda outputs, targets: outputs[:1, 0].mean(dim=0, keepdim=True))


@case
def a_measure_without_a_derivative() -> Any:
    return attribute(measure=lambda outputs, targets: (outputs.argmax(dim=1) == targets).double())


@case
def training_that_went_on_after_fit() -> Any:
    model = linear()
    fitted = uw.Influence().fit(uw.Task(model, uw.CrossEntropy(), uw.L2(0.1)), rows())
    with torch.no_grad():
        model.weight.mul_(1.01)  # type: ignore[union-attr,operator]
    return fitted.attribute(rows(4))


@case
def a_loss_that_is_NaN() -> Any:
    return attribute(
        loss=lambda f, y: (f.gather(1, y[:, None])[:, 0] - 5.0).log(),
        method=uw.Influence(uw.GGN()),
    )


@case
def NaN_parameters() -> Any:
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = torch.nan  # type: ignore[union-attr,index,operator]
    return attribute(model)


@case
def a_step_that_cuts_the_gradient() -> Any:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).detach()

    return attribute(Cut().eval())


@case
def a_step_whose_derivative_is_zero() -> Any:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).round()

    return attribute(Rounded().eval())


@case
def a_parameter_that_forward_does_not_use() -> Any:
    model = linear()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    return attribute(model)


@case
def parameters_that_are_all_frozen() -> Any:
    return attribute(linear().requires_grad_(False))


@case
def a_pattern_that_matches_no_parameter() -> Any:
    return attribute(params="head.*")


@case
def a_model_in_half_precision() -> Any:
    X, y = rows()
    return attribute(linear().half(), train=(X.half(), y), queries=(X[:4].half(), y[:4]))


@case
def a_model_that_returns_a_tuple() -> Any:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    return attribute(Two().eval())


# -- numerics --------------------------------------------------------------------------------------


@case
def an_indefinite_Hessian_under_Cholesky() -> Any:
    method = uw.Influence(uw.Hessian(), uw.Cholesky())
    return attribute(deep(), method=method, penalty=uw.L2(1e-3))


@case
def a_singular_Hessian() -> Any:
    method = uw.Influence(uw.Hessian(), uw.Cholesky())
    return attribute(method=method, penalty=uw.NoPenalty())


@case
def CG_that_cannot_converge() -> Any:
    return attribute(method=uw.Influence(uw.Hessian(), uw.CG(rtol=1e-14, max_steps=2)))


@case
def CG_on_an_indefinite_Hessian() -> Any:
    method = uw.Influence(uw.Hessian(), uw.CG())
    return attribute(deep(), method=method, penalty=uw.NoPenalty())


@case
def a_hinge_without_temperature() -> Any:
    return uw.SmoothHinge(temperature=0.0)


@case
def negative_damping() -> Any:
    return attribute(method=uw.Influence(damping=-0.1))


@case
def a_removed_example_that_alone_fixes_a_parameter() -> Any:
    X = torch.eye(3, dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double().eval()
    with torch.no_grad():
        model.weight.copy_(y.T)
    task = uw.Task(model, uw.SquaredError())
    return uw.Influence().fit(task, (X, y + 0.5)).removal((X, y + 0.5))


# -- asking the wrong thing ------------------------------------------------------------------------


@case
def a_query_that_was_not_scored() -> Any:
    return attribute().top(3, query=9)


@case
def dropping_an_example_twice() -> Any:
    return attribute().predict(drop=[1, 1])


@case
def dropping_an_example_that_does_not_exist() -> Any:
    return attribute().predict(drop=[24])


@case
def an_example_index_out_of_range() -> Any:
    task = uw.Task(linear(), uw.CrossEntropy(), uw.L2(0.1))
    return uw.Influence().fit(task, rows()).parameter_influence(24)


@case
def the_input_gradient_of_token_ids() -> Any:
    model = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 2)).double().eval()
    tokens, y = torch.arange(24).reshape(12, 2) % 5, torch.arange(12) % 2
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.1), params="1.*")
    return uw.Influence().fit(task, (tokens, y)).input_influence(0, (tokens[:2], y[:2]))


@case
def an_unsupported_estimator() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    from upweight.adapters import sklearn as sk

    X, y = (part.numpy() for part in rows())
    return sk.task(RandomForestClassifier(n_estimators=2, random_state=0).fit(X, y), X, y)


@case
def an_estimator_that_was_not_fitted() -> Any:
    from sklearn.linear_model import LogisticRegression

    from upweight.adapters import sklearn as sk

    X, y = (part.numpy() for part in rows())
    return sk.task(LogisticRegression(), X, y)


@case
def an_estimator_far_from_its_minimum() -> Any:
    from sklearn.linear_model import LogisticRegression

    from upweight.adapters import sklearn as sk

    X, y = (part.numpy() for part in rows())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = LogisticRegression(max_iter=1, C=100.0).fit(X, y)
    return sk.task(estimator, X, y)


# -- changes after fit, assumptions and removals ---------------------------------------------------


def changed(change: Callable[[nn.Sequential, Tensor, Tensor], object]) -> Any:
    """Fit, change something, ask."""
    X, y = rows()
    body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LeakyReLU()).double()
    model = nn.Sequential(*body.requires_grad_(False), linear()).eval()
    method = uw.Influence(uw.EKFAC(), damping=0.1)
    fitted = method.fit(uw.Task(model, uw.CrossEntropy(), uw.L2(0.1)), (X, y))
    change(model, X, y)
    return fitted.attribute(rows(4))


@case
def batch_statistics_moved_after_fit() -> Any:
    return changed(lambda model, X, y: model[1].running_mean.add_(1.0))


@case
def a_frozen_layer_changed_after_fit() -> Any:
    return changed(lambda model, X, y: model[0].weight.data.mul_(3))


@case
def an_activation_changed_after_fit() -> Any:
    return changed(lambda model, X, y: setattr(model[2], "negative_slope", 0.2))


@case
def inputs_changed_in_place_after_fit() -> Any:
    return changed(lambda model, X, y: X.mul_(3))


@case
def a_label_changed_in_place_after_fit() -> Any:
    return changed(lambda model, X, y: y[:1].sub_(1).abs_())


@case
def a_penalty_other_than_trained_with() -> Any:
    return attribute(penalty=uw.L2(0.001))


@case
def an_untrained_model() -> Any:
    torch.manual_seed(0)
    return attribute(nn.Linear(3, 2).double())


@case
def training_labels_that_are_all_ignored() -> Any:
    X, y = rows()
    return attribute(train=(X, torch.full_like(y, -100)))


@case
def a_query_whose_label_is_ignored() -> Any:
    X, y = rows(4)
    return attribute(queries=(X, y.index_fill(0, torch.tensor(2), -100)))


@case
def removals_from_separable_classes_without_much_penalty() -> Any:
    X, y = rows()
    task = uw.Task(nn.Linear(3, 2).double(), uw.CrossEntropy(), uw.L2(1e-5))
    task = task.moved_to(uw.Newton().prepare(task, as_data((X, y))).center)
    return uw.Influence().fit(task, (X, y)).removal(rows(4))


@case
def a_removal_asked_of_a_curvature_by_layers() -> Any:
    method = uw.Influence(uw.EKFAC(), damping=0.1)
    return method.fit(uw.Task(linear(), uw.CrossEntropy(), uw.L2(0.1)), rows()).removal(rows(4))


def main() -> int:
    """Print the table; 1 if any case passed silently."""
    silent = 0
    for name, function in CASES.items():
        result = outcome(function)
        silent += result.verdict == "silent"
        print(f"\n{result.verdict.upper():8} {name}")
        print("    " + result.said.replace("\n", "\n    "))
    print(f"\n{len(CASES)} cases, {silent} passed silently")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
