"""Held-out text: loss, perplexity per token and per word, bits per byte, accuracy of the next token.

Each document is scored by itself, from the <EOS> before it to the <EOS> that ends it, in overlapping windows: every
token once, with the most context that the stride leaves (training validates in windows side by side across documents,
so that its figures are a little worse). Of an instruction only the response counts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.data.corpus.corpus import TokenStream, byte_table, open_corpus
from slm_jax.data.sources.documents import InvalidRow, RowMapper
from slm_jax.data.sources.files import FileSource
from slm_jax.evaluation.encoding import begin, num_bytes
from slm_jax.evaluation.intervals import bootstrap
from slm_jax.evaluation.results import Figure, Measured
from slm_jax.evaluation.scoring import Item, TokenScores
from slm_jax.evaluation.tasks import Score
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural
from tokenizer import HybridTokenizer

_TOP = 5
_STRETCH = 4096  # tokens: parts of longer documents are resampled by themselves


class Documents(NamedTuple):
    """Documents to be scored; of each the bytes and words of what is scored, and its source."""

    items: list[Item]
    bytes_D: np.ndarray  # int64
    words_D: np.ndarray  # int64: stretches without white space
    source_D: np.ndarray  # int64, index into sources
    sources: list[str]


def documents_of_run(run: Run, tokenizer: HybridTokenizer, max_tokens: int = 0) -> Documents:
    """The run's own validation text, of each source at most max_tokens (0: all). Raises UserError if there is none."""
    if not run.corpus.is_dir():
        raise UserError(f"{run.path} has no corpus: its held-out text is not there. Name some with heldout=FILE")
    corpus = open_corpus(run.corpus, tokenizer)
    found: list[Documents] = []
    first = 0
    for manifest in corpus.manifests:
        count = len(manifest["validation"]["shards"])
        split = TokenStream(corpus.validation.shards[first : first + count]).head(max_tokens)
        first += count
        found.append(_of_split(split, tokenizer, manifest["name"]))
    return _joined(found)


def documents_of_files(pattern: str, tokenizer: HybridTokenizer, max_tokens: int = 0) -> Documents:
    """Of text, JSONL or Parquet files (column text): the first documents, about max_tokens of them (0: all)."""
    texts, size = [], 0
    for what in FileSource((pattern,), RowMapper()).read():
        if isinstance(what, InvalidRow):
            raise UserError(f"{what.where}: {what.reason}")
        if what.text.strip():
            texts.append(what.text)
            size += len(what.text)
        if max_tokens and size > 16 * max_tokens:  # there are hardly more characters in a token
            break
    if not texts:
        raise UserError(f"{pattern} holds no text")
    end = np.array([tokenizer.token2id["<EOS>"]], np.int32)
    arrays = tokenizer.encode_arrays(texts)
    if max_tokens:
        kept = max(1, int(np.searchsorted(np.cumsum([len(ids) + 1 for ids in arrays]), max_tokens, side="right")))
        arrays, texts = arrays[:kept], texts[:kept]
    items = [Item(begin(tokenizer, ids, end)) for ids in arrays]
    sizes = np.array([num_bytes(text) for text in texts])
    words = np.array([len(text.split()) for text in texts])
    return Documents(items, sizes, words, np.zeros(len(texts), np.int64), [pattern])


def _of_split(split: TokenStream, tokenizer: HybridTokenizer, name: str) -> Documents:
    ends = split.ends
    items, words = [], []
    for start, end, prompt in zip([0, *ends[:-1]], ends, split.documents["prompt"].astype(int), strict=True):
        ids = split[start:end].astype(np.int32)
        items.append(Item(begin(tokenizer, ids), 1 + int(prompt)))
        words.append(len(tokenizer.decode(ids[prompt:]).split()))
    sizes = split.documents["bytes"].astype(np.int64)
    return Documents(items, sizes, np.array(words), np.zeros(len(items), np.int64), [name])


def _joined(parts: Sequence[Documents]) -> Documents:
    return Documents(
        [item for part in parts for item in part.items],
        np.concatenate([part.bytes_D for part in parts]),
        np.concatenate([part.words_D for part in parts]),
        np.repeat(np.arange(len(parts)), [len(part.items) for part in parts]),
        [part.sources[0] for part in parts],
    )


def measure_heldout(
    documents: Documents, tokenizer: HybridTokenizer, score: Score, context: int, stride: int
) -> Measured:
    """All figures; of several sources also of each. Intervals by resampling documents, long ones in stretches."""
    table = byte_table(tokenizer)
    scores = score(documents.items)
    parts = [
        _stretches(item.ids[item.first :], each, int(size), int(words), table)
        for item, each, size, words in zip(documents.items, scores, documents.bytes_D, documents.words_D, strict=True)
    ]
    groups = {"all": np.ones(len(parts), bool)}
    if len(documents.sources) > 1:
        groups |= {name: documents.source_D == i for i, name in enumerate(documents.sources)}
    figures = []
    for name, of in groups.items():
        if of.any():
            figures += _figures(name, np.concatenate([parts[i] for i in np.flatnonzero(of)]), int(of.sum()))
    _, tokens, _, _, size, words = np.concatenate(parts).sum(0)
    note = (
        f"{plural(len(documents.items), 'document')}, {tokens:,.0f} tokens (the <EOS> that ends each included), "
        f"{words:,.0f} words, {size:,.0f} bytes; windows of {context} tokens, of which a further one scores {stride}; "
        f"intervals by resampling documents (of more than {_STRETCH:,} tokens: stretches of them)"
    )
    return Measured(figures, note)


def _stretches(ids: np.ndarray, scores: TokenScores, num_bytes: int, words: int, table: np.ndarray) -> np.ndarray:
    """Sums [S, 6] over each of the equal stretches of a document: nats, tokens, hits at 1 and at 5, bytes and words.

    Bytes and words are shared out by what tokens stand for by themselves: exact for the document, near enough for how
    its stretches differ.
    """
    starts = np.linspace(0, ids.size, -(-ids.size // _STRETCH), endpoint=False).astype(int)
    columns = (-scores.logprobs.astype(np.float64), np.ones(ids.size), scores.ranks == 0, scores.ranks < _TOP)
    sums = np.array([np.add.reduceat(column, starts, dtype=np.float64) for column in columns]).T
    sizes = np.add.reduceat(table[ids], starts)
    share = sizes / sizes.sum() if sizes.sum() else np.full(starts.size, 1 / starts.size)
    return np.column_stack([sums, num_bytes * share, words * share])


def _figures(group: str, sums_SxK: np.ndarray, count: int) -> list[Figure]:
    def ratio(above: int, below: int, scale: float = 1.0, power: bool = False) -> Callable[[np.ndarray], np.ndarray]:
        def figure(sums: np.ndarray) -> np.ndarray:
            value = scale * sums[..., above] / np.maximum(sums[..., below], 1)
            return np.exp(np.minimum(value, 700.0)) if power else value  # beyond: no float64

        return figure

    metrics = {
        "loss": ratio(0, 1),
        "perplexity": ratio(0, 1, power=True),
        "word_perplexity": ratio(0, 5, power=True),
        "bits_per_byte": ratio(0, 4, 1 / np.log(2)),
        "top1_accuracy": ratio(2, 1),
        "top5_accuracy": ratio(3, 1),
    }
    return [Figure(group, name, bootstrap(sums_SxK, figure), count) for name, figure in metrics.items()]
