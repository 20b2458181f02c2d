"""Evaluation of a trained model: held-out text, minimal pairs, last words, word analogies and multiple choice.

    from slm_jax.evaluation import evaluate
    evaluate("runs/NAME", ["heldout", "blimp=my/blimp.jsonl"]).rows

The command is `python -m slm_jax.evaluate`. `harness` runs a model in EleutherAI's lm-evaluation-harness.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slm_jax.evaluation.suite import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from slm_jax.evaluation import suite

        return getattr(suite, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
