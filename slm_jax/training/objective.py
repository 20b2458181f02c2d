"""The objectives of training: next-token prediction, and preferences (dpo.py).

An objective is described by `ops.LossWeights` or `dpo.Preference`; its sums over a batch have `loss`, `tokens`, the
`divisor` of the means, and `metrics()`.

Shapes: B sequences, T tokens, D dim, V vocabulary.
"""

import jax
import jax.numpy as jnp

from slm_jax.config.schema import TrainConfig
from slm_jax.model import ops
from slm_jax.model.transformer import Transformer
from slm_jax.training import dpo
from slm_jax.utils.batch import Batch
from tokenizer.vocabulary import SPECIAL_TOKENS

_EOS_ID = SPECIAL_TOKENS.index("<EOS>")


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


Objective = ops.LossWeights | dpo.Preference
Sums = ops.LossSums | dpo.PreferenceSums


def make_objective(config: TrainConfig) -> Objective:
    """Return the objective of a config."""
    if config.objective == "dpo":
        return dpo.Preference(config.dpo_beta)
    return ops.LossWeights(config.z_loss, config.ul_alpha)


def validation_objective(config: TrainConfig) -> Objective:
    """Return the objective of a config without additional terms."""
    return make_objective(config) if config.objective == "dpo" else ops.LossWeights()


def objective_sums(
    model: Transformer, batch: Batch, objective: Objective, dropout_key: jax.Array | None = None
) -> Sums:
    """Return the sums of an objective over a batch; arguments as of `loss_sums`."""
    if isinstance(objective, dpo.Preference):
        return dpo.preference_sums(model, batch, objective, dropout_key)
    return loss_sums(model, batch, objective, dropout_key)


def zero_sums(objective: Objective) -> Sums:
    """Return the sums of an objective over nothing."""
    kind = dpo.PreferenceSums if isinstance(objective, dpo.Preference) else ops.LossSums
    return kind(*(jnp.zeros(()) for _ in kind._fields))


def sequences(batch: Batch, objective: Objective) -> Batch:
    """Return a batch with one sequence in each row, as the model computes it."""
    return dpo.sequences(batch) if isinstance(objective, dpo.Preference) else batch
