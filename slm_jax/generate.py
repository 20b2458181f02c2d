"""Text from a model: prefill, a decode loop with a cache of keys and values, sampling.

`python -m slm_jax.generate --run runs/NAME --prompt "…"` streams text; `generate` and `stream` serve programs.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slm_jax.callable_module import make_callable
from slm_jax.errors import UserError, command_line
from slm_jax.transformer import KVCache, Transformer
from tokenizer import HybridTokenizer

_BUCKET = 64  # prompts and caches are padded to multiples of it, so that few shapes are compiled
_NEVER = -1e30


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8  # 0: always the most probable token
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 0.95  # only the most probable tokens that together have this probability
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for values out of range."""
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature {self.temperature} must be 0 or more")
        if self.top_k < 0:
            problems.append(f"top_k {self.top_k} must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed {self.seed} must be from 0 to {2**32 - 1}")
        if problems:
            raise UserError("; ".join(problems))


def sample(logits_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits_BxV, min(sampling.top_k, logits_BxV.shape[-1]))[0][:, -1:]
        logits_BxV = jnp.where(logits_BxV < kth, _NEVER, logits_BxV)
    if sampling.top_p < 1:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(sorted_BxV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BxV, axis=-1)
        # The token that crosses the threshold stays, so one always does.
        smallest = jnp.min(jnp.where(before < sampling.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV < smallest, _NEVER, logits_BxV)
    return jax.random.categorical(key, logits_BxV, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "window"), donate_argnames="cache")
def _advance(graph, params, tokens, positions, cache, key, suppressed, sampling, window):
    """Feed tokens [B, T] and draw the next [B] after each row's last real one; (next, its positions [B, 1], cache)."""
    model: Transformer = nnx.merge(graph, params)
    x_BxTxD, cache = model.hidden_cached(tokens, positions, cache, window)
    last = jnp.argmax(positions, axis=1)
    logits_BxV = model.logits(x_BxTxD[jnp.arange(len(last)), last])
    drawn = sample(jnp.where(suppressed, _NEVER, logits_BxV), key, sampling)
    return drawn, jnp.max(positions, axis=1, keepdims=True) + 1, cache


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),
    context: int = 0,
    suppress: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """The next tokens int32 [B], max_tokens times, for prompts of token ids of any lengths (none empty).

    context: tokens that attention sees at most (a model knows no distances beyond its training length); 0: the
    model's window. suppress: ids never drawn. The same seed gives the same tokens. Raises UserError on bad input.
    """
    sampling.check()
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("a prompt has no tokens: begin it with <EOS>, as encode_prompt does")
    graph, params = nnx.split(model, nnx.Param)
    longest = max(map(len, prompts))
    width = -(-longest // _BUCKET) * _BUCKET
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    suppressed = np.zeros(model.vocab_size, bool)
    suppressed[list(suppress)] = True
    capacity = -(-(longest + max_tokens) // _BUCKET) * _BUCKET
    window = min(w for w in (context, model.config.window, capacity) if w)
    cache: KVCache = model.empty_cache(len(prompts), capacity)
    static = replace(sampling, seed=0)  # the seed is in the key: another one compiles nothing
    key = jax.random.key(sampling.seed)
    drawn: Any = tokens
    at: Any = positions
    for i in range(max_tokens):
        drawn = drawn if i == 0 else drawn[:, None]
        drawn, at, cache = _advance(
            graph, params, drawn, at, cache, jax.random.fold_in(key, i), suppressed, static, window
        )
        yield np.asarray(drawn)


def generate(
    model: Transformer,
    tokenizer: HybridTokenizer,
    prompts: str | Sequence[str],
    max_tokens: int = 200,
    sampling: Sampling = Sampling(),
    context: int = 0,
) -> list[str]:
    """Each prompt's continuation, up to the end of its text or max_tokens; an empty prompt begins a new document."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    eos = tokenizer.token2id["<EOS>"]
    rows: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for drawn in stream(
        model, [encode_prompt(tokenizer, p) for p in prompts], max_tokens, sampling, context, never_drawn(tokenizer)
    ):
        running -= {row for row in running if drawn[row] == eos}
        for row in running:
            rows[row].append(int(drawn[row]))
        if not running:
            break
    return [tokenizer.decode(row) for row in rows]


def encode_prompt(tokenizer: HybridTokenizer, prompt: str) -> list[int]:
    """The ids of a prompt as the beginning of a document (of which an empty one leaves all to the model)."""
    return [tokenizer.token2id["<EOS>"], *tokenizer.encode(prompt, mode="flat")]


def never_drawn(tokenizer: HybridTokenizer) -> list[int]:
    """Ids that ordinary text never holds, <EOS> apart: they stand in no training text."""
    names = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK>", "<RES>")
    return [tokenizer.token2id[name] for name in names]


@dataclass(frozen=True)
class Options:
    """Continue a text with the model of a run."""

    prompt: str
    """The text to continue."""
    run: str = ""
    """The run directory; empty: the newest in runs/."""
    max_tokens: int = 200
    """Longest continuation, in tokens."""
    temperature: float = 0.8
    """0: always the most probable token; higher is more varied."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the most probable tokens that together have this probability."""
    seed: int = 0
    """The same seed gives the same text."""


def main() -> None:
    """The command line."""
    import tyro

    from slm_jax.process import tune_process

    options = tyro.cli(Options, prog="python -m slm_jax.generate", use_underscores=True)
    tune_process()
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    sampling.check()
    if options.max_tokens < 1:
        raise UserError(f"max_tokens {options.max_tokens} must be 1 or more")
    if not options.prompt:
        raise UserError("the prompt is empty: give at least one character")

    from slm_jax.load import load_run

    loaded = load_run(options.run or None)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal shows no half characters
    decoder = loaded.tokenizer.stream_decoder()
    ids = encode_prompt(loaded.tokenizer, options.prompt)
    sys.stdout.write(options.prompt)
    for drawn in stream(
        loaded.model, [ids], options.max_tokens, sampling, loaded.context, never_drawn(loaded.tokenizer)
    ):
        if drawn[0] == loaded.tokenizer.token2id["<EOS>"]:
            break
        sys.stdout.write(decoder.push(int(drawn[0])))
        sys.stdout.flush()
    print(decoder.finish())


make_callable(__name__)

if __name__ == "__main__":
    with command_line():
        main()
