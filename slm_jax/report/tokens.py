"""The tokenizer of a run: what it holds, how it does on text that it has not seen, and how it cuts the samples."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from slm_jax.data.corpus.corpus import SPLITS
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.report import escape, markup
from slm_jax.report.axes import percent
from slm_jax.report.escape import Safe
from slm_jax.report.run_data import Facts, Sample
from tokenizer import HybridTokenizer

SHOWN = 24  # rows of a table
TEXT = 1200  # characters of a sample that are shown piece by piece
COUNTED = 2_000_000  # tokens of a text that are counted

CLASSES = {  # kinds of `tokenizer.inspect.results.Segment` by how they look
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
MEANINGS = {
    "base": "a common short word or word part",
    "merge": "two pieces joined",
    "phrase": "pieces of neighbouring words joined",
    "char": "one character beyond ASCII",
    "byte": "one byte, where nothing larger fits",
    "case": "a mark: the next piece is in upper case (↑), or its first letter is (⇧)",
    "space": "spaces and line ends",
    "special": "no text: the end of a document and such",
}
_LOOKS = list(dict.fromkeys(CLASSES.values()))


def tokenizer_part(facts: Facts, samples: list[Sample]) -> Safe:
    """Figures, merges and the newest sample in pieces; "" before there is a tokenizer."""
    tokenizer = facts.tokenizer
    if tokenizer is None:
        return Safe("")
    kinds = looks_of(tokenizer)
    merges, longest = _top_merges(tokenizer), _longest(tokenizer, kinds)
    tables = [
        markup.card(table, title) for title, table in (("Most used merges", merges), ("Longest entries", longest))
    ]
    parts = [
        markup.card(markup.facts_list(_figures(facts, tokenizer, kinds))),
        _shares(facts, kinds),
        _pieces_of_samples(tokenizer, samples),
        Safe(f'<div class="pair">{markup.joined(tables)}</div>') if merges else Safe(""),
    ]
    return Safe(f'<div class="stack">{markup.joined(part for part in parts if part)}</div>')


def looks_of(tokenizer: HybridTokenizer) -> list[str]:
    """How each id is shown, [V]."""
    return [CLASSES[kind] for kind in tokenizer.kinds]


def _figures(facts: Facts, tokenizer: HybridTokenizer, kinds: list[str]) -> Iterator[tuple[str, object]]:
    counts = {look: kinds.count(look) for look in _LOOKS}
    entries = ", ".join(f"{count:,} {look}" for look, count in counts.items() if count)
    yield "Ids", f"{tokenizer.vocab_size:,} ({entries})"
    yield "Where from", facts.config.tokenizer.path or "learned from the training text"
    for side, name in zip(SPLITS, ("training", "held-out"), strict=True):
        if rates := [rate for m in facts.manifests if (rate := _rate(m, side))]:
            yield f"Bytes per token, {name} text", "; ".join(rates)
    yield "Fingerprint", tokenizer.fingerprint[:16]


def _rate(manifest: dict[str, Any], side: str) -> str:
    """Bytes per token of one side of a corpus; those of prompts are not counted in its bytes, so none is given then."""
    part = manifest[side]
    if not part["tokens"] or part["prompts"]:
        return ""
    # Each document ends with <EOS>, which stands for no text.
    return f"{part['bytes'] / max(part['tokens'] - part['documents'], 1):.3f}"


def _shares(facts: Facts, kinds: list[str]) -> Safe:
    """A bar: how often each kind occurs in the held-out text."""
    counts = counts_of(facts.split("validation"), len(kinds))
    if counts is None or not counts.sum():
        return Safe("")
    looks = np.array([_LOOKS.index(look) for look in kinds])
    totals = np.bincount(looks, counts, len(_LOOKS)) / counts.sum()
    found = [(look, share) for look, share in zip(_LOOKS, totals.tolist(), strict=True) if share > 0]
    bar = "".join(
        f'<span class="piece-{look}" style="flex:{share:.5f}" title="{look} {percent(share)}"></span>'
        for look, share in found
    )
    keys = "".join(_key(look, percent(share)) for look, share in found)
    return markup.card(
        Safe(f'<div class="bar" aria-hidden="true">{bar}</div><ul class="kinds">{keys}</ul>'),
        "Tokens of the held-out text by kind",
    )


def _key(look: str, meaning: str) -> str:
    return f'<li><span class="piece piece-{look}">&nbsp;{look}&nbsp;</span> {escape.text(meaning)}</li>'


def counts_of(split: TokenStream | None, vocab_size: int) -> np.ndarray | None:
    """int64 [V]: how often each id occurs in a text, the first so many tokens of it; None if it cannot be read."""
    if split is None:
        return None
    found = np.bincount(split[:COUNTED], minlength=vocab_size)
    return found if len(found) == vocab_size else None


def _pieces_of_samples(tokenizer: HybridTokenizer, samples: list[Sample]) -> Safe:
    """The first text of the newest sample that has any, each token in the colour of its kind."""
    found = ((sample.step, text[:TEXT]) for sample in reversed(samples) for text in sample.texts if text)
    step, text = next(found, (0, ""))
    if not text:
        return Safe("")
    pieces, seen = pieces_html(tokenizer, text)
    size, count = len(text.encode("utf-8", "surrogatepass")), tokenizer.count(text)
    legend = "".join(_key(look, MEANINGS[look]) for look in _LOOKS if look in seen)
    return markup.card(
        Safe(
            f"{markup.paragraph(f'{count:,} tokens, {size / max(count, 1):.2f} bytes per token.', 'small muted')}"
            f'<ul class="kinds">{legend}</ul><div class="pieces" tabindex="0" role="region" '
            f'aria-label="Sample text in pieces">{pieces}</div>'
        ),
        f"The sample of step {step:,} in pieces",
    )


def pieces_html(tokenizer: HybridTokenizer, text: str) -> tuple[Safe, set[str]]:
    """The tokens of a text as elements with their kind and id as a title, and the kinds that occur."""
    found, seen = [], set()
    names = tokenizer.id2token
    for piece, kind, id_ in tokenizer.segment(text):
        look = CLASSES[kind]
        seen.add(look)
        shown = {"<UP>": "⇧", "<CAPS>": "↑"}.get(names[id_], names[id_]) if kind in ("case", "special") else piece
        if look == "space":  # the line still ends where it ends
            shown = visible(shown).replace("⏎", "⏎\n").replace("→", "→\t")
        title = escape.text(f"{kind} {id_}: {names[id_]!r}")
        found.append(f'<span class="piece piece-{look}" title="{title}">{escape.text(shown)}</span>')
    return Safe("".join(found)), seen


def visible(text: str) -> str:
    """A text whose white space can be seen."""
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "→")


def _entry(text: str) -> Safe:
    """An entry of the vocabulary in a table."""
    return Safe(f'<span class="tok">{escape.text(visible(text))}</span>')


def _top_merges(tokenizer: HybridTokenizer) -> Safe:
    """Those that are no plain white space, which would be most of them in text that is indented."""
    words = [merge for merge in tokenizer.top_merges(tokenizer.vocab_size) if merge.text.strip()][:SHOWN]
    rows = [(_entry(m.text), joined_entries(m.left, m.right), f"{m.count:,}", m.id) for m in words]
    head = ["text", "made of", "uses in training", "id"]
    return markup.table(head, rows, {2, 3}, "Most used merges") if rows else Safe("")


def joined_entries(left: str, right: str) -> Safe:
    """The two parts of a merge."""
    return Safe(f"{_entry(left)} + {_entry(right)}")


def _longest(tokenizer: HybridTokenizer, looks: list[str]) -> Safe:
    """The entries of the most bytes, white space left out."""
    names = tokenizer.id2token
    ids = [id_ for id_, look in enumerate(looks) if look in ("merge", "phrase", "base")]
    sizes = [(len(names[id_].encode("utf-8", "surrogatepass")), id_) for id_ in ids]
    longest = sorted(sizes, key=lambda pair: (-pair[0], pair[1]))[:SHOWN]
    rows = [(_entry(names[id_]), looks[id_], size, id_) for size, id_ in longest]
    return markup.table(["text", "kind", "bytes", "id"], rows, {2, 3}, "Longest entries")
