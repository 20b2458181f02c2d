"""Train the pretrained tokenizers again: python -m tokenizer.vocabularies.build FOLDER

FOLDER contains UTF-8 .txt files in which a line ``<|endoftext|>`` ends a document. One document in ten, chosen by the
hash of its text, is held out; the manifest contains the bytes per token on those.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tokenizer import HybridTokenizer
from tokenizer.vocabularies import SUFFIX

SIZES = {"8k": 8192, "16k": 16384, "32k": 32768}
ENGLISH = ("english_prose", "english_tech", "stories", "shakespeare")
MULTILINGUAL = (*ENGLISH, "code", "multilingual", "hebrew", "hebrew_niqqud", "arabic", "russian", "chinese")
DESCRIPTIONS = {
    "english_prose": "novels and essays, public domain",
    "english_tech": "manuals and RFC-like documents",
    "stories": "fairy tales",
    "shakespeare": "plays",
    "code": "Python, C and Go",
    "multilingual": "about twenty languages",
    "hebrew": "Hebrew",
    "hebrew_niqqud": "Hebrew with vowel points",
    "arabic": "Arabic",
    "russian": "Russian",
    "chinese": "Chinese",
}


def read_documents(folder: Path, name: str) -> tuple[str, str]:
    """Return the training text and the held-out text of one file."""
    text = (folder / f"{name}.txt").read_bytes().decode("utf-8")
    training = []
    held_out = []
    for document in text.split("<|endoftext|>\n"):
        if hashlib.sha256(document.encode()).digest()[0] % 10 == 0:
            held_out.append(document)
        else:
            training.append(document)
    return "".join(training), "".join(held_out)


def build(folder: Path, target: Path) -> dict[str, Any]:
    """Train all pretrained tokenizers on the text in `folder` and save them to `target`; return the manifest."""
    manifest: dict[str, Any] = {}
    for family, names in (("english", ENGLISH), ("multilingual", MULTILINGUAL)):
        texts = {name: read_documents(folder, name) for name in names}
        training_bytes = sum(len(training.encode()) for training, _ in texts.values())
        for label, size in SIZES.items():
            tokenizer = HybridTokenizer()
            for training, _ in texts.values():
                tokenizer.add_text(training)
            # Without turn tokens: the ids of these vocabularies are fixed, and conversations use reserved ones.
            tokenizer.freeze_vocab(vocab_size=size, turn_tokens=False, note=f"{family}-{label}: {', '.join(names)}")
            tokenizer.save(target / f"{family}-{label}{SUFFIX}")
            manifest[f"{family}-{label}"] = {
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
                "learned_from": {name: DESCRIPTIONS[name] for name in names},
                "bytes_of_text": training_bytes,
                "held_out_bytes_per_token": {
                    name: round(len(held_out.encode()) / tokenizer.count(held_out), 3)
                    for name, (_, held_out) in texts.items()
                },
            }
    return manifest


if __name__ == "__main__":
    vocabularies = Path(__file__).parent
    manifest_text = json.dumps(build(Path(sys.argv[1]), vocabularies), indent=1) + "\n"
    (vocabularies / "manifest.json").write_text(manifest_text, encoding="utf-8")
