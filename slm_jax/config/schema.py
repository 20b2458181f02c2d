"""Config of a run: one frozen tree of options from a preset, overrides and defaults.

Precedence, lowest first: the defaults in `sections`, the preset (`--config NAME|PATH`), overrides
(`--section.option value`). All invalid values are reported at once.
"""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from slm_jax.config.checks import cross_checks
from slm_jax.config.data_section import DataConfig, TokenizerConfig
from slm_jax.config.model_section import ModelConfig
from slm_jax.config.optimizer_section import OptimizerConfig
from slm_jax.config.presets import read_preset
from slm_jax.config.recipes import overridable, with_recipe
from slm_jax.config.sections import MAX_STEPS, CheckpointConfig, HealthConfig, LoraConfig, Sections, TrainConfig
from slm_jax.utils.errors import UserError

__all__ = [
    "MAX_STEPS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "HealthConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "describe_error",
    "format_problems",
    "nearest_name",
    "unknown_option",
]

Tree = dict[str, Any]


class Config(Sections):
    """Everything that a run depends on.

    `Config()` has the defaults of all options; `Config.load` reads a preset and applies overrides. Instances are
    immutable: `model_copy(update=…)` makes a changed copy.
    """

    @classmethod
    def load(cls, preset: str | Path = "quickstart", **overrides: Any) -> "Config":
        """Load a preset and apply overrides.

        Args:
            preset: Name of a preset in `configs/`, or path of a TOML file.
            **overrides: Values by dotted name, `**{"train.steps": 10}` or `train__steps=10`.

        Returns:
            The validated config.

        Raises:
            UserError: The preset cannot be read, or the values are invalid; lists every problem.
        """
        tree = read_preset(preset)
        given = {field: value for name, value in overrides.items() if (field := _model_option(name))}
        if isinstance(tree.get("model"), dict):
            tree["model"] = overridable(tree["model"], given, str(preset))
        for name, value in overrides.items():
            section, _, field = name.replace("__", ".").partition(".")
            if isinstance(tree.setdefault(section, {}), dict):  # from_tree reports anything else
                tree[section][field] = value
        return cls.from_tree(tree, origin=str(preset))

    @classmethod
    def from_tree(cls, tree: Tree, origin: str = "config") -> "Config":
        """Validate a config given as nested dicts.

        Args:
            tree: Values by section and option, as in a TOML file.
            origin: Source of the values, named in error messages.

        Raises:
            UserError: The values are invalid; lists every problem.
        """
        config, problems = cls.check(tree)
        if problems or config is None:
            raise UserError(format_problems(origin, problems))
        return config

    @classmethod
    def check(cls, tree: Tree) -> tuple["Config | None", list[str]]:
        """Validate a config given as nested dicts, without raising.

        Returns:
            The config, None if single values are invalid, and all problems. Cross-field checks also run on the
            values that are valid by themselves.
        """
        tree = with_recipe(_with_implied_source(tree))
        try:
            config = cls.model_validate(tree)
        except pydantic.ValidationError as error:
            return None, cls._problems(tree, error)
        return config, [text for _, text in cross_checks(config)]

    @classmethod
    def _problems(cls, tree: Tree, error: pydantic.ValidationError) -> list[str]:
        """Return the problems of single options, then those between the other options."""
        messages = _single_problems(error)
        valid = {
            section: {key: value for key, value in fields.items() if f"{section}.{key}" not in messages}
            for section, fields in tree.items()
            if section in cls.model_fields and section not in messages and isinstance(fields, dict)
        }
        across = cross_checks(cls.model_validate(valid))
        return [*messages.values(), *(text for names, text in across if not messages.keys() & set(names))]

    @classmethod
    def single_problems(cls, tree: Tree) -> list[str]:
        """Return the problems of single options given as nested dicts, none of those between options."""
        try:
            cls.model_validate(tree)
        except pydantic.ValidationError as error:
            return list(_single_problems(error).values())
        return []

    def to_toml(self) -> str:
        """Return the config as TOML with the description of each option as a comment.

        `Config.from_tree(tomllib.loads(text))` restores it.
        """
        lines = []
        for section_name, section in self:
            lines.append(f"[{section_name}]")
            for name, field in type(section).model_fields.items():
                value = getattr(section, name)
                text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
                text = text.replace("\x7f", "\\u007f")  # the one character that JSON leaves bare and TOML forbids
                lines.append(f"{name} = {text}  # {field.description}")
            lines.append("")
        return "\n".join(lines)

    def differences(self, other: "Config") -> dict[str, tuple[Any, Any]]:
        """Return the options that differ: `{"train.steps": (value here, value in other)}`."""
        own, others = self.flat(), other.flat()
        return {name: (own[name], others[name]) for name in own if own[name] != others[name]}


def _single_problems(error: pydantic.ValidationError) -> dict[str, str]:
    """Return the message for each invalid option by its dotted name."""
    messages: dict[str, str] = {}
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"][:2])
        if name in messages:  # an option of several types has one error per type
            messages[name] += f", or {_expectation(item)}"
        else:
            messages[name] = describe_error(name, item)
    return messages


def format_problems(origin: str, problems: list[str]) -> str:
    """Return the text of one error: a single problem on one line, several as a list."""
    if len(problems) == 1:
        return f"{origin}: {problems[0]}"
    return "\n".join([f"{origin}: {len(problems)} problems:", *(f"  - {problem}" for problem in problems)])


def describe_error(name: str, item: Any) -> str:
    """Return the message of one pydantic error.

    Args:
        name: Dotted name of the option.
        item: An item of `ValidationError.errors()`.
    """
    if item["type"] == "extra_forbidden":
        return unknown_option(name)
    if item["type"] == "missing":
        return f"{name} is missing"
    return f"{name} = {item['input']!r}: should be {_expectation(item)}"


def _expectation(item: Any) -> str:
    text = item["msg"].removeprefix("Input should be ").replace("a valid tuple", "a list")
    return text.removesuffix(", unable to parse string as an integer")


def unknown_option(name: str) -> str:
    """Return the message for a key that is no option or section, with the nearest existing one."""
    if name in Sections.fields():  # the dotted name as one key
        section, _, option = name.partition(".")
        return f"unknown key '{name}': give {option} in the table (in Python, the dict) {section}"
    near = nearest_name(name, [*Sections.fields(), *Sections.model_fields])
    return f"unknown key {name}" + (f", perhaps you meant {near}" if near else "")


def nearest_name(name: str, names: Sequence[str]) -> str:
    """Return the existing name that an unknown one may stand for, empty if none is similar.

    In this order: the same option of another section (`lr` for `optimizer.lr`), a similar option of the same section,
    a similar spelling of the whole name.
    """
    section, _, last = name.rpartition(".")
    same = [each for each in names if each.rpartition(".")[2] == last]
    if same:
        return same[0]
    if section and any(each.startswith(f"{section}.") for each in names):
        lasts = [each.rpartition(".")[2] for each in names if each.startswith(f"{section}.")]
        close = [f"{section}.{each}" for each in difflib.get_close_matches(last, lasts, n=1, cutoff=0.5)]
    else:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return close[0] if close else ""


def _model_option(name: str) -> str:
    """Return the option of the section `model` that a name of `Config.load` stands for; "" for another section."""
    section, _, field = name.replace("__", ".").partition(".")
    return field if section == "model" else ""


def _with_implied_source(tree: Tree) -> Tree:
    """Add `data.source = "files"` where files are given and no source."""
    data = tree.get("data")
    if isinstance(data, dict) and data.get("files") and "source" not in data:
        return {**tree, "data": {**data, "source": "files"}}
    return tree
