"""HybridTokenizer: a lossless, inspectable subword tokenizer in pure Python and NumPy.

How text is represented, and why:

- A space belongs to the word after it (" the"), as in most tokenizers that language models are trained with: a separate
  space token would double the length of the text. Newlines and indentation likewise go before what follows them,
  where that is common enough. ``<SP>`` and ``<NL>`` are what is left: a space or newline by itself.
- Case is a mark on the next token: ``<UP>`` + " the" is " The", ``<CAPS>`` + " the" is " THE". Common capitalised
  words are entries of their own, made of the mark and the word. ``lowercase=False`` keeps case in the entries instead.
- What is in no entry is written in bytes, so that every str can be encoded; entries are always whole characters.
- A key (white space and the word after it) is encoded with as few tokens as possible, whatever surrounds it. Hence
  ``encode(a) + encode(b)`` is ``encode(a + b)`` wherever b begins with white space and a ends without.
- Letters, digits and punctuation are kept apart while merges are learned, which costs 3 to 5 % more tokens and makes
  better models: 1.40 bits per byte against 1.43 (2.2 M parameters, 2,048 entries, the same 400 steps on Python's
  documentation). ``boundaries="spaces"`` lets "him," be one token. A newline does not join the word after it either:
  that saves 2 % of the tokens, but models ended worse on plays, prose and code (by 0.2 to 1.7 %, six of six runs of 1 M
  parameters with 1,024 and 2,048 entries) and better on Python's documentation alone (by 1.0 %).
- With phrases, ids of neighbouring words are joined after that. Fewer tokens stand for the same text, each predicting
  more at once; whether a model gains by it is for its bits per byte to decide.
"""

from tokenizer.errors import TokenizerError
from tokenizer.hybrid import HybridTokenizer
from tokenizer.vocabularies import pretrained_names

__all__ = ["HybridTokenizer", "TokenizerError", "pretrained_names"]
