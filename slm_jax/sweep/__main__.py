"""The command `python -m slm_jax.sweep`: see slm_jax/cli/sweep.py."""

from slm_jax.cli import run_command

run_command(__name__, "sweep")
