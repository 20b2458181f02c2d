"""A model of a run in EleutherAI's lm-evaluation-harness: its tasks, prompts and metrics with our log-probabilities.

    python -m slm_jax.evaluation.harness --model slm_jax --model_args run=runs/NAME --tasks lambada_openai,arc_easy

accepts all options of `lm_eval` (`pip install -e '.[eval]'`). From Python:

    import lm_eval
    from slm_jax.evaluation.harness import SlmJax
    lm_eval.simple_evaluate(SlmJax(run="runs/NAME"), tasks=["arc_easy"])

A context is treated as the beginning of a document, after an <EOS>. Contexts that exceed the trained length are
truncated on the left. A rolling log-likelihood covers the complete text, in windows that overlap by half.
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from slm_jax.evaluation.encoding import continuation_items, sentence_items
from slm_jax.evaluation.scoring import Scorer
from slm_jax.generation.decode import encode_prompt, generate_ids, suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.run.load import load_run
from slm_jax.utils.command import command_errors
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import install_command
from slm_jax.utils.text_tokenizer import decode_continuation

NAME = "slm_jax"
_DEFAULT_BATCH_SIZE = 16
_DEFAULT_MAX_TOKENS = 256  # of a generation request without a limit


class HarnessModel:
    """The request types of the harness's `LM` interface, without depending on the harness.

    Requests are the harness's `Instance` objects, of which only `args` is read.
    """

    def __init__(
        self,
        run: str = "",
        context: int = 0,
        batch_tokens: int = 0,
        batch_size: Any = 16,
        step: str | int = "",
        **_: Any,
    ) -> None:
        """Load the model of a run.

        Args:
            run: The run directory; empty: the newest in runs/.
            context: Maximum number of input tokens; 0: the trained length.
            batch_tokens: Tokens scored per batch; 0: a default for the device.
            batch_size: Number of texts generated at a time.
            step: The checkpoint: best, last, or the number of a step; empty: as for `load_run`.
            _: Other arguments that the harness passes (device, max_batch_size), which are ignored.

        Raises:
            UserError: The run cannot be loaded.
        """
        super().__init__()
        loaded = load_run(run or None, step=step)
        self._model = loaded.model
        self._tokenizer = loaded.tokenizer
        self._scorer = Scorer(loaded.model, int(context) or loaded.context, batch_tokens=int(batch_tokens))
        # The harness passes 1 if no batch size was given; "auto" leaves the choice to the model.
        given = str(batch_size).isdecimal() and int(batch_size) > 1
        self._batch_size = int(batch_size) if given else _DEFAULT_BATCH_SIZE
        self._name = f"{loaded.run.path} step {loaded.step}"

    @property
    def tokenizer_name(self) -> str:
        """The key under which the harness caches requests."""
        return self._tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return the description that the harness adds to its results."""
        return {"model": NAME, "run": self._name}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations given their contexts.

        Returns:
            For each request the log-probability in nats, and whether greedy decoding generates the continuation.
        """
        pairs = [request.args for request in requests]
        scores = self._scorer.score(continuation_items(self._tokenizer, pairs).items)
        return [(scored.total, scored.greedy) for scored in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each complete text in nats, its first token included."""
        texts = [request.args[0] for request in requests]
        return [scored.total for scored in self._scorer.score(sentence_items(self._tokenizer, texts))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each context up to a stop string (excluded), <EOS> or the maximum length."""
        groups: dict[tuple[Sampling, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_generation_settings(request.args[1])].append(i)
        texts = [""] * len(requests)
        stops = self._tokenizer.stop_ids
        suppress = suppressed_ids(self._tokenizer)
        for (sampling, max_tokens), members in groups.items():
            for start in range(0, len(members), self._batch_size):
                batch = members[start : start + self._batch_size]
                prompts = [encode_prompt(self._tokenizer, requests[i].args[0]) for i in batch]
                rows = generate_ids(self._model, prompts, max_tokens, sampling, self._scorer.context, suppress, stops)
                for i, prompt, row in zip(batch, prompts, rows, strict=True):
                    kept = [token for token in row if token not in stops]
                    text = decode_continuation(self._tokenizer, prompt, kept)
                    texts[i] = _truncate(text, requests[i].args[1].get("until") or ())
        return texts


def _generation_settings(kwargs: dict[str, Any]) -> tuple[Sampling, int]:
    """Return the sampling of a request (greedy unless it asks for samples) and its maximum number of tokens."""
    max_tokens = int(kwargs.get("max_gen_toks") or kwargs.get("max_tokens") or _DEFAULT_MAX_TOKENS)
    if not kwargs.get("do_sample", float(kwargs.get("temperature") or 0) > 0):
        return Sampling(temperature=0), max_tokens
    types = {"temperature": float, "top_p": float, "top_k": int, "seed": int}
    given = {name: type_(kwargs[name]) for name, type_ in types.items() if kwargs.get(name) is not None}
    return Sampling(**given), max_tokens


def _truncate(text: str, stops: str | Sequence[str]) -> str:
    """Return the text before the first stop string."""
    if isinstance(stops, str):
        stops = [stops]
    positions = [text.find(stop) for stop in stops if stop]
    return text[: min((position for position in positions if position >= 0), default=len(text))]


@functools.cache
def model_class() -> type:
    """Return `SlmJax`, registered with the harness as the model `slm_jax`.

    Raises:
        UserError: The harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness is not installed ({error}): {install_command('eval')}") from None

    @register_model(NAME)
    class SlmJax(HarnessModel, LM):
        """The model of a run for lm-evaluation-harness."""

    return SlmJax


def __getattr__(name: str) -> Any:
    if name == "SlmJax":  # created on first use: the harness is optional, and slow to import
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command line of `lm_eval` with our model registered."""
    from slm_jax.utils.process import tune_process

    model_class()
    tune_process()
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    with command_errors():
        main()
