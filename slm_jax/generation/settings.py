"""The sampling settings of a sequence, without JAX: commands declare their options with them."""

from dataclasses import dataclass, replace

from slm_jax.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one sequence."""

    temperature: float = 0.8
    """0: greedy decoding; higher values give more varied text."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens with this total probability; 1: from all."""
    min_p: float = 0.0
    """Sample from tokens at least this fraction as probable as the most probable one; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: makes tokens of the prompt and the text less probable, except the end of the text (CTRL,
    arXiv:1909.05858); 1: no penalty."""
    no_repeat_ngram: int = 0
    """Never repeat an n-gram of this many tokens in prompt and text, unless it ends the text; 0: no such rule."""
    seed: int = 0
    """Random seed; the same seed gives the same text."""

    def problems(self) -> list[str]:
        """Return one phrase for each value that is out of range."""
        rules = (
            ("temperature", 0 <= self.temperature < float("inf"), "must be 0 (greedy) or more, and finite"),
            ("top_k", 0 <= self.top_k < 2**31, f"must be from 0 (all) to {2**31 - 1}"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 (all) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "must be above 0; 1 is no penalty"),
            ("no_repeat_ngram", 0 <= self.no_repeat_ngram < 2**31, f"must be from 0 (no rule) to {2**31 - 1}"),
            ("seed", 0 <= self.seed < 2**32, f"must be from 0 to {2**32 - 1}"),
        )
        return [f"{name} {getattr(self, name)} {rule}" for name, valid, rule in rules if not valid]

    def check(self) -> None:
        """Validate the settings.

        Raises:
            UserError: Values are out of range; the message names all of them.
        """
        if problems := self.problems():
            raise UserError("; ".join(problems))

    def with_seed_offset(self, n: int) -> "Sampling":
        """Return the same settings with `n` added to the seed, modulo 2^32."""
        return replace(self, seed=(self.seed + n) % 2**32)
