"""The page `report.html` of a run or curriculum: its sections in order."""

import logging
from pathlib import Path

from slm_jax.report import markup, scores, sections
from slm_jax.report.charts import SharedX
from slm_jax.report.curves import curves_section
from slm_jax.report.escaping import SafeHtml
from slm_jax.report.markup import Section
from slm_jax.report.run_data import ReportData, read_report_data
from slm_jax.report.tokenizer_section import tokenizer_section
from slm_jax.report.track import Track
from slm_jax.run.directory import Run, curriculum_of
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_text

logger = logging.getLogger(__name__)


def write_report(path: Path | None, to: Path | None = None) -> tuple[ReportData, Path]:
    """Write the report of a run or curriculum.

    Args:
        path: The directory; None: the newest run.
        to: The file to write; None: `report.html` in the directory.

    Returns:
        The data of the report, and the path of the file.

    Raises:
        UserError: There is no such run, it is damaged, or the file cannot be written.
    """
    data = read_report_data(path)
    target = to or Run(data.path).report
    write_page(target, report_html(data))
    return data, target


def write_report_after_training(run: Run) -> None:
    """Write the report of a run, and of the curriculum that it is a stage of.

    A problem with the report is only logged: the training itself succeeded.
    """
    try:
        for path in (run.path, curriculum_of(run)):
            if path is not None:
                write_report(path)
    except UserError as error:
        logger.warning("no report was written: %s", error)


def write_page(target: Path, text: str) -> None:
    """Write or replace a page.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        replace_text(target, text)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None


def report_html(data: ReportData, compared: Track | None = None) -> str:
    """Return the page as HTML.

    Args:
        data: The run or curriculum.
        compared: The run against a reference; None: no such section.
    """
    shared_x = SharedX()
    samples = [sample for stage in data.stages for sample in stage.samples]
    parts = [
        Section("Curves", curves_section(data, shared_x, compared.line() if compared else None)),
        Section("Reference", compared.section() if compared else SafeHtml("")),
        Section("Validation", scores.validation_section(data)),
        Section("Stages", scores.stages_section(data)),
        Section("Evaluation", scores.evaluation_section(data)),
        Section("Benchmarks", scores.benchmarks_section(data)),
        Section("Samples", sections.samples_section(data)),
        Section("Tokenizer", tokenizer_section(data.last, samples)),
        Section("Data", sections.data_section(data)),
        Section("Config", sections.config_section(data)),
        Section("Environment and cost", sections.environment_section(data)),
    ]
    return markup.page(f"{data.name}: report", sections.page_head(data), parts, shared_x.html())
