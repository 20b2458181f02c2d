"""Ready-made tokenizers; `manifest.json` says what text each was learned from."""

from __future__ import annotations

from pathlib import Path

from tokenizer.errors import TokenizerError

_FOLDER = Path(__file__).parent
SUFFIX = ".hybtok"


def pretrained_names() -> list[str]:
    """The names that `HybridTokenizer.pretrained` knows."""
    return sorted(path.name.removesuffix(SUFFIX) for path in _FOLDER.glob(f"*{SUFFIX}"))


def path_of(name: str) -> Path:
    """The file of a ready-made tokenizer. Raises TokenizerError when there is none of that name."""
    names = pretrained_names()
    if name not in names:
        raise TokenizerError(f"there is no ready-made tokenizer {name!r}; there are: {', '.join(names) or 'none'}")
    return _FOLDER / f"{name}{SUFFIX}"
