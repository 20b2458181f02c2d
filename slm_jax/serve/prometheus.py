"""GET /metrics: statistics of a server for Prometheus."""

from collections.abc import Callable, Iterator, Mapping

from slm_jax.serve.engine import Engine
from slm_jax.serve.metrics import escape_label, metric


def server_metrics(engines: Mapping[str, Engine], statuses: Mapping[int, int]) -> Iterator[str]:
    """Yield the lines of GET /metrics.

    Args:
        engines: The engine of each model.
        statuses: Number of HTTP responses by status.
    """
    labeled = {f'model="{escape_label(name)}"': engine for name, engine in engines.items()}

    def samples(name: str, value: Callable[[Engine], float]) -> Iterator[str]:
        return (f"{name}{{{labels}}} {value(engine)}" for labels, engine in labeled.items())

    responses = (f'slm_http_responses_total{{status="{status}"}} {count}' for status, count in sorted(statuses.items()))
    yield from metric("slm_http_responses_total", "counter", "HTTP responses by status.", responses)
    counters = (
        ("slm_prompt_tokens_total", "Prompt tokens processed.", lambda e: e.counters.prompt_tokens),
        ("slm_prefix_reused_tokens_total", "Prompt tokens not computed again.", lambda e: e.counters.reused_tokens),
        ("slm_prefix_evicted_total", "Conversations dropped from the cache.", lambda e: e.prefixes.evicted),
        ("slm_drawn_tokens_total", "Tokens generated.", lambda e: e.counters.generated_tokens),
    )
    for name, description, value in counters:
        yield from metric(name, "counter", description, samples(name, value))
    finished = [
        f'slm_texts_total{{{labels},end="{reason}"}} {count}'
        for labels, engine in labeled.items()
        for reason, count in sorted(engine.counters.finished.items())
    ]
    yield from metric("slm_texts_total", "counter", "Finished texts by finish reason.", finished)
    gauges = (
        ("slm_texts_writing", "Texts being generated.", lambda e: e.occupancy().running),
        ("slm_texts_waiting", "Texts waiting for a slot.", lambda e: e.occupancy().waiting),
        ("slm_prefix_conversations", "Conversations in the prefix cache.", lambda e: len(e.prefixes)),
        ("slm_prefix_bytes", "Size of the prefix cache.", lambda e: e.prefixes.bytes),
        ("slm_slots", "Maximum number of texts generated at the same time.", lambda e: e.slots),
    )
    for name, description, value in gauges:
        yield from metric(name, "gauge", description, samples(name, value))
    histograms = (
        ("slm_first_token_seconds", "Time from request to first token.", lambda e: e.counters.first_token),
        ("slm_text_seconds", "Time from request to end of text.", lambda e: e.counters.request_time),
    )
    for name, description, histogram in histograms:
        lines = (line for labels, engine in labeled.items() for line in histogram(engine).lines(name, labels))
        yield from metric(name, "histogram", description, lines)
