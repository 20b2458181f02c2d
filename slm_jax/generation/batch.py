"""A batch of prompts for the compiled loop: checked, padded to few shapes, with the random numbers of each sequence.

Shapes: B sequences, L columns (padding, prompts, generated tokens), V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.generation.sampling import Sampling
from slm_jax.utils.errors import UserError

_MAX_BATCH_TOKENS = 2**28  # of a batch, prompts included: 12 bytes for each are allocated before the first is sampled
NO_TOKEN = -1
"""Marks padding, and the columns after the end of a sequence."""


class BatchRequest(NamedTuple):
    """A batch of prompts and how to continue them; the attributes are the arguments of `decode.stream`."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    sampling: Sampling | Sequence[Sampling] = Sampling()
    context: int = 0
    suppress: Sequence[int] = ()
    stop: Sequence[int] = ()

    def check(self, vocab_size: int) -> Sequence[Sampling]:
        """Validate the request and return the settings of each sequence.

        Args:
            vocab_size: Number of ids of the model.

        Raises:
            UserError: Arguments are invalid; the message names all problems.
        """
        rows = len(self.prompts)
        settings = [self.sampling] * rows if isinstance(self.sampling, Sampling) else list(self.sampling)
        problems = [problem for each in dict.fromkeys(settings) for problem in each.problems()]
        if len(settings) != rows:
            problems.append(f"{len(settings)} samplings for {rows} prompts: pass one, or one per prompt")
        if not self.prompts:
            problems.append("no prompts: pass at least one")
        if not all(len(prompt) for prompt in self.prompts):
            problems.append("a prompt has no tokens: start it with <EOS>, as encode_prompt does")
        if self.max_tokens < 1:
            problems.append(f"max_tokens {self.max_tokens} must be 1 or more")
        if rows * (max(map(len, self.prompts), default=0) + self.max_tokens) > _MAX_BATCH_TOKENS:
            problems.append(
                f"max_tokens {self.max_tokens:,} is too large: a batch (here of {rows}) may have at most "
                f"{_MAX_BATCH_TOKENS:,} tokens in total, prompts included"
            )
        if self.context < 0:
            problems.append(f"context {self.context} must be 0 (the model's window) or more")
        prompt_ids = (id_ for prompt in self.prompts for id_ in prompt)
        for name, ids in (("prompt", prompt_ids), ("suppress", self.suppress), ("stop", self.stop)):
            if outside := [int(id_) for id_ in ids if not 0 <= id_ < vocab_size][:3]:
                problems.append(f"{name} ids {outside} are outside the model's vocabulary of {vocab_size}")
        if len(set(self.suppress)) >= vocab_size:
            problems.append("all ids are suppressed: leave at least one")
        if problems:
            raise UserError("; ".join(problems))
        return settings


def pad_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, chunk: int) -> tuple[np.ndarray, int]:
    """Return the history int32 [B, L] with prompts padded on the left, and the first column after them."""
    first = -(-max(map(len, prompts)) // chunk) * chunk
    history_BxL = np.full((len(prompts), round_up(first + max_tokens, chunk)), NO_TOKEN, np.int32)
    for row, prompt in enumerate(prompts):
        history_BxL[row, first - len(prompt) : first] = prompt
    return history_BxL, first


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def round_up(n: int, unit: int) -> int:
    """Round up to a multiple of unit, by at most an eighth to one of few values: fewer shapes are compiled."""
    unit = max(unit, power_of_two(n) // 16)
    return -(-n // unit) * unit


def seeds(sampling: Sampling | Sequence[Sampling], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return uint32 [B] each: the seed and the stream number of each sequence."""
    if isinstance(sampling, Sampling):
        return np.full(rows, sampling.seed, np.uint32), np.arange(rows, dtype=np.uint32)
    return np.array([each.seed for each in sampling], np.uint32), np.zeros(rows, np.uint32)


@functools.partial(jax.jit, static_argnames="length")
def uniforms(seed_B: jax.Array, row_B: jax.Array, length: int) -> jax.Array:
    """Return float32 [B, length, 2] in [0, 1); those of a step depend on seed, stream number and step only.

    They are drawn before the loop: one token at a time, drawing them would take longer than sampling.
    """
    return jax.vmap(jax.vmap(uniform_pair, (None, None, 0)), (0, 0, None))(seed_B, row_B, jnp.arange(length))


def uniform_pair(seed: jax.Array, row: jax.Array, step: jax.Array) -> jax.Array:
    """Draw the random numbers of one generated token.

    Args:
        seed: uint32 scalar.
        row: uint32 scalar, the stream number: the index in the batch if one seed is for all sequences, else 0.
        step: int32 scalar, the index of the token in the generated text.

    Returns:
        float32 [2] in [0, 1).
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)
    return jax.random.uniform(key, (2,))


def id_mask(ids: Sequence[int], size: int) -> np.ndarray:
    """Return bool [size] that is True at the ids."""
    mask = np.zeros(size, bool)
    mask[list(ids)] = True
    return mask
