"""Preset files: those of the package by name, and any TOML file by path."""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from slm_jax.utils.errors import UserError


def preset_names(curricula: bool = False) -> list[str]:
    """Return the names of the presets of the package, sorted.

    Args:
        curricula: Those of curricula (which have stages) instead of runs.
    """
    paths = sorted(_preset_folder().glob("*.toml"))
    return [path.stem for path in paths if ("\n[[stages]]" in path.read_text(encoding="utf-8")) == curricula]


def _preset_folder() -> Path:
    """Return `configs/`, which is next to the packages in a source tree and inside the package in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def reference_path(name: str) -> Path:
    """Return the path of the reference result of a preset, which may not exist."""
    return _preset_folder() / "references" / f"{name}.json"


def reference_names() -> list[str]:
    """Return the presets that have a reference result, sorted."""
    return sorted(path.stem for path in reference_path("any").parent.glob("*.json"))


def read_preset(preset: str | Path, curricula: bool = False) -> dict[str, Any]:
    """Read a preset as nested dicts.

    Args:
        preset: Name of a preset, or path of a TOML file.
        curricula: Accept curricula, and look names up among these.

    Raises:
        UserError: There is no such preset, or it cannot be read.
    """
    path = Path(preset)
    if path.suffix != ".toml" and not path.is_file():
        path = _preset_folder() / f"{preset}.toml"
        if not path.is_file():
            names = preset_names(curricula)
            near = difflib.get_close_matches(str(preset), names, n=1, cutoff=0.5)
            hint = f", perhaps you meant {near[0]}" if near else ""
            raise UserError(f"no preset named {preset}{hint} (available: {', '.join(names)}; or give a .toml file)")
    tree = read_toml(path)
    if "stages" in tree and not curricula:
        raise UserError(f"{path} is a curriculum of several stages: python -m slm_jax.orchestrator --config {preset}")
    return tree


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as nested dicts.

    Raises:
        UserError: The file cannot be read, or is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows write a byte order mark
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
