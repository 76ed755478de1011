"""What the laws bind: methods, and how closely each must obey."""

import torch

import upweight as uw

DIRECT = {
    "Hessian": uw.Influence(uw.Hessian(), uw.solvers.Cholesky()),
    "GGN": uw.Influence(uw.GGN(), uw.solvers.Cholesky()),
    "EmpiricalFisher": uw.Influence(uw.EmpiricalFisher(), uw.solvers.Cholesky()),
    "damped Hessian": uw.Influence(uw.Hessian(), uw.solvers.Cholesky(), damping=0.1),
    "relatively damped GGN": uw.Influence(
        uw.GGN(), uw.solvers.Cholesky(), damping=uw.Relative(0.2)
    ),
}
"""Solved by factorization: an error of rounding alone."""

RTOL = 1e-11
ITERATIVE = {
    "Hessian, CG": uw.Influence(uw.Hessian(), uw.solvers.CG(rtol=RTOL)),
    "GGN, BlockCG": uw.Influence(uw.GGN(), uw.solvers.BlockCG(rtol=RTOL)),
    "Hessian, MINRES": uw.Influence(uw.Hessian(), uw.solvers.MINRES(rtol=RTOL)),
}
"""Solved to a residual: 10 × rtol is asked of the scores."""

LAYERED = {
    "EKFAC, observed": uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=0.1, tolerance=0),
    "KFAC, expected, reduced": uw.Influence(
        uw.KFAC(uw.labels.Expected(), uw.curvature.Reduce()), damping=uw.Relative(0.2), tolerance=0
    ),
}
"""Inverted block by block, in their own eigenbases; asked with tolerance 0."""

SAMPLED = {"Fisher": uw.Influence(uw.Fisher(samples=3, seed=5), uw.solvers.Cholesky())}
"""Draws labels by place, so the order of the data changes it."""

SAMPLED_LAYERED = {
    "EKFAC, sampled": uw.Influence(uw.EKFAC(uw.labels.Sampled(3, 5)), damping=0.1, tolerance=0)
}
"""Draws labels by place, so the order of the data changes it."""

DETERMINISTIC = DIRECT | ITERATIVE | LAYERED
EVERYONE = DETERMINISTIC | SAMPLED | SAMPLED_LAYERED


def spread(checks, problems, turn):
    """Each law of `check_method` on one problem, the next law on the next, from the `turn`-th on.

    With a `turn` per method, every method meets every problem, every law meets every problem, and
    every method is held to every law. Checks that name no problem are kept.
    """
    laws = []
    for name, check in checks:
        law, _, of = name.rpartition(": ")
        if of not in problems:
            yield name, check
            continue
        if law not in laws:
            laws.append(law)
        if of == problems[(turn + laws.index(law)) % len(problems)]:
            yield name, check


def tolerance(name):
    """What a method's scores may be off by, relative to the largest of them."""
    return 10 * RTOL if name in ITERATIVE else 1e-10


def assert_same(actual, expected, rtol):
    """Equal to rtol times the largest entry."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * scale)


def scores(method, task, train, queries, measure=None):
    """S as a matrix."""
    fitted = method.fit(task, train)
    found = attributed(fitted, queries, measure)
    assert bool((found.values != 0).any()), "a law says nothing about scores that are all zero"
    return found.values


def attributed(fitted, queries, measure=None):
    """Scores of the loss, unless another measure is asked for."""
    return fitted.attribute(queries, uw.Loss() if measure is None else measure)


def first_output(outputs, targets):
    """A measurement that every model has: the sum of squares of its first outputs."""
    return outputs.reshape(len(outputs), -1)[:, :2].square().sum(dim=1)
