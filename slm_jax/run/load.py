"""Load the model of a run, to generate, evaluate or export."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from slm_jax.config.schema import Config
from slm_jax.model import lora, lora_merge
from slm_jax.model.abstract import abstract_model
from slm_jax.model.precision import compute_dtype
from slm_jax.model.transformer import Transformer
from slm_jax.run.directory import Run, find_run
from slm_jax.run.frozen import read_merged
from slm_jax.run.read_checkpoint import read_params
from slm_jax.run.selection import Step, regular_steps, select_checkpoint
from slm_jax.utils import tokenizer_loading
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import TokenizerError


@dataclass(frozen=True)
class LoadedRun:
    """A model with its run.

    Attributes:
        run: The run directory.
        config: The config that it was trained with.
        tokenizer: Its tokenizer.
        model: The model on the first device, with float32 parameters; adapters (LoRA) are merged into them.
        step: The step of the checkpoint that the parameters are from; the newest one, if several were averaged.
        step_text: That step among the checkpoints of the run: "step 125 (best; last is 300)".
    """

    run: Run
    config: Config
    tokenizer: TextTokenizer
    model: Transformer
    step: int
    step_text: str = ""

    @property
    def context(self) -> int:
        """Number of tokens that the model was trained on at once, `train.sequence_length`."""
        return self.config.train.sequence_length


def load_tokenizer(run: Run) -> TextTokenizer:
    """Return the tokenizer of a run.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        return tokenizer_loading.load_tokenizer(run.tokenizer)
    except TokenizerError as error:
        raise UserError(str(error)) from None


def load_run(path: str | None = None, average: int = 1, step: Step = None) -> LoadedRun:
    """Load a checkpoint of a run.

    Args:
        path: The run directory, or a curriculum, which stands for its newest stage; None: the newest run in `runs/`.
        average: Number of newest checkpoints whose parameters are averaged, without an older one that is kept as
            the best; above 1, `step` must be None or "last".
        step: "best" (fewest validation bits per byte), "last", or the number of a step. None: the best checkpoint if
            the newest validation is not the best one, otherwise the last checkpoint. Where the chosen one is corrupt,
            the next best or the one before is used, with a warning; that of a given number is an error.

    Returns:
        The model with its config and tokenizer.

    Raises:
        UserError: There is no such run or checkpoint, it has not enough valid checkpoints, or a step was given together
            with `average`.
    """
    run = find_run(path, trained=True)
    config = run.read_config()
    tokenizer = load_tokenizer(run)
    if average > 1 and step not in (None, "", "last"):
        raise UserError(
            f"--average {average} is of the newest checkpoints: leave out --step {step}, or give --average 1"
        )
    selection = select_checkpoint(run, "last" if average > 1 else step)
    graph, shapes = abstract_model(config, tokenizer.vocab_size)
    target = _on_first_device(shapes)
    candidates = selection.candidates if average == 1 else regular_steps(selection.candidates, config.checkpoint)
    compute = compute_dtype(config.train.dtype)
    params, used = read_merged(run.checkpoints, config, target, average, candidates, compute)
    text = selection.describe(used) if average == 1 else f"mean of {average} checkpoints up to step {used}"
    return LoadedRun(run, config, tokenizer, nnx.merge(graph, params), used, text)


def load_adapters(run: Run, config: Config, step: Step = None) -> tuple[lora.Params, str]:
    """Load the adapters of a LoRA run.

    Args:
        run: The run.
        config: Its config.
        step: The checkpoint, see `load_run`.

    Returns:
        The adapters on the first device, see `lora.init_adapters`, and the step among the checkpoints of the run.

    Raises:
        UserError: There is no usable checkpoint.
    """
    selection = select_checkpoint(run, step)
    _, shapes = abstract_model(config, load_tokenizer(run).vocab_size)
    adapters = lora_merge.abstract_adapters(_on_first_device(shapes), config.lora)
    params, used = read_params(
        run.checkpoints, adapters, steps=selection.candidates, moving_average=bool(config.optimizer.average_decay)
    )
    return params, selection.describe(used)


def _on_first_device(shapes: Any) -> Any:
    """Return shapes with the sharding of arrays on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
