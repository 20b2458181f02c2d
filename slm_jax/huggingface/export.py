"""Export of a run to a Hugging Face model folder: `python -m slm_jax.export --run runs/NAME --to DIR`.

    checkpoint -> safetensors      config -> config.json of a stock class
    tokenizer -> tokenizer.json if it is portable, otherwise a module and its vocabulary

The folder appears complete or not at all.
"""

import json
import math
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from flax import nnx

from slm_jax.chat.template import ChatTemplate
from slm_jax.generation.decode import suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.huggingface import model_card
from slm_jax.huggingface.bundle import bundle
from slm_jax.huggingface.chat_files import CHAT_TEMPLATE, stop_ids
from slm_jax.huggingface.config_json import check_options, to_config_json
from slm_jax.huggingface.gguf import MODELFILE, check_gguf, modelfile, write_gguf
from slm_jax.huggingface.peft_folder import CONFIG as ADAPTER_CONFIG
from slm_jax.huggingface.peft_folder import write_adapters
from slm_jax.huggingface.portable_tokenizer import TOKENIZER_JSON, write_tokenizer, write_tokenizer_json
from slm_jax.huggingface.weights import INDEX, to_tensors, write_tensors
from slm_jax.run.conversations import is_chat_trained
from slm_jax.run.directory import Run
from slm_jax.run.load import LoadedRun, load_adapters
from slm_jax.run.selection import Step
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from slm_jax.utils.tokenizer_files import HYBRID_FILE as TOKENIZER_FILE
from slm_jax.utils.tokenizer_files import TOKENIZER_FILES
from tokenizer import HybridTokenizer

TOKENIZER_CLASS = "SlmJaxTokenizer"
TOKENIZER_MODULE = Path(__file__).parent / "exported" / "tokenization_slm_jax.py"
# Files that an export writes, and those that the hub's tools add: everything that --overwrite may remove.
_OVERWRITABLE = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    *TOKENIZER_FILES,
    "README.md",
    ".gitattributes",
    INDEX,
    TOKENIZER_FILE,
    TOKENIZER_MODULE.name,
    MODELFILE,
    ADAPTER_CONFIG,
}


def export(
    loaded: LoadedRun,
    to: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    license: str = "",
    name: str = "",
    shard_gb: float = 5.0,
    overwrite: bool = False,
    average: int = 1,
    chat: bool | None = None,
) -> Path:
    """Write a loaded run to a folder that transformers loads.

    Args:
        loaded: The run.
        to: The folder; it must be empty or not exist, unless `overwrite`.
        dtype: Data type of the weights.
        license: The license stated on the model card; empty: none.
        name: The model's name on the card; empty: that of the run.
        shard_gb: Maximum size of a weights file in 10^9 bytes.
        overwrite: Replace a folder written by an earlier export.
        average: Number of averaged checkpoints, as passed to `load_run`, for the card.
        chat: Whether to write the chat template and settings; None: if the run was trained on conversations.

    Returns:
        The folder.

    Raises:
        UserError: The folder cannot be used, the model has options that no supported class can express, or the
            ``tokenizer.json`` of a portable tokenizer does not give its ids.
    """
    if not 0 < shard_gb < math.inf:
        raise UserError(f"shard_gb {shard_gb} must be a number above 0")
    vocab_size = loaded.tokenizer.vocab_size
    config = to_config_json(loaded.config.model, vocab_size, loaded.context, dtype)
    is_chat = is_chat_trained(loaded.run) if chat is None else chat
    config |= _special_ids(loaded.tokenizer, is_chat)
    title = name or loaded.run.path.absolute().name
    is_foreign = not isinstance(loaded.tokenizer, HybridTokenizer)
    portable = isinstance(loaded.tokenizer, HybridTokenizer) and loaded.tokenizer.portable
    weights = model_card.ExportedWeights(
        loaded.step, average, config["architectures"][0], vocab_size, is_foreign, portable, is_chat
    )
    card = model_card.collect(loaded.run, loaded.config, weights, title, license)
    with _replace_folder(Path(to), overwrite) as folder:
        params = nnx.to_pure_dict(nnx.state(loaded.model, nnx.Param))
        write_tensors(to_tensors(params, vocab_size), folder, dtype, int(shard_gb * 1e9))
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _generation_config(loaded, config))
        _write_tokenizer(loaded, folder, is_chat)
        (folder / "README.md").write_text(model_card.write_card(card), encoding="utf-8", errors="backslashreplace")
    return Path(to)


def _write_tokenizer(loaded: LoadedRun, folder: Path, is_chat: bool) -> None:
    """Write the tokenizer: that of a published model as its own files, byte for byte."""
    if not isinstance(loaded.tokenizer, HybridTokenizer):
        from slm_jax.utils.foreign_tokenizer import ForeignTokenizer  # the package tokenizers, an extra

        assert isinstance(loaded.tokenizer, ForeignTokenizer)
        for name, content in loaded.tokenizer.files.items():
            (folder / name).write_bytes(content)
        return
    if loaded.tokenizer.portable:
        write_tokenizer(loaded.tokenizer, folder, loaded.context, is_chat)
    else:
        settings = _tokenizer_config(loaded.context)
        if is_chat:
            settings["chat_template"] = ChatTemplate.of(loaded.tokenizer).source
            (folder / CHAT_TEMPLATE).write_text(settings["chat_template"], encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", settings)
        (folder / TOKENIZER_MODULE.name).write_text(bundle(TOKENIZER_MODULE), encoding="utf-8")
    loaded.tokenizer.save(folder / TOKENIZER_FILE)


def _special_ids(tokenizer: TextTokenizer, is_chat: bool) -> dict[str, Any]:
    """Return the special ids of config.json."""
    ends = stop_ids(tokenizer, is_chat)
    return {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id,
    }


def export_gguf(
    loaded: LoadedRun,
    to: str | Path,
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32",
    name: str = "",
    overwrite: bool = False,
    chat: bool | None = None,
) -> Path:
    """Write a loaded run to a folder with one GGUF file, for llama.cpp, and an Ollama Modelfile.

    Args:
        loaded: The run; its tokenizer must be portable.
        to: The folder; it must be empty or not exist, unless `overwrite`.
        dtype: Data type of the matrices.
        name: The model's name, also of the file; empty: that of the run.
        overwrite: Replace a folder written by an earlier export.
        chat: Whether to write the chat template and settings; None: if the run was trained on conversations.

    Returns:
        The folder.

    Raises:
        UserError: The folder cannot be used, the package `gguf` is missing, GGUF cannot express the model or its
            tokenizer, or a stock tokenizer does not give its ids.
    """
    vocab_size = loaded.tokenizer.vocab_size
    config = to_config_json(loaded.config.model, vocab_size, loaded.context, dtype)
    tokenizer = check_gguf(config, loaded.tokenizer, dtype)
    title = name or loaded.run.path.absolute().name
    file = f"{title.replace('/', '-')}-{dtype}.gguf"
    with _replace_folder(Path(to), overwrite) as folder:
        write_tokenizer_json(tokenizer, folder)  # for the comparison: the GGUF file has the same entries
        (folder / TOKENIZER_JSON).unlink()
        params = nnx.to_pure_dict(nnx.state(loaded.model, nnx.Param))
        is_chat = is_chat_trained(loaded.run) if chat is None else chat
        write_gguf(to_tensors(params, vocab_size), config, tokenizer, folder / file, dtype, title, is_chat)
        (folder / MODELFILE).write_text(modelfile(file, tokenizer if is_chat else None), encoding="utf-8")
    return Path(to)


def export_peft(run: Run, step: Step, to: str | Path, overwrite: bool = False) -> tuple[Path, str]:
    """Write the adapters of a LoRA run to a folder that the package peft loads.

    Args:
        run: The run.
        step: The checkpoint, see `load_run`.
        to: The folder; it must be empty or not exist, unless `overwrite`.
        overwrite: Replace a folder written by an earlier export.

    Returns:
        The folder, and the step among the checkpoints of the run.

    Raises:
        UserError: The folder cannot be used, the run has no adapters or no usable checkpoint, or no class of
            transformers computes the model that they belong to.
    """
    config = run.read_config()
    if not config.lora.rank:
        raise UserError(f"{run.path} has no adapters (lora.rank 0): export it with --format transformers")
    check_options(config.model)  # peft computes with a class of transformers
    adapters, text = load_adapters(run, config, step)
    with _replace_folder(Path(to), overwrite) as folder:
        write_adapters(folder, adapters, config.lora, config.init.from_hf)
    return Path(to), text


def _generation_config(loaded: LoadedRun, config: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config.json with the defaults of `python -m slm_jax.generate`."""
    sampling = Sampling()
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "suppress_tokens": [id_ for id_ in suppressed_ids(loaded.tokenizer) if id_ not in ends],
        "use_cache": config["use_cache"],
    }


def _tokenizer_config(length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": TOKENIZER_CLASS,
        "auto_map": {"AutoTokenizer": [f"{TOKENIZER_MODULE.stem}.{TOKENIZER_CLASS}", None]},
        "begin_with_eos": True,
        "model_max_length": length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replace_folder(to: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder next to `to` that takes its place when the block ends.

    If the block raises, the temporary folder is deleted and `to` stays as it was. Raises UserError if `to` may not be
    replaced or cannot be written.
    """
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise UserError(f"--to {to} is not a folder: give another one")
    existing = sorted(path.name for path in to.iterdir()) if to.is_dir() else []
    foreign = [name for name in existing if name not in _OVERWRITABLE and not name.endswith((".safetensors", ".gguf"))]
    if existing and not overwrite:
        raise UserError(f"--to {to} is not empty: give another folder, or --overwrite if an export wrote it")
    if foreign:
        raise UserError(f"--to {to} contains {foreign[0]}, which no export wrote: remove it, or give another folder")
    parent = to.absolute().parent
    suffix = secrets.token_hex(4)
    partial = parent / f".{to.absolute().name}.partial-{suffix}"
    old = parent / f".{to.absolute().name}.old-{suffix}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}") from None
    try:
        yield partial
        if existing:
            to.rename(old)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not to.exists():  # the second rename failed
            old.rename(to)
        shutil.rmtree(old, ignore_errors=True)
