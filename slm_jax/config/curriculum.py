"""Schema of a curriculum: stages of training over shared options, validated as a whole before anything runs.

    [curriculum]                     evaluate = ["heldout"]
    [model] [train] [optimizer] …    options of all stages
    [[stages]]                       name = "stories", data.source = "tinystories", epochs = 1, optimizer.lr = 0.01
    [[stages]]                       name = "articles", data.source = "wikitext", train.steps = 2000

A stage is a name and any options of a run, which override the shared ones. All stages have the same tokenizer and model
shape; each starts from the weights of the previous one.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from slm_jax.config.option import Section, Strings, option
from slm_jax.config.paths import CURRICULUM, STAGES
from slm_jax.config.presets import read_preset
from slm_jax.config.recipes import overridable
from slm_jax.config.schema import Config, describe_error, format_problems
from slm_jax.config.weight_conflicts import weight_conflicts
from slm_jax.utils.errors import UserError

Tree = dict[str, Any]
_PREVIOUS = "the previous stage"  # placeholder for its run until the curriculum has a folder
_TEXT = ("source", "files", "mix")  # of [data]: a stage that gives one of them inherits none of them


class CurriculumConfig(Section):
    """Options of a curriculum besides its stages."""

    evaluate: Strings = option(
        (), "Tasks of python -m slm_jax.evaluate that run after each stage, such as heldout or blimp."
    )
    tokenizer_text: Literal["all", "first"] = option(
        "all",
        "Text that the tokenizer is learned from: of all stages (at most 50 MB of each source), or of the first only. "
        "Stages that are added later do not change it.",
    )
    compare: bool = option(
        True, "After each stage, measure the held-out text of all stages so far: how much of them is retained."
    )


class StageConfig(Section):
    """Options of a stage besides the options of its run."""

    name: str = option(..., "Letters, digits, dots, - and _.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)
    epochs: float | None = option(
        None, "Length in epochs instead of train.steps: one epoch is as many rows as all its sources have.", gt=0
    )


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum.

    Attributes:
        number: Its number, from 1.
        name: Its name.
        config: The config of its run, complete except for the path of the previous stage, and for train.steps if the
            length is given in epochs.
        epochs: Its length in epochs; None: train.steps.
    """

    number: int
    name: str
    config: Config
    epochs: float | None

    @property
    def title(self) -> str:
        """Number and name, for messages."""
        return f"stage {self.number} ({self.name})"

    def folder(self, curriculum: Path) -> Path:
        """Return the folder of its run in the folder of a curriculum."""
        return curriculum / STAGES / f"{self.number:02d}-{self.name}"


@dataclass(frozen=True)
class Curriculum:
    """A validated curriculum.

    Attributes:
        name: Name of the preset or file.
        options: Options of the curriculum itself.
        stages: Its stages, in order.
        tree: The nested dicts that it was read from.
    """

    name: str
    options: CurriculumConfig
    stages: tuple[Stage, ...]
    tree: Tree

    @classmethod
    def load(cls, preset: str | Path = "curriculum-offline", **overrides: Any) -> "Curriculum":
        """Load a preset and apply overrides to all stages.

        Args:
            preset: Name of a preset in `configs/`, or path of a TOML file.
            **overrides: Values by dotted name, `**{"train.steps": 10}` or `train__steps=10`.

        Raises:
            UserError: The curriculum is invalid; lists every problem with its stage.
        """
        nested: Tree = {}
        for name, value in overrides.items():
            section, _, field = name.replace("__", ".").partition(".")
            nested.setdefault(section, {})[field] = value
        return cls.from_tree(read_preset(preset, curricula=True), nested, str(preset))

    @classmethod
    def from_tree(cls, tree: Tree, overrides: Tree | None = None, origin: str = "curriculum") -> "Curriculum":
        """Validate a curriculum given as nested dicts.

        Args:
            tree: The curriculum, as in a TOML file.
            overrides: Values by section and option, for all stages.
            origin: Name or path of the curriculum, used in messages and for its name.

        Raises:
            UserError: The curriculum is invalid; lists every problem, one per line.
        """
        tree = _overridden(tree, overrides or {})
        options, problems = _section(CurriculumConfig, tree.get("curriculum", {}), "curriculum")
        stages, stage_problems = _read_stages(tree)
        problems += stage_problems
        if problems:
            raise UserError(format_problems(origin, problems))
        assert isinstance(options, CurriculumConfig)
        name = Path(origin).parent.name if Path(origin).name == CURRICULUM else Path(origin).stem
        return cls(name, options, tuple(stages), tree)

    def to_toml(self) -> str:
        """Return the curriculum as TOML; `from_tree(tomllib.loads(text))` restores it."""
        lines: list[str] = []
        for section, fields in self.tree.items():
            if section != "stages":
                lines += _table(section, fields)
        for stage in self.tree["stages"]:
            plain = {name: value for name, value in stage.items() if not isinstance(value, dict)}
            lines += ["[[stages]]", *_pairs(plain), ""]
            for section, fields in stage.items():
                if isinstance(fields, dict):
                    lines += _table(f"stages.{section}", fields)
        return "\n".join(lines)


def _table(name: str, fields: Tree) -> list[str]:
    return [f"[{name}]", *_pairs(fields), ""]


def _pairs(fields: Tree) -> list[str]:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]


def _merged(base: Tree, over: Tree) -> Tree:
    """Merge two trees option by option; the text that `over` names replaces that of `base` completely."""
    result = dict(base)
    for section, fields in over.items():
        before = base.get(section, {})
        if isinstance(fields, dict) and isinstance(before, dict):
            if section == "model":
                before = overridable(before, fields, "the curriculum")
            if section == "data" and set(_TEXT) & fields.keys():
                before = {name: value for name, value in before.items() if name not in _TEXT}
            fields = {**before, **fields}
        result[section] = fields
    return result


def _overridden(tree: Tree, overrides: Tree) -> Tree:
    """Apply overrides to the shared options, and to the stages that override these."""
    stages = tree.get("stages", [])
    shared = _merged({name: value for name, value in tree.items() if name != "stages"}, overrides)
    if not isinstance(stages, list):
        return {**shared, "stages": stages}
    changed = []
    for stage in stages:
        if isinstance(stage, dict):
            mine = {s: {f: v for f, v in o.items() if f in stage[s]} for s, o in overrides.items() if s in stage}
            data = overrides.get("data", {})
            if set(_TEXT) & data.keys() and set(_TEXT) & stage.get("data", {}).keys():
                mine["data"] = {**mine["data"], **{name: data[name] for name in _TEXT if name in data}}
            stage = _merged(stage, mine)
            if "steps" in overrides.get("train", {}):
                stage.pop("epochs", None)
        changed.append(stage)
    return {**shared, "stages": changed}


def _section(kind: type[Section], fields: Any, name: str) -> tuple[Section | None, list[str]]:
    """Validate a section; return it, None if it is invalid, and its problems."""
    try:
        return kind.model_validate(fields), []
    except pydantic.ValidationError as error:
        problems = []
        for item in error.errors():
            if item["type"] == "string_pattern_mismatch":
                item["msg"] = str(kind.model_fields[str(item["loc"][0])].description).lower().rstrip(".")
            problems.append(describe_error(".".join([name, *map(str, item["loc"])]), item))
        return None, problems


def _read_stages(tree: Tree) -> tuple[list[Stage], list[str]]:
    """Validate the stages; return those that are valid, and all problems."""
    given = tree.get("stages")
    if not isinstance(given, list) or not given or not all(isinstance(stage, dict) for stage in given):
        remedy = "python -m slm_jax.train trains a config without stages"
        return [], [f"a curriculum needs stages: at least one table [[stages]] with a name; {remedy}"]
    shared = {name: value for name, value in tree.items() if name not in ("stages", "curriculum")}
    trees = [_run_tree(shared, stage, i) for i, stage in enumerate(given)]
    checked = [Config.check(each) for each in trees]
    # Problems of the shared options are reported once.
    common = [p for p in Config.check(shared)[1] if all(p in stage_problems for _, stage_problems in checked)]
    problems = list(common)
    stages = []
    for number, (stage, (config, stage_problems)) in enumerate(zip(given, checked, strict=True), start=1):
        own, wrong = _section(StageConfig, {k: v for k, v in stage.items() if k not in Config.model_fields}, "stages")
        title = f"stage {number}" + (f" ({stage['name']})" if isinstance(stage.get("name"), str) else "")
        wrong += [problem for problem in stage_problems if problem not in common]
        wrong += _misplaced(stage)
        problems += [f"{title}: {problem}" for problem in wrong]
        if isinstance(own, StageConfig) and config is not None:
            stages.append(Stage(number, own.name, config, own.epochs))
    if len(stages) == len(given):
        problems += _across(stages)
    return stages, problems


def _run_tree(shared: Tree, stage: Tree, index: int) -> Tree:
    """Return the options of a stage's run."""
    tree = _merged(shared, {name: value for name, value in stage.items() if name in Config.model_fields})
    init = tree.get("init", {})
    if isinstance(init, dict):
        if index:
            tree["init"] = {**{k: v for k, v in init.items() if not k.startswith("from_")}, "from_run": _PREVIOUS}
        elif not any(name.startswith("from_") and value for name, value in init.items()):
            # Shared init.optimizer is meant for later stages: there is no optimizer state before the first.
            tree["init"] = {k: v for k, v in init.items() if k != "optimizer" or k in stage.get("init", {})}
    return tree


def _misplaced(stage: Tree) -> Iterator[str]:
    """Yield the options of a stage that belong elsewhere."""
    if stage.get("tokenizer"):
        yield "there is one tokenizer for all stages: put [tokenizer] above the stages"
    init = stage.get("init", {})
    for name in init if isinstance(init, dict) else ():
        if name.startswith("from_"):
            yield f"init.{name} is for the start of the first stage: put [init] above the stages"
    train = stage.get("train", {})
    if "epochs" in stage and isinstance(train, dict) and "steps" in train:
        yield "epochs and train.steps both set its length: leave one out"


def _across(stages: list[Stage]) -> Iterator[str]:
    """Yield problems between stages."""
    for name, count in Counter(stage.name for stage in stages).items():
        if count > 1:
            yield f"{count} stages are named {name}: give each a different name"
    for stage in stages:
        if stage.config.train.minutes:
            yield f"{stage.title}: train.minutes is for single runs: give train.steps, or epochs"
    for before, stage in itertools.pairwise(stages):
        yield from weight_conflicts(stage.config, before.config, f"in {stage.title}", f"in {before.title}")
