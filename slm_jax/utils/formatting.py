"""Numbers, sizes, durations and tables as text."""

from collections.abc import Collection, Sequence


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: `1 document`, `2,000 documents`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def text_size(count: int) -> str:
    """Return a number of bytes of text in bytes, kB or MB (10^3, 10^6): a small text does not read as 0.0 kB."""
    if count < 1000:
        return plural(count, "byte")
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.2f} MB"


def memory_size(count: int) -> str:
    """Return a number of bytes of memory in MB or GB (10^6, 10^9)."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Return a duration as 3:07, or 1:02:11 from an hour on."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return rows of cells as text with aligned columns, two spaces apart.

    Args:
        rows: The cells, the header row included; all rows have the same length.
        right: Indices of the columns that are aligned to the right; the others are to the left.

    Returns:
        One line per row without trailing spaces, joined by newlines.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
