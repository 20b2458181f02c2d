"""A folder of the Hugging Face layout as what a run begins with: `--init.from_hf DIR`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config.schema import ModelConfig
from slm_jax.huggingface.config_json import from_config_json
from slm_jax.model.transformer import swiglu_width
from slm_jax.utils.errors import UserError

TOKENIZER_FILE = "tokenizer.hybtok"
# Files by which other tokenizers are kept.
_OTHERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Folder(NamedTuple):
    """What config.json says."""

    path: Path
    model: dict[str, Any]  # fields of `model.*`
    vocab_size: int  # rows of the embedding


def open_folder(path: str) -> Folder:
    """The folder of a model that we have all parts of. Raises UserError that names what it lacks or we do."""
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        hint = "" if folder.exists() or path.count("/") != 1 else f" (from the hub: hf download {path} --local-dir DIR)"
        raise UserError(f"init.from_hf {path}: there is no config.json, so it is no folder of a model{hint}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no object")
    model, vocab_size = from_config_json(content, str(file))
    return Folder(folder, model, vocab_size)


def folder_misfits(folder: Folder, model: ModelConfig) -> Iterator[str]:
    """What keeps the folder's weights out of a model, each with both values."""
    there = ModelConfig(**folder.model)
    for name in ("dim", "depth", "heads", "tie_weights", "qk_norm"):
        if getattr(there, name) != getattr(model, name):
            yield f"model.{name}: {getattr(there, name)!r} there, {getattr(model, name)!r} here"
    if (there.kv_heads or there.heads) != (model.kv_heads or model.heads):
        yield f"model.kv_heads: {there.kv_heads} there, {model.kv_heads or model.heads} here"
    if swiglu_width(there) != swiglu_width(model):
        yield (
            f"width of the SwiGLU: {swiglu_width(there)} there (model.mlp_dim {there.mlp_dim}, model.mlp_multiple 1), "
            f"{swiglu_width(model)} here"
        )


def find_tokenizer(folder: Folder, asked: str) -> str:
    """The path or name of the tokenizer: the folder's own if it is of this project, else the one that was asked for.

    Raises UserError if there is neither.
    """
    own = folder.path / TOKENIZER_FILE
    if own.is_file():
        return str(own)
    if asked:
        return asked
    others = [name for name in _OTHERS if (folder.path / name).is_file()]
    there = f" ({others[0]} there is of another kind, which training here does not read)" if others else ""
    raise UserError(
        f"init.from_hf {folder.path}: it holds no {TOKENIZER_FILE}{there}. Its embedding has {folder.vocab_size} rows, "
        "one for each id of the tokenizer that it was trained with: give that one, saved by this project, as "
        "--tokenizer.path"
    )


def read_parameters(folder: Folder, shapes: dict[str, Any]) -> dict[str, Any]:
    """The folder's weights as a Transformer's pure dict of float32 NumPy arrays with these shapes. Raises UserError."""
    from slm_jax.huggingface.weights import read_params  # with safetensors, which only this needs

    return read_params(folder.path, shapes, folder.vocab_size)
