"""The tokenizer of a published model in the report."""

from types import SimpleNamespace

import pytest

pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")

from slm_jax.config.schema import Config
from slm_jax.report.tokenizer_section import tokenizer_section
from slm_jax.run.samples import Sample
from slm_jax.utils.tokenizer_loading import load_tokenizer
from tests.report.pages import Page
from tests.report.test_report import properties
from tests.utils import foreign

TEXT = f"Line 1: the quick fox\n\tnaïve 🙂 {foreign.EOS}<tool> שלום עולם"
MANIFEST = {
    "train": {"tokens": 1010, "bytes": 3000, "documents": 10, "prompts": 0},
    "validation": {"tokens": 0, "bytes": 0, "documents": 0, "prompts": 0},
    "counts": {},
}


@pytest.mark.parametrize("bos", [False, True])
def test_properties_and_sample(tmp_path, bos):
    tokenizer = load_tokenizer(foreign.byte_level(tmp_path, bos=bos))
    run = SimpleNamespace(tokenizer=tokenizer, config=Config(), manifests=[MANIFEST])
    page = Page(str(tokenizer_section(run, [Sample(1, ["old"]), Sample(2, [TEXT])]))).root
    shown = properties(page)
    assert shown["Vocabulary"] == f"{tokenizer.vocab_size:,} (4 special)"
    assert shown["Ends a text"] == foreign.EOS
    assert shown.get("Bytes per token, training text") == (None if bos else "3.000")
    pieces = list(page.all("span", "piece"))
    assert [int(piece.attributes["title"].split(":")[0]) for piece in pieces] == tokenizer.encode(TEXT)
    words = "".join(piece.text for piece in pieces if "piece-space" not in piece.classes)
    assert "".join(words.replace("▯", "").split()) == "".join(TEXT.split())
    assert [piece.text for piece in pieces if "piece-special" in piece.classes] == [foreign.EOS]
    assert any("piece-byte" in piece.classes for piece in pieces)  # the emoji is more than one token
