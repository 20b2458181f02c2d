"""Optional packages: the extras of pyproject.toml."""

import importlib
from typing import Any

from slm_jax.utils.errors import UserError


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra, and where to run it."""
    return f"pip install -e '.[{extra}]' (in a clone of slm_jax)"


def import_optional(module: str, purpose: str, extra: str = "data") -> Any:
    """Import a library of an extra.

    Args:
        module: The module's name.
        purpose: What it is needed for, for the error message: "reading Parquet".
        extra: The extra that installs it.

    Raises:
        UserError: The library is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs {module}, which is not installed: {install_command(extra)}") from None
