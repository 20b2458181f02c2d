"""Recognition of files that are not UTF-8 text by their first bytes."""

import codecs
import unicodedata

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


# Among other characters of text, NUL bytes separate or pad fields; ASCII text in UTF-16 has one for each character.
_MAX_NULS = 1 / 3
_OTHERS = ("Cc", "Cn", "Co")  # characters that text hardly has: controls, unassigned ones, those for private use
_MAX_OTHERS = 0.01  # of all characters
_WHITE_SPACE = "\t\n\v\f\r"


def describe_binary(head: bytes) -> tuple[str, str] | None:
    """Return what the beginning of a file shows it to be, with a remedy; None for what may be UTF-8 text.

    Only files with NUL bytes are in doubt. They are UTF-8 text if they decode as such to hardly any other control
    characters. UTF-16 text would decode to many: bytes of its characters, such as the upper byte 4 of Cyrillic letters.
    Latin-1 text would decode as UTF-16 to characters for private use: an é and a NUL byte are U+E900.

    Args:
        head: The first `HEAD_SIZE` bytes, decompressed.

    Returns:
        The format and the remedy, as parts of a message.
    """
    for offset, signature, name, remedy in _SIGNATURES:
        if head.startswith(signature, offset):
            return name, remedy
    nuls = head.count(0)
    if not nuls or (nuls <= _MAX_NULS * len(head) and _is_text(head, "utf-8", also="\0")):
        return None
    orders = ("LE", "BE") if head[1::2].count(0) > head[::2].count(0) else ("BE", "LE")
    for order in orders:
        if _is_text(head, f"utf-16-{order}"):
            return "UTF-16 without a byte order mark", _UTF16_REMEDY.format(order)
    return f"binary data (a NUL byte at offset {head.index(0):,})", _LEAVE_OUT


def _is_text(data: bytes, encoding: str, also: str = "") -> bool:
    """Return whether bytes decode, except for an incomplete end, to characters that text consists of.

    Args:
        data: The bytes.
        encoding: Their encoding.
        also: Control characters that are allowed besides white space.
    """
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return False
    allowed = _WHITE_SPACE + also
    others = sum(unicodedata.category(character) in _OTHERS and character not in allowed for character in text)
    return others <= _MAX_OTHERS * len(text)
