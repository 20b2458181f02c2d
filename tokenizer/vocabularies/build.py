"""python -m tokenizer.vocabularies.build FOLDER: learn the ready-made tokenizers anew from a folder of text.

FOLDER holds UTF-8 .txt files in which a line ``<|endoftext|>`` ends a document. One document in ten, chosen by the
hash of its text, is held out; the manifest gives the bytes per token on those.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tokenizer import HybridTokenizer
from tokenizer.vocabularies import SUFFIX

SIZES = {"8k": 8192, "16k": 16384, "32k": 32768}
ENGLISH = ("english_prose", "english_tech", "stories", "shakespeare")
MULTILINGUAL = (*ENGLISH, "code", "multilingual", "hebrew", "hebrew_niqqud", "arabic", "russian", "chinese")
WHAT = {
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


def documents(folder: Path, name: str) -> tuple[str, str]:
    """(text to learn from, text held out) of one file."""
    text = (folder / f"{name}.txt").read_bytes().decode("utf-8")
    parts: tuple[list[str], list[str]] = ([], [])
    for document in text.split("<|endoftext|>\n"):
        held_out = hashlib.sha256(document.encode()).digest()[0] % 10 == 0
        parts[held_out].append(document)
    return "".join(parts[0]), "".join(parts[1])


def build(folder: Path, target: Path) -> dict[str, object]:
    """Learn and save all of them; return the manifest."""
    manifest: dict[str, object] = {}
    for family, names in (("english", ENGLISH), ("multilingual", MULTILINGUAL)):
        texts = {name: documents(folder, name) for name in names}
        learned = sum(len(learn.encode()) for learn, _ in texts.values())
        for label, size in SIZES.items():
            tokenizer = HybridTokenizer()
            for learn, _ in texts.values():
                tokenizer.add_text(learn)
            tokenizer.freeze_vocab(vocab_size=size, note=f"{family}-{label}: {', '.join(names)}")
            tokenizer.save(target / f"{family}-{label}{SUFFIX}")
            manifest[f"{family}-{label}"] = {
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
                "learned_from": {name: WHAT[name] for name in names},
                "bytes_of_text": learned,
                "held_out_bytes_per_token": {
                    name: round(len(held.encode()) / tokenizer.count(held), 3) for name, (_, held) in texts.items()
                },
            }
    return manifest


if __name__ == "__main__":
    here = Path(__file__).parent
    made = build(Path(sys.argv[1]), here)
    (here / "manifest.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
