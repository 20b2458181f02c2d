"""The ready-made tokenizers: there, small, whole, and what the manifest says."""

import json
from pathlib import Path

import pytest

import tokenizer
from tests.test_tokenizer.samples import LANGUAGES, TRAPS
from tokenizer import HybridTokenizer, pretrained_names
from tokenizer.encoding.segment import encode_reference

FOLDER = Path(tokenizer.__file__).parent / "vocabularies"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))


def test_names():
    sizes = ("8k", "16k", "32k")
    assert set(pretrained_names()) == {f"{family}-{size}" for family in ("english", "multilingual") for size in sizes}
    assert set(MANIFEST) == set(pretrained_names())
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 2_000_000


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_ready_made(name):
    tok = HybridTokenizer.pretrained(name)
    entry = MANIFEST[name]
    assert tok.fingerprint == entry["fingerprint"]
    assert tok.vocab_size == entry["vocab_size"] == 1024 * int(name.split("-")[1].removesuffix("k"))
    assert tok.vocab_size <= 1 << 16
    for text in [*LANGUAGES.values(), *TRAPS]:
        ids = tok.encode(text)
        assert ids == encode_reference(text, tok._vocabulary)
        assert tok.decode(ids) == text
    english = LANGUAGES["english"]
    assert len(english) / tok.count(english) > 2


def test_long_text_by_the_fast_paths():
    tok = HybridTokenizer.pretrained("multilingual-8k")
    text = "\n".join(LANGUAGES.values()) * 20 + " ".join(f"new{index}word" for index in range(500))
    assert tok.encode_array(text).tolist() == encode_reference(text, tok._vocabulary)
    assert tok.decode(tok.encode_array(text)) == text
