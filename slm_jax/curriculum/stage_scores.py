"""Scores of each stage's model on the held-out text of all stages: what was learned, kept and forgotten.

Each stage's model is scored on the text of all stages so far, and on that of the next one before it is trained. The
rows are in `stage_scores.json`, see `slm_jax.run.results`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx

from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun, load_run
from slm_jax.run.results import Row, read_stage_scores, write_stage_scores
from slm_jax.run.selection import select_checkpoint
from slm_jax.training import validation
from slm_jax.training.objective import loss_sums
from slm_jax.utils.formatting import text_table

logger = logging.getLogger(__name__)


def update(folder: Path, stages: Sequence[Run]) -> None:
    """Add the missing scores after the last of some stages.

    These are those of its model on the text of each stage, and of the previous model on its text.

    Args:
        folder: The folder of the curriculum.
        stages: The stages so far, in order.

    Raises:
        UserError: `stage_scores.json` is damaged, or a model cannot be loaded.
    """
    rows = read_stage_scores(folder)
    last = stages[-1]
    pairs = [(last, text) for text in stages]
    if len(stages) > 1:
        pairs.insert(0, (stages[-2], last))
    loaded: LoadedRun | None = None
    for model, text in pairs:
        key = (model.path.name, text.path.name)
        if any((row["after"], row["text"], row["step"]) == (*key, select_checkpoint(model).step) for row in rows):
            continue
        if loaded is None or loaded.run.path != model.path:
            loaded = None  # frees the previous model first
            loaded = load_run(str(model.path))
        row: Row = {"after": model.path.name, "text": text.path.name, "step": loaded.step}
        row |= score(loaded, text)
        rows = [each for each in rows if (each["after"], each["text"]) != key] + [row]
        write_stage_scores(folder, rows)
        logger.info("after %s, held-out text of %s: %.3f bits per byte", *key, row["bits_per_byte"])


def forget(folder: Path, stages: Sequence[str]) -> None:
    """Remove the scores of stages other than these: their folders were removed to restart them."""
    rows = read_stage_scores(folder)
    kept = [row for row in rows if {row["after"], row["text"]} <= set(stages)]
    if len(kept) < len(rows):
        write_stage_scores(folder, kept)


def score(loaded: LoadedRun, text: Run) -> Row:
    """Score a model on the held-out text of a run.

    The batches are those that the run itself validates with, so that its own model gets the scores of the validation at
    its checkpoint.

    Args:
        loaded: The model.
        text: The run whose held-out text is used.

    Returns:
        The scores, see `slm_jax.training.validation.scores`.
    """
    config = text.read_config()
    corpus = open_corpus(text.corpus, loaded.tokenizer)
    graph, params = nnx.split(loaded.model, nnx.Param)
    evaluate = jax.jit(lambda params, batch: loss_sums(nnx.merge(graph, params), batch))
    held_out = corpus.held_out(config.eval.max_tokens)
    return validation.scores(config, held_out, lambda batch: evaluate(params, batch))


def table(rows: Sequence[Row]) -> str:
    """Return bits per byte as a text table: a line for each model, a column for the text of each stage."""
    models = sorted({row["after"] for row in rows})
    texts = sorted({row["text"] for row in rows})
    values = {(row["after"], row["text"]): f"{row['bits_per_byte']:.3f}" for row in rows}
    lines = [["held-out bits per byte of", *texts]]
    for model in models:
        lines.append([f"after {model}", *(values.get((model, text), "") for text in texts)])
    return text_table(lines, right=range(1, len(texts) + 1))
