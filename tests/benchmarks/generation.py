"""Generation against its rivals: python tests/benchmarks/generation.py [--shapes S M] [--batches 1 8] [--rounds 3]

Each rival and slm_jax continue a prompt of 16 tokens to a text of 256, greedily, in turn within each round: a PyTorch
loop that runs the whole text again for every token, and `generate` of Hugging Face transformers with its cache, both
in float32, of models of the same shape (no query-key norm, as a Llama has none). The ratio of a round compares two
neighbouring runs; the table gives the median ratio and the least and largest, by the clock and by processor time
(which other programs on the machine disturb less: use it with --threads 1). Weights are random: only time counts.

Needs torch and transformers: pip install torch transformers. A rival that is not installed is left out.
"""

import argparse
import importlib.util
import os
import sys
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
from slm_jax.model import ops  # noqa: E402
from slm_jax.model.transformer import Transformer, swiglu_width  # noqa: E402
from slm_jax.utils.process import tune_process  # noqa: E402

VOCAB, PROMPT, LENGTH = 8192, 16, 256
SHAPES = {
    "S": ModelConfig(dim=256, depth=4, heads=8, mlp_dim=1024, qk_norm=False),
    "M": ModelConfig(dim=512, depth=6, heads=8, mlp_dim=2048, qk_norm=False),
}
TARGETS = {
    ("whole text again", 1): 15.0,
    ("whole text again", 8): 25.0,
    ("transformers, cache", 1): 1.5,
    ("transformers, cache", 8): 1.5,
}
Work = Callable[[np.ndarray], np.ndarray]
"""Prompts int [B, PROMPT] to the ids drawn [B, LENGTH - PROMPT]."""


def ours(config: ModelConfig, dtype: str, sampling: Sampling) -> Work:
    """slm_jax."""
    model = Transformer(config, VOCAB, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    return lambda prompts: np.array(generate_ids(model, prompts.tolist(), LENGTH - PROMPT, sampling))


def torch_whole_text_again(config: ModelConfig) -> Work:
    """A plain PyTorch Transformer, run over the whole text for every token, logits of all positions as in training."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    width, inner = config.dim // config.heads, swiglu_width(config)
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


def transformers_with_cache(config: ModelConfig) -> Work:
    """Hugging Face's Llama of the same shape, `generate` with its defaults for a greedy text."""
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


def seconds(work: Work, prompts: np.ndarray) -> np.ndarray:
    """Of one call: by the clock, and of the processor."""
    start = np.array([time.perf_counter(), time.process_time()])
    drawn = work(prompts)
    assert drawn.shape == (len(prompts), LENGTH - PROMPT)
    return np.array([time.perf_counter(), time.process_time()]) - start


def spread(ratios: np.ndarray) -> str:
    """Median (least-largest)."""
    return f"{np.median(ratios):.1f} ({ratios.min():.1f}-{ratios.max():.1f})"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["S", "M"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="Of both sides; the process keeps to so many cores.")
    parser.add_argument("--dtype", help="Of our products; default: as training chooses.")
    parser.add_argument(
        "--sample", action="store_true", help="Ours draws at temperature 0.8, top-p 0.95, not greedily."
    )
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    tune_process()
    makers = {
        "whole text again": ("torch", torch_whole_text_again),
        "transformers, cache": ("transformers", transformers_with_cache),
    }
    rivals = {name: make for name, (package, make) in makers.items() if importlib.util.find_spec(package)}
    for name in makers.keys() - rivals.keys():
        print(f"{name}: left out, {makers[name][0]} is not installed (pip install torch transformers)")
    if rivals:
        import torch

        torch.set_num_threads(args.threads)
    dtype = args.dtype or str(ops.compute_dtype("auto"))
    sampling = Sampling() if args.sample else Sampling(temperature=0)
    print(
        f"slm_jax in {dtype}, rivals in float32, {args.threads} threads, {PROMPT} to {LENGTH} tokens; ours: {sampling}"
    )
    print("| shape | batch | ours, ms per step | rival | its | ratio by the clock | of processor time | target |")
    print("|" + "---|" * 8)
    for shape in args.shapes:
        own = ours(SHAPES[shape], dtype, sampling)
        others = {name: make(SHAPES[shape]) for name, make in rivals.items()} or {"none": own}
        for batch in args.batches:
            prompts = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT))
            for work in (own, *others.values()):
                seconds(work, prompts)  # compiled, and memory touched
            for name, other in others.items():
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
