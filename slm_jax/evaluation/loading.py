"""Tasks with their data in memory, ready to be measured on any model: of a checkpoint, or during training."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from slm_jax.config.schema import DataConfig
from slm_jax.distributed.sharding import mesh_of, replicated
from slm_jax.evaluation import analogies, core, heldout
from slm_jax.evaluation.core_bundle import open_bundle, read_tasks
from slm_jax.evaluation.datasets import Dataset, HubLoader, Record, read_files
from slm_jax.evaluation.item_texts import Pieces, chat_pieces, core_pieces, record_pieces
from slm_jax.evaluation.registry import CHAT_TASKS, SPECIAL_SCORES, TASKS
from slm_jax.evaluation.replies import Replier
from slm_jax.evaluation.results import TaskResult
from slm_jax.evaluation.scoring import Item, Scorer, TokenScores
from slm_jax.evaluation.specs import TaskSpec
from slm_jax.model.transformer import Transformer
from slm_jax.run.directory import Run
from slm_jax.utils.formatting import plural
from slm_jax.utils.text_tokenizer import TextTokenizer

Keep = np.ndarray | None
"""Mask of the items that count, bool [N]; None: all."""

_SEED = 0  # of the random subset for max_items


class Subject:
    """A model to measure.

    Attributes:
        model: The model. Its parameters may be split over devices; all processes must then measure.
        tokenizer: Its tokenizer.
        run: Its run, whose held-out text is that of the task `heldout`.
        scorer: Log-probabilities by the model.
        verbose: Whether long tasks log their progress.
        memory: Scores that are kept for a second measurement of the same items, by token ids and first scored token;
            None: none are.
    """

    def __init__(self, model: Transformer, tokenizer: TextTokenizer, run: Run, scorer: Scorer, verbose: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.run = run
        self.scorer = scorer
        self.verbose = verbose
        self.memory: dict[tuple[int, bytes], TokenScores] | None = None

    def score(self, items: Sequence[Item]) -> list[TokenScores]:
        """Score items, see `Scorer.score`; those in `memory` are not computed again."""
        if self.memory is None:
            return self.scorer.score(items)
        keys = [(item.first, item.ids.tobytes()) for item in items]
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self.memory}
        self.memory.update(zip(missing, self.scorer.score(list(missing.values())), strict=True))
        return [self.memory[key] for key in keys]

    @functools.cached_property
    def replier(self) -> Replier:
        """Replies of the model, shared by the tasks that ask for the same ones.

        Raises:
            UserError: The tokenizer has no chat template.
        """
        return Replier(self.model, self.tokenizer, self.scorer.context)

    def embedding(self) -> np.ndarray:
        """Return the token embeddings, float32 [V, D]."""
        embedding_VxD = self.model.embedding[...]
        mesh = mesh_of(embedding_VxD)
        if mesh is not None:
            embedding_VxD = jax.jit(lambda x: x, out_shardings=replicated(mesh))(embedding_VxD)
        return np.asarray(embedding_VxD)[: self.model.vocab_size]


class LoadedTask(NamedTuple):
    """A task whose data is in memory.

    Attributes:
        spec: The requested task.
        origin: The origin of the data.
        size: Number and kind of its items: "67,000 records".
        score: The metric over all items that stands for the task, a share from 0 to 1.
        content: The items, as JSON values.
        texts: The pieces of text of each item, to be searched for in training text; empty: they are not.
        parts: The part of the task that each of these items belongs to; empty: the task has no parts.
        measure: Computes all metrics of a model, over the items that a mask, bool [N], keeps (None: all).
    """

    spec: TaskSpec
    origin: str
    size: str
    score: str
    content: Any
    texts: Sequence[Pieces]
    parts: Sequence[str]
    measure: Callable[..., TaskResult]


def load_task(
    spec: TaskSpec, hub: HubLoader, max_items: int = 0, max_tokens: int = 0, data: DataConfig | None = None
) -> LoadedTask:
    """Read the data of a task; held-out text is encoded, and that of a run read, when it is measured.

    Args:
        spec: The task.
        hub: Loads data sets of the hub.
        max_items: Maximum number of records, a random subset with a fixed seed; 0: all.
        max_tokens: Maximum number of tokens of held-out text; 0: all.
        data: The options by which the training text was read, which held-out files are read with; None: defaults.

    Raises:
        UserError: The data cannot be read.
    """
    if spec.name == "heldout":
        return _load_heldout(spec, max_tokens, data)
    if spec.name == "analogies":
        questions = analogies.read_questions(spec.path)
        questions = questions.select(subset(list(range(len(questions.sections))), max_items))

        def measure_analogies(subject: Subject, keep: Keep = None) -> TaskResult:
            return analogies.measure_analogies(questions, subject.tokenizer, subject.embedding())

        size = plural(len(questions.sections), "question")
        content = [questions.words, questions.index_Qx4.tolist()]
        return LoadedTask(spec, spec.path, size, SPECIAL_SCORES["analogies"], content, (), (), measure_analogies)
    if spec.name == "core":
        return _load_core(spec, hub.option, max_items)
    if spec.name in CHAT_TASKS:
        chat_task = CHAT_TASKS[spec.name]
        dataset = read_files(spec.path, chat_task.columns) if spec.path else chat_task.records()
        chats = subset(dataset.records, max_items)

        def measure_replies(subject: Subject, keep: Keep = None) -> TaskResult:
            return chat_task.measure(_kept(chats, keep), subject.replier.reply)

        size = plural(len(chats), "conversation")
        texts = [chat_pieces(record, chat_task.columns) for record in chats]
        return LoadedTask(spec, dataset.origin, size, chat_task.score, chats, texts, (), measure_replies)
    task = TASKS[spec.name]
    dataset = read_files(spec.path, task.columns) if spec.path else _load_from_hub(spec.name, hub)
    records = subset(dataset.records, max_items)

    def measure_records(subject: Subject, keep: Keep = None) -> TaskResult:
        return task.measure(_kept(records, keep), subject.tokenizer, subject.score)

    texts = [record_pieces(task, record) for record in records]
    size = plural(len(records), "record")
    return LoadedTask(spec, dataset.origin, size, task.score, records, texts, (), measure_records)


def _load_heldout(spec: TaskSpec, max_tokens: int, data: DataConfig | None) -> LoadedTask:
    read = heldout.read_documents(spec.path, data, max_tokens) if spec.path else []
    texts = [" ".join(document.strings) for document in read]

    def measure(subject: Subject, keep: Keep = None) -> TaskResult:
        if spec.path:
            documents = heldout.encode_documents(read, spec.path, subject.tokenizer, max_tokens, data)
        else:
            documents = heldout.documents_of_run(subject.run, subject.tokenizer, max_tokens)
        if keep is not None:
            documents = documents.select(keep[: len(documents.items)])
        scorer = subject.scorer
        result = heldout.measure_heldout(documents, subject.tokenizer, subject.score, scorer.context, scorer.stride)
        return result._replace(origin=", ".join(documents.sources))

    size = plural(len(texts), "document") if spec.path else "held-out text of the run"
    return LoadedTask(
        spec,
        spec.path or "held-out text of the run",
        size,
        SPECIAL_SCORES["heldout"],
        texts,
        [(text,) for text in texts],
        (),
        measure,
    )


def _load_core(spec: TaskSpec, option: str, max_items: int) -> LoadedTask:
    bundle = open_bundle(spec.path, option)
    tasks = [(task, core.shuffled(records, max_items)) for task, records in read_tasks(bundle)]

    def measure(subject: Subject, keep: Keep = None) -> TaskResult:
        context = subject.scorer.context
        return core.measure_core(tasks, subject.tokenizer, subject.score, context, keep, subject.verbose)

    size = f"{plural(sum(len(records) for _, records in tasks), 'item')} of {plural(len(tasks), 'task')}"
    texts = [core_pieces(task.kind, record) for task, records in tasks for record in records]
    parts = [task.label for task, records in tasks for _ in records]
    return LoadedTask(spec, bundle.origin, size, SPECIAL_SCORES["core"], tasks, texts, parts, measure)


def _load_from_hub(name: str, hub: HubLoader) -> Dataset:
    task = TASKS[name]
    assert task.hub is not None  # parse_tasks requires a file for the others
    return hub.load(name, task.hub, task.columns)


def _kept(records: list[Record], keep: Keep) -> list[Record]:
    return records if keep is None else [records[i] for i in np.flatnonzero(keep)]


def subset(items: list[Any], max_items: int) -> list[Any]:
    """Return at most `max_items` items (0: all), a random subset in order, always the same."""
    if not max_items or len(items) <= max_items:
        return items
    chosen = np.random.default_rng(_SEED).permutation(len(items))[:max_items]
    return [items[i] for i in np.sort(chosen)]
