"""Comparison of runs by their files."""

import json
from pathlib import Path

import jax
import numpy as np

CLOCK = {"seconds", "tokens_per_second", "mfu", "eta_seconds", "time", "crc32"}
"""Metrics that depend on the time of day or the speed of the machine, and the checksum of all."""


def read_rows(run: Path) -> list[dict]:
    """Return the metrics of a run, read without the package."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    """Return rows of metrics without those that differ between equal runs."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def saved_arrays(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Return the step of the newest checkpoint and its arrays by name, read without the package."""
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    tree = ocp.StandardCheckpointer().restore(folder.absolute() / str(step) / "state")
    return step, {
        jax.tree_util.keystr(path): np.asarray(jax.random.key_data(x) if "key" in str(getattr(x, "dtype", "")) else x)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def assert_same_run(first: Path, second: Path) -> None:
    """Assert equal newest checkpoints to the bit, equal metrics but for the clock, and equal samples."""
    step, arrays = saved_arrays(first / "checkpoints")
    other_step, others = saved_arrays(second / "checkpoints")
    assert step == other_step
    assert arrays.keys() == others.keys()
    for name in arrays:
        assert np.array_equal(arrays[name], others[name]), name
    assert without_clock(read_rows(first)) == without_clock(read_rows(second))
    assert (first / "samples.md").read_text() == (second / "samples.md").read_text()
