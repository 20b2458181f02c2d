"""Recognition of files that are not UTF-8 text by their first bytes."""

import codecs

HEAD_SIZE = 1 << 16  # bytes that are examined

_UTF16_REMEDY = "convert it, as in: iconv -f UTF-16{} -t UTF-8 OLD > NEW"
_UNPACK = "unpack it and name the files in it"
_LEAVE_OUT = "extract its text, or leave it out"
# Offset, bytes there, format, remedy. UTF-32 precedes UTF-16, whose byte order mark is a prefix of its own.
_SIGNATURES = (
    (0, codecs.BOM_UTF32_LE, "UTF-32", "convert it, as in: iconv -f UTF-32 -t UTF-8 OLD > NEW"),
    (0, codecs.BOM_UTF32_BE, "UTF-32", "convert it, as in: iconv -f UTF-32 -t UTF-8 OLD > NEW"),
    (0, codecs.BOM_UTF16_LE, "UTF-16", _UTF16_REMEDY.format("")),
    (0, codecs.BOM_UTF16_BE, "UTF-16", _UTF16_REMEDY.format("")),
    (0, b"\x1f\x8b\x08", "a gzip file", "give it the suffix .gz after that of its content, as in a.txt.gz"),
    (0, b"\xfd7zXZ\x00", "an xz file", "give it the suffix .xz after that of its content, as in a.txt.xz"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "give it the suffix .zst after that of its content, as in a.txt.zst"),
    (4, b"1AY&SY", "a bzip2 file", "unpack it with bunzip2"),
    (0, b"PK\x03\x04", "a zip archive (or a document stored as one: .docx, .epub, …)", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"PAR1\x15", "a Parquet file", "give it the suffix .parquet"),
    (0, b"ARROW1\x00\x00", "an Arrow file", "convert it to Parquet"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "convert it to Parquet"),
    (0, b"%PDF-", "a PDF file", _LEAVE_OUT),
    (0, b"SQLite format 3\x00", "an SQLite database", _LEAVE_OUT),
)


def describe_binary(head: bytes) -> tuple[str, str] | None:
    """Return what the beginning of a file shows it to be, with a remedy; None for what may be UTF-8 text.

    Text has no NUL bytes. UTF-16 without a byte order mark is recognized by its NUL bytes, which are all at even or all
    at odd offsets (the upper bytes of spaces, line ends and ASCII letters).

    Args:
        head: The first `HEAD_SIZE` bytes, decompressed.

    Returns:
        The format and the remedy, as parts of a message.
    """
    for offset, signature, name, remedy in _SIGNATURES:
        if head.startswith(signature, offset):
            return name, remedy
    if b"\0" not in head:
        return None
    even_nuls = head[::2].count(0)
    odd_nuls = head[1::2].count(0)
    for order, nuls, others in (("LE", odd_nuls, even_nuls), ("BE", even_nuls, odd_nuls)):
        if nuls and not others and _is_utf16(head, order):
            return "UTF-16 without a byte order mark", _UTF16_REMEDY.format(order)
    return f"binary data (a NUL byte at offset {head.index(0):,})", _LEAVE_OUT


def _is_utf16(head: bytes, order: str) -> bool:
    """Return whether the bytes decode as UTF-16 of a byte order (LE or BE), except for an incomplete end."""
    try:
        codecs.getincrementaldecoder(f"utf-16-{order.lower()}")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
