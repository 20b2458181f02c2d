"""Flags generated from option dataclasses and from the schema: values, messages and help."""

import importlib
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest

from slm_jax.cli import generate, train
from slm_jax.cli.help import wrapped
from slm_jax.cli.options import Flag, config_from_args, make_config, read_options, read_options_and_config
from slm_jax.config.finetuning import describe_fine_tuning
from slm_jax.config.schema import Config
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer


@dataclass(frozen=True)
class Inner:
    """How it is done."""

    rate: float = 0.5
    """Rate per step."""


INNER = Inner()


@dataclass(frozen=True)
class Example:
    """Do a thing with files."""

    files: Annotated[tuple[str, ...], Flag(positional=True)] = ()
    """Files to read."""
    run: Annotated[tuple[str, ...], Flag(repeated=True, empty=True)] = ()
    """A run; may be repeated."""
    max_items: int = 3
    """Items of each file."""
    every: Annotated[bool, Flag(name="all")] = False
    """Show everything."""
    tasks: tuple[str, ...] = ()
    """Names of tasks."""
    format: Literal["text", "json"] = "text"
    """Output format."""
    inner: Inner = INNER


@dataclass(frozen=True)
class Required:
    """Need two values."""

    to: str
    """Folder to write to."""
    device: Literal["cpu", "gpu"]
    """Device to use."""


@dataclass(frozen=True)
class Switch:
    """Take no words."""

    every: bool = False
    """Do everything."""


def read(*args):
    return read_options(Example, args, "example")


def test_values_of_every_kind():
    assert read() == Example()
    assert read("a", "--max-items=-5", "b", "--all") == Example(files=("a", "b"), max_items=-5, every=True)
    assert read("--run", "x", "--run=y", "--rate", "1e-3") == Example(run=("x", "y"), inner=Inner(0.001))
    assert read("--tasks", "a", "b", "--format", "json", "--", "c") == Example(
        tasks=("a", "b"), format="json", files=("c",)
    )
    assert read("--all", "false").every is read("--no-all").every is False
    assert read("--run", "-", "--run", "").run == ("-", "")
    assert read("--all", "maybe") == Example(every=True, files=("maybe",))  # no value of --all
    assert read("x", "--", "--all", "-y").files == ("x", "--all", "-y")
    assert read("--max_items", "-5").max_items == -5
    assert read("--tasks", "-a", "b", "-3M", "--run", "-c d").tasks == ("-a", "b", "-3M")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max_itemz", "3"], "unknown option --max_itemz, perhaps you meant --max_items (see --help)"),
        (["--zzz"], "unknown option --zzz (see --help)"),
        (["--max_items", "many"], "--max_items many: should be a whole number"),
        (["--max_items="], "--max_items is empty: give a value, or leave it out"),
        (["--max_items"], "--max_items needs a value"),
        (["--tasks"], "--tasks needs at least one value"),
        (["--run"], "--run needs a value"),
        (["--rate", "fast"], "--rate fast: should be a number"),
        (["--format", "xml"], "--format xml: should be one of 'text', 'json'"),
        (["--max_items", "3", "--max-items=4"], "--max_items is given twice"),
        (["-x"], "unknown: -x (--help lists the options)"),
        (["--max_items", "-3M"], "--max_items -3M: should be a whole number"),
        (["--max_items", ""], "--max_items is empty: give a value, or leave it out"),
        (["--tasks", "a", ""], "--tasks is empty: give a value, or leave it out"),
        (["--format="], "--format is empty: give a value, or leave it out"),
        ([""], "files is empty: give a value, or leave it out"),
    ],
)
def test_messages_name_the_flag_the_value_and_the_remedy(args, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read(*args)


def test_messages_of_missing_options_state_what_to_give():
    with pytest.raises(UserError, match=r"^--to is missing: give a value \(Folder to write to\)$"):
        read_options(Required, (), "example")
    with pytest.raises(UserError, match=r"^--device is missing: give one of 'cpu', 'gpu'$"):
        read_options(Required, ("--to", "x"), "example")


def test_a_truth_value_where_no_words_are_taken():
    with pytest.raises(UserError, match=r"^--every maybe: should be one of 'True', 'False'$"):
        read_options(Switch, ["--every", "maybe"], "switch")
    with pytest.raises(UserError, match=r"^unknown: maybe "):
        read_options(Switch, ["maybe"], "switch")


def test_help_fits_the_terminal_and_lists_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as ended:
        read("--max_items", "5", "--help")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    assert shown.startswith("Do a thing with files.\n\nUsage: example [--option value …] [FILES …]\n")
    assert re.search(r"--max_items INT +Items of each file\. Default:\s+3", shown)
    assert re.search(r"How it is done\.\n  --rate FLOAT +Rate per step\. Default: 0\.5", shown)
    assert re.search(r"--format text\|json +Output format\. Default:\s+'text'", shown)


def test_commands_in_a_help_are_readable_on_narrow_terminals(monkeypatch):
    """The words of a line are kept together, also those of a second column that has too little space."""
    monkeypatch.setenv("COLUMNS", "60")
    command = "python -m slm_jax.scaling --to scaling/a --target 1e14"
    text = f"Fit laws.\n\n    {command} --dry-run\n    {command}   test the prediction\n    slm -h   show help\n"
    assert wrapped(text).splitlines() == [
        "Fit laws.",
        "",
        "    python -m slm_jax.scaling --to scaling/a --target 1e14",
        "        --dry-run",
        "    python -m slm_jax.scaling --to scaling/a --target 1e14",
        "        test the prediction",
        "    slm -h   show help",
    ]


def help_of(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        train.parse_args(args)
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_comes_in_levels(capsys):
    short = help_of(capsys, "--help")
    assert all(f"  --{name}" in short for name in ("config", "run", "resume", "coordinator"))
    assert all((f"--{name} " in short) == (name in Config.fields_with("common")) for name in Config.fields())
    assert re.search(r"--train\.steps INT .*\n? *.*Default: 600", short)  # that of the preset quickstart
    assert "Default: 1600" in help_of(capsys, "--config", "minute", "--help")
    of_model = help_of(capsys, "--help", "model")
    assert "--model.remat auto|none|elementwise|dots|full" in of_model
    assert "--train." not in of_model
    everything = help_of(capsys, "--help", "all")
    assert all(f"--{name} " in everything for name in Config.fields())
    with pytest.raises(UserError, match=r"--help modl: there is no such section, perhaps you meant model "):
        train.parse_args(["--help", "modl"])


def test_options_of_the_command_and_of_the_config():
    options, overrides = read_options_and_config(
        train.Options, ["--run", "x", "--train.steps", "5", "--data.max-tokens", "7", "--resume", "--process=1"], "x"
    )
    assert (options.run, options.resume, options.multihost.process) == ("x", True, 1)
    assert overrides == {"train.steps": 5, "data.max_tokens": 7}


def test_values_of_earlier_versions_are_accepted():
    with pytest.raises(UserError, match=r"init\.optimizer is keep, but there is no run"):
        config_from_args(["--init.optimizer", "carry"], "x", "x")


def test_adapters_and_preferences_have_settings_for_fine_tuning(tmp_path):
    Run(tmp_path).save_config(Config.load(**{"model.dim": 64, "model.heads": 2}))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    start = {"init.from_run": str(tmp_path), "train.steps": 200, "data.files": ("a.txt",)}
    preferences = {"train.objective": "dpo", "data.mode": "padded"}
    rates = {}
    for name, given in (("lora", {"lora.rank": 8}), ("dpo", preferences), ("both", {"lora.rank": 8, **preferences})):
        config = make_config({**start, **given})
        optimizer = config.optimizer
        rates[name] = optimizer.lr
        assert (optimizer.name, optimizer.weight_decay, optimizer.warmup_steps) == ("adamw", 0.0, 6)
        assert config.model.dim == 64
        assert "(for fine-tuning; " in describe_fine_tuning(optimizer, config.train, config.lora, 64)
    assert rates == {"lora": 2e-4, "dpo": 8e-5, "both": 8e-4}
    wide = {"init.from_run": "", "model.dim": 2048, "model.heads": 16, **preferences}
    assert make_config({**start, **wide}).optimizer.lr == 2e-6
    assert make_config({**start, **preferences, "optimizer.lr": 0.5}).optimizer.lr == 0.5
    # Training all parameters on with text, or with a preset: as before.
    assert make_config(start).optimizer == make_config({}).optimizer
    assert make_config({**start, "lora.rank": 8}, "minute").optimizer == make_config({}, "minute").optimizer


def test_several_types():
    assert config_from_args(["--train.microbatch", "auto"], "x", "x").train.microbatch == "auto"
    assert config_from_args(["--train.microbatch", "8"], "x", "x").train.microbatch == 8
    with pytest.raises(UserError, match=r"^--train\.microbatch x: should be a whole number or 'auto'$"):
        config_from_args(["--train.microbatch", "x"], "x", "x")


@pytest.mark.parametrize(
    ("name", "unused"), [("mfu", {"log", "checkpoint", "eval", "init", "data"}), ("check", {"log", "checkpoint"})]
)
def test_help_lists_only_the_sections_that_are_used(name, unused, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"slm_jax.cli.{name}").main(["--help", "all"])
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    sections = {option.removeprefix("--").partition(".")[0] for option in names if "." in option}
    assert sections & {"model", "train", "optimizer"} == {"model", "train", "optimizer"}
    assert not sections & unused


def test_any_number_of_samples_begins_at_once(monkeypatch, capsys):
    drawn = []

    def generate_ids(_, ids, *rest):
        drawn.append([sampling.seed for sampling in rest[1]])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return [[5] for _ in ids]

    monkeypatch.setattr("slm_jax.generation.decode.generate_ids", generate_ids)
    tokenizer = HybridTokenizer.pretrained("english-8k")
    options = generate.Options(samples=10**12, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        generate._generate_all(SimpleNamespace(model=None, tokenizer=tokenizer), ["a"], [[5, 3]], options, 8, [])
    assert drawn == [[0, 1], [2, 3], [4, 5]]
    assert capsys.readouterr().out.count("=== prompt 1, sample") == 4
