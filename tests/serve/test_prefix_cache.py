"""Conversations: what earlier turns computed is reused, and no bit of the output depends on that."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from slm_jax.generation.decode import generate_ids, suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.serve import batching, prefix_cache
from slm_jax.serve.engine import Engine
from slm_jax.serve.prefill import CHUNKS, conversation_chunks
from slm_jax.serve.prefix_cache import PrefixCache, PromptChunk
from slm_jax.utils.errors import UserError
from tests.serve.conftest import CONTEXT, loaded_run
from tests.serve.test_engine import make_request, random_prompt, run

VARIED = Sampling(temperature=1.0, repetition_penalty=1.1)


def random_conversation(random, length=CONTEXT - 8):
    """Return ids and boundaries of a conversation of a length."""
    sizes = random.choice([1, 3, 12, 17, 20, 33, 50, 70], 40)
    boundaries = [b for b in np.cumsum(sizes).tolist() if b < length]
    return random.integers(10, 330, length).tolist(), boundaries


def idle(engine):
    """Let the engine do what it does while nobody waits."""
    while engine._unsaved or engine._answered or engine._ahead:
        engine._inbox.put(None)  # else it would wait for a request
        engine._round()


def outputs(engine, turns, others=()):
    """Serve prompts one after another, with other requests; return every logprob of every turn."""
    result = []
    for seed, (ids, boundaries) in enumerate(turns):
        sampling = VARIED.with_seed_offset(seed)
        request = make_request(ids, 5, sampling, logprobs=True, ignore_eos=True, boundaries=boundaries)
        run(engine, [*(make_request(random_prompt(engine.run, n, n), 9, ignore_eos=True) for n in others), request])
        engine.compute_ahead(ids, boundaries)
        idle(engine)
        result.append([(token.logprob, token.top) for token in request.on_chunk.logprobs])
    return result


def turns_of(random, ids, boundaries):
    """Return prompts as turns make them: up to some boundaries, sometimes with other messages at the end."""
    ends = [*(end for end in boundaries if end > 10), len(ids)]
    for end in sorted(random.choice(ends, min(4, len(ends)), replace=False)):
        first = [b for b in boundaries if b < end]
        yield ids[:end], first
        if random.random() < 0.4 and first:
            start = random.choice(first)
            yield [*ids[:start], *random.integers(10, 330, int(end - start)).tolist()], first


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_output_is_bit_identical_with_and_without_the_cache(dtype, tokenizer, tmp_path, loaded):
    """Random conversations, retries and branches, alone and with other requests."""
    if dtype != "float32":
        loaded = loaded_run(tmp_path / "half", tokenizer, dtype=dtype, depth=2)
    cached, plain = (Engine(loaded, 4, 6, 2, prefix_cache=size) for size in (512, 0))
    random = np.random.default_rng(0)
    for _ in range(3 if dtype == "float32" else 12):
        turns = list(turns_of(random, *random_conversation(random)))
        expected = outputs(plain, turns)
        assert outputs(cached, turns) == expected
        assert outputs(cached, turns, others=[70, 3, 20]) == expected
    assert plain.counters.reused_tokens == 0
    assert cached.counters.reused_tokens > 0.6 * cached.counters.prompt_tokens / 2
    assert len(plain.prefixes) == 0


def test_chunks_of_a_message_do_not_depend_on_later_messages():
    random = np.random.default_rng(1)
    for _ in range(50):
        length = int(random.integers(1, 700))
        boundaries = sorted(random.choice(np.arange(1, length + 1), min(length, 4), replace=False).tolist())
        chunks = conversation_chunks(length, boundaries)
        assert [chunk.first for chunk in chunks] == [0, *(chunk.end for chunk in chunks[:-1])]
        assert chunks[-1].end == length
        assert {chunk.first for chunk in chunks} >= set(boundaries) - {length}
        assert all(chunk.length <= chunk.size in CHUNKS for chunk in chunks)
        for end in boundaries:
            known = [b for b in boundaries if b < end]
            assert conversation_chunks(end, known) == [chunk for chunk in chunks if chunk.end <= end]


def prefix(*lengths, size=16):
    """Return chunks of these lengths."""
    ends = np.cumsum(lengths).tolist()
    return [PromptChunk(end - length, length, size) for end, length in zip(ends, lengths, strict=True)]


def test_the_cache_keeps_the_newest_conversations_within_its_bound():
    weights, other = object(), object()
    cache = PrefixCache(3 * 40)
    cache.reset(weights)

    def ids(*parts):
        return np.concatenate([np.full(10, part, np.int32) for part in parts])

    kept = np.zeros(10, np.float32)
    cache.add(weights, ids(1), prefix(10), kept)
    cache.add(weights, ids(1, 2), prefix(10, 10), kept)  # in the place of the conversation that it continues
    assert (len(cache), cache.bytes) == (1, 40)
    cache.add(weights, ids(1), prefix(10), kept)
    assert len(cache) == 1
    assert cache.find(weights, ids(1, 2, 3), prefix(10, 10, 10)) == (kept, 2)
    assert cache.find(weights, ids(1, 4), prefix(10, 10)) == (kept, 1)
    assert cache.find(weights, ids(1, 2)[:15], prefix(10, 5)) == (kept, 1)
    assert cache.find(weights, ids(1, 2), prefix(10, 10, size=64)) == (None, 0)  # computed by another program
    assert cache.find(weights, ids(1, 2), prefix(20)) == (None, 0)
    assert cache.find(other, ids(1, 2), prefix(10, 10)) == (None, 0)
    cache.add(weights, ids(1, 4), prefix(10, 10), kept)
    cache.add(weights, ids(5), prefix(10), kept)
    cache.find(weights, ids(1, 2), prefix(10, 10))
    cache.add(weights, ids(6), prefix(10), kept)
    assert (len(cache), cache.bytes, cache.evicted) == (3, 120, 1)
    assert cache.has(weights, ids(1, 2), prefix(10, 10))
    assert not cache.has(weights, ids(1, 4), prefix(10, 10))  # the least recently used
    cache.add(other, ids(7), prefix(10), kept)
    cache.add(weights, ids(7), prefix(10), np.zeros(100, np.float32))  # larger than the bound
    assert len(cache) == 3
    cache.reset(other)
    assert (len(cache), cache.bytes) == (0, 0)


def test_an_answer_is_computed_while_the_engine_is_idle(loaded):
    engine = Engine(loaded, 4, 6, 2)
    ids, boundaries = random_conversation(np.random.default_rng(3), 90)
    prompt = boundaries[-2]
    run(engine, [make_request(ids[:prompt], 3, boundaries=boundaries[:-2])])
    engine.compute_ahead(ids, boundaries)
    waiting = make_request([5], 30, ignore_eos=True)
    run(engine, [waiting])  # others come first
    assert engine._answered or not engine._ahead.is_complete
    idle(engine)
    longer = ids + random_prompt(loaded, 12, 1)
    request = make_request(longer, 3, boundaries=[*boundaries, 90])
    run(engine, [request])
    assert request.reused == 90
    assert (len(engine.prefixes), engine.counters.reused_tokens) == (1, 90)


def test_other_weights_reuse_nothing(loaded, tokenizer, tmp_path):
    other = loaded_run(tmp_path / "other", tokenizer, seed=1)
    engine = Engine(loaded, 4, 6, 2)
    random = np.random.default_rng(4)
    turns = [random_conversation(random, 60)] * 2
    before = outputs(engine, turns)
    assert engine.counters.reused_tokens
    engine.compute_ahead(*random_conversation(random, 60))
    engine.replace_weights(other)
    assert (len(engine.prefixes), engine.prefixes.bytes) == (0, 0)
    reused = engine.counters.reused_tokens
    first = outputs(engine, turns[:1])
    assert engine.counters.reused_tokens == reused
    assert first == outputs(Engine(other, 4, 6, 2, prefix_cache=0), turns[:1]) != before[:1]


def test_a_conversation_beyond_the_context_is_refused(engine):
    with pytest.raises(UserError, match="of 129 tokens exceeds the context of 128"):
        engine.submit([make_request([1] * 129, 1, boundaries=[])])
    engine.compute_ahead([1] * 129, [])
    assert not engine._answered


def test_the_size_of_an_entry_is_that_of_its_arrays(loaded):
    engine = Engine(loaded, 4, 6, 2)
    run(engine, [make_request(random_prompt(loaded, 20, 0), 1, boundaries=[])])
    idle(engine)
    config = loaded.config.model
    per_column = 2 * config.depth * config.dim * 4 + 4  # keys and values in float32, the position
    assert engine.prefixes.bytes == 64 * per_column + 4
    assert jax.tree.leaves(engine.prefixes._entries[0].cache)[0].shape[1] == 64


def test_a_context_beyond_the_trained_length_is_seen_in_full(loaded, caplog):
    """The conversation has chunks of the largest size; the oracle is `generate_ids` with the same context."""
    with caplog.at_level("INFO", "slm_jax.serve.engine"):
        cached, plain = (Engine(loaded, 2, 2, 2, context=700, prefix_cache=size) for size in (512, 0))
    assert f"was trained on {CONTEXT} tokens at once; the context of 700" in caplog.text
    assert (cached.context, cached.window) == (700, 700)
    ids = np.random.default_rng(7).integers(10, 330, 640).tolist()
    boundaries = [20, 300, 560]
    assert CHUNKS[-1] in {chunk.size for chunk in conversation_chunks(560, boundaries[:2])}
    turns = [(ids[:560], boundaries[:2]), (ids, boundaries)]
    texts = outputs(cached, turns)
    assert texts == outputs(plain, turns)
    assert cached.counters.reused_tokens >= 560
    request = make_request(ids, 4, VARIED, ignore_eos=True, boundaries=boundaries)
    suppress = [*suppressed_ids(loaded.tokenizer), loaded.tokenizer.eos_id]
    assert run(cached, [request]) == generate_ids(loaded.model, [ids], 4, VARIED, 700, suppress)
    other = [*range(10, 30), *ids[20:]]  # the first message, 600 tokens before the answer
    assert outputs(plain, [(ids, boundaries)])[0][0] != outputs(plain, [(other, boundaries)])[0][0]


@pytest.mark.parametrize("program", ["trim_prompt", "restore_prompt", "prefill_chunk"])
def test_an_error_in_work_for_the_cache_costs_the_cache_only(program, loaded, monkeypatch, caplog):
    """The device is out of memory as a conversation is kept, restored, or computed ahead; the cache recovers."""
    clock = [0.0]
    monkeypatch.setattr(prefix_cache, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    engine, plain = (Engine(loaded, 4, 6, 2, prefix_cache=size) for size in (512, 0))
    ids, boundaries = random_conversation(np.random.default_rng(5), 90)
    first = make_request(ids[: boundaries[-1]], 3, ignore_eos=True, boundaries=boundaries[:-1])
    run(engine, [first])
    if program == "restore_prompt":
        idle(engine)
        assert len(engine.prefixes) == 1

    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(batching, program, fail)
        if program != "restore_prompt":
            engine.compute_ahead(ids, boundaries)
            idle(engine)
        else:
            run(engine, [make_request(ids, 3, boundaries=boundaries)])
    assert "RESOURCE_EXHAUSTED" in caplog.text
    assert (len(engine.prefixes), engine.prefixes.bytes, engine.prefixes.max_bytes) == (0, 0, 0)
    requests = [make_request(ids, 9, ignore_eos=True, boundaries=boundaries) for _ in range(2)]
    assert run(engine, requests[:1]) == run(plain, requests[1:])
    engine.compute_ahead(ids, boundaries)
    idle(engine)
    assert (len(engine.prefixes), requests[0].reused, engine._ahead) == (0, 0, None)
    clock[0] += 30
    engine.compute_ahead(ids, boundaries)
    idle(engine)
    assert (len(engine.prefixes), engine.prefixes.max_bytes) == (1, 256 * 10**6)
    requests = [make_request(ids, 9, ignore_eos=True, boundaries=boundaries) for _ in range(2)]
    assert engine.prefixes._pause == 60
    assert run(engine, requests[:1]) == run(plain, requests[1:])
    assert requests[0].reused > 0
    assert engine.prefixes._pause == 30


def test_the_pause_after_errors_grows_until_something_was_reused(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(prefix_cache, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    cache = PrefixCache(1000)
    weights = object()
    cache.reset(weights)

    def fail(error):
        with cache.optional("keeping a conversation"):
            raise error
        start, step = clock[0], 1.0
        while not cache.max_bytes:
            clock[0] += step
        return clock[0] - start

    pauses = []
    for _ in range(6):  # something is kept in between, but it cannot be restored
        pauses.append(fail(ValueError("broken")))
        cache.add(weights, np.arange(16), [PromptChunk(0, 16, 16)], np.zeros(10))
        assert len(cache) == 1
    assert pauses == [30, 60, 120, 240, 480, 600]
    assert cache.max_bytes == 1000
    cache.note_reuse()
    assert fail(MemoryError()) == 30
    assert (len(cache), cache.max_bytes) == (0, 500)
    assert "for 30 s, turns of conversations are computed in full" in caplog.text


def test_weights_that_are_replaced_during_an_error_stay():
    """Another thread gets the lock before each time that this one takes it."""
    cache = PrefixCache(1000)

    class Lock:
        def __enter__(self):
            cache._weights = self.newest = object()

        def __exit__(self, *error):
            pass

    cache._lock = Lock()
    with cache.optional("keeping a conversation"):
        raise ValueError
    assert cache._weights is cache._lock.newest


def test_a_conversation_larger_than_the_cache_is_not_computed_ahead(loaded):
    engine = Engine(loaded, 4, 6, 2)
    per_column = 2 * loaded.config.model.depth * loaded.config.model.dim * 4 + 4
    engine.prefixes._limit = 64 * per_column + 4
    engine.compute_ahead(random_prompt(loaded, 65, 0), [])
    assert not engine._answered
    engine.compute_ahead(random_prompt(loaded, 64, 0), [])
    assert len(engine._answered) == 1
    idle(engine)
    assert len(engine.prefixes) == 1
