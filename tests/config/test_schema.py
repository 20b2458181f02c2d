"""The config: presets, overrides, traits, and all problems reported at once."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from slm_jax.cli import train
from slm_jax.cli.options import config_from_args, read_options
from slm_jax.config.presets import preset_names
from slm_jax.config.schema import Config
from slm_jax.utils.errors import UserError

DPO = {"train.objective": "dpo", "data.mode": "padded"}


def problem(**overrides):
    with pytest.raises(UserError) as caught:
        Config.load(**{name.replace("__", "."): value for name, value in overrides.items()})
    return str(caught.value)


def test_every_preset_is_valid():
    assert "quickstart" in preset_names()
    for name in preset_names():
        Config.load(name)


def test_toml_round_trip():
    config = Config.load(data__files=("a b.txt", 'q"\\.txt', "\x7f\n"), train__steps=7, model__tie_weights=False)
    assert Config.from_tree(tomllib.loads(config.to_toml())) == config


def test_every_option_has_a_description():
    for section, info in Config.model_fields.items():
        for name, field in info.annotation.model_fields.items():
            assert field.description, f"{section}.{name}"
            assert field.description.endswith("."), f"{section}.{name}"


def test_precedence_default_preset_override(tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text("[train]\nsteps = 5\nseed = 3\n")
    config = config_from_args(["--config", str(preset), "--train.steps", "9"], "x", "x")
    assert (config.train.steps, config.train.seed, config.train.batch_size) == (9, 3, Config().train.batch_size)


def test_command_line_types():
    args = ["--data.files", "a.txt", "b.txt", "--model.tie_weights", "False", "--optimizer.lr=1e-3"]
    config = config_from_args(args, "x", "x")
    assert config.data.files == ("a.txt", "b.txt")
    assert config.data.source == "files"
    assert config.model.tie_weights is False
    assert config.optimizer.lr == 1e-3


def test_all_problems_together():
    text = problem(
        model__dim=0, optimizer__lr=-1.0, train__batch_size=7, train__accumulation=2, model__heads=4, model__kv_heads=3
    )
    assert text.count("\n  - ") == 4
    for part in ("model.dim = 0", "optimizer.lr = -1.0", "use batch_size 6 or 8", "use one of [1, 2, 4]"):
        assert part in text


def test_a_dotted_name_as_one_key_is_explained():
    with pytest.raises(UserError, match=r"unknown key 'train\.steps': give steps in the table .* train$"):
        Config.from_tree({"train.steps": 3})


def test_problems_of_a_mixture_are_among_all_problems():
    """Every entry by itself, and the shares of those that are valid."""
    mix = ("python-docs=x", "python-qa=0", "=2", "hf:alone", "files=1", "b.txt=1e-8")
    text = problem(data__mix=mix, train__steps=-1, train__batch_size=7, train__accumulation=2)
    assert text.count("\n  - ") == 8
    for part in (
        "train.steps = -1",
        "data.mix: python-docs=x: x is not a weight (a number above 0), as in python-docs=0.3",
        "data.mix: python-qa=0: 0 is not a weight",
        "data.mix: '=2' names no source",
        "data.mix: files is the source of data.files: name paths or patterns",
        "data.mix: hf:alone: a data set of the hub is written as hf:OWNER/NAME",
        "data.mix: b.txt with weight 1e-08 of 2 would get fewer than one in 1,000,000 rows",
        "use batch_size 6 or 8",
    ):
        assert part in text
    assert Config.load(data__mix=("a.txt", "b.txt=2e-6")).data.mix


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.dim": 100, "model.heads": 3},
            r"not divisible by model.heads 3 .*: use \d+ or \d+ heads, or dim 96 or 102",
        ),
        ({"model.dim": 9, "model.heads": 3}, "odd.*use dim 6 or 12"),
        (
            {"train.batch_size": 100, "mesh.data": 8},
            "batch_size 100 is not divisible by 8 devices: use 96 or 104, or 4 devices",
        ),
        ({"train.batch_size": 12, "mesh.data": 10**12}, "not divisible by 1000000000000 devices: .*, or 4 devices"),
        (
            {"train.batch_size": 8, "train.microbatch": 4, "mesh.data": 8},
            "microbatch 4 is not divisible by 8 devices: use 8 or auto",
        ),
        (
            {"train.batch_size": 12, "train.microbatch": 4, "mesh.data": 8},
            "batch_size 12 is not divisible by 8 devices: use 8 or 16 and train.microbatch auto, or 4 devices",
        ),
        ({"checkpoint.folder": "foo://b/x"}, "should be a folder, or a bucket gs://BUCKET/FOLDER"),
        ({"checkpoint.folder": "caf\udce9"}, "checkpoint.folder: .* is not valid Unicode"),
        ({"data.source": "files"}, "--data.files"),
        ({"data.source": "hf:alone"}, "data.source: hf:alone: a data set of the hub is written as hf:OWNER/NAME"),
        ({"data.source": "tinystory"}, "'tinystory' is not known, perhaps you meant tinystories"),
        ({"data.mix": ("a.txt",), "data.files": ("b.txt",)}, "data.mix names the sources itself"),
        ({"data.source": "python-docs", "data.files": ("a",)}, "leave one out"),
        ({"data.separator": " ##"}, "can never match a whole line"),
        ({"data.files": ("caf\udce9.txt",)}, "not valid Unicode"),
        ({"train.seed": 2**32}, "train.seed"),
        ({"train.steps": 100_000_000_000}, "train.steps = 100000000000: should be less than or equal to 2147483647"),
        ({"train.dtype": "int8"}, "train.dtype = 'int8': should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"train.stepz": 3}, "unknown key train.stepz, perhaps you meant train.steps"),
        ({"model.lr": 3}, "unknown key model.lr, perhaps you meant optimizer.lr"),
        ({"trian.steps": 3}, "unknown key trian, perhaps you meant train"),
        ({"model.dim": 65, "model.heads": 2}, "heads of even width: use dim 64 or 68"),
        (
            {"model.rope_original_length": 64},
            "rope_original_length 64 has no effect without model.rope_scaling: llama3 or",
        ),
        (
            {"model.rope_scaling": "linear", "model.rope_factor": 2.0, "model.rope_low_turns": 2.0},
            "model.rope_low_turns 2 has no effect without model.rope_scaling: llama3 or yarn",
        ),
        ({"model.rope_high_turns": 8.0}, "model.rope_high_turns 8 has no effect without model.rope_scaling: llama3 or"),
        (
            {"model.rope_scaling": "llama3", "model.rope_original_length": 64, "model.rope_attention_factor": 1.5},
            "model.rope_attention_factor 1.5 has no effect without model.rope_scaling: yarn",
        ),
        ({"model.rope_factor": 2.0}, "no effect without model.rope_scaling: linear, llama3 or yarn"),
        (
            {"model.rope_scaling": "yarn", "model.rope_original_length": 4, "model.rope_low_turns": 30.0},
            "rope_original_length 4 is too short for yarn, no channel makes rope_low_turns 30 turns in it: give 189 or",
        ),
        (
            {"model.rope_scaling": "yarn", "model.rope_original_length": 10**9, "model.rope_base": 10.0},
            "every channel makes more than rope_high_turns 32 turns in it: raise rope_high_turns",
        ),
        ({**DPO, "data.source": "smoltalk"}, "needs pairs, .* and data.source smoltalk has none: name files, or hf:"),
        ({"optimizer.head_lr_scale": 0.5}, "head_lr_scale has no effect with model.tie_weights, .*embedding_lr_scale"),
        (
            {"optimizer.momentum": 0.9, "optimizer.name": "adamw"},
            "momentum has no effect with optimizer.name adamw: .*",
        ),
        (
            {"optimizer.momentum": 0.8, "optimizer.momentum_warmup_steps": 9},
            "use a larger one, or leave momentum_warmup",
        ),
        (
            {"optimizer.cautious_decay": True, "optimizer.weight_decay": 0},
            "cautious_decay has no effect with .* 0: leave",
        ),
        ({"optimizer.vector_lr_scale": 2, "lora.rank": 4}, "vector_lr_scale has no effect with lora.rank"),
        ({**DPO, "data.source": "hf:a/b", "data.loss_on": "all"}, "data.loss_on all has no effect with .*leave it out"),
        ({**DPO, "data.source": "hf:a/b", "data.format": "alpaca"}, "needs pairs, and data.format alpaca reads none"),
    ],
)
def test_each_problem_states_a_remedy(overrides, message):
    assert re.search(message, problem(**overrides)), problem(**overrides)


def test_suggested_values_are_accepted():
    Config.load(**{"model.dim": 96, "model.heads": 3})
    Config.load(**{"train.batch_size": 104, "mesh.data": 8})


def test_unknown_preset_and_broken_file(tmp_path):
    with pytest.raises(UserError, match="perhaps you meant quickstart"):
        Config.load("quikstart")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(UserError, match=r"bad\.toml is not valid TOML"):
        Config.load(tmp_path / "bad.toml")
    (tmp_path / "flat.toml").write_text("train = 5\n")
    with pytest.raises(UserError, match="train = 5"):
        config_from_args(["--config", str(tmp_path / "flat.toml"), "--train.steps", "9"], "x", "x")
    with pytest.raises(UserError, match="train = 5"):
        Config.load(tmp_path / "flat.toml", **{"train.steps": 9})
    with pytest.raises(UserError, match="cannot read"):
        Config.load(tmp_path / "none.toml")


def test_unknown_option_on_the_command_line():
    with pytest.raises(UserError, match=r"unknown option --model\.dims, perhaps you meant --model\.dim "):
        config_from_args(["--model.dims", "3"], "x", "x")


def test_equivalent_spellings():
    assert config_from_args(["--model.tie_weights", "false"], "x", "x").model.tie_weights is False
    assert config_from_args(["--model.tie_weights=true"], "x", "x").model.tie_weights is True
    assert Config.load(**{"data.files": "my.txt"}).data.files == ("my.txt",)


@pytest.mark.parametrize(
    ("name", "near"), [("--steps", "train.steps"), ("--resum", "resume"), ("--data.filse", "data.files")]
)
def test_nearest_option(name, near):
    with pytest.raises(UserError, match=f"perhaps you meant --{near} "):
        train.parse_args([name, "3"])


def test_all_wrong_values_of_a_command_line_are_reported_at_once():
    wrong = "--train.steps many --model.depth x --optimizer.name sgd --data.files --train.batch_size 0 --model.dim 100"
    with pytest.raises(UserError) as error:
        config_from_args(wrong.split(), "x", "x")
    assert str(error.value).splitlines() == [
        "command line: 5 problems:",
        "  - --train.steps many: should be a whole number",
        "  - --model.depth x: should be a whole number",
        "  - --optimizer.name sgd: should be one of 'muon', 'normuon', 'adamw'",
        "  - --data.files needs at least one value",
        "  - train.batch_size = 0: should be greater than or equal to 1",
    ]
    with pytest.raises(UserError, match=r"^--train\.steps many: should be a whole number$"):
        config_from_args(["--train.steps", "many"], "x", "x")


def test_option_without_values():
    with pytest.raises(UserError, match=r"--data\.files needs at least one value"):
        config_from_args(["--data.files"], "x", "x")


def test_files_override_the_source_of_a_preset(tmp_path):
    (tmp_path / "docs.toml").write_text('[data]\nsource = "python-docs"\n')
    config = config_from_args(["--config", str(tmp_path / "docs.toml"), "--data.files", "a.txt"], "x", "x")
    assert config.data.source == "files"


def test_option_given_twice():
    with pytest.raises(UserError, match="--run is given twice"):
        train.parse_args(["--run", "a", "--run=b"])
    assert config_from_args(["--train.steps", "3", "--train.steps=4"], "x", "x").train.steps == 4  # as in a script


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.steps", "abc"], "--train.steps abc: should be a whole number"),
        (["--train.steps", ""], "--train.steps is empty: should be a whole number"),
        (["--optimizer.lr=fast"], "--optimizer.lr fast: should be a number"),
        (["--model.tie_weights", "maybe"], "--model.tie_weights maybe: should be one of 'True', 'False'"),
        (["--optimizer.name", "sgd"], "--optimizer.name sgd: should be one of 'muon', 'normuon', 'adamw'"),
        (["--log.sinks", "wandb", "paper"], "--log.sinks paper: should be one of 'tensorboard', 'wandb', 'trackio'"),
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "3", "4"], "unknown: 4 (--help lists the options)"),
    ],
)
@pytest.mark.parametrize("columns", ["200", "60"])
def test_invalid_values_are_reported_on_one_line(monkeypatch, args, message, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        config_from_args(args, "x", "x")


def test_options_of_a_small_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")

    @dataclass
    class Options:
        """One sentence, and another that continues
        in the next line.

            python -m this       and what it does, which does not fit into the line
            python -m that       a line of its own
        """

        folder: str
        """Target folder."""

    for args, message in (
        ([], r"^--folder is missing: give a value \(Target folder\)$"),
        (["--foldr", "x", "--folder", "y"], "you meant --folder "),
    ):
        with pytest.raises(UserError, match=message):
            read_options(Options, args, "x")
    with pytest.raises(SystemExit):
        read_options(Options, ["--help"], "x")
    lines = capsys.readouterr().out.split("\n")
    assert lines[:3] == [
        "One sentence, and another that continues in the next line.",
        "",
        f"{'    python -m this':25}and what it does, which does not",
    ]
    assert lines[3:5] == [f"{'':25}fit into the line", f"{'    python -m that':25}a line of its own"]
    assert any("--folder STR" in line for line in lines)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        config_from_args(["--help", "all"], "python -m slm_jax.train", "text")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in Config().flat())


def test_presets_are_packaged_in_the_wheel():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"configs": "slm_jax/configs"}


def test_traits_of_options():
    """Every option is read with the traits that its readers rely on."""
    resumable = Config.fields_with("resumable")
    assert {"train.steps", "log.every", "health.on_spike"} <= resumable
    assert not {"train.seed", "optimizer.lr", "data.source", "eval.max_tokens", "checkpoint.folder"} & resumable
    assert {"model.attention", "model.scan_layers", "model.remat", "mesh.fsdp"} <= Config.fields_with("execution")
    assert Config.fields_with("execution") | Config.fields_with("per_host") <= resumable
    assert Config.fields_with("per_host") == {"data.cache", "data.workers"}
    assert not Config.fields_with("shapes_weights") & resumable
    with pytest.raises(ValueError, match="unknown trait 'resumeable'"):
        Config.fields_with("resumeable")


def test_values_of_earlier_versions():
    """Runs and curricula of earlier versions keep the optimizer state with the word `carry`."""
    config = Config.load(**{"init.from_run": "runs/a", "init.optimizer": "carry"})
    assert config.init.optimizer == "keep"
    assert config == Config.load(**{"init.from_run": "runs/a", "init.optimizer": "keep"})


@pytest.mark.parametrize("name", ["dim", "depth", "heads", "head_dim", "mlp_dim", "mlp_multiple", "vocab_multiple"])
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_made(name):
    """A list of 10^12 divisors, or so many layers, would never be finished."""
    with pytest.raises(UserError, match=rf"model\.{name} = 1000000000007: should be less than or equal to"):
        Config.load(**{f"model.{name}": 10**12 + 7})
