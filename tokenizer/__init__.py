"""HybridTokenizer: a lossless, inspectable subword tokenizer in pure Python and NumPy.

How text is represented, and why:

- A space belongs to the word after it (" the"), as in most tokenizers that language models are trained with: a separate
  space token would double the length of text. Newlines and indentation are likewise placed before what follows them,
  where that is common enough. ``<SP>`` and ``<NL>`` are for the rest: a single space or newline.
- Case is a mark on the next token: ``<UP>`` + " the" is " The", ``<CAPS>`` + " the" is " THE". Common capitalized words
  are entries of their own, made of the mark and the word. ``lowercase=False`` keeps case in the entries instead.
- Text without an entry is encoded as bytes, so every str can be encoded; entries are always complete characters.
- A pre-token (white space and the word after it) is encoded with as few tokens as possible, independent of its context.
  Hence ``encode(a) + encode(b) == encode(a + b)`` if b starts with white space and a does not end with it.
- Letters, digits and punctuation are kept apart while merges are learned, which costs 3 to 5 % more tokens and makes
  better models: 1.40 bits per byte instead of 1.43 (2.2 M parameters, 2,048 entries, the same 400 steps on Python's
  documentation). ``boundaries="spaces"`` lets "him," be one token. A newline does not join the word after it either:
  joining saves 2 % of the tokens, but models ended worse on plays, prose and code (by 0.2 to 1.7 %, six of six runs of
  1 M parameters with 1,024 and 2,048 entries) and better only on Python's documentation (by 1.0 %).
- Phrases, if requested, then join ids of neighboring words. The same text takes fewer tokens, each of which predicts
  more at once; whether a model gains from that must be decided by its bits per byte.

Names are imported on first use, so that `python -m tokenizer` can expect Ctrl-C before it loads anything.
"""

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from typing import Any

    from tokenizer.errors import TokenizerError
    from tokenizer.hybrid import HybridTokenizer
    from tokenizer.vocabularies import pretrained_names

__all__ = ["HybridTokenizer", "TokenizerError", "pretrained_names"]

_MODULES = {
    "HybridTokenizer": "tokenizer.hybrid",
    "TokenizerError": "tokenizer.errors",
    "pretrained_names": "tokenizer.vocabularies",
}


def __getattr__(name: str) -> "Any":
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return list(__all__)
