"""What must hold of a run before and after training, each check able to fail by itself; the command is check.py.

A check takes what it looks at (a model, a batch, a tokenizer, rows) and returns a `Finding`; it changes nothing.
"""

from slm_jax.checks.finding import FAIL, OK, SKIPPED, Finding, as_json, as_table

__all__ = ["FAIL", "OK", "SKIPPED", "Finding", "as_json", "as_table"]
