"""Test the training step: shifted targets, accumulation, one compilation, determinism, several devices."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from slm_jax.data.batches.packed import PackedBatches
from slm_jax.distributed import sharding
from slm_jax.distributed.platform import Platform
from slm_jax.model import ops
from slm_jax.model.abstract import abstract_model
from slm_jax.model.dropout import drop, example_keys, site_keys
from slm_jax.model.ops import LossWeights
from slm_jax.model.precision import compute_dtype
from slm_jax.training.context import mean_context
from slm_jax.training.objective import NextToken
from slm_jax.training.resize import resize_vocabulary
from slm_jax.training.schedule import make_schedule
from slm_jax.training.steps import init_state, make_objective, make_steps
from slm_jax.training.train_step import eval_step, gradients, loss_fn, train_step
from slm_jax.utils.batch import IGNORE_INDEX
from tests.helpers import largest_difference, logits_of, random_ids, tiny_config
from tokenizer.vocabulary import SPECIAL_TOKENS

VOCAB = 61


def shifted_batch(ids):
    labels = jnp.concatenate([ids[:, 1:], jnp.full((ids.shape[0], 1), IGNORE_INDEX)], axis=1)
    return {"input_ids": ids, "labels": labels}


def train(config, batch, steps):
    made = make_steps(config, VOCAB)
    state = made.init()
    for _ in range(steps):
        state, metrics = made.train(state, batch)
    return state, metrics, made


def bound_gradients(config, **options):
    """Return `gradients` with the model of a config."""
    graph, _ = abstract_model(config, VOCAB)
    return functools.partial(gradients, graph=graph, objective=make_objective(config.train), **options)


def test_unlikelihood_of_packed_windows_ends_at_the_document():
    """Packed windows have no segment_ids: a document begins with the <EOS> before it."""
    config = tiny_config(train__ul_alpha=1.0)
    graph, _ = abstract_model(config, VOCAB)
    params = make_steps(config, VOCAB).init().params
    eos = SPECIAL_TOKENS.index("<EOS>")
    ids = jnp.array([[20, 21, eos, 22, 23, 22, eos, 24], [30, 31, 32, 33, 34, 35, 36, 37]], jnp.int32)
    segments = jnp.array([[0, 0, 1, 1, 1, 1, 2, 2], [0] * 8], jnp.int32)
    batch = shifted_batch(ids)
    weights = LossWeights(ul_alpha=1.0)
    _, packed = jax.jit(functools.partial(loss_fn, graph=graph, objective=NextToken(weights)))(params, batch, None)

    @jax.jit
    def score(params, context):
        model = nnx.merge(graph, params)
        hidden = model.hidden(ids)  # attention crosses the documents
        options = (batch["labels"], model.dtype, weights, context, model.vocab_size)
        return ops.cross_entropy(hidden, model.head_weight(), *options)

    expected = score(params, ops.ContextTokens.from_batch(ids, None, segments))
    np.testing.assert_allclose(np.array(packed), np.array(expected), rtol=1e-6)
    everything = score(params, ops.ContextTokens.from_batch(ids))
    assert float(everything.loss) > float(packed.loss)


@pytest.mark.parametrize("fields", [{}, {"train__z_loss": 0.01, "train__ul_alpha": 0.5}])
def test_gradients_equal_the_derivative_of_the_mean_loss(fields):
    """Compare with finite differences of the mean of `loss_fn` along the gradient."""
    config = tiny_config(**fields)
    params = make_steps(config, VOCAB).init().params
    batch = shifted_batch(random_ids((4, 8)))
    compute = bound_gradients(config)
    grads, sums = jax.jit(compute)(params, batch, None)
    loss_of = jax.jit(functools.partial(loss_fn, **compute.keywords))
    assert float(sums.tokens) == 4 * 7
    norm = float(optax.tree.norm(grads))

    def mean_loss(step):
        moved = jax.tree.map(lambda p, g: p + step / norm * g, params, grads)
        loss, sums = loss_of(moved, batch, None)
        return float(loss / sums.tokens)

    step = 0.02
    slope = (mean_loss(step) - mean_loss(-step)) / (2 * step)
    assert slope == pytest.approx(norm, rel=1e-2)  # float32 losses differ by 1e-5 of their size


def test_gradients_of_microbatches_equal_those_of_the_batch():
    """With uneven numbers of labels, so that a mean of means would differ."""
    config = tiny_config()
    params = make_steps(config, VOCAB).init().params
    batch = shifted_batch(random_ids((8, 16)))
    batch["labels"] = jnp.where(jnp.arange(16) < jnp.arange(1, 9)[:, None], batch["labels"], IGNORE_INDEX)
    grads, sums = jax.jit(bound_gradients(config))(params, batch, None)
    for steps in (2, 4, 8):
        compute = jax.jit(bound_gradients(config, grad_accum_steps=steps))
        accumulated, accumulated_sums = compute(params, batch, None)
        np.testing.assert_allclose(np.array(accumulated_sums), np.array(sums), rtol=1e-6)
        assert largest_difference(accumulated, grads) < 1e-6


@pytest.fixture(scope="module")
def dropped_gradients():
    """Return (parameters, batch, key, gradients, sums) of one microbatch, layers unrolled, nothing recomputed."""
    config = tiny_config(model__dropout=0.5)
    params = make_steps(config, VOCAB).init().params
    batch = shifted_batch(random_ids((8, 16)))
    key = jax.random.key(3)
    compute = jax.jit(bound_gradients(config))
    grads, sums = compute(params, batch, key)
    assert largest_difference(compute(params, batch, None)[0], grads) > 1e-3
    return params, batch, key, grads, sums


@pytest.mark.parametrize(
    "fields",
    [
        {"model__remat": "full", "model__scan_layers": True},
        {"model__remat": "dots", "train__accumulation": 2},
        {"train__accumulation": 8, "model__scan_layers": True},
    ],
)
def test_dropout_masks_do_not_depend_on_how_the_step_is_computed(fields, dropped_gradients):
    """Microbatches are chosen by the free memory: they must not change the run beyond rounding."""
    params, batch, key, expected, sums = dropped_gradients
    config = tiny_config(model__dropout=0.5, **fields)
    compute = jax.jit(bound_gradients(config, grad_accum_steps=config.train.grad_accum_steps))
    grads, other_sums = compute(params, batch, key)
    np.testing.assert_allclose(np.array(other_sums), np.array(sums), rtol=1e-6)
    assert largest_difference(grads, expected) < 1e-6


def test_examples_have_dropout_masks_of_their_own(dropped_gradients):
    """A row with its key gives what it gives elsewhere in a batch and before padding; equal rows differ."""
    config = tiny_config(model__dropout=0.5)
    graph, _ = abstract_model(config, VOCAB)
    model = nnx.merge(graph, dropped_gradients[0])
    ids = jnp.tile(random_ids((1, 16)), (4, 1))
    key = jax.random.key(0)

    @jax.jit
    def compute():
        moved = model.hidden(ids, dropout_key=example_keys(key, 4)[::-1])
        return model.hidden(ids, dropout_key=key), moved, model.hidden(ids[:, :11], dropout_key=key)

    together, moved, shorter = compute()
    assert largest_difference(moved[::-1], together) < 1e-5
    assert largest_difference(shorter, together[:, :11]) < 1e-5
    assert all(largest_difference(together[row], together[row - 1]) > 0.1 for row in range(4))


def test_every_site_of_dropout_has_a_mask_of_its_own():
    """The masks of embedding, attention and MLP of two layers: equal in about half of their entries, as if drawn."""
    keys = example_keys(jax.random.key(0), 2)
    ones = jnp.ones((2, 16, 32))
    masks = [np.asarray(drop(ones, 0.5, site_keys(keys, site)) > 0).ravel() for site in range(5)]
    masks += [np.asarray(drop(ones, 0.5, site_keys(example_keys(jax.random.key(1), 2), 0)) > 0).ravel()]
    for i, mask in enumerate(masks):
        assert 0.45 < mask.mean() < 0.55
        assert all(0.45 < np.mean(mask == other) < 0.55 for other in masks[:i])


def test_dropout_masks_are_drawn_where_they_are_used():
    """The program with dropout moves no more between devices than the one without."""
    moved = []
    for rate in (0.0, 0.5):
        config = tiny_config(model__dropout=rate, model__depth=1, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
        mesh = sharding.make_mesh(config)
        made = make_steps(config, 64, mesh)
        batch = {name: jax.ShapeDtypeStruct((8, 16), jnp.int32) for name in ("input_ids", "labels")}
        program = made.train.lower(jax.eval_shape(made.init), batch).compile().as_text()
        collectives = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
        moved.append({name: program.count(f" {name}(") for name in collectives})
    assert moved[0] == moved[1]
    assert moved[0]["all-reduce"]


def test_train_step_applies_the_optimizer_to_the_gradients():
    """Plain SGD in place of the configured optimizer: the update is the scaled gradient."""
    config = tiny_config(train__accumulation=2)
    graph, _ = abstract_model(config, VOCAB)
    optimizer = optax.sgd(0.5)
    state = init_state(config, VOCAB, optimizer)
    batch = shifted_batch(random_ids((8, 16)))
    grads, sums = bound_gradients(config, grad_accum_steps=2)(state.params, batch, None)
    after, metrics = train_step(
        state, batch, config=config, graph=graph, optimizer=optimizer, objective=NextToken(), options=()
    )
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
    assert largest_difference(after.params, expected) == 0
    assert int(after.step) == 1
    assert jnp.array_equal(jax.random.key_data(after.key), jax.random.key_data(state.key))
    assert float(metrics["loss"]) == float(sums.nll / sums.tokens)
    assert float(metrics["grad_norm"]) == float(optax.tree.norm(grads))
    assert float(metrics["lr"]) == pytest.approx(float(make_schedule(config.optimizer, 20)(0)))
    assert float(metrics["tokens"]) == 8 * 15


@pytest.mark.parametrize("step", [train_step, eval_step, gradients, loss_fn])
def test_a_step_has_no_objective_or_options_of_its_own(step):
    """A caller that forgot them would compute something else than the config says."""
    parameters = inspect.signature(step).parameters
    required = {"objective", "options"} & parameters.keys()
    assert "objective" in required
    assert all(parameters[name].default is inspect.Parameter.empty for name in required)


def test_eval_step_ignores_dropout_and_additional_terms():
    config = tiny_config(model__dropout=0.5, train__z_loss=1.0, train__ul_alpha=1.0)
    params = make_steps(config, VOCAB).init().params
    batch = shifted_batch(random_ids((8, 16)))
    sums = eval_step(params, batch, graph=abstract_model(config, VOCAB)[0], objective=NextToken())
    assert float(sums.loss) == float(sums.nll)
    graph = abstract_model(tiny_config(), VOCAB)[0]
    assert float(sums.nll) == float(eval_step(params, batch, graph=graph, objective=NextToken()).nll)


def test_untrained_loss_is_about_log_vocabulary():
    made = make_steps(tiny_config(), VOCAB)
    sums = made.evaluate(made.init().params, shifted_batch(random_ids((8, 16))))
    assert float(sums.nll / sums.tokens) == pytest.approx(np.log(VOCAB), rel=0.05)


def test_learns_to_predict_the_next_token_and_not_to_copy():
    """Overfit a batch of random tokens, which the model can memorize only if the targets are the following tokens.

    Afterwards it predicts the next token, and not its input, which an unshifted loss would teach.
    """
    config = tiny_config(train__steps=150, model__dim=64, model__mlp_dim=192, optimizer__schedule="constant")
    ids = random_ids((8, 16))
    state, metrics, made = train(config, shifted_batch(ids), 150)
    assert float(metrics["loss"]) < 0.2  # not 0: the first token does not determine the text
    predicted = np.asarray(logits_of(made.model(state.params), ids)).argmax(axis=-1)
    assert (predicted[:, 1:-1] == np.asarray(ids)[:, 2:]).mean() > 0.95
    assert (predicted[:, 1:-1] == np.asarray(ids)[:, 1:-1]).mean() < 0.2


def test_overfitted_batch_has_no_loss_shifted_and_a_high_one_unshifted():
    """Eight texts that differ in their first token can be memorized completely.

    A model that has memorized them is worse than chance at predicting its own input, the task of an unshifted loss.
    """
    config = tiny_config(train__steps=150, model__dim=64, model__mlp_dim=192)
    ids = random_ids((8, 16)).at[:, 0].set(jnp.arange(8))
    batch = shifted_batch(ids)
    state, _, made = train(config, batch, 150)
    shifted = made.evaluate(state.params, batch)
    unshifted = made.evaluate(state.params, batch | {"labels": ids})
    assert float(shifted.nll / shifted.tokens) < 0.02
    assert float(unshifted.nll / unshifted.tokens) > np.log(VOCAB)


def test_batches_feed_the_next_token_to_the_step():
    """Train on a stream in which each token determines the next one but never equals it.

    The loss approaches 0. An unshifted loss would do so too, by copying, so the predictions are checked as well.
    """
    stream = np.tile(np.arange(50, dtype=np.uint16), 40)
    config = tiny_config(train__steps=60, optimizer__schedule="constant", optimizer__lr=0.01)
    batches = PackedBatches(stream, 8, 16, seed=0)
    made = make_steps(config, VOCAB)
    state = made.init()
    for step in range(60):
        state, metrics = made.train(state, batches.at(step))
    assert float(metrics["loss"]) < 0.1
    predicted = np.asarray(logits_of(made.model(state.params), jnp.arange(10, 20)[None])).argmax(axis=-1)
    assert predicted[0, 1:].tolist() == list(range(12, 21))


def test_accumulated_equals_one_large_batch_weighted_by_valid_tokens():
    batch = shifted_batch(random_ids((8, 16)))
    uneven = jnp.arange(16)[None] < jnp.array([2, 16, 3, 16, 16, 1, 9, 16])[:, None]
    batch["labels"] = jnp.where(uneven, batch["labels"], IGNORE_INDEX)
    full, metrics, _ = train(tiny_config(optimizer__name="adamw"), batch, 3)
    accumulated, accumulated_metrics, _ = train(tiny_config(optimizer__name="adamw", train__accumulation=4), batch, 3)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], accumulated_metrics[name], rtol=2e-5)
    assert largest_difference(full.params, accumulated.params) < 1e-4  # AdamW amplifies the rounding of tiny gradients


def test_input_tokens_and_predicted_tokens_are_counted():
    batch = shifted_batch(random_ids((8, 16)))
    batch["labels"] = batch["labels"].at[:, :6].set(-100)
    mask = jnp.ones((8, 16), jnp.int32).at[3:, 12:].set(0)
    for accumulation in (1, 2):
        config = tiny_config(train__accumulation=accumulation, model__depth=1)
        metrics = [train(config, inputs, 1)[1] for inputs in (batch, batch | {"attention_mask": mask})]
        assert [int(row["input_tokens"]) for row in metrics] == [8 * 16, 8 * 16 - 5 * 4]
        assert int(metrics[0]["tokens"]) == int((batch["labels"] >= 0).sum())


@pytest.mark.parametrize("window", [0, 3])
def test_mean_context_counts_the_attended_keys(window):
    """Compare with the attention mask: segments, padding on both sides, both, neither."""
    ids = random_ids((3, 12))
    mask = jnp.ones((3, 12), jnp.int32).at[0, 9:].set(0).at[1, :4].set(0)
    segments = jnp.cumsum(random_ids((3, 12), vocab_size=3, seed=1) == 0, axis=1, dtype=jnp.int32)
    for extra in (
        {"attention_mask": mask},
        {"segment_ids": segments},
        {"attention_mask": mask, "segment_ids": segments},
    ):
        valid = extra.get("attention_mask", jnp.ones_like(ids))
        attended = ops.causal_mask(12, window, valid, extra.get("segment_ids")) & (valid > 0)[:, :, None]
        expected = float(attended.sum() / valid.sum())
        assert float(mean_context({"input_ids": ids, **extra}, window)) == pytest.approx(expected)


def test_mean_context_is_a_metric_where_attention_is_limited_by_documents():
    state, batch = make_steps(tiny_config(), VOCAB), shifted_batch(random_ids((8, 16)))
    segmented = batch | {"segment_ids": jnp.broadcast_to(jnp.arange(16) // 4, (8, 16)).astype(jnp.int32)}
    metrics = [jax.eval_shape(state.train, jax.eval_shape(state.init), inputs)[1] for inputs in (batch, segmented)]
    assert ["mean_context" in row for row in metrics] == [False, True]


@pytest.mark.parametrize("name", ["cpu", "tpu"])
def test_step_is_traced_for_the_platform_of_its_model(name):
    """A TPU's operations in a program that is traced where there is none: nothing asks for the present device."""
    platform = Platform(name)
    config = tiny_config(train__dtype="auto", train__sequence_length=128, model__scan_layers=True)
    graph, params = abstract_model(config, VOCAB, platform)
    batch = {name: jax.ShapeDtypeStruct((8, 128), jnp.int32) for name in ("input_ids", "labels")}
    compute = functools.partial(gradients, graph=graph, objective=NextToken())
    program = str(jax.make_jaxpr(lambda params, batch: compute(params, batch, None))(params, batch))
    dtype = compute_dtype("auto", platform)
    assert nnx.merge(graph, params).platform == platform
    assert ("pallas_call" in program) == (name == "tpu")  # splash attention
    # Transposes for the bfloat16 units of CPUs; elsewhere the loss has the only one.
    assert (program.count("optimization_barrier") > 1) == (name == "cpu")
    assert ops.cache_dtype(dtype, platform) == (jnp.float32 if name == "cpu" else jnp.bfloat16)


def test_steps_take_the_platform_of_their_mesh():
    config = tiny_config()
    mesh = sharding.make_mesh(config)
    steps = make_steps(config, VOCAB, mesh)
    assert steps.model(jax.eval_shape(steps.init).params).platform == Platform.of_mesh(mesh) == Platform("cpu")


def test_run_compiles_the_step_once():
    config = tiny_config(model__dropout=0.1)
    made = make_steps(config, VOCAB)
    state = made.init()
    for i in range(4):
        state, _ = made.train(state, jax.tree.map(np.asarray, shifted_batch(random_ids((8, 16), seed=i))))
    assert made.train._cache_size() == 1


def test_seed_determines_the_weights():
    batch = shifted_batch(random_ids((8, 16)))
    config = tiny_config(model__dropout=0.2)
    first, second = (train(config, batch, 3)[0].params for _ in range(2))
    assert largest_difference(first, second) == 0
    assert largest_difference(first, train(tiny_config(train__seed=1), batch, 3)[0].params) > 0


def test_dropout_differs_between_steps():
    config = tiny_config(model__dropout=0.5, optimizer__lr=1e-12)
    made = make_steps(config, VOCAB)
    state = made.init()
    losses = []
    for _ in range(3):
        state, metrics = made.train(state, shifted_batch(random_ids((8, 16))))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_eight_devices_equal_one():
    config = tiny_config(train__dtype="float32")
    batches = PackedBatches(np.asarray(random_ids((4000,))).astype(np.uint16), 8, 16, seed=0)
    losses = {}
    for devices in (1, 8):
        mesh = sharding.make_mesh(tiny_config(mesh__data=devices))
        made = make_steps(config, VOCAB, mesh)
        state = made.init()
        losses[devices] = []
        for step in range(5):
            state, metrics = made.train(state, sharding.shard_batch(mesh, batches.at(step)))
            losses[devices].append(float(metrics["loss"]))
        assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == devices
    np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5)


def test_gradients_are_reduced_once_per_step():
    """No all-reduce inside a loop: gradients are summed over devices after the loop over chunks of the loss."""
    config = tiny_config(train__batch_size=64, train__sequence_length=256)
    mesh = sharding.make_mesh(config)
    made = make_steps(config, VOCAB, mesh)
    ids = random_ids((64, 257))
    batch = sharding.shard_batch(mesh, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    program = made.train.lower(made.init(), batch).compile().as_text()
    computations = re.split(r"\n\n", program)
    bodies = [c for c in computations if c.startswith(tuple(f"%{n} " for n in re.findall(r"body=%([\w.]+)", program)))]
    assert bodies
    assert "all-reduce(" in program
    assert not any("all-reduce(" in body for body in bodies)


@pytest.mark.parametrize(
    ("tied", "name"),
    [
        (True, "adamw"),
        (False, "muon"),
        pytest.param(True, "muon", marks=pytest.mark.slow),
        pytest.param(False, "adamw", marks=pytest.mark.slow),
    ],
)
def test_resized_state_keeps_its_old_rows(name, tied):
    """Parameters and moments of old ids stay bit-identical, moments of new ones are 0, and training continues."""
    config = tiny_config(optimizer__name=name, model__tie_weights=tied, optimizer__average_decay=0.5)
    ids = random_ids((8, 16))
    state, _, made = train(config, shifted_batch(ids), 3)
    old = jax.device_get(state)  # training donates the state
    wider = resize_vocabulary(state, made.model(state.params), VOCAB + 9)
    resized = 0
    for before, after in zip(jax.tree.leaves(old[1:3]), jax.tree.leaves(wider[1:3]), strict=True):
        same = after if after.shape == before.shape else after[:VOCAB]
        resized += after.shape != before.shape
        assert np.array_equal(before, same)
    assert resized == (3 if tied else 6)  # parameters and their two moments
    for moments in jax.tree.leaves(wider.opt_state):
        if moments.shape[:1] == (VOCAB + 9,):
            assert not np.any(moments[VOCAB:])
    mean = wider.average["params"]["embedding"]
    assert np.array_equal(mean[:VOCAB], old.average["params"]["embedding"][:VOCAB])
    assert np.array_equal(mean[VOCAB:], wider.params["embedding"][VOCAB:])
    larger = make_steps(config, VOCAB + 9)
    assert jax.tree.structure(wider) == jax.tree.structure(jax.eval_shape(larger.init))
    state, metrics = larger.train(wider, shifted_batch(ids.at[:, ::2].set(VOCAB + 8)))
    assert np.isfinite(float(metrics["loss"]))
