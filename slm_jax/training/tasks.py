"""Scores of `eval.tasks` during training: the tasks of `slm_jax.evaluation` on the parameters of a step.

The data is read once, before the tokenizer is learned, so that an unknown name, a missing file or an unreachable hub is
reported before any work. The programs take the parameters that training holds, without a copy. Scores depend on the
parameters only: training computes the same with and without them, and a resumed run has the same scores.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from slm_jax.config.schema import Config
from slm_jax.distributed import agreement, multihost, sharding
from slm_jax.evaluation.datasets import HubLoader
from slm_jax.evaluation.loading import LoadedTask, Subject, load_task
from slm_jax.evaluation.results import TaskResult, chance_of
from slm_jax.evaluation.scoring import Scorer
from slm_jax.evaluation.specs import parse_tasks
from slm_jax.model.transformer import Transformer
from slm_jax.run.directory import Run
from slm_jax.run.metrics import Row
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

OPTION = "--eval.tasks"


def load_tasks(config: Config) -> list[LoadedTask]:
    """Read the data of `eval.tasks`, in every process; the first one downloads what others then find in the cache.

    Raises:
        UserError: A task is unknown, its data cannot be read, or it differs between processes.
    """
    specs = parse_tasks(config.eval.tasks, OPTION)
    hub = HubLoader(OPTION)
    tasks: list[LoadedTask] = []

    def load() -> list[str]:
        if not tasks:
            tasks.extend(
                load_task(spec, hub, config.eval.task_items, config.eval.max_tokens, config.data) for spec in specs
            )
        return [f"{task.spec.title}: {task.size} of {task.origin}" for task in tasks]

    for line in agreement.from_first("data of the tasks", load):
        logger.info("task %s", line)
    agreement.gather("data of the tasks, read", load)
    agreement.require_same(
        "the data of eval.tasks", lambda: {task.spec.title: _digest(task) for task in tasks}, "give all the same files"
    )
    return tasks


def _digest(task: LoadedTask) -> str:
    text = json.dumps(task.content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class TrainingTasks:
    """Scores parameters on tasks."""

    def __init__(
        self,
        tasks: list[LoadedTask],
        config: Config,
        run: Run,
        tokenizer: TextTokenizer,
        make_model: Callable[[Any], Transformer],
    ):
        """Keep what the scores need; nothing is computed.

        Args:
            tasks: The tasks, see `load_tasks`.
            config: The config of the run.
            run: The run.
            tokenizer: Its tokenizer.
            make_model: Returns the model with given parameters, `Steps.model`.
        """
        self._tasks = tasks
        self._config = config
        self._run = run
        self._tokenizer = tokenizer
        self._make_model = make_model

    def score(self, weights: Any) -> Row:
        """Score parameters.

        Replicated parameters are scored by the first process on its first device, while the others wait; with
        parameters that are split over devices all processes compute.

        Args:
            weights: All parameters, `TrainState.evaluated_weights`.

        Returns:
            For each task its score `task_NAME` from 0 to 1, the ends of its 95 % interval `task_NAME/low` and
            `task_NAME/high`, and `task_NAME/chance`, the score of guessing, where there is one. A task that cannot be
            measured is reported and left out.
        """
        if not self._tasks:
            return {}
        if sharding.is_replicated(weights):
            return agreement.from_first("task scores", lambda: self._score(sharding.local_replica(weights)))
        own = self._score(weights)
        return agreement.from_first("task scores", lambda: own)

    def _score(self, weights: Any) -> Row:
        length = self._config.train.sequence_length
        microbatch = self._config.train.batch_size // self._config.train.grad_accum_steps
        model = self._make_model(weights)
        scorer = Scorer(model, length)
        scorer.batch_tokens = min(scorer.batch_tokens, microbatch * length)  # which fits into memory with gradients
        subject = Subject(model, self._tokenizer, self._run, scorer)
        row: Row = {}
        for task in self._tasks:
            try:
                row |= _scores(task, task.measure(subject))
            except UserError as error:
                if multihost.is_first():
                    logger.warning("%s: not scored: %s", task.spec.title, error)
        return row


def _scores(task: LoadedTask, result: TaskResult) -> Row:
    """Return the fields of a task in a row of metrics."""
    metric = next(each for each in result.metrics if (each.group, each.name) == ("all", task.score))
    name = f"task_{task.spec.title}"
    value, low, high = metric.estimate
    row: Row = {name: value}
    if low is not None and high is not None:
        row |= {f"{name}/low": low, f"{name}/high": high}
    chance = chance_of(metric.reference)
    return row if chance is None else row | {f"{name}/chance": chance}
