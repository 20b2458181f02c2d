"""Checks of a model, its input and its step: each passes on correct code and fails on the defect that it is for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.checks import FAIL, OK, SKIPPED, data, masking, step, weights
from slm_jax.config.schema import ModelConfig
from slm_jax.distributed import sharding
from slm_jax.model import ops
from slm_jax.model.transformer import Transformer
from slm_jax.training.objective import loss_sums
from slm_jax.utils.batch import IGNORE_INDEX
from tests.helpers import random_ids, tiny_config
from tokenizer import HybridTokenizer

VOCAB = 61
FIELDS = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 96}


def fresh(**fields):
    """Return an untrained model."""
    return Transformer(ModelConfig(**{**FIELDS, **fields}), VOCAB, rngs=nnx.Rngs(0))


def changed(model, change):
    """Return the model with a function of (name, array) applied to its parameters."""
    graph, params = nnx.split(model, nnx.Param)
    tree = nnx.to_pure_dict(params)
    names = {id(leaf): name for name, leaf in weights.named(tree)}
    return nnx.merge(graph, jax.tree.map(lambda leaf: change(names[id(leaf)], leaf), tree))


def batch_of(rows=4, length=16):
    ids = np.asarray(random_ids((rows, length + 1)))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].copy()}


# Visible positions.

LENGTH = 16


WINDOWED = {"window": 5, "kv_heads": 2, "tie_weights": False}


PARTS = {"window": 5, "window_pattern": "SL", "mlp": "relu2", "logit_softcap": 9.0, "attention_gate": True}
PARTS |= {"value_embeddings": (1,), "residual_scales": True}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, WINDOWED, PARTS])
def test_correct_model_sees_the_visible_tokens(fields):
    model = fresh(**fields)
    for look in (masking.causality, masking.attention_window, masking.padding, masking.segments):
        found = look(model, LENGTH)
        assert found.verdict == (SKIPPED if look is masking.attention_window and not fields else OK), found


def attention_that(monkeypatch, mask):
    """Make the model attend with another mask: mask(length, window, valid, segments) -> bool [B or 1, T, T]."""

    def attend(q, k, v, dtype, window=0, valid=None, segments=None, implementation="auto", platform=None):
        return ops.masked_attention(q, k, v, mask(q.shape[1], window, valid, segments), dtype)

    monkeypatch.setattr(ops, "attention", attend)


def peeks(length, window, valid, segments):
    mask = ops.causal_mask(length, window, valid, segments)
    return mask | jnp.eye(length, k=1, dtype=bool)


BROKEN_MASKS = {
    "one token ahead": (masking.causality, 0, peeks),
    "a window one too wide": (masking.attention_window, 5, lambda t, w, v, s: ops.causal_mask(t, w + 1, v, s)),
    "a window one too narrow": (masking.attention_window, 5, lambda t, w, v, s: ops.causal_mask(t, w - 1, v, s)),
    "padding is seen": (masking.padding, 0, lambda t, w, v, s: ops.causal_mask(t, w, None, s)),
    "segments leak": (masking.segments, 0, lambda t, w, v, s: ops.causal_mask(t, w, v, None)),
    "no window": (masking.causality, 3, lambda t, w, v, s: ops.causal_mask(t, 0, v, s)),
}


@pytest.mark.parametrize("name", BROKEN_MASKS)
def test_wrong_mask_fails(monkeypatch, name):
    look, window, mask = BROKEN_MASKS[name]
    attention_that(monkeypatch, mask)
    found = look(fresh(window=window), LENGTH)
    assert found.verdict == FAIL
    assert any("position" in line for line in found.details)


def test_dependencies_agree_with_finite_differences():
    """A token has a gradient exactly if changing it changes the logits."""
    model = fresh(window=4)
    ids = np.asarray(random_ids((1, 12)))
    at = 9
    seen = masking.dependencies(model, ids, np.array([at]))[0] > 0
    others = np.repeat(ids, 12, axis=0)
    others[np.arange(12), np.arange(12)] = (others[np.arange(12), np.arange(12)] + 1) % VOCAB
    logits = jax.jit(lambda ids: model(ids))(np.concatenate([ids, others]))[:, at]
    moved = np.asarray(jnp.any(logits[1:] != logits[0], axis=-1))
    assert moved.tolist() == seen.tolist() == [False] * 3 + [True] * 7 + [False] * 2


# Parameters.


def test_correct_model_passes():
    model = fresh()
    assert weights.shapes(model, model.config, VOCAB, 16).verdict == OK
    padded = fresh(vocab_multiple=64, tie_weights=False)
    assert weights.shapes(padded, padded.config, VOCAB, 16).verdict == OK
    assert weights.finite_weights(model).verdict == OK
    out = weights.outputs(model, batch_of())
    assert out.loss == pytest.approx(math.log(VOCAB), abs=0.1)
    assert weights.finite_logits(out).verdict == weights.initial_loss(out, model).verdict == OK


@pytest.mark.parametrize("layer", [0, 1])
def test_one_block_has_the_value_embeddings_of_its_layer(layer):
    model = fresh(value_embeddings=(1,))
    single = masking.one_block(model, layer)
    assert single.config.value_embeddings == ((0,) if layer else ())
    assert (single.value_embeddings is None) == (layer == 0)
    nnx.eval_shape(lambda: single.hidden(jnp.zeros((1, 4), jnp.int32)))


def test_parameters_that_start_at_zero_hide_no_gradient():
    model = fresh(output_init="zero")
    filled = weights.without_zeros(model)
    assert weights.gradient_flow(filled, batch_of()).verdict == OK
    assert np.array_equal(filled.embedding[...], model.embedding[...])


def test_wrong_shapes_fail():
    model = fresh()
    assert weights.shapes(model, ModelConfig(**{**FIELDS, "depth": 3}), VOCAB, 16).verdict == FAIL
    assert weights.shapes(model, model.config, VOCAB + 1, 16).verdict == FAIL
    half = changed(model, lambda name, leaf: leaf.astype(jnp.bfloat16) if name == "embedding" else leaf)
    found = weights.shapes(half, half.config, VOCAB, 16)
    assert found.verdict == FAIL
    assert "embedding is bfloat16" in found.details


def test_nan_weights_fail():
    def break_one(name, leaf):
        return leaf.at[1, 2, 3].set(jnp.nan) if name == "blocks.mlp.up.weight" else leaf

    model = changed(fresh(), break_one)
    found = weights.finite_weights(model)
    assert found.verdict == FAIL
    assert found.details == ("blocks.mlp.up.weight[1]: 1 of 2,048",)
    out = weights.outputs(model, batch_of())
    assert weights.finite_logits(out).verdict == weights.initial_loss(out, model).verdict == FAIL
    assert masking.causality(model, 8).verdict == FAIL


def test_dead_layer_fails():
    """Its two output matrices are 0, so the parameters before these get no gradient."""
    dead = ("blocks.attention.out.weight", "blocks.mlp.down.weight")
    model = changed(fresh(), lambda name, leaf: leaf.at[1].set(0) if name in dead else leaf)
    found = weights.gradient_flow(model, batch_of())
    assert found.verdict == FAIL
    assert "blocks.mlp.up.weight[1]: no gradient" in found.details
    assert not any("[0]" in line for line in found.details)


@pytest.mark.parametrize("factor", [pytest.param(0.0, marks=pytest.mark.slow), 10.0])
def test_weights_of_another_scale_fail(factor):
    """With zero weights the loss is ln V but nothing can be learned; with large ones it is far above."""
    model = changed(fresh(), lambda name, leaf: leaf * factor if leaf.ndim > 1 else leaf)
    if factor:
        assert weights.initial_loss(weights.outputs(model, batch_of()), model).verdict == FAIL
    else:
        assert weights.gradient_flow(model, batch_of()).verdict == FAIL


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 256, 1024])
@pytest.mark.parametrize("tied", [True, False])
def test_initial_loss_is_within_its_bounds(dim, tied):
    model = fresh(dim=dim, mlp_dim=3 * dim, tie_weights=tied)
    assert weights.initial_loss(weights.outputs(model, batch_of(8)), model).verdict == OK


def test_tied_and_untied_weights_are_distinguished():
    tied = fresh()
    untied = fresh(tie_weights=False)
    assert weights.tied(tied, True).verdict == weights.tied(untied, False).verdict == OK
    assert weights.tied(tied, False).verdict == FAIL
    assert weights.tied(untied, True).verdict == FAIL
    copy = fresh(tie_weights=False)
    copy.head[...] = copy.embedding[...]
    assert weights.tied(copy, False).verdict == weights.tied(copy, True).verdict == FAIL
    assert "two arrays of equal values" in weights.tied(copy, True).found


# Input of the model.


def test_next_token_labels_pass():
    batch = batch_of()
    assert data.next_token(batch, VOCAB).verdict == OK
    batch["labels"][:, :5] = IGNORE_INDEX  # a prompt
    assert data.next_token(batch, VOCAB).verdict == OK
    padded = batch | {"attention_mask": np.ones_like(batch["labels"])}
    padded["labels"][1, 9:] = IGNORE_INDEX
    padded["attention_mask"][1, 9:] = 0
    assert data.next_token(padded, VOCAB).verdict == OK
    few = batch_of()
    few["labels"][2, 11:] = few["labels"][3] = IGNORE_INDEX  # 41 labels: in float32, 41 times 1 / 41 is not 1
    assert data.next_token(few, VOCAB).verdict == OK


def test_other_labels_fail():
    batch = batch_of()
    ids = batch["input_ids"]
    unshifted = data.next_token(batch | {"labels": ids}, VOCAB)
    assert unshifted.verdict == FAIL
    assert "copying 100.0%" in unshifted.found
    assert data.next_token(batch | {"labels": np.roll(batch["labels"], -1, axis=1)}, VOCAB).verdict == FAIL
    one_wrong = batch["labels"].copy()
    one_wrong[2, 3] = (one_wrong[2, 3] + 1) % VOCAB
    assert data.next_token(batch | {"labels": one_wrong}, VOCAB).verdict == FAIL
    assert data.next_token(batch | {"labels": np.full_like(ids, IGNORE_INDEX)}, VOCAB).verdict == FAIL


def test_loss_without_shift_fails():
    """Correct labels, and a loss that scores each position by the current token."""

    def unshifted(model, batch):
        return loss_sums(model, batch | {"labels": jnp.where(batch["labels"] < 0, IGNORE_INDEX, batch["input_ids"])})

    assert data.next_token(batch_of(), VOCAB, unshifted).verdict == FAIL


def test_ids_out_of_range_fail():
    batch = batch_of()
    assert data.ids_in_range(batch, [], VOCAB).verdict == OK
    assert data.ids_in_range(batch, [np.array([3, VOCAB])], VOCAB).verdict == FAIL
    batch["labels"][0, 0] = VOCAB
    assert data.ids_in_range(batch, [], VOCAB).verdict == FAIL


class Lowercasing(HybridTokenizer):
    """A tokenizer that loses case, as the first ones of this kind did."""

    def decode(self, tokens, *args, **kwargs):
        return super().decode(tokens, *args, **kwargs).lower()


def test_lossy_tokenizer_fails():
    tokenizer = HybridTokenizer.pretrained("english-8k")
    assert data.lossless(tokenizer, data.SAMPLES).verdict == OK
    tokenizer.__class__ = Lowercasing
    found = data.lossless(tokenizer, data.SAMPLES)
    assert found.verdict == FAIL
    assert "at 0: 'Hello, world! THE Th' decodes to 'hello, world! the th'" in found.details


def test_vocabulary_of_another_size_fails():
    tokenizer = HybridTokenizer.pretrained("english-8k")
    assert data.vocabulary(fresh(), tokenizer).verdict == FAIL
    model = Transformer(ModelConfig(**FIELDS), tokenizer.vocab_size, rngs=nnx.Rngs(0))
    assert data.vocabulary(model, tokenizer).verdict == OK


# The step.


def test_indivisible_batch_fails():
    found, mesh = step.devices(tiny_config(train__batch_size=6))
    assert found.verdict == FAIL
    assert mesh is None
    assert "6 is not divisible by 8 devices" in found.found
    assert step.devices(tiny_config(train__batch_size=16))[0].verdict == OK


def fitted_step(**fields):
    config = tiny_config(mesh__data=1, **fields)
    mesh = sharding.make_mesh(config)
    batch = batch_of(config.train.batch_size, config.train.sequence_length)
    return (*step.memory_fit(config, VOCAB, mesh, sharding.shard_batch(mesh, batch)), mesh, batch)


@pytest.mark.slow
def test_step_that_does_not_fit_fails():
    found, fitted, *_ = fitted_step(train__memory_gb=1e-5, train__batch_size=1, model__depth=1)
    assert found.verdict == FAIL
    assert fitted is None
    assert "--model.remat full" in found.found


def test_step_that_does_not_lower_the_loss_fails():
    found, fitted, mesh, batch = fitted_step(model__depth=1)
    assert found.verdict == OK
    assert step.one_step(fitted, fitted.steps.init(), mesh, batch).verdict == OK

    def uphill(state, batch):
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics = fitted.train(state, batch)
        return state._replace(params=jax.tree.map(lambda new, old: 2 * old - new, state.params, before)), metrics

    worse = dataclasses.replace(fitted, train=uphill)
    assert step.one_step(worse, fitted.steps.init(), mesh, batch).verdict == FAIL
    still = dataclasses.replace(fitted, train=lambda state, batch: (state, fitted.train(fitted.steps.init(), batch)[1]))
    assert step.one_step(still, fitted.steps.init(), mesh, batch).verdict == FAIL
