"""The section about the tokenizer of a run: its entries, its compression of unseen text, and a tokenized sample."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from slm_jax.data.corpus.corpus import SPLITS
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.report import markup
from slm_jax.report.axes import format_percent
from slm_jax.report.escaping import SafeHtml, escape_text
from slm_jax.report.foreign_tokenizer_section import foreign_tokenizer_section
from slm_jax.report.run_data import RunData
from slm_jax.run.samples import Sample
from tokenizer import HybridTokenizer

if TYPE_CHECKING:  # needs the package tokenizers, an extra
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

_TABLE_ROWS = 24
_SAMPLE_CHARS = 1200  # of the tokenized sample
_MAX_COUNTED = 2_000_000  # tokens of a text whose frequencies are counted

CATEGORIES = {  # kinds of `tokenizer.inspect.results.Segment` by the category they are displayed as
    "base": "base",
    "merge": "merge",
    "phrase": "phrase",
    "char": "char",
    "byte": "byte",
    "case": "case",
    "sp": "space",
    "nl": "space",
    "run": "space",
    "special": "special",
}
DESCRIPTIONS = {
    "base": "a frequent short word or part of a word",
    "merge": "two tokens merged into one",
    "phrase": "tokens of adjacent words merged into one",
    "char": "one character outside ASCII",
    "byte": "a single byte, where no longer token matches",
    "case": "a mark: the next token is in upper case (↑), or starts with a capital (⇧)",
    "space": "spaces and line breaks",
    "special": "not text, for example the end of a document",
}
_CATEGORY_NAMES = list(dict.fromkeys(CATEGORIES.values()))


def tokenizer_section(run_data: RunData, samples: list[Sample]) -> SafeHtml:
    """Return properties, merges and a tokenized sample; "" before there is a tokenizer.

    Args:
        run_data: The run.
        samples: All samples, the oldest first.
    """
    tokenizer = run_data.tokenizer
    if tokenizer is None:
        return SafeHtml("")
    if not isinstance(tokenizer, HybridTokenizer):
        published = cast("ForeignTokenizer", tokenizer)
        return foreign_tokenizer_section(run_data, published, samples, list(_rates(run_data)))
    categories = token_categories(tokenizer)
    parts = [
        markup.card(markup.properties(_properties(run_data, tokenizer, categories))),
        _category_bar(run_data, categories),
        _tokenized_sample(tokenizer, samples),
    ]
    merges = _top_merges_table(tokenizer)
    if merges:
        tables = [
            markup.card(merges, "Most frequent merges"),
            markup.card(_longest_table(tokenizer, categories), "Longest entries"),
        ]
        parts.append(SafeHtml(f'<div class="pair">{markup.concatenate(tables)}</div>'))
    return SafeHtml(f'<div class="stack">{markup.concatenate(part for part in parts if part)}</div>')


def token_categories(tokenizer: HybridTokenizer) -> list[str]:
    """Return the category of each token id, [V]."""
    return [CATEGORIES[kind] for kind in tokenizer.kinds]


def _properties(run_data: RunData, tokenizer: HybridTokenizer, categories: list[str]) -> Iterator[tuple[str, object]]:
    counts = {category: categories.count(category) for category in _CATEGORY_NAMES}
    entries = ", ".join(f"{count:,} {category}" for category, count in counts.items() if count)
    yield "Vocabulary", f"{tokenizer.vocab_size:,} ({entries})"
    yield "Origin", run_data.config.tokenizer.path or "trained on the training text"
    yield from _rates(run_data)
    yield "Fingerprint", tokenizer.fingerprint[:16]


def _rates(run_data: RunData) -> Iterator[tuple[str, str]]:
    for split, name in zip(SPLITS, ("training", "held-out"), strict=True):
        rates = [_bytes_per_token(manifest, split) for manifest in run_data.manifests]
        known = [rate for rate in rates if rate]
        if known:
            yield f"Bytes per token, {name} text", "; ".join(known)


def _bytes_per_token(manifest: dict[str, Any], split: str) -> str:
    """Return the bytes per token of a split; "" if it has prompts, whose bytes are not in the manifest."""
    part = manifest[split]
    if not part["tokens"] or part["prompts"]:
        return ""
    # Without the <EOS> of each document, which stands for no text. A document that was cut has one in `train` only.
    ended = part["documents"] - (manifest["counts"].get("cut", 0) if split == "validation" else 0)
    num_tokens = part["tokens"] - ended
    return f"{part['bytes'] / max(num_tokens, 1):.3f}"


def _category_bar(run_data: RunData, categories: list[str]) -> SafeHtml:
    """Return a bar of the share of each category in the held-out text."""
    counts = token_counts(run_data.token_stream("validation"), len(categories))
    if counts is None or not counts.sum():
        return SafeHtml("")
    category_of_id = np.array([_CATEGORY_NAMES.index(category) for category in categories])
    totals = np.bincount(category_of_id, counts, len(_CATEGORY_NAMES)) / counts.sum()
    shares = {name: share for name, share in zip(_CATEGORY_NAMES, totals.tolist(), strict=True) if share > 0}
    bar = "".join(
        f'<span class="piece-{name}" style="flex:{share:.5f}" title="{name} {format_percent(share)}"></span>'
        for name, share in shares.items()
    )
    keys = "".join(_key(name, format_percent(share)) for name, share in shares.items())
    return markup.card(
        SafeHtml(f'<div class="bar" aria-hidden="true">{bar}</div><ul class="kinds">{keys}</ul>'),
        "Tokens of the held-out text by kind",
    )


def _key(category: str, text: str) -> str:
    return f'<li><span class="piece piece-{category}">&nbsp;{category}&nbsp;</span> {escape_text(text)}</li>'


def token_counts(stream: TokenStream | None, vocab_size: int) -> np.ndarray | None:
    """Count how often each id occurs at the beginning of a text.

    Args:
        stream: The text.
        vocab_size: Number V of ids.

    Returns:
        int64 [V]; None if the text is not available or has other ids.
    """
    if stream is None:
        return None
    counts = np.bincount(stream[:_MAX_COUNTED], minlength=vocab_size)
    return counts if len(counts) == vocab_size else None


def _tokenized_sample(tokenizer: HybridTokenizer, samples: list[Sample]) -> SafeHtml:
    """Return the first text of the newest sample that has one, with each token in the color of its category."""
    texts = ((sample.step, text[:_SAMPLE_CHARS]) for sample in reversed(samples) for text in sample.texts if text)
    step, text = next(texts, (0, ""))
    if not text:
        return SafeHtml("")
    pieces, present = tokens_html(tokenizer, text)
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    num_tokens = tokenizer.count(text)
    summary = f"{num_tokens:,} tokens, {num_bytes / max(num_tokens, 1):.2f} bytes per token."
    legend = "".join(_key(name, DESCRIPTIONS[name]) for name in _CATEGORY_NAMES if name in present)
    return markup.card(
        SafeHtml(
            f"{markup.paragraph(summary, 'small muted')}"
            f'<ul class="kinds">{legend}</ul><div class="pieces" tabindex="0" role="region" '
            f'aria-label="Tokenized sample">{pieces}</div>'
        ),
        f"Tokenized sample of step {step:,}",
    )


def tokens_html(tokenizer: HybridTokenizer, text: str) -> tuple[SafeHtml, set[str]]:
    """Return the tokens of a text as elements with kind and id in their title, and the categories that occur."""
    elements = []
    present = set()
    names = tokenizer.id2token
    for piece, kind, id_ in tokenizer.segment(text):
        category = CATEGORIES[kind]
        present.add(category)
        shown = piece
        if kind in ("case", "special"):
            shown = {"<UP>": "⇧", "<CAPS>": "↑"}.get(names[id_], names[id_])
        if category == "space":  # keep the line break or tab after its symbol
            shown = visible_white_space(shown).replace("⏎", "⏎\n").replace("→", "→\t")
        title = escape_text(f"{kind} {id_}: {names[id_]!r}")
        elements.append(f'<span class="piece piece-{category}" title="{title}">{escape_text(shown)}</span>')
    return SafeHtml("".join(elements)), present


def visible_white_space(text: str) -> str:
    """Replace spaces, line breaks and tabs by symbols."""
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "→")


def _entry(text: str) -> SafeHtml:
    """Return a vocabulary entry for a table cell."""
    return SafeHtml(f'<span class="tok">{escape_text(visible_white_space(text))}</span>')


def _top_merges_table(tokenizer: HybridTokenizer) -> SafeHtml:
    """Return the most frequent merges, without those of white space only, which dominate in indented text."""
    merges = [merge for merge in tokenizer.top_merges(tokenizer.vocab_size) if merge.text.strip()][:_TABLE_ROWS]
    if not merges:
        return SafeHtml("")
    rows = [(_entry(m.text), _merge_parts(m.left, m.right), f"{m.count:,}", m.id) for m in merges]
    return markup.table(["text", "merged from", "count in training", "id"], rows, {2, 3}, "Most frequent merges")


def _merge_parts(left: str, right: str) -> SafeHtml:
    return SafeHtml(f"{_entry(left)} + {_entry(right)}")


def _longest_table(tokenizer: HybridTokenizer, categories: list[str]) -> SafeHtml:
    """Return the entries with the most bytes, without white space."""
    names = tokenizer.id2token
    ids = [id_ for id_, category in enumerate(categories) if category in ("merge", "phrase", "base")]
    sizes = [(len(names[id_].encode("utf-8", "surrogatepass")), id_) for id_ in ids]
    longest = sorted(sizes, key=lambda pair: (-pair[0], pair[1]))[:_TABLE_ROWS]
    rows = [(_entry(names[id_]), categories[id_], size, id_) for size, id_ in longest]
    return markup.table(["text", "kind", "bytes", "id"], rows, {2, 3}, "Longest entries")
