"""A GGUF file with weights and tokenizer, which llama.cpp, Ollama and other programs load, and an Ollama Modelfile."""

from pathlib import Path
from typing import Any

import numpy as np

from slm_jax.chat.own_template import template_source
from slm_jax.huggingface.weights import Tensors
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import install_command
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer
from tokenizer.portable.tokenizer_json import merge_names, token_names

MODELFILE = "Modelfile"
PRE_TOKENIZER = "llama-bpe"
"""llama.cpp's name of the pattern of portable tokenizers."""
_ARCHITECTURES = ("qwen3", "qwen2", "llama")
_BLOCK_WIDTH = 32  # numbers that q8_0 quantizes together


def check_gguf(config: dict[str, Any], tokenizer: TextTokenizer, dtype: str) -> HybridTokenizer:
    """Check that llama.cpp computes a model, before anything is written.

    Args:
        config: The content of config.json.
        tokenizer: The run's tokenizer.
        dtype: Data type of the weights: float32, float16, bfloat16 or q8_0.

    Returns:
        The tokenizer, which is portable.

    Raises:
        UserError: The package `gguf` is not installed, or the file cannot express the model or its tokenizer.
    """
    try:
        import gguf  # noqa: F401  # whether it is there
    except ImportError:
        raise UserError(f"--format gguf needs the package gguf: {install_command('gguf')}") from None
    if not isinstance(tokenizer, HybridTokenizer):
        raise UserError(
            "--format gguf writes portable tokenizers of this project only, and the run has that of a published model: "
            "give --format transformers, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if not tokenizer.portable:
        raise UserError(
            "--format gguf needs a portable tokenizer, whose ids llama.cpp gives as well: train with "
            "--tokenizer.portable True"
        )
    kind = config["model_type"]
    if kind == "mistral" and not config.get("sliding_window"):  # see `to_config_json`: the class of Llama refuses it
        raise UserError(
            f"--format gguf: a width of {config['hidden_size']} that is not a multiple of "
            f"{config['num_attention_heads']} heads is not supported without model.qk_norm or model.qkv_bias: train "
            "with another model.dim or model.heads"
        )
    if kind not in _ARCHITECTURES or config.get("use_sliding_window"):
        raise UserError(
            f"--format gguf: a model of type {kind}, or with windows or layers without rotary positions, is not "
            f"supported; only {', '.join(_ARCHITECTURES)} with full attention in all layers"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"--format gguf: rotary positions of type {rope['rope_type']} are not supported, only unscaled")
    widths = (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] * config["head_dim"])
    if dtype == "q8_0" and any(width % _BLOCK_WIDTH for width in widths):
        raise UserError(f"--dtype q8_0 needs widths that are multiples of {_BLOCK_WIDTH}: this model has {widths}")
    return tokenizer


def write_gguf(
    tensors: Tensors,
    config: dict[str, Any],
    tokenizer: HybridTokenizer,
    path: Path,
    dtype: str,
    name: str,
    is_chat: bool = False,
) -> None:
    """Write weights and tokenizer to one file; norms and biases stay in float32.

    Args:
        tensors: Names as in transformers, and functions that return float32 arrays.
        config: The content of config.json, checked by `check_gguf`.
        tokenizer: The run's tokenizer.
        path: The file.
        dtype: Data type of the matrices: float32, float16, bfloat16 or q8_0.
        name: The model's name.
        is_chat: Whether to write the chat template and the token that ends a turn.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    kind = {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16, "q8_0": types.Q8_0}[dtype]
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    file_types = gguf.LlamaFileType
    file_type = {
        "float32": file_types.ALL_F32,
        "float16": file_types.MOSTLY_F16,
        "bfloat16": file_types.MOSTLY_BF16,
        "q8_0": file_types.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_type[dtype])
    _add_options(writer, config)
    _add_tokenizer(writer, tokenizer)
    if is_chat:
        writer.add_chat_template(template_source(tokenizer, has_escapes=False))
        writer.add_eot_token_id(tokenizer.turn_ids.end)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    for tensor, read in tensors:
        array = np.ascontiguousarray(read(), dtype=np.float32)
        if architecture == "llama":
            array = _interleave_rotary_pairs(tensor, array, config)
        stored = table.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise UserError(f"--format gguf: the tensor {tensor} has no name there")
        matrix = array.ndim == 2
        data = gguf.quants.quantize(array, kind) if matrix and kind != types.F32 else array
        writer.add_tensor(stored, data, raw_dtype=kind if matrix else types.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_options(writer: Any, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: Any, tokenizer: HybridTokenizer) -> None:
    import gguf

    vocabulary = tokenizer.vocabulary
    eos = tokenizer.token2id["<EOS>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(token_names(vocabulary))
    types = [gguf.TokenType.NORMAL] * tokenizer.vocab_size
    for id_ in vocabulary.special_ids:
        types[id_] = gguf.TokenType.CONTROL
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in merge_names(vocabulary)])
    writer.add_bos_token_id(eos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(tokenizer.token2id["<UNK>"])
    writer.add_pad_token_id(tokenizer.token2id["<PAD>"])
    writer.add_add_bos_token(True)


def _interleave_rotary_pairs(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Reorder the channels of queries and keys: llama.cpp rotates the pairs (2i, 2i + 1) in models of this class."""
    if ".q_proj." in name:
        heads = config["num_attention_heads"]
    elif ".k_proj." in name:
        heads = config["num_key_value_heads"]
    else:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


# In Go's template language. Ollama puts the start of a text before it.
_OLLAMA_TEMPLATE = """\
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}@system@
{{- else if eq .Role "user" }}@user@
{{- else }}@assistant@
{{- end }}{{ .Content }}
{{- if or (not $last) (ne .Role "assistant") }}@end@
{{- end }}
{{- if and $last (ne .Role "assistant") }}@assistant@
{{- end }}
{{- end }}"""


def modelfile(file: str, tokenizer: HybridTokenizer | None = None) -> str:
    """Return an Ollama Modelfile.

    Args:
        file: The GGUF file in the same folder.
        tokenizer: The tokenizer of a model for chat; None: the text goes to the model as it is.
    """
    template = "{{ .Prompt }}"
    stops = ["<EOS>"]
    if tokenizer is not None:
        template = _OLLAMA_TEMPLATE
        for name, id_ in tokenizer.turn_ids._asdict().items():
            template = template.replace(f"@{name}@", tokenizer.id2token[id_])
        stops.insert(0, tokenizer.id2token[tokenizer.turn_ids.end])
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join(lines) + "\n"
