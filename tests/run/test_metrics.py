"""Rows of metrics.jsonl: an incomplete last one is ignored, damaged ones are reported and skipped."""

import json

import pytest

from slm_jax.run.metrics import MetricsWriter, read_metrics, task_scores, tasks_text
from slm_jax.utils.formatting import duration


def test_an_incomplete_last_row_is_ignored_and_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 2.5}\n{"step": 2, "seconds": 3.5}\n{"step": 3, "sec')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with MetricsWriter(path, after_step=1) as metrics:
        assert metrics.seconds == 2.5
        metrics.write({"step": 2, "seconds": 4.0})
    assert read_metrics(path) == [{"step": 1, "seconds": 2.5}, {"step": 2, "seconds": 4.0}]


@pytest.mark.parametrize("line", [b'{"st', b"5", b"[1]", b'{"a": 1}', b'{"step": "2"}', b"\xff", b"[" * 100_000])
def test_damage_in_the_middle_is_reported_skipped_and_kept_in_the_file(tmp_path, line, caplog):
    path = tmp_path / "metrics.jsonl"
    data = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(data)
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert "metrics.jsonl, line 2, is damaged and skipped" in caplog.text
    MetricsWriter(path, after_step=3).close()
    assert path.read_bytes() == data


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    """Every bit of a row, not only those that make it invalid JSON."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 3.25 / step, "lr": 1e-05, "val_loss": None} for step in (1, 2, 3)]
    with MetricsWriter(path, after_step=0) as metrics:
        for row in rows:
            metrics.write(row)
    assert read_metrics(path) == rows
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line) | {"crc32": 0} for line in lines] == [row | {"crc32": 0} for row in rows]
    for bit in range(8 * len(lines[1])):
        damaged = bytearray(lines[1])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(lines[0] + damaged + lines[2])
        found = read_metrics(path, quiet=True)
        assert all(row in rows for row in found), damaged
        assert len(found) < 3, damaged


def test_rows_of_earlier_versions_have_no_check_value(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    path.write_text(before)
    with MetricsWriter(path, after_step=2) as metrics:
        metrics.write({"step": 3, "loss": 1.0})
    assert path.read_text().startswith(before)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "loss": 0.5}\n')  # its check value was lost
    assert [row["step"] for row in read_metrics(path, quiet=True)] == [1, 2, 3]


def test_a_row_with_nan_is_refused(tmp_path):
    with MetricsWriter(tmp_path / "m", after_step=0) as metrics, pytest.raises(ValueError, match="JSON"):
        metrics.write({"step": 1, "loss": float("nan")})


def test_duration():
    assert (duration(7), duration(187.4), duration(3731)) == ("0:07", "3:07", "1:02:11")


def test_a_label_of_a_task_may_have_a_slash():
    row = {"task_choices:a/b": 0.5, "task_choices:a/b/low": 0.4, "task_choices:a/b/high": 0.6, "task_blimp/chance": 0.5}
    assert task_scores(row) == {"choices:a/b": 0.5}
    assert tasks_text(row) == "choices:a/b 50.0 % (40.0 – 60.0)"
