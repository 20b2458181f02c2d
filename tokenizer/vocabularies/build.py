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
PORTABLE = "-portable"
"""Ends the names of portable tokenizers."""
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


def train(name: str, texts: dict[str, tuple[str, str]], target: Path) -> dict[str, Any]:
    """Train one tokenizer and save it to `target`; return its entry in the manifest.

    Args:
        name: Its name, for example "english-16k" or "english-16k-portable".
        texts: Training text and held-out text of each file.
        target: The folder.
    """
    portable = name.endswith(PORTABLE)
    tokenizer = HybridTokenizer(portable=portable)
    for training, _ in texts.values():
        tokenizer.add_text(training)
    size = SIZES[name.split("-")[1]]
    # Those that are not portable have no turn tokens: their ids are fixed, and conversations use reserved ones.
    tokenizer.freeze_vocab(vocab_size=size, turn_tokens=portable, note=f"{name}: {', '.join(texts)}")
    tokenizer.save(target / f"{name}{SUFFIX}")
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "learned_from": {text: DESCRIPTIONS[text] for text in texts},
        "bytes_of_text": sum(len(training.encode()) for training, _ in texts.values()),
        "held_out_bytes_per_token": {
            text: round(len(held_out.encode()) / tokenizer.count(held_out), 3) for text, (_, held_out) in texts.items()
        },
    }


def build(folder: Path, target: Path) -> dict[str, Any]:
    """Train all pretrained tokenizers on the text in `folder` and save them to `target`; return the manifest."""
    manifest: dict[str, Any] = {}
    for family, names in (("english", ENGLISH), ("multilingual", MULTILINGUAL)):
        texts = {name: read_documents(folder, name) for name in names}
        for kind in ("", PORTABLE):
            for label in SIZES:
                name = f"{family}-{label}{kind}"
                manifest[name] = train(name, texts, target)
    return manifest


if __name__ == "__main__":
    vocabularies = Path(__file__).parent
    manifest_text = json.dumps(build(Path(sys.argv[1]), vocabularies), indent=1) + "\n"
    (vocabularies / "manifest.json").write_text(manifest_text, encoding="utf-8")
