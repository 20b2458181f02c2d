"""Split by hash, written whole or not at all, read back exactly."""

import hashlib
import json

import numpy as np
import pytest

from slm_jax.data.corpus import open_corpus, split_documents, write_corpus
from slm_jax.errors import UserError
from tokenizer import HybridTokenizer

DOCUMENTS = [f"Document {i}: the quick brown fox jumps over {i} lazy dogs.\n" * 3 for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    made = HybridTokenizer()
    for text in DOCUMENTS:
        made.add_text(text)
    made.freeze_vocab(vocab_size=400)
    return made


def test_sides_are_disjoint_complete_and_of_about_the_fraction():
    train, validation = split_documents(DOCUMENTS, 0.2)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert 20 < len(validation) < 60


def test_adding_documents_moves_none():
    """Not even the parts of long ones."""
    more = [f"Something else, number {i}." * 30 for i in range(300)]
    novels = ["".join(f"Line {i} of novel {n}.\n" for i in range(3000)) for n in range(5)]
    before, after = split_documents(DOCUMENTS + novels, 0.2), split_documents(more + DOCUMENTS + novels, 0.2)
    assert len(before[0]) + len(before[1]) > len(DOCUMENTS) + 20
    assert set(before[0]) <= set(after[0])
    assert set(before[1]) <= set(after[1])


def test_exact_repeats_are_dropped():
    train, validation = split_documents(DOCUMENTS * 3, 0.2)
    assert len(train) + len(validation) == len(DOCUMENTS)


def test_one_long_document_is_split_in_parts_that_lose_nothing():
    text = "".join(f"Line {i} of a novel.\n" for i in range(20_000))
    train, validation = split_documents([text], 0.05)
    assert sum(map(len, train + validation)) == len(text)
    assert all(part.endswith("\n") for part in train + validation)
    assert 0 < sum(map(len, validation)) < 0.15 * len(text)


def test_of_a_few_files_none_is_held_out_whole():
    files = [f"{name} " * 2000 for name in ("english", "עברית", "🙂🙃", "four", "five")]
    train, validation = split_documents(files, 0.05)
    assert all(any(name in part for part in train) for name in ("english", "עברית", "🙂🙃", "four", "five"))
    assert 0 < sum(map(len, validation)) < 0.25 * sum(map(len, files))


def test_a_few_documents_still_give_both_sides():
    train, validation = split_documents(["first text " * 50, "second text " * 50], 0.01)
    assert train
    assert validation
    with pytest.raises(UserError, match="too short"):
        split_documents(["x"], 0.05)


def test_written_and_read_back(tmp_path, tokenizer):
    sides = split_documents(DOCUMENTS, 0.2)
    write_corpus(tmp_path / "corpus", sides, tokenizer)
    corpus = open_corpus(tmp_path / "corpus", tokenizer)
    for split, texts in ((corpus.train, sides[0]), (corpus.validation, sides[1])):
        starts = [0, *split.ends[:-1]]
        pieces = [split.tokens[a:b] for a, b in zip(starts, split.ends, strict=True)]
        assert all(piece[-1] == tokenizer.token2id["<EOS>"] for piece in pieces)
        assert [tokenizer.decode(piece[:-1].tolist()) for piece in pieces] == texts
        assert split.sizes.tolist() == [len(text.encode()) for text in texts]


def test_manifest_tells_what_is_there(tmp_path, tokenizer):
    write_corpus(tmp_path / "corpus", split_documents(DOCUMENTS, 0.2), tokenizer)
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    tokens = np.load(tmp_path / "corpus" / "train.tokens.npy")
    assert manifest["train"]["sha256"] == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert manifest["train"]["tokens"] == tokens.size


def test_too_little_text_leaves_no_folder(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"one batch takes 1,000,000"):
        write_corpus(tmp_path / "corpus", split_documents(DOCUMENTS, 0.2), tokenizer, at_least=1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_damage_and_another_tokenizer_are_named(tmp_path, tokenizer):
    write_corpus(tmp_path / "corpus", split_documents(DOCUMENTS, 0.2), tokenizer)
    other = HybridTokenizer()
    other.add_text("other text " * 9)
    other.freeze_vocab(vocab_size=300)
    with pytest.raises(UserError, match="another tokenizer"):
        open_corpus(tmp_path / "corpus", other)
    file = tmp_path / "corpus" / "train.tokens.npy"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        open_corpus(tmp_path / "corpus", tokenizer)


def test_head_takes_whole_documents(tmp_path, tokenizer):
    write_corpus(tmp_path / "corpus", split_documents(DOCUMENTS, 0.2), tokenizer)
    split = open_corpus(tmp_path / "corpus", tokenizer).validation
    head = split.head(int(split.ends[2]))
    assert len(head.ends) == 3
    assert head.tokens.size == split.ends[2]
    assert head.num_bytes == split.sizes[:3].sum()
    assert split.head(0) is split
    assert len(split.head(1).ends) == 1
