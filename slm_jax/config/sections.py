"""Every option of a run, by section.

The sections with the most options have files of their own: model_section.py, optimizer_section.py, data_section.py. A
new option is one field of its section: its type, default, bounds, a description with the unit, and its traits
(`option`). Nothing else declares options; presets, command-line flags, help and checks are derived from these fields.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic.fields import FieldInfo

from slm_jax.config.data_section import DataConfig, TokenizerConfig
from slm_jax.config.model_section import ModelConfig
from slm_jax.config.optimizer_section import OptimizerConfig
from slm_jax.config.option import TRAITS, Section, Strings, Trait, one_or_more, option, traits_of
from slm_jax.utils.extras import install_command

MAX_STEPS = 2**31 - 1  # steps are counted in int32


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
    minutes: float = option(
        0.0,
        "On a new run: choose train.steps such that training takes this many minutes on this machine, by a short speed "
        "trial; the run keeps that number. 0: train.steps as given.",
        common=True,
        resumable=True,
        ge=0,
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
        0.1, "With dpo: the smaller it is, the farther the model may move away from the reference.", gt=0
    )
    z_loss: float = option(0.0, "Weight of the z-loss, log(Z)^2, which keeps logits small.", ge=0)
    ul_alpha: float = option(0.0, "Weight of the unlikelihood loss on tokens that already occur in the context.", ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Compute precision (parameters stay float32); auto: bfloat16 where the hardware multiplies it faster, float16 "
        "on NVIDIA GPUs that multiply only that faster (T4, V100). float16 scales the loss (dynamic loss scaling).",
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
        "of the MLP.",
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
        "Maximum number of validation tokens; 0: all of them. In a mixture it is divided among the sources in "
        "proportion to their held-out text, whole documents and at least one of each.",
        ge=0,
    )
    prompts: Strings = option(
        ("",),
        "Prompts of the sample texts written at each validation; empty: a new document. Of a run trained on "
        "conversations they are messages of the user, and an empty one stands for a held-out question.",
        resumable=True,
    )
    sample_tokens: int = option(120, "Length of each sample text, in tokens; 0: no samples.", resumable=True, ge=0)
    tasks: Strings = option(
        (),
        "Tasks that are scored during training, named as for python -m slm_jax.evaluate --tasks (NAME or NAME=FILE); "
        "their data is read before training starts.",
        resumable=True,
    )
    tasks_every: int = option(
        0,
        "Steps between scores of the tasks, which the last step always has; 0: with each validation.",
        resumable=True,
        ge=0,
    )
    task_items: int = option(
        500,
        "Maximum number of items of each task, a random subset with a fixed seed; 0: all.",
        resumable=True,
        ge=0,
    )


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
        (), f"Where metrics go besides metrics.jsonl; needs {install_command('logging')}.", resumable=True
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
