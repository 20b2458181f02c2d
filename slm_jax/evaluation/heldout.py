"""Held-out text: loss, perplexity per token and per word, bits per byte, and next-token accuracy.

Each document is scored separately, from the <EOS> before it to the <EOS> that ends it, in overlapping windows: every
token once, with as much context as the stride leaves. Validation during training uses the batches of its `data.mode`
instead, so its metrics are slightly worse: what follows where a window or a long document is cut has only the token
before it as context. Of instructions, only the response is scored; of conversations, the turns of the assistant.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from slm_jax.config.schema import DataConfig
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.corpus.encode import ItemEncoder
from slm_jax.data.corpus.encoded import TextEncoder, encoded_items, end_of
from slm_jax.data.corpus.splitting import SplitText
from slm_jax.data.corpus.stream import DOCUMENT_DTYPE, Shard, TokenStream, byte_table
from slm_jax.data.sources.documents import Document, InvalidRow
from slm_jax.data.sources.file_source import FileSource
from slm_jax.data.sources.files import ROW_FORMATS, file_format, find_files
from slm_jax.data.sources.row_files import read_rows
from slm_jax.data.sources.rows import Mapper, Row, RowMapper, make_row_mapper
from slm_jax.data.turns import boundary_ids, pieces
from slm_jax.evaluation.encoding import with_eos_prefix
from slm_jax.evaluation.intervals import bootstrap_interval
from slm_jax.evaluation.results import Metric, TaskResult
from slm_jax.evaluation.scoring import Item, TokenScores
from slm_jax.evaluation.tasks import MAX_NATS, ScoreFunction
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural
from slm_jax.utils.text_tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

_TOP = 5  # of top5_accuracy
_SEGMENT = 4096  # tokens; longer documents are split into segments, which are resampled separately
_CHARS_PER_TOKEN = 16  # an upper bound, for reading only as much text as max_tokens can need

# Columns of the sums from which all metrics are computed.
_NATS, _TOKENS, _HITS, _TOP_HITS, _BYTES, _WORDS = range(6)


class Documents(NamedTuple):
    """D documents to score.

    Attributes:
        items: Token ids, and the first that is scored.
        bytes_D: UTF-8 bytes of the scored text, int64.
        words_D: Words of the scored text, separated by white space, int64.
        source_D: Index into `sources`, int64.
        sources: Names of the sources.
        responses: Of conversations, which of the tokens from the first on are scored, bool [n]; else None.
    """

    items: list[Item]
    bytes_D: np.ndarray
    words_D: np.ndarray
    source_D: np.ndarray
    sources: list[str]
    responses: Sequence[np.ndarray | None]

    def select(self, keep: np.ndarray) -> "Documents":
        """Return the documents that a mask, bool [D], keeps."""
        chosen = np.flatnonzero(keep).tolist()
        return Documents(
            [self.items[i] for i in chosen],
            self.bytes_D[chosen],
            self.words_D[chosen],
            self.source_D[chosen],
            self.sources,
            [self.responses[i] for i in chosen],
        )


def documents_of_run(run: Run, tokenizer: TextTokenizer, max_tokens: int = 0) -> Documents:
    """Read the validation documents of a run.

    Args:
        run: The run.
        tokenizer: The tokenizer of the run.
        max_tokens: Maximum number of tokens of each source; 0: all.

    Raises:
        UserError: The run has no corpus.
    """
    if not run.corpus.is_dir():
        raise UserError(f"{run.path} has no corpus, and so no held-out text: give a file with --tasks heldout=FILE")
    corpus = open_corpus(run.corpus, tokenizer)
    parts = [_documents_of_stream(part.stream.head(max_tokens), tokenizer, part.name) for part in corpus.held_out()]
    return _concatenated(parts)


def documents_of_files(
    pattern: str, tokenizer: TextTokenizer, max_tokens: int = 0, data: DataConfig | None = None
) -> Documents:
    """Read and encode documents of files, see `read_documents` and `encode_documents`."""
    documents = read_documents(pattern, data, max_tokens)
    return encode_documents(documents, pattern, tokenizer, max_tokens, data)


def read_documents(pattern: str, data: DataConfig | None = None, max_tokens: int = 0) -> list[Document]:
    """Read documents of files in all formats that `data.files` reads: text, instructions and conversations.

    Args:
        pattern: A file, folder or glob.
        data: The options by which the training text was read (format, columns, template, separator …); None: defaults.
        max_tokens: Read complete documents from the beginning, at least as many as can hold this number of tokens; 0:
            all.

    Raises:
        UserError: A file cannot be read, a record is invalid, or there is no text.
    """
    data = data or DataConfig()
    mapper = _mapper(pattern, data)
    source = FileSource((pattern,), mapper, data.separator, data.document == "line", data.encoding_errors, remedy="")
    documents = []
    num_chars = 0
    for document in source.read():
        if isinstance(document, InvalidRow):
            raise UserError(f"{document.location}: {document.reason}")
        if any(text.strip() for text in document.strings):
            documents.append(document)
            num_chars += document.size
        if max_tokens and num_chars > _CHARS_PER_TOKEN * max_tokens:
            break
    if not documents:
        raise UserError(f"{pattern} contains no text")
    return documents


def _mapper(pattern: str, data: DataConfig) -> Mapper:
    """Return the mapping of rows to documents: that of the training text, or the column `text` of rows without it."""
    files = [path for path in find_files((pattern,)) if file_format(path) in ROW_FORMATS]
    if not files:
        return RowMapper()
    mapper = make_row_mapper(data)
    row = next((each for each in read_rows(files[0]) if isinstance(each, Row)), None)
    columns = row.value if row is not None and isinstance(row.value, dict) else {}
    if "text" in columns and mapper.missing_column(columns):
        logger.info("%s has no column %s: its column text is read", pattern, mapper.missing_column(columns))
        return RowMapper()
    return mapper


def encode_documents(
    documents: Sequence[Document],
    name: str,
    tokenizer: TextTokenizer,
    max_tokens: int = 0,
    data: DataConfig | None = None,
) -> Documents:
    """Encode documents as those of a corpus are; of instructions and conversations the responses are scored.

    Args:
        documents: The documents.
        name: Name of their source.
        tokenizer: The tokenizer of the model, with whose chat template conversations are encoded.
        max_tokens: Keep complete documents from the beginning up to this number of tokens, but at least one; 0: all.
        data: The option `loss_on` of the training text; None: the default.

    Raises:
        UserError: There are conversations, and the tokenizer has no chat template, or its template rejects one.
    """
    marked = any(document.messages is not None for document in documents)
    loss_on = (data or DataConfig()).loss_on
    encoder = TextEncoder(tokenizer, loss_on, marked)
    texts = [SplitText(each.text, each.response, "validation", 0, messages=each.messages) for each in documents]
    ids = iter(ItemEncoder(tokenizer).encode(encoded_items(texts)))
    tokens: list[np.ndarray] = []
    rows = []
    end = 0
    for text in texts:
        encoded = encoder.encoded(text, ids)
        tokens += [encoded.ids, end_of(encoded, tokenizer.eos_id, marked)]
        end += tokens[-2].size + tokens[-1].size
        rows.append((end, 0, encoded.num_bytes, encoded.prompt_size, encoded.rest, 0))
    prompts = (marked and loss_on == "response") or any(row[3] for row in rows)
    shard = Shard(np.concatenate(tokens), np.array(rows, DOCUMENT_DTYPE), prompts, marked=marked)
    return _documents_of_stream(TokenStream([shard]).head(max_tokens), tokenizer, name)


def _documents_of_stream(stream: TokenStream, tokenizer: TextTokenizer, name: str) -> Documents:
    ends = stream.ends
    items = []
    words = []
    responses: list[np.ndarray | None] = []
    boundaries = boundary_ids(tokenizer) if stream.has_conversations else ()
    for start, end, prompt in zip([0, *ends[:-1]], ends, stream.documents["prompt"].astype(int), strict=True):
        ids = stream[start:end].astype(np.int32)
        items.append(Item(with_eos_prefix(tokenizer, ids), 1 + int(prompt)))
        if not stream.has_conversations:
            responses.append(None)
            words.append(len(tokenizer.decode(ids[prompt:]).split()))
            continue
        mask = stream.prompt_mask(start, end)
        scored = np.ones(ids.size, bool) if mask is None else ~mask
        responses.append(scored[prompt:])
        words.append(
            sum(len(each.text.split()) for each in pieces(ids, scored, tokenizer, boundaries) if each.is_response)
        )
    sizes = stream.documents["bytes"].astype(np.int64)
    return Documents(items, sizes, np.array(words), np.zeros(len(items), np.int64), [name], responses)


def _concatenated(parts: Sequence[Documents]) -> Documents:
    return Documents(
        [item for part in parts for item in part.items],
        np.concatenate([part.bytes_D for part in parts]),
        np.concatenate([part.words_D for part in parts]),
        np.repeat(np.arange(len(parts)), [len(part.items) for part in parts]),
        [part.sources[0] for part in parts],
        [each for part in parts for each in part.responses],
    )


def measure_heldout(
    documents: Documents, tokenizer: TextTokenizer, score: ScoreFunction, context: int, stride: int
) -> TaskResult:
    """Compute all metrics over all documents, and over each source if there are several.

    Args:
        documents: The documents.
        tokenizer: The tokenizer of the model.
        score: `Scorer.score` of the model.
        context: Context of the scorer in tokens, for the note.
        stride: Stride of the scorer in tokens, for the note.

    Returns:
        The metrics, with bootstrap intervals over documents, or over segments of long documents.
    """
    byte_counts_V = byte_table(tokenizer)
    scores = score(documents.items)
    sizes = zip(documents.bytes_D.tolist(), documents.words_D.tolist(), strict=True)
    parts = [
        _segment_sums(*_scored(item.ids[item.first :], scored, response), size, words, byte_counts_V)
        for item, scored, response, (size, words) in zip(
            documents.items, scores, documents.responses, sizes, strict=True
        )
    ]
    groups = {"all": np.ones(len(parts), bool)}
    if len(documents.sources) > 1:
        groups |= {name: documents.source_D == i for i, name in enumerate(documents.sources)}
    metrics = []
    for name, members in groups.items():
        if members.any():
            sums_SxK = np.concatenate([parts[i] for i in np.flatnonzero(members)])
            metrics += _metrics(name, sums_SxK, int(members.sum()))
    totals = np.concatenate(parts).sum(0)
    turns = (
        ", or the end of each response of a conversation"
        if any(each is not None for each in documents.responses)
        else ""
    )
    note = (
        f"{plural(len(documents.items), 'document')}, {totals[_TOKENS]:,.0f} tokens (including the <EOS> that ends "
        f"each{turns}), {totals[_WORDS]:,.0f} words, {totals[_BYTES]:,.0f} bytes; windows of {context} tokens, stride "
        f"{stride}; intervals by resampling documents (segments of those with more than {_SEGMENT:,} tokens)"
    )
    return TaskResult(metrics, note)


def _scored(ids: np.ndarray, scores: TokenScores, response: np.ndarray | None) -> tuple[np.ndarray, TokenScores]:
    """Return the tokens that count, and their scores; of a conversation, those of its responses."""
    if response is None:
        return ids, scores
    return ids[response], TokenScores(scores.logprobs[response], scores.ranks[response])


def _segment_sums(ids: np.ndarray, scores: TokenScores, num_bytes: int, words: int, table: np.ndarray) -> np.ndarray:
    """Return the sums, float64 [S, 6], over each of S segments of equal length of a document.

    The bytes and words of the document are divided among its segments in proportion to the bytes of their tokens: exact
    for the document, and accurate enough for the variation between segments.

    Args:
        ids: The scored tokens.
        scores: Their scores.
        num_bytes: Bytes of the scored text.
        words: Words of the scored text.
        table: Bytes of each token, [V].
    """
    starts = np.linspace(0, ids.size, -(-ids.size // _SEGMENT), endpoint=False).astype(int)
    columns = (
        -scores.logprobs.astype(np.float64),  # _NATS
        np.ones(ids.size),  # _TOKENS
        scores.ranks == 0,  # _HITS
        scores.ranks < _TOP,  # _TOP_HITS
    )
    sums = np.array([np.add.reduceat(column, starts, dtype=np.float64) for column in columns]).T
    sizes = np.add.reduceat(table[ids], starts)
    share = sizes / sizes.sum() if sizes.sum() else np.full(starts.size, 1 / starts.size)
    return np.column_stack([sums, num_bytes * share, words * share])


def _metrics(group: str, sums_SxK: np.ndarray, count: int) -> list[Metric]:
    statistics = {
        "loss": _ratio(_NATS, _TOKENS),
        "perplexity": _perplexity(_TOKENS),
        "word_perplexity": _perplexity(_WORDS),
        "bits_per_byte": _ratio(_NATS, _BYTES, 1 / np.log(2)),
        "top1_accuracy": _ratio(_HITS, _TOKENS),
        "top5_accuracy": _ratio(_TOP_HITS, _TOKENS),
    }
    return [Metric(group, name, bootstrap_interval(sums_SxK, f), count) for name, f in statistics.items()]


def _ratio(numerator: int, denominator: int, scale: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """Return the statistic `scale * numerator / denominator` of two columns of sums [..., K]."""
    return lambda sums: scale * sums[..., numerator] / np.maximum(sums[..., denominator], 1)


def _perplexity(denominator: int) -> Callable[[np.ndarray], np.ndarray]:
    nats = _ratio(_NATS, denominator)
    return lambda sums: np.exp(np.minimum(nats(sums), MAX_NATS))
