"""The playground API: tokenize text, explain a token and describe a vocabulary, as JSON-ready values.

The functions take and return plain values, so any HTTP server can expose them: `tokenizer.inspect.server` (standard
library only) and `slm_jax.serve` both do. The static files of the page are in `tokenizer/web`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizer.encoding.unicode import bytes_to_text, text_to_bytes
from tokenizer.errors import TokenizerError
from tokenizer.hybrid import HybridTokenizer
from tokenizer.inspect.results import Explanation

WEB_FOLDER = Path(__file__).parents[1] / "web"
MAX_TEXT_CHARACTERS = 20_000
"""Characters accepted in one tokenization request."""
MAX_TEXT_TOKENS = 20_000
"""Tokens in the answer to one tokenization request, which has about 100 bytes for each."""
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_MAX_TREE_DEPTH = 64


def token_kind(tokenizer: HybridTokenizer, id_: int) -> str:
    """Return the kind of an id; see `tokenizer.inspect.results.Segment`."""
    return tokenizer._vocabulary.kind(id_)


def tokenize(tokenizer: HybridTokenizer, text: str) -> dict[str, Any]:
    """Tokenize a text for display.

    Args:
        tokenizer: A frozen tokenizer.
        text: At most `MAX_TEXT_CHARACTERS` characters and `MAX_TEXT_TOKENS` tokens.

    Returns:
        ``{"tokens": [[text, kind, id, name], …], "bytes": UTF-8 bytes of the text, "characters": its length}``.

    Raises:
        TokenizerError: The text is too long.
    """
    if len(text) > MAX_TEXT_CHARACTERS:
        raise TokenizerError(f"the text has {len(text):,} characters: the maximum is {MAX_TEXT_CHARACTERS:,}")
    if (count := tokenizer.count(text)) > MAX_TEXT_TOKENS:
        raise TokenizerError(f"the text has {count:,} tokens: the maximum is {MAX_TEXT_TOKENS:,}")
    tokens = [[*segment, tokenizer.id2token[segment.id]] for segment in tokenizer.segment(text)]
    return {"tokens": tokens, "bytes": len(text_to_bytes(text)), "characters": len(text)}


def explain(tokenizer: HybridTokenizer, id_: int) -> dict[str, Any]:
    """Return the decomposition of a token, down to its bytes, as nested dictionaries.

    Raises:
        TokenizerError: The id is outside the vocabulary.
    """
    return _explanation_tree(tokenizer.explain_token(id_), 0)


def _explanation_tree(explanation: Explanation, depth: int) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    if depth < _MAX_TREE_DEPTH:
        parts = [_explanation_tree(part, depth + 1) for part in explanation.parts]
    return {
        "id": explanation.id,
        "name": explanation.name,
        "kind": explanation.kind,
        "text": bytes_to_text(explanation.data),
        "bytes": explanation.data.hex(" "),
        "parts": parts,
    }


def describe(tokenizer: HybridTokenizer) -> dict[str, Any]:
    """Return the size of a vocabulary and its number of entries of each kind."""
    return {"size": tokenizer.vocab_size, "kinds": tokenizer.db_status(0).kinds}


@lru_cache(maxsize=64)
def read_asset(path: Path) -> tuple[bytes, str]:
    """Return the content and the media type of a static file of the page."""
    return path.read_bytes(), f"{MEDIA_TYPES[path.suffix]}; charset=utf-8"


class PlaygroundApi:
    """The JSON endpoints below ``/api/``, for a fixed set of vocabularies that are loaded on first use.

    Args:
        names: Names of the vocabularies, in display order.
        load: Loads the tokenizer of a name.
    """

    def __init__(self, names: list[str], load: Callable[[str], HybridTokenizer]) -> None:
        self.names = names
        self._load = lru_cache(maxsize=len(names))(load)

    def tokenizer(self, name: object) -> HybridTokenizer:
        """Return the tokenizer of a name.

        Raises:
            TokenizerError: The name is not one of `names`, or the tokenizer cannot be loaded.
        """
        if name not in self.names:
            raise TokenizerError(f"unknown vocabulary {name!r}: choose one of {', '.join(self.names)}")
        return self._load(str(name))

    def __call__(self, path: str, query: Mapping[str, str], body: Mapping[str, Any]) -> Any:
        """Answer a request.

        Args:
            path: The path below ``/api/``.
            query: Parameters of the query string.
            body: The JSON body; empty for GET.

        Returns:
            A JSON-ready value, or None if the path does not exist.

        Raises:
            TokenizerError: A parameter is invalid.
        """
        if path == "vocabularies":
            return self.names
        if path == "describe":
            return describe(self.tokenizer(query.get("vocabulary")))
        if path == "cut":
            if not isinstance(body.get("text"), str):
                raise TokenizerError("text must be a string")
            return tokenize(self.tokenizer(body.get("vocabulary")), body["text"])
        if path == "explain":
            digits = query.get("id", "")
            if not digits.isdecimal() or len(digits) > 9:  # int() refuses strings of thousands of digits
                raise TokenizerError("id must be an integer of at most 9 digits")
            return explain(self.tokenizer(query.get("vocabulary")), int(digits))
        return None
