"""The section about the tokenizer of a published model: its entries, its compression, and a tokenized sample."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slm_jax.report import markup
from slm_jax.report.escaping import SafeHtml, escape_text
from slm_jax.report.run_data import RunData
from slm_jax.run.samples import Sample

if TYPE_CHECKING:  # needs the package tokenizers, an extra
    from slm_jax.utils.foreign_tokenizer import ForeignTokenizer

_SAMPLE_CHARS = 1200  # of the tokenized sample
_SPECIAL_NAMES = 12  # that are listed


def foreign_tokenizer_section(
    run_data: RunData, tokenizer: "ForeignTokenizer", samples: list[Sample], rates: list[tuple[str, str]]
) -> SafeHtml:
    """Return properties and a tokenized sample.

    Args:
        run_data: The run.
        tokenizer: Its tokenizer.
        samples: All samples, the oldest first.
        rates: Names and values of the bytes per token.
    """
    parts = [
        markup.card(markup.properties(_properties(run_data, tokenizer, rates))),
        _tokenized_sample(tokenizer, samples),
    ]
    return SafeHtml(f'<div class="stack">{markup.concatenate(part for part in parts if part)}</div>')


def _properties(
    run_data: RunData, tokenizer: "ForeignTokenizer", rates: list[tuple[str, str]]
) -> Iterator[tuple[str, object]]:
    special = sorted(name for name, is_special in tokenizer.added_tokens.items() if is_special)
    listed = ", ".join(special[:_SPECIAL_NAMES]) + (", …" if len(special) > _SPECIAL_NAMES else "")
    yield "Vocabulary", f"{tokenizer.vocab_size:,} ({len(special):,} special)"
    yield "Origin", run_data.config.tokenizer.path or "the initial weights"
    if special:
        yield "Special tokens", listed
    yield "Ends a text", tokenizer.id2token.get(tokenizer.eos_id, tokenizer.eos_id)
    if tokenizer.start_id == tokenizer.eos_id:  # else the manifest counts an id before each text as well
        yield from rates
    yield "Fingerprint", tokenizer.fingerprint[:16]


def _tokenized_sample(tokenizer: "ForeignTokenizer", samples: list[Sample]) -> SafeHtml:
    """Return the first text of the newest sample that has one, cut into its tokens."""
    texts = ((sample.step, text[:_SAMPLE_CHARS]) for sample in reversed(samples) for text in sample.texts if text)
    step, text = next(texts, (0, ""))
    if not text:
        return SafeHtml("")
    pieces = [
        f'<span class="piece piece-{category}" title="{escape_text(title)}">{escape_text(shown)}</span>'
        for shown, category, title in token_pieces(tokenizer, text)
    ]
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    summary = f"{len(pieces):,} tokens, {num_bytes / max(len(pieces), 1):.2f} bytes per token."
    return markup.card(
        SafeHtml(
            f"{markup.paragraph(summary, 'small muted')}"
            '<div class="pieces" tabindex="0" role="region" aria-label="Tokenized sample">' + "".join(pieces) + "</div>"
        ),
        f"Tokenized sample of step {step:,}",
    )


def token_pieces(tokenizer: "ForeignTokenizer", text: str) -> Iterator[tuple[str, str, str]]:
    """Yield, for each token of a text, what is shown, its category, and its id with its name.

    Of the tokens that share a character, the first one shows it. Together, the pieces are the text, except for
    characters that the tokenizer drops.
    """
    ids, offsets = tokenizer.encode_with_offsets(text)
    shown_up_to = 0
    for id_, (start, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
        piece = text[max(start, shown_up_to) : end]
        shown_up_to = max(shown_up_to, end)
        name = tokenizer.id2token.get(id_, "")
        category = "special" if tokenizer.added_tokens.get(name) else "merge" if piece else "byte"
        if piece and not piece.strip():
            category = "space"
            piece = piece.replace(" ", "·").replace("\n", "⏎\n").replace("\t", "→\t")
        yield piece or "▯", category, f"{id_}: {name!r}"
