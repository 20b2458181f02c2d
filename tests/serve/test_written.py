"""Text that is handed out piece by piece is the whole text, cut at the first stop string."""

from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.serve.detokenizer import Written
from tests.serve.conftest import TEXT
from tokenizer import HybridTokenizer

TOKENIZER = HybridTokenizer()
TOKENIZER.add_text(TEXT)
TOKENIZER.freeze_vocab(vocab_size=330)


def expected(ids, stops):
    """By definition: the text so far is looked through after each id; from the first stop string in it on, nothing."""
    decoder, text = TOKENIZER.stream_decoder(), ""
    for push in [*(lambda id_=id_: decoder.push(id_) for id_ in ids), decoder.finish]:
        text += push()
        if found := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(found)], True
    return text, False


IDS = st.one_of(
    st.text("The list, a 🙂é\n").map(TOKENIZER.encode), st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=20)
)


@settings(max_examples=300, deadline=None)
@given(IDS, st.lists(st.text("The list 🙂", min_size=1, max_size=5), max_size=3), st.lists(st.integers(1, 4)))
def test_pieces_are_the_whole_text(ids, stops, cuts):
    written = Written(TOKENIZER, stops, offset=7)
    text, tokens, rest = "", [], list(ids)
    while rest:
        count = cuts.pop() if cuts else 1
        written.push(rest[:count])
        rest = rest[count:]
        new, found = written.take()
        text += new
        tokens += found
        assert all(stop not in text for stop in stops)
    written.finish()
    new, found = written.take(whole=True)
    text, tokens = text + new, tokens + found
    assert (text, written.stopped) == expected(ids, stops)
    if not written.stopped:
        assert text == TOKENIZER.decode(ids)
        assert [token.id for token in tokens] == ids
    offset = 7
    for token in tokens:
        assert token.offset == offset
        offset += len(token.text)
    of_tokens = "".join(token.text for token in tokens)
    if written.stopped:
        assert of_tokens.startswith(text)
        assert all(token.offset < 7 + len(text) or not token.text for token in tokens)  # a case mark has no width
    else:  # half a character at the end is no token's
        assert text.startswith(of_tokens)


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not():
    written = Written(TOKENIZER, ["list is"])
    seen = []
    for letter in "The list it":
        written.push(TOKENIZER.encode(letter))
        seen.append(written.take()[0])
    assert seen == ["T", "h", "e", " ", "", "", "", "", "", "", "list it"]
