"""The command line `python -m slm_jax.generate`: prompts from options, files or standard input."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from slm_jax.cli.options import read_options
from slm_jax.generation.decode import NO_TOKEN, encode_prompt, generate_ids, never_drawn, stream
from slm_jax.generation.sampling import Sampling
from slm_jax.run.load import LoadedRun, load_run
from slm_jax.utils.errors import UserError
from slm_jax.utils.process import tune_process

_DEFAULT = Sampling()
_NOTHING = "(the model ended the text at once)"


@dataclass(frozen=True)
class Options:
    """Continue texts with the model of a run."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue (may be repeated); `-`: standard input, without a last line end; "": a new document."""
    prompts: str = ""
    """A file of prompts, one per line (UTF-8)."""
    run: str = ""
    """The run directory; empty: the newest in runs/."""
    average: int = 1
    """Average the parameters of the newest so many checkpoints, instead of the newest alone."""
    samples: int = 1
    """Continuations of each prompt."""
    max_tokens: int = 200
    """Longest continuation, in tokens; it may go beyond the trained length (see context)."""
    context: int = 0
    """Tokens that attention looks back over; 0: the length that the model was trained at."""
    batch_size: int = 16
    """Texts computed at once, where there are several."""
    format: Literal["text", "jsonl"] = "text"
    """text: as it comes, prompt first. jsonl: a line {"prompt", "text", "ended"} for each text when it is done."""
    suppress: tuple[str, ...] = ()
    """Tokens never drawn; "<EOS>": never end. `python -m tokenizer inspect runs/NAME/tokenizer.hybtok` names them."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = _DEFAULT


def main(args: Sequence[str] | None = None) -> None:
    """The command line. Raises UserError."""
    options = read_options(Options, args, "python -m slm_jax.generate")
    tune_process()
    problems = options.sampling.problems()
    for name, least in (("samples", 1), ("average", 1), ("max_tokens", 1), ("context", 0), ("batch_size", 1)):
        if getattr(options, name) < least:
            problems.append(f"{name} {getattr(options, name)} must be {least} or more")
    if problems:
        raise UserError("; ".join(problems))
    prompts = read_prompts(options)
    loaded = load_run(options.run or None, options.average)
    names = loaded.tokenizer.token2id
    if unknown := [name for name in options.suppress if name not in names]:
        listed = f"python -m tokenizer inspect {shlex.quote(str(loaded.run.tokenizer))}"
        raise UserError(f"--suppress {unknown[0]!r} is no token of this run: `{listed}` names the special ones")
    suppress = [*never_drawn(loaded.tokenizer), *(names[name] for name in options.suppress)]
    context = options.context or loaded.context
    ids = [encode_prompt(loaded.tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    if longest > context:
        print(
            f"note: a prompt has {longest} tokens, the context {context}: each token is drawn by attention to the last "
            f"{context} tokens",
            file=sys.stderr,
        )
    # Half characters, which byte tokens may leave, are shown escaped.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if len(prompts) * options.samples == 1 and options.format == "text":
        _stream_one(loaded, prompts[0], ids[0], options, context, suppress)
    else:
        _write_all(loaded, prompts, ids, options, context, suppress)


def read_prompts(options: Options) -> list[str]:
    """All prompts that the options name. Raises UserError if they cannot be read, or there is none."""
    # A last line end is the shell's: behind a finished line many a model ends its text.
    prompts = [
        _read("standard input", sys.stdin.read).removesuffix("\n") if prompt == "-" else prompt
        for prompt in options.prompt
    ]
    if options.prompts:
        text = _read(f"--prompts {options.prompts}", lambda: Path(options.prompts).read_text(encoding="utf-8"))
        prompts += text.removesuffix("\n").split("\n") if text else []
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT (`-`: standard input) or --prompts FILE, one per line")
    return prompts


def _read(name: str, read: Callable[[], str]) -> str:
    try:
        return read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read: {error}") from None


def _stream_one(
    loaded: LoadedRun, prompt: str, ids: list[int], options: Options, context: int, suppress: list[int]
) -> None:
    """The prompt, and its continuation as it comes."""
    eos = loaded.tokenizer.token2id["<EOS>"]
    decoder = loaded.tokenizer.stream_decoder()
    written = False
    sys.stdout.write(prompt)
    for drawn in stream(loaded.model, [ids], options.max_tokens, options.sampling, context, suppress, [eos]):
        if drawn[0] not in (eos, NO_TOKEN):
            written = True
            sys.stdout.write(decoder.push(int(drawn[0])))
            sys.stdout.flush()
    print(decoder.finish(), flush=True)
    if not written:
        print(_NOTHING, file=sys.stderr)


def _write_all(
    loaded: LoadedRun, prompts: list[str], ids: list[list[int]], options: Options, context: int, suppress: list[int]
) -> None:
    """Every sample of every prompt, batch by batch; sample i of a prompt has the seed + i, whatever else is asked."""
    eos = loaded.tokenizer.token2id["<EOS>"]
    rows = [(i, sample) for i in range(len(prompts)) for sample in range(options.samples)]
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        samplings = [options.sampling.with_seed_plus(sample) for _, sample in batch]
        texts = generate_ids(
            loaded.model, [ids[i] for i, _ in batch], options.max_tokens, samplings, context, suppress, [eos]
        )
        for (i, sample), drawn in zip(batch, texts, strict=True):
            text = loaded.tokenizer.decode([token for token in drawn if token != eos])
            if options.format == "jsonl":
                row = {"prompt": prompts[i], "text": text, "ended": drawn[-1] == eos}
                print(json.dumps(row))
            else:
                print(f"=== prompt {i + 1}, sample {sample + 1} ===\n{prompts[i]}{text}", flush=True)
                if drawn == [eos]:
                    print(_NOTHING, file=sys.stderr)
