"""The shape of a model from its number of parameters: width, depth, heads and inner width.

For a given vocabulary the width is the largest multiple of a head's width at which a model of the usual depth,
width / WIDTH_PER_LAYER, has not many more parameters than are asked for. The depth then is what the parameters allow,
and the inner width of the SwiGLU makes up for what is left by rounding, so that their number is met to a few percent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slm_jax.config.sections import Sections
from slm_jax.utils.errors import UserError

WIDTH_PER_LAYER = 64  # aspect ratio, width / depth: that of gpu_30m; 768 x 12 is GPT-2's; not measured
MIN_DEPTH = 2
MIN_WIDTH = 64
# Width of a head, by the smallest width of the model: 64 as in GPT-2, 128 where the kernels of TPUs and GPUs profit.
HEAD_WIDTHS = ((0, 64), (512, 128))
# Multiples of the SwiGLU's inner width, by the smallest width of the model: large ones suit matrix units, small ones
# let a small model meet its number of parameters.
MLP_MULTIPLES = ((0, 16), (128, 32), (256, 64), (768, 128))
MLP_RATIO = 8 / 3  # inner width / width: the parameters of an MLP of four times the width (arXiv:2002.05202)
MAX_PARAMETERS = 20e9  # far beyond what this project is for; larger numbers are typing errors
# Bounds of what follows from a given width or depth; beyond them the given one is taken for a mistake.
UNUSUAL_MLP_RATIO = 8  # noted above: that of Gemma 2B, the largest of a decoder in wide use
MAX_MLP_RATIO = 16
MAX_DEPTH_PER_WIDTH = 0.5  # blocks of a model of width 1
_WIDTH_SLACK = 1.2  # a width is taken if its usual model has at most this many times the parameters
_TOLERANCE = 0.05  # of the number of parameters


@dataclass(frozen=True)
class Shape:
    """Shape of a model.

    Attributes:
        dim: Width.
        depth: Blocks.
        heads: Query heads, as many as key and value heads.
        inner: Inner width of the SwiGLU.
        mlp_multiple: `model.mlp_multiple`, of which `inner` is a multiple.
        mlp_dim: `model.mlp_dim`, of which `inner` is two thirds, rounded up to that multiple.
        vocab_size: Entries of the vocabulary.
        tables: Embedding and head: 1 if they are tied, otherwise 2.
    """

    dim: int
    depth: int
    heads: int
    inner: int
    mlp_multiple: int
    mlp_dim: int
    vocab_size: int
    tables: int = 1

    @property
    def parameters(self) -> int:
        """Number of all parameters, as `performance.flops.parameters` counts them for a model of these options."""
        norms = 2 * self.dim + 2 * (self.dim // self.heads)
        block = 4 * self.dim**2 + 3 * self.dim * self.inner + norms
        return self.depth * block + self.tables * self.vocab_size * self.dim + self.dim

    @property
    def mlp_ratio(self) -> float:
        """Inner width of the SwiGLU, as a multiple of the width."""
        return self.inner / self.dim

    def flops_per_token(self, length: int) -> float:
        """Return the model FLOPs of one token's training step; `performance.flops` counts the same.

        Args:
            length: Tokens of a sequence.
        """
        matrices = self.depth * (4 * self.dim**2 + 3 * self.dim * self.inner) + self.vocab_size * self.dim
        return 6 * matrices + 12 * self.depth * self.dim * (length + 1) / 2


def smooth_flops_per_token(parameters: float, vocab_size: int, length: int) -> float:
    """Return about the model FLOPs of one token's training step, growing smoothly with the parameters."""
    low, high = 0.0, 1e6
    for _ in range(100):
        width = (low + high) / 2
        low, high = (width, high) if _usual_parameters(width, vocab_size) < parameters else (low, width)
    return 6 * parameters + 12 * width**2 / WIDTH_PER_LAYER * (length + 1) / 2


def _usual_parameters(width: float, vocab_size: int, tables: int = 1, depth: int = 0) -> float:
    """Return about how many parameters a model has; with depth 0 it has the usual one for its width."""
    blocks = depth or max(MIN_DEPTH, width / WIDTH_PER_LAYER)
    return tables * vocab_size * width + blocks * (4 + 3 * MLP_RATIO) * width**2


def smallest(vocab_size: int, given: Mapping[str, Any]) -> float:
    """Return about how many parameters the smallest model with a vocabulary and with given options has."""
    tables = 1 if given.get("model.tie_weights", True) else 2
    dim = int(given.get("model.dim", 0)) or MIN_WIDTH
    return _usual_parameters(dim, vocab_size, tables, int(given.get("model.depth", 0)) or MIN_DEPTH)


def parameters_of(config: Sections, vocab_size: int = 0) -> int:
    """Return how many parameters the rule counts for a model, without options that it does not know.

    Args:
        config: The config; `model.kv_heads`, `head_dim`, `value_embeddings` and the like are not looked at.
        vocab_size: Entries of the vocabulary; 0: the largest one that may be learned.
    """
    model = config.model
    inner = math.ceil(2 * model.mlp_dim / 3 / model.mlp_multiple) * model.mlp_multiple
    tables = 1 if model.tie_weights else 2
    shape = Shape(
        model.dim,
        model.depth,
        model.heads,
        inner,
        model.mlp_multiple,
        model.mlp_dim,
        vocab_size or config.tokenizer.vocab_size,
        tables,
    )
    return shape.parameters


def choose_shape(parameters: float, vocab_size: int, given: Mapping[str, Any]) -> Shape:
    """Return the shape of a model with about this number of parameters.

    Args:
        parameters: Number of parameters.
        vocab_size: Entries of the vocabulary.
        given: Options by dotted name, of which `model.dim`, `depth`, `heads`, `mlp_dim`, `mlp_multiple` and
            `tie_weights` are kept.

    Raises:
        UserError: No shape has about that many parameters, and the smallest one is named; or the given width or depth
            would need an absurd number of blocks or inner width.
    """
    if parameters > MAX_PARAMETERS:
        raise UserError(f"{parameters:.3g} parameters are too many: --size at most {MAX_PARAMETERS / 1e9:.0f}B")
    tables = 1 if given.get("model.tie_weights", True) else 2
    depth = int(given.get("model.depth", 0))
    dim = int(given.get("model.dim", 0)) or _width(parameters, vocab_size, tables, given)
    heads = int(given.get("model.heads", 0)) or max(1, dim // _by_width(HEAD_WIDTHS, dim))
    multiple = int(given.get("model.mlp_multiple", 0)) or _by_width(MLP_MULTIPLES, dim)
    mlp_dim = int(given.get("model.mlp_dim", 0))
    inner = math.ceil(2 * mlp_dim / 3 / multiple) * multiple
    if not depth:
        block = 4 * dim**2 + 3 * dim * (inner or MLP_RATIO * dim)
        depth = max(MIN_DEPTH, round((parameters - tables * vocab_size * dim) / block))
    if not mlp_dim:
        exact = ((parameters - tables * vocab_size * dim) / depth / dim - 4 * dim) / 3
        inner = max(multiple, round(exact / multiple) * multiple)
        mlp_dim = 3 * inner // 2
    shape = Shape(dim, depth, heads, inner, multiple, mlp_dim, vocab_size, tables)
    is_free = not {"model.dim", "model.depth", "model.mlp_dim"} <= given.keys()
    if is_free and shape.parameters > (1 + _TOLERANCE) * parameters:
        raise UserError(
            f"no model of {parameters:,.0f} parameters has a vocabulary of {vocab_size:,} and the given options; the "
            f"smallest has {shape.parameters:,}: give a larger --size or --budget, or a smaller vocabulary"
        )
    _require_plausible(shape, parameters, given)
    return shape


def _require_plausible(shape: Shape, parameters: float, given: Mapping[str, Any]) -> None:
    """Refuse a shape whose given width or depth leaves most of the parameters to one other quantity.

    Raises:
        UserError: The inner width or the depth is absurd; names the options to change.
    """
    width = _width(parameters, shape.vocab_size, shape.tables, given)
    is_deep = shape.depth > max(MIN_DEPTH, MAX_DEPTH_PER_WIDTH * shape.dim)
    # A large vocabulary may leave no wider model: then many blocks are the only ones.
    if "model.depth" not in given and is_deep and width > shape.dim:
        raise UserError(
            f"{parameters:,.0f} parameters of width {shape.dim} need {shape.depth:,} blocks: give a larger --model.dim "
            f"(such as {width}), a smaller --size or --budget, or --model.depth if that is meant"
        )
    if "model.mlp_dim" not in given and shape.mlp_ratio > MAX_MLP_RATIO:
        usual = round(1.5 * MLP_RATIO * shape.dim)
        shape_options = [f"--{name}" for name in ("model.depth", "model.dim") if name in given]
        raise UserError(
            f"{parameters:,.0f} parameters in {shape.depth} blocks of width {shape.dim} need an inner width of "
            f"{shape.inner:,}, {shape.mlp_ratio:.0f} times the width: change {' or '.join(shape_options)}, --size or "
            f"--budget, or the vocabulary of {shape.vocab_size:,}, or give --model.mlp_dim (usual: {usual}) for "
            "another size"
        )


def shape_reasons(shape: Shape) -> dict[str, tuple[Any, str]]:
    """Return the options of a shape by dotted name, each with its reason."""
    head = shape.dim // shape.heads
    return {
        "model.dim": (shape.dim, f"about {WIDTH_PER_LAYER} x depth; a multiple of {head}"),
        "model.depth": (shape.depth, f"what the parameters allow ({shape.parameters:,} in all)"),
        "model.heads": (shape.heads, f"of width {head}"),
        "model.kv_heads": (0, "as many as heads"),
        "model.head_dim": (0, "width / heads"),
        "model.mlp_dim": (
            shape.mlp_dim,
            f"inner width {shape.inner}, {shape.mlp_ratio:.2f} of the width; meets the parameters",
        ),
        "model.mlp_multiple": (shape.mlp_multiple, "the inner width suits matrix units"),
    }


def _width(parameters: float, vocab_size: int, tables: int, given: Mapping[str, Any]) -> int:
    """Return the largest width whose model of the usual, or the given, depth is not far above the parameters."""
    heads = int(given.get("model.heads", 0))
    depth = int(given.get("model.depth", 0))
    best = width = 2 * heads or MIN_WIDTH
    while _usual_parameters(width, vocab_size, tables, depth) <= _WIDTH_SLACK * parameters:
        best = width
        width += 2 * heads or _by_width(HEAD_WIDTHS, width)
    return best


def _by_width(table: tuple[tuple[int, int], ...], width: int) -> int:
    """Return the last value of a table whose smallest width is not above a width."""
    return [value for least, value in table if width >= least][-1]
