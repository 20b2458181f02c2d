"""Results of checks, and their output as a table or as JSON."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from slm_jax.utils.formatting import text_table

OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"
DOCUMENTS = 2000  # documents of a hub source that are read if no run has them


class Finding(NamedTuple):
    """Result of one check.

    Attributes:
        name: Name of the check.
        verdict: OK, FAIL or SKIPPED.
        found: What was found, in a few words or numbers; of a skipped check the reason.
        expected: What passes.
        details: Lines below it, such as parameters or texts.
    """

    name: str
    verdict: str
    found: str
    expected: str = ""
    details: tuple[str, ...] = ()


def finding(name: str, ok: bool, found: str, expected: str, details: Sequence[str] = ()) -> Finding:
    """Return a Finding that is OK if a condition holds, else FAIL."""
    return Finding(name, OK if ok else FAIL, found, expected, tuple(details))


def skipped(name: str, reason: str) -> Finding:
    """Return the Finding of a check that does not apply."""
    return Finding(name, SKIPPED, reason)


def shortened(lines: Sequence[str], max_lines: int = 8) -> tuple[str, ...]:
    """Return the first lines, and the number of those left out."""
    more = len(lines) - max_lines
    return (*lines[:max_lines], f"and {more} more") if more > 0 else tuple(lines)


def count(findings: Sequence[Finding], verdict: str) -> int:
    """Return the number of findings with a verdict."""
    return sum(each.verdict == verdict for each in findings)


def summary(findings: Sequence[Finding]) -> str:
    """Return the verdict of all findings in one line."""
    failed = count(findings, FAIL)
    left_out = count(findings, SKIPPED)
    if failed:
        text = f"{failed} of {len(findings)} checks failed"
    elif left_out:
        text = f"{len(findings) - left_out} checks ok"
    else:
        text = f"all {len(findings)} checks ok"
    return f"{text}, {left_out} skipped" if left_out else text


def as_table(findings: Sequence[Finding]) -> str:
    """Return aligned columns (name, verdict, found, expected) with details indented below, and the summary."""
    rows = [("check", "verdict", "found", "expected")]
    rows += [(each.name, each.verdict, each.found, each.expected) for each in findings]
    head, *lines = text_table(rows).split("\n")
    result = [head]
    for line, each in zip(lines, findings, strict=True):
        result += [line, *(f"    {detail}" for detail in each.details)]
    return "\n".join([*result, "", summary(findings)])


def as_json(subject: dict[str, Any], findings: Sequence[Finding]) -> str:
    """Return one JSON object: what was checked, `ok`, and each finding."""
    checks = [each._asdict() | {"details": list(each.details)} for each in findings]
    return json.dumps({**subject, "ok": not count(findings, FAIL), "checks": checks}, indent=1)
