"""The definition of a sweep, its file, and the trials that it consists of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.paths import RUNS
from slm_jax.config.recipes import overridable
from slm_jax.config.schema import Config, format_problems
from slm_jax.sweep.axes import Axis, Convert, Setting, parse_axis, settings
from slm_jax.sweep.definition import read_definition, require_same_options, save_definition
from slm_jax.utils.errors import UserError

SWEEP = "sweep.toml"
_HEADER = "A sweep: the varied options, then the options that all trials share."


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        setting: The values of the varied options.
        config: All options.
        run: The run directory.
    """

    setting: Setting
    config: Config
    run: Path


@dataclass(frozen=True)
class Sweep:
    """The definition of a sweep.

    Attributes:
        base: The options of all trials.
        vary: The varied options as they were given, see `axes`.
        seeds: Number of seeds of each setting, from that of `base` on.
        num_random: Number of random settings; 0: all combinations.
        random_seed: Seed of the random settings.
        metric: The key of `metrics.jsonl` that is compared; lower is better.
    """

    base: Config
    vary: tuple[str, ...]
    seeds: int = 1
    num_random: int = 0
    random_seed: int = 0
    metric: str = "val_bits_per_byte"

    def axes(self, convert: Convert) -> list[Axis]:
        """Return the varied options."""
        return [parse_axis(text, convert) for text in self.vary]

    def trials(self, folder: Path, convert: Convert) -> list[Trial]:
        """Return the trials, the first seed of all settings first, so that a comparison is possible early.

        Args:
            folder: The folder of the sweep.
            convert: Converts a word of `vary` to the value of an option.

        Raises:
            UserError: Invalid axes or settings; every invalid setting is named.
        """
        axes = self.axes(convert)
        if self.base.train.minutes or any("train.minutes" in axis.names for axis in axes):
            raise UserError(
                "train.minutes chooses other steps for each trial, but trials are compared at equal steps: give "
                "train.steps"
            )
        chosen = settings(axes, self.num_random, self.random_seed)
        base = self.base.model_dump()
        configs: list[tuple[Setting, Config]] = []
        problems: list[str] = []
        for setting in chosen:
            tree = {section: dict(fields) for section, fields in base.items()}
            of_model = {name.removeprefix("model."): 0 for name in setting.values if name.startswith("model.")}
            tree["model"] = dict(overridable(tree["model"], of_model, "the sweep"))
            for name, value in setting.values.items():
                section, _, key = name.partition(".")
                tree[section][key] = value
            config, found = Config.check(tree)
            if config is None or found:
                problems += [f"{setting.label}: {problem}" for problem in found]
            else:
                configs.append((setting, config))
        if problems:
            raise UserError(format_problems("sweep", problems))
        first = self.base.train.seed
        return [
            Trial(setting, with_seed(config, seed), folder / RUNS / f"{setting.folder}-seed{seed}")
            for seed in range(first, first + self.seeds)
            for setting, config in configs
        ]

    def save(self, folder: Path) -> None:
        """Write the definition, so that the folder alone continues the sweep."""
        own: dict[str, Any] = {
            "vary": list(self.vary),
            "seeds": self.seeds,
            "random": self.num_random,
            "random_seed": self.random_seed,
            "metric": self.metric,
        }
        save_definition(folder / SWEEP, _HEADER, own, self.base)

    @classmethod
    def load(cls, folder: Path) -> "Sweep":
        """Read the definition of a folder.

        Raises:
            UserError: It cannot be read, or is invalid.
        """
        return read_definition(folder / SWEEP, cls._from_table)

    @classmethod
    def _from_table(cls, base: Config, own: dict[str, Any]) -> "Sweep":
        return cls(
            base,
            tuple(map(str, own["vary"])),
            int(own["seeds"]),
            int(own["random"]),
            int(own["random_seed"]),
            str(own["metric"]),
        )

    def require_continues(self, saved: "Sweep", folder: Path) -> None:
        """Refuse to mix trials with other shared options into a folder.

        Other values, more seeds and more random settings may be added, and another score may be compared.

        Raises:
            UserError: Names what differs.
        """
        others = []
        if self.num_random and saved.num_random:  # else the settings that were tried would be drawn no more
            for name in ("random_seed", "vary"):
                new, old = getattr(self, name), getattr(saved, name)
                if new != old:
                    others.append(f"--{name} ({new!r}, before {old!r})")
        require_same_options(self.base, saved.base, folder, others)


def with_seed(config: Config, seed: int) -> Config:
    """Return a config with another seed."""
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
