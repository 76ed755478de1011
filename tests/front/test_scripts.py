"""What a training script holds, as it is: loaders, data sets, losses, a model in train()."""

import functools
import re
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import (
    DataLoader,
    Dataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import upweight as uw
from tests.front.test_attribute import QUERIES, TRAIN, N, X, Y, network
from upweight.errors import (
    DataError,
    DtypeError,
    NonDeterministic,
    ScalarLoss,
    ShapeError,
    SpecError,
)

CE = nn.CrossEntropyLoss()
ask = functools.partial(uw.attribute, method=uw.GradientDot())
"""A quick method: here it matters what reaches it."""


class Examples(Dataset):
    """Of any shape: read(i) of the first n rows."""

    def __init__(self, read, n=N):
        self.read, self.n = read, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.read(i)


def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        CE(model(X), Y).backward()
        optimizer.step()
    return model


MODEL = trained()
EXPECTED = ask(MODEL, TRAIN, QUERIES, CE).values
LABELLED = Examples(lambda i: {"image": X[i], "label": int(Y[i]), "index": i})


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (Examples(lambda i: (X[i], int(Y[i]))), None),
        (Examples(lambda i: (X[i], Y[i], i)), "batch[2], its place in the data"),
        (Examples(lambda i: (i, X[i], Y[i])), "model(batch[1]) against batch[2]"),
        (Examples(lambda i: (X[i], Y[i], f"{i}.png")), "batch[2], a text"),
        (LABELLED, "model(batch['image']) against batch['label']; left out: batch['index'], its"),
        (Examples(lambda i: {"pixels": X[i], "digit": Y[i]}), "against batch['digit']"),
        ({"image": X, "label": Y, "index": torch.arange(N)}, "batch['index'], its place"),
        (Examples(lambda i: ((X[i],), Y[i])), "model(batch[0][0]) against batch[1]"),
        (((X,), Y), "model(batch[0][0]) against batch[1]"),
        (Examples(lambda i: {"x": {"input": X[i]}, "y": Y[i]}), "model(input=batch['x']['input'])"),
        (Examples(lambda i: ({"input": X[i]}, Y[i])), "model(input=batch[0]['input']) against"),
    ],
)
def test_each_entry_of_an_example_is_found(train, said, capsys):
    scores = ask(MODEL, train, QUERIES, CE)
    assert_close(scores.values, EXPECTED, rtol=0, atol=0)
    lines = capsys.readouterr().err.splitlines()
    told = [line.removeprefix("upweight: ") for line in lines]
    assert len(told) == (said is not None) and all(said in each for each in told)
    assert set(told) <= set(scores.provenance.notes)
    assert scores.context.labels("train", [0, 5]) == Y[[0, 5]].tolist()


def test_a_shuffling_loader_is_read_in_the_order_of_its_data_set(capsys):
    def together(items):
        return torch.stack([i["image"] for i in items]), torch.tensor([i["label"] for i in items])

    for collate in (None, together):
        loader = DataLoader(LABELLED, 8, shuffle=True, drop_last=True, collate_fn=collate)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a line, not a warning from inside of the library
            scores = ask(MODEL, loader, LABELLED if collate is None else QUERIES, CE)
        rows = slice(0, 5) if collate is None else slice(None)
        expected = ask(MODEL, TRAIN, TRAIN, CE).values if collate is None else EXPECTED
        assert_close(scores.values[rows], expected[rows], rtol=1e-10, atol=1e-13)
        assert "shuffling (RandomSampler) was left out: example i is dataset[i]" in (
            capsys.readouterr().err
        )
    # The same reading for whatever is asked later.
    scores = ask(MODEL, LABELLED, [LABELLED[3]], CE)
    again = scores.require_context().fitted.attribute(LABELLED)
    assert_close(again.values[3], scores.values[0], rtol=1e-10, atol=1e-13)
    assert len(scores.self_influence().top(2)) == 2
    assert "self-influence" not in str(scores.table(0, 2)) and len(scores.table(0, 2)) == 4


def test_one_example_as_a_data_set_returns_it():
    full = ask(MODEL, LABELLED, LABELLED, CE).values
    for query in (LABELLED[3], (X[3], int(Y[3])), (X[3], Y[3])):
        found = ask(MODEL, LABELLED, query, CE).values
        assert_close(found, full[3:4], rtol=1e-10, atol=1e-13)
    model = MODEL
    alone = ask(model, TRAIN, X[3], CE).values
    classed = ask(model, TRAIN, (X[3:4], model(X[3:4]).argmax(1)), CE).values
    assert_close(alone, classed, rtol=0, atol=0)


class TwoInputs(nn.Module):
    """f(x, z) of two halves of the inputs; `take` says how they come, `give` what is returned."""

    def __init__(self, take=lambda *xz: xz, give=lambda f: f):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 3).double(), nn.Linear(2, 3).double()
        self.take, self.give = take, give

    def forward(self, x, z):
        return self.give(self.first(x) + self.second(z).tanh())


class OneDict(TwoInputs):
    def forward(self, batch):
        return super().forward(batch["x"], batch["z"])


def test_two_inputs_in_one_entry_and_a_model_that_takes_a_dict(capsys):
    model = TwoInputs()
    x, z = X[:, :2], X[:, 2:]
    expected = ask(model, (x, z, Y), (x[:5], z[:5], Y[:5]), CE).values
    forms = {
        "model(batch[0][0], batch[0][1]) against batch[1]": lambda i: ((x[i], z[i]), Y[i]),
        "model(x=batch['a']['x'], z=batch['a']['z']) against batch['y']":
            lambda i: {"a": {"x": x[i], "z": z[i]}, "y": Y[i]},
    }  # fmt: skip
    for said, read in forms.items():
        train = Examples(read)
        for queries in (Examples(read, 5), [train[k] for k in range(5)]):
            assert_close(ask(model, train, queries, CE).values, expected, rtol=0, atol=0)
            assert said in capsys.readouterr().err
        assert_close(ask(model, train, train[3], CE).values, expected[3:4], rtol=1e-9, atol=1e-12)
    arrays = ask(model, ((x, z), Y), ((x[:5], z[:5]), Y[:5]), CE)
    assert_close(arrays.values, expected, rtol=0, atol=0)
    capsys.readouterr()
    named = Examples(lambda i: {"x": x[i], "z": z[i], "label": Y[i]})
    one = ask(OneDict(), named, [named[k] for k in range(5)], CE)
    assert "model({'x': batch['x'], 'z': batch['z']}) against" in capsys.readouterr().err
    assert_close(one.values, expected, rtol=0, atol=0)


def test_a_model_that_returns_several_tensors():
    x, z = X[:, :2], X[:, 2:]
    train, queries = (x, z, Y), (x[:5], z[:5], Y[:5])
    expected = ask(TwoInputs(), train, queries, CE).values
    named = ask(TwoInputs(give=lambda f: {"logits": f, "aux": f.detach()}), train, queries, CE)
    assert_close(named.values, expected, rtol=0, atol=0)
    for give in (lambda f: (f, f.detach()), lambda f: {"out": f, "aux": f.detach()}):
        model = TwoInputs(give=give)
        with pytest.raises(ShapeError, match="must return one tensor") as caught:
            ask(model, train, queries, CE)
        way = re.search(r"forward=(lambda model, batch: .*)\) in place", str(caught.value))[1]
        found = ask(uw.Task(model, CE, forward=eval(way)), train, queries)
        assert_close(found.values, expected, rtol=0, atol=0)


class Sequences(nn.Module):
    """Takes [b, t] and [t] alike, as recurrent layers and embeddings do."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4).double(), nn.Linear(4, 7).double()

    def forward(self, x):
        return self.out(self.embed(x).tanh())


def test_one_sequence_is_one_query():
    tokens = torch.randint(0, 7, (N, 6), generator=torch.Generator().manual_seed(0))
    train = Examples(lambda i: (tokens[i, :-1], tokens[i, 1:]))
    model, loss = Sequences(), uw.CrossEntropy()
    expected = ask(model, train, [train[3]], loss).values
    found = ask(model, train, train[3], loss).values
    assert found.shape == (1, N) and torch.equal(found, expected)
    both = ask(model, train, (tokens[:2, :-1], tokens[:2, 1:]), loss).values
    assert both.shape == (2, N)


def test_yes_or_no_as_torch_has_it():
    """Queries without labels, and suspects, of BCEWithLogitsLoss with outputs [b] and [b, 1]."""
    yes, loss = (X[:, 0] > 0).double(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0).double())
    for column in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 1), nn.Identity() if column else nn.Flatten(0)).double()
        y = yes[:, None] if column else yes
        scores = uw.attribute(model, (X, y), (X[:5], y[:5]), loss, penalty=uw.L2(0.1))
        assert len(scores.suspects().frame()) and ".suspects()" in repr(scores)
        alone = uw.attribute(model, (X, y), X[:5], loss, penalty=uw.L2(0.1))
        taken = (model(X[:5]) > 0).double()
        said = uw.attribute(model, (X, y), (X[:5], taken), loss, penalty=uw.L2(0.1))
        assert_close(alone.values, said.values, rtol=0, atol=0)


def test_loaders_that_leave_out_or_weigh_say_what_to_pass():
    rows = Examples(lambda i: (X[i], Y[i]))
    loader = DataLoader(rows, 8, sampler=SubsetRandomSampler([5, 1, 7]))
    with pytest.raises(DataError) as caught:
        ask(MODEL, loader, QUERIES, CE)
    way = str(caught.value).partition("Way out: ")[2].rstrip(". ")
    found = ask(MODEL, eval(way, {"torch": torch, "loader": loader}), QUERIES, CE)
    assert_close(found.values, ask(MODEL, Subset(rows, [1, 5, 7]), QUERIES, CE).values)
    sampler = WeightedRandomSampler(torch.arange(1.0, N + 1), N)
    with pytest.raises(DataError, match=r"v\[i\] = n times") as caught:
        ask(MODEL, DataLoader(rows, 8, sampler=sampler), QUERIES, CE)
    assert "attribute(model, (X, (y, v)), queries, upweight.Weighted(loss))" in str(caught.value)
    v = (N * sampler.weights / sampler.weights.sum()).double()
    weighted = ask(MODEL, (X, (Y, v)), (X[:5], (Y[:5], torch.ones(5))), uw.Weighted(CE))
    assert_close(weighted.values, ask(MODEL, TRAIN, (X[:5], Y[:5]), CE).values * v)


def test_of_half_precision_the_way_out_is_the_float_model():
    half = torch.nn.Sequential(*[each for each in network(torch.float16)]).eval()
    with pytest.raises(DtypeError, match=r"Way out: model\.float\(\)"):
        ask(half, (X.float(), Y), (X[:5].float(), Y[:5]), CE)
    assert ask(half.float(), (X.float(), Y), (X[:5].float(), Y[:5]), CE).values.shape == (5, N)


def test_a_choice_that_takes_long_says_how_long(capsys):
    uw.attribute(network(), TRAIN, QUERIES, CE, budget=1e-6)
    assert re.search(r"this is the quickest; it takes about \d", capsys.readouterr().err)


class Steered(nn.Module):
    """Takes one input or two."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 60).double()

    def forward(self, x, z=None):
        return self.layer(x) if z is None else self.layer(x) * (1 + z[:, None])


def test_two_readings_are_refused_with_both_written_out():
    train = Examples(lambda i: (X[i], Y[i], i))
    with pytest.raises(SpecError, match="2 readings fit") as caught:
        ask(Steered(), train, QUERIES, CE)
    ways = re.findall(
        r"forward=(lambda model, batch: \(model\(.*?\), batch\[\d\]\))", str(caught.value)
    )
    assert len(ways) == 2 and ways[0] != ways[1]
    for way in ways:
        task = uw.Task(Steered(), CE, forward=eval(way))
        assert ask(task, train, [train[3]]).values.shape == (1, N)


def test_an_entry_that_may_be_a_weight_is_refused_with_both_ways_out():
    v = X[:, 0].exp()
    for train in (
        Examples(lambda i: (X[i], Y[i], v[i])),
        Examples(lambda i: {"a": X[i], "label": Y[i], "v": v[i]}),
    ):
        with pytest.raises(SpecError, match="is left over") as caught:
            ask(MODEL, train, QUERIES, CE)
        plain, weighted = re.findall(
            r"forward=(lambda model, batch: .*?)\), train", str(caught.value)
        )
        found = ask(uw.Task(MODEL, CE, forward=eval(plain)), train, [train[2]])
        whole = ask(MODEL, TRAIN, TRAIN, CE)
        assert_close(found.values[0], whole.values[2], rtol=1e-10, atol=1e-13)
        task = uw.Task(MODEL, uw.Weighted(uw.CrossEntropy()), forward=eval(weighted))
        found = ask(task, train, [train[2]])
        whole = ask(uw.Task(MODEL, uw.Weighted(uw.CrossEntropy())), (X, (Y, v)),
                             (X, (Y, v)))  # fmt: skip
        assert_close(found.values[0], whole.values[2], rtol=1e-10, atol=1e-13)


def test_a_model_in_training_mode_is_asked_as_it_predicts_and_comes_back_in_it(capsys):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))

    model = made().double().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scores = uw.attribute(model, TRAIN, QUERIES, CE)
    assert "2 layers answer otherwise (first 1 (BatchNorm1d))" in capsys.readouterr().err
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    expected = uw.attribute(made().double().eval(), TRAIN, QUERIES, CE)
    assert_close(scores.values, expected.values, rtol=0, atol=0)
    # It is the same parameters, so that a change to them is seen.
    model[0].weight.data += 1
    with pytest.raises(uw.errors.ModelChanged):
        scores.self_influence()


def focal(f, y):
    losses = nn.functional.cross_entropy(f, y, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


class Focal(nn.Module):
    def forward(self, f, y):
        return focal(f, y).mean()


def one_at_a_time(f, y):
    return sum(focal(f[i : i + 1], y[i : i + 1])[0] for i in range(len(f)) if int(y[i]) >= 0)


def test_a_loss_that_returns_the_mean_or_sum_of_its_batch(capsys):
    expected = ask(MODEL, TRAIN, QUERIES, focal).values
    capsys.readouterr()
    for loss, how in ((Focal(), "mean"), (lambda f, y: focal(f, y).sum(), "sum"),
                      (one_at_a_time, "sum")):  # fmt: skip
        scores = ask(MODEL, TRAIN, QUERIES, loss)
        assert f"which is the {how} over its examples" in capsys.readouterr().err
        assert_close(scores.values, expected, rtol=1e-8, atol=1e-11)
    weight = torch.tensor([1.0, 2.0, 5.0]).double()

    def weighted(f, y):
        return nn.functional.cross_entropy(f, y, weight=weight)

    for loss in (weighted, lambda f, y: (f @ f.T).logsumexp(1).mean()):
        with pytest.raises(ScalarLoss, match=r"(2|40) examples") as caught:
            ask(MODEL, TRAIN, QUERIES, loss)
    assert "nn.CrossEntropyLoss(weight=w)" in str(caught.value)
    # One that is cross-entropy by another name is told so.
    named = ask(MODEL, TRAIN, QUERIES, lambda f, y: nn.functional.cross_entropy(f, y))
    assert "those of torch.nn.CrossEntropyLoss(): pass that" in capsys.readouterr().err
    assert_close(named.values, EXPECTED, rtol=1e-9, atol=1e-12)
    # The way out, and a function of PyTorch's is the loss that it is.
    one = ask(MODEL, TRAIN, QUERIES, nn.CrossEntropyLoss(weight=weight)).values
    functional = nn.functional.cross_entropy
    two = ask(MODEL, TRAIN, QUERIES, functools.partial(functional, weight=weight))
    assert_close(two.values, one, rtol=0, atol=0)
    plain = ask(MODEL, TRAIN, QUERIES, functional).values
    assert_close(plain, EXPECTED, rtol=0, atol=0)


def test_random_augmentation_is_seen_and_one_draw_of_it_is_a_way_out():
    train = Examples(lambda i: (X[i] + torch.rand(4).double(), Y[i]))
    with pytest.raises(NonDeterministic, match="random augmentation") as caught:
        ask(MODEL, DataLoader(train, 8, shuffle=True), QUERIES, CE)
    draw = re.search(r"\[dataset\[i\] .*?\)\)\]", str(caught.value)).group()
    kept = eval(draw, {"dataset": train})
    found = ask(MODEL, kept, QUERIES, CE).values
    arrays = torch.stack([x for x, _ in kept]), Y
    assert_close(found, ask(MODEL, arrays, QUERIES, CE).values, rtol=1e-9, atol=1e-12)


def test_more_queries_than_training_examples_are_remarked(capsys):
    scores = ask(MODEL, QUERIES, TRAIN, CE)
    err = capsys.readouterr().err
    assert "more queries (40) than training examples (5)" in err
    assert "attribute(model, train, queries)" in err and scores.values.shape == (N, 5)
    ask(MODEL, TRAIN, TRAIN, CE)
    assert "wrong way" not in capsys.readouterr().err
