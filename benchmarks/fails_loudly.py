"""What does the library say to bad inputs and broken numerics? A table; nothing may pass silently.

    python benchmarks/fails_loudly.py

Each case is a mistake that a user makes. It must end in an error of upweight's own with its four
parts (required, given, usual cause, way out), in a warning that is also kept in the provenance, or
in the verdict "Do not believe these".
The process exits with 1 if any case passes silently. The same cases are a test.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

import upweight as uw
from upweight.cli.named import named
from upweight.cli.pages import alone
from upweight.cli.question import reopened
from upweight.effects import Effects
from upweight.errors import UpweightError
from upweight.evaluation import Check, check
from upweight.linalg import Dense, Tag, solve
from upweight.provenance import Provenance
from upweight.runs.directory import Run
from upweight.runs.record import Record
from upweight.scores import Scores, Unit
from upweight.task.data import as_data
from upweight.verdict import Verdict

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
    if isinstance(result, Check) and result.verdict is Verdict.DOUBT:
        return Outcome("warning", str(result))
    kept = isinstance(result, uw.Scores | Effects) and bool(result.provenance.notes)
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
    return task.moved_to(uw.training.Newton().prepare(task, data).center).model.eval()


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
    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        weight = torch.arange(1.0, outputs.shape[1] + 1, dtype=outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets, weight=weight)

    return attribute(loss=weighted)


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
    method = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())
    return attribute(deep(), method=method, penalty=uw.L2(1e-3))


@case
def a_singular_Hessian() -> Any:
    method = uw.Influence(uw.Hessian(), uw.solvers.Cholesky())
    return attribute(method=method, penalty=uw.NoPenalty())


@case
def CG_that_cannot_converge() -> Any:
    return attribute(method=uw.Influence(uw.Hessian(), uw.solvers.CG(rtol=1e-14, max_steps=2)))


@case
def CG_on_an_indefinite_Hessian() -> Any:
    method = uw.Influence(uw.Hessian(), uw.solvers.CG())
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


# -- values that are not an example's own ----------------------------------------------------------


@case
def a_loss_balanced_by_the_classes_of_its_batch() -> Any:
    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(outputs, y, reduction="none")
        return each / torch.bincount(y, minlength=2)[y]

    return attribute(loss=loss)


@case
def a_loss_divided_by_the_tokens_of_its_batch() -> Any:
    ids, model = tokens()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(outputs.mT, y, reduction="none", ignore_index=-100)
        return each.sum(dim=1) / (y != -100).sum() * len(y)

    targets = ids.masked_fill(ids == 2, -100)
    return attribute(model, (ids, targets), (ids[:4], targets[:4]), loss=loss)


@case
def a_model_that_pools_over_padding() -> Any:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mean(dim=1))

    X, y = rows(120)
    longest_first = [(X[: 30 - i], y[i]) for i in range(24)]

    def collate(items: list[Any]) -> Any:
        xs = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        return xs, torch.stack([y for _, y in items])

    loader = DataLoader(longest_first, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    return attribute(Pooled(), loader, loader)


@case
def a_data_set_that_augments_at_random() -> Any:
    X, y = rows()

    class Augmented(TensorDataset):
        def __getitem__(self, i: Any) -> Any:
            x, target = super().__getitem__(i)
            return (x.flip(0) if torch.rand(()) < 0.5 else x), target

    return attribute(train=Augmented(X, y))


@case
def a_collate_function_that_drops_examples() -> Any:
    X, y = rows()
    examples = [None if i == 7 else (X[i], y[i]) for i in range(24)]

    def collate(items: list[Any]) -> Any:
        return torch.utils.data.default_collate([item for item in items if item is not None])

    return attribute(train=DataLoader(examples, batch_size=8, collate_fn=collate))  # type: ignore[arg-type]


@case
def dropout_by_function_in_training_mode() -> Any:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.linear(x), 1e-3, training=self.training)

    return attribute(Dropping().train())


@case
def a_measure_that_ignores_its_batch() -> Any:
    return attribute(measure=lambda task, params, batch: params["weight"].reshape(-1)[:4])


@case
def a_measure_that_repeats_a_parameter() -> Any:
    def repeated(task: Any, params: Any, batch: Any) -> Tensor:
        value: Tensor = params["weight"][0, 0].expand(len(batch[0]))
        return value

    return attribute(measure=repeated)


@case
def a_functional_that_returns_a_matrix() -> Any:
    return attribute(measure=uw.Functional(lambda task, params, queries, w: params["weight"]))


@case
def a_functional_of_nothing() -> Any:
    return attribute(measure=uw.Functional(lambda task, params, queries, w: torch.ones(2)))


@case
def a_functional_that_draws() -> Any:
    def drawn(task: Any, params: Any, queries: Any, weights: Tensor) -> Tensor:
        value: Tensor = (params["weight"] * torch.rand(2, 3)).sum()
        return value

    return attribute(measure=uw.Functional(drawn))


@case
def a_functional_with_an_infinite_derivative() -> Any:
    def rooted(task: Any, params: Any, queries: Any, weights: Tensor) -> Tensor:
        w = params["weight"]
        return (w - w.detach()).square().sum().sqrt()

    return attribute(measure=uw.Functional(rooted))


@case
def a_coefficient_of_no_parameter() -> Any:
    return attribute(measure=uw.Coefficient("slope"))


@case
def a_measure_of_the_first_query_only() -> Any:
    return attribute(measure=lambda outputs, targets: outputs[0].sum().expand(len(outputs)))


@case
def a_language_model_that_shifts_its_labels_inside() -> Any:
    ids, inner = tokens()

    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits, loss = self.inner(input_ids), None
            if labels is not None:
                loss = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
            return SimpleNamespace(logits=logits, loss=loss)

    data = {"input_ids": ids, "labels": ids}
    return attribute(Shifting(), data, data)


def tokens() -> tuple[Tensor, nn.Module]:
    """Sequences of four symbols, and a small model of them."""
    ids = torch.arange(24 * 5).reshape(24, 5) ** 2 % 7 % 4
    torch.manual_seed(0)
    return ids, nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Linear(3, 4)).double().eval()


# -- formats of data, names in place of objects, and what does not fit -----------------------------


def frame() -> Any:
    """The rows as a table."""
    import pandas as pd

    return pd.DataFrame(rows()[0].numpy(), columns=["a", "b", "c"])


@case
def examples_that_hold_their_place() -> Any:
    X, y = rows()
    return attribute(train=[(X[i], y[i], i) for i in range(len(X))])


@case
def an_example_place_where_the_model_would_take_labels() -> Any:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.linear(x)

    X, y = rows()
    return attribute(Takes(), train=(X, y, torch.arange(len(X))))


@case
def examples_of_different_lengths() -> Any:
    return attribute(train=[(torch.ones(k % 3 + 1, 3).double(), 1) for k in range(24)])


@case
def a_list_of_inputs_read_as_columns() -> Any:
    return uw.as_data(list(rows()[0]))


@case
def class_labels_as_floats() -> Any:
    X, y = rows()
    return attribute(train=(X, y.double()))


@case
def targets_in_a_dict_for_one_loss() -> Any:
    X, y = rows()
    return attribute(train=(X, {"a": y, "b": y}))


@case
def a_table_with_a_missing_value() -> Any:
    table = frame().convert_dtypes()
    table.iloc[3, 1] = None
    return attribute(train=(table, rows()[1]))


@case
def a_table_with_a_column_of_categories() -> Any:
    return attribute(train=(frame().assign(b=list("xyz") * 8), rows()[1]))


@case
def a_table_beside_labels_in_another_order() -> Any:
    import pandas as pd

    y = pd.Series(rows()[1].numpy()).sample(frac=1.0, random_state=0)
    return attribute(train=(frame(), y))


@case
def names_beside_the_arrays() -> Any:
    X, y = rows()
    return attribute(train={"input": X, "name": ["a row"] * len(X), "labels": y})


@case
def token_ids_outside_of_the_vocabulary() -> Any:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2)).double()
    return attribute(model.eval(), train=(torch.arange(72).reshape(24, 3) % 7, rows()[1]))


@case
def a_forward_that_returns_outputs_alone() -> Any:
    task = uw.Task(linear(), uw.CrossEntropy(), forward=lambda model, batch: model(batch[0]))
    return uw.Influence().fit(task, rows(2))


@case
def a_measure_by_name() -> Any:
    return attribute(measure="probability")


@case
def a_method_by_name() -> Any:
    return uw.Influence("ekfac")  # type: ignore[arg-type]


@case
def a_plain_function_for_sampled_labels() -> Any:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    return attribute(loss=loss, method=uw.Influence(uw.EKFAC()))


@case
def a_fraction_of_an_example_dropped() -> Any:
    return attribute().predict(drop=[1.9])


@case
def a_mask_of_another_length_dropped() -> Any:
    return attribute().predict(drop=[True, False])


@case
def weights_that_are_NaN() -> Any:
    return attribute().predict(weights=torch.full((24,), torch.nan))


@case
def a_negative_number_of_examples() -> Any:
    return attribute().top(-3, 0)


@case
def a_subset_counted_from_the_end() -> Any:
    return uw.as_data(rows()).subset([-1])


@case
def no_removals() -> Any:
    return attribute().require_context().fitted.removal(rows(4), groups=[])


@case
def a_factor_larger_than_memory() -> Any:
    model = nn.Linear(1_000_000, 4, bias=False)
    train = torch.ones(1, 1_000_000), torch.zeros(1).long()
    return attribute(
        model, train=train, queries=train, method=uw.Influence(solver=uw.solvers.Cholesky())
    )


@case
def covariances_larger_than_memory() -> Any:
    model = nn.Linear(1_000_000, 4, bias=False)
    train = torch.ones(1, 1_000_000), torch.zeros(1).long()
    method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
    return attribute(model, train=train, queries=train, method=method)


# -- verdicts --------------------------------------------------------------------------------------


@case
def a_recipe_that_makes_another_model() -> Any:
    early = uw.Training(
        lambda: nn.Linear(3, 2).double(), uw.SGD(lr=0.01), epochs=1, batch=8, seed=0
    )
    return check(attribute(), early, subsets=20)


@case
def scores_that_are_noise() -> Any:
    scores = attribute()
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(scores.values.shape, generator=g, dtype=torch.float64)
    return check(replace(scores, values=noise), uw.training.Newton(), subsets=20)


@case
def a_check_of_too_few_models() -> Any:
    return check(attribute(), uw.training.Newton(), subsets=3)


# -- adapters: rows before and after a pipeline, columns by name, fits without an end --------------


def pipeline() -> tuple[Any, Any, Any, Any]:
    """A scaled logistic regression on a frame, its data, and what was fitted of its task."""
    import pandas as pd
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import upweight.adapters.sklearn as sk

    inputs, labels = rows(60)
    X = pd.DataFrame(10 + 5 * inputs.numpy(), columns=["a", "b", "c"])
    y = np.where(labels.numpy() == 1, "yes", "no")
    made = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10)).fit(X, y)
    return made, X, y, uw.Influence().fit(*sk.task(made, X, y))


@case
def features_of_a_pipeline_as_its_rows() -> Any:
    made, X, y, fitted = pipeline()
    Z = torch.from_numpy(made[:-1].transform(X))
    return fitted.attribute((Z, torch.from_numpy((y == "yes") * 1.0)[:, None]))


@case
def rows_of_a_pipeline_in_a_dataset() -> Any:
    _, X, y, fitted = pipeline()
    return fitted.attribute(
        TensorDataset(torch.from_numpy(X.to_numpy()), torch.from_numpy((y == "yes") * 1.0)[:, None])
    )


@case
def queries_translated_for_another_pipeline() -> Any:
    import upweight.adapters.sklearn as sk

    made, X, y, fitted = pipeline()
    return fitted.attribute(sk.data(made[-1], made[:-1].transform(X), y))


@case
def a_pipeline_asked_with_other_labels() -> Any:
    _, X, y, fitted = pipeline()
    return fitted.attribute((X, (y == "yes").astype(int)))


@case
def a_pipeline_asked_with_columns_in_another_order() -> Any:
    _, X, y, fitted = pipeline()
    return fitted.attribute((X[["c", "b", "a"]], y))


@case
def labels_in_another_order_than_their_rows() -> Any:
    import pandas as pd

    _, X, y, fitted = pipeline()
    return fitted.attribute((X, pd.Series(y, index=X.index)[::-1]))


@case
def another_training_set_for_a_translated_task() -> Any:
    _, X, y, fitted = pipeline()
    return uw.Influence().fit(fitted.task, (X[::-1], y[::-1]))


@case
def a_regression_asked_without_targets() -> Any:
    from sklearn.linear_model import Ridge

    import upweight.adapters.sklearn as sk

    X = rows(60)[0].numpy()
    y = X[:, 0] ** 2
    return uw.Influence().fit(*sk.task(Ridge().fit(X, y), X, y)).attribute(X[:3])


@case
def an_estimator_in_place_of_a_task() -> Any:
    made, X, y, _ = pipeline()
    return uw.Influence().fit(made, (X, y))


@case
def the_pair_of_an_adapter_in_place_of_a_task() -> Any:
    import upweight.adapters.sklearn as sk

    made, X, y, _ = pipeline()
    pair: Any = sk.task(made, X, y)
    return uw.Influence().fit(pair, (X, y))


@case
def an_estimator_in_place_of_a_model() -> Any:
    return uw.Task(pipeline()[0], uw.CrossEntropy())  # type: ignore[arg-type]


def counted(**named: Any) -> tuple[Any, Any, Any]:
    """A Poisson regression of statsmodels on a frame, with its data."""
    import statsmodels.api as sm

    _, X, _, _ = pipeline()
    exog = sm.add_constant(X)
    y = np.arange(60) * 7 % 5
    return sm.GLM(y, exog, family=sm.families.Poisson(), **named).fit(tol=1e-12), exog, y


@case
def exog_with_columns_in_another_order() -> Any:
    import upweight.adapters.statsmodels as smx

    results, exog, y = counted()
    return smx.data(results, exog[exog.columns[::-1]], y)


@case
def queries_without_the_exposure_of_the_fit() -> Any:
    import upweight.adapters.statsmodels as smx

    results, exog, y = counted(exposure=1.0 + np.arange(60) % 3)
    return uw.Influence().fit(*smx.task(results)).attribute((exog, y))


@case
def classes_that_are_separated() -> Any:
    import statsmodels.api as sm

    import upweight.adapters.statsmodels as smx

    x = np.linspace(-1, 1, 60)
    results = sm.Logit((x > 0) * 1.0, sm.add_constant(x)).fit(disp=0)
    return uw.Influence().fit(*smx.task(results))


@case
def a_group_whose_counts_are_all_0() -> Any:
    from sklearn.linear_model import PoissonRegressor

    import upweight.adapters.sklearn as sk

    group = np.arange(60) % 2
    y = np.where(group == 1, 0, 1 + np.arange(60) * 7 % 5)
    X = group[:, None].astype(float)
    return sk.task(PoissonRegressor(alpha=0.0, tol=1e-10, max_iter=1000).fit(X, y), X, y)


@case
def collinear_columns_of_statsmodels() -> Any:
    import statsmodels.api as sm

    import upweight.adapters.statsmodels as smx

    _, exog, y = counted()
    return smx.task(sm.OLS(y, exog.assign(twice=2 * exog["a"])).fit())


# -- files of a run --------------------------------------------------------------------------------


def altered(change: Callable[[Path], None], name: str = "tile-*", saved: bool = False) -> Any:
    """Scores read from a folder of which one file was altered."""
    model, train = linear(), rows()
    method = uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=0.1, tolerance=0.0)
    with tempfile.TemporaryDirectory() as folder:
        fitted = method.fit(uw.Task(model, uw.CrossEntropy(), uw.L2(0.1)), train)
        if saved:
            fitted.attribute(train).save(folder)
        else:
            fitted.attribute(train, into=uw.Shards(folder))
        (path,) = Path(folder).glob(name)
        change(path)
        return uw.Scores.load(folder)


def edited(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """The numbers of a file changed, and all that its header says left as it was."""

    def save(path: Path) -> None:
        with safe_open(path, "pt") as file:
            told, values = file.metadata(), file.get_tensor("values")
        save_file({"values": change(values).contiguous()}, path, told)

    return save


def one_score_of_99(values: Tensor) -> Tensor:
    """As somebody with an editor may leave them."""
    values = values.clone()
    values[0, 0] = 99.0
    return values


@case
def one_edited_score_in_shards() -> Any:
    return altered(edited(one_score_of_99))


@case
def one_edited_score_that_was_saved() -> Any:
    return altered(edited(one_score_of_99), saved=True)


@case
def scores_doubled_on_disk() -> Any:
    return altered(edited(lambda values: 2 * values))


@case
def a_transposed_file_of_scores() -> Any:
    return altered(edited(lambda values: values.mT))


@case
def a_file_of_scores_that_is_shorter_than_its_name() -> Any:
    return altered(edited(lambda values: values[:-3]))


@case
def another_unit_in_the_header() -> Any:
    def change(path: Path) -> None:
        path.write_text(path.read_text().replace("DERIVATIVE", "RANK"))

    return altered(change, "finished.json")


@case
def a_header_that_was_cut() -> Any:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:40])

    return altered(change, "manifest.json")


@case
def a_file_of_scores_under_another_name() -> Any:
    def change(path: Path) -> None:
        path.rename(path.with_stem(f"{path.stem} (1)"))

    return altered(change)


@case
def scores_saved_over_those_of_a_pass() -> Any:
    def change(path: Path) -> None:
        Scores(torch.ones(2, 3), Unit.DERIVATIVE, Provenance(*"abc", 3, 2, 1, "d", "e")).save(
            path.parent
        )

    return altered(change)


@case
def a_pass_over_the_data_that_was_not_finished() -> Any:
    return altered(Path.unlink, "finished.json")


# -- runs of strangers ---------------------------------------------------------------------------


def received(folder: Path, **changes: str) -> Run:
    """A run directory whose run.toml names a file beside it."""
    (folder / "evil.py").write_text("raise SystemExit('the code of a stranger ran')\n")
    names = {"task": "evil.py:task", "train": "evil.py:train", "queries": "evil.py:test"}
    texts = {"directory": ".", "method": "Influence()", "measure": "Loss()", **names, **changes}
    none: dict[str, str] = {}
    Record(
        **texts, memory_bytes=0, threads=1, n=1, q=1, p=1, fingerprints=none,
        sources=none, versions=none,
    ).write(folder / "run.toml")  # fmt: skip
    return Run(folder)


@case
def a_run_of_a_stranger_whose_files_nobody_named() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        run = received(Path(folder))
        with reopened(run, named(run, (), (), "upweight rerun RUN")):
            pass


@case
def a_run_of_a_stranger_beside_a_project_of_ones_own() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        run = received(Path(folder), method="../gift/evil.py:method")
        with reopened(run, named(run, ["project.py"], (), "upweight rerun RUN")):
            pass


@case
def a_page_of_a_run_that_keeps_nothing_to_show() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return alone(received(Path(folder)))


# -- exact curvatures ------------------------------------------------------------------------------


class SquareOnce(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = 2 * ctx.saved_tensors[0] * gradient
        return found


class TimesSum(torch.autograd.Function):
    """x times the sum of its entries, whose own derivative is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sum(dim=1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total: Tensor = ctx.saved_tensors[0].sum(dim=1, keepdim=True)
        return gradient * total


class Through(nn.Module):
    """A layer that applies a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@case
def hessian_of_a_layer_without_second_derivative() -> Any:
    return attribute(deep(nn.Hardsigmoid()), method=uw.Influence(uw.Hessian(), damping=5.0))


@case
def hessian_of_a_function_that_is_once_differentiable() -> Any:
    model = deep(Through(SquareOnce.apply))
    return attribute(model, method=uw.Influence(uw.Hessian(), damping=5.0))


@case
def hessian_of_gradients_that_are_those_of_no_function() -> Any:
    model = deep(Through(TimesSum.apply))
    return attribute(model, method=uw.Influence(uw.Hessian(), damping=5.0))


# -- labels, padding and what a dtype cannot hold ------------------------------------------------


@case
def two_parameters_in_one_memory() -> Any:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight.data = model[0].weight.data
    return uw.Task(model, uw.SquaredError())


@case
def a_parameter_that_is_one_number_expanded() -> Any:
    model = nn.Linear(3, 2)
    model.weight.data = torch.ones(1).expand(2, 3)
    return uw.Task(model, uw.SquaredError())


@case
def labels_that_float32_cannot_tell_from_outputs() -> Any:
    outputs = torch.full((4, 1), 1.7e9, dtype=torch.float32)
    return uw.SquaredError().sample(outputs, outputs, torch.Generator())


@case
def shares_of_tokens_of_another_measure() -> Any:
    from upweight.report import Display, html

    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 3), nn.Flatten(), nn.Linear(12, 2))
    ids, y = torch.arange(48).reshape(12, 4) % 7, torch.arange(12) % 2
    train, queries = uw.as_data((ids, y)), uw.as_data((ids[:2], y[:2]))
    fitted = uw.Influence(uw.EKFAC(), damping=0.1).fit(uw.Task(model, uw.CrossEntropy()), train)
    scores = fitted.attribute(queries, uw.Margin())
    with tempfile.TemporaryDirectory() as folder:
        display = Display(
            train_tokens=[[str(i) for i in row] for row in ids.tolist()],
            token_scores=lambda q, some: fitted.attribute(
                queries.subset([q]), into=uw.PerToken(some)
            ),
        )
        return html(scores, Path(folder) / "page.html", display)


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
    task = task.moved_to(uw.training.Newton().prepare(task, as_data((X, y))).center)
    return uw.Influence().fit(task, (X, y)).removal(rows(4))


@case
def a_removal_asked_of_a_similarity() -> Any:
    method = uw.GradientDot()
    return method.fit(uw.Task(linear(), uw.CrossEntropy(), uw.L2(0.1)), rows()).removal(rows(4))


SLOPE = 1.0


class ByGlobal(nn.Module):
    """Reads a number that is no part of it."""

    def forward(self, x: Tensor) -> Tensor:
        return SLOPE * x


@case
def a_global_that_forward_reads_changed_after_fit() -> Any:
    model = deep(ByGlobal())
    fitted = uw.Influence(uw.GGN()).fit(uw.Task(model, uw.CrossEntropy(), uw.L2(0.1)), rows())
    try:
        globals()["SLOPE"] = 2.0
        return fitted.attribute(rows(4))
    finally:
        globals()["SLOPE"] = 1.0


class Stretched(nn.Module):
    """Scales by the longest input so far."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.cache):
            self.cache = torch.ones(len(x))
        return x * len(self.cache) / 24


@case
def a_cache_that_grew_after_fit_and_changes_outputs() -> Any:
    model = deep(Stretched())
    model(rows(24)[0])
    fitted = uw.Influence(uw.GGN()).fit(uw.Task(model, uw.CrossEntropy(), uw.L2(0.1)), rows())
    model(rows(48)[0])
    return fitted.attribute(rows(4))


class Autocast(nn.Module):
    """Computes in bfloat16 and says float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = deep().float()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


@case
def hessian_of_a_model_that_computes_in_bfloat16() -> Any:
    X, y = rows()
    train = X.float(), y
    return attribute(Autocast(), train, train, method=uw.Influence(uw.Hessian(), damping=5.0))


@case
def scores_of_a_model_that_computes_in_bfloat16() -> Any:
    X, y = rows()
    train = X.float(), y
    return attribute(Autocast(), train, train, method=uw.Influence(uw.GGN(), damping=5.0))


@case
def a_model_that_runs_in_float32_only() -> Any:
    return attribute(deep(Through(lambda x: x @ torch.eye(4, dtype=torch.float32))))


# -- one floor for every method --------------------------------------------------------------------


def fitted(method: uw.Method | None = None, **more: Any) -> Any:
    """A fitted method of the small problem."""
    task = uw.Task(linear(), uw.CrossEntropy(), uw.L2(0.1))
    return (method or uw.Influence()).fit(task, rows(), **more)


@case
def a_reducer_that_was_not_called() -> Any:
    return fitted().attribute(rows(4), into=uw.Top)


@case
def a_number_in_the_place_of_a_reducer() -> Any:
    return fitted(uw.Influence(uw.GGN())).attribute(rows(4), into=10)


@case
def no_memory_for_an_exact_curvature() -> Any:
    return fitted(uw.Influence(uw.GGN()), resources=uw.Resources(memory_bytes=0)).attribute(rows(4))


@case
def a_history_for_a_method_that_looks_at_none() -> Any:
    return fitted(history=[linear(), linear()])


@case
def a_preconditioner_that_nobody_fitted() -> Any:
    A = Dense(torch.eye(3, dtype=torch.float64), frozenset({Tag.PSD}))
    return solve(A, torch.ones(3, dtype=torch.float64), uw.solvers.CG(preconditioner=uw.EKFAC()))


@case
def outputs_without_each_example_of_a_similarity() -> Any:
    return fitted(uw.GradientCosine()).loo_outputs()


@case
def a_prediction_from_a_similarity() -> Any:
    return fitted(uw.GradientDot()).attribute(rows(4)).predict(drop=[1])


@case
def a_removal_in_another_word() -> Any:
    return fitted().removal(rows(4), evaluate="plug-in")


@case
def positions_of_a_model_without_any() -> Any:
    return fitted(uw.Influence(uw.EKFAC(), damping=0.1)).attribute(rows(4), into=uw.PerToken([0]))


@case
def a_coefficient_that_does_not_exist() -> Any:
    return fitted().attribute(None, uw.Coefficient("weight[0, 9]"))


@case
def a_tolerance_given_as_a_percentage() -> Any:
    return uw.Influence(uw.EKFAC(), tolerance=5)


# -- estimators ------------------------------------------------------------------------------------


def trained(recipe: uw.Training) -> uw.Task:
    """A network at the end of a recipe."""
    task = uw.Task(deep(), uw.CrossEntropy(), uw.L2(0.1))
    return task.moved_to(recipe.trajectory(task, rows()).theta)


@case
def a_step_at_which_lissa_diverges() -> Any:
    return attribute(method=uw.Influence(uw.GGN(), uw.solvers.LiSSA(scale=1e-3), 0.01))


@case
def magic_of_a_model_whose_training_is_unknown() -> Any:
    return fitted(uw.MAGIC())


@case
def magic_of_a_model_that_another_recipe_trained() -> Any:
    task = trained(uw.Training(deep, uw.SGD(0.1), epochs=2, batch=5))
    other = uw.Training(deep, uw.SGD(0.2), epochs=2, batch=5)
    return uw.MAGIC().fit(task, rows(), history=other)


@case
def a_sampler_whose_steps_are_too_long() -> Any:
    return fitted(uw.BIF(step=50.0, localization=1.0, draws=10)).attribute(rows(4))


@case
def stacking_without_a_recipe() -> Any:
    return fitted(uw.Stacked((uw.GradientDot(),)))


@case
def shapley_values_of_neighbours_for_a_regression() -> Any:
    X, _ = rows()
    task = uw.Task(nn.Linear(3, 1).double(), uw.SquaredError())
    return uw.KNNShapley().fit(task, (X, X[:, :1]))


@case
def the_steps_of_a_recipe_that_has_none() -> Any:
    return fitted(uw.TracIn(), history=uw.training.Newton())


@case
def a_history_of_other_data() -> Any:
    recipe = uw.Training(deep, uw.SGD(0.1), epochs=2, batch=5)
    task = trained(recipe)
    return uw.TracIn().fit(task, rows(20), history=recipe.trajectory(task, rows()))


@case
def projected_members_with_running_statistics_of_their_own() -> Any:
    task = uw.Task(deep(nn.BatchNorm1d(4)), uw.CrossEntropy())
    other = deep(nn.BatchNorm1d(4))
    with torch.no_grad():
        other[2].running_mean += 1.0
    return uw.TRAK(dim=8, damping=0.1).fit(task, rows(), history=[other])


@case
def a_network_without_the_loss_it_was_trained_with() -> Any:
    return uw.attribute(deep(), rows(), rows(4))


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
