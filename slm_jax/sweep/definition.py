"""The file that defines a set of trials: a table of its own, then the options that all trials share."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from slm_jax.config.presets import read_toml
from slm_jax.config.schema import Config
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_text

Definition = TypeVar("Definition")


def save_definition(path: Path, header: str, own: Mapping[str, Any], base: Config) -> None:
    """Write a definition, so that its folder alone continues the trials.

    Args:
        path: The file, `NAME.toml`; its table is called NAME.
        header: Comment at the top.
        own: The values of the table.
        base: The options that all trials share.
    """
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in own.items()]
    replace_text(path, "\n".join([f"# {header}", f"[{path.stem}]", *lines, "", base.to_toml()]))


def read_definition(path: Path, make: Callable[[Config, dict[str, Any]], Definition]) -> Definition:
    """Read a definition.

    Args:
        path: The file, as for `save_definition`.
        make: Makes the definition from the shared options and the values of its table.

    Raises:
        UserError: The file cannot be read, or is invalid.
    """
    tree = read_toml(path)
    own = tree.pop(path.stem, None)
    config = Config.from_tree(tree, str(path))
    try:
        if not isinstance(own, dict):
            raise ValueError(f"it has no table {path.stem}")
        return make(config, own)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the definition of a {path.stem} ({error}): use another folder") from None


def require_same_options(new: Config, saved: Config, folder: Path, others: Sequence[str] = ()) -> None:
    """Refuse to mix trials with other shared options into a folder.

    Args:
        new: The shared options of now.
        saved: Those of the trials in the folder.
        folder: The folder.
        others: Further differences, in words.

    Raises:
        UserError: Names what differs.
    """
    differing = [f"{name} ({value!r}, before {old!r})" for name, (value, old) in new.differences(saved).items()]
    if differing or others:
        listed = ", ".join([*differing, *others])
        raise UserError(f"{folder} holds trials with other options: {listed}. Give the same, or another --to")
