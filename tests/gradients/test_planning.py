"""Blocks, their sources, what is left to `torch.func` and why; what is refused by name."""

import copy
import re

import pytest
import torch
from torch import nn

import upweight as uw
from tests import market
from tests.gradients import layer_market
from tests.gradients.layer_market import Chain, Decoder, gradient_rows
from tests.market import draw, initialized, labels, tokens
from tests.reference import dense
from upweight.errors import NotDifferentiable, UnsupportedModel
from upweight.gradients.blocks import MatrixBlock, VectorBlock
from upweight.gradients.planning import plan
from upweight.task.data import as_data

# Said of bilinear layers by PyTorch, which runs them one example at a time under vmap.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def chain(model=None, n=6, **options):
    g = torch.Generator().manual_seed(0)
    model = initialized(model or Chain(), g).eval()
    return uw.Task(model, uw.CrossEntropy(), **options), (draw(g, n, 3), labels(g, n, 2))


def blocks(name):
    return {block.name: block for block in layer_market.planned(name).blocks}


@pytest.mark.parametrize("name", market.BUILDERS)
def test_blocks_cover_theta_once(name):
    p = market.problem(name)
    made = plan(p.task, p.task.theta(), as_data(p.train))
    index = torch.cat([block.index(p.task.layout) for block in made.blocks])
    assert sorted(index.tolist()) == list(range(p.task.layout.size))


@pytest.mark.parametrize("name", layer_market.BUILDERS)
def test_blocks_of_layers_cover_theta_once(name):
    made = layer_market.planned(name)
    index = torch.cat([block.index(made.task.layout) for block in made.blocks])
    assert sorted(index.tolist()) == list(range(made.task.layout.size))


@pytest.mark.parametrize("name", layer_market.BUILDERS)
def test_block_shapes_fit_their_index(name):
    made = layer_market.planned(name)
    for block in made.blocks:
        assert torch.Size(block.shape).numel() == len(block.index(made.task.layout))


def test_a_bias_is_the_last_column_of_its_weight():
    block = blocks("linear")["0.weight"]
    assert isinstance(block, MatrixBlock)
    assert (block.bias, block.shape) == ("0.bias", (4, 4))


def test_a_bias_that_only_one_use_adds_stands_alone():
    found = blocks("tied_with_one_bias")
    assert (found["body.weight"].bias, found["body.weight"].shape) == (None, (3, 3))
    assert isinstance(found["body.bias"], VectorBlock)


def test_biases_that_are_shared_throughout_are_a_column():
    assert blocks("tied_throughout")["body.weight"].bias == "body.bias"


def test_gains_and_biases_of_a_norm_are_one_block():
    assert blocks("layer_norm")["1.weight + 1.bias"].shape == (8,)


def test_a_block_for_each_group_of_a_convolution():
    found = blocks("conv2d_groups")
    assert [(b.name, b.shape, b.rows) for b in found.values()] == [
        ("0.weight[0:3]", (3, 18), (0, 3)),
        ("0.weight[3:6]", (3, 18), (3, 6)),
    ]


def test_attention_is_two_matrices():
    found = blocks("attention_self")
    assert found["layer.in_proj_weight"].shape == (12, 5)
    assert found["layer.out_proj.weight"].shape == (4, 5)


# -- notes ----------------------------------------------------------------------------------------

NOTES = {
    "weight_norm": r"weight.original0, .*weight.original1: .* because ParametrizationList",
    "used_bare": r"body.weight: .* because it is also used outside of its layers",
    "lstm": r"one at a time, about \d+ times slower, because of layer.weight_ih_l0, .*params=",
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_say_what_fell_back_and_why(name):
    notes = "\n".join(layer_market.planned(name).notes)
    assert re.search(NOTES[name], notes), notes


def test_nothing_to_note_where_every_layer_has_a_rule():
    assert layer_market.planned("decoder").notes == ()


def test_a_product_outside_of_its_layer_has_the_factors_of_the_layer():
    made = layer_market.planned("outside")
    assert made.products == {"left.weight": False, "right.weight": False, "twice.weight": False}
    assert not made.one_by_one
    found = {b.name: b.shape for b in made.blocks if isinstance(b, MatrixBlock)}
    assert found["left.weight"] == (4, 3) and found["right.weight"] == (4, 4)
    others = {"left.bias", "right.bias", "each.weight", "each.bias", "all.weight"}
    assert set(made.broadcast) == others
    assert not layer_market.planned("decoder").products


def test_products_with_parameters_themselves_have_factors():
    """In whichever orientation each is kept; a stack has a block for each of its parts."""
    made = layer_market.planned("products")
    assert (made.notes, made.one_by_one) == ((), False)
    found = {b.name: b.shape for b in made.blocks if isinstance(b, MatrixBlock)}
    assert found["embedding.weight"] == (7, 4) and found["io"] == (6, 4) and found["oi"] == (4, 6)
    assert [found[f"heads[{k}:{k + 2}]"] for k in (0, 2)] == [(2, 2)] * 2
    assert [found[f"up[{k}:{k + 5}]"] for k in (0, 5, 10)] == [(5, 4)] * 3
    assert set(made.broadcast) == {"heads_bias", "added"}


def test_a_layer_that_does_not_run_is_noted():
    task, data = chain(layer_market.Unused())
    made = plan(task, task.theta(), as_data(data))
    assert made.by_function == ("spare.weight", "spare.bias")
    assert "spare did not run on the examples tried" in made.notes[0]
    torch.testing.assert_close(gradient_rows(made, data), dense.gradients(task, data), **EXACT)


class ReturnsWeights(nn.Module):
    """Uses the second thing that attention returns."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        out, weights = self.layer(x, x, x)
        return self.head(out.mean(dim=1)) + weights.square().sum(dim=(1, 2))[:, None]


def test_a_layer_whose_second_output_matters_is_left_to_torch_func():
    g = torch.Generator().manual_seed(0)
    task = uw.Task(initialized(ReturnsWeights(), g).eval(), uw.CrossEntropy())
    data = (draw(g, 5, 3, 4), torch.tensor([0, 1, 2, 0, 1]))
    # A constant added to all logits changes no cross-entropy: another loss.
    task = uw.Task(task.model, lambda f, y: f[:, 0] * (y + 1.0))
    made = plan(task, task.theta(), as_data(data))
    assert "layer.in_proj_weight" in made.by_function
    assert any("differ from autograd's" in note for note in made.notes)
    torch.testing.assert_close(gradient_rows(made, data), dense.gradients(task, data), **EXACT)


def test_a_loss_that_is_flat_where_the_plan_looks_hides_no_mistake():
    """With zero gradients of ℓ alone, any rule would seem right."""
    g = torch.Generator().manual_seed(0)
    model = initialized(ReturnsWeights(), g).eval()
    flat = uw.Task(model, lambda f, y: (f.sum(dim=1) - 50.0).relu())
    made = plan(flat, flat.theta(), as_data((draw(g, 5, 3, 4), torch.zeros(5))))
    assert "layer.in_proj_weight" in made.by_function


# -- positions without an axis for the examples ---------------------------------------------------


class Positions(Decoder):
    """Positions embedded, normalized and mapped before any example is seen."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Sequential(self.positions, nn.LayerNorm(4), nn.Linear(4, 4))


class Unsqueezed(Decoder):
    """The embedded positions get their axis for the examples by hand."""

    def __init__(self):
        super().__init__()
        embed = self.positions

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = embed

            def forward(self, place):
                return self.embed(place).unsqueeze(0)

        self.positions = Wrapper()


def language(model):
    g = torch.Generator().manual_seed(0)
    task = uw.Task(initialized(model, g).eval(), uw.CrossEntropy())
    return task, as_data((tokens(g, 6, 5, 6), tokens(g, 6, 5, 6)))


def test_layers_after_repeated_positions_need_no_repeating():
    task, data = language(Positions())
    made = plan(task, task.theta(), data)
    assert made.by_function == ()
    assert made.repeated == {"positions.0": False}
    expected = dense.gradients(task, data)
    torch.testing.assert_close(gradient_rows(made, data.batch(0, 6)), expected, **EXACT)


def test_positions_that_cannot_be_repeated_are_told_apart_where_they_are_added():
    task, data = language(Unsqueezed())
    made = plan(task, task.theta(), data)
    assert (made.by_function, made.broadcast) == ((), ("positions.embed.weight",))
    expected = dense.gradients(task, data)
    torch.testing.assert_close(gradient_rows(made, data.batch(0, 6)), expected, **EXACT)


@pytest.mark.parametrize("t", [1, 2, 6])
def test_sequences_of_any_length(t):
    g = torch.Generator().manual_seed(0)
    task, _ = language(Decoder(length=6))
    data = as_data((tokens(g, 6, t, 6), tokens(g, 6, t, 6)))
    expected = dense.gradients(task, data)
    torch.testing.assert_close(
        gradient_rows(plan(task, task.theta(), data), data.batch(0, 6)), expected, **EXACT
    )


def test_sequences_of_another_length_than_the_plan_saw():
    g = torch.Generator().manual_seed(0)
    task, data = language(Decoder(length=6))
    made = plan(task, task.theta(), data)
    for t in (1, 3, 6):
        other = as_data((tokens(g, 6, t, 6), tokens(g, 6, t, 6)))
        expected = dense.gradients(task, other)
        torch.testing.assert_close(gradient_rows(made, other.batch(0, 6)), expected, **EXACT)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripts_are_refused_by_name():
    g = torch.Generator().manual_seed(0)
    script = torch.jit.script(initialized(nn.Sequential(nn.Linear(3, 2)), g))
    task = uw.Task(script, uw.CrossEntropy())
    with pytest.raises(UnsupportedModel, match=r"a torch.jit script(.|\n)*load_state_dict"):
        plan(task, task.theta(), as_data((draw(g, 4, 3), labels(g, 4, 2))))
    for curvature in (uw.EKFAC(), uw.GGN(), uw.Hessian()):
        with pytest.raises(UnsupportedModel, match=r"a torch\.jit script"):
            uw.Influence(curvature).fit(task, (draw(g, 4, 3), labels(g, 4, 2)))


def test_data_parallel_over_several_devices_is_refused_by_name():
    task, data = chain()
    wrapped = nn.DataParallel(task.model)
    wrapped.device_ids = [0, 1]
    task = uw.Task(wrapped, uw.CrossEntropy())
    with pytest.raises(UnsupportedModel, match=r"DataParallel over 2 devices(.|\n)*model.module"):
        plan(task, task.theta(), as_data(data))


def test_data_parallel_on_one_device():
    task, data = chain()
    wrapped = uw.Task(nn.DataParallel(task.model), uw.CrossEntropy())
    found = gradient_rows(plan(wrapped, wrapped.theta(), as_data(data)), data)
    torch.testing.assert_close(found, dense.gradients(task, data), **EXACT)


class Centered(Chain):
    """Batch statistics where parameters without a rule see them."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        hidden = torch.tanh(self.body(x)) * self.gain
        return self.head(hidden - hidden.mean(dim=0))


def test_examples_that_depend_on_each_other_are_refused():
    task, data = chain(Centered())
    with pytest.raises(UnsupportedModel, match=r"add up(.|\n)*gain(.|\n)*model.eval\(\)"):
        plan(task, task.theta(), as_data(data))


def test_a_measure_that_counts_is_refused():
    task, data = chain()
    made = plan(task, task.theta(), as_data(data))
    with pytest.raises(NotDifferentiable, match=r"no gradient reaches(.|\n)*LogProb"):
        gradient_rows(made, data, lambda p, b: task.call(p, b)[0].argmax(dim=1).double())


# -- compiled models ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compile_module", [torch.compile, lambda m: (m.compile(), m)[1]])
def test_compiled_models_run_as_written_and_are_not_compiled(compile_module):
    task, data = chain()
    expected = dense.gradients(task, data)
    compiled = uw.Task(compile_module(task.model), uw.CrossEntropy())
    before = dict(torch._dynamo.utils.counters["stats"])
    found = gradient_rows(plan(compiled, compiled.theta(), as_data(data)), data)
    torch.testing.assert_close(found, expected, **EXACT)
    assert dict(torch._dynamo.utils.counters["stats"]) == before


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_models_that_have_run_already():
    task, data = chain()
    expected = dense.gradients(task, data)
    compiled = torch.compile(task.model, backend="eager")
    compiled(data[0])
    again = uw.Task(compiled, uw.CrossEntropy())
    found = gradient_rows(plan(again, again.theta(), as_data(data)), data)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.fixture
def one_process(tmp_path):
    """A group of one process."""
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["fully_shard", "parallelize_module", "FullyShardedDataParallel"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_parameters_that_are_split_over_processes_are_refused_by_name(one_process, how):
    """The way out, as the message has it, gives the scores of the model that was split."""
    from torch.distributed import fsdp
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.tensor import parallel

    task, data = chain()
    plain, model = copy.deepcopy(task.model), copy.deepcopy(task.model)
    if how == "fully_shard":
        model = fsdp.fully_shard(model, mesh=one_process)
    elif how == "parallelize_module":
        name = next(k for k, m in model.named_modules() if isinstance(m, nn.Linear))
        parallel.parallelize_module(model, one_process, {name: parallel.ColwiseParallel()})
    else:
        model = fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    method = uw.Influence(uw.GGN(), damping=1.0)
    with pytest.raises(UnsupportedModel, match=r"whole of each parameter") as error:
        method.fit(uw.Task(model, uw.CrossEntropy()), data)
    for parameter in plain.parameters():
        parameter.data.zero_()
    way = re.search(r"plain\.load_state_dict\(.*\)\)\)", str(error.value))
    eval(way[0], {**vars(state_dict), "plain": plain, "model": model})
    found = method.fit(uw.Task(plain, uw.CrossEntropy()), data).attribute(data).values
    expected = method.fit(task, data).attribute(data).values
    torch.testing.assert_close(found, expected, **EXACT)
