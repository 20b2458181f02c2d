"""Parts of a corpus: encoded by several processes, merged into the bytes that one process writes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from slm_jax.chat.messages import Message
from slm_jax.data.corpus import build, division, parts, splitting, writing
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.division import file_owners
from slm_jax.data.corpus.merge import complete_parts, merge_parts
from slm_jax.data.corpus.part_files import Part, PartState, json_checksum, parts_folder
from slm_jax.data.corpus.parts import build_part
from slm_jax.data.corpus.writing import write_json
from slm_jax.data.sources.documents import Document, InvalidRow
from slm_jax.data.sources.file_source import FileSource
from slm_jax.utils.errors import UserError
from slm_jax.utils.tokenizer_loading import load_tokenizer
from tests.data.test_corpus import TEXTS, Killed, ListSource, contents
from tests.helpers import learned_tokenizer
from tests.processes import Process, command_environment, wait_for

WORDS = "the quick brown fox ÉCOLE jumps Straße over 🙂 lazy dogs \ud800 THE End\n a\u0301 42".split(" ")


@pytest.fixture(scope="module")
def tokenizer():
    return learned_tokenizer(TEXTS)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make groups, shards and chunks so small that a few documents fill many."""
    for module, name, value in (
        (build, "GROUP_SIZE", 1000),
        (parts, "GROUP_SIZE", 1000),
        (division, "GROUP_SIZE", 1000),
        (build, "SHARD_SIZE", 1500),
        (parts, "CHUNK_SIZE", 800),
        (splitting, "SAMPLE_SIZE", 6000),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(writing.os, "fsync", lambda file: None)  # most of the time of so many files


def random_text(random, words):
    return " ".join(random.choice(WORDS, words)) + " \n" * int(random.integers(3))


def random_items(random, kind):
    """Return documents of one kind, among them duplicates, empty ones and invalid rows."""
    items = []
    for number in range(int(random.integers(40, 150))):
        chance = random.random()
        if chance < 0.05:
            items.append(InvalidRow(f"reason {random.integers(3)}", f"line {number}"))
        elif chance < 0.1:
            items.append(Document(" \n", "  " if kind == "instructions" else None))
        elif chance < 0.25 and items and isinstance(items[-1], Document):
            items.append(items[int(random.integers(len(items)))])
        else:
            text = f"{number}: {random_text(random, 4 if kind == 'short' else 40)}"
            response = random_text(random, 9) + "!" if kind == "instructions" else None
            group = f"group {number // 5}" if kind == "groups" else ""
            split = ("validation" if chance > 0.8 else "train") if kind == "own splits" else None
            items.append(Document(text, response, split, group))
            if kind == "conversations" and number % 9:  # the others are plain text
                turns = [Message("user", text), Message("assistant", random_text(random, 9) + "!")]
                items[-1] = Document("", messages=tuple(turns * int(random.integers(1, 4))))
    return items


OPTIONS = {
    "plain": {},
    "duplicates kept": {"deduplicate": False},
    "documents": {"max_documents": 30},
    "tokens": {"max_tokens": 2500},
    "capped": {"max_validation_characters": 700},
    "all predicted": {"loss_on": "all"},
}


def make_parts(corpus, source, tokenizer, options, count, numbers=None):
    for number in numbers or range(1, count + 1):
        part = Part(number, count)
        build_part(part.folder(corpus), source, tokenizer, options, part, workers=1)


@pytest.mark.parametrize("kind", ["plain", "short", "instructions", "groups", "own splits", "conversations"])
@pytest.mark.parametrize("name", OPTIONS)
def test_merged_parts_have_the_bytes_of_one_process(tmp_path, tokenizer, kind, name):
    random = np.random.default_rng(len(kind) * 7 + len(name))
    source = ListSource(random_items(random, kind))
    options = CorpusOptions(0.2, **OPTIONS[name])
    build_corpus(tmp_path / "one", source, tokenizer, options, workers=1)
    for count in (3, 40):
        merged = tmp_path / f"merged{count}"
        make_parts(merged, source, tokenizer, options, count)
        assert complete_parts(merged) == count
        merge_parts(merged, source, tokenizer, options, count, workers=1)
        assert contents(merged) == contents(tmp_path / "one")
        assert not list(tmp_path.glob("*.p*"))  # neither parts nor partial folders are left


@pytest.mark.parametrize("cap", [0, 500, 2000])
@pytest.mark.parametrize("documents", [1, 3])
def test_documents_that_are_cut_are_the_same(tmp_path, tokenizer, monkeypatch, cap, documents):
    """With a cap, the last of them is cut elsewhere, and later ones stay whole, which a part cannot know."""
    monkeypatch.setattr(splitting, "SAMPLE_SIZE", 100_000)
    random = np.random.default_rng(cap)
    texts = [random_text(random, 1500) for _ in range(documents)]
    source = ListSource([*texts[:1], *texts])
    options = CorpusOptions(0.1, max_validation_characters=cap)
    build_corpus(tmp_path / "one", source, tokenizer, options, workers=1)
    counts = json.loads((tmp_path / "one" / "manifest.json").read_text())["counts"]
    assert counts["cut"] == documents if cap != 500 else counts["cut"] >= 1
    make_parts(tmp_path / "merged", source, tokenizer, options, 2)
    merge_parts(tmp_path / "merged", source, tokenizer, options, 2, workers=1)
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")


@pytest.fixture(scope="module")
def foreign_tokenizer(tmp_path_factory):
    """A tokenizer of another kind, which does not restore texts: it puts a token before them, and changes spaces."""
    pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")
    from tests.utils import foreign

    return load_tokenizer(foreign.byte_fallback(tmp_path_factory.mktemp("foreign")))


@pytest.mark.parametrize("kind", ["plain", "instructions"])
@pytest.mark.parametrize("name", ["plain", "tokens", "capped"])
def test_parts_of_a_foreign_tokenizer_have_the_bytes_of_one_process(tmp_path, foreign_tokenizer, kind, name):
    test_merged_parts_have_the_bytes_of_one_process(tmp_path, foreign_tokenizer, kind, name)


@pytest.mark.parametrize("cap", [0, 500, 2000])
def test_documents_of_a_foreign_tokenizer_that_are_cut_are_the_same(tmp_path, foreign_tokenizer, monkeypatch, cap):
    """The merge cuts the text itself: the ids would not restore it."""
    text = random_text(np.random.default_rng(cap), 1500)
    assert foreign_tokenizer.decode(foreign_tokenizer.encode(text)) != text
    test_documents_that_are_cut_are_the_same(tmp_path, foreign_tokenizer, monkeypatch, cap, 3)


@pytest.mark.parametrize("limit", [{"max_tokens": 4000}, {"max_documents": 100}])
def test_what_the_parts_lack_for_a_limit_is_encoded_by_the_merge(tmp_path, tokenizer, limit, caplog):
    """Parts stop at an estimate, which is too low where most documents are duplicates."""
    caplog.set_level("INFO")
    source = ListSource(text for text in TEXTS for _ in range(6))
    options = CorpusOptions(0.2, **limit)
    build_corpus(tmp_path / "one", source, tokenizer, options, workers=1)
    make_parts(tmp_path / "merged", source, tokenizer, options, 3)
    merge_parts(tmp_path / "merged", source, tokenizer, options, 3, workers=1)
    assert "encoding the rest" in caplog.text
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")


def test_files_are_dealt_out_by_size(tmp_path, tokenizer):
    random = np.random.default_rng(3)
    for number, size in enumerate((900, 10, 300, 1, 2000, 60, 700)):
        text = random_text(random, size).replace("\ud800", "")
        (tmp_path / f"{number}.txt").write_text(text if number != 3 else "")
    source = FileSource([str(tmp_path / "*.txt")])
    options = CorpusOptions(0.2)
    assert file_owners(source, options, 3) == [1, 1, 2, 1, 0, 1, 2]
    assert file_owners(source, options, 4) is None  # too few: each part reads all, and encodes its groups
    assert file_owners(source, CorpusOptions(max_tokens=9), 3) is None
    build_corpus(tmp_path / "one", source, tokenizer, options, workers=1)
    read = []
    documents = source.documents
    source.documents = lambda path: read.append(path.name) or documents(path)
    for count in (3, 4):
        make_parts(tmp_path / "merged", source, tokenizer, options, count)
        merge_parts(tmp_path / "merged", source, tokenizer, options, count, workers=1)
        assert contents(tmp_path / "merged") == contents(tmp_path / "one")
        shutil.rmtree(tmp_path / "merged")
    assert read.count("1.txt") == 3 + 1 + 2 * 4  # in every sample; then once with 3 parts, by all with 4


def test_an_interrupted_part_resumes_and_ends_with_the_same_files(tmp_path, tokenizer, monkeypatch, caplog):
    source = ListSource([*TEXTS, *TEXTS[:9], InvalidRow("why", "where")])
    options = CorpusOptions(0.2)
    make_parts(tmp_path / "one", source, tokenizer, options, 2)
    caplog.set_level("INFO")
    write = writing._write_file
    for kill_at in range(1, 12):
        writes = iter(range(100))

        def interrupted(path, content, last=kill_at, writes=writes):
            if next(writes) == last:
                raise Killed
            write(path, content)

        monkeypatch.setattr(writing, "_write_file", interrupted)
        with pytest.raises(Killed):
            make_parts(tmp_path / "cut", source, tokenizer, options, 2, [2])
        monkeypatch.setattr(writing, "_write_file", write)
        make_parts(tmp_path / "cut", source, tokenizer, options, 2, [2])
        assert contents(tmp_path / "cut.parts-2" / "2") == contents(tmp_path / "one.parts-2" / "2")
        shutil.rmtree(tmp_path / "cut.parts-2")
    assert caplog.text.count("resuming after") == 8  # the first chunk is complete after the fourth write


def test_an_interrupted_merge_begins_again(tmp_path, tokenizer, monkeypatch):
    source = ListSource(TEXTS)
    build_corpus(tmp_path / "one", source, tokenizer, CorpusOptions(0.2), workers=1)
    make_parts(tmp_path / "merged", source, tokenizer, CorpusOptions(0.2), 2)
    save = build.BuildProgress.save
    monkeypatch.setattr(build.BuildProgress, "save", lambda self, folder: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        merge_parts(tmp_path / "merged", source, tokenizer, CorpusOptions(0.2), 2)
    monkeypatch.setattr(build.BuildProgress, "save", save)
    assert complete_parts(tmp_path / "merged") == 2  # nothing is lost
    merge_parts(tmp_path / "merged", source, tokenizer, CorpusOptions(0.2), 2)
    assert contents(tmp_path / "merged") == contents(tmp_path / "one")


def test_missing_damaged_and_different_parts_are_named(tmp_path, tokenizer, caplog):
    source = ListSource(TEXTS)
    options = CorpusOptions(0.2)
    corpus = tmp_path / "list-1"

    def merge(**changes):
        merge_parts(corpus, source, tokenizer, options, changes.get("count", 3))

    make_parts(corpus, source, tokenizer, options, 3, [1, 3])
    with pytest.raises(UserError, match=r"^list: part 2 is missing of 3: run data prepare --part I/3"):
        merge()
    with pytest.raises(UserError, match=r"part 4 is missing of 4 \(.*list-1\.parts-3 has parts of 3\)"):
        merge(count=4)
    other = learned_tokenizer(TEXTS[:50], 300)
    make_parts(tmp_path / "list-2", source, other, options, 3, [2])
    with pytest.raises(UserError, match=r"part 2 is missing of 3 \(parts in .*list-2\.parts-3 .* another tokenizer\)"):
        merge()
    state = PartState.load(parts_folder(corpus, 3) / "1")
    state.done = False
    folder = parts_folder(corpus, 3) / "2"
    folder.mkdir()
    state.save(folder)
    with pytest.raises(UserError, match=r"part 2 is not complete of 3"):
        merge()
    shutil.rmtree(folder)
    make_parts(corpus, ListSource(TEXTS[:20]), tokenizer, options, 3, [2])  # a source that hides its change
    with pytest.raises(UserError, match=r"parts 1 and 2 of 3 were made of different text .* \(sample_items\)"):
        merge()
    shutil.rmtree(folder)
    make_parts(corpus, source, tokenizer, options, 3, [2])
    state = PartState.load(folder)
    for version in (state.header["format"], [0, 0, 0]):
        PartState(**{**vars(state), "header": {**state.header, "format": version}}).save(folder)
        assert complete_parts(corpus) == (3 if version != [0, 0, 0] else 0)
    with pytest.raises(UserError, match="part 2 of 3 was made by another version of this program: remove"):
        merge()
    state.save(folder)
    file = folder / "00001.tokens.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"part 2 of 3 in .* is damaged \(chunk 2: its checksum .* --part 2/3"):
        merge()
    make_parts(corpus, source, tokenizer, options, 3, [2])  # without removing it
    assert "is damaged (chunk 2" in caplog.text
    merge()
    assert corpus.is_dir()


# Real processes, with groups of the real size.


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    words = [word.replace("\ud800", "?") for word in WORDS] + [f"w{number}" for number in range(300)]
    lines = [f"{number} {' '.join(random.choice(words, 60))}" for number in range(9000)]
    Path("a.txt").write_text("\n<|endoftext|>\n".join(lines))
    Path("b").mkdir()
    for number in range(7):
        rows = [json.dumps({"text": text}) for text in [*lines[number::90], "not in a.txt " * number]]
        Path("b", f"{number}.jsonl").write_text("\n".join([*rows, "[1", *rows[:3]]))
    return tmp_path


def arguments(cache, *more):
    mix = ["--data.mix", "a.txt=2", "b=1"]
    return ["prepare", *mix, "--data.cache", cache, "--tokenizer.vocab_size", "500", "--data.workers", "1", *more]


def start(folder, *args):
    return Process(
        [sys.executable, "-m", "slm_jax.data", *args],
        cwd=folder, env=command_environment(folder) | {"PYTHONPATH": str(Path(build.__file__).parents[3])},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def corpora(cache):
    return {
        path.relative_to(cache): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and path.stat().st_size
    }


@pytest.mark.slow
def test_three_processes_one_of_them_killed(texts):
    one = start(texts, *arguments("one"))
    parts_of = {number: start(texts, *arguments("three", "--part", f"{number}/3")) for number in (1, 2, 3)}
    folder = texts / "three" / "corpora"
    wait_for(lambda: bool(list(folder.glob("a.txt-*.parts-3/2/tokenizer.hybtok"))), parts_of[2])
    os.kill(parts_of[2].pid, signal.SIGKILL)
    parts_of[2].communicate()
    for number in (1, 3):
        status, out, err = finish(parts_of[number])
        assert status == 0, err
        assert f"a.txt: part {number} of 3 has " in out
    status, _, err = finish(start(texts, *arguments("three", "--merge", "3")))
    assert status == 2
    assert "a.txt: part 2 is " in err
    status, out, err = finish(start(texts, *arguments("three", "--part", "2/3")))
    assert status == 0, err
    status, out, err = finish(start(texts, *arguments("three", "--merge", "3")))
    assert status == 0, err
    status, expected, err = finish(one)
    assert status == 0, err
    assert out == expected.replace("one/corpora", "three/corpora")
    assert corpora(texts / "three") == corpora(texts / "one")


@pytest.mark.slow
def test_tasks_of_ray(texts):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    status, expected, err = finish(start(texts, *arguments("one")))
    assert status == 0, err
    status, out, err = finish(start(texts, *arguments("ray", "--ray", "3")))
    assert status == 0, err
    assert "3 of 3 parts are prepared" in err
    assert "merging 3 parts of a.txt" in err
    assert out == expected.replace("one/corpora", "ray/corpora")
    assert corpora(texts / "ray") == corpora(texts / "one")
    status, _, err = finish(start(texts, "prepare", "b/none.txt", "--ray", "2"))
    assert (status, err.count("\n")) == (2, 1)


def test_json_with_documents_is_written_and_hashed_part_by_part(tmp_path):
    content = {"groups": [[0, 8, None]], "texts": [[i, "é" * 200_000] for i in range(8)], "invalid": [["why", "where"]]}
    whole = json.dumps(content, sort_keys=True).encode()
    file = tmp_path / "content.json"
    tracemalloc.start()
    try:
        write_json(file, content)
        sha256 = json_checksum(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sha256 == hashlib.sha256(whole).hexdigest()
    assert file.read_text() == json.dumps(content, indent=1) + "\n"
    assert peak < 0.6 * len(whole)
