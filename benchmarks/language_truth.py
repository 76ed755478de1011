"""What fine-tuning says: the kept model's losses when it is trained on other passages.

The base of `language_model.py` is trained further on 1 024 passages of four genres that it has not
seen. The truth of a training is the loss of 64 other passages of the same documents, in nats summed
over 32 tokens:

    full/SEED             all passages; seed 0 is the model `finetuned`, the one that is attributed
    half-NN/SEED          those of a random half that close ranks (the subsets of `subset_weights`)
    without-qNN-NAME/0    all but the 50 that a method ranks first for query NN: their places in the
                          batches of full/0 stay empty

The seed is that of the order; nothing else is random. Every training is kept in the cache as it
finishes, so a run that was stopped goes on, and `truths/brown-llama/losses.safetensors` is written
anew after each from what there is.

    python benchmarks/language_truth.py --data ../shared/data --halves 32 --seeds 2 --full 4
    python benchmarks/language_truth.py --data ../shared/data --without chosen.json

`chosen.json` is written by `language_fidelity.py --choose`. A training on all passages takes half
a minute of one core.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from environment import DATA
from language_model import HERE, KEPT, LENGTH, PASSAGES, Passages, keep, losses, model, passages
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upweight.runtime.fingerprint import digest
from upweight.runtime.versions import library_versions
from upweight.training import subset_weights

LOSSES = KEPT / "losses.safetensors"
HALVES = 32


@dataclass(frozen=True)
class Recipe:
    """AdamW without decay, the learning rate falling in a line to 0; float32, no dropout.

    J is the mean over passages of the loss summed over their tokens, here divided by 32.
    """

    rate: float = 1e-3
    epochs: int = 2
    batch: int = 32
    betas: tuple[float, float] = (0.9, 0.95)


RECIPE = Recipe()


def finetuned(
    ids: Tensor, seed: int, kept: Tensor | None = None, recipe: Recipe = RECIPE
) -> nn.Module:
    """The base trained on rows of `ids`; those not `kept` leave their places empty."""
    lm = model("base")
    optimizer = torch.optim.AdamW(lm.parameters(), recipe.rate, recipe.betas, weight_decay=0.0)
    steps, step = recipe.epochs * -(-len(ids) // recipe.batch), 0
    for epoch in range(recipe.epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for rows in torch.randperm(len(ids), generator=generator).split(recipe.batch):
            size = len(rows) * (ids.shape[1] - 1)
            used = ids[rows if kept is None else rows[kept[rows]]]
            optimizer.param_groups[0]["lr"] = recipe.rate * (1 - step / steps)
            logits = lm(input_ids=used[:, :-1], use_cache=False).logits
            total = nn.functional.cross_entropy(
                logits.flatten(0, 1), used[:, 1:].flatten(), reduction="sum"
            )
            optimizer.zero_grad()
            (total / size).backward()
            optimizer.step()
            step += 1
    return lm


def halves(subsets: int = HALVES) -> Tensor:
    """Which passages each half keeps, `[s, n]`."""
    return subset_weights(PASSAGES, subsets) > 0


class Truth:
    """Trainings in the cache, and the file made of them."""

    def __init__(self, texts: Passages, cache: Path) -> None:
        self.texts = texts
        base = load_file(KEPT / "base.safetensors")
        about = repr(RECIPE), texts.train, texts.queries, *(base[k] for k in sorted(base))
        self.fingerprint = digest(*about)[:32]
        self.folder = cache / f"language-{self.fingerprint[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def make(self, name: str, ids: Tensor, seed: int, kept: Tensor | None = None) -> None:
        """One training, unless it is there."""
        file = self.folder / f"{name.replace('/', '-seed')}.safetensors"
        if file.exists():
            return
        used, started = time.process_time(), time.perf_counter()
        lm = finetuned(ids, seed, kept).eval()
        found = {name: losses(lm, self.texts.queries)}
        seconds = time.process_time() - used
        wall = time.perf_counter() - started
        if name == "full/0":
            self._keep(lm)
        save_file(found, file.with_suffix(".unfinished"), {"seconds": str(seconds)})
        file.with_suffix(".unfinished").replace(file)
        mean = float(found[name].mean()) / LENGTH
        print(f"{name}: {mean:.4f} nats, {seconds:.0f} CPU s, {wall:.0f} s", flush=True)
        self.collect()

    def _keep(self, lm: nn.Module) -> None:
        """The model that is attributed, with what rounding it to float16 changes."""
        texts = self.texts
        about: dict[str, Any] = {"recipe": asdict(RECIPE), "fingerprint": self.fingerprint}
        for name, each in (("base", model("base")), ("finetuned", lm)):
            for part, ids in (("train", texts.train), ("queries", texts.queries)):
                about[f"{name}_{part}_nats_per_token"] = float(losses(each, ids).mean()) / LENGTH
        keep(lm, "finetuned", about)
        rounded = losses(model("finetuned"), texts.queries) - losses(lm, texts.queries)
        about["largest_change_by_float16"] = float(rounded.abs().max()) / LENGTH
        keep(lm, "finetuned", about)

    def collect(self) -> None:
        """All trainings of this recipe and base in one file."""
        tensors, seconds = dict[str, Tensor](), 0.0
        for file in sorted(self.folder.glob("*.safetensors")):
            tensors |= load_file(file)
            with safe_open(file, "pt") as opened:
                seconds += float(opened.metadata()["seconds"])
        facts = {
            "fingerprint": self.fingerprint,
            "recipe": asdict(RECIPE),
            "cpu_seconds": round(seconds),
            "versions": library_versions(),
        }
        save_file(tensors, LOSSES, {"facts": json.dumps(facts)})


def measured(seeds: int = 2) -> tuple[Tensor, Tensor]:
    """Halves that were trained from so many seeds `[s, n]`, and their losses `[k, s, q]`."""
    found = load_file(LOSSES)
    names = [[f"half-{k:02d}/{seed}" for seed in range(seeds)] for k in range(HALVES)]
    done = [k for k, each in enumerate(names) if all(name in found for name in each)]
    values = [torch.stack([found[names[k][seed]] for k in done]) for seed in range(seeds)]
    return halves()[done], torch.stack(values)


def main() -> None:
    """The trainings asked for that are not in the cache."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=DATA, metavar="DIR", help="default: ../shared/data")
    add("--cache", type=Path, default=HERE / ".cache", metavar="DIR")
    add("--halves", type=int, default=0)
    add("--seeds", type=int, default=2)
    add("--full", type=int, default=1, help="seeds of the training on all passages")
    add("--without", type=Path, metavar="FILE", help="what to leave out, as JSON")
    add("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    texts = passages(given.data)
    truth = Truth(texts, given.cache)
    for seed in range(min(1, given.full)):
        truth.make(f"full/{seed}", texts.train, seed)
    for seed in range(given.seeds):
        for k, kept in enumerate(halves()[: given.halves]):
            truth.make(f"half-{k:02d}/{seed}", texts.train[kept], seed)
    for seed in range(1, given.full):
        truth.make(f"full/{seed}", texts.train, seed)
    if given.without:
        for name, gone in json.loads(given.without.read_text()).items():
            kept = torch.ones(PASSAGES, dtype=torch.bool)
            kept[gone] = False
            truth.make(f"without-{name}/0", texts.train, 0, kept)
    truth.collect()


if __name__ == "__main__":
    main()
