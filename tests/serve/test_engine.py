"""Texts written together are those written alone, token for token, whoever joins and leaves."""

import queue
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.generation.decode import encode_prompt, generate_ids, never_drawn
from slm_jax.generation.sampling import Sampling
from slm_jax.serve import batching
from slm_jax.serve.engine import Engine, Full, Text
from slm_jax.utils.errors import UserError
from tests.serve.conftest import CONTEXT, loaded_run

LONGEST = 110
GREEDY = Sampling(temperature=0)
VARIED = Sampling(temperature=1.5, top_k=60, top_p=0.97, min_p=0.001, repetition_penalty=1.3, seed=11)


@dataclass
class Heard:
    """What a text handed out."""

    ids: list = field(default_factory=list)
    places: list = field(default_factory=list)
    pieces: int = 0
    end: str = ""

    def __call__(self, piece):
        assert not self.end, "something came after the end"
        self.ids += piece.ids
        self.places += piece.places
        self.pieces += 1
        self.end = piece.end


def text(ids, max_tokens, sampling=GREEDY, **more):
    return Text(ids, max_tokens, sampling, Heard(), **more)


def run(engine, texts, rounds=10_000):
    """Serve until all have ended."""
    engine.submit(texts)
    for _ in range(rounds):
        if all(each.hand_out.end for each in texts):
            return [each.hand_out.ids for each in texts]
        engine._round()
    raise AssertionError("the texts do not end")


def alone(loaded, ids, sampling=GREEDY):
    """The oracle: `generate` of one prompt, LONGEST tokens that never end (one length: one program)."""
    suppress = [*never_drawn(loaded.tokenizer), loaded.tokenizer.token2id["<EOS>"]]
    return generate_ids(loaded.model, [ids], LONGEST, sampling, CONTEXT, suppress)[0]


def random_prompt(loaded, length, seed):
    return np.random.default_rng(seed).integers(300, loaded.tokenizer.vocab_size, length).tolist()


def test_greedy_texts_in_company_are_those_of_generate_alone(engine, loaded):
    """Short and long prompts; texts that grow past what a block has, and one past the context."""
    lengths = (1, 5, 64, 150, 30, 2)
    prompts = [random_prompt(loaded, length, seed) for seed, length in enumerate(lengths)]
    counts = (40, 90, 30, 60, 1, LONGEST)
    texts = [text(prompt, count, endless=True) for prompt, count in zip(prompts, counts, strict=True)]
    rows = run(engine, texts)
    for prompt, count, row in zip(prompts, counts, rows, strict=True):
        assert row == alone(loaded, prompt)[:count]


def test_the_same_seed_gives_the_same_text_alone_in_company_and_from_generate(engine, loaded):
    prompts = [random_prompt(loaded, 3 + 7 * i, i) for i in range(6)]
    samplings = [VARIED.with_seed_plus(i) if i % 2 else Sampling(temperature=1.2, seed=i) for i in range(6)]
    together = run(engine, [text(p, 45, s, endless=True) for p, s in zip(prompts, samplings, strict=True)])
    for prompt, sampling, row in zip(prompts, samplings, together, strict=True):
        assert run(engine, [text(prompt, 45, sampling, endless=True)])[0] == row
        assert alone(loaded, prompt, sampling)[:45] == row
    assert len(set(map(tuple, together))) == 6


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_company_changes_no_bit(dtype, engine, loaded, tokenizer, tmp_path):
    """Neighbours that are there first, and that make the block larger."""
    if dtype == "bfloat16":  # in which a last bit would grow to a whole per cent
        engine = Engine(loaded_run(tmp_path / "half", tokenizer, dtype=dtype), slots=4, rows=4)
        assert engine.run.model.dtype == jnp.bfloat16
    prompt = random_prompt(loaded, 9, 1)

    def logprobs(company):
        texts = [text(random_prompt(loaded, n, n), 60, endless=True) for n in company]
        mine = text(prompt, 60, Sampling(temperature=1.0, seed=3), told=True, endless=True)
        run(engine, [*texts, mine])
        return [place.logprob for place in mine.hand_out.places]

    expected = logprobs([])
    assert len(expected) == 60
    assert logprobs([70, 3]) == expected  # to the last bit
    assert logprobs([120]) == expected


def test_places_are_the_log_probabilities_of_the_whole_model(engine, loaded):
    prompt = random_prompt(loaded, 50, 5)
    told = text(prompt, 12, VARIED, told=True, prompt_told=True, endless=True)
    run(engine, [told, text([4], 20)])
    ids, places = told.hand_out.ids, told.hand_out.places
    assert ids[:49] == prompt[1:]
    assert len(ids) == len(places) == 49 + 12
    whole = jnp.asarray([prompt[:1] + ids])
    expected = np.asarray(jax.jit(lambda ids: jax.nn.log_softmax(loaded.model(ids)[0], axis=-1))(whole))
    for i, (id_, place) in enumerate(zip(ids, places, strict=True)):
        assert place.logprob == pytest.approx(expected[i, id_], abs=1e-4)
        order = np.argsort(-expected[i])[:5]
        assert [value for _, value in place.top] == pytest.approx(expected[i, order].tolist(), abs=1e-4)


def test_a_text_that_leaves_frees_its_row_at_once(engine):
    forever = [text([5], 10**6, endless=True) for _ in range(4)]
    waits = text([6], 3, endless=True)
    engine.submit([*forever, waits])
    for _ in range(5):
        engine._round()
    assert engine.state() == (4, 1)
    assert waits.hand_out.pieces == 0
    forever[2].leave = "cancelled"
    while not waits.hand_out.end:
        engine._round()
    assert forever[2].hand_out.end == "cancelled"
    assert waits.hand_out.end == "length"
    assert len(waits.hand_out.ids) == 3
    for each in forever:
        each.leave = "stop"
    engine._round()
    assert engine.state() == (0, 0)
    assert [each.hand_out.end for each in forever] == ["stop", "stop", "cancelled", "stop"]


def test_beyond_the_bound_texts_are_refused_all_or_none(engine):
    many = [text([5], 2) for _ in range(11)]
    with pytest.raises(Full):
        engine.submit(many)
    assert engine.state() == (0, 0)
    run(engine, many[:10])
    with pytest.raises(UserError, match="ids"):
        engine.submit([text([10**6], 2)])
    with pytest.raises(UserError, match="top_p"):
        engine.submit([text([1], 2, Sampling(top_p=0))])


def test_the_end_of_a_text_is_stop_and_not_among_its_ids(engine, loaded):
    ends = [text(random_prompt(loaded, 4, i), 400, Sampling(temperature=3, top_p=1.0, seed=i)) for i in range(8)]
    rows = run(engine, ends)
    assert {each.hand_out.end for each in ends} >= {"stop"}
    for each, row in zip(ends, rows, strict=True):
        assert engine.eos not in row
        assert (len(row) == 400) == (each.hand_out.end == "length")


def test_after_the_warm_up_nothing_is_compiled(loaded):
    fresh = Engine(loaded, slots=4, waiting=6, rows=2)
    fresh.warm_up()
    programs = (
        batching.draw,
        batching.join,
        batching.resize,
        batching.feed_prompt,
        batching.empty_prompt,
        batching.empty_block,
    )
    before = [program._cache_size() for program in programs]
    texts = [
        text(random_prompt(loaded, n, n), 80, VARIED, told=n % 2 == 0, prompt_told=n > 99) for n in (1, 40, 64, 100)
    ]
    run(fresh, texts)
    run(fresh, [text([7], 3)])
    assert [program._cache_size() for program in programs] == before
    assert fresh.counters.drawn_tokens > 240


def test_the_thread_serves_and_ends_what_is_left(loaded):
    fresh = Engine(loaded, slots=2, waiting=2, rows=2)
    pieces = queue.Queue()
    fresh.start()
    fresh.submit([Text(encode_prompt(loaded.tokenizer, "The"), 10**6, GREEDY, pieces.put, endless=True)])
    assert pieces.get(timeout=60).ids
    fresh.close()
    while not (end := pieces.get(timeout=60).end):
        pass
    assert end == "cancelled"
    with pytest.raises(UserError, match="stopped"):
        fresh.submit([text([1], 1)])


def test_a_failure_ends_every_text_as_an_error(loaded, monkeypatch):
    broken = Engine(loaded, slots=2, waiting=2, rows=2)
    monkeypatch.setattr(batching, "draw", lambda *a: 1 / 0)
    texts = [text([5], 9), text([6], 9), text([7], 9)]
    broken.submit(texts)
    with pytest.raises(ZeroDivisionError):
        broken._serve()
    assert [each.hand_out.end for each in texts] == ["error"] * 3
    assert isinstance(broken.failure, ZeroDivisionError)
