"""The embedded corpus: the documentation bundled with every Python installation.

`pydoc_data.topics` (the language reference that `help()` shows) and the docstrings of the standard library, about
2.5 MB of English. Source files are read with `ast`; nothing is imported or run, so the text is the same on every
machine with the same version of Python from the same distributor (Debian's packages lack some modules, for example).
"""

import ast
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from slm_jax.data.sources.documents import CountingReader, Document
from slm_jax.data.sources.similar import similar_groups
from slm_jax.utils.errors import UserError

# Folders without documentation: tests, vendored packages, and packages that vary between installations.
_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "_vendor",
    "_bundled",
}
_MIN_MODULE = 200  # characters; the docstrings of a module that have fewer are skipped


class PythonDocs:
    """The documentation of Python as a `Source`.

    Some documents have passages in common (those of `bz2` and `lzma`, for example). They form groups, each of which is
    either trained on or held out.
    """

    name = "python-docs"

    def describe(self) -> Any:
        """Return Python's version."""
        return platform.python_version()

    def read(self, position: Any = None) -> CountingReader:
        """Read from a position, the number of documents read before."""
        return CountingReader(self._documents(), position, platform.python_version())

    def _documents(self) -> Iterator[Document]:
        for (_, text), first in zip(_named_documents(), _groups(), strict=True):
            yield Document(text, group=_named_documents()[first][1])


def documents() -> Iterator[str]:
    """Yield the texts in a fixed order: the topics of the language reference, then the docstrings of each module.

    Raises:
        UserError: This Python lacks the source files of its library (some frozen or stripped installations).
    """
    return (text for _, text in _named_documents())


def module_groups() -> dict[str, str]:
    """Return the `Document.group` of each module that has a text."""
    named = _named_documents()
    return {name: named[first][1] for (name, _), first in zip(named, _groups(), strict=True) if name}


@cache
def _named_documents() -> tuple[tuple[str, str], ...]:
    """Return (name of the module or empty, text) of all documents: parsing the library takes seconds."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise UserError(
            f"this Python installation has no documentation ({topics} is missing): name text files with --data.files"
        )
    named = [("", text) for text in _topics(topics)]
    for name, tree in modules(library):
        text = _module_text(name, tree)
        if len(text) >= _MIN_MODULE:
            named.append((name, text))
    return tuple(named)


@cache
def _groups() -> list[int]:
    """Return the index of the first document of each document's group."""
    return similar_groups([text for _, text in _named_documents()])


def modules(library: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield (name, syntax tree) of the modules of a standard library in a fixed order.

    Args:
        library: The folder of the standard library.
    """
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        folders = path.relative_to(library).parts[:-1]
        if _SKIPPED.isdisjoint(folders) and not any(f == "pydoc_data" or f.startswith("config-") for f in folders):
            tree = _parse(path)
            if tree is not None:
                name = ".".join(path.relative_to(library).with_suffix("").parts)
                yield name.removesuffix(".__init__"), tree


def _topics(path: Path) -> Iterator[str]:
    """Yield the values of the dict literal in pydoc_data/topics.py, except those that are sections of longer ones.

    Many topics are such sections ("in", "is" and "not in" of "comparisons"); with them, validation text would occur in
    the training split as well.
    """
    tree = _parse(path)
    topics: dict[str, str] = {}
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                topics[name] = text.strip() + "\n"
    seen: set[str] = set()  # paragraphs of the topics kept so far, longest topic first
    kept = []
    for name in sorted(topics, key=lambda n: (-len(topics[n]), n)):
        paragraphs = [" ".join(paragraph.split()) for paragraph in topics[name].split("\n\n")]
        repeated = sum(len(p) for p in paragraphs if p in seen)
        if 2 * repeated < sum(map(len, paragraphs)):
            kept.append(name)
            seen.update(paragraphs)
    yield from (topics[name] for name in sorted(kept))


def _module_text(name: str, tree: ast.Module) -> str:
    """Return a module's docstrings in source order, in the layout of `help()`."""
    parts = [f"module {name}\n\n{doc}\n"] if (doc := ast.get_docstring(tree)) else []
    parts += _described(tree.body, indent="")
    return "\n".join(parts)


def _described(body: list[ast.stmt], indent: str) -> Iterator[str]:
    """Yield each class and function that has a docstring: its signature, then the docstring, indented."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if doc := ast.get_docstring(node):
            if isinstance(node, ast.ClassDef):
                head = f"class {node.name}"
            else:
                head = f"{node.name}({ast.unparse(node.args)})"
            lines = (f"{indent}    {line}" if line else "" for line in doc.splitlines())
            yield f"{indent}{head}\n\n" + "\n".join(lines) + "\n"
        if isinstance(node, ast.ClassDef):
            yield from _described(node.body, indent + "    ")


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file; None if it is not valid Python (templates, other encodings)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None
