"""The presets for accelerators: what they say of themselves is what their numbers come to."""

import importlib.util
import re
from pathlib import Path

import pytest

from slm_jax.config.presets import preset_names
from slm_jax.config.schema import Config
from slm_jax.performance import flops
from slm_jax.training import mfu

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("plan", ROOT / "tests" / "benchmarks" / "plan.py")
plan = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plan)

LARGE = sorted({each.preset for each in plan.PLANS})


def test_every_preset_for_accelerators_is_planned():
    assert set(plan.SPEEDS) <= set(LARGE) <= set(preset_names())


@pytest.mark.parametrize("name", LARGE)
def test_the_comment_says_what_the_numbers_come_to(name):
    """Parameters, tokens of the run and tokens per second, each to two digits."""
    text = (ROOT / "configs" / f"{name}.toml").read_text().replace("\n# ", " ")
    config = plan.configured(next(each for each in plan.PLANS if each.preset == name))
    vocab_size = mfu.vocabulary(config)
    millions = flops.parameters(config.model, vocab_size) / 1e6
    (said,) = re.findall(r"A model of ([\d.]+) ([MG]) parameters", text)
    assert float(said[0]) * {"M": 1, "G": 1000}[said[1]] == pytest.approx(millions, rel=0.05)
    tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
    (said,) = re.findall(r"steps = [\d_]+ +# ([\d.]+) ([MG]) tokens", text)
    assert float(said[0]) * {"M": 1e6, "G": 1e9}[said[1]] == pytest.approx(tokens, rel=0.05)
    rows = {each.device: (each.count, each.mfu) for each in plan.PLANS if each.preset == name and not each.fields}
    rows |= {device: (1, share) for device, share in plan.SPEEDS.get(name, {}).items()}
    said = re.findall(r"([\d,]+) tokens/s on (?:an? |8 )?([A-Za-z0-9 ]+?) \((\d+) %", text)
    assert {device for _, device, _ in said} == {plan.short(device) for device in rows}
    for device, (count, share) in rows.items():
        speed = plan.tokens_per_second(config, vocab_size, device, count, share)
        value, percent = next((v, p) for v, d, p in said if d == plan.short(device))
        assert int(value.replace(",", "")) == pytest.approx(speed, rel=0.06)
        assert int(percent) == round(100 * share)


@pytest.mark.parametrize("name", LARGE)
def test_widths_are_what_matrix_units_like(name):
    config = Config.load(name)
    vocab_size = mfu.vocabulary(config)
    sizes = [side for shape in flops.block_matrices(config.model) for side in shape]
    assert all(size % 128 == 0 for size in (*sizes, vocab_size, config.train.sequence_length))
    assert config.model.dim // config.model.heads in (64, 128)
