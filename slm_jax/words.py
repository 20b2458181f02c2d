"""Numbers in words."""


def counted(count: int, what: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def text_size(count: int) -> str:
    """Bytes in kB or MB, so that a small text is not told as 0.00 MB."""
    return f"{count / 1e3:,.1f} kB" if count < 1e6 else f"{count / 1e6:,.2f} MB"
