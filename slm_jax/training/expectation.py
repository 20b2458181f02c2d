"""Expectations of a text and a model before they are trained: too much repetition, or too little training.

The rule is coarse, and its two numbers are from the literature:

- A text that is repeated up to four times is nearly as good as fresh text; after that the gain per epoch falls, and a
  large model begins to memorize it (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models",
  arXiv:2305.16264). With dropout and an early stop a small text may be read eight times (`--size auto`).
- About 20 tokens per parameter are the best use of a given amount of computation (Hoffmann et al. 2022, "Training
  Compute-Optimal Large Language Models", arXiv:2203.15556). With less text, or more of it, training still works.
"""

import math

from slm_jax.config.schema import Config, ModelConfig
from slm_jax.config.training_length import AUTO_EPOCHS, MAX_EPOCHS, TOKENS_PER_PARAMETER

_WORTH_NAMING = 1.25  # a longer run is proposed if it is at least this much longer
_ESTIMATE = 1.25  # epochs of a text whose tokens were estimated, as a multiple of the intended ones


def expectation(config: Config, text_tokens: int, steps_per_epoch: float, parameters: int, start: int = 0) -> str:
    """Return one line: tokens per parameter, epochs, what they lead to, and what to change if they do not fit.

    Args:
        config: The config of the run.
        text_tokens: Tokens of the training text.
        steps_per_epoch: Steps that read it once.
        parameters: Parameters of the model.
        start: Steps that are done. A resumed run keeps its text and model, so that no other ones are proposed.
    """
    steps = config.train.steps
    epochs = steps / steps_per_epoch
    per_parameter = text_tokens / parameters
    trained = epochs * per_parameter
    facts = (
        f"{text_tokens:,} tokens of text, {_short(per_parameter)} per parameter, are read {_short(epochs)} times "
        f"({_short(trained)} trained tokens per parameter)"
    )
    enough_epochs = max(1, math.floor(MAX_EPOCHS * steps_per_epoch))
    is_repeated = epochs > MAX_EPOCHS and per_parameter < TOKENS_PER_PARAMETER and steps > enough_epochs
    if is_repeated and _is_guarded(config) and epochs <= _ESTIMATE * AUTO_EPOCHS:
        guards = f"model.dropout {config.model.dropout:g} and train.stop_early {config.train.stop_early}"
        return f"{facts}: {guards} guard against overfitting"
    if is_repeated:
        changes = [f"--train.steps {enough_epochs} ({MAX_EPOCHS} epochs)"] if enough_epochs > start else []
        if not start:
            changes += [*_smaller(config.model), "more text"]
        if not config.train.stop_early:
            changes.append("--train.stop_early 2")
        remedy = f". To change: {', '.join(changes)}" if changes else ""
        return f"{facts}: likely to overfit{remedy}"
    is_fresh = not (config.init.from_run or config.init.from_hf)
    enough = math.ceil(TOKENS_PER_PARAMETER / per_parameter * steps_per_epoch)
    longer, reason = min((enough_epochs, f"{MAX_EPOCHS} epochs"), (enough, f"{TOKENS_PER_PARAMETER} per parameter"))
    if is_fresh and longer > _WORTH_NAMING * steps:
        verdict = "the model would probably still improve with more steps, up to about"
        return f"{facts}: {verdict} --train.steps {longer} ({reason})"
    return f"{facts}: text, model and steps fit"


def _is_guarded(config: Config) -> bool:
    """Return whether dropout and an early stop limit overfitting, and the best checkpoint is kept."""
    return bool(config.model.dropout and config.train.stop_early and config.checkpoint.keep_best)


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _smaller(model: ModelConfig) -> list[str]:
    """Return the options of a model of half the width, none where its heads would not fit."""
    dim = model.dim // 2
    if not model.head_dim and dim % (2 * model.heads):  # the width of a head must be even
        return []
    return [f"--model.dim {dim} --model.mlp_dim {model.mlp_dim // 2}"]
