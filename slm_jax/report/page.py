"""`report.html` of a run or of a curriculum."""

import sys
from pathlib import Path

from slm_jax.report import markup, scores, sections
from slm_jax.report.charts import Tracks
from slm_jax.report.curves import curves
from slm_jax.report.markup import Section
from slm_jax.report.run_data import Subject, read_subject
from slm_jax.report.tokens import tokenizer_part
from slm_jax.run.directory import Run, curriculum_of
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_text


def write_report(path: Path | None, to: Path | None = None) -> tuple[Subject, Path]:
    """Write the report of the run or curriculum at a path (None: the newest run) beside it or to another place.

    Raises UserError if there is no such run, it is damaged, or the file cannot be written.
    """
    subject = read_subject(path)
    target = to or Run(subject.path).report
    write(target, report_html(subject))
    return subject, target


def write_at_end(run: Run) -> None:
    """The same at the end of training, of a stage also that of its curriculum. What is wrong with the report is said,
    and costs no more than the report."""
    try:
        for path in filter(None, (run.path, curriculum_of(run))):
            write_report(path)
    except UserError as error:
        print(f"note: no report: {error}", file=sys.stderr)


def write(target: Path, text: str) -> None:
    """Replace a page. Raises UserError if that cannot be done."""
    try:
        replace_text(target, text)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None


def report_html(subject: Subject) -> str:
    """The page."""
    tracks = Tracks()
    facts = subject.last
    samples = [sample for stage in subject.stages for sample in stage.samples]
    parts = [
        Section("Curves", curves(subject, tracks)),
        Section("Validation", scores.validation(subject)),
        Section("Stages", scores.stages(subject)),
        Section("Evaluation", scores.evaluation(subject)),
        Section("Benchmarks", scores.benchmarks(subject)),
        Section("Samples", sections.samples(subject)),
        Section("Tokenizer", tokenizer_part(facts, samples)),
        Section("Data", sections.data(subject)),
        Section("Config", sections.config(subject)),
        Section("Environment and cost", sections.environment(subject)),
    ]
    return markup.page(f"{subject.name}: report", sections.head(subject), parts, tracks.html())
