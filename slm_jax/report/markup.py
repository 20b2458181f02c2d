"""HTML building blocks of a page. Everything that is not `SafeHtml` is escaped here."""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from slm_jax.report.escaping import STYLE, SafeHtml, escape_text, read_asset

_HERE = Path(__file__).parent
_LONG_CELL = 40  # characters, from which on a column gets a minimum width


class Section(NamedTuple):
    """A section of the page with a heading, linked from the navigation at the top."""

    title: str
    body: SafeHtml

    @property
    def anchor(self) -> str:
        """The id of the element."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def page(title: str, head: SafeHtml, sections: Iterable[Section], shared_data: SafeHtml) -> str:
    """Return a complete HTML document, which contains its styles, script and data and loads nothing.

    Args:
        title: Title of the document.
        head: Content above the navigation.
        sections: The sections; empty ones are omitted.
        shared_data: Data for the script, `SharedX.html`.
    """
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.anchor}">{escape_text(section.title)}</a>' for section in shown)
    parts = "".join(
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">'
        f'<h2 id="{section.anchor}-title">{escape_text(section.title)}</h2>{section.body}</section>'
        for section in shown
    )
    style = read_asset(STYLE) + read_asset(_HERE / "report.css")
    script = read_asset(_HERE / "report.js")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Forbid all requests: the page shows texts of a run, and this protects even if one were not escaped.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape_text(title)}</title><style>{style}</style></head>"
        f'<body><header class="wide">{head}</header><nav class="top" aria-label="Sections"><div class="wide">{links}'
        f"</div></nav><main>{parts}</main>{shared_data}<script>{script}</script></body></html>\n"
    )


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    numbers: Iterable[int] = (),
    label: str = "",
    row_headers: bool = True,
) -> SafeHtml:
    """Return a table that scrolls horizontally if it is too wide for the page.

    Args:
        header: Cells of the header row.
        rows: Cells of each row.
        numbers: Indices of columns of numbers, which are aligned to the right.
        label: Name of the table for screen readers.
        row_headers: The first cell of each row is a header.
    """
    right = set(numbers)
    rows = list(rows)
    long = set()
    for row in rows:
        for i, value in enumerate(row):
            if not isinstance(value, SafeHtml) and len(str(value)) > _LONG_CELL:
                long.add(i)

    def cell(tag: str, index: int, value: object, scope: str = "") -> str:
        attributes = ""
        if index in right:
            attributes += ' class="number"'
        elif index in long:
            attributes += ' class="long"'
        if scope:
            attributes += f' scope="{scope}"'
        return f"<{tag}{attributes}>{escape_text(value)}</{tag}>"

    header_cells = "".join(cell("th", i, value, "col") for i, value in enumerate(header))
    body = []
    for row in rows:
        cells = []
        for i, value in enumerate(row):
            if i == 0 and row_headers:
                cells.append(cell("th", i, value, "row"))
            else:
                cells.append(cell("td", i, value))
        body.append(f"<tr>{''.join(cells)}</tr>")
    name = f' role="region" aria-label="{escape_text(label)}"' if label else ""
    return SafeHtml(
        f'<div class="scroll" tabindex="0"{name}><table><thead><tr>{header_cells}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def properties(pairs: Iterable[tuple[str, object]]) -> SafeHtml:
    """Return a list of names and values, one pair per line; pairs with an empty value are omitted."""
    items = "".join(
        f"<div><dt>{escape_text(name)}</dt><dd>{escape_text(value)}</dd></div>"
        for name, value in pairs
        if value not in ("", None)
    )
    return SafeHtml(f'<dl class="properties">{items}</dl>')


def tiles(values: Iterable[tuple[str, str, str]]) -> SafeHtml:
    """Return the most important values as tiles, given (name, value, remark)."""
    items = []
    for name, value, remark in values:
        small = f"<small>{escape_text(remark)}</small>" if remark else ""
        items.append(f'<div class="tile"><dt>{escape_text(name)}</dt><dd>{escape_text(value)}{small}</dd></div>')
    return SafeHtml(f'<dl class="tiles">{"".join(items)}</dl>')


def card(body: SafeHtml, title: str = "") -> SafeHtml:
    """Return a box with an optional title."""
    heading = f"<h3>{escape_text(title)}</h3>" if title else ""
    return SafeHtml(f'<div class="card">{heading}{body}</div>')


def collapsible(title: str, body: SafeHtml, is_open: bool = False, css_class: str = "") -> SafeHtml:
    """Return a part of the page that the reader can open and close."""
    attributes = f' class="{css_class}"' if css_class else ""
    if is_open:
        attributes += " open"
    return SafeHtml(f"<details{attributes}><summary>{escape_text(title)}</summary>{body}</details>")


def paragraph(value: object, css_class: str = "") -> SafeHtml:
    """Return a paragraph of text."""
    attributes = f' class="{css_class}"' if css_class else ""
    return SafeHtml(f"<p{attributes}>{escape_text(value)}</p>")


def note(texts: Sequence[str]) -> SafeHtml:
    """Return a highlighted box with a line per text; "" if there are none."""
    if not texts:
        return SafeHtml("")
    lines = "".join(f"<div>{escape_text(text)}</div>" for text in texts)
    return SafeHtml(f'<div class="note" role="note">{lines}</div>')


def concatenate(parts: Iterable[str]) -> SafeHtml:
    """Concatenate pieces of HTML."""
    parts = list(parts)
    assert all(isinstance(part, SafeHtml) for part in parts)
    return SafeHtml("".join(parts))


def format_utc(seconds: float) -> str:
    """Format a time in seconds since 1970 as 2026-01-31 14:05 UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return str(seconds)
