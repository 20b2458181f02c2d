"""Test schedules against closed forms, AdamW and Muon against optax, and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.config.schema import OptimizerConfig
from slm_jax.training import muon
from slm_jax.training.muon import orthogonalize, scale_by_muon
from slm_jax.training.optimizer import make_optimizer
from slm_jax.training.schedule import make_schedule
from tests.helpers import BFLOAT16, FLOAT32, cosine, largest_difference


def rates(steps=100, **fields):
    schedule = make_schedule(OptimizerConfig(lr=1.0, **fields), steps)
    return np.array([schedule(i) for i in range(steps)])


def test_warmup_then_wsd():
    lr = rates(warmup_steps=10, schedule="wsd", decay_fraction=0.5)
    np.testing.assert_allclose(lr[:10], (np.arange(10) + 1) / 11, rtol=1e-5)
    np.testing.assert_allclose(lr[10:55], 1.0)
    np.testing.assert_allclose(lr[55:], 1 - np.arange(45) / 45, rtol=1e-5, atol=1e-6)


def test_warmup_then_cosine_to_a_floor():
    lr = rates(warmup_steps=10, schedule="cosine", final_lr_fraction=0.1)
    np.testing.assert_allclose(lr[10:], 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(90) / 90)), rtol=1e-5)


def test_constant_without_warmup():
    np.testing.assert_allclose(rates(warmup_steps=0, schedule="constant"), 1.0)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    blocks = {"wide": make(2, 8, 24), "tall": make(2, 24, 8), "norm": make(2, 8)}  # two layers
    return {"embedding": make(20, 8), "blocks": blocks, "final_norm": make(8)}


def run(optimizer, steps=3):
    params = tree()
    state = None
    state = optimizer.init(params)
    for i in range(steps):
        updates, state = optimizer.update(tree(i + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


def layers(stacks):
    """Return each matrix of a stack under a name of its own."""
    return {f"{name}{i}": x[i] for name, x in stacks.items() for i in range(len(x))}


def test_muon_agrees_with_optax():
    """Compare direction and size with optax.contrib.muon.

    It corrects the bias of the momentum; after orthogonalization that is only another weight of the newest gradient, so
    updates are close, but not equal to the last digit.
    """
    weights = {name: x for name, x in tree()["blocks"].items() if x.ndim == 3}
    ours = scale_by_muon(FLOAT32)
    theirs = optax.contrib.muon(1.0, consistent_rms=0.2)
    our_state = ours.init(weights)
    their_state = theirs.init(layers(weights))
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: x * (i + 1) + 0.1 * i, weights)
        update, our_state = ours.update(grads, our_state)
        update = layers(update)  # optax has no stacks of matrices
        expected, their_state = theirs.update(layers(grads), their_state, layers(weights))
        assert cosine(update, jax.tree.map(jnp.negative, expected)) > 0.99
        assert float(optax.tree.norm(update)) == pytest.approx(float(optax.tree.norm(expected)), rel=0.03)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_orthogonalize_approximates_the_polar_factor(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    values = np.linalg.svd(orthogonalize(x, FLOAT32), compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert cosine(orthogonalize(x, FLOAT32), jnp.asarray(u @ vt)) > 0.97
    assert cosine(orthogonalize(x, FLOAT32), orthogonalize(x, BFLOAT16)) > 0.999


def naive_polar_express(x):
    """Return the polynomials of arXiv:2505.16932, algorithm 1, applied to the singular values, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / (1.01 * np.linalg.norm(s))
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ):
        s = s / 1.01
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", [(16, 16), (2, 16, 40), (40, 16)])
def test_polar_express_equals_its_polynomials_of_singular_values(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    result = orthogonalize(x, FLOAT32, "polar-express")
    expected = np.stack([naive_polar_express(matrix) for matrix in x]) if x.ndim == 3 else naive_polar_express(x)
    np.testing.assert_allclose(result, expected, atol=2e-4)
    assert cosine(result, orthogonalize(x, BFLOAT16, "polar-express")) > 0.998


def test_polar_express_is_closer_to_the_polar_factor_than_newton_schulz():
    """Compare singular values from 1 down to 1/200 of the largest, as gradients have them."""
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=(32, 32)))
    x = jnp.asarray(u * np.geomspace(1, 1 / 200, 32) @ vt, jnp.float32)

    def error(method):
        return float(np.linalg.norm(orthogonalize(x, FLOAT32, method) - u @ vt) / np.sqrt(32))

    assert error("polar-express") < 0.1 < 0.15 < error("newton-schulz")


def naive_muon(weight, gradients, config, momenta):
    """Return one matrix [in, out] after steps of Muon or NorMuon in NumPy, with an exact polar factor."""
    x = np.asarray(weight, np.float64)
    m, v = np.zeros_like(x), np.zeros(x.shape[1])
    for gradient, beta in zip(gradients, momenta, strict=True):
        g = np.asarray(gradient, np.float64)
        m = beta * m + (1 - beta) * g
        u, _, vt = np.linalg.svd(beta * m + (1 - beta) * g, full_matrices=False)
        update = u @ vt
        if config.name == "normuon":  # arXiv:2510.05491, algorithm 1; the rows there are columns here
            v = config.beta2 * v + (1 - config.beta2) * np.mean(update**2, axis=0)
            normalized = update / np.sqrt(v)
            update = normalized * np.linalg.norm(update) / np.linalg.norm(normalized)
        update = 0.2 * np.sqrt(max(x.shape)) * update
        decayed = x * (update * x >= 0) if config.cautious_decay else x
        x = x - config.lr * (update + config.weight_decay * decayed)
    return x


def exactly_orthogonal(x, dtype, method):
    """Return the polar factor in place of the iteration's approximation."""
    u, _, vt = jnp.linalg.svd(x, full_matrices=False)
    return u @ vt


@pytest.mark.parametrize(
    ("fields", "momenta"),
    [
        ({"name": "normuon"}, [0.95] * 4),
        ({"name": "muon", "cautious_decay": True, "momentum": 0.9}, [0.9] * 4),
        # A warm-up of 2 steps from 0.85, and a cooldown over the last 2 of 5 steps, of which 4 are taken.
        (
            {"name": "normuon", "cautious_decay": True, "momentum_warmup_steps": 2, "momentum_cooldown_steps": 2},
            [0.85, 0.9, 0.95, 0.95],
        ),
        ({"name": "muon", "momentum": 0.95, "momentum_cooldown_steps": 4}, [0.95, 0.95, 0.925, 0.9]),
    ],
)
def test_options_of_muon_agree_with_numpy(monkeypatch, fields, momenta):
    monkeypatch.setattr(muon, "orthogonalize", exactly_orthogonal)
    config = OptimizerConfig(lr=0.05, warmup_steps=0, schedule="constant", clip=0, weight_decay=0.5, **fields)
    params = run(make_optimizer(config, 5, FLOAT32), steps=4)
    for name in ("wide", "tall"):
        for layer in range(2):
            gradients = [tree(i + 1)["blocks"][name][layer] for i in range(4)]
            expected = naive_muon(tree()["blocks"][name][layer], gradients, config, momenta)
            np.testing.assert_allclose(params["blocks"][name][layer], expected, atol=2e-5)


def test_cautious_decay_of_adamw_agrees_with_numpy():
    config = OptimizerConfig(
        name="adamw", lr=0.05, warmup_steps=0, schedule="constant", clip=0, weight_decay=0.5, cautious_decay=True
    )
    params = run(make_optimizer(config, 10, FLOAT32))
    for name in ("embedding", "final_norm"):
        expected = naive_adamw(tree()[name], [tree(i + 1)[name] for i in range(3)], 0.05, config)
        np.testing.assert_allclose(params[name], expected, rtol=2e-5, atol=1e-6)


def test_adamw_equals_that_of_optax():
    config = OptimizerConfig(name="adamw", lr=0.1, warmup_steps=0, schedule="constant", clip=0, weight_decay=0.3)
    decay = {"embedding": True, "blocks": {"wide": True, "tall": True, "norm": False}, "final_norm": False}
    expected = optax.adamw(0.1, b1=0.9, b2=0.95, weight_decay=0.3, mask=decay)
    assert largest_difference(run(make_optimizer(config, 10, FLOAT32)), run(expected)) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon"])
def test_matrices_decay_and_scales_do_not(name):
    config = OptimizerConfig(name=name, lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10, FLOAT32)
    params = tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not np.any(updates["blocks"]["norm"])
    assert not np.any(updates["final_norm"])
    for matrix, update in (
        (params["embedding"], updates["embedding"]),
        (params["blocks"]["wide"], updates["blocks"]["wide"]),
    ):
        np.testing.assert_allclose(update, -0.05 * matrix, rtol=1e-5)


def test_clipping_bounds_the_gradient():
    config = OptimizerConfig(name="adamw", lr=0.1, warmup_steps=0, schedule="constant", weight_decay=0, clip=1.0)
    big = jax.tree.map(lambda x: x * 1e6, tree(1))
    small = jax.tree.map(lambda x: x / optax.tree.norm(tree(1)), tree(1))
    optimizer = make_optimizer(config, 10, FLOAT32)
    from_big = optimizer.update(big, optimizer.init(tree()), tree())[0]
    from_small = optimizer.update(small, optimizer.init(tree()), tree())[0]
    assert largest_difference(from_big, from_small) < 1e-5


def naive_adamw(params, gradients, rate, config):
    """Return an array after AdamW steps in NumPy, written down from arXiv:1711.05101, algorithm 2."""
    x, m, v = np.asarray(params, np.float64), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        g = np.asarray(gradient, np.float64)
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        direction = m / (1 - config.beta1**step) / (np.sqrt(v / (1 - config.beta2**step)) + 1e-8)
        decay = config.weight_decay if x.ndim > 1 else 0.0
        decayed = x * (direction * x >= 0) if config.cautious_decay else x
        x = x - rate * (direction + decay * decayed)
    return x


SCALES = {"embedding_lr_scale": 3.0, "head_lr_scale": 0.25, "vector_lr_scale": 7.0}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_group_has_its_own_learning_rate(name):
    fixed = {"name": name, "lr": 0.01, "warmup_steps": 0, "schedule": "constant", "clip": 0, "weight_decay": 0.3}
    config = OptimizerConfig(**fixed, **SCALES)

    def with_head(seed):
        return {**tree(seed), "head": tree(seed + 10)["embedding"]}

    def params_after(config, steps=3):
        optimizer = make_optimizer(config, 10, FLOAT32)
        params = with_head(0)
        state = optimizer.init(params)
        for i in range(steps):
            updates, state = optimizer.update(with_head(i + 1), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    scaled, state = params_after(config)
    plain, plain_state = params_after(OptimizerConfig(**fixed))
    assert jax.tree.structure(state) == jax.tree.structure(plain_state)  # either run resumes the other's state
    rates = {"embedding": 0.03, "head": 0.0025, "final_norm": 0.07}
    for parameter, rate in rates.items():
        gradients = [with_head(i + 1)[parameter] for i in range(3)]
        naive = naive_adamw(with_head(0)[parameter], gradients, rate, config)
        np.testing.assert_allclose(scaled[parameter], naive, rtol=2e-5, atol=1e-6)
    for layer in range(2):  # the vectors of a stack, one per layer
        gradients = [with_head(i + 1)["blocks"]["norm"][layer] for i in range(3)]
        naive = naive_adamw(with_head(0)["blocks"]["norm"][layer], gradients, 0.07, config)
        np.testing.assert_allclose(scaled["blocks"]["norm"][layer], naive, rtol=2e-5, atol=1e-6)
    for matrix in ("wide", "tall"):
        np.testing.assert_array_equal(scaled["blocks"][matrix], plain["blocks"][matrix])


def test_scales_of_one_are_the_same_program():
    def program(config):
        optimizer = make_optimizer(config, 10, FLOAT32)
        return jax.jit(optimizer.update).lower(tree(1), optimizer.init(tree()), tree()).as_text()

    ones = dict.fromkeys(SCALES, 1.0)
    assert program(OptimizerConfig(**ones)) == program(OptimizerConfig())
    assert program(OptimizerConfig(**SCALES)) != program(OptimizerConfig())
