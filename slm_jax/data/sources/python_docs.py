"""The embedded corpus: the documentation that every Python installation carries.

`pydoc_data.topics` (the language reference that `help()` shows) and the docstrings of the standard library, about
2.5 MB of English. Source files are read with `ast`; nothing is imported or run, so the text is the same on every
machine with the same Python version.
"""

import ast
import itertools
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm_jax.data.sources.documents import Document
from slm_jax.utils.errors import UserError

# Not documentation: tests, vendored packages, what varies between installations.
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
_MINIMUM = 200  # characters; shorter modules say next to nothing


class PythonDocs:
    """See `Source`."""

    name = "python-docs"

    def describe(self) -> Any:
        """Python's version."""
        return platform.python_version()

    def read(self, position: Any = None) -> "_Reader":
        """position: the number of documents that were read."""
        return _Reader(position or 0)


class _Reader:
    version = platform.python_version()

    def __init__(self, done: int):
        self._done = done

    def __iter__(self) -> Iterator[Document]:
        for text in itertools.islice(documents(), self._done, None):
            self._done += 1
            yield Document(text)

    def position(self) -> int:
        return self._done


def documents() -> Iterator[str]:
    """The documents in a fixed order: each topic of the language reference, then each module with its docstrings.

    Raises UserError on a Python without the sources of its library (some frozen or stripped installations).
    """
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if not topics.is_file():
        raise UserError(f"this Python carries no documentation ({topics} is missing): give text with --data.files")
    yield from _topics(topics)
    for name, tree in modules(library):
        text = _module_text(name, tree)
        if len(text) >= _MINIMUM:
            yield text


def modules(library: Path) -> Iterator[tuple[str, ast.Module]]:
    """(name, syntax tree) of the documented modules of a standard library, in a fixed order."""
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        folders = path.relative_to(library).parts[:-1]
        if _SKIPPED.isdisjoint(folders) and not any(f == "pydoc_data" or f.startswith("config-") for f in folders):
            tree = _parse(path)
            if tree is not None:
                name = ".".join(path.relative_to(library).with_suffix("").parts)
                yield name.removesuffix(".__init__"), tree


def _topics(path: Path) -> Iterator[str]:
    """The values of the one dict literal in pydoc_data/topics.py, without those that are sections of longer ones.

    Many topics are ("in", "is" and "not in" are parts of "comparisons"); left in, they would put text that is
    validated on into the training side as well.
    """
    tree = _parse(path)
    literals = [
        n.value for n in (tree.body if tree else ()) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)
    ]
    topics = {name: text.strip() + "\n" for literal in literals for name, text in ast.literal_eval(literal).items()}
    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda n: (-len(topics[n]), n)):
        paragraphs = [" ".join(paragraph.split()) for paragraph in topics[name].split("\n\n")]
        repeated = sum(len(p) for p in paragraphs if p in seen)
        if 2 * repeated < sum(map(len, paragraphs)):
            kept.append(name)
            seen.update(paragraphs)
    yield from (topics[name] for name in sorted(kept))


def _module_text(name: str, tree: ast.Module) -> str:
    """A module's docstrings in the order of its source, as `help()` lays them out."""
    parts = [f"module {name}\n\n{doc}\n"] if (doc := ast.get_docstring(tree)) else []
    parts += _described(tree.body, indent="")
    return "\n".join(parts)


def _described(body: list[ast.stmt], indent: str) -> Iterator[str]:
    """Each class and function with a docstring: its head, then the text indented under it."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_class = isinstance(node, ast.ClassDef)
        if doc := ast.get_docstring(node):
            head = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})"
            lines = (f"{indent}    {line}" if line else "" for line in doc.splitlines())
            yield f"{indent}{head}\n\n" + "\n".join(lines) + "\n"
        if is_class:
            yield from _described(node.body, indent + "    ")


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree, or None for a file that is not valid Python (templates, other encodings)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None
