"""Questions and answers about the standard library: a small instruction set bundled with every Python installation.

Each documented public module, class and function gives a question, and the first sentence of its docstring the answer.
These sentences occur in `python-docs` as well. Both sources hold out the same modules, so that a held-out answer is not
in training text of the other source, except where a module repeats a sentence of another one.
"""

import ast
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.data.sources.documents import CountingReader, Document, InvalidRow
from slm_jax.data.sources.python_docs import module_groups, modules
from slm_jax.data.sources.rows import Mapper, Row, RowMapper
from slm_jax.utils.errors import UserError

QA_MAPPER = RowMapper(template="Question: {instruction}\nAnswer: ", response_column="output")

_MIN_ANSWER = 20  # characters
_MAX_ANSWER = 240  # characters
_SENTENCE = re.compile(r".+?[.!?](?=\s|$)")


class PythonQA:
    """The questions as a `Source`; rows have the columns `instruction` and `output`."""

    name = "python-qa"

    def __init__(self, mapper: Mapper = QA_MAPPER):
        """Create the source.

        Args:
            mapper: The mapping of rows to documents.
        """
        self.mapper = mapper

    def describe(self) -> Any:
        """Return Python's version and the fields of the mapper."""
        return ["python-qa", platform.python_version(), *self.mapper.describe()]

    def read(self, position: Any = None) -> CountingReader:
        """Read from a position, the number of rows read before."""
        return CountingReader(self._documents(), position, platform.python_version())

    def _documents(self) -> Iterator[Document | InvalidRow]:
        groups = module_groups()
        for number, (module, row) in enumerate(_rows_of_modules(), start=1):
            item = self.mapper.to_document(Row(row, f"python-qa, row {number}"))
            yield item._replace(group=groups.get(module, module)) if isinstance(item, Document) else item


def rows() -> Iterator[dict[str, str]]:
    """Yield rows with the columns `instruction` and `output` in a fixed order, each output once.

    Raises:
        UserError: This Python lacks the source files of its library.
    """
    return (row for _, row in _rows_of_modules())


def _rows_of_modules() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (name of the module, row)."""
    library = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for name, tree in modules(library):
        if any(part.startswith("_") for part in name.split(".")):
            continue
        for question, text in _questions(name, tree):
            answer = first_sentence(text)
            if answer and answer not in seen:
                seen.add(answer)
                yield name, {"instruction": question, "output": answer}
    if not seen:
        raise UserError(
            f"this Python installation has no documentation (none in {library}): name text files with --data.files"
        )


def _questions(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (question, docstring) of a module, its classes and its functions."""
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
    """Yield (dotted name, node) of the public classes and functions below a node."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield f"{path}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{path}.{child.name}")


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring on one line; empty if it has none of a suitable length."""
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    match = _SENTENCE.match(paragraph)
    sentence = match[0] if match else ""
    if not _MIN_ANSWER <= len(sentence) <= _MAX_ANSWER:
        return ""
    if " " not in sentence or "(C)" in sentence:  # a bare name, or a copyright notice
        return ""
    return sentence
