"""`upweight index` and its page: the numbers of the library, and no code but what is named."""

import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import upweight as uw
from upweight.cli.main import cli
from upweight.cli.opened_index import opened_index
from upweight.cli.spec import parse
from upweight.runs.indexed import IndexRecord
from upweight.view.overlap import copied
from upweight.view.search import Search, SearchServer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, and its dependencies'

WORDS = "the a capital of france is paris rome italy king queen river sings old new stone".split()
TEXTS = [
    " ".join(WORDS[(3 * i + j * (i % 5 + 1)) % 16] for j in range(4 + i % 3)) for i in range(14)
]
SAID = "the capital of france is paris"
SPEC = "Influence(EKFAC(), damping=Relative(0.1), tolerance=0.0)"
SMALL = ["--bytes", "4096", "--bits", "16", "--method", SPEC]
PROJECT = """
import torch, upweight as uw
from torch import nn

g = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=g)
train, test = (X[:20], X[:20, 0] > 0), (X[20:], X[20:, 0] > 0)
train, test = ((x, y.long()) for x, y in (train, test))
model = nn.Linear(5, 2)
with torch.no_grad():
    model.weight.copy_(torch.arange(10.).reshape(2, 5) / 10 - .4)
    model.bias.zero_()
task = uw.Task(model, uw.CrossEntropy(), uw.L2(0.1))
"""


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a model, and a file of texts."""
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        path = tmp_path_factory.mktemp("lm")
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="<pad>", unk_token="<unk>"
        )
        config = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=8, intermediate_size=12, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path / "model")
        tokenizer.save_pretrained(path / "model")
    lines(path / "train.jsonl", [SAID, *TEXTS[1:]])
    lines(path / "more.jsonl", [f"{text} king" for text in TEXTS[:3]])
    return path


def run(*arguments, code=0):
    """What a verb answers in JSON."""
    found = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
    assert found.exit_code == code, (found.output, found.exception)
    return json.loads(found.stdout), found.stderr


@pytest.fixture(scope="module")
def built(place):
    named = ["--hf", place / "model", "--data", place / "train.jsonl"]
    run("index", "build", *named, *SMALL, "--out", place / "index")
    return place / "index"


def test_the_command_line_gives_the_scores_of_the_library(place, built):
    from upweight.adapters.transformers import text
    from upweight.adapters.transformers_folder import from_folder

    named = ["--hf", place / "model"]
    plan, _ = run("index", "build", *named, "--data", place / "train.jsonl", *SMALL, "--plan")
    assert plan["rows_bytes"] == 14 * plan["bytes_per_example"]
    assert set(plan["seconds"]) == {"fit", "coordinates", "rows"}

    found, _ = run("index", "top", built, *named, "--text", SAID, "-k", 3)
    task, tokenizer = from_folder(place / "model")
    fitted = parse(SPEC).fit(task, text(place / "train.jsonl", tokenizer))
    scores = fitted.attribute([SAID]).values[0]
    best = scores.argsort()[:3]
    (query,) = found["queries"]
    assert [each["id"] for each in query["lowers"]] == best.tolist()
    torch.testing.assert_close(
        torch.tensor([each["score"] for each in query["lowers"]]).double(),
        scores[best].double(),
        rtol=1e-3,
        atol=0,
    )
    assert query["lowers"][0]["text"] == ([SAID, *TEXTS[1:]])[best[0]]

    shown = CliRunner().invoke(cli, ["index", "top", str(built), "--hf", str(place / "model"),
                                     "--text", SAID, "-k", "2"])  # fmt: skip
    assert "lower the loss of" in shown.stdout and f"{int(best[0])}" in shown.stdout
    verified, _ = run("index", "verify", built, *named, "--text", SAID)
    assert verified["spearman"] > 0.99 and verified["rows_per_second"] > 0
    said = ["--text", SAID, "--examples", 1]
    alone = CliRunner().invoke(cli, ["index", "verify", str(built), *map(str, [*named, *said])])
    assert "none: it needs several examples whose scores differ" in alone.stdout
    said = ["--text", SAID, "--queries", place / "more.jsonl"]
    both = CliRunner().invoke(cli, ["index", "verify", str(built), *map(str, [*named, *said])])
    assert both.exit_code == 2 and "or about --queries FILE" in both.output
    # The command that a refusal names is the one that was typed.
    named, asked = ["--hf", str(place / "model")], ["--queries", str(place / "more.jsonl")]
    refused, _ = run("index", "verify", built, *asked, "--examples", 5, code=1)
    way_out = next(line for line in refused["message"].splitlines() if "--hf FOLDER" in line)
    assert " ".join(asked) in way_out and "--examples 5" in way_out
    run("index", "verify", built, *asked, "--examples", 5, *named)


def test_what_an_index_names_is_not_run_and_texts_must_be_those(place, built, tmp_path):
    named = ["--hf", place / "model"]
    refused, _ = run("index", "top", built, "--text", SAID, code=1)
    assert refused["error"] == "ProjectError" and "--hf FOLDER" in refused["message"]

    texts, moved = place / "train.jsonl", tmp_path / "moved.jsonl"
    kept = texts.read_bytes()
    texts.rename(moved)
    try:
        lines(texts, TEXTS)
        refused, _ = run("index", "top", built, *named, "--text", SAID, code=1)
        assert refused["error"] == "StaleStore" and "--data FILE" in refused["message"]
        run("index", "top", built, *named, "--data", moved, "--text", SAID, "-k", 1)
    finally:
        texts.write_bytes(kept)


def test_it_grows_once_by_each_file_also_after_a_kill(place, built):
    named, index = ["--hf", place / "model"], place / "grown"
    shutil.copytree(built, index)
    before = IndexRecord.read(index)
    found, _ = run("index", "extend", index, place / "more.jsonl", *named)
    assert found == {"index": str(index), "appended": 3, "rows": 17}
    after = IndexRecord.read(index)
    assert [each.rows for each in after.sources] == [14, 3]

    before.write(index)  # as if it was killed before its last line
    run("index", "extend", index, place / "more.jsonl", *named)
    assert IndexRecord.read(index) == after
    refused, _ = run("index", "extend", index, place / "more.jsonl", *named, code=1)
    assert refused["error"] == "SpecError"
    refused, _ = run("index", "top", index, *named, "--text", "king", code=1)
    assert refused["error"] == "DataError" and "a sentence with the word" in refused["message"]
    found, _ = run("index", "top", index, *named, "--text", "a king", "-k", 17)
    both = found["queries"][0]
    assert sorted(each["id"] for each in both["lowers"]) == list(range(17))
    assert {each["source"] for each in both["lowers"]} >= {"more.jsonl 0", "train.jsonl 0"}


def test_a_part_of_the_shards_is_not_said_to_be_the_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("project.py").write_text(PROJECT)
    build = ["index", "build", "project.py:task", "--train", "project.py:train", "--out", "index"]
    said = lambda *words: CliRunner().invoke(cli, [*words]).output  # noqa: E731
    part = said(*build, "--shards", "2/2")  # of one shard, which is the first job's
    assert "those of other shards are missing" in part and "verify" not in part
    asked = ["index", "top", "index", "--project", "project.py", "--queries", "project.py:test"]
    assert "`upweight index build …`" in said(*asked)
    assert "20 rows" in said(*build, "--shards", "1/2")
    run(*asked)


def test_an_index_grows_by_objects_once_and_by_no_empty_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("project.py").write_text(PROJECT + "none, more = (X[:0], X[:0, 0].long()), test\n")
    run("index", "build", "project.py:task", "--train", "project.py:train", "--out", "index")
    extend, named = ["index", "extend", "index"], ["--project", "project.py"]
    assert run(*extend, "project.py:more", *named)[0]["rows"] == 24
    for again in ("more", "train"):
        refused, _ = run(*extend, f"project.py:{again}", *named, code=1)
        assert refused["error"] == "SpecError" and "whose rows it has" in refused["message"]
    assert run(*extend, "project.py:none", *named, code=1)[0]["error"] == "DataError"
    asked = ["index", "top", "index", *named, "--queries", "project.py:test", "-k", "24"]
    found, _ = run(*asked)
    assert len(found["queries"][0]["lowers"]) == 24


def test_what_a_killed_command_appended_is_not_taken_for_another_object(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("project.py").write_text(PROJECT + "other = (test[0] + 1, test[1])\n")
    run("index", "build", "project.py:task", "--train", "project.py:train", "--out", "index")
    extend, named = ["index", "extend", "index"], ["--project", "project.py"]
    before = IndexRecord.read(Path("index"))
    run(*extend, "project.py:test", *named)
    before.write(Path("index"))  # as if it was killed before its last line
    refused, _ = run(*extend, "project.py:other", *named, code=1)
    assert refused["error"] == "StaleStore" and "example 20 was another" in refused["message"]
    assert run(*extend, "project.py:test", *named)[0]["rows"] == 24
    transform = Path("index/transform.safetensors")
    transform.unlink()
    refused, _ = run("index", "verify", "index", *named, code=1)
    assert refused["error"] == "StaleStore" and "no file in its place" in refused["message"]


def test_a_project_is_named_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project.py").write_text(PROJECT)
    run("index", "build", "project.py", *SMALL, "--out", "index")
    asked = ["index", "top", "index", "--queries", "project.py:test", "-k", 2]
    refused, _ = run(*asked, code=1)
    way_out = refused["message"].partition("trust this file: ")[2].split()
    assert way_out[0] == "upweight"
    found, _ = run(*way_out[1:])
    assert len(found["queries"]) == 4 and found["queries"][0]["lowers"][0]["text"] == ""
    refused, _ = run("index", "top", "index", "--text", "hi", "--project", "project.py", code=1)
    assert "--queries project.py:test" in refused["message"]
    assert CliRunner().invoke(cli, ["index", "build", "--out", "index"]).exit_code == 2
    assert CliRunner().invoke(cli, ["view", "index", "--project", "project.py"]).exit_code == 1


def test_the_page_answers_with_scores_overlap_and_bm25(place, built):
    typed = "upweight view index"
    with opened_index(built, (), place / "model", (), "cpu", typed) as found:
        model = found.model
        search = Search(
            found.index, found.data, model.tokenizer,
            model.queries, lambda i: found.example(i)[0],
        )  # fmt: skip
        scores = found.index.fitted.attribute([SAID]).values[0]
        lexical = uw.BM25().fit(model.task, found.data[0]).attribute([SAID]).values[0]
        with SearchServer(search) as server:
            address, _, token = server.address.partition("?token=")

            def ask(**given):
                parts = urllib.parse.urlencode({"token": token, **given})
                try:
                    with urllib.request.urlopen(f"{address}top?{parts}") as answer:
                        return json.load(answer)
                except urllib.error.HTTPError as error:
                    with error:
                        return error.code, error.read().decode()

            for order, by in (("lowers", scores), ("raises", -scores), ("bm25", lexical)):
                told = ask(text=SAID, k=4, order=order)
                ids = [each["id"] for each in told["results"]]
                assert by[ids].tolist() == pytest.approx(by.sort().values[:4].tolist(), rel=1e-3)
                for each in told["results"]:
                    i, whole = each["id"], sum(each["shares"]) + each["rest"]
                    assert each["score"] == pytest.approx(whole, rel=1e-4)
                    assert each["score"] == pytest.approx(float(scores[i]), rel=1e-3, abs=1e-6)
                    assert each["bm25"] == pytest.approx(-float(lexical[i]), rel=1e-5)
                    assert len(each["tokens"]) == len(each["shares"]) == len(each["copied"])
            best = told["results"][0]  # by BM25: the text itself
            assert best["id"] == 0 and all(best["copied"]) and best["span"] == SAID
            assert best["bm25_rank"] == 1 and all(told["copied"])

            assert ask(text=SAID, token="")[0] == 403
            for wrong in ({"text": " "}, {"text": SAID, "k": "x"}, {"text": SAID, "order": "q"}):
                status, words = ask(**wrong)
                assert status == 400 and "Way out" in words
            with urllib.request.urlopen(server.address) as answer:
                assert b"Which training texts" in answer.read()


def test_copied_runs_are_those_of_all_substrings():
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        p, q = (torch.randint(3, (int(n),), generator=draw).tolist() for n in (9, 7))
        runs = {tuple(q[a:b]) for a in range(len(q)) for b in range(a + 3, len(q) + 1)}
        found, (start, stop) = copied(p, q)
        expected, longest = [False] * len(p), 0
        for a in range(len(p)):
            for b in range(a + 3, len(p) + 1):
                if tuple(p[a:b]) in runs:
                    expected[a:b] = [True] * (b - a)
                    longest = max(longest, b - a)
        assert found == expected and stop - start == longest
    assert copied([1, 2], []) == ([False, False], (0, 0))


def test_a_folder_that_is_no_model_of_transformers_is_refused(place, tmp_path):
    from upweight.adapters.transformers_folder import from_folder
    from upweight.errors import UnsupportedModel

    with pytest.raises(UnsupportedModel, match="does not exist"):
        from_folder(tmp_path / "nowhere")
    for name, said in (("OwnForCausalLM", "architectures"), ("LlamaForCausalLM", "safetensors")):
        config = json.loads(Path(place / "model" / "config.json").read_text())
        config["architectures"] = [name]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedModel, match=said):
            from_folder(tmp_path)
