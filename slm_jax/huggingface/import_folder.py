"""Hugging Face model folders as initial weights of a run: `--init.from_hf DIR`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config.schema import ModelConfig
from slm_jax.huggingface.config_json import from_config_json
from slm_jax.huggingface.json_file import read_json_object
from slm_jax.model.block import mlp_width
from slm_jax.performance.flops import parameters
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import memory_size
from slm_jax.utils.tokenizer_files import FOREIGN_JSON, HYBRID_FILE

_MIN_PARAMETER_BYTES = 2  # float16 and bfloat16
_MAX_PADDING_ROWS = 1024  # largest multiple that embeddings are usually padded to
_UNSUPPORTED_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Folder(NamedTuple):
    """A model folder with the content of its config.json.

    Attributes:
        path: The folder.
        model: The `model.*` options by name.
        vocab_size: Number of rows of the embedding: one per id of the tokenizer, and perhaps rows of padding.
    """

    path: Path
    model: dict[str, Any]
    vocab_size: int


def open_folder(path: str) -> Folder:
    """Read the config.json of a model folder.

    Args:
        path: The folder.

    Raises:
        UserError: There is no config.json, it is damaged, or the model has features that are not supported here.
    """
    folder = Path(path)
    file = folder / "config.json"
    if not file.is_file():
        is_hub_name = not folder.exists() and path.count("/") == 1
        hint = f" (from the hub: hf download {path} --local-dir DIR)" if is_hub_name else ""
        raise UserError(f"init.from_hf {path}: not a model folder, no config.json{hint}")
    content = read_json_object(file)
    model, vocab_size = from_config_json(content, str(file))
    return Folder(folder, model, vocab_size)


def folder_misfits(folder: Folder, model: ModelConfig) -> Iterator[str]:
    """Compare a folder's model with the options of a run.

    Args:
        folder: The model folder.
        model: The options of the run.

    Yields:
        A line with both values for each difference that keeps the weights from being loaded.
    """
    source = ModelConfig(**folder.model)
    features = ("qk_norm", "qkv_bias", "mlp", "attention_gate", "value_embeddings", "residual_scales")
    for name in ("dim", "depth", "heads", "head_width", "tie_weights", *features):
        if getattr(source, name) != getattr(model, name):
            option = "head_dim" if name == "head_width" else name
            yield f"model.{option}: {getattr(source, name)!r} in the folder, {getattr(model, name)!r} in this config"
    source_kv_heads = source.kv_heads or source.heads
    kv_heads = model.kv_heads or model.heads
    if source_kv_heads != kv_heads:
        yield f"model.kv_heads: {source_kv_heads} in the folder, {kv_heads} in this config"
    if mlp_width(source) != mlp_width(model):
        yield (
            f"{'SwiGLU' if model.mlp == 'swiglu' else 'MLP'} width: {mlp_width(source)} in the folder (model.mlp_dim "
            f"{source.mlp_dim}, model.mlp_multiple 1), {mlp_width(model)} in this config"
        )


def check_size(folder: Folder) -> None:
    """Check that a folder's weights are not smaller than its config.json states, before anything is allocated.

    Args:
        folder: The model folder.

    Raises:
        UserError: A file of weights is missing, or they are too small.
    """
    from slm_jax.huggingface.weights import weight_files  # imports safetensors, which is not needed for the config

    size = sum(file.stat().st_size for file in weight_files(folder.path))
    count = parameters(ModelConfig(**folder.model), folder.vocab_size)
    if size < _MIN_PARAMETER_BYTES * count:
        raise UserError(
            f"{folder.path}: config.json describes a model of {count:,} parameters, at least "
            f"{memory_size(_MIN_PARAMETER_BYTES * count)}, but the weights are {memory_size(size)}: one of them is "
            "damaged or of another model"
        )


def find_tokenizer(folder: Folder, option: str) -> str:
    """Return the tokenizer to use with a folder's weights.

    Args:
        folder: The model folder.
        option: The option `tokenizer.path`; may be empty.

    Returns:
        The path of the folder's own tokenizer, one of this project or a `tokenizer.json`, else `option`.

    Raises:
        UserError: There is neither.
    """
    for own in (folder.path / HYBRID_FILE, folder.path / FOREIGN_JSON):
        if own.is_file():
            return str(own)
    if option:
        return option
    foreign = [name for name in _UNSUPPORTED_TOKENIZERS if (folder.path / name).is_file()]
    hint = f" ({foreign[0]} is not read: save the tokenizer with transformers to get one)" if foreign else ""
    raise UserError(
        f"init.from_hf {folder.path}: no {HYBRID_FILE} or {FOREIGN_JSON}{hint}. The embedding has "
        f"{folder.vocab_size} rows, one per id of the tokenizer that the model was trained with: give that tokenizer "
        "as --tokenizer.path"
    )


def check_vocabulary(folder: Folder, num_ids: int, name: str) -> None:
    """Check that a tokenizer's ids have rows in a folder's embedding.

    Rows beyond the ids are padding, as `resize_token_embeddings(pad_to_multiple_of=…)` of transformers adds them.

    Args:
        folder: The model folder.
        num_ids: Number of ids of the tokenizer.
        name: The tokenizer's name in the message; with the folder's own, any number of rows may be padding.

    Raises:
        UserError: There are too few rows, or more than are plausible as padding.
    """
    surplus = folder.vocab_size - num_ids
    is_own = Path(name).parent == folder.path
    if surplus < 0 or (surplus >= _MAX_PADDING_ROWS and not is_own):
        raise UserError(
            f"the embedding in {folder.path} has {folder.vocab_size} rows, but the tokenizer {name} has "
            f"{num_ids} ids: the weights fit no other tokenizer than the one they were trained with"
        )


def read_parameters(folder: Folder, shapes: dict[str, Any], num_ids: int) -> dict[str, Any]:
    """Read a folder's weights.

    Args:
        folder: The model folder.
        shapes: The parameters of a `Transformer` as a pure dict of arrays or `jax.ShapeDtypeStruct`.
        num_ids: Number of ids of the tokenizer; the embedding's rows beyond it are padding.

    Returns:
        A pure dict of float32 NumPy arrays with these shapes.

    Raises:
        UserError: The weights are missing, damaged, or do not fit; see `weights.read_params`.
    """
    from slm_jax.huggingface.weights import read_params  # imports safetensors, which nothing else here needs

    return read_params(folder.path, shapes, folder.vocab_size, num_ids)
