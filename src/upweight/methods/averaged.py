"""S[q, i] = mean over k of S_k[q, i], each method's row at one length: several views of one model.

Methods that look at different things are wrong in different places, so their mean is often nearer
to retraining than either. `Stacked` learns what each counts from retrained models; here each
counts alike, which takes none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from upweight.errors import SpecError
from upweight.methods.fitting import Fitting
from upweight.methods.method import Method
from upweight.methods.points import SeveralScorers
from upweight.methods.scorer import Asked, Known
from upweight.methods.stacked import blocks
from upweight.runtime.memory import require_bytes, solved_bytes
from upweight.scores import Unit


@dataclass(frozen=True)
class Averaged(Method):
    """The mean of several methods' scores of one model, where each counts alike.

        S[q, i] = (f_q / K) Σ_k S_k[q, i] / f_kq       f_kq = ‖S_k[q, :]‖,   f_q = (Π_k f_kq)^(1/K)

    Rows are brought to one length, the geometric mean of all methods', since sizes of approximate
    methods differ by factors of ten and more; a row of zeros stays out. The unit is ∂m/∂w if that
    of every method is, and a rank otherwise.

    `fit(..., history=...)` is handed to the methods that look at training.

    Args:
        methods: Two or more.

    Raises:
        SpecError: There are fewer than two, or one is no method.

    Exact when: every method is.
    Cost: fit and scores of every method. Memory: two rows of n scores for each query at a time.
    """

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        if len(self.methods) < 2 or not all(isinstance(m, Method) for m in self.methods):
            raise SpecError(
                "Averaged takes the mean of two methods or more.",
                f"{self!r}.",
                "a class that was not called, or one method.",
                "Averaged((SOURCE(3), Influence(EKFAC(), damping=Relative(0.1)))), for instance.",
            )

    @property
    def unit(self) -> Unit:
        units = {method.unit for method in self.methods}
        return Unit.DERIVATIVE if units == {Unit.DERIVATIVE} else Unit.RANK

    @property
    def takes_history(self) -> bool:  # type: ignore[override]
        return any(method.takes_history for method in self.methods)

    @property
    def takes_run(self) -> bool:  # type: ignore[override]
        return any(method.takes_run for method in self.methods)

    @property
    def history_is_optional(self) -> bool:  # type: ignore[override]
        return all(m.history_is_optional for m in self.methods if m.takes_history)

    def prepare(self, fitting: Fitting) -> "AveragedScorer":
        made = []
        for k, method in enumerate(self.methods):
            resources = fitting.resources.within(f"method-{k}")
            history = fitting.history if method.takes_history else None
            made.append(method.prepare(replace(fitting, resources=resources, history=history)))
        return AveragedScorer(tuple(made), fitting)


@dataclass(frozen=True, eq=False)
class AveragedScorer(SeveralScorers):
    """Scorers of several methods at one θ̂, asked one after the other."""

    fitting: Fitting

    @property
    def dtype(self) -> torch.dtype:
        found = self.fitting.task.layout.dtype
        for scorer in self.scorers:
            found = torch.promote_types(found, scorer.dtype or found)
        return found

    def health(self) -> dict[str, Any]:
        return {"averaged": len(self.scorers)}

    def settings(self, asked: Asked) -> dict[str, int]:
        found = [scorer.settings(asked) for scorer in self.scorers]
        each = 2 * len(self.fitting.data) * self.dtype.itemsize
        room = solved_bytes(self.fitting.task.layout.device, asked.memory_bytes) // each
        together = min(room, *(s["queries_together"] for s in found))
        return {**found[0], "queries_together": max(1, together)}

    def summary(self, records: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        return {}, super().summary(records)[1]  # numbers of one method are not those of the mean

    def jobs(self, asked: Asked) -> Iterator["AveragedJob"]:
        if asked.functional is not None:
            yield self._mean(asked, 0)
            return
        together = asked.together or self.settings(asked)["queries_together"]
        for first, queries in asked.groups(together):
            some = replace(asked, queries=queries, together=len(queries))
            yield self._mean(some, first)

    def _mean(self, asked: Asked, first: int) -> "AveragedJob":
        """Of some queries, `first` on."""
        n, q, device = len(self.fitting.data), len(asked), self.fitting.task.layout.device
        require_bytes(
            2 * q * n * self.dtype.itemsize,
            f"scores of two methods, of {q} × {n} numbers",
            device,
            "ask some queries at a time, as_data(queries).subset(range(100)).",
        )
        total = torch.zeros(q, n, dtype=self.dtype, device=device)
        logs = torch.zeros(q, dtype=torch.float64, device=device)
        heard, records = torch.zeros_like(logs), list[list[Any]]()
        for scorer in self.scorers:
            found = torch.empty_like(total)
            records.append([])
            for row, column, (part,) in blocks(scorer, asked, n, records=records[-1]):
                found[row : row + part.shape[0], column : column + part.shape[1]] = part
            length = torch.linalg.vector_norm(found, dim=1, dtype=torch.float64)
            is_heard = length > 0
            total += found / torch.where(is_heard, length, 1.0).to(total)[:, None]
            logs += torch.where(is_heard, length, 1.0).log()
            heard += is_heard
        heard = heard.clamp_min(1.0)
        total *= ((logs / heard).exp() / heard).to(total)[:, None]
        return AveragedJob(total, first, record=tuple(records))


@dataclass(frozen=True, eq=False)
class AveragedJob(Known):
    """Scores that are there already, and of each method the records of its jobs."""

    record: tuple[list[Any], ...] = ()  # type: ignore[assignment]
