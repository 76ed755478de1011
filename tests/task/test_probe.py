"""The value of an example is its own: what is refused, and who is blamed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

import upweight as uw
from tests.fitted import at
from tests.market import draw
from upweight.errors import NonDeterministic, NotDifferentiable, ScalarLoss, ShapeError
from upweight.task.check import require_answerable
from upweight.task.data import as_data
from upweight.task.probe import PROBE_EXAMPLES, evenly_spaced

G = torch.Generator().manual_seed(0)
X, Y = draw(G, 40, 3), torch.arange(40) % 2
CURVATURES = [uw.GGN(), uw.EKFAC(labels=uw.labels.Observed())]


def fit(model, loss=None, train=(X, Y), curvature=None, **options):
    task = uw.Task(model.double().eval(), loss or uw.CrossEntropy(), **options)
    return uw.Influence(curvature or uw.GGN(), damping=1.0).fit(task, train)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


class Then(nn.Module):
    """A network, then any function of its outputs."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = net(), function

    def forward(self, x):
        return self.function(self.net(x))


def ce(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


# -- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: ce(o, y) / torch.bincount(y, minlength=2)[y],
        lambda o, y: ce(o, y) / ce(o, y).detach().sum() * len(y),
        lambda o, y: ce(o, y) / len(y),
        lambda o, y: ce(o - o.mean(dim=0), y),
        lambda o, y: ce(o, y).mean().expand(len(y)),
        lambda o, y: ce(o @ o.T, torch.arange(len(y))),
    ],
    ids=["class-balanced", "normalized", "divided by the batch", "centred", "mean", "InfoNCE"],
)
def test_a_loss_that_looks_at_its_batch_is_blamed(loss, curvature):
    with pytest.raises(NonDeterministic, match=r"(?s)loss of an example .* same outputs") as caught:
        fit(net(), loss, curvature=curvature)
    assert "divide by a number that does not change with the batch" in str(caught.value)


def test_a_loss_divided_by_a_fixed_number_is_fine():
    counts = torch.bincount(Y)
    fit(net(), lambda o, y: ce(o, y) / counts[y])


class Tokens(nn.Module):
    """One output for each position."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids)))


IDS = torch.randint(9, (40, 5), generator=G)
LABELS = torch.where(torch.rand(40, 5, generator=G) < 0.7, IDS.roll(1, 1), -100)
LABELS[:, 0] = 1


def token_losses(outputs, targets):
    kept = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return kept.sum(dim=1)


def test_a_loss_divided_by_the_tokens_of_the_batch():
    def mean(outputs, targets):
        return token_losses(outputs, targets) / (targets != -100).sum() * len(targets)

    with pytest.raises(NonDeterministic, match="same outputs by themselves"):
        fit(Tokens(), mean, (IDS, LABELS))
    tokens = float((LABELS != -100).sum()) / len(LABELS)
    fixed = fit(Tokens(), lambda o, y: token_losses(o, y) / tokens, (IDS, LABELS))
    plain = fit(Tokens(), uw.CrossEntropy(), (IDS, LABELS))
    torch.testing.assert_close(
        fixed.losses.mean() * tokens, plain.losses.mean(), rtol=1e-12, atol=0
    )


def test_noise_in_the_loss():
    with pytest.raises(NonDeterministic, match="same values for the same outputs"):
        fit(net(), lambda o, y: ce(o, y) * (1 + torch.rand(len(y), dtype=o.dtype)))


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(
    "function",
    [
        lambda f: f + f.roll(1, 0),
        lambda f: f - f.mean(dim=0),
        lambda f: torch.softmax(f @ f.T, dim=1) @ f,
        lambda f: f * len(f),
    ],
    ids=["the one before", "centred", "attention over the batch", "batch size"],
)
def test_a_model_that_looks_at_its_batch_is_blamed(function, curvature):
    with pytest.raises(NonDeterministic, match=r"(?s)output must not depend .*passed alone"):
        fit(Then(function), curvature=curvature)


def test_outputs_are_compared_where_the_loss_is_saturated():
    """A loss that is 0 for the probe says nothing; its model is coupled all the same."""
    with pytest.raises(NonDeterministic, match="output must not depend"):
        fit(
            Then(lambda f: f - f.mean(dim=0)),
            lambda o, y: torch.where(torch.arange(len(o)) < 0, ce(o, y), o[:, 0] * 0),
        )


class Ragged(Dataset):
    """Sequences of many lengths, longest first or mixed."""

    def __init__(self, lengths):
        g = torch.Generator().manual_seed(1)
        self.items = [(torch.randn(k, 3, generator=g, dtype=torch.float64), k % 2) for k in lengths]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def padded(items):
    lengths = torch.tensor([len(x) for x, _ in items])
    xs = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
    return xs, lengths, torch.tensor([y for _, y in items])


class Pooled(nn.Module):
    """The mean over positions, of padded ones too unless masked."""

    def __init__(self, masked, per_token=False):
        super().__init__()
        self.net, self.masked, self.per_token = net(), masked, per_token

    def forward(self, x, lengths):
        kept = (torch.arange(x.shape[1]) < lengths[:, None]).double()[:, :, None]
        if not self.masked:
            kept = torch.ones_like(kept)
        pooled = (x * kept).sum(dim=1) / kept.sum(dim=1)
        return self.net(pooled)


SORTED, MIXED = sorted(range(2, 42), reverse=True), [2 + (7 * i) % 11 for i in range(40)]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("lengths", [SORTED, MIXED], ids=["sorted", "mixed"])
def test_pooling_over_padding_is_blamed_on_the_padding(lengths, curvature):
    loader = DataLoader(Ragged(lengths), batch_size=4, collate_fn=padded)
    with pytest.raises(NonDeterministic, match="how far its batch is padded"):
        fit(Pooled(masked=False), train=loader, curvature=curvature)


@pytest.mark.parametrize("lengths", [SORTED, MIXED], ids=["sorted", "mixed"])
def test_the_ways_out_of_padding_work(lengths):
    """The mask gives the scores of one example at a time; so does padding all to one length."""
    data = Ragged(lengths)
    loader = DataLoader(data, batch_size=4, collate_fn=padded)
    expected = fit(Pooled(masked=True), train=loader).attribute(loader).values
    most = max(lengths)

    def to_one_length(items):
        xs, lengths, ys = padded(items)
        return F.pad(xs, (0, 0, 0, most - xs.shape[1])), lengths, ys

    whole = DataLoader(data, batch_size=4, collate_fn=to_one_length)
    found = fit(Pooled(masked=True), train=whole).attribute(whole).values
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    fit(Pooled(masked=False), train=whole)


class PerToken(nn.Module):
    """Outputs for each position that see the mean of their sequence, padding included."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 9)

    def forward(self, ids):
        z = self.embedding(ids)
        return self.head(torch.tanh(z + z.mean(dim=1, keepdim=True)))


def test_an_output_for_each_token_is_compared_as_well():
    g = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 9, (k,), generator=g) for k in MIXED]

    def collate(items):
        ids = nn.utils.rnn.pad_sequence(list(items), batch_first=True)
        return ids, torch.where(ids > 0, ids, -100)

    with pytest.raises(NonDeterministic, match="how far its batch is padded"):
        fit(PerToken(), train=DataLoader(rows, batch_size=4, collate_fn=collate))


def test_a_condition_number_is_not_batch_statistics():
    """Sums that cancel round otherwise in other batches; no example sees another one there."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(60, 40, generator=g, dtype=torch.float64)
        X[:, 39] = X[:, 3] + 1e-12 * torch.randn(60, generator=g, dtype=torch.float64)
        y = torch.randn(60, 3, generator=g, dtype=torch.float64)
        model = nn.Linear(40, 3, bias=False).double()
        model.weight.data = torch.linalg.lstsq(X, y, driver="gels").solution.T.contiguous()
        task = uw.Task(model, uw.SquaredError())
        uw.Influence(damping=1e-3).fit(task, (X, y)).attribute((X[:3], y[:3]))


# -- data -----------------------------------------------------------------------------------------


class Augmented(Dataset):
    def __init__(self, n=40):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return X[i].flip(0) if torch.rand(()) < 0.5 else X[i], Y[i]


@pytest.mark.parametrize("seed", range(10))
def test_data_that_differ_at_each_reading_are_named(seed):
    torch.manual_seed(seed)
    with pytest.raises(NonDeterministic, match="Augmented"):
        fit(net(), train=Augmented())


def test_one_draw_of_random_data_is_an_answer():
    data = Augmented()
    fit(net(), train=[data[i] for i in range(len(data))])


def test_random_masking_in_the_collate_function():
    def masked(items):
        xs, ys = default_collate(items)
        return xs * (torch.rand(xs.shape) > 0.15), ys

    rows = [(X[i], Y[i]) for i in range(40)]
    with pytest.raises(NonDeterministic, match="read a second time"):
        fit(net(), train=DataLoader(rows, batch_size=4, collate_fn=masked))


def test_a_collate_function_that_scales_by_the_batch():
    def scaled(items):
        xs, ys = default_collate(items)
        return xs / xs.abs().max(), ys

    rows = [(X[i], Y[i]) for i in range(40)]
    with pytest.raises(NonDeterministic, match=r"(?s)inputs and targets .* inputs differ as well"):
        fit(net(), train=DataLoader(rows, batch_size=4, collate_fn=scaled))


@pytest.mark.parametrize("missing", [0, 7, 20, 39])
@pytest.mark.parametrize("curvature", [uw.GGN(), uw.EKFAC()])
def test_a_collate_function_that_drops_examples(missing, curvature):
    rows = [None if i == missing else (X[i], Y[i]) for i in range(40)]

    def skipping(items):
        return default_collate([item for item in items if item is not None])

    loader = DataLoader(rows, batch_size=8, collate_fn=skipping)
    with pytest.raises(ShapeError, match=rf"example {missing} alone gives"):
        fit(net(), train=loader, curvature=curvature)


def test_the_probe_is_spread_over_the_data():
    assert evenly_spaced(1) == (0,)
    assert evenly_spaced(5) == (0, 1, 2, 3, 4)
    assert evenly_spaced(1000)[0] == 0 and evenly_spaced(1000)[-1] == 999
    assert len(set(evenly_spaced(1000))) == PROBE_EXAMPLES


# -- modes ----------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Dropout by function, rarely."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return F.dropout(self.net(x), 1e-3, training=self.training)


@pytest.mark.parametrize(
    "layer",
    [
        Functional(),
        nn.Sequential(net(), nn.RReLU()),
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), net()),
        nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 3)), net()),
        nn.Sequential(net(), nn.BatchNorm1d(2)),
        nn.Sequential(
            nn.Linear(3, 4),
            nn.Unflatten(1, (2, 2)),
            nn.InstanceNorm1d(2, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(4, 2),
        ),
    ],
    ids=["dropout", "RReLU", "spectral norm", "old spectral norm", "BatchNorm", "InstanceNorm"],
)
def test_a_mode_that_matters_is_refused(layer):
    task = uw.Task(layer.double().train(), uw.CrossEntropy())
    with pytest.raises(NonDeterministic, match=r"call model\.eval\(\)"):
        uw.Influence(uw.EKFAC(), damping=1.0).fit(task, (X, Y))
    uw.Influence(uw.EKFAC(), damping=1.0).fit(uw.Task(layer.eval(), uw.CrossEntropy()), (X, Y))


# -- measures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "measure",
    [
        lambda o, y: o[0].sum().expand(len(o)),
        lambda o, y: (o - o.mean(dim=0))[:, 0],
        lambda o, y: o[:, 0] / len(o),
    ],
    ids=["first row", "centred", "mean"],
)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_measure_that_looks_at_its_batch_is_refused(measure, curvature):
    fitted = fit(net(), curvature=curvature)
    with pytest.raises(NonDeterministic, match="A measurement must not depend on"):
        fitted.attribute((X[:5], Y[:5]), measure)


def test_noise_in_a_measure():
    fitted = fit(net())
    with pytest.raises(NonDeterministic, match="measure must give the same value"):
        fitted.attribute((X[:5], Y[:5]), lambda o, y: o[:, 0] * torch.rand(len(o)))


def test_a_measure_that_ignores_its_batch_is_refused_and_the_way_out_works():
    fitted = fit(nn.Linear(3, 2))
    p = 6

    def every(task, params, batch):
        return params["weight"].reshape(-1)[:p]

    with pytest.raises(ScalarLoss, match="ignores its batch"):
        fitted.attribute((X[:p], Y[:p]), every)
    for k in range(p):
        found = fitted.attribute(
            (X[:1], Y[:1]), lambda task, params, batch, k=k: params["weight"].reshape(-1)[k : k + 1]
        )
        moved = [fitted.parameter_influence(i)["weight"].reshape(-1)[k] for i in range(3)]
        torch.testing.assert_close(
            found.values[0, :3], torch.stack(moved) / len(X), rtol=1e-9, atol=1e-12
        )


# -- gradients ------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A head for each domain."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 2) for _ in range(2)])

    def forward(self, x, domain):
        z, out = torch.tanh(self.trunk(x)), x.new_zeros(len(x), 2)
        for k, head in enumerate(self.heads):
            if bool((domain == k).any()):
                out = out.index_put((domain == k,), head(z[domain == k]))
        return out


def heads(seed=0):
    torch.manual_seed(seed)
    return Heads().double().eval()


@pytest.mark.filterwarnings("ignore:examples are taken one at a time")
def test_examples_in_the_order_of_their_domain_have_the_scores_of_any_other_order():
    domain = (torch.arange(40) >= 20).long()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    queries = (X[:3], domain[:3], Y[:3])

    def scores(index):
        task = uw.Task(heads(), uw.CrossEntropy())
        method = uw.Influence(uw.EKFAC(labels=uw.labels.Observed()), damping=1.0)
        fitted = method.fit(task, (X[index], domain[index], Y[index]))
        return at(fitted, 0).attribute(queries).values

    torch.testing.assert_close(
        scores(torch.arange(40))[:, order], scores(order), rtol=1e-9, atol=1e-12
    )


def test_a_head_that_the_training_data_never_reach_counts_as_zero_with_a_note():
    domain = torch.zeros(40, dtype=torch.long)
    task = uw.Task(heads(), uw.CrossEntropy())
    method = uw.Influence(uw.EKFAC(labels=uw.labels.Observed()), damping=1.0)
    with pytest.warns(UserWarning, match=r"no gradient reaches heads\.1\.weight"):
        fitted = method.fit(task, (X, domain, Y))
    found = at(fitted, 0).attribute((X[:3], domain[:3], Y[:3]))
    assert any("no gradient reaches heads.1.weight" in note for note in found.provenance.notes)
    without = uw.Task(heads(), uw.CrossEntropy(), params=("trunk.*", "heads.0.*"))
    expected = at(method.fit(without, (X, domain, Y)), 0).attribute((X[:3], domain[:3], Y[:3]))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-10, atol=1e-14)


def test_parameters_that_nothing_reaches_are_refused():
    model = Then(lambda f: f)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(NotDifferentiable, match=r"unused\.weight"):
        fit(model, params="unused*")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_queries_that_do_not_reach_a_head_are_noted_and_right(curvature):
    """Their gradient there is zero: the scores of queries of both domains hold theirs as rows."""
    domain = torch.arange(40) % 2
    task = uw.Task(heads(), uw.CrossEntropy())
    fitted = uw.Influence(curvature, damping=1.0, tolerance=0).fit(task, (X, domain, Y))
    both = fitted.attribute((X, domain, Y))
    one = fitted.attribute((X[::2], domain[::2], Y[::2]))
    torch.testing.assert_close(one.values, both.values[::2], rtol=1e-9, atol=1e-13)
    assert any("of the queries" in note and "heads.1" in note for note in one.provenance.notes)
    assert not any("of the queries" in note for note in both.provenance.notes)


# -- rounding that is no coupling -----------------------------------------------------------------


def test_least_squares_in_natural_units_in_float32():
    """A residual times an output rounds by far more than either; no example sees another."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(100, 3, generator=g, dtype=torch.float64)
        noise = 0.3 * torch.randn(100, generator=g, dtype=torch.float64)
        y = 1e4 * (X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + noise)[:, None]
        A = torch.cat([X, torch.ones_like(y)], dim=1)
        theta = torch.linalg.lstsq(A, y).solution
        model = nn.Linear(3, 1)
        model.weight.data, model.bias.data = theta[:3].T.clone(), theta[3].clone()
        task = uw.Task(model.float(), uw.SquaredError())
        uw.Influence(damping=1e-3).fit(task, (X.float(), y.float()))


class Autocast(nn.Module):
    """Computes in bfloat16 inside of forward, in parameters that no layer holds."""

    def __init__(self, back):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = nn.ParameterList(
            [nn.Parameter(torch.randn(16, 16, generator=g) / 3) for _ in range(20)]
        )
        self.out, self.back = nn.Parameter(torch.randn(16, 3, generator=g)), back

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            for w in self.w:
                x = torch.tanh(x @ w)
            x = x @ self.out
        return x.float() if self.back else x


@pytest.mark.filterwarnings("ignore:the model computes in bfloat16")
@pytest.mark.parametrize("back", [True, False], ids=["cast back", "as it is"])
def test_autocast_inside_of_forward_rounds(back):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(37, 16, generator=g), torch.arange(37) % 3
    for curvature in (uw.EKFAC(), uw.GGN()):
        task = uw.Task(Autocast(back).float().eval(), uw.CrossEntropy())
        fitted = uw.Influence(curvature, uw.solvers.Auto(), damping=1.0).fit(task, (x.float(), y))
        assert bool(fitted.attribute((x[:2].float(), y[:2])).values.isfinite().all())


@pytest.mark.parametrize("curvature", [uw.GGN(), uw.EKFAC(), uw.Diagonal()])
def test_missing_values_are_named_as_such(curvature):
    bad = X.clone()
    bad[5, 1] = torch.nan
    with pytest.raises(uw.errors.NonFinite, match="example 5, loss nan, whose inputs"):
        fit(net(), train=(bad, Y), curvature=curvature)


def test_lazy_layers_are_named_and_the_way_out_works():
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(uw.errors.UnsupportedModel, match="call the model once"):
        uw.Task(model, uw.CrossEntropy())
    model.double()(X)
    uw.Task(model, uw.CrossEntropy())


# -- coupled in gradients alone --------------------------------------------------------------------


class Centering(torch.autograd.Function):
    """The identity, whose backward pass takes the mean over the batch out."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(dim=0)


def hooked(change):
    def apply(x):
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(change)
        return x

    return apply


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner, self.function, self.outer = nn.Linear(3, 4), function, nn.Linear(4, 2)

    def forward(self, x):
        return self.outer(self.function(torch.tanh(self.inner(x))))


COUPLED = {
    "an autograd function": Centering.apply,
    "a hook that normalizes": hooked(lambda g: g / g.norm()),
    "a hook that clips by norm": hooked(lambda g: g * (1e-3 / g.norm()).clamp(max=1.0)),
}
OWN = {
    "nothing": lambda x: x,
    "a hook that clips each": hooked(lambda g: g.clamp(-1e-3, 1e-3)),
    "a kink": torch.relu,
    "a reversal": hooked(lambda g: -g),
}


@pytest.mark.parametrize("curvature", [uw.GGN(), uw.EKFAC()], ids=repr)
@pytest.mark.parametrize("name", COUPLED)
def test_examples_that_share_a_backward_pass_are_refused(name, curvature):
    torch.manual_seed(0)
    model, data = (
        Between(COUPLED[name]).double(),
        (torch.randn(30, 3).double(), torch.arange(30) % 2),
    )
    with pytest.raises(NonDeterministic, match=r"gradient of an example(.|\n)*backward pass"):
        uw.Influence(curvature, damping=1.0).fit(uw.Task(model, uw.CrossEntropy()), data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_examples_whose_gradients_are_their_own_are_answered(name, dtype):
    torch.manual_seed(0)
    model = Between(OWN[name]).to(dtype)
    data = torch.randn(30, 3).to(dtype), torch.arange(30) % 2
    require_answerable(uw.Task(model, uw.CrossEntropy()), as_data(data), "training data")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [1, 40])
def test_gradients_of_a_perfect_fit_are_rounding_and_no_coupling(width, dtype):
    """Residuals of 0 but for rounding, which differs between a batch and an example alone."""
    torch.manual_seed(0)
    model = Between(torch.tanh).to(dtype) if width == 1 else nn.Linear(width, 2).to(dtype)
    x = torch.randn(30, 3 if width == 1 else width).to(dtype)
    with torch.no_grad():
        data = x, model(x)
    require_answerable(uw.Task(model, uw.SquaredError()), as_data(data), "training data")
