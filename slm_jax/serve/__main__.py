"""Entry point of `python -m slm_jax.serve`, see slm_jax/cli/serve.py."""

from slm_jax.cli import run_command

run_command(__name__, "serve")
