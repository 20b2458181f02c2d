"""The command `python -m slm_jax.orchestrator`: see slm_jax/cli/orchestrator.py."""

from slm_jax.cli import run_command

run_command(__name__, "orchestrator")
