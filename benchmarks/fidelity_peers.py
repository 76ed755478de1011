"""The peers in `fidelity.py`, each by its own public interface and on the same trained model.

`factor` in each turns what the library returns into S = ∂m/∂w, or into something proportional to it
where the library claims no size (TracIn, TRAK).
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ekfac_contenders import ClassesSecond, Slices, whole
from fidelity_methods import Contender, Method, chunks, log_odds
from fidelity_networks import Problem, losses, measured
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

TRAK_DIMENSIONS = 512


def loss_only(problem: Problem) -> tuple[str, ...]:
    return ("loss",)


def batches(X: Tensor, y: Tensor, size: int) -> DataLoader[Any]:
    """Whole slices, which spares peers the collating."""
    return DataLoader(Slices(X, y), batch_size=size, collate_fn=whole)


# -- kronfluence -----------------------------------------------------------------------------------


class Kronfluence(Method):
    """`Analyzer`, strategy `ekfac`; by default it adds a tenth of a layer's mean eigenvalue."""

    def fit(self) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task
        from kronfluence.utils.dataset import DataLoaderKwargs

        problem, method = self.problem.single(), self
        self.measure = "loss"

        class Ours(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
                X, y = batch
                outputs = model(X)
                if sample and problem.kind == "number":
                    y = outputs.detach() + torch.randn_like(outputs)
                elif sample:
                    drawn = torch.multinomial(outputs.detach().flatten(0, -2).softmax(-1), 1)
                    y = drawn.view(y.shape)
                return losses(problem.kind, outputs, y).sum()

            def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
                X, y = batch
                return measured(problem.kind, method.measure, model(X), y).sum()

            def get_influence_tracked_modules(self) -> list[str]:
                return list(problem.linear)

        logging.disable(logging.WARNING)
        torch.manual_seed(0)
        self.analyzer = Analyzer(
            analysis_name="fidelity",
            model=prepare_model(problem.model, Ours()),
            task=Ours(),
            cpu=True,
            disable_tqdm=True,
            output_dir=str(self.folder / "kronfluence"),
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=whole))
        self.train = Slices(problem.X, problem.y)
        self.queries = Slices(problem.Xq, problem.yq)
        self.analyzer.fit_all_factors(
            factors_name="factors",
            dataset=self.train,
            per_device_batch_size=64,
            factor_args=FactorArguments(strategy="ekfac"),
        )

    def _damping(self) -> Any:
        from kronfluence.arguments import ScoreArguments

        return ScoreArguments(damping_factor=self.problem.penalty or None)

    def scores(self, measure: str) -> Tensor:
        self.measure = measure
        self.analyzer.compute_pairwise_scores(
            scores_name=measure,
            factors_name="factors",
            query_dataset=self.queries,
            train_dataset=self.train,
            per_device_query_batch_size=len(self.queries),
            per_device_train_batch_size=128,
            score_args=self._damping(),
        )
        found: Tensor = self.analyzer.load_pairwise_scores(measure)["all_modules"]
        return -found / len(self.train)

    def self_scores(self) -> Tensor:
        self.analyzer.compute_self_scores(
            scores_name="self",
            factors_name="factors",
            train_dataset=self.train,
            per_device_train_batch_size=128,
            score_args=self._damping(),
        )
        found: Tensor = self.analyzer.load_self_scores("self")["all_modules"]
        return found


# -- pyDVL -----------------------------------------------------------------------------------------


def flat_loss(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over the examples, of outputs as pyDVL hands them on."""

    def mean(outputs: Tensor, y: Tensor) -> Tensor:
        return losses(kind, outputs, y).mean()

    return mean


class PyDVL(Method):
    """An influence model of pyDVL. It knows losses only."""

    BATCH = 250

    def __init__(self, problem: Problem, folder: Path, make: Callable[[Problem], Any]) -> None:
        super().__init__(problem, folder)
        self.make = make

    def _loader(self) -> DataLoader[tuple[Tensor, ...]]:
        # Of one size: it averages over batches, whatever their sizes.
        n = len(self.problem.X)
        size = next(b for b in range(min(n, 1000), 0, -1) if n % b == 0)
        data = TensorDataset(self.problem.X, self.problem.y)
        sampler = BatchSampler(SequentialSampler(data), size, drop_last=False)
        return DataLoader(data, sampler=sampler, batch_size=None)

    def fit(self) -> None:
        self.influence = self.make(self.problem).fit(self._loader())

    def scores(self, measure: str) -> Tensor:
        p = self.problem
        factors = self.influence.influence_factors(p.Xq, p.yq)
        parts = [
            self.influence.influences_from_factors(factors, X, y) for X, y in chunks(p, self.BATCH)
        ]
        return -torch.cat(parts, dim=1) / len(p.X)

    def self_scores(self) -> Tensor:
        # It has no self-influence: the diagonal of small squares of all scores.
        parts = []
        for X, y in chunks(self.problem, 50):
            factors = self.influence.influence_factors(X, y)
            parts.append(self.influence.influences_from_factors(factors, X, y).diagonal())
        return torch.cat(parts)


class PyDVLEkfac(PyDVL):
    """`EkfacInfluence`, whose gradients are of the mean over a passage's bytes."""

    BATCH = 16

    def fit(self) -> None:
        from pydvl.influence.torch import EkfacInfluence

        self.problem = p = self.problem.single()
        kept = {id(q) for module in p.linear.values() for q in module.parameters()}
        for parameter in p.model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
        model = ClassesSecond(p.model) if p.kind == "text" else p.model
        self.influence = EkfacInfluence(
            model, update_diagonal=True, hessian_regularization=p.damping
        ).fit(self._loader())

    def scores(self, measure: str) -> Tensor:
        window = self.problem.y[0].numel()
        return super().scores(measure) * window**2


def pydvl_cg(problem: Problem) -> Any:
    from pydvl.influence.torch import CgInfluence

    return CgInfluence(
        problem.model,
        flat_loss(problem.kind),
        regularization=problem.damping,
        rtol=1e-2,  # it stops at ‖residual‖ < rtol² ‖b‖
        atol=1e-8,
        maxiter=200,
        solve_simultaneously=True,
    )


def pydvl_nystroem(problem: Problem) -> Any:
    from pydvl.influence.torch import NystroemSketchInfluence

    torch.manual_seed(0)
    return NystroemSketchInfluence(
        problem.model, flat_loss(problem.kind), regularization=problem.damping, rank=50
    )


# -- dattri ----------------------------------------------------------------------------------------


class Dattri(Method):
    """An attributor of dattri, on all training examples in one batch: it averages over batches."""

    QUERIES = 10
    """At once: the memory of its iterative solvers grows with them."""

    def __init__(self, problem: Problem, folder: Path, make: Callable[[Any, Problem], Any]) -> None:
        super().__init__(problem, folder)
        self.make = make

    def _function(self, name: str) -> Callable[[dict[str, Tensor], Any], Tensor]:
        problem = self.problem

        def mean(params: dict[str, Tensor], batch: Any) -> Tensor:
            X, y = batch
            # LiSSA hands labels and inputs over as float32.
            X, y = X.to(problem.X.dtype), y.to(problem.y.dtype)
            if X.ndim == problem.X.ndim - 1:  # one example by itself, as TracIn and TRAK take them
                X, y = X[None], y[None]
            outputs = torch.func.functional_call(problem.model, params, (X,))
            return measured(problem.kind, name, outputs, y).mean()

        return mean

    def _task(self, measure: str) -> Any:
        from dattri.task import AttributionTask

        return AttributionTask(
            self._function("loss"),
            self.problem.model,
            dict(self.problem.checkpoints[-1]),
            target_func=self._function(measure),
        )

    def _train(self) -> DataLoader[Any]:
        p = self.problem
        return batches(p.X, p.y, len(p.X))

    def fit(self) -> None:
        self.attributors = dict[str, Any]()
        self._attributor("loss")

    def _attributor(self, measure: str) -> Any:
        if measure not in self.attributors:
            made = self.make(self._task(measure), self.problem)
            made.cache(self._train())
            self.attributors[measure] = made
        return self.attributors[measure]

    def scores(self, measure: str) -> Tensor:
        p = self.problem
        queries = batches(p.Xq, p.yq, self.QUERIES)
        values: Tensor = self._attributor(measure).attribute(self._train(), queries)
        return -values.T / len(p.X)

    def self_scores(self) -> Tensor:
        values: Tensor = self._attributor("loss").self_attribute(self._train())
        return values.flatten()


class DattriEkfac(Dattri):
    """`IFAttributorEKFAC` takes its factors from the measurement: the loss is what makes sense."""

    QUERIES = 100

    def _train(self) -> DataLoader[Any]:
        return batches(self.problem.X, self.problem.y, 50)

    def self_scores(self) -> Tensor:
        raise NotImplementedError


class DattriTracIn(Dattri):
    """`TracInAttributor`: weighted products of gradients, or of their directions."""

    QUERIES = 100

    def __init__(self, problem: Problem, folder: Path, *, every: bool, normalized: bool) -> None:
        super().__init__(problem, folder, lambda task, problem: None)
        self.every, self.normalized = every, normalized

    def _attributor(self, measure: str) -> Any:
        from dattri.algorithm import tracin
        from dattri.task import AttributionTask

        p = self.problem
        states = [dict(state) for state in p.checkpoints][0 if self.every else -1 :]
        rates = p.facts["rates"] if self.every else [1.0]
        task = AttributionTask(
            self._function("loss"), p.model, states, target_func=self._function(measure)
        )
        made = tracin.TracInAttributor(task, torch.tensor(rates), self.normalized)
        made.projector_kwargs = None  # None in the constructor means 512 random dimensions
        return made

    def _train(self) -> DataLoader[Any]:
        return batches(self.problem.X, self.problem.y, 250)


class DattriTrak(Dattri):
    """`TRAKAttributor` on the final model: scores of f, the output that TRAK predicts."""

    def _train(self) -> DataLoader[Any]:
        return batches(self.problem.X, self.problem.y, 250)

    def fit(self) -> None:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask

        f = self._function("margin")
        loss = self._function("loss")

        def p(params: dict[str, Tensor], batch: Any) -> Tensor:
            return torch.exp(-loss(params, batch))

        problem = self.problem
        task = AttributionTask(f, problem.model, dict(problem.checkpoints[-1]))
        self.attributor = TRAKAttributor(task, p, {"proj_dim": trak_dimensions(problem)})

    def scores(self, measure: str) -> Tensor:
        p = self.problem
        if self.attributor.full_train_dataloader is None:
            self.attributor.cache(self._train())
        values = self.attributor.attribute(batches(p.Xq, p.yq, len(p.Xq))).T
        return values if measure == "margin" else log_odds(p)[:, None] * values

    def self_scores(self) -> Tensor:
        values: Tensor = self.attributor.self_attribute(self._train())
        return values.flatten()


def trak_dimensions(problem: Problem) -> int:
    """Fewer than a quarter of the examples, whose products of features are inverted."""
    return min(TRAK_DIMENSIONS, len(problem.X) // 4)


def dattri_explicit(task: Any, problem: Problem) -> Any:
    from dattri.algorithm.influence_function import IFAttributorExplicit

    return IFAttributorExplicit(task, regularization=problem.damping)


def dattri_cg(task: Any, problem: Problem) -> Any:
    from dattri.algorithm.influence_function import IFAttributorCG

    return IFAttributorCG(task, regularization=problem.damping, max_iter=50)


LISSA_SCALE = 100.0


def dattri_lissa(task: Any, problem: Problem) -> Any:
    from dattri.algorithm.influence_function import IFAttributorLiSSA

    torch.manual_seed(0)
    # Its recursion solves (H + scaling · damping) x = v.
    return IFAttributorLiSSA(
        task,
        batch_size=32,
        recursion_depth=1000,
        scaling=LISSA_SCALE,
        damping=problem.damping / LISSA_SCALE,
    )


def dattri_ekfac(task: Any, problem: Problem) -> Any:
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    names = [k for k, m in problem.linear.items() if isinstance(m, nn.Linear)]
    return IFAttributorEKFAC(task, module_name=names, damping=problem.damping)


# -- captum ----------------------------------------------------------------------------------------


class Captum(Method):
    """`TracInCP`: of the checkpoints, weighted by their learning rates."""

    def fit(self) -> None:
        from captum.influence import TracInCP

        p = self.problem

        def load(model: nn.Module, k: int) -> float:
            model.load_state_dict(p.checkpoints[k])
            return float(p.facts["rates"][k])

        class Summed(nn.Module):
            reduction = "sum"

            def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
                return losses(p.kind, outputs, y).sum()

        class Each(nn.Module):
            reduction = "none"

            def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
                return losses(p.kind, outputs, y)

        # Gradients of a whole batch at once are for linear layers and convolutions.
        batched = p.kind != "text"
        data = TensorDataset(p.X, p.y)
        sampler = BatchSampler(SequentialSampler(data), 250 if batched else 25, drop_last=False)
        self.influence = TracInCP(
            p.model,
            DataLoader(data, sampler=sampler, batch_size=None),
            checkpoints=list(range(len(p.checkpoints))),
            checkpoints_load_func=load,
            loss_fn=Summed() if batched else Each(),
            sample_wise_grads_per_batch=batched,
        )

    def scores(self, measure: str) -> Tensor:
        p = self.problem
        return -self.influence.influence((p.Xq, p.yq)).detach() / len(p.X)

    def self_scores(self) -> Tensor:
        found: Tensor = self.influence.self_influence()
        return found


# -- traker ----------------------------------------------------------------------------------------


class Traker(Method):
    """`TRAKer` on the final model, without a GPU: its `BasicProjector`."""

    def fit(self) -> None:
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput
        from trak.projectors import BasicProjector

        p = self.problem

        class Output(AbstractModelOutput):
            """f and −∂ℓ/∂f; for classes the same as its own for images."""

            def __init__(self) -> None: ...

            @staticmethod
            def get_output(model: Any, weights: Any, buffers: Any, X: Tensor, y: Tensor) -> Tensor:
                outputs = torch.func.functional_call(model, (weights, buffers), X[None])
                if p.kind == "text":
                    return -losses(p.kind, outputs, y[None])[0]
                name = "output" if p.kind == "number" else "margin"
                return measured(p.kind, name, outputs, y[None])[0]

            @staticmethod
            def get_out_to_loss_grad(model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
                X, y = batch
                outputs = torch.func.functional_call(model, (weights, buffers), X)
                if p.kind == "text":
                    return torch.ones(len(X), 1)
                if p.kind == "number":
                    return (y - outputs).detach()
                p_right = outputs.softmax(-1).gather(1, y[:, None])
                return (1 - p_right).detach()

        self.traker = TRAKer(
            model=p.model,
            task="image_classification" if p.kind == "classes" else Output(),
            train_set_size=len(p.X),
            save_dir=str(self.folder / "trak"),
            device="cpu",
            # Its own choice without a GPU, in blocks: with a single one 0.3.2 fails when scoring.
            projector=BasicProjector(
                sum(q.numel() for q in p.model.parameters()),
                trak_dimensions(p),
                seed=0,
                proj_type="normal",
                device="cpu",
                block_size=50,
            ),
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        self.traker.load_checkpoint(p.checkpoints[-1], model_id=0)
        for X, y in chunks(p, 250):
            self.traker.featurize(batch=(X, y), num_samples=len(X))
        self.traker.finalize_features()

    def _of(self, name: str, X: Tensor, y: Tensor) -> Tensor:
        self.traker.start_scoring_checkpoint(name, self.problem.checkpoints[-1], 0, len(X))
        for part in zip(X.split(250), y.split(250), strict=True):
            self.traker.score(batch=part, num_samples=len(part[0]))
        return torch.tensor(self.traker.finalize_scores(exp_name=name)).T

    def scores(self, measure: str) -> Tensor:
        p = self.problem
        values = self._of(measure, p.Xq, p.yq)
        return log_odds(p)[:, None] * values if measure == "loss" else values

    def self_scores(self) -> Tensor:
        # It has no self-influence: the diagonal of all scores.
        return self._of("self", self.problem.X, self.problem.y).diagonal()


# -- bergson ---------------------------------------------------------------------------------------


class AsPretrained(nn.Module):
    """What bergson asks of a language model: logits at every byte, also at the last."""

    dtype = torch.float32

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model, self.device = problem.model, torch.device("cpu")

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Any:
        logits = self.model(x[:, :-1])
        return SimpleNamespace(logits=nn.functional.pad(logits, (0, 0, 0, 1)))


class Bergson(Method):
    """TrackStar: projected gradients, whitened by their second moments and of unit length."""

    BATCH, RANK = 50, 16  # 16 is what its command `trackstar` takes

    def fit(self) -> None:
        from bergson import Attributor, CollectorComputer, GradientProcessor, IndexConfig
        from bergson.collection import collect_gradients
        from bergson.hessians.autocorrelation import AutocorrelationCollector
        from datasets import Dataset

        logging.disable(logging.WARNING)
        p = self.problem
        self.lm = AsPretrained(p)
        passages = torch.cat([p.X, p.y[:, -1:]], dim=1)
        data = Dataset.from_dict({"input_ids": passages.tolist()})
        parts = [part.tolist() for part in torch.arange(len(data)).split(self.BATCH)]
        # With its default, no column would be left of data that are nothing but tokens.
        config = IndexConfig(
            run_path=str(self.folder / "bergson"), projection_dim=self.RANK, drop_columns=False
        )
        processor = GradientProcessor(projection_dim=self.RANK)
        collect_gradients(self.lm, data, processor, config, batches=parts)
        moments = str(self.folder / "bergson" / "moments")
        collector = AutocorrelationCollector(
            model=self.lm,
            processor=GradientProcessor(projection_dim=self.RANK),
            data=data,
            path=moments,
        )
        CollectorComputer(
            self.lm, data, collector=collector, batches=parts, cfg=config
        ).run_with_collector_hooks()
        self.attributor = Attributor(config.partial_run_path, unit_norm=True, hessian_path=moments)

    def scores(self, measure: str) -> Tensor:
        p = self.problem
        with self.attributor.trace(self.lm, None) as found:
            passages = torch.cat([p.Xq, p.yq[:, -1:]], dim=1)
            losses(p.kind, self.lm(passages).logits[:, :-1], p.yq).sum().backward()
        values = torch.empty(len(p.Xq), len(p.X))
        return -values.scatter(1, found.indices, found.scores.float()) / len(p.X)


# -- who runs on what ------------------------------------------------------------------------------


def classes_only(problem: Problem) -> str | None:
    return None if problem.kind == "classes" else "its model output is the margin of one label"


def text_only(problem: Problem) -> str | None:
    return None if problem.kind == "text" else "it is for language models"


def pydvl_layers(problem: Problem) -> str | None:
    if problem.kind == "number":
        return "it is for cross entropy only"
    if any(isinstance(m, nn.Conv2d) for m in problem.linear.values()):
        return "it knows linear layers only, no convolutions"
    return None


def dattri_layers(problem: Problem) -> str | None:
    if any(isinstance(m, nn.Conv2d) for m in problem.linear.values()):
        return "it knows linear layers only, no convolutions"
    if problem.kind == "text":
        return "its factors are for outputs [b, t] of one loss; it failed on attention's in trials"
    return None


def affordable_explicit(problem: Problem) -> str | None:
    p = sum(q.numel() for q in problem.model.parameters())
    return None if p <= 3_000 else f"it differentiates all {p} parameters of the whole batch twice"


def never(problem: Problem) -> bool:
    return False


def dattri(make: Callable[..., Any], kind: type[Dattri] = Dattri) -> Callable[..., Method]:
    return lambda problem, folder: kind(problem, folder, make)


PEERS = (
    Contender(
        "kronfluence EK-FAC",
        Kronfluence,
        "kronfluence",
        "Analyzer, ekfac, sampled targets, its default damping of 0.1 mean eigenvalues by layer; "
        "the penalty's λ where there is one",
    ),
    Contender(
        "pyDVL EK-FAC",
        partial(PyDVLEkfac, make=lambda problem: None),
        "pyDVL",
        "EkfacInfluence(update_diagonal=True), λ of the task",
        pydvl_layers,
        loss_only,
        detects=never,
    ),
    Contender(
        "pyDVL CG",
        partial(PyDVL, make=pydvl_cg),
        "pyDVL",
        "CgInfluence, Hessian, λ of the task, relative residual 1e-4, 200 steps at most",
        measures=loss_only,
        detects=never,
    ),
    Contender(
        "pyDVL Nyström",
        partial(PyDVL, make=pydvl_nystroem),
        "pyDVL",
        "NystroemSketchInfluence, Hessian, rank 50, λ of the task",
        measures=loss_only,
    ),
    Contender(
        "dattri explicit",
        dattri(dattri_explicit),
        "dattri",
        "IFAttributorExplicit, λ of the task",
        affordable_explicit,
    ),
    Contender(
        "dattri CG",
        dattri(dattri_cg),
        "dattri",
        "IFAttributorCG, λ of the task, 50 steps",
        detects=never,
    ),
    Contender(
        "dattri LiSSA",
        dattri(dattri_lissa),
        "dattri",
        "IFAttributorLiSSA, λ of the task, 1000 steps of 32 examples, scale 100",
        measures=loss_only,
        detects=never,
    ),
    Contender(
        "dattri EK-FAC",
        dattri(dattri_ekfac, DattriEkfac),
        "dattri",
        "IFAttributorEKFAC, given labels, λ of the task",
        dattri_layers,
        loss_only,
        detects=never,
    ),
    Contender(
        "dattri grad dot",
        partial(DattriTracIn, every=False, normalized=False),
        "dattri",
        "TracInAttributor, final model",
        calibrated=False,
    ),
    Contender(
        "dattri grad cosine",
        partial(DattriTracIn, every=False, normalized=True),
        "dattri",
        "TracInAttributor, final model, normalized",
        calibrated=False,
        detects=never,
    ),
    Contender(
        "dattri TracIn",
        partial(DattriTracIn, every=True, normalized=False),
        "dattri",
        "TracInAttributor, five checkpoints and their learning rates",
        calibrated=False,
    ),
    Contender(
        "dattri TRAK",
        dattri(lambda task, problem: None, DattriTrak),
        "dattri",
        "TRAKAttributor, final model, 512 dimensions (at most n/4)",
        classes_only,
        calibrated=False,
    ),
    Contender(
        "captum TracInCP",
        Captum,
        "captum",
        "TracInCP, five checkpoints and their learning rates",
        measures=loss_only,
        calibrated=False,
    ),
    Contender(
        "traker TRAK",
        Traker,
        "traker",
        "TRAKer, final model, 512 dimensions (at most n/4), float32",
        calibrated=False,
    ),
    Contender(
        "bergson TrackStar",
        Bergson,
        "bergson",
        "TrackStar: 16 × 16 projections a layer, second moments of the training gradients alone, "
        "float32, its default damping of 0.1 mean eigenvalues",
        text_only,
        loss_only,
        calibrated=False,
        detects=never,
    ),
)
