"""Escaping of text and data for HTML, and the style sheet that all pages of the project share.

The style sheet is part of the tokenizer package, whose page also works without slm_jax.
"""

import html
import json
from pathlib import Path
from typing import Any

from tokenizer.inspect.playground import WEB_FOLDER

STYLE = WEB_FOLDER / "style.css"


class SafeHtml(str):
    """HTML whose text is already escaped."""

    __slots__ = ()


def escape_text(value: object) -> SafeHtml:
    """Escape a value for HTML text or an attribute; control characters become visible symbols."""
    if isinstance(value, SafeHtml):
        return value
    return SafeHtml(html.escape(str(value).translate(_SYMBOLS), quote=True))


def script_json(value: Any) -> SafeHtml:
    """Return JSON for a `<script type="application/json">`; no text in it can end the element or start a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return SafeHtml(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def read_asset(path: Path) -> SafeHtml:
    """Return the text of a style sheet or script of this project."""
    return SafeHtml(path.read_text(encoding="utf-8"))


# Control characters other than tab and newline are invalid in HTML (parsers drop or replace them, each differently),
# and a lone surrogate has no UTF-8 encoding.
_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_SYMBOLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SYMBOLS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
