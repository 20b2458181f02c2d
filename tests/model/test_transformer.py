"""Test the model: causality, masks, packing, cached against full forward passes, every option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.model.dropout import drop, example_keys
from slm_jax.model.ops import LossWeights
from slm_jax.training.objective import loss_sums
from tests.helpers import largest_difference, random_ids, tiny_model

OPTIONS = [
    {"kv_heads": 0, "qk_norm": True, "tie_weights": True, "window": 0},
    {"kv_heads": 2, "qk_norm": True, "tie_weights": False, "window": 5},
    {"kv_heads": 1, "qk_norm": False, "tie_weights": True, "window": 0},
    {"kv_heads": 0, "qk_norm": False, "tie_weights": False, "window": 3},
    {"kv_heads": 2, "window": 3, "full_layers": (1,), "nope_layers": (1,), "head_dim": 6, "qkv_bias": True},
    {"kv_heads": 2, "window": 3, "window_pattern": "SL", "mlp": "relu2", "logit_softcap": 6.0, "attention_gate": True}
    | {"value_embeddings": (1,), "residual_scales": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cached_equals_full_forward(options):
    """Prefill of a padded batch, then one token at a time, gives the logits of the full texts."""
    model = tiny_model(**options)
    ids = random_ids((2, 14))
    lengths = np.array([9, 4])
    positions = np.where(np.arange(12)[None] < lengths[:, None], np.arange(12)[None], -1)
    cache = model.empty_cache(2, 12 + 5)  # one column per token, padding included
    prompt = jnp.where(positions >= 0, ids[:, :12], 0)

    @nnx.jit
    def cached_logits(model, ids, positions, cache):
        x, cache = model.hidden_cached(ids, positions, cache)
        return model.logits(x), cache

    logits, cache = cached_logits(model, prompt, jnp.asarray(positions), cache)
    full = model(ids)
    for row in range(2):
        n = lengths[row]
        assert largest_difference(logits[row, :n], full[row, :n]) < 1e-4
    for i in range(5):
        at = jnp.asarray(lengths + i)[:, None]
        logits, cache = cached_logits(model, jnp.take_along_axis(ids, at, axis=1), at, cache)
        expected = jnp.take_along_axis(full, at[..., None], axis=1)
        assert largest_difference(logits, expected) < 1e-4  # logits of size 10 in float32


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_causal_by_gradient(options):
    """Logits at t depend on the embeddings of tokens 0 to t within the reach of the window, and on no later one."""
    model = tiny_model(**options)
    graph, params = nnx.split(model, nnx.Param)
    ids = jnp.arange(12)[None]  # each token once, so that a row of the embedding is a position

    @jax.jit
    def at(t):
        def logit(params):
            return jnp.sum(jnp.tanh(nnx.merge(graph, params).hidden(ids)[0, t]))

        return jnp.abs(nnx.to_pure_dict(jax.grad(logit)(params))["embedding"]).sum(axis=1)[:12]

    reach = 2 * (options["window"] - 1) if model.config.longest_window else 12  # two layers of window - 1
    for t in (0, 3, 11):
        touched = at(t) > 0
        assert touched.tolist() == [max(0, t - reach) <= s <= t for s in range(12)]


def test_packed_documents_equal_separate_ones():
    model = tiny_model()
    a, b = random_ids((1, 7), seed=1), random_ids((1, 5), seed=2)
    segment_ids = jnp.array([[0] * 7 + [1] * 5])
    positions = jnp.array([[*range(7), *range(5)]])
    packed = model(jnp.concatenate([a, b], axis=1), segment_ids=segment_ids, positions=positions)
    assert largest_difference(packed[:, :7], model(a)) < 1e-4
    assert largest_difference(packed[:, 7:], model(b)) < 1e-4


def test_padding_never_changes_real_positions():
    model = tiny_model()
    ids = random_ids((2, 10))
    mask = jnp.array([[1] * 10, [1] * 6 + [0] * 4])
    other = jnp.where(mask == 1, ids, (ids + 7) % 61)
    first, second = model(ids, attention_mask=mask), model(other, attention_mask=mask)
    assert largest_difference(first[1, :6], second[1, :6]) == 0
    assert largest_difference(first[1, :6], model(ids[1:, :6])[0]) < 1e-4


def test_left_padding_has_no_gradient():
    """Real tokens follow the padding and must not depend on it."""
    model = tiny_model()
    graph, params = nnx.split(model, nnx.Param)
    ids = jnp.arange(10)[None]  # each token once, so that a row of the embedding is a position
    mask = (ids >= 4).astype(jnp.int32)

    def real(params):
        return jnp.sum(jnp.tanh(nnx.merge(graph, params).hidden(ids, mask)[0, 4:]))

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(real))(params))["embedding"]
    touched = jnp.abs(gradient).sum(axis=1)[:10] > 0
    assert touched.tolist() == [False] * 4 + [True] * 6
    assert bool(jnp.isfinite(gradient).all())  # queries that attend to nothing must not give NaN
    assert (
        largest_difference(model(ids, attention_mask=mask)[:, 4:], model(ids[:, 4:])) < 2e-3
    )  # positions are relative


def test_dropout_needs_a_key_and_is_deterministic_for_it():
    model, ids = tiny_model(dropout=0.3), random_ids((2, 8))
    key = jax.random.key(1)
    assert largest_difference(model(ids), tiny_model()(ids)) == 0
    model.set_dropout(0.0)
    assert largest_difference(model(ids, dropout_key=key), model(ids)) == 0
    with pytest.raises(ValueError, match="dropout 1"):
        model.set_dropout(1)
    model.set_dropout(0.3)
    assert largest_difference(model(ids, dropout_key=key), model(ids, dropout_key=key)) == 0
    assert largest_difference(model(ids, dropout_key=key), model(ids)) > 0.01


def loss_and_gradients(batch, key=None, **fields):
    graph, params = nnx.split(tiny_model(depth=3, **fields), nnx.Param)

    def loss(params):
        sums = loss_sums(nnx.merge(graph, params), batch, LossWeights(ul_alpha=0.1), key)
        return sums.loss / sums.tokens

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def batch_and_gradients():
    """Return a batch, a key, and the loss and gradients with dropout, unrolled and without recomputation."""
    ids = random_ids((3, 17))
    batch, key = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}, jax.random.key(3)
    return batch, key, loss_and_gradients(batch, key, dropout=0.2)


@pytest.mark.parametrize("fields", [{"scan_layers": True}, {"remat": "full"}, {"remat": "dots", "scan_layers": True}])
def test_scan_and_remat_change_nothing(fields, batch_and_gradients):
    """With dropout too: the recomputation draws the same masks."""
    batch, key, unrolled = batch_and_gradients
    values = loss_and_gradients(batch, key, dropout=0.2, **fields)
    for expected, value in zip(jax.tree.leaves(unrolled), jax.tree.leaves(values), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary_has_no_effect(tied):
    """Padding rows have no logits, no probability and no gradient."""
    plain, padded = (tiny_model(tie_weights=tied, vocab_multiple=m) for m in (1, 64))
    assert plain.embedding[...].shape[0] == 61
    assert padded.embedding[...].shape[0] == padded.head_weight().shape[0] == 64
    ids = random_ids((2, 9))
    assert padded(ids).shape == (2, 9, 61)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    graph, params = nnx.split(padded, nnx.Param)
    grads = jax.jit(jax.grad(lambda params: loss_sums(nnx.merge(graph, params), batch).loss))(params)
    assert not np.any(nnx.to_pure_dict(grads)["embedding" if tied else "head"][61:])
    expected = -jnp.take_along_axis(jax.nn.log_softmax(padded(ids[:, :-1])), ids[:, 1:, None], axis=-1).sum()
    assert float(nnx.jit(loss_sums)(padded, batch).nll) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 50])
@pytest.mark.parametrize("multiple", [1, 32])
def test_resizing_the_vocabulary_keeps_old_rows(tied, size, multiple):
    model = tiny_model(tie_weights=tied, vocab_multiple=multiple)
    ids = random_ids((1, 9)) % 50
    before, embedding, head = model(ids), model.embedding[...], model.head_weight()
    model.resize_token_embeddings(size)
    kept = min(size, 61)
    assert model(ids).shape == (1, 9, size)
    assert model.embedding[...].shape[0] == -(-size // multiple) * multiple
    assert np.array_equal(model.embedding[...][:kept], embedding[:kept])
    assert np.array_equal(model.head_weight()[:kept], head[:kept])
    assert (model.head is None) == tied
    assert largest_difference(model(ids)[..., :kept], before[..., :kept]) < 1e-4
    if size > 61:
        assert 0.01 < float(jnp.std(model.embedding[...][61:size])) < 0.03
        model(jnp.full((1, 3), size - 1))  # the new ids are valid


def test_resizing_the_vocabulary_keeps_value_embeddings():
    model = tiny_model(value_embeddings=(1,), vocab_multiple=32)
    table, gate = model.value_embeddings.table[...], model.value_embeddings.value_gate[...]
    model.resize_token_embeddings(70)
    assert model.value_embeddings.table[...].shape == (1, 96, 32)
    assert np.array_equal(model.value_embeddings.table[...][:, :61], table[:, :61])
    assert np.array_equal(model.value_embeddings.value_gate[...], gate)
    assert 0.01 < float(jnp.std(model.value_embeddings.table[...][:, 64:])) < 0.03


def test_tied_head_is_the_embedding_and_untied_is_not():
    assert "head" not in nnx.to_pure_dict(nnx.state(tiny_model(), nnx.Param))
    untied = tiny_model(tie_weights=False)
    assert largest_difference(untied.head_weight(), untied.embedding[...]) > 0


def test_rotary_positions_are_relative():
    """Shifting all positions by the same amount changes nothing."""
    model, ids = tiny_model(), random_ids((1, 9))
    shifted = model(ids, positions=jnp.arange(9)[None] + 50)
    assert largest_difference(shifted, model(ids)) < 2e-3  # angles of up to 58 rad in float32
    assert largest_difference(model(ids, positions=jnp.arange(9)[None] * 2), model(ids)) > 0.1


def test_dropout_scales_in_float32():
    """In bfloat16 1 - 0.1 is 0.8984, so that activations would be 0.17 % too large after every sub-layer."""
    x_1xTxD = jnp.linspace(0.1, 3.0, 512).reshape(1, 8, 64).astype(jnp.bfloat16)
    dropped = drop(x_1xTxD, 0.1, example_keys(jax.random.key(0), 1))
    expected = np.asarray(x_1xTxD, np.float32) / np.float32(0.9)
    kept = np.asarray(dropped) != 0
    assert dropped.dtype == jnp.bfloat16
    assert 0.8 < kept.mean() < 1
    np.testing.assert_array_equal(np.asarray(dropped)[kept], expected.astype(jnp.bfloat16)[kept])


@pytest.mark.parametrize(("output_init", "factor"), [("zero", 0.0), ("depth", 0.5)])
def test_initial_output_projections(output_init, factor):
    """They alone depend on output_init; the draws of all others are the same, times init_std."""
    plain = nnx.to_pure_dict(nnx.state(tiny_model(scale=1.0), nnx.Param))
    initial = tiny_model(scale=1.0, output_init=output_init, init_std=0.03)
    params = nnx.to_pure_dict(nnx.state(initial, nnx.Param))
    outputs = {("attention", "out"), ("mlp", "down")}
    for path, value in jax.tree_util.tree_leaves_with_path(params["blocks"]):
        expected = plain["blocks"]
        for key in path:
            expected = expected[key.key]
        names = tuple(key.key for key in path[:2])
        scale = 1.0 if path[-1].key == "scale" else 1.5 * (factor if names in outputs else 1.0)
        np.testing.assert_allclose(value, scale * expected, rtol=1e-6)
    np.testing.assert_allclose(params["embedding"], 1.5 * plain["embedding"], rtol=1e-6)
    if output_init == "zero":
        ids = random_ids((2, 9))
        hidden = initial.final_norm(initial.embedding[...][ids])
        assert largest_difference(initial(ids), initial.logits(hidden)) < 1e-5
