"""The command `python -m slm_jax.generate`: see slm_jax/cli/generate.py."""

from slm_jax.cli import run_command

run_command(__name__, "generate")
