"""Print constraints for pip that pin each dependency of the project to its lowest declared version.

    python .ci/lowest.py > constraints.txt
    pip install -c constraints.txt -e ".[test]"

The dependencies of the extras (tools, data formats) are not pinned.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_DEPENDENCY = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)")


def lowest(pyproject: str) -> list[str]:
    """Return NAME==VERSION for each dependency of a project.

    Args:
        pyproject: The content of its pyproject.toml.

    Raises:
        ValueError: A dependency is not declared as NAME>=VERSION, so that it has no lowest version to test.
    """
    pins = []
    for dependency in tomllib.loads(pyproject)["project"]["dependencies"]:
        match = _DEPENDENCY.fullmatch(dependency)
        if match is None:
            raise ValueError(f"dependency {dependency!r}: declare the lowest tested version, NAME>=VERSION")
        pins.append(f"{match[1]}=={match[2]}")
    return pins


if __name__ == "__main__":
    sys.stdout.writelines(f"{pin}\n" for pin in lowest(PYPROJECT.read_text(encoding="utf-8")))
