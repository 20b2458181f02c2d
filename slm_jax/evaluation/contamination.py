"""Evaluation items that the training text contains in part: the overlap of n-grams of words.

An item is contaminated if one of its pieces, each choice of a question for example, has 13 consecutive words in common
with a training document: 13 is the largest n of GPT-3 (arXiv:2005.14165, appendix C), which takes a smaller one, 8 or
more, for tasks of short items. Words are what is left between white space in lower case without punctuation (characters
that are neither letters, digits nor underscores). Items all of whose pieces have fewer than 13 words cannot be
compared; they count as clean, and their number is stated.

The n-grams of the items are held in memory as 64-bit hashes, and the training text is read once, block by block. Words
of n-grams with equal hashes are not compared. Two different n-grams have the same hash with a probability of 2**-64:
with 10**6 n-grams of items and 10**10 of training text, the probability that any item is marked by mistake is below 0.1
%.
"""

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from slm_jax.data.ancestry import runs_of_weights
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.data.overlap import text_blocks
from slm_jax.evaluation.intervals import binomial_interval
from slm_jax.evaluation.item_texts import Pieces
from slm_jax.evaluation.results import Metric, TaskResult
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural
from slm_jax.utils.text_tokenizer import TextTokenizer
from slm_jax.utils.text_windows import window_hashes

logger = logging.getLogger(__name__)

NGRAM = 13  # words
SHARE = "contaminated_share"
CLEAN = "clean"
_LARGE = 20_000_000  # tokens of training text, which take more than a few seconds
_PUNCTUATION = re.compile(r"[^\w\s]+")
_TABLE_BITS = 24


class Contamination(NamedTuple):
    """Items of a task that share an n-gram with the training text.

    Attributes:
        found: Whether the training text has an n-gram of the item, bool [N].
        num_short: Number of items all of whose pieces have fewer words than an n-gram.
    """

    found: np.ndarray
    num_short: int


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _PUNCTUATION.sub("", text.lower()).split()


class NgramIndex:
    """The n-grams of the items of several tasks."""

    def __init__(self, tasks: Sequence[Sequence[Pieces]]):
        """Hash the n-grams of all items.

        Args:
            tasks: For each task the pieces of each item.
        """
        pieces = [each for texts in tasks for each in texts]
        hashes, lengths = _ngrams(list(itertools.chain.from_iterable(pieces)))
        item_of = np.repeat(np.arange(len(pieces)), [len(each) for each in pieces])
        counts = np.maximum(lengths - NGRAM + 1, 0)
        items = np.repeat(item_of, counts)
        self._comparable = np.bincount(item_of, counts, len(pieces)) > 0
        self._hashes, inverse = np.unique(hashes, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        self._items = items[order]  # of each n-gram, one after another
        self._starts = np.searchsorted(inverse[order], np.arange(self._hashes.size + 1))
        self._found = np.zeros(self._hashes.size, bool)
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[_slots(self._hashes)] = True
        self._bounds = np.cumsum([0, *map(len, tasks)])

    def search(self, texts: Sequence[str]) -> None:
        """Look all n-grams of training documents up."""
        hashes, _ = _ngrams(texts)
        hashes = hashes[self._table[_slots(hashes)]]
        if hashes.size and self._hashes.size:
            at = np.minimum(np.searchsorted(self._hashes, hashes), self._hashes.size - 1)
            self._found[at[self._hashes[at] == hashes]] = True

    def results(self) -> list[Contamination]:
        """Return the items of each task that were found."""
        found = np.zeros(self._comparable.size, bool)
        found[self._items[np.repeat(self._found, np.diff(self._starts))]] = True
        return [
            Contamination(found[a:b], int((~self._comparable[a:b]).sum()))
            for a, b in itertools.pairwise(self._bounds.tolist())
        ]


def _slots(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def _ngrams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the n-grams within each text, uint64, one text after another, and the words of each [N]."""
    words = [words_of(text) for text in texts]
    lengths = np.array([len(each) for each in words], np.int64)
    total = int(lengths.sum())
    values = np.fromiter(map(hash, itertools.chain.from_iterable(words)), np.int64, total).view(np.uint64)
    hashes = window_hashes(values, NGRAM)
    text_of = np.repeat(np.arange(lengths.size), lengths)
    return hashes[text_of[: hashes.size] == text_of[text_of.size - hashes.size :]], lengths


def find_contamination(tasks: Sequence[Sequence[Pieces]], blocks: Iterable[Sequence[str]]) -> list[Contamination]:
    """Find the items of tasks that share an n-gram with training text.

    Args:
        tasks: For each task the pieces of each item.
        blocks: Blocks of training documents, which are read once.

    Returns:
        The result of each task.
    """
    index = NgramIndex(tasks)
    for texts in blocks:
        index.search(texts)
    return index.results()


def run_contamination(tasks: Sequence[Sequence[Pieces]], run: Run, tokenizer: TextTokenizer) -> list[Contamination]:
    """Find the items of tasks in the training text of a run, and of the runs that its weights come from.

    Args:
        tasks: For each task the pieces of each item.
        run: The run.
        tokenizer: Its tokenizer.

    Raises:
        UserError: The run has no corpus.
    """
    if not run.corpus.is_dir():
        raise UserError(f"{run.path} has no corpus: its training text cannot be searched for items of the tasks")
    folders = [run.corpus, *(each.corpus for each in runs_of_weights(run.read_config())[0])]
    streams = [part.train for folder in folders for part in open_corpus(folder, tokenizer, verify=False).parts]
    total = sum(map(len, streams))
    logger.info(
        "searching %s of training text for n-grams of %s",
        plural(total, "token"), plural(sum(map(len, tasks)), "item"),
    )  # fmt: skip
    return find_contamination(tasks, _logged_blocks(streams, tokenizer, total))


def _logged_blocks(streams: Sequence[TokenStream], tokenizer: TextTokenizer, total: int) -> Iterator[list[str]]:
    """Yield the documents of streams in blocks; log the progress through a large text."""
    before = 0
    logged = 0
    for stream in streams:
        for texts, end in text_blocks(stream, tokenizer):
            yield texts
            tenths = 10 * (before + end) // total
            if total > _LARGE and tenths > logged:
                logged = tenths
                logger.info("%d %% of the training text is searched", 10 * tenths)
        before += len(stream)


def contamination_metrics(found: np.ndarray, parts: Sequence[str] = ()) -> list[Metric]:
    """Return the share of contaminated items, of all and of each part.

    Args:
        found: Which items are contaminated, bool [N].
        parts: The part that each item belongs to; empty: there are no parts.
    """
    names = np.array(parts)
    groups = {"all": np.ones(found.size, bool)} | {name: names == name for name in dict.fromkeys(parts)}
    return [
        Metric(name, SHARE, binomial_interval(int(found[members].sum()), int(members.sum())), int(members.sum()))
        for name, members in groups.items()
    ]


def clean_metrics(result: TaskResult, parts: Sequence[str] = ()) -> list[Metric]:
    """Return the metrics of clean items as those of the group `clean`, and of `clean / PART`.

    Args:
        result: The result over clean items.
        parts: The part that each item belongs to; metrics of other groups are left out.
    """
    names = {"all": CLEAN} | {part: f"{CLEAN} / {part}" for part in parts}
    return [replace(metric, group=names[metric.group]) for metric in result.metrics if metric.group in names]


def describe(contamination: Contamination) -> str:
    """Return one sentence about the comparison."""
    short = f"; {plural(contamination.num_short, 'item')} of fewer words count as clean"
    return (
        f"contaminated: {NGRAM} consecutive words in common with a training document (lower case, without punctuation)"
        f"{short if contamination.num_short else ''}"
    )
