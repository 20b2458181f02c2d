"""The command `python -m slm_jax.benchmark_logger`: see slm_jax/cli/benchmark_logger.py."""

from slm_jax.cli import run_command

run_command(__name__, "benchmark_logger")
