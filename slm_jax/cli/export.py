"""The command `python -m slm_jax.export`: write a run as a Hugging Face model folder."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from slm_jax.cli import bare_words
from slm_jax.cli.options import Flag, read_options
from slm_jax.utils.errors import UserError
from slm_jax.utils.process import without_garbage_collection
from slm_jax.utils.progress import show_log

if TYPE_CHECKING:
    from slm_jax.run.load import LoadedRun


@dataclass(frozen=True)
class Options:
    """Export a run to a folder that Hugging Face transformers loads.

    The folder holds the weights as safetensors, the config.json of a stock class (Qwen3, Qwen2, SmolLM3, Arcee, Mistral
    or Llama, depending on the model's options), the tokenizer, and a model card made from the run's metrics. A portable
    tokenizer (--tokenizer.portable True in training) is a stock tokenizer.json, that of a published model its own
    files, any other a Python module with its vocabulary.
    Import it again with `python -m slm_jax.train --init.from_hf DIR`.
    """

    to: Annotated[str, Flag(metavar="FOLDER")]
    """The folder to write; it must be empty or not exist."""
    run: Annotated[str, Flag(metavar="PATH", bare=bare_words.run_folders())] = ""
    """The run directory; empty: the newest in runs/."""
    step: Annotated[str, Flag(metavar="best|last|N")] = ""
    """The checkpoint; empty: the best one if the validation does not improve any more, otherwise the last."""
    average: int = 1
    """Average the parameters of this many newest checkpoints, not together with --step best or N; 1: no average."""
    format: Literal["transformers", "gguf", "peft"] = "transformers"
    """gguf: one file with weights and tokenizer for llama.cpp, and an Ollama Modelfile; needs a portable tokenizer.
    peft: the adapters of a LoRA run alone, which the other formats merge into the weights."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Data type of the exported weights; bfloat16 halves the files; float16 and q8_0 with --format gguf only."""
    license: str = ""
    """The model's license for the card, as the hub spells it (mit, apache-2.0, cc-by-4.0 …); empty: none is stated.
    Only with --format transformers, which has a card."""
    name: str = ""
    """The model's name on the card; empty: the name of the run."""
    shard_gb: float | None = None
    """Maximum size of a weights file in 10^9 bytes; larger models are split into several files. Not with --format gguf,
    which is one file. Default: 5."""
    overwrite: bool = False
    """Replace a folder written by an earlier export."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Write the chat template and settings; auto: if the run was trained on conversations."""
    push: Annotated[str, Flag(metavar="OWNER/NAME")] = ""
    """Also upload the folder to this repository on the Hugging Face hub, which is created if there is none; needs an
    access token (`hf auth login`) and the extra [hub]."""
    private: bool = False
    """With --push: create the repository as a private one."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args: The command line without the program's name; None: that of the process.

    Raises:
        UserError: Invalid options, no such run, or a model that cannot be exported.
    """
    options = read_options(Options, args, "python -m slm_jax.export")
    show_log()
    if options.average < 1:
        raise UserError(f"--average {options.average} must be 1 or more")
    if options.shard_gb is not None and not 0 < options.shard_gb < math.inf:
        raise UserError(f"--shard_gb {options.shard_gb:g} must be a number above 0")
    if options.private and not options.push:
        raise UserError("--private is for --push only: leave it out, or name the repository with --push OWNER/NAME")
    with without_garbage_collection():
        from slm_jax.huggingface.export import export, export_gguf
        from slm_jax.huggingface.push import Hub
        from slm_jax.run.load import load_run

    if options.format == "peft":
        _export_adapters(options)
        return
    _check_format(options)
    hub = Hub(options.push, options.private) if options.push else None  # refused before the work, not after it
    loaded = load_run(options.run or None, options.average, options.step)
    chat = None if options.chat == "auto" else options.chat == "on"
    if options.format == "gguf":
        folder = export_gguf(loaded, options.to, options.dtype, options.name, options.overwrite, chat)
        _show_gguf(loaded, folder, options.dtype)
    else:
        assert options.dtype != "float16"
        assert options.dtype != "q8_0"
        folder = export(
            loaded,
            options.to,
            dtype=options.dtype,
            license=options.license,
            name=options.name,
            shard_gb=5.0 if options.shard_gb is None else options.shard_gb,
            overwrite=options.overwrite,
            average=options.average,
            chat=chat,
        )
        _show_transformers(loaded, folder, options.dtype)
    if hub is None:
        repository = shlex.quote(loaded.run.path.absolute().name)
        print(f"\nUpload to the hub (or with --push):\n  hf upload USER/{repository} {shlex.quote(str(folder))}")
    else:
        print(f"\nuploaded to {hub.upload(folder, f'{loaded.run.path.absolute().name}, {loaded.step_text}')}")


def _check_format(options: Options) -> None:
    """Raise UserError for options that the format does not have."""
    if options.format == "transformers":
        if options.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {options.dtype} is written with --format gguf only: give float32 or bfloat16")
        return
    for option in ("license", "shard_gb"):
        if getattr(options, option) not in ("", None):
            raise UserError(f"--{option} is for --format transformers only: leave it out with --format gguf")


def _show_gguf(loaded: "LoadedRun", folder: Path, dtype: str) -> None:
    """Print what was written, and how to use it."""
    (file,) = folder.glob("*.gguf")
    size = file.stat().st_size
    print(f"exported run {loaded.run.path}, {loaded.step_text}, in {dtype}: {size / 1e6:,.1f} MB in {file}\n")
    print(f"  llama-completion -m {shlex.quote(str(file))} -p 'Once upon a time'")
    print(f"  ollama create NAME -f {shlex.quote(str(folder / 'Modelfile'))}")


def _show_transformers(loaded: "LoadedRun", folder: Path, dtype: str) -> None:
    """Print what was written, and how to use it."""
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"exported run {loaded.run.path}, {loaded.step_text}, as {architecture} in {dtype}: "
        f"{size / 1e6:,.1f} MB in {folder}\n"
    )
    print(f"  AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    trust = ", trust_remote_code=True" if any(folder.glob("*.py")) else ""
    print(f"  AutoTokenizer.from_pretrained({str(folder)!r}{trust})")


def _export_adapters(options: Options) -> None:
    """Write the adapters of a run, and print how to load them.

    Raises:
        UserError: An option is not for adapters, or the run has none.
    """
    from slm_jax.huggingface.export import export_peft
    from slm_jax.run.directory import find_run

    others = ("average", "dtype", "license", "name", "shard_gb", "chat", "push", "private")
    for option in others:
        if getattr(options, option) != getattr(Options(to=""), option):
            raise UserError(f"--{option} is not for --format peft, which writes float32 adapters of one checkpoint")
    run = find_run(options.run or None, trained=True)
    folder, step_text = export_peft(run, options.step, options.to, options.overwrite)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"exported the adapters of run {run.path}, {step_text}, in float32: {size / 1e6:,.1f} MB in {folder}\n")
    print(f"  PeftModel.from_pretrained(base, {str(folder)!r})    # base: the model that the run started with")
