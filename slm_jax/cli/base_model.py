"""The option `--base` of `--size auto`: find a finished run whose weights a small text can start from.

A run is suitable if it has finished, was trained to predict text, and its tokenizer restores a sample of the text
without needing many more tokens than for its own text. Of several, the one whose training took the most FLOPs is
proposed. A run that is named need only have a checkpoint and such a tokenizer.
"""

import bisect
import contextlib
import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.dial import AUTO
from slm_jax.config.paths import RUNS
from slm_jax.config.schema import Config, DataConfig
from slm_jax.config.shape import parameters_of
from slm_jax.data.sources.files import file_errors, find_files
from slm_jax.run.directory import Run, find_run, runs_by_age, stages_in
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural

NONE = "none"
_MIN_FIT = 0.6  # bytes per token of the text, as a share of those of the base's own text
_SAMPLE_PARTS = 6  # spread evenly over the bytes of all files
_SAMPLE_BYTES = 32_768  # of each part, of as many files as it takes
_NAMED = 3  # unsuitable runs that are named
_LOOKED_AT = 20  # newest runs that are looked at


@dataclass(frozen=True)
class Base:
    """A finished run that training can start from.

    Attributes:
        run: The run.
        config: Its options.
        parameters: Parameters of its model.
        vocab_size: Entries of its tokenizer.
        tokens: Tokens that it was trained on, all steps together.
        bytes_per_token: UTF-8 bytes per token of a sample of the new text.
        own_bytes_per_token: Those of its own training text; NaN if the run was kept without it.
        objections: Reasons not to choose it unless it is named.
    """

    run: Run
    config: Config
    parameters: int
    vocab_size: int
    tokens: float
    bytes_per_token: float
    own_bytes_per_token: float
    objections: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Return the options by dotted name that a run with these weights has."""
        saved = {name: value for name, value in self.config.flat().items() if is_shared(name)}
        del saved["model.dropout"]  # follows from the new text
        saved["tokenizer.path"] = ""  # the tokenizer is in the run
        return {**saved, "init.from_run": str(self.run.path)}

    def describe(self) -> str:
        """Return one line: the size, the training, and how the tokenizer fits the text."""
        from slm_jax.report.axes import format_compact  # NumPy, as below

        own = "" if math.isnan(self.own_bytes_per_token) else f", {self.own_bytes_per_token:.2f} of its own text"
        return (
            f"{self.run.path}: {format_compact(self.parameters)} parameters, trained on {format_compact(self.tokens)} "
            f"tokens; its tokenizer restores a sample of the text exactly, with {self.bytes_per_token:.2f} bytes per "
            f"token{own}"
        )


def is_shared(name: str) -> bool:
    """Return whether an option of a run follows from the run that it started from."""
    return name.startswith(("model.", "tokenizer.")) or name in ("train.sequence_length", "init.from_run")


def choose_base(name: str, files: Sequence[str]) -> tuple[Base | None, list[str]]:
    """Return the run to start from, and lines for the user about it.

    Args:
        name: Value of `--base`: a run, "auto", "none", or "" to only look for one.
        files: Paths and patterns of the text files; empty: the text is of another kind.

    Returns:
        The run, None to start with random weights; if `name` is "", the run that `--base auto` would use. Lines on what
        was found.

    Raises:
        UserError: The named run cannot be used, or the text is not in files.
    """
    if name.lower() == NONE or not (files or name):
        return None, []
    if not files:
        raise UserError(f"--base {name} looks at a sample of the text, which has to be in text files")
    sample = text_sample(find_files(files))
    if name and name.lower() != AUTO:
        base = _examine(find_run(str(_existing(name))), sample)
        notes = [f"note: {base.run.path} is {objection}" for objection in base.objections]
        return base, [f"base model: {base.describe()}", *notes]
    bases, unsuitable = _search(sample)
    if not bases:
        then = "a new model is trained" if name else ""
        return None, list(_none_found(unsuitable, then))
    best = max(bases, key=lambda base: base.parameters * base.tokens)
    count = plural(len(bases), "suitable run")
    which = f"the one of {count} in {RUNS} whose training took the most FLOPs" if len(bases) > 1 else "the only one"
    return best, [f"base model{'' if name else ' available'}: {best.describe()} ({which})"]


def require_same_base(name: str, run: Run, saved: Config) -> None:
    """Check `--base` of a run that exists: its initial weights cannot change; "auto" stands for those that it has.

    Args:
        name: Value of `--base`.
        run: The run.
        saved: Its config.

    Raises:
        UserError: It started with other weights.
    """
    started = saved.init.from_run
    if name.lower() == AUTO:
        return
    if name.lower() == NONE:
        is_same = not started
    else:
        folders = [Path(name), RUNS / name]
        # Of a curriculum the newest stage was taken, which need not be the newest one now.
        paths = [*folders, *(stage for folder in folders for stage in stages_in(folder))]
        with contextlib.suppress(UserError):  # it may have been removed since
            paths.append(find_run(str(_existing(name))).path)
        is_same = bool(started) and Path(started).resolve() in [path.resolve() for path in paths]
    if not is_same:
        weights = f"the weights of {started}" if started else "random weights"
        raise UserError(f"{run.path} started with {weights}: --base {name} needs another --run, or leave --base out")


def base_command(prog: str, base: Base, own: Mapping[str, str], overrides: Mapping[str, Any]) -> str:
    """Return the command line that starts with a base, in one line.

    Args:
        prog: The command.
        base: The base.
        own: Values of the command's own options by name, besides --size and --base; empty ones are left out.
        overrides: Options of the config by dotted name.
    """
    words = [*prog.split(), "--size", AUTO, "--base", str(base.run.path)]
    for name, value in own.items():
        words += [f"--{name}", value] if value else []
    for name, value in overrides.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return shlex.join(words)


def text_sample(paths: Sequence[Path]) -> str:
    """Return parts of some files, spread evenly over all their bytes, as one text; few bytes as a whole.

    Separators of documents, and characters that the ends of a part cut, are left out.
    """
    texts = [part.decode("utf-8", errors="ignore") for part in _sample_parts(paths)]
    return "\n".join(texts).replace(DataConfig().separator, "")


def _sample_parts(paths: Sequence[Path]) -> Iterator[bytes]:
    """Yield what files hold of some stretches of all their bytes, which do not overlap, one file at a time."""
    ends = list(itertools.accumulate(path.stat().st_size for path in paths))
    stretches = [(0, ends[-1])]
    if ends[-1] > _SAMPLE_PARTS * _SAMPLE_BYTES:
        distance = (ends[-1] - _SAMPLE_BYTES) / (_SAMPLE_PARTS - 1)
        starts = [round(part * distance) for part in range(_SAMPLE_PARTS)]
        stretches = [(start, start + _SAMPLE_BYTES) for start in starts]
    for start, stop in stretches:
        for index in range(bisect.bisect_right(ends, start), len(paths)):
            begin = ends[index - 1] if index else 0
            if begin >= stop:
                break
            with file_errors(paths[index]), paths[index].open("rb") as file:
                file.seek(max(start - begin, 0))
                yield file.read(min(stop, ends[index]) - max(start, begin))


def _existing(name: str) -> Path:
    """Return the path of a run that is given by its path, or by its name in `runs/`."""
    path = Path(name)
    return RUNS / name if not path.exists() and (RUNS / name).exists() else path


def _search(sample: str) -> tuple[list[Base], list[str]]:
    """Return the suitable runs in `runs/`, and the others with the reason, the newest first."""
    bases, unsuitable = [], []
    for run in reversed(runs_by_age()[-_LOOKED_AT:]):
        try:
            base = _examine(run, sample)
        except UserError as error:
            unsuitable.append(str(error))
            continue
        if base.objections:
            unsuitable.append(f"{run.path} is {base.objections[0]}")
        else:
            bases.append(base)
    return bases, unsuitable


def _none_found(unsuitable: Sequence[str], then: str) -> Iterator[str]:
    """Yield the line for no suitable run, none if there are no runs and none was asked for."""
    if not unsuitable and not then:
        return
    named = "; ".join(unsuitable[:_NAMED]) or f"there is no run in {RUNS}"
    more = f"; and {len(unsuitable) - _NAMED} more" if len(unsuitable) > _NAMED else ""
    yield f"base model: none is suitable ({named}{more}){', ' + then if then else ''}"


def _examine(run: Run, sample: str) -> Base:
    """Return a run as a base.

    Raises:
        UserError: It has no checkpoint, its tokenizer does not restore the text, or its files cannot be read.
    """
    from slm_jax.data.load import load_tokenizer

    config = run.read_config()
    step = run.newest_step()
    if step is None:
        raise UserError(f"{run.path} has no checkpoint")
    tokenizer = load_tokenizer(str(run.tokenizer))
    ids = tokenizer.encode(sample)
    if tokenizer.decode(ids) != sample:
        raise UserError(f"the tokenizer of {run.path} does not restore the text exactly")
    bytes_per_token = len(sample.encode()) / max(len(ids), 1)
    own = _own_bytes_per_token(run)
    objections = []
    if not _is_finished(run, config, step):
        objections.append(f"not finished (step {step} of {config.train.steps})")
    if config.train.objective != "next-token":
        objections.append(f"trained with train.objective {config.train.objective}")
    if bytes_per_token < _MIN_FIT * own:
        objections.append(
            f"of other text: its tokenizer has {bytes_per_token:.2f} bytes per token of this one, {own:.2f} of its own"
        )
    tokens = step * config.train.batch_size * config.train.sequence_length
    vocab_size = tokenizer.vocab_size
    parameters = parameters_of(config, vocab_size)
    return Base(run, config, parameters, vocab_size, tokens, bytes_per_token, own, tuple(objections))


def _is_finished(run: Run, config: Config, step: int) -> bool:
    if step >= config.train.steps:
        return True
    if not config.train.stop_early:
        return False
    from slm_jax.run.selection import newest_trend  # imports JAX, which the other runs do not need

    return newest_trend(run).is_over(config.train.stop_early)


def _own_bytes_per_token(run: Run) -> float:
    """Return the UTF-8 bytes per token of a run's training text; NaN if it was kept without its text."""
    from slm_jax.data.corpus.corpus import read_manifest

    try:
        manifest = read_manifest(run.corpus)
        entries = [run.corpus / part["folder"] for part in manifest.get("mix", ())]
        parts = [read_manifest(folder, run.corpus)["train"] for folder in entries] or [manifest["train"]]
    except UserError:
        return math.nan
    return sum(part["bytes"] for part in parts) / max(sum(part["tokens"] for part in parts), 1)
