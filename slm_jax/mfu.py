"""The command `python -m slm_jax.mfu`: see slm_jax/cli/mfu.py."""

from slm_jax.cli import run_command

run_command(__name__, "mfu")
