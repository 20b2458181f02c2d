"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors, read and written.

Here the adapters of all layers are stacked, `a` [L, in, rank] and `b` [L, rank, out]; PEFT stores `lora_A.weight`
[rank, in] and `lora_B.weight` [out, rank] of each layer. The numbers are the same.
"""

import json
import math
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slm_jax.config.schema import LoraConfig, format_problems
from slm_jax.huggingface.json_file import read_json_object
from slm_jax.model.lora import ADAPTER, SUBLAYERS
from slm_jax.utils.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Names of the linear layers of a block in the Hugging Face layout."""

_TARGETS = {module: target for target, module in MODULES.items()}
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.lora_(A|B)\.weight")
# Values of adapter_config.json with which an adapter computes (alpha / rank) (x·a)·b and nothing else.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None, []),  # active only after these tokens
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # The others, such as pissa, olora, corda and loftq, also change the weights that the adapters are for.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}


class PeftAdapters(NamedTuple):
    """The adapters of a folder.

    Attributes:
        rank: Rank of the adapters.
        alpha: Scale: their product is multiplied by alpha / rank.
        targets: The linear layers that have an adapter, in the order of `lora.targets`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def options(self) -> dict[str, Any]:
        """Return the options of the section `lora` by name."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}


def open_adapters(path: str) -> PeftAdapters:
    """Read the description of the adapters of a folder.

    Args:
        path: The folder.

    Raises:
        UserError: A file is missing or damaged, or the adapters are of another kind.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        raise UserError(f"lora.from_peft {path}: not a folder of PEFT, no {CONFIG}")
    content = read_json_object(file)
    problems = [
        f"{name} is {content[name]!r}, supported is {allowed[0]!r}"
        for name, allowed in _REQUIRED.items()
        if name in content and content[name] not in allowed
    ]
    rank: Any = content.get("r")
    alpha: Any = content.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        problems.append(f"r is {rank!r}, not a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        problems.append(f"lora_alpha is {alpha!r}, not a number above 0")
    if problems:
        raise UserError(format_problems(str(file), problems))
    if content.get("use_rslora"):  # scaled by alpha / sqrt(rank)
        alpha = alpha * math.sqrt(rank)
    with ExitStack() as stack:
        modules = {_parse(name, file)[1] for name in _open(Path(path), stack).keys()}  # noqa: SIM118
    return PeftAdapters(rank, float(alpha), tuple(target for target in SUBLAYERS if MODULES[target] in modules))


def check_adapters(path: str, config: LoraConfig) -> None:
    """Check that a folder's adapters are those that a config describes.

    Args:
        path: The folder.
        config: The options.

    Raises:
        UserError: They differ; all differing options are named.
    """
    found = open_adapters(path).options()
    problems = []
    for name, value in found.items():
        current = getattr(config, name)
        if (set(value) != set(current)) if name == "targets" else value != current:
            problems.append(f"lora.{name}: {value!r} in the folder, {current!r} in this config")
    if problems:
        raise UserError(format_problems(f"this run cannot start with the adapters of {path}", problems))


def read_adapters(path: str, config: LoraConfig, shapes: Any) -> dict[str, Any]:
    """Read the adapters of a folder.

    Args:
        path: The folder.
        config: The options, which `check_adapters` has compared.
        shapes: The adapters of the model, or their shapes, see `lora.init_adapters`.

    Returns:
        Pure dict of float32 NumPy arrays with these shapes.

    Raises:
        UserError: A tensor is missing or has another shape or type, or the model has no place for one.
    """
    with ExitStack() as stack:
        file = _open(Path(path), stack)
        unused = set(file.keys())
        adapters: dict[str, Any] = {"blocks": {}}
        for target in config.targets:
            sublayer = SUBLAYERS[target]
            like = shapes["blocks"][sublayer][target][ADAPTER]
            stacked = {}
            for key, letter in (("a", "A"), ("b", "B")):
                layers, rows, columns = like[key].shape
                array = np.empty((layers, rows, columns), np.float32)
                for layer in range(layers):
                    name = _tensor_name(layer, target, letter)
                    unused.discard(name)
                    array[layer] = _read(file, name, (columns, rows), path).T
                stacked[key] = array
            adapters["blocks"].setdefault(sublayer, {})[target] = {ADAPTER: stacked}
    if unused:
        raise UserError(f"{path}: the model has no linear layer for {', '.join(sorted(unused)[:5])}")
    return adapters


def write_adapters(folder: Path, adapters: Any, config: LoraConfig, base: str) -> int:
    """Write adapters as PEFT does.

    Args:
        folder: The folder to write to.
        adapters: Pure dict of arrays, see `lora.init_adapters`.
        config: Rank, alpha and targets.
        base: Folder or name of the model that they are for, which PEFT loads it from; empty: not stated.

    Returns:
        The size of the tensors in bytes.
    """
    from safetensors.numpy import save_file

    tensors = {}
    for target in config.targets:
        pair = adapters["blocks"][SUBLAYERS[target]][target][ADAPTER]
        for key, letter in (("a", "A"), ("b", "B")):
            for layer, matrix in enumerate(np.asarray(pair[key], np.float32)):
                tensors[_tensor_name(layer, target, letter)] = np.ascontiguousarray(matrix.T)
    path = folder / WEIGHTS
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # save_file makes it readable by its owner only
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": [MODULES[target].rpartition(".")[2] for target in config.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensor_name(layer: int, target: str, letter: str) -> str:
    return f"base_model.model.model.layers.{layer}.{MODULES[target]}.lora_{letter}.weight"


def _parse(name: str, file: Path) -> tuple[int, str]:
    """Return the layer and the module of a tensor's name.

    Raises:
        UserError: It is not that of an adapter of a block's linear layer.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _TARGETS:
        raise UserError(f"{file.parent}: {name} is no adapter of {', '.join(MODULES.values())}")
    return int(match[1]), match[2]


def _open(folder: Path, stack: ExitStack) -> Any:
    """Open the tensors of a folder."""
    from slm_jax.huggingface.weights import open_tensors  # imports safetensors, which only folders need

    path = folder / WEIGHTS
    if not path.is_file():
        hint = " (adapter_model.bin is not read, as such files can contain code)" if folder.is_dir() else ""
        raise UserError(f"{folder}: {WEIGHTS} is missing{hint}; adapters are read from safetensors only")
    return stack.enter_context(open_tensors(path))


def _read(file: Any, name: str, shape: tuple[int, int], path: str) -> np.ndarray:
    """Return a tensor in float32."""
    from slm_jax.huggingface.weights import read_float_tensor

    if name not in set(file.keys()):
        raise UserError(f"{path}: tensor {name} is missing")
    return read_float_tensor(file, name, shape, path)
