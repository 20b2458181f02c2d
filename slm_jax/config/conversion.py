"""Options of a public function: validated ones, or what they are loaded from."""

from pathlib import Path
from typing import Any, Protocol, Self, TypeVar


class Loadable(Protocol):
    """A config or a curriculum."""

    @classmethod
    def load(cls, preset: str | Path, /) -> Self:
        """Load the preset of a name, or a TOML file."""

    @classmethod
    def from_tree(cls, tree: dict[str, Any], /) -> Self:
        """Validate nested dicts."""


T = TypeVar("T", bound=Loadable)


def loaded(value: T | str | Path | dict[str, Any], kind: type[T]) -> T:
    """Return the options that an argument stands for.

    Args:
        value: The options, the name of a preset, the path of a TOML file, or nested dicts.
        kind: The class of the options, `Config` or `Curriculum`.

    Raises:
        UserError: The options are invalid, or there is no such preset.
        TypeError: The argument is something else.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, dict):
        return kind.from_tree(value)
    if isinstance(value, str | Path):
        return kind.load(value)
    raise TypeError(
        f"expected a {kind.__name__}, the name of a preset, the path of a TOML file or nested dicts, not "
        f"{type(value).__name__}: such as {kind.__name__}.load()"
    )
