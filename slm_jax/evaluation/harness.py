"""EleutherAI's lm-evaluation-harness on the model of a run: its tasks, its prompts, its metrics, our log-probabilities.

    python -m slm_jax.evaluation.harness --model slm_jax --model_args run=runs/NAME --tasks lambada_openai,arc_easy

takes every option of `lm_eval` (`pip install -e '.[eval]'`). From Python:

    import lm_eval
    from slm_jax.evaluation.harness import SlmJax
    lm_eval.simple_evaluate(SlmJax(run="runs/NAME"), tasks=["arc_easy"])

A context begins a document: <EOS> stands before it. Of one longer than the trained length the beginning is cut off; a
rolling log-likelihood is that of the whole text, in windows of which a further one scores half of its tokens.
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from slm_jax.evaluation.encoding import continuations, sentences
from slm_jax.evaluation.scoring import Scorer
from slm_jax.generation.decode import encode_prompt, generate_ids, suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.run.load import load_run
from slm_jax.utils.errors import UserError, command_errors

NAME = "slm_jax"
_MAX_NEW_TOKENS = 256  # where a task does not say


class Answers:
    """The three questions that the harness asks a model. `requests` are its Instances, of which `args` is read."""

    def __init__(self, run: str = "", context: int = 0, batch_tokens: int = 0, batch_size: Any = 16, **_: Any) -> None:
        """run: the directory, empty: the newest. context: 0: the trained length. batch_size: texts written at once.
        What else the harness passes (device, max_batch_size) does not concern us."""
        super().__init__()
        loaded = load_run(run or None)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._scorer = Scorer(loaded.model, int(context) or loaded.context, batch_tokens=int(batch_tokens))
        # "auto", and 1, which the harness passes where nobody asked for a number, leave it to us.
        self._rows = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 1 else 16
        self._name = f"{loaded.run.path} step {loaded.step}"

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests by."""
        return self._tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results."""
        return {"model": NAME, "run": self._name}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding writes it) of each continuation, given its context."""
        pairs = [request.args for request in requests]
        scores = self._scorer.score(continuations(self._tokenizer, pairs).items)
        return [(scored.total, scored.greedy) for scored in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, whole, from its first token on."""
        texts = [request.args[0] for request in requests]
        return [scored.total for scored in self._scorer.score(sentences(self._tokenizer, texts))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation, up to the first of its stop texts (left out), <EOS> or the most tokens."""
        groups: dict[tuple[Sampling, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_settings(request.args[1])].append(i)
        texts = [""] * len(requests)
        eos = self._tokenizer.token2id["<EOS>"]
        for (sampling, most), members in groups.items():
            for start in range(0, len(members), self._rows):
                batch = members[start : start + self._rows]
                prompts = [encode_prompt(self._tokenizer, requests[i].args[0]) for i in batch]
                suppress = suppressed_ids(self._tokenizer)
                rows = generate_ids(self._model, prompts, most, sampling, self._scorer.context, suppress, [eos])
                for i, row in zip(batch, rows, strict=True):
                    text = self._tokenizer.decode([token for token in row if token != eos])
                    texts[i] = _until(text, requests[i].args[1].get("until") or ())
        return texts


def _settings(wanted: dict[str, Any]) -> tuple[Sampling, int]:
    """How a request is to be continued, and by how many tokens at most: greedily unless it asks for samples."""
    most = int(wanted.get("max_gen_toks") or wanted.get("max_tokens") or _MAX_NEW_TOKENS)
    if not wanted.get("do_sample", float(wanted.get("temperature") or 0) > 0):
        return Sampling(temperature=0), most
    values = {"temperature": float, "top_p": float, "top_k": int, "seed": int}
    given = {name: kind(wanted[name]) for name, kind in values.items() if wanted.get(name) is not None}
    return Sampling(**given), most


def _until(text: str, stops: str | Sequence[str]) -> str:
    """The text up to the first stop in it."""
    places = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop]
    found = [place for place in places if place >= 0]
    return text[: min(found)] if found else text


@functools.cache
def model_class() -> type:
    """`SlmJax`, registered with the harness as the model `slm_jax`. Raises UserError if it is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error}): pip install -e '.[eval]' in a clone, or by itself: "
            "pip install lm-eval"
        ) from None

    @register_model(NAME)
    class SlmJax(Answers, LM):
        """The model of a run for lm-evaluation-harness."""

    return SlmJax


def __getattr__(name: str) -> Any:
    if name == "SlmJax":  # made when it is wanted: the harness is optional, and slow to import
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """`lm_eval` with our model among its models."""
    from slm_jax.utils.process import tune_process

    model_class()
    tune_process()
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    with command_errors():
        main()
