"""The command `python -m slm_jax.generate`: continue prompts from options, files or standard input."""

import itertools
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, read_options
from slm_jax.generation.settings import Sampling
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError
from slm_jax.utils.process import tune_process, without_garbage_collection
from slm_jax.utils.progress import show_log
from tokenizer import HybridTokenizer

if TYPE_CHECKING:
    from slm_jax.run.load import LoadedRun

logger = logging.getLogger(__name__)

_DEFAULT = Sampling()
_EMPTY = "(the model ended the text immediately)"


@dataclass(frozen=True)
class Options:
    """Continue texts with the model of a run.

    python -m slm_jax.generate 'Once upon a time'
    """

    prompt: Annotated[tuple[str, ...], Flag(metavar="TEXT", repeated=True, empty=True, bare=bare_words.prompts)] = ()
    """A text to continue (may be repeated); `-`: standard input, without a final newline; "": a new document."""
    prompts: Annotated[str, Flag(metavar="FILE")] = ""
    """A file of prompts, one per line (UTF-8)."""
    run: Annotated[str, Flag(metavar="PATH")] = ""
    """The run directory; empty: the newest in runs/."""
    step: Annotated[str, Flag(metavar="best|last|N")] = ""
    """The checkpoint; empty: the best one if the validation does not improve any more, otherwise the last."""
    average: int = 1
    """Average the parameters of this many newest checkpoints, not together with --step best or N; 1: no average."""
    samples: int = 1
    """Continuations per prompt."""
    max_tokens: int = 200
    """Maximum length of a continuation in tokens; it may exceed the trained length (see context)."""
    context: int = 0
    """Number of tokens that attention sees; 0: the length that the model was trained at."""
    batch_size: int = 16
    """Number of texts generated together, if there are several."""
    format: Literal["text", "jsonl"] = "text"
    """text: prompt and text, streamed. jsonl: one line {"prompt", "text", "ended"} per finished text."""
    suppress: tuple[str, ...] = ()
    """Tokens that are never generated; "<EOS>": never end. `python -m tokenizer inspect runs/NAME/tokenizer.hybtok`
    lists them."""
    sampling: Sampling = _DEFAULT


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The command line without the program's name; None: that of the process.

    Raises:
        UserError: Invalid options or input; the message names all problems.
    """
    options = read_options(Options, args, "python -m slm_jax.generate")
    show_log()
    _check(options)
    prompts = read_prompts(options)
    run = find_run(options.run or None, trained=True)  # that there is none is reported without waiting for JAX
    with without_garbage_collection():
        tune_process()
        from slm_jax.generation.decode import encode_prompt
        from slm_jax.run.load import load_run

    loaded = load_run(str(run.path), options.average, options.step)
    logger.info("run %s, %s", loaded.run.path, loaded.step_text)
    suppress = _suppressed(loaded, options.suppress)
    context = options.context or loaded.context
    ids = [encode_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    if longest > context:
        logger.info(
            "note: a prompt has %d tokens, more than the context of %d: attention sees the last %d tokens only",
            longest,
            context,
            context,
        )
    # Byte tokens may leave incomplete characters, which are shown escaped.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if len(prompts) * options.samples == 1 and options.format == "text":
        _stream_one(loaded, prompts[0], ids[0], options, context, suppress)
    else:
        _generate_all(loaded, prompts, ids, options, context, suppress)


def _check(options: Options) -> None:
    problems = [f"--{problem}" for problem in options.sampling.problems()]
    minima = {"samples": 1, "average": 1, "max_tokens": 1, "context": 0, "batch_size": 1}
    for name, minimum in minima.items():
        if getattr(options, name) < minimum:
            problems.append(f"--{name} {getattr(options, name)} must be {minimum} or more")
    if problems:
        raise UserError("; ".join(problems))


def _suppressed(loaded: "LoadedRun", names: Sequence[str]) -> list[int]:
    """Return the ids that are never generated: the special ones, and the tokens that the user names."""
    from slm_jax.generation.decode import suppressed_ids

    token2id = loaded.tokenizer.token2id
    if unknown := [name for name in names if name not in token2id]:
        file = str(loaded.run.tokenizer)
        remedy = f"`python -m tokenizer inspect {shlex.quote(file)}` lists the special ones"
        if not isinstance(loaded.tokenizer, HybridTokenizer):
            remedy = f"tokenizer.json in {file} lists them"
        raise UserError(f"--suppress {unknown[0]!r} is not a token of this run: {remedy}")
    return [*suppressed_ids(loaded.tokenizer), *(token2id[name] for name in names)]


def read_prompts(options: Options) -> list[str]:
    """Return all prompts that the options name.

    Raises:
        UserError: A prompt cannot be read, or there is none.
    """
    # The shell adds a final newline to standard input; after a complete line many models would end the text.
    prompts = [
        _read("standard input", sys.stdin.read).removeprefix("\ufeff").removesuffix("\n") if prompt == "-" else prompt
        for prompt in options.prompt
    ]
    if options.prompts:
        text = _read(f"--prompts {options.prompts}", lambda: Path(options.prompts).read_text(encoding="utf-8-sig"))
        if not (text or prompts):
            raise UserError(f"--prompts {options.prompts} is empty: give a file with one prompt per line")
        prompts += text.removesuffix("\n").split("\n") if text else []
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT (`-`: standard input) or --prompts FILE, one per line")
    return prompts


def _read(name: str, read: Callable[[], str]) -> str:
    try:
        return read()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from None


def _stream_one(
    loaded: "LoadedRun", prompt: str, ids: list[int], options: Options, context: int, suppress: list[int]
) -> None:
    """Print one prompt and its continuation, token by token."""
    from slm_jax.generation.batch import NO_TOKEN
    from slm_jax.generation.decode import stream

    stops = loaded.tokenizer.stop_ids
    decoder = loaded.tokenizer.stream_decoder(ids)
    empty = True
    sys.stdout.write(prompt)
    for token_B in stream(loaded.model, [ids], options.max_tokens, options.sampling, context, suppress, stops):
        if token_B[0] not in (*stops, NO_TOKEN):
            empty = False
            sys.stdout.write(decoder.push(int(token_B[0])))
            sys.stdout.flush()
    print(decoder.finish(), flush=True)
    if empty:
        logger.info(_EMPTY)


def _generate_all(
    loaded: "LoadedRun", prompts: list[str], ids: list[list[int]], options: Options, context: int, suppress: list[int]
) -> None:
    """Print all samples of all prompts, batch by batch.

    Sample i of a prompt has the seed `seed + i`, so that its text does not depend on the other prompts.
    """
    from slm_jax.generation.decode import generate_ids
    from slm_jax.utils.text_tokenizer import decode_continuation

    stops = loaded.tokenizer.stop_ids
    jobs = ((i, sample) for i in range(len(prompts)) for sample in range(options.samples))
    while batch := list(itertools.islice(jobs, options.batch_size)):
        samplings = [options.sampling.with_seed_offset(sample) for _, sample in batch]
        rows = generate_ids(
            loaded.model, [ids[i] for i, _ in batch], options.max_tokens, samplings, context, suppress, stops
        )
        for (i, sample), generated in zip(batch, rows, strict=True):
            kept = [token for token in generated if token not in stops]
            text = decode_continuation(loaded.tokenizer, ids[i], kept)
            if options.format == "jsonl":
                print(json.dumps({"prompt": prompts[i], "text": text, "ended": generated[-1] in stops}))
            else:
                print(f"=== prompt {i + 1}, sample {sample + 1} ===\n{prompts[i]}{text}", flush=True)
                if len(generated) == 1 and generated[0] in stops:
                    logger.info(_EMPTY)
