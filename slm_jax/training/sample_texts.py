"""Sample texts during training: continuations of `eval.prompts`, or an assistant's replies to them."""

from collections.abc import Callable
from typing import Any

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.config.schema import Config
from slm_jax.data.load import example_prompt, has_conversations
from slm_jax.distributed import agreement, multihost, sharding
from slm_jax.generation.decode import Sampling, generate, generate_ids, suppressed_ids
from slm_jax.model.transformer import Transformer
from slm_jax.run.directory import Run
from slm_jax.training.steps import Steps
from slm_jax.utils.text_tokenizer import TextTokenizer, decode_continuation


def sampling_function(config: Config, run: Run, tokenizer: TextTokenizer, steps: Steps) -> Callable[[Any], list[str]]:
    """Return a function from parameters to sample texts, one for each prompt, prompts included.

    Args:
        config: The config of the run.
        run: The run. If it is trained on conversations, prompts are turns of the user; an empty one stands for a
            question of the held-out text.
        tokenizer: Its tokenizer.
        steps: The functions of the run.
    """
    sampling = Sampling(seed=config.train.seed)  # fixed: the samples of two steps differ by the model only
    wanted = bool(config.eval.sample_tokens and config.eval.prompts)
    is_chat, prompts = False, list(config.eval.prompts)
    if wanted:
        is_chat, prompts = agreement.from_first("prompts of the samples", lambda: _prompts(config, run))

    def generate_samples(params: Any) -> list[str]:
        if not wanted:
            return []
        if sharding.is_replicated(params):
            if not multihost.is_first():
                return []
            params = sharding.local_replica(params)  # one device is enough
        # Otherwise the parameters stay split and all processes generate: in full they may not fit on a device.
        model = steps.model(params)
        size, context = config.eval.sample_tokens, config.train.sequence_length
        if is_chat:
            texts = _dialogs(model, tokenizer, prompts, size, sampling, context)
        else:
            continuations = generate(model, tokenizer, prompts, size, sampling, context)
            texts = [prompt + text for prompt, text in zip(prompts, continuations, strict=True)]
        return texts if multihost.is_first() else []

    return generate_samples


def _prompts(config: Config, run: Run) -> tuple[bool, list[str]]:
    """Return whether a run is trained on conversations, and the prompts of its samples."""
    if not has_conversations(run):
        return False, list(config.eval.prompts)
    return True, [prompt or example_prompt(run) for prompt in config.eval.prompts]


def _dialogs(
    model: Transformer, tokenizer: TextTokenizer, prompts: list[str], size: int, sampling: Sampling, context: int
) -> list[str]:
    """Return each prompt with the assistant's reply to it, as `user: …` and `assistant: …`."""
    template = ChatTemplate.of(tokenizer)
    ids = [template.encode([Message("user", prompt)], generation_prompt=True).ids.tolist() for prompt in prompts]
    stops = template.stop_ids
    suppressed = sorted(set(suppressed_ids(tokenizer)) - set(stops))
    rows = generate_ids(model, ids, size, sampling, context, suppressed, stops)
    replies = [
        decode_continuation(tokenizer, prompt, [id_ for id_ in row if id_ not in stops])
        for prompt, row in zip(ids, rows, strict=True)
    ]
    return [f"user: {prompt}\n\nassistant: {reply}" for prompt, reply in zip(prompts, replies, strict=True)]
