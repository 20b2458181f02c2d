"""Import of the libraries that only some sources need."""

import importlib
from typing import Any

from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import install_command


def import_optional(module: str, purpose: str) -> Any:
    """Import a library of the extra `[data]`.

    Args:
        module: The module's name.
        purpose: What it is needed for, for the error message: "reading Parquet".

    Raises:
        UserError: The library is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs {module}, which is not installed: {install_command('data')}") from None
