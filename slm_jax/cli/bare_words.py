"""Words on the command line without the name of an option: text files, runs and prompts.

Each function accepts the words that a command takes in this way. A word that is evidently something else is refused
with the option that it belongs to.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from slm_jax.config.paths import CURRICULUM
from slm_jax.config.presets import preset_names
from slm_jax.config.source_names import is_source
from slm_jax.run.directory import Run, stages_in
from slm_jax.utils.errors import UserError


def text_files(words: Sequence[str]) -> None:
    """Accept files, folders and globs of text to train on.

    Raises:
        UserError: A word is a run, a config, a named source, or nothing that exists.
    """
    for word in words:
        if not word.strip():
            raise UserError("a path is empty (an unset variable of the shell?); the current folder is '.'")
        if is_run(word):
            raise UserError(f"{word} is a run: --run {word} uses it; --init.from_run {word} starts from its weights")
        _refuse_configs(word)
        if exists(word) or is_glob(word):
            continue
        if is_source(word):
            raise UserError(f"{word} is a named source: --data.source {word}")
        raise UserError(f"there is no file or folder {word} (in {Path.cwd()}); text to train on is expected here")


def run_folders(config: bool = False, hint: str = "") -> Callable[[Sequence[str]], None]:
    """Return a function that accepts run directories.

    Args:
        config: The command has the option `--config`.
        hint: How the command takes a file, with {} for its path; empty: not at all.
    """

    def accept(words: Sequence[str]) -> None:
        for word in words:
            if config:
                _refuse_configs(word)
            if exists(word) and Path(word).is_file():
                raise UserError(f"{word} is a file, not a run directory{'; ' + hint.format(word) if hint else ''}")

    return accept


def config_files(words: Sequence[str]) -> None:
    """Accept a TOML file or the name of a preset.

    Raises:
        UserError: It is a run or curriculum.
    """
    for word in words:
        if is_run(word):
            raise UserError(f"{word} is a run or curriculum: --run {word}")


def prompts(words: Sequence[str]) -> None:
    """Accept prompts.

    Raises:
        UserError: A word is a run or a file, or the words look like one prompt without quotation marks.
    """
    for word in words:
        if is_run(word):
            raise UserError(f"{word} is a run: --run {word} uses it; give a prompt as well")
        if "." in word and exists(word) and Path(word).is_file():
            raise UserError(f"{word} is a file: --prompts {word} reads a prompt from each line, --prompt continues it")
    if len(words) > 1 and not any(" " in word for word in words):
        text = " ".join(words)
        raise UserError(f"{text}: quote a prompt of several words ('{text}'), or give each prompt with --prompt")


def is_glob(word: str) -> bool:
    """Return whether a word is a pattern of file names."""
    return any(character in word for character in "*?[")


def is_run(word: str) -> bool:
    """Return whether a word is the path of a run or curriculum."""
    return exists(word) and (
        Run(Path(word)).exists() or (Path(word) / CURRICULUM).is_file() or bool(stages_in(Path(word)))
    )


def _refuse_configs(word: str) -> None:
    """Raise UserError if a word is a config file, or the name of a preset and of nothing else."""
    if word.endswith(".toml"):
        raise UserError(f"{word} is a config: --config {word}")
    if exists(word):
        return
    if word in preset_names():
        raise UserError(f"{word} is a preset: --config {word}")
    if word in preset_names(curricula=True):
        raise UserError(f"{word} is a curriculum: python -m slm_jax.orchestrator --config {word}")


def exists(word: str) -> bool:
    """Return whether a word is the path of something."""
    try:
        return bool(word) and Path(word).exists()
    except (OSError, ValueError):  # too long for a name; a null character
        return False
