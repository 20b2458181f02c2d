"""Overlap of held-out and training text, against a comparison of all strings."""

import dataclasses
import json

import numpy as np
import pytest

from slm_jax.data import overlap
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.corpus import MixturePart, open_corpus
from slm_jax.data.overlap import HeldOutText, corpus_overlap, measure_overlap, stored_overlap
from slm_jax.data.sources.documents import Document
from tests.data.test_corpus import ListSource
from tokenizer import HybridTokenizer


def naive(held_out, train):
    """Return (whole documents, characters, matched characters)."""
    train = [" ".join(text.split()) for text in train]
    whole = characters = matched = 0
    for document in held_out:
        text, predicted = (" ".join(each.split()) for each in document[:2])
        if any(text in other if len(text) >= 50 else text == other for other in train):
            whole += 1
        windows = [i for i in range(len(predicted) - 49) if any(predicted[i : i + 50] in other for other in train)]
        characters += len(predicted)
        matched += len({i + k for i in windows for k in range(50)})
    return whole, characters, matched


def passage(random, size):
    words = ["".join(random.choice(list("abcdé🙂"), random.integers(1, 9))) for _ in range(size)]
    return "".join(word + random.choice([" ", " ", "  ", "\n"]) for word in words)


def test_against_a_comparison_of_all_strings():
    random = np.random.default_rng(3)
    for case in range(30):
        pool = [passage(random, random.integers(1, 25)) for _ in range(12)]

        def document(random=random, pool=pool):
            parts = [pool[random.integers(12)] if random.random() < 0.5 else passage(random, 12) for _ in range(4)]
            return "".join(parts[: random.integers(1, 5)])

        train = [document() for _ in range(8)]
        texts = [document() for _ in range(5)] + [train[0], f" {train[1].strip()}\n", train[2][5:]]
        held_out = [HeldOutText(text, text if case % 2 else text[len(text) // 2 :]) for text in texts]
        blocks = [train[:3], [], train[3:]]
        result = measure_overlap(held_out, blocks)
        assert (result.whole, result.characters, result.matched) == naive(held_out, train)
        assert (result.documents, result.held_out) == (8, 8)
    assert measure_overlap([], [["text"]]) == (0, 0, 0, 0, 0)
    assert measure_overlap([HeldOutText("short", "short")], []).summary().startswith("held-out text that is also in")


def test_equal_hashes_are_verified(monkeypatch):
    """With a hash that is the same for all windows, the figures are lower bounds, and never wrong."""
    monkeypatch.setattr(
        overlap, "window_hashes", lambda points, size: np.zeros(max(points.size - size + 1, 0), np.uint64)
    )
    text, other = "abcdefghij" * 6, "0123456789" * 6
    assert measure_overlap([HeldOutText(text, text)], [[other]])[1:4] == (0, 60, 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of documents of which a tenth shares its middle with the next one."""
    random = np.random.default_rng(0)
    texts = [passage(random, 40) for _ in range(200)]
    for i in range(0, 199, 10):
        texts[i] += texts[i + 1][50:150]
    items = [Document(text) for text in texts[:150]]
    items += [Document("Question: what is this about, and which of them? ", text) for text in texts[150:]]
    tokenizer = HybridTokenizer()
    for text in texts:
        tokenizer.add_text(text)
    tokenizer.freeze_vocab(vocab_size=600)
    folder = tmp_path_factory.mktemp("overlap") / "corpus"
    build_corpus(folder, ListSource(items), tokenizer, CorpusOptions(0.3))
    return folder, tokenizer


def documents(stream, tokenizer):
    ends = stream.ends
    for start, end, prompt in zip([0, *ends[:-1]], ends, stream.documents["prompt"].astype(int), strict=True):
        yield HeldOutText(*(tokenizer.decode(stream[a : end - 1].tolist()) for a in (start, start + prompt)))


def test_overlap_of_a_corpus_is_stored(corpus, monkeypatch):
    folder, tokenizer = corpus
    opened = open_corpus(folder, tokenizer)
    held_out = list(documents(opened.validation, tokenizer))
    train = [each.text for each in documents(opened.train, tokenizer)]
    expected = naive(held_out, train)
    assert expected[2] > 0
    monkeypatch.setattr(overlap, "_BLOCK", 500)
    result = corpus_overlap([opened], tokenizer)
    assert (result.whole, result.characters, result.matched) == expected
    # Training text of earlier runs counts as well: if it is the held-out text, all of that.
    trained = dataclasses.replace(opened, parts=(MixturePart(opened.validation, 1.0, ""),))
    everything = corpus_overlap([opened], tokenizer, [trained])
    assert everything.whole == everything.documents == len(held_out)
    assert everything.matched == everything.characters
    assert stored_overlap(folder, tokenizer, max_tokens=10) is None
    assert stored_overlap(folder, tokenizer) == result
    saved = json.loads((folder / "overlap.json").read_text())
    assert saved["matched"] == result.matched
    monkeypatch.setattr(overlap, "corpus_overlap", None)
    assert stored_overlap(folder, tokenizer, max_tokens=10) == result
    with pytest.raises(TypeError):  # together with other corpora it is another figure
        stored_overlap(folder, tokenizer, [folder])


def test_large_held_out_text_is_sampled(corpus, monkeypatch):
    folder, tokenizer = corpus
    opened = open_corpus(folder, tokenizer)
    monkeypatch.setattr(overlap, "_MAX_HELD_OUT", opened.validation.num_bytes // 3)
    result = corpus_overlap([opened], tokenizer)
    total = opened.validation.num_documents
    assert result.held_out == total
    assert total // 4 <= result.documents <= total // 3 + 1
    assert f"(measured on {result.documents} of {total} held-out documents)" in result.summary()
