"""Entry point of `python -m slm_jax.chat`, see slm_jax/cli/chat.py."""

from slm_jax.cli import run_command

run_command(__name__, "chat")
