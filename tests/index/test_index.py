"""An index: the product of two rows is the score, whoever built the files and however often."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import upweight as uw
from tests.market import problem
from tests.runtime.damage import DAMAGES
from upweight.errors import (
    MissingContext,
    NonFinite,
    NotOffered,
    NotWritten,
    ShapeError,
    SpecError,
    StaleStore,
)
from upweight.gradients.factored import Formed, Tokens
from upweight.gradients.passes import GradientPass
from upweight.index import transform as transforms
from upweight.index.asking import FromIndex
from upweight.index.codes import Codes
from upweight.index.index import _numbers
from upweight.index.transform import (
    BlockCoordinates,
    Folded,
    axes_of,
    fold_into,
    restored,
    separable,
    transform,
    turned,
)
from upweight.methods.reduce import Sink
from upweight.runtime.store import Store
from upweight.scoring.stream import training_loss

METHOD = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1), tolerance=0.0)
ALL = 10**6
NAME = "mlp_tanh"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Of four examples, so that a shard of eight has two."""
    monkeypatch.setattr(transforms, "MOST_EXAMPLES", 4)


@pytest.fixture(scope="module")
def fitted():
    p = problem(NAME)
    return METHOD.fit(p.task, p.train)


def asked():
    """Queries."""
    return problem(NAME).queries


def corpus(n=29):
    """Examples like those of the training data; each is another."""
    X, y = problem(NAME).train
    draw = torch.Generator().manual_seed(0)
    at = torch.randint(len(X), (n,), generator=draw)
    return X[at] + torch.randn(n, *X.shape[1:], generator=draw, dtype=X.dtype), y[at]


def part(data, start, stop=None):
    return tuple(each[start:stop] for each in data)


def hashes(folder):
    """Of every file of numbers."""
    paths = folder.glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def build(fitted, data, folder, limit=100, **more):
    return uw.Index.build(fitted, data, folder, limit, **{"bits": 8, "shard": 8, **more})


class Queries(Sink):
    """u_q of the queries of a question."""

    def __init__(self, made):
        self.made, self.rows = made, []

    def missing(self, job, n):
        self.rows.append(self.made.of_query(job))
        return []

    def result(self, answer):
        return torch.cat(self.rows)


class Asked(FromIndex):
    """A question that is answered by them."""

    def begin(self, sweep):
        return Queries(self.transform)


METHODS = {
    "EK-FAC": METHOD,
    "no bases": uw.GradientDot(),
    "two sides": uw.LoGra(rank=2),
    "a sketch": uw.TRAK(dim=16),
}


@pytest.mark.parametrize(
    "method, name",
    [
        ("EK-FAC", "tied"),
        ("EK-FAC", "conv"),
        ("no bases", "tied"),
        ("two sides", "tied"),
        ("a sketch", "mlp_tanh"),
    ],
)
def test_the_product_of_two_rows_is_the_score(method, name):
    """In float64, of all coordinates, also of a transform that was read back."""
    p = problem(name)
    fitted = METHODS[method].fit(p.task, p.train)
    made = transform(fitted, ALL, None, 8, Codes(32))
    tensors = dict(made.tensors())
    made = restored(fitted, tensors, "folder")
    if tensors.pop("gains", None) is not None:
        with pytest.raises(StaleStore, match="coordinates alone"):
            restored(fitted, tensors, "folder")
    u = fitted.attribute(p.queries, into=Asked(None, made, 0, None))
    data = fitted.train
    with GradientPass(made.plan, made.theta) as passes:
        batch = data.batch(0, len(data))
        v = made.of_example(passes.of(training_loss(p.task), batch, len(data)))
    S = fitted.attribute(p.queries).values
    torch.testing.assert_close(u @ v.mT, S, rtol=1e-10, atol=1e-12 * float(S.abs().max()))


def rows_of(made, data):
    """T g of all of them."""
    with GradientPass(made.plan, made.theta) as passes:
        factors = passes.of(training_loss(made.plan.task), data.batch(0, len(data)), len(data))
        return made.of_example(factors)


def test_the_largest_coordinates_are_kept_and_the_others_sketched(monkeypatch):
    """By brute force over all of them; with queries, by the product of the two mean sizes."""
    monkeypatch.setattr(transforms, "SKETCHED", 0.5)
    p = problem("tied")
    fitted = METHOD.fit(p.task, p.train)
    every, queries = transform(fitted, ALL, None, ALL, Codes(32)), p.task.queries(p.queries)
    whole, other = (rows_of(every, data) * every.spread for data in (fitted.train, queries))
    own = whole.abs().mean(dim=0)
    assert bool((own[:-1] >= own[1:] - 1e-12).all())  # largest first
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double() / 2**0.5
    H = torch.kron(two, torch.kron(two, two))
    for known, by in ((None, own), (queries, own * other.abs().mean(dim=0))):
        made, best = transform(fitted, 16, known, ALL, Codes(32)), by.argsort(descending=True)[:8]
        few = rows_of(made, fitted.train)
        assert (made.width, made.sketched) == (16, 8)
        torch.testing.assert_close(few[:, :8] * made.spread[:8], whole[:, best])
        torch.testing.assert_close(few[:, :8].square().mean(dim=0), torch.ones(8).double())
        rest = whole.index_fill(1, best, 0.0)[:, every.order.argsort()]  # in the order of blocks
        sums = rest.new_zeros(len(rest), 8)
        sums.index_add_(1, torch.arange(rest.shape[1]) % 8, rest)
        torch.testing.assert_close(few[:, 8:] * made.spread[8:], sums @ H)


@pytest.mark.parametrize("start", [0, 3])
def test_products_of_sketches_are_right_in_the_mean_over_signs(start):
    """Of all 2⁷ draws; and exact of as many numbers as there are others."""

    def sketch(rows, size):
        sums = rows.new_zeros(len(rows), size)
        fold_into(sums, rows, start)
        return turned(sums)

    x, y = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).double()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 7)
    a, b = (sketch(signs * each, 4) for each in (x, y))
    torch.testing.assert_close((a * b).sum(dim=1).mean(), x @ y)
    a, b = (sketch(each[None], 8) for each in (x, y))
    torch.testing.assert_close((a * b).sum(), x @ y)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (26, 5)])
def test_products_of_projected_axes_are_right_in_the_mean(shape, monkeypatch):
    """Within 4 standard errors over draws, for two axes turned, and for one that is too long."""
    monkeypatch.setattr(transforms, "NARROW", 2)
    g = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(d, d, generator=g).double()).Q for d in shape]
    values = torch.rand(shape, generator=g).double() ** 4
    gradient, V = torch.randn(2, *shape, generator=g).double()
    found = []
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        axes = axes_of(values, bases, 0.1, 9, draw, torch.float64)
        block = BlockCoordinates(axes, torch.zeros(0, dtype=torch.int64))
        assert block.size < gradient.numel() and (max(shape) < 20 or isinstance(axes[0], Folded))
        # As one matrix, and position by position.
        v = block(Formed(gradient[None]))
        each = Tokens(gradient.mT[None], torch.eye(shape[1]).double()[None])
        torch.testing.assert_close(v, block._of_positions(each).flatten(1))
        found.append(float((v * block.of_solved(V[None])).sum()))
    each = torch.tensor(found).double()
    error = float(each.std()) / len(each) ** 0.5
    assert error > 0 and abs(float(each.mean()) - float((gradient * V).sum())) < 4 * error


def test_weights_of_two_axes_are_those_of_the_least_variance():
    """Exact where Λ is an outer product; else no other weights of an axis are better."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, generator=g).double(), torch.rand(4, generator=g).double()
    left, right = separable(x[:, None] * y, 0.0)
    torch.testing.assert_close(
        (left[:, None] * right).square() * x[:, None] * y, torch.ones(6, 4).double()
    )
    values = torch.rand(6, 4, generator=g).double() ** 3

    def variance(left, right):
        weights = (left[:, None] * right).square()
        whole = values + 0.1
        return float((values * weights).sum() * (values / whole**2 / weights).sum())

    left, right = separable(values, 0.1)
    least = variance(left, right)
    for _ in range(20):
        others = (w * (1 + 0.1 * torch.randn(len(w), generator=g).double()) for w in (left, right))
        assert variance(*others) > least


def test_an_axis_much_longer_than_the_other_is_left_as_it_is():
    """Λ is the second moment of its entries there; products of all coordinates stay exact."""
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(30, 3, generator=g).double(), torch.randint(40, (30,), generator=g)
    fitted = METHOD.fit(uw.Task(nn.Linear(3, 40).double(), uw.CrossEntropy()), (X, y))
    (block,) = fitted.scorer.curvature.blocks  # [40, 3 + 1]
    (mine,) = transforms._every(fitted.scorer, 0)
    left, right = mine.axes
    Q, R = block.eigen.bases
    H = torch.kron(Q, R) @ torch.diag(block.eigen.values.flatten()) @ torch.kron(Q, R).mT
    turn = torch.kron(torch.eye(40).double(), R)
    moments = (turn.mT @ H @ turn).diagonal().reshape(40, 4)
    a, b = separable(moments, block.damping)
    torch.testing.assert_close(left.weights.abs(), a)
    torch.testing.assert_close(
        right.example.square().sum(dim=0).sort().values, b.square().sort().values
    )
    made = transform(fitted, ALL, None, 8, Codes(32))
    u = fitted.attribute((X[:2], y[:2]), into=Asked(None, made, 0, None))
    S = fitted.attribute((X[:2], y[:2])).values
    torch.testing.assert_close(u @ rows_of(made, fitted.train).mT, S, rtol=1e-9, atol=1e-12)


def test_gains_give_products_the_size_of_scores():
    """Of least squares, then divided by their own slope; by brute force on the same examples."""
    torch.manual_seed(0)
    X, y = torch.randn(48, 12).double(), torch.arange(48) % 3
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    fitted = METHOD.fit(uw.Task(model, uw.CrossEntropy()), (X, y))
    made = transform(fitted, 64, None, ALL, Codes(32))
    asked, others = list(range(0, 48, 4)), [i for i in range(48) if i % 4]
    u = fitted.attribute((X[asked], y[asked]), into=Asked(None, made, 0, None))
    v, k = rows_of(made, fitted.train)[others], len(made.order)
    S = fitted.attribute((X[asked], y[asked])).values[:, others]
    products = u @ v.mT
    assert float((products * S).sum() / S.square().sum()) == pytest.approx(1, rel=1e-6)
    shares = torch.stack([(u[:, a] @ v[:, a].mT).flatten() for a in (slice(k), slice(k, None))])
    assert made.gains.min() > 0 and not made.gains.equal(torch.ones(2).double())
    gram, found = shares @ shares.mT, shares @ S.flatten()
    best = torch.linalg.solve(gram, found)  # of what has the gains already: the same number twice
    assert float(best[0]) == pytest.approx(float(best[1]), rel=1e-4)


def test_an_index_answers_as_the_method_does(fitted, tmp_path, monkeypatch):
    """Scores to rounding; the best k exactly, also where eight bits order them otherwise."""
    queries = asked()
    truth = fitted.attribute(queries)
    exact = build(fitted, None, tmp_path / "all", ALL, bits=32)
    found = exact.scores(queries, uw.Loss())
    torch.testing.assert_close(found.values, truth.values, rtol=1e-5, atol=1e-7)
    assert found.unit is truth.unit and found.context.train is fitted.train
    sums = exact.scores(queries, into=uw.GroupSums([i % 2 for i in range(18)])).values
    torch.testing.assert_close(sums[:, 0], found.values[:, ::2].sum(dim=1))
    stored = exact.scores(queries, into=uw.Shards(tmp_path / "kept"))
    assert torch.equal(stored[:], found.values)

    few = build(fitted, None, tmp_path / "few", 68)
    assert few.bytes_per_example <= 68 and few.numbers == exact.numbers
    asked_for, attribute = [], type(fitted).attribute

    def counted(*given, **named):
        asked_for.append(given)
        return attribute(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(type(fitted), "attribute", counted)
        best, top = truth.top(2), few.top(queries, 2, candidates=4)
    assert len(asked_for) == 1  # scanned and scored by the same solved queries
    assert top.top().raises == best.raises and top.top().lowers == best.lowers
    at = truth.values.gather(1, top.raises)
    torch.testing.assert_close(top.raises_by, at, rtol=1e-12, atol=0)
    rough = few.top(queries, 2, rerank=False)
    scanned = few.scores(queries).values.gather(1, rough.raises)
    assert torch.equal(rough.raises_by, scanned)
    assert not torch.allclose(scanned, truth.values.gather(1, rough.raises), rtol=1e-6)
    assert any("candidates" in note for note in top.provenance.notes)


def test_products_of_some_coordinates_have_no_size_until_verify_finds_it(tmp_path):
    draw = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 12, generator=draw), torch.arange(40) % 3
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))  # 259 parameters
    task = uw.Task(model, uw.CrossEntropy())
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, (X, y))
    index, queries = build(fitted, None, tmp_path, 68), (X[:3], y[:3])
    assert index.numbers == 64 and index.scores(queries).unit is uw.Unit.RANK
    assert index.top(queries, 2).unit is uw.Unit.DERIVATIVE  # from gradients
    slope = index.verify(queries, examples=40).slope
    assert slope < 0.9 and index.scores(queries).unit is uw.Unit.RANK


def test_what_verify_says_is_so_and_is_kept(fitted, tmp_path):
    queries, data = asked(), corpus()
    index = build(fitted, data, tmp_path)
    assert index.verified is None
    assert any("not verified" in note for note in index.scores(queries).provenance.notes)
    said = index.verify(queries, examples=range(0, 29, 4), k=3)
    products = index.scores(queries).values[:, ::4]
    # Further examples: the derivative in a weight that is 0.
    scores = torch.cat(
        [fitted.label_influence(part(data, i, i + 1), [int(data[1][i])], queries)[:, 0]
         for i in range(0, 29, 4)], dim=1,
    )  # fmt: skip
    assert said.slope == pytest.approx(float((products * scores).sum() / scores.square().sum()))
    ranks = [x.argsort(dim=1).argsort(dim=1).double() for x in (products, scores)]
    spearman = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True)]
    assert said.spearman == pytest.approx(sum(spearman) / len(spearman))
    best = [x.abs().topk(3, dim=1).indices.tolist() for x in (products, scores)]
    shared = [len(set(a) & set(b)) / 3 for a, b in zip(*best, strict=True)]
    assert said.recall == pytest.approx(sum(shared) / len(shared))
    again = uw.Index.load(tmp_path, fitted, data)
    assert again.verified == said and str(said) in repr(again)
    assert again.scores(queries).provenance.health["index_spearman"] == said.spearman


def test_of_one_example_there_is_no_correlation_and_verify_says_so(fitted, tmp_path):
    index = build(fitted, corpus(), tmp_path)
    said = index.verify(asked(), examples=[3])
    assert (said.spearman, said.pearson) == (None, None)
    assert "no correlation (it needs several examples whose scores differ)" in str(said)
    again = uw.Index.load(tmp_path, fitted, corpus())
    assert again.verified == said and str(said) in repr(again)
    assert again.scores(asked()).provenance.health["index_spearman"] is None


# -- who builds it, and how often -----------------------------------------------------------------


def test_appending_gives_the_files_of_a_build_in_one_go(tmp_path, monkeypatch):
    """Whoever reads meanwhile sees the index as it was."""
    torch.manual_seed(0)  # large enough to round by the size of a batch, in float32
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 10))
    data = torch.randn(29, 40), torch.arange(29) % 10
    fitted, queries = METHOD.fit(uw.Task(model, uw.CrossEntropy()), data), part(data, 0, 3)
    whole = build(fitted, data, tmp_path / "whole", ALL, bits=32, source="all of it")
    index = build(fitted, part(data, 0, 13), tmp_path / "parts", ALL, bits=32)
    reader = uw.Index.load(tmp_path / "parts", fitted, part(data, 0, 13))
    before, add = reader.scores(queries).values, Store.add

    def added(store, name, tensors):
        add(store, name, tensors)
        assert torch.equal(reader.scores(queries).values, before) and len(reader) == 13

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", added)
        index.extend(part(data, 13, 24), source="more")
    index.extend(part(data, 24))
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
    assert [(p.start, p.stop, p.source) for p in index.parts] == [
        (0, 13, None), (13, 24, "more"), (24, 29, None),
    ]  # fmt: skip
    a, b = index.top(queries, 3), whole.top(queries, 3)
    assert torch.equal(a.raises, b.raises) and torch.equal(a.lowers, b.lowers)
    torch.testing.assert_close(a.raises_by, b.raises_by)  # as gradients of other batches
    late = uw.Index.load(tmp_path / "whole", fitted)
    late._end = 13  # as if it had been loaded before the others appended
    late.extend(part(data, 13))
    assert len(late) == 29
    # Data that grew: what is there is compared, the rest is made.
    grown = build(fitted, part(data, 0, 13), tmp_path / "grown", ALL, bits=32)
    assert len(grown) == 13 and len(build(fitted, data, tmp_path / "grown", ALL, bits=32)) == 29
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork")
def test_processes_share_a_build_and_take_over_from_one_that_was_killed(fitted, tmp_path):
    data = corpus()
    build(fitted, data, tmp_path / "alone")
    context, folder = multiprocessing.get_context("fork"), tmp_path / "shared"

    def work(slow=False):
        add = Store.add

        def added(store, name, tensors):
            time.sleep(30 if slow and name.startswith("rows-0000000008") else 0)
            add(store, name, tensors)

        Store.add = added
        build(fitted, data, folder)
        os._exit(0)

    first = context.Process(target=work, args=(True,))
    first.start()
    deadline = time.monotonic() + 30  # it comes to hold the claim of its second shard, and waits
    while not list(folder.glob("rows-0*-*8.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    others = [context.Process(target=work) for _ in range(2)]
    for other in others:
        other.start()
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGKILL)
    for each in (first, *others):
        each.join(30)
    assert [each.exitcode for each in (first, *others)] == [-signal.SIGKILL, 0, 0]
    assert hashes(folder) == hashes(tmp_path / "alone")


def test_jobs_that_know_no_locks_take_shares(fitted, tmp_path):
    data = corpus()
    build(fitted, data, tmp_path / "alone")
    second = build(fitted, data, tmp_path / "shares", shards="2/2")
    with pytest.raises(ShapeError, match=r"Index\.build"):
        second.scores(asked())
    assert len(build(fitted, data, tmp_path / "shares", shards="1/2")) == 29
    assert hashes(tmp_path / "shares") == hashes(tmp_path / "alone")


def test_a_full_disk_and_a_gradient_that_is_not_finite_keep_what_is_there(
    fitted, tmp_path, monkeypatch
):
    data, made = corpus(), []
    write = Store.add

    def full(self, name, tensors, *given):
        made.append(name)
        if len(made) == 4:
            raise NotWritten("A file must be written.", "no room", "a full disk", "free space")
        return write(self, name, tensors, *given)

    monkeypatch.setattr(Store, "add", full)
    with pytest.raises(NotWritten):
        build(fitted, data, tmp_path)
    kept = hashes(tmp_path)
    assert len(kept) == 3 and len(build(fitted, data, tmp_path)) == 29
    assert kept.items() <= hashes(tmp_path).items()
    assert len(made) == 4 + 2  # the transform and two shards were not made again


def test_a_row_that_is_not_finite_is_named_and_those_before_it_are_kept(fitted, tmp_path):
    X, y = corpus()
    wrong = X.clone()
    wrong[20] = torch.nan
    with pytest.raises(NonFinite, match="row of example 20"):
        build(fitted, (wrong, y), tmp_path)
    kept = hashes(tmp_path)
    build(fitted, (torch.cat([X[:20], X[21:]]), torch.cat([y[:20], y[21:]])), tmp_path)
    assert len(kept) == 3 and kept.items() <= hashes(tmp_path).items()


def test_as_many_numbers_are_kept_as_fit():
    codes = Codes(8)
    for limit in (68, 131, 132, 200, 4096):
        most = _numbers(codes, limit, 10**6)
        assert codes.bytes(most) <= limit < codes.bytes(most + 64)
    assert _numbers(codes, 4096, 50) == 50


# -- what is refused ------------------------------------------------------------------------------


def test_an_index_without_its_manifest_says_what_to_do_and_that_works(fitted, tmp_path):
    before = build(fitted, corpus(), tmp_path / "index").scores(asked()).values
    (tmp_path / "index" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest.json(.|\n)*same Index.build"):
        uw.Index.load(tmp_path / "index", fitted, corpus())
    with pytest.raises(FileNotFoundError, match=r"no folder(.|\n)*folder of an index"):
        uw.Index.load(tmp_path / "elsewhere", fitted, corpus())
    build(fitted, corpus(), tmp_path / "index")
    found = uw.Index.load(tmp_path / "index", fitted, corpus()).scores(asked()).values
    assert torch.equal(found, before)


def test_a_damaged_shard_is_never_scanned(fitted, tmp_path):
    folder = tmp_path / "whole"
    index = build(fitted, corpus(), folder)
    before = index.scores(asked()).values  # its hash is known; the file then changes
    name = "rows-0000000008-0000000016.safetensors"
    for kind in ("one bit", "cut", "no hash"):
        shutil.copytree(folder, tmp_path / kind)
        DAMAGES[kind](tmp_path / kind / name)
        with pytest.raises(StaleStore, match="delete the file and ask again"):
            uw.Index.load(tmp_path / kind, fitted, corpus()).scores(asked())
    DAMAGES["one bit"](folder / name)
    with pytest.raises(StaleStore, match="delete the file and ask again"):
        index.scores(asked())
    (folder / name).unlink()  # the way out
    assert torch.equal(build(fitted, corpus(), folder).scores(asked()).values, before)


def test_shards_stay_mapped_only_where_all_fit_into_memory(fitted, tmp_path):
    index = build(fitted, corpus(), tmp_path)

    def held() -> list[bool]:
        known = index._rows.store.known.items()
        return [tensors is not None for file, (_, tensors) in known if "rows" in file]

    before = index.scores(asked()).values
    index.top(asked(), 2)  # also reads the checksums of some shards
    assert held()
    assert all(held())
    index._rows = replace(index._rows, memory_bytes=1)
    assert torch.equal(index.scores(asked()).values, before)
    assert held()
    assert not any(held())


def test_other_data_and_other_methods_are_refused(fitted, tmp_path):
    queries, data = asked(), corpus()
    build(fitted, data, tmp_path)
    changed = (data[0].clone(), data[1].clone())
    changed[1][20] = (changed[1][20] + 1) % 2
    with pytest.raises(StaleStore, match="example 20 was another"):
        build(fitted, changed, tmp_path)
    index = uw.Index.load(tmp_path, fitted, changed)
    index.scores(queries)  # of rows, which are of the data as they were
    with pytest.raises(StaleStore, match="example 20 was another"):
        index.top(queries, 29)
    with pytest.raises(ShapeError, match="only appended to"):
        build(fitted, part(data, 0, 10), tmp_path)
    with pytest.raises(ShapeError, match=r"index\.extend"):
        uw.Index.load(tmp_path, fitted, data, part(data, 0, 1))
    part_of_it = uw.Index.load(tmp_path, fitted, part(data, 0, 10))
    with pytest.raises(MissingContext, match="rerank=False"):
        part_of_it.top(queries, 29)
    part_of_it.top(queries, 29, rerank=False)
    with pytest.raises(StaleStore, match="another codes"):
        build(fitted, data, tmp_path, 300, bits=32)
    p = problem(NAME)
    other = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.2)).fit(p.task, p.train)
    for ask in (build, lambda f, d, folder: uw.Index.load(folder, f, d)):
        with pytest.raises(StaleStore, match="another method"):
            ask(other, data, tmp_path)
    with pytest.raises(FileNotFoundError):
        uw.Index.load(tmp_path / "nowhere", fitted)


@pytest.mark.parametrize(
    "method",
    [
        uw.Influence(damping=0.1),
        uw.GradientCosine(),
        uw.TRAK(dim=16, threshold=0.1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_methods_without_rows_are_refused_by_name(method, tmp_path):
    p = problem("mlp_tanh")
    fitted = method.fit(p.task, p.train)
    with pytest.raises(NotOffered, match=type(method).__name__):
        build(fitted, None, tmp_path)


@pytest.mark.parametrize(
    "given, error",
    [
        ({"bytes_per_example": 10}, "at least 64 numbers"),
        ({"bytes_per_example": 1.5}, "whole number"),
        ({"sample": 0}, "sample"),
        ({"shards": "0/2"}, "1/4"),
        ({"bits": 7}, "bits"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, error, fitted, tmp_path):
    with pytest.raises(SpecError, match=error):
        uw.Index.build(fitted, None, tmp_path, **given)
