"""The one exception that a user of the tokenizer can meet."""

from __future__ import annotations


class TokenizerError(ValueError):
    """A mistake in the use of the tokenizer, or a damaged file: one clear line that says what to do."""
