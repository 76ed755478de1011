"""attribute(tolerance=0) is −(1/n) ∇mᵀ (⊕ (H_l + λ_l))⁻¹ g, by the dense route.

Gradients from loops over autograd and the curvature as one matrix on flat vectors; or all of it by
`Influence` with a named solver, which knows nothing of blocks or of the contraction.
"""

import functools

import pytest
import torch

import upweight as uw
from tests.fitted import at
from tests.laws.subjects import assert_same, first_output
from tests.market import BUILDERS, problem
from tests.reference import dense

MIXED = uw.Blockwise((("*.weight", uw.EKFAC()), ("*", uw.Diagonal())))
SPECS = {
    "EKFAC": uw.EKFAC(),
    "EKFAC, reduced, expected": uw.EKFAC(uw.labels.Expected(), uw.curvature.Reduce()),
    "KFAC": uw.KFAC(uw.labels.Observed()),
    "Diagonal": uw.Diagonal(),
    "Blockwise": MIXED,
}
EVERY = list(BUILDERS)
SOME = ["softmax", "mlp_tanh", "conv", "tied", "layer_norm", "dict_batch", "mlp_float32"]
CASES = [(name, "EKFAC") for name in EVERY] + [
    (name, spec) for spec in SPECS if spec != "EKFAC" for name in SOME
]
RELATIVE = uw.Relative(0.1)


def sampled(spec, name):
    """The spec, with labels that the problem's loss has."""
    if "sampled" in BUILDERS[name][1] or spec is MIXED:
        return spec
    return {uw.EKFAC: uw.EKFAC, uw.Diagonal: uw.Diagonal}[type(spec)](uw.labels.Expected())


def measures(name):
    """Each measure that the problem's loss defines, and the same as a function of outputs."""
    loss = problem(name).task.loss
    likelihood = (uw.CrossEntropy, uw.Bernoulli)
    found = {"loss": (uw.Loss(), loss), "function": (first_output, first_output)}
    found["logit"] = (uw.Logit(0), lambda f, y: f.reshape(len(f), -1)[:, 0])
    if "sampled" in BUILDERS[name][1]:
        found["log-probability"] = (uw.LogProb(), loss.log_prob)
    if isinstance(loss, likelihood) and name != "soft_targets":
        found["margin"] = (uw.Margin(), loss.margin)
    return found


@functools.cache
def training_gradients(name):
    p = problem(name)
    return dense.gradients(p.task, p.train)


def with_damping(fitted):
    """⊕ (H_l + λ_l) as a matrix: each block has its own λ."""
    H = fitted.scorer.curvature.operator().dense()
    for block in fitted.scorer.curvature.blocks:
        index = block.block.index(fitted.task.layout)
        H[index, index] += block.damping
    return H


@pytest.mark.parametrize("name, spec", CASES)
def test_scores_of_every_measure(name, spec):
    p = problem(name)
    fitted = uw.Influence(sampled(SPECS[spec], name), damping=RELATIVE).fit(p.task, p.train)
    H, g = with_damping(fitted), training_gradients(name)
    rtol = 1e-4 if "float32" in p.traits else 1e-10
    for measure, function in measures(name).values():
        found = at(fitted, 0).attribute(p.queries, measure)
        m = dense.measure_gradients(p.task, function, p.queries)
        assert_same(found.values, -(m @ torch.linalg.solve(H, g.T)) / p.n, rtol)
        assert found.provenance.health["contraction_error"] == 0
    own = -(g * torch.linalg.solve(H, g.T).T).sum(dim=1) / p.n
    assert_same(fitted.self_influence(), own, rtol)


@pytest.mark.parametrize("damping", [uw.Absolute(0.05), RELATIVE], ids=repr)
@pytest.mark.parametrize("name", SOME[:-1])
def test_damping_of_each_block(name, damping):
    """λ is the same for all blocks, or a fraction of each block's own mean eigenvalue."""
    p = problem(name)
    fitted = uw.Influence(uw.Diagonal(uw.labels.Observed()), damping=damping).fit(p.task, p.train)
    H = fitted.scorer.curvature.operator().diagonal()
    lams = set()
    for block in fitted.scorer.curvature.blocks:
        mean = float(H[block.block.index(p.task.layout)].mean())
        expected = 0.05 if damping != RELATIVE else 0.1 * mean
        assert block.damping == pytest.approx(expected, rel=1e-12)
        lams.add(block.damping)
    several = len(fitted.scorer.curvature.blocks) > 1
    assert len(lams) == (
        len(fitted.scorer.curvature.blocks) if damping == RELATIVE and several else 1
    )


FOUR = ["softmax_penalized_bias", "mlp_tanh", "conv", "attention"]
# Two models for each curvature, in turn; all curvatures of all models are above, by loops.
TURNS = [(spec, name) for k, spec in enumerate(SPECS) for name in (FOUR[k % 4], FOUR[(k + 1) % 4])]


@pytest.mark.parametrize("spec, name", TURNS)
def test_a_named_solver_gives_the_same_scores(spec, name):
    """The same curvature on flat vectors, factorized; gradients by vmap."""
    p = problem(name)
    flat = uw.Influence(SPECS[spec], uw.solvers.Cholesky(), 0.05).fit(p.task, p.train)
    layered = uw.Influence(SPECS[spec], damping=0.05).fit(p.task, p.train)
    assert_same(at(layered, 0).attribute(p.queries).values, flat.attribute(p.queries).values, 1e-10)
    assert_same(layered.self_influence(), flat.self_influence(), 1e-10)
    for key in ("gradient_norm", "decrement"):
        expected = flat.stationarity[key]  # of size 1 where the model is not trained
        assert layered.stationarity[key] == pytest.approx(expected, rel=1e-8, abs=1e-14)
        assert name != "attention" or expected > 0.01


def blocks_of(name, spec, task):
    return zip(
        spec.fit_blocks(task, uw.as_data(problem(name).train), task.theta()).blocks,
        spec.fit_blocks(
            uw.Task(task.model, task.loss, None, task.params, task.forward),
            uw.as_data(problem(name).train),
            task.theta(),
        ).blocks,
        strict=True,
    )


@pytest.mark.parametrize("spec", ["EKFAC", "KFAC", "Diagonal"])
@pytest.mark.parametrize("name", ["mlp_tanh", "tied", "attention"])
def test_a_uniform_penalty_adds_its_strength_to_every_eigenvalue(name, spec):
    p = problem(name)
    for block, plain in blocks_of(name, SPECS[spec], p.task):
        expected = plain.eigenvalues + p.task.penalty.strength
        torch.testing.assert_close(block.eigenvalues, expected, rtol=1e-12, atol=1e-14)
    notes = SPECS[spec].fit_blocks(p.task, uw.as_data(p.train), p.task.theta()).notes
    assert not any("penalty" in note for note in notes)


@pytest.mark.parametrize("name", ["logistic", "softmax", "custom_penalty"])
@pytest.mark.parametrize("spec", ["EKFAC", "KFAC", "Diagonal"])
def test_any_other_penalty_adds_its_diagonal_in_the_basis(name, spec):
    """diag(Qᵀ D Q) for D the diagonal of ∇²R: with excluded biases, a sum of penalties, a function.

    Without a basis and with a diagonal ∇²R that is all of it, and nothing to note.
    """
    p = problem(name)
    D = dense.penalty_hessian(p.task).diagonal()
    for block, plain in blocks_of(name, SPECS[spec], p.task):
        entries = D[block.block.index(p.task.layout)]
        if spec == "Diagonal":
            share = entries
        else:
            Q = torch.kron(plain.left.contiguous(), plain.right.contiguous())
            share = (Q.T @ torch.diag(entries) @ Q).diagonal()
        added = (block.eigenvalues - plain.eigenvalues).flatten()
        torch.testing.assert_close(added, share, rtol=1e-10, atol=1e-12)
    notes = SPECS[spec].fit_blocks(p.task, uw.as_data(p.train), p.task.theta()).notes
    approximate = spec != "Diagonal" or name != "logistic"
    assert any("penalty's curvature enters through its diagonal" in n for n in notes) == approximate


@pytest.mark.parametrize(
    "spec", [uw.EKFAC(), uw.KFAC(uw.labels.Expected()), uw.Diagonal(uw.labels.Observed())]
)
@pytest.mark.parametrize("kept", [9, None])
def test_a_part_of_the_data_may_keep_the_n_of_all(spec, kept):
    """(1/n) Σ over the kept, also where the curvature is learned from some of them."""
    p = problem("mlp_gelu")
    spec = type(spec)(spec.labels, examples=kept)
    part = uw.as_data(p.train).subset(range(2, p.n))
    R = dense.penalty_hessian(p.task)
    whole, own = (spec.fit(p.task, part, p.task.theta(), n=n).dense() - R for n in (None, p.n))
    assert_same(own, whole * (p.n - 2) / p.n, 1e-10)


def test_removal_by_refactorization_takes_the_removed_share_out():
    """A Newton step without a group, with a curvature by layer and a named solver."""
    p = problem("mlp_tanh")
    spec, group = uw.Diagonal(uw.labels.Observed()), [1, 4]
    fitted = uw.Influence(spec, uw.solvers.Cholesky(), 0.1).fit(p.task, p.train)
    step = p.task.layout.flatten(fitted.removal_step(group))
    g = training_gradients("mlp_tanh")
    kept = [i for i in range(p.n) if i not in group]
    H = g[kept].square().sum(dim=0) / p.n + p.task.penalty.strength + 0.1
    assert_same(step, g[group].sum(dim=0) / p.n / H, 1e-10)
