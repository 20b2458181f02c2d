"""The run directory: everything needed to resume, evaluate, generate or export is in it.

    runs/NAME/config.toml       the resolved config
              tokenizer.hybtok  the tokenizer (tokenizer.foreign.zip: that of a published model)
              corpus/           the tokenized text
              checkpoints/      the newest training states (`checkpoint.folder`: elsewhere); base/: frozen weights
              pairs/            preference pairs (DPO)
              reference/        log-probabilities of the reference (DPO)
              metrics.jsonl     one row per step
              layers.jsonl      norms of each layer (`log.layers`)
              profile/          traces of some steps (`log.profile`)
              samples.md        texts generated during training
              evaluation.json   results of `python -m slm_jax.evaluate`
              environment.json  versions and devices of each call of `train`
              loss.png          the training curve
              report.html       a page about all of this

A curriculum is a folder with curriculum.toml, the tokenizer, benchmarks.csv, stage_scores.json, and a run for each
stage in stages/01-NAME, stages/02-NAME…
"""

import contextlib
import logging
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_jax.config.paths import CURRICULUM, RUNS, STAGES
from slm_jax.config.presets import read_toml
from slm_jax.config.schema import Config
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_partial, locked_folder, replace_text
from slm_jax.utils.tokenizer_files import tokenizer_file

logger = logging.getLogger(__name__)

_CONFIG_HEADER = "# The resolved options of a run. After an edit by hand, shorten the last line to '# end'."
_CONFIG_END = "# end"
UNUSED = ".unused"  # marks a directory that `naming.new_run` has created, until the run begins


@dataclass(frozen=True)
class Run:
    """A run directory and the paths of its files.

    Attributes:
        path: The directory; it may not exist yet.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, TOML."""
        return self.path / "config.toml"

    @property
    def tokenizer(self) -> Path:
        """The saved tokenizer, of whichever kind; `tokenizer.hybtok` if there is none yet."""
        return tokenizer_file(self.path)

    @property
    def corpus(self) -> Path:
        """The folder of the tokenized text."""
        return self.path / "corpus"

    @property
    def pairs(self) -> Path:
        """The folder of the preference pairs of a DPO run, see `slm_jax.data.pairs`."""
        return self.path / "pairs"

    @property
    def reference(self) -> Path:
        """The folder of the reference's log-probabilities of a DPO run, see `slm_jax.training.dpo.reference`."""
        return self.path / "reference"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints: `checkpoint.folder` (also of a bucket), or a folder in the run."""
        section = self.read_options().get("checkpoint", {}) if self.exists() else {}
        if not section.get("folder"):
            return self.path / "checkpoints"
        from etils import epath  # slow to import; reads buckets as well

        return epath.Path(section["folder"])  # has the methods of a Path

    @property
    def metrics(self) -> Path:
        """One JSON row per step, see `slm_jax.run.metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def trial(self) -> Path:
        """The number of steps that a speed trial chose, see `slm_jax.run.speed_trial`."""
        return self.path / "trial.json"

    @property
    def layers(self) -> Path:
        """JSON rows with the norms of each layer, see `slm_jax.run.metrics`."""
        return self.path / "layers.jsonl"

    @property
    def profile(self) -> Path:
        """The folder of profiler traces."""
        return self.path / "profile"

    @property
    def samples(self) -> Path:
        """Texts generated during training, see `slm_jax.run.samples`."""
        return self.path / "samples.md"

    @property
    def plot(self) -> Path:
        """The training curve, PNG."""
        return self.path / "loss.png"

    @property
    def environment(self) -> Path:
        """Versions and devices of each call of `train`, see `slm_jax.run.environment`."""
        return self.path / "environment.json"

    @property
    def report(self) -> Path:
        """The report, HTML."""
        return self.path / "report.html"

    def exists(self) -> bool:
        """Return whether there is a run in the directory.

        Raises:
            UserError: The directory cannot be read.
        """
        try:
            return self.config.is_file()
        except OSError as error:  # no permission, or the name is too long
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None

    def is_new(self) -> bool:
        """Return whether the directory does not exist, or was created by `naming.new_run` and holds nothing yet."""
        if self.exists():
            return False
        return not self.path.exists() or ((self.path / UNUSED).exists() and not self._holds_other_files())

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, None without any.

        Raises:
            UserError: The folder of the checkpoints cannot be read.
        """
        folder = self.checkpoints
        try:
            return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=None)
        except Exception as error:  # no permission; a bucket's library raises errors of its own
            raise UserError(f"the folder of checkpoints {folder} cannot be read ({error})") from None

    def read_options(self) -> dict[str, Any]:
        """Return the saved options as nested dicts, not validated.

        Raises:
            UserError: There is no config, or it is damaged.
        """
        tree = read_toml(self.config)
        _verify_config(self.config, tree)
        return tree

    def read_config(self) -> Config:
        """Return the saved config.

        Raises:
            UserError: There is none, it is damaged, or it does not fit this version.
        """
        return Config.from_tree(self.read_options(), origin=str(self.config))

    def save_config(self, config: Config) -> None:
        """Replace the saved config. Its last line holds a checksum of the lines above it."""
        text = f"{_CONFIG_HEADER}\n\n{config.to_toml()}"
        checksum = f"{zlib.crc32(text.encode()):08x}"
        replace_text(self.config, f"{text}\n{_CONFIG_END}, CRC-32 of the lines above: {checksum}\n")

    def begin(self, config: Config) -> None:
        """Start a run in the locked directory, or check that an existing one can be resumed with a config.

        Options become binding when something depends on them: those of the text and the tokenizer with the corpus, the
        others with the first checkpoint. Until then they may be changed, so that a run that was refused because it
        does not fit into memory can be started again in the same directory. Options with the trait `resumable` may
        always change.

        Args:
            config: The config to train with. It is saved unless there is a checkpoint; then the caller saves it once
                the run has been restored.

        Raises:
            UserError: The directory holds other files, or the run has other values of binding options, which are named.
        """
        if not self.exists():
            self._require_empty()
            self.save_config(config)
            (self.path / UNUSED).unlink(missing_ok=True)
            return
        has_checkpoint = self.newest_step() is not None
        if not has_checkpoint and not self.corpus.is_dir():
            self.save_config(config)
            return
        saved = self.read_config()
        self.require_no_conflicts(self.conflicts(saved, config))
        # A new attempt replaces the options of one that was refused; otherwise the microbatch that fitted stays saved.
        if not has_checkpoint and set(saved.differences(config)) - Config.fields_with("resumable"):
            self.save_config(config)

    def conflicts(self, saved: Config, config: Config) -> dict[str, tuple[Any, Any]]:
        """Return the options that must not differ between two configs for this run, as {name: (saved, new)}.

        With a checkpoint these are all but the `resumable` ones; with a corpus only, those that the corpus and the
        tokenizer depend on; without either, none.
        """
        return self.binding(saved.differences(config))

    def binding(self, differences: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
        """Return those of the differing options, {name: (saved, new)}, that must not differ; see `conflicts`."""
        if self.newest_step() is not None:
            resumable = Config.fields_with("resumable")
        elif self.corpus.is_dir():
            resumable = Config.fields_with("resumable") | {name for name in Config.fields() if not _shapes_corpus(name)}
        else:
            return {}
        return {name: values for name, values in differences.items() if name not in resumable}

    def require_no_conflicts(self, conflicts: dict[str, tuple[Any, Any]]) -> None:
        """Refuse conflicting options.

        Raises:
            UserError: There are conflicts; names them, with the saved and the new value of each.
        """
        if not conflicts:
            return
        listed = "\n".join(f"  {name}: {old!r} saved, {new!r} current" for name, (old, new) in conflicts.items())
        count = "One option differs" if len(conflicts) == 1 else f"{len(conflicts)} options differ"
        raise UserError(
            f"{self.path} is a run with another config: give the same values, or use another --run (with "
            f"--init.from_run {self.path} it starts with the weights of this run). {count}:\n{listed}"
        )

    def _require_empty(self) -> None:
        """Raise UserError if the directory holds files that are not those of a run."""
        if not self._holds_other_files():
            return
        if (self.path / CURRICULUM).is_file():
            raise UserError(f"{self.path} is a curriculum: python -m slm_jax.orchestrator --run {self.path}")
        raise UserError(f"{self.path} holds files but no run (no config.toml): use another --run or an empty folder")

    def _holds_other_files(self) -> bool:
        """Return whether the directory holds files besides the lock and the mark of an unused one."""
        return bool({path.name for path in self.path.iterdir() if not is_partial(path)} - {".lock", UNUSED})

    @contextlib.contextmanager
    def lock(self, checkpoints: str = "") -> Iterator[None]:
        """Hold the lock of the run, so that one process at a time trains it.

        Args:
            checkpoints: `checkpoint.folder`, which is locked as well unless it is of a bucket.

        Raises:
            UserError: Another process holds one of the locks.
        """
        with contextlib.ExitStack() as locks:
            locks.enter_context(locked_folder(self.path, f"training {self.path}", "--run"))
            if checkpoints and "://" not in checkpoints:
                folder = Path(checkpoints)
                locks.enter_context(locked_folder(folder, f"saving its checkpoints in {folder}", "--checkpoint.folder"))
            yield


def _verify_config(path: Path, tree: dict[str, Any]) -> None:
    """Check that the config of a run is complete: one that is cut at the end of a line is still valid TOML.

    Raises:
        UserError: It is not.
    """
    text = path.read_text(encoding="utf-8-sig")
    body, _, last = text.rstrip("\n").rpartition("\n")
    if last.startswith(_CONFIG_END):
        checksum = last.removeprefix(_CONFIG_END).rpartition(" ")[2]
        if checksum and checksum != f"{zlib.crc32(body.encode()):08x}":
            raise UserError(
                f"{path} differs from its checksum: it is damaged, restore it; or if you edited it, shorten its last "
                f"line to {_CONFIG_END!r}"
            )
    # Earlier versions wrote no such line, but every option; mesh.tensor is the last one of the first version.
    elif text.startswith(_CONFIG_HEADER) or "tensor" not in tree.get("mesh", {}):
        raise UserError(f"{path} is damaged: its end is missing. Restore it, or start another --run")


def other_input_error(step: int, other: str, saved: object, current: object) -> UserError:
    """Return the error for a checkpoint that was saved with another input than training has now.

    Args:
        step: The step of the checkpoint.
        other: The input: "another tokenizer", "another text", …
        saved: The value or the fingerprint that the checkpoint was saved with.
        current: That of this call.
    """
    return UserError(
        f"the checkpoint of step {step} was saved with {other} ({saved}, now {current}): restore what the run was "
        "started with, or start another --run"
    )


def _shapes_corpus(name: str) -> bool:
    """Return whether the corpus or the tokenizer of a run depends on an option; `data.mode` only shapes batches."""
    return name.startswith(("data.", "tokenizer.", "init.from_")) and name != "data.mode"


def find_run(path: str | None, trained: bool = False) -> Run:
    """Find a run.

    Args:
        path: A run directory; a curriculum stands for its newest stage; None: the newest run in `runs/` that can be
            read; the others are skipped with a warning.
        trained: Without a path, consider only runs with a checkpoint.

    Raises:
        UserError: There is no such run (the newest runs are named), or that in `path` cannot be read.
    """
    if path is None:
        return _newest_run(trained)
    run = _run_in(Path(path))
    if run is None:
        # The run that this very command is creating has no text yet; checkpoints may be in a bucket.
        named = [run for run in runs_by_age() if run.corpus.is_dir()]
        shown = named[-5:]
        kind = "existing" if shown == named else "newest"
        known = f"; {kind} runs: {', '.join(str(run.path) for run in shown)}" if shown else ""
        raise UserError(f"no run in {path} (it has no config.toml){known}")
    return run


def _newest_run(trained: bool) -> Run:
    """Return the newest run in `runs/` that can be read, with `trained` the newest one with a checkpoint."""
    runs = runs_by_age()
    run = first_readable(reversed(runs), trained)
    if run is None:
        kind = "no run with a checkpoint" if runs else "no run"
        raise UserError(f"there is {kind} in {RUNS.absolute()}: train one with python -m slm_jax.train")
    return run


def first_readable(runs: Iterable[Run], trained: bool = False) -> Run | None:
    """Return the first of some runs that can be read; those before it are skipped with a warning.

    Args:
        runs: The runs.
        trained: Consider only runs with a checkpoint.
    """
    for run in runs:
        try:
            run.read_options()
            if not trained or run.newest_step() is not None:
                return run
        except UserError as error:
            _warn_of_skipped(run.path, error)
    return None


def runs_by_age() -> list[Run]:
    """Return the runs in `runs/`, the newest last; folders that cannot be read are skipped with a warning."""
    aged = []
    for folder in RUNS.glob("*"):
        try:
            run = _run_in(folder)
            if run is not None:
                aged.append((run.path.stat().st_mtime, run))
        except FileNotFoundError:  # removed meanwhile
            continue
        except (UserError, OSError) as error:
            _warn_of_skipped(folder, error)
    return [run for _, run in sorted(aged, key=lambda each: each[0])]


def _warn_of_skipped(folder: Path, error: Exception) -> None:
    logger.warning("%s is skipped in the search for the newest run: %s", folder, error)


def _run_in(folder: Path) -> Run | None:
    """Return the run in a folder, or the newest stage of a curriculum, preferably one with a checkpoint."""
    if Run(folder).exists():
        return Run(folder)
    stages = [Run(stage) for stage in stages_in(folder)]
    trained = [stage for stage in stages if stage.newest_step() is not None]
    if not stages:
        return None
    return trained[-1] if trained else stages[-1]


def stages_in(folder: Path) -> list[Path]:
    """Return the run directories of the stages of a curriculum that were started, in order."""
    return sorted(path.parent for path in (folder / STAGES).glob("*/config.toml"))


def curriculum_of(run: Run) -> Path | None:
    """Return the folder of the curriculum that a run is a stage of; None for other runs."""
    stages = run.path.absolute().parent
    return run.path.parent.parent if stages.name == STAGES and (stages.parent / CURRICULUM).is_file() else None
