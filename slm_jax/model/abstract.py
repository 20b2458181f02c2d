"""The config's model without arrays: its graph, the shapes of its parameters and the partitions that they declare.

What assembles a run starts from these: the state of a checkpoint, the memory of a step and the placement of parameters
on the devices are known before any array exists.
"""

from typing import Any

from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.distributed.partitioning import Partitions
from slm_jax.distributed.platform import Platform
from slm_jax.model import lora
from slm_jax.model.params import collect_partitions
from slm_jax.model.precision import Policy
from slm_jax.model.transformer import Transformer


def abstract_model(
    config: Config, vocab_size: int, platform: Platform | None = None, adapters: bool = False
) -> tuple[nnx.GraphDef, Any]:
    """Return the graph and the abstract parameters of the config's Transformer, without creating any array.

    Args:
        config: The config.
        vocab_size: Entries of the tokenizer's vocabulary.
        platform: The hardware that the model runs on; None: JAX's first device.
        adapters: Include the adapters of `config.lora`, if it has any.

    Returns:
        (graph, params): `nnx.merge(graph, arrays)` is the model; params is a pure dict of `jax.ShapeDtypeStruct`.
    """
    graph, params = nnx.split(_abstract_transformer(config, vocab_size, platform, adapters), nnx.Param)
    return graph, nnx.to_pure_dict(params)


def declared_partitions(config: Config, vocab_size: int) -> Partitions:
    """Return the partition that each parameter of the config's Transformer declares, by its path; adapters as well."""
    return collect_partitions(_abstract_transformer(config, vocab_size, adapters=True))


def _abstract_transformer(
    config: Config, vocab_size: int, platform: Platform | None = None, adapters: bool = False
) -> Transformer:
    policy = Policy.choose(config, platform)

    def create() -> Transformer:
        model = Transformer(config.model, vocab_size, policy=policy, rngs=nnx.Rngs(0))
        if adapters and config.lora.rank:
            lora.attach(model, config.lora)
        return model

    return nnx.eval_shape(create)
