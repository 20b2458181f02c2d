"""Counts and sizes as a user reads them."""

import pytest

from slm_jax.utils.formatting import plural, text_size


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 documents"), (1, "1 document"), (2, "2 documents"), (1234, "1,234 documents")]
)
def test_counts_agree_with_the_noun(count, text):
    assert plural(count, "document") == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (3_160, "3.2 kB"), (60_000, "60.0 kB"), (2_390_000, "2.39 MB")],
)
def test_a_small_size_is_not_rounded_to_zero(count, text):
    assert text_size(count) == text
