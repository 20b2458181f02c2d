"""A tiny trained run, and helpers that modify copies of it."""

import json
import shutil

import numpy as np
import pytest

from slm_jax.config.schema import Config
from slm_jax.run.directory import Run
from slm_jax.run.metrics import read_metrics
from slm_jax.training.train import train
from tests.helpers import ONE_BLOCK

STEPS = 24
TINY = {
    **ONE_BLOCK,
    "train.batch_size": 4,
    "train.steps": STEPS,
    "train.dtype": "float32",
    "optimizer.warmup_steps": 2,
    "eval.every": 8,
    "eval.sample_tokens": 12,
    "eval.prompts": ("Line 5", "The quick"),
    "mesh.data": 1,
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The directory of a run of 24 steps. Use `copy` to modify it."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [f"Line {i}: the quick brown Fox jumps over {i * 7 % 13} lazy dogs, née Åse.\n" for i in range(600)]
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    config = Config.load(
        **{**TINY, "data.files": (str(folder / "text.txt"),), "data.cache": str(folder / "cache")}  # type: ignore[arg-type]
    )
    return train(config, folder / "runs" / "first").run


@pytest.fixture
def copy(trained, tmp_path):
    """A function that copies the run under a name, without its checkpoints."""

    def make(name="run"):
        shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        return Run(tmp_path / name)

    return make


@pytest.fixture
def curriculum(copy, tmp_path):
    """A finished curriculum of two stages, the second with a lower learning rate."""
    folder = tmp_path / "course"
    stages = [copy("course/stages/01-words"), copy("course/stages/02-more words")]
    config = stages[1].read_config()
    lower = config.optimizer.model_copy(update={"lr": 0.002})
    stages[1].save_config(config.model_copy(update={"optimizer": lower}))
    (folder / "curriculum.toml").write_text('[[stages]]\nname = "words"\n[[stages]]\nname = "more words"\n')
    shutil.copy(stages[0].tokenizer, folder / "tokenizer.hybtok")
    return folder


def rows_of(run):
    """Return the metrics of a run, read without the package."""
    return read_metrics(run.metrics)


def cut_held_out(run, *ends):
    """Replace the held-out documents by ones that end at these tokens, with two bytes per token."""
    path = run.corpus / "validation-00000.documents.npy"
    documents = np.repeat(np.load(path)[:1], len(ends))
    documents["end"] = ends
    documents["digest"] = range(len(ends))
    documents["bytes"] = 2 * np.diff(ends, prepend=0)
    path.unlink()  # it may be a hard link
    np.save(path, documents)
    manifest = json.loads((run.corpus / "manifest.json").read_text())
    manifest["validation"]["shards"][0]["documents"] = len(ends)
    (run.corpus / "manifest.json").unlink()
    (run.corpus / "manifest.json").write_text(json.dumps(manifest))


def with_option(run, section, **values):
    """Change options of the config."""
    config = run.read_config()
    changed = getattr(config, section).model_copy(update=values)
    run.save_config(config.model_copy(update={section: changed}))


def write_rows(run, rows):
    """Replace the metrics."""
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
