"""The measured scores of `--size auto`, and their interpolation."""

import itertools
import math
from pathlib import Path

import pytest

from slm_jax.config import small_text
from slm_jax.config.rule import Request, make_recipe
from slm_jax.config.schema import Config
from slm_jax.config.small_text import POINTS, Point, expected_bits


@pytest.fixture
def table(monkeypatch):
    """Two texts of three sizes each."""
    texts = {
        "verse": (Point(100_000, 2.5), Point(400_000, 2.25), Point(6_000_000, 1.75)),
        "lists": (Point(150_000, 1.5), Point(500_000, 1.0), Point(5_000_000, 0.5)),
    }
    monkeypatch.setattr(small_text, "POINTS", texts)
    return texts


def test_the_pages_name_what_the_rule_chooses():
    """README.md by the bytes of files, configs/README.md by those of the training text and of files."""
    root = Path(__file__).parents[2]
    pages = {name: (root / name).read_text(encoding="utf-8") for name in ("README.md", "configs/README.md")}

    def chosen(kilobytes, share, digits):
        recipe = make_recipe(Request(auto=True, text_bytes=round(1000 * kilobytes * share)))
        return f"{recipe.parameters / 1e6:.{digits}f} M", recipe.options["train.steps"].value

    of_files = 1 - Config().data.validation_fraction
    for kilobytes, name in ((100, "100 kB"), (1000, "1 MB")):
        size, steps = chosen(kilobytes, of_files, 1)
        assert f"{size}, {steps} steps at {name}" in pages["README.md"]
    size, steps = chosen(100, of_files, 2)
    assert f"{size} parameters and {steps} steps" in " ".join(pages["configs/README.md"].split())
    for kilobytes in (100, 300):
        size, steps = chosen(kilobytes, 1, 2)
        assert f"| {kilobytes} kB of English news | {size} | {steps}" in pages["configs/README.md"]


def test_the_table_is_ordered_and_more_text_has_lower_scores():
    for points in POINTS.values():
        assert points
        for smaller, larger in itertools.pairwise(points):
            assert smaller.text_bytes < larger.text_bytes
            assert smaller.bits_per_byte > larger.bits_per_byte


def test_at_measured_sizes_the_range_holds_the_measurements(table):
    for name, points in table.items():
        for point in points:
            bits = expected_bits(point.text_bytes)
            assert bits.low <= point.bits_per_byte <= bits.high
            assert f"{name} ({point.bits_per_byte:.2f})" in bits.source


def test_between_two_sizes_half_of_the_logarithm_is_half_of_the_way(table):
    for name, points in table.items():
        for smaller, larger in itertools.pairwise(points):
            bits = expected_bits(round(math.sqrt(smaller.text_bytes * larger.text_bytes)))
            assert f"{name} ({(smaller.bits_per_byte + larger.bits_per_byte) / 2:.2f})" in bits.source


def test_texts_of_other_sizes_are_left_out(monkeypatch):
    texts = {"short": (Point(100_000, 2.5), Point(300_000, 2.0)), "long": (Point(1_000_000, 1.5),)}
    monkeypatch.setattr(small_text, "POINTS", texts)
    assert expected_bits(499_999).source == "short (2.00)"
    assert expected_bits(500_000).source == "short (2.00) and long (1.50)"
    assert expected_bits(600_000)[:2] == (1.5, 2.0)
    assert expected_bits(600_001).source == "long (1.50)"
    assert expected_bits(5_000_000).source == "long (1.50), measured at 1,000 kB, the nearest size"


def test_between_distant_texts_both_count(monkeypatch):
    monkeypatch.setattr(small_text, "POINTS", {"short": (Point(100_000, 2.5),), "long": (Point(1_000_000, 1.5),)})
    assert expected_bits(300_000).source == "short (2.50) and long (1.50)"


@pytest.mark.parametrize("factor", [0.1, 10])
def test_outside_of_the_measured_sizes_the_nearest_is_named(factor, table):
    sizes = [point.text_bytes for points in table.values() for point in points]
    nearest = min(sizes) if factor < 1 else max(sizes)
    outside, inside = expected_bits(round(factor * nearest)), expected_bits(nearest)
    assert (outside.low, outside.high) == (inside.low, inside.high)
    assert f"measured at {nearest / 1e3:,.0f} kB" in outside.source
    assert "measured at" not in inside.source
