"""Messages about a validation loss that rises, with what helps against it."""

from slm_jax.config.schema import Config
from slm_jax.run.trend import Trend


def rise_text(config: Config, trend: Trend, train_loss: float | None) -> str:
    """Return the warning about a validation that has become worse than the best one.

    The training loss tells the two causes apart: where it is below the lowest validation loss, the model seems to
    memorize its text; otherwise training itself does not progress.

    Args:
        config: The config of the run.
        trend: The validations so far, which have risen.
        train_loss: Loss of the newest training step, None if it was skipped.
    """
    assert trend.newest is not None
    assert trend.best is not None
    newest, best = trend.newest, trend.best
    value = "is not finite" if newest.loss is None else f"rises: {newest.loss:.3f}"
    text = f"validation loss {value} at step {newest.step}, after {best.loss:.3f} at step {best.step}"
    if config.checkpoint.keep_best:
        text += " (kept)"
    if train_loss is None or best.loss is None or train_loss >= best.loss:
        return f"{text}; the training loss does not fall either: try a lower --optimizer.lr (now {config.optimizer.lr})"
    memorizes = f"the model seems to memorize its text (training loss {train_loss:.3f})"
    return f"{text}; {memorizes}. What helps: {remedies(best.step, config)}"


def remedies(step: int, config: Config) -> str:
    """Return the remedies for overfitting as text.

    Args:
        step: The step of the best validation.
        config: The config of the run.
    """
    dropout = min(config.model.dropout + 0.1, 0.5)
    stop = "" if config.train.stop_early else ", or --train.stop_early 2"
    changes = f"fewer steps (--train.steps {step}{stop}), --model.dropout {dropout:.1f}"
    if config.init.from_run or config.init.from_hf:  # the size of the model is that of its initial weights
        return f"{changes}, or more text"
    return f"{changes}, more text, a smaller model, or a trained one as the base (--init.from_run)"
