"""Verification of large corpora as they are read: each flipped bit is reported, in the file and block where it is."""

import json
import re
import shutil

import numpy as np
import pytest

from slm_jax.config.schema import Config
from slm_jax.data.batches.packed import PackedBatches
from slm_jax.data.batches.padded import PaddedBatches
from slm_jax.data.batches.prefetch import Prefetcher
from slm_jax.data.corpus import build, corpus, verification
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.corpus import open_array, open_corpus
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE
from slm_jax.data.prepare import prepare
from slm_jax.data.sources.documents import CountingReader, Document
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

TEXTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs.\n" * 3 for i in range(100)]
BLOCK = 256


class Texts:
    name = "texts"

    def describe(self):
        return "texts"

    def read(self, position=None):
        return CountingReader(map(Document, TEXTS), position)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return (folder, tokenizer) of a corpus of several shards with several blocks."""
    tokenizer = HybridTokenizer()
    for text in TEXTS:
        tokenizer.add_text(text)
    tokenizer.freeze_vocab(vocab_size=320)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "BLOCK", BLOCK)
        patch.setattr(build, "SHARD_SIZE", 1500)
        patch.setattr(build, "GROUP_SIZE", 500)
        patch.setattr("slm_jax.data.corpus.splitting.SAMPLE_SIZE", 3000)
        folder = tmp_path_factory.mktemp("built") / "corpus"
        build_corpus(folder, Texts(), tokenizer, CorpusOptions(0.2), workers=1)
    return folder, tokenizer


@pytest.fixture
def large(built, tmp_path, monkeypatch):
    """Return (folder, tokenizer) of a copy that counts as large."""
    monkeypatch.setattr(corpus, "_VERIFIED", 0)
    monkeypatch.setattr(verification, "BLOCK", BLOCK)
    shutil.copytree(built[0], tmp_path / "corpus")
    return tmp_path / "corpus", built[1]


def flip_bit(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_flipped_bit_is_reported_when_its_block_is_read(large):
    folder, tokenizer = large
    whole = open_corpus(folder, tokenizer).train
    expected = whole[0 : len(whole)]
    size = whole.shards[1].tokens.size
    first = whole.shards[0].tokens.size  # of the second shard in the stream
    blocks = -(-size // BLOCK)
    assert len(whole.shards) > 2
    assert blocks > 3
    path = folder / "train-00001.tokens.npy"
    data = path.read_bytes()
    header = len(data) - 2 * size
    for block in range(blocks):
        at = min(block * BLOCK + 17 * block, size - 1)
        flip_bit(path, header + 2 * at, block % 8)
        stream = open_corpus(folder, tokenizer).train  # opening reads nothing
        start = first + block * BLOCK
        end = first + min((block + 1) * BLOCK, size)
        for _ in range(2):  # once and for all
            with pytest.raises(UserError) as error:
                stream[max(start - 1, 0) : start + 1]
        assert re.search(
            rf"damaged \(train-00001\.tokens\.npy: the checksum differs in block {block + 1} of {blocks} "
            rf"\(tokens {start - first:,} to {end - first - 1:,}\)\): remove {folder} to build it again",
            str(error.value),
        )
        assert (stream[end : len(stream)] == expected[end:]).all()
        assert (stream[0:start] == expected[:start]).all()
        path.write_bytes(data)


def test_flipped_bit_in_the_documents_is_reported_when_its_shard_is_read(large):
    folder, tokenizer = large
    flip_bit(folder / "train-00001.documents.npy", -30)
    stream = open_corpus(folder, tokenizer).train
    end = stream.shards[0].tokens.size
    assert stream[0:end].size == end
    for read in (
        lambda: stream[end : end + 1],
        lambda: stream.ends,
        lambda: stream.documents,
        lambda: stream.num_bytes,
    ):
        with pytest.raises(UserError, match=r"train-00001\.documents\.npy: its checksum"):
            read()


def test_ids_beyond_the_vocabulary_are_reported(large):
    folder, tokenizer = large
    path = folder / "train-00001.tokens.npy"
    tokens = np.load(path)
    tokens[300] = 999
    np.save(path, tokens)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["train"]["shards"][1]
    entry["tokens_sha256"] = verification.checksum(tokens)
    entry["tokens_crc32"] = verification.block_checksums(tokens)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    message = r"train-00001\.tokens\.npy: id 999{} is beyond the 320 ids of the tokenizer"
    stream = open_corpus(folder, tokenizer).train
    with pytest.raises(UserError, match=message.format(r" in block 2 of \d+ \(tokens 256 to 511\)")):
        stream[0 : len(stream)]
    with pytest.raises(UserError, match=message.format("")):
        open_corpus(folder, tokenizer, verify=True)


def test_corpora_without_checksums_of_blocks_are_verified_by_shard(large):
    folder, tokenizer = large
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in ("train", "validation"):
        for entry in manifest[split]["shards"]:
            del entry["tokens_crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    stream = open_corpus(folder, tokenizer).train
    assert stream[0 : len(stream)].size == len(stream)
    flip_bit(folder / "train-00001.tokens.npy", -1)
    stream = open_corpus(folder, tokenizer).train
    with pytest.raises(
        UserError, match=r"train-00001\.tokens\.npy: the checksum differs in block 1 of 1 \(tokens 0 to"
    ):
        stream[0 : len(stream)]


def test_damage_reaches_the_training_loop(large):
    folder, tokenizer = large
    flip_bit(folder / "train-00002.tokens.npy", -1)
    for make in (PackedBatches, PaddedBatches):
        batches = make(open_corpus(folder, tokenizer).parts, 4, 64, 0)
        with Prefetcher(batches, lambda arrays: arrays, 0, 500) as prefetcher:

            def read_all(prefetcher=prefetcher):
                for _ in range(500):
                    prefetcher.next()

            with pytest.raises(UserError, match=r"train-00002\.tokens\.npy: the checksum differs in block"):
                read_all()


def test_every_flipped_bit_in_a_header_is_harmless_or_reported(large):
    path = large[0] / "train-00000.documents.npy"
    expected = np.load(path)
    problems = set()
    for offset in range(path.stat().st_size - expected.nbytes):
        for bit in range(8):
            flip_bit(path, offset, bit)
            try:
                array = open_array(path, DOCUMENT_DTYPE, expected.size)
            except ValueError as error:
                problems.add(str(error).partition(" (")[0])
            else:
                assert (array == expected).all()
            flip_bit(path, offset, bit)
    assert "train-00000.documents.npy: its header is damaged" in problems
    assert all(problem.startswith("train-00000.documents.npy: ") for problem in problems)


def test_removing_a_damaged_corpus_rebuilds_it_in_the_cache_as_well(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"The quick brown fox jumps over {i} dogs.\n" for i in range(900)))
    fields = {"data.files": (str(tmp_path / "a.txt"),), "data.cache": str(tmp_path / "cache")}
    config = Config.load(**fields, **{"tokenizer.vocab_size": 400, "train.batch_size": 4, "train.sequence_length": 32})
    monkeypatch.setattr(corpus, "_VERIFIED", 0)
    run = Run(tmp_path / "run")
    run.path.mkdir()
    _, before = prepare(config, run)
    flip_bit(run.corpus / "train-00000.tokens.npy", -1)  # a hard link: the file of the cache is the same
    _, damaged = prepare(config, run)
    with pytest.raises(
        UserError, match=rf"damaged \(train-00000\.tokens\.npy: .*: remove {run.corpus} to build it again"
    ):
        damaged.train[0 : len(damaged.train)]
    shutil.rmtree(run.corpus)
    _, after = prepare(config, run)
    assert after.fingerprint == before.fingerprint
    assert after.train[0 : len(after.train)].size == len(before.train)
