"""The pretrained tokenizers of the package; `manifest.json` lists the text that each was trained on."""

from __future__ import annotations

from pathlib import Path

from tokenizer.errors import TokenizerError

_FOLDER = Path(__file__).parent
SUFFIX = ".hybtok"


def pretrained_names() -> list[str]:
    """Return the names that `HybridTokenizer.pretrained` accepts, sorted."""
    return sorted(path.name.removesuffix(SUFFIX) for path in _FOLDER.glob(f"*{SUFFIX}"))


def path_of(name: str) -> Path:
    """Return the file of a pretrained tokenizer.

    Raises:
        TokenizerError: There is no pretrained tokenizer of that name.
    """
    names = pretrained_names()
    if name not in names:
        raise TokenizerError(f"no pretrained tokenizer {name!r}; available: {', '.join(names) or 'none'}")
    return _FOLDER / f"{name}{SUFFIX}"
