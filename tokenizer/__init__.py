"""HybridTokenizer: a lossless, inspectable subword tokenizer in pure Python and NumPy."""

from tokenizer.errors import TokenizerError
from tokenizer.hybrid import HybridTokenizer
from tokenizer.vocabularies import pretrained_names

__all__ = ["HybridTokenizer", "TokenizerError", "pretrained_names"]
