"""Normalized white space."""

from hypothesis import given
from hypothesis import strategies as st

from slm_jax.utils.text_windows import normalize_space, normalized_bytes
from tests.test_tokenizer.samples import any_text

SPACES = [chr(code) for code in range(0x110000) if chr(code).isspace()]


@given(
    st.one_of(
        any_text, st.lists(st.one_of(st.sampled_from(SPACES), st.sampled_from("ab\u2019é中🙂\ud800"))).map("".join)
    )
)
def test_bytes_are_those_of_the_normalized_text(text):
    assert normalized_bytes(text) == normalize_space(text).encode("utf-8", "surrogatepass")


def test_every_kind_of_white_space():
    assert (
        normalized_bytes("".join(f"{space}a{space}{space}b" for space in SPACES))
        == b"a b " * (len(SPACES) - 1) + b"a b"
    )
