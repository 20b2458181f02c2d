"""benchmarks.csv has one row per measurement: with concurrent writers, after kills, measured repeatedly."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slm_jax.cli.benchmark_logger import main
from slm_jax.config.schema import Config
from slm_jax.curriculum import benchmarks
from slm_jax.curriculum.benchmarks import plot, table
from slm_jax.run.directory import Run
from slm_jax.run.results import BENCHMARK_COLUMNS, Benchmark, append_benchmark, read_benchmarks
from slm_jax.utils.errors import UserError
from tests.processes import Process

ROOT = Path(benchmarks.__file__).parents[2]
ROW = Benchmark(
    timestamp="2026-01-02T03:04:05Z", stage="01-a", model="32x2", device="1 x CPU", parameters=1234,
    dataset='my "own", text.txt', sequence_length=16, steps=10, items=80, batch=8, tokens=1280, seconds=0.1 + 0.2,
    loss=2.5, perplexity=12.18, accuracy=0.4, bits_per_byte=1.2345678901234567, train_loss=2.4,
    tokens_per_second=4266.6, mfu=0.31, version="0.1.0", jax="0.10.2", config="0123456789ab", commit="abc+",
)  # fmt: skip

MANY = """
import dataclasses, sys
from pathlib import Path
from slm_jax.run.results import append_benchmark
from tests.curriculum.test_benchmarks import ROW
name = sys.argv[2]
for i in range(40):
    append_benchmark(Path(sys.argv[1]), dataclasses.replace(ROW, stage=name, steps=i))
    append_benchmark(Path(sys.argv[1]), dataclasses.replace(ROW, stage="shared", steps=i))
"""


def test_processes_append_concurrently(tmp_path):
    path = tmp_path / "b.csv"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        Process([sys.executable, "-c", MANY, str(path), name], env=environment, stderr=subprocess.PIPE)
        for name in "xyz"
    ]
    assert [(process.communicate()[1], process.returncode) for process in started] == [(b"", 0)] * 3
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(BENCHMARK_COLUMNS)
    assert lines.count(lines[0]) == 1
    keys = sorted((row["stage"], row["steps"]) for row in read_benchmarks(path))
    assert keys == sorted((name, i) for name in ("x", "y", "z", "shared") for i in range(40))


def test_rows_are_read_back_as_written(tmp_path):
    path = tmp_path / "deep" / "b.csv"
    other = dataclasses.replace(ROW, stage="two\nlines", steps=11)
    assert append_benchmark(path, ROW)
    assert append_benchmark(path, other)
    assert not append_benchmark(path, dataclasses.replace(ROW, seconds=9.0, commit="other"))  # the same model again
    assert read_benchmarks(path) == [dataclasses.asdict(ROW), {**dataclasses.asdict(other), "stage": "two lines"}]
    assert read_benchmarks(tmp_path / "none.csv") == []


def test_a_line_cut_short_anywhere_is_repaired(tmp_path):
    path = tmp_path / "b.csv"
    append_benchmark(path, ROW)
    append_benchmark(path, dataclasses.replace(ROW, steps=11))
    whole = path.read_bytes()
    first = whole[: whole[:-1].rfind(b"\n") + 1]
    edges = {len(first) - 1, len(first), len(first) + 1, len(whole) - 1}
    for cut in sorted(edges | set(range(0, len(whole), 9))):
        path.write_bytes(whole[:cut])
        kept = 0 if cut < len(first) else 1
        assert len(read_benchmarks(path)) == kept
        assert append_benchmark(path, dataclasses.replace(ROW, steps=12))
        assert [row["steps"] for row in read_benchmarks(path)] == [10, 12][1 - kept :]
        assert path.read_bytes().count(b"timestamp") == 1
    path.write_bytes(whole)
    assert not append_benchmark(path, ROW)
    assert path.read_bytes() == whole


def test_other_files_are_refused_and_not_changed(tmp_path):
    path = tmp_path / "b.csv"
    for foreign in (b"a,b\n1,2\n", b"a,b\n1,2", b"\xff\xfe\n\xe9", b"PNG\rx\n"):
        path.write_bytes(foreign)
        for use in (
            lambda: append_benchmark(path, ROW),
            lambda: read_benchmarks(path),
            lambda: main(["--csv", str(path), "--show"]),
        ):
            with pytest.raises(UserError, match=r"line [01], is not a benchmark"):
                use()
        assert path.read_bytes() == foreign
    path.write_text("one line")
    with pytest.raises(UserError, match="is another file"):
        append_benchmark(path, ROW)
    assert path.read_text() == "one line"
    append_benchmark(tmp_path / "c.csv", ROW)
    text = (tmp_path / "c.csv").read_text()
    (tmp_path / "c.csv").write_text(text.replace("1234,", "many,", 1))
    with pytest.raises(UserError, match="line 2, is not a benchmark"):
        read_benchmarks(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text(text + "1,2\n")
    with pytest.raises(UserError, match="line 3, is not a benchmark"):
        append_benchmark(tmp_path / "c.csv", dataclasses.replace(ROW, steps=3))


@pytest.mark.parametrize("name", ["folder", "b.csv/x", "folder/b.csv/x", "/proc/x.csv"])
def test_invalid_paths_are_reported(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "b.csv", tmp_path / "folder" / "b.csv"):
        append_benchmark(path, ROW)
    path = tmp_path / name
    with pytest.raises(UserError, match="cannot write"):
        append_benchmark(path, ROW)
    with pytest.raises(UserError, match=r"is a folder|cannot read|has no rows"):
        main(["--csv", str(path), "--show"])
    with pytest.raises(UserError, match=r"is a folder|cannot write"):
        main(["--csv", str(tmp_path / "b.csv"), "--show", "--plot", str(path)])


def test_a_skipped_step_is_measured_without_its_loss(tmp_path, monkeypatch):
    run = Run(tmp_path)
    scores = {"val_loss": 2.5, "val_perplexity": 12.2, "val_accuracy": 0.4, "val_bits_per_byte": 1.2}
    row = {
        "step": 4,
        "loss": None,
        "tokens": 64,
        "input_tokens": 128,
        "seconds": 2.0,
        "tokens_per_second": 32.0,
        "mfu": 0.1,
        "time": 0,
    }
    lines = [row | scores, row | {"step": 5, "val_loss": None}]  # the scores of step 5 were not finite
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.save_config(Config.load("minute"))
    monkeypatch.setattr("slm_jax.run.load.load_tokenizer", lambda run: SimpleNamespace(vocab_size=300))
    measured = benchmarks.measure(run)
    assert (measured.steps, math.isnan(measured.train_loss)) == (4, True)
    assert (measured.tokens, measured.tokens_per_second, measured.mfu) == (64, 32.0, 0.1)  # the median of its steps
    path = tmp_path / "b.csv"
    assert append_benchmark(path, measured)
    assert not append_benchmark(path, measured)
    path.write_text(path.read_text().replace(",nan,", ",,"))  # as earlier versions wrote it
    assert append_benchmark(path, ROW)
    assert [math.isnan(row["train_loss"]) for row in read_benchmarks(path)] == [True, False]


def test_table_and_plot(tmp_path, capsys):
    path = tmp_path / "b.csv"
    for steps in (10, 20, 30):
        append_benchmark(path, dataclasses.replace(ROW, steps=steps, bits_per_byte=2.0 - steps / 100))
    lines = table(read_benchmarks(path)).splitlines()
    assert len(lines) == 4
    assert "1.900" in lines[1]
    assert "40.0%" in lines[1]
    plot(read_benchmarks(path), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    main(["--csv", str(path), "--show", "--plot", str(tmp_path / "c.png")])
    assert capsys.readouterr().out.splitlines() == lines
    assert (tmp_path / "c.png").is_file()
