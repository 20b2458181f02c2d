"""The command `python -m slm_jax.export`: see slm_jax/cli/export.py."""

from slm_jax.cli import run_command

run_command(__name__, "export")
