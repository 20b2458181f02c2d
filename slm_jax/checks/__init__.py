"""Checks of a run before and after training, each of which can fail on its own.

A check takes what it examines (a model, a batch, a tokenizer, rows of metrics), changes nothing, and returns a
`Finding`.
"""

from slm_jax.checks.finding import FAIL, OK, SKIPPED, Finding, as_json, as_table

__all__ = ["FAIL", "OK", "SKIPPED", "Finding", "as_json", "as_table"]
