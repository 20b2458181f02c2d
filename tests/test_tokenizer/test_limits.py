"""Adversarial input takes linear time and bounded memory; threads do not affect each other."""

import random
import string
import threading
import time

import pytest

from tests.test_tokenizer.conftest import encode_reference, make
from tests.test_tokenizer.samples import LANGUAGES, corpus
from tokenizer import HybridTokenizer
from tokenizer.encoding import encoder
from tokenizer.portable import encoder as portable_encoder


def _adversarial_texts(size: int) -> dict[str, str]:
    source = random.Random(5)
    letters = string.ascii_lowercase
    return {
        "one letter": "a" * size,
        "no spaces": "".join(source.choices(letters, k=size)),
        "random Unicode": "".join(map(chr, source.choices(range(0x3000), k=size // 2))),
        "new words": "".join("".join(source.choices(letters, k=9)) + " " for _ in range(size // 10)),
        "newlines": "\n" * size,
        "spaces": " " * size,
        "spaces and newlines": " \n" * (size // 2),
        "a repeated phrase": " of the" * (size // 7),
    }


def _seconds(tok: HybridTokenizer, text: str) -> float:
    fastest = 1e9
    for _ in range(3):
        fresh = HybridTokenizer.from_vocabulary(tok._vocabulary)
        fresh.encode_array("build the tables " * 200)
        start = time.process_time()
        fresh.encode_array(text)
        fastest = min(fastest, time.process_time() - start)
    return fastest


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_adversarial_texts(100)))
def test_linear_time(name):
    tok = make(phrases=0.1)
    one, two = _adversarial_texts(1_000_000)[name], _adversarial_texts(2_000_000)[name]
    size = len(one.encode("utf-8", "surrogatepass")) / 1e6
    first, second = _seconds(tok, one), _seconds(tok, two)
    assert second <= 2.6 * first + 0.02  # 2.3 times, plus a margin for a busy machine
    assert size / first >= 1.5, f"{size / first:.2f} MB/s"


@pytest.mark.parametrize("name", list(_adversarial_texts(100)))
def test_adversarial_texts_round_trip(tok, name):
    text = _adversarial_texts(20_000)[name]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert ids == encode_reference(text, tok._vocabulary)


@pytest.mark.parametrize("portable", [False, True])
def test_cache_is_bounded(monkeypatch, portable):
    monkeypatch.setattr(encoder, "CACHE_LIMIT", 200_000)
    monkeypatch.setattr(portable_encoder, "CACHE_LIMIT", 200_000)
    tok = make(portable=portable)
    state = tok._encoder
    for start in range(20):
        text = " ".join(f"{start}word{index}" for index in range(1000)) + " the end"
        assert tok.decode(tok.encode(text)) == text
        assert state._cache_bytes <= 200_000
        caches = (state._chunks, state._pretokens) if portable else (state._cache, state._cache_of_parts)
        entries = [entry for cache in caches for entry in cache.items()]
        assert sum(len(pretoken) + len(ids) for pretoken, ids in entries) <= 200_000


@pytest.mark.parametrize("options", [{"phrases": 0.1}, {"portable": True}])
def test_threads(monkeypatch, options):
    """A small cache, which is emptied all the time while other threads use it."""
    monkeypatch.setattr(encoder, "CACHE_LIMIT", 20_000)
    monkeypatch.setattr(portable_encoder, "CACHE_LIMIT", 20_000)
    tok = make(**options)
    texts = [corpus()[index * 500 : index * 500 + 4000] for index in range(12)] + list(LANGUAGES.values())
    expected = [encode_reference(text, tok._vocabulary) for text in texts]
    wrong: list[str] = []

    def work(seed: int) -> None:
        order = list(range(len(texts))) * 3
        random.Random(seed).shuffle(order)
        for index in order:
            ids = tok.encode(texts[index])
            if ids != expected[index] or tok.decode(ids) != texts[index]:
                wrong.append(texts[index])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
