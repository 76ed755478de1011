"""Every Python block of the docs runs, page by page, in the order of the page.

A page starts with the names below, as its reader has them: a model, data, scores of it. A block
that needs what no test has says so in the line before: `<!-- not run: why -->`.
"""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.view import Server

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)```", re.DOTALL)
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.parent.name != "decisions" and "```python\n" in page.read_text(encoding="utf-8")
]
NOT_RUN = {"training.md": 1, "transformers.md": 1, "debugging.md": 1, "several-machines.md": 4}
"""Blocks that need a cluster, a training, or a download."""

SHORTER = {
    '"2 min"': "subsets=8",
    "subsets=50": "subsets=8",
    "subset_weights(n, 100)": "subset_weights(n, 10)",
    "[20] * 30": "[20] * 10",
    "subsets=40": "subsets=8",
    "range(20):": "range(3):",
    "check(recipe, subsets=20)": "check(recipe, subsets=8)",
    "epochs=8, batch=16": "epochs=1, batch=64",
    "[s for i, s in enumerate(sentences) if i % 12]": "sentences[1::6]",
    "held_out, texts = sentences[::12]": "held_out, texts = sentences[::48]",
    "range(3, 203, 20)": "range(3, 43, 4)",
    "examples=range(1, 17)": "examples=range(1, 4)",
}
"""The same with fewer or shorter trainings."""


def images(count, seed):
    """Inputs of 10 classes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 10
    return torch.randn(count, 6, generator=draw).double() + 4 * torch.eye(10, 6).double()[y], y


class Net(nn.Sequential):
    """A small network."""

    def __init__(self):
        super().__init__(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 10))
        self.double()


def network(n=40, epochs=2):
    """What the pages on networks start with."""
    train, queries = images(n, 0), images(8, 1)
    recipe = uw.Training(Net, uw.SGD(0.1, momentum=0.9), epochs, batch=n // 4)
    task = uw.Task(recipe.trained(uw.Task(Net(), uw.CrossEntropy()), train), uw.CrossEntropy())
    fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, train)
    return {
        "uw": uw,
        "torch": torch,
        "Net": Net,
        "model": task.model,
        "task": task,
        "recipe": recipe,
        "fitted": fitted,
        "scores": fitted.attribute(queries),
        "train": train,
        "queries": queries,
        "measure": uw.Loss(),
        "X": train[0],
        "y": train[1],
        "labels": train[1].tolist(),
        "X_test": queries[0],
        "y_test": queries[1],
        "n": n,
    }


def training():
    """The network, and what an adjoint starts from."""
    from dataclasses import replace

    from upweight.training.optimizers import OptimizerState
    from upweight.training.steps import TrainingState

    names = network(1664)  # 26 batches of 64, ten epochs of which are 260 steps
    size = names["task"].layout.size
    return names | {
        "direction": torch.ones(size, dtype=torch.float64),
        "replace": replace,
        "OptimizerState": OptimizerState,
        "TrainingState": TrainingState,
    }


def evaluation():
    """A network that is right about some, three groups of 20 of each class, wrong labels."""
    names = network(600, epochs=6)
    s = -names["fitted"].self_influence()
    wrong = torch.arange(600) % 8 == 0
    losses = names["fitted"].losses
    return names | {"upweight": uw, "s": s, "losses": losses, "mislabeled": wrong}


def report():
    """Ids of tokens, people, and a server that need not stay."""
    words = types.SimpleNamespace(
        convert_ids_to_tokens=lambda ids: [f"t{i}" for i in ids],
        decode=lambda ids, skip_special_tokens: " ".join(f"t{i}" for i in ids),
    )
    person = types.SimpleNamespace(age=40, city="Riga")
    ids, y = torch.arange(60).reshape(12, 5) % 9, torch.arange(12) % 2

    def reader():
        return nn.Sequential(nn.Embedding(9, 4), Mean(), nn.Linear(4, 2)).double()

    recipe = uw.Training(reader, uw.SGD(0.1), epochs=2, batch=4)
    task = uw.Task(
        recipe.trained(uw.Task(reader(), uw.CrossEntropy()), (ids, y)), uw.CrossEntropy()
    )
    fitted = uw.Influence(uw.EKFAC(), damping=0.1).fit(task, (ids, y))
    queries = (ids[:3], y[:3])
    return network() | {
        "recipe": recipe,
        "fitted": fitted,
        "scores": fitted.attribute(queries),
        "train": (ids, y),
        "queries": queries,
        "input_ids": ids.tolist(),
        "tokenizer": words,
        "people": [person] * 12,
    }


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x):
        return x.mean(dim=1)


def command_line():
    """The user's own training, beside `project.py`."""
    mine = types.ModuleType("my_training")
    mine.Net, mine.weights = Net, lambda name: Net().state_dict()
    mine.train_set, mine.test_set = (lambda: images(40, 0)), (lambda: images(8, 1))
    return {"modules": [mine]}


def classes():
    """Two classes for scikit-learn."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(0)
    X, X_test = draw.normal(size=(60, 3)), draw.normal(size=(5, 3))
    labels = {"y": (X[:, 0] > draw.normal(size=60)), "y_test": X_test[:, 0] > 0}
    of = {name: value.astype(int) for name, value in labels.items()}
    return {"X": X, "X_test": X_test, "LogisticRegression": linear_model.LogisticRegression} | of


def groups():
    """Two classes, and which of six groups each row is of."""
    names = classes()
    return names | {"labels": np.arange(len(names["y"])) % 6}


def gaps():
    """Two classes of two groups each, in three splits, with labels held back in one of them."""
    names, draw = classes(), np.random.default_rng(1)
    for split, count in (("", 400), ("_validation", 600), ("_test", 600)):
        group = np.where(draw.random(count) < 0.4, "b", "a")
        skill = draw.normal(size=count)
        y = skill + 0.5 * draw.normal(size=count) > 0
        held = (group == "b") & y & (draw.random(count) < (0 if split else 0.6))
        names[f"X{split}"] = np.c_[skill, (group == "b") + 0.5 * draw.normal(size=count)]
        names[f"y{split}"] = (y & ~held).astype(int)
        names[f"groups{split or '_train'}"] = group
        names["source"] = names.get("source", np.where(draw.random(count) < 0.5, "one", "two"))
    return names


def counts():
    """Deaths in some years, and what a regression is asked about."""
    pytest.importorskip("statsmodels")
    sm = pytest.importorskip("statsmodels.api")
    draw = np.random.default_rng(0)
    X, years = draw.normal(size=(60, 3)), draw.uniform(1, 2, size=60)
    deaths = draw.poisson(years * np.exp(X @ [0.3, -0.2, 0.1]))
    new = {"exog": sm.add_constant(X)[:5], "endog": deaths[:5], "years_new": years[:5]}
    return {"X": X, "years": years, "deaths": deaths} | new


def rows():
    """A least squares fit, and a likelihood."""
    pytest.importorskip("statsmodels")
    sm = pytest.importorskip("statsmodels.api")
    draw = np.random.default_rng(0)
    X = draw.normal(size=(60, 3))
    counted = draw.poisson(np.exp(X @ [0.3, -0.2, 0.1])).astype(float)
    beta = sm.GLM(counted, X, family=sm.families.Poisson()).fit(tol=1e-12).params
    return {
        "X": X,
        "y": counted,
        "beta": beta,
        "X_test": sm.add_constant(X)[:5],
        "y_test": counted[:5],
    }


def unlearning():
    """Two classes for scikit-learn, and what a task is made of."""
    return classes() | {"torch": torch}


def survey():
    """A survey in villages, with a recipe for the network that the page ends with."""
    pytest.importorskip("statsmodels")
    pd = pytest.importorskip("pandas")
    draw = np.random.default_rng(0)
    X = pd.DataFrame(draw.normal(size=(200, 2)), columns=["schooling", "age"])
    y = (draw.uniform(size=200) < 1 / (1 + np.exp(-0.4 * X.schooling))).astype(float)
    return network() | {"X": X, "y": y, "village": np.arange(200) // 10}


def wrong_labels():
    """Iris, of which some labels are wrong: rows to train on, to steer by, and to test on."""
    datasets = pytest.importorskip("sklearn.datasets")
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y = datasets.load_iris(return_X_y=True)
    labels = np.array(["setosa", "versicolor", "virginica"])[y]
    own, validation, test = (np.arange(150) % 3 == k for k in range(3))
    noisy = labels[own]
    noisy[::6] = "virginica"
    fresh = linear_model.LogisticRegression(solver="newton-cholesky", tol=1e-10)
    return {
        "clf": fresh.fit(X[own], noisy),
        "X": X[own],
        "y": noisy,
        "X_validation": X[validation],
        "y_validation": labels[validation],
        "X_test": X[test],
        "y_test": np.roll(labels[test], 1),  # so that some query is wrong
    }


def poisoned():
    """The network, and inputs with a trigger beside their originals."""
    names = network()
    X, y = images(60, 2)
    triggered = X.clone()
    triggered[:, 0] += 4
    half = {"originals": (X[:5], y[:5]), "triggered": (triggered[:5], y[:5])}
    fresh = {"test": (X[5:], y[5:]), "fresh_triggered": (triggered[5:], y[5:])}
    return names | half | fresh


def language_model():
    """A random GPT-2, a tokenizer of whole words, and texts."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    datasets = pytest.importorskip("datasets")
    texts = ["the iris is a flower", "a flower is not a tree", "what is a tree", "the tree is old"]
    special = ["<pad>", "<unk>", "user", "assistant", "<end>"]
    vocabulary = [*special, *sorted({word for text in texts for word in text.split()})]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = transformers.GPT2Config(vocab_size=len(vocabulary), **sizes)
    return {
        "model": transformers.GPT2LMHeadModel(config).eval(),
        "tokenizer": tokenizer,
        "dataset": datasets.Dataset.from_dict({"text": texts}),
    }


def nothing(*libraries):
    """An empty folder, as a tutorial begins, where these libraries are."""

    def names():
        for library in libraries:
            pytest.importorskip(library)
        torch.set_default_dtype(torch.float32)  # as a reader has it; `read` sets it back
        return {}

    return names


NAMES = {
    "tutorials/table.md": nothing("sklearn", "pandas"),
    "tutorials/results.md": nothing("statsmodels", "matplotlib"),
    "tutorials/checkpoint.md": nothing("sklearn", "pandas"),
    "tutorials/text.md": nothing("sklearn", "pandas", "transformers", "tokenizers"),
    "tutorials/audit.md": nothing("sklearn", "pandas"),
    "transformers.md": language_model,
    "debugging.md": wrong_labels,
    "poisoning.md": poisoned,
    "training.md": training,
    "evaluation.md": evaluation,
    "report.md": report,
    "cli.md": command_line,
    "sklearn.md": classes,
    "statsmodels.md": counts,
    "fairness.md": gaps,
    "regression.md": rows,
    "unlearning.md": unlearning,
    "cross_validation.md": groups,
    "robustness.md": survey,
}
"""What a page starts with, by its name or its path; others with `network`."""


def served(scores, display):
    """Begin and end at once what `serve` does until it is interrupted."""
    with Server(scores, display):
        pass


def test_every_page_is_in_the_navigation_once_and_every_decision_in_its_list():
    nav = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (?:.+: )?(\S+\.md)$", nav, re.MULTILINE)
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))
    table = (DOCS / "decisions" / "index.md").read_text(encoding="utf-8")
    for page in sorted((DOCS / "decisions").glob("0*.md")):
        title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        assert f"- [{title}]({page.name})" in table


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Run the blocks of a page in an empty folder; its namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("upweight.view.serve", served)
    own = torch.get_default_dtype()

    def run(page, names):
        module = types.ModuleType("page_of_the_docs")
        for each in (module, *names.pop("modules", [])):
            monkeypatch.setitem(sys.modules, each.__name__, each)
        vars(module).update(names)
        text = page.read_text(encoding="utf-8")
        blocks = list(BLOCK.finditer(text))
        assert sum(bool(b[1]) for b in blocks) == NOT_RUN.get(page.name, 0)
        for block in blocks:
            if not block[1]:
                line = text.count("\n", 0, block.start(2))
                code = block[2]
                for long, short in SHORTER.items():
                    code = code.replace(long, short)
                exec(compile("\n" * line + code, page, "exec"), vars(module))
        return vars(module)

    yield run
    torch.set_default_dtype(own)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_blocks_of_a_page_run(page, read):
    inside = page.relative_to(DOCS).as_posix()
    read(page, NAMES.get(inside, NAMES.get(page.name, network))())
