"""Pieces of a page. Whatever is not `Safe` is escaped here."""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from slm_jax.report import escape
from slm_jax.report.escape import Safe

_HERE = Path(__file__).parent


class Section(NamedTuple):
    """A part of the page with its heading, reached from the list at the top."""

    title: str
    body: Safe

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def page(title: str, head: Safe, sections: Iterable[Section], tracks: Safe) -> str:
    """The whole document: styles, scripts and data in it, nothing outside of it."""
    kept = [section for section in sections if section.body]
    links = "".join(f'<a href="#{s.anchor}">{escape.text(s.title)}</a>' for s in kept)
    parts = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">'
        f'<h2 id="{s.anchor}-title">{escape.text(s.title)}</h2>{s.body}</section>'
        for s in kept
    )
    style = escape.read(escape.STYLE) + escape.read(_HERE / "report.css")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing may be fetched: texts of a run are shown here, and this holds even if one were to slip through.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape.text(title)}</title><style>{style}</style></head>"
        f'<body><header class="wide">{head}</header><nav class="top" aria-label="Sections"><div class="wide">{links}'
        f"</div></nav><main>{parts}</main>{tracks}<script>{escape.read(_HERE / 'report.js')}</script></body></html>\n"
    )


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    numbers: Iterable[int] = (),
    label: str = "",
    row_heads: bool = True,
) -> Safe:
    """A table that scrolls within itself; columns in `numbers` stand right; the first cell of a row is its head."""
    right = set(numbers)
    rows = list(rows)

    long = {i for row in rows for i, value in enumerate(row) if not isinstance(value, Safe) and len(str(value)) > 40}

    def cell(tag: str, index: int, value: object, more: str = "") -> str:
        kind = ' class="number"' if index in right else ' class="long"' if index in long else ""
        return f"<{tag}{kind}{more}>{escape.text(value)}</{tag}>"

    top = "".join(cell("th", i, value, ' scope="col"') for i, value in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            cell("th", i, value, ' scope="row"') if i == 0 and row_heads else cell("td", i, value)
            for i, value in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    name = f' role="region" aria-label="{escape.text(label)}"' if label else ""
    return Safe(
        f'<div class="scroll" tabindex="0"{name}><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def facts_list(pairs: Iterable[tuple[str, object]]) -> Safe:
    """Names and values, one a line."""
    items = "".join(
        f"<div><dt>{escape.text(k)}</dt><dd>{escape.text(v)}</dd></div>" for k, v in pairs if v not in ("", None)
    )
    return Safe(f'<dl class="facts">{items}</dl>')


def tiles(figures: Iterable[tuple[str, str, str]]) -> Safe:
    """The figures that matter most: (name, value, a word on it)."""
    items = "".join(
        f'<div class="tile"><dt>{escape.text(name)}</dt><dd>{escape.text(value)}'
        f"{f'<small>{escape.text(word)}</small>' if word else ''}</dd></div>"
        for name, value, word in figures
    )
    return Safe(f'<dl class="tiles">{items}</dl>')


def card(body: Safe, title: str = "") -> Safe:
    """A box."""
    head = f"<h3>{escape.text(title)}</h3>" if title else ""
    return Safe(f'<div class="card">{head}{body}</div>')


def folded(title: str, body: Safe, is_open: bool = False) -> Safe:
    """What is seen when asked for."""
    return Safe(f"<details{' open' * is_open}><summary>{escape.text(title)}</summary>{body}</details>")


def paragraph(value: object, kind: str = "") -> Safe:
    """A paragraph of text."""
    return Safe(f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape.text(value)}</p>")


def joined(parts: Iterable[str]) -> Safe:
    """Pieces of HTML, one behind another."""
    parts = list(parts)
    assert all(isinstance(part, Safe) for part in parts)
    return Safe("".join(parts))


def utc(seconds: float) -> str:
    """A time since 1970 as 2026-01-31 14:05 UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return str(seconds)
