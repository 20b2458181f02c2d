"""The definition of a study: budgets, sizes and seeds, and the run of each combination.

The options of a run follow from its size and budget by the rule of `slm_jax/config/rule.py`, except those that are
given. Tokenizer and sequence length are the same in all runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.dial import parse_number
from slm_jax.config.paths import RUNS
from slm_jax.config.recipes import overridable
from slm_jax.config.rule import Request, make_recipe
from slm_jax.config.schema import Config, format_problems
from slm_jax.performance import flops
from slm_jax.report.axes import format_compact
from slm_jax.sweep.axes import Setting
from slm_jax.sweep.definition import read_definition, require_same_options, save_definition
from slm_jax.sweep.plan import Trial, with_seed
from slm_jax.utils.errors import UserError

SCALING = "scaling.toml"
CHECK = "check"  # folder of the held-out run
_HEADER = "A study of scaling: budgets and sizes, then the options that all runs share unless the rule sets them."
MIN_STEPS = 20
MIN_BUDGETS = 2
MIN_SIZES = 3
_SHARED = ("tokenizer.vocab_size", "train.sequence_length")
_FROM_BUDGET = ("train.steps", "train.minutes")


@dataclass(frozen=True)
class SizeSetting(Setting):
    """The options of one size at one budget.

    Attributes:
        budget: FLOPs that were asked for.
        parameters: Parameters of the model, with the planned vocabulary.
        tokens: Input tokens of all steps.
        flops: Model FLOPs of all steps.
    """

    budget: float = 0.0
    parameters: int = 0
    tokens: int = 0
    flops: float = 0.0

    @property
    def label(self) -> str:
        """The setting in words: `320k parameters, 1e+12 FLOPs`."""
        return f"{format_compact(self.parameters)} parameters, {self.budget:.3g} FLOPs"

    @property
    def folder(self) -> str:
        """The setting as a file name that no other setting has: `1e12-320k-5f2a9c`."""
        digest = super().folder.rpartition("-")[2]
        return f"{self.budget:.3g}-{format_compact(self.parameters)}-{digest}".replace("e+", "e")


@dataclass(frozen=True)
class Study:
    """The definition of a study.

    Attributes:
        base: The options that all runs share unless the rule sets them.
        budgets: FLOPs, ascending.
        sizes: Parameters, ascending.
        given: Dotted names of the options of `base` that the rule does not set.
        seeds: Number of seeds of each run, from that of `base` on.
        metric: The key of `metrics.jsonl` that is the loss; lower is better.
    """

    base: Config
    budgets: tuple[float, ...]
    sizes: tuple[float, ...]
    given: tuple[str, ...] = ()
    seeds: int = 1
    metric: str = "val_bits_per_byte"

    def require_valid(self) -> None:
        """Refuse a study whose fits are not determined.

        Raises:
            UserError: Too few budgets or sizes, or an option is given that follows from the budget.
        """
        for name, values, least in (("budgets", self.budgets, MIN_BUDGETS), ("sizes", self.sizes, MIN_SIZES)):
            if len(values) < least:
                raise UserError(f"--{name}: give {least} values or more, the fit needs them")
        if fixed := sorted(set(self.given) & set(_FROM_BUDGET)):
            raise UserError(f"--{fixed[0]} follows from the budget: leave it out")
        if self.base.train.minutes:  # of a preset
            raise UserError("train.minutes of the config: the steps follow from the budget, leave it out")

    def trials(self, folder: Path, vocab_size: int) -> list[Trial]:
        """Return the runs, the first seed of all settings first.

        Args:
            folder: The folder of the study.
            vocab_size: Entries of the tokenizer.

        Raises:
            UserError: Invalid options or sizes.
        """
        planned = [(budget, size) for budget in self.budgets for size in self.sizes]
        trials = [self.trial(budget, size, vocab_size, folder / RUNS) for budget, size in planned]
        by_shape: dict[tuple[float, int], float] = {}
        for trial, (budget, size) in zip(trials, planned, strict=True):
            assert isinstance(trial.setting, SizeSetting)
            other = by_shape.setdefault((budget, trial.setting.parameters), size)
            if other != size:
                raise UserError(
                    f"--sizes {other:.9g} and {size:.9g} lead to the same model of {trial.setting.parameters:,} "
                    "parameters: give sizes that are farther apart"
                )
        first = self.base.train.seed
        return [seeded(trial, seed) for seed in range(first, first + self.seeds) for trial in trials]

    def trial(self, budget: float, size: float, vocab_size: int, runs: Path) -> Trial:
        """Return the run of a size and a budget, with the first seed.

        Args:
            budget: FLOPs.
            size: Parameters.
            vocab_size: Entries of the tokenizer.
            runs: The folder of the run directory.

        Raises:
            UserError: No such model, an invalid option, or a budget of too few steps.
        """
        values = self.base.flat()
        given = {name: values[name] for name in (*self.given, *_SHARED)}
        recipe = make_recipe(Request(parameters=size, flops=budget, vocab_size=vocab_size, given=given))
        options = {name: choice.value for name, choice in recipe.options.items()}
        config = self._config(options)
        per_token = _flops_per_token(config, vocab_size)
        batch = config.train.batch_size * config.train.sequence_length
        steps = round(budget / (per_token * batch))
        if steps < MIN_STEPS:
            raise UserError(
                f"--budgets {budget:g}: only {steps} steps of {size:.9g} parameters, at least {MIN_STEPS} are needed: "
                "give larger budgets or smaller sizes"
            )
        options |= {"train.steps": steps, "eval.every": steps}  # the last validation is the score
        config = self._config(options)
        tokens = steps * batch
        setting = SizeSetting(options, budget, flops.parameters(config.model, vocab_size), tokens, tokens * per_token)
        return seeded(Trial(setting, config, runs / "any"), self.base.train.seed)

    def can_train(self, budget: float, size: float, vocab_size: int) -> bool:
        """Return whether there is a run of a size and a budget."""
        try:
            self.trial(budget, size, vocab_size, Path(RUNS))
        except UserError:
            return False
        return True

    def _config(self, options: dict[str, Any]) -> Config:
        tree = {section: dict(fields) for section, fields in self.base.model_dump().items()}
        if "model.depth" in options:
            tree["model"] = dict(overridable(tree["model"], {"depth": options["model.depth"]}, "the study"))
        for name, value in options.items():
            section, _, key = name.partition(".")
            tree[section][key] = value
        config, problems = Config.check(tree)
        if config is None or problems:
            raise UserError(format_problems("scaling", problems))
        return config

    def save(self, folder: Path) -> None:
        """Write the definition, so that the folder alone continues the study."""
        own = {
            "budgets": list(self.budgets),
            "sizes": list(self.sizes),
            "given": list(self.given),
            "seeds": self.seeds,
            "metric": self.metric,
        }
        save_definition(folder / SCALING, _HEADER, own, self.base)

    @classmethod
    def load(cls, folder: Path) -> "Study":
        """Read the definition of a folder.

        Raises:
            UserError: It cannot be read, or is invalid.
        """
        return read_definition(folder / SCALING, cls._from_table)

    @classmethod
    def _from_table(cls, base: Config, own: dict[str, Any]) -> "Study":
        given = tuple(map(str, own["given"]))
        if unknown := set(given) - base.flat().keys():
            raise ValueError(f"unknown option {min(unknown)}")
        budgets, sizes = (tuple(sorted(map(float, own[name]))) for name in ("budgets", "sizes"))
        return cls(base, budgets, sizes, given, int(own["seeds"]), str(own["metric"]))

    def require_continues(self, saved: "Study", folder: Path) -> None:
        """Refuse to mix runs with other options into a folder, and to drop some of its runs.

        Raises:
            UserError: Names what differs.
        """
        for name in ("budgets", "sizes"):
            if missing := set(getattr(saved, name)) - set(getattr(self, name)):
                raise UserError(
                    f"--{name}: {min(missing):g} of the study in {folder} is missing: add values to its own"
                )
        if self.seeds < saved.seeds:
            raise UserError(f"--seeds {self.seeds}: the study in {folder} has {saved.seeds}: give as many or more")
        others = [] if set(self.given) == set(saved.given) else ["the options on the command line"]
        require_same_options(self.base, saved.base, folder, others)


def seeded(trial: Trial, seed: int) -> Trial:
    """Return a run with another seed, and the run directory that belongs to it."""
    name = f"{trial.setting.folder}-seed{seed}"
    return Trial(trial.setting, with_seed(trial.config, seed), trial.run.parent / name)


def size_setting(trial: Trial) -> SizeSetting:
    """Return the setting of a run of a study."""
    assert isinstance(trial.setting, SizeSetting)
    return trial.setting


def merged(option: str, saved: tuple[float, ...], given: tuple[float, ...]) -> tuple[float, ...]:
    """Return the values of a study together with those that are given, ascending.

    Raises:
        UserError: A value is given twice.
    """
    if len(set(given)) < len(given):
        raise UserError(f"--{option}: a value is given twice")
    return tuple(sorted({*saved, *given}))


def parse_numbers(option: str, words: Iterable[str]) -> tuple[float, ...]:
    """Return numbers such as `300k`, `1.2M`, `3B` and `1e13`, ascending.

    Args:
        option: The option that they belong to, named in messages.
        words: The words of the command line.

    Raises:
        UserError: A word is no positive number.
    """
    numbers = []
    for word in words:
        number = parse_number(word)
        if not number:
            raise UserError(f"--{option} {word}: should be a positive number, such as 300k, 1.2M or 1e13")
        numbers.append(number)
    return tuple(sorted(numbers))


def _flops_per_token(config: Config, vocab_size: int) -> float:
    return float(flops.token_flops(config.model, vocab_size, config.train.sequence_length, config.lora).at())
