"""Rows of metrics.jsonl: an incomplete last one is ignored, other damage is reported."""

import pytest

from slm_jax.run.metrics import MetricsWriter, read_metrics
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import duration


def test_an_incomplete_last_row_is_ignored_and_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 2.5}\n{"step": 2, "seconds": 3.5}\n{"step": 3, "sec')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    with MetricsWriter(path, after_step=1) as metrics:
        assert metrics.seconds == 2.5
        metrics.write({"step": 2, "seconds": 4.0})
    assert read_metrics(path) == [{"step": 1, "seconds": 2.5}, {"step": 2, "seconds": 4.0}]


@pytest.mark.parametrize("line", [b'{"st', b"5", b"[1]", b'{"a": 1}', b'{"step": "2"}', b"\xff"])
def test_damage_in_the_middle_is_reported_and_the_file_kept(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    data = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        MetricsWriter(path, after_step=3)
    assert path.read_bytes() == data


def test_a_row_with_nan_is_refused(tmp_path):
    with MetricsWriter(tmp_path / "m", after_step=0) as metrics, pytest.raises(ValueError, match="JSON"):
        metrics.write({"step": 1, "loss": float("nan")})


def test_duration():
    assert (duration(7), duration(187.4), duration(3731)) == ("0:07", "3:07", "1:02:11")
