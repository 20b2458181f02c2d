"""Cached generation of a batch of prompts equals the full forward pass, in one compiled loop."""

import io
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.cli.generate import Options, main, read_prompts
from slm_jax.generation import decode as generation
from slm_jax.generation.batch import NO_TOKEN
from slm_jax.generation.decode import Sampling, generate_ids, stream
from slm_jax.model.ops import cached_attention, masked_attention, write_cache
from slm_jax.model.ops.attention import cache_mask
from slm_jax.model.precision import Policy
from slm_jax.model.transformer import Transformer
from slm_jax.utils.errors import UserError
from tests.helpers import BFLOAT16, FLOAT32, random_ids, tiny_model
from tokenizer import HybridTokenizer

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
GREEDY = Sampling(temperature=0)
VARIED = Sampling(temperature=2.0, top_k=40, top_p=0.98, min_p=0.001, repetition_penalty=1.2, no_repeat_ngram=3, seed=5)


def streamed(*args, **kwargs):
    return np.stack(list(stream(*args, **kwargs)), axis=1).tolist()


def assert_greedy(model, prompts, rows, tolerance=1e-4):
    """Assert that each token is the argmax of the full forward pass; one pass gives the logits of every position."""
    texts = [prompt + row for prompt, row in zip(prompts, rows, strict=True)]
    ids = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = text
    logits_BxTxV = np.asarray(jax.jit(model.__call__)(jnp.asarray(ids)))
    for logits_TxV, prompt, row in zip(logits_BxTxV, prompts, rows, strict=True):
        for i, token in enumerate(row):
            assert logits_TxV[len(prompt) + i - 1].max() - logits_TxV[len(prompt) + i - 1, token] < tolerance, i


@pytest.fixture
def small_chunks(monkeypatch):
    """Make prompts of a few tokens take several chunks, and short texts wrap around the cache."""
    monkeypatch.setattr(generation, "_CHUNKS", (2, 4))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"window": 5},
        {"kv_heads": 2},
        {"kv_heads": 1, "qk_norm": False, "window": 3},
        {"tie_weights": False, "vocab_multiple": 64},
        {"qk_norm": False, "tie_weights": False},
    ],
)
def test_greedy_equals_the_full_forward_pass_at_each_token(fields, small_chunks):
    model = tiny_model(**fields)
    rows = generate_ids(model, PROMPTS, 20, GREEDY)
    assert [len(row) for row in rows] == [20] * 3
    assert_greedy(model, PROMPTS, rows)


def test_assert_greedy_rejects_a_wrong_token():
    model = tiny_model()
    rows = generate_ids(model, PROMPTS, 8, GREEDY)
    rows[1][-1] = (rows[1][-1] + 1) % 61
    with pytest.raises(AssertionError):
        assert_greedy(model, PROMPTS, rows)


def test_attention_slides_beyond_the_context_in_bounded_memory(small_chunks, monkeypatch):
    """A text much longer than the context equals that of a model with this window; the cache does not grow."""
    capacities = []
    empty_cache = Transformer.empty_cache
    monkeypatch.setattr(
        Transformer,
        "empty_cache",
        lambda self, b, capacity: capacities.append(capacity) or empty_cache(self, b, capacity),
    )
    prompts = [random_ids((37,), seed=1).tolist(), [4], random_ids((90,), seed=2).tolist()]
    windowed = tiny_model(window=5)
    assert_greedy(windowed, prompts, generate_ids(tiny_model(), prompts, 60, GREEDY, context=5))
    assert capacities == [8]  # window + chunk - 1 with chunks of 4, rounded up to a multiple of the chunk


def test_context_does_not_change_a_text_within_it():
    model = tiny_model()
    assert generate_ids(model, PROMPTS, 8, GREEDY, context=16) == generate_ids(model, PROMPTS, 8, GREEDY)


def test_bfloat16_logits_stay_close_to_the_full_forward_pass():
    config = tiny_model().config
    half = Transformer(config, 61, policy=Policy(BFLOAT16), rngs=nnx.Rngs(0))
    assert_greedy(
        half, PROMPTS, generate_ids(half, PROMPTS, 20, GREEDY), tolerance=1e-3
    )  # logits are about 0.1, and bfloat16 has 8 bits of precision


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_cached_attention_equals_masked_attention(dtype):
    b, t, h, g, k, s = 2, 3, 4, 2, 8, 16
    generator = np.random.default_rng(0)
    q, keys, values = (
        jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((b, t, h, k), (b, s, g, k), (b, s, g, k))
    )
    mask = cache_mask(jnp.asarray([[8, 9, 10], [-1, 0, 1]]), jnp.broadcast_to(jnp.arange(s), (b, s)), 5)
    caches = [write_cache(jnp.zeros((b * g, s, k)), x, jnp.int32(0), dtype) for x in (keys, values)]
    result = cached_attention(q, *caches, mask, dtype)
    expected = masked_attention(q, keys, values, mask, dtype)
    np.testing.assert_allclose(result, expected, atol=2e-6)


def test_a_sequence_does_not_depend_on_the_rest_of_the_batch():
    model = tiny_model()
    samplings = [VARIED, Sampling(seed=9), GREEDY]
    rows = generate_ids(model, PROMPTS, 12, samplings)
    for prompt, each, row in zip(PROMPTS, samplings, rows, strict=True):
        assert generate_ids(model, [prompt, [1], [2]], 12, [each, GREEDY, GREEDY])[0] == row
    assert generate_ids(model, PROMPTS[:1], 12, [VARIED]) == rows[:1]
    same = generate_ids(model, [[3]] * 3, 12, Sampling(temperature=3.0, top_p=1.0))
    assert len(set(map(tuple, same))) == 3  # one seed for all: each sequence has its own random numbers
    assert generate_ids(model, [[3], [8], [8]], 12, Sampling(temperature=3.0, top_p=1.0))[0] == same[0]


def test_seed_reproduces():
    model = tiny_model(scale=2.0)
    first = generate_ids(model, PROMPTS, 12, Sampling(seed=1))
    assert first == generate_ids(model, PROMPTS, 12, Sampling(seed=1))
    assert first != generate_ids(model, PROMPTS, 12, Sampling(seed=2))


@pytest.mark.parametrize("settings", [GREEDY, VARIED])
def test_streamed_tokens_are_those_of_one_call(settings):
    model = tiny_model()
    assert streamed(model, PROMPTS, 25, settings) == generate_ids(model, PROMPTS, 25, settings)


def test_sequences_end_at_their_stop_ids_and_the_loop_with_the_last():
    model = tiny_model()
    settings = Sampling(temperature=2.0, top_p=1.0, seed=5)
    free = generate_ids(model, PROMPTS, 25, settings)
    stops = [free[0][3], free[1][6], free[2][1]]
    rows = generate_ids(model, PROMPTS, 25, settings, stop=stops)
    ends = [min(i for i, token in enumerate(row) if token in stops) + 1 for row in free]
    assert rows == [row[:end] for row, end in zip(free, ends, strict=True)]
    columns = streamed(model, PROMPTS, 25, settings, stop=stops)
    assert columns == [
        row + [NO_TOKEN] * (max(ends) - len(row)) for row in rows
    ]  # no step after the last sequence has ended


def test_stop_ids_are_exempt_from_penalty_and_ngram_rule():
    model = tiny_model()
    first = generate_ids(model, PROMPTS[:1], 1, GREEDY)[0]
    settings = Sampling(temperature=0, repetition_penalty=100.0, no_repeat_ngram=1)
    prompt = [*first, *PROMPTS[0]]  # as a prompt starts with <EOS>, which is a stop id
    expected = generate_ids(model, [prompt], 1, GREEDY)[0]
    assert (
        generate_ids(model, [expected + prompt], 1, settings, stop=range(61))[0]
        == (generate_ids(model, [expected + prompt], 1, GREEDY)[0])
    )


def test_suppressed_ids_are_never_sampled_and_ngrams_never_repeat():
    model = tiny_model()
    rows = generate_ids(model, PROMPTS, 30, Sampling(temperature=5.0, top_p=1.0), suppress=range(5, 61))
    assert set(itertools.chain(*rows)) <= set(range(5))
    for prompt, row in zip(
        PROMPTS, generate_ids(model, PROMPTS, 40, Sampling(temperature=0, no_repeat_ngram=2)), strict=True
    ):
        pairs = list(itertools.pairwise(prompt + row))
        assert len(set(pairs)) == len(pairs)
    once = generate_ids(model, PROMPTS, 40, Sampling(temperature=0, no_repeat_ngram=1))
    assert all(len(set(prompt + row)) == len(prompt + row) for prompt, row in zip(PROMPTS, once, strict=True))
    assert len(set(generate_ids(model, [[3]], 30, Sampling(temperature=0, repetition_penalty=50.0))[0])) == 30


def test_invalid_arguments_are_reported_together():
    bad = Sampling(temperature=-1, top_k=-2, top_p=0, min_p=2, repetition_penalty=0, no_repeat_ngram=-1, seed=-1)
    with pytest.raises(UserError, match=r"temperature -1.*top_k -2.*top_p 0.*min_p 2.*penalty 0.*ngram -1.*seed -1"):
        generate_ids(tiny_model(), PROMPTS, 1, bad)
    for message, prompts, count, more in (
        ("no tokens", [[]], 1, {}),
        ("no prompts", [], 1, {}),
        ("max_tokens 0", PROMPTS, 0, {}),
        (r"max_tokens 100,000,000 is too large.*here of 3", PROMPTS, 100_000_000, {}),
        ("max_tokens 100,000,000,000", PROMPTS[:1], 100_000_000_000, {}),
        ("context -1", PROMPTS, 1, {"context": -1}),
        (r"prompt ids \[61\]", [[61]], 1, {}),
        (r"stop ids \[-1\]", PROMPTS, 1, {"stop": [-1]}),
        ("all ids are suppressed", PROMPTS, 1, {"suppress": range(61)}),
        ("2 samplings for 3 prompts", PROMPTS, 1, {"sampling": [GREEDY] * 2}),
    ):
        with pytest.raises(UserError, match=message):
            generate_ids(tiny_model(), prompts, count, **more)


def test_changing_settings_seeds_and_lengths_compiles_nothing():
    model = tiny_model(dim=48)
    generate_ids(model, [[1, 2], [3]], 3, GREEDY)
    programs = (generation.prepare_weights, generation._prefill, generation._decode, generation.uniforms)
    before = [program._cache_size() for program in programs]
    generate_ids(model, [[1, 2, 3, 4], [7]], 5, VARIED, suppress=[3], stop=[4])
    generate_ids(model, [[1, 2, 3, 4], [7]], 5, [Sampling(top_k=3), GREEDY])
    streamed(model, [[5] * 30, [7]], 6, Sampling(min_p=0.2, repetition_penalty=1.5))
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize("samples", [1, 2])
def test_an_empty_continuation_is_reported(monkeypatch, capsys, caplog, samples):
    caplog.set_level("INFO", "slm_jax")
    tokenizer = HybridTokenizer()
    tokenizer.add_text("a b c")
    tokenizer.freeze_vocab()
    eos = tokenizer.token2id["<EOS>"]
    place = {"run": SimpleNamespace(path="runs/a"), "step_text": "step 2 (last)"}
    run = SimpleNamespace(tokenizer=tokenizer, model=None, context=8, **place)
    monkeypatch.setattr("slm_jax.cli.generate.find_run", lambda *_, **__: run.run)
    monkeypatch.setattr("slm_jax.run.load.load_run", lambda *_: run)
    monkeypatch.setattr("slm_jax.generation.decode.stream", lambda *_: iter([np.array([eos])]))
    monkeypatch.setattr("slm_jax.generation.decode.generate_ids", lambda *_: [[eos], [eos]])
    main(["--prompt", "a\n", "--samples", str(samples)])
    out = capsys.readouterr().out
    assert "a\n" in out
    assert "the model ended" not in out
    assert caplog.messages == ["run runs/a, step 2 (last)", *["(the model ended the text immediately)"] * samples]


def test_prompts_are_read_from_options_files_and_standard_input(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_bytes("one\r\nt\u2028w\fo\n".encode())
    (tmp_path / "empty.txt").touch()
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nstdin\n\n"))
    assert read_prompts(Options(prompt=("a", "", "-"), prompts=str(tmp_path / "prompts.txt"))) == [
        "a",
        "",
        "from\nstdin\n",
        "one",
        "t\u2028w\fo",
    ]
    assert read_prompts(Options(prompt=("a",), prompts=str(tmp_path / "empty.txt"))) == ["a"]
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfThe\r\nA\r\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffpiped\n"))
    assert read_prompts(Options(prompt=("-",), prompts=str(tmp_path / "bom.txt"))) == ["piped", "The", "A"]
    latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", latin)
    for options, message in (
        (Options(), "no prompt"),
        (Options(prompts=str(tmp_path / "empty.txt")), "--prompts .*empty.txt is empty: give a file"),
        (Options(prompt=("-",)), r"standard input is not UTF-8 \(byte 3\): convert it"),
        (Options(prompts=str(tmp_path / "none")), "cannot read --prompts .*none: No such file or directory$"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(options)
    with pytest.raises(UserError, match=r"top_p 2.*samples 0.*max_tokens 0"):
        main(["--prompt", "a", "--top_p", "2", "--samples", "0", "--max_tokens", "0"])
