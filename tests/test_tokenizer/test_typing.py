"""The package is fully typed for its users."""

import subprocess
import sys
from pathlib import Path

import pytest

import tokenizer

CONSUMER = """
import numpy as np
from numpy.typing import NDArray

from tokenizer import HybridTokenizer, TokenizerError, pretrained_names

tok = HybridTokenizer(lowercase=True, byte_limit=4)
paths: list[str] = tok.add_files(["data/**/*.txt"], processes=2, progress=lambda what, done, total: None)
tok.freeze_vocab(k_bases=5000, max_merges=10000)
flat: list[int] = tok.encode("text", mode="flat")
pairs: list[tuple[int, int]] = tok.encode("text", mode="rle")
array: NDArray[np.int32] = tok.encode_array("text")
text: str = tok.decode(flat) + tok.decode(pairs) + tok.decode(array)
ids, mask = tok.encode_batch(["text"], max_len=8)
ids_BxT: NDArray[np.int32] = ids
mask_BxT: NDArray[np.bool_] = mask
pad: int = tok.token2id["<PAD>"]
kinds: set[str] = {segment.kind for segment in tok.segment("text")}
leaves: list[str] = tok.explain_token("text").leaves()
count: int = tok.top_merges(1)[0].count
special: tuple[str, ...] = tok.db_status(preview=0).special
chunk: str = tok.stream_decoder().push(flat[0])
loaded: HybridTokenizer = HybridTokenizer.pretrained(pretrained_names()[0])
"""
WRONG = {
    "tok.decode(3)": "arg-type",
    "tok.encode('text', mode='list')": "call-overload",
    "pairs: list[tuple[int, int]] = tok.encode('text')": "assignment",
}


def test_a_typed_program_can_use_it(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    lines = ["from tokenizer import HybridTokenizer", "tok = HybridTokenizer()", *WRONG]
    (tmp_path / "wrong.py").write_text("\n".join(lines) + "\n")
    options = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "mypy", *options, str(tmp_path / "consumer.py"), str(tmp_path / "wrong.py")]
    root = Path(tokenizer.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert "consumer.py" not in done.stdout, done.stdout
    for number, code in enumerate(WRONG.values(), start=3):
        assert f"wrong.py:{number}: error:" in done.stdout
        assert f"[{code}]" in done.stdout
