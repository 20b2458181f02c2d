"""Corpora: split by hash, built in shards that survive a kill, read back exactly; damage is reported."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from slm_jax.data.corpus import build, writing
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.corpus.encode import encode_groups
from slm_jax.data.corpus.plan import make_plan
from slm_jax.data.corpus.splitting import SourceCounts, SourceSample, SplitAssigner
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE
from slm_jax.data.corpus.writing import save_array, write_array
from slm_jax.data.sources.documents import CountingReader, Document, InvalidRow
from slm_jax.utils.errors import UserError, is_disk_full
from tests.helpers import learned_tokenizer
from tests.processes import Process, kill_at_random_instants
from tokenizer import HybridTokenizer

TEXTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs.\n" * 3 for i in range(200)]


class ListSource:
    """A source of given documents."""

    name = "list"

    def __init__(self, items):
        self.items = [Document(item) if isinstance(item, str) else item for item in items]

    def describe(self):
        return "list"

    def read(self, position=None):
        return CountingReader(self.items, position)


def texts_of(documents, fraction=0.2):
    """Return the texts of the two splits."""
    documents = [Document(text) for text in documents]
    assigner = SplitAssigner(make_plan(documents, fraction))
    texts = [text for document in documents for text in assigner.assign(document, SourceCounts())]
    return [[text.text for text in texts if text.split == split] for split in ("train", "validation")]


def decoded(stream, tokenizer):
    """Return the documents of a stream, each without its <EOS>."""
    starts = [0, *stream.ends[:-1]]
    documents = [stream[a:b] for a, b in zip(starts, stream.ends, strict=True)]
    assert all(ids[-1] == tokenizer.token2id["<EOS>"] for ids in documents)
    return [tokenizer.decode(ids[:-1].tolist()) for ids in documents]


def contents(folder):
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer():
    return learned_tokenizer(TEXTS)


@pytest.fixture
def small_shards(monkeypatch):
    """Make groups and shards so small that a few documents fill many."""
    monkeypatch.setattr(build, "GROUP_SIZE", 1000)
    monkeypatch.setattr(build, "SHARD_SIZE", 1000)
    monkeypatch.setattr("slm_jax.data.corpus.splitting.SAMPLE_SIZE", 5000)


def test_splits_are_disjoint_complete_and_near_the_fraction():
    train, validation = texts_of(TEXTS)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(TEXTS)
    assert 20 < len(validation) < 60


def test_adding_documents_moves_none_to_the_other_split():
    more = [f"Something else, number {i}." * 30 for i in range(300)]
    before, after = texts_of(TEXTS), texts_of(more + TEXTS)
    assert set(before[0]) <= set(after[0])
    assert set(before[1]) <= set(after[1])
    assert [set(part) for part in texts_of(TEXTS[::-1])] == [set(part) for part in before]  # in any order


def test_two_documents_give_both_splits():
    train, validation = texts_of(["first text " * 50, "second text " * 50], 0.01)
    assert len(train) == len(validation) == 2  # the beginning and the end of each
    with pytest.raises(UserError, match="too short"):
        texts_of(["x"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["nine char", "nine char"],
            "too short .*: add more \\(9 characters in 1 document, 1 duplicate not counted\\); ",
        ),
        ([f"{i:500}" for i in range(30)], "all of the text would be held out.*fraction; "),
        ([], "there is no text to train on; "),
    ],
)
def test_too_little_text_is_reported_with_what_was_skipped(texts, message):
    skipped = [InvalidRow("column text is missing", "a:1"), InvalidRow("column text is missing", "a:2"), Document(" ")]
    sample = CountingReader([*skipped, *map(Document, texts)])
    expected = "2 invalid rows skipped: 2 x column text is missing (first: a:1); 1 empty document skipped"
    with pytest.raises(UserError, match=message) as caught:
        SourceSample(sample).plan(0.9999)
    assert str(caught.value).endswith(expected)


def test_a_source_without_training_text_is_reported():
    with pytest.raises(UserError, match="no text to train on; all of it is the source's validation text"):
        SourceSample(CountingReader([Document("held out", split="validation")]))
    with pytest.raises(UserError, match="no text to train on; the source has no documents"):
        SourceSample(CountingReader([]))


@pytest.mark.parametrize("workers", [1, 2])
def test_corpus_is_read_back_exactly(tmp_path, tokenizer, small_shards, monkeypatch, workers):
    monkeypatch.setattr(
        "slm_jax.data.corpus.encode.MIN_PARALLEL", 5000
    )  # characters; the rest is encoded by the workers
    build_corpus(tmp_path / "corpus", ListSource(TEXTS), tokenizer, CorpusOptions(0.2), workers=workers)
    corpus = open_corpus(tmp_path / "corpus", tokenizer)
    assert len(corpus.train.shards) > 5
    for stream, texts in zip((corpus.train, corpus.validation), texts_of(TEXTS), strict=True):
        assert decoded(stream, tokenizer) == texts
        assert stream.num_bytes == sum(len(text.encode()) for text in texts)
        assert stream.num_bytes_between(0, len(stream)) == stream.num_bytes
        assert stream.num_documents == len(texts)
    assert not list(tmp_path.glob("*.partial"))


def test_reading_across_shards_equals_reading_one_array(tmp_path, tokenizer, small_shards):
    build_corpus(tmp_path / "corpus", ListSource(TEXTS), tokenizer, CorpusOptions(0.2))
    split = open_corpus(tmp_path / "corpus", tokenizer).train
    whole = np.concatenate([shard.tokens for shard in split.shards])
    random = np.random.default_rng(0)
    for _ in range(200):
        a, b = sorted(random.integers(0, len(split) + 1, 2))
        assert np.array_equal(split[a:b], whole[a:b])
        assert split.num_bytes_between(a, b) == split.num_bytes_between(0, b) - split.num_bytes_between(0, a)


def test_byte_counts_are_exact_in_any_script(tmp_path, small_shards):
    words = "ÉCOLE Straße İstanbul ŉ ǅ 🙂 עברית ⁇ THE End a\u0301 \ud800 ﬁn K ſ Σίσυφος <EOS>".split()
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, 40)) + "  \n" * (i % 3) + str(i) for i in range(60)]
    made = HybridTokenizer()
    for text in texts[:40]:
        made.add_text(text)
    made.freeze_vocab(vocab_size=500)
    build_corpus(tmp_path / "corpus", ListSource(texts), made, CorpusOptions(0.2))
    corpus = open_corpus(tmp_path / "corpus", made)
    for split in (corpus.train, corpus.validation):
        ends = split.ends
        sizes = [split.num_bytes_between(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        assert sizes == [len(text.encode("utf-8", "surrogatepass")) for text in decoded(split, made)]
        assert sum(split.num_bytes_between(a, a + 1) for a in range(len(split))) == split.num_bytes


def test_duplicates_and_invalid_rows_are_skipped_and_counted(tmp_path, tokenizer, small_shards):
    items = [x for i, text in enumerate(TEXTS) for x in (text, InvalidRow("odd", f"row {i}"), text, " \n")]
    build_corpus(tmp_path / "a", ListSource(items), tokenizer, CorpusOptions(0.2))
    corpus = open_corpus(tmp_path / "a", tokenizer)
    assert [decoded(s, tokenizer) for s in (corpus.train, corpus.validation)] == texts_of(TEXTS)
    assert corpus.manifests[0]["counts"] == {
        "documents": 600,
        "repeats": 200,
        "empty": 200,
        "bad": {"odd": 200},
        "examples": {"odd": "row 0"},
        "held_out": sum(map(len, texts_of(TEXTS)[1])),
        "cut": 0,
        "gaps": 0,
    }
    build_corpus(tmp_path / "b", ListSource(items), tokenizer, CorpusOptions(0.2, deduplicate=False))
    corpus = open_corpus(tmp_path / "b", tokenizer)
    train, validation = texts_of(TEXTS)
    assert decoded(corpus.train, tokenizer) == [text for text in train for _ in range(2)]
    assert decoded(corpus.validation, tokenizer) == validation


def test_limits_of_documents_and_tokens(tmp_path, tokenizer, small_shards):
    train = texts_of(TEXTS)[0]
    build_corpus(tmp_path / "a", ListSource(TEXTS), tokenizer, CorpusOptions(0.2, max_documents=50))
    assert decoded(open_corpus(tmp_path / "a", tokenizer).train, tokenizer) == train[:50]
    build_corpus(tmp_path / "b", ListSource(TEXTS), tokenizer, CorpusOptions(0.2, max_tokens=3000))
    split = open_corpus(tmp_path / "b", tokenizer).train
    assert decoded(split, tokenizer) == train[: split.num_documents]
    assert split.ends[-2] < 3000 <= len(split)
    documents = [Document(text) for text in TEXTS]  # not many more are read than are needed
    reader = CountingReader(documents)
    assert len(SourceSample(reader, max_documents=3).items) == reader.position() == 26
    assert SourceSample(CountingReader(documents), max_tokens=50).items == documents[:3]


def test_validation_text_of_the_source_is_never_trained_on(tmp_path, tokenizer):
    held_out = [Document(text, split="validation") for text in TEXTS[:20]]
    items = [*held_out, *(Document(text, split="train") for text in TEXTS[10:])]
    build_corpus(tmp_path / "a", ListSource(items), tokenizer, CorpusOptions(0.2))
    corpus = open_corpus(tmp_path / "a", tokenizer)
    assert decoded(corpus.validation, tokenizer) == TEXTS[:20]
    assert decoded(corpus.train, tokenizer) == TEXTS[20:]


def test_prompt_of_an_instruction_is_not_predicted(tmp_path, tokenizer, small_shards):
    items = [Document(f"Question {i}?\n", f"Answer {i} 🙂, THE end.") for i in range(100)]
    build_corpus(tmp_path / "a", ListSource(items), tokenizer, CorpusOptions(0.2))
    build_corpus(tmp_path / "b", ListSource(items), tokenizer, CorpusOptions(0.2, loss_on="all"))
    split, other = (open_corpus(tmp_path / name, tokenizer).train for name in "ab")
    assert len(split) == len(other)
    assert not other.has_prompts
    mask = split.prompt_mask(0, len(split))
    texts = decoded(split, tokenizer)
    predicted = tokenizer.decode(split[0 : len(split)][~mask].tolist())
    assert predicted == "".join(text.partition("\n")[2] for text in texts)
    assert tokenizer.decode(split[0 : len(split)][mask].tolist()) == "".join(t.partition("\n")[0] + "\n" for t in texts)
    assert split.num_bytes == len(predicted.encode()) == split.num_bytes_between(0, len(split))
    assert other.num_bytes == sum(len(text.encode()) for text in texts)
    for a, b in ((0, 7), (3, 50), (11, 12), (900, len(split))):
        assert np.array_equal(split.prompt_mask(a, b), mask[a:b])


class Killed(BaseException):
    pass


def test_interrupted_build_resumes_and_ends_with_the_same_files(tmp_path, tokenizer, small_shards, monkeypatch):
    items = [x for i, text in enumerate(TEXTS) for x in (text, InvalidRow(f"odd {i % 3}", f"row {i}"), text)]
    build_corpus(tmp_path / "complete", ListSource(items), tokenizer, CorpusOptions(0.2))
    expected = contents(tmp_path / "complete")
    write = writing._write_file
    number = 0
    while not (tmp_path / "cut").is_dir():
        number += 1
        remaining = iter(range(number % 5 + 1))  # writes before the interruption

        def interrupted(path, content, remaining=remaining):
            if next(remaining, None) is None:
                path.with_name(f".{path.name}.0123.partial").write_bytes(b"half")
                raise Killed
            write(path, content)

        monkeypatch.setattr(writing, "_write_file", interrupted)
        try:
            build_corpus(tmp_path / "cut", ListSource(items), tokenizer, CorpusOptions(0.2))
        except Killed:
            assert number < 200
    assert number > 5
    assert contents(tmp_path / "cut") == expected  # temporary files of the interrupted builds were removed


def test_keys_of_the_saved_progress(tmp_path, tokenizer, small_shards, monkeypatch):
    """A build that an earlier version of this format began is resumed."""
    items = [item for i, text in enumerate(TEXTS) for item in (text, InvalidRow("odd", f"row {i}"))]
    build_corpus(tmp_path / "complete", ListSource(items), tokenizer, CorpusOptions(0.2))
    write = writing._write_file

    def interrupted(path, content):
        if path.name == "train-00005.tokens.npy":
            raise Killed
        write(path, content)

    monkeypatch.setattr(writing, "_write_file", interrupted)
    with pytest.raises(Killed):
        build_corpus(tmp_path / "cut", ListSource(items), tokenizer, CorpusOptions(0.2))
    file = tmp_path / "cut.partial" / "progress.json"
    saved = json.loads(file.read_text())
    assert set(saved) == {"plan", "head", "position", "version", "counts", "shards", "done"}
    assert saved["head"] > 0
    assert saved["position"] > saved["head"]
    assert len(saved["shards"]["train"]) == 5
    monkeypatch.setattr(writing, "_write_file", write)
    build_corpus(tmp_path / "cut", ListSource(items), tokenizer, CorpusOptions(0.2))
    assert contents(tmp_path / "cut") == contents(tmp_path / "complete")


def test_a_damaged_partial_build_starts_again(tmp_path, tokenizer, small_shards, monkeypatch, caplog):
    """A damaged header is an exception of any kind in NumPy, and damaged digests would change what is deduplicated."""
    source = ListSource(TEXTS)
    build_corpus(tmp_path / "complete", source, tokenizer, CorpusOptions(0.2))
    write = writing._write_file

    def interrupted(path, content):
        if path.name == "train-00005.tokens.npy":
            raise Killed
        write(path, content)

    name = "train-00002.documents.npy"
    content = (tmp_path / "complete" / name).read_bytes()
    swapped = content[:-30] + bytes(byte ^ 1 for byte in content[-30:])
    for damaged in (b"", content[:60], content[:-1], b"\x80\x04K\x01.", content.replace(b"{", b"[", 1), swapped, None):
        monkeypatch.setattr(writing, "_write_file", interrupted)
        with pytest.raises(Killed):
            build_corpus(tmp_path / "cut", source, tokenizer, CorpusOptions(0.2))
        file = tmp_path / "cut.partial" / name
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        (tmp_path / "cut.partial" / "tokenizer.hybtok").write_bytes(b"damaged")
        monkeypatch.setattr(writing, "_write_file", write)
        caplog.clear()
        build_corpus(tmp_path / "cut", source, tokenizer, CorpusOptions(0.2))
        assert "cut.partial is damaged (" in caplog.text
        assert "preparing list from its beginning" in caplog.text
        assert contents(tmp_path / "cut") == contents(tmp_path / "complete")
        shutil.rmtree(tmp_path / "cut")


def test_two_writers_of_a_file_use_different_temporary_files(tmp_path):
    path = tmp_path / "a.json"

    def write_while_another_one_writes(file):
        writing.write_json(path, ["second"])
        file.write(b"first")

    writing._write_file(path, write_while_another_one_writes)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


PREPARE = """
import sys
from pathlib import Path
from slm_jax.data.corpus import build, splitting
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.sources.file_source import FileSource
from slm_jax.data.sources.rows import RowMapper
from tokenizer import HybridTokenizer
build.GROUP_SIZE, build.SHARD_SIZE, splitting.SAMPLE_SIZE = 20_000, 20_000, 50_000
if not Path(sys.argv[1]).exists():  # it does if the last process was killed after its last write
    build_corpus(Path(sys.argv[1]), FileSource((sys.argv[2],), RowMapper(detects=True)),
                 HybridTokenizer.pretrained("english-8k"), CorpusOptions(0.1), workers=2)
"""


@pytest.mark.parametrize(("kills", "kind"), [(3, "conversations"), pytest.param(15, "text", marks=pytest.mark.slow)])
def test_build_killed_at_random_instants_ends_with_the_same_files(tmp_path, kills, kind):
    random = np.random.default_rng(kills)
    words = [f"w{i:x}" for i in range(3000)]
    with (tmp_path / "text.jsonl").open("w") as file:
        for i in range(6000):
            text = " ".join(words[j] for j in (random.zipf(1.3, 60) + i) % len(words))
            turns = [{"role": "user", "content": text[:200]}, {"role": "assistant", "content": text[200:]}]
            row = {"text": text} if kind == "text" else {"messages": turns}
            file.write(json.dumps(row if i % 50 else {"body": 1}) + "\n")
    command = [sys.executable, "-c", PREPARE]
    environment = {**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[3])}
    begin = time.monotonic()
    subprocess.run([*command, tmp_path / "complete", tmp_path / "text.jsonl"], env=environment, check=True)
    seconds = time.monotonic() - begin
    cut = [*command, tmp_path / "cut", tmp_path / "text.jsonl"]
    kill_at_random_instants(
        lambda: Process(cut, env=environment),
        (0.2 * seconds, seconds),
        kills,
        begin_again=lambda: shutil.rmtree(tmp_path / "cut"),
    )
    subprocess.run(cut, env=environment, check=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "complete")


def test_damage_and_another_tokenizer_are_reported(tmp_path, tokenizer, small_shards):
    folder = tmp_path / "corpus"
    build_corpus(folder, ListSource(TEXTS), tokenizer, CorpusOptions(0.2))
    other = HybridTokenizer()
    other.add_text("other text " * 9)
    other.freeze_vocab(vocab_size=300)
    with pytest.raises(UserError, match="another tokenizer"):
        open_corpus(folder, other)
    file = folder / "train-00003.tokens.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"damaged \(train-00003\.tokens\.npy: "):
        open_corpus(folder, tokenizer, verify=False)
    file.write_bytes(whole[:-10] + bytes(x ^ 1 for x in whole[-10:]))
    open_corpus(folder, tokenizer, verify=False)
    with pytest.raises(UserError, match=r"train-00003\.tokens\.npy: its checksum"):
        open_corpus(folder, tokenizer)
    file.write_bytes(whole)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_corpus(folder, tokenizer)


def test_head_has_complete_documents(tmp_path, tokenizer, small_shards):
    build_corpus(tmp_path / "corpus", ListSource(TEXTS), tokenizer, CorpusOptions(0.2))
    split = open_corpus(tmp_path / "corpus", tokenizer).train
    for count in (1, 3, 77):
        head = split.head(int(split.ends[count - 1]))
        assert head.num_documents == count
        assert len(head) == split.ends[count - 1]
        assert head.num_bytes == split.documents["bytes"][:count].sum()
    assert split.head(0) is split
    assert split.head(1).num_documents == 1


def test_sources_without_text_are_reported(tmp_path, tokenizer):
    bad = [InvalidRow("column text is missing (columns: body)", f"row {i}") for i in range(3)]
    for items, message in (([], "no text"), ([" "], "empty"), (bad, "3 invalid rows .*--data.text_field$")):
        with pytest.raises(UserError, match=message):
            build_corpus(tmp_path / "corpus", ListSource(items), tokenizer, CorpusOptions(0.2))
        assert list(tmp_path.iterdir()) == []


def test_death_of_a_worker_is_reported(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("slm_jax.data.corpus.encode.MIN_PARALLEL", 0)
    tokenizer.save(tmp_path / "tokenizer.hybtok")
    groups = encode_groups(((i, [TEXTS[i]]) for i in range(9)), tokenizer, tmp_path / "nowhere.hybtok", 2)
    with pytest.raises(UserError, match="a process that encodes text has died"):
        list(groups)
    groups = encode_groups(((i, [TEXTS[i]]) for i in range(9)), tokenizer, tmp_path / "tokenizer.hybtok", 2)
    assert [(i, tokenizer.decode(ids.tolist())) for i, (ids,) in groups] == list(enumerate(TEXTS[:9]))


def test_manifest_has_all_options(tmp_path, tokenizer):
    options = CorpusOptions(0.3, False, 40, 5000, "all", 1000)
    build_corpus(tmp_path / "corpus", ListSource(TEXTS), tokenizer, options)
    assert json.loads((tmp_path / "corpus" / "manifest.json").read_text())["options"] == dataclasses.asdict(options)


def test_source_of_the_readme(tmp_path, tokenizer, small_shards):
    readme = (Path(build.__file__).parents[1] / "README.md").read_text()
    namespace = {}
    exec(textwrap.dedent(readme.partition("```python\n")[2].partition("   ```")[0]), namespace)
    source = namespace["Squares"]()
    build_corpus(tmp_path / "corpus", source, tokenizer, CorpusOptions())
    corpus = open_corpus(tmp_path / "corpus", tokenizer)
    assert corpus.train.num_documents + corpus.validation.num_documents == 2000
    reader = source.read()
    items = iter(reader)
    first = [next(items) for _ in range(9)]
    rest = [*source.read(reader.position())]
    assert [*first, *rest] == [*source.read()]


@pytest.mark.parametrize("array", [np.arange(300_000, dtype=np.uint16), np.zeros(9000, DOCUMENT_DTYPE)])
def test_full_disk_is_recognized_when_an_array_is_written(tmp_path, array):
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb") as file:  # noqa: PTH123
        save_array(file, array)
    assert is_disk_full(caught.value)
    write_array(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
