"""A Hugging Face model: which training passages made it say this?

A small GPT-2 and its tokenizer learn the descriptions of the data sets that ship with scikit-learn,
two sentences a passage. Of passages that were held out it is asked which training passages lower
their loss most: how often are these from the description of the same data set? Beside EK-FAC
influence stand the similarity of gradients and BM25, the words in common.
"""

import math
import re
import warnings
from pathlib import Path

import sklearn.datasets
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import upweight as uw
import upweight.adapters.transformers as hf

warnings.simplefilter("ignore")
torch.manual_seed(0)
passages = []
for page in sorted((Path(sklearn.datasets.__file__).parent / "descr").glob("*.rst")):
    sentences = re.split(r"(?<=[.:])\s+", " ".join(page.read_text(encoding="utf-8").split()))
    pairs = [" ".join(sentences[k : k + 2]) for k in range(0, len(sentences), 2)]
    passages += [{"text": text, "page": page.stem} for text in pairs if len(text) > 40]
train, held = [p for i, p in enumerate(passages) if i % 6], passages[::6]

words = ByteLevelBPETokenizer()
texts = [p["text"] for p in train]
words.train_from_iterator(texts, 700, show_progress=False, special_tokens=["<pad>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, pad_token="<pad>")
data, queries = (hf.text(part, tokenizer, length=64) for part in (train, held))

sizes = {"n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4}
sizes |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
for _ in range(12):
    for rows in torch.randperm(len(data)).split(16):
        optimizer.zero_grad()
        model(**data.take(rows)).loss.backward()
        optimizer.step()

task = hf.causal_lm(model.eval(), params="transformer.h.*")
loss = float(model(**queries.batch(0, len(queries))).loss)
print(f"{len(train)} passages; held-out loss {loss:.2f} per token, of guessing {math.log(700):.2f}")
page, asked = ([p["page"] for p in part] for part in (train, held))
methods = {
    "EK-FAC influence": uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1), tolerance=3e-2),
    "gradient cosine": uw.GradientCosine(),
    "BM25": uw.BM25(),
}
for name, method in methods.items():
    best = method.fit(task, data).attribute(queries).values.topk(5, largest=False).indices
    same = [sum(page[i] == asked[q] for i in row) / 5 for q, row in enumerate(best.tolist())]
    print(f"  {name:17s} {sum(same) / len(same):.0%} of the five strongest are of the same page")
print(f"  {'chance':17s} {sum(page.count(p) for p in asked) / len(page) / len(asked):.0%}")
