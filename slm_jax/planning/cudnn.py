"""cuDNN's attention compiled for a GPU that is not present.

JAX checks the widths that cuDNN supports against the first GPU of this machine, and takes another path without one.
While a program is lowered for a described GPU, its questions are answered for that GPU instead. The functions are
private to JAX: if a release has others, `described_gpu` fails with a message, and no program is compiled for another
GPU than the one that was asked for.
"""

import contextlib
from collections.abc import Iterator

from slm_jax.utils.errors import UserError


@contextlib.contextmanager
def described_gpu(capability: tuple[int, int]) -> Iterator[None]:
    """Lower cuDNN's attention for GPUs of a compute capability.

    Args:
        capability: The compute capability (major, minor).

    Raises:
        UserError: If the installed JAX checks its GPU in another way.
    """
    import jax
    from jax._src.cudnn import fused_attention_stablehlo as attention

    def as_numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    answers = {
        "check_compute_capability": lambda least: capability >= as_numbers(least),
        "is_cuda_compute_capability_equal": lambda other: capability == as_numbers(other),
    }
    if missing := [name for name in answers if not hasattr(attention, name)]:
        raise UserError(
            f"jax {jax.__version__} has no {missing[0]} in {attention.__name__}: cuDNN's attention cannot be compiled "
            "without a GPU; use --model.attention blocks"
        )
    originals = {name: getattr(attention, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(attention, name, answer)
        yield
    finally:
        for name, original in originals.items():
            setattr(attention, name, original)
