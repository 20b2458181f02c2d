"""The command `python -m slm_jax.evaluate`: see slm_jax/cli/evaluate.py."""

from slm_jax.cli import run_command

run_command(__name__, "evaluate")
