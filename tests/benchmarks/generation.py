"""Generation speed: python tests/benchmarks/generation.py [--shapes S M] [--batches 1 8] [--rounds 3]

slm_jax and each baseline continue a prompt of 16 tokens to 256 tokens, greedily, in turn within each round. Baselines
are a PyTorch loop without a cache, which runs the model on the whole text for every token, `generate` of Hugging
Face transformers with its cache, both in float32, with models of the same shape (no query-key norm, as in Llama), and
llama.cpp in float32 with the weights of slm_jax, exported to GGUF: with --dtype float32 the tokens are compared too.
The ratio of a round compares two adjacent runs; the table gives its median, minimum and maximum, in wall-clock time and
in processor time (which other programs on the machine disturb less: use it with --threads 1). Weights are random.

Needs torch and transformers (pip install torch transformers), and llama-cpp-python and gguf. A baseline that is not
installed is skipped. Against llama.cpp alone: --baselines llama.cpp --dtype float32.
"""

import argparse
import functools
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

import jax.numpy as jnp  # noqa: E402  # after the path is set
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from slm_jax.config.schema import ModelConfig  # noqa: E402
from slm_jax.generation.decode import Sampling, generate_ids  # noqa: E402
from slm_jax.model.block import swiglu_width  # noqa: E402
from slm_jax.model.precision import Policy, compute_dtype  # noqa: E402
from slm_jax.model.transformer import Transformer  # noqa: E402
from slm_jax.utils.process import tune_process  # noqa: E402

VOCAB = 8192  # ids
PROMPT = 16  # tokens
LENGTH = 256  # tokens, prompt included
SHAPES = {
    "S": ModelConfig(dim=256, depth=4, heads=8, mlp_dim=1024, qk_norm=False),
    "M": ModelConfig(dim=512, depth=6, heads=8, mlp_dim=2048, qk_norm=False),
}
TARGETS = {
    ("no cache", 1): 15.0,
    ("no cache", 8): 25.0,
    ("transformers", 1): 1.5,
    ("transformers", 8): 1.5,
    ("llama.cpp", 1): 0.7,
    ("llama.cpp", 8): 1.5,
}
PACKAGES = {"no cache": ("torch",), "transformers": ("transformers",), "llama.cpp": ("llama_cpp", "gguf")}
Work = Callable[[np.ndarray], np.ndarray]
"""Function from prompts int [B, PROMPT] to generated ids int [B, LENGTH - PROMPT]."""


def model_of(config: ModelConfig, dtype: str) -> Transformer:
    """Return a model of random weights."""
    return Transformer(config, VOCAB, policy=Policy(jnp.dtype(dtype)), rngs=nnx.Rngs(0))


def ours(config: ModelConfig, dtype: str, sampling: Sampling) -> Work:
    """Return `generate_ids` of slm_jax with a model of random weights."""
    model = model_of(config, dtype)
    return lambda prompts: np.array(generate_ids(model, prompts.tolist(), LENGTH - PROMPT, sampling))


def torch_without_cache(config: ModelConfig) -> Work:
    """Return a loop over a plain PyTorch Transformer that computes logits of all positions for every token."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    width = config.dim // config.heads  # of a head
    inner = swiglu_width(config)
    draw = lambda *shape: torch.randn(shape) * 0.02  # noqa: E731
    embedding = draw(VOCAB, config.dim)
    sizes = {"qkv": (3 * config.dim, config.dim), "out": (config.dim, config.dim)}
    sizes |= {"gate": (inner, config.dim), "up": (inner, config.dim), "down": (config.dim, inner)}
    layers = [{name: draw(*size) for name, size in sizes.items()} for _ in range(config.depth)]
    frequency = config.rope_base ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(LENGTH)[:, None] * frequency
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    ones = torch.ones(config.dim)

    def rotate(x: Any) -> Any:
        a, b = x.chunk(2, -1)
        return x * cos[: x.shape[-2]] + torch.cat((-b, a), -1) * sin[: x.shape[-2]]

    def logits(ids: Any) -> Any:
        x = embedding[ids]
        b, t, d = x.shape
        for layer in layers:
            normed = functional.rms_norm(x, (d,), ones, 1e-6)
            q, k, v = functional.linear(normed, layer["qkv"]).view(b, t, 3, config.heads, width).permute(2, 0, 3, 1, 4)
            out = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + functional.linear(out.transpose(1, 2).reshape(b, t, d), layer["out"])
            normed = functional.rms_norm(x, (d,), ones, 1e-6)
            x = x + functional.linear(
                functional.silu(functional.linear(normed, layer["gate"])) * functional.linear(normed, layer["up"]),
                layer["down"],
            )
        return functional.linear(functional.rms_norm(x, (d,), ones, 1e-6), embedding)

    def run(prompts: np.ndarray) -> np.ndarray:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            while ids.shape[1] < LENGTH:
                ids = torch.cat((ids, logits(ids)[:, -1].argmax(-1, keepdim=True)), 1)
        return ids[:, PROMPT:].numpy()

    return run


def transformers_generate(config: ModelConfig) -> Work:
    """Return `generate` of transformers, greedy and with its cache, for a Llama of the same shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=config.dim,
            intermediate_size=swiglu_width(config),
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()

    def run(prompts: np.ndarray) -> np.ndarray:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            whole = llama.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LENGTH - PROMPT,
                do_sample=False,
                use_cache=True,
            )
        return whole[:, PROMPT:].numpy()

    return run


def llama_cpp_generate(config: ModelConfig, threads: int) -> Work:
    """Return greedy generation of llama.cpp with the weights of `model_of`."""
    from tests.benchmarks.llama_cpp_rival import LlamaCpp, write_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(model_of(config, "float32"), config, LENGTH, path)
        return LlamaCpp(path, LENGTH, threads)


def seconds(work: Work, prompts: np.ndarray) -> np.ndarray:
    """Return wall-clock and processor time of one call, in seconds."""
    start = np.array([time.perf_counter(), time.process_time()])
    generated = work(prompts)
    assert generated.shape == (len(prompts), LENGTH - PROMPT)
    return np.array([time.perf_counter(), time.process_time()]) - start


def spread(ratios: np.ndarray) -> str:
    """Return `median (minimum-maximum)`."""
    return f"{np.median(ratios):.1f} ({ratios.min():.1f}-{ratios.max():.1f})"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["S", "M"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of all libraries; the process is limited to as many cores"
    )
    parser.add_argument("--baselines", nargs="+", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--dtype", help="compute dtype of slm_jax; default: that of training")
    parser.add_argument(
        "--sample",
        action="store_true",
        help="sample with slm_jax (temperature 0.8, top-p 0.95) instead of decoding greedily",
    )
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    args = arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    tune_process()
    makers = {
        "no cache": torch_without_cache,
        "transformers": transformers_generate,
        "llama.cpp": functools.partial(llama_cpp_generate, threads=args.threads),
    }
    missing = {name: [each for each in PACKAGES[name] if not importlib.util.find_spec(each)] for name in args.baselines}
    for name in filter(missing.get, missing):
        print(f"{name}: skipped, {', '.join(missing[name])} not installed")
    baselines = {name: makers[name] for name in args.baselines if not missing[name]}
    if baselines.keys() - {"llama.cpp"}:
        import torch

        torch.set_num_threads(args.threads)
    dtype = args.dtype or str(compute_dtype("auto"))
    sampling = Sampling() if args.sample else Sampling(temperature=0)
    print(
        f"slm_jax with {dtype} products, PyTorch baselines in float32; {args.threads} threads, {PROMPT} to {LENGTH} "
        f"tokens; {sampling}"
    )
    print(
        "| shape | batch | slm_jax, ms/step | baseline | ms/step | ratio, wall clock | ratio, processor time | target |"
    )
    print("|" + "---|" * 8)
    for shape in args.shapes:
        own = ours(SHAPES[shape], dtype, sampling)
        others = {name: make(SHAPES[shape]) for name, make in baselines.items()} or {"none": own}
        for batch in args.batches:
            prompts = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT))
            for work in (own, *others.values()):
                seconds(work, prompts)  # compile, and touch the memory
            for name, other in others.items():
                if name == "llama.cpp" and dtype == "float32" and not args.sample:
                    same = (own(prompts) == other(prompts)).mean()
                    print(f"tokens equal to those of llama.cpp: {100 * same:.1f} %", file=sys.stderr)
                times = np.array([(seconds(own, prompts), seconds(other, prompts)) for _ in range(args.rounds)])
                mine, its = np.median(times[:, :, 0], axis=0) / (LENGTH - PROMPT) * 1e3
                clock, processor = (spread(times[:, 1, i] / times[:, 0, i]) for i in (0, 1))
                target = f">= {TARGETS[name, batch]:g}" if (name, batch) in TARGETS else ""
                print(
                    f"| {shape} | {batch} | {mine:.2f} | {name} | {its:.2f} | {clock} | {processor} | {target} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
