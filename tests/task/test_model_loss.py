"""The task's loss is the one that the model computes: causal language models shift their labels."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw
from upweight.errors import SpecError

IDS = torch.cat([(torch.arange(20)[:, None] + torch.arange(7)[None] * k) % 9 for k in (1, 2)])
DATA = {"input_ids": IDS, "labels": IDS}
QUERIES = {key: value[:5] for key, value in DATA.items()}


class Shifting(nn.Module):
    """A language model in the convention of transformers, under any name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 9)

    def forward(self, input_ids, labels=None):
        z = torch.tanh(self.mix(self.embedding(input_ids).cumsum(dim=1)))
        logits = self.head(z)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class TinyForCausalLM(Shifting):
    """Known by its name."""


class Wrapped(TinyForCausalLM):
    """A class of the user's on top of it."""


class Plain(Shifting):
    """Computes the loss that it is scored by."""

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids).logits
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def by_hand(model, batch):
    return model(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]


def scores(model, forward=None, curvature=None):
    task = uw.Task(model.double().eval(), uw.CrossEntropy(), forward=forward)
    method = uw.Influence(curvature or uw.EKFAC(), damping=1.0)
    return method.fit(task, DATA).attribute(QUERIES).values


@pytest.mark.parametrize("curvature", [uw.EKFAC(), uw.GGN()])
def test_a_model_that_shifts_inside_is_refused_and_the_way_out_works(curvature):
    with pytest.raises(SpecError, match=r"(?s)own loss.*forward=uw\.next_token") as caught:
        scores(Shifting(), curvature=curvature)
    task = uw.Task(Shifting().double(), uw.CrossEntropy())
    alone = {key: value[:1] for key, value in DATA.items()}
    own = task.model(**alone).loss.detach()
    assert f"{float(own):.6g} per target" in str(caught.value)
    found = scores(Shifting(), forward=uw.next_token, curvature=curvature)
    assert torch.equal(found, scores(Shifting(), forward=by_hand, curvature=curvature))


@pytest.mark.parametrize("model", [TinyForCausalLM, Wrapped])
def test_a_causal_model_known_by_name_is_shifted(model):
    task = uw.Task(model().double(), uw.CrossEntropy())
    own = torch.stack([task.model(IDS[i : i + 1], IDS[i : i + 1]).loss for i in range(3)]).detach()
    found = task.losses(task.theta(), {key: value[:3] for key, value in DATA.items()})
    torch.testing.assert_close(found / 6, own, rtol=1e-12, atol=0)
    assert torch.equal(scores(model()), scores(Shifting(), forward=by_hand))


def test_a_name_that_promises_another_loss_is_refused():
    class MisnamedForCausalLM(Plain):
        pass

    with pytest.raises(SpecError, match="own loss"):
        scores(MisnamedForCausalLM())


def test_a_model_that_computes_the_task_loss_passes():
    scores(Plain())


def test_a_forward_of_the_users_is_noted_where_it_is_another_loss():
    task = uw.Task(
        Shifting().double(),
        uw.CrossEntropy(),
        forward=lambda model, batch: (model(batch["input_ids"]).logits, batch["labels"]),
    )
    with pytest.warns(UserWarning, match="own loss is another"):
        fitted = uw.Influence(uw.EKFAC(), damping=1.0).fit(task, DATA)
    assert any("own loss is another" in note for note in fitted.notes)


def test_ignored_labels_and_lengths_count_as_in_the_model():
    """A mean over counted targets, of examples with other counts."""
    labels = IDS.clone()
    for i in range(len(labels)):
        labels[i, 3 + i % 4 :] = -100
    data = {"input_ids": IDS, "labels": labels}
    task = uw.Task(TinyForCausalLM().double().eval(), uw.CrossEntropy())
    uw.Influence(uw.EKFAC(), damping=1.0).fit(task, data)
    refused = uw.Task(Shifting().double().eval(), uw.CrossEntropy())
    with pytest.raises(SpecError, match="moved by one position"):
        uw.Influence(uw.EKFAC(), damping=1.0).fit(refused, data)


@pytest.mark.parametrize("loss", ["single_label", "multi_label", "regression"])
def test_losses_of_other_heads_agree(loss):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(3, 2)

        def forward(self, x, labels=None):
            logits = self.net(x)
            if labels is None:
                own = None
            elif loss == "single_label":
                own = F.cross_entropy(logits, labels)
            elif loss == "multi_label":
                own = F.binary_cross_entropy_with_logits(logits, labels)
            else:
                own = F.mse_loss(logits, labels)
            return SimpleNamespace(logits=logits, loss=own)

    x = torch.sin(torch.arange(36.0)).reshape(12, 3).double()
    y = {
        "single_label": torch.arange(12) % 2,
        "multi_label": (x[:, :2] > 0).double(),
        "regression": x[:, 1:] ** 2,
    }[loss]
    ours = {
        "single_label": uw.CrossEntropy(),
        "multi_label": uw.Bernoulli(),
        "regression": uw.SquaredError(),
    }[loss]
    task = uw.Task(Head().double().eval(), ours)
    uw.Influence(uw.GGN(), damping=1.0).fit(task, {"x": x, "labels": y})


# -- wrapped, under another return, another loss, another form of the data -------------------------


class AnyArguments(nn.Module):
    """Passes on whatever it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Compiled(AnyArguments):
    """As torch.compile keeps the model."""

    def __init__(self, inner):
        nn.Module.__init__(self)
        self._orig_mod = inner

    def forward(self, *args, **kwargs):
        return self._orig_mod(*args, **kwargs)


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled])
def test_what_wraps_a_causal_model_is_seen_through(wrap):
    found = scores(wrap(TinyForCausalLM()))
    assert torch.equal(found, scores(Shifting(), forward=by_hand))


def test_a_wrapper_that_names_no_arguments_is_asked_for_its_loss():
    with pytest.raises(SpecError, match="moved by one position"):
        scores(AnyArguments(TinyForCausalLM()))
    found = scores(AnyArguments(TinyForCausalLM()), forward=uw.next_token)
    assert torch.equal(found, scores(Shifting(), forward=by_hand))


@pytest.mark.parametrize(
    "returned",
    [lambda o: (o.loss, o.logits), lambda o: (o.logits, o.loss), lambda o: o.loss],
    ids=["loss first", "loss last", "loss alone"],
)
def test_a_loss_is_recognized_among_what_is_returned(returned):
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Shifting()

        def forward(self, input_ids, labels=None):
            out = self.inner(input_ids, labels)
            return out.logits if labels is None else returned(out)

    with pytest.raises(SpecError, match="moved by one position"):
        scores(Returns())


def test_a_loss_of_the_users_is_refused_where_only_the_shift_is_missing():
    def summed(outputs, targets):
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(dim=1)

    def fit(loss, forward=None):
        task = uw.Task(Shifting().double().eval(), loss, forward=forward)
        return uw.Influence(uw.GGN(), damping=1.0).fit(task, DATA)

    with pytest.raises(SpecError, match=r"forward=uw\.next_token"):
        fit(summed)
    fit(summed, uw.next_token)
    # A scale, or which positions count, is theirs to choose.
    fit(lambda o, y: 3 * F.cross_entropy(o[:, 0], y[:, 1], reduction="none"))


def test_targets_that_are_the_inputs():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Shifting()

        def forward(self, ids):
            return self.inner(ids).logits

    class BareForCausalLM(Bare):
        pass

    def fit(model, forward=None):
        task = uw.Task(model.double().eval(), uw.CrossEntropy(), forward=forward)
        return uw.Influence(uw.EKFAC(), damping=1.0).fit(task, (IDS, IDS))

    with pytest.raises(SpecError, match=r"token that follows(.|\n)*next_token"):
        fit(BareForCausalLM())
    fit(BareForCausalLM(), uw.next_token)
    with pytest.warns(UserWarning, match="targets that are the inputs themselves"):
        fitted = fit(Bare())
    assert any("targets that are the inputs" in note for note in fitted.notes)
