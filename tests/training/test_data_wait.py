"""The note about waiting for data."""

import logging
from types import SimpleNamespace

import pytest

from slm_jax.training.recorder import StepRecorder


@pytest.mark.parametrize(("seconds", "is_logged"), [(0.9, False), (9.0, False), (10.0, True)])
def test_the_wait_is_stated_where_it_matters(seconds, is_logged, caplog):
    caplog.set_level(logging.INFO)
    StepRecorder.report_data_wait(SimpleNamespace(_seconds=150.0, _seconds_before=50.0), seconds)
    assert ("waiting for data" in caplog.text) == is_logged
