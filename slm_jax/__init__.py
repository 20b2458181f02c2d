"""slm_jax: from raw text to a trained, measured, usable small language model in JAX.

    from slm_jax import Config, Transformer, train, generate, load_run

Names are imported when they are first used, so that `import slm_jax` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm_jax import generate, train
    from slm_jax.config import Config
    from slm_jax.curriculum import Curriculum
    from slm_jax.load import load_run
    from slm_jax.orchestrator import orchestrate
    from slm_jax.transformer import Transformer

__version__ = "0.1.0"
__all__ = ["Config", "Curriculum", "Transformer", "generate", "load_run", "orchestrate", "train"]

_HOMES = {"Config": "slm_jax.config", "Transformer": "slm_jax.transformer", "load_run": "slm_jax.load"}
_HOMES |= {"Curriculum": "slm_jax.curriculum", "orchestrate": "slm_jax.orchestrator"}


def __getattr__(name: str) -> Any:
    if name in ("train", "generate"):
        return importlib.import_module(f"slm_jax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
