"""A run as a folder of the Hugging Face layout: `python -m slm_jax.export --run runs/NAME --to DIR`.

    checkpoint -> safetensors        config -> config.json of a stock class        tokenizer -> a module and its file

The folder appears whole or not at all.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from flax import nnx

from slm_jax.generation.decode import suppressed_ids
from slm_jax.generation.sampling import Sampling
from slm_jax.huggingface import model_card
from slm_jax.huggingface.bundle import bundle
from slm_jax.huggingface.config_json import to_config_json
from slm_jax.huggingface.weights import to_tensors, write_tensors
from slm_jax.run.load import LoadedRun
from slm_jax.utils.errors import UserError

TOKENIZER_CLASS = "SlmJaxTokenizer"
TOKENIZER_MODULE = Path(__file__).parent / "exported" / "tokenization_slm_jax.py"
TOKENIZER_FILE = "tokenizer.hybtok"
# What an export writes, and what the hub's tools put beside it: all that --overwrite may remove.
_WRITTEN = {"config.json", "generation_config.json", "tokenizer_config.json", "README.md", TOKENIZER_MODULE.name}
_WRITTEN |= {TOKENIZER_FILE, "model.safetensors.index.json", ".gitattributes", "special_tokens_map.json"}


def export(
    loaded: LoadedRun,
    to: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    license: str = "",
    name: str = "",
    shard_gb: float = 5.0,
    overwrite: bool = False,
    average: int = 1,
) -> Path:
    """Write a loaded run to a folder; arguments as in `Options`, average as `load_run` got it. Raises UserError."""
    if not 0 < shard_gb < math.inf:
        raise UserError(f"shard_gb {shard_gb} must be a number above 0")
    vocab_size, model = loaded.tokenizer.vocab_size, loaded.model
    config = to_config_json(loaded.config.model, vocab_size, loaded.context, dtype)
    title = name or loaded.run.path.absolute().name
    weights = model_card.Weights(loaded.step, average, config["architectures"][0], vocab_size)
    facts = model_card.gather(loaded.run, loaded.config, weights, title, license)
    with _new_folder(Path(to), overwrite) as folder:
        tensors = to_tensors(nnx.to_pure_dict(nnx.state(model, nnx.Param)), vocab_size)
        write_tensors(tensors, folder, dtype, int(shard_gb * 1e9))
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _generation(loaded, config))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(loaded.context))
        (folder / TOKENIZER_MODULE.name).write_text(bundle(TOKENIZER_MODULE), encoding="utf-8")
        loaded.tokenizer.save(folder / TOKENIZER_FILE)
        (folder / "README.md").write_text(model_card.write_card(facts), encoding="utf-8", errors="backslashreplace")
    return Path(to)


def _generation(loaded: LoadedRun, config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: texts are drawn as by `python -m slm_jax.generate`."""
    sampling = Sampling()
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "suppress_tokens": suppressed_ids(loaded.tokenizer),
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
def _new_folder(to: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `to`, which takes its place once all is in it. Raises UserError if something is in the way."""
    if to.is_symlink() or (to.exists() and not to.is_dir()):
        raise UserError(f"--to {to} is no folder: give another one")
    there = sorted(path.name for path in to.iterdir()) if to.is_dir() else []
    foreign = [name for name in there if name not in _WRITTEN and not name.endswith(".safetensors")]
    if there and not overwrite:
        raise UserError(f"--to {to} is not empty: give another folder, or --overwrite if an export wrote it")
    if foreign:
        raise UserError(f"--to {to} holds {foreign[0]}, which no export wrote: remove it, or give another folder")
    beside = to.absolute().parent
    partial, old = (beside / f".{to.absolute().name}.{what}-{os.getpid()}" for what in ("partial", "old"))
    try:
        beside.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to {beside}: {error.strerror}") from None
    try:
        yield partial
        if there:
            to.rename(old)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not to.exists():
            old.rename(to)
        shutil.rmtree(old, ignore_errors=True)
