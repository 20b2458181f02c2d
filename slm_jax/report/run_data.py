"""All data of a report, read from the directory of a run, which may still be training, or of a curriculum."""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.config.paths import CURRICULUM
from slm_jax.config.presets import read_toml
from slm_jax.config.schema import Config
from slm_jax.data.ancestry import runs_of_weights
from slm_jax.data.corpus.corpus import CHAT_FORMAT, open_array, read_manifest, shard_files
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE, Shard, TokenStream, heads
from slm_jax.data.overlap import Overlap, stored_overlap
from slm_jax.performance import flops
from slm_jax.report.columns import Columns, concatenate_stages, read_columns
from slm_jax.run import environment
from slm_jax.run.directory import Run, curriculum_of, find_run, stages_in
from slm_jax.run.load import load_tokenizer
from slm_jax.run.metrics import Row
from slm_jax.run.results import BENCHMARKS, read_benchmark_cells, read_evaluation, read_stage_scores
from slm_jax.run.samples import Sample, read_samples
from slm_jax.utils.errors import UserError
from slm_jax.utils.labels import source_labels
from slm_jax.utils.text_tokenizer import TextTokenizer

_MAX_OVERLAP_TOKENS = 8_000_000  # training tokens that are compared with held-out text for a report, in some seconds


@dataclass(frozen=True)
class RunData:
    """Data of one run: an ordinary one, or a stage of a curriculum.

    Attributes:
        run: The run directory.
        config: The resolved config.
        tokenizer: The tokenizer; None if it does not exist yet.
        columns: The metrics, with the end of the previous stage as offset.
        manifests: Manifests of the corpora; empty if the text has not been prepared yet.
        calls: Entries of environment.json, one for each invocation of the training command.
        stage: Name of the stage; "" for an ordinary run.
    """

    run: Run
    config: Config
    tokenizer: TextTokenizer | None
    columns: Columns
    manifests: list[dict[str, Any]]
    calls: list[dict[str, Any]]
    stage: str = ""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer; 0 if there is none yet."""
        return self.tokenizer.vocab_size if self.tokenizer else 0

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model."""
        return flops.parameters(self.config.model, self.vocab_size)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training on one token, on average."""
        tokens = self.columns["input_tokens"].sum()
        if not tokens:
            return float(_token_flops(self.config, self.vocab_size).at())
        return float(self.columns["flops"].sum() / tokens)

    @cached_property
    def samples(self) -> list[Sample]:
        """The generated samples, the oldest first."""
        return read_samples(self.run.samples)

    @property
    def step(self) -> int:
        """The last step with a row of metrics; 0 before the first."""
        return int(self.columns["step"][-1]) if len(self.columns) else 0

    def token_stream(self, split: str) -> TokenStream | None:
        """Return the tokens of a split, its corpora concatenated as in training; None if they cannot be read.

        Args:
            split: "train" or "validation".
        """
        streams = self._token_streams(split)
        return None if streams is None else TokenStream([shard for stream in streams for shard in stream.shards])

    def _token_streams(self, split: str) -> list[TokenStream] | None:
        """Return the tokens of a split of each corpus; None if they cannot be read."""
        streams = []
        for manifest in self.manifests:
            shards = []
            for number, entry in enumerate(manifest[split]["shards"]):
                files = [manifest["folder"] / name for name in shard_files(split, number)]
                try:
                    tokens = open_array(files[0], np.dtype(manifest["dtype"]), entry["tokens"])
                    documents = open_array(files[1], DOCUMENT_DTYPE, entry["documents"])
                except (OSError, ValueError):  # the run was copied without its corpus, or it is damaged
                    return None
                marked = manifest["format"] == CHAT_FORMAT
                shards.append(Shard(tokens, documents, bool(entry["prompts"]), marked=marked))
            streams.append(TokenStream(shards))
        return streams

    @cached_property
    def overlap(self) -> Overlap | None:
        """Held-out text that is also training text; None if it was not measured, and would take long."""
        if self.tokenizer is None or not self.manifests:
            return None
        earlier = [run.corpus for run in runs_of_weights(self.config)[0]]
        try:
            return stored_overlap(self.run.corpus, self.tokenizer, earlier, _MAX_OVERLAP_TOKENS)
        except UserError:  # the run was copied without its corpus
            return None

    @cached_property
    def validation_stream(self) -> TokenStream | None:
        """The tokens used for validation; None if they cannot be read."""
        streams = self._token_streams("validation")
        if streams is None:
            return None
        used = heads(streams, self.config.eval.max_tokens)
        return TokenStream([shard for stream in used for shard in stream.shards])


@dataclass(frozen=True)
class ReportData:
    """Data of a report about a run, or about a curriculum with a run for each stage.

    Attributes:
        path: The directory of the run or curriculum.
        stages: The runs of the stages that were started; an ordinary run is its only stage.
        evaluation: Rows of evaluation.json, with "stage" and with "about", the method of the task.
        benchmarks: Rows of benchmarks.csv.
        stage_scores: Scores of each stage's model on the held-out text of all stages.
        num_planned: Number of stages in the curriculum.
    """

    path: Path
    stages: list[RunData]
    evaluation: list[Row] = field(default_factory=list)
    benchmarks: list[dict[str, str]] = field(default_factory=list)
    stage_scores: list[Row] = field(default_factory=list)
    num_planned: int = 1

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.resolve().name

    @property
    def last(self) -> RunData:
        """The newest stage."""
        return self.stages[-1]

    @property
    def is_curriculum(self) -> bool:
        """True for a curriculum, false for an ordinary run."""
        return bool(self.last.stage)

    @cached_property
    def columns(self) -> Columns:
        """The metrics of all stages, concatenated."""
        return concatenate_stages([stage.columns for stage in self.stages])

    @property
    def flops(self) -> float:
        """Model FLOPs of all stages so far."""
        return self.columns.end["flops"]

    @property
    def scores(self) -> Row:
        """The newest validation scores; empty before the first validation."""
        return self.columns.validations[-1] if self.columns.validations else {}

    @property
    def state(self) -> str:
        """The progress in words: "finished: step 500 of 500"."""
        state = "finished" if self.is_finished else "not finished"
        step = f"step {self.last.step:,} of {self.last.config.train.steps:,}"
        if not self.is_curriculum:
            return f"{state}: {step}"
        return f"{state}: stage {len(self.stages)} of {self.num_planned} ({self.last.stage}), {step}"

    @property
    def is_finished(self) -> bool:
        """True if every step of every stage is done."""
        return self.last.step >= self.last.config.train.steps and len(self.stages) >= self.num_planned

    @cached_property
    def held_out_digest(self) -> str:
        """SHA-256 over the digests of the validation documents; "" if unknown.

        It identifies the text, independently of the tokenizer.
        """
        stream = self.last.validation_stream
        if not stream:
            return ""
        documents = stream.documents[np.argsort(stream.documents["digest"], kind="stable")]
        # A document that is cut for the split has the same digest wherever it is cut.
        return hashlib.sha256(documents["digest"].tobytes() + documents["bytes"].tobytes()).hexdigest()


def read_report_data(path: Path | None) -> ReportData:
    """Read the data of a run or curriculum.

    Args:
        path: The directory; None: the newest run, or the curriculum that it is a stage of.

    Raises:
        UserError: There is no such run, or it is damaged.
    """
    if path is None:
        run = find_run(None)
        path = curriculum_of(run) or run.path
    stage_folders = stages_in(path)
    stages: list[RunData] = []
    for folder in stage_folders or [find_run(str(path)).path]:
        stages.append(_read_run_data(folder, stages, is_stage=bool(stage_folders)))
    evaluation: list[Row] = []
    for stage in stages:
        evaluation += _read_evaluation(stage.run.path, stage.stage)
    benchmarks = read_benchmark_cells(path / BENCHMARKS)
    if not stage_folders:
        return ReportData(path, stages, evaluation, benchmarks)
    evaluation += _read_evaluation(path, "")
    planned = read_toml(path / CURRICULUM).get("stages", ()) if (path / CURRICULUM).is_file() else ()
    return ReportData(
        path, stages, evaluation, benchmarks, read_stage_scores(path), num_planned=max(len(planned), len(stages))
    )


def _token_flops(config: Config, vocab_size: int) -> flops.TokenFlops:
    return flops.token_flops(config.model, vocab_size, config.train.sequence_length, config.lora)


def _read_run_data(path: Path, previous: list[RunData], is_stage: bool) -> RunData:
    run = Run(path)
    config = run.read_config()
    tokenizer = load_tokenizer(run) if run.tokenizer.is_file() else None
    columns = read_columns(run.metrics, _token_flops(config, tokenizer.vocab_size if tokenizer else 0))
    if previous:
        columns = columns.with_offsets(previous[-1].columns.end)
    stage = ""
    if is_stage:
        stage = path.name.partition("-")[2] or path.name  # folders are named NN-STAGE
    return RunData(run, config, tokenizer, columns, _read_manifests(run.corpus), environment.read_calls(run), stage)


def _read_manifests(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest of each corpus of a mixture, none before there is text.

    "weight" and "folder" are added, and "name" is the label of the source.
    """
    if not (folder / "manifest.json").is_file():
        return []
    manifest = read_manifest(folder)
    if "mix" not in manifest:
        return [manifest | {"folder": folder, "weight": 1.0, "name": source_labels([manifest["name"]])[0]}]
    labels = source_labels([entry["name"] for entry in manifest["mix"]])
    return [
        read_manifest(folder / entry["folder"])
        | {"folder": folder / entry["folder"], "weight": entry["weight"], "name": label}
        for entry, label in zip(manifest["mix"], labels, strict=True)
    ]


def _read_evaluation(folder: Path, stage: str) -> list[Row]:
    """Return the results in a folder, each with its "stage" and the method of its task ("about")."""
    evaluation = read_evaluation(folder)
    rows = []
    for row in evaluation.results:
        if is_number(row.get("value")):
            about = evaluation.tasks.get(row["task"], {})
            rows.append({"group": "all"} | row | {"about": about, "stage": stage})
    return rows


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
