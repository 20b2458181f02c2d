"""Every option there is: one frozen tree, TOML presets, command-line overrides.

Precedence, lowest first: the defaults below, the preset (`--config NAME|PATH`), `--section.field value`.
A new option is one field here, with its type, default, unit and a one-line description; nothing else declares options.
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from slm_jax.config.checks import cross_checks
from slm_jax.config.presets import read_preset
from slm_jax.utils.errors import UserError

MAX_STEPS = 2**31 - 1  # an int32 counts them


class Section(BaseModel):
    """A frozen group of fields; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# A list of texts; one alone may be given without brackets.
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class ModelConfig(Section):
    """The Transformer's shape."""

    dim: int = Field(192, ge=8, description="Width of the residual stream.")
    depth: int = Field(4, ge=1, description="Number of blocks (attention + SwiGLU).")
    heads: int = Field(3, ge=1, description="Query heads; dim must be a multiple of it.")
    kv_heads: int = Field(0, ge=0, description="Key/value heads (grouped-query attention); 0: as many as heads.")
    mlp_dim: int = Field(768, ge=8, description="SwiGLU size; its inner width is 2/3 of it, rounded up.")
    mlp_multiple: int = Field(64, ge=1, description="The inner width is rounded up to a multiple of it.")
    window: int = Field(0, ge=0, description="Tokens that attention sees, itself included; 0 or >= the length: all.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate on embeddings and on each sub-layer's output.")
    tie_weights: bool = Field(True, description="Share the embedding with the output head.")
    qk_norm: bool = Field(True, description="RMSNorm on queries and keys, per head.")
    norm_eps: float = Field(1e-6, gt=0, description="Added to the mean square in each RMSNorm, under the root.")
    rope_base: float = Field(10_000.0, gt=1, description="Base of the rotary position frequencies.")
    vocab_multiple: int = Field(
        1, ge=1, description="Pad the embedding and the head to a multiple of so many rows (no token is added)."
    )
    attention: Literal["auto", "blocks", "cudnn", "splash", "naive"] = Field(
        "auto",
        description="auto: cudnn on NVIDIA GPUs, splash on TPUs, else blocks of queries; naive: all scores at once.",
    )
    scan_layers: bool = Field(
        False, description="One compiled block, looped over: compiles fast however deep, runs slower on CPU."
    )
    remat: Literal["none", "dots", "full"] = Field(
        "none",
        description="Activations computed again in the backward pass, to save memory: none; all but the results of "
        "linear layers (dots); all but each block's input (full).",
    )


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: Literal["muon", "adamw"] = Field(
        "muon", description="muon: Muon for hidden matrices, AdamW for the rest; adamw: AdamW for all."
    )
    lr: float = Field(0.01, gt=0, description="Peak learning rate (RMS-matched: AdamW and Muon share it).")
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warm-up from 0, counted in `train.steps`.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "wsd", description="After warm-up: cosine to the floor; stable then linear decay to the floor (wsd); constant."
    )
    decay_fraction: float = Field(0.5, gt=0, le=1, description="Share of the steps that wsd decays for, at the end.")
    final_lr_fraction: float = Field(0.0, ge=0, le=1, description="The floor, as a share of the peak.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of matrices; norm scales are never decayed.")
    clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0: no clipping.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second-moment decay.")


class TrainConfig(Section):
    """Length of the run, batch, precision."""

    steps: int = Field(1000, ge=1, le=MAX_STEPS, description="Optimizer steps in all, those before a resume included.")
    batch_size: int = Field(16, ge=1, description="Sequences per optimizer step, over all devices.")
    sequence_length: int = Field(256, ge=2, description="Tokens per sequence.")
    accumulation: int = Field(
        1, ge=1, description="Split each batch into so many parts, one after the other (less memory)."
    )
    microbatch: int | Literal["auto"] = Field(
        "auto",
        description="The same by size: sequences computed at once; auto: as many as fit into memory (`accumulation` "
        "parts or more).",
    )
    memory_gb: float = Field(
        0.0, ge=0, description="Memory of one device that a step may take, in 10^9 bytes; 0: what is free."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Initial weights, order of the data, dropout.")
    z_loss: float = Field(0.0, ge=0, description="Weight of log(Z)^2, which keeps logits small.")
    ul_alpha: float = Field(
        0.0, ge=0, description="Weight of the unlikelihood of repeating a token that the text already holds."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Compute precision (parameters stay float32); auto: bfloat16 where the hardware multiplies it.",
    )

    debug: bool = Field(
        False, description="Stop at the first NaN, and name the step and the operation that made it (slow)."
    )
    deterministic: bool = Field(
        False, description="GPUs: only operations that give the same bits each time (slower; CPUs and TPUs always do)."
    )

    @property
    def grad_accum_steps(self) -> int:
        """Parts that a batch is computed in, one after the other."""
        return self.accumulation if self.microbatch == "auto" else self.batch_size // self.microbatch


class DataConfig(Section):
    """Where the text comes from."""

    source: str = Field(
        "python-docs",
        description="python-docs or python-qa (inside every Python installation), files, a name such as tinystories "
        "(python -m slm_jax.data list), or hf:OWNER/NAME[:CONFIG][:SPLIT].",
    )
    files: Texts = Field(
        (), description="Text, JSONL or Parquet files, folders or globs ('my/**/*.txt'); implies source = files."
    )
    mix: Texts = Field(
        (), description="Several sources or globs instead, by share of the batches: 'python-docs=1' 'my/*.txt=3'."
    )
    separator: str = Field(
        "<|endoftext|>", description="A line that holds just this ends a document; empty: each file is one document."
    )
    document: Literal["file", "line"] = Field(
        "file", description="Text files: what is a document, a file (or a part up to a separator) or each line."
    )
    encoding_errors: Literal["strict", "replace"] = Field(
        "strict", description="Bytes that are not UTF-8: strict refuses the file, replace puts U+FFFD in their place."
    )
    text_field: str = Field("", description="Rows: the column of the text; empty: the source's own, or text.")
    template: str = Field(
        "", description="Rows as instructions: alpaca, or a prompt with {column}s ('{question}\\n'); empty: no prompt."
    )
    response_field: str = Field("", description="Instructions: the column of the response; empty: output.")
    loss_on: Literal["response", "all"] = Field(
        "response", description="Instructions: what is predicted, the response only or the prompt as well."
    )
    revision: str = Field("", description="Hub: a commit or branch; empty: the newest when the text is prepared.")
    max_documents: int = Field(0, ge=0, description="Documents to train on, of each source, at most; 0: all.")
    max_tokens: int = Field(0, ge=0, description="Tokens to train on, of each source, at most (about); 0: all.")
    deduplicate: bool = Field(True, description="Leave out exact repeats of a document.")
    validation_fraction: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Share of the documents held out for validation, chosen by a hash of each, where the source has "
        "no validation text of its own.",
    )
    mode: Literal["packed", "segmented", "padded"] = Field(
        "packed",
        description="packed: windows of full length that run across documents; segmented: the same, with attention "
        "inside each document only; padded: each document in rows of its own.",
    )
    cache: str = Field(
        "", description="Folder of prepared text, shared by all runs; empty: slm_jax/data in the user's cache folder."
    )
    workers: int = Field(0, ge=0, description="Processes that tokenize; 0: one for each core.")


class TokenizerConfig(Section):
    """The tokenizer: learned from the training text, or a given one."""

    path: str = Field("", description="A saved tokenizer or a ready-made one's name; empty: learn one from the text.")
    vocab_size: int = Field(2048, ge=300, le=65536, description="Ids of a learned tokenizer (at most).")
    lowercase: bool = Field(True, description="Learned: share one entry between the, The and THE (lossless).")
    byte_limit: int = Field(4, ge=1, le=16, description="Learned: longest base token, in UTF-8 bytes.")
    boundaries: Literal["words", "spaces"] = Field(
        "words",
        description="Learned: keep letters, digits and punctuation apart (words), or not: fewer tokens (spaces).",
    )


class InitConfig(Section):
    """What a run begins with."""

    from_run: str = Field(
        "",
        description="A run whose newest weights this one begins with, its tokenizer included (fine-tuning); empty: "
        "random weights.",
    )
    from_hf: str = Field(
        "",
        description="A folder of the Hugging Face layout to begin with: one that slm_jax.export wrote, or a Llama, "
        "Mistral or Qwen3 with a tokenizer of this project.",
    )
    optimizer: Literal["fresh", "carry"] = Field(
        "fresh",
        description="With from_run, the optimizer's moments: fresh, or those of that run (carry). The schedule begins "
        "anew.",
    )


class CheckpointConfig(Section):
    """When to save, how much to keep."""

    every: int = Field(200, ge=1, description="Steps between checkpoints; the last step is always saved.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    keep_best: int = Field(
        0, ge=0, description="Checkpoints of the best validations (bits per byte) saved and kept beside them; 0: none."
    )
    keep_every: int = Field(0, ge=0, description="Steps between checkpoints that are kept for ever; 0: none.")
    minutes: float = Field(
        0.0,
        ge=0,
        description="Save also when so many minutes have passed since the last time (machines that may be "
        "taken away); 0: never.",
    )
    folder: str = Field(
        "", description="Folder or bucket (gs://…, with gcsfs) of this run's checkpoints; empty: inside the run."
    )


class EvalConfig(Section):
    """Validation and samples during training."""

    every: int = Field(250, ge=1, description="Steps between validations; the last step is always validated.")
    max_tokens: int = Field(0, ge=0, description="Tokens validated on, at most; 0: all, whatever the tokenizer.")
    prompts: Texts = Field(
        ("",), description="Beginnings of the sample texts written at each validation; empty: of a new document."
    )
    sample_tokens: int = Field(120, ge=0, description="Length of each sample text; 0: none.")


class HealthConfig(Section):
    """What to do about a step whose loss or gradient is not finite, or far from what it has been."""

    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite: stop the run, whose checkpoints are from before it; or skip"
        " the batch and count it.",
    )
    on_spike: Literal["ignore", "stop", "skip"] = Field(
        "ignore", description="A loss or gradient norm far above its running mean: ignore it, stop, or skip the batch."
    )
    deviations: float = Field(6.0, gt=0, description="Standard deviations above the running mean that are a spike.")
    window: int = Field(128, ge=2, description="Steps that the running mean and deviation look back over (about).")
    warmup_steps: int = Field(100, ge=2, description="Healthy steps before anything is taken for a spike.")
    max_skips: int = Field(10, ge=1, description="Batches skipped one after the other that stop the run.")


class LogConfig(Section):
    """What is printed and written."""

    every: int = Field(50, ge=1, description="Steps between plain progress lines (when not a terminal).")
    layers: int = Field(
        0,
        ge=0,
        description="Steps between rows of layers.jsonl (norms of each layer's gradient, weights and update); 0: none.",
    )
    profile: str = Field(
        "", description="Steps FIRST:LAST of which jax.profiler writes a trace to profile/ in the run; empty: none."
    )
    sinks: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="Where rows go beside metrics.jsonl; needs pip install 'slm_jax[logging]'."
    )


class MeshConfig(Section):
    """Devices: data x fsdp x tensor of them."""

    data: int = Field(0, ge=0, description="Devices the batch is split over (data parallel); 0: all that are left.")
    fsdp: int = Field(1, ge=1, description="Devices that split the batch and hold a part of the parameters each.")
    tensor: int = Field(1, ge=1, description="Devices that split each layer: heads, inner width and vocabulary.")


class Config(Section):
    """Everything a run depends on."""

    model: ModelConfig = Field(ModelConfig(), description="The Transformer's shape.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="Optimizer and learning-rate schedule.")
    train: TrainConfig = Field(TrainConfig(), description="Length of the run, batch, precision.")
    data: DataConfig = Field(DataConfig(), description="Where the text comes from.")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="Learned from the training text, or given.")
    init: InitConfig = Field(InitConfig(), description="What a run begins with.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When to save, how much to keep.")
    eval: EvalConfig = Field(EvalConfig(), description="Validation and samples during training.")
    health: HealthConfig = Field(HealthConfig(), description="What to do about NaN and spikes.")
    log: LogConfig = Field(LogConfig(), description="What is printed and written.")
    mesh: MeshConfig = Field(MeshConfig(), description="Devices.")

    @classmethod
    def load(cls, preset: str | Path = "quickstart", **overrides: Any) -> "Config":
        """The preset (a name in `configs/` or a path to a TOML file) with overrides `{"train.steps": 10}` on top.

        Overrides are dotted names, given as `**{"train.steps": 10}` or with `__` for the dot: `train__steps=10`.
        Raises UserError that lists every problem found.
        """
        tree = read_preset(preset)
        for name, value in overrides.items():
            section, _, field = name.replace("__", ".").partition(".")
            if isinstance(tree.setdefault(section, {}), dict):  # else from_tree says so
                tree[section][field] = value
        return cls.from_tree(tree, origin=str(preset))

    @classmethod
    def from_tree(cls, tree: dict[str, Any], origin: str = "config") -> "Config":
        """A validated Config from nested dicts; raises UserError with every problem, one a line."""
        config, problems = cls.check(tree)
        if problems or config is None:
            raise UserError(as_list(origin, problems))
        return config

    @classmethod
    def check(cls, tree: dict[str, Any]) -> tuple["Config | None", list[str]]:
        """The Config of nested dicts and every problem that it has; None where fields are themselves wrong."""
        tree = _files_imply_source(tree)
        try:
            config = cls.model_validate(tree)
        except pydantic.ValidationError as error:
            found: dict[str, str] = {}
            for item in error.errors():
                name = ".".join(str(part) for part in item["loc"][:2])
                # A field of several types has an error for each.
                found[name] = f"{found[name]}, or {_expected(item)}" if name in found else explain(name, item)
            problems, bad = list(found.values()), set(found)
            # Fields that are themselves wrong take no part in the cross-field checks; all others still do.
            rest = {
                section: {k: v for k, v in fields.items() if f"{section}.{k}" not in bad}
                for section, fields in tree.items()
                if section in cls.model_fields and section not in bad and isinstance(fields, dict)
            }
            problems += [text for fields, text in cross_checks(cls.model_validate(rest)) if not bad & set(fields)]
            return None, problems
        return config, [text for _, text in cross_checks(config)]

    def to_toml(self) -> str:
        """The whole tree as TOML, each field with its description; `from_tree(tomllib.loads(...))` restores it."""
        lines = []
        for section_name, section in self:
            lines.append(f"[{section_name}]")
            for name, info in type(section).model_fields.items():
                value = getattr(section, name)
                text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
                text = text.replace("\x7f", "\\u007f")  # which TOML has no literal for
                lines.append(f"{name} = {text}  # {info.description}")
            lines.append("")
        return "\n".join(lines)

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Fields that differ, `{"train.steps": (mine, theirs)}`."""
        mine, theirs = self.flat(), other.flat()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    def flat(self) -> dict[str, Any]:
        """All fields by dotted name, in order."""
        return {f"{s}.{f}": v for s, section in self for f, v in section}


def as_list(origin: str, problems: list[str]) -> str:
    """Problems as the text of one error."""
    if len(problems) == 1:
        return f"{origin}: {problems[0]}"
    return "\n".join([f"{origin}: {len(problems)} problems:", *(f"  - {p}" for p in problems)])


def explain(name: str, item: Any) -> str:
    """One pydantic error as one sentence, with the nearest name for an unknown one."""
    if item["type"] == "extra_forbidden":
        return unknown_key(name)
    if item["type"] == "missing":
        return f"{name} is missing"
    return f"{name} = {item['input']!r}: should be {_expected(item)}"


def _expected(item: Any) -> str:
    text = item["msg"].removeprefix("Input should be ").replace("a valid tuple", "a list of texts")
    return text.removesuffix(", unable to parse string as an integer")


def unknown_key(name: str) -> str:
    """The sentence for a name that is no field, with the nearest one that is."""
    fields = list(Config().flat())
    # The right field under the wrong section, or the nearest spelling.
    near = [f for f in fields if f.partition(".")[2] == name.rpartition(".")[2]]
    others = fields if "." in name else [*Config.model_fields, "config", "run", "resume"]
    near = near or difflib.get_close_matches(name, others, n=1, cutoff=0.5)
    return f"unknown key {name}" + (f", perhaps you meant {near[0]}" if near else "")


def _files_imply_source(tree: dict[str, Any]) -> dict[str, Any]:
    data = tree.get("data")
    if isinstance(data, dict) and data.get("files") and "source" not in data:
        return {**tree, "data": {**data, "source": "files"}}
    return tree
