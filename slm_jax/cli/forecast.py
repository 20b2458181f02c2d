"""Expected time and bits per byte of `--size auto`, before training, and their comparison with the run afterwards."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slm_jax.cli.dial import bytes_of_text
from slm_jax.config.rule import text_tokens
from slm_jax.config.schema import Config
from slm_jax.config.small_text import ExpectedBits, expected_bits
from slm_jax.performance import flops
from slm_jax.training.result import Result
from slm_jax.utils.formatting import duration, text_size

# The steps may take this many times the expected time: the share of the peak that they reach depends on the shape, and
# other programs may use the machine. It was 1.0 to 1.5 times for 0.9 to 1.2 M parameters on one core.
_TIMES = (0.8, 1.8)
_FORWARD = 1 / 3  # share of a training step's FLOPs that validation needs for a token


@dataclass(frozen=True)
class Forecast:
    """Expectations of a run of `--size auto`.

    Attributes:
        text_bytes: Bytes of the training text, as known before it is read.
        bits: Bits per byte of held-out text.
        seconds: Time of all steps with their validations, if the run does not stop early; NaN: not estimated.
        is_tuned: The run starts with trained weights, which the measured runs did not.
    """

    text_bytes: int
    bits: ExpectedBits
    seconds: float
    is_tuned: bool

    def lines(self) -> Iterator[str]:
        """Yield what to expect, in words."""
        if math.isfinite(self.seconds):
            low, high = (duration(factor * self.seconds) for factor in _TIMES)
            yield (
                f"expected time: {low} to {high} for all steps on this machine, by their FLOPs and the measured peak; "
                "preparing the text and compiling come on top, an early stop saves time"
            )
        tuned = "; with a base model for such text fewer" if self.is_tuned else ""
        yield (
            f"expected score: {self.bits.low:.2f} to {self.bits.high:.2f} bits per byte of held-out text with the "
            f"options of the rule, if your {text_size(self.text_bytes)} are like the measured texts: "
            f"{self.bits.source}{tuned}"
        )

    def comparison(self, result: Result) -> Iterator[str]:
        """Yield how a run compares with what was expected.

        Args:
            result: What `train` returned for the finished run.
        """
        best = result.trend.best
        if best is not None and best.bits_per_byte is not None:
            bits = best.bits_per_byte
            low, high = self.bits.low, self.bits.high
            relation = "below" if bits < low else "above" if bits > high else "within"
            yield f"Expected: {low:.2f} to {high:.2f} bits per byte; {bits:.2f} is {relation} this range."
        if math.isfinite(self.seconds) and "seconds" in result.metrics:
            times = " to ".join(duration(factor * self.seconds) for factor in _TIMES)
            yield f"Expected time of all steps: {times}; they took {duration(result.metrics['seconds'])}."


def make_forecast(config: Config, speed: Callable[[Config], float] | None = None) -> Forecast | None:
    """Return what to expect of a run; None if the size of its text is not known, as that of compressed files.

    Args:
        config: Its options, which `--size auto` has chosen.
        speed: Returns the model FLOPs per second of this machine; None: the time is not estimated.
    """
    train = config.train
    text_bytes = bytes_of_text(config.model_dump()["data"], {})
    if not text_bytes:
        return None
    seconds = math.nan
    if speed is not None and not train.minutes:
        vocab_size = config.tokenizer.vocab_size
        per_token = flops.token_flops(config.model, vocab_size, train.sequence_length, config.lora)
        held_out = config.data.validation_fraction / (1 - config.data.validation_fraction)
        validated = (
            _FORWARD * math.ceil(train.steps / config.eval.every) * text_tokens(held_out * text_bytes, vocab_size)
        )
        tokens = train.steps * train.batch_size * train.sequence_length + validated
        seconds = float(per_token.at()) * tokens / speed(config)
    return Forecast(text_bytes, expected_bits(text_bytes), seconds, bool(config.init.from_run))
