"""Checks of a trained model: loss against baselines and the log, generation with and without a cache."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.checks.finding import Finding, finding, skipped
from slm_jax.checks.uncached import run_uncached
from slm_jax.config.schema import Config
from slm_jax.data.batches.modes import validation_batches
from slm_jax.data.corpus.stream import TokenStream
from slm_jax.generation.decode import generate_ids, suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.model import ops
from slm_jax.model.transformer import Transformer
from slm_jax.run.checkpoint import open_folder, steps_in, verify_checkpoint
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row
from slm_jax.run.trend import Trend
from slm_jax.training.overfitting import remedies
from slm_jax.utils.batch import IGNORE_INDEX, Batch
from slm_jax.utils.text_tokenizer import TextTokenizer, decode_continuation

_COUNTED = 50_000_000  # training tokens that frequencies are counted in
_SNIPPET = 70  # characters of a text that are shown


class RowLoss(NamedTuple):
    """Loss of one row of held-out text."""

    nll: float  # nats, summed over its predicted positions
    tokens: int  # predicted
    labels: np.ndarray  # int32 [T]
    before: tuple[int, ...] = ()  # id before the first label

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens


def row_losses(model: Transformer, config: Config, parts: Sequence[TokenStream]) -> list[RowLoss]:
    """Return the loss of every row of held-out text that has labels.

    Args:
        model: The model.
        config: The config of its run.
        parts: Held-out token ids of each source.
    """
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def losses(params: Any, batch: Batch) -> jax.Array:
        merged: Transformer = nnx.merge(graph, params)
        masks = (batch.get(name) for name in ("attention_mask", "segment_ids", "positions"))
        x_BxTxD = merged.hidden(batch["input_ids"], *masks)

        def one(x_TxD: jax.Array, labels_T: jax.Array) -> jax.Array:
            head_VxD = merged.head_weight()
            return ops.cross_entropy(
                x_TxD[None],
                head_VxD,
                labels_T[None],
                merged.dtype,
                vocab_size=merged.vocab_size,
                platform=merged.platform,
                softcap=merged.logit_softcap,
            ).nll

        return jax.vmap(one)(x_BxTxD, batch["labels"])

    rows = []
    size = config.train.batch_size // config.train.grad_accum_steps
    for batch, _ in itertools.chain.from_iterable(validation_batches(config, part, size) for part in parts):
        nll_B = np.asarray(losses(params, batch), np.float64)
        counts_B = np.count_nonzero(batch["labels"] != IGNORE_INDEX, axis=1)
        first_B = np.argmax(batch["labels"] != IGNORE_INDEX, axis=1)
        before_B = [(int(row[first]),) for row, first in zip(batch["input_ids"], first_B, strict=True)]
        values = zip(nll_B, counts_B.tolist(), batch["labels"], before_B, strict=True)
        rows += [RowLoss(*each) for each in values if each[1]]
    return rows


def held_out_loss(rows: Sequence[RowLoss]) -> float:
    """Return the loss of all rows in nats per predicted token."""
    return sum(row.nll for row in rows) / sum(row.tokens for row in rows)


def unigram_loss(train: TokenStream, rows: Sequence[RowLoss], vocab_size: int) -> float:
    """Return the loss of a unigram model on the rows: token frequencies of the training text, plus one."""
    counts_V = np.ones(vocab_size)
    counts_V += np.bincount(train[: min(len(train), _COUNTED)], minlength=vocab_size)[:vocab_size]
    cost_V = -np.log(counts_V / counts_V.sum())
    labels = np.concatenate([row.labels[row.labels != IGNORE_INDEX] for row in rows])
    return float(cost_V[labels].mean())


def below_baselines(loss: float, unigram: float, vocab_size: int) -> Finding:
    """Check that the loss is below that of token frequencies and that of a uniform guess."""
    uniform = math.log(vocab_size)
    ok = math.isfinite(loss) and loss < min(unigram, uniform)
    return finding(
        "held-out loss",
        ok,
        f"{loss:.3f} nats per token",
        f"below token frequencies {unigram:.3f} and ln V {uniform:.3f}",
    )


def matches_log(loss: float, rows: Sequence[Row], step: int, dtype: str) -> Finding:
    """Check that the held-out loss is the one that training logged at this step.

    Other hardware and other batch sizes sum in another order: bfloat16 products (8 bits) keep 2 or 3 digits of single
    logits, float16 ones (11 bits) one more, and the mean over many tokens one or two more; float32 keeps 5.
    """
    logged = next((row.get("val_loss") for row in rows if row["step"] == step), None)
    if logged is None:
        return skipped("validation repeats", f"no validation was logged at step {step}")
    tolerance = {"bfloat16": 2e-3, "float16": 5e-4}.get(dtype, 1e-5) * max(logged, 1.0)
    ok = abs(loss - logged) <= tolerance
    return finding("validation repeats", ok, f"{loss:.6f}", f"{logged:.6f} as in metrics.jsonl, ± {tolerance:.1g}")


def per_sample(rows: Sequence[RowLoss], tokenizer: TextTokenizer, worst: int = 3) -> Finding:
    """Check that the loss of each row is finite, and show the texts with the highest loss."""
    means = np.array([row.mean for row in rows])
    if not np.isfinite(means).all():
        count = int(np.count_nonzero(~np.isfinite(means)))
        return finding("loss of each sample", False, f"{count} of {len(means)} are not finite", "finite numbers")
    details = []
    for index in np.argsort(-means)[:worst]:
        ids = rows[index].labels[rows[index].labels != IGNORE_INDEX][: 4 * _SNIPPET]
        text = decode_continuation(tokenizer, rows[index].before, ids.tolist())
        details.append(f"{means[index]:.3f}  {text[:_SNIPPET]!r}")
    low, middle, high = (float(np.quantile(means, q)) for q in (0.05, 0.5, 0.95))
    found = f"{len(means):,} rows: median {middle:.3f}, 90 % between {low:.3f} and {high:.3f}"
    return finding("loss of each sample", True, found, f"finite; the {len(details)} worst are shown", details)


def cached_logits(model: Transformer, ids: Sequence[int], context: int = 0) -> Finding:
    """Check that a text fed token by token through the cache gets the logits of the full forward pass."""
    ids_1xT = np.asarray(ids, np.int32)[None]
    length = ids_1xT.shape[1]

    def both(model_params: Any, ids_1xT: jax.Array) -> tuple[jax.Array, jax.Array]:
        merged: Transformer = nnx.merge(graph, model_params)

        def one(cache: Any, at: jax.Array) -> tuple[Any, jax.Array]:
            token_1x1 = jax.lax.dynamic_slice_in_dim(ids_1xT, at, 1, axis=1)
            x_1x1xD, cache = merged.hidden_cached(token_1x1, at[None, None], cache, context)
            return cache, x_1x1xD[0, 0]

        _, x_TxD = jax.lax.scan(one, merged.empty_cache(1, length), jnp.arange(length))
        return merged.logits(x_TxD), merged(ids_1xT)[0]

    graph, params = nnx.split(model, nnx.Param)
    cached_TxV, whole_TxV = (np.asarray(each, np.float64) for each in run_uncached(both, params, ids_1xT))
    gap, size = float(np.abs(cached_TxV - whole_TxV).max()), float(np.abs(whole_TxV).max())
    tolerance = _rounding(model) * size
    expected = f"at most {tolerance:.1g}, rounding in {model.dtype.name}"
    ok = math.isfinite(gap) and gap <= tolerance
    return finding("cached logits", ok, f"differ by {gap:.2g} in {length} tokens", expected)


def _rounding(model: Transformer) -> float:
    """Return the tolerated difference of two orders of summation, as a fraction of the largest logit: a few roundings
    of the products' dtype (8, 11 or 24 bits) through the layers."""
    if model.dtype == jnp.float32:
        return 1e-4
    more_digits = 2**-3 if model.dtype == jnp.float16 else 1.0
    # Each layer also rounds about 20 results, whose errors add up as the root of their number.
    tolerance = 2e-2 if model.policy.activation == jnp.float32 else 2**-8 * math.sqrt(20 * model.config.depth)
    return tolerance * more_digits


def greedy_text(
    model: Transformer, tokenizer: TextTokenizer, prompt: Sequence[int], context: int, length: int = 16
) -> Finding:
    """Check that each greedily generated token is the most probable one by the full forward pass without a cache.

    Rounding may decide between two nearly equal tokens: the logit of a generated token must be the largest up to
    rounding.
    """
    suppressed = suppressed_ids(tokenizer)
    drawn = generate_ids(model, [prompt], length, Sampling(temperature=0.0), context, suppressed)[0]
    ids = np.array([[*prompt, *drawn]], np.int32)
    graph, params = nnx.split(model, nnx.Param)
    logits = run_uncached(lambda params, ids: nnx.merge(graph, params)(ids), params, ids)
    logits_NxV = np.array(logits[0, len(prompt) - 1 : -1], np.float64)
    size = float(np.abs(logits_NxV).max())
    logits_NxV[:, suppressed] = -np.inf
    gaps = logits_NxV.max(axis=1) - logits_NxV[np.arange(len(drawn)), drawn]
    tolerance = _rounding(model) * size
    found = f"{np.count_nonzero(gaps == 0)} of {len(drawn)} tokens, largest gap {gaps.max():.2g}"
    text = decode_continuation(tokenizer, prompt, list(map(int, drawn)))[:_SNIPPET]
    ok = bool((gaps <= tolerance).all())  # false of NaN
    return finding("greedy text", ok, found, f"the most probable, or within {tolerance:.1g}", [repr(text)])


def metrics_rows(rows: Sequence[Row], step: int) -> Finding:
    """Check that metrics.jsonl has each step once, in order, at least up to the checkpoint."""
    steps = [row["step"] for row in rows]
    wrong = next((i for i, recorded in enumerate(steps, 1) if recorded != i), None)
    missing = "" if wrong is None else f"; row {wrong} is of step {steps[wrong - 1]}"
    ok = wrong is None and len(steps) >= step
    problems = [
        f"step {r['step']}: {k} is {v}"
        for r in rows
        for k, v in r.items()
        if isinstance(v, float) and not math.isfinite(v)
    ]
    found = f"{len(steps)} rows, checkpoint of step {step}{missing}"
    return finding("metrics", ok and not problems, found, f"steps 1 to {step} or more, each once", problems[:4])


def complete_checkpoints(run: Run) -> Finding:
    """Check that the files of every checkpoint are those that were written."""
    folder = open_folder(run.checkpoints)
    steps = steps_in(folder)
    problems = []
    for step in list(steps):
        try:
            verify_checkpoint(folder, step)
        except Exception as error:  # anything may come of reading a corrupt file
            if step in steps_in(folder):
                problems.append(f"step {step}: {error}")
            else:
                steps.remove(step)  # a training process has just deleted it
    found = f"{len(steps) - len(problems)} of {len(steps)} ({', '.join(map(str, steps))})"
    return finding("checkpoint", bool(steps) and not problems, found, "every checkpoint is as it was saved", problems)


def overfitting(rows: Sequence[Row], step: int, used: str, config: Config) -> Finding:
    """Check that the validation loss has not risen by more than 1 % from its lowest value.

    Args:
        rows: The rows of `metrics.jsonl`.
        step: The last step with a checkpoint.
        used: The checkpoint that was loaded.
        config: The config of the run.
    """
    trend = Trend.from_rows(row for row in rows if row["step"] <= step)
    if trend.newest is None or trend.best is None:
        return skipped("overfitting", "no validation was logged")
    ok = not trend.has_risen
    found = (
        f"validation loss {trend.newest.loss:.3f} at step {trend.newest.step}" if trend.newest.loss else "not finite"
    )
    expected = f"at most 1 % above the lowest, {trend.best.loss:.3f} at step {trend.best.step}"
    details = [] if ok else [f"what helps: {remedies(trend.best.step, config)}", f"these checks use {used}"]
    return finding("overfitting", ok, found, expected, details)
