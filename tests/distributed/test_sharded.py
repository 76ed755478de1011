"""A model that fully_shard splits over two processes gives the numbers of the whole model.

Two processes with gloo run SCRIPT, once for all tests here, on a transformer with each kind of
parameter: of layers whose rule reads no weight and of those that do, tied, met by broadcasting.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SECONDS = 120

SCRIPT = """
import copy, hashlib, json, re, warnings, weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import upweight as uw
from upweight import shards
from upweight.errors import ModelChanged, UnsupportedModel
from upweight.task import sharded

warnings.simplefilter("ignore")
shards.SHARD = 30  # several files
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)


class Scale(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x):
        return x / (1 + x.square().mean(-1, keepdim=True)).sqrt() * self.weight


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.attention = Scale(d), nn.MultiheadAttention(d, 2, batch_first=True)
        self.up, self.down, self.last = nn.Linear(d, 9), nn.Linear(9, d), nn.LayerNorm(d)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.tanh(self.up(self.last(x))))


class Model(nn.Module):
    def __init__(self, v=7, t=5, d=6):
        super().__init__()
        self.embed, self.at = nn.Embedding(v, d), nn.Parameter(torch.randn(t, d))
        self.blocks = nn.ModuleList([Block(d), Block(d), Block(d)])
        self.head = nn.Linear(d, v, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x) + self.at
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def split(model, **policy):
    for block in model.blocks:
        fully_shard(block, **policy)
    return fully_shard(model, **policy)


def state(model):
    modules = list(model.modules())
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in modules]
    orders = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in modules]
    held = [{k: id(p) for k, p in m._parameters.items()} for m in modules]
    parts = [p.to_local().tolist() for p in model.parameters()]
    none = all(p.grad is None for p in model.parameters())
    return hooks, orders, held, parts, none, [m.training for m in modules]


def refused(function, kind=UnsupportedModel):
    try:
        function()
    except kind as error:
        return str(error)
    return "not refused"


def mean_loss(model, first):
    own = slice(first, None, 2)
    return nn.functional.cross_entropy(model(train[0][own]).mT, train[1][own])


x = torch.randint(7, (70, 5))  # two blocks of examples, the second shorter
train, queries = (x, x.roll(-1, 1)), (x[:4].flip(1), x[:4])
few = (x[:9], x[:9])
method = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1))


def answers(model, group, folder):
    task = uw.Task(model, uw.CrossEntropy(), uw.L2(1e-3))
    resources = uw.Resources(memory_bytes=60_000, group=group)
    with torch.no_grad():
        model(x[:2])  # fully_shard leaves the weights of the root whole after it
    fitted = method.fit(task, train, resources=resources)
    found = {
        "own": fitted.self_influence(),
        "losses": fitted.losses,
        "cosine": uw.GradientCosine().fit(task, few).attribute(queries).values,
    }
    fitted.attribute(queries, uw.Margin(), into=uw.Shards(f"{folder}/scores"))
    index = uw.Index.build(fitted, None, f"{folder}/index", bytes_per_example=96, shard=20)
    found["top"] = index.top(queries, 3).raises_by
    return fitted, found


def files(folder):
    found = sorted(Path(folder).rglob("*.safetensors"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


plain = Model().double().eval()
model = split(copy.deepcopy(plain))
live, peak = {}, 0
gathered = sharded._gathered


def counted(unit):  # what there is of whole weights at a time
    global peak
    found = gathered(unit)
    for each in found:
        storage = each.untyped_storage()
        live[id(storage)] = storage.nbytes()
        weakref.finalize(storage, live.pop, id(storage), None)
    peak = max(peak, sum(live.values()))
    return found


sharded._gathered = counted
fitted, found = answers(model, dist.group.WORLD, "split")
model.reshard()
before = state(model)
again = uw.GradientDot().fit(fitted.task, few).attribute(queries)
sharded._gathered = gathered
sizes = [sum(p.numel() * 8 for p in u.parameters) for u in fitted.task.sharded.units]
seven = torch.randn(7)[0].expand(40)  # a real tensor, however it is laid out
stand = fitted.task.held_theta()
views = [stand, stand[3:9].view(2, 3), stand.detach().requires_grad_(), sharded.nudged(stand, 1, 2)]
# With a method the front door asks for nothing else.
front = uw.attribute(model, train, queries, uw.CrossEntropy(), penalty=uw.L2(1e-3), method=method,
                     resources=uw.Resources(memory_bytes=60_000, group=dist.group.WORLD)).values
same = torch.equal(front, fitted.attribute(queries).values)
told = {
    "front": same,
    "places": [sharded.stands_in(x) for x in (*views, seven, stand.clone())],
    "chosen": refused(lambda: uw.attribute(model, train, queries, uw.CrossEntropy())),
    "peak": peak / (sizes[0] + 2 * max(sizes[1:])),
    "sum": sum(sizes) / (sizes[0] + 2 * max(sizes[1:])),
    "lent": state(model) == before,
    "left": len(live),
    "GGN": refused(lambda: uw.Influence(uw.GGN(), damping=1.0).fit(fitted.task, train)),
    "moves": refused(lambda: fitted.parameter_influence(0)),
    "functional": refused(lambda: fitted.attribute(queries, uw.Coefficient("at"))),
    "theta": refused(fitted.task.theta),
    "evidence": refused(
        lambda: uw.Influence(uw.EKFAC(), damping=uw.Evidence()).fit(fitted.task, train)
    ),
    "mixed": refused(
        lambda: method.fit(
            uw.Task(
                split(Model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)).eval(),
                uw.CrossEntropy(),
            ),
            train,
        )
    ),
}
# The model trains on as it would have.
mean_loss(model, rank).backward()
gradients = [p.grad.full_tensor() for p in model.parameters()]
torch.optim.SGD(model.parameters(), 0.1).step()
told["changed"] = refused(lambda: fitted.attribute(queries), ModelChanged)
Path(f"told-{rank}.json").write_text(json.dumps(told))
torch.save(found, f"found-{rank}.pt")
if rank == 0:
    expected = answers(plain, None, "whole")[1]
    total = (mean_loss(plain, 0) + mean_loss(plain, 1)) / 2
    wanted = torch.autograd.grad(total, list(plain.parameters()))
    errors = {
        name: float((found[name] - e).norm() / e.norm()) for name, e in expected.items()
    } | {"training": max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, wanted))}
    compared = {"errors": errors, "split": files("split"), "whole": files("whole")}
    Path("compared.json").write_text(json.dumps(compared))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have run the script."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "script.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
            | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=SECONDS) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said[0][1] + said[1][1]
    return folder


@pytest.fixture(scope="module", params=[0, 1])
def told(folder, request):
    """What one of them tells."""
    return json.loads((folder / f"told-{request.param}.json").read_text())


def test_scores_rows_and_files_are_those_of_the_whole_model(folder):
    compared = json.loads((folder / "compared.json").read_text())
    assert max(compared["errors"].values()) < 1e-12, compared["errors"]
    assert len(compared["whole"]) == 8
    assert compared["split"] == compared["whole"]


def test_a_process_has_the_whole_weights_of_few_parts_at_a_time(told):
    """Those of the model's own, and of two blocks while the next is put together."""
    assert told["peak"] <= 1 < told["sum"]
    assert told["left"] == 0


def test_a_placeholder_for_theta_is_known_by_its_storage_and_nothing_else_is(told):
    assert told["places"] == [True] * 4 + [False] * 2


def test_the_front_door_takes_a_method_that_goes_by_layer(told):
    assert told["front"]


def test_the_model_comes_back_as_it_was_lent(told):
    assert told["lent"]


@pytest.mark.parametrize(
    "what", ["GGN", "moves", "functional", "theta", "evidence", "mixed", "chosen"]
)
def test_what_needs_whole_weights_is_refused_by_name(told, what):
    assert "split over processes" in told[what]


def test_a_step_of_training_after_the_fit_is_noticed(told):
    assert "parameter embed.weight" in told["changed"]
