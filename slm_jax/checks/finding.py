"""What a check found, and how several are shown."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"


class Finding(NamedTuple):
    """The outcome of one check."""

    name: str
    verdict: str  # OK, FAIL or SKIPPED
    found: str  # a few words or numbers; of a skipped check the reason
    expected: str = ""
    details: tuple[str, ...] = ()  # lines under it: which parameters, which texts


def finding(name: str, ok: bool, found: str, expected: str, details: Sequence[str] = ()) -> Finding:
    """A Finding by a condition."""
    return Finding(name, OK if ok else FAIL, found, expected, tuple(details))


def skipped(name: str, why: str) -> Finding:
    """A check that does not apply."""
    return Finding(name, SKIPPED, why)


def some(names: Sequence[str], most: int = 8) -> tuple[str, ...]:
    """The first few of many, and how many more there are."""
    more = len(names) - most
    return (*names[:most], f"and {more} more") if more > 0 else tuple(names)


def count(findings: Sequence[Finding], verdict: str) -> int:
    """How many have a verdict."""
    return sum(each.verdict == verdict for each in findings)


def summary(findings: Sequence[Finding]) -> str:
    """One line: the verdict of all."""
    failed = count(findings, FAIL)
    parts = [f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks ok"]
    if left_out := count(findings, SKIPPED):
        parts[0] = parts[0] if failed else f"{len(findings) - left_out} checks ok"
        parts.append(f"{left_out} skipped")
    return ", ".join(parts)


def as_table(findings: Sequence[Finding]) -> str:
    """Aligned columns: name, verdict, what was found, what was expected; details indented beneath."""
    head = ("check", "verdict", "found", "expected")
    rows = [(each.name, each.verdict, each.found, each.expected) for each in findings]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(3)]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip()

    lines = [line(head)]
    for row, each in zip(rows, findings, strict=True):
        lines += [line(row), *(f"    {detail}" for detail in each.details)]
    return "\n".join([*lines, "", summary(findings)])


def as_json(subject: dict[str, Any], findings: Sequence[Finding]) -> str:
    """One JSON object: what was checked, whether all is well, and each finding."""
    checks = [each._asdict() | {"details": list(each.details)} for each in findings]
    return json.dumps({**subject, "ok": not count(findings, FAIL), "checks": checks}, indent=1)
