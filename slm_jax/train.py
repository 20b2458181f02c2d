"""The command `python -m slm_jax.train`: see slm_jax/cli/train.py."""

from slm_jax.cli import run_command

run_command(__name__, "train")
