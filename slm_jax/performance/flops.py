"""Floating-point operations of a model: by formula, from the traced program, and by XLA.

A product of [m, k] and [k, n] takes 2·m·k·n FLOPs. Model FLOPs are those of the matrix products that the mathematics
needs, whatever the implementation recomputes or skips; element-wise operations (norms, softmax, rotations) are not
counted, as is customary (PaLM, arXiv:2204.02311, appendix B). A token attends to the `mean_context` keys that the
causal window leaves; with causal=False it attends to all T, the convention of PaLM and nanochat, which includes the
masked half of the attention square. Where attention stays inside a document (segmented and padded batches), a token
attends to the earlier tokens of its document only: the training step counts them (`training.context.mean_context`).
"""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from slm_jax.config.schema import LoraConfig, ModelConfig
from slm_jax.model.block import mlp_width, round_up


def block_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Return the shapes [in, out] of the matrices of one block."""
    dim = config.dim
    q_dim = config.heads * config.head_width
    kv_dim = (config.kv_heads or config.heads) * config.head_width
    attention = [(dim, q_dim), (dim, kv_dim), (dim, kv_dim), (q_dim, dim)]
    inner = mlp_width(config)
    into_mlp = 2 if config.mlp == "swiglu" else 1  # matrices: gate and up, or up alone
    return [*attention, *[(dim, inner)] * into_mlp, (inner, dim)]


def _gate_parameters(config: ModelConfig) -> int:
    """Return the number of weights of all gates of heads, on outputs of attention and on value embeddings."""
    kv_heads = config.kv_heads or config.heads
    gates = config.depth * config.heads if config.attention_gate else 0
    return config.gate_channels * (gates + len(config.value_embeddings) * kv_heads)


def matmul_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters that every token is multiplied with: the matrices of the blocks and the head.

    Embeddings are lookups and do not count; a tied head counts once.
    """
    blocks = config.depth * sum(i * o for i, o in block_matrices(config)) + _gate_parameters(config)
    return blocks + vocab_size * config.dim


def parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the number of all parameters.

    Unlike `matmul_parameters` this includes an untied embedding, value embeddings, scales, biases, and the rows that
    pad the vocabulary to a multiple of `vocab_multiple`.
    """
    head_norms = 2 * config.head_width if config.qk_norm else 0
    biases = (config.heads + 2 * (config.kv_heads or config.heads)) * config.head_width if config.qkv_bias else 0
    residual_scales = 2 if config.residual_scales else 0
    vectors = config.depth * (2 * config.dim + head_norms + biases + residual_scales) + config.dim
    kv_dim = (config.kv_heads or config.heads) * config.head_width
    width = (1 if config.tie_weights else 2) * config.dim + len(config.value_embeddings) * kv_dim
    tables = round_up(vocab_size, config.vocab_multiple) * width
    return config.depth * sum(i * o for i, o in block_matrices(config)) + _gate_parameters(config) + tables + vectors


def _layers_mean_context(config: ModelConfig, length: int) -> float:
    """Return `mean_context`, averaged over the layers, whose windows may differ."""
    windows = collections.Counter(config.layer_windows)
    if len(windows) == 1:
        return mean_context(length, config.longest_window)
    return sum(count * mean_context(length, window) for window, count in windows.items()) / config.depth


def mean_context(length: int, window: int) -> float:
    """Return the average number of keys that a query attends to, itself included.

    Args:
        length: Tokens of a sequence, T.
        window: Size of the causal window; 0: no window.
    """
    window = min(window or length, length)
    # The first `window` queries attend to 1, 2, …, window keys, all later ones to `window`.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def forward_flops_per_token(config: ModelConfig, vocab_size: int, length: int, causal: bool = True) -> float:
    """Return the FLOPs of one token's forward pass.

    Args:
        config: The model.
        vocab_size: Entries of the vocabulary.
        length: Tokens of a sequence, T.
        causal: Count only the keys inside the causal window, see the top of the file.
    """
    context = _layers_mean_context(config, length) if causal else length
    width = config.heads * config.head_width
    return 2 * matmul_parameters(config, vocab_size) + 4 * config.depth * width * context


def train_flops_per_token(config: ModelConfig, vocab_size: int, length: int, causal: bool = True) -> float:
    """Return the FLOPs of one token's training step: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(config, vocab_size, length, causal)


class TokenFlops(NamedTuple):
    """Model FLOPs of training on one token, which depend on the number of keys that it attends to.

    Attributes:
        fixed: FLOPs of the matrices.
        per_key: FLOPs of attention for each attended key.
        context: Attended keys in a full window, on average.
    """

    fixed: float
    per_key: float
    context: float

    def at(self, context: Any = None) -> Any:
        """Return the FLOPs of a token, float or an array of floats.

        Args:
            context: Attended keys on average, a number or an array; None: those of a full window.
        """
        return self.fixed + self.per_key * (self.context if context is None else context)


def token_flops(config: ModelConfig, vocab_size: int, length: int, lora: LoraConfig | None = None) -> TokenFlops:
    """Return the FLOPs of one token's training step by attended keys.

    Args:
        config: The model.
        vocab_size: Entries of the vocabulary.
        length: Tokens of a window.
        lora: Adapters, which are trained alone unless their rank is 0; None: all parameters are trained.
    """
    fixed = 6.0 * matmul_parameters(config, vocab_size)
    per_key = 12.0 * config.depth * config.heads * config.head_width
    if lora is not None and lora.rank:
        fixed, per_key = _adapter_flops(config, vocab_size, lora)
    return TokenFlops(fixed, per_key, context=_layers_mean_context(config, length))


# The linear layers of a block in the order of `block_matrices`, grouped by what depends on what.
_SUBLAYERS = {
    "swiglu": (("query", "key", "value"), ("out",), ("gate", "up"), ("down",)),
    "relu2": (("query", "key", "value"), ("out",), ("up",), ("down",)),
}


def _adapter_flops(config: ModelConfig, vocab_size: int, lora: LoraConfig) -> tuple[float, float]:
    """Return `TokenFlops.fixed` and `per_key` of a step that trains adapters alone.

    A product with a frozen weight has a gradient of its input only, and none before the first adapter of the model.
    """
    sublayers = _SUBLAYERS[config.mlp]
    names = [name for group in sublayers for name in group]
    shapes = dict(zip(names, block_matrices(config), strict=True))
    # Gates are frozen; their input has a gradient but for that of the first layer.
    gates = _gate_parameters(config)
    kv_heads = config.kv_heads or config.heads
    heads_of_first = config.attention_gate * config.heads + (0 in config.value_embeddings) * kv_heads
    fixed = 4.0 * vocab_size * config.dim + 4.0 * gates - 2.0 * config.gate_channels * heads_of_first
    for layer in range(config.depth):
        needs_gradient = layer > 0
        for group in sublayers:
            for name in group:
                inputs, outputs = shapes[name]
                fixed += 2.0 * inputs * outputs * (1 + needs_gradient)
                if name in lora.targets:
                    # x·a and its product with b; the gradients of a, of b, of x·a, and of x.
                    fixed += 2.0 * lora.rank * (2 * (inputs + outputs) + outputs + inputs * needs_gradient)
            needs_gradient |= bool(set(group) & set(lora.targets))
    # In the attention of the first layer, gradients of probabilities, queries, keys and values that lead to an adapter.
    has = {name: name in lora.targets for name in sublayers[0]}
    first = (has["query"] or has["key"]) + sum(has.values())
    per_key = (12.0 * (config.depth - 1) + 4 + 2 * first) * config.heads * config.head_width
    return fixed, per_key


def optimizer_flops(config: ModelConfig, name: str, iterations: int = 5) -> float:
    """Return the FLOPs of the optimizer's matrix products in one step; they are no model FLOPs.

    Muon, NorMuon: each iteration on a matrix of a block, m its shorter and n its longer side, computes the Gram
    matrix (2·m²·n), its square (2·m³) and the product with the matrix (2·m²·n). AdamW multiplies no matrices.

    Args:
        config: The model.
        name: Name of the optimizer, the value of `optimizer.name`.
        iterations: Iterations of Newton-Schulz or Polar Express in a step.
    """
    if name == "adamw":
        return 0.0
    sides = [(min(shape), max(shape)) for shape in block_matrices(config)]
    return float(config.depth * iterations * sum(4 * m * m * n + 2 * m**3 for m, n in sides))


class TracedFlops(NamedTuple):
    """FLOPs of a traced program's matrix products.

    Attributes:
        flops: FLOPs of all products.
        uncounted: Primitives that contain products which cannot be counted (a kernel, a loop of unknown length).
    """

    flops: float
    uncounted: tuple[str, ...]


def traced_flops(function: Callable[..., Any], *args: Any) -> TracedFlops:
    """Count the FLOPs of all matrix products in the program of `function(*args)`, before XLA optimizes it.

    The body of a scan counts as often as it runs. Nothing is computed. The program depends on the backend
    (`slm_jax.model.ops`).

    Args:
        function: A traceable function.
        *args: Arrays or `jax.ShapeDtypeStruct`s.
    """
    total, uncounted = _count(jax.make_jaxpr(function)(*args).jaxpr)
    return TracedFlops(total, tuple(sorted(uncounted)))


def xla_flops(function: Callable[..., Any], *args: Any) -> float | None:
    """Return the FLOPs that XLA's cost analysis finds in the unoptimized program; None if the backend has none.

    The analysis includes element-wise operations, and counts the body of a scan once, however often it runs.
    """
    try:
        analysis = jax.jit(function).lower(*args).cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    return float(analysis["flops"]) if analysis and "flops" in analysis else None


def _count(jaxpr: Any) -> tuple[float, set[str]]:
    """Return (FLOPs of the products of a program, primitives that cannot be counted)."""
    total = 0.0
    uncounted = set()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        counts = [_count(subprogram) for subprogram in _subprograms(eqn.params)]
        if name == "dot_general":
            total += _dot_flops(eqn)
        elif name == "cond":  # only one branch runs: assume the most expensive one
            total += max(flops for flops, _ in counts)
        elif name == "while":  # of unknown length
            if any(flops for flops, _ in counts):
                uncounted.add(name)
        elif name == "pallas_call" or "dot_product_attention" in name:
            uncounted.add(name)
        else:
            repetitions = eqn.params["length"] if name == "scan" else 1
            total += repetitions * sum(flops for flops, _ in counts)
        for _, uncounted_inside in counts:
            uncounted |= uncounted_inside
    return total, uncounted


def _subprograms(params: dict[str, Any]) -> list[Any]:
    """Return the programs among the parameters of an equation."""
    programs = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):  # derivative rules, which this program does not run
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            program = getattr(item, "jaxpr", item)
            if hasattr(program, "eqns"):
                programs.append(program)
    return programs


def _dot_flops(eqn: Any) -> float:
    """Return 2 · (elements of the result) · (elements of the contracted axes)."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
