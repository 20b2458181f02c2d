"""The one-way rule of the packages: each layer imports only earlier ones, no module cycles, nothing imports a command.

Every import counts, also inside functions and under TYPE_CHECKING: what a reader has to follow is the same.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each package may import those of its own line and of the lines above it.
LAYERS = (
    {"tokenizer"},
    {"utils"},
    {"config"},
    {"chat"},
    {"distributed"},
    {"model"},
    {"run", "performance", "generation"},
    {"data", "serve"},
    {"evaluation", "report", "huggingface"},
    {"training"},
    {"planning"},
    {"curriculum", "checks", "sweep"},
    {"scaling"},
    {"cli"},
)
# Within a line, a package does not import another one of the line.
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("slm_jax", "tokenizer")
    for path in (ROOT / package).rglob("*.py")
    if "exported" not in path.parts  # the class for transformers: bundled into one file when a model is exported
}
COMMANDS = {name for name in MODULES if name.endswith(".__main__") or (name.count(".") == 1 and "slm_jax" in name)}
COMMANDS -= {f"slm_jax.{package}" for package in LEVEL}


def imports_of(name: str) -> set[str]:
    """Modules of the project that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found |= {submodule if submodule in MODULES else node.module or ""} & MODULES.keys()
    return found - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}
IMPORTS["slm_jax"] = set()  # its names are imported on first use: `import slm_jax` imports nothing else


def package_of(name: str) -> str:
    """The package of the layers that a module belongs to; "" for slm_jax itself and for its commands."""
    first, *rest = name.split(".")
    return first if first == "tokenizer" else rest[0] if rest and rest[0] in LEVEL else ""


def closure(*names: str) -> set[str]:
    """The modules that these import, directly or not, and these themselves."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += IMPORTS[name]
    return found


def test_each_layer_imports_only_earlier_ones():
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if package_of(name) and package_of(other) and package_of(name) != package_of(other) and name not in COMMANDS
        if LEVEL[package_of(other)] >= LEVEL[package_of(name)]
    ]
    assert not wrong


def test_nothing_imports_a_command():
    assert "slm_jax.train" in COMMANDS
    wrong = [f"{name} imports {other}" for name, others in IMPORTS.items() for other in others if other in COMMANDS]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    assert not [name for name in MODULES if any(name in closure(other) for other in IMPORTS[name])]


# What runs at each step of a plain run; the loop imports the step and gets the other two from `setup`. Not counted: the
# assembly (`steps`, `setup`) and `tokenizer/`.
CORE = ("slm_jax.training.loop", "slm_jax.training.optimizer", "slm_jax.training.health")
# Features that a run may do without.
FEATURES = (
    "slm_jax.training.options",
    "slm_jax.training.dpo",
    "slm_jax.model.lora",
    "slm_jax.training.trial",
    "slm_jax.training.tasks",
)


def test_the_core_path_can_be_read_in_an_evening():
    """The number in slm_jax/README.md is an upper bound of the core and what it imports, and a close one."""
    modules = closure(*CORE)
    lines = sum(len(MODULES[name].read_text(encoding="utf-8").splitlines()) for name in modules if "slm_jax" in name)
    text = (ROOT / "slm_jax" / "README.md").read_text(encoding="utf-8")
    stated = int(re.search(r"at most\s+([\d,]+) lines", text)[1].replace(",", ""))
    assert 0.95 * stated <= lines <= stated
    assert not {package_of(name) for name in modules} & {"report", "huggingface", "serve", "curriculum", "evaluation"}
    assert not [name for name in modules if name.startswith(FEATURES)]


@pytest.mark.parametrize("package", ["slm_jax", "tokenizer"])
def test_few_files_lie_beside_the_folders(package):
    assert len(list((ROOT / package).glob("*.py"))) <= 16


def test_no_module_asks_for_the_default_backend():
    """Programs are compiled for the devices of a mesh: see slm_jax/distributed/platform.py."""
    assert [str(path) for path in MODULES.values() if "default_backend" in path.read_text(encoding="utf-8")] == []
