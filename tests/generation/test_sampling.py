"""Sampling settings against NumPy, plain Python and, if installed, Hugging Face transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.generation import decode, sampling
from slm_jax.generation.batch import id_mask
from slm_jax.generation.sampling import (
    Sampling,
    penalize,
    repeated_ngrams,
    sample,
    sample_index,
    stack_sampling,
    two_level_argmax,
)

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
RANKED = np.argsort(-PROBABILITIES)


def frequencies(settings, logits, count=20_000):
    """Return the share of samples of each id."""
    uniforms = jnp.asarray(np.random.default_rng(0).random((count, 2)), jnp.float32)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    tokens = jax.jit(sample)(rows, uniforms, stack_sampling([settings] * count))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("settings", "kept", "power"),
    [
        (Sampling(temperature=1.0, top_p=1.0), 5, 1.0),
        (Sampling(temperature=0.5, top_p=1.0), 5, 2.0),
        (Sampling(temperature=1.0, top_p=1.0, top_k=2), 2, 1.0),
        (Sampling(temperature=1.0, top_p=0.75), 3, 1.0),
        (Sampling(temperature=1.0, top_p=0.01), 1, 1.0),
        (Sampling(temperature=1.0, top_p=1.0, top_k=99), 5, 1.0),
        (Sampling(temperature=1.0, top_p=1.0, min_p=0.3), 3, 1.0),
        (Sampling(temperature=0.5, top_p=1.0, min_p=0.3), 2, 2.0),  # after the temperature
        (
            Sampling(temperature=1.0, top_p=0.86, top_k=3),
            3,
            1.0,
        ),  # top-p of what top-k keeps: 0.4 + 0.3 of 0.85 is less
        (Sampling(temperature=1.0, top_p=0.82, top_k=3), 2, 1.0),
        (Sampling(temperature=0.0), 1, 1.0),
        (Sampling(temperature=1e-6, top_p=1.0), 1, 1.0),
    ],
)
def test_sampled_frequencies(settings, kept, power):
    expected = np.zeros(5)
    expected[RANKED[:kept]] = PROBABILITIES[RANKED[:kept]] ** power
    expected /= expected.sum()
    result = frequencies(settings, np.log(PROBABILITIES))
    np.testing.assert_allclose(result, expected, atol=0.015)  # 4 standard deviations
    assert not result[expected == 0].any()


def naive_kept(logits, top_k, top_p, min_p):
    """Return bool [V], the ids that truncation keeps: one sequence, by sorting, in float64."""
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
    weights = np.where(kept, np.exp(logits - logits.max()), 0)
    weights /= weights.sum()
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        kept &= weights >= weights[order][before < top_p].min()
    return kept & (weights >= min_p * weights.max())


def test_truncation_equals_sorting():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 4, (300, 61)).astype(np.float32)
    settings = [
        Sampling(1.0, int(k), float(p), float(m))
        for k, p, m in zip(
            generator.integers(0, 70, 300),
            generator.choice([1.0, 0.999, 0.9, 0.5, 0.1], 300),
            generator.choice([0, 1e-3, 0.3], 300),
            strict=True,
        )
    ]
    kept_BxV = np.asarray(
        sampling._truncate(jnp.asarray(logits - logits.max(-1, keepdims=True)), stack_sampling(settings)) > 0
    )
    for row, each, kept in zip(logits.astype(np.float64), settings, kept_BxV, strict=True):
        # Between the two: a float32 sum may lie on either side of the threshold.
        low, high = (naive_kept(row, each.top_k, min(each.top_p * f, 1.0), each.min_p) for f in (1 - 1e-5, 1 + 1e-5))
        assert (kept >= low).all()
        assert (kept <= high).all()


def test_each_sequence_has_its_own_settings():
    logits = jnp.log(jnp.asarray(np.tile(PROBABILITIES, (3, 1)), jnp.float32))
    settings = stack_sampling(
        [Sampling(temperature=0), Sampling(temperature=1, top_k=1), Sampling(temperature=1, top_p=1)]
    )
    assert sample(logits, jnp.full((3, 2), 0.999), settings).tolist() == [1, 1, 4]


@pytest.mark.parametrize("size", [1, 5, 61, 8192, 50_257])
def test_two_level_sampling_and_argmax(size):
    x = np.random.default_rng(size).normal(size=(3, size)).astype(np.float32)
    x[1] = 0.5  # ties: the first
    assert (np.asarray(two_level_argmax(jnp.asarray(x))) == x.argmax(-1)).all()
    weights = np.zeros((4, size), np.float32)
    weights[:, size // 3] = 1e-30  # tiny, but the only one
    extremes = jnp.asarray([[0, 0], [1 - 2**-24, 0], [0, 1 - 2**-24], [1 - 2**-24, 1 - 2**-24]], jnp.float32)
    assert sample_index(jnp.asarray(weights), extremes).tolist() == [size // 3] * 4


def naive_banned(ids, n):
    """Return the ids banned by Hugging Face's no_repeat_ngram_size for one sequence, in plain Python."""
    if n == 0 or len(ids) + 1 < n:
        return set()
    last = tuple(ids[len(ids) - n + 1 :])
    return {ids[i + n - 1] for i in range(len(ids) - n + 1) if tuple(ids[i : i + n - 1]) == last}


def test_repeated_ngrams_match_plain_python():
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 4, length).tolist() for length in generator.integers(1, 13, 300)]
    n = generator.integers(0, 6, 300)
    history = np.full((300, 16), -1, np.int32)
    for row, ids in enumerate(rows):
        history[row, 12 - len(ids) : 12] = ids
    starts = jnp.asarray([12 - len(ids) for ids in rows])
    banned = np.asarray(repeated_ngrams(jnp.asarray(history), starts, jnp.int32(12), jnp.asarray(n), 4))
    expected = [naive_banned(ids, size) for ids, size in zip(rows, n, strict=True)]
    assert [set(np.flatnonzero(row).tolist()) for row in banned] == expected
    assert sum(map(bool, expected)) > 50


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([[2.0, -2.0, 3.0, -3.0]])
    seen = jnp.asarray([[True, True, False, False]])
    assert penalize(logits, seen, jnp.asarray([2.0])).tolist() == [[1.0, -4.0, 3.0, -3.0]]
    assert (penalize(logits, seen, jnp.asarray([1.0])) == logits).all()


def test_logits_processors_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 20, (4, 30))
    logits = generator.normal(0, 3, (4, 20)).astype(np.float32)
    settings = Sampling(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05, repetition_penalty=1.4)
    logits_torch = transformers.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor(ids), torch.tensor(logits))
    banned = transformers.NoRepeatNGramLogitsProcessor(2)(torch.tensor(ids), torch.zeros(4, 20)).numpy() == -np.inf
    starts, n = jnp.zeros(4, jnp.int32), jnp.full(4, 2)
    assert (np.asarray(repeated_ngrams(jnp.asarray(ids), starts, jnp.int32(30), n, 20)) == banned).all()
    seen = jax.nn.one_hot(ids, 20).sum(1) > 0
    ours = penalize(jnp.asarray(logits), seen, jnp.full(4, 1.4))
    np.testing.assert_allclose(ours, logits_torch.numpy(), rtol=1e-6)
    warped = logits_torch
    for warper in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(9),
        transformers.TopPLogitsWarper(0.8),
        transformers.MinPLogitsWarper(0.05),
    ):
        warped = warper(torch.tensor(ids), warped)
    shifted = (ours - ours.max(-1, keepdims=True)) / 0.7
    weights = np.asarray(sampling._truncate(shifted, stack_sampling([settings] * 4)))
    expected = torch.softmax(warped, -1).numpy()
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), expected, rtol=1e-5)


@pytest.mark.parametrize("stops", [[], [0]])
def test_next_token_is_that_of_transformers_but_for_the_end_of_the_text(stops):
    """Greedy decoding with both rules; with a stop id the scores of transformers are kept as they were at that id."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    generator = np.random.default_rng(0)
    rows, length, vocab_size = 200, 12, 9
    ids = generator.integers(0, vocab_size, (rows, length)).astype(np.int32)
    ids[:, 0] = 0  # a text begins with <EOS>
    logits = generator.normal(0, 2, (rows, vocab_size)).astype(np.float32)
    scores = torch.tensor(logits)
    for processor in (transformers.RepetitionPenaltyLogitsProcessor(1.5), transformers.NoRepeatNGramLogitsProcessor(2)):
        scores = processor(torch.tensor(ids, dtype=torch.int64), scores)
    with_the_end_penalized = scores.argmax(-1).numpy()
    scores[:, stops] = torch.tensor(logits)[:, stops]
    seen_BxV = jnp.zeros((rows, vocab_size), bool).at[jnp.arange(rows)[:, None], ids].set(True)
    settings = stack_sampling([Sampling(temperature=0, repetition_penalty=1.5, no_repeat_ngram=2)] * rows)
    inputs = decode._Inputs(
        start_B=jnp.zeros(rows, jnp.int32),
        first=jnp.int32(length),
        uniform_BxLx2=jnp.zeros((rows, length, 2)),
        sampling=settings,
        suppressed_V=jnp.zeros(vocab_size, bool),
        stops_V=id_mask(stops, vocab_size),
    )
    state = decode._State(
        None, jnp.asarray(ids), jnp.int32(length), seen_BxV, jnp.asarray(logits), jnp.zeros(rows, bool)
    )
    tokens = np.asarray(decode._sample_next(state, inputs))
    assert (tokens == scores.argmax(-1).numpy()).all()
    assert (tokens != with_the_end_penalized).any() == bool(stops)


def test_ban_of_every_id_yields_but_suppression_holds():
    logits = jnp.asarray([[sampling._BANNED, -jnp.inf, sampling._BANNED]])
    for uniform in (0.0, 0.4, 0.99):
        assert sample(logits, jnp.full((1, 2), uniform), stack_sampling([Sampling(temperature=1.0)])).tolist()[0] != 1
    assert sample(logits, jnp.zeros((1, 2)), stack_sampling([Sampling(temperature=0)])).tolist()[0] != 1
