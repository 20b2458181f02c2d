"""Reference results: the validation curves of several seeds of one config, in `configs/references/NAME.json`."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.config.option import Trait
from slm_jax.config.presets import reference_names, reference_path
from slm_jax.config.schema import Config
from slm_jax.report.run_data import ReportData
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_text

FORMAT = 1
MIN_SEEDS = 2
_CONFIDENCE = 0.95
_NO_PART: tuple[Trait, ...] = (
    "resumable",
    "execution",
    "per_host",
)  # traits of options that a result does not depend on
_ALSO_NONE = {"train.seed", "checkpoint.folder"}
_DESCRIBED = ("slm_jax", "python", "packages", "system", "processor", "cores", "device", "devices")


@dataclass(frozen=True)
class SeedCurve:
    """The validations of one seed, V in all.

    Attributes:
        seed: `train.seed`.
        steps: Step of each validation.
        tokens: Predicted tokens up to it.
        bits_per_byte: Bits per byte of held-out text.
        seconds: Training time up to it, on the machine of the reference.
    """

    seed: int
    steps: list[int]
    tokens: list[int]
    bits_per_byte: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Reference:
    """The result of a config over several seeds.

    Attributes:
        name: Name of the preset or of the file.
        options: The resolved options that a result depends on, by dotted name.
        held_out: Digest of the held-out text (`ReportData.held_out_digest`).
        text: Bytes and documents of the text.
        environment: Versions, machine and device.
        curves: One for each seed, all with the same steps.
    """

    name: str
    options: dict[str, Any]
    held_out: str
    text: dict[str, Any]
    environment: dict[str, Any]
    curves: list[SeedCurve]

    @property
    def steps(self) -> np.ndarray:
        """Steps of the validations, [V]."""
        return np.array(self.curves[0].steps, np.float64)

    @property
    def mean(self) -> np.ndarray:
        """Bits per byte, averaged over the seeds, [V]."""
        return np.mean([curve.bits_per_byte for curve in self.curves], axis=0)

    @property
    def spread(self) -> float:
        """Standard deviation between seeds relative to their mean, pooled over the validations."""
        values = np.array([curve.bits_per_byte for curve in self.curves])
        return float(np.sqrt(np.mean(np.var(values, axis=0, ddof=1) / np.mean(values, axis=0) ** 2)))

    @property
    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds that hold 95 % of the validations of one more seed (Student's t), [V] each."""
        from scipy.stats import t

        count = len(self.curves)
        factor = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * math.sqrt(1 + 1 / count) * self.spread
        return self.mean * (1 - factor), self.mean * (1 + factor)

    @property
    def final(self) -> tuple[float, float]:
        """Mean and standard deviation of the last validation."""
        last = [curve.bits_per_byte[-1] for curve in self.curves]
        return float(np.mean(last)), float(np.std(last, ddof=1))

    @property
    def seconds(self) -> float:
        """Mean training time, on the machine of the reference."""
        return float(np.mean([curve.seconds[-1] for curve in self.curves]))


def result_options(config: Config) -> dict[str, Any]:
    """Return the options that a result depends on, as JSON values by dotted name."""
    ignored = _ALSO_NONE.union(*(config.fields_with(trait) for trait in _NO_PART)) - {"train.steps"}
    values = {name: value for name, value in config.flat().items() if name not in ignored}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def make_reference(name: str, runs: Sequence[ReportData]) -> Reference:
    """Return the reference of finished runs that differ in their seed only.

    Args:
        name: Its name.
        runs: The runs.

    Raises:
        UserError: Too few runs, or runs that are no seeds of one config.
    """
    if len(runs) < MIN_SEEDS:
        raise UserError(f"--reference needs {MIN_SEEDS} runs or more that differ in train.seed, for a spread")
    runs = sorted(runs, key=lambda run: run.last.config.train.seed)
    first = runs[0]
    options = result_options(first.last.config)
    for run in runs:
        if run.is_curriculum or not run.is_finished or not run.columns.validations:
            raise UserError(f"{run.path} is not a finished run with validations: --reference needs such runs")
        others = result_options(run.last.config)
        differing = [option for option in options if options[option] != others[option]]
        if differing or run.held_out_digest != first.held_out_digest:
            what = ", ".join(differing) or "held-out text"
            raise UserError(f"{run.path} and {first.path} differ in {what}: --reference needs seeds of one config")
    seeds = [run.last.config.train.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError("two runs have the same train.seed: --reference needs different seeds")
    curves = [_curve(run) for run in runs]
    if any(curve.steps != curves[0].steps for curve in curves):
        raise UserError("the runs were validated at different steps (eval.every): --reference needs the same")
    call = first.last.calls[-1] if first.last.calls else {}
    environment = {key: call[key] for key in _DESCRIBED if key in call}
    return Reference(name, options, first.held_out_digest, text_of(first), environment, curves)


def text_of(run: ReportData) -> dict[str, Any]:
    """Return bytes and documents of the text of a run."""
    manifests = run.last.manifests
    return {
        f"{split}_{unit}": sum(manifest[split][unit] for manifest in manifests)
        for split in ("train", "validation")
        for unit in ("documents", "bytes")
    }


def _curve(run: ReportData) -> SeedCurve:
    columns = run.columns
    rows = columns.validations
    index = columns.validation_indices()
    return SeedCurve(
        run.last.config.train.seed,
        [int(row["step"]) for row in rows],
        [int(each) for each in columns.x["tokens"][index]],
        [float(row["val_bits_per_byte"]) for row in rows],
        [round(float(each), 1) for each in columns.x["seconds"][index]],
    )


def write_reference(reference: Reference, path: Path) -> None:
    """Write a reference as JSON.

    Raises:
        UserError: The file cannot be written.
    """
    content = {"format": FORMAT, **asdict(reference)}
    try:
        replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_reference(path: Path) -> Reference:
    """Read a reference.

    Raises:
        UserError: It cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        curves = [SeedCurve(**curve) for curve in content.pop("curves")]
        reference = Reference(**content, curves=curves)
        _require_complete(reference)
        return reference
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is not a reference ({error}): write one with report RUN RUN … --reference PATH"
        ) from None


def _require_complete(reference: Reference) -> None:
    """Raise ValueError or TypeError unless all curves have the same ascending steps, and positive numbers."""
    curves = reference.curves
    columns = [np.array(column) for curve in curves for column in list(asdict(curve).values())[1:]]
    if len(curves) < MIN_SEEDS or not columns[0].size or len({column.shape for column in columns}) != 1:
        raise ValueError("its curves are incomplete")
    if any(curve.steps != curves[0].steps for curve in curves):
        raise ValueError("its curves have different steps")
    if not all(np.issubdtype(column.dtype, np.number) and np.isfinite(column).all() for column in columns):
        raise ValueError("its curves are not finite numbers")
    if any(value <= 0 for curve in curves for value in (*curve.steps, *curve.bits_per_byte)):
        raise ValueError("its curves have steps or bits per byte that are not positive")
    if any((np.diff(column) <= 0).any() for curve in curves for column in (curve.steps, curve.tokens)):
        raise ValueError("its curves have steps or tokens that do not ascend")
    tables = (reference.options, reference.text, reference.environment)
    if not all(isinstance(each, dict) for each in tables):
        raise TypeError("options, text and environment are not all objects")


def find_references(name: str) -> list[Reference]:
    """Return the references that `--against` names.

    Args:
        name: `reference` for all of the package, the name of one, or the path of a JSON file.

    Raises:
        UserError: There is none.
    """
    if name == "reference":
        return [read_reference(reference_path(each)) for each in reference_names()]
    if name in reference_names():
        return [read_reference(reference_path(name))]
    if Path(name).is_dir():
        raise UserError(f"--against {name} is a folder: to compare runs, give them all (python -m slm_jax.report A B)")
    if name.endswith(".json"):
        return [read_reference(Path(name))]
    names = reference_names()
    known = f"available: {', '.join(['reference', *names])}; or" if names else "the package has none:"
    raise UserError(f"--against {name}: no such reference ({known} give a .json file)")
