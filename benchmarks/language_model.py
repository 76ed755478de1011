"""A small language model to work with: Llama's architecture, trained on the Brown corpus.

    tokenizer    byte-level BPE, 4 096 tokens, with <s> before each text
    base         4 layers of width 160 (2 049 440 parameters), context 128, on all genres but four
    finetuned    the base after 1 024 passages of those four genres, by `language_truth.py`

The models are kept in float16 in `truths/brown-llama` and are computed with in float32; the base
was rounded before anything was trained from it. To read them takes torch, transformers and
tokenizers:

    from language_model import model, tokenizer, passages
    lm, words, texts = model("finetuned"), tokenizer(), passages(Path("../shared/data"))

    python benchmarks/language_model.py --data ../shared/data      # trains tokenizer and base anew

Training the base takes about five minutes of one core an epoch.
"""

import argparse
import gzip
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import DATA
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
KEPT = HERE / "truths" / "brown-llama"
START = "<s>"
VOCABULARY, CONTEXT = 4096, 128
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

GENRES = ("fiction: science", "humor", "press: reviews", "religion")
"""Left out of the base's training; the fine-tuning is on these."""
LENGTH = 32
"""Tokens of a passage, all of them predicted: before the first comes <s>."""
PASSAGES, QUERIES = 1024, 64

VALIDATED = 25
"""Of the other documents, each so many-th is held out of the base's training."""
BATCH, RATE, WARMUP, DECAY = 8, 2e-3, 100, 0.1


def network() -> nn.Module:
    """The architecture, with random weights; dropout is 0 in all of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa"))


def model(which: str = "finetuned") -> nn.Module:
    """The kept model `base` or `finetuned`, in float32 and eval mode."""
    lm = network()
    state = {name: kept.float() for name, kept in load_file(KEPT / f"{which}.safetensors").items()}
    lm.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return lm.eval()


def facts(which: str = "finetuned") -> dict[str, Any]:
    """How the kept model was trained, and its losses."""
    with safe_open(KEPT / f"{which}.safetensors", "pt") as opened:
        found: dict[str, Any] = json.loads(opened.metadata()["facts"])
    return found


def keep(lm: nn.Module, which: str, about: dict[str, Any]) -> None:
    """Round to float16 and save; the head is the embedding, and is kept once."""
    state = {k: v.detach().half() for k, v in lm.state_dict().items() if k != "lm_head.weight"}
    KEPT.mkdir(parents=True, exist_ok=True)
    unfinished = KEPT / f"{which}.unfinished"
    save_file(state, unfinished, {"facts": json.dumps(about)})
    unfinished.replace(KEPT / f"{which}.safetensors")


def tokenizer() -> Any:
    """The kept tokenizer, as `transformers.PreTrainedTokenizerFast`; <s> also pads."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(KEPT / "tokenizer.json"), bos_token=START, pad_token=START
    )


def encoder() -> Any:
    """The kept tokenizer, as `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(KEPT / "tokenizer.json"))


def documents(folder: Path) -> list[dict[str, str]]:
    """The 500 documents of the Brown corpus: id, genre, text."""
    with gzip.open(folder / "brown.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Passages:
    """Token ids `[n, 33]`, <s> first, and the number of each one's document."""

    train: Tensor
    queries: Tensor
    train_documents: Tensor
    query_documents: Tensor
    names: tuple[str, ...]
    genres: tuple[str, ...]

    @staticmethod
    def split(ids: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next token, both `[n, 32]`."""
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def passages(folder: Path) -> Passages:
    """What is fine-tuned on, and 64 other passages of the same documents, drawn at random."""
    words, found = encoder(), [d for d in documents(folder) if d["genre"] in GENRES]
    rows, origin = [], []
    for number, document in enumerate(found):
        ids = torch.tensor(words.encode(document["text"]).ids)
        for part in ids[: len(ids) // LENGTH * LENGTH].split(LENGTH):
            rows.append(torch.cat([torch.zeros(1, dtype=torch.long), part]))
            origin.append(number)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    every, of = torch.stack(rows)[order], torch.tensor(origin)[order]
    end = PASSAGES + QUERIES
    return Passages(
        every[:PASSAGES],
        every[PASSAGES:end],
        of[:PASSAGES],
        of[PASSAGES:end],
        tuple(d["id"] for d in found),
        tuple(d["genre"] for d in found),
    )


def losses(lm: nn.Module, ids: Tensor, batch: int = 64) -> Tensor:
    """Cross entropy of each row, summed over its tokens but the first, `[n]`."""
    found = []
    with torch.no_grad():
        for rows in ids.split(batch):
            logits = lm(input_ids=rows[:, :-1], use_cache=False).logits
            each = nn.functional.cross_entropy(
                logits.transpose(1, 2), rows[:, 1:], reduction="none"
            )
            found.append(each.sum(dim=1))
    return torch.cat(found)


def train_tokenizer(texts: list[str]) -> None:
    """Byte-level BPE on the documents that the base is trained on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    KEPT.mkdir(parents=True, exist_ok=True)
    words.save(str(KEPT / "tokenizer.json"), pretty=False)


def chunks(texts: list[str]) -> Tensor:
    """Rows of <s> and 128 tokens of one document, `[n, 129]`, without what is left at its end."""
    words = encoder()
    rows = []
    for text in texts:
        ids = torch.tensor(words.encode(text).ids)
        rows += ids[: len(ids) // CONTEXT * CONTEXT].split(CONTEXT)
    every = torch.stack(rows)
    return torch.cat([torch.zeros(len(every), 1, dtype=torch.long), every], dim=1)


def train_base(ids: Tensor, held_out: Tensor, epochs: int) -> None:
    """AdamW, a linear schedule with warm-up; products in bfloat16, which are quicker here."""
    torch.manual_seed(0)
    lm = network()
    optimizer = torch.optim.AdamW(lm.parameters(), RATE, betas=(0.9, 0.95), weight_decay=DECAY)
    steps, step = epochs * -(-len(ids) // BATCH), 0
    started, used = time.perf_counter(), time.process_time()
    for epoch in range(epochs):
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(epoch))
        for rows in ids[order].split(BATCH):
            rate = RATE * min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
            optimizer.param_groups[0]["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                logits = lm(input_ids=rows[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                took = time.perf_counter() - started, time.process_time() - used
                print(
                    f"{step}/{steps}: {loss:.3f}, {took[0]:.0f} s, {took[1]:.0f} CPU s", flush=True
                )
    exact = per_token(lm, held_out)
    about = {
        "recipe": f"AdamW({RATE}, betas=(0.9, 0.95), weight_decay={DECAY}), {epochs} epochs, "
        f"batches of {BATCH}, {WARMUP} steps of warm-up, then in a line to 0, clipped at 1",
        "tokens": ids.numel() - len(ids),
        "parameters": sum(p.numel() for p in lm.parameters()),
        "cpu_seconds": time.process_time() - used,
        "held_out_nats_per_token": exact,
    }
    keep(lm, "base", about)
    about["held_out_in_float16"] = per_token(model("base"), held_out)
    keep(lm, "base", about)
    print(about)


def per_token(lm: nn.Module, ids: Tensor) -> float:
    """Mean loss in nats."""
    return float(losses(lm, ids).sum()) / (ids.numel() - len(ids))


def main() -> None:
    """Tokenizer and base anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    others = [d["text"] for d in documents(given.data) if d["genre"] not in GENRES]
    held = others[::VALIDATED]
    used = [text for k, text in enumerate(others) if k % VALIDATED]
    train_tokenizer(used)
    train_base(chunks(used), chunks(held), given.epochs)


if __name__ == "__main__":
    main()
