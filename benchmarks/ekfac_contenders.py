"""Who computes EK-FAC influence in `ekfac.py`, each by its own public interface.

A contender is made from a problem, its settings and a seed, all outside the clock; then `fit` makes
the factors and `scores` the scores, in the contender's own convention. `mapping` says in words and
`factor` in numbers what turns them into S = ∂m/∂w `[q, n]`, for the summed loss of an example.
`blocks` hands the factors over to `ekfac_truth.py`. Peers are imported inside their functions, so
that only the one that runs must be there.
"""

import abc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ekfac_networks import CONTEXT
from ekfac_workloads import Problem, Workload
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

Settings = dict[str, Any]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Factors:
    """Of one layer: H ≈ (Q_G ⊗ Q_A) diag(Λ) (Q_G ⊗ Q_A)ᵀ over `[o, i]`, bias as last column."""

    weight: str
    bias: str | None
    left: Tensor
    """Q_G `[o, o]`, eigenvectors in columns."""
    right: Tensor
    """Q_A `[i, i]`, eigenvectors in columns."""
    eigenvalues: Tensor
    """Λ `[o, i]`, of the mean loss's curvature."""
    damping: float


class Method(abc.ABC):
    """EK-FAC influence by one library."""

    def __init__(self, problem: Problem, settings: Settings, seed: int, folder: Path) -> None:
        self.problem, self.settings, self.seed, self.folder = problem, settings, seed, folder

    @abc.abstractmethod
    def fit(self) -> None:
        """Make the factors."""

    @abc.abstractmethod
    def scores(self, progress: Progress) -> Tensor:
        """All scores, in the library's own convention but as `[q, n]`."""

    @abc.abstractmethod
    def blocks(self) -> Iterator[Factors]:
        """The factors, layer by layer."""

    def details(self) -> dict[str, Any]:
        """What else the library says of its run, for the record."""
        return {}

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers attributed."""
        return self.problem.workload.layers(self.problem.model)


class Upweight(Method):
    """`Influence(curvature=EKFAC())`."""

    def fit(self) -> None:
        import upweight as uw

        p = self.problem
        part = self.settings.get("one_in", 1)
        some = None if part == 1 else len(p.X) // part
        task = uw.Task(p.model, loss=uw.CrossEntropy(), params=p.workload.params)
        method = uw.Influence(
            curvature=uw.EKFAC(labels=uw.labels.Sampled(seed=self.seed), examples=some),
            damping=uw.Absolute(p.workload.damping),
            tolerance=self.settings["tolerance"],
        )
        self.fitted = method.fit(task, (p.X, p.y))

    def scores(self, progress: Progress) -> Tensor:
        import upweight as uw

        scores = self.fitted.attribute((self.problem.Xq, self.problem.yq), measure=uw.Loss())
        self.provenance = scores.provenance
        values: Tensor = scores.values
        return values

    def details(self) -> dict[str, Any]:
        said = self.provenance
        return {
            "seconds": dict(said.seconds),
            "health": dict(said.health),
            "notes": list(said.notes),
        }

    def blocks(self) -> Iterator[Factors]:
        for b in self.fitted.scorer.curvature.blocks:
            yield Factors(b.weight, b.bias, b.left, b.right, b.eigenvalues, float(b.damping))


class Slices(Dataset[tuple[Tensor, ...]]):
    """Examples that are read a batch at a time, which spares peers the collating."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        rows = torch.as_tensor(indices)
        return tuple(t[rows] for t in self.tensors)


def whole(batch: Any) -> Any:
    """The collate function of `Slices`: a batch is one already."""
    return batch


class Kronfluence(Method):
    """`Analyzer` with the strategy `ekfac` and its true Fisher: targets drawn from the model."""

    def fit(self) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task
        from kronfluence.utils.dataset import DataLoaderKwargs

        tracked = list(self.layers)

        class SummedCrossEntropy(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
                X, y = batch
                outputs = model(X).flatten(0, -2)
                if sample:
                    with torch.no_grad():
                        y = torch.multinomial(outputs.softmax(-1), 1)
                return F.cross_entropy(outputs, y.flatten(), reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return tracked

        logging.disable(logging.WARNING)
        torch.manual_seed(self.seed)
        self.tracked = tracked
        self.biased = {name for name, module in self.layers.items() if module.bias is not None}
        self.analyzer = Analyzer(
            analysis_name="ekfac",
            model=prepare_model(self.problem.model, SummedCrossEntropy()),
            task=(SummedCrossEntropy()),
            cpu=True,
            disable_tqdm=True,
            output_dir=str(self.folder / "kronfluence"),
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=whole))
        self.analyzer.fit_all_factors(
            factors_name="factors",
            dataset=Slices(self.problem.X, self.problem.y),
            per_device_batch_size=self.settings["factor_batch"],
            factor_args=FactorArguments(strategy="ekfac"),
        )

    def scores(self, progress: Progress) -> Tensor:
        from kronfluence.arguments import ScoreArguments

        p, s = self.problem, self.settings
        held_at_once = s.get("queries_at_once", s["query_batch"])
        self.analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="factors",
            query_dataset=Slices(p.Xq, p.yq),
            train_dataset=Slices(p.X, p.y),
            per_device_query_batch_size=s["query_batch"],
            per_device_train_batch_size=s["train_batch"],
            score_args=ScoreArguments(
                damping_factor=p.workload.damping,
                query_gradient_low_rank=s.get("rank"),
                query_gradient_accumulation_steps=max(1, held_at_once // s["query_batch"]),
            ),
        )
        scores: Tensor = self.analyzer.load_pairwise_scores("scores")["all_modules"]
        return scores

    def blocks(self) -> Iterator[Factors]:
        factors = self.analyzer.load_all_factors("factors")
        for name in self.tracked:
            yield Factors(
                weight=f"{name}.weight",
                bias=f"{name}.bias" if name in self.biased else None,
                left=factors["gradient_eigenvectors"][name],
                right=factors["activation_eigenvectors"][name],
                # It keeps sums over the examples and divides by their number before damping.
                eigenvalues=factors["lambda_matrix"][name] / factors["num_lambda_processed"][name],
                damping=self.problem.workload.damping,
            )


class ClassesSecond(nn.Module):
    """Outputs `[b, c, t]`, which is where `F.cross_entropy` looks for classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).transpose(1, -1)


class PyDVL(Method):
    """`EkfacInfluence(update_diagonal=True)`."""

    def fit(self) -> None:
        from pydvl.influence.torch import EkfacInfluence

        p, s = self.problem, self.settings
        model = p.model
        attributed = {id(q) for module in self.layers.values() for q in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in attributed)
        if p.y.ndim > 1:
            model = ClassesSecond(model)
        self.influence = EkfacInfluence(
            model, update_diagonal=True, hessian_regularization=p.workload.damping
        ).fit(self._loader(s["factor_batch"]))

    def _loader(self, batch: int) -> DataLoader[tuple[Tensor, ...]]:
        data = TensorDataset(self.problem.X, self.problem.y)
        sampler = BatchSampler(SequentialSampler(data), batch, drop_last=False)
        return DataLoader(data, sampler=sampler, batch_size=None)

    def scores(self, progress: Progress) -> Tensor:
        p, s = self.problem, self.settings
        queries = zip(p.Xq.split(s["query_batch"]), p.yq.split(s["query_batch"]), strict=True)
        factors = torch.cat([self.influence.influence_factors(x, y) for x, y in queries])
        parts = []
        for x, y in self._loader(s["train_batch"]):
            parts.append(self.influence.influences_from_factors(factors, x, y))
            progress(sum(part.shape[1] for part in parts) / len(p.X))
        return torch.cat(parts, dim=1)

    def blocks(self) -> Iterator[Factors]:
        damping = self.problem.workload.damping
        for name, (_, right, left, diagonal) in self.influence.ekfac_representation:
            inner = name.removeprefix("model.")
            eigenvalues = diagonal.view(len(left), len(right))
            yield Factors(f"{inner}.weight", f"{inner}.bias", left, right, eigenvalues, damping)


class Dattri(Method):
    """`IFAttributorEKFAC`."""

    def fit(self) -> None:
        from dattri.algorithm.influence_function import IFAttributorEKFAC
        from dattri.task import AttributionTask

        p, s = self.problem, self.settings

        def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            X, y = batch
            outputs = torch.func.functional_call(p.model, params, (X,))
            return F.cross_entropy(outputs.flatten(0, -2), y.flatten())

        task = AttributionTask(loss, p.model, p.model.state_dict())
        self.attributor = IFAttributorEKFAC(
            task, module_name=list(self.layers), damping=p.workload.damping
        )
        self.attributor.cache(self._loader((p.X, p.y), s["factor_batch"]))

    def _loader(self, tensors: tuple[Tensor, Tensor], batch: int) -> DataLoader[Any]:
        return DataLoader(Slices(*tensors), batch_size=batch, collate_fn=whole)

    def scores(self, progress: Progress) -> Tensor:
        p, s = self.problem, self.settings
        train = self._loader((p.X, p.y), s["train_batch"])
        queries = self._loader((p.Xq, p.yq), s["query_batch"])
        values: Tensor = self.attributor.attribute(train, queries)
        return values.T

    def blocks(self) -> Iterator[Factors]:
        damping = self.problem.workload.damping
        for name, (right, left) in self.attributor.cached_q.items():
            # It multiplies by eigenvectors as if they were in rows.
            yield Factors(
                f"{name}.weight",
                f"{name}.bias",
                left.T,
                right.T,
                self.attributor.cached_lambdas[name],
                damping,
            )


def _exactly(_: Problem) -> float:
    return 1.0


def _minus_mean(problem: Problem) -> float:
    return -1.0 / len(problem.X)


def _minus_mean_of_tokens(problem: Problem) -> float:
    return _minus_mean(problem) * (CONTEXT**2 if problem.y.ndim > 1 else 1)


@dataclass(frozen=True)
class Contender:
    """One row of the table, or several: one for each of its settings."""

    name: str
    make: type[Method]
    modules: tuple[str, ...]
    """What must be importable; the first names the library."""
    distribution: str
    """The name under which its version is recorded."""
    description: str
    mapping: str
    factor: Callable[[Problem], float]
    settings: Callable[[Workload], list[Settings]]
    repeated: bool = False
    """Whether it is run as often as `--runs` says; the others run once."""
    at_most: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Workloads that are too much for it, with the training examples and queries that are not."""

    def size(self, workload: Workload, n: int, queries: int) -> tuple[int, int]:
        """Training examples and queries it is given of those asked for."""
        most = self.at_most.get(workload.name, (n, queries))
        return min(n, most[0]), min(queries, most[1])


def _tolerance(value: float) -> Callable[[Workload], list[Settings]]:
    return lambda workload: [{"tolerance": value}]


def _batches(*sizes: tuple[int, int, int]) -> list[Settings]:
    """Of examples for the factors, of queries, and of examples for the scores."""
    return [{"factor_batch": f, "query_batch": q, "train_batch": t} for f, q, t in sizes]


def _kronfluence(workload: Workload) -> list[Settings]:
    sizes = {
        "mlp": ((32, 100, 512), (64, 500, 128), (512, 500, 512)),
        "cnn": ((16, 200, 64), (64, 200, 256), (512, 200, 512)),
        "gpt": ((8, 100, 8), (32, 100, 32)),
        "gpt-1000q": ((8, 100, 8), (32, 500, 32)),
    }
    return _batches(*sizes[workload.name])


def _pydvl(workload: Workload) -> list[Settings]:
    # Its gradients cost a batch's backward pass for each example of the batch.
    sizes = {
        "mlp": ((512, 16, 16), (64, 8, 8)),
        "cnn": ((512, 16, 16),),
        "gpt": ((32, 1, 1), (32, 2, 2)),
    }
    return _batches(*sizes[workload.made_as])


_SUMMED = "S = −G/n for its G = ∇mᵀ(H + λI)⁻¹∇ℓ, H the mean over examples"


def _from_part(part: str, one_in: int) -> Contender:
    """Ours with the factors of a part of the examples."""
    return Contender(
        name=f"upweight-2%-{part}",
        make=Upweight,
        modules=("upweight", "torch"),
        distribution="upweight",
        description=f"Influence(curvature=EKFAC(examples=n // {one_in}), damping=Absolute(λ), "
        "tolerance=0.02)",
        mapping="S itself",
        factor=_exactly,
        settings=lambda workload: [{"tolerance": 0.02, "one_in": one_in}],
        repeated=True,
    )


CONTENDERS = (
    Contender(
        name="upweight-2%",
        make=Upweight,
        modules=("upweight", "torch"),
        distribution="upweight",
        description="Influence(curvature=EKFAC(), damping=Absolute(λ), tolerance=0.02)",
        mapping="S itself",
        factor=_exactly,
        settings=_tolerance(0.02),
        repeated=True,
    ),
    _from_part("eighth", 8),
    _from_part("sixteenth", 16),
    Contender(
        name="upweight-0.1%",
        make=Upweight,
        modules=("upweight", "torch"),
        distribution="upweight",
        description="Influence(curvature=EKFAC(), damping=Absolute(λ), tolerance=0.001)",
        mapping="S itself",
        factor=_exactly,
        settings=_tolerance(0.001),
        repeated=True,
    ),
    Contender(
        name="kronfluence",
        make=Kronfluence,
        modules=("kronfluence", "torch"),
        distribution="kronfluence",
        description="Analyzer, strategy ekfac, damping_factor=λ, summed losses, sampled targets",
        mapping=_SUMMED,
        factor=_minus_mean,
        settings=_kronfluence,
    ),
    Contender(
        name="pydvl",
        make=PyDVL,
        modules=("pydvl", "dask", "distributed", "zarr", "torch"),
        distribution="pyDVL",
        description="EkfacInfluence(update_diagonal=True, hessian_regularization=λ)",
        mapping=f"{_SUMMED}; × 128² for sequences, whose gradients it takes of the tokens' mean",
        factor=_minus_mean_of_tokens,
        settings=_pydvl,
    ),
    Contender(
        name="dattri",
        make=Dattri,
        modules=("dattri", "torch"),
        distribution="dattri",
        description="IFAttributorEKFAC(damping=λ): the Fisher of the given targets",
        mapping=f"{_SUMMED}; × 128² for sequences, whose gradients it takes of the tokens' mean",
        factor=_minus_mean_of_tokens,
        settings=lambda workload: _batches((512, 20, 512)),
        at_most={"mlp": (1_000, 20)},
    ),
)
