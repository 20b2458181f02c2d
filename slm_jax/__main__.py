"""The command `python -m slm_jax`, which runs the others: see slm_jax/cli/slm.py."""

from slm_jax.cli import run_command

run_command(__name__, "slm")
