"""Batched requests give the tokens of requests served alone, whichever others join and leave."""

import asyncio
import json
import queue
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.generation.decode import encode_prompt, generate_ids, suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.serve import batching
from slm_jax.serve.completions import Completion, Limits
from slm_jax.serve.engine import Engine
from slm_jax.serve.errors import ApiError
from slm_jax.serve.requests import QueueFullError, Request
from slm_jax.serve.schema import CompletionRequest
from slm_jax.serve.warm_up import WarmUp
from slm_jax.utils.errors import UserError
from tests.serve.conftest import CONTEXT, loaded_run
from tokenizer import HybridTokenizer

LONGEST = 110
GREEDY = Sampling(temperature=0)
VARIED = Sampling(temperature=1.5, top_k=60, top_p=0.97, min_p=0.001, repetition_penalty=1.3, seed=11)


@dataclass
class Collector:
    """Callback that collects the chunks of a request."""

    ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    chunks: int = 0
    finish_reason: str = ""

    def __call__(self, chunk):
        assert not self.finish_reason, "a chunk after the last one"
        self.ids += chunk.ids
        self.logprobs += chunk.logprobs
        self.chunks += 1
        self.finish_reason = chunk.finish_reason


def make_request(ids, max_tokens, sampling=GREEDY, **options):
    return Request(ids, max_tokens, sampling, Collector(), **options)


def run(engine, requests, rounds=10_000):
    """Serve requests until all are finished; returns their ids."""
    engine.submit(requests)
    for _ in range(rounds):
        if all(request.on_chunk.finish_reason for request in requests):
            return [request.on_chunk.ids for request in requests]
        engine._round()
    raise AssertionError("the requests do not finish")


def alone(loaded, ids, sampling=GREEDY):
    """Return the expected ids: `generate_ids` of one prompt, LONGEST tokens without end (one length: one program)."""
    suppress = [*suppressed_ids(loaded.tokenizer), loaded.tokenizer.token2id["<EOS>"]]
    return generate_ids(loaded.model, [ids], LONGEST, sampling, CONTEXT, suppress)[0]


def random_prompt(loaded, length, seed):
    return np.random.default_rng(seed).integers(300, loaded.tokenizer.vocab_size, length).tolist()


def test_greedy_batched_requests_equal_generate(engine, loaded):
    """Short and long prompts, texts that outgrow the block's columns, and one that outgrows the context."""
    lengths = (1, 5, 64, 150, 30, 2)
    prompts = [random_prompt(loaded, length, seed) for seed, length in enumerate(lengths)]
    counts = (40, 90, 30, 60, 1, LONGEST)
    requests = [make_request(prompt, count, ignore_eos=True) for prompt, count in zip(prompts, counts, strict=True)]
    texts = run(engine, requests)
    for prompt, count, ids in zip(prompts, counts, texts, strict=True):
        assert ids == alone(loaded, prompt)[:count]


def test_a_seed_gives_the_same_text_alone_batched_and_from_generate(engine, loaded):
    prompts = [random_prompt(loaded, 3 + 7 * i, i) for i in range(6)]
    samplings = [VARIED.with_seed_offset(i) if i % 2 else Sampling(temperature=1.2, seed=i) for i in range(6)]
    batched = run(engine, [make_request(p, 45, s, ignore_eos=True) for p, s in zip(prompts, samplings, strict=True)])
    for prompt, sampling, ids in zip(prompts, samplings, batched, strict=True):
        assert run(engine, [make_request(prompt, 45, sampling, ignore_eos=True)])[0] == ids
        assert alone(loaded, prompt, sampling)[:45] == ids
    assert len(set(map(tuple, batched))) == 6


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_other_requests_change_no_bit(dtype, engine, loaded, tokenizer, tmp_path):
    """Other requests are there first, and enlarge the block."""
    if dtype == "bfloat16":  # in which a difference in the last bit would be amplified to a percent
        engine = Engine(loaded_run(tmp_path / "half", tokenizer, dtype=dtype), slots=4, block_slots=4)
        assert engine.run.model.dtype == jnp.bfloat16
    prompt = random_prompt(loaded, 9, 1)

    def logprobs(other_lengths):
        others = [make_request(random_prompt(loaded, n, n), 60, ignore_eos=True) for n in other_lengths]
        request = make_request(prompt, 60, Sampling(temperature=1.0, seed=3), logprobs=True, ignore_eos=True)
        run(engine, [*others, request])
        return [token.logprob for token in request.on_chunk.logprobs]

    expected = logprobs([])
    assert len(expected) == 60
    assert logprobs([70, 3]) == expected  # bit for bit
    assert logprobs([120]) == expected


def test_logprobs_are_those_of_the_full_forward_pass(engine, loaded):
    prompt = random_prompt(loaded, 50, 5)
    request = make_request(prompt, 12, VARIED, logprobs=True, prompt_logprobs=True, ignore_eos=True)
    run(engine, [request, make_request([4], 20)])
    ids, logprobs = request.on_chunk.ids, request.on_chunk.logprobs
    assert ids[:49] == prompt[1:]
    assert len(ids) == len(logprobs) == 49 + 12
    whole = jnp.asarray([prompt[:1] + ids])
    expected = np.asarray(jax.jit(lambda ids: jax.nn.log_softmax(loaded.model(ids)[0], axis=-1))(whole))
    for i, (id_, token) in enumerate(zip(ids, logprobs, strict=True)):
        assert token.logprob == pytest.approx(expected[i, id_], abs=1e-4)
        order = np.argsort(-expected[i])[:5]
        assert [value for _, value in token.top] == pytest.approx(expected[i, order].tolist(), abs=1e-4)


def test_a_canceled_request_frees_its_slot_at_once(engine):
    endless = [make_request([5], 10**6, ignore_eos=True) for _ in range(4)]
    waiting = make_request([6], 3, ignore_eos=True)
    engine.submit([*endless, waiting])
    for _ in range(5):
        engine._round()
    assert engine.occupancy() == (4, 1)
    assert waiting.on_chunk.chunks == 0
    endless[2].finish("cancelled")
    while not waiting.on_chunk.finish_reason:
        engine._round()
    assert endless[2].on_chunk.finish_reason == "cancelled"
    assert waiting.on_chunk.finish_reason == "length"
    assert len(waiting.on_chunk.ids) == 3
    for request in endless:
        request.finish("stop")
    engine._round()
    assert engine.occupancy() == (0, 0)
    assert [request.on_chunk.finish_reason for request in endless] == ["stop", "stop", "cancelled", "stop"]


def test_requests_beyond_the_queue_size_are_refused_all_or_none(engine):
    requests = [make_request([5], 2) for _ in range(11)]
    with pytest.raises(QueueFullError):
        engine.submit(requests)
    assert engine.occupancy() == (0, 0)
    run(engine, requests[:10])
    with pytest.raises(UserError, match="at least one id"):
        engine.submit([make_request([10**6], 2)])
    with pytest.raises(UserError, match="top_p"):
        engine.submit([make_request([1], 2, Sampling(top_p=0))])


def test_finish_reason_stop_and_no_eos_among_the_ids(engine, loaded):
    requests = [
        make_request(random_prompt(loaded, 4, i), 400, Sampling(temperature=3, top_p=1.0, seed=i)) for i in range(8)
    ]
    texts = run(engine, requests)
    assert {request.on_chunk.finish_reason for request in requests} >= {"stop"}
    for request, ids in zip(requests, texts, strict=True):
        assert not set(engine.stop_ids) & set(ids)
        assert (len(ids) == 400) == (request.on_chunk.finish_reason == "length")


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


def test_requests_are_served_during_the_warm_up_and_nothing_is_compiled_after_it(loaded):
    fresh = Engine(loaded, slots=4, queue_size=6, block_slots=2)
    assert fresh.progress == (0, 0)
    early = make_request(random_prompt(loaded, 3, 0), 2, ignore_eos=True)
    fresh.submit([early])
    fresh.start(warm_up=True)
    wait_until(lambda: early.on_chunk.finish_reason)
    done, total = fresh.progress
    assert done < total
    wait_until(lambda: fresh.progress == (total, total))
    assert early.on_chunk.ids == alone(loaded, early.prompt_ids)[:2]
    assert (fresh.counters.prompt_tokens, fresh.counters.generated_tokens) == (3, 2)  # those of the warm-up not counted
    assert sum(fresh.counters.finished.values()) == 1
    programs = (
        batching.decode,
        batching.insert,
        batching.resize,
        batching.prefill_chunk,
        batching.empty_prompt_cache,
        batching.empty_block,
        batching.trim_prompt,
        batching.restore_prompt,
    )
    before = [program._cache_size() for program in programs]
    requests = [
        make_request(random_prompt(loaded, n, n), 80, VARIED, logprobs=n % 2 == 0, prompt_logprobs=n > 99)
        for n in (1, 40, 64, 100)
    ]
    requests += [make_request(random_prompt(loaded, n, n), 80, boundaries=[2, 9]) for n in (10, 40, 100, 100)]
    for batch in (requests[:4], requests[4:], [make_request([7], 3)]):
        fresh.submit(batch)
        wait_until(lambda batch=batch: all(request.on_chunk.finish_reason for request in batch))
    fresh.close()
    assert [program._cache_size() for program in programs] == before
    assert fresh.counters.generated_tokens > 240


def test_the_warm_up_compiles_what_can_be_requested(loaded, monkeypatch):
    """No conversations without a chat template, conversations first if asked for, no copies without a prefix cache."""

    def kinds(**options):
        return [request.boundaries is not None for request, _ in WarmUp(None, [64, 128], **options)._prompts]

    assert kinds() == sorted(kinds())
    assert kinds(chat_first=True) == sorted(kinds(), reverse=True)
    assert kinds(chat=False) == [False] * kinds().count(False)
    calls = []
    monkeypatch.setattr(batching, "trim_prompt", lambda cache, columns: calls.append(columns) or cache)
    monkeypatch.setattr(batching, "restore_prompt", lambda *args: None)
    for size, expected in ((0, []), (512, [64, 128, 256, 512])):
        plain = Engine(loaded, 2, 2, 2, prefix_cache=size)
        plain._feeder.compile_copies(plain._weights)
        assert calls == expected


def test_closing_the_engine_cancels_its_requests(loaded):
    fresh = Engine(loaded, slots=2, queue_size=2, block_slots=2)
    chunks = queue.Queue()
    fresh.start()
    fresh.submit([Request(encode_prompt(loaded.tokenizer, "The"), 10**6, GREEDY, chunks.put, ignore_eos=True)])
    assert chunks.get(timeout=60).ids
    fresh.close()
    while not (reason := chunks.get(timeout=60).finish_reason):
        pass
    assert reason == "cancelled"
    with pytest.raises(UserError, match="stopped"):
        fresh.submit([make_request([1], 1)])


def test_a_failure_finishes_every_request_with_an_error(loaded, monkeypatch):
    broken = Engine(loaded, slots=2, queue_size=2, block_slots=2)
    monkeypatch.setattr(batching, "decode", lambda *a: 1 / 0)
    requests = [make_request([5], 9), make_request([6], 9), make_request([7], 9)]
    broken.submit(requests)
    with pytest.raises(ZeroDivisionError):
        broken._serve()
    assert [request.on_chunk.finish_reason for request in requests] == ["error"] * 3
    assert isinstance(broken.failure, ZeroDivisionError)


def test_prompts_are_refused_unencoded_beyond_the_longest_tokens_only(tmp_path):
    tokenizer = HybridTokenizer(portable=True)
    tokenizer.add_text(("=" * 128 + "\n") * 50 + "the quick fox " * 20)
    tokenizer.freeze_vocab(vocab_size=400)
    engine = Engine(loaded_run(tmp_path / "run", tokenizer), slots=1, block_slots=1)
    longest = max(len(tokenizer.decode([id_])) for id_ in range(tokenizer.vocab_size))
    assert engine.longest_token == longest == 48

    async def count(prompt):
        request = CompletionRequest.parse(json.dumps({"prompt": prompt}).encode())
        completion = Completion("run", engine, request, Limits(4, 100, 60))
        completion.encode()
        return completion.usage()["prompt_tokens"]

    assert asyncio.run(count("=" * 48)) == 2  # with the one that begins a text
    with pytest.raises(ApiError, match="has 193 characters; the limit is 4 tokens"):
        asyncio.run(count("=" * (4 * 48 + 1)))
    # A published tokenizer with a longer entry, and a special token that is recognized in a text.
    for token_bytes, longest in (([b"", b"x" * 200], 200), ([b"", b"x"], 7)):
        published = SimpleNamespace(token_bytes=token_bytes, id2token={0: "<start>", 1: "x"})
        assert Engine.longest_token.func(SimpleNamespace(run=SimpleNamespace(tokenizer=published))) == longest
