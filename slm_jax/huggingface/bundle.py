"""Bundle a module and the `tokenizer` modules that it imports into one Python file, which an exported folder carries.

The source stays in its modules; the file is generated at each export.
"""

import ast
import re
from pathlib import Path

import tokenizer

_ROOTS = {"tokenizer": Path(tokenizer.__file__).parent}
_FUTURE = "from __future__ import annotations"
_ORIGIN = "Generated from the sources of slm_jax (MIT license): its tokenizer, then the class for transformers."


def bundle(path: Path) -> str:
    """Return the source of a module with the modules it imports from `tokenizer` placed before it.

    Imports between these modules are removed. A private name that several modules define is renamed in all but the
    first of them.

    Args:
        path: The module.

    Returns:
        The source of one self-contained module.

    Raises:
        ValueError: Two modules define the same public name, or an import cannot be bundled (`import … as`, packages).
    """
    modules: list[tuple[str, Path]] = []
    _visit(path.stem, path, modules)
    owners: dict[str, str] = {}  # the module that defines each name
    sources = []
    for name, file in modules:
        source = file.read_text(encoding="utf-8")
        for defined in sorted(_defined_names(ast.parse(source))):
            if owners.setdefault(defined, name) == name:
                continue
            if not defined.startswith("_"):
                raise ValueError(f"{defined} is defined in {owners[defined]} and in {name}")
            source = re.sub(rf"(?<![.\w]){defined}\b", f"{defined}_of_{name.rpartition('.')[2]}", source)
        sources.append((name, _remove_imports(source)))
    *dependencies, (_, main) = sources
    docstring = (ast.get_docstring(ast.parse(main), clean=False) or "").rstrip()
    rule = "-" * 8
    parts = [f'"""{docstring}\n\n{_ORIGIN}\n"""\n', f"{_FUTURE}\n"]
    parts += [f"\n# {rule} {name} {rule}\n\n{_docstring_as_comment(source)}" for name, source in dependencies]
    parts.append(f"\n# {rule} for transformers {rule}\n\n{_docstring_as_comment(main)}")
    text = "\n".join(parts)
    compile(text, path.name, "exec")
    return re.sub(r"\n{4,}", "\n\n\n", text)


def _visit(name: str, path: Path, modules: list[tuple[str, Path]]) -> None:
    """Append a module after everything that it imports (depth-first)."""
    if any(file == path for _, file in modules):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if _is_own_import(node):
            assert isinstance(node, ast.ImportFrom)
            assert node.module
            if any(alias.asname for alias in node.names):
                raise ValueError(f"{name}: `import … as` of {node.module} cannot be bundled")
            root, _, rest = node.module.partition(".")
            imported = _ROOTS[root] / f"{rest.replace('.', '/')}.py"
            if not imported.is_file():
                raise ValueError(f"{name}: {node.module} is not a single-file module")
            if not any(file == imported for _, file in modules):
                _visit(node.module, imported, modules)
    if not any(file == path for _, file in modules):
        modules.append((name, path))


def _is_own_import(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in _ROOTS


def _defined_names(tree: ast.Module) -> set[str]:
    """Return the names that a module defines at its top level, other than by imports."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def _remove_imports(source: str) -> str:
    """Return the source without imports of bundled modules and of `__future__` (which is imported once, at the top)."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if _is_own_import(node) or (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            assert isinstance(node, ast.ImportFrom)
            assert node.end_lineno
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
            if node.col_offset:  # it may be the only statement of a function or a condition
                lines[node.lineno - 1] = " " * node.col_offset + "pass"
    return "\n".join(lines) + "\n"


def _docstring_as_comment(source: str) -> str:
    """Return the source with the module's docstring turned into a comment."""
    node = ast.parse(source).body[0]
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
        return source.strip("\n") + "\n"
    assert node.end_lineno
    lines = source.splitlines()
    comment = [f"# {line}".rstrip() for line in node.value.value.strip("\n").splitlines()]
    return "\n".join(comment) + "\n\n" + "\n".join(lines[node.end_lineno :]).strip("\n") + "\n"
