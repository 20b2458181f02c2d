"""Imports cost nothing and reach nothing; the tokenizer knows no jax; documented names exist."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import slm_jax

IMPORT_ALL = """
import importlib, importlib.util, pkgutil, socket, sys
def refuse(*args, **kwargs): raise AssertionError("a network connection on import")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
for package in sys.argv[1:]:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if module.name.startswith("slm_jax.serve.") and importlib.util.find_spec("starlette") is None:
            continue  # the extra that it needs is not installed
        if module.name == "slm_jax.utils.foreign_tokenizer" and importlib.util.find_spec("tokenizers") is None:
            continue
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def test_the_tokenizer_imports_no_jax():
    done = python(IMPORT_ALL + "assert not {'jax', 'flax', 'slm_jax'} & sys.modules.keys()", "tokenizer")
    assert done.returncode == 0, done.stderr


def test_everything_imports_in_silence_without_network_or_devices():
    no_device = "from jax._src import xla_bridge\nassert not xla_bridge._backends, 'a device was opened'"
    done = python(IMPORT_ALL + no_device, "tokenizer", "slm_jax")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_package_alone_imports_no_jax():
    assert python("import slm_jax, sys; assert 'jax' not in sys.modules").returncode == 0


def test_documented_names():
    from slm_jax import Config, Transformer, generate, load_run, train

    assert all(map(callable, (Config, Transformer, generate, load_run, train)))
    assert callable(slm_jax.train)


def test_extras_are_installed_in_one_way():
    """As in the README, and only those of pyproject.toml; the launch files and notebooks install from a URL."""
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [path for folder in ("slm_jax", "tokenizer", "configs", "tests") for path in (root / folder).rglob("*.*")]
    texts = {
        path.relative_to(root): path.read_text(encoding="utf-8")
        for path in [root / "README.md", root / ".github" / "CONTRIBUTING.md", *files]
        if path.suffix in (".py", ".md", ".toml") and "run_0" not in str(path) and path != Path(__file__)
    }
    named = set()
    for path, text in texts.items():
        assert not re.search(r"pip install '?\"?slm_jax", text), path
        named |= set(re.findall(r"pip install -e ['\"]\.\[([a-z-]+)\]", text))
        named |= set(re.findall(r"""install_command\(['"]([a-z-]+)['"]\)""", text))
        named |= set(re.findall(r'import_optional\([^()]*extra(?:: str )?= ?"([a-z-]+)"', text))
    assert named <= extras.keys()
    assert {"data", "serve", "logging", "gcs", "tokenizers"} <= named


def test_lowest_versions_are_pinned():
    """.ci/run installs them in an environment of their own, and runs tests there."""
    script = Path(__file__).parents[1] / ".ci" / "lowest.py"
    spec = importlib.util.spec_from_file_location("lowest", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    project = '[project]\ndependencies = ["jax>=0.7.2", "orbax-checkpoint>=0.11", "a.b[c,d]>=1.0rc1"]'
    assert module.lowest(project) == ["jax==0.7.2", "orbax-checkpoint==0.11", "a.b==1.0rc1"]
    for unbounded in ("jax", "jax>0.7", "jax>=0.7,<1", "jax==0.7"):
        with pytest.raises(ValueError, match="declare the lowest tested version"):
            module.lowest(f'[project]\ndependencies = ["{unbounded}"]')
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.split()
    declared = tomllib.loads(script.parents[1].joinpath("pyproject.toml").read_text())["project"]["dependencies"]
    assert [pin.replace("==", ">=") for pin in printed] == declared
