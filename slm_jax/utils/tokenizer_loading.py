"""Loading of saved tokenizers of every kind."""

from pathlib import Path
from typing import Any

from slm_jax.utils.extras import install_command
from tokenizer import HybridTokenizer, TokenizerError


def load_tokenizer(path: str | Path) -> Any:
    """Load a saved tokenizer of either kind, or a `tokenizer.json` with the files next to it.

    Raises:
        TokenizerError: It is missing or damaged, or a foreign one needs a package that is not installed.
    """
    path = Path(path)
    if path.suffix not in (".zip", ".json"):
        return HybridTokenizer.load(path)
    try:
        from slm_jax.utils.foreign_tokenizer import ForeignTokenizer
    except ImportError:
        raise TokenizerError(
            f"{path} is read with the package tokenizers, which is not installed: {install_command('tokenizers')}"
        ) from None
    return ForeignTokenizer.load(path)
