"""The exception that the tokenizer raises for mistakes of its user."""

from __future__ import annotations


class TokenizerError(ValueError):
    """Invalid use of the tokenizer, or an invalid file. The message is one line that says what to do."""
