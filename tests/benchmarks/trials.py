"""Short training runs that differ in few options, for `rule.py` and `ablations.py`.

A trial trains with the functions of `slm_jax.train` (the same model, batches, optimizer and schedule) but keeps nothing
except its score, and passes the learning rates and the seed to the compiled step as arguments: hundreds of trials of
one shape need one compilation. Its loss is that of `slm_jax.train` with the same options up to rounding.

Scores are appended to a file of JSON lines; a trial that it holds is not run again, so any sweep can be interrupted.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
# Replaces the folder of this file, whose tokenizer.py would shadow the package.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(ROOT)

# Numbers that the optimizer only multiplies with: arguments of the compiled step.
ARGUMENTS = ("lr", "embedding_lr_scale", "head_lr_scale", "vector_lr_scale", "weight_decay")
COMMON = {
    "train.dtype": "float32",
    "train.batch_size": 8,
    "train.sequence_length": 64,
    "train.steps": 300,
    "tokenizer.vocab_size": 1024,
}
# Not those of a preset: scores that were kept would mean something else after a change of its options.
SHAPE = {
    "model.dim": 128,
    "model.depth": 4,
    "model.heads": 2,
    "model.mlp_dim": 512,
    "optimizer.lr": 0.01,
    "optimizer.warmup_steps": 20,
}
VALIDATION_TOKENS = 32_768


@functools.cache
def base() -> dict[str, Any]:
    """Return the options that trials start from, by dotted name."""
    from slm_jax.config.sections import Sections

    return {name: field.default for name, field in Sections.fields().items()} | SHAPE | COMMON


@dataclass(frozen=True)
class Trial:
    """A training run.

    Attributes:
        text: A value of `data.source`, or the path of a text file.
        options: Options that differ from `base`.
        seed: Seed of the initial weights and of the order of the data.
    """

    text: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def key(self) -> str:
        """The trial as text, by which its score is found again: without the options of the base."""
        options = {k: v for k, v in {**COMMON, **self.options}.items() if k in COMMON or v != base().get(k)}
        return json.dumps([Path(self.text).stem, dict(sorted(options.items())), self.seed])


class Data(NamedTuple):
    """A tokenized text."""

    vocab_size: int
    corpus: Any
    validation: Any
    validation_bytes: int


class Scores:
    """The scores of trials, in a file of JSON lines."""

    def __init__(self, path: Path):
        """Read the scores that the file has; it need not exist."""
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[row.pop("key")] = row

    def trials(self) -> Iterator[tuple[Trial, dict[str, Any]]]:
        """Yield the trials that the file has, and their scores."""
        for key, row in self.rows.items():
            text, options, seed = json.loads(key)
            yield Trial(text, options, seed), row

    def of(self, trial: Trial) -> dict[str, Any]:
        """Return the score of a trial, which is run if the file does not have it."""
        if trial.key not in self.rows:
            row = run(trial)
            self.rows[trial.key] = row
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": trial.key, **row}) + "\n")
            changed = {name.rpartition(".")[2]: value for name, value in trial.options.items()}
            print(
                f"  {Path(trial.text).stem} seed {trial.seed} {changed}: {row['bits_per_byte']:.4f} "
                f"({row['seconds']:.0f} s)",
                flush=True,
            )
        return self.rows[trial.key]

    def loss(self, trial: Trial) -> float:
        """Return the bits per byte of a trial; infinity if it diverged."""
        value = float(self.of(trial)["bits_per_byte"])
        return value if math.isfinite(value) else math.inf


def config_of(trial: Trial) -> Any:
    """Return all options of a trial."""
    from slm_jax import Config

    text = {"data.files": (trial.text,)} if Path(trial.text).is_file() else {"data.source": trial.text}
    return Config.load("minute", **{**text, **SHAPE, **COMMON, **trial.options, "train.seed": trial.seed})


@functools.lru_cache(maxsize=8)
def _data(data: Any, tokenizer: Any) -> Data:
    """Return the tokenized text of a config, from the cache that all runs share."""
    from slm_jax import Config
    from slm_jax.data.prepare import prepare
    from slm_jax.run.directory import Run

    config = Config.load(
        "minute",
        **{f"data.{k}": v for k, v in json.loads(data).items()},
        **{f"tokenizer.{k}": v for k, v in json.loads(tokenizer).items()},
    )
    folder = Path(tempfile.mkdtemp())
    tokens, corpus = prepare(config, Run(folder))
    validation = corpus.validation
    end = min(len(validation), VALIDATION_TOKENS)
    return Data(tokens.vocab_size, corpus, validation[:end], validation.num_bytes_between(0, end))


def data_of(config: Any) -> Data:
    """Return the tokenized text of a config."""
    return _data(config.data.model_dump_json(), config.tokenizer.model_dump_json())


class _Key:
    """A config, equal to others that have the same program."""

    def __init__(self, config: Any, without: tuple[str, ...]):
        self.config = config
        tree = config.model_dump(mode="json")
        flat = {f"{section}.{name}": value for section, fields in tree.items() for name, value in fields.items()}
        ignored = ("data.", "eval.", "checkpoint.", "log.", "train.seed", *without)
        self._key = json.dumps({k: v for k, v in flat.items() if not k.startswith(ignored)}, sort_keys=True)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._key == other._key


def _with(config: Any, section: str, values: Mapping[str, Any]) -> Any:
    """Return a config with other values, which are not validated: they may be traced."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=dict(values))})


def _optimizer(config: Any, vocab_size: int, rates: Mapping[str, Any]) -> Any:
    """Return the optimizer of a config with traced rates."""
    import jax
    import optax

    from slm_jax.distributed.platform import Platform
    from slm_jax.model.abstract import declared_partitions
    from slm_jax.model.params import parameter_group
    from slm_jax.model.precision import Policy
    from slm_jax.training.optimizer import make_optimizer

    scales = {name: rates.get(f"{name}_lr_scale", 1.0) for name in ("embedding", "head", "vector")}
    own = {name: rates[name] for name in ("lr", "weight_decay") if name in rates}
    own |= {f"{name}_lr_scale": 1.0 for name in scales}
    dtype = Policy.choose(config, Platform.default()).compute
    partitions = declared_partitions(config, vocab_size)
    common = make_optimizer(_with(config, "optimizer", own).optimizer, config.train.steps, dtype, partitions)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # As `make_optimizer` does; it compares the scales with 1, which traced ones do not allow.
        updates, state = common.update(grads, state, params)
        groups = scales | {"matrix": 1.0}
        return jax.tree_util.tree_map_with_path(lambda path, u: groups[parameter_group(path, u)] * u, updates), state

    return optax.GradientTransformation(common.init, update)


@functools.lru_cache(maxsize=4)
def _init_program(key: _Key, vocab_size: int) -> Any:
    """Compile (seed) -> initial state."""
    import jax

    from slm_jax.distributed.platform import Platform
    from slm_jax.training.steps import init_state

    config = key.config

    def init(seed: jax.Array) -> Any:
        return init_state(
            _with(config, "train", {"seed": seed}), vocab_size, _optimizer(config, vocab_size, {}), Platform.default()
        )

    return jax.jit(init)


@functools.lru_cache(maxsize=4)
def _programs(key: _Key, vocab_size: int) -> tuple[Any, Any]:
    """Compile the training step, with the numbers of `ARGUMENTS` as arguments, and the evaluation."""
    import jax

    from slm_jax.distributed.platform import Platform
    from slm_jax.model.abstract import abstract_model
    from slm_jax.model.precision import Policy
    from slm_jax.training.steps import make_objective, step_options
    from slm_jax.training.train_step import eval_step, train_step

    config = key.config
    graph, _ = abstract_model(config, vocab_size, Platform.default(), adapters=True)
    options = tuple(step_options(config, Policy.choose(config, Platform.default()).compute))
    objective = make_objective(config.train)
    step = functools.partial(train_step, graph=graph, objective=objective, options=options)

    def train(state: Any, batch: Any, rates: Mapping[str, jax.Array]) -> tuple[Any, jax.Array]:
        optimizer = _optimizer(config, vocab_size, rates)
        changed = _with(config, "optimizer", {"lr": rates["lr"]})
        state, metrics = step(state, batch, config=changed, optimizer=optimizer)
        return state, metrics["loss"]

    def evaluate(weights: Any, batch: Any) -> jax.Array:
        return eval_step(weights, batch, graph=graph, objective=objective.without_additions()).nll

    return jax.jit(train, donate_argnums=0), jax.jit(evaluate)


class Stepper:
    """A model in training.

    Attributes:
        state: The training state.
        number: Steps taken.
    """

    def __init__(self, config: Any, data: Data):
        """Draw the initial weights; compile, unless a config of the same shape was compiled before."""
        import numpy as np

        from slm_jax.data.batches.modes import make_batches

        arguments = tuple(f"optimizer.{name}" for name in ARGUMENTS)
        init = _init_program(_Key(config, arguments), data.vocab_size)
        key = _Key(config, (*arguments, "model.init_std", "model.output_init"))
        self._train, self._evaluate = _programs(key, data.vocab_size)
        self._rates = {name: np.float32(getattr(config.optimizer, name)) for name in ARGUMENTS}
        self._batches = make_batches(config, data.corpus)
        self._shape = config.train.batch_size, config.train.sequence_length
        self.number = 0
        self.state = init(np.uint32(config.train.seed))

    def step(self) -> Any:
        """Take a step and return the loss, which may not be computed yet."""
        self.state, loss = self._train(self.state, dict(self._batches.at(self.number)), self._rates)
        self.number += 1
        return loss

    def nats(self, tokens: Any) -> float:
        """Return the loss summed over tokens, in order."""
        from slm_jax.data.batches.packed import sequential_batches

        return sum(
            float(self._evaluate(self.state.evaluated_weights, b)) for b in sequential_batches(tokens, *self._shape)
        )


def run(trial: Trial) -> dict[str, Any]:
    """Train, and return the bits per byte of held-out text, the loss in nats, and the duration."""
    import jax

    config = config_of(trial)
    data = data_of(config)
    start = time.perf_counter()
    stepper = Stepper(config, data)
    for step in range(config.train.steps):
        loss = stepper.step()
        if step % 50 == 49 and not math.isfinite(float(loss)):
            break
    nats = stepper.nats(data.validation)
    return {
        "bits_per_byte": nats / math.log(2) / data.validation_bytes,
        "loss": nats / len(data.validation),
        "seconds": time.perf_counter() - start,
        "parameters": sum(x.size for x in jax.tree.leaves(stepper.state.params)),
        "training_tokens": len(data.corpus.train),
    }
