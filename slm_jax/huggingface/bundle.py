"""One Python file out of a module and what it imports of this repository: what an exported folder can carry.

The source stays in its modules; the file is made of them when a model is exported.
"""

import ast
import re
from pathlib import Path

import tokenizer

_ROOTS = {"tokenizer": Path(tokenizer.__file__).parent}
_FUTURE = "from __future__ import annotations"
_ORIGIN = "This file is made of the sources of slm_jax (MIT licence): those of its tokenizer, then the class."


def bundle(path: Path) -> str:
    """The source of a module with that of the `tokenizer` modules it imports before it, those imports left out.

    A private name that two modules define is told apart. Raises ValueError for a public one, and for what else cannot
    be put into one file.
    """
    order: list[tuple[str, Path]] = []
    _visit(path.stem, path, order)
    owners: dict[str, str] = {}
    parts = []
    for name, each in order:
        source = each.read_text(encoding="utf-8")
        for defined in sorted(_defined(ast.parse(source))):
            if owners.setdefault(defined, name) == name:
                continue
            if not defined.startswith("_"):
                raise ValueError(f"{defined} is defined in {owners[defined]} and in {name}")
            source = re.sub(rf"(?<![.\w]){defined}\b", f"{defined}_of_{name.rpartition('.')[2]}", source)
        parts.append((name, _without_own_imports(source)))
    *needed, (_, last) = parts
    doc = ast.get_docstring(ast.parse(last), clean=False) or ""
    first = f'"""{doc.rstrip()}\n\n{_ORIGIN}\n"""\n'
    own = "".join(f"\n\n# {'-' * 8} {name} {'-' * 8}\n\n{_without_docstring(source)}" for name, source in needed)
    text = f"{first}\n{_FUTURE}\n{own}\n\n# {'-' * 8} for transformers {'-' * 8}\n\n{_without_docstring(last)}"
    compile(text, path.name, "exec")
    return re.sub(r"\n{4,}", "\n\n\n", text)


def _visit(name: str, path: Path, order: list[tuple[str, Path]]) -> None:
    """Append the module after all that it imports."""
    if any(each == path for _, each in order):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if _is_own(node):
            assert isinstance(node, ast.ImportFrom)
            assert node.module
            if any(alias.asname for alias in node.names):
                raise ValueError(f"{name}: `import … as` of {node.module} cannot be put into one file")
            root, _, rest = node.module.partition(".")
            if not (found := _ROOTS[root] / f"{rest.replace('.', '/')}.py").is_file():
                raise ValueError(f"{name}: {node.module} is no module of one file")
            if not any(each == found for _, each in order):
                _visit(node.module, found, order)
    if not any(each == path for _, each in order):
        order.append((name, path))


def _is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _ROOTS


def _defined(tree: ast.Module) -> set[str]:
    """Names that a module gives something at its top level, imports apart."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def _without_own_imports(source: str) -> str:
    """The source without its imports of what is in the same file, and of __future__ (which come once, at the top)."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if _is_own(node) or (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            assert isinstance(node, ast.ImportFrom)
            assert node.end_lineno
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
            if node.col_offset:  # in a function or a condition, of which it may be all there is
                lines[node.lineno - 1] = " " * node.col_offset + "pass"
    return "\n".join(lines) + "\n"


def _without_docstring(source: str) -> str:
    """The source without the module's docstring, which becomes a comment."""
    node = ast.parse(source).body[0]
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
        return source.strip("\n") + "\n"
    assert node.end_lineno
    lines = source.splitlines()
    comment = [f"# {line}".rstrip() for line in node.value.value.strip("\n").splitlines()]
    return "\n".join(comment) + "\n\n" + "\n".join(lines[node.end_lineno :]).strip("\n") + "\n"
