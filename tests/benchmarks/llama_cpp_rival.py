"""Greedy generation by llama.cpp with the weights of a model of slm_jax: a rival of `generation.py`.

Needs llama-cpp-python and gguf: pip install llama-cpp-python gguf. The library is built for the machine it is installed
on; a prebuilt one may lack its instructions.
"""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from slm_jax.config.schema import ModelConfig
from slm_jax.huggingface.config_json import to_config_json
from slm_jax.huggingface.gguf import write_gguf
from slm_jax.huggingface.weights import to_tensors
from slm_jax.model.transformer import Transformer
from tokenizer import HybridTokenizer
from tokenizer.vocabulary import FIRST_BYTE, PORTABLE_PATTERN, Vocabulary

_FLOAT32 = 0  # GGML_TYPE_F32


def made_up_tokenizer(vocab_size: int) -> HybridTokenizer:
    """Return a portable tokenizer of so many ids, of pairs of bytes: a GGUF file has one, but nothing is tokenized."""
    empty = Vocabulary(lowercase=False, byte_limit=4, pattern=PORTABLE_PATTERN)
    pairs = [divmod(number, 256) for number in range(vocab_size - empty.size)]
    merges = tuple((FIRST_BYTE + left, FIRST_BYTE + right) for left, right in pairs)
    return HybridTokenizer.from_vocabulary(dataclasses.replace(empty, merges=merges))


def write_model(model: Transformer, config: ModelConfig, length: int, path: Path) -> None:
    """Write a model to a GGUF file in float32, as `python -m slm_jax.export --format gguf` does."""
    tokenizer = made_up_tokenizer(model.vocab_size)
    tensors = to_tensors(nnx.to_pure_dict(nnx.state(model, nnx.Param)), model.vocab_size)
    json = to_config_json(config, model.vocab_size, length, "float32")
    write_gguf(tensors, json, tokenizer, path, "float32", "benchmark")


class LlamaCpp:
    """Continues prompts of equal length with llama.cpp, all in one batch, with a cache in float32."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        """Load a file.

        Args:
            path: The GGUF file.
            length: Tokens of a text, prompt included.
            threads: Threads of llama.cpp.
        """
        import llama_cpp

        self._api = llama_cpp
        self._length = length
        self._threads = threads
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[int, Any] = {}

    def _context(self, rows: int) -> Any:
        if rows not in self._contexts:
            options = self._api.llama_context_default_params()
            options.n_ctx = self._length * rows
            options.n_seq_max = rows
            options.n_batch = options.n_ubatch = max(512, self._length * rows)
            options.n_threads = options.n_threads_batch = self._threads
            options.type_k = options.type_v = _FLOAT32
            options.kv_unified = False
            self._contexts[rows] = self._api.llama_init_from_model(self._model, options)
        return self._contexts[rows]

    def __call__(self, prompts: np.ndarray) -> np.ndarray:
        """Return the greedy continuation of prompts int [B, P] to `length` tokens, int [B, length - P]."""
        rows, size = prompts.shape
        context = self._context(rows)
        self._api.llama_memory_clear(self._api.llama_get_memory(context), True)
        batch = self._api.llama_batch_init(rows * size, 0, 1)
        try:
            generated = []
            tokens = prompts
            for first in [0, *range(size, self._length - 1)]:
                self._decode(context, batch, tokens, first)
                logits = self._api.llama_get_logits(context)
                tokens = np.ctypeslib.as_array(logits, (rows, self._vocab_size)).argmax(axis=1)[:, None]
                generated.append(tokens)
            return np.concatenate(generated, axis=1)
        finally:
            self._api.llama_batch_free(batch)

    def _decode(self, context: Any, batch: Any, tokens: np.ndarray, first: int) -> None:
        """Compute the logits of the last token of each row."""
        rows, count = tokens.shape
        batch.n_tokens = rows * count
        for row in range(rows):
            for column in range(count):
                item = row * count + column
                batch.token[item] = int(tokens[row, column])
                batch.pos[item] = first + column
                batch.n_seq_id[item] = 1
                batch.seq_id[item][0] = row
                batch.logits[item] = column == count - 1
        status = self._api.llama_decode(context, batch)
        assert status == 0, f"llama_decode returned {status}"
