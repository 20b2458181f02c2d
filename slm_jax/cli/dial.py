"""The options `--size` and `--budget` of the commands: the rule applied to the text, the machine and what is given."""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from slm_jax.cli.base_model import Base, base_command, choose_base, is_shared, require_same_base
from slm_jax.cli.flags import Flag
from slm_jax.cli.options import make_config, nested
from slm_jax.config.dial import AUTO, Budget, parse_budget, parse_size
from slm_jax.config.presets import read_preset
from slm_jax.config.rule import OPTIONS, Recipe, Request, make_recipe
from slm_jax.config.schema import Config, format_problems
from slm_jax.config.shape import parameters_of
from slm_jax.data.sources.files import ROW_FORMATS, file_format, find_files, is_compressed
from slm_jax.distributed import multihost
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import text_table

logger = logging.getLogger(__name__)

# Share of the fastest matrix product that a training step reaches, to estimate a size from a time; the speed trial
# then measures the step itself. quickstart reaches 0.45 on two CPU cores.
_UTILIZATION = 0.4
_TEXTS = {"python-docs": 2_400_000}  # bytes of training text of sources whose size is known
_BYTES_PER_PARAMETER = 16  # weight, gradient and two moments, float32
_TRAIN = "python -m slm_jax.train"
_MARGIN = 1.05  # text that is prepared, as a multiple of the tokens that are trained on
_TIMED_MARGIN = 4.0  # where the speed trial may choose more tokens than estimated
_OTHER_SIZE = 0.02  # a difference of the number of parameters that is worth a note
_SAME_SIZE = 0.1  # a run has the size that is asked for if it differs by at most this


@dataclass(frozen=True)
class DialOptions:
    """Size and budget: shape, text length, batch, rates and intervals follow from one rule, are printed with their
    reasons, and are saved in the run. They replace those of --config, which keeps its text and all other options;
    options of the command line win over both."""

    size: Annotated[str, Flag(metavar="N")] = ""
    """Parameters of the model: 10M, 2.5M, 1B. Alone: 20 tokens for each, at most 4 epochs of a text of known size.
    auto: as many as your own text files suffice for, with dropout and an early stop against overfitting."""
    budget: Annotated[str, Flag(metavar="TIME|FLOPS|TOKENS")] = ""
    """Length of the training: 10min, 2h (on this machine), 1e18 (FLOPs) or '2B tokens'. Alone: the size follows too."""
    base: Annotated[str, Flag(metavar="RUN|auto|none")] = ""
    """With --size auto: start from the weights, shape and tokenizer of a run; auto: a finished one in runs/ whose
    tokenizer suits the text; none: do not search. By default such a run is only named, with the command to use."""

    def __bool__(self) -> bool:
        return bool(self.size or self.budget or self.base)

    @property
    def is_auto(self) -> bool:
        """True if the size follows from the text."""
        return self.size.strip().lower() == AUTO


NO_DIAL = DialOptions()


def apply_rule(
    dial: DialOptions,
    overrides: dict[str, Any],
    preset: str = "",
    speed: Callable[[Config], float] | None = None,
    run: str = "",
) -> dict[str, Any]:
    """Return the options of the command line together with those that the rule chooses, and print these.

    Args:
        dial: Values of `--size` and `--budget`; with neither, the options are returned as they are.
        overrides: Options of the command line by dotted name; they are kept.
        preset: Value of `--config`, which the text comes from.
        speed: Returns the model FLOPs per second of this machine; None: a time is refused.
        run: Value of `--run` of training, for the command that starts from a base.

    Raises:
        UserError: A value is wrong, or does not fit the other options.
    """
    if not dial:
        return overrides
    size = parse_size(dial.size) if dial.size and not dial.is_auto else 0.0
    _require_new_model(dial, overrides)
    tree = _valid_options(overrides, preset)
    budget, flops = _budget(dial, overrides, preset, speed)
    data = tree.get("data", {})
    text_bytes = bytes_of_text(data, overrides)
    base: Base | None = None
    lines: list[str] = []
    if dial.is_auto:
        if not text_bytes:
            raise UserError(
                "--size auto needs a text whose size is known, plain text files that are neither empty nor "
                "compressed: give a number, --size 10M"
            )
        own = {"config": preset, "budget": dial.budget, "run": run}
        base, lines = _base(dial, overrides, own, data)
    model = tree.get("model", {})
    kept = {f"model.{name}": model[name] for name in ("tie_weights",) if name in model}
    initial = base.options() if base else {}
    named = overrides.get("tokenizer.path", tree.get("tokenizer", {}).get("path", ""))
    recipe = make_recipe(
        Request(
            parameters=size,
            auto=dial.is_auto,
            tuned=base is not None,
            flops=flops,
            tokens=budget.tokens,
            minutes=overrides.get("train.minutes") or budget.seconds / 60,
            text_bytes=text_bytes,
            vocab_size=base.vocab_size if base else _vocabulary(named),
            bytes_per_token=base.bytes_per_token if base else 0.0,
            given={**kept, **initial, **overrides},
        )
    )
    options = {**initial, **_chosen_options(recipe, overrides, tree), **overrides}
    vocab_size = base.vocab_size if base else 0
    recipe = _with_note_of_other_size(recipe, make_config(options, preset), vocab_size)
    print("\n".join([as_text(recipe), *lines]), file=sys.stderr)
    return options


def _require_new_model(dial: DialOptions, overrides: dict[str, Any]) -> None:
    """Refuse initial weights that the rule does not know.

    Raises:
        UserError: The options name some.
    """
    if started := next((name for name in ("init.from_run", "init.from_hf") if overrides.get(name)), ""):
        other = f", or give --size auto --base {overrides[started]}" if started == "init.from_run" else ""
        raise UserError(
            f"--size and --budget choose a new model, but --{started} starts with an existing one: leave them out and "
            f"give --train.steps or --train.minutes{other}"
        )
    _require_size_auto(dial)


def _require_size_auto(dial: DialOptions) -> None:
    """Raise UserError if `--base` is given without `--size auto`."""
    if dial.base and not dial.is_auto:
        other = "" if dial.base in ("auto", "none") else f", or --init.from_run {dial.base}"
        raise UserError(f"--base {dial.base} belongs to --size auto: give both{other}")


def _budget(
    dial: DialOptions, overrides: dict[str, Any], preset: str, speed: Callable[[Config], float] | None
) -> tuple[Budget, float]:
    """Return the budget, and the FLOPs that it stands for; 0: none, or tokens.

    Raises:
        UserError: It is no budget, or a time and there is no speed.
    """
    budget = parse_budget(dial.budget) if dial.budget else Budget()
    minutes = 0.0 if "train.steps" in overrides else overrides.get("train.minutes", 0.0)
    if minutes and not dial.budget and speed is not None and multihost.process_count() == 1:
        budget = Budget(seconds=60 * minutes)
    if not budget.seconds:
        return budget, budget.flops
    if speed is None:
        raise UserError(f"--budget {dial.budget}: the time is that of this machine; give FLOPs, or tokens")
    return budget, budget.seconds * speed(Config.load(preset or "quickstart"))


def _base(
    dial: DialOptions, overrides: dict[str, Any], own: dict[str, str], data: dict[str, Any]
) -> tuple[Base | None, list[str]]:
    """Return the run to start from, None for random weights, and lines about it or about one that is available.

    Args:
        dial: Value of `--base`.
        overrides: Options of the config by dotted name.
        own: The other options of the command, for the command that starts from a base.
        data: The section `data` of the preset.
    """
    base, lines = choose_base(dial.base, _files(data, overrides))
    if base is None or dial.base:
        return base, lines
    return None, [*lines, f"to start from it:  {base_command(_TRAIN, base, own, overrides)}"]


def _chosen_options(recipe: Recipe, overrides: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a recipe, with either steps or minutes, and as much text of a preset as they need."""
    chosen = {name: choice.value for name, choice in recipe.options.items()}
    if "train.steps" in overrides:
        chosen.pop("train.minutes", None)
    elif "train.minutes" in chosen or overrides.get("train.minutes"):
        del chosen["train.steps"]  # an estimate, for rates and intervals
    limit = tree.get("data", {}).get("max_tokens", 0)
    if limit and "data.max_tokens" not in overrides:  # of a preset, whose own training it is enough for
        timed = bool(chosen.get("train.minutes") or overrides.get("train.minutes"))  # the tokens are an estimate
        chosen["data.max_tokens"] = math.ceil((_TIMED_MARGIN if timed else _MARGIN) * recipe.tokens)
    return chosen


def _valid_options(overrides: dict[str, Any], preset: str) -> dict[str, Any]:
    """Return the preset, after the values that the rule computes with were checked, each by itself.

    Raises:
        UserError: Values are invalid; lists every problem.
    """
    tree = read_preset(preset or "quickstart")
    merged = dict(tree)
    for section, fields in nested(overrides).items():
        present = tree.get(section, {})
        if isinstance(present, dict):
            merged[section] = {**present, **fields}
    if problems := Config.single_problems(merged):
        raise UserError(format_problems(preset or "config", problems))
    return tree


def _with_note_of_other_size(recipe: Recipe, config: Config, vocab_size: int) -> Recipe:
    """Return a recipe with a note if given options, which the rule does not know, change the number of parameters.

    Args:
        recipe: The recipe.
        config: All options.
        vocab_size: Entries of the tokenizer of the initial weights; 0: the tokenizer is that of the options.
    """
    from slm_jax.performance.flops import parameters  # imports JAX: errors are reported without waiting for it

    count = parameters(config.model, vocab_size or _vocabulary_of(config))
    if math.isclose(count, recipe.parameters, rel_tol=_OTHER_SIZE):
        return recipe
    note = (
        f"with the given options the model has {count:,} parameters, not {recipe.parameters:,}: length, batch and "
        "rates are those of the latter"
    )
    return replace(recipe, notes=(*recipe.notes, note))


def as_text(recipe: Recipe) -> str:
    """Return a recipe as a table of option, value and reason."""
    rows = [("option", "value", "reason")]
    rows += [
        (name, _value(choice.value), choice.reason)
        for name, choice in recipe.options.items()
        if name not in ("model.kv_heads", "model.head_dim")  # replace those of a preset, and are 0
    ]
    tokens = f"{recipe.tokens:,} tokens, {recipe.tokens / recipe.parameters:.1f} per parameter"
    total = f"{recipe.parameters:,} parameters, {tokens}, {recipe.flops:.2e} FLOPs"
    return "\n".join([text_table(rows, right=[1]), total, *(f"note: {note}" for note in recipe.notes)])


def keep_saved(dial: DialOptions, overrides: dict[str, Any], run: Run) -> dict[str, Any]:
    """Return the options of the command line for a run that exists: what the rule decided then stays as it is.

    Args:
        dial: Values of `--size`, `--budget` and `--base`.
        overrides: Options of the command line by dotted name.
        run: The run.

    Raises:
        UserError: The run has another size or other initial weights than those that are asked for.
    """
    if not dial:
        return overrides
    _require_size_auto(dial)
    if dial.budget:
        parse_budget(dial.budget)
    saved = run.read_config()
    # The file of a named tokenizer may have moved since; of a learned one the size counts that was asked for.
    copied = saved.tokenizer.path and run.tokenizer.is_file()
    parameters = parameters_of(saved, _vocabulary(str(run.tokenizer)) if copied else _vocabulary_of(saved))
    if dial.size and not dial.is_auto and not math.isclose(parameters, parse_size(dial.size), rel_tol=_SAME_SIZE):
        raise UserError(
            f"{run.path} is a run of about {parameters:,.0f} parameters: --size {dial.size} needs another --run"
        )
    if dial.base:
        require_same_base(dial.base, run, saved)
    given = [f"--{name}" for name, value in vars(dial).items() if value]
    logger.info("%s exists and keeps its options: ignoring %s", run.path, " and ".join(given))
    flat = saved.flat()
    length = {"train.steps", "train.minutes"}
    kept = {name: flat[name] for name in (*OPTIONS, "data.max_tokens") if name not in length}
    if saved.init.from_run:  # the model and the tokenizer are those of --base
        kept |= {name: value for name, value in flat.items() if is_shared(name)}
    if not length & overrides.keys():
        name = "train.minutes" if saved.train.minutes else "train.steps"
        kept[name] = flat[name]
    return {**kept, **overrides}


def measured_speed(config: Config) -> float:
    """Return about the model FLOPs per second that training reaches on the devices of this machine.

    Raises:
        UserError: Several processes train together.
    """
    if multihost.process_count() > 1:
        raise UserError(
            "a time as --budget is measured by one process: give FLOPs or tokens, or --size and --train.minutes"
        )
    from slm_jax.distributed import sharding
    from slm_jax.performance.roofline import mfu_baseline
    from slm_jax.utils.process import tune_process

    tune_process(config.train.deterministic)
    mesh = sharding.make_mesh(config)
    return _UTILIZATION * mfu_baseline(config, config.tokenizer.vocab_size, mesh).flops


def require_memory(dial: DialOptions, config: Config) -> None:
    """Refuse a size whose weights and optimizer state alone do not fit into memory; names one that fits.

    On CPUs and single devices; a step that needs more than its state is refused when it is compiled.

    Raises:
        UserError: It does not fit.
    """
    if not dial or multihost.process_count() > 1:  # devices of several processes are opened by all together
        return
    from slm_jax.utils.memory import free_host_memory
    from slm_jax.utils.process import tune_process

    tune_process(config.train.deterministic)
    import jax

    from slm_jax.performance import flops

    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    free = free_host_memory() if device.platform == "cpu" else statistics.get("bytes_limit", 1 << 62)
    parameters = flops.parameters(config.model, _vocabulary_of(config))
    needed = _BYTES_PER_PARAMETER * parameters / (config.mesh.fsdp * config.mesh.tensor)
    if needed > free:
        fits = free / needed * parameters / 2
        raise UserError(
            f"{parameters / 1e6:,.0f}M parameters take {needed / 1e9:.1f} GB for weights, gradients and optimizer, but "
            f"{free / 1e9:.1f} GB of memory are free: --size {fits / 1e6:,.0f}M fits"
        )


def bytes_of_text(data: dict[str, Any], overrides: dict[str, Any]) -> int:
    """Return about the bytes of the training text, 0 if they are not known before it is read."""

    def value(name: str, default: Any) -> Any:
        return overrides.get(f"data.{name}", data.get(name, default))

    # The max_tokens of a preset follows from the training tokens, see apply_rule.
    if any(value(name, 0) for name in ("mix", "max_documents")) or overrides.get("data.max_tokens"):
        return 0
    if files := _files(data, overrides):
        paths = find_files(files)
        if any(is_compressed(path) or file_format(path) in ROW_FORMATS for path in paths):
            return 0  # such files hold more than their text, or less
        held_out = value("validation_fraction", Config().data.validation_fraction)
        return round((1 - held_out) * sum(path.stat().st_size for path in paths))
    return _TEXTS.get(value("source", "python-docs"), 0)


def _files(data: dict[str, Any], overrides: dict[str, Any]) -> Sequence[str]:
    """Return the paths and patterns of the text files, none if the text is of another kind."""
    files = overrides.get("data.files", () if "data.source" in overrides else data.get("files", ()))
    return [files] if isinstance(files, str) else files


def _vocabulary(path: str) -> int:
    """Return the entries of a named tokenizer, 0 if none is named and one is learned."""
    if not path:
        return 0
    from slm_jax.data.load import load_tokenizer

    return load_tokenizer(path).vocab_size


def _vocabulary_of(config: Config) -> int:
    """Return the entries of the tokenizer of a config; at most that many if it is learned."""
    return _vocabulary(config.tokenizer.path) or config.tokenizer.vocab_size


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
