"""Options of the section `model`: the shape of the Transformer, and how it is computed."""

from typing import Literal

from slm_jax.config.option import Integers, Section, option


class ModelConfig(Section):
    """Shape of the Transformer, and how it is computed."""

    recipe: Literal["standard", "speedrun"] = option(
        "standard",
        "Values of options that are not given; speedrun: mlp relu2, output_init zero, logit_softcap 15, "
        "residual_scales, attention_gate, and value_embeddings in every other layer.",
        training_only=True,
    )
    dim: int = option(
        192, "Width of the residual stream.", common=True, shapes_weights=True, exported=True, ge=8, le=2**17
    )
    depth: int = option(
        4, "Number of blocks (attention and MLP).", common=True, shapes_weights=True, exported=True, ge=1, le=2**12
    )
    heads: int = option(
        3, "Query heads; must divide dim.", common=True, shapes_weights=True, exported=True, ge=1, le=2**12
    )
    kv_heads: int = option(
        0,
        "Key and value heads (grouped-query attention); 0: as many as heads.",
        shapes_weights=True,
        exported=True,
        ge=0,
    )
    head_dim: int = option(0, "Channels of a head; 0: dim / heads.", shapes_weights=True, exported=True, ge=0, le=2**13)
    mlp_dim: int = option(
        768,
        "Size of the MLP; the inner width of swiglu is 2/3 of this, rounded up.",
        common=True,
        shapes_weights=True,
        exported=True,
        ge=8,
        le=2**20,
    )
    mlp: Literal["swiglu", "relu2"] = option(
        "swiglu",
        "MLP of each block; swiglu: three matrices, see mlp_dim; relu2: relu(x)^2 between two matrices, of inner width "
        "mlp_dim: as many parameters.",
        shapes_weights=True,
        exported=True,
    )
    mlp_multiple: int = option(
        64,
        "The inner width of swiglu is rounded up to a multiple of this.",
        shapes_weights=True,
        exported=True,
        ge=1,
        le=2**20,
    )
    window: int = option(
        0,
        "Sliding window: tokens that a token attends to, itself included; 0 or at least the sequence length: all "
        "before it.",
        exported=True,
        ge=0,
    )
    full_layers: Integers = option(
        (), "Layers, counted from 0, that attend to all tokens before them despite `window`.", exported=True
    )
    window_pattern: str = option(
        "",
        "Windows of the layers as letters that repeat, such as SSSL; S: `window`, L: all tokens before it. The last "
        "layer always attends to all; empty: all layers but full_layers have the window.",
        exported=True,
        pattern="^[SL]*$",
    )
    dropout: float = option(
        0.0, "Dropout rate on the embeddings and on each sublayer's output.", training_only=True, ge=0, lt=1
    )
    tie_weights: bool = option(True, "Share the embedding with the output head.", shapes_weights=True, exported=True)
    qk_norm: bool = option(True, "RMSNorm on queries and keys, per head.", shapes_weights=True, exported=True)
    qkv_bias: bool = option(
        False, "Biases of the query, key and value projections.", shapes_weights=True, exported=True
    )
    attention_gate: bool = option(
        False,
        "Scale each head's output by a learned gate, 2 sigmoid of the layer's first 12 input channels times a matrix "
        "(arXiv:2505.06708); 1 at first.",
        shapes_weights=True,
    )
    value_embeddings: Integers = option(
        (),
        "Layers, counted from 0, that add a further embedding of each token to the values of attention, scaled by a "
        "gate for each head (nanochat).",
        shapes_weights=True,
    )
    residual_scales: bool = option(
        False,
        "Scale the input of each layer, and add a share of the normalized embeddings to it: two learned numbers for "
        "each layer, 1 and 0.1 at first (nanochat).",
        shapes_weights=True,
    )
    logit_softcap: float = option(
        0.0,
        "Bound c of the logits, which become c tanh(logits / c); 0: no bound. nanochat has 15, Gemma 2 has 30.",
        ge=0,
    )
    norm_eps: float = option(1e-6, "Epsilon of RMSNorm, added to the mean square.", exported=True, gt=0)
    rope_base: float = option(10_000.0, "Base of the rotary position frequencies.", exported=True, gt=1)
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = option(
        "none",
        "Scaling of rotary frequencies to longer texts; linear: all are divided by rope_factor; llama3, yarn: those "
        "of few turns.",
        exported=True,
    )
    rope_factor: float = option(1.0, "With rope_scaling: the factor by which texts become longer.", exported=True, ge=1)
    rope_original_length: int = option(
        0,
        "With llama3 and yarn: sequence length of the pre-training that preceded the scaling, in tokens.",
        exported=True,
        ge=0,
    )
    rope_low_turns: float = option(
        1.0, "With llama3 and yarn: fewer turns per original length are divided by rope_factor.", exported=True, gt=0
    )
    rope_high_turns: float = option(
        32.0, "With llama3 and yarn: frequencies of more turns per original length are kept.", exported=True, gt=0
    )
    rope_attention_factor: float = option(
        0.0, "With yarn: scale of rotated queries and keys; 0: 0.1 ln(rope_factor) + 1.", exported=True, ge=0
    )
    nope_layers: Integers = option(
        (), "Layers, counted from 0, without rotary positions (NoPE, arXiv:2305.19466).", exported=True
    )
    max_positions: int = option(
        0,
        "Longest text that the initial weights were trained on, in tokens, which an export states; 0 or less than "
        "train.sequence_length: that one.",
        exported=True,
        ge=0,
    )
    init_std: float = option(
        0.02, "Standard deviation of the initial matrices, of embedding and head too.", training_only=True, gt=0
    )
    output_init: Literal["normal", "zero", "depth"] = option(
        "normal",
        "Initial output projections of attention and MLP; normal: as other matrices; zero: 0, a block is the identity "
        "at first; depth: init_std / sqrt(2 depth), as in GPT-2.",
        training_only=True,
    )
    vocab_multiple: int = option(
        1,
        "Pad the embedding and the head to a multiple of this many rows (adds no tokens).",
        shapes_weights=True,
        training_only=True,
        ge=1,
        le=2**20,
    )
    attention: Literal["auto", "blocks", "cudnn", "splash", "naive"] = option(
        "auto",
        "Attention implementation; auto: cudnn on NVIDIA GPUs, splash on TPUs, else blocks of queries; naive: all "
        "scores at once.",
        execution=True,
    )
    scan_layers: bool | Literal["auto"] = option(
        "auto",
        "Compile one block and loop over it: compile time does not depend on depth, but steps are slower on CPUs; "
        "auto: on TPUs, and on GPUs with more than 24 blocks.",
        execution=True,
    )
    remat: Literal["auto", "none", "elementwise", "dots", "full"] = option(
        "auto",
        "Activations recomputed in the backward pass to save memory; elementwise: norms, rotations and the like; dots: "
        "all but the outputs of linear layers; full: all but the input of each block; auto: elementwise, on CPUs none.",
        execution=True,
    )

    @property
    def head_width(self) -> int:
        """Channels of one attention head, K."""
        return self.head_dim or self.dim // self.heads

    @property
    def gate_channels(self) -> int:
        """Channels of a layer's input that its gates depend on, C."""
        return min(12, self.dim)

    @property
    def output_std(self) -> float:
        """Standard deviation of the initial output projections of attention and MLP."""
        factors = {"normal": 1.0, "zero": 0.0, "depth": (2 * self.depth) ** -0.5}
        return self.init_std * factors[self.output_init]

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Window of each layer; 0: the layer attends to all earlier tokens."""
        if not self.window_pattern:
            return tuple(0 if layer in self.full_layers else self.window for layer in range(self.depth))
        letters = (self.window_pattern * self.depth)[: self.depth - 1] + "L"
        return tuple(self.window if letter == "S" else 0 for letter in letters)

    @property
    def longest_window(self) -> int:
        """Tokens that at least one layer attends to; 0: all."""
        windows = self.layer_windows
        return max(windows) if all(windows) else 0
