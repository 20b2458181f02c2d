"""What each stage of a curriculum did to the held-out text of all of them: what was gained, kept and forgotten.

`stage_scores.json` in the curriculum's folder has a row for each model (after which stage) and text (of which stage):
each stage's model on the text of all stages so far, and on that of the next one, where that begins.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from flax import nnx

from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun, load_run
from slm_jax.run.results import Row, read_stage_scores, write_stage_scores
from slm_jax.training import validation
from slm_jax.training.train_step import loss_sums


def update(folder: Path, stages: Sequence[Run], say: Callable[[str], None]) -> None:
    """Measure what is missing, after the last of the stages: its model on the text of each, and the model before on its
    text. Raises UserError if the file is damaged."""
    rows = read_stage_scores(folder)
    last = stages[-1]
    wanted = [(last, text) for text in stages]
    if len(stages) > 1:
        wanted.insert(0, (stages[-2], last))
    models: dict[Path, LoadedRun] = {}
    for model, text in wanted:
        step = model.newest_step()
        if any((row["after"], row["text"], row["step"]) == (model.path.name, text.path.name, step) for row in rows):
            continue
        if model.path not in models:
            models = {model.path: load_run(str(model.path))}  # one at a time in memory
        found = {"after": model.path.name, "text": text.path.name, "step": models[model.path].step}
        found |= score(models[model.path], text)
        rows = [row for row in rows if (row["after"], row["text"]) != (model.path.name, text.path.name)] + [found]
        write_stage_scores(folder, rows)
        say(f"after {model.path.name}, held-out text of {text.path.name}: {found['bits_per_byte']:.3f} bits per byte")


def forget(folder: Path, stages: Sequence[str]) -> None:
    """Drop the rows of other stages than these: their folders were removed, to begin them anew."""
    rows = read_stage_scores(folder)
    kept = [row for row in rows if {row["after"], row["text"]} <= set(stages)]
    if len(kept) < len(rows):
        write_stage_scores(folder, kept)


def score(loaded: LoadedRun, text: Run) -> Row:
    """Loss, accuracy and bits per byte of a model on the held-out text of a run, in the batches that the run itself
    validates in (so that its own model gets the figures of its last validation)."""
    config = text.read_config()
    corpus = open_corpus(text.corpus, loaded.tokenizer)
    graph, params = nnx.split(loaded.model, nnx.Param)
    evaluate = jax.jit(lambda params, batch: loss_sums(nnx.merge(graph, params), batch))
    held_out = corpus.validation.head(config.eval.max_tokens)
    return validation.scores(config, held_out, lambda batch: evaluate(params, batch))


def table(rows: Sequence[Row]) -> str:
    """Bits per byte: a line for each model, a column for the held-out text of each stage."""
    names = sorted({row["after"] for row in rows})
    texts = sorted({row["text"] for row in rows})
    found = {(row["after"], row["text"]): f"{row['bits_per_byte']:.3f}" for row in rows}
    first = "held-out bits per byte of"
    width = max(len(first), *(len(f"after {name}") for name in names))
    lines = ["  ".join([first.ljust(width), *texts])]
    for name in names:
        cells = [found.get((name, text), "").rjust(len(text)) for text in texts]
        lines.append("  ".join([f"after {name}".ljust(width), *cells]).rstrip())
    return "\n".join(lines)
