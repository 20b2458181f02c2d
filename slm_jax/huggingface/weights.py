"""Parameters as the tensors of the Hugging Face layout, and back; written and read with safetensors, never pickle.

Here the blocks' parameters are stacked, [L, ...], and a linear layer is [in, out]; there each layer has its own and is
[out, in]. Everything else is the same numbers under another name.
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

_BLOCK = {
    ("attention_norm", "scale"): "input_layernorm",
    ("attention", "query", "weight"): "self_attn.q_proj",
    ("attention", "key", "weight"): "self_attn.k_proj",
    ("attention", "value", "weight"): "self_attn.v_proj",
    ("attention", "out", "weight"): "self_attn.o_proj",
    ("attention", "query_norm", "scale"): "self_attn.q_norm",
    ("attention", "key_norm", "scale"): "self_attn.k_norm",
    ("mlp_norm", "scale"): "post_attention_layernorm",
    ("mlp", "gate", "weight"): "mlp.gate_proj",
    ("mlp", "up", "weight"): "mlp.up_proj",
    ("mlp", "down", "weight"): "mlp.down_proj",
}
_OTHERS = {
    ("embedding",): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}


def _leaves(params: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, array) of every leaf that is there."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        elif value is not None:
            yield (*path, key), value


def to_tensors(params: dict[str, Any], vocab_size: int) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """(name, how to get the float32 array) of every tensor in order; params: the pure dict of a Transformer.

    Rows of the embedding and the head beyond vocab_size are padding and left out.
    """
    leaves = dict(_leaves(params))
    blocks = {path[1:]: array for path, array in leaves.items() if path[0] == "blocks"}
    assert blocks.keys() <= _BLOCK.keys(), blocks.keys() - _BLOCK.keys()  # every parameter has a place
    assert {path for path in leaves if path[0] != "blocks"} <= _OTHERS.keys(), leaves.keys()

    def whole(array: Any) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(array[:vocab_size], np.float32)

    def layer(array: Any, number: int, path: tuple[str, ...]) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(array[number], np.float32).T if path[-1] == "weight" else np.asarray(array[number])

    yield _OTHERS["embedding",], whole(leaves["embedding",])
    depth = len(next(iter(blocks.values())))
    for number in range(depth):
        for path, name in _BLOCK.items():
            if path in blocks:
                yield f"model.layers.{number}.{name}.weight", layer(blocks[path], number, path)
    norm = leaves["final_norm", "scale"]
    yield _OTHERS["final_norm", "scale"], lambda: np.asarray(norm, np.float32)
    if ("head",) in leaves:
        yield _OTHERS["head",], whole(leaves["head",])


def write_tensors(
    tensors: Iterator[tuple[str, Callable[[], np.ndarray]]], folder: Path, dtype: str, shard_bytes: int
) -> int:
    """Write the tensors as one file, or several of at most shard_bytes (or one tensor) with an index; their bytes."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def close() -> None:
        path = folder / f"shard-{len(shards)}"
        path.touch()
        mode = path.stat().st_mode
        save_file(held, path, metadata={"format": "pt"})
        path.chmod(mode)  # as any other file: it would be its owner's alone
        shards.append(list(held))
        held.clear()

    for name, get in tensors:
        array = np.ascontiguousarray(get().astype(jnp.dtype(dtype)))
        if held and sum(each.nbytes for each in held.values()) + array.nbytes > shard_bytes:
            close()
        held[name] = array
        total += array.nbytes
    close()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return total
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def read_params(folder: Path, shapes: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The pure dict of float32 arrays that has these shapes, out of a folder's safetensors.

    Padding rows (beyond vocab_size), which nothing reads, are zeros. Raises UserError that names tensors that are
    missing, of another shape, or that the model has no place for.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in _files(folder)]
        places: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # it is no dict
        used: set[str] = set()

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            used.add(name)
            if name not in places:
                raise UserError(f"{folder}: there is no tensor {name}")
            array = places[name].get_tensor(name)
            if array.shape != shape:
                raise UserError(f"{folder}: {name} is {list(array.shape)}, {list(shape)} is needed")
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(f"{folder}: {name} is {array.dtype}: only float32, float16 or bfloat16 weights")
            return array.astype(np.float32)

        params: dict[str, Any] = {}
        for path, leaf in _leaves(shapes):
            if path[0] == "blocks":
                array = np.empty(leaf.shape, np.float32)
                for number in range(leaf.shape[0]):
                    name = f"model.layers.{number}.{_BLOCK[path[1:]]}.weight"
                    linear = path[-1] == "weight"
                    found = read(name, leaf.shape[:0:-1] if linear else leaf.shape[1:])
                    array[number] = found.T if linear else found
            elif path == ("final_norm", "scale"):
                array = read(_OTHERS[path], leaf.shape)
            else:
                array = np.zeros(leaf.shape, np.float32)
                array[:vocab_size] = read(_OTHERS[path], (vocab_size, leaf.shape[1]))
            _put(params, path, array)
        # A tied head may stand in the file as well; tables of angles are constants.
        left = [n for n in places if n not in used and n != _OTHERS["head",] and not n.endswith("rotary_emb.inv_freq")]
        if left:
            raise UserError(f"{folder}: the model has no place for {', '.join(sorted(left)[:5])}")
    return params


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises UserError without any, or where one of the index is missing."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / Path(name).name for name in names]  # no name leads out of the folder
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{index} is damaged: download the folder again") from None
    else:
        files = [folder / SINGLE]
    if missing := [file.name for file in files if not file.is_file()]:
        others = [p.name for p in sorted(folder.glob("*")) if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5")]
        hint = f" ({others[0]} is not read: such files can hold code)" if others else ""
        raise UserError(f"{folder}: there is no {missing[0]}{hint}; weights are read from safetensors only")
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
