"""Every option of every command: empty and negative values end in one line, without a traceback."""

import importlib
import sys
from collections.abc import Iterator
from typing import get_args

import pytest

from slm_jax.cli.flags import Option, _alternatives, command_options
from slm_jax.cli.options import config_from_args
from slm_jax.config.schema import Config
from slm_jax.run.selection import parse_step
from slm_jax.utils.errors import UserError

# Module of each command, its arguments before the options, the class of its options, and arguments that it requires.
COMMANDS = {
    "benchmark_logger": ([], "Options", []),
    "chat": ([], "Options", []),
    "check": ([], "Options", []),
    "data list": (["list"], "ListOptions", []),
    "data prepare": (["prepare"], "PrepareOptions", []),
    "data inspect": (["inspect"], "InspectOptions", []),
    "evaluate": ([], "Options", []),
    "export": ([], "Options", ["--to", "out"]),
    "generate": ([], "Options", ["--prompt", "a"]),
    "mfu": ([], "Options", []),
    "orchestrator": ([], "Options", []),
    "plan": ([], "Options", ["--device", "h100"]),
    "report": ([], "Options", []),
    "scaling": ([], "Options", ["--to", "study"]),
    "serve": ([], "Options", []),
    "sweep": ([], "Options", ["--to", "sweep", "--vary", "optimizer.lr=0.1,0.2"]),
    "train": ([], "Options", []),
}


def options_of(command: str) -> Iterator[Option]:
    module = importlib.import_module(f"slm_jax.cli.{command.split()[0]}")
    yield from command_options(getattr(module, COMMANDS[command][1]))


def is_number(option: Option) -> bool:
    return bool({int, float} & set(_alternatives(option.type)))


TEXTS = ("size", "budget", "config", "part")  # which refuse -1 and -3M; so does `run` where one is read

CASES = [
    (command, option.title, value)
    for command in COMMANDS
    for option in options_of(command)
    for value in ("", "-1", "-3M")
    if bool not in _alternatives(option.type)
    and not option.flag.empty
    and (
        value == ""
        or is_number(option)
        or option.name in TEXTS
        or (option.name == "run" and command not in ("train", "orchestrator"))
    )
]


@pytest.mark.parametrize(("command", "option", "value"), CASES)
def test_a_value_that_cannot_be_is_refused_in_one_line(command, option, value, tmp_path, monkeypatch):
    """The commands run in a folder without a run: a message about that one would mean that the value was accepted."""
    monkeypatch.chdir(tmp_path)
    first, _, required = COMMANDS[command]
    rest = [] if option in required else required
    module = importlib.import_module(f"slm_jax.cli.{command.split()[0]}")
    words = [option, value] if option.startswith("--") else [value]
    arguments = [*first, *words, *rest]
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    with pytest.raises(UserError) as caught:
        module.main(*([] if first else [arguments]))  # that of data takes no arguments
    message = str(caught.value)
    assert "\n" not in message
    if value == "":
        assert message == f"{option} is empty: give a value, or leave it out"
    else:
        assert value in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["-1", "-3M"])
def test_a_checkpoint_that_cannot_be_is_refused(value):
    with pytest.raises(UserError, match=f"^--step '{value}': should be best, last, or the number of a step$"):
        parse_step(value)


def problem_of(name: str, value: str) -> str:
    """Return the error of an option of the config, empty if the value is accepted."""
    try:
        config_from_args([f"--{name}", value], "x", "x", base={})
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", ["", "-1", "-3M"])
def test_empty_and_negative_values_of_the_config_end_in_one_line(value):
    """Every option of the config; an empty text is a value of some."""
    for name, field in Config.fields().items():
        problem = problem_of(name, value)
        if problem:
            assert problem.count("\n") == problem.count("\n  - ")  # a line for each problem
            assert name in problem
        else:
            kinds = [kind for each in _alternatives(field.annotation) for kind in (each, *get_args(each))]
            assert str in kinds or name == "model.window_pattern"
