"""Parameters to and from the tensors of the Hugging Face layout, written and read with safetensors, never pickle.

Here the parameters of all blocks are stacked, [L, ...], and a linear layer is [in, out]; in the Hugging Face layout
each layer has its own tensors, and a linear layer is [out, in]. The numbers are the same.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slm_jax.utils.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

Tensors = Iterator[tuple[str, Callable[[], np.ndarray]]]
"""Names of tensors with functions that return the arrays, so that one at a time is in memory."""

# Paths of parameters to names of tensors: of a block, and of the rest of the model.
_BLOCK = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "query", "weight"): "self_attn.q_proj.weight",
    ("attention", "query", "bias"): "self_attn.q_proj.bias",
    ("attention", "key", "weight"): "self_attn.k_proj.weight",
    ("attention", "key", "bias"): "self_attn.k_proj.bias",
    ("attention", "value", "weight"): "self_attn.v_proj.weight",
    ("attention", "value", "bias"): "self_attn.v_proj.bias",
    ("attention", "out", "weight"): "self_attn.o_proj.weight",
    ("attention", "query_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "key_norm", "scale"): "self_attn.k_norm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "weight"): "mlp.gate_proj.weight",
    ("mlp", "up", "weight"): "mlp.up_proj.weight",
    ("mlp", "down", "weight"): "mlp.down_proj.weight",
}
_OUTSIDE_BLOCKS = {
    ("embedding",): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}


def _leaves(params: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and array of every parameter; optional ones that the model does not have are None."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        elif value is not None:
            yield (*path, key), value


def to_tensors(params: dict[str, Any], vocab_size: int) -> Tensors:
    """Convert parameters to tensors.

    Args:
        params: The parameters of a `Transformer` as a pure dict.
        vocab_size: Number of ids; the rows of embedding and head beyond it are padding and left out.

    Yields:
        Name of each tensor and a function that returns it in float32, in the order of the layers.
    """
    leaves = dict(_leaves(params))
    blocks = {path[1:]: array for path, array in leaves.items() if path[0] == "blocks"}
    outside = {path for path in leaves if path[0] != "blocks"}
    # A parameter without a name would be missing in the export.
    assert blocks.keys() <= _BLOCK.keys(), blocks.keys() - _BLOCK.keys()
    assert outside <= _OUTSIDE_BLOCKS.keys(), outside - _OUTSIDE_BLOCKS.keys()

    def rows(array: Any) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(array[:vocab_size], np.float32)

    def layer(array: Any, number: int, path: tuple[str, ...]) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(array[number], np.float32).T if path[-1] == "weight" else np.asarray(array[number])

    yield _OUTSIDE_BLOCKS["embedding",], rows(leaves["embedding",])
    depth = len(next(iter(blocks.values())))
    for number in range(depth):
        for path, name in _BLOCK.items():
            if path in blocks:
                yield f"model.layers.{number}.{name}", layer(blocks[path], number, path)
    norm = leaves["final_norm", "scale"]
    yield _OUTSIDE_BLOCKS["final_norm", "scale"], lambda: np.asarray(norm, np.float32)
    if ("head",) in leaves:
        yield _OUTSIDE_BLOCKS["head",], rows(leaves["head",])


def write_tensors(tensors: Tensors, folder: Path, dtype: str, shard_bytes: int) -> int:
    """Write tensors as safetensors: one file, or several with an index.

    Args:
        tensors: Names and arrays.
        folder: The folder to write to.
        dtype: Data type to convert to.
        shard_bytes: Maximum size of a file; a larger tensor gets a file of its own.

    Returns:
        The total size of the tensors in bytes.
    """
    shards: list[list[str]] = []  # names of the tensors in each file
    pending: dict[str, np.ndarray] = {}
    total = 0

    def write_shard() -> None:
        path = folder / f"shard-{len(shards)}"
        path.touch()
        mode = path.stat().st_mode
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(mode)  # save_file makes it readable by its owner only
        shards.append(list(pending))
        pending.clear()

    for name, get in tensors:
        array = np.ascontiguousarray(get().astype(jnp.dtype(dtype)))
        if pending and sum(each.nbytes for each in pending.values()) + array.nbytes > shard_bytes:
            write_shard()
        pending[name] = array
        total += array.nbytes
    write_shard()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return total
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def read_params(folder: Path, shapes: dict[str, Any], vocab_size: int, num_ids: int) -> dict[str, Any]:
    """Read parameters from the safetensors files of a folder.

    Args:
        folder: The model folder.
        shapes: The parameters of a `Transformer` as a pure dict of arrays or `jax.ShapeDtypeStruct`.
        vocab_size: Number of rows of the folder's embedding.
        num_ids: Number of ids of the tokenizer, at most `vocab_size`; the folder's rows beyond it are not used.

    Returns:
        A pure dict of float32 NumPy arrays with these shapes; rows of embedding and head beyond `num_ids`, which are
        padding, are zeros.

    Raises:
        UserError: A file is missing or damaged; a tensor is missing or has another shape or type; or the model has no
            parameter for a tensor.
    """
    with ExitStack() as stack:
        tensors = _TensorReader(folder, stack)
        params: dict[str, Any] = {}
        for path, leaf in _leaves(shapes):
            if path[0] == "blocks":
                array = _read_stacked(tensors, path[1:], leaf.shape)
            elif path == ("final_norm", "scale"):
                array = tensors.read(_OUTSIDE_BLOCKS[path], leaf.shape)
            else:
                array = np.zeros(leaf.shape, np.float32)
                array[:num_ids] = tensors.read(_OUTSIDE_BLOCKS[path], (vocab_size, leaf.shape[1]))[:num_ids]
            _set_leaf(params, path, array)
        if unused := tensors.unused():
            raise UserError(f"{folder}: the model has no parameter for {', '.join(unused[:5])}")
    return params


def _read_stacked(tensors: "_TensorReader", path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Read one parameter of all blocks, float32 [L, ...]."""
    array = np.empty(shape, np.float32)
    is_linear = path[-1] == "weight"
    layer_shape = shape[:0:-1] if is_linear else shape[1:]
    for number in range(shape[0]):
        tensor = tensors.read(f"model.layers.{number}.{_BLOCK[path]}", layer_shape)
        array[number] = tensor.T if is_linear else tensor
    return array


class _TensorReader:
    """Reader of the tensors of a folder that keeps track of which were read."""

    def __init__(self, folder: Path, stack: ExitStack):
        self._folder = folder
        self._files: dict[str, Any] = {}  # by name of tensor
        self._used: set[str] = set()
        for path in weight_files(folder):
            file = stack.enter_context(open_tensors(path))
            self._files |= dict.fromkeys(file.keys(), file)

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor in float32, or raise UserError if it is missing or does not fit."""
        self._used.add(name)
        if name not in self._files:
            raise UserError(f"{self._folder}: tensor {name} is missing")
        return read_float_tensor(self._files[name], name, shape, self._folder)

    def unused(self) -> list[str]:
        """Return the names of tensors that were not read, sorted."""
        # A tied head may be stored as well, and tables of rotary angles are constants.
        ignored = {_OUTSIDE_BLOCKS["head",]}
        return sorted(
            name
            for name in self._files
            if name not in self._used and name not in ignored and not name.endswith("rotary_emb.inv_freq")
        )


def read_float_tensor(file: Any, name: str, shape: tuple[int, ...], folder: str | Path) -> np.ndarray:
    """Return a tensor of an open safetensors file in float32.

    Args:
        file: What `open_tensors` returned.
        name: A tensor in it.
        shape: The expected shape.
        folder: The folder of the file, for messages.

    Raises:
        UserError: The tensor has another shape, or does not hold floating-point numbers.
    """
    array = file.get_tensor(name)
    if array.shape != shape:
        raise UserError(f"{folder}: {name} has shape {list(array.shape)}, expected {list(shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{folder}: {name} is {array.dtype}: must be float32, float16 or bfloat16")
    converted: np.ndarray = array.astype(np.float32)
    return converted


def _set_leaf(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder.

    Raises:
        UserError: One is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / Path(name).name for name in names]  # only files of this folder
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{index} is damaged: download the folder again") from None
    else:
        files = [folder / SINGLE]
    if missing := [file.name for file in files if not _is_file(file)]:
        pickles = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5")]
        hint = f" ({pickles[0]} is not read, as such files can contain code)" if pickles else ""
        raise UserError(f"{folder}: {missing[0][:100]} is missing{hint}; weights are read from safetensors only")
    return files


def _is_file(path: Path) -> bool:
    """Return whether there is a file; a damaged index may name one that no file system can have."""
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def open_tensors(path: Path) -> Any:
    """Open a safetensors file, a context manager.

    Raises:
        UserError: It is damaged.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
