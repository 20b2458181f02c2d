"""Options of the commands: their own, declared as dataclasses, and those of the config, `--section.option value`.

Only names and types are checked here; bounds and cross-field rules are those of `Config.from_tree`, so that a TOML
file and a command line get the same messages, all at once.
"""

import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from slm_jax.cli import bare_words
from slm_jax.cli.flags import Flag, InvalidValuesError, Option, build, command_options, config_options, parse
from slm_jax.cli.help import help_text, wrapped
from slm_jax.config.finetuning import fine_tuning_settings
from slm_jax.config.presets import read_preset
from slm_jax.config.recipes import overridable
from slm_jax.config.schema import Config, ModelConfig, TrainConfig
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError

__all__ = [
    "SINGLE_HOST",
    "Flag",
    "MultihostOptions",
    "config_from_args",
    "make_config",
    "nested",
    "read_options",
    "read_options_and_config",
    "wrapped",
]

Options = TypeVar("Options")
Tree = dict[str, Any]


@dataclass(frozen=True)
class MultihostOptions:
    """Several hosts: the same command on each, with the same file system. Processes find each other under Slurm and
    Open MPI, on Kubernetes (pip install kubernetes) and on TPU slices; elsewhere give all three options."""

    coordinator: Annotated[str | None, Flag(metavar="HOST:PORT")] = None
    """Address of the first process."""
    processes: Annotated[int | None, Flag(metavar="N")] = None
    """Number of processes; 1: do not join others."""
    process: Annotated[int | None, Flag(metavar="I")] = None
    """Number of this process, from 0."""


SINGLE_HOST = MultihostOptions()


def read_options(kind: type[Options], args: Sequence[str] | None, prog: str) -> Options:
    """Parse the command line of a command without a config.

    `--help` prints the docstring of `kind` and its options, and exits.

    Args:
        kind: The option dataclass of the command.
        args: The command line; None: that of the process.
        prog: The command, named in the help.

    Raises:
        UserError: An unknown option, or a wrong or missing value.
    """
    args = list(sys.argv[1:] if args is None else args)
    options = list(command_options(kind))
    _show_help(args, inspect.getdoc(kind) or "", prog, options)
    return build(kind, options, parse(options, args))


def read_options_and_config(
    kind: type[Options],
    args: Sequence[str] | None,
    prog: str,
    description: str = "",
    preset: str = "quickstart",
    files: bool = False,
    used: tuple[str, ...] = ("",),
) -> tuple[Options, Tree]:
    """Parse the command line of a command that takes every option of the config as well.

    Args:
        kind: The option dataclass of the command.
        args: The command line; None: that of the process.
        prog: The command, named in the help.
        description: Description in the help; empty: the docstring of `kind`.
        preset: Preset whose values the help shows as defaults if the command line names none; empty: no preset.
        files: Words without the name of an option are values of `data.files`.
        used: How the names of the config's options begin that the command uses. The help lists only these; the others
            are accepted, so that the command line of a run can be given.

    Returns:
        The command's own options, and the given options of the config by dotted name.

    Raises:
        UserError: An unknown option, or a wrong or missing value.
    """
    args = list(sys.argv[1:] if args is None else args)
    own = list(command_options(kind))
    listed = [option for option in config_options(_shown_preset(args, preset)) if option.name.startswith(used)]
    _show_help(args, description or inspect.getdoc(kind) or "", prog, [*own, *_with_files(listed, files)])
    names = {option.name for option in own}
    try:
        given = parse([*own, *_with_files(config_options({}), files)], args)
    except InvalidValuesError as error:
        valid = {name: value for name, value in error.valid.items() if name not in names}
        # Bounds of the other values are reported at the same time; rules between options need all values.
        raise InvalidValuesError([*error.problems, *Config.single_problems(nested(valid))], valid) from None
    overrides = {name: value for name, value in given.items() if name not in names}
    return build(kind, own, given), overrides


def _with_files(options: Iterable[Option], files: bool) -> Iterator[Option]:
    """Yield the options of the config; if `files`, `data.files` takes the words without the name of an option."""
    for option in options:
        is_files = files and option.name == "data.files"
        yield replace(option, flag=Flag(metavar="FILE …", bare=bare_words.text_files)) if is_files else option


def _show_help(args: Sequence[str], description: str, prog: str, options: Sequence[Option]) -> None:
    """Print the help and exit if the command line asks for it."""
    for i, arg in enumerate(args):
        if arg in ("-h", "--help"):
            topic = args[i + 1] if i + 1 < len(args) and not args[i + 1].startswith("-") else ""
            print(help_text(description, prog, options, topic))
            raise SystemExit(0)


def _shown_preset(args: Sequence[str], preset: str) -> Tree:
    """Return the preset whose values the help shows as defaults; nothing if no help is asked for."""
    if not {"-h", "--help"} & set(args):
        return {}
    names = [value for arg, value in itertools.pairwise(args) if arg == "--config"]
    names += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
    name = next(iter(names), preset)
    return read_preset(name, curricula=True) if name else {}


@dataclass(frozen=True)
class _ConfigOptions:
    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file; the options of the config override it."""


def config_from_args(args: Sequence[str], prog: str, description: str, base: Tree | None = None) -> Config:
    """Return the config of a command line that has no other options.

    Args:
        args: The command line.
        prog: The command, named in the help.
        description: Its description in the help.
        base: Values below the overrides where no preset is given; None: those of the preset quickstart.

    Raises:
        UserError: The command line or the config is invalid.
    """
    options, overrides = read_options_and_config(_ConfigOptions, args, prog, description)
    return make_config(overrides, options.config, base)


def make_config(overrides: dict[str, Any], preset: str = "", base: Tree | None = None) -> Config:
    """Return the config of a preset or of `base`, with overrides.

    With `init.from_run` or `init.from_hf`, and without a preset, the model is that of the run or folder. Without a
    preset, the optimizer has the settings for fine-tuning with `init.from_hf`, adapters or preferences. With
    `lora.from_peft` the adapters are those of the folder.

    Args:
        overrides: Values by dotted name.
        preset: Name or path of a preset; empty: none.
        base: Values below the overrides where no preset is given; None: those of the preset quickstart.

    Raises:
        UserError: The preset cannot be read, or the values are invalid; lists every problem.
    """
    if "train.steps" in overrides:
        if overrides.get("train.minutes"):
            raise UserError("train.steps and train.minutes are both given, but minutes choose the steps: leave one out")
        overrides = {**overrides, "train.minutes": 0.0}  # of a preset or an existing run
    if preset or base is None:
        tree = dict(read_preset(preset or "quickstart"))
    else:
        tree = dict(base)
    if not preset and base is None:
        tree |= _initial_sections(overrides, tree)
    if base is None:
        tree["lora"] = _adapter_options(overrides, tree)
    data = tree.get("data")
    if {"data.files", "data.mix"} & overrides.keys() and "data.source" not in overrides and isinstance(data, dict):
        tree["data"] = {name: value for name, value in data.items() if name != "source"}  # overridden as well
    if isinstance(tree.get("model"), dict):
        source = preset or overrides.get("init.from_run") or ("the saved config" if base else "quickstart")
        tree["model"] = overridable(tree["model"], nested(overrides).get("model", {}), str(source))
    for section, fields in nested(overrides).items():
        present = tree.get(section, {})
        if isinstance(present, dict):  # from_tree reports anything else
            tree[section] = {**present, **fields}
    return Config.from_tree(tree, origin=preset or "config")


def _initial_sections(overrides: dict[str, Any], tree: Tree) -> Tree:
    """Return the sections that differ from those of `tree` for a run that starts with existing weights."""
    sections: Tree = {}
    if start := overrides.get("init.from_run"):
        sections["model"] = find_run(start, trained=True).read_options().get("model", {})
    elif folder := overrides.get("init.from_hf"):
        # Imports JAX, which is not needed to check other options.
        from slm_jax.huggingface.import_folder import open_folder

        sections["model"] = {**tree.get("model", {}), **open_folder(folder).model}
    rank = overrides.get("lora.rank", int(bool(overrides.get("lora.from_peft"))))
    objective = overrides.get("train.objective", "next-token")
    # Training all parameters of a run on with text: as that run was trained.
    if overrides.get("init.from_hf") or rank or objective != "next-token":
        steps = overrides.get("train.steps", tree.get("train", {}).get("steps", TrainConfig().steps))
        model: Tree = sections.get("model") or tree.get("model") or {}
        width = int(overrides.get("model.dim") or model.get("dim") or ModelConfig().dim)
        settings = fine_tuning_settings(steps, width, rank, objective)
        sections["optimizer"] = {**tree.get("optimizer", {}), **settings}
    return sections


def _adapter_options(overrides: dict[str, Any], tree: Tree) -> Any:
    """Return the section `lora` of `tree` with rank, alpha and targets of the folder `lora.from_peft`.

    Values of a preset that itself names the folder are kept, so that other ones are reported.
    """
    section = tree.get("lora", {})
    if not isinstance(section, dict):  # from_tree reports it
        return section
    folder = overrides.get("lora.from_peft", section.get("from_peft"))
    if not (folder and isinstance(folder, str)):
        return section
    from slm_jax.huggingface.peft_folder import open_adapters  # as in _initial_sections

    options = open_adapters(folder).options()
    return {**section, **options} if "lora.from_peft" in overrides else {**options, **section}


def nested(overrides: dict[str, Any]) -> Tree:
    """Return values by dotted name as nested dicts."""
    tree: Tree = {}
    for name, value in overrides.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree
