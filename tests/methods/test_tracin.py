"""TracIn and SOURCE against training unrolled by autograd, and damping from training."""

import math

import pytest
import torch
from torch import nn

import upweight as uw
from tests.training.loops import data, net, task
from upweight.errors import NonFinite, NotOffered, SpecError
from upweight.methods.source import functions
from upweight.methods.tracin import nearest_states
from upweight.training.history import rates, resolved_damping
from upweight.training.optimizers import SGD, Adam, AdamW
from upweight.training.schedules import Cosine

N = 14


def regression(penalty=0.1, seed=0):
    """A quadratic J."""
    draw = torch.Generator().manual_seed(seed)
    X, y = torch.randn(N, 3, generator=draw).double(), torch.randn(N, 1, generator=draw).double()
    queries = (
        torch.randn(4, 3, generator=draw).double(),
        torch.randn(4, 1, generator=draw).double(),
    )

    def init():
        return nn.Linear(3, 1).double()

    return init, uw.Task(init(), uw.SquaredError(), uw.L2(penalty)), (X, y), queries


def trained(recipe, about, train, every=1):
    history = recipe.trajectory(about, train, every=every)
    return history, about.moved_to(history.theta)


def unrolled(history, about, train, queries, outputs=False):
    """dm(θ_T)/dw by autograd through every step, with torch.optim's rules written out."""
    w = history.weights.double().clone().requires_grad_()
    rule, state = history.optimizer, history.state(0)
    theta, memory = state.theta.clone().requires_grad_(), state.optimizer
    for step in history.steps():
        batch = (train[0][step.indices], train[1][step.indices])
        params = about.named(theta)
        value = (w[step.indices] * about.losses(params, batch)).mean()
        value = value + about.penalty(params, about.layout)
        (gradient,) = torch.autograd.grad(value, theta, create_graph=True)
        theta, memory = rule.step(theta, gradient, memory, step.lr)
    assert torch.allclose(theta, history.theta, rtol=0, atol=1e-10)
    m = about.losses(about.named(theta), queries)
    return torch.stack([torch.autograd.grad(one, w, retain_graph=True)[0] for one in m])


def gradients(about, theta, points):
    rows = []
    for i in range(len(points[0])):
        t = theta.clone().requires_grad_()
        one = (points[0][i : i + 1], points[1][i : i + 1])
        rows.append(torch.autograd.grad(about.losses(about.named(t), one).sum(), t)[0])
    return torch.stack(rows)


def scores(method, about, train, queries, history):
    return method.fit(about, train, history=history).attribute(queries).values


# -- TracIn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [N, 5])
def test_one_step_is_the_derivative(batch):
    """Of a measure that is linear over the step: ∇m(θ_1) in place of ∇m(θ_0) is the curvature's."""
    recipe = uw.Training(net, SGD(0.3), 1, batch, seed=3)
    about, train = task(net()), data(N)
    history = recipe.trajectory(about, train, every=1)
    first = next(history.steps())
    # Of one step: a recorded run would be stopped there.
    w = torch.ones(N, dtype=torch.float64, requires_grad=True)
    start = history.state(0).theta.requires_grad_()
    inside = (train[0][first.indices], train[1][first.indices])
    value = (w[first.indices] * about.losses(about.named(start), inside)).mean()
    (g,) = torch.autograd.grad(value, start, create_graph=True)
    end = start - first.lr * g
    by_w = torch.stack([torch.autograd.grad(x, w, retain_graph=True)[0] for x in end])
    queries = data(4, seed=5)
    by_theta = gradients(about, start.detach(), queries)
    expected = by_theta @ by_w
    found = torch.zeros(4, N, dtype=torch.float64)
    rate = float(rates(history)[0])
    found[:, first.indices] = -rate / len(first.indices) * (
        by_theta @ gradients(about, start.detach(), inside).T
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    if batch == N:  # the whole run
        moved = about.moved_to(history.theta)
        for method in (uw.TracIn(1), uw.TracIn(1, batches=True)):
            values = scores(method, moved, train, queries, history)
            torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "optimizer",
    [SGD(1e-5), SGD(1e-5, momentum=0.8), SGD(1e-5, momentum=0.8, nesterov=True),
     SGD(1e-5, momentum=0.7, dampening=0.4)],
    ids=repr,
)  # fmt: skip
def test_all_steps_are_the_derivative_to_first_order(optimizer):
    """Batches of 5 with a last one of 4, a schedule, and momentum to the end of the run."""
    recipe = uw.Training(net, optimizer, 2, 5, Cosine(), seed=3)
    about, train, queries = task(net()), data(N), data(4, seed=5)
    history, moved = trained(recipe, about, train)
    expected = unrolled(history, moved, train, queries)
    found = scores(uw.TracIn(batches=True), moved, train, queries, history)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    # Without the batches each example counts by 1/n in each step: a mean over orders.
    rough = scores(uw.TracIn(), moved, train, queries, history)
    assert 1e-3 < float((rough - expected).norm() / expected.norm()) < 0.5


def test_states_and_batches_by_hand():
    recipe = uw.Training(net, SGD(0.2, momentum=0.6), 4, 4, seed=1)
    about, train, queries = task(net()), data(N), data(3, seed=5)
    history, moved = trained(recipe, about, train, every=4)
    assert history.kept == (0, 4, 8, 12, 16)
    c = rates(history)
    eta = [s.lr for s in history.steps()]
    assert float(c[9]) == pytest.approx(sum(eta[s] * 0.6 ** (s - 9) for s in range(9, 16)))
    dots = {
        t: gradients(about, history.state(t).theta, queries)
        @ gradients(about, history.state(t).theta, train).T
        for t in history.kept
    }
    near = {0: [0, 1, 2], 4: [3, 4, 5, 6], 8: [7, 8, 9, 10], 12: [11, 12, 13, 14], 16: [15]}
    expected = -sum(dots[t] * c[steps].sum() for t, steps in near.items()) / N
    found = scores(uw.TracIn(), moved, train, queries, history)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    two = -(dots[4] * c[:8].sum() + dots[12] * c[8:].sum()) / N
    found = scores(uw.TracIn(2), moved, train, queries, history)
    torch.testing.assert_close(found, two, rtol=1e-10, atol=1e-14)
    each = torch.zeros(2, N, dtype=torch.float64)
    for s in history.steps():
        each[s.number // 8].index_add_(0, s.indices, c[s.number].expand(len(s.indices))
                                       / len(s.indices))  # fmt: skip
    fitted = uw.TracIn(2, batches=True).fit(moved, train, history=history)
    expected = -(dots[4] * each[0] + dots[12] * each[1])
    torch.testing.assert_close(fitted.attribute(queries).values, expected, rtol=1e-10, atol=1e-14)
    layers = fitted.attribute(queries, into=uw.PerLayer())
    torch.testing.assert_close(
        sum(part.values for part in layers.values()), expected, rtol=1e-9, atol=1e-13
    )
    own = fitted.attribute(train).values.diagonal()
    torch.testing.assert_close(fitted.self_influence(), own, rtol=1e-10, atol=1e-14)


def test_with_adam_each_entry_has_its_step():
    recipe = uw.Training(net, Adam(0.01), 3, 5)
    about, train, queries = task(net()), data(N), data(3, seed=5)
    history, moved = trained(recipe, about, train)
    c, expected = rates(history), torch.zeros(3, N, dtype=torch.float64)
    eta, corrected = 0.01, [1 - 0.9 ** (s + 1) for s in range(9)]
    assert float(c[4]) == pytest.approx(
        sum(0.1 * eta * 0.9 ** (s - 4) / corrected[s] for s in range(4, 9))
    )
    for t in range(1, 9):  # the first step is with the state after it: before, there is no v̂
        state = history.state(t)
        v = state.optimizer.memories["square"] / (1 - 0.999**t)
        P = 1 / (v.sqrt() + 1e-8)
        weight = c[t] + (c[0] if t == 1 else 0)
        left = gradients(about, state.theta, queries) * P
        expected -= weight / N * left @ gradients(about, state.theta, train).T
    found = scores(uw.TracIn(), moved, train, queries, history)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-13)


class ThenNormalized(nn.Module):
    """A bias that batch normalization takes out again, in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.b(self.norm(self.a(x)).tanh())


def normalized(folder, eps=1e-8):
    """In eval mode that bias has a gradient, and of what training saw of it Adam remembers 0."""
    model, (X, y) = ThenNormalized(), data(N)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=eps)
    with uw.record(model, optimizer, folder / f"run {eps}", every=2) as run:
        for indices in torch.arange(N).split(5) * 2:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[indices]), y[indices]).backward()
            optimizer.step()
            run.step(indices)
    about = task(model.eval())
    return about, (X, y), data(3, seed=5), run.history(about)


def test_with_adam_what_no_step_has_moved_is_left_out(tmp_path):
    about, (X, y), queries, history = normalized(tmp_path)
    names = about.layout.unflatten(torch.arange(about.layout.size))
    expected, c = 0.0, rates(history)
    for t, steps in nearest_states(history, None):
        state = history.state(t)
        v = state.optimizer.memories["square"] / (1 - 0.999**t)
        P = 1 / (v.sqrt() + 1e-8)
        P[names["a.bias"]] = 0
        left = gradients(about, state.theta, queries) * P
        right = gradients(about, state.theta, (X, y))
        expected = expected - float(c[steps].sum()) / N * left @ right.T
    found = uw.TracIn().fit(about, (X, y), history=history).attribute(queries)
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-13)
    (note,) = (note for note in found.provenance.notes if "left out at one state or more" in note)
    assert "4 of" in note and "in a.bias:" in note
    one = uw.TracIn(states=1).fit(about, (X, y), history=history)
    index = uw.Index.build(one, None, tmp_path / "index", 10**6, bits=32)
    values = one.attribute(queries).values
    torch.testing.assert_close(index.scores(queries).values, values, rtol=1e-5, atol=1e-5)
    with pytest.raises(SpecError, match="a recorded run of 6 steps"):
        uw.MAGIC().fit(about, (X, y), history=history)


# -- SOURCE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [uw.GGN(), uw.Hessian()], ids=repr)
def test_source_by_step_is_training_unrolled(curvature):
    init, about, train, queries = regression()
    recipe = uw.Training(init, SGD(0.1), 7, N, Cosine())
    history, moved = trained(recipe, about, train)
    expected = unrolled(history, moved, train, queries)
    method = uw.SOURCE(7, curvature, 1, discrete=True)
    fitted = method.fit(moved, train, history=history)
    torch.testing.assert_close(fitted.attribute(queries).values, expected, rtol=1e-8, atol=1e-12)
    own = fitted.attribute(train).values.diagonal()
    torch.testing.assert_close(fitted.self_influence(), own, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("segments, states", [(1, 1), (4, 5)])
@pytest.mark.parametrize("optimizer", [SGD(0.2), SGD(0.2, weight_decay=0.1)], ids=repr)
def test_source_from_the_minimum_is_training_unrolled(optimizer, segments, states):
    """Where gradients stand still, whatever the segments; the decay is the penalty or not."""
    decay = optimizer.weight_decay
    _, about, train, queries = regression(0.1 - decay)
    whole = uw.Task(about.model, uw.SquaredError(), uw.L2(0.1))
    weights = torch.ones(1, N, dtype=torch.float64)
    minimum = uw.training.Newton(tol=1e-14).prepare(whole, uw.as_data(train))(weights).theta[0]
    start = about.moved_to(minimum)
    history, moved = trained(uw.Training(None, optimizer, 9, N), start, train)
    expected = unrolled(history, moved, train, queries)
    for curvature in (uw.GGN(), uw.Hessian()):
        method = uw.SOURCE(segments, curvature, states, discrete=True)
        found = scores(method, moved, train, queries, history)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_source_of_a_subset_is_its_training_unrolled():
    """Gradients of all examples, curvature of those with a weight."""
    init, about, train, queries = regression()
    w = uw.training.subset_weights(N, 1, 0.5, renormalize=True)[0]
    recipe = uw.Training(init, SGD(0.1), 7, N, Cosine())  # absent examples keep their places
    history = recipe.trajectory(about, train, w, every=1)
    moved = about.moved_to(history.theta)
    expected = unrolled(history, moved, train, queries)
    for curvature in (uw.GGN(), uw.Hessian()):
        method = uw.SOURCE(7, curvature, 1, discrete=True)
        found = scores(method, moved, train, queries, history)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("curvature", [uw.GGN(), uw.EKFAC(uw.labels.Expected())], ids=repr)
def test_segments_of_source_add_up(curvature):
    about, train, queries = task(net()), data(N), data(3, seed=5)
    history, moved = trained(uw.Training(net, SGD(0.3, momentum=0.5), 3, 5), about, train)
    parts = [
        scores(uw.SOURCE(3, curvature, segment=k), moved, train, queries, history) for k in range(3)
    ]
    whole = scores(uw.SOURCE(3, curvature), moved, train, queries, history)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-8, atol=1e-12)
    assert float((parts[0] - whole).norm()) > 0.1 * float(whole.norm())


def test_the_flow_is_the_limit_of_small_steps():
    """The error is of first order in the step size, and so for momentum."""
    init, about, train, queries = regression()
    for momentum, most in ((0.0, 0.6), (0.9, 0.65)):
        errors = []
        for k in (20, 40):
            recipe = uw.Training(init, SGD(4 * (1 - momentum) / k, momentum=momentum), k, N)
            history, moved = trained(recipe, about, train)
            expected = unrolled(history, moved, train, queries)
            found = scores(uw.SOURCE(k // 2, uw.GGN(), 2), moved, train, queries, history)
            errors.append(float((found - expected).norm() / expected.norm()))
        assert errors[0] < (0.1 if momentum == 0 else 0.25) and errors[1] < most * errors[0], errors


def test_source_after_long_training_is_influence():
    """R → (H + λ)⁻¹, and no early segment is left."""
    init, about, train, queries = regression()
    recipe = uw.Training(init, SGD(0.5), 300, N)
    history, moved = trained(recipe, about, train, every=50)
    for curvature in (uw.GGN(), uw.EKFAC(uw.labels.Expected())):
        found = scores(uw.SOURCE(3, curvature), moved, train, queries, history)
        influence = uw.Influence(curvature, tolerance=0).fit(moved, train).attribute(queries)
        torch.testing.assert_close(found, influence.values, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("rule", [Adam, AdamW])
def test_adam_is_a_diagonal(rule, by_layer):
    """D and R by the matrix exponential of P H, by hand from the states.

    Exact on all of θ, and by layer where P and H̄ have the same eigenvectors.
    """
    init, about, train, queries = regression()
    optimizer = rule(0.02, weight_decay=0.05)
    history, moved = trained(uw.Training(init, optimizer, 12, 5), about, train)
    H = uw.GGN().fit(about, uw.as_data(train), history.theta).dense()
    curvature = uw.Diagonal(uw.labels.Expected()) if by_layer else uw.GGN()
    if by_layer:
        H = torch.diag(H.diagonal())
    eye, tau, expected = torch.eye(4).double(), rates(history), 0.0
    v = gradients(about, history.theta, queries)
    for begin, end, states in ((18, 36, (22, 31)), (0, 18, (4, 13))):
        roots = [
            (history.state(t).optimizer.memories["square"] / (1 - 0.999**t)).sqrt() for t in states
        ]
        P = torch.diag(1 / (sum(roots) / 2 + 1e-8))
        A = P @ (H + 0.05 * eye) if rule is Adam else P @ H + 0.05 * eye
        D = torch.linalg.matrix_exp(-tau[begin:end].sum() * A)
        R = torch.linalg.solve(A, (eye - D) @ P)
        g = sum(gradients(about, history.state(t).theta, train) for t in states) / 2
        expected = expected - v @ R @ g.T / N
        v = v @ D
    found = scores(uw.SOURCE(2, curvature, 2), moved, train, queries, history)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("by_layer", [False, True])
def test_source_moves_nothing_that_adam_has_not_seen(by_layer, tmp_path):
    """D and R of the other entries alone: by the matrix exponential, and by eigenvectors.

    Of an eigenvector that has a part in both, by layer, M is the mean over the entries that move.
    """
    about, train, queries, history = normalized(tmp_path)
    curvature = uw.EKFAC(uw.labels.Expected()) if by_layer else uw.GGN()
    moves = torch.ones(about.layout.size, dtype=torch.bool)
    moves[about.layout.unflatten(torch.arange(len(moves)))["a.bias"]] = False
    tau, expected = rates(history), 0.0
    v = gradients(about, history.theta, queries) * moves
    for begin, end, t in ((3, 6, 4), (0, 3, 2)):
        state, step = history.state(t), float(tau[begin:end].sum())
        M = (state.optimizer.memories["square"] / (1 - 0.999**t)).sqrt() + 1e-8
        D, R = torch.zeros(2, len(moves), len(moves)).double()
        if by_layer:
            for block in curvature.fit_blocks(about, uw.as_data(train), state.theta).blocks:
                index, e = block.block.index(about.layout), block.eigen
                Q = e.unrotated(torch.eye(len(index)).double().view(-1, *e.values.shape)).flatten(1)
                Q, on = Q.T * moves[index, None], moves[index]
                mean = (Q.square().T @ (M[index] * on)) / Q.square().sum(dim=0)
                sigma = e.values.flatten() / mean + 0.01
                for whole, f in (
                    (D, torch.exp(-step * sigma)),
                    (R, (1 - torch.exp(-step * sigma)) / sigma / mean),
                ):
                    whole[index[:, None], index] = Q @ torch.diag(f) @ Q.T
        else:
            some, eye = moves.nonzero()[:, 0], torch.eye(int(moves.sum())).double()
            H = curvature.fit(about, uw.as_data(train), state.theta).dense()[some][:, some]
            A = torch.diag(1 / M[some]) @ H + 0.01 * eye
            D[some[:, None], some] = left = torch.linalg.matrix_exp(-step * A)
            R[some[:, None], some] = torch.linalg.solve(A, (eye - left) @ torch.diag(1 / M[some]))
        expected = expected - v @ R @ gradients(about, state.theta, train).T / N
        v = v @ D
    found = uw.SOURCE(2, curvature, 1).fit(about, train, history=history).attribute(queries)
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-12)
    (note,) = (note for note in found.provenance.notes if "left out at one state or more" in note)
    assert "4 of" in note and "in a.bias:" in note


def test_the_mean_curvature_of_states_is_one_fit_of_them_all():
    about, train = task(net()), data(N)
    first, second = about.theta(), about.theta() + 0.5
    for spec in (
        uw.Diagonal(uw.labels.Expected()),
        uw.EKFAC(uw.labels.Observed()),
        uw.KFAC(uw.labels.Observed()),
    ):
        joint = spec.fit_blocks(about, uw.as_data(train), second, others=[first])
        again = spec.fit_blocks(about, uw.as_data(train), second, others=[first], memory_bytes=1)
        each = [spec.fit_blocks(about, uw.as_data(train), t) for t in (first, second)]
        for k, block in enumerate(joint.blocks):
            traces = [float(part.blocks[k].eigen.trace()) for part in each]
            if not isinstance(spec, uw.KFAC):  # a product of means is no mean of products
                assert float(block.eigen.trace()) == pytest.approx(sum(traces) / 2, rel=1e-10)
            torch.testing.assert_close(
                block.eigen.dense(), again.blocks[k].eigen.dense(), rtol=1e-8, atol=1e-12
            )
        one = spec.fit_blocks(about, uw.as_data(train), first, others=[first])
        torch.testing.assert_close(
            one.operator().dense(), each[0].operator().dense(), rtol=1e-8, atol=1e-12
        )


def test_source_by_layer_of_a_network_by_hand():
    """Two segments of EK-FAC: bases and eigenvalues from fits of the states."""
    recipe = uw.Training(net, SGD(0.3, momentum=0.5), 4, 7)
    about, train, queries = task(net()), data(N), data(3, seed=5)
    history, moved = trained(recipe, about, train)
    spec, c = uw.EKFAC(uw.labels.Expected()), rates(history)
    v, expected = gradients(about, history.theta, queries), 0.0
    for begin, end, states in ((4, 8, (4, 6)), (0, 4, (0, 2))):
        thetas = [history.state(t).theta for t in states]
        made = spec.fit_blocks(about, uw.as_data(train), thetas[1], others=thetas[:1])
        decay, response = torch.zeros_like(v), torch.zeros_like(v)
        for block in made.blocks:
            index, e = block.block.index(about.layout), block.eigen
            tau = float(c[begin:end].sum())
            decay[:, index] = e.function(lambda s, tau=tau: torch.exp(-tau * s)).mv(v[:, index])
            response[:, index] = e.function(
                lambda s, tau=tau: torch.where(s > 1e-9, (1 - torch.exp(-tau * s)) / s, tau)
            ).mv(v[:, index])
        mean = sum(gradients(about, theta, train) for theta in thetas) / 2
        expected = expected - response @ mean.T / N
        v = decay
    found = scores(uw.SOURCE(2, spec, 2), moved, train, queries, history)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_functions_of_eigenvalues():
    steps = torch.tensor([0.1, 0.3]).double()
    sigma = torch.tensor([0.0, 1e-9, 1e-5, 0.5, 40.0]).double()
    left, response = functions(sigma, steps)
    assert response[:2].tolist() == pytest.approx([0.4, 0.4])
    assert float(response[4]) == pytest.approx((1 - math.exp(-16)) / 40)
    torch.testing.assert_close(left, torch.exp(-0.4 * sigma))
    left, response = functions(sigma, steps, discrete=True)
    torch.testing.assert_close(left, (1 - 0.1 * sigma) * (1 - 0.3 * sigma))
    torch.testing.assert_close(response, 0.1 * (1 - 0.3 * sigma) + 0.3)


# -- damping from training ------------------------------------------------------------------------


def test_damping_is_one_over_the_steps():
    about, train = task(net()), data(N)
    plain = uw.Training(net, SGD(0.3, weight_decay=0.01), 2, 5, Cosine())
    history, moved = trained(plain, about, train)
    total = sum(0.3 * Cosine()(t, 6) for t in range(6))
    for given in (plain, history):
        assert resolved_damping(given, about, uw.as_data(train)) == pytest.approx(1 / total + 0.01)
    long = uw.Training(net, SGD(0.1, momentum=0.9), 200, N)
    lam = resolved_damping(long, about, uw.as_data(train))
    assert lam == pytest.approx(1 / (200 * 0.1 / (1 - 0.9)), rel=0.06)
    spec = uw.Influence(uw.EKFAC(), damping=uw.FromTraining())
    fitted = spec.fit(moved, train, history=plain)
    assert {b.damping for b in fitted.scorer.curvature.blocks} == {
        resolved_damping(plain, about, uw.as_data(train))
    }
    with pytest.raises(SpecError, match="how the model was trained"):
        spec.fit(moved, train)
    with pytest.raises(SpecError, match="one step size"):
        spec.fit(moved, train, history=uw.Training(net, Adam(), 2, 5))
    with pytest.raises(SpecError, match="θ̂ alone"):
        uw.Influence(uw.EKFAC(), damping=0.1).fit(moved, train, history=plain)
    with pytest.raises(SpecError, match="steps of training"):
        uw.FromTraining().of(uw.GGN().fit(about, uw.as_data(train), about.theta()))


def test_a_ridge_of_the_steps_is_near_what_they_resolve():
    x = torch.logspace(-6, 6, 1000).double()
    ratio = -torch.expm1(-x) / (x / (1 + x))
    assert 1 - 1e-9 <= float(ratio.min()) and float(ratio.max()) < 1.3


# -- attacks --------------------------------------------------------------------------------------


def test_a_recipe_is_trained_and_no_other_model_taken():
    recipe = uw.Training(net, SGD(0.3), 2, 5, seed=4)
    about, train, queries = task(net()), data(N), data(3, seed=5)
    moved = task(recipe.trained(about, train))
    history = recipe.trajectory(about, train)
    for method in (uw.TracIn(), uw.SOURCE(2)):
        found = scores(method, moved, train, queries, recipe)
        assert torch.equal(found, scores(method, moved, train, queries, history))
        with pytest.raises(SpecError, match="how the model was trained"):
            method.fit(moved, train)
        with pytest.raises(SpecError, match="end at the parameters"):
            method.fit(about, train, history=history)
        with pytest.raises(SpecError, match="how the model was trained"):
            method.fit(moved, train, history="a folder")
        half = recipe.trajectory(about, train, torch.arange(N) % 2)  # of mean 1/2
        with pytest.raises(SpecError, match="plain training"):
            method.fit(about.moved_to(half.theta), train, history=half)
        with pytest.raises(SpecError, match="training examples"):
            method.fit(moved, (train[0][:9], train[1][:9]), history=history)
        with pytest.raises(NotOffered):
            method.fit(moved, train, history=history).parameter_influence(0)


def test_what_source_refuses():
    about, train = task(net()), data(N)
    history, moved = trained(uw.Training(net, SGD(0.1, momentum=0.5), 2, 5), about, train, [])
    with pytest.raises(SpecError, match="kept state"):
        uw.SOURCE(3).fit(moved, train, history=history)
    with pytest.raises(SpecError, match="without a memory"):
        uw.SOURCE(1, discrete=True).fit(moved, train, history=history)
    with pytest.raises(SpecError, match="as an object"):
        uw.SOURCE(curvature="ekfac")
    for wrong in (0, 1.5, True, -1):
        with pytest.raises(SpecError, match="whole number"):
            uw.TracIn(wrong)
        with pytest.raises(SpecError, match="whole number"):
            uw.SOURCE(states=wrong)
    with pytest.raises(SpecError, match="from 0 to 2"):
        uw.SOURCE(3, segment=3)
    init, about, train, _ = regression()
    history, moved = trained(uw.Training(init, SGD(0.1), 100, N), about, train, 50)
    with pytest.raises(NonFinite, match="segment"):
        uw.SOURCE(1, uw.Hessian(), 1).fit(
            uw.Task(moved.model, lambda f, y: -500 * (f - y).square().sum(dim=1)), train,
            history=history,
        )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2])
def test_few_examples(n):
    recipe = uw.Training(net, SGD(0.3), 2, 5)
    about, train = task(net()), data(n)
    history, moved = trained(recipe, about, train)
    for method in (uw.TracIn(), uw.TracIn(batches=True), uw.SOURCE(2, uw.Diagonal())):
        found = scores(method, moved, train, data(3, seed=5), history)
        assert found.shape == (3, n) and bool(found.isfinite().all())


@pytest.mark.filterwarnings("ignore:parameters are bfloat16:UserWarning")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_other_dtypes(dtype, tolerance):
    recipe = uw.Training(net, SGD(0.3), 3, 5)
    about, (X, y), (Xq, yq) = task(net()), data(N), data(4, seed=5)
    history, moved = trained(recipe, about, (X, y))
    expected = [scores(m, moved, (X, y), (Xq, yq), history) for m in METHODS]
    short, theta = task(net().to(dtype)), history.theta.to(dtype)
    there = short.moved_to(theta)
    for method, values in zip(METHODS, expected, strict=True):
        found = scores(method, there, (X.to(dtype), y), (Xq.to(dtype), yq), history)
        assert float((found.double() - values).norm() / values.norm()) < tolerance


METHODS = [uw.TracIn(), uw.SOURCE(2, uw.EKFAC(uw.labels.Expected()))]


class Tied(nn.Module):
    """A weight used twice, a frozen layer, batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm, self.fixed = nn.BatchNorm1d(3), nn.Linear(3, 3).requires_grad_(False)
        self.double().eval()

    def forward(self, x):
        return self.b(self.norm(self.fixed(self.a(x)).tanh()))


def test_tied_weights_frozen_layers_and_batch_norm():
    recipe = uw.Training(Tied, SGD(0.2), 3, 5)
    about, train, queries = task(Tied()), data(N), data(3, seed=5)
    history, moved = trained(recipe, about, train)
    expected = 0.0
    for t, c in enumerate(rates(history)):
        theta = history.state(t).theta
        expected = expected - c / N * (
            gradients(about, theta, queries) @ gradients(about, theta, train).T
        )
    found = scores(uw.TracIn(), moved, train, queries, history)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-13)
    one = scores(uw.SOURCE(3), moved, train, queries, history)
    assert bool(one.isfinite().all())


def test_reducers_have_what_the_matrix_has(tmp_path):
    recipe = uw.Training(net, SGD(0.3), 1, 3)
    about, train, queries = task(net()), data(6), data(2, seed=5)
    history, moved = trained(recipe, about, train)
    for method in (uw.TracIn(), uw.TracIn(batches=True), uw.SOURCE(2, uw.EKFAC())):
        fitted = method.fit(moved, train, history=history)
        values = fitted.attribute(queries).values
        folder = tmp_path / type(method).__name__ / str(getattr(method, "batches", ""))
        kept = fitted.attribute(queries, into=uw.Shards(folder))
        torch.testing.assert_close(kept.values(), values, rtol=1e-10, atol=1e-14)
        parts = fitted.attribute(queries, into=uw.PerLayer()).values()
        layers = sum(part.values for part in parts)
        torch.testing.assert_close(layers, values, rtol=1e-9, atol=1e-13)
        few = method.fit(moved, train, history=history, resources=uw.Resources(memory_bytes=1))
        torch.testing.assert_close(few.attribute(queries).values, values, rtol=1e-9, atol=1e-13)
