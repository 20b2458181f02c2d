"""Checks of a model's parameters and outputs: shapes, finite values, initial loss, gradients, tied weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.checks.finding import Finding, finding, shortened
from slm_jax.checks.uncached import run_uncached
from slm_jax.config.schema import ModelConfig
from slm_jax.model.block import round_up
from slm_jax.model.transformer import Transformer
from slm_jax.performance import flops
from slm_jax.training.objective import loss_sums
from slm_jax.utils.batch import IGNORE_INDEX, Batch
from slm_jax.utils.formatting import plural


def parameters_of(model: Transformer) -> Any:
    """Return the model's parameters as a tree of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def named(tree: Any) -> list[tuple[str, Any]]:
    """Return (name, leaf) of a tree of parameters; names are dotted, `blocks.mlp.up.weight`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(".".join(str(getattr(part, "key", part)) for part in path), leaf) for path, leaf in leaves]


def layers(tree: Any) -> list[tuple[str, Any]]:
    """Return (name, leaf) with stacked leaves of the blocks split by layer, `blocks.mlp.up.weight[0]`."""
    cut = []
    for name, leaf in named(tree):
        parts = [(f"{name}[{i}]", leaf[i]) for i in range(len(leaf))] if name.startswith("blocks.") else [(name, leaf)]
        cut += parts
    return cut


def shapes(model: Transformer, config: ModelConfig, vocab_size: int, length: int) -> Finding:
    """Check the number of parameters against the formula, their dtype float32, and logits float32 [B, T, V]."""
    tree = named(parameters_of(model))
    total = sum(leaf.size for _, leaf in tree)
    rows = round_up(vocab_size, config.vocab_multiple)
    expected = flops.parameters(config, vocab_size)
    other = [f"{name} is {leaf.dtype}" for name, leaf in tree if leaf.dtype != jnp.float32]
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    graph, params = nnx.split(model, nnx.Param)
    logits = jax.eval_shape(lambda params, ids: nnx.merge(graph, params)(ids), params, ids)
    ok = not other and total == expected and (logits.shape, logits.dtype) == ((2, length, vocab_size), jnp.float32)
    if (size := len(model.embedding[...])) != rows:
        ok = False
        other.append(f"the embedding has {size} rows")
    return finding(
        "shapes",
        ok,
        f"{total:,} parameters, {'float32' if not any('is' in o for o in other) else 'not all float32'}; "
        f"logits {logits.dtype} {_shape(logits.shape)}",
        f"{expected:,} parameters, float32; logits float32 {_shape((2, length, vocab_size))}",
        shortened(other),
    )


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def finite_weights(model: Transformer) -> Finding:
    """Check that no parameter is NaN or infinite."""
    failed = [
        f"{name}: {_unfinite(leaf)} of {leaf.size:,}" for name, leaf in layers(parameters_of(model)) if _unfinite(leaf)
    ]
    total = sum(leaf.size for _, leaf in named(parameters_of(model)))
    found = f"{plural(len(failed), 'parameter')} with values that are not finite" if failed else f"all {total:,} finite"
    return finding("finite weights", not failed, found, "no NaN, no infinity", shortened(failed))


def _unfinite(leaf: jax.Array) -> int:
    return int(jnp.count_nonzero(~jnp.isfinite(leaf)))


def tied(model: Transformer, tie_weights: bool) -> Finding:
    """Check that the head is the embedding, or a separate array with other values, as configured."""
    tree = parameters_of(model)
    names = [name for name in ("embedding", "head") if name in tree]
    same = model.head is None and model.head_weight().shape == model.embedding[...].shape
    if tie_weights:
        ok = same and names == ["embedding"]
        expected = "one array for embedding and head"
    else:
        ok = names == ["embedding", "head"] and not np.array_equal(tree["head"], tree["embedding"])
        expected = "two arrays that differ"
    found = "one array" if len(names) == 1 else "two arrays"
    if len(names) == 2:
        found += " of equal values" if np.array_equal(tree["head"], tree["embedding"]) else " that differ"
    return finding("tied weights" if tie_weights else "untied weights", ok, found, expected)


def copy_to_one_device(make: Callable[[Any], Transformer], params: Any) -> Transformer:
    """Return the model with a copy of its parameters on one device; they may be sharded, and donated later."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return make(jax.tree.map(lambda leaf: jax.device_put(jnp.copy(leaf), first), params))


def without_zeros(model: Transformer) -> Transformer:
    """Return the model with small random values in parameters that are all 0.

    Parameters that start at 0, such as output projections (`model.output_init`), let no gradient through to what comes
    before them: dependences would not show.
    """
    graph, params = nnx.split(model, nnx.Param)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    filled = [x if jnp.any(x) else 0.02 * jax.random.normal(key, x.shape, x.dtype) for x, key in pairs]
    merged: Transformer = nnx.merge(graph, jax.tree.unflatten(structure, filled))
    return merged


def few_rows(batch: Batch, rows: int = 2) -> Batch:
    """Return the rows of a batch with the most labels."""
    order = np.argsort(-np.count_nonzero(np.asarray(batch["labels"]) != IGNORE_INDEX, axis=1), kind="stable")[:rows]
    return {name: jnp.asarray(np.asarray(array)[order]) for name, array in batch.items()}


class Outputs(NamedTuple):
    """Outputs of the model for a batch."""

    finite: bool  # all logits are
    largest: float  # largest absolute logit
    loss: float  # nats per predicted token


def outputs(model: Transformer, batch: Batch) -> Outputs:
    """Return the model's outputs for a batch, computed as in training."""

    def run(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        merged: Transformer = nnx.merge(graph, params)
        logits = merged(*(batch.get(k) for k in ("input_ids", "attention_mask", "segment_ids", "positions")))
        return jnp.isfinite(logits).all(), jnp.max(jnp.abs(logits)), loss_sums(merged, batch).nll

    graph, params = nnx.split(model, nnx.Param)
    finite, largest, nll = run_uncached(run, params, batch)
    count = int(np.count_nonzero(np.asarray(batch["labels"]) != IGNORE_INDEX))
    return Outputs(bool(finite), float(largest), float(nll) / max(count, 1))


def finite_logits(out: Outputs) -> Finding:
    """Check that no logit is NaN or infinite."""
    found = f"all finite, largest {out.largest:.3g}" if out.finite else "some are NaN or infinite"
    return finding("finite logits", out.finite, found, "no NaN, no infinity")


def initial_loss(out: Outputs, model: Transformer) -> Finding:
    """Check that the loss of untrained weights is ln V and a little more: all tokens are about equally likely.

    Untrained logits are about normal with variance D * init_std^2, the head's rows times hidden states of root mean
    square 1; the mean of their exponentials lifts the loss by half of that. A tied head also favours the token just
    read, whose row is part of the state: that and the chance of a small batch are the 0.3 nats on either side.
    """
    size = model.vocab_size
    dim = model.config.dim
    loss = out.loss
    lift = dim * model.config.init_std**2 / 2
    ok = math.isfinite(loss) and abs(loss - math.log(size) - lift) < 0.3 + lift
    return finding(
        "initial loss",
        ok,
        f"{loss:.3f} nats per token",
        f"ln {size} = {math.log(size):.3f}, + {lift:.2f} ± {0.3 + lift:.2f}",
    )


def gradient_flow(model: Transformer, batch: Batch) -> Finding:
    """Check that every parameter of every layer has a gradient of the loss that is finite and not all zero."""
    graph, params = nnx.split(model, nnx.Param)

    def gradients(params: Any, batch: Batch) -> Any:
        def loss(params: Any) -> jax.Array:
            sums = loss_sums(nnx.merge(graph, params), batch)
            return sums.loss / sums.tokens

        return jax.grad(loss)(params)

    parts = layers(nnx.to_pure_dict(run_uncached(gradients, params, batch)))
    sizes = jax.device_get([jnp.max(jnp.abs(leaf)) for _, leaf in parts])
    failed = [
        f"{name}: {'no gradient' if size == 0 else 'gradient not finite'}"
        for (name, _), size in zip(parts, sizes, strict=True)
        if not (np.isfinite(size) and size > 0)
    ]
    found = f"{len(parts) - len(failed)} of {len(parts)} parameters" + (f", {len(failed)} without" if failed else "")
    return finding("gradient flow", not failed, found, "a finite gradient, not 0, for each", shortened(failed))
