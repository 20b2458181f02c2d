"""Low-rank adapters: values and gradients against closed forms, and what they leave unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import partial_eval

from slm_jax.config.schema import Config, LoraConfig
from slm_jax.distributed import sharding
from slm_jax.model import lora, lora_merge
from slm_jax.model.abstract import abstract_model
from slm_jax.model.params import join, pure_params
from slm_jax.model.precision import Policy
from slm_jax.performance import flops
from slm_jax.training.objective import NextToken
from slm_jax.training.steps import make_steps
from slm_jax.training.train_step import gradients
from slm_jax.utils.errors import UserError
from tests.helpers import BFLOAT16, largest_difference, random_ids, tiny_config, tiny_model

VOCAB = 61
LORA = {"lora__rank": 3, "lora__alpha": 6.0}


def batch_of(rows=8, length=16):
    ids = random_ids((rows, length + 1))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def drawn(tree, seed=1, scale=0.3):
    """Return random arrays in the shapes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), tree)


@pytest.fixture(scope="module")
def model():
    """A base, random adapters, the config and the graph with adapters."""
    config = tiny_config(**LORA)
    base = pure_params(tiny_model(VOCAB))
    adapters = drawn(lora.init_adapters(base, config.lora, jax.random.key(0)))
    graph, _ = abstract_model(config, VOCAB, adapters=True)
    return config, graph, base, adapters


def grads_of(config, graph, base, adapters, batch, **options):
    return jax.jit(
        lambda adapters: gradients(adapters, batch, None, graph=graph, objective=NextToken(), base=base, **options)
    )(adapters)


def test_an_adapter_adds_the_scaled_product(model):
    _, graph, base, adapters = model
    x = drawn(jnp.zeros((5, 32)), 2)
    linear = nnx.merge(graph, jax.tree.map(lambda x: x, join(base, adapters))).blocks.mlp.up
    layer = 1
    state = jax.tree.map(lambda leaf: leaf[layer], nnx.state(linear))
    nnx.update(linear, state)
    w, a, b = (np.asarray(x, np.float64) for x in (linear.weight[...], linear.adapter.a[...], linear.adapter.b[...]))
    expected = np.asarray(x, np.float64) @ w + 2.0 * (np.asarray(x, np.float64) @ a) @ b
    assert np.allclose(linear(x), expected, atol=1e-4)


def test_merged_weights_compute_the_same(model):
    config, graph, base, adapters = model
    ids = batch_of()["input_ids"]
    plain, _ = abstract_model(config, VOCAB)
    merged = lora_merge.merge(base, adapters, config.lora)
    query = base["blocks"]["attention"]["query"]["weight"]
    pair = adapters["blocks"]["attention"]["query"]["adapter"]
    exact = np.asarray(query, np.float64) + 2.0 * np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
    assert np.allclose(merged["blocks"]["attention"]["query"]["weight"], exact, atol=1e-5)
    adapted = nnx.merge(graph, join(base, adapters))(ids)
    assert largest_difference(adapted, nnx.merge(plain, merged)(ids)) < 2e-3 * float(jnp.abs(adapted).max())
    assert largest_difference(adapted, nnx.merge(plain, base)(ids)) > 0.1


def test_rounding_error_of_merged_weights():
    """Against NumPy, and without error in float32."""
    config = LoraConfig(rank=2, alpha=2.0)
    keys = jax.random.split(jax.random.key(0), 3)
    weight = 0.02 * jax.random.normal(keys[0], (1, 32, 32))
    a, b = (
        0.008 * jax.random.normal(key, shape) for key, shape in zip(keys[1:], [(1, 32, 2), (1, 2, 32)], strict=True)
    )
    base, adapters = {"up": {"weight": weight}, "norm": jnp.ones(3)}, {"up": {lora.ADAPTER: {"a": a, "b": b}}}
    merged = lora_merge.merge(base, adapters, config)
    product = np.asarray(merged["up"]["weight"]) - np.asarray(weight)
    new, old = (np.asarray(x.astype(jnp.bfloat16), np.float32) for x in (merged["up"]["weight"], weight))
    expected = np.sqrt(((new - old - product) ** 2).sum() / (product**2).sum())
    assert expected > 0.1
    assert float(lora_merge.rounding_error(base, merged, jnp.dtype("bfloat16"))) == pytest.approx(expected, rel=1e-4)
    assert float(lora_merge.rounding_error(base, merged, jnp.dtype("float32"))) == 0
    assert float(lora_merge.rounding_error(base, base, jnp.dtype("bfloat16"))) == 0


def test_gradients_follow_from_those_of_the_merged_weights(model):
    """With merged weights w + s·a·b, the gradient of a is s·dw·bᵀ, that of b is s·aᵀ·dw."""
    config, graph, base, adapters = model
    batch = batch_of()
    plain, _ = abstract_model(config, VOCAB)
    merged = lora_merge.merge(base, adapters, config.lora)
    full, sums = jax.jit(lambda p: gradients(p, batch, None, graph=plain, objective=NextToken()))(merged)
    for options in ({}, {"grad_accum_steps": 2}):
        grads, own_sums = grads_of(config, graph, base, adapters, batch, **options)
        assert float(own_sums.nll) == pytest.approx(float(sums.nll), rel=1e-4)
        for sublayer, targets in adapters["blocks"].items():
            for target, pair in targets.items():
                dw = np.asarray(full["blocks"][sublayer][target]["weight"], np.float64)
                a, b = (np.asarray(pair["adapter"][name], np.float64) for name in "ab")
                found = grads["blocks"][sublayer][target]["adapter"]
                for name, exact in (("a", 2.0 * dw @ b.swapaxes(1, 2)), ("b", 2.0 * a.swapaxes(1, 2) @ dw)):
                    assert np.allclose(found[name], exact, atol=2e-3 * np.abs(exact).max()), (target, name)


def test_new_adapters_change_nothing_and_only_they_are_trained():
    config = tiny_config(**LORA, train__dtype="bfloat16", lora__targets=("query", "down"))
    steps = make_steps(config, VOCAB)
    state = steps.init()
    assert set(state.params["blocks"]) == {"attention", "mlp"}
    assert list(state.params["blocks"]["mlp"]) == ["down"]
    assert state.base["blocks"]["mlp"]["up"]["weight"].dtype == BFLOAT16
    assert state.base["embedding"].dtype == state.base["blocks"]["mlp_norm"]["scale"].dtype == jnp.float32
    plain = make_steps(tiny_config(train__dtype="bfloat16"), VOCAB)
    base = plain.init().params
    batch = batch_of()
    expected = plain.evaluate(base, batch)
    assert [float(x) for x in steps.evaluate(state.weights, batch)] == [float(x) for x in expected]
    before = jax.device_get(state.base)
    moments = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert moments == {x.shape for x in jax.tree.leaves(state.params)}
    losses = []
    for _ in range(4):
        state, metrics = steps.train(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(state.base), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"model__scan_layers": True, "model__remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"model__remat": "elementwise"}, marks=pytest.mark.slow),
        pytest.param({"model__remat": "dots", "model__qkv_bias": True}, marks=pytest.mark.slow),
        pytest.param({"model__tie_weights": False, "model__kv_heads": 2}, marks=pytest.mark.slow),
    ],
)
def test_execution_options_do_not_change_the_gradients(options):
    config = tiny_config(**LORA, **options)
    shaping = {name: value for name, value in options.items() if name not in ("model__scan_layers", "model__remat")}
    naive = tiny_config(**LORA, **shaping, model__remat="none", model__scan_layers=False)
    batch = batch_of()
    results = []
    for each in (config, naive):
        graph, _ = abstract_model(each, VOCAB, adapters=True)
        state = make_steps(each, VOCAB).init()
        results.append(grads_of(each, graph, state.base, drawn(state.params), batch)[0])
    assert largest_difference(*results) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__data": 2}])
@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_a_mesh_computes_the_same(axes, optimizer):
    """Adapters are split like the axes of their weight."""
    batch = batch_of()
    results = []
    for fields in ({}, axes):
        config = tiny_config(**LORA, **fields, optimizer__name=optimizer)
        mesh = sharding.make_mesh(config) if fields else None
        steps = make_steps(config, 64, mesh)
        state = steps.init()
        if mesh is not None:
            query = state.params["blocks"]["attention"]["query"]["adapter"]
            assert query["a"].sharding.spec == jax.P(None, "fsdp", None)
            assert query["b"].sharding.spec == jax.P(None, None, "tensor")
        for _ in range(2):
            state, metrics = steps.train(state, batch if mesh is None else sharding.shard_batch(mesh, batch))
        results.append((float(metrics["loss"]), jax.device_get(state.params)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-4)
    assert largest_difference(results[0][1], results[1][1]) < 1e-3


@pytest.mark.slow
def test_float16_scales_the_loss_and_skips_overflows():
    steps = make_steps(tiny_config(**LORA, train__dtype="float16"), VOCAB)
    state = steps.init()
    state = state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(2.0**24)))
    before = jax.device_get(state.params)
    batch = batch_of()
    skipped = 0
    for _ in range(30):
        state, metrics = steps.train(state, batch)
        if not float(metrics["grad_norm"]) < np.inf:
            skipped += 1
            assert largest_difference(before, state.params) == 0
    assert 0 < skipped < 30
    assert float(metrics["loss"]) < 4.2


def test_the_backward_pass_skips_the_gradients_of_frozen_weights():
    """A step costs 2/3 of one that trains all parameters, in the traced program without dead code and as XLA counts."""
    shape = {"model__dim": 64, "model__mlp_dim": 192, "model__depth": 3, "train__batch_size": 8}
    shape |= {"model__attention": "naive", "model__scan_layers": False, "model__remat": "none"}
    batch = batch_of(8, 16)
    found = {}
    for rank in (0, 2):
        config = tiny_config(**shape, lora__rank=rank)
        graph, params = abstract_model(config, VOCAB, adapters=True)
        base = ()
        if rank:
            base = abstract_model(config, VOCAB)[1]
            params = jax.eval_shape(
                lambda base=base, config=config: lora.init_adapters(base, config.lora, jax.random.key(0))
            )

        def gradient(params, base, graph=graph):
            return gradients(params, batch, None, graph=graph, objective=NextToken(), base=base)[0]

        closed = jax.make_jaxpr(gradient)(params, base)
        alive, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
        traced = flops._count(alive)[0]
        formula = 8 * 16 * flops.token_flops(config.model, VOCAB, 16, config.lora).at(16)
        compiled = jax.jit(gradient).lower(params, base).compile().cost_analysis()["flops"]
        found[rank] = (traced, formula, compiled)
    traced, formula, compiled = zip(*found.values(), strict=True)
    assert traced[1] == pytest.approx(formula[1], rel=0.02)
    assert formula[1] / formula[0] == pytest.approx(2 / 3, abs=0.06)
    assert compiled[1] / compiled[0] == pytest.approx(2 / 3, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts", [{"mlp": "relu2"}, {"attention_gate": True}, {"value_embeddings": (0, 2)}, {"value_embeddings": (1,)}]
)
@pytest.mark.parametrize("targets", [("query", "key", "value", "out", "up", "down"), ("down",), ("value",)])
def test_flops_with_the_parts_of_the_speed_runs(parts, targets):
    """The formula counts exactly the products of the traced program; gates are frozen."""
    fields = {"depth": 3, "attention": "naive", "scan_layers": False, "remat": "none", **parts}
    fields = {f"model__{name}": value for name, value in fields.items()}
    config = tiny_config(**fields, lora__rank=2, lora__targets=targets)
    graph, base = abstract_model(config, VOCAB, adapters=True)[0], abstract_model(config, VOCAB)[1]
    params = jax.eval_shape(lambda: lora.init_adapters(base, config.lora, jax.random.key(0)))
    batch = batch_of(8, 16)

    def gradient(params, base):
        return gradients(params, batch, None, graph=graph, objective=NextToken(), base=base)[0]

    closed = jax.make_jaxpr(gradient)(params, base)
    alive, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    assert flops._count(alive)[0] == 8 * 16 * flops.token_flops(config.model, VOCAB, 16, config.lora).at(16)


def test_without_a_rank_nothing_changes():
    """The state and the program of a step are those of a config without the section."""
    config = tiny_config(lora__rank=0)
    steps = make_steps(config, VOCAB)
    assert steps.init.eval_shape().base == ()
    text = steps.train.lower(steps.init.eval_shape(), batch_of()).as_text()
    assert "adapter" not in text
    graph, params = abstract_model(config, VOCAB)
    assert abstract_model(config, VOCAB, adapters=True) == (graph, params)


def test_frozen_weights_are_rounded_to_the_dtype_of_products_only():
    params = pure_params(tiny_model(VOCAB))
    frozen = lora.freeze(params, Policy(compute=BFLOAT16))
    changed = [x.dtype != y.dtype for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(frozen), strict=True)]
    assert sum(changed) == 7
    same = lora.freeze(params, Policy())
    assert all(x is y for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(same), strict=True))


def test_a_is_drawn_as_peft_draws_it():
    """Uniform within 1 / sqrt(inputs): `kaiming_uniform_` with a = sqrt(5)."""
    base = {"blocks": {"mlp": {"down": {"weight": jnp.zeros((4, 400, 30))}}}}
    pair = lora.init_adapters(base, LoraConfig(rank=50, targets=("down",)), jax.random.key(0))
    a = np.asarray(pair["blocks"]["mlp"]["down"]["adapter"]["a"])
    assert np.abs(a).max() == pytest.approx(1 / 20, rel=1e-3)
    assert a.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.01)
    assert not np.asarray(pair["blocks"]["mlp"]["down"]["adapter"]["b"]).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora.targets": ["query"]}, "lora.targets has no effect with lora.rank 0: give a rank"),
        ({"lora.alpha": 8}, "lora.alpha has no effect with lora.rank 0"),
        ({"lora.from_peft": "x"}, "lora.from_peft has no effect with lora.rank 0"),
        ({"lora.rank": 2, "lora.targets": []}, "name at least one of query, key, value"),
        ({"lora.rank": 2, "lora.targets": ["up", "up"]}, "each once"),
        ({"lora.rank": 2, "lora.targets": ["head"]}, "lora.targets = 'head': should be 'query'"),
        ({"lora.rank": 2, "init.from_run": "x", "init.optimizer": "keep"}, "use init.optimizer fresh"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        Config.load(**fields)
    assert message in str(caught.value)
