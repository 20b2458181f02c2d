"""A run against a reference: on track or not at the steps reached, and what differs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slm_jax.report import markup
from slm_jax.report.charts import Line
from slm_jax.report.escaping import SafeHtml
from slm_jax.report.reference import Reference, result_options, text_of
from slm_jax.report.run_data import ReportData
from slm_jax.utils.errors import UserError

# Scores of runs that differ in one of these are different quantities.
_SCORE_OPTIONS = ("train.objective", "data.mode", "train.sequence_length", "data.loss_on", "eval.max_tokens")


@dataclass(frozen=True)
class Track:
    """A run against a reference, at P validations within the steps of the reference.

    Attributes:
        reference: The reference.
        steps: Steps, [P].
        scores: Bits per byte of the run, [P].
        mean: Those of the reference, interpolated between its validations, [P].
        low: Lower bound of its band, [P].
        high: Upper bound, [P].
        differences: What differs, in words.
        is_beyond: Whether the run has validations only after the last one of the reference.
    """

    reference: Reference
    steps: np.ndarray
    scores: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    differences: tuple[str, ...]
    is_beyond: bool = False

    @property
    def verdict(self) -> str:
        """One sentence about the last of the steps."""
        if not len(self.steps):
            first, last = int(self.reference.steps[0]), int(self.reference.steps[-1])
            if self.is_beyond:
                return f"nothing to compare: all validations of the run are after step {last:,}, the reference's last"
            return f"nothing to compare yet: the first validation of the reference is at step {first:,}"
        score, low, high = self.scores[-1], self.low[-1], self.high[-1]
        if score > high:
            word = "BEHIND the reference" if not self.differences else "worse than the reference, whose options differ"
        elif score < low:
            word = "ahead of the reference"
        else:
            word = "on track"
        return (
            f"{word}: {score:.4f} bits per byte at step {int(self.steps[-1]):,}, {self.reference.name} "
            f"{self.mean[-1]:.4f} ({low:.4f} to {high:.4f})"
        )

    def lines(self) -> Iterator[str]:
        """Yield the verdict and the differences."""
        yield self.verdict
        outside = int(np.sum((self.scores < self.low) | (self.scores > self.high)))
        if len(self.steps) > 1:
            yield f"{len(self.steps) - outside} of {len(self.steps)} validations are inside the band of 95 %"
        for difference in self.differences:
            yield f"differs: {difference}"

    def line(self) -> Line:
        """Return the reference as a line of the report's chart."""
        curves = self.reference.curves
        x = {
            "step": self.reference.steps,
            "tokens": np.mean([curve.tokens for curve in curves], axis=0),
            "seconds": np.mean([curve.seconds for curve in curves], axis=0),
        }
        name = f"{self.reference.name} (reference, {len(curves)} seeds)"
        return Line(name, x, self.reference.mean, band=self.reference.band, dots=True, color=2)

    def section(self) -> SafeHtml:
        """Return the section of the report."""
        rows = [
            [f"{int(step):,}", f"{score:.4f}", f"{mean:.4f}", f"{low:.4f} to {high:.4f}"]
            for step, score, mean, low, high in zip(
                self.steps, self.scores, self.mean, self.low, self.high, strict=True
            )
        ]
        header = ["step", "bits per byte", self.reference.name, "95 % of further seeds"]
        parts = [markup.paragraph(line) for line in self.lines()]
        return markup.concatenate([*parts, markup.table(header, rows, range(4), "Reference")] if rows else parts)


def track(run: ReportData, references: Sequence[Reference]) -> Track:
    """Compare a run with the reference whose options are the nearest.

    The curve of the reference is interpolated between its validations and extrapolated nowhere.

    Args:
        run: The run, which may still be training.
        references: The references to choose from, one or more.

    Raises:
        UserError: A comparison would be meaningless; names the reasons.
    """
    if not references:
        raise UserError("configs/references has no references: give the path of one, or --reference to make one")
    if run.is_curriculum:
        raise UserError(f"{run.path} is a curriculum, and references are of single runs: give one of its stages")
    if not run.held_out_digest:
        raise UserError(f"the held-out text of {run.path} cannot be read, so nothing can be compared with it")
    problems = {each.name: _obstacles(run, each) for each in references}
    possible = [each for each in references if not problems[each.name]]
    if not possible:
        reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in problems.items())
        raise UserError(f"{run.path} cannot be compared with a reference. {reasons}")
    nearest = min(possible, key=lambda each: len(list(_differences(run, each))))
    rows = [row for row in run.columns.validations if nearest.steps[0] <= row["step"] <= nearest.steps[-1]]
    steps = np.array([row["step"] for row in rows], np.float64)
    scores = np.array([row["val_bits_per_byte"] for row in rows], np.float64)
    mean, low, high = (np.interp(steps, nearest.steps, each) for each in (nearest.mean, *nearest.band))
    validated = [row["step"] for row in run.columns.validations]
    is_beyond = bool(validated) and min(validated) > nearest.steps[-1]
    return Track(nearest, steps, scores, mean, low, high, tuple(_differences(run, nearest)), is_beyond)


def _obstacles(run: ReportData, reference: Reference) -> list[str]:
    """Return the reasons why the scores are different quantities."""
    found = []
    if run.held_out_digest != reference.held_out:
        python = reference.environment.get("python", "unknown")
        found.append(
            f"other held-out text (the reference was made with Python {python}, whose documentation it may be)"
        )
    options = result_options(run.last.config)
    for name in _SCORE_OPTIONS:
        if options[name] != reference.options.get(name, options[name]):
            found.append(f"{name} is {options[name]!r}, there {reference.options[name]!r}")
    return found


def _differences(run: ReportData, reference: Reference) -> Iterator[str]:
    """Yield what differs without making the scores different quantities."""
    options = result_options(run.last.config)
    for name, value in options.items():
        if name not in reference.options:
            yield f"{name} is {value!r}; the reference is older than this option"
        elif value != reference.options[name]:
            yield f"{name} is {value!r}, there {reference.options[name]!r}"
    for name, value in text_of(run).items():
        if value != reference.text.get(name):
            yield f"text: {name.replace('_', ' ')} {value:,}, there {reference.text.get(name):,}"
    calls = run.last.calls
    here = calls[-1].get("packages", {}).get("jax") if calls else None
    there = reference.environment.get("packages", {}).get("jax")
    if here and there and here != there:
        yield f"jax {here}, there {there}"
