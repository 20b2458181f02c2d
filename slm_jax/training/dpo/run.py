"""The additions of a DPO run to an ordinary one: batches of pairs, the reference, and the validation of both."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from slm_jax.config.schema import Config, LoraConfig
from slm_jax.data.batches.pairs import PairBatches
from slm_jax.data.corpus.corpus import Corpus
from slm_jax.data.pairs import Pairs, open_pairs
from slm_jax.distributed import agreement, sharding
from slm_jax.distributed.platform import Platform
from slm_jax.model import lora
from slm_jax.model.abstract import abstract_model
from slm_jax.model.precision import Policy, describe_precision
from slm_jax.run.directory import Run
from slm_jax.run.frozen import base_fingerprint, missing_base_error, read_base
from slm_jax.run.metrics import Row
from slm_jax.training.dpo import loss as dpo
from slm_jax.training.dpo.reference import LogProbabilities, reference_log_probabilities
from slm_jax.training.steps import Steps, in_mesh, make_steps
from slm_jax.utils.batch import Arrays, Batch
from slm_jax.utils.text_tokenizer import TextTokenizer


def open_pair_batches(config: Config, run: Run, corpus: Corpus, tokenizer: TextTokenizer) -> PairBatches:
    """Return the training batches of a DPO run; the first process makes its pairs, the others open them.

    Raises:
        UserError: The source of the run has no pairs, or they are too long.
    """
    opened: list[Pairs] = []

    def open_once() -> Pairs:
        if not opened:
            opened.append(open_pairs(run.pairs, config, corpus, tokenizer))
        return opened[0]

    agreement.from_first("preference pairs", lambda: open_once().fingerprint)
    agreement.require_same(
        "the pairs", lambda: {"pairs": open_once().fingerprint}, "all hosts must see the same file system"
    )
    return PairBatches(opened[0], config.train.batch_size, config.train.sequence_length, config.train.seed)


def set_reference(batches: PairBatches, config: Config, run: Run, vocab_size: int, mesh: jax.sharding.Mesh) -> None:
    """Set the log-probabilities of the reference in the batches of a run; compute those that the run has not stored.

    The reference is the model of step 0: the frozen weights in the folder of the checkpoints.

    Args:
        batches: The batches.
        config: The config, with the microbatch that fits into memory.
        run: The run.
        vocab_size: Entries of the tokenizer's vocabulary.
        mesh: The devices.

    Raises:
        UserError: The frozen weights are missing, or they are damaged and values are missing.
    """
    weights = agreement.from_first("frozen weights", lambda: base_fingerprint(run.checkpoints))
    if not weights:  # before what was computed with them is taken for that of other weights
        raise missing_base_error(run.checkpoints)
    depends_on = {
        "weights": weights,
        "pairs": batches.rows.pairs.fingerprint,
        "length": config.train.sequence_length,
        "precision": describe_precision(config, Platform.of_mesh(mesh)).partition(" (")[0],
    }
    rows = config.train.batch_size // config.train.grad_accum_steps
    make = functools.partial(_reference_model, config, run, vocab_size, mesh)
    batches.reference = reference_log_probabilities(run.reference, batches, json.dumps(depends_on), rows, make)


def _reference_model(config: Config, run: Run, vocab_size: int, mesh: jax.sharding.Mesh) -> LogProbabilities:
    """Load the frozen weights, and compile the log-probabilities of a batch under them."""
    plain = config.model_copy(update={"lora": LoraConfig()})
    steps = make_steps(plain, vocab_size, mesh)
    policy = Policy.choose(plain, Platform.of_mesh(mesh))
    # Matrices have the dtype of the products, which round them to it anyway: the training state needs the memory.
    shapes = jax.eval_shape(lambda params: lora.freeze(params, policy), abstract_model(plain, vocab_size)[1])
    weights = read_base(run.checkpoints, sharding.abstract_arrays(mesh, shapes, steps.partitions))

    def log_probabilities(weights: Any, batch: Batch) -> jax.Array:
        return dpo.response_log_probabilities(steps.model(weights), batch)

    compiled = jax.jit(in_mesh(functools.partial(log_probabilities), mesh), out_shardings=sharding.replicated(mesh))

    def compute(batch: Arrays) -> np.ndarray:
        return np.asarray(compiled(weights, sharding.shard_batch(mesh, batch)))

    return compute


def pair_validation(
    config: Config, batches: PairBatches, corpus: Corpus, steps: Steps, mesh: jax.sharding.Mesh
) -> Callable[[Any], Row]:
    """Return a function from weights to their scores on the held-out pairs.

    The scores: `val_loss`, `val_accuracy` (of preferences), `val_margin`, `val_chosen_reward`, `val_rejected_reward`;
    and of the chosen responses as text, `val_perplexity` and `val_bits_per_byte`.
    """
    rows = config.train.batch_size // config.train.grad_accum_steps
    num_bytes, num_tokens = corpus.validation.num_bytes, _predicted_tokens(corpus)

    def validate(weights: Any) -> Row:
        total = np.zeros(len(dpo.PreferenceSums._fields))
        for batch in batches.validation_batches(rows, config.eval.max_tokens):
            total += np.array(steps.evaluate(weights, sharding.shard_batch(mesh, batch)), np.float64)
        sums = dpo.PreferenceSums(*total)  # of NumPy, added up in float64
        means = {f"val_{name}": float(value) for name, value in sums.metrics().items()}
        nats = float(sums.chosen_nll) / float(sums.chosen_tokens)
        bits = nats / math.log(2) * num_tokens / num_bytes  # bytes of a token on average
        return means | {"val_perplexity": math.exp(min(nats, 700.0)), "val_bits_per_byte": bits}

    return validate


def _predicted_tokens(corpus: Corpus) -> int:
    """Return the number of held-out tokens that are predicted."""
    mask = corpus.validation.prompt_mask(0, len(corpus.validation))
    return len(corpus.validation) - (0 if mask is None else int(mask.sum()))
