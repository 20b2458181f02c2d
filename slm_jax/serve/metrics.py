"""What has been done, counted, in the text form that Prometheus reads (version 0.0.4)."""

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass
class Histogram:
    """How long something took; observed on one thread."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_SECONDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Its samples."""
        running = 0
        for bound, count in zip((*map(repr, _SECONDS), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {running}'
        yield f"{name}_sum{{{labels}}} {self.total:.6f}"
        yield f"{name}_count{{{labels}}} {running}"


@dataclass
class Counters:
    """What an engine has done since its start; written by its thread alone."""

    prompt_tokens: int = 0
    drawn_tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=Histogram)
    whole_text: Histogram = field(default_factory=Histogram)


def metric(name: str, kind: str, about: str, samples: Iterable[str]) -> Iterator[str]:
    """One metric with its head."""
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    yield from samples


def label(value: str) -> str:
    """A label's value, escaped."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
