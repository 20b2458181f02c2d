"""All that a report tells of a run, read from its directory and nowhere else; a run may still be going on."""

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
from slm_jax.data.corpus.corpus import read_manifest, shard_files
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE, Shard, TokenStream
from slm_jax.performance import flops
from slm_jax.report.columns import Columns, joined, read_columns
from slm_jax.run import environment
from slm_jax.run.directory import Run, curriculum_of, find_run, stages_in
from slm_jax.run.load import load_tokenizer
from slm_jax.run.metrics import Row
from slm_jax.run.results import BENCHMARKS, read_benchmark_cells, read_evaluation, read_stage_scores
from slm_jax.run.samples import Sample, read_samples
from tokenizer import HybridTokenizer


@dataclass(frozen=True)
class Facts:
    """One run: an ordinary one, or a stage of a curriculum."""

    run: Run
    config: Config
    tokenizer: HybridTokenizer | None  # None before there is one
    columns: Columns  # with the offsets of the stages before
    manifests: list[dict[str, Any]]  # of the corpora
    calls: list[dict[str, Any]]  # environment.json
    stage: str = ""  # the name of the stage

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, 0 before there is one."""
        return self.tokenizer.vocab_size if self.tokenizer else 0

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return flops.parameters(self.config.model, self.vocab_size)

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training on a token."""
        return flops_per_token(self.config, self.vocab_size)

    @cached_property
    def samples(self) -> list[Sample]:
        """The sample texts, the oldest first."""
        return read_samples(self.run.samples)

    @property
    def step(self) -> int:
        """The last step with a row."""
        return int(self.columns["step"][-1]) if len(self.columns) else 0

    def split(self, side: str) -> TokenStream | None:
        """One side of the text, corpus behind corpus as in training; None if it cannot be read."""
        shards = []
        for manifest in self.manifests:
            for number, noted in enumerate(manifest[side]["shards"]):
                files = [manifest["folder"] / name for name in shard_files(side, number)]
                try:
                    tokens, documents = (np.load(file, mmap_mode="r") for file in files)
                except (OSError, ValueError, EOFError):  # the corpus was not copied with the run
                    return None
                if documents.dtype != DOCUMENT_DTYPE:
                    return None
                shards.append(Shard(tokens, documents, bool(noted["prompts"])))
        return TokenStream(shards)

    @cached_property
    def validated(self) -> TokenStream | None:
        """The held-out text that it is validated on; None if it cannot be read."""
        split = self.split("validation")
        return None if split is None else split.head(self.config.eval.max_tokens)


@dataclass(frozen=True)
class Subject:
    """What a report is about: a run, or a curriculum with a run for each stage."""

    path: Path
    stages: list[Facts]
    evaluation: list[Row] = field(default_factory=list)  # each with its stage, and how it was measured ("about")
    benchmarks: list[dict[str, str]] = field(default_factory=list)
    stage_scores: list[Row] = field(default_factory=list)  # each stage's model on the held-out text of all
    planned: int = 1  # stages in all

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.resolve().name

    @property
    def last(self) -> Facts:
        """The newest stage."""
        return self.stages[-1]

    @property
    def is_curriculum(self) -> bool:
        """Whether it has stages of its own."""
        return bool(self.last.stage)

    @cached_property
    def columns(self) -> Columns:
        """All rows, stage behind stage."""
        return joined([stage.columns for stage in self.stages])

    @property
    def flops(self) -> float:
        """Model FLOPs of all stages so far."""
        return self.columns.end["flops"]

    @property
    def scores(self) -> Row:
        """The newest validation scores; empty before the first."""
        return self.columns.validations[-1] if self.columns.validations else {}

    @property
    def state(self) -> str:
        """How far it is, in words."""
        steps = self.last.config.train.steps
        where = f"stage {len(self.stages)} of {self.planned} ({self.last.stage}), " if self.is_curriculum else ""
        return f"{'finished' if self.is_finished else 'not finished'}: {where}step {self.last.step:,} of {steps:,}"

    @property
    def is_finished(self) -> bool:
        """Whether every step of every stage is done."""
        return self.last.step >= self.last.config.train.steps and len(self.stages) >= self.planned

    @cached_property
    def held_out(self) -> str:
        """SHA-256 over the digests of the documents that are validated on, the same for the same text whatever its
        tokenizer; "" if it is not known."""
        split = self.last.validated
        return hashlib.sha256(np.sort(split.documents["digest"]).tobytes()).hexdigest() if split else ""


def read_subject(path: Path | None) -> Subject:
    """The run or curriculum at a path (default: the newest run). Raises UserError if there is none or it is damaged."""
    if path is None:
        run = find_run(None)
        path = curriculum_of(run) or run.path
    folders = stages_in(path)
    stages: list[Facts] = []
    for folder in folders or [path]:
        stages.append(_read_facts(folder if folders else find_run(str(path)).path, stages, bool(folders)))
    evaluation: list[Row] = []
    for folder, stage in [*((each.run.path, each.stage) for each in stages), *([(path, "")] if folders else [])]:
        evaluation += [row | {"stage": stage} for row in _read_evaluation(folder)]
    benchmarks = read_benchmark_cells(path / BENCHMARKS)
    if not folders:
        return Subject(path, stages, evaluation, benchmarks)
    planned = len(read_toml(path / CURRICULUM).get("stages", ())) if (path / CURRICULUM).is_file() else 0
    compared = read_stage_scores(path)
    return Subject(path, stages, evaluation, benchmarks, compared, max(planned, len(stages)))


def flops_per_token(config: Config, vocab_size: int) -> float:
    """Model FLOPs of training on a token."""
    return flops.train_flops_per_token(config.model, vocab_size, config.train.sequence_length)


def _read_facts(path: Path, before: list[Facts], is_stage: bool) -> Facts:
    run = Run(path)
    config = run.read_config()
    tokenizer = load_tokenizer(run) if run.tokenizer.is_file() else None
    columns = read_columns(run.metrics, flops_per_token(config, tokenizer.vocab_size if tokenizer else 0))
    if before:
        columns = columns.after(before[-1].columns.end)
    stage = path.name.partition("-")[2] or path.name if is_stage else ""
    return Facts(run, config, tokenizer, columns, _read_manifests(run.corpus), environment.read_calls(run), stage)


def _read_manifests(folder: Path) -> list[dict[str, Any]]:
    """Of each corpus of a mix, with its "weight" and "folder"; none before there is text."""
    if not (folder / "manifest.json").is_file():
        return []
    manifest = read_manifest(folder)
    if "mix" not in manifest:
        return [manifest | {"folder": folder, "weight": 1.0}]
    parts = [(folder / each["folder"], each["weight"]) for each in manifest["mix"]]
    return [read_manifest(part) | {"folder": part, "weight": weight} for part, weight in parts]


def _read_evaluation(path: Path) -> list[Row]:
    """The rows of evaluation.json, "about" of each what is noted of its task. Raises UserError if it is damaged."""
    evaluation = read_evaluation(path)
    rows = [row for row in evaluation.results if _is_number(row.get("value"))]
    return [{"group": "all"} | row | {"about": evaluation.tasks.get(row["task"], {})} for row in rows]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
