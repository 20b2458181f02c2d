"""A run taken off the disk, to generate, evaluate or export."""

from dataclasses import dataclass

import jax
from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.model.params import abstract_model
from slm_jax.model.transformer import Transformer
from slm_jax.run.checkpoint import read_params
from slm_jax.run.directory import Run, find_run
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer, TokenizerError


@dataclass(frozen=True)
class LoadedRun:
    """A run's model with what it needs."""

    run: Run
    config: Config
    tokenizer: HybridTokenizer
    model: Transformer
    step: int

    @property
    def context(self) -> int:
        """Tokens that the model was trained to look back over."""
        return self.config.train.sequence_length


def load_tokenizer(run: Run) -> HybridTokenizer:
    """The run's tokenizer. Raises UserError if it is missing or damaged."""
    try:
        return HybridTokenizer.load(run.tokenizer)
    except TokenizerError as error:
        raise UserError(str(error)) from None


def load_run(path: str | None = None, average: int = 1) -> LoadedRun:
    """The newest whole checkpoint of a run (default: the newest run in `runs/`), or the mean of the parameters of its
    newest few (average). Raises UserError."""
    run = find_run(path, trained=True)
    config = run.read_config()
    tokenizer = load_tokenizer(run)
    graph, shapes = abstract_model(config, tokenizer.vocab_size)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    params, step = read_params(run.checkpoints, target, average=average)
    return LoadedRun(run, config, tokenizer, nnx.merge(graph, params), step)
