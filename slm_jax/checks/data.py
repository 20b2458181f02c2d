"""Checks of the model's input: labels are the next token, ids are in range, the tokenizer is lossless and fits."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.checks.finding import Finding, finding, shortened, skipped
from slm_jax.checks.uncached import run_uncached
from slm_jax.data.corpus.corpus import Corpus
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.distributed.platform import Platform
from slm_jax.model.ops import LossSums
from slm_jax.model.transformer import Transformer
from slm_jax.training.objective import loss_sums
from slm_jax.utils.batch import IGNORE_INDEX, Arrays
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer

# What tokenizers typically lose: case, runs of spaces, line ends, other scripts, combining characters, surrogates, and
# texts that look like the names of special or byte tokens.
SAMPLES = (
    "Hello, world! THE The the",
    "  two  spaces,\ttabs\t\t and\r\nline\n\n\nends \u00a0 ",
    "def f(x): return {'a': x ** 2, \"b\": [1, 2.5e-3]}  # code",
    "שלום  Привет γειά σου 你好，世界 مرحبا नमस्ते 안녕",
    "🙂👩‍👩‍👧 e\u0301 \u200b\ufeff \x00\x07 \ud800 İıſß",
    "<PAD> <EOS> <|endoftext|> byte_12 _x",
    "",
)
_ROWS = 4  # rows of a batch that the loss is computed for
_SCANNED = 50_000_000  # token ids of each split that are scanned
_DOCUMENTS = 20  # documents of each split that are tokenized


class _Oracle:
    """Stand-in for a model: the hidden state of each position selects a token, whose logit is then the largest."""

    def __init__(self, names_BxT: jax.Array, rows_VxD: jax.Array):
        self._names = names_BxT
        self._rows = rows_VxD
        self.dtype = jnp.dtype("float32")
        self.platform = Platform.default()
        self.vocab_size = len(rows_VxD)
        self.logit_softcap = 0.0

    def hidden(self, *_: Any, **__: Any) -> jax.Array:
        return 50.0 * self._rows[self._names]

    def head_weight(self) -> jax.Array:
        return self._rows


def next_token(batch: Arrays, vocab_size: int, sums: Callable[..., LossSums] = loss_sums) -> Finding:
    """Check that labels are the next tokens, and that the loss scores each position by them.

    In the batch, labels[t] must be input_ids[t + 1] wherever both exist. By the loss, a model that predicts the next
    token of the text must be right everywhere, and one that copies the current token (what unshifted labels teach)
    must not.

    Args:
        batch: A batch, int32 [B, T].
        vocab_size: Number of token ids.
        sums: The loss function, with the signature of `loss_sums`.
    """
    ids, labels = np.asarray(batch["input_ids"]), np.asarray(batch["labels"])
    real = np.asarray(batch.get("attention_mask", np.ones_like(ids))) > 0
    scored = (labels[:, :-1] != IGNORE_INDEX) & real[:, 1:]
    if not scored.any():
        return finding("labels", False, "nothing to predict in this batch", "labels that are the next token")
    following = float((labels[:, :-1] == ids[:, 1:])[scored].mean())
    rows = np.argsort(-scored.sum(axis=1), kind="stable")[:_ROWS]  # those with the most labels
    few = {name: np.asarray(array)[rows, :-1] for name, array in batch.items()}
    few["labels"] = np.where(scored[rows], few["labels"], IGNORE_INDEX)
    embedding_VxD = jax.random.normal(jax.random.key(0), (vocab_size, 64))
    embedding_VxD /= jnp.linalg.norm(embedding_VxD, axis=1, keepdims=True)

    def counts(names_2xBxT: jax.Array, batch: Any, embedding_VxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        def count(names_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
            found = sums(_Oracle(names_BxT, embedding_VxD), batch)
            return found.correct, found.tokens

        return jax.vmap(count)(names_2xBxT)

    names_2xBxT = np.stack([ids[rows, 1:], ids[rows, :-1]])
    # Divided here: compiled, n / n may be a product with a reciprocal, and differ from 1.
    correct, tokens = map(np.asarray, run_uncached(counts, names_2xBxT, few, embedding_VxD))
    oracle, copy = map(float, correct / tokens)
    return finding(
        "labels",
        following == 1.0 and oracle == 1.0 and copy < 0.5,
        f"{following:.1%} the next id; naming it is {oracle:.1%} right, copying {copy:.1%}",
        "100 %, 100 %, below 50 %",
    )


def vocabulary(model: Transformer, tokenizer: TextTokenizer) -> Finding:
    """Check that the model has one logit per entry of the tokenizer."""
    sizes = tokenizer.vocab_size, model.vocab_size
    rows = min(len(model.embedding[...]), len(model.head_weight()))
    ok = sizes[0] == sizes[1] <= rows
    found = f"tokenizer {sizes[0]:,}, model {sizes[1]:,}, rows {rows:,}"
    return finding("vocabulary", ok, found, "as many logits as entries, rows for all")


def lossless(tokenizer: TextTokenizer, texts: Sequence[str]) -> Finding:
    """Check that decode(encode(text)) == text."""
    if not isinstance(tokenizer, HybridTokenizer):
        return skipped("tokenizer round trip", "not one of this project: it may normalize text")
    lost = []
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            lost.append(f"at {at}: {text[at : at + 20]!a} decodes to {back[at : at + 20]!a}")
    found = f"{len(texts) - len(lost)} of {len(texts)} texts are restored"
    return finding("tokenizer round trip", not lost, found, "decode(encode(text)) == text", shortened(lost))


def sample_documents(corpus: Corpus, tokenizer: TextTokenizer, max_documents: int = _DOCUMENTS) -> list[str]:
    """Return documents of both splits, spread over each; of long ones the beginning."""
    texts = []
    for split in (corpus.train, corpus.validation):
        ends = split.ends
        for number in np.unique(np.linspace(0, len(ends) - 1, min(max_documents, len(ends))).astype(int)):
            start, end = int(ends[number - 1]) if number else 0, int(ends[number]) - 1  # without its <EOS>
            texts.append(tokenizer.decode(split[start : min(end, start + 500)].tolist()))
    return texts


def ids_in_range(batch: Arrays, splits: Sequence[TokenStream], vocab_size: int) -> Finding:
    """Check that every id of a batch and of the corpus has a row in the embedding."""
    ids, labels = np.asarray(batch["input_ids"]), np.asarray(batch["labels"])
    arrays = [ids, labels[labels != IGNORE_INDEX], *(split[: min(len(split), _SCANNED)] for split in splits)]
    low, high = min(int(a.min()) for a in arrays if a.size), max(int(a.max()) for a in arrays if a.size)
    total = sum(a.size for a in arrays)
    found = f"{low} to {high} in {total:,} ids"
    return finding("ids in range", low >= 0 and high < vocab_size, found, f"0 to {vocab_size - 1}")
