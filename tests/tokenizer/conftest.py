"""Small texts and tokenizers that the tokenizer tests share."""

import pytest
from tests.tokenizer.samples import CORPUS

from tokenizer import HybridTokenizer
