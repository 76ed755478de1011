"""Models of transformers, random and tiny: GPT-2 (transposed maps, tied head), BERT and LLaMA.

transformers is no dependency of the project; where it is absent, nothing here runs.
"""

import functools
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

import upweight as uw
from tests.fitted import at
from tests.gradients.layer_market import gradient_rows
from tests.reference import dense
from upweight.errors import DtypeError
from upweight.gradients.planning import plan
from upweight.task.data import as_data

if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)


@functools.cache
def transformers():
    """Imported when a test asks: it takes seconds, and every process of the suite collects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module("transformers")


SIZES = {"vocab_size": 11}


def gpt2():
    config = transformers().GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=7, **SIZES)
    return transformers().GPT2LMHeadModel(config)


def bert():
    config = transformers().BertConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=7,
        num_labels=3,
        **SIZES,
    )
    return transformers().BertForSequenceClassification(config)


def llama():
    config = transformers().LlamaConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        max_position_embeddings=7,
        **SIZES,
    )
    return transformers().LlamaForCausalLM(config)


def language(model, per_token):
    g = torch.Generator().manual_seed(0)
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=g))
    x = torch.randint(11, (5, 6), generator=g)
    mask = (torch.arange(6) < torch.tensor([6, 4, 6, 3, 5])[:, None]).long()
    labels = torch.where(mask == 1, x, -100) if per_token else torch.randint(3, (5,), generator=g)
    task = uw.Task(model, uw.CrossEntropy())
    return task, as_data({"input_ids": x, "attention_mask": mask, "labels": labels})


@pytest.mark.filterwarnings("ignore")  # transformers' own, and its dependencies'
@pytest.mark.parametrize("build, per_token", [(gpt2, True), (bert, False), (llama, True)])
def test_gradients(build, per_token):
    task, data = language(build(), per_token)
    made = plan(task, task.theta(), data)
    found = gradient_rows(made, data.batch(0, 5))
    torch.testing.assert_close(found, dense.gradients(task, data), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build, per_token", [(gpt2, True), (bert, False), (llama, True)])
def test_every_parameter_has_a_rule(build, per_token):
    task, data = language(build(), per_token)
    assert plan(task, task.theta(), data).notes == ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("labels", [uw.labels.Sampled(), uw.labels.Observed()], ids=repr)
@pytest.mark.parametrize("build", [gpt2, llama])
def test_padding_changes_no_score(build, labels):
    """One position more, as far as these models go."""
    task, data = language(build(), per_token=True)
    short = data.batch(0, 5)
    more = {"input_ids": 3, "attention_mask": 0, "labels": -100}
    longer = {k: torch.nn.functional.pad(x, (0, 1), value=more[k]) for k, x in short.items()}
    method = uw.Influence(uw.EKFAC(labels), damping=0.1)
    once, again = (at(method.fit(task, d), 0).attribute(short).values for d in (short, longer))
    torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-10 * float(once.abs().max()))


@pytest.mark.filterwarnings("ignore")
def test_gpt2_has_the_blocks_of_linear_maps():
    """A bias with its weight, [o, i + 1]."""
    task, data = language(gpt2(), per_token=True)
    blocks = {b.name: b for b in plan(task, task.theta(), data).blocks}
    block = blocks["transformer.h.0.attn.c_attn.weight"]
    assert (block.shape, block.bias) == ((24, 9), "transformer.h.0.attn.c_attn.bias")


@pytest.mark.filterwarnings("ignore")
def test_experts_in_a_dtype_that_their_kernel_lacks():
    """The cause is the dtype; both ways out give the same scores."""
    config = transformers().MixtralConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        num_local_experts=3,
        max_position_embeddings=7,
        **SIZES,
    )
    task, data = language(transformers().MixtralForCausalLM(config), per_token=True)
    method = uw.Influence(uw.EKFAC(uw.labels.Observed()), damping=0.1)
    with pytest.raises(DtypeError, match=r"in torch.float32 the model runs(.|\n)*'eager'"):
        method.fit(task, data)
    config._experts_implementation = "eager"
    exact = at(method.fit(task, data), 0).attribute(data).values
    config._experts_implementation = "grouped_mm"
    task = uw.Task(task.model.float(), uw.CrossEntropy())
    found = at(method.fit(task, data), 0).attribute(data).values
    # An expert sees a few tokens of these: eigenvalues of its covariances lie close, and rounding
    # turns their eigenvectors.
    torch.testing.assert_close(
        found.double(), exact, rtol=1e-3, atol=5e-3 * float(exact.abs().max())
    )


def opt():
    return transformers().OPTForCausalLM(
        transformers().OPTConfig(
            hidden_size=8,
            word_embed_proj_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=12,
            max_position_embeddings=7,
            **SIZES,
        )
    )


def sized(**more):
    return {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 12,
        "max_position_embeddings": 7,
        "pad_token_id": 0,
        **SIZES,
        **more,
    }


def tied_bias():
    config = sized()
    config.pop("num_key_value_heads")
    return transformers().BertForMaskedLM(transformers().BertConfig(**config))


def gemma2():
    return transformers().Gemma2ForCausalLM(transformers().Gemma2Config(**sized(head_dim=4)))


def mixtral():
    config = sized(num_local_experts=3, experts_implementation="eager")
    return transformers().MixtralForCausalLM(transformers().MixtralConfig(**config))


def gpt_oss():
    """Experts with biases, kept as [E, i, o]."""
    config = sized(
        head_dim=4, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager"
    )
    return transformers().GptOssForCausalLM(transformers().GptOssConfig(**config))


def mamba():
    """A convolution and a product with parameters of layers that are never called."""
    more = {"state_size": 4, "time_step_rank": 2, "intermediate_size": 16}
    return transformers().MambaForCausalLM(transformers().MambaConfig(**(sized() | more)))


def adapted(kind):
    def build():
        peft = pytest.importorskip("peft")
        maps = ["v_proj", "down_proj"]
        config = {
            "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=maps),
            "ia3": lambda: peft.IA3Config(target_modules=maps, feedforward_modules=maps[1:]),
        }[kind]()
        return peft.get_peft_model(llama(), config)

    return build


def llama4():
    """Stacks of experts to which every token comes, most as zeros."""
    config = sized(
        head_dim=4,
        num_local_experts=3,
        intermediate_size_mlp=12,
        moe_layers=[1],
    )
    return transformers().Llama4ForCausalLM(transformers().Llama4TextConfig(**config))


def recurrent_gemma():
    """Gates that are stacks, by head, with biases."""
    config = sized(head_dim=4, lru_width=8, block_types=["recurrent", "attention"])
    return transformers().RecurrentGemmaForCausalLM(transformers().RecurrentGemmaConfig(**config))


def deberta():
    """Maps of a table of distances; the head is the embedding's tensor."""
    config = sized(
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        type_vocab_size=0,
        position_biased_input=False,
        legacy=False,
    )
    config.pop("num_key_value_heads")
    return transformers().DebertaForMaskedLM(transformers().DebertaConfig(**config))


FAMILIES = {
    "stacked experts": llama4,
    "stacked gates": recurrent_gemma,
    "distances": deberta,
    "shifted positions": opt,
    "tied bias": tied_bias,
    "scaled embedding": gemma2,
    "experts": mixtral,
    "experts with biases": gpt_oss,
    "states": mamba,
    "DoRA": adapted("dora"),
    "IA3": adapted("ia3"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_no_example_is_taken_alone_for_the_sake_of(name):
    """Batches of a size that the plan did not see give each example's own gradient by autograd."""
    torch.manual_seed(0)
    task, data = language(FAMILIES[name](), per_token=True)
    made = plan(task, task.theta(), data)
    assert (made.notes, made.by_function) == ((), ())
    found, expected = gradient_rows(made, data.batch(0, 5)), dense.gradients(task, data)
    assert bool(expected.any(dim=0).any())
    # Of Llama 4 the router's weights are in float32.
    slack = 1e-6 if name == "stacked experts" else 1e-10
    torch.testing.assert_close(found, expected, rtol=slack, atol=slack)


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_and_a_decoder_with_one_table_of_positions_between_tokens():
    """T5: `shared` is held three times, positions are looked up once and added to the scores."""
    torch.manual_seed(0)
    config = transformers().T5Config(
        d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0, **SIZES
    )
    model, data = language(transformers().T5ForConditionalGeneration(config), per_token=True)

    def forward(model, batch):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        return model(**inputs, decoder_input_ids=batch["input_ids"]).logits, batch["labels"]

    task = uw.Task(model.model, uw.CrossEntropy(), forward=forward)
    made = plan(task, task.theta(), data)
    assert (made.notes, made.by_function) == ((), ())
    assert all("relative_attention_bias" in name for name in made.broadcast)
    found, expected = gradient_rows(made, data.batch(0, 5)), dense.gradients(task, data)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
