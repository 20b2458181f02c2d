"""`--size auto --base`: which runs a small text can start from, what is printed, and the options that follow."""

import itertools
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from slm_jax.cli import train
from slm_jax.cli.base_model import _sample_parts, text_sample
from slm_jax.config.schema import Config
from slm_jax.config.small_text import TUNED_EPOCHS
from slm_jax.config.weight_conflicts import weight_conflicts
from slm_jax.run.directory import Run
from slm_jax.training.tokenizer import resolve_tokenizer
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

TEXT = "".join(f"The {n}th line of this text is about the number {n * n}.\n" for n in range(2000))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT)
    return tmp_path


def make_run(folder, name, steps=40, finished=True, text=TEXT, own_bytes=3.0, **options):
    """Write the files of a run that the search reads; the arrays of its checkpoint are left out."""
    run = Run(folder / "runs" / name)
    run.path.mkdir(parents=True)
    shape = {"model.dim": 96, "model.heads": 2, "model.depth": 3, "model.mlp_dim": 150, "train.sequence_length": 64}
    config = Config.load("quickstart", **{**shape, "train.steps": steps, "tokenizer.vocab_size": 320, **options})
    run.begin(config)
    tokenizer = HybridTokenizer()
    tokenizer.add_text(text)
    tokenizer.freeze_vocab(vocab_size=320)
    tokenizer.save(run.path / "tokenizer.hybtok")
    (run.path / "checkpoints" / str(steps if finished else steps // 2)).mkdir(parents=True)
    run.corpus.mkdir()
    manifest = {"format": 3, "train": {"bytes": round(1000 * own_bytes), "tokens": 1000}}
    (run.corpus / "manifest.json").write_text(json.dumps(manifest))
    return run


def parse(*words):
    return train.parse_args(["my.txt", "--size", "auto", *words])[0]


def test_a_suitable_run_is_named_and_not_used(folder, capsys):
    run = make_run(folder, "good")
    config = parse("--train.seed", "7")
    assert not config.init.from_run
    printed = capsys.readouterr().err
    assert "base model available: runs/good" in printed
    assert "the only one" in printed
    command = next(line for line in printed.splitlines() if line.startswith("to start from it:")).partition(":  ")[2]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "slm_jax.train"]
    used = train.parse_args(words[3:])[0]
    assert (used.init.from_run, used.train.seed, used.data.files) == (str(run.path.relative_to(folder)), 7, ("my.txt",))


def test_the_command_of_a_suitable_run_keeps_all_options(folder, capsys):
    make_run(folder, "good")
    given = ["--run", "mine", "--budget", "3e12", "--config", "tinystories", "--eval.prompts", "Once upon", ""]
    given += ["--optimizer.lr", "0.001", "--data.deduplicate", "False"]
    parse(*given)
    printed = capsys.readouterr().err
    words = shlex.split(printed.partition("to start from it:")[2].splitlines()[0])[3:]
    config, run = train.parse_args(words)
    expected = train.parse_args(["my.txt", "--size", "auto", "--base", "runs/good", *given])
    assert (config, run) == expected
    assert (run.path.name, config.eval.prompts, config.data.deduplicate) == ("mine", ("Once upon", ""), False)


def test_the_run_of_the_most_flops_is_used(folder, capsys):
    make_run(folder, "short", steps=10)
    run = make_run(folder, "long", steps=50, **{"model.dropout": 0.3})
    make_run(folder, "unfinished", steps=900, finished=False)
    make_run(folder, "foreign", steps=900, text="ABCDEFG " * 500, own_bytes=7.0)
    dpo = {"train.objective": "dpo", "data.files": ["pairs.jsonl"], "data.mode": "padded"}
    make_run(folder, "preferences", steps=900, **dpo)
    (make_run(folder, "damaged", steps=900).path / "tokenizer.hybtok").write_text("nothing")
    config = parse("--base", "auto")
    assert config.init.from_run == "runs/long"
    printed = capsys.readouterr().err
    assert "of 2 suitable runs" in printed
    assert not list(weight_conflicts(config, run.read_config()))
    assert resolve_tokenizer(config) == "runs/long/tokenizer.hybtok"
    assert config.train.sequence_length == 64
    assert config.model.dropout == 0  # that of the text, which is read four times, not of the base
    assert f"{TUNED_EPOCHS} epochs of the text" in printed
    assert config.optimizer.lr < parse("--base", "none").optimizer.lr


def test_nothing_is_looked_for_with_none(folder, capsys):
    make_run(folder, "good")
    assert not parse("--base", "none").init.from_run
    assert "base model" not in capsys.readouterr().err


def test_without_a_suitable_run_a_new_model_is_trained(folder, capsys):
    parse()
    assert "base model" not in capsys.readouterr().err  # no run, nothing to say
    parse("--base", "auto")
    assert "base model: none is suitable (there is no run in runs), a new model" in capsys.readouterr().err
    make_run(folder, "unfinished", finished=False)
    assert not parse("--base", "auto").init.from_run
    assert "(runs/unfinished is not finished (step 20 of 40)), a new model" in capsys.readouterr().err


def test_a_named_run_is_used_as_it_is(folder, capsys):
    make_run(folder, "unfinished", finished=False)
    for name in ("unfinished", "runs/unfinished", str(folder / "runs/unfinished")):
        assert parse("--base", name).init.from_run.endswith("runs/unfinished")
    assert "note: runs/unfinished is not finished" in capsys.readouterr().err


def test_options_of_a_preset_and_of_the_command_line(folder):
    run = make_run(folder, "good")
    config = parse("--base", "good", "--config", "tinystories", "--optimizer.lr", "0.001", "--train.steps", "9")
    assert (config.optimizer.lr, config.train.steps) == (0.001, 9)
    assert not list(weight_conflicts(config, run.read_config()))
    assert resolve_tokenizer(config) == "runs/good/tokenizer.hybtok"


@pytest.mark.parametrize("preset", [[], ["--config", "tinystories"]])
def test_the_same_command_resumes(preset, folder):
    make_run(folder, "good", **{"model.tie_weights": False})
    words = ["--base", "good", "--run", "mine", *preset]
    config = parse(*words)
    make_run(folder, "mine").save_config(config)
    (folder / "runs/mine").rename("mine")
    assert parse(*words) == config


@pytest.mark.parametrize(
    ("started", "accepted", "refused"),
    [
        ("runs/good", ["good", "runs/good", "auto", "AUTO"], ["other", "none", "missing"]),
        ("runs/removed", ["removed", "auto"], ["good", "none"]),
        ("", ["none", "auto"], ["good"]),
    ],
)
def test_the_base_of_an_existing_run_stays(started, accepted, refused, folder, caplog):
    make_run(folder, "good")
    make_run(folder, "other")
    make_run(folder, "mine", **{"init.from_run": started, "data.files": ["my.txt"]})
    with caplog.at_level("INFO", "slm_jax.cli.dial"):
        for name in accepted:
            assert parse("--base", name, "--run", "runs/mine").init.from_run == started
    assert "runs/mine exists and keeps its options: ignoring --size and --base" in caplog.text
    for name in refused:
        with pytest.raises(UserError, match=f"runs/mine started with .*: --base {name} needs another --run"):
            parse("--base", name, "--run", "runs/mine")
    with pytest.raises(UserError, match="--base good belongs to --size auto"):
        train.parse_args(["--base", "good", "--run", "runs/mine"])


def test_the_base_stays_when_its_curriculum_has_gone_on(folder):
    """The base was the stage that was the newest then."""
    stages = [f"course/stages/{stage}" for stage in ("01-words", "02-chat")]
    for stage in stages:
        make_run(folder, stage)
    for stage in stages:
        name = f"after-{Path(stage).name}"
        make_run(folder, name, **{"init.from_run": f"runs/{stage}", "data.files": ["my.txt"]})
        assert parse("--base", "course", "--run", f"runs/{name}").init.from_run == f"runs/{stage}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my.txt", "--size", "auto", "--base", "missing"], "no run in missing"),
        (["my.txt", "--size", "1M", "--base", "auto"], "--base auto belongs to --size auto: give both$"),
        (["my.txt", "--base", "good"], "--base good belongs to --size auto: give both, or --init.from_run good$"),
        (["--size", "auto", "--base", "good"], "has to be in text files"),
        (["my.txt", "--size", "auto", "--init.from_run", "runs/good"], "or give --size auto --base runs/good"),
        (["my.txt", "--size", "auto", "--base", "normalizing"], "does not restore the text exactly"),
    ],
)
def test_refusals(words, message, folder, monkeypatch):
    make_run(folder, "good")
    make_run(folder, "normalizing")
    monkeypatch.setattr(HybridTokenizer, "decode", lambda self, ids, **_: "else")
    with pytest.raises(UserError, match=message) as error:
        train.parse_args(words)
    assert "\n" not in str(error.value)


def test_the_sample_covers_all_files_and_cuts_no_character(folder):
    paths = []
    for number in range(3):
        paths.append(folder / f"{number}.txt")
        paths[-1].write_text(f"{number}א" * 50_000 + "\n<|endoftext|>\n")
    sample = text_sample(paths)
    assert set(sample) == {"0", "1", "2", "א", "\n"}
    assert len(sample.encode()) <= 6 * 32_768 + 6
    assert text_sample([folder / "my.txt"]).startswith("The 0th line")


@pytest.mark.parametrize("lines", [4_000, 10_000, 28_000, 28_088, 28_089, 30_000, 100_000])
@pytest.mark.parametrize("files", [1, 2])
def test_the_parts_of_the_sample_do_not_overlap(lines, files, folder):
    texts = ["".join(f"{file}{number:05d}\n" for number in range(lines // files)) for file in range(files)]
    paths = [folder / f"{file}.txt" for file in range(files)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    sample = text_sample(paths)
    whole = [line for line in sample.splitlines() if len(line) == 6]
    assert len(whole) == len(set(whole))
    assert len(sample) <= 6 * 32_768 + 5
    if lines * 7 <= 6 * 32_768:
        assert sample == "\n".join(texts)
    else:
        assert len(sample) > (5 if files == 1 else 4) * 32_768


@pytest.mark.parametrize("sizes", [[5] * 3, [300] * 1000, [0, 70_000] * 4, [400_000], [1, 200_000, 0, 9, 65_536, 7, 0]])
def test_the_sample_is_of_as_many_files_as_it_takes(sizes, folder):
    data = np.random.default_rng(len(sizes)).bytes(sum(sizes))
    paths = [folder / f"{number}.txt" for number in range(len(sizes))]
    for path, size, end in zip(paths, sizes, itertools.accumulate(sizes), strict=True):
        path.write_bytes(data[end - size : end])
    stretches = [range(len(data))]
    if len(data) > 6 * 32_768:
        starts = [round(part * (len(data) - 32_768) / 5) for part in range(6)]
        stretches = [range(start, start + 32_768) for start in starts]
    files = [number for number, size in enumerate(sizes) for _ in range(size)]
    groups = [list(group) for stretch in stretches for _, group in itertools.groupby(stretch, files.__getitem__)]
    parts = [part for part in _sample_parts(paths) if part]
    assert parts == [data[group[0] : group[-1] + 1] for group in groups]
    assert sum(map(len, parts)) == min(len(data), 6 * 32_768)
