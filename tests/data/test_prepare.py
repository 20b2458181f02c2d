"""Preparation of a run's data: made once, shared by runs and processes, rebuilt where it was lost or damaged."""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slm_jax.config.schema import Config, DataConfig
from slm_jax.data import load
from slm_jax.data.batches.modes import make_batches
from slm_jax.data.corpus import cache
from slm_jax.data.corpus.part_files import Part
from slm_jax.data.prepare import _require_kind, prepare, prepare_part
from slm_jax.data.sources.registry import make_source
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from tests.processes import Process

ROOT = Path(load.__file__).parents[2]


class Workspace:
    """A folder with two text files, in which data are prepared by this process and by commands."""

    def __init__(self, path, caplog):
        self.path = path
        self.caplog = caplog
        self.options = ["--data.files", "a.txt", "--tokenizer.vocab_size", "400", "--data.cache", "cache"]

    def config(self, **fields):
        values = {"data.cache": str(self.path / "cache"), "tokenizer.vocab_size": 400}
        values |= {"train.batch_size": 4, "train.sequence_length": 32}
        if "data__mix" not in fields:
            values["data.files"] = (str(self.path / "a.txt"),)
        return Config.load(**values | {name.replace("__", "."): value for name, value in fields.items()})

    def prepare(self, name, **fields):
        run = Run(self.path / name)
        run.path.mkdir(exist_ok=True)
        self.caplog.clear()
        return prepare(self.config(**fields), run)

    @property
    def messages(self):
        """The log lines of the last call of `prepare`."""
        return self.caplog.messages

    def command(self, *args):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return Process(
            [sys.executable, "-m", "slm_jax.data", *args],
            cwd=self.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@pytest.fixture
def workspace(tmp_path, caplog):
    for name in "ab":
        text = "".join(f"Line {i} of {name}: the quick brown fox jumps over {i * 7 % 13} dogs.\n" for i in range(900))
        (tmp_path / f"{name}.txt").write_text(text)
    with caplog.at_level(logging.INFO, logger="slm_jax"):
        yield Workspace(tmp_path, caplog)


def test_second_run_reads_nothing_and_builds_nothing(workspace, monkeypatch):
    _, first = workspace.prepare("one")
    assert any(text.startswith("learning") for text in workspace.messages)
    monkeypatch.setattr("slm_jax.data.sources.files.open_binary", None)
    _, second = workspace.prepare("two")
    assert first.fingerprint == second.fingerprint
    assert not any(text.startswith(("reading", "learning")) for text in workspace.messages)
    files = [workspace.path / name / "corpus" / "train-00000.tokens.npy" for name in ("one", "two")]
    assert files[0].stat().st_ino == files[1].stat().st_ino  # hard links to one file
    with pytest.raises(TypeError):  # other options need the text again
        workspace.prepare("three", data__validation_fraction=0.2)


def test_run_keeps_its_data_when_the_cache_is_deleted(workspace):
    _, before = workspace.prepare("run")
    shutil.rmtree(workspace.path / "cache")
    _, after = workspace.prepare("run")
    assert after.fingerprint == before.fingerprint
    assert workspace.messages == []


def test_changed_text_is_reported_and_not_used(workspace):
    _, before = workspace.prepare("run")
    (workspace.path / "a.txt").write_text("Other text.\n" * 900)
    _, after = workspace.prepare("run")
    assert after.fingerprint == before.fingerprint
    assert [text for text in workspace.messages if "the text has changed" in text]


def test_example_prompt_is_the_beginning_of_a_held_out_document(workspace):
    assert load.example_prompt(Run(workspace.path / "none")) == "The"
    workspace.prepare("one")
    assert re.fullmatch(r"Line \d+ of a:", load.example_prompt(Run(workspace.path / "one")))
    text = "\n<|endoftext|>\n".join(f"{i:030} internationalisation" for i in range(99))
    (workspace.path / "long.txt").write_text(text)
    workspace.prepare("two", data__files=(str(workspace.path / "long.txt"),), tokenizer__vocab_size=300)
    assert load.example_prompt(Run(workspace.path / "two")) == "The"  # two words are longer than a prompt


def test_example_prompt_of_instructions_is_a_whole_prompt(workspace):
    rows = [{"instruction": f"Name {'the very ' * (i % 5)}number {i}.", "output": f"It is {i}."} for i in range(300)]
    (workspace.path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"data__files": (str(workspace.path / "tasks.jsonl"),), "data__template": "alpaca"}
    workspace.prepare("run", **tasks)
    prompt = load.example_prompt(Run(workspace.path / "run"))
    assert re.fullmatch(
        r"Below is an instruction.*### Instruction:\nName number \d+\.\n\n### Response:\n", prompt, re.S
    )


def test_example_prompt_of_conversations_is_the_first_question(workspace, capsys):
    chats = [
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": f"Is {i} even?"}]}
        for i in range(300)
    ]
    for i, row in enumerate(chats):
        row["conversations"].append({"from": "gpt", "value": "No." if i % 2 else "Yes."})
    (workspace.path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    options = {"data__files": (str(workspace.path / "chats.jsonl"),), "data__mode": "segmented"}
    _, corpus = workspace.prepare("run", **options)
    assert "conversations in ShareGPT format (column conversations)" in "\n".join(workspace.messages)
    run = Run(workspace.path / "run")
    assert re.fullmatch(r"Is \d+ even\?", load.example_prompt(run))
    assert load.has_conversations(run)
    assert corpus.train.num_turns == corpus.train.num_documents
    manifest = json.loads((run.corpus / "manifest.json").read_text())
    assert manifest["source"][-1] == {"columns": ["conversations"]}
    workspace.prepare("run", **options)
    assert not [text for text in workspace.messages if "the text has changed" in text]


def test_another_chat_template_of_the_tokenizer_is_another_corpus(workspace, monkeypatch):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    rows = [
        {"messages": [{**each, "content": f"{each['content']} {i}"} for each in row["messages"]]} for i in range(300)
    ]
    (workspace.path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data__files": (str(workspace.path / "chats.jsonl"),), "data__mode": "segmented"}
    workspace.prepare("one", **options)
    workspace.prepare("two", **options)
    assert not [text for text in workspace.messages if "another chat template" in text]
    monkeypatch.setattr("slm_jax.data.prepare.template_digest", lambda tokenizer: "of another template")
    workspace.prepare("three", **options)
    assert [text for text in workspace.messages if "another chat template" in text]


def test_prepared_conversations_are_not_read_as_text(tmp_path):
    """The key of a data set of the hub does not tell what is detected in it."""
    for number, options, is_refused in [
        (4, {}, False),
        (4, {"format": "chat"}, False),
        (4, {"format": "text"}, True),
        (4, {"text_field": "body"}, True),
        (3, {"format": "text"}, False),
    ]:
        (tmp_path / "manifest.json").write_text(json.dumps({"format": number}))
        source = make_source("hf:some/chats", DataConfig(**options))
        with pytest.raises(UserError, match="prepared as conversations") if is_refused else contextlib.nullcontext():
            _require_kind(tmp_path, source)


def test_text_needs_no_chat_template(workspace, monkeypatch):
    """The tokenizer of a base model has none."""

    def refuse(tokenizer):
        raise UserError("the tokenizer has no chat template")

    monkeypatch.setattr("slm_jax.data.prepare.template_digest", refuse)
    first = workspace.prepare("one")[1].fingerprint
    assert workspace.prepare("two")[1].fingerprint == first  # from the cache


def test_a_run_of_an_earlier_version_has_not_changed(workspace):
    """Versions before did not store the options by which files were read."""
    (workspace.path / "rows.jsonl").write_text(
        "".join(json.dumps({"body": f"Row {i}. " * 9}) + "\n" for i in range(99))
    )
    options = {"data__files": (str(workspace.path / "rows.jsonl"),), "data__text_field": "body"}
    workspace.prepare("run", **options)
    file = workspace.path / "run" / "corpus" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest["source"].pop() == {"columns": ["body", "", ""]}
    file.unlink()  # a hard link to the cache
    file.write_text(json.dumps(manifest))
    workspace.prepare("run", **options)
    assert not [text for text in workspace.messages if "the text has changed" in text]


def test_on_another_file_system_small_text_is_copied_and_large_text_linked(workspace, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    workspace.prepare("copied")
    assert not (workspace.path / "copied" / "corpus").is_symlink()
    monkeypatch.setattr(cache, "_MAX_COPY", 0)
    _, before = workspace.prepare("linked")
    assert (workspace.path / "linked" / "corpus").is_symlink()
    shutil.rmtree(workspace.path / "cache")
    _, again = workspace.prepare("linked")
    assert any(text.endswith(" kB held out") for text in workspace.messages)  # it was built again
    assert again.fingerprint == before.fingerprint


def test_location_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache.cache_folder() == tmp_path / "user" / "slm_jax" / "data"
    assert cache.cache_folder("~/x") == Path.home() / "x"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # not a folder: nothing can be created in it
    assert cache.cache_folder() == Path("runs") / ".cache"


def test_cache_that_cannot_be_written_to_is_reported_with_the_option(workspace):
    (workspace.path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write to the cache .*Use another folder: --data\.cache"):
        workspace.prepare("run")


def test_damaged_corpus_in_the_cache_is_reported_and_rebuilt(workspace):
    _, before = workspace.prepare("one")
    shutil.rmtree(workspace.path / "one")
    file = next((workspace.path / "cache").rglob("train-00000.tokens.npy"))
    file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    _, after = workspace.prepare("two")
    assert any(
        "train-00000.tokens.npy: its checksum" in text and "building it again" in text for text in workspace.messages
    )
    assert after.fingerprint == before.fingerprint


def test_corpus_of_an_earlier_version_is_prepared_again_with_a_message(workspace, monkeypatch):
    """A run keeps its own; the corpus in the cache is left alone, since it may be linked to."""
    monkeypatch.setattr("slm_jax.data.prepare.FORMAT", 2)
    monkeypatch.setattr("slm_jax.data.corpus.build.FORMAT", 2)
    _, before = workspace.prepare("old")
    monkeypatch.undo()
    _, kept = workspace.prepare("old")
    assert kept.fingerprint == before.fingerprint
    assert workspace.messages == []
    _, after = workspace.prepare("new")
    assert after.fingerprint != before.fingerprint
    (message,) = [text for text in workspace.messages if "prepared by an earlier version" in text]
    (folder,) = re.findall(r"(\S+) may be removed", message)
    assert (Path(folder) / "manifest.json").is_file()
    workspace.prepare("third")
    assert not any("earlier version" in text for text in workspace.messages)


def test_sources_are_mixed(workspace):
    both = tuple(f"{workspace.path / name}.txt={weight}" for name, weight in (("a", 3), ("b", 1)))
    _, mixed = workspace.prepare("mixed", data__mix=both)
    assert [part.weight for part in mixed.parts] == [3, 1]
    assert [part.name.rpartition("/")[2] for part in mixed.parts] == ["a.txt", "b.txt"]
    assert len(mixed.train) == sum(len(part.train) for part in mixed.parts)
    assert mixed.validation.num_bytes == sum(manifest["validation"]["bytes"] for manifest in mixed.manifests)
    assert mixed.validation.num_bytes_between(0, len(mixed.validation)) == mixed.validation.num_bytes
    _, again = workspace.prepare("mixed", data__mix=both)
    assert (again.fingerprint, workspace.messages) == (mixed.fingerprint, [])
    _, other = workspace.prepare("other", data__mix=(both[0], both[1].replace("=1", "=2")))
    assert other.fingerprint != mixed.fingerprint
    assert not any(text.startswith("reading a") for text in workspace.messages)


@pytest.mark.parametrize("mode", ["packed", "segmented"])
def test_too_little_text_is_reported_before_anything_is_stored(workspace, mode):
    large = {"train__batch_size": 1000, "train__sequence_length": 1000, "data__mode": mode}
    with pytest.raises(UserError, match=r"one batch takes 1000 x 1000 = 1,000,000: .*lower --train\.batch_size"):
        workspace.prepare("run", **large)
    assert list((workspace.path / "run").iterdir()) == []
    _, corpus = workspace.prepare("run", data__mode=mode)  # the advice can be followed with the same run
    make_batches(workspace.config(data__mode=mode), corpus)
    assert {path.name for path in (workspace.path / "run").iterdir()} == {"corpus", "tokenizer.hybtok"}


def test_prompts_that_leave_no_response_are_reported_before_anything_is_stored(workspace):
    rows = "".join(f'{{"q": "Question {i} about the quick brown fox?", "a": "Answer {i}."}}\n' for i in range(200))
    (workspace.path / "qa.jsonl").write_text(rows)
    fields = {
        "data__files": (str(workspace.path / "qa.jsonl"),),
        "data__template": "{q}",
        "data__response_field": "a",
        "data__mode": "padded",
    }
    with pytest.raises(UserError, match=r"qa\.jsonl: every prompt fills a row of 2 tokens.*--train\.sequence_length"):
        workspace.prepare("run", **fields, train__sequence_length=2)
    assert list((workspace.path / "run").iterdir()) == []
    _, corpus = workspace.prepare("run", **fields, train__sequence_length=64)
    make_batches(workspace.config(**fields, train__sequence_length=64), corpus)


def test_too_little_text_of_a_mixture_is_reported_before_anything_is_stored(workspace):
    both = tuple(f"{workspace.path / name}.txt" for name in "ab")
    with pytest.raises(UserError, match=r"one batch takes 1000 x 1000"):
        workspace.prepare("run", data__mix=both, train__batch_size=1000, train__sequence_length=1000)
    assert list((workspace.path / "run").iterdir()) == []


def test_commands(workspace):
    both = [workspace.command("prepare", *workspace.options) for _ in range(2)]  # at the same time
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("learning a tokenizer" in stderr for _, stderr in outputs) == 1
    folder = outputs[0][0].splitlines()[-1]
    listed = workspace.command("list", "--data.cache", "cache").communicate()[0]
    assert "tinystories" in listed
    assert Path(folder).name in listed
    shown = workspace.command("inspect", folder).communicate()[0]
    for expected in ("all checksums match", "median", "padded at", "% padding", "document 0: 'Line "):
        assert expected in shown
    assert "note: there are too few documents to hold out whole ones: the beginning of 1 document is held out" in shown
    assert "held-out text that is also in training text: 0.0% of the documents, " in shown
    assert workspace.command("inspect", *workspace.options).communicate()[0] == shown
    file = workspace.path / folder / "train-00000.documents.npy"
    file.write_bytes(file.read_bytes()[:-1])
    process = workspace.command("inspect", folder)
    assert "train-00000.documents.npy" in process.communicate()[1]
    assert process.returncode == 2
    process = workspace.command("inspect", "nowhere")
    assert "no file, folder, run or prepared text 'nowhere'" in process.communicate()[1]
    assert process.returncode == 2


def test_a_part_that_waited_for_the_merge_is_not_encoded_again(workspace, monkeypatch):
    workspace.prepare("run")
    (manifest,) = (workspace.path / "cache" / "corpora").glob("*/manifest.json")
    entry = manifest.parent
    hidden = entry.rename(entry.with_name("hidden"))
    locked_entry = cache.locked_entry

    @contextlib.contextmanager
    def merged_meanwhile(path, content):
        with locked_entry(path, content):
            hidden.rename(entry)
            yield

    monkeypatch.setattr(cache, "locked_entry", merged_meanwhile)
    tokenizer = str(workspace.path / "run" / "tokenizer.hybtok")
    assert prepare_part(workspace.config(), Part(1, 2), tokenizer) == [None]
    assert not Part(1, 2).folder(entry).exists()


def test_leftovers_of_a_complete_corpus_are_removed(workspace):
    """As a process leaves them that is killed after a merge, before it has removed the parts."""
    workspace.prepare("run")
    (manifest,) = (workspace.path / "cache" / "corpora").glob("*/manifest.json")
    entry = manifest.parent
    left, used = (entry.with_name(f"{entry.name}.parts-{count}") for count in (2, 3))
    for folder in (left, used, entry.with_name(entry.name + ".partial")):
        (folder / "1").mkdir(parents=True)
        (folder / "1.lock").touch()
    with cache.locked_entry(used / "1", "a part"):
        workspace.prepare("other")
        assert [path.name for path in entry.parent.iterdir() if path.is_dir() and path != entry] == [used.name]
    workspace.prepare("third")
    assert not used.exists()
