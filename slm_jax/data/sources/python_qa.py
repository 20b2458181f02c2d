"""A small set of instructions that every Python carries: what its modules, classes and functions are for.

Each documented, public name of the standard library is a question, the first sentence of its docstring the response.
Those stand in `python-docs` too: after training on that, held-out questions are new, but their answers were read.
"""

import ast
import itertools
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.data.sources.documents import Document, InvalidRow, RowMapper
from slm_jax.data.sources.python_docs import modules
from slm_jax.utils.errors import UserError

QA_COLUMNS = RowMapper(template="Question: {instruction}\nAnswer: ", response="output")

_SHORTEST, _LONGEST = 20, 240  # characters of a response
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


class PythonQA:
    """See `Source`. Rows have the columns instruction and output."""

    name = "python-qa"

    def __init__(self, columns: RowMapper = QA_COLUMNS):
        self.columns = columns

    def describe(self) -> Any:
        """Python's version, and how rows become documents."""
        c = self.columns
        return ["python-qa", platform.python_version(), c.text, c.template, c.response]

    def read(self, position: Any = None) -> "_Reader":
        """position: the number of rows that were read."""
        return _Reader(self.columns, position or 0)


class _Reader:
    version = platform.python_version()

    def __init__(self, columns: RowMapper, done: int):
        self._columns, self._done = columns, done

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        for row in itertools.islice(rows(), self._done, None):
            self._done += 1
            yield self._columns.to_document(row, f"python-qa, row {self._done}")

    def position(self) -> int:
        return self._done


def rows() -> Iterator[dict[str, str]]:
    """{"instruction", "output"} in a fixed order, each output once. Raises UserError if Python's sources lack."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    found = False
    for name, tree in modules(library):
        if any(part.startswith("_") for part in name.split(".")):
            continue
        for question, text in _asked(name, tree):
            answer = first_sentence(text)
            if answer and answer not in seen:
                seen.add(answer)
                found = True
                yield {"instruction": question, "output": answer}
    if not found:
        raise UserError(f"this Python carries no documentation (none in {library}): give text with --data.files")


def _asked(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(question, docstring) of a module and of what it holds."""
    yield f"What is the module {name} for?", ast.get_docstring(tree) or ""
    for path, node in _public(tree, name):
        text = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            yield f"What is the class {path}?", text
        else:
            yield f"What does {path} do?", text


def _public(
    node: ast.Module | ast.ClassDef, path: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield f"{path}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{path}.{child.name}")


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring on one line; empty where it has none that says something in a few words."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match[0] if match else ""
    return sentence if _SHORTEST <= len(sentence) <= _LONGEST and " " in sentence and "(C)" not in sentence else ""
