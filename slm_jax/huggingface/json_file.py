"""Reading the JSON files of folders that other programs have written."""

import json
from pathlib import Path
from typing import Any

from slm_jax.utils.errors import UserError


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        UserError: It is not valid JSON, nested too deeply, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: not a JSON object")
    return content
