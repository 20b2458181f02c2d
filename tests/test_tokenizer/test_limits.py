"""Adversarial input takes linear time and bounded memory; threads do not affect each other."""

import random
import string
import threading
import time

import pytest

from tests.test_tokenizer.conftest import encode_reference, make
from tests.test_tokenizer.samples import LANGUAGES, corpus
from tokenizer import HybridTokenizer
from tokenizer.encoding import base_encoder, bulk, short_cache, word_cache
from tokenizer.encoding.encoder import Encoder
from tokenizer.portable.encoder import PortableEncoder


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
        fresh.encode_array("build the tables " * 4000)
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
def test_adversarial_texts_round_trip(tok, name, monkeypatch):
    monkeypatch.setattr(base_encoder, "MIN_FIRST_BULK", 0)
    text = _adversarial_texts(20_000)[name]
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert ids == encode_reference(text, tok._vocabulary)


@pytest.mark.parametrize("portable", [False, True])
def test_caches_are_bounded(monkeypatch, portable):
    """New words all the time; what a text adds to the cache of long texts may exceed the limit until the next one."""
    monkeypatch.setattr(short_cache, "SHORT_CACHE_LIMIT", 100_000)
    monkeypatch.setattr(word_cache, "CACHE_LIMIT", 400_000)
    tok = make(portable=portable)
    short, long = tok._encoder._cache, tok._encoder._bulk.cache
    source = random.Random(5)
    sizes = []
    for _ in range(20):
        words = ["".join(source.choices(string.ascii_lowercase, k=9)) for _ in range(1000)]
        for index in range(0, 1000, 250):
            text = " ".join(words[index : index + 250])
            assert tok.decode(tok.encode(text)) == text
            assert short.size_in_bytes <= 100_000
            assert sum(len(word) + len(ids) for word, ids in short._entries.items()) <= 100_000
        text = " ".join(words)
        assert tok.decode(tok.encode(text)) == text
        sizes.append(long.size_in_bytes)
    assert max(sizes) <= 800_000
    assert sorted(sizes) != sizes  # it was emptied


def test_interrupted_look_up_leaves_no_wrong_ids(monkeypatch):
    """Interrupt the making of ids, after their words are in the tables."""
    tok = make()
    text = corpus()[:6000]
    expected = encode_reference(text, tok._vocabulary)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(tok._encoder._bulk, "_segment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tok.encode(text)
    assert tok.encode(text) == expected == tok.encode(text)


@pytest.mark.parametrize("portable", [False, True])
def test_interrupted_reset_leaves_no_wrong_ids(monkeypatch, portable):
    """Interrupt the emptying of a full cache, while its permanent words are in the tables without ids."""
    monkeypatch.setattr(base_encoder, "MIN_FIRST_BULK", 0)
    tok = make(portable=portable)
    text = corpus()[:6000]
    expected = encode_reference(text, tok._vocabulary)
    assert tok.encode(text) == expected

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(word_cache, "CACHE_LIMIT", 0)
        context.setattr(word_cache.WordCache, "_add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tok.encode(text)
    assert tok.encode(text) == expected == tok.encode(text)


@pytest.mark.parametrize("options", [{"phrases": 0.1}, {"portable": True}])
def test_threads(monkeypatch, options):
    """Small caches, which are emptied all the time while other threads use them."""
    monkeypatch.setattr(base_encoder, "MIN_FIRST_BULK", 10_000)
    monkeypatch.setattr(short_cache, "SHORT_CACHE_LIMIT", 20_000)
    monkeypatch.setattr(word_cache, "CACHE_LIMIT", 20_000)
    monkeypatch.setattr(bulk, "_BLOCK", 1000)
    tok = make(**options)
    texts = [corpus()[index * 500 : index * 500 + 4000 + 100 * index] for index in range(12)] + list(LANGUAGES.values())
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


@pytest.mark.parametrize("portable", [False, True])
def test_tables_are_made_once(monkeypatch, portable):
    """Eight threads encode the first long text at once: one makes the tables, and the others wait for them."""
    made = []
    kind = PortableEncoder if portable else Encoder
    make_bulk = kind._make_bulk

    def make_slowly(self):
        made.append(threading.get_ident())
        time.sleep(0.05)  # the other threads get as far as they can
        return make_bulk(self)

    monkeypatch.setattr(kind, "_make_bulk", make_slowly)
    tok = make(portable=portable)
    text = corpus() * (1 + base_encoder.MIN_FIRST_BULK // len(corpus()))
    barrier = threading.Barrier(8)
    results: list[list[int]] = []

    def work() -> None:
        barrier.wait()
        results.append(tok.encode(text))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(results) == 8
    assert all(ids == results[0] for ids in results)
    assert tok.decode(results[0]) == text
