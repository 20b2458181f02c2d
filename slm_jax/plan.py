"""The command `python -m slm_jax.plan`: see slm_jax/cli/plan.py."""

from slm_jax.cli import run_command

run_command(__name__, "plan")
