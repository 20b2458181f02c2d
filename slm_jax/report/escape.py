"""What the project's pages share: one style sheet (which lies with the tokenizer, whose page stands alone), and text
made safe for HTML. Nothing of it needs a network."""

import html
import json
from pathlib import Path
from typing import Any

from tokenizer.inspect.playground import WEB_FOLDER

STYLE = WEB_FOLDER / "style.css"


class Safe(str):
    """HTML that is already escaped."""

    __slots__ = ()


def text(value: object) -> Safe:
    """A value as HTML text or attribute: every character shown as it is, control characters as pictures of them."""
    if isinstance(value, Safe):
        return value
    return Safe(html.escape(str(value).translate(_PICTURES), quote=True))


def data(value: Any) -> Safe:
    """JSON for a `<script type="application/json">`: no text in it can end the element or begin a comment."""
    dumped = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Safe(dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def read(path: Path) -> Safe:
    """The text of a style sheet or script of this package."""
    return Safe(path.read_text(encoding="utf-8"))


# Control characters but tab and line end are no HTML (a parser drops or replaces them, each in its way); a lone
# surrogate cannot be written as UTF-8.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
