"""The command `python -m slm_jax.data`: see slm_jax/cli/data.py."""

from slm_jax.cli import run_command

run_command(__name__, "data")
