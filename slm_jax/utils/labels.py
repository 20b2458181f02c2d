"""Short labels of sources of text, for metrics, tables and names of runs."""

import re
from collections.abc import Sequence

_MORE = re.compile(r" and \d+ more$")


def source_labels(names: Sequence[str]) -> list[str]:
    """Return a short label of each source, no two of them the same.

    That of a path is the name of the file or folder, that of a pattern the name of the folder in which it begins:
    `plays.txt` for `../texts/plays.txt`, `my` for `../my/**/*.txt`. Parent folders are added where two labels would be
    the same. Other names, such as `python-docs` and `hf:OWNER/NAME`, are their own labels.

    Args:
        names: Names of sources: a name of `data.source`, a hub id, or a path, folder or pattern.
    """
    labels = [_label(name, 1) for name in names]
    for depth in range(2, 1 + max((name.count("/") for name in names), default=0) + 1):
        labels = [
            _label(name, depth) if labels.count(label) > 1 else label for name, label in zip(names, labels, strict=True)
        ]
    seen: dict[str, int] = {}
    result = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        result.append(f"{label} ({seen[label]})" if seen[label] > 1 else label)
    return result


def _label(name: str, depth: int) -> str:
    """Return the last `depth` fixed components of a path; any other name as it is."""
    if name.startswith("hf:"):
        return name
    more = _MORE.search(name)
    path = name[: more.start()] if more else name
    parts = [part for part in path.split("/") if part not in ("", ".", "..", "~") and not set(part) & set("*?[")]
    if not parts:
        return name
    return "/".join(parts[-depth:]) + (more.group() if more else "")


def file_name_part(text: str, length: int = 20) -> str:
    """Return a text in the form that names of folders use: lower-case letters, digits and dashes.

    Args:
        text: Any text.
        length: Most characters of the result.
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:length].strip("-") or "text"
