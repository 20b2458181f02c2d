"""Names of tasks: NAME, NAME=FILE, and NAME:LABEL=FILE for several data sets of one task."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from slm_jax.data.sources.files import find_files
from slm_jax.evaluation.core_bundle import check_path
from slm_jax.evaluation.registry import CHAT_TASKS, TASKS
from slm_jax.utils.errors import UserError

SPECIAL_TASKS = {  # tasks that are not computed from records; the others are in registry.py
    "heldout": "held-out text of the run (or heldout=FILE): loss, perplexity, bits per byte, accuracy",
    "analogies": "word analogies by the embeddings (analogies=FILE, in the format of word2vec's questions-words.txt)",
    "core": "CORE of DataComp-LM: mean centered accuracy over 22 few-shot tasks (or core=DIR, the evaluation bundle)",
}
OPTION = "--tasks"


class TaskSpec(NamedTuple):
    """A requested task: NAME, NAME=FILE, or NAME:LABEL=FILE for several data sets of one task."""

    name: str
    label: str
    path: str

    @property
    def argument(self) -> str:
        """The form that `parse_tasks` accepts."""
        return f"{self.title}={self.path}" if self.path else self.title

    @property
    def title(self) -> str:
        """The name in result rows."""
        return f"{self.name}:{self.label}" if self.label else self.name


def parse_tasks(arguments: Sequence[str], option: str = OPTION) -> list[TaskSpec]:
    """Parse task arguments, each of which may hold several separated by commas.

    Args:
        arguments: The arguments.
        option: The option that they are from, for messages.

    Raises:
        UserError: A task is unknown or requested twice, or its file is missing.
    """
    specs = []
    for argument in (part.strip() for text in arguments for part in text.split(",")):
        if argument:
            specs.append(_parse_task(argument, option))
    if arguments and not specs:
        known = ", ".join([*SPECIAL_TASKS, *TASKS, *CHAT_TASKS])
        raise UserError(f"{option} names no task: give some of {known}, or omit the option")
    titles = [spec.title for spec in specs]
    repeated = [title for title in titles if titles.count(title) > 1]
    if repeated:
        title = repeated[0]
        raise UserError(f"{option}: {title} is given twice: distinguish them with a label, {title}:LABEL=FILE")
    return specs


def _parse_task(argument: str, option: str) -> TaskSpec:
    known = [*SPECIAL_TASKS, *TASKS, *CHAT_TASKS]
    title, _, path = argument.partition("=")
    name, _, label = title.partition(":")
    if argument.endswith("=") and not path:
        raise UserError(f"{option} {argument}: the path of the file is empty")
    if name not in known:
        similar = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise UserError(f"{option}: unknown task {name} (known: {', '.join(known)}){hint}")
    if not path and (name in ("analogies", "choices") or label):
        raise UserError(f"{option} {title} needs a file: {title}=FILE")
    if path:
        try:
            if name == "core":
                check_path(path)
            else:
                find_files((path,))
        except UserError as error:
            raise UserError(f"{option} {argument}: {str(error).removeprefix('data.files: ')}") from None
    return TaskSpec(name, label, path)
