"""The command `python -m slm_jax.report`: see slm_jax/cli/report.py."""

from slm_jax.cli import run_command

run_command(__name__, "report")
