"""The networks of `ekfac.py` and how they are trained: PyTorch alone, from a fixed seed.

    mlp    784-512-256-128-10 with ReLU         567 434 parameters    MNIST
    cnn    two convolutions, two linear layers  105 866               MNIST
    gpt    byte-level transformer, 4 layers of  875 264               Brown corpus, sequences of 128
           width 128, 4 heads, 128 bytes                              bytes and those that follow

Run as a program it trains one of them and writes one `.safetensors`: its parameters, and the data
to attribute as bytes: X `[n, ...]`, y, Xq `[q, ...]`, yq.
"""

import argparse
import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

SEED = 0
CONTEXT = 128
BYTES = 256
HELD_OUT_DOCUMENTS = 50
QUERIES = 1_000


class Attention(nn.Module):
    """Causal self-attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        heads = self.qkv(x).view(b, t, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(b, t, width))


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """A language model of bytes, with learned positions and a head of its own."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, width)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_residual = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "mlp": (mlp, 567_434, 60_000),
    "cnn": (cnn, 105_866, 10_000),
    "gpt": (GPT, 875_264, 2_000),
}
"""How to make each, its number of parameters, and how many training examples are kept."""


def token_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross entropy with classes on the last axis, of each example or of each of its tokens."""
    flat = F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
    return flat.view(y.shape)


def as_inputs(name: str) -> Callable[[Tensor], Tensor]:
    """What turns the bytes of the file into what the network takes."""
    if name == "gpt":
        return lambda X: X.long()
    shape = (-1, 784) if name == "mlp" else (-1, 1, 28, 28)
    return lambda X: (X.float() / 255).view(shape)


def images(file: Path, n: int, queries: int) -> dict[str, Tensor]:
    """The first n training and test images as bytes."""
    with np.load(file) as arrays:
        return {
            "X": torch.from_numpy(arrays["X"][:n]),
            "y": torch.from_numpy(arrays["y"][:n].astype(np.uint8)),
            "Xq": torch.from_numpy(arrays["Xt"][:queries]),
            "yq": torch.from_numpy(arrays["yt"][:queries].astype(np.uint8)),
        }


def sequences(file: Path, train: int, queries: int) -> dict[str, Tensor]:
    """Windows of 128 bytes and the bytes that follow them, from documents in a shuffled order.

    Queries are spread over documents that no training sequence comes from.
    """
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].encode() for line in lines]
    generator = np.random.default_rng(SEED)
    order = generator.permutation(len(texts))

    def windows(documents: np.ndarray, count: int) -> Tensor:
        cut = [
            np.frombuffer(texts[d], np.uint8)[: len(texts[d]) // 129 * 129].reshape(-1, 129)
            for d in documents
        ]
        pool = np.concatenate(cut)
        return torch.from_numpy(generator.permutation(pool)[:count].copy())

    held_out = windows(order[:HELD_OUT_DOCUMENTS], queries)
    trained = windows(order[HELD_OUT_DOCUMENTS:], train)
    return {
        "X": trained[:, :-1],
        "y": trained[:, 1:],
        "Xq": held_out[:, :-1],
        "yq": held_out[:, 1:],
    }


def batches(n: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of whole batches, shuffled anew in each epoch."""
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        yield from order[: n // batch * batch].view(-1, batch)


def train(
    name: str, model: nn.Module, data: dict[str, Tensor], batch: int, epochs: int, lr: float
) -> None:
    """Adam with a linear fall of its step size; decay of weights for the language model only."""
    inputs = as_inputs(name)
    decay = 0.1 if name == "gpt" else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    steps = len(data["X"]) // batch * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), 1 - step / steps)
    )
    for rows in batches(len(data["X"]), batch, epochs, torch.Generator().manual_seed(SEED)):
        loss = token_losses(model(inputs(data["X"][rows])), data["y"][rows].long()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def quality(name: str, model: nn.Module, X: Tensor, y: Tensor) -> dict[str, float]:
    """Mean loss (per token) and accuracy."""
    inputs, losses, hits = as_inputs(name), [], []
    for start in range(0, len(X), 250):
        rows = slice(start, start + 250)
        outputs, targets = model(inputs(X[rows])), y[rows].long()
        losses.append(token_losses(outputs, targets).flatten())
        hits.append((outputs.argmax(-1) == targets).flatten())
    return {
        "loss": float(torch.cat(losses).mean()),
        "accuracy": float(torch.cat(hits).float().mean()),
    }


def made(name: str, folder: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """The trained network, its data and what is to be known of both."""
    torch.manual_seed(SEED)
    make, parameters, n = NETWORKS[name]
    model = make()
    count = sum(p.numel() for p in model.parameters())
    if count != parameters:
        refusal = f"{name} has {count} parameters, not {parameters}."
        raise SystemExit(refusal)
    if name == "gpt":
        # It sees each of 25 600 sequences once; the first 2 000 are attributed.
        data = sequences(folder / "brown.jsonl.gz", 25_600, QUERIES)
        train(name, model, data, batch=64, epochs=1, lr=2e-3)
    else:
        data = images(folder / "mnist.npz", n, 10_000)
        train(name, model, data, batch=128, epochs=4 if name == "mlp" else 8, lr=1e-3)
    held_out = quality(name, model, data["Xq"], data["yq"])
    kept = {
        key: value[: n if key in ("X", "y") else QUERIES].contiguous()
        for key, value in data.items()
    }
    seen = quality(name, model, kept["X"], kept["y"])
    facts = {"network": name, "training": json.dumps({"attributed": seen, "held_out": held_out})}
    return model, kept, facts


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("data", type=Path, help="the folder of mnist.npz and brown.jsonl.gz")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    model, data, facts = made(given.name, given.data)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    unfinished = given.out.with_suffix(".unfinished")
    save_file(tensors | data, unfinished, facts)
    unfinished.replace(given.out)


if __name__ == "__main__":
    main()
