"""The command `python -m slm_jax.scaling`: see slm_jax/cli/scaling.py."""

from slm_jax.cli import run_command

run_command(__name__, "scaling")
