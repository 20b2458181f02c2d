"""Counting the floating-point operations of a model: by formula, from the program as written, and by XLA.

A product of [m, k] and [k, n] is 2·m·k·n FLOPs. Model FLOPs are those of the matrix products that the mathematics
needs, whatever the implementation recomputes or skips; element-wise work (norms, softmax, rotations) is left out, as
is usual (arXiv:2204.02311, appendix B). A token attends to the `mean_context` keys that the causal window leaves it;
with causal=False to all T, the convention of older work, which counts the masked half of the square too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from slm_jax.config.schema import ModelConfig
from slm_jax.model.transformer import round_up, swiglu_width


def block_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """[in, out] of the matrices of one block."""
    dim, inner = config.dim, swiglu_width(config)
    kv_dim = (config.kv_heads or config.heads) * (dim // config.heads)
    return [(dim, dim), (dim, kv_dim), (dim, kv_dim), (dim, dim), (dim, inner), (dim, inner), (inner, dim)]


def matmul_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Parameters that every token is multiplied with: all matrices of the blocks and the head (the embedding is a
    look-up and counts nothing; a tied head counts once)."""
    return config.depth * sum(i * o for i, o in block_matrices(config)) + vocab_size * config.dim


def parameters(config: ModelConfig, vocab_size: int) -> int:
    """All parameters there are: the matrices, an embedding that is not the head, the scales of the norms, and the
    rows that pad the vocabulary (`vocab_multiple`), which are in no other count here."""
    head_norms = 2 * (config.dim // config.heads) if config.qk_norm else 0
    norms = config.depth * (2 * config.dim + head_norms) + config.dim
    tables = (1 if config.tie_weights else 2) * round_up(vocab_size, config.vocab_multiple) * config.dim
    return config.depth * sum(i * o for i, o in block_matrices(config)) + tables + norms


def mean_context(length: int, window: int) -> float:
    """Keys that a query sees on average, itself included: causal, within the window (0: no window)."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops_per_token(config: ModelConfig, vocab_size: int, length: int, causal: bool = True) -> float:
    """FLOPs of one token's forward pass in a sequence of `length`; causal: see the top of the file."""
    context = mean_context(length, config.window) if causal else length
    return 2 * matmul_parameters(config, vocab_size) + 4 * config.depth * config.dim * context


def train_flops_per_token(config: ModelConfig, vocab_size: int, length: int, causal: bool = True) -> float:
    """FLOPs of one token's training step: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(config, vocab_size, length, causal)


def generate_flops_per_token(config: ModelConfig, vocab_size: int, context: int) -> float:
    """FLOPs of generating one token that sees `context` cached ones, itself included (all within the window)."""
    seen = min(config.window or context, context)
    return 2 * matmul_parameters(config, vocab_size) + 4 * config.depth * config.dim * seen


def optimizer_flops(config: ModelConfig, name: str, iterations: int = 5) -> float:
    """FLOPs of the optimizer's matrix products in one step, whatever the batch: no part of the model's FLOPs.

    Muon: each Newton-Schulz iteration on a block's matrix, m the shorter side and n the longer, makes the Gram matrix
    (2·m²·n), its square (2·m³) and the product with the matrix (2·m²·n). AdamW multiplies no matrices.
    """
    if name != "muon":
        return 0.0
    sides = [(min(shape), max(shape)) for shape in block_matrices(config)]
    return float(config.depth * iterations * sum(4 * m * m * n + 2 * m**3 for m, n in sides))


class Traced(NamedTuple):
    """What a program's matrix products cost."""

    flops: float
    uncounted: tuple[str, ...]  # primitives whose inside cannot be counted (a kernel, a loop of unknown length)


def traced_flops(function: Callable[..., Any], *args: Any) -> Traced:
    """FLOPs of all matrix products that `function(*args)` makes, as written: a scan's body as often as it runs.

    args may be `jax.ShapeDtypeStruct`s; nothing is computed. The backend decides what is written (`slm_jax.model.ops`).
    """
    total, uncounted = _count(jax.make_jaxpr(function)(*args).jaxpr)
    return Traced(total, tuple(sorted(uncounted)))


def xla_flops(function: Callable[..., Any], *args: Any) -> float | None:
    """FLOPs that XLA's cost analysis finds in the program before optimization, or None where a backend has none.

    It counts element-wise operations too, and the body of a scan once, however often it runs.
    """
    try:
        analysis = jax.jit(function).lower(*args).cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    return float(analysis["flops"]) if analysis and "flops" in analysis else None


def _count(jaxpr: Any) -> tuple[float, set[str]]:
    total, uncounted = 0.0, set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inside = [_count(sub) for sub in _inner(eqn.params)]
        if name == "dot_general":
            total += _dot_flops(eqn)
        elif name == "cond":  # the dearest branch
            total += max(flops for flops, _ in inside)
        elif name == "while" or name == "pallas_call" or ("dot_product_attention" in name):
            if name != "while" or any(flops for flops, _ in inside):
                uncounted.add(name)
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(flops for flops, _ in inside)
        uncounted |= {each for _, found in inside for each in found}
    return total, uncounted


def _inner(params: dict[str, Any]) -> list[Any]:
    """The programs that an equation carries."""
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):  # rules for derivatives, which do not run here
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(each, "jaxpr", each)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def _dot_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
