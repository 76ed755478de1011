"""`transformers.Trainer`, recorded: what it did is what a replay by our own optimizers does.

Random and tiny, offline. Where transformers is absent, nothing here runs.
"""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import IterableDataset

import upweight as uw
import upweight.adapters.transformers as hf
from tests.adapters.test_transformers import built, library, rows, words
from tests.training.loops import replayed
from upweight.errors import DataError, SpecError, StaleStore
from upweight.training.record import read_record

pytestmark = pytest.mark.filterwarnings("ignore")
N = 14


def examples(name, n=N):
    return rows(name, [3 + i % 5 for i in range(n)])


def labelled(name, n=N):
    found = examples(name, n)
    return [{"labels": list(row["input_ids"]), **row} for row in found]


def trainer(
    folder, name="classes", every=1, callbacks=(), data=None, model=None, kind=None, **given
):
    """Of 14 examples in batches of 4: the last one of an epoch has 2."""
    t = library()
    settings = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 4, "num_train_epochs": 2,
        "learning_rate": 0.01, "report_to": [], "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    model = built(name)
    for module in model.modules():  # a draw of dropout cannot be replayed
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    recorder = hf.Recorder(folder / "run", every)
    made = (kind or t.Trainer)(
        model, t.TrainingArguments(**(settings | given)), data_collator=hf.Padding(0),
        train_dataset=labelled(name) if data is None else data, callbacks=[recorder, *callbacks],
    )  # fmt: skip
    made.remove_callback(t.PrinterCallback)
    return made, recorder


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [
        ("classes", {"gradient_accumulation_steps": 3, "weight_decay": 0.2, "warmup_steps": 2}, 4),
        ("Llama", {"gradient_accumulation_steps": 3, "max_grad_norm": 0.3}, 4),
        ("Llama", {"train_sampling_strategy": "group_by_length", "data_seed": 3,
                   "max_grad_norm": 0.1, "weight_decay": 0.2}, 8),
        ("BERT", {"max_grad_norm": 0, "optim": "sgd", "dataloader_drop_last": True}, 6),
    ],
)  # fmt: skip
def test_a_replay_of_the_recorded_steps_is_what_trainer_did(tmp_path, name, settings, steps):
    """Accumulation, short batches, clipping, decay by parameter, schedules, means over tokens."""
    made, _ = trainer(tmp_path, name, **settings)
    first = {k: x.clone() for k, x in made.model.state_dict().items()}
    made.train()
    made.model.eval()
    own = hf.from_trainer(made)
    history = own.history
    assert history.kept == tuple(range(steps + 1))
    assert torch.equal(history.state(0).theta, own.task.layout.flatten(
        {k: first[k] for k in own.task.layout.names}))  # fmt: skip
    # Losses of language models are float32 in transformers.
    assert replayed(own.task, own.data, history) < (1e-12 if name == "classes" else 2e-6)
    found = torch.cat([s.indices for s in history.steps()])
    counts = found.bincount(minlength=N)
    assert bool((counts == 2).all()) or settings.get("dataloader_drop_last")
    hooks = [p._post_accumulate_grad_hooks for p in made.model.parameters()]
    assert not any(hooks) and not made.model._forward_hooks


def test_examples_that_a_batch_has_in_one_row_are_read_by_themselves(tmp_path):
    """Without padding: positions begin anew with each, and so does attention."""
    flat = library().DataCollatorWithFlattening(return_position_ids=True)
    made, _ = trainer(tmp_path, "Llama", gradient_accumulation_steps=2, max_steps=3)
    made.data_collator = flat
    made.train()
    own = hf.from_trainer(made)
    assert any("without padding" in note for note in own.notes)
    assert own.data.batch(0, 5)["input_ids"].shape == (5, 7)
    assert replayed(own.task, own.data, own.history) < 2e-6
    assert uw.attribute(made, None, labelled("Llama")[:2], method=uw.GradientDot()).values.any()


def test_scores_are_those_of_the_same_loop_by_hand(tmp_path):
    """`uw.record` around the same steps, clipped and with a decay for each group of parameters."""
    made, _ = trainer(tmp_path, every=4, max_grad_norm=0.1, weight_decay=0.2)
    by_hand = built("classes")
    made.train()
    made.model.eval()
    own = hf.from_trainer(made)
    decays = made.get_decay_parameter_names(by_hand)
    groups = [
        {"params": [p for k, p in by_hand.named_parameters() if (k in decays) is is_in],
         "weight_decay": 0.2 * is_in}
        for is_in in (True, False)
    ]  # fmt: skip
    rule = torch.optim.AdamW(groups, 0.01)
    with uw.record(by_hand, rule, tmp_path / "hand", every=4) as run:
        for step in own.history.steps():
            rule.param_groups[0]["lr"] = rule.param_groups[1]["lr"] = step.lr
            rule.zero_grad()
            by_hand(**own.data.take(step.indices)).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
            rule.step()
            run.step(step.indices, factors=min(1.0, 0.1 / float(norm + 1e-6)))
    task = hf.task(by_hand)
    expected, queries = run.history(task), own.data.subset([0, 1])
    assert torch.allclose(expected.theta, own.history.theta, rtol=1e-6, atol=1e-9)
    method = uw.TracIn(1, batches=True)
    one, other = (
        method.fit(about, own.data, history=history).attribute(queries).values
        for about, history in ((own.task, own.history), (task, expected))
    )
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert all(0.01 < float(s.factors.mean()) < 0.5 for s in expected.steps())
    uw.SOURCE(1, states=1).fit(own.task, own.data, history=own.history)


def test_a_killed_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    class Kill(library().TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 6:
                raise KeyboardInterrupt

    saves = {"save_strategy": "steps", "save_steps": 3}
    whole, recorder = trainer(tmp_path / "whole", every=None, **saves)
    whole.train()
    whole.model.eval()
    task = hf.from_trainer(whole).task
    expected = recorder.history(task)
    assert expected.kept == (0, 3, 4, 6, 8)
    killed, recorder = trainer(tmp_path / "killed", every=None, callbacks=[Kill()], **saves)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert killed.model._forward_hooks
    recorder.close()
    assert not killed.model._forward_hooks
    again, recorder = trainer(tmp_path / "killed", every=None, **saves)
    with pytest.raises(StaleStore, match="resume_from_checkpoint=True"):
        again.train()
    again.train(resume_from_checkpoint=True)
    found = recorder.history(task)
    assert found.kept == expected.kept and found.digest == expected.digest
    assert torch.equal(found.theta, expected.theta)
    other, _ = trainer(tmp_path / "other", **saves)
    with pytest.raises(StaleStore, match="begins with its first step"):
        other.train(resume_from_checkpoint=str(tmp_path / "killed" / "out" / "checkpoint-3"))
    with pytest.raises(SpecError, match="state that was kept"):
        read_record(task, recorder.folder, end=5)
    assert len(read_record(task, recorder.folder, end=4)) == 4


def test_a_recipe_trains_again_without_some_examples(tmp_path):
    made, _ = trainer(tmp_path, max_steps=2, every=4)
    made.train()
    own, state = hf.from_trainer(made), torch.get_rng_state()
    trained = own.recipe.prepare(own.task, own.data)
    assert torch.equal(torch.get_rng_state(), state)
    weights = torch.ones(3, N)
    weights[1, [2, 5]], weights[2, 0] = 0.0, 2.0
    one = trained(weights[:2]).theta
    assert torch.equal(one[0], own.task.theta()) and not torch.equal(one[1], one[0])
    with pytest.raises(SpecError, match="in or out"):
        trained(weights[2:])
    scores = uw.attribute(made, None, labelled("classes")[:2], method=uw.GradientDot())
    assert scores.values.shape == (2, N)


def test_a_trainer_is_asked_as_it_comes_from_training(tmp_path, capsys):
    """Its model is in training mode then; scores are those of the model in eval mode."""
    made, _ = trainer(tmp_path, max_steps=2)
    made.processing_class = words()
    made.train()
    assert made.model.training
    queries, method = labelled("classes")[:3], uw.GradientDot()
    scores = uw.attribute(made, None, queries, method=method)
    assert "training mode" in capsys.readouterr().err and made.model.training
    # One example as the data set returns it, and tokens alone by the class that is predicted.
    one = uw.attribute(made, None, queries[1], method=method)
    assert_close(one.values, scores.values[1:2], rtol=1e-6, atol=1e-9)
    alone = [{"input_ids": row["input_ids"]} for row in queries]
    predicted = uw.attribute(made, None, alone, method=method)
    with torch.no_grad():
        model = made.model.eval()
        classes = [int(model(torch.tensor([r["input_ids"]])).logits.argmax()) for r in alone]
    expected = [row | {"labels": y} for row, y in zip(alone, classes, strict=True)]
    again = uw.attribute(made, None, expected, method=method)
    assert_close(predicted.values, again.values, rtol=1e-6, atol=1e-9)
    assert ".check()" in repr(scores)  # recorded, so its initial weights are known
    # Examples that come as tokens are shown as what the tokenizer reads in them.
    text = made.processing_class.decode(
        made.train_dataset[0]["input_ids"], skip_special_tokens=True
    )
    shown = scores.table(query=0, k=len(scores.values[0]))
    assert shown.set_index("place")["text"][0] == text


def test_a_trainer_that_cannot_be_trained_again_asks_for_a_recipe(tmp_path):
    made, recorder = trainer(tmp_path, max_steps=1)
    made.remove_callback(recorder)
    made.train()
    scores = uw.attribute(made, None, labelled("classes")[:2], method=uw.GradientDot())
    assert ".check(recipe)" in repr(scores)


def test_what_cannot_be_seen_is_refused_by_name(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from labelled("classes")

    class Weighted(library().Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **given):
            labels = inputs.pop("labels")
            return torch.nn.functional.cross_entropy(model(**inputs).logits, labels)

    made, _ = trainer(tmp_path / "a", data=Stream(), max_steps=2)
    with pytest.raises(DataError, match="IterableDataset"):
        made.train()
    made, _ = trainer(tmp_path / "b", optim="adafactor")
    with pytest.raises(SpecError, match="steps are known"):
        made.train()
    made, _ = trainer(tmp_path / "c", kind=Weighted, gradient_accumulation_steps=2)
    with pytest.raises(SpecError, match="step of 2 batches"):
        made.train()
    made, recorder = trainer(tmp_path / "d", kind=Weighted)  # a mean over the examples of a batch
    made.train()
    task = uw.Task(made.model.eval(), uw.CrossEntropy())
    with pytest.raises(SpecError, match="its model's own"):
        hf.from_trainer(made)
    assert all(s.factors is None or bool((s.factors <= 1).all())
               for s in recorder.history(task).steps())  # fmt: skip
    assert isinstance(recorder, library().TrainerCallback)
