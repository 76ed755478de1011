"""DataInf against its formula by hand, and exact for one example."""

import pytest
import torch
from torch import nn

import upweight as uw
from tests.laws.subjects import assert_same
from tests.market import problem
from upweight.errors import DtypeError, NonFinite, NotPositiveDefinite, UnsupportedModel
from upweight.testing import check_method
from upweight.testing.problems import ridge

pytestmark = pytest.mark.filterwarnings("ignore::upweight.errors.AssumptionWarning")


def gradients(task, data):
    """∇ℓ of every example by autograd, one at a time, by parameter."""
    rows = []
    for i in range(len(data[0])):
        params = {k: v.clone().requires_grad_() for k, v in task.named(task.theta()).items()}
        one = task.losses(params, tuple(d[i : i + 1] for d in data)).sum()
        rows.append(dict(zip(params, torch.autograd.grad(one, list(params.values())), strict=True)))
    return {k: torch.stack([row[k].flatten() for row in rows]) for k in rows[0]}


def by_hand(task, train, queries, layers, factor=None, lam=None):
    """−(1/n) Σ_l v_lᵀ mean_i[(gᵢgᵢᵀ + λ_l I)⁻¹] g_l with inverses formed in full."""
    g, v = gradients(task, train), gradients(task, queries)
    n, total = len(train[0]), 0.0
    for names in layers:
        gl, vl = (torch.cat([x[name] for name in names], dim=1) for x in (g, v))
        own = factor * float(gl.square().mean()) if lam is None else lam
        eye = torch.eye(gl.shape[1], dtype=gl.dtype)
        P = torch.stack([torch.linalg.inv(torch.outer(x, x) + own * eye) for x in gl]).mean(dim=0)
        total = total - vl @ P @ gl.T / n
    return total


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()
    X = torch.randn(9, 4, dtype=torch.float64)
    return uw.Task(model, uw.CrossEntropy()), (X, torch.arange(9) % 3)


LAYERS = (("0.weight", "0.bias"), ("2.weight", "2.bias"))


@pytest.mark.parametrize("given", [{"factor": 0.1}, {"lam": 0.03}], ids=str)
def test_equals_the_formula(given):
    task, train = network()
    queries = tuple(part[:3] for part in train)
    damping = uw.Relative(0.1) if "factor" in given else 0.03
    fitted = uw.DataInf(damping).fit(task, train)
    expected = by_hand(task, train, queries, LAYERS, **given)
    assert_same(fitted.attribute(queries).values, expected, 1e-11)
    own = by_hand(task, train, train, LAYERS, **given).diagonal()
    assert_same(fitted.self_influence(), own, 1e-11)
    parts = fitted.attribute(queries, into=uw.PerLayer())
    assert_same(sum(part.values for part in parts.values()), expected, 1e-11)
    assert_same(
        fitted.removal(queries, groups=[[0, 4]]).values[:, 0],
        -expected[:, [0, 4]].sum(dim=1),
        1e-11,
    )


def test_is_influence_for_one_example():
    task, (X, y) = network()
    one = (X[:1], y[:1])
    found = uw.DataInf(0.05).fit(task, one).attribute((X, y)).values
    blocks = torch.zeros_like(found)
    for names in LAYERS:
        part = uw.Task(task.model, task.loss, params=names)
        exact = uw.Influence(uw.EmpiricalFisher(), uw.solvers.Cholesky(), damping=0.05)
        blocks += exact.fit(part, one).attribute((X, y)).values
    assert_same(found, blocks, 1e-10)


def test_swapping_mean_and_inverse_fails_where_gradients_are_large():
    # P is nearly I/λ as soon as there are more directions than examples can take away.
    task, train = network()
    found = uw.DataInf(1e-6).fit(task, train).attribute(train).values
    dot = uw.GradientDot().fit(task, train).attribute(train).values / 1e-6
    exact = uw.Influence(uw.EmpiricalFisher(), uw.solvers.Cholesky(), 1e-6).fit(task, train)
    assert float((found - dot).norm() / dot.norm()) < 0.5
    assert float(found.norm() / exact.attribute(train).values.norm()) > 1e3


def test_a_note_says_where_the_swap_loses_the_size():
    """Where it does not, scores are those of the inverse, to within the limit of the note."""
    task, train = network()
    longest = max(
        float(torch.cat([gradients(task, train)[k] for k in names], 1).square().sum(1).mean())
        for names in LAYERS
    )
    alike = tuple(torch.cat([part[:1]] * 5) for part in train)
    for data, lam, noted in (
        (train, longest / 0.09, False),
        (train, longest / 0.11, True),
        (alike, longest / 2.0, True),
        (tuple(part[:1] for part in train), 1e-4, False),
    ):
        found = uw.DataInf(lam).fit(task, data).attribute(train)
        said = [note for note in found.provenance.notes if "order and not the size" in note]
        assert bool(said) == noted
        assert ("‖gᵢ‖²" in found.against_sizes) == noted
        exact = torch.zeros_like(found.values)
        for names in LAYERS:
            part = uw.Task(task.model, task.loss, params=names)
            method = uw.Influence(uw.EmpiricalFisher(), uw.solvers.Cholesky(), damping=lam)
            exact += method.fit(part, data).attribute(train).values
        limit = 0.11 if data is train else 1e-10
        assert float((found.values - exact).norm() / exact.norm()) < limit


LAWS = list(check_method(uw.DataInf(uw.Relative(0.1)), damped=True, rtol=1e-10))


@pytest.mark.parametrize("law", [law for _, law in LAWS], ids=[name for name, _ in LAWS])
def test_laws(law):
    law()


def test_the_penalty_is_part_of_the_damping():
    p = ridge()
    lam = p.task.penalty.strength
    without = uw.Task(p.task.model, p.task.loss)
    found = uw.DataInf(0.2).fit(p.task, p.train).attribute(p.queries).values
    assert_same(
        found, uw.DataInf(0.2 + lam).fit(without, p.train).attribute(p.queries).values, 1e-11
    )


def test_refusals():
    task, train = network()
    with pytest.raises(NotPositiveDefinite, match=r"Relative\(0.1\)"):
        uw.DataInf(0.0).fit(task, train)
    part = uw.Task(task.model, task.loss, uw.L2(0.1, exclude=("*bias",)))
    with pytest.raises(UnsupportedModel, match="multiple of"):
        uw.DataInf(0.1).fit(part, train)
    half = uw.Task(nn.Linear(4, 3).bfloat16().eval(), uw.CrossEntropy())
    with pytest.raises(DtypeError, match="half precision"):
        uw.DataInf(0.1).fit(half, (train[0].bfloat16(), train[1]))


def test_overflowing_gradients_are_named():
    model = nn.Linear(2, 1, bias=False).float().eval()
    X = torch.tensor([[1.0, 2.0], [1e20, 1e-3]], dtype=torch.float32)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e-20, 0.0]]))
    with pytest.raises(NonFinite, match="training examples 0 to 1"):
        uw.DataInf(0.1).fit(
            uw.Task(model, uw.SquaredError()), (X, torch.zeros(2, 1, dtype=torch.float32))
        )


def test_market():
    p = problem("dict_batch")
    assert uw.DataInf(0.1).fit(p.task, p.train).attribute(p.queries).values.isfinite().all()
