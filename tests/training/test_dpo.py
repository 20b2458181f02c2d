"""DPO: the loss and its gradients against a closed form and PyTorch, and preferences with a known optimum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.distributed import sharding
from slm_jax.model.abstract import abstract_model
from slm_jax.model.params import pure_params
from slm_jax.training.dpo import loss as dpo
from slm_jax.training.steps import make_steps
from slm_jax.training.train_step import gradients
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError
from tests.helpers import largest_difference, tiny_config, tiny_model

VOCAB = 61
LENGTH = 12
BETA = 0.3
DPO = {"train__objective": "dpo", "train__dpo_beta": BETA, "data__mode": "padded", "data__files": "x.jsonl"}


def pairs_of(count, seed=0, prompt=3):
    """Return a batch of random pairs with responses of different lengths, and a reference that is not 0."""
    rng = np.random.default_rng(seed)
    batch = {name: np.zeros((count, 2 * LENGTH), np.int32) for name in ("input_ids", "attention_mask")}
    batch["labels"] = np.full((count, 2 * LENGTH), IGNORE_INDEX, np.int32)
    for i in range(count):
        shared = rng.integers(9, VOCAB, prompt)
        for start in (0, LENGTH):
            size = int(rng.choice([LENGTH - 4, LENGTH]))  # few shapes to compile
            ids = np.concatenate([shared, rng.integers(9, VOCAB, size + 1 - prompt)])
            batch["input_ids"][i, start : start + size] = ids[:-1]
            batch["labels"][i, start + prompt - 1 : start + size] = ids[prompt:]
            batch["attention_mask"][i, start : start + size] = 1
    batch[dpo.REFERENCE] = -rng.uniform(20, 30, (count, 2)).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in batch.items()}


@pytest.fixture(scope="module")
def model():
    config = tiny_config(**DPO)
    return config, abstract_model(config, VOCAB)[0], pure_params(tiny_model(VOCAB, scale=3.0))


def naive_log_probabilities(model, batch):
    """One sequence at a time, without padding, from the full logits in float64."""
    result = np.zeros((len(batch["labels"]), 2))
    for i, labels_2T in enumerate(np.asarray(batch["labels"])):
        for side in (0, 1):
            span = slice(side * LENGTH, (side + 1) * LENGTH)
            size = int(batch["attention_mask"][i, span].sum())
            ids = batch["input_ids"][i : i + 1, span][:, :size]
            logits = np.asarray(model(ids)[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            labels = labels_2T[span][:size]
            result[i, side] = sum(log_p[t, label] for t, label in enumerate(labels) if label != IGNORE_INDEX)
    return result


def test_log_probabilities_are_those_of_each_response_alone(model, monkeypatch):
    _, graph, params = model
    batch = pairs_of(3)
    expected = naive_log_probabilities(nnx.merge(graph, params), batch)
    found = dpo.response_log_probabilities(nnx.merge(graph, params), batch)
    assert np.allclose(found, expected, atol=2e-4)
    monkeypatch.setattr(dpo, "_LOGIT_BYTES", 4 * 6 * VOCAB * 5)  # several chunks, the last one padded
    assert np.allclose(dpo.response_log_probabilities(nnx.merge(graph, params), batch), expected, atol=2e-4)


def test_loss_metrics_and_gradients_have_their_closed_form(model):
    """The gradient of a pair is -β σ(-m) (∇ log π(chosen) - ∇ log π(rejected))."""
    _, graph, params = model
    batch = pairs_of(4)
    policy = naive_log_probabilities(nnx.merge(graph, params), batch)
    reward = BETA * (policy - np.asarray(batch[dpo.REFERENCE], np.float64))
    margin = reward[:, 0] - reward[:, 1]
    sigmoid = 1 / (1 + np.exp(margin))  # σ(-m)
    objective = dpo.Preference(BETA)
    compute = jax.jit(lambda p: gradients(p, batch, None, graph=graph, objective=objective))
    grads, sums = compute(params)
    metrics = {name: float(value) for name, value in sums.metrics().items()}
    assert metrics == pytest.approx(
        {
            "loss": float(np.log1p(np.exp(-margin)).mean()),
            "accuracy": float((margin > 0).mean()),
            "margin": float(margin.mean()),
            "chosen_reward": float(reward[:, 0].mean()),
            "rejected_reward": float(reward[:, 1].mean()),
        },
        abs=1e-4,
    )
    weights = jnp.asarray(np.stack([-sigmoid, sigmoid], axis=1) * BETA / 4, jnp.float32)

    def weighted(params):
        return jnp.sum(weights * dpo.response_log_probabilities(nnx.merge(graph, params), batch))

    expected = jax.jit(jax.grad(weighted))(params)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest_difference(grads, expected) < 1e-4 * scale
    halves = jax.jit(lambda p: gradients(p, batch, None, graph=graph, objective=objective, grad_accum_steps=2))
    accumulated, again = halves(params)
    assert largest_difference(accumulated, grads) < 1e-5 * scale
    assert float(again.loss) == pytest.approx(float(sums.loss), rel=1e-5)


def test_rows_without_labels_are_no_pairs(model):
    _, graph, params = model
    batch = pairs_of(2)
    padded = {name: jnp.concatenate([x, jnp.zeros_like(x)]) for name, x in batch.items()}
    padded["labels"] = padded["labels"].at[2:].set(IGNORE_INDEX)
    sums = [dpo.Preference(BETA).sums(nnx.merge(graph, params), each) for each in (batch, padded)]
    assert [float(x) for x in sums[0]] == pytest.approx([float(x) for x in sums[1]], rel=1e-5)


@pytest.mark.slow
def test_a_pytorch_twin_computes_the_same(model):
    torch = pytest.importorskip("torch", minversion="2.9", reason="pip install -e '.[bench]'")
    from tests.model import torch_twin

    config, graph, params = model
    batch = pairs_of(3, seed=4)
    grads, sums = gradients(params, batch, None, graph=graph, objective=dpo.Preference(BETA))
    twin = torch_twin.TorchTransformer(config.model, VOCAB)
    torch_twin.load_weights(twin, params)
    rows = {name: torch.from_numpy(np.array(x, np.int64)) for name, x in dpo.sequences(batch).items()}
    log_p = torch.log_softmax(twin(rows["input_ids"], rows["attention_mask"]), -1)
    valid = rows["labels"] != IGNORE_INDEX
    each = log_p.gather(-1, rows["labels"].clamp(min=0)[..., None])[..., 0].masked_fill(~valid, 0.0).sum(-1).view(-1, 2)
    ratio = each - torch.from_numpy(np.array(batch[dpo.REFERENCE]))
    loss = -torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
    loss.backward()
    assert float(sums.metrics()["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    ours = torch_twin.weights_of(grads, VOCAB)
    for name, parameter in twin.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert float(np.abs(parameter.grad.numpy() - ours[name]).max()) <= 1e-3 * scale + 1e-6, name


@pytest.mark.parametrize("fields", [{"lora__rank": 4}, pytest.param({}, marks=pytest.mark.slow)], ids=["lora", "all"])
def test_the_optimum_is_that_of_the_tabular_case(fields):
    """A is preferred to B in 3 of 4 pairs: r_A - r_B = log 3, and π is proportional to ρ exp(r / β)."""
    steps = make_steps(
        tiny_config(
            **DPO,
            **fields,
            optimizer__name="adamw",
            optimizer__lr=0.01,
            optimizer__weight_decay=0.0,
            optimizer__schedule="cosine",
            train__steps=80,
            train__batch_size=4,
        ),
        VOCAB,
    )
    batch = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), pairs_of(1, seed=2))
    swapped = jax.tree.map(lambda x: jnp.roll(x, LENGTH, axis=1), {k: v for k, v in batch.items() if k != "reference"})
    batch = {name: x.at[3].set(swapped[name][3]) if name in swapped else x for name, x in batch.items()}
    state = steps.init()
    probabilities = jax.jit(lambda weights: dpo.response_log_probabilities(steps.model(weights), batch))
    reference = probabilities(state.weights)
    batch[dpo.REFERENCE] = reference
    first = None
    for _ in range(80):
        state, metrics = steps.train(state, batch)
        first = first or float(metrics["loss"])
    assert first == pytest.approx(math.log(2), abs=1e-4)
    margin = BETA * np.asarray(probabilities(state.weights) - reference)
    margin = margin[0, 0] - margin[0, 1]
    assert margin == pytest.approx(math.log(3), abs=0.05)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(metrics["loss"]) == pytest.approx(entropy, abs=1e-3)
    assert float(metrics["accuracy"]) == 0.75


@pytest.mark.slow
def test_a_mesh_computes_the_same(model):
    batch = pairs_of(8)
    results = []
    for axes in ({}, {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__data": 2}):
        config = tiny_config(**DPO, **axes, model__dropout=0.1)
        mesh = sharding.make_mesh(config) if axes else None
        steps = make_steps(config, 64, mesh)
        state, metrics = steps.train(steps.init(), batch if mesh is None else sharding.shard_batch(mesh, batch))
        results.append([float(metrics[name]) for name in ("loss", "margin", "grad_norm", "tokens", "input_tokens")])
        sums = steps.evaluate(state.weights, batch if mesh is None else sharding.shard_batch(mesh, batch))
        assert float(sums.pairs) == 8
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0][4] == int(batch["attention_mask"].sum())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.mode": "packed"}, "data.mode is packed: use --data.mode padded"),
        ({"train.ul_alpha": 0.1}, "train.ul_alpha adds to the next-token loss"),
        ({"train.z_loss": 0.1}, "train.z_loss adds to the next-token loss"),
        ({"data.files": []}, "rows with columns chosen and rejected"),
        ({"train.objective": "next-token"}, "train.dpo_beta has no effect with train.objective next-token"),
        ({"train.dpo_beta": 0}, "greater than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields, message):
    given = {name.replace("__", "."): value for name, value in DPO.items()}
    with pytest.raises(UserError) as caught:
        Config.load(**{**given, **fields})
    assert message in str(caught.value)
