"""The command line `python -m slm_jax.evaluate`: what a run's model can do, with confidence intervals."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from slm_jax.cli.options import read_options
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """Measure the newest model of a run: held-out text, BLiMP, LAMBADA, analogies, multiple choice.

    Tasks are names, with spaces or commas between them; NAME=FILE is a set of your own, NAME:LABEL=FILE one of several
    of a kind.

    Every figure comes with its 95 % interval. They are printed and kept in RUN/evaluation.json, where a task that is
    measured again takes the place of what it was. Sets come from the Hugging Face hub (fetched once, kept in the user's
    cache; needs the extra [data]) or from a file of the same columns: --tasks blimp=blimp.jsonl.xz

    Exit status: 0, or 2 where a task that was asked for could not be measured (the others are).
    """

    tasks: tuple[str, ...] = ()
    """What to measure; `list` explains all. None: heldout, blimp and lambada, as far as they are there."""
    run: str = ""
    """The run directory; empty: the newest in runs/."""
    max_items: int = 0
    """Rows of each set at most, drawn by a fixed seed; 0: all."""
    max_tokens: int = 1_000_000
    """Tokens of held-out text at most; 0: all."""
    context: int = 0
    """Tokens that the model sees at most; 0: the length that it was trained at."""
    stride: int = 0
    """Tokens that each further window of a long text scores (1: each has the whole context); 0: half the context."""
    batch_tokens: int = 0
    """Tokens computed at once; 0: as suits the device."""
    every_group: Annotated[bool, tyro.conf.arg(name="all")] = False
    """Print every group, also BLiMP's 67 paradigms (evaluation.json always holds them)."""
    json: bool = False
    """Print the new rows as JSON instead of a table."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Raises UserError."""
    options = read_options(Options, args, "python -m slm_jax.evaluate")
    problems = [
        f"{name} {getattr(options, name)} must be {least} or more"
        for name, least in (("max_items", 0), ("max_tokens", 0), ("context", 0), ("stride", 0), ("batch_tokens", 0))
        if getattr(options, name) < least
    ]
    if problems:
        raise UserError("; ".join(problems))
    from slm_jax.evaluation import suite

    if "list" in options.tasks:
        print(explain())
        return
    from slm_jax.utils.process import tune_process

    tune_process()
    found = suite.evaluate(
        options.run or None,
        options.tasks,
        context=options.context,
        stride=options.stride,
        max_items=options.max_items,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
    )
    if options.json:
        print(json.dumps({"results": found.rows, "tasks": found.tasks, "missing": found.missing}, indent=1))
    elif found.rows:
        print(suite.table(found.rows, options.every_group))
        for title, about in found.tasks.items():
            print(f"\n{title}: {about['data']}. {about['note']} ({about['dtype']}, step {about['step']}).")
    if found.missing:
        text = f"not measured: {', '.join(found.missing)} (see above)"  # with its reason, as soon as it was known
        if options.tasks or not found.rows:
            raise UserError(text)
        print(f"\n{text}", file=sys.stderr)


def explain() -> str:
    """Every task in a few words: what it is, where its set lies, and the columns of a file in its place."""
    from slm_jax.evaluation.analogies import COLUMNS
    from slm_jax.evaluation.registry import TASKS
    from slm_jax.evaluation.suite import OWN

    lines = ["Tasks (--tasks NAME, or NAME=FILE for a file of your own):"]
    for name, about in OWN.items():
        more = {"heldout": "text, or rows with the column text", "analogies": COLUMNS}[name]
        lines += [f"  {name:14} {about}", f"  {'':14} file: {more}"]
    for name, task in TASKS.items():
        lines.append(f"  {name:14} {task.about}")
        where = f"hub: {task.hub.repo}; " if task.hub else ""
        lines.append(f"  {'':14} {where}file: JSONL or Parquet (also .gz, .xz, .zst) with {', '.join(task.columns)}")
    return "\n".join(lines)
