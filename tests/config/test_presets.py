"""Presets: what their comments and configs/README.md state follows from their values."""

import re
from pathlib import Path

import pytest

from slm_jax.config.curriculum import Curriculum
from slm_jax.config.presets import preset_names, read_preset
from slm_jax.config.rule import learning_rate
from slm_jax.config.schema import Config
from slm_jax.model.block import swiglu_width
from slm_jax.performance import flops
from slm_jax.planning.presets import PRESET_TARGETS, targets_of
from slm_jax.planning.targets import TARGETS
from slm_jax.training import mfu

ROOT = Path(__file__).parents[2]
ACCELERATOR_PRESETS = sorted({each.preset for each in PRESET_TARGETS})
LEARNED_ON_CPU = {"quickstart", "minute", "curriculum-offline", "chat-offline"}
TIMED_ON_GPU = {"gpu_125m", "gpu_350m", "gpu_1b"}  # configs/README.md, "Measured on an H200"
UNIT = {"M": 1e6, "G": 1e9}


def header(name):
    """The comment at the top of a preset, on one line."""
    lines = (ROOT / "configs" / f"{name}.toml").read_text().splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("# ") for line in comment)


def quantity(text):
    """A number such as `2.5 G`."""
    number, unit = text.split()
    return float(number) * UNIT[unit]


def parameters(config):
    return flops.parameters(config.model, mfu.vocabulary(config))


def tokens(config):
    return config.train.steps * config.train.batch_size * config.train.sequence_length


def test_every_preset_for_accelerators_is_planned():
    assert set(ACCELERATOR_PRESETS) <= set(preset_names())
    assert {each.device for each in PRESET_TARGETS} <= set(TARGETS)
    for each in PRESET_TARGETS:
        mesh = Config.load(each.preset, **each.options).mesh
        assert each.devices == max(mesh.data, 1) * mesh.fsdp * mesh.tensor


@pytest.mark.parametrize("name", preset_names())
def test_comments_of_a_preset_follow_from_its_values(name):
    """Parameters to 5 %, tokens of the run, and widths."""
    text = (ROOT / "configs" / f"{name}.toml").read_text()
    config = Config.load(name)
    (stated,) = re.findall(r"^([\d.]+ [MG]) parameters", header(name))
    assert quantity(stated) == pytest.approx(parameters(config), rel=0.05)
    for stated in re.findall(r"steps = [\d_]+ +# ([\d.]+ [MG]) tokens", text):
        assert quantity(stated) == pytest.approx(tokens(config), rel=0.05)
    for stated in re.findall(r"(\d+) per parameter", text):
        assert int(stated) == round(tokens(config) / parameters(config))
    for stated in re.findall(r"# of width (\d+)", text):
        assert int(stated) == config.model.dim // config.model.heads
    for stated in re.findall(r"inner width (\d+)", text):
        assert int(stated) == swiglu_width(config.model)


@pytest.mark.parametrize("name", preset_names())
def test_the_learning_rate_of_a_preset_is_that_of_the_rule(name):
    config = Config.load(name)
    batch_tokens = config.train.batch_size * config.train.sequence_length
    rate = learning_rate(config.model.dim, batch_tokens, config.train.steps, config.optimizer.name)
    assert config.optimizer.lr == pytest.approx(rate, rel=0.06)


@pytest.mark.parametrize("name", preset_names())
def test_presets_hold_out_as_much_text_as_they_validate_on(name):
    """Four to five characters a token; text from the web is held out up to the cap, a twentieth is far more."""
    config = Config.load(name)
    assert 4 * config.eval.max_tokens < config.data.max_validation_characters < 50_000_000


@pytest.mark.parametrize("name", preset_names(curricula=True))
def test_comments_of_a_curriculum_follow_from_its_values(name):
    stages = Curriculum.load(name).stages
    (stated,) = re.findall(r"One model of ([\d.]+ [MG]) parameters", header(name))
    assert quantity(stated) == pytest.approx(parameters(stages[0].config), rel=0.05)
    assert f"in {[None, 'one', 'two', 'three', 'four'][len(stages)]} stages" in header(name)


@pytest.mark.parametrize("name", [*preset_names(), *preset_names(curricula=True)])
def test_presets_that_have_not_been_run_state_so(name):
    """No figure of memory or speed is stated for a device on which nothing has been measured."""
    text = header(name)
    assert ("ot yet run on" in text) == (name not in LEARNED_ON_CPU | TIMED_ON_GPU)
    assert ("teps were timed on" in text) == (name in TIMED_ON_GPU)
    if name not in LEARNED_ON_CPU:
        assert not re.search(r"tokens/s|MFU|TFLOP|[\d.]+ GB (?:of state|besides)", text)


@pytest.mark.parametrize("name", ACCELERATOR_PRESETS)
def test_the_header_names_the_devices_of_the_plan(name):
    named = {target.name for target in TARGETS.values() if target.label in header(name)}
    assert named == {each.device for each in targets_of(name)}


def test_the_table_of_the_readme_follows_from_the_presets():
    text = (ROOT / "configs" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+ [MG]) \| [^|]+ \| ([\d.]+ [MG]) \|", text, flags=re.M)
    assert sorted(name for name, *_ in rows) == preset_names()
    for name, count, length in rows:
        config = Config.load(name)
        assert quantity(count) == pytest.approx(parameters(config), rel=0.05), name
        assert quantity(length) == pytest.approx(tokens(config), rel=0.05), name
    assert all(f"`{name}`" in text for name in preset_names(curricula=True))


@pytest.mark.parametrize("name", ACCELERATOR_PRESETS)
def test_widths_are_multiples_of_what_matrix_units_use(name):
    config = Config.load(name)
    vocab_size = mfu.vocabulary(config)
    sizes = [side for shape in flops.block_matrices(config.model) for side in shape]
    assert all(size % 128 == 0 for size in (*sizes, vocab_size, config.train.sequence_length))
    assert config.model.dim // config.model.heads in (64, 128)


def test_byte_order_mark_of_a_preset_is_ignored(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert read_preset(tmp_path / "mine.toml") == {"train": {"steps": 7}}
