"""The commands `slm` and `python -m slm_jax`: list the other commands, or run one of them."""

import difflib
import sys

from slm_jax.cli import run_main
from slm_jax.utils.errors import UserError

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue texts",
    "chat": "talk to a model in the terminal",
    "serve": "web page and OpenAI-compatible API",
    "evaluate": "held-out text, BLiMP, LAMBADA, analogies, multiple choice",
    "report": "HTML report of a run, or a comparison of several",
    "check": "verify a config or a trained run",
    "orchestrator": "train one model on several texts, stage by stage",
    "sweep": "train with several values of some options, and compare",
    "scaling": "fit scaling laws at equal FLOPs, and predict a larger run",
    "benchmark_logger": "append a run's scores to a CSV file",
    "export": "export to the Hugging Face layout",
    "data": "list, prepare and inspect training text",
    "mfu": "model FLOPs utilization of the training step",
    "plan": "memory and speed of a step on a TPU or GPU that is not present",
    "tokenizer": "train, encode, decode, inspect, compare, serve",
}


def main() -> int | None:
    """Run the command that the first argument names; list all without one.

    Returns:
        The exit status of the command.

    Raises:
        UserError: There is no such command.
    """
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(listing())
        return 0
    if name == "--version":
        from slm_jax import __version__

        print(__version__)
        return 0
    command = name.replace("-", "_")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f", perhaps you meant {near[0]}" if near else ""
        raise UserError(f"unknown command {name}{hint}; the commands are {', '.join(COMMANDS)}")
    sys.argv = [f"slm {command}", *rest]
    run_main("tokenizer.cli" if command == "tokenizer" else f"slm_jax.cli.{command}")
    return None  # not reached: run_main exits


def listing() -> str:
    """Return the commands with one line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        [
            "From raw text to a trained, measured, usable small language model.",
            "",
            "Usage: slm COMMAND [--option value …]",
            "",
            *lines,
            "",
            "slm COMMAND --help lists the options. `slm COMMAND` is `python -m slm_jax.COMMAND` (tokenizer: `python -m",
            "tokenizer`).",
        ]
    )


def run() -> None:
    """Run as the console script `slm`."""
    run_main("slm_jax.cli.slm")
