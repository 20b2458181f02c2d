"""Direct preference optimization (DPO, arXiv:2305.18290): the loss of pairs of a chosen and a rejected response.

With the log-probability π of a response under the model and ρ under the frozen reference, each summed over the tokens
of the response, the loss of a pair is

    -log σ(m),   m = β ((π_chosen - ρ_chosen) - (π_rejected - ρ_rejected))

β (π - ρ) is the reward of a response, and m the margin. The reference's values are constants of a batch: they are
computed once (`reference`).

A batch has a row for each pair, [B, 2 T]: the chosen conversation, then the rejected one, each padded to T tokens. The
model computes them as 2 B sequences, side by side.

Shapes: B pairs, N = 2 B sequences, T tokens, D dim, V vocabulary, C tokens of a chunk, S chunks.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.model import ops
from slm_jax.model.transformer import Transformer
from slm_jax.utils.batch import IGNORE_INDEX, Batch

REFERENCE = "reference"
"""Name of the reference's log-probabilities in a batch, float32 [B, 2]."""

_LOGIT_BYTES = 1 << 28  # logits that exist at a time; those of other chunks are computed again in the backward pass


class PreferenceSums(NamedTuple):
    """Sums over pairs, float32 scalars; divide by `pairs` for means.

    Attributes:
        loss: The loss, in nats.
        correct: Pairs with a positive margin.
        chosen: Rewards of the chosen responses.
        rejected: Rewards of the rejected responses.
        pairs: Number of pairs.
        tokens: Tokens of all responses.
        chosen_nll: Negative log-probabilities of the chosen responses, in nats.
        chosen_tokens: Tokens of the chosen responses.
    """

    loss: jax.Array
    correct: jax.Array
    chosen: jax.Array
    rejected: jax.Array
    pairs: jax.Array
    tokens: jax.Array
    chosen_nll: jax.Array
    chosen_tokens: jax.Array

    @classmethod
    def zeros(cls) -> "PreferenceSums":
        """Return the sums over no pairs."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    @property
    def divisor(self) -> jax.Array:
        """The divisor of the means."""
        return self.pairs

    def metrics(self) -> dict[str, jax.Array]:
        """Return the means by name."""
        count = jnp.maximum(self.pairs, 1.0)
        return {
            "loss": self.loss / count,
            "accuracy": self.correct / count,
            "margin": (self.chosen - self.rejected) / count,
            "chosen_reward": self.chosen / count,
            "rejected_reward": self.rejected / count,
        }


def sequences(batch: Batch) -> Batch:
    """Return the 2 B sequences of a batch of pairs, each [N, T]: a chosen one, then the rejected one of its pair."""
    rows = {name: x for name, x in batch.items() if name != REFERENCE}
    return {name: x.reshape(2 * len(x), -1) for name, x in rows.items()}


def response_log_probabilities(model: Transformer, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
    """Return the log-probability of each response, summed over its tokens, float32 [B, 2].

    Args:
        model: The model.
        batch: A batch of pairs.
        dropout_key: Keys of the pairs, [B]; None disables dropout.
    """
    rows = sequences(batch)
    keys_N = None if dropout_key is None else jax.vmap(jax.random.split)(dropout_key).reshape(-1)
    x_NxTxD = model.hidden(rows["input_ids"], rows["attention_mask"], dropout_key=keys_N)
    head_VxD = model.head_weight()
    count, length, dim = x_NxTxD.shape
    chunks = min(length, math.ceil(4 * count * length * len(head_VxD) / _LOGIT_BYTES))
    padding = (0, -length % chunks)
    x_NxTxD = jnp.pad(x_NxTxD, ((0, 0), padding, (0, 0)))
    labels_NxT = jnp.pad(rows["labels"], ((0, 0), padding), constant_values=IGNORE_INDEX)
    x_SxNxCxD = x_NxTxD.reshape(count, chunks, -1, dim).swapaxes(0, 1)
    labels_SxNxC = labels_NxT.reshape(count, chunks, -1).swapaxes(0, 1)

    @jax.checkpoint
    def add_chunk(total_N: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x_NxCxD, labels_NxC = chunk
        logits_NxCxV = ops.matmul(x_NxCxD.astype(jnp.float32), head_VxD.T, model.dtype, model.platform)
        logits_NxCxV = ops.cap_logits(logits_NxCxV[..., : model.vocab_size], model.logit_softcap)
        log_p_NxCxV = jax.nn.log_softmax(logits_NxCxV)
        valid_NxC = labels_NxC != IGNORE_INDEX
        of_label_NxC = jnp.take_along_axis(log_p_NxCxV, jnp.where(valid_NxC, labels_NxC, 0)[..., None], axis=-1)[..., 0]
        return total_N + jnp.sum(jnp.where(valid_NxC, of_label_NxC, 0.0), axis=-1), None

    total_N, _ = jax.lax.scan(add_chunk, jnp.zeros(count, jnp.float32), (x_SxNxCxD, labels_SxNxC))
    return total_N.reshape(-1, 2)


class Preference(NamedTuple):
    """The DPO objective, see `training.objective.Objective`.

    Attributes:
        beta: Factor of the log-ratios: the smaller, the farther the model may move away from the reference.
    """

    beta: float

    def sums(self, model: Transformer, batch: Batch, dropout_key: jax.Array | None = None) -> PreferenceSums:
        """Return the sums of the DPO loss over a batch of pairs.

        Args:
            model: The model.
            batch: int32 arrays [B, 2 T], and the reference's log-probabilities; rows without labels are padding.
            dropout_key: Keys of the pairs, [B]; None disables dropout.
        """
        with jax.named_scope("loss"):
            policy_Bx2 = response_log_probabilities(model, batch, dropout_key)
            reward_Bx2 = self.beta * (policy_Bx2 - batch[REFERENCE])
            margin_B = reward_Bx2[:, 0] - reward_Bx2[:, 1]
            is_response_BxT = batch["labels"] != IGNORE_INDEX
            valid_B = jnp.any(is_response_BxT, axis=1).astype(jnp.float32)
            return PreferenceSums(
                loss=-jnp.sum(valid_B * jax.nn.log_sigmoid(margin_B)),
                correct=jnp.sum(valid_B * (margin_B > 0)),
                chosen=jnp.sum(valid_B * reward_Bx2[:, 0]),
                rejected=jnp.sum(valid_B * reward_Bx2[:, 1]),
                pairs=jnp.sum(valid_B),
                tokens=jnp.sum(is_response_BxT, dtype=jnp.float32),
                chosen_nll=-jnp.sum(valid_B * policy_Bx2[:, 0]),
                chosen_tokens=jnp.sum(is_response_BxT[:, : is_response_BxT.shape[1] // 2], dtype=jnp.float32),
            )

    def zero_sums(self) -> PreferenceSums:
        """Return zero-initialized sums."""
        return PreferenceSums.zeros()

    def sequences(self, batch: Batch) -> Batch:
        """Return the 2 B sequences of a batch of pairs."""
        return sequences(batch)

    def without_additions(self) -> "Preference":
        """Return self: DPO has no auxiliary terms."""
        return self
