"""slm_jax: from raw text to a trained, measured, usable small language model in JAX.

    from slm_jax import Config, train, load_run, generate

    config = Config.load("quickstart", **{"train.steps": 300})    every option, from a preset and overrides
    result = train(config)                                        text to model; result.run is the run directory
    run = load_run(result.run)                                    run.model, run.tokenizer, run.config
    generate(run.model, run.tokenizer, ["Once upon a time"])      continue texts

    Curriculum, orchestrate                                       one model through several texts, stage by stage
    Transformer                                                   the model, a Flax NNX module

Names are imported on first use, so that `import slm_jax` loads neither JAX nor anything else.
"""

TYPE_CHECKING = False  # as type checkers know it: `typing` takes 10 ms to import, in which Ctrl-C prints a traceback
if TYPE_CHECKING:
    from typing import Any

    from slm_jax.config.curriculum import Curriculum
    from slm_jax.config.schema import Config
    from slm_jax.curriculum.orchestrate import orchestrate
    from slm_jax.generation.decode import generate
    from slm_jax.model.transformer import Transformer
    from slm_jax.run.load import load_run
    from slm_jax.training.train import train

__version__ = "0.1.0"
__all__ = ["Config", "Curriculum", "Transformer", "generate", "load_run", "orchestrate", "train"]

_MODULES = {
    "Config": "slm_jax.config.schema",
    "Curriculum": "slm_jax.config.curriculum",
    "Transformer": "slm_jax.model.transformer",
    "generate": "slm_jax.generation.decode",
    "load_run": "slm_jax.run.load",
    "orchestrate": "slm_jax.curriculum.orchestrate",
    "train": "slm_jax.training.train",
}


def __getattr__(name: str) -> "Any":
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
