"""Incrementally decoded text equals the text decoded at once, cut at the first stop string."""

from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.serve.detokenizer import IncrementalDetokenizer
from tests.serve.conftest import TEXT
from tokenizer import HybridTokenizer

TOKENIZER = HybridTokenizer()
TOKENIZER.add_text(TEXT)
TOKENIZER.freeze_vocab(vocab_size=330)


def expected(ids, stops):
    """Apply the definition: search the text so far after each id, and cut it at the first stop string in it."""
    decoder, text = TOKENIZER.stream_decoder(), ""
    for push in [*(lambda id_=id_: decoder.push(id_) for id_ in ids), decoder.finish]:
        text += push()
        if matches := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(matches)], True
    return text, False


IDS = st.one_of(
    st.text("The list, a 🙂é\n").map(TOKENIZER.encode), st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=20)
)


@settings(max_examples=300, deadline=None)
@given(IDS, st.lists(st.text("The list 🙂", min_size=1, max_size=5), max_size=3), st.lists(st.integers(1, 4)))
def test_released_text_equals_the_text_decoded_at_once(ids, stops, chunk_sizes):
    detokenizer = IncrementalDetokenizer(TOKENIZER, stops, offset=7)
    text = ""
    tokens = []
    rest = list(ids)
    while rest:
        count = chunk_sizes.pop() if chunk_sizes else 1
        detokenizer.append(rest[:count])
        rest = rest[count:]
        new_text, new_tokens = detokenizer.release()
        text += new_text
        tokens += new_tokens
        assert all(stop not in text for stop in stops)
    detokenizer.finish()
    new_text, new_tokens = detokenizer.release(final=True)
    text += new_text
    tokens += new_tokens
    assert (text, detokenizer.stopped) == expected(ids, stops)
    if not detokenizer.stopped:
        assert text == TOKENIZER.decode(ids)
        assert [token.id for token in tokens] == ids
    offset = 7
    for token in tokens:
        assert token.offset == offset
        offset += len(token.text)
    joined = "".join(token.text for token in tokens)
    if detokenizer.stopped:
        assert joined.startswith(text)
        assert all(token.offset < 7 + len(text) or not token.text for token in tokens)  # a case mark has no width
    else:  # an incomplete character at the end belongs to no token
        assert text.startswith(joined)


def test_a_possible_start_of_a_stop_string_is_held_back():
    detokenizer = IncrementalDetokenizer(TOKENIZER, ["list is"])
    released = []
    for letter in "The list it":
        detokenizer.append(TOKENIZER.encode(letter))
        released.append(detokenizer.release()[0])
    assert released == ["T", "h", "e", " ", "", "", "", "", "", "", "list it"]
