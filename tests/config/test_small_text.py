"""The measured scores of `--size auto`, and their interpolation."""

import itertools
import math

import pytest

from slm_jax.config import small_text
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


@pytest.mark.parametrize("factor", [0.1, 10])
def test_outside_of_the_measured_sizes_the_nearest_is_named(factor, table):
    sizes = [point.text_bytes for points in table.values() for point in points]
    nearest = min(sizes) if factor < 1 else max(sizes)
    outside, inside = expected_bits(round(factor * nearest)), expected_bits(nearest)
    assert (outside.low, outside.high) == (inside.low, inside.high)
    assert f"measured at {nearest / 1e3:,.0f} kB" in outside.source
    assert "measured at" not in inside.source
