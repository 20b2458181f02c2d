"""Instructions whose constraints a program can verify, in the manner of IFEval (arXiv:2311.07911).

The prompts are this project's own, shorter than those of IFEval, so that scores are not comparable with published ones.
Models of a few million parameters are near zero.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from slm_jax.utils.errors import UserError

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)

Check = dict[str, Any]


def num_words(text: str) -> int:
    """Return the number of words: letters and digits, joined by hyphens and apostrophes."""
    return len(_WORD.findall(text))


def num_sentences(text: str) -> int:
    """Return the number of sentences: parts that end with . ! or ? before white space or the end."""
    return len(_SENTENCE_END.findall(text.strip()))


def _contains(text: str, value: Any) -> bool:
    return re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", text, re.IGNORECASE) is not None


def _is_json(text: str, value: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict if value == "object" else list)
    except ValueError:
        return False


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "max_words": lambda text, value: 0 < num_words(text) <= value,
    "min_words": lambda text, value: num_words(text) >= value,
    "words": lambda text, value: num_words(text) == value,
    "sentences": lambda text, value: num_sentences(text) == value,
    "bullets": lambda text, value: len(_BULLET.findall(text)) == value,
    "paragraphs": lambda text, value: len([p for p in re.split(r"\n\s*\n", text) if p.strip()]) == value,
    "starts_with": lambda text, value: text.lstrip().startswith(value),
    "ends_with": lambda text, value: text.rstrip().endswith(value),
    "contains": _contains,
    "excludes": lambda text, value: bool(text.strip()) and not _contains(text, value),
    "case": lambda text, value: (
        any(map(str.isalpha, text)) and text == (text.lower() if value == "lower" else text.upper())
    ),
    "no_commas": lambda text, value: bool(text.strip()) and ("," not in text) is value,
    "json": _is_json,
}
"""Constraints by name: a function of the reply and of the value of the constraint. An empty reply satisfies none."""


_COUNTS = ("max_words", "min_words", "words", "sentences", "bullets", "paragraphs")
_CHOICES: dict[str, tuple[Any, ...]] = {"case": ("lower", "upper"), "no_commas": (True,), "json": ("object", "array")}


def _is_valid(name: str, value: Any) -> bool:
    """Return whether a value is one for a constraint."""
    if name in _COUNTS:
        return type(value) is int and value >= 0
    if name in _CHOICES:
        return any(value == choice and type(value) is type(choice) for choice in _CHOICES[name])
    return isinstance(value, str) and bool(value)


def satisfied(text: str, check: Check) -> bool:
    """Return whether a reply satisfies a constraint.

    Args:
        text: The reply.
        check: {"check": name, "value": value}.

    Raises:
        UserError: The constraint is unknown, or its value is none for it.
    """
    name, value = check.get("check"), check.get("value")
    if not isinstance(name, str) or name not in CHECKS:
        raise UserError(f"unknown check {name!r} (known: {', '.join(CHECKS)})")
    if not _is_valid(name, value):
        wanted = "a number" if name in _COUNTS else f"one of {_CHOICES[name]}" if name in _CHOICES else "a text"
        raise UserError(f"check {name}: {value!r} is not a value for it, which is {wanted}")
    return bool(text.strip()) and CHECKS[name](text, value)


def _check(name: str, value: Any) -> Check:
    return {"check": name, "value": value}


INSTRUCTIONS: tuple[tuple[str, tuple[Check, ...]], ...] = (
    ("Answer with exactly one word: what color is the sky?", (_check("words", 1),)),
    ("Name an animal. Use exactly one word.", (_check("words", 1),)),
    ("Describe the sea in exactly three words.", (_check("words", 3),)),
    ("Describe a cat in at most five words.", (_check("max_words", 5),)),
    ("Explain what a computer is in at most 20 words.", (_check("max_words", 20),)),
    ("What is a list in Python? Use at most ten words.", (_check("max_words", 10),)),
    ("Write about the moon in at least 30 words.", (_check("min_words", 30),)),
    ("Explain rain in at least 40 words.", (_check("min_words", 40),)),
    ("Write exactly two sentences about dogs.", (_check("sentences", 2),)),
    ("Write exactly three sentences about the sun.", (_check("sentences", 3),)),
    ("In exactly one sentence, what is a book?", (_check("sentences", 1),)),
    ("Give me a list of three fruits as bullet points that begin with '- '.", (_check("bullets", 3),)),
    ("List four countries as bullet points that begin with '- '.", (_check("bullets", 4),)),
    ("List two uses of water as bullet points that begin with '* '.", (_check("bullets", 2),)),
    ("Write two paragraphs about trees, separated by an empty line.", (_check("paragraphs", 2),)),
    ("Write three paragraphs about music, separated by empty lines.", (_check("paragraphs", 3),)),
    ("Begin your answer with the word Certainly. What is gold?", (_check("starts_with", "Certainly"),)),
    ("Start your reply with 'First,' and explain how to boil an egg.", (_check("starts_with", "First,"),)),
    ("Begin with 'Dear friend' and write a greeting.", (_check("starts_with", "Dear friend"),)),
    ("Tell me about snow and end with the words 'The end.'", (_check("ends_with", "The end."),)),
    ("Describe a tree. Finish your answer with 'That is all.'", (_check("ends_with", "That is all."),)),
    ("What is iron? End your answer with an exclamation mark.", (_check("ends_with", "!"),)),
    ("Ask me a question about food. It must end with a question mark.", (_check("ends_with", "?"),)),
    ("Write a sentence that contains the word river.", (_check("contains", "river"),)),
    ("Write about a house and use the word window.", (_check("contains", "window"),)),
    ("Use the words bird and tree in one sentence.", (_check("contains", "bird"), _check("contains", "tree"))),
    ("Tell me about Paris without using the word city.", (_check("excludes", "city"), _check("contains", "Paris"))),
    ("Describe snow without using the word cold.", (_check("excludes", "cold"), _check("contains", "snow"))),
    ("Write a sentence about fish in lower case letters only.", (_check("case", "lower"), _check("contains", "fish"))),
    ("Answer in lower case only: what is a car?", (_check("case", "lower"), _check("contains", "car"))),
    ("SAY HELLO IN CAPITAL LETTERS ONLY.", (_check("case", "upper"), _check("contains", "hello"))),
    ("Write one sentence about rain, all in upper case.", (_check("case", "upper"), _check("contains", "rain"))),
    ("Write a sentence about bread without any comma.", (_check("no_commas", True), _check("contains", "bread"))),
    ("Name three colors without using commas.", (_check("no_commas", True), _check("min_words", 3))),
    ("Answer with a JSON object that has the key name.", (_check("json", "object"), _check("contains", "name"))),
    ("Give me a JSON object with the keys city and country.", (_check("json", "object"), _check("contains", "city"))),
    (
        "Write exactly two sentences about winter, and use the word ice.",
        (_check("sentences", 2), _check("contains", "ice")),
    ),
    (
        "Describe a dog in at most ten words, in lower case only.",
        (_check("max_words", 10), _check("case", "lower"), _check("contains", "dog")),
    ),
    ("List three animals as bullet points in lower case.", (_check("bullets", 3), _check("case", "lower"))),
    (
        "Begin with 'Yes' and end with 'Thank you.' Is water wet?",
        (_check("starts_with", "Yes"), _check("ends_with", "Thank you.")),
    ),
)
