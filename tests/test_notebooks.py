"""The notebooks: one installation cell, which names the right cause when it fails, and stored outputs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NO_CLONE = "git could not clone"
CONFLICT = "does not fit"
OTHER = "the last lines of pip above name the cause"
OLDEST_JAX = next(
    dependency.removeprefix("jax>=")
    for dependency in tomllib.loads((NOTEBOOKS[0].parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    if dependency.startswith("jax>=")
)
# The backend of a project in ../slm_jax that needs no build package.
BACKEND = """
import zipfile

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "slm_jax-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(f"slm_jax-1.dist-info/{path}", text)
    return name
"""


def wheel_files(name: str, version: str, requires: Sequence[str] = ()) -> dict[str, str]:
    """Return the metadata of a wheel without modules."""
    extras = sorted(set(re.findall(r'extra == "(\w+)"', " ".join(requires))))
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"]
    metadata += [f"Provides-Extra: {extra}\n" for extra in extras] + [f"Requires-Dist: {each}\n" for each in requires]
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return {"METADATA": "".join(metadata), "WHEEL": tag, "RECORD": ""}


def write_wheel(folder: Path, name: str, version: str, requires: Sequence[str] = ()) -> Path:
    """Write a wheel that pip can install without an index."""
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in wheel_files(name, version, requires).items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
    return path


def write_project(folder: Path, requires: Sequence[str]) -> None:
    """Write a project slm_jax into a folder, whose subfolder notebooks then looks like that of a checkout."""
    (folder / "slm_jax").mkdir()
    files = wheel_files("slm_jax", "1", requires)
    (folder / "backend.py").write_text(f"FILES = {files!r}\n{BACKEND}")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )


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


def without_index(wheels: Path | None = None) -> dict[str, str]:
    """Return the environment of a pip that reaches no index, and finds packages in a folder of wheels."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    found = {} if wheels is None else {"PIP_FIND_LINKS": str(wheels)}
    fixed = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
    return {**kept, **fixed, **found}


def install(
    python: Path, folder: Path, wheels: Path | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the first cell of a notebook, with an unreachable repository, as Jupyter does in a folder.

    Args:
        python: The Python of an environment.
        folder: A folder, in which `notebooks` is created.
        wheels: Where pip finds packages.
        before: Code that the kernel has run before.
    """
    code = source(cells(NOTEBOOKS[0])[0]).replace(
        "https://github.com/OWNER/slm_jax", "http://127.0.0.1:9/slm_jax"
    )  # nothing listens
    assert "127.0.0.1" in code
    folder.joinpath("notebooks").mkdir(exist_ok=True)
    command = [python, "-c", f"{before}\n{code}"]
    return subprocess.run(
        command, cwd=folder / "notebooks", env=without_index(wheels), capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_repository_that_cannot_be_cloned_is_named(environment, tmp_path):
    done = install(environment, tmp_path)
    assert done.returncode != 0
    assert f"RuntimeError: slm_jax was not installed: {NO_CLONE} http://127" in done.stderr
    assert "git clone" in done.stdout  # the message of pip
    assert CONFLICT not in done.stderr


@pytest.fixture
def jax_wheels(tmp_path):
    """Return a folder with wheels of two releases of jax and of the packages for accelerators."""
    folder = tmp_path / "wheels"
    for version in ("0.5.1", "99.1"):
        extras = [f'jax-cuda12-plugin=={version}; extra == "cuda12"', f'libtpu=={version}; extra == "tpu"']
        write_wheel(folder, "jax", version, [f"jaxlib=={version}", *extras])
        for name in ("jaxlib", "jax-cuda12-plugin", "libtpu"):
            write_wheel(folder, name, version)
    return folder


@pytest.fixture
def has_packages(environment, jax_wheels):
    """Return a function that installs packages, and one that returns what is installed; removed afterwards."""
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "slm_jax")

    def pip(*arguments):
        command = [environment, "-m", "pip", *arguments]
        return subprocess.run(command, env=without_index(jax_wheels), check=True, capture_output=True, text=True).stdout

    def installed():
        found = {each["name"]: each["version"] for each in json.loads(pip("list", "--format", "json"))}
        return {name: version for name, version in found.items() if name.replace("-", "_") != "slm_jax"}

    yield lambda *packages: pip("install", "-q", *packages), installed
    pip("uninstall", "-q", "-y", *names)


@pytest.mark.parametrize(
    ("old", "extra", "plugin"),
    [
        ("jax[tpu]==0.5.1", "[tpu]", "libtpu"),
        ("jax[cuda12]==0.5.1", "[cuda12]", "jax-cuda12-plugin"),
        ("jax==0.5.1", "", ""),
    ],
)
def test_a_jax_that_is_too_old_is_upgraded_for_its_accelerator(
    environment, tmp_path, jax_wheels, has_packages, old, extra, plugin
):
    install_packages, installed = has_packages
    install_packages(old)
    write_project(tmp_path, [f"jax>={OLDEST_JAX}"])
    done = install(environment, tmp_path, jax_wheels)
    assert done.returncode == 0, done.stderr
    assert f"jax 0.5.1 is older than {OLDEST_JAX}: upgrading it, pip install 'jax{extra}>={OLDEST_JAX}'" in done.stdout
    assert "installed slm_jax with jax 99.1, jaxlib 99.1" in done.stdout
    expected = {"jax": "99.1", "jaxlib": "99.1"} | ({plugin: "99.1"} if plugin else {})
    assert {name: version for name, version in installed().items() if name in (*expected, "libtpu")} == expected


def test_a_loaded_jax_that_was_upgraded_needs_a_restart(environment, tmp_path, jax_wheels, has_packages):
    install_packages, _ = has_packages
    install_packages("jax==0.5.1")
    write_project(tmp_path, [f"jax>={OLDEST_JAX}"])
    load = "import sys, types; sys.modules['jax'] = types.ModuleType('jax')"
    done = install(environment, tmp_path, jax_wheels, before=load)
    assert done.returncode != 0
    assert "RuntimeError: Restart the runtime, then run all cells again: it has loaded jax," in done.stderr


def test_a_jax_that_is_new_enough_is_kept(environment, tmp_path, jax_wheels, has_packages):
    """Also where a newer one exists; a project that rejects it is an error that names it."""
    install_packages, installed = has_packages
    write_wheel(jax_wheels, "jax", OLDEST_JAX, [f"jaxlib=={OLDEST_JAX}"])
    write_wheel(jax_wheels, "jaxlib", OLDEST_JAX)
    install_packages(f"jax=={OLDEST_JAX}")
    write_project(tmp_path, ["jax>=99"])
    done = install(environment, tmp_path, jax_wheels)
    assert done.returncode != 0
    assert f"slm_jax was not installed: it {CONFLICT} ['jax=={OLDEST_JAX}', 'jaxlib=={OLDEST_JAX}']" in done.stderr
    assert NO_CLONE not in done.stderr
    shutil.rmtree(tmp_path / "slm_jax")
    write_project(tmp_path, [f"jax>={OLDEST_JAX}"])
    assert install(environment, tmp_path, jax_wheels).returncode == 0
    assert installed()["jax"] == OLDEST_JAX


def test_the_cell_and_the_project_need_the_same_jax():
    assert f'OLDEST_JAX = "{OLDEST_JAX}"' in source(cells(NOTEBOOKS[0])[0])


def test_another_failure_of_pip_is_shown(environment, tmp_path):
    (tmp_path / "slm_jax").mkdir()  # a checkout without pyproject.toml
    done = install(environment, tmp_path)
    assert done.returncode != 0
    assert f"slm_jax was not installed: {OTHER}" in done.stderr
    assert "pyproject.toml" in done.stdout
    assert NO_CLONE not in done.stderr
    assert CONFLICT not in done.stderr


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
