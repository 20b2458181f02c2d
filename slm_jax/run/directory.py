"""The run directory: everything needed to go on, to evaluate, to generate or to export is in it.

runs/NAME/config.toml       the resolved config
          tokenizer.hybtok     the tokenizer
          corpus/           the tokenised text
          checkpoints/      the newest few states (`checkpoint.folder`: elsewhere)
          metrics.jsonl     one row per step
          layers.jsonl      norms of each layer (`log.layers`)
          profile/          traces of chosen steps (`log.profile`)
          samples.md        texts written during training
          loss.png          the curves
          environment.json  versions and device of each call
          report.html       all of it to be looked at

A curriculum (orchestrator) is a folder with curriculum.toml, the tokenizer, benchmarks.csv, and in stages/01-NAME,
stages/02-NAME… a run for each stage.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.paths import CURRICULUM, RUNS, STAGES
from slm_jax.config.presets import read_toml
from slm_jax.config.schema import Config
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_partial, locked_folder, replace_text


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    run: Path
    step: int
    metrics: dict[str, Any]  # the last row of metrics.jsonl
    stopped_by: int | None = None  # the signal that ended it before its last step
    signal: int | None = None  # the signal that came, also at its last step


@dataclass(frozen=True)
class Run:
    """The places of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.toml"

    @property
    def tokenizer(self) -> Path:
        """The saved tokenizer."""
        return self.path / "tokenizer.hybtok"

    @property
    def corpus(self) -> Path:
        """The folder of tokenised text."""
        return self.path / "corpus"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints: `checkpoint.folder`, which may be of a bucket, or in the run."""
        section = read_toml(self.config).get("checkpoint", {}) if self.exists() else {}
        if not section.get("folder"):
            return self.path / "checkpoints"
        from etils import epath  # reads buckets as well; slow to import

        return epath.Path(section["folder"])  # has the methods of a Path

    @property
    def metrics(self) -> Path:
        """One JSON row per step."""
        return self.path / "metrics.jsonl"

    @property
    def layers(self) -> Path:
        """One JSON row of norms for some steps."""
        return self.path / "layers.jsonl"

    @property
    def profile(self) -> Path:
        """The folder of traces."""
        return self.path / "profile"

    @property
    def samples(self) -> Path:
        """Texts written during training."""
        return self.path / "samples.md"

    @property
    def plot(self) -> Path:
        """The loss and learning-rate curves."""
        return self.path / "loss.png"

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint, None without any. Raises UserError where the folder cannot be read."""
        folder = self.checkpoints
        try:
            return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=None)
        except Exception as error:  # no permission; and of a bucket anything may come
            raise UserError(f"the folder of checkpoints {folder} cannot be read ({error})") from None

    @property
    def environment(self) -> Path:
        """Versions and device of each call."""
        return self.path / "environment.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def exists(self) -> bool:
        """Whether a run was begun here. Raises UserError where that cannot be seen."""
        try:
            return self.config.is_file()
        except OSError as error:  # no permission, a name that is too long
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None

    def read_config(self) -> Config:
        """The saved config. Raises UserError if there is none or it does not fit this version."""
        return Config.from_tree(read_toml(self.config), origin=str(self.config))

    def begin(self, config: Config) -> None:
        """Save the config of a new run in the locked directory, or check that an old one's is the same but for what may
        change (`save_config` notes that, once the run is known to go on).

        Raises UserError that names the fields of another config.
        """
        # Before the text is whole and anything was trained, nothing is bound to the config yet.
        if self.exists() and (self.corpus.is_dir() or self.newest_step() is not None):
            resumable = Config.fields_with("resumable")
            differ = {k: v for k, v in self.read_config().differences(config).items() if k not in resumable}
            if differ:
                fields = "\n".join(f"  {name}: {old!r} there, {new!r} here" for name, (old, new) in differ.items())
                raise UserError(
                    f"{self.path} is a run of another config: give the same values, or use another --run (with "
                    f"--init.from_run {self.path} it begins with the weights of this one). "
                    f"{'One option differs' if len(differ) == 1 else f'{len(differ)} options differ'}:\n{fields}"
                )
            return
        if not self.exists() and {p.name for p in self.path.iterdir() if not is_partial(p)} - {".lock"}:
            if (self.path / CURRICULUM).is_file():
                raise UserError(f"{self.path} is a curriculum: python -m slm_jax.orchestrator --run {self.path}")
            raise UserError(
                f"{self.path} holds files but no run (no config.toml): use another --run or an empty folder"
            )
        self.save_config(config)

    def save_config(self, config: Config) -> None:
        """Keep the resolved config."""
        replace_text(self.config, config.to_toml())

    @contextlib.contextmanager
    def lock(self, checkpoints: str = "") -> Iterator[None]:
        """Held while a process trains this run. Raises UserError if another one does, or writes to the same folder of
        checkpoints (`checkpoint.folder`; a bucket's is not locked)."""
        with contextlib.ExitStack() as locks:
            locks.enter_context(locked_folder(self.path, f"training {self.path}", "--run"))
            if checkpoints and "://" not in checkpoints:
                folder = Path(checkpoints)
                locks.enter_context(locked_folder(folder, f"saving its checkpoints in {folder}", "--checkpoint.folder"))
            yield


def new_run(config: Config) -> Run:
    """A fresh `runs/SOURCE-DIMxDEPTH-TIME-HASH`."""
    digest = hashlib.sha256(config.to_toml().encode()).hexdigest()[:4]
    source = re.sub(r"[^A-Za-z0-9.]+", "-", "mix" if config.data.mix else config.data.source)
    name = f"{source}-{config.model.dim}x{config.model.depth}-{time.strftime('%Y%m%d-%H%M%S')}-{digest}"
    taken = sum(1 for _ in RUNS.glob(f"{name}*"))
    return Run(RUNS / (f"{name}-{taken + 1}" if taken else name))


def find_run(path: str | None, trained: bool = False) -> Run:
    """The run at a path, or the newest in `runs/` (trained: that has a checkpoint); of a curriculum its newest stage.

    Raises UserError, with those there are, if there is none.
    """
    found = [run for folder in RUNS.glob("*") if (run := _run_in(folder)) is not None]
    runs = sorted(found, key=lambda run: run.path.stat().st_mtime)
    if path is None:
        runs = [run for run in runs if not trained or run.newest_step() is not None]
        if not runs:
            raise UserError(f"there is no run in {RUNS.absolute()}: train one with python -m slm_jax.train")
        return runs[-1]
    run = _run_in(Path(path))
    if run is None:
        there = f"; there are: {', '.join(str(run.path) for run in runs[-5:])}" if runs else ""
        raise UserError(f"no run in {path} (no config.toml there){there}")
    return run


def _run_in(folder: Path) -> Run | None:
    """The run in a folder, or the newest stage of a curriculum: with a checkpoint, else that was begun at all."""
    if Run(folder).exists():
        return Run(folder)
    begun = [Run(stage) for stage in stages_in(folder)]
    return next((run for run in reversed(begun) if run.newest_step() is not None), begun[-1] if begun else None)


def stages_in(folder: Path) -> list[Path]:
    """The runs of a curriculum's stages that were begun, in order."""
    return sorted(path.parent for path in (folder / STAGES).glob("*/config.toml"))


def curriculum_of(run: Run) -> Path | None:
    """The folder of the curriculum that a run is a stage of."""
    stages = run.path.absolute().parent
    return run.path.parent.parent if stages.name == STAGES and (stages.parent / CURRICULUM).is_file() else None
