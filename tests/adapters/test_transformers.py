"""Models of transformers by the adapters: their own loss, whatever the form and padding of data.

Random and tiny, offline. Where transformers is absent, nothing here runs.
"""

import functools
import json
import warnings
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import upweight as uw
import upweight.adapters.transformers as hf
from upweight.errors import DataError, SpecError, UnsupportedModel, UpweightError
from upweight.front.opened import opened
from upweight.task.data import ArrayData
from upweight.task.identity import contents

if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, and its dependencies'


@functools.cache
def library(name="transformers"):
    """Imported when a test asks: it takes seconds, and every process of the suite collects."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = import_module(name)
    if name == "transformers":
        found.logging.set_verbosity_error()
    return found


V = 23
S = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
L = S | {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
}
K = L | {"num_key_value_heads": 1}
GPT2 = S | {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
# name: class, configuration, its settings
FAMILIES = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", K),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", K),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", K | {"head_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", L),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", K | {"head_dim": 4}),
    "OPT": ("OPTForCausalLM", "OPTConfig", L | {"ffn_dim": 12, "word_embed_proj_dim": 8}),
    "Phi": ("PhiForCausalLM", "PhiConfig", K),
    "Falcon": ("FalconForCausalLM", "FalconConfig", L),
    "Bloom": ("BloomForCausalLM", "BloomConfig", S | {"hidden_size": 8, "n_layer": 1, "n_head": 2}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", K),
    "RWKV": (
        "RwkvForCausalLM",
        "RwkvConfig",
        S | {"hidden_size": 8, "num_hidden_layers": 2, "context_length": 32, "rescale_every": 0},
    ),
    "classes": ("BertForSequenceClassification", "BertConfig", L | {"num_labels": 3}),
    "one number": ("BertForSequenceClassification", "BertConfig", L | {"num_labels": 1}),
    "several labels": (
        "BertForSequenceClassification",
        "BertConfig",
        L | {"num_labels": 3, "problem_type": "multi_label_classification"},
    ),
    "classes of tokens": ("BertForTokenClassification", "BertConfig", L | {"num_labels": 3}),
    "last token": ("GPT2ForSequenceClassification", "GPT2Config", GPT2 | {"num_labels": 3}),
    "BERT": ("BertForMaskedLM", "BertConfig", L),
    "ELECTRA": ("ElectraForMaskedLM", "ElectraConfig", L | {"embedding_size": 8}),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        L | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0, "vocab_size": V, "pad_token_id": 0, "eos_token_id": 2},
    ),
    "BART": (
        "BartForConditionalGeneration",
        "BartConfig",
        {f"{side}_{what}": k for side in ("encoder", "decoder")
         for what, k in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 12))}
        | S | {"d_model": 8, "decoder_start_token_id": 2, "forced_eos_token_id": None},
    ),
}  # fmt: skip


def built(name, dtype=torch.float64):
    kind, config, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(library(), kind)(getattr(library(), config)(**settings)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def rows(name, lengths=(5, 3, 8, 4, 6, 7, 4)):
    """Examples of several lengths, as lists: with no mask, and no labels where none are needed."""
    g, found = torch.Generator().manual_seed(0), []
    labels = {
        "classes": lambda ids: len(ids) % 3,
        "last token": lambda ids: len(ids) % 3,
        "one number": lambda ids: len(ids) / 3,
        "several labels": lambda ids: [float(len(ids) % 2), 1.0, 0.0],
        "classes of tokens": lambda ids: [x % 3 for x in ids],
        "T5": lambda ids: ids[::2],
        "BART": lambda ids: ids[::2],
    }
    masked = {k: lambda ids: [x if t % 2 else -100 for t, x in enumerate(ids)]
              for k in ("BERT", "ELECTRA", "ModernBERT")}  # fmt: skip
    for n in lengths:
        row = {"input_ids": torch.randint(3, V, (n,), generator=g).tolist()}
        if name in labels | masked:
            row["labels"] = (labels | masked)[name](row["input_ids"])
        found.append(row)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_models_own(name):
    model = built(name)
    task = hf.task(model)
    batch = task.training(rows(name)).batch(0, 7)
    y = batch["labels"]
    if name in ("one number", "several labels", "classes", "last token"):
        counted = len(y)
    else:
        counted = int((y[:, 1:] != -100).sum() if hf.kind(model) == "causal_lm" else (y >= 0).sum())
    before = dict(vars(model.config))
    own = float(model(**batch).loss) * counted
    model.config.problem_type = before.get("problem_type")
    found = task.losses(task.theta(), batch)
    assert found.shape == (7,) and bool((found > 0).all())
    # Most compute their loss in float32, whatever they are in.
    assert abs(float(found.sum()) / own - 1) < 1e-6


@pytest.mark.parametrize(
    "name, dtype, labels, rtol",
    [
        ("GPT-2", torch.float64, uw.labels.Sampled(), 1e-12),
        ("GPT-2", torch.float64, uw.labels.Observed(), 1e-12),
        ("GPT-NeoX", torch.float32, uw.labels.Sampled(), 1e-5),
        ("Llama", torch.float32, uw.labels.Sampled(), 1e-5),
        ("Llama", torch.float32, uw.labels.Observed(), 1e-5),
        ("classes", torch.float64, uw.labels.Observed(), 1e-12),
        ("BERT", torch.float64, uw.labels.Observed(), 1e-12),
    ],
)
def test_neither_padding_nor_batches_change_a_row(name, dtype, labels, rtol, monkeypatch):
    """G2: eight more positions, and batches of one, three and all, each padded to its longest."""
    task = hf.task(built(name, dtype))
    short = task.training(rows(name))
    more = short.batch(0, 7)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    more = {k: F.pad(x, (0, 8), value=fills[k]) if x.ndim > 1 else x for k, x in more.items()}
    queries, found = short.take([0, 2, 4]), []
    for data, size in ((more, 7), (short, 7), (short, 3), (short, 1)):
        monkeypatch.setattr("upweight.curvature.layerwise.MOST_EXAMPLES", size)
        fitted = uw.Influence(uw.EKFAC(labels), damping=0.1, tolerance=0).fit(task, data)
        found.append((fitted.attribute(queries).values, fitted.self_influence()))
    for others in found[1:]:
        for once, again in zip(found[0], others, strict=True):
            assert float((again - once).abs().max() / once.abs().max()) < rtol


@pytest.mark.parametrize("name", ["Llama", "BERT", "BART"])
def test_a_text_that_attends_to_one_token_alone_is_padded_as_any_other(name, monkeypatch):
    """Nothing depends on its queries and keys: their δ is 0, or a rounding error by the padding."""
    task = hf.task(built(name))
    data = task.training(rows(name, (7, 4, 9, 2, 12, 7, 1, 10)))
    fills, found = {"input_ids": 0, "attention_mask": 0, "labels": -100}, []
    for more, size in ((0, 8), (1, 8), (5, 8), (9, 8), (0, 3), (0, 2)):
        monkeypatch.setattr("upweight.curvature.layerwise.MOST_EXAMPLES", size)
        batch = {k: F.pad(x, (0, more), value=fills[k]) for k, x in data.batch(0, 8).items()}
        method = uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=1e-3, tolerance=0)
        fitted = method.fit(task, batch if more else data)
        found.append(fitted.attribute(data.take([0, 2, 4])).values)
    for others in found[1:]:
        assert float((others - found[0]).abs().max() / found[0].abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_texts_that_share_a_row_do_not_see_each_other(name):
    """Their positions begin anew, and no mask is given: as in training, also beside padding."""
    task = hf.task(built(name))
    ids = [row["input_ids"] for row in rows(name, (7, 4, 9, 5, 6, 3))]
    pairs = [*zip(ids[::2], ids[1::2], strict=True)]
    packed = [
        {"input_ids": a + b, "position_ids": [*range(len(a)), *range(len(b))],
         "labels": [-100, *a[1:], -100, *b[1:]]}
        for a, b in pairs
    ]  # fmt: skip
    data, apart = task.training(packed), task.training(ids)
    theta = task.theta()
    expected = task.losses(theta, apart.batch(0, 6)).reshape(3, 2).sum(dim=1)
    torch.testing.assert_close(task.losses(theta, data.batch(0, 3)), expected)
    # The model's own loss is compared with it; scores are sums over the texts.
    scores = uw.GradientDot().fit(task, data).attribute(task.training(ids[:1])).values
    each = uw.GradientDot().fit(task, apart).attribute(task.training(ids[:1])).values
    torch.testing.assert_close(scores, 2 * each.reshape(1, 3, 2).sum(dim=2))
    # With a mask they do see each other, as they do in training.
    seen = task.training([row | {"attention_mask": [1] * len(row["input_ids"])} for row in packed])
    assert not torch.allclose(task.losses(theta, seen.batch(0, 3)), expected)


def test_rwkv_is_not_to_divide_its_parameters_when_it_is_first_asked():
    """Its way out computes the same; and no cache is filled, which a gradient does not survive."""
    _, _, settings = FAMILIES["RWKV"]
    torch.manual_seed(0)
    made = library().RwkvForCausalLM(library().RwkvConfig(**settings | {"rescale_every": 1})).eval()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with pytest.raises(UnsupportedModel, match=r"RwkvForCausalLM(.|\n)*rescale_every = 0"):
        hf.task(made)
    made.config.rescale_every = 0
    task = hf.task(made)
    data = task.training(rows("RWKV"))
    scores = uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=0.1).fit(task, data)
    assert bool(scores.attribute(data.take([0])).values.isfinite().all())
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    found = task.losses(task.theta(), data.batch(0, 7))
    made.config.rescale_every = 1
    task.model.rwkv.layers_are_rescaled = False
    own = made(**data.take([0])).loss * (len(rows("RWKV")[0]["input_ids"]) - 1)
    assert not torch.equal(made.state_dict()["rwkv.blocks.1.feed_forward.value.weight"],
                           before["rwkv.blocks.1.feed_forward.value.weight"])  # fmt: skip
    assert abs(float(own / found[0]) - 1) < 1e-4  # but for the ε of layer norms


# -- the data that it takes ------------------------------------------------------------------------

TEXTS = [
    "the cat sat on the mat",
    "a dog ran",
    "the dog sat on a cat and a mat",
    "cat",
    "on the mat ran the dog",
]


@functools.cache
def words():
    """A tokenizer of whole words, made here."""
    library("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<mask>", "<s>", "</s>", "<unk>", "user", "assistant"]
    vocabulary = [*special, *sorted({w for text in TEXTS for w in text.split()})]
    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = library().PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="<pad>", mask_token="<mask>", unk_token="<unk>"
    )
    made.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    return made


def same(a, b):
    assert sorted(a) == sorted(b)
    return all(torch.equal(a[k], b[k]) for k in a)


def test_every_form_of_the_same_texts_is_the_same_data(tmp_path):
    datasets = library("datasets")
    tokenizer, task = words(), hf.causal_lm(built("GPT-2"), words())
    expected = hf.text(TEXTS, tokenizer)
    batch = expected.batch(0, 5)
    assert batch["input_ids"].shape == (5, 9) and batch["attention_mask"].sum(1).tolist() == [
        6, 3, 9, 1, 6,
    ]  # fmt: skip
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert expected.batch(1, 2)["input_ids"].shape == (1, 3)
    assert expected.notes == ("1 of 5 texts have one token, which nothing predicts",)
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    raw = datasets.Dataset.from_dict({"text": TEXTS, "source": ["a"] * 5})
    encoded = raw.map(lambda row: tokenizer(row["text"]))
    forms = {
        "texts": TEXTS,
        "a file": path,
        "texts of a dataset": raw,
        "tokens of a dataset": encoded,
        "tensors of a dataset": encoded.with_format("torch"),
        "a loader": torch.utils.data.DataLoader(encoded, batch_size=2),
        "a tokenizer's lists": tokenizer(TEXTS),
        "a tokenizer's tensors": tokenizer(TEXTS, padding=True, return_tensors="pt"),
        "a list of examples": [dict(row) for row in encoded],
    }
    for form, given in forms.items():
        data = task.training(given)
        assert same(data.batch(0, 5), batch), form
        assert contents(data) == contents(expected), form
    assert isinstance(task.training(forms["a tokenizer's tensors"]), ArrayData)
    cut = hf.text(TEXTS, tokenizer, length=4)
    assert cut.batch(0, 5)["input_ids"].shape == (5, 4)
    assert "3 of 5 texts reach 4 tokens, where they are cut" in cut.notes


def test_scores_of_texts():
    task = hf.causal_lm(built("GPT-2"), words())
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, TEXTS)
    scores = fitted.attribute(["the dog sat on a cat and a mat"])
    assert int(scores.values[0].argmin()) == 2 and float(scores.values[0, 3]) == 0
    first = str(scores.top(1)).splitlines()
    assert first[0].endswith("“the dog sat on a cat and a mat”")
    assert f"lowers the loss  2  “{TEXTS[2]}”" in first[-1]
    table = scores.table(k=1)
    assert table.text.tolist() == [TEXTS[i] for i in table.place]
    again = uw.attribute(
        built("GPT-2"),
        hf.text(TEXTS, words()),
        hf.text([TEXTS[2]], words()),
        method=uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)),
    )
    torch.testing.assert_close(again.values, scores.values)


def test_a_query_of_one_token_is_named_and_a_sentence_with_it_is_the_way_out():
    task = hf.causal_lm(built("GPT-2"), words())
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, TEXTS)
    with pytest.raises(DataError, match="1 queries of which no token is predicted: 'cat'") as told:
        fitted.attribute(["cat"])
    assert str(told.value).count("\n") == 3 and "a sentence" in str(told.value)
    assert fitted.attribute(["the cat sat"]).values.abs().max() > 0
    with pytest.raises(DataError, match="2 training examples"):
        task.training(["cat", "dog"])
    # One beside others is told of, also where batches are of one text.
    small = uw.Resources(memory_bytes=1)
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, TEXTS, resources=small)
    with pytest.warns(uw.errors.AssumptionWarning, match="query 1"):
        scores = fitted.attribute(["the cat sat", "dog"])
    assert not scores.values[1].any()


def test_a_given_loss_reads_data_as_the_models_own_does():
    model = built("GPT-2")
    ids = [{"input_ids": torch.tensor(x)} for x in words()(TEXTS)["input_ids"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))
        own = uw.attribute(model, ids, ids[:2], method=method)
        given = uw.attribute(model, ids, ids[:2], nn.CrossEntropyLoss(), method=method)
        smooth = uw.CrossEntropy(label_smoothing=0.1)
        other = uw.attribute(model, ids, ids[:2], smooth, method=method)
    torch.testing.assert_close(given.values, own.values, rtol=0, atol=0)
    assert not torch.allclose(other.values, own.values)
    # Rows (inputs, targets) are pairs that the user made: nothing is moved.
    task = hf.with_loss(hf.causal_lm(model), uw.CrossEntropy())
    assert task.loss == hf.causal_lm(model).loss
    inputs = torch.tensor([[7, 8, 9]])
    outputs, targets = task.call(task.theta(), (inputs, inputs))
    assert outputs.shape[1] == 3 and torch.equal(targets, inputs)
    # A task of another adapter has data that are read with its own loss; its parts make another.
    made = uw.Task(nn.Linear(2, 2), uw.CrossEntropy(), reads=object())
    with pytest.raises(UnsupportedModel, match=r"made\.forward"):
        hf.with_loss(made, uw.CrossEntropy())
    uw.Task(made.model, uw.SquaredError(), made.penalty, made.params, made.forward)


def test_conversations_are_scored_for_their_answers():
    talk = [
        [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": "sat on"},
            {"role": "user", "content": "a dog"},
            {"role": "assistant", "content": "ran"},
        ]
    ]
    tokenizer = words()
    batch = hf.chat(talk, tokenizer).batch(0, 1)
    labels = batch["labels"][0].tolist()
    kept = tokenizer.convert_ids_to_tokens([x for x in labels if x >= 0])
    assert kept == ["sat", "on", "</s>", "ran", "</s>"]
    assert [x for x, y in zip(batch["input_ids"][0].tolist(), labels, strict=True) if y >= 0] == [
        x for x in labels if x >= 0
    ]
    with pytest.raises(DataError, match="answer of the assistant"):
        hf.chat([talk[0][:1]], tokenizer)
    task = hf.causal_lm(built("GPT-2"), tokenizer)
    assert same(task.queries([{"messages": talk[0]}]).batch(0, 1), batch)
    assert same(task.queries(talk).batch(0, 1), batch)  # two messages look like (X, y) as well
    assert "user: the cat" in hf.chat(talk, tokenizer).given.texts[0]
    with pytest.raises(DataError, match="one conversation in place of a list"):
        task.queries(talk[0])


def test_masks_belong_to_the_example():
    tokenizer = words()
    many = hf.text(TEXTS * 40, tokenizer, masked=0.3)
    ids, labels = (many.batch(0, 200)[k] for k in ("input_ids", "labels"))
    plain = hf.text(TEXTS * 40, tokenizer).batch(0, 200)
    kept = labels != -100
    assert bool(kept.any(dim=1).all()) and torch.equal(labels[kept], plain["input_ids"][kept])
    assert torch.equal(ids[~kept], plain["input_ids"][~kept])
    share = float((ids[kept] == tokenizer.mask_token_id).double().mean())
    assert 0.7 < share < 0.9 and 0.25 < float(kept.sum() / plain["attention_mask"].sum()) < 0.45
    assert same(hf.text(TEXTS * 40, tokenizer, masked=0.3).take([7]), many.take([7]))
    task = hf.masked_lm(built("BERT"), tokenizer)
    with pytest.raises(DataError, match="tokens that its inputs lack") as caught:
        task.training(hf.text(TEXTS, tokenizer))
    assert "text(dataset, tokenizer, masked=0.15)" in str(caught.value)
    task.training(hf.text(TEXTS, tokenizer, masked=0.15))


def test_texts_with_labels():
    tokenizer = words()
    rows = [{"text": text, "label": k % 3, "answer": "a cat"} for k, text in enumerate(TEXTS)]
    classes = hf.text(rows, tokenizer, labels="label")
    assert classes.batch(0, 5)["labels"].tolist() == [0, 1, 2, 0, 1]
    answers = hf.text(rows, tokenizer, labels="answer").batch(0, 2)
    assert tokenizer.convert_ids_to_tokens(answers["labels"][0].tolist()) == ["a", "cat"]
    with pytest.raises(DataError, match="labels='label'"):
        hf.text(rows, tokenizer, labels="class")
    with pytest.raises(DataError, match="None in row 1"):
        hf.text([rows[0], rows[1] | {"label": None}], tokenizer, labels="label")
    task = hf.classifier(built("classes"), tokenizer)
    for given, cause in (("answer", "classes by name"), (None, "in another place")):
        with pytest.raises(DataError, match=cause):
            task.training(hf.text(rows, tokenizer, labels=given))


def test_texts_alone_are_asked_about_by_the_class_that_is_predicted():
    model, tokenizer = built("classes"), words()
    found = hf.classifier(model, tokenizer).queries(TEXTS)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = model(**inputs).logits.argmax(dim=1)
    assert found.batch(0, len(TEXTS))["labels"].tolist() == expected.tolist()
    assert any("class that the network predicts" in note for note in found.notes)
    with pytest.raises(DataError, match="labels='label'"):
        hf.classifier(built("several labels"), tokenizer).queries(TEXTS)


def test_tokens_in_any_list():
    task, ids = hf.causal_lm(built("GPT-2")), [[3, 4, 5], [6, 7, 8, 9], [3, 9]]
    expected = task.training([{"input_ids": each} for each in ids])
    for given in (ids, [torch.tensor(x) for x in ids], [np.array(x) for x in ids]):
        assert same(task.training(given).batch(0, 3), expected.batch(0, 3))
    for given in ({"input_ids": ids[1]}, {"input_ids": torch.tensor(ids[1])}, torch.tensor(ids[1])):
        assert same(task.queries(given).batch(0, 1), expected.batch(1, 2))


def test_examples_without_labels_are_refused_with_what_makes_them():
    tokenizer = words()
    tokens = [{"input_ids": x} for x in tokenizer(TEXTS)["input_ids"]]
    for name, kind, way in (
        ("BERT", hf.masked_lm, "hf.text(dataset, tokenizer, masked=0.15)"),
        ("T5", hf.seq2seq, "hf.text(dataset, tokenizer, labels='target')"),
        ("classes", hf.classifier, "hf.text(dataset, tokenizer, labels='label')"),
    ):
        with pytest.raises(DataError, match=r"Given: examples of .*input_ids") as caught:
            kind(built(name), tokenizer).training(tokens)
        assert way in str(caught.value)
    loader = DataLoader(tokens, 2, collate_fn=lambda b: dict(tokenizer.pad(b, return_tensors="pt")))
    task = hf.causal_lm(built("GPT-2"), tokenizer)
    with pytest.raises(DataError, match="without that collate function"):
        task.training(loader)
    assert len(task.training(tokens)) == len(TEXTS)


def test_rows_with_text_and_label_are_data_of_a_classifier(tmp_path):
    tokenizer = words()
    task = hf.classifier(built("classes"), tokenizer)
    rows = [{"text": text, "label": k % 3} for k, text in enumerate(TEXTS)]
    expected = task.training(hf.text(rows, tokenizer, labels="label"))
    for given in (rows, [{"labels": row["label"], "text": row["text"]} for row in rows]):
        found = task.training(given)
        assert found.batch(0, 5)["labels"].tolist() == [0, 1, 2, 0, 1]
        assert torch.equal(found.batch(0, 5)["input_ids"], expected.batch(0, 5)["input_ids"])
    assert task.queries(rows[1]).batch(0, 1)["labels"].tolist() == [1], "one row"
    with pytest.raises(DataError, match="classes by name"):
        task.training([row | {"label": "yes"} for row in rows])


def test_a_text_is_a_query_by_itself(tmp_path):
    for name in ("classes", "GPT-2"):
        task = hf.task(built(name), words())
        assert len(task.queries("the cat sat")) == 1
    file = tmp_path / "a file.jsonl"
    file.write_text("\n".join(map(json.dumps, TEXTS)))
    assert len(task.queries(str(file))) == len(TEXTS)
    with pytest.raises(UpweightError):
        task.queries("no-such-file.jsonl")


def test_asking_for_classes_leaves_nothing_on_the_model():
    class Noting(library().BertForSequenceClassification):
        def forward(self, **inputs):
            self.seen = getattr(self, "seen", 0) + 1
            return super().forward(**inputs)

    model = Noting(library().BertConfig(**L, num_labels=3)).double().eval()
    hf.classifier(model, words()).queries(TEXTS)
    assert "seen" not in vars(model)


def test_more_tokens_than_positions_are_told_from_another_vocabulary():
    long = [" ".join(["cat"] * 40)]
    with pytest.raises(DataError, match="more tokens than the model has positions") as caught:
        uw.attribute(built("GPT-2"), hf.text(long * 4, words()), hf.text(long, words()))
    assert "length=32" in str(caught.value)


def test_padding_on_the_left_that_changes_the_model_is_refused_and_the_ways_out_work():
    task = hf.causal_lm(built("GPT-2"))
    right = task.training(rows("GPT-2"))
    left = {k: x.flip(1) for k, x in right.batch(0, 7).items()}  # of the reversed texts
    del left["labels"]
    with pytest.raises(DataError, match=r"positions of padding on its left(.|\n)*position_ids"):
        task.training(left)
    mask = left["attention_mask"]
    told = task.training(left | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)})
    unpadded = [{"input_ids": row["input_ids"][::-1]} for row in rows("GPT-2")]
    expected = task.losses(task.theta(), task.training(unpadded).batch(0, 7))
    torch.testing.assert_close(task.losses(task.theta(), told.batch(0, 7)), expected)
    # Positions of OPT are counted from the mask, those of rotary embeddings are relative.
    for name in ("OPT", "Llama"):
        hf.causal_lm(built(name)).training(left)


# -- the models that it takes ----------------------------------------------------------------------


def adapted(name="Llama", **more):
    peft = library("peft")
    target = ["q_proj", "up_proj"] if name == "Llama" else ["c_attn"]
    config = peft.LoraConfig(r=2, target_modules=target, fan_in_fan_out=name != "Llama", **more)
    return peft.get_peft_model(built(name), config).double().eval()


def test_adapters_alone_are_attributed_and_fresh_ones_are_blocks_of_zeros():
    task = hf.causal_lm(adapted(task_type="CAUSAL_LM"))
    assert all(".lora_" in name for name in task.layout.names) and len(task.layout.names) == 4
    data = task.training(rows("Llama"))
    for method in (
        uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)),
        uw.DataInf(damping=uw.Relative(0.1)),
        uw.LoGra(),
    ):
        fitted = method.fit(task, data)
        assert sum("lora_A" in note and "0 for all examples" in note for note in fitted.notes) == 2
        found = fitted.attribute(data.take([0, 1])).values
        # The same without them.
        rest = hf.causal_lm(task.model, params="*lora_B*")
        expected = method.fit(rest, data).attribute(data.take([0, 1])).values
        assert bool(found.any())
        if not isinstance(method, uw.LoGra):  # whose projections belong to places in θ
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # Without a task type peft gives no class that says what it is.
    assert hf.kind(adapted()) == "causal_lm"


COUPLED = ("MiniLM", "CLIP", "contrast", "experts")


def coupled(which):
    if which == "MiniLM":
        return library().BertModel(library().BertConfig(**L))
    if which == "experts":
        more = {"num_local_experts": 2, "output_router_logits": True}
        return library().MixtralForCausalLM(library().MixtralConfig(**K, **more))
    if which == "CLIP":

        class CLIP(nn.Linear):
            def forward(self, pixel_values, return_loss=None):
                return super().forward(pixel_values)

        return CLIP(3, 2)

    class SentenceTransformer(nn.Sequential):
        pass

    return SentenceTransformer(nn.Linear(3, 2))


@pytest.mark.parametrize("which", COUPLED)
def test_losses_that_couple_examples_are_refused_by_name(which):
    model = coupled(which).eval()
    for refused in (hf.task, hf.classifier, lambda model: opened(model, [])):
        with pytest.raises(UnsupportedModel, match=type(model).__name__) as caught:
            refused(model)
    if which == "experts":
        # Another loss has no term that balances the experts.
        ids = [{"input_ids": torch.tensor([3, 4, 5])}]
        assert opened(model, ids, uw.CrossEntropy()).task.loss == uw.CrossEntropy(axis=-1)
        model.config.output_router_logits = False
        hf.task(model)
    else:
        assert "FeatureSimilarity" in str(caught.value)


def test_what_can_be_asked_of_an_encoder_instead():
    """Pairs with negatives of their own, a number of all queries, and who is embedded alike."""
    model = coupled("MiniLM").double().eval()
    g = torch.Generator().manual_seed(0)
    data = {"ids": torch.randint(3, V, (6, 3, 5), generator=g), "y": torch.zeros(6).long()}

    def triples(model, batch):
        h = model(batch["ids"].flatten(0, 1)).last_hidden_state[:, 0].unflatten(0, (-1, 3))
        return torch.einsum("bd,bkd->bk", h[:, 0], h[:, 1:]), batch["y"]

    task = uw.Task(model, uw.CrossEntropy(), forward=triples)
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, data)
    assert fitted.attribute(data).values.shape == (6, 6)

    def in_batch(task, params, queries, weights):
        return torch.logsumexp(task.outputs(params, queries)[0], dim=(0, 1))

    assert fitted.attribute(data, uw.Functional(in_batch)).values.shape == (1, 6)
    rows = {"input_ids": data["ids"][:, 0], "y": data["y"]}
    one = uw.Task(
        model, uw.CrossEntropy(), forward=lambda m, b: (m(b["input_ids"])[1][:, :2], b["y"])
    )
    alike = uw.FeatureSimilarity("pooler").fit(one, rows).attribute(rows).values
    assert alike.argmin(dim=1).tolist() == list(range(6))


def test_models_of_another_kind_and_other_losses_are_refused():
    marian = library().MarianMTModel(library().MarianConfig(**FAMILIES["BART"][2]))
    assert hf.kind(marian) == "seq2seq"  # of which its name says nothing
    with pytest.raises(UnsupportedModel, match=r"masked_lm\(model\)"):
        hf.causal_lm(built("BERT"))
    model = built("last token")
    model.config.pad_token_id = None
    with pytest.raises(SpecError, match="pad_token_id = tokenizer"):
        hf.classifier(model)
    with pytest.raises(UnsupportedModel, match=r"causal_lm\(model\), masked_lm"):
        hf.task(nn.Linear(2, 2))

    class Smoothed(library().GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None, labels=None):
            out = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            if labels is not None:
                out.loss = 1.3 * out.loss
            return out

    other = Smoothed(library().GPT2Config(**GPT2)).double().eval()
    with pytest.raises(SpecError, match="own loss"):
        uw.Influence(uw.EKFAC(), damping=0.1).fit(hf.causal_lm(other), rows("GPT-2"))


def test_the_model_comes_back_as_it_was_and_class_names_are_known():
    model = built("classes")
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    task = hf.task(model)
    before = dict(vars(model.config))
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, rows("classes"))
    assert all(getattr(model.config, key) is value for key, value in before.items())
    assert task.reads.classes == ("bad", "fair", "good")
    query = task.queries(rows("classes")[:1])
    named = fitted.relabel_influence(1, "good", query)
    torch.testing.assert_close(named, fitted.relabel_influence(1, 2, query))
