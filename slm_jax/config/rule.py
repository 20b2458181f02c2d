"""The rule behind `--size` and `--budget`: from a number of parameters and a budget to the options of a run.

Each value has its reason in one line. The constants at the top of the file, in small_text.py and in training_length.py,
are what is known today, in the comment beside each: "measured" names what was compared, everything else is a convention
or from the literature. Options that are given are kept, and the others follow from them: with `--model.depth 6` the
width is chosen for six blocks.

The shape itself is in `shape.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slm_jax.config.shape import (
    UNUSUAL_MLP_RATIO,
    Shape,
    choose_shape,
    shape_reasons,
    smallest,
    smooth_flops_per_token,
)
from slm_jax.config.small_text import AUTO_DROPOUT, AUTO_STOP_EARLY, TUNED_EPOCHS, TUNED_LR_SCALE, auto_parameters
from slm_jax.config.training_length import AUTO_EPOCHS, MAX_EPOCHS, TOKENS_PER_PARAMETER
from slm_jax.utils.errors import UserError

MIN_STEPS = 300  # a shorter run takes smaller batches instead; see AUTO_EPOCHS

# Vocabulary of a learned tokenizer: VOCABULARY · (parameters / VOCABULARY_AT)^VOCABULARY_POWER.
VOCABULARY = 2048  # as many as quickstart has at 1.7 M
VOCABULARY_AT = 2.2e6
VOCABULARY_POWER = 0.7  # about the 16,384 of gpu_30m and the 32,768 of gpu_125m; not measured
VOCABULARY_MULTIPLE = 128  # suits matrix units
MIN_VOCABULARY = 512
MAX_VOCABULARY = 32_768
BYTES_PER_ENTRY = 200  # a small text has no more entries worth learning than its bytes divided by this; not measured
# UTF-8 bytes per token, to estimate the tokens of a text: measured on Python's documentation with 2,048 entries, and on
# English news with 512 (2.12) and 1,280 (3.02).
BYTES_PER_TOKEN = 3.4
BYTES_PER_TOKEN_PER_DOUBLING = 0.25  # above that vocabulary; not measured
BYTES_PER_TOKEN_PER_HALVING = 0.6  # below it
MIN_BYTES_PER_TOKEN = 1.2

# Tokens of a sequence, by the smallest number of parameters that has them; those of the presets, not measured.
SEQUENCE_LENGTHS = ((0, 128), (1.5e6, 256), (5e6, 512), (25e6, 1024), (700e6, 2048))

# Tokens of a batch: BATCH_TOKENS · (training tokens / BATCH_AT)^BATCH_POWER.
BATCH_TOKENS = 4096  # that of quickstart; half of it was no better in equal time
BATCH_AT = 2.0e6
BATCH_POWER = 0.5  # the critical batch grows as tokens^0.47 (arXiv:2410.21676)

# Peak learning rate: LR · (width / LR_WIDTH)^-LR_WIDTH_POWER · (tokens of a batch / LR_BATCH)^LR_BATCH_POWER ·
# (steps / LR_STEPS)^-LR_STEPS_POWER. Measured with Muon (tests/benchmarks/rule.py) at widths 64 to 384, batches of 128
# to 2,048 tokens, 300 and 1,200 steps, on two texts; the rest is extrapolated. At depths 2 to 8 the best were 0.0049
# to 0.0064: no power of the depth. The powers of the fit are 0.81 ± 0.25, 0.14 ± 0.09 and 0.54 ± 0.14; these are round
# numbers within two standard errors, whose rate at width 768 is near a published one: 0.0036, which is 0.02 for
# orthogonal matrices (github.com/karpathy/nanochat).
LR = {"muon": 0.005, "normuon": 0.005, "adamw": 0.0005}  # normuon and adamw: not measured
LR_WIDTH = 128
LR_WIDTH_POWER = 0.75
LR_BATCH = 512
LR_BATCH_POWER = 0.25
LR_STEPS = 300
LR_STEPS_POWER = 0.33

# Learning rates of groups of parameters as multiples of LR, and initial weights: the defaults of the options.
EMBEDDING_LR_SCALE = 1.0
HEAD_LR_SCALE = 1.0  # of an untied head
VECTOR_LR_SCALE = 1.0
INIT_STD = 0.02
OUTPUT_INIT = "normal"

# Schedule.
WARMUP_STEPS = 10  # warm-up: WARMUP_STEPS + WARMUP_FRACTION of the steps; 20 of 500
WARMUP_FRACTION = 0.02
DECAY_FRACTION = 0.5  # quickstart's
WEIGHT_DECAY = 0.1  # the default of most recipes (arXiv:2005.14165)

# Intervals.
VALIDATIONS = 8  # validations and checkpoints of a run
MAX_INTERVAL = 1000  # steps between two of them

# Everything that the rule may decide, besides data.max_tokens of a preset.
OPTIONS = (
    *("tokenizer.vocab_size", "model.dim", "model.depth", "model.heads", "model.kv_heads", "model.head_dim"),
    *("model.mlp_dim", "model.mlp_multiple", "train.sequence_length", "train.batch_size", "train.steps"),
    *(
        "model.dropout",
        "train.stop_early",
        "model.init_std",
        "model.output_init",
        "train.minutes",
        "optimizer.name",
        "optimizer.lr",
    ),
    *("optimizer.embedding_lr_scale", "optimizer.head_lr_scale", "optimizer.vector_lr_scale"),
    *("optimizer.warmup_steps", "optimizer.schedule"),
    *("optimizer.decay_fraction", "optimizer.weight_decay", "eval.every", "checkpoint.every"),
)


@dataclass(frozen=True)
class Choice:
    """Value of an option, and why it has it."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Request:
    """Input of the rule; at least one of `parameters`, `flops` and `tokens` is given.

    Attributes:
        parameters: Parameters of the model; 0: they follow from the budget.
        auto: The parameters follow from `text_bytes`, and the text is read AUTO_EPOCHS times.
        tuned: The weights are trained ones: the shape is among `given`, and the text is read TUNED_EPOCHS times.
        flops: Model FLOPs of the training; 0: no such budget.
        tokens: Training tokens; 0: no such budget.
        minutes: Time that `flops` was estimated from; 0: none. The steps are fixed by a speed trial then.
        text_bytes: Bytes of the training text; 0: not known.
        vocab_size: Entries of an existing tokenizer; 0: one is learned.
        bytes_per_token: That of an existing tokenizer on this text; 0: not known.
        given: Options by dotted name that are kept as they are.
    """

    parameters: float = 0
    auto: bool = False
    tuned: bool = False
    flops: float = 0
    tokens: float = 0
    minutes: float = 0
    text_bytes: int = 0
    vocab_size: int = 0
    bytes_per_token: float = 0
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Output of the rule.

    Attributes:
        options: Every option that the rule decides, by dotted name; given ones are not among them.
        parameters: Parameters of the model.
        tokens: Training tokens, all steps together.
        flops: Model FLOPs of the training.
        notes: Further remarks, one line each.
    """

    options: dict[str, Choice]
    parameters: int
    tokens: int
    flops: float
    notes: tuple[str, ...]


def make_recipe(request: Request) -> Recipe:
    """Return the options of a run.

    Args:
        request: What is asked for.

    Raises:
        UserError: The size is too small for its vocabulary, or the budget for a single step.
    """
    return _Builder(request).build()


class _Builder:
    """Decides option by option; later ones depend on earlier ones."""

    def __init__(self, request: Request):
        """Start with the given options.

        Args:
            request: What is asked for.
        """
        self._request = request
        self._given = dict(request.given)
        self._options: dict[str, Choice] = {}
        self._notes: list[str] = []
        self._is_limited_by_text = False  # the tokens are those of the text, not those of a budget or a size

    def build(self) -> Recipe:
        """Return the recipe."""
        target = self._request.parameters or self._target()
        vocab_size = self._vocabulary(target)
        length = self._choose(
            "train.sequence_length", sequence_length(target), f"tokens of a sequence at {_short(target)} parameters"
        )
        shape = choose_shape(target, vocab_size, self._given)
        if "model.mlp_dim" not in self._given and shape.mlp_ratio > UNUSUAL_MLP_RATIO:
            self._notes.append(
                f"the inner width is {shape.mlp_ratio:.0f} times the width, where about 3 is usual: another "
                "--model.dim or --model.depth gives a more usual shape"
            )
        for name, (value, reason) in shape_reasons(shape).items():
            self._choose(name, value, reason)
        tokens, reason = self._tokens(shape, length)
        batch_size, steps = self._batch_and_steps(tokens, length, reason, shape)
        self._optimizer(shape, batch_size * length, steps)
        self._intervals(steps)
        total = steps * batch_size * length
        if self._request.auto:
            self._small_text(total / self._text_tokens(shape.vocab_size))
        return Recipe(self._options, shape.parameters, total, total * shape.flops_per_token(length), tuple(self._notes))

    def _choose(self, name: str, value: Any, reason: str) -> Any:
        """Return the given value of an option, otherwise record and return that of the rule."""
        if name in self._given:
            return self._given[name]
        self._options[name] = Choice(value, reason)
        return value

    def _target(self) -> float:
        """Return the parameters that follow from the text, or from the budget."""
        if self._request.auto:
            return auto_parameters(self._request.text_bytes)
        return self._compute_optimal()

    def _small_text(self, epochs: float) -> None:
        """Choose what keeps a model from learning a small text by heart.

        Args:
            epochs: How often the text is read, by the estimate of its tokens.
        """
        reads = f"the text is read about {_short(epochs)} times"
        if round(epochs, 1) > MAX_EPOCHS:  # whole steps may exceed the epochs that were asked for a little
            self._choose("model.dropout", AUTO_DROPOUT, f"{reads}, more than {MAX_EPOCHS}")
        else:
            self._choose("model.dropout", 0.0, f"{reads}, at most {MAX_EPOCHS}")
        self._choose("train.stop_early", AUTO_STOP_EARLY, "validations in a row without a better one end the run")

    def _compute_optimal(self) -> float:
        """Return the parameters whose 20 tokens each cost the budget, or fill the text a few times."""
        request = self._request
        sizes = []
        if request.flops:
            sizes.append(_solve(lambda n: TOKENS_PER_PARAMETER * n * self._flops_per_token(n), request.flops))
        if request.tokens:
            sizes.append(request.tokens / TOKENS_PER_PARAMETER)
        target = min(sizes)
        if request.text_bytes:
            limit = _solve(lambda n: TOKENS_PER_PARAMETER * n / self._tokens_of_text(n), MAX_EPOCHS)
            if limit < target:
                self._notes.append(
                    f"the text is enough for {_short(limit)} parameters ({TOKENS_PER_PARAMETER} tokens each, "
                    f"{MAX_EPOCHS} epochs): the budget is not used up. --size chooses a larger model, at the risk of "
                    "overfitting"
                )
                target = limit
        least = smallest(request.vocab_size or self._given.get("tokenizer.vocab_size") or MIN_VOCABULARY, self._given)
        return max(target, least)

    def _flops_per_token(self, parameters: float) -> float:
        vocab_size = self._request.vocab_size or self._given.get("tokenizer.vocab_size") or vocabulary(parameters)
        length = self._given.get("train.sequence_length") or sequence_length(parameters)
        return smooth_flops_per_token(parameters, vocab_size, length)

    def _tokens_of_text(self, parameters: float) -> float:
        """Return the estimated tokens of the text with the vocabulary of a size."""
        given = self._request.vocab_size or self._given.get("tokenizer.vocab_size")
        return self._text_tokens(given or vocabulary(parameters, self._request.text_bytes))

    def _text_tokens(self, vocab_size: int) -> float:
        """Return about how many tokens the text has with a vocabulary."""
        request = self._request
        if request.bytes_per_token:
            return request.text_bytes / request.bytes_per_token
        return text_tokens(request.text_bytes, vocab_size)

    def _vocabulary(self, target: float) -> int:
        request = self._request
        if request.vocab_size:
            return request.vocab_size
        reason = f"grows as parameters^{VOCABULARY_POWER}"
        if request.text_bytes and vocabulary(target, request.text_bytes) < vocabulary(target):
            reason = f"at most one entry for {BYTES_PER_ENTRY} bytes of the text"
        return int(self._choose("tokenizer.vocab_size", vocabulary(target, request.text_bytes), reason))

    def _tokens(self, shape: Shape, length: int) -> tuple[float, str]:
        """Return the training tokens and their reason."""
        request = self._request
        by_size = TOKENS_PER_PARAMETER * shape.parameters
        if request.auto and not (request.flops or request.tokens):
            epochs = TUNED_EPOCHS if request.tuned else AUTO_EPOCHS
            tokens = epochs * self._text_tokens(shape.vocab_size)
            self._is_limited_by_text = tokens < by_size
            return min(
                (tokens, f"{epochs} epochs of the text: about {_short(tokens)} tokens"),
                (by_size, "20 tokens per parameter"),
            )
        if request.flops or request.tokens:
            tokens = request.tokens or request.flops / shape.flops_per_token(length)
            ratio = tokens / shape.parameters
            reason = f"the budget: {_short(tokens)} tokens, {_short(ratio)} per parameter"
            if not (request.parameters or request.auto):
                tokens, reason = self._capped(shape, tokens, reason)
            elif request.text_bytes and tokens > 2 * MAX_EPOCHS * self._text_tokens(shape.vocab_size):
                reads = tokens / self._text_tokens(shape.vocab_size)
                remedy = "" if request.auto or self._given.get("train.stop_early") else ", see --train.stop_early"
                self._notes.append(
                    f"the budget reads the text about {_short(reads)} times: likely to overfit{remedy}"
                    + ("" if remedy else ", train.stop_early ends the run then")
                )
            return tokens, reason
        return self._capped(shape, by_size, f"{TOKENS_PER_PARAMETER} tokens per parameter: {_short(by_size)} tokens")

    def _capped(self, shape: Shape, tokens: float, reason: str) -> tuple[float, str]:
        """Return the tokens and their reason, at most MAX_EPOCHS epochs of the text."""
        if not self._request.text_bytes:
            return tokens, reason
        limit = MAX_EPOCHS * self._text_tokens(shape.vocab_size)
        if limit < tokens:
            self._is_limited_by_text = True
            return limit, f"{MAX_EPOCHS} epochs of the text: about {_short(limit)} tokens"
        return tokens, reason

    def _batch_and_steps(self, tokens: float, length: int, reason: str, shape: Shape) -> tuple[int, int]:
        size = self._choose(
            "train.batch_size",
            batch_sequences(tokens, length),
            f"{batch_sequences(tokens, length) * length:,} tokens: grows as training tokens^{BATCH_POWER}",
        )
        steps = round(tokens / (size * length))
        if steps < 1 and "train.steps" not in self._given:
            if self._is_limited_by_text or not (self._request.flops or self._request.tokens):
                cause = "the text is too short: " if self._is_limited_by_text else ""
                raise UserError(
                    f"{cause}{reason}, and a step takes {size * length:,}: give more text, a smaller "
                    "--train.batch_size, or --train.steps"
                )
            needed = size * length * shape.flops_per_token(length)
            raise UserError(
                f"the budget is too small for one step of {_short(shape.parameters)} parameters, which takes "
                f"{needed:.1e} FLOPs: give a larger --budget, or a smaller --size"
            )
        if self._request.minutes:
            minutes = self._request.minutes
            self._choose("train.minutes", minutes, "the budget; a short speed trial then fixes train.steps")
            self._choose("train.steps", steps, f"estimated; {reason}")
        else:
            self._choose("train.steps", steps, reason)
        return size, int(self._given.get("train.steps", steps))

    def _optimizer(self, shape: Shape, batch_tokens: int, steps: int) -> None:
        name = self._choose("optimizer.name", "muon", "Muon for matrices, AdamW for all else")
        rate = learning_rate(shape.dim, batch_tokens, steps, name)
        reason = f"falls as width^-{LR_WIDTH_POWER} and steps^-{LR_STEPS_POWER}, grows as batch^{LR_BATCH_POWER}"
        if self._request.tuned:
            rate = float(f"{TUNED_LR_SCALE * rate:.2g}")
            reason = f"{TUNED_LR_SCALE} of that for random weights"
        self._choose("optimizer.lr", rate, reason)
        self._choose("optimizer.embedding_lr_scale", EMBEDDING_LR_SCALE, "of the embedding, with tied weights the head")
        if shape.tables == 2:
            self._choose("optimizer.head_lr_scale", HEAD_LR_SCALE, "of the head")
        self._choose("optimizer.vector_lr_scale", VECTOR_LR_SCALE, "of norm scales and biases")
        self._choose("model.init_std", INIT_STD, "standard deviation of the initial matrices")
        self._choose("model.output_init", OUTPUT_INIT, "initial output projections of attention and MLP")
        warmup = min(round(WARMUP_STEPS + WARMUP_FRACTION * steps), steps // 4)
        self._choose("optimizer.warmup_steps", warmup, f"{WARMUP_STEPS} steps and {WARMUP_FRACTION:.0%} of all")
        schedule = self._choose("optimizer.schedule", "wsd", "a constant rate can be extended, its decay repeated")
        if schedule == "wsd":
            self._choose("optimizer.decay_fraction", DECAY_FRACTION, "the second half of the steps")
        self._choose("optimizer.weight_decay", WEIGHT_DECAY, "the usual value, of matrices")

    def _intervals(self, steps: int) -> None:
        every = max(1, min(MAX_INTERVAL, math.ceil(steps / VALIDATIONS)))
        self._choose("eval.every", every, f"about {VALIDATIONS} validations, at most {MAX_INTERVAL:,} steps apart")
        self._choose("checkpoint.every", every, "at each validation")


def vocabulary(parameters: float, text_bytes: int = 0) -> int:
    """Return the entries of a learned tokenizer for a model, and for a text if its size is known."""
    ideal = VOCABULARY * (parameters / VOCABULARY_AT) ** VOCABULARY_POWER
    if text_bytes:
        ideal = min(ideal, text_bytes / BYTES_PER_ENTRY)
    bounded = min(max(ideal, MIN_VOCABULARY), MAX_VOCABULARY)
    return round(bounded / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def text_tokens(text_bytes: float, vocab_size: int) -> float:
    """Return about how many tokens a text has."""
    doublings = math.log2(vocab_size / VOCABULARY)
    slope = BYTES_PER_TOKEN_PER_DOUBLING if doublings > 0 else BYTES_PER_TOKEN_PER_HALVING
    return text_bytes / max(BYTES_PER_TOKEN + slope * doublings, MIN_BYTES_PER_TOKEN)


def sequence_length(parameters: float) -> int:
    """Return the tokens of a sequence for a model."""
    return max(length for least, length in SEQUENCE_LENGTHS if parameters >= least)


def learning_rate(width: int, batch_tokens: int, steps: int, optimizer: str = "muon") -> float:
    """Return the peak learning rate, with two significant digits.

    Args:
        width: Width of the model.
        batch_tokens: Tokens of a batch.
        steps: Optimizer steps of the run.
        optimizer: A value of `optimizer.name`.
    """
    shrinks = (width / LR_WIDTH) ** -LR_WIDTH_POWER * (steps / LR_STEPS) ** -LR_STEPS_POWER
    return float(f"{LR.get(optimizer, LR['muon']) * shrinks * (batch_tokens / LR_BATCH) ** LR_BATCH_POWER:.2g}")


def batch_sequences(tokens: float, length: int) -> int:
    """Return the sequences of a batch: a power of two or three quarters of one, from 8 on a multiple of 8."""
    ideal = min(BATCH_TOKENS * (tokens / BATCH_AT) ** BATCH_POWER, tokens / MIN_STEPS) / length
    sizes = [2**i for i in range(20)] + [3 * 2**i for i in range(3, 18)]
    return min(sizes, key=lambda size: abs(math.log(size / max(ideal, 0.5))))


def _solve(cost: Any, target: float) -> float:
    """Return the number of parameters at which a growing cost reaches a target, by bisection."""
    low, high = 1.0, 1e14
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return math.sqrt(low * high)


def _short(value: float) -> str:
    """Return a number with about three digits: 950, 12.3 k, 2.21 M, 1.2 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
