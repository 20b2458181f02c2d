"""The command `python -m slm_jax.evaluate`: measure the model of a run, with confidence intervals."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, read_options
from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Options:
    """Measure the model of a run: held-out text, BLiMP, LAMBADA, multiple choice, conversations, CORE and more.

    Tasks are separated by spaces or commas. NAME=FILE measures a data set of your own, NAME:LABEL=FILE one of several
    for the same task.

    Metrics have 95 % confidence intervals where there is more than one item. The results are printed and stored in
    RUN/evaluation.json, where a task that is measured again replaces its earlier results. Data sets come from the
    Hugging Face hub (downloaded once to the user's cache; requires the extra [data]) or from a file with the same
    columns: --tasks blimp=blimp.jsonl.xz

    Exit status: 0, or 2 if a requested task could not be measured (the others are).
    """

    tasks: tuple[str, ...] = ()
    """Tasks to measure; `list` describes all. Default: heldout, blimp and lambada, as far as available."""
    run: Annotated[
        str, Flag(metavar="PATH", bare=bare_words.run_folders(hint="--tasks heldout={} measures this text"))
    ] = ""
    """The run directory; empty: the newest in runs/."""
    step: Annotated[str, Flag(metavar="best|last|N")] = ""
    """The checkpoint; empty: the best one if the validation does not improve any more, otherwise the last."""
    max_items: int = 0
    """Maximum number of records of each data set, a random subset with a fixed seed; 0: all."""
    limit: int = 0
    """The same as --max_items, by its name in lm-evaluation-harness."""
    max_tokens: int = 1_000_000
    """Tokens of held-out text, about: whole documents, at least one; 0: all."""
    context: int = 0
    """Maximum number of input tokens; 0: the length that the model was trained at."""
    stride: int = 0
    """Tokens that each further window of a long text scores (1: all have the full context); 0: half the context."""
    batch_tokens: int = 0
    """Tokens per batch; 0: a default for the device."""
    contamination: bool = False
    """Also find the items that share 13 consecutive words with the training text, and score the others alone."""
    every_group: Annotated[bool, Flag(name="all")] = False
    """Print every group, including BLiMP's 67 paradigms (evaluation.json always contains them)."""
    json: bool = False
    """Print the new results as JSON instead of a table."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: Arguments; None: those of the process.

    Raises:
        UserError: Invalid arguments, an unknown run, or a requested task that could not be measured.
    """
    options = read_options(Options, args, "python -m slm_jax.evaluate")
    problems = [
        f"--{name} {getattr(options, name)} must be 0 or more"
        for name in ("max_items", "limit", "max_tokens", "context", "stride", "batch_tokens")
        if getattr(options, name) < 0
    ]
    if options.limit and options.max_items and options.limit != options.max_items:
        problems.append(f"--limit {options.limit} and --max_items {options.max_items} are the same option: give one")
    if problems:
        raise UserError("; ".join(problems))
    from slm_jax.evaluation import suite

    if "list" in options.tasks:
        print(describe_tasks())
        return
    from slm_jax.utils.process import tune_process

    tune_process()
    evaluation = suite.evaluate(
        options.run or None,
        options.tasks,
        step=options.step,
        context=options.context,
        stride=options.stride,
        max_items=options.max_items or options.limit,
        max_tokens=options.max_tokens,
        batch_tokens=options.batch_tokens,
        contamination=options.contamination,
    )
    if options.json:
        results = {
            "results": evaluation.rows,
            "tasks": evaluation.tasks,
            "missing": evaluation.missing,
            "unstored": evaluation.unstored,
        }
        print(json.dumps(results, indent=1))
    elif evaluation.rows:
        print(suite.format_table(evaluation.rows, options.every_group))
        for title, about in evaluation.tasks.items():
            print(f"\n{title}: {about['data']}. {about['note']} ({about['dtype']}, step {about['step']}).")
    if evaluation.missing:
        text = f"not measured: {', '.join(evaluation.missing)} (see above)"  # the reasons were logged
        if options.tasks or not evaluation.rows:
            raise UserError(text)
        print(f"\n{text}", file=sys.stderr)
    if evaluation.unstored:
        raise UserError(f"not stored: {', '.join(evaluation.unstored)} (see above)")


def describe_tasks() -> str:
    """Return a description of every task: its metrics, its data set, and the columns of a file that replaces it."""
    from slm_jax.evaluation import analogies
    from slm_jax.evaluation.datasets import required_columns
    from slm_jax.evaluation.registry import CHAT_TASKS, TASKS
    from slm_jax.evaluation.specs import SPECIAL_TASKS

    formats = {
        "heldout": "text, or records with the column text, of instructions or of conversations",
        "analogies": analogies.FORMAT,
    }
    formats["core"] = "folder or zip file with core.yaml, eval_meta_data.csv and eval_data/, or hf:OWNER/NAME"
    lines = ["Tasks (--tasks NAME, or NAME=FILE for a file of your own):"]
    for name, description in SPECIAL_TASKS.items():
        lines += [f"  {name:17} {description}", f"  {'':17} file: {formats[name]}"]
    for name, task in TASKS.items():
        hub = f"hub: {task.hub.repo}; " if task.hub else ""
        columns = required_columns(task.columns)
        lines.append(f"  {name:17} {task.description}")
        lines.append(f"  {'':17} {hub}file: JSONL or Parquet (or .gz, .xz, .zst) with {columns}")
    for name, chat_task in CHAT_TASKS.items():
        lines.append(f"  {name:17} {chat_task.description}")
        lines.append(f"  {'':17} built in; file: JSONL or Parquet with {required_columns(chat_task.columns)}")
    return "\n".join(lines)
