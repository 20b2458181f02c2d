"""Every option of a run, by section.

A new option is one field here: its type, default, bounds, a description with the unit, and its traits (`option`).
Nothing else declares options; presets, command-line flags, help and checks are derived from these fields.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic.fields import FieldInfo

from slm_jax.config.option import TRAITS, Integers, Section, Strings, Trait, one_or_more, option, traits_of

MAX_STEPS = 2**31 - 1  # steps are counted in int32


class ModelConfig(Section):
    """Shape of the Transformer, and how it is computed."""

    dim: int = option(192, "Width of the residual stream.", common=True, shapes_weights=True, exported=True, ge=8)
    depth: int = option(
        4, "Number of blocks (attention and SwiGLU).", common=True, shapes_weights=True, exported=True, ge=1
    )
    heads: int = option(3, "Query heads; must divide dim.", common=True, shapes_weights=True, exported=True, ge=1)
    kv_heads: int = option(
        0,
        "Key and value heads (grouped-query attention); 0: as many as heads.",
        shapes_weights=True,
        exported=True,
        ge=0,
    )
    head_dim: int = option(0, "Channels of a head; 0: dim / heads.", shapes_weights=True, exported=True, ge=0)
    mlp_dim: int = option(
        768,
        "SwiGLU size; its inner width is 2/3 of this, rounded up.",
        common=True,
        shapes_weights=True,
        exported=True,
        ge=8,
    )
    mlp_multiple: int = option(
        64, "The SwiGLU's inner width is rounded up to a multiple of this.", shapes_weights=True, exported=True, ge=1
    )
    window: int = option(
        0,
        "Sliding window: tokens that a token attends to, itself included; 0 or at least the sequence length: all "
        "before it.",
        exported=True,
        ge=0,
    )
    full_layers: Integers = option(
        (), "Layers, counted from 0, that attend to all tokens before them in spite of `window`.", exported=True
    )
    dropout: float = option(
        0.0, "Dropout rate on the embeddings and on each sublayer's output.", training_only=True, ge=0, lt=1
    )
    tie_weights: bool = option(True, "Share the embedding with the output head.", shapes_weights=True, exported=True)
    qk_norm: bool = option(True, "RMSNorm on queries and keys, per head.", shapes_weights=True, exported=True)
    qkv_bias: bool = option(
        False, "Biases of the query, key and value projections.", shapes_weights=True, exported=True
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
        0, "With llama3 and yarn: sequence length of the pre-training before it, in tokens.", exported=True, ge=0
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
    vocab_multiple: int = option(
        1,
        "Pad the embedding and the head to a multiple of this many rows (adds no tokens).",
        shapes_weights=True,
        training_only=True,
        ge=1,
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
    def layer_windows(self) -> tuple[int, ...]:
        """Window of each layer; 0: the layer attends to all earlier tokens."""
        return tuple(0 if layer in self.full_layers else self.window for layer in range(self.depth))

    @property
    def longest_window(self) -> int:
        """Tokens that at least one layer attends to; 0: all."""
        windows = self.layer_windows
        return max(windows) if all(windows) else 0


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["muon", "adamw"] = option(
        "muon", "muon: Muon for hidden matrices, AdamW for all other parameters; adamw: AdamW for all.", common=True
    )
    lr: float = option(
        0.01,
        "Peak learning rate; with muon the same for both of its parts. adamw alone needs a lower one, about 0.001.",
        common=True,
        gt=0,
    )
    warmup_steps: int = option(20, "Steps of linear warmup, part of train.steps.", ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = option(
        "wsd", "After warmup; cosine: cosine decay to the final rate; wsd: constant, then linear decay to it."
    )
    decay_fraction: float = option(
        0.5, "Fraction of the steps after warmup that wsd decays for, at the end.", gt=0, le=1
    )
    final_lr_fraction: float = option(0.0, "Final learning rate as a fraction of the peak.", ge=0, le=1)
    weight_decay: float = option(0.1, "Decoupled weight decay of matrices; norm scales are not decayed.", ge=0)
    clip: float = option(1.0, "Largest global gradient norm; 0: no clipping.", ge=0)
    beta1: float = option(0.9, "Decay rate of AdamW's first moment.", ge=0, lt=1)
    beta2: float = option(0.95, "Decay rate of AdamW's second moment.", ge=0, lt=1)


class TrainConfig(Section):
    """Length of the run, batch size and precision."""

    steps: int = option(
        1000,
        "Optimizer steps in total, including those before a resume.",
        common=True,
        resumable=True,
        ge=1,
        le=MAX_STEPS,
    )
    stop_early: int = option(
        0,
        "End the run when this many validations in a row (every eval.every steps) were not better than the best one "
        "before them; 0: never.",
        common=True,
        resumable=True,
        ge=0,
    )
    batch_size: int = option(16, "Sequences per optimizer step, over all devices.", common=True, ge=1)
    sequence_length: int = option(256, "Tokens per sequence.", common=True, ge=2)
    accumulation: int = option(
        1, "Gradient accumulation: microbatches that each batch is split into (less memory).", execution=True, ge=1
    )
    microbatch: int | Literal["auto"] = option(
        "auto",
        "Gradient accumulation by size: sequences per microbatch; auto: as many as fit into memory, in at least "
        "`accumulation` microbatches.",
        execution=True,
    )
    memory_gb: float = option(
        0.0, "Memory of one device that a step may use, in GB (10^9 bytes); 0: all that is free.", execution=True, ge=0
    )
    seed: int = option(
        0, "Seed of the initial weights, the order of the data and dropout.", common=True, ge=0, lt=2**32
    )
    objective: Literal["next-token", "dpo"] = option(
        "next-token",
        "dpo: direct preference optimization on pairs of a chosen and a rejected response, from initial weights that "
        "are also the reference; a batch then has train.batch_size pairs.",
        common=True,
    )
    dpo_beta: float = option(
        0.1, "With dpo: the smaller, the farther the model may move away from the reference.", gt=0
    )
    z_loss: float = option(0.0, "Weight of the z-loss, log(Z)^2, which keeps logits small.", ge=0)
    ul_alpha: float = option(0.0, "Weight of the unlikelihood loss on tokens that already occur in the context.", ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Compute precision (parameters stay float32); auto: bfloat16 where the hardware multiplies it, float16 on "
        "NVIDIA GPUs that multiply only that (T4, V100). float16 scales the loss (dynamic loss scaling).",
        common=True,
    )
    residual_dtype: Literal["auto", "float32", "compute"] = option(
        "auto",
        "Dtype of the residual stream and of all activations; compute: that of the matrix products; auto: float32 on "
        "CPUs, compute on GPUs and TPUs.",
        execution=True,
    )
    debug: bool = option(
        False, "Stop at the first NaN and report the step and the operation that produced it (slow).", resumable=True
    )
    deterministic: bool = option(
        False, "On GPUs use deterministic operations only (slower); on CPUs and TPUs they always are."
    )

    @property
    def grad_accum_steps(self) -> int:
        """Microbatches per optimizer step."""
        return self.accumulation if self.microbatch == "auto" else self.batch_size // self.microbatch


class DataConfig(Section):
    """Source of the text, and how it becomes batches."""

    source: str = option(
        "python-docs",
        "python-docs, python-qa or python-chat (part of every Python installation), files, a name such as tinystories "
        "(python -m slm_jax.data list), or hf:OWNER/NAME[:CONFIG][:SPLIT].",
        common=True,
    )
    files: Strings = option(
        (), "Text, JSONL or Parquet files, folders or globs ('my/**/*.txt'); implies source = files.", common=True
    )
    mix: Strings = option(
        (), "Several sources or globs with their shares of the batches: 'python-docs=1' 'my/*.txt=3'.", common=True
    )
    separator: str = option(
        "<|endoftext|>", "Text files: a line with only this text ends a document; empty: one document per file."
    )
    document: Literal["file", "line"] = option(
        "file", "Text files: each file (or each part up to a separator) or each line is a document."
    )
    encoding_errors: Literal["strict", "replace"] = option(
        "strict",
        "Bytes that are not UTF-8; strict: reject the text file, skip the row of other files; replace: read them as "
        "U+FFFD.",
    )
    format: Literal["auto", "text", "chat", "messages", "sharegpt", "alpaca", "dolly", "preferences"] = option(
        "auto",
        "JSONL, Parquet, hub: what a row holds. auto: text, or a conversation where there is no column text; chat: a "
        "conversation in one of the formats messages (OpenAI), sharegpt, alpaca and dolly; preferences: a chosen and a "
        "rejected one; text: no conversation.",
    )
    text_field: str = option(
        "", "JSONL, Parquet, hub: the column of the text, or of the conversation; empty: the source's own, or text."
    )
    template: str = option(
        "",
        "JSONL, Parquet, hub: alpaca, or a prompt with {column} placeholders ('{question}\\n'); empty: no prompts.",
    )
    response_field: str = option("", "With template: the column of the response; empty: output.")
    loss_on: Literal["response", "all"] = option(
        "response",
        "Instructions and conversations: the tokens that are predicted, of responses only or of prompts as well.",
    )
    revision: str = option("", "Hub: a commit or branch; empty: the newest one when the text is prepared.")
    max_documents: int = option(0, "Largest number of training documents per source; 0: no limit.", ge=0)
    max_tokens: int = option(0, "Largest number of training tokens per source (approximate); 0: no limit.", ge=0)
    deduplicate: bool = option(True, "Drop exact duplicates of a document.")
    validation_fraction: float = option(
        0.05,
        "Fraction of the documents held out for validation, chosen by their hash, where the source has no validation "
        "split.",
        gt=0,
        lt=1,
    )
    max_validation_characters: int = option(
        20_000_000,
        "Largest number of characters held out per source; later documents are trained on; 0: no limit.",
        ge=0,
    )
    mode: Literal["packed", "segmented", "padded"] = option(
        "packed",
        "packed: windows of full length across documents; segmented: the same, with attention within each document "
        "only; padded: one document per sequence.",
        common=True,
    )
    cache: str = option(
        "",
        "Folder of prepared text, shared by all runs; empty: slm_jax/data in the user's cache folder.",
        per_host=True,
    )
    workers: int = option(0, "Processes that tokenize; 0: one per core.", per_host=True, ge=0)


class TokenizerConfig(Section):
    """Tokenizer: learned from the training text, or an existing one."""

    path: str = option(
        "",
        "A saved tokenizer, a tokenizer.json, or the name of a pretrained one (english-16k); empty: learn one from the "
        "training text.",
        common=True,
    )
    vocab_size: int = option(2048, "Learned tokenizer: maximum number of token ids.", common=True, ge=300, le=65536)
    portable: bool = option(
        False,
        "Learned tokenizer: segment as a stock tokenizer.json does, so that the export needs no code of its own; then "
        "lowercase, byte_limit and boundaries have no effect.",
    )
    lowercase: bool = option(True, "Learned tokenizer: the, The and THE share one entry (lossless).")
    byte_limit: int = option(4, "Learned tokenizer: longest base token, in UTF-8 bytes.", ge=1, le=16)
    boundaries: Literal["words", "spaces"] = option(
        "words",
        "Learned tokenizer; words: no token joins letters, digits and punctuation; spaces: tokens stop only at white "
        "space (fewer tokens).",
    )


class InitConfig(Section):
    """Initial weights."""

    from_run: str = option(
        "",
        "Start from the weights of this run (the best ones, if its validation did not improve any more at the end, "
        "otherwise the newest) and use its tokenizer (fine-tuning); empty: random weights.",
        common=True,
    )
    from_hf: str = option(
        "",
        "Start from a folder in the Hugging Face layout, with optimizer settings for fine-tuning: one written by "
        "slm_jax.export, or a Llama, Mistral, Qwen2, Qwen3 or SmolLM3 with its tokenizer.json.",
    )
    optimizer: Literal["fresh", "keep"] = option(
        "fresh",
        "With from_run, the optimizer's moments; fresh: start at zero; keep: those of that run. The schedule restarts.",
        former_values={"carry": "keep"},
    )


LoraTarget = Literal["query", "key", "value", "out", "gate", "up", "down"]


class LoraConfig(Section):
    """Low-rank adapters (LoRA) on frozen initial weights."""

    rank: int = option(
        0,
        "Rank of the adapters, the only parameters that are trained; the initial weights (init.from_run, init.from_hf) "
        "are frozen; 0: no adapters, all parameters are trained.",
        common=True,
        ge=0,
    )
    alpha: float = option(16.0, "Scale of the adapters: their product is multiplied by alpha / rank.", gt=0)
    targets: Annotated[tuple[LoraTarget, ...], one_or_more] = option(
        get_args(LoraTarget),
        "Linear layers of each block that have an adapter: query, key, value and out of attention, gate, up and down "
        "of the SwiGLU.",
    )
    from_peft: str = option(
        "",
        "Start with the adapters of a folder in the PEFT layout, and with its rank, alpha and targets; empty: adapters "
        "whose product is 0.",
    )


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

    every: int = option(
        200, "Steps between checkpoints; the last step is always saved.", common=True, resumable=True, ge=1
    )
    keep: int = option(2, "Newest checkpoints kept.", resumable=True, ge=1)
    keep_best: int = option(
        1,
        "Checkpoints with the best validation (bits per byte), saved and kept in addition; 0: none.",
        resumable=True,
        ge=0,
    )
    keep_every: int = option(0, "Steps between checkpoints that are kept permanently; 0: none.", resumable=True, ge=0)
    minutes: float = option(
        0.0,
        "Also save when this many minutes have passed since the last save (preemptible machines); 0: never.",
        resumable=True,
        ge=0,
    )
    folder: str = option(
        "", "Folder or bucket (gs://…, with gcsfs) of this run's checkpoints; empty: inside the run directory."
    )


class EvalConfig(Section):
    """Validation and sample texts during training."""

    every: int = option(
        250, "Steps between validations; the last step is always validated.", common=True, resumable=True, ge=1
    )
    max_tokens: int = option(
        0,
        "Largest number of validation tokens; 0: all of them. In a mixture it is divided among the sources in "
        "proportion to their held-out text, whole documents and at least one of each.",
        ge=0,
    )
    prompts: Strings = option(
        ("",), "Prompts of the sample texts written at each validation; empty: a new document.", resumable=True
    )
    sample_tokens: int = option(120, "Length of each sample text, in tokens; 0: no samples.", resumable=True, ge=0)


class HealthConfig(Section):
    """Reaction to non-finite or spiking losses and gradients."""

    on_nan: Literal["stop", "skip"] = option(
        "stop",
        "A non-finite loss or gradient; stop: end the run (its checkpoints are from before); skip: leave the batch out "
        "and count it.",
        resumable=True,
    )
    on_spike: Literal["ignore", "stop", "skip"] = option(
        "ignore",
        "A loss or gradient norm far above its running mean: ignore it, stop the run, or skip the batch.",
        resumable=True,
    )
    deviations: float = option(
        6.0, "Standard deviations above the running mean that count as a spike.", resumable=True, gt=0
    )
    window: int = option(128, "Steps that the running mean and deviation cover (approximate).", resumable=True, ge=2)
    warmup_steps: int = option(100, "Healthy steps before spikes are detected.", resumable=True, ge=2)
    max_skips: int = option(10, "Consecutive skipped batches that stop the run.", resumable=True, ge=1)


class LogConfig(Section):
    """Progress output and metrics loggers."""

    every: int = option(50, "Steps between progress lines where there is no terminal.", resumable=True, ge=1)
    layers: int = option(
        0,
        "Steps between rows of layers.jsonl (norms of each layer's gradient, weights and update); 0: none.",
        resumable=True,
        ge=0,
    )
    profile: str = option(
        "", "Steps FIRST:LAST that jax.profiler traces to profile/ in the run; empty: none.", resumable=True
    )
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), "Where metrics go besides metrics.jsonl; needs pip install 'slm_jax[logging]'.", resumable=True
    )


class MeshConfig(Section):
    """Device mesh: data x fsdp x tensor devices."""

    data: int = option(
        0, "Devices that the batch is split over (data parallelism); 0: all remaining ones.", execution=True, ge=0
    )
    fsdp: int = option(
        1, "Devices that the batch, the parameters and the optimizer state are split over (FSDP).", execution=True, ge=1
    )
    tensor: int = option(
        1,
        "Devices that each layer is split over (tensor parallelism): heads, inner width, vocabulary.",
        execution=True,
        ge=1,
    )


def _section(kind: type[Section]) -> Any:
    """Declare a section of the config with its defaults; its description is the docstring of its class."""
    return option(kind(), str(kind.__doc__))


class Sections(Section):
    """Sections of a config, with all options."""

    model: ModelConfig = _section(ModelConfig)
    optimizer: OptimizerConfig = _section(OptimizerConfig)
    train: TrainConfig = _section(TrainConfig)
    data: DataConfig = _section(DataConfig)
    tokenizer: TokenizerConfig = _section(TokenizerConfig)
    init: InitConfig = _section(InitConfig)
    lora: LoraConfig = _section(LoraConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig)
    eval: EvalConfig = _section(EvalConfig)
    health: HealthConfig = _section(HealthConfig)
    log: LogConfig = _section(LogConfig)
    mesh: MeshConfig = _section(MeshConfig)

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Return the pydantic fields of all options by dotted name, in order."""
        sections = {name: field.annotation for name, field in cls.model_fields.items()}
        return {f"{name}.{key}": field for name, kind in sections.items() for key, field in kind.model_fields.items()}  # type: ignore[union-attr]

    @classmethod
    def fields_with(cls, trait: Trait) -> frozenset[str]:
        """Return the dotted names of the options with a trait, such as `resumable`.

        Args:
            trait: A parameter of `option`.
        """
        if trait not in TRAITS:
            raise ValueError(f"unknown trait {trait!r}: one of {', '.join(TRAITS)}")
        return frozenset(name for name, field in cls.fields().items() if trait in traits_of(field))

    def flat(self) -> dict[str, Any]:
        """Return the values of all options by dotted name, in order."""
        return {f"{name}.{key}": value for name, section in self for key, value in section}
