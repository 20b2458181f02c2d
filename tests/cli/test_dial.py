"""--size and --budget on a command line: what wins, what is printed, what is refused."""

import pytest

from slm_jax.cli import check, mfu, plan, train
from slm_jax.cli.dial import DialOptions, apply_rule, bytes_of_text
from slm_jax.config.rule import OPTIONS
from slm_jax.config.schema import Config
from slm_jax.config.shape import parameters_of
from slm_jax.config.training_length import TOKENS_PER_PARAMETER
from slm_jax.performance import flops
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("A line of text.\n" * 100_000)
    return tmp_path


def test_the_rule_replaces_the_shape_of_a_preset_and_the_command_line_both(capsys):
    config, run = train.parse_args(
        ["--config", "tinystories", "--size", "10M", "--model.depth", "6", "--train.seed", "3"]
    )
    assert run is None
    preset = Config.load("tinystories")
    assert parameters_of(config) != parameters_of(preset)
    assert config.model.depth == 6
    assert config.train.seed == 3
    assert config.data.source == "tinystories"
    assert config.eval.prompts == preset.eval.prompts
    assert config.tokenizer.path == preset.tokenizer.path
    table = capsys.readouterr().err
    assert "optimizer.lr" in table
    assert "model.depth" not in table  # given, so that there is nothing to explain
    changed = set(config.differences(preset))
    assert changed <= {*OPTIONS, "data.max_tokens", "model.depth", "train.seed"}


def test_a_text_limits_the_length(capsys):
    config, _ = train.parse_args(["text.txt", "--size", "1M"])
    tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
    assert tokens < TOKENS_PER_PARAMETER * 1e6
    assert "epochs of the text" in capsys.readouterr().err


def test_flops_are_spent_and_the_table_says_so(capsys):
    train.parse_args(["--config", "tinystories", "--budget", "1e15"])
    assert "1.00e+15 FLOPs" in capsys.readouterr().err


def test_a_time_becomes_minutes():
    chosen = apply_rule(DialOptions(budget="10min"), {}, "tinystories", speed=lambda _: 1e11)
    assert chosen["train.minutes"] == 10
    assert "train.steps" not in chosen  # fixed by the speed trial
    steps = apply_rule(DialOptions(budget="10min"), {"train.steps": 70}, "tinystories", speed=lambda _: 1e11)
    assert steps["train.steps"] == 70
    assert "train.minutes" not in steps


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "banana"], "--size banana: should be"),
        (["--budget", "bananas"], "--budget bananas: should be"),
        (["--size", "auto", "--config", "tinystories"], "needs a text whose size is known"),
        (["--budget", "1e6"], "too small for one step"),
        (["--size", "1M", "--config", "gpu_125m"], "give a larger --size or --budget, or a smaller vocabulary"),
        (["text.txt", "--size", "1M", "--train.steps", "0"], r"train\.steps = 0: should be"),
        (["text.txt", "--size", "1M", "--model.heads", "-1"], r"model\.heads = -1: should be"),
        (["text.txt", "--size", "1M", "--tokenizer.vocab_size", "0"], r"vocab_size = 0: should be"),
        (["text.txt", "--size", "1M", "--train.sequence_length", "0"], r"sequence_length = 0: should be"),
        (["text.txt", "--budget", "1e12", "--train.sequence_length", "-4"], r"sequence_length = -4: should be"),
        (["text.txt", "--size", "1M", "--data.validation_fraction", "1.5"], r"validation_fraction = 1\.5: should be"),
        (["text.txt", "--size", "1M", "--train.minutes", "2", "--train.steps", "5"], "leave one out"),
        (["tiny.txt", "--size", "auto"], "the text is too short"),
        (["tiny.txt", "--size", "1M"], "the text is too short"),
        (["tiny.txt", "--budget", "1e12"], "the text is too short"),
        (["text.txt", "--size", "3M", "--train.batch_size", "100000"], "too short.* a smaller --train.batch_size"),
        (
            ["--config", "tinystories", "--size", "20M", "--train.batch_size", "10000000"],
            "^20 tokens per parameter",
        ),
        (["tiny.txt", "--size", "auto", "--budget", "1e6"], "the budget is too small"),
        (["empty.txt", "--size", "auto"], "neither empty nor compressed"),
        (["--size", "1M", "--init.from_run", "runs/x"], r"init\.from_run starts with an existing one"),
    ],
)
def test_refusals_are_one_line(args, message, folder):
    (folder / "tiny.txt").write_text("ten bytes\n")
    (folder / "empty.txt").touch()
    with pytest.raises(UserError, match=message) as error:
        train.parse_args(args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dial", [["--size", "1M"], ["--budget", "1e12"], ["--size", "AUTO"]])
def test_given_minutes_replace_the_steps(dial, monkeypatch):
    monkeypatch.setattr(train, "measured_speed", lambda _: 1e11)
    config, _ = train.parse_args(["text.txt", *dial, "--train.minutes", "2"])
    assert config.train.minutes == 2
    assert config.train.steps == Config.load("quickstart").train.steps  # the speed trial's, later


def test_given_minutes_are_a_budget_of_one_process(monkeypatch):
    def options(**dial):
        return apply_rule(DialOptions("1M", **dial), minutes if not dial else {}, "tinystories", speed=lambda _: 1e10)

    minutes = {"train.minutes": 2.0}
    assert options() == options(budget="2min")
    monkeypatch.setattr("slm_jax.distributed.multihost.process_count", lambda: 2)
    assert options()["train.minutes"] == 2
    assert options() != apply_rule(DialOptions("1M", "2min"), {}, "tinystories", speed=lambda _: 1e10)


def test_a_limit_of_tokens_of_a_preset_is_none_of_a_text(capsys):
    train.parse_args(["text.txt", "--config", "tinystories", "--size", "10M"])
    assert "epochs of the text" in capsys.readouterr().err
    train.parse_args(["text.txt", "--config", "tinystories", "--size", "auto"])


def test_the_tokens_of_a_time_are_an_estimate_with_a_margin():
    timed = apply_rule(DialOptions(budget="10min"), {}, "tinystories", speed=lambda _: 1e11)
    counted = apply_rule(DialOptions(budget="6e13"), {}, "tinystories")
    assert timed["data.max_tokens"] > 3 * counted["data.max_tokens"]


def test_a_run_is_resumed_without_the_file_of_its_tokenizer(folder):
    args = ["text.txt", "--size", "1M", "--run", "made", "--tokenizer.path", "tokenizer.hybtok"]
    tokenizer = HybridTokenizer()
    tokenizer.add_text("some text")
    tokenizer.freeze_vocab(vocab_size=300)
    tokenizer.save(folder / "tokenizer.hybtok")
    config, run = train.parse_args(args)
    run.path.mkdir()
    run.begin(config)
    (folder / "tokenizer.hybtok").rename(run.tokenizer)
    assert train.parse_args(args)[0] == config


@pytest.mark.parametrize(
    "given", [["--model.recipe", "speedrun"], ["--model.head_dim", "128"], ["--model.kv_heads", "1"]]
)
def test_options_that_change_the_size_are_noted(given, capsys):
    config, _ = train.parse_args(["text.txt", "--size", "3M", *given])
    count = flops.parameters(config.model, config.tokenizer.vocab_size)
    assert f"the model has {count:,} parameters" in capsys.readouterr().err


def test_without_such_options_there_is_no_note(capsys):
    config, _ = train.parse_args(["text.txt", "--size", "3M"])
    text = capsys.readouterr().err
    assert f"{flops.parameters(config.model, config.tokenizer.vocab_size):,} parameters" in text
    assert "note:" not in text


def test_a_size_beyond_the_memory_names_one_that_fits(monkeypatch):
    monkeypatch.setattr("slm_jax.utils.memory.free_host_memory", lambda: 10**9)
    with pytest.raises(UserError, match=r"--size \d+M fits") as error:
        train.parse_args(["--size", "350M"])
    fits = str(error.value).rpartition("--size ")[2].split()[0]
    train.parse_args(["--size", fits])


def test_an_existing_run_keeps_what_was_chosen(folder):
    args = ["text.txt", "--size", "1M", "--run", "made"]
    config, run = train.parse_args(args)
    run.path.mkdir()
    run.begin(config)
    (folder / "text.txt").write_text("A line of text.\n")  # the rule would choose other steps
    again, _ = train.parse_args(args)
    assert again == config
    with pytest.raises(UserError, match="--size 30M needs another --run"):
        train.parse_args(["text.txt", "--size", "30M", "--run", "made"])
    assert Run(folder / "made").read_config() == config


def test_an_existing_run_keeps_the_length_of_a_preset_s_text(capsys):
    args = ["--size", "1M", "--run", "made", "--config", "tinystories"]
    config, run = train.parse_args(args)
    assert config.data.max_tokens < Config.load("tinystories").data.max_tokens
    run.path.mkdir()
    run.begin(config)
    assert train.parse_args(args)[0] == config


def test_other_commands_take_the_options(monkeypatch):
    with pytest.raises(UserError, match="--run names an existing one"):
        mfu.main(["--run", "x", "--size", "1M"])
    with pytest.raises(UserError, match="--run names an existing one"):
        check.main(["--run", "x", "--size", "1M"])
    with pytest.raises(UserError, match="the time is that of this machine"):
        plan.main(["--device", "h100", "--budget", "10min"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.NDJSON", "a.json", "a.parquet", "a.txt.gz", "a.md.XZ", "a.jsonl.zst"])
def test_files_that_hold_more_or_less_than_their_text_have_no_known_size(name, folder):
    for path in (folder / "text.md", folder / name):
        path.write_bytes(b"x" * 1000)
    assert bytes_of_text({}, {"data.files": "text.md", "data.validation_fraction": 0.25}) == 750
    assert bytes_of_text({}, {"data.files": ["text.md", name]}) == 0
