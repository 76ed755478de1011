"""Index: rows of training examples on disk, asked for the examples behind a measurement."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upweight._typing import Folder
from upweight.errors import MissingContext, ShapeError, SpecError, message
from upweight.index.asking import Best, ByToken, Compared, Nearest, ScanJob, Scanned
from upweight.index.codes import Codes
from upweight.index.scan import Scan
from upweight.index.shards import INDEX, MULTIPLE, TRANSFORM, Rows, filled
from upweight.index.transform import Transform, restored, transform, width_of
from upweight.index.verification import Verification, verification
from upweight.methods.fitted import Fitted
from upweight.methods.reduce import Matrix, Reducer, Top
from upweight.methods.scorer import TokenScores
from upweight.provenance import Provenance
from upweight.runtime.atomic import make_folder
from upweight.runtime.headers import Misfit, fitting, stale
from upweight.runtime.lock import claimed
from upweight.runtime.ranks import share_of
from upweight.runtime.selection import places, spaced
from upweight.runtime.store import FINISHED, Store
from upweight.scores import TopScores, Unit
from upweight.task.check import require_answerable
from upweight.task.data import Data
from upweight.task.identity import contents, described, model_described
from upweight.task.measures import Loss

AGAIN = (
    "the same Index.build(…), index.extend(…) or `upweight index build …`, which makes only what "
    "is missing"
)

BITS = 1
"""Of a number of a row, unless told otherwise."""

SIZE = 0.1
"""By how much the slope of `verify` may differ from 1 for products to have the size of scores."""

SHARD = 2048
"""Rows in a file: what an interruption may cost, and what several processes share out."""

SAMPLE = 128
"""Training examples over which the mean size of coordinates is taken."""

CANDIDATES = 20
"""How many times k examples of a scan are looked at again from their gradients, at each end."""

LOSS = Loss()


@dataclass(frozen=True)
class Part:
    """The rows start … stop − 1, from one call of `build` or `extend`; what they came from."""

    start: int
    stop: int
    source: str | None


@dataclass(frozen=True)
class _Facts:
    """What finished.json says of an index."""

    n: int
    parts: tuple[Part, ...]
    verified: Verification | None


class Index:
    """Rows v_i on disk with S[q, i] = −(1/n) ⟨V_q, gᵢ⟩ ≈ u_q · v_i.

    Of a method by layer, such as `Influence(EKFAC(), damping=…)`, v_i is a projection T of the
    whitened gradient, in few bits a number:

        v_i = σ⁻¹ ∘ T (w ∘ (Q_Gᵀ gᵢ Q_A))
        u_q = −(1/n) σ ∘ a ∘ T (w⁻¹ ∘ (Q_Gᵀ V_q Q_A))

    with V_q = (H + λ)⁻¹ ∇m_q as the method solves it, w = w_G ⊗ w_A ≈ (Λ + λ)^−½ and σ the root
    mean squares of what stands behind σ⁻¹. T keeps the coordinates of largest mean size one by one
    and a random projection of all others; a is a number for each of the two, from some training
    examples. Each axis is whitened and projected by itself, so that no gradient is formed in full.
    Of `LoGra` and `TRAK`, v_i = σ⁻¹ ∘ P gᵢ. n is
    that of the fit, also for rows of other examples: their S is the derivative in the weight of a
    further example, at weight 0.

    Made by `build` and `load`. Changed by `extend`; `verify` keeps in it what it found.

    Products of some of the coordinates may not have the size of scores: see `unit`. `top` takes the
    scores that it shows from gradients.

    Exact when: all coordinates are kept, in 32 bits.
    """

    def __init__(
        self,
        rows: Rows,
        transform: Transform,
        fitted: Fitted,
        held: list[tuple[int, Data]],
    ) -> None:
        self._rows = rows
        self._transform = transform
        self._held = held
        self._end = 0  # rows that were there when it was built, loaded or extended here
        self.fitted = fitted
        """The method that answers."""
        self.seconds: dict[str, float] = {}
        """Time spent on building it, by stage."""

    # -- making it --------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        fitted: Fitted,
        data: Any,
        folder: Folder,
        bytes_per_example: int = 4096,
        *,
        bits: int = BITS,
        queries: Any = None,
        sample: int = SAMPLE,
        shard: int = SHARD,
        source: str | None = None,
        shards: str = "1/1",
    ) -> "Index":
        """Write the rows of every example into a folder, or those that are not there yet.

        Interrupted, also by kill −9, the same call resumes; processes that call it at the same
        time share the work, each claiming a shard that nobody makes. The files are the same.

        Args:
            fitted: Whose scores.
            data: The examples, as for `as_data`; None: the training data of the fit. Where the
                folder has the rows of the first of them, only the others are made.
            folder: Where to; one folder per index.
            bytes_per_example: What the codes of a row may take. Where all coordinates take less,
                all are kept.
            bits: Of each number; 32 keeps float32.
            queries: Some like those to come, for the choice of coordinates: by the product of their
                mean sizes with those of the training examples. None: by the latter alone.
            sample: Over how many training examples these are taken.
            shard: Rows in a file.
            source: What the data are, to be read later: a file, a data set's name.
            shards: "i/m": only every m-th shard, from the i-th on, for schedulers that start m jobs
                on folders that know no locks. The last to end finishes the index; until then it has
                no answers.

        Raises:
            NotOffered: The method has no rows.
            SpecError: A row does not fit, or a size or share means nothing.
            StaleStore: The folder has the index of something else, or of other examples; or a file
                is damaged.
            NonFinite: A gradient is not finite. The shards before it are kept.
            NotWritten: The disk is full or not writable. The same.
            ModelChanged: The model is not what the method was fitted to.

        Cost: one pass over the data, with o k + i l + k l multiply-adds for each position of a
        layer [o, i] of which k × l numbers are made (8 of all layers for one of the sketch), where
        a plain pass takes 3 o i. The same for twice `sample` training examples, of which a quarter
        is asked about the others.
        """
        started = time.perf_counter()
        share, codes = share_of(shards), Codes(bits)
        _require_counts(bytes_per_example=bytes_per_example, sample=sample, shard=shard)
        with fitted.task.in_step():
            fitted._require_same_model()
            known = None if queries is None else fitted.task.queries(queries)
            most = _numbers(codes, bytes_per_example, width_of(fitted))
            chosen = "training" if known is None else f"training and queries {contents(known)}"
            description = {
                **_of_fit(fitted),
                "rows": f"at most {most} numbers, by mean sizes over {sample}, {chosen}; and a "
                "sketch",
                "codes": described(codes),
            }
            examples, place = _data(fitted, data), Path(folder)
            make_folder(place)
            meanwhile = fitted.task.meanwhile
            # One process chooses the coordinates.
            with claimed(place, INDEX, wait=True, meanwhile=meanwhile):
                store = _of_another(place, description)
                if store is None:
                    made = transform(fitted, most, known, sample, codes)
                    size = -(-shard // made.at_once) * made.at_once
                    begun = {"at_once": made.at_once, "shard": size, "bits": bits}
                    store = Store.open(place, description, begun=begun, again=AGAIN)
                    store.add(TRANSFORM, made.tensors())
            index = cls._opened(store, fitted, [(0, examples)])
            chose = time.perf_counter()
            index._add(examples, 0, source, share)
            index._end = len(examples)
            ended = time.perf_counter()
            index.seconds = {"coordinates": chose - started, "rows": ended - chose}
            return index

    @classmethod
    def load(cls, folder: Folder, fitted: Fitted, *data: Any) -> "Index":
        """The index of a folder.

        Args:
            folder: Where it is.
            fitted: The method of its scores, fitted to the same model; again, where it is another
                process.
            data: What it was built on and extended with, in that order, for scores from gradients;
                none: the training data of the fit.

        Raises:
            FileNotFoundError: There is none.
            StaleStore: It is of another model or method, or damaged.
            ShapeError: It is not finished, or has fewer rows than there are examples.
        """
        fitted._require_same_model()
        store = _kept(Path(folder))
        own = {key: store.description.get(key, "") for key in ("rows", "codes")}
        store.require({**_of_fit(fitted), **own})
        held, start = list[tuple[int, Data]](), 0
        for each in data or (None,):
            examples = _data(fitted, each)
            held.append((start, examples))
            start += len(examples)
        index = cls._opened(store, fitted, held)
        index._end = len(index)
        if start > index._end:
            raise ShapeError(
                "An index has a row of each example.",
                f"{index._end} rows in {store.directory} for {start} examples.",
                "data that were appended to since.",
                "index.extend(…) with the new ones, or Index.build(…) with all of them, which "
                "makes only the new rows.",
            )
        return index

    @classmethod
    def _opened(cls, store: Store, fitted: Fitted, held: list[tuple[int, Data]]) -> "Index":
        store = Store.load(store.directory, AGAIN)
        codes = Codes(store.begun["bits"])
        made = restored(fitted, store.mapped(TRANSFORM), store.directory)
        memory = fitted.resources.memory_bytes
        rows = Rows(store, codes, store.begun["shard"], store.begun["at_once"], memory)
        return cls(rows, made, fitted, held)

    def extend(self, data: Any, *, source: str | None = None, shards: str = "1/1") -> None:
        """Append the rows of further examples: those of a build in one go.

        They are that bit for bit, with as many threads, where a batch has one shape whatever is in
        it; examples that are padded to the longest of a batch may round otherwise. What is asked
        meanwhile sees the index as it was. Interrupted, the same call resumes; processes that had
        loaded the index before and make the same call share the work.

        Args:
            data: The new examples only.
            source: What they are.
            shards: As for `build`.

        Raises:
            As for `build`.

        Cost: one pass over the new examples.
        """
        share = share_of(shards)
        with self.fitted.task.in_step():
            self.fitted._require_same_model()
            examples, n = _data(self.fitted, data), self._end
            started = time.perf_counter()
            self._add(examples, n, source, share)
            if sum(len(each) for _, each in self._held) == n:
                self._held.append((n, examples))
            self._end = n + len(examples)
            self.seconds["rows"] = time.perf_counter() - started

    def require_examples(self, data: Any, offset: int) -> None:
        """That the rows from `offset` on are those of these examples; reads all of them.

        Raises:
            StaleStore: They are of others.
        """
        self._rows.require_same(_data(self.fitted, data), offset)

    def _add(self, data: Data, offset: int, source: str | None, share: tuple[int, int]) -> None:
        rows, n = self._rows, offset + len(data)
        finished = rows.store.facts
        told = None if finished is None else self._told
        if told is not None and offset == 0 and n < told.n:
            self._rows.fill(self._transform, data, 0, share)  # refuses others
            raise ShapeError(
                "An index is only appended to.",
                f"{n} examples for the {told.n} rows of {rows.store.directory}.",
                "fewer data than it was built on.",
                "Index.load(folder, fitted, …) asks it as it is; a part of it is built in another "
                "folder.",
            )
        rows.fill(self._transform, data, offset, share)
        before = () if told is None else told.parts
        start = before[-1].stop if before else 0
        parts = before if start == n else (*before, Part(start, n, source))
        rows.finish(n, asdict(_Facts(n, parts, None if told is None else told.verified)))

    # -- what it is -------------------------------------------------------------------------------

    @property
    def _told(self) -> _Facts:
        store = self._rows.store
        facts = store.require_finished()
        try:
            found: _Facts = fitting(facts, _Facts, "facts")
        except Misfit as misfit:
            way_out = f"delete the file and ask again: {AGAIN}; no row is made again."
            raise stale(store.directory / FINISHED, misfit, way_out) from misfit
        return found

    def __len__(self) -> int:
        """How many examples have a row.

        Raises:
            ShapeError: It is not finished.
        """
        return self._told.n

    @property
    def parts(self) -> tuple[Part, ...]:
        """What it was built on and extended with."""
        return self._told.parts

    @property
    def verified(self) -> Verification | None:
        """What `verify` last found."""
        return self._told.verified

    @property
    def unit(self) -> Unit:
        """What a product of rows means: the unit of the method where it is known to have its size.

        That is where all coordinates are kept, or `verify` found a slope within a tenth of 1;
        otherwise only the order within a row means anything.
        """
        found = self.verified
        has_size = found is not None and abs(found.slope - 1) <= SIZE
        is_whole = self.numbers == width_of(self.fitted)
        return self.fitted.spec.unit if is_whole or has_size else Unit.RANK

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._rows.store.directory

    @property
    def bits(self) -> int:
        """Of a number of a row."""
        return self._rows.codes.bits

    @property
    def numbers(self) -> int:
        """K, of a row."""
        return self._transform.width

    @property
    def bytes_per_example(self) -> int:
        """Of the codes of a row."""
        return self._rows.codes.bytes(self.numbers + -self.numbers % MULTIPLE)

    def __repr__(self) -> str:
        told = self._told
        checked = "not verified" if told.verified is None else str(told.verified)
        return (
            f"Index of {told.n} examples in {self.folder}\n"
            f"  rows: {self.numbers} {self._transform.kind} of {self.bits} bits, "
            f"{self.bytes_per_example} bytes\n  method: {self.fitted.spec!r}\n  {checked}"
        )

    # -- asking it --------------------------------------------------------------------------------

    def scores(
        self,
        queries: Any,
        measure: Callable[..., Tensor] = LOSS,
        *,
        into: Reducer | None = None,
    ) -> Any:
        """Ŝ[q, i] = u_q · v_i of every query and example, or what is kept of it.

        Args:
            queries: As for `Fitted.attribute`.
            measure: The same.
            into: The same.

        Returns:
            As there: `Scores` for `Matrix()`, the default. Their unit is `Index.unit`.

        Raises:
            UpweightError: As there, or what is to be kept does not fit into memory.
            ShapeError: The index is not finished.
            StaleStore: A file is damaged.

        Cost: q solves, and one reading of the index; of the first question also its hash. Memory:
        one shard; all of them stay mapped for the next question where they take no more than the
        fit's memory, a quarter of what is free unless told otherwise.
        """
        into = Matrix() if into is None else into
        _, train = self._held[0]
        only = train if len(self._held) == 1 and len(train) == len(self) else None
        digest = {"index": self._rows.store.digest}
        scanned = Scanned(*self._asked(), into, digest, only, self.unit)
        return self.fitted.attribute(queries, measure, into=scanned)

    def top(
        self,
        queries: Any,
        k: int = 10,
        measure: Callable[..., Tensor] = LOSS,
        *,
        rerank: bool = True,
        candidates: int | None = None,
    ) -> TopScores:
        """The k examples that raise and the k that lower each measurement most.

        A scan of all rows proposes candidates; their scores are then taken from their gradients, as
        `Fitted.attribute` takes them, without its tolerance. So the scores are those of the method,
        and an example is missed only where the scan did not propose it: see `verify`.

        Args:
            queries: As for `Fitted.attribute`.
            measure: The same.
            k: How many of each.
            rerank: Whether candidates are looked at again. Without, scores are products of rows.
            candidates: How many at each end of each query; None: 20 k.

        Raises:
            MissingContext: The data of a candidate are not at hand.
            StaleStore: They are not what its row was made of, or a file is damaged.
            UpweightError: As for `scores`.

        Cost: that of `scores`, and a gradient of each candidate of any query.
        """
        if not rerank:
            return self.scores(queries, measure, into=Top(k))
        wanted = CANDIDATES * k if candidates is None else candidates
        if isinstance(wanted, Integral) and isinstance(k, Integral) and wanted < k:
            raise SpecError(
                "The best k are chosen among at least k candidates.",
                f"k={k} of {wanted} candidates.",
                "the two numbers in each other's place.",
                f"candidates={CANDIDATES * k}, or leave it out.",
            )
        Top(k)
        best = Best(*self._asked(), (), self._held, wanted, k, self._at_hand)
        return self.fitted.attribute(queries, measure, into=best)

    def tokens(
        self, queries: Any, examples: Sequence[int], measure: Callable[..., Tensor] = LOSS
    ) -> TokenScores:
        """The scores of some indexed examples from their gradients, position by position.

        As `PerToken(examples)` of `Fitted.attribute`, also of examples that the method was not
        fitted to.

        Args:
            queries: As for `Fitted.attribute`.
            examples: Which.
            measure: The same.

        Returns:
            Shares `[q, k, t]` and what has no position `[q, k]`, of the examples in their order.

        Raises:
            MissingContext: Their data are not at hand.
            NotOffered: The method is not by layer.
            UpweightError: As for `scores`, or nothing is used at several positions.

        Cost: that of the queries' solves, and a gradient of each of the examples, at once.
        """
        chosen = places(examples, len(self), "Examples", least=1)
        ascending = self._at_hand(sorted(chosen))
        asked = ByToken(*self._asked(), ascending, self._held)
        found: TokenScores = self.fitted.attribute(queries, measure, into=asked)
        order = [ascending.index(i) for i in chosen]
        return TokenScores(found.shares[:, order], found.rest[:, order])

    def nearest(
        self,
        query: Any,
        count: int = 40,
        measure: Callable[..., Tensor] = LOSS,
        *,
        raises: bool = False,
    ) -> tuple[list[int], TokenScores]:
        """The first examples of the scan for one query, with their scores position by position.

        `scores` and `tokens` in one question, for who waits for the answer: the query is checked
        and solved once.

        Args:
            query: One query.
            count: How many examples.
            measure: As for `Fitted.attribute`.
            raises: Whether those that raise the measurement most, in place of lower it.

        Returns:
            Their places in ascending order, and the shares of their scores.

        Raises:
            ShapeError: There are several queries.
            UpweightError: As for `tokens`.

        Cost: a solve, one reading of the index, and the gradients of the examples, at once.
        """
        _require_counts(count=count)
        asked = self.fitted.task.queries(query)
        if len(asked) != 1:
            raise ShapeError(
                "The first examples of a scan are those of one query.",
                f"{len(asked)} queries.",
                "a whole set of queries.",
                "ask for one after the other; or top(queries, k) for the scores alone.",
            )
        self._at_hand([len(self) - 1])
        nearest = Nearest(*self._asked(), (), self._held, count, raises)
        return self.fitted.attribute(asked, measure, into=nearest)

    def scan_seconds(self) -> float:
        """How long a scan of all rows takes for one query, measured now.

        The first reading, which compares the files with their hashes, is not timed.

        Raises:
            StaleStore: A file is damaged.
        """
        n, asked = len(self), Scan(filled(torch.ones(1, self.numbers)), self._rows.codes)
        scan = ScanJob(0, asked, self._rows, n, torch.float32)
        taken = 0.0
        for _ in range(2):
            started = time.perf_counter()
            scan.block(0, n)
            taken = time.perf_counter() - started
        return taken

    def verify(
        self,
        queries: Any,
        examples: int | Sequence[int] = 200,
        measure: Callable[..., Tensor] = LOSS,
        k: int = 10,
    ) -> Verification:
        """How well the products agree with the scores from gradients, on some examples.

        Kept with the index, and said in the provenance of its answers from then on.

        Args:
            queries: As for `Fitted.attribute`.
            measure: The same.
            examples: How many, evenly spaced; or which.
            k: Of the recall.

        Raises:
            MissingContext: Their data are not at hand.
            NotWritten: The folder is not writable.
            UpweightError: As for `scores`.

        Cost: a gradient of each of the examples, and their rows.
        """
        n = len(self)
        if isinstance(examples, int):
            _require_counts(examples=examples)
            chosen = spaced(n, examples)
        else:
            chosen = sorted(places(examples, n, "Examples", least=1))
        _require_counts(k=k)
        compared = Compared(*self._asked(), self._at_hand(chosen), self._held)
        both = self.fitted.attribute(queries, measure, into=compared)
        found = verification(both[..., 1], both[..., 0], k, n)
        store = self._rows.store
        with claimed(store.directory, INDEX, wait=True):
            told = replace(self._told, verified=found)
            store.finish(asdict(told), store.names())
        return found

    def _at_hand(self, chosen: Sequence[int]) -> Sequence[int]:
        """The same examples, in ascending order, whose data are held."""
        last, data = self._held[-1]
        if chosen and chosen[-1] >= last + len(data):
            raise MissingContext(
                "Scores from gradients need the data of the examples.",
                f"example {chosen[-1]}, with data of the first {last + len(data)}.",
                "an index that was extended, loaded without the data that it was extended with.",
                "Index.load(folder, fitted, data, more, …) with all of them in order; or "
                "top(..., rerank=False), which needs none.",
            )
        return chosen

    def _asked(self) -> tuple[Rows, Transform, int, Callable[[Provenance], Provenance]]:
        return self._rows, self._transform, len(self), self._told_of

    def _told_of(self, provenance: Provenance) -> Provenance:
        """With what is known of the index."""
        checked = self.verified
        health = {
            "index_rows": len(self),
            "index_numbers": self.numbers,
            "index_bits": self.bits,
            "index_bytes_per_example": self.bytes_per_example,
            **{f"index_{name}": value for name, value in self._transform.facts.items()},
        }
        note = f"an index of {len(self)} rows of {self.bytes_per_example} bytes"
        if checked is None:
            note += ", not verified: index.verify(queries)"
        else:
            note += f"; {checked}"
            health |= {f"index_{name}": value for name, value in asdict(checked).items()}
        every = (*provenance.notes, note)
        return replace(provenance, health={**provenance.health, **health}, notes=every)


def _kept(folder: Path) -> Store:
    """The store of a folder; a FileNotFoundError that says what to do where there is none."""
    try:
        return Store.load(folder, AGAIN)
    except FileNotFoundError:
        lacks = "which has no manifest.json" if folder.is_dir() else "which is no folder"
        raise FileNotFoundError(
            message(
                "An index is a folder that Index.build has written.",
                f"{folder}, {lacks}.",
                "another folder, or a file that was removed.",
                f"the folder of an index; or, for one of which a file is missing, {AGAIN}.",
            )
        ) from None


def _of_another(folder: Path, description: Mapping[str, str]) -> Store | None:
    """The store of a folder, if it has this index; None where it has none. Another is refused."""
    try:
        found = Store.load(folder, AGAIN)
    except FileNotFoundError:
        return None
    if found.names():
        found.require(description)
    return found if found.path(TRANSFORM).exists() else None


def _of_fit(fitted: Fitted) -> dict[str, str]:
    """What rows depend on, but for the examples that they are of."""
    task = fitted.task
    history = {} if fitted.history is None else {"history": described(fitted.history)}
    return {
        "method": described(fitted.spec),
        "loss": described(task.loss),
        "penalty": described(task.penalty),
        "parameters": repr(task.layout),
        "forward": described(task.forward),
        "model": model_described(task),
        "training examples": str(len(fitted.train)),
        **history,
    }


def _data(fitted: Fitted, data: Any) -> Data:
    if data is None:
        return fitted.train
    found = fitted.task.training(data)
    require_answerable(fitted.task, found, "examples of an index")
    return found.watched()


def _numbers(codes: Codes, bytes_per_example: int, width: int) -> int:
    """How many numbers fit: a multiple of `MULTIPLE`, or all that there are."""
    beside = codes.bytes(0)
    numbers = (bytes_per_example - beside) // (codes.bytes(MULTIPLE) - beside) * MULTIPLE
    if numbers < MULTIPLE:
        raise SpecError(
            f"A row has at least {MULTIPLE} numbers.",
            f"bytes_per_example={bytes_per_example} with {codes.bits} bits each.",
            "a number of kilobytes, or of numbers, in place of bytes.",
            f"bytes_per_example={codes.bytes(MULTIPLE)} or more; 4096 is the default.",
        )
    return min(numbers, width)


def _require_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise SpecError(
                f"{name} is a whole number from 1 on.",
                f"{name}={value!r}.",
                "a share in place of a number, or 0.",
                f"leave {name}= out for the default.",
            )
