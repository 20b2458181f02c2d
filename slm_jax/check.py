"""The command `python -m slm_jax.check`: see slm_jax/cli/check.py."""

from slm_jax.cli import run_command

run_command(__name__, "check")
