"""Texts of the items of tasks, to be searched for in training text.

An item has one text or several pieces: training text holds a question with one of its answers, or one of two sentences,
and hardly ever all choices one after another. Of a conversation each message is a piece. Words of a prompt's template
are no part of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from slm_jax.evaluation.datasets import Record
from slm_jax.evaluation.registry import PAIR_COLUMNS, Task

Pieces = tuple[str, ...]
"""The texts of an item, each of which counts by itself."""


def record_pieces(task: Task, record: Record) -> Pieces:
    """Return the pieces of a record: each choice with its question, each sentence of a pair, or all of its text."""
    if task.columns == PAIR_COLUMNS:
        return tuple(all_text(record, [column]) for column in task.columns)
    if task.to_question is not None:
        try:
            question = task.to_question(record)
        except ValueError:  # measuring the task reports it, with the number of the record
            return (all_text(record, task.columns),)
        context = question.context.removeprefix("Question: ").removesuffix("\nAnswer:")
        return tuple(f"{context} {choice}" for choice in question.choices)
    return (all_text(record, task.columns),)


def core_pieces(kind: str, record: Record) -> Pieces:
    """Return the pieces of a record of CORE, without examples: the question with each choice or context."""
    if kind == "multiple_choice":
        return tuple(f"{record['query']} {choice}" for choice in record["choices"])
    if kind == "schema":
        return tuple(f"{context} {record['continuation']}" for context in record["context_options"])
    return (f"{record['context']} {record['continuation']}",)


def chat_pieces(record: Record, columns: Sequence[str]) -> Pieces:
    """Return the pieces of a record of a chat task: the content of each message, and each text of the other columns.

    Args:
        record: The record, which may be malformed: measuring the task reports it.
        columns: The columns of the task.
    """
    pieces = []
    for value in (record.get(column) for column in columns):
        messages = value if isinstance(value, list) else [value]
        texts = (each.get("content") if isinstance(each, dict) else each for each in messages)
        pieces += [text for text in texts if isinstance(text, str)]
    return tuple(pieces)


def all_text(record: Record, columns: Sequence[str]) -> str:
    """Return all text in some columns of a record."""
    return " ".join(text for column in columns for text in _strings(record[column]))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
