"""The pretrained tokenizers: complete, small and as described in the manifest."""

import json
from pathlib import Path

import pytest

import tokenizer
from tests.test_tokenizer.conftest import encode_reference
from tests.test_tokenizer.samples import EDGE_CASES, LANGUAGES
from tokenizer import HybridTokenizer, pretrained_names
from tokenizer.vocabulary import TURN_TOKENS

FOLDER = Path(tokenizer.__file__).parent / "vocabularies"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))


def test_names():
    sizes = ("8k", "16k", "32k")
    families = [f"{family}-{size}" for family in ("english", "multilingual") for size in sizes]
    assert set(pretrained_names()) == {*families, *(f"{name}-portable" for name in families)}
    assert set(MANIFEST) == set(pretrained_names())
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 2_000_000


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_pretrained_tokenizer(name):
    tok = HybridTokenizer.pretrained(name)
    entry = MANIFEST[name]
    assert tok.fingerprint == entry["fingerprint"]
    assert tok.vocab_size == entry["vocab_size"] == 1024 * int(name.split("-")[1].removesuffix("k"))
    assert tok.vocab_size <= 1 << 16
    assert tok.portable == name.endswith("-portable")
    for text in [*LANGUAGES.values(), *EDGE_CASES]:
        ids = tok.encode(text)
        assert ids == encode_reference(text, tok._vocabulary)
        assert tok.decode(ids) == text
    if tok.portable:
        assert set(tok.turn_ids) == {tok.token2id[turn] for turn in TURN_TOKENS}
    english = LANGUAGES["english"]
    assert len(english) / tok.count(english) > 2


@pytest.mark.parametrize("name", ["multilingual-8k", "multilingual-8k-portable"])
def test_fast_paths_on_long_text(name):
    tok = HybridTokenizer.pretrained(name)
    text = "\n".join(LANGUAGES.values()) * 20 + " ".join(f"new{index}word" for index in range(500))
    assert tok.encode_array(text).tolist() == encode_reference(text, tok._vocabulary)
    assert tok.decode(tok.encode_array(text)) == text
