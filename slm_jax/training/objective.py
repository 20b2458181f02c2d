"""The objective of training: its interface, and next-token prediction. Preferences are in dpo/.

Shapes: B sequences, T tokens, D dim, V vocabulary.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from slm_jax.model import ops
from slm_jax.model.transformer import Transformer
from slm_jax.utils.batch import Batch
from tokenizer.vocabulary import SPECIAL_TOKENS

_EOS_ID = SPECIAL_TOKENS.index("<EOS>")


class Objective(Protocol):
    """The loss of a batch, and the form of its rows.

    Sums are a NamedTuple of float32 scalars with `loss`, `tokens`, the `divisor` of the means, and `metrics()`: such as
    `ops.LossSums`.
    """

    def sums(self, model: Transformer, batch: Batch, dropout_key: jax.Array | None = None) -> Any:
        """Return the sums over a batch.

        Args:
            model: The model.
            batch: int32 arrays with B rows, see `utils.batch`.
            dropout_key: Key of the dropout masks, or the keys of the rows, [B]; None disables dropout.
        """

    def zero_sums(self) -> Any:
        """Return zero-initialized sums."""

    def sequences(self, batch: Batch) -> Batch:
        """Return a batch with one sequence in each row, as the model computes it."""

    def without_additions(self) -> "Objective":
        """Return the validation objective, without auxiliary loss terms."""


class NextToken(NamedTuple):
    """Next-token prediction.

    Attributes:
        weights: Weights of the terms added to the cross entropy.
    """

    weights: ops.LossWeights = ops.LossWeights()

    def sums(self, model: Transformer, batch: Batch, dropout_key: jax.Array | None = None) -> ops.LossSums:
        """Return `loss_sums`."""
        return loss_sums(model, batch, self.weights, dropout_key)

    def zero_sums(self) -> ops.LossSums:
        """Return zero-initialized sums."""
        return ops.LossSums.zeros()

    def sequences(self, batch: Batch) -> Batch:
        """Return the batch."""
        return batch

    def without_additions(self) -> "NextToken":
        """Return plain cross entropy."""
        return NextToken()


def loss_sums(
    model: Transformer,
    batch: Batch,
    weights: ops.LossWeights = ops.LossWeights(),
    dropout_key: jax.Array | None = None,
) -> ops.LossSums:
    """Return the sums of the next-token loss over a batch; hidden state t is scored against labels[:, t].

    Args:
        model: The model.
        batch: int32 arrays [B, T], see `utils.batch`.
        weights: Weights of the terms added to the cross entropy.
        dropout_key: Key of the dropout masks, or the keys of the rows, [B]; None disables dropout.
    """
    x_BxTxD = model.hidden(
        batch["input_ids"],
        batch.get("attention_mask"),
        batch.get("segment_ids"),
        batch.get("positions"),
        dropout_key=dropout_key,
    )
    context = None
    if weights.ul_alpha:
        # A document begins with the <EOS> before it: in packed windows, too, no other document is looked back on.
        segments_BxT = batch.get("segment_ids")
        if segments_BxT is None:
            segments_BxT = jnp.cumsum(batch["input_ids"] == _EOS_ID, axis=-1, dtype=jnp.int32)
        context = ops.ContextTokens.from_batch(batch["input_ids"], batch.get("attention_mask"), segments_BxT)
    head_VxD = model.head_weight()
    rest = (model.dtype, weights, context, model.vocab_size, model.platform, model.logit_softcap)
    with jax.named_scope("loss"):
        return ops.cross_entropy(x_BxTxD, head_VxD, batch["labels"], *rest)
