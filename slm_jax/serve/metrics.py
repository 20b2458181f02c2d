"""Server statistics in the Prometheus text format (version 0.0.4)."""

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds


@dataclass
class Histogram:
    """Histogram of durations; observed from one thread."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """Add one duration."""
        self.counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield the samples of the histogram: cumulative buckets, sum and count."""
        running = 0
        for bound, count in zip((*map(repr, _BOUNDS), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {running}'
        yield f"{name}_sum{{{labels}}} {self.total:.6f}"
        yield f"{name}_count{{{labels}}} {running}"


@dataclass
class Counters:
    """Statistics of an engine since its start; written by its thread only.

    Attributes:
        prompt_tokens: Number of prompt tokens processed.
        reused_tokens: Number of these that were not computed again, as an earlier conversation begins with them.
        generated_tokens: Number of tokens generated.
        finished: Number of finished requests by finish reason.
        first_token: Time from submission to the first token.
        request_time: Time from submission to the end.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    first_token: Histogram = field(default_factory=Histogram)
    request_time: Histogram = field(default_factory=Histogram)


def metric(name: str, kind: str, description: str, samples: Iterable[str]) -> Iterator[str]:
    """Yield the lines of one metric.

    Args:
        name: Name of the metric.
        kind: counter, gauge or histogram.
        description: Help text.
        samples: Lines `name{labels} value`.
    """
    yield f"# HELP {name} {description}"
    yield f"# TYPE {name} {kind}"
    yield from samples


def escape_label(value: str) -> str:
    """Escape the value of a label."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
