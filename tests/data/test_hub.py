"""Data sets of the hub, read with the real libraries over HTTP from a local server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm_jax.config.schema import Config, DataConfig
from slm_jax.config.source_names import SOURCES
from slm_jax.data.sources import hub
from slm_jax.data.sources.catalog import CATALOG, find_dataset
from slm_jax.data.sources.registry import make_source
from slm_jax.utils.errors import UserError
from tests.data.hub_server import COMMIT, Hub

pytest.importorskip("datasets")
import pyarrow
import pyarrow.parquet as parquet

from tests.processes import Process


def table(path, rows, group=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


STORIES = [f"Once upon a time there were {i} cats. " * 8 for i in range(400)]
ARTICLES = [f" = Title {i} = \n \n Text of {i}.\n = = Section = = \n More <unk> text {i}.\n" for i in range(40)]
TASKS = [{"instruction": f"Add {i}.", "input": str(i) if i % 2 else "", "output": f"It is {i}."} for i in range(60)]


# (tree, message, parent, role, text, rank, deleted)
_NODES = [
    ("a", "1", None, "prompter", "Which?", None, False),
    ("a", "2", "1", "assistant", "Second best.", 1, False),
    ("a", "3", "1", "assistant", "Best.", 0, False),
    ("a", "4", "1", "assistant", "Deleted.", -1, True),
    ("a", "5", "3", "prompter", "Why?", None, False),
    ("a", "6", "5", "assistant", "So.", None, False),
    ("a", "7", "6", "prompter", "Unanswered.", None, False),
    ("b", "8", None, "prompter", "Alone.", None, False),
    ("c", "9", None, "prompter", "One?", None, False),
    ("c", "10", "9", "assistant", "One.", None, False),
]
TREES = [
    dict(zip(("message_tree_id", "message_id", "parent_id", "role", "text", "rank", "deleted"), node, strict=True))
    for node in _NODES
]
THREADS = [
    [["user", "Which?"], ["assistant", "Best."], ["user", "Why?"], ["assistant", "So."]],
    [["user", "One?"], ["assistant", "One."]],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of tiny data sets with the real schemas."""
    root = tmp_path_factory.mktemp("hub")
    stories = root / "roneneldan" / "TinyStories" / "data"
    for i in range(2):
        table(stories / f"train-0000{i}-of-00002.parquet", [{"text": text} for text in STORIES[i::2]])
    table(stories / "validation-00000-of-00001.parquet", [{"text": f"Held out {i}. " * 9} for i in range(10)])
    wikitext = root / "Salesforce" / "wikitext"
    for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        rows = [{"text": line} for article in ARTICLES for line in ["", *article.splitlines(keepends=True)]]
        table(wikitext / config / "train-00000-of-00001.parquet", rows)
        table(wikitext / config / "validation-00000-of-00001.parquet", rows[:12])
        table(wikitext / config / "test-00000-of-00001.parquet", rows[:6])
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("test", "train", "validation"))
        for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    )
    (wikitext / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    lines(root / "yahma" / "alpaca-cleaned" / "alpaca_data_cleaned.json", [])
    (root / "yahma" / "alpaca-cleaned" / "alpaca_data_cleaned.json").write_text(json.dumps(TASKS))
    dolly = [{"instruction": t["instruction"], "context": t["input"], "response": t["output"]} for t in TASKS]
    lines(root / "databricks" / "databricks-dolly-15k" / "databricks-dolly-15k.jsonl", dolly)
    wikipedia = root / "wikimedia" / "wikipedia"
    table(wikipedia / "20231101.he" / "train-00000-of-00001.parquet", [{"id": "1", "title": "ש", "text": "שלום " * 9}])
    (wikipedia / "README.md").write_text(
        "---\nconfigs:\n- config_name: 20231101.he\n  data_files:\n  - split: train\n    path: 20231101.he/*\n---\n"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    smoltalk = root / "HuggingFaceTB" / "smoltalk"
    table(smoltalk / "data" / "all" / "train-00000-of-00001.parquet", [{"messages": turns, "source": "x"}] * 3)
    (smoltalk / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: train\n    path: data/all/train-*\n---\n"
    )
    for split in ("train", "validation"):
        table(root / "OpenAssistant" / "oasst2" / "data" / f"{split}-00000-of-00001.parquet", TREES)
    shared = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}] * 2
    table(root / "some" / "chats" / "train.parquet", shared)
    nulls = [{"text": None, "messages": turns}, {"text": "A", "messages": turns}, {"text": "B", "messages": None}]
    table(root / "some" / "nulls" / "train.parquet", nulls)
    late = [{"messages": None}, {"messages": turns}]
    table(root / "some" / "late" / "train.parquet", late)
    lines(root / "some" / "rows" / "train.jsonl", [{"body": f"Row {i}. " * 20, "n": i} for i in range(3000)])
    return root


PROGRAM = """
import json, logging, sys, time
from slm_jax.config.schema import DataConfig
from slm_jax.data.sources import hub
from slm_jax.data.sources.documents import InvalidRow
from slm_jax.data.sources.registry import make_source
from slm_jax.utils.errors import UserError
logging.basicConfig()
logging.getLogger("slm_jax").setLevel("INFO")
wait, *requests = json.loads(sys.argv[1])
hub.RETRY_WAITS = (wait,) * 4
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, wait))  # the libraries retry as well
for name, fields, start, count in requests:
    try:
        reader = make_source(name, DataConfig(source=name, **fields)).read(start)
        items = [
            ["invalid", item.reason] if isinstance(item, InvalidRow)
            else [item.text, item.response, item.split] if item.messages is None else [*item.messages, item.split]
            for _, item in zip(range(count), reader)
        ]
        print(json.dumps([items, reader.position()]))
    except UserError as error:
        print(json.dumps(["error", str(error)]))
sys.stdout.flush()
import os; os._exit(0)
"""


class ServedHub:
    """A hub, and programs that read from it in processes of their own."""

    def __init__(self, folder, home):
        self.hub = Hub(folder)
        self.home = home

    def environment(self):
        """Return the environment of a process; HF_ENDPOINT is read when the libraries are imported."""
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        root = str(Path(hub.__file__).parents[3])
        return {**kept, "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "PYTHONPATH": root, "HF_TOKEN": ""}

    def read(self, name, start=None, count=10**6, wait=0.01, **fields):
        """Return (items as lists, position after them), or ("error", message); `wait` seconds between retries."""
        (result,) = self.read_all([name, fields, start, count], wait=wait)
        return result

    def read_all(self, *requests, wait=0.01):
        """Return the results of several requests [name, fields, start, count], read by one process in this order."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps([wait, *requests])],
            env=self.environment(), text=True, capture_output=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.err = done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()[-len(requests) :]]


@pytest.fixture
def served(folder, tmp_path):
    made = ServedHub(folder, tmp_path)
    yield made
    made.hub.close()


def test_splits_positions_and_dropped_connections(served):
    whole, _ = served.read("tinystories")
    assert [text for text, _, side in whole if side == "validation"] == [f"Held out {i}. " * 9 for i in range(10)]
    assert sorted(text for text, _, side in whole if side == "train") == sorted(STORIES)
    assert [side for _, _, side in whole] == ["validation"] * 10 + ["train"] * 400
    served.hub.drop = [300, 2000, 100]
    served.hub.refuse = 2
    first, position = served.read("tinystories", count=137)
    assert not served.hub.drop
    assert first == whole[:137]
    assert position["commit"] == COMMIT
    rest, _ = served.read("tinystories", start=position)
    assert rest == whole[137:]


@pytest.mark.slow
def test_lines_are_joined_to_articles_from_any_position(served):
    whole, _ = served.read("wikitext")
    train = [text for text, _, side in whole if side == "train"]
    assert train == ARTICLES
    first, position = served.read("wikitext-2", count=11)
    rest, _ = served.read("wikitext-2", start=position)
    assert first + rest == whole


def test_instructions_and_configurations(served):
    names = ("alpaca", "dolly", "wikipedia:he")
    (alpaca, _), (dolly, _), (hebrew, _) = served.read_all(*([name, {}, None, 10**6] for name in names))
    assert [response for _, response, _ in alpaca] == [task["output"] for task in TASKS]
    assert alpaca[1][0].endswith("### Instruction:\nAdd 1.\n\n### Input:\n1\n\n### Response:\n")
    assert dolly == alpaca
    assert hebrew == [["שלום " * 9, None, None]]


def test_conversations_by_name_and_by_detection(served):
    chat = {"format": "chat"}
    (smoltalk, _), (shared, _), (alpaca, _), (dolly, _), (first, position), (whole, _) = served.read_all(
        ["smoltalk", {}, None, 10**6],
        ["hf:some/chats", {}, None, 10**6],
        ["alpaca", chat, None, 10**6],
        ["dolly", chat, None, 10**6],
        ["oasst", {}, None, 1],
        ["oasst", {}, None, 10**6],
    )
    assert smoltalk == shared[:1] * 3 == [[["user", "Hi"], ["assistant", "Hello."], None]] * 3
    assert alpaca[1] == [["user", "Add 1.\n\n1"], ["assistant", "It is 1."], None]
    assert dolly == alpaca
    assert "conversations in ShareGPT format (column conversations)" in served.err
    assert "conversations in dolly format (columns instruction, context, response)" in served.err
    alone = ["invalid", "a tree of messages without a prompt and its answer"]
    expected = []
    for split in ("validation", "train"):
        expected += [[*THREADS[0], split], alone, [*THREADS[1], split]]
    assert whole == expected
    assert first == whole[:1]
    assert position["lines"][0]["message_id"] == "8"  # of the tree that was begun
    assert served.read("oasst", start=position)[0] == whole[1:]


def test_columns_decide_whatever_their_values_are(served):
    """Also where a build resumes after rows whose values are null."""
    (text, after), (late, first), (again, _) = served.read_all(
        ["hf:some/nulls", {}, None, 10**6],
        ["hf:some/late", {}, None, 1],
        ["hf:some/late", {}, None, 10**6],
    )
    assert [item[0] for item in text] == ["invalid", "A", "B"]
    assert after["conversations"] is False
    assert (late[0][0], first["conversations"]) == ("invalid", True)
    assert again[1:] == served.read("hf:some/late", start=first)[0] == [[["user", "Hi"], ["assistant", "Hello."], None]]


def test_any_hub_id_and_its_errors(served):
    rows, _ = served.read("hf:some/rows", text_field="body", count=2000)
    assert rows[1234] == ["Row 1234. " * 20, None, None]
    errors = {
        (
            "hf:some/rows",
            "",
        ): r"has no column text (columns: body, n): name the column of the text with --data.text_field",
        ("hf:some/rows::tset", ""): "has no split tset (splits: train)",
        ("hf:some/rows:conf", ""): "'conf' not found. Available: ['default']. Choose one with hf:some/rows:CONFIG",
        ("hf:no/where", ""): "the hub has no data set no/where (or it is private: set HF_TOKEN)",
        ("wikipedia:xx", ""): "20231101.xx",
    }
    results = served.read_all(*([name, {"text_field": field}, None, 10**6] for name, field in errors))
    for (kind, text), expected in zip(results, errors.values(), strict=True):
        assert kind == "error"
        assert expected in text
    served.hub.gated.add("some/rows")
    assert "some/rows is gated: accept its terms" in served.read("hf:some/rows", text_field="body")[1]


def test_lasting_loss_of_the_connection_is_reported(served):
    served.hub.refuse = 10**9
    kind, text = served.read("tinystories")
    assert kind == "error"
    assert "the connection failed 5 times" in text
    assert "give the same command again" in text
    assert served.err.count("retrying in") == 4


PREPARE = """
import sys
from slm_jax.cli import data
from slm_jax.data.corpus import build, splitting
build.GROUP_SIZE, build.SHARD_SIZE, splitting.SAMPLE_SIZE = 4000, 4000, 9000
sys.argv[1:1] = ["prepare", "--data.source", "tinystories", "--tokenizer.vocab_size", "400", "--data.cache"]
data.main()
"""


@pytest.mark.slow
def test_killed_download_resumes_and_is_needed_once(served, tmp_path):
    def prepare(cache):
        return Process(
            [sys.executable, "-c", PREPARE, str(cache)],
            env=served.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finished(cache):
        process = prepare(cache)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out.splitlines()

    shown = finished(tmp_path / "complete")
    complete = Path(shown[-1])
    assert "400 documents" in shown[0]
    for shard in (1, 4):
        process = prepare(tmp_path / "cut")
        while not list((tmp_path / "cut").rglob(f"train-0000{shard}.tokens.npy")):
            assert process.poll() is None, process.communicate()
            os.sched_yield()
        process.kill()
        process.communicate()
    cut = Path(finished(tmp_path / "cut")[-1])
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (complete, cut)]
    names = [name for name in contents[0] if name.endswith(".npy")]
    assert len(names) > 12
    assert all(contents[0][name] == contents[1][name] for name in names)
    assert contents[0]["manifest.json"] == contents[1]["manifest.json"]
    assert json.loads(contents[0]["manifest.json"])["version"] == COMMIT
    served.hub.close()
    assert finished(tmp_path / "cut") == finished(tmp_path / "cut")  # from the cache, without a network


@pytest.mark.slow  # the library waits for half a minute
def test_temporary_loss_of_the_network(served):
    whole, _ = served.read("tinystories")
    served.hub.skip = 2  # the schema and the validation split; the server closes while it sends the next answer
    served.hub.drop = [100]
    served.hub.go_away = True
    process = Process(
        [sys.executable, "-c", PROGRAM, json.dumps([2, ["tinystories", {}, None, 10**6]])],
        env=served.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    lines = [next(line for line in process.stderr if "retrying in 2 s" in line) for _ in range(2)]
    assert "cannot be reached" in lines[1]
    served.hub.open()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])[0] == whole


def test_missing_network_is_detected_at_once(monkeypatch, folder):
    server = Hub(folder)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    hub.check_reachable("tinystories")
    server.close()
    with pytest.raises(UserError, match=r"127\.0\.0\.1 cannot be reached .*--data.source python-docs"):
        hub.check_reachable("tinystories")
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")  # reserved for documentation
    begin = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached"):
        hub.check_reachable("tinystories")
    assert time.monotonic() - begin < 2 * hub.CONNECT_TIMEOUT


def test_names_of_data_sets():
    assert set(CATALOG) | {"python-docs", "python-qa", "python-chat", "files"} == set(SOURCES)
    assert find_dataset("wikitext").config == "wikitext-103-raw-v1"
    assert find_dataset("wikipedia:he").config == "20231101.he"
    assert find_dataset("fineweb-edu").config == "sample-10BT"
    assert find_dataset("hf:a/b:c:d")[2:5] == ("c", "", "d")
    for wrong in ("hf:a", "hf:a/b:c:d:e", "hf:/b", "tinystories:x"):
        with pytest.raises(UserError, match=r"no configurations|is written as hf:OWNER/NAME"):
            find_dataset(wrong)
    with pytest.raises(UserError, match="perhaps you meant tinystories"):
        Config.load(**{"data.source": "tinystorys"})
    assert (
        make_source("alpaca", DataConfig(source="alpaca", template="Q {instruction}\n")).dataset.mapper.response_column
        == "output"
    )
