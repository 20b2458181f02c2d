"""The notebooks: one installation cell, which names the right cause when it fails, and stored outputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NO_CLONE = "git could not clone"
OLD_JAX = "may be too old"
OTHER = "the last lines of pip above name the cause"
# A project in ../slm_jax whose metadata need no build package, and that wants a JAX newer than the installed one.
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, settings=None):
    info = Path(folder, "slm_jax-1.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: slm_jax\\nVersion: 1\\nRequires-Dist: jax>=0.10\\n")
    return info.name
"""


def cells(path: Path, kind: str = "code") -> list[dict]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_all_notebooks_begin_with_the_same_installation():
    assert len(NOTEBOOKS) == 5
    assert len({source(cells(path)[0]).replace("slm_jax[data] @", "slm_jax @") for path in NOTEBOOKS}) == 1


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Return the Python of an empty virtual environment with pip."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    return folder / "venv" / "bin" / "python"


def install(python: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run the first cell of a notebook, with an unreachable repository, as Jupyter does in a folder."""
    code = source(cells(NOTEBOOKS[0])[0]).replace(
        "https://github.com/OWNER/slm_jax", "http://127.0.0.1:9/slm_jax"
    )  # nothing listens
    assert "127.0.0.1" in code
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    env = {**kept, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
    folder.joinpath("notebooks").mkdir()
    command = [python, "-c", code]
    return subprocess.run(command, cwd=folder / "notebooks", env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_repository_that_cannot_be_cloned_is_named(environment, tmp_path):
    done = install(environment, tmp_path)
    assert done.returncode != 0
    assert f"RuntimeError: slm_jax was not installed: {NO_CLONE} http://127" in done.stderr
    assert "git clone" in done.stdout  # the message of pip
    assert OLD_JAX not in done.stderr


def test_an_installed_jax_that_is_too_old_is_named(environment, tmp_path):
    (site,) = environment.parents[1].glob("lib/python*/site-packages")
    info = site / "jax-0.0.1.dist-info"
    info.mkdir()
    try:
        info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.0.1\n")
        info.joinpath("RECORD").touch()
        (tmp_path / "slm_jax").mkdir()
        (tmp_path / "backend.py").write_text(BACKEND)
        (tmp_path / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        done = install(environment, tmp_path)
    finally:
        shutil.rmtree(info)
    assert done.returncode != 0
    assert f"slm_jax was not installed: ['jax==0.0.1'] {OLD_JAX}" in done.stderr
    assert NO_CLONE not in done.stderr


def test_another_failure_of_pip_is_shown(environment, tmp_path):
    (tmp_path / "slm_jax").mkdir()  # a checkout without pyproject.toml
    done = install(environment, tmp_path)
    assert done.returncode != 0
    assert f"slm_jax was not installed: {OTHER}" in done.stderr
    assert "pyproject.toml" in done.stdout
    assert NO_CLONE not in done.stderr
    assert OLD_JAX not in done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_of_a_real_run_are_stored(path):
    """Every code cell was run, in order and without an error; at least one of its outputs is a picture."""
    code_cells = cells(path)
    assert [cell["execution_count"] for cell in code_cells] == list(range(1, len(code_cells) + 1))
    outputs = [output for cell in code_cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join("".join(output.get("text", [])) for output in outputs)
    assert text.strip()
    assert "/tmp" not in text  # a path of the machine that ran it
    assert "/home" not in text
    assert path.stat().st_size < 400_000
