"""The CPU recipe of nanoGPT in PyTorch: a rival of `learning.py`.

    python tests/benchmarks/nanogpt_rival.py train.txt held_out.txt

trains on the characters of one file, and prints the bits per byte of the other one as JSON. Hyperparameters are those
of the command "I only have a macbook" in the README of https://github.com/karpathy/nanoGPT and of its
config/train_shakespeare_char.py; the code is written for this benchmark. Like nanoGPT it prints the loss of every
iteration, estimates both losses every 250 iterations and computes in float32 without torch.compile. Needs torch.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

LAYERS = 4
HEADS = 4
WIDTH = 128
CONTEXT = 64
BATCH = 12
ITERATIONS = 2000
WARMUP = 100
RATE, LAST_RATE = 1e-3, 1e-4
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
CLIP = 1.0
ESTIMATE_EVERY = 250
ESTIMATE_BATCHES = 20


class Block(nn.Module):
    """A pre-norm transformer block of GPT-2 without biases."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, bias=False)
        self.norm2 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float [B, T, WIDTH] of the same."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """GPT-2 with tied embeddings."""

    def __init__(self, vocab_size: int) -> None:
        """Draw the weights: deviation 0.02, of the output projections divided by sqrt(2 LAYERS)."""
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_output = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if is_output else 0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits float [B, T, vocabulary] of ids int [B, T]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


def loss_of(model: Gpt, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the cross entropy in nats of ids int [B, T + 1], each predicted from the ones before it in its row."""
    return functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def random_batch(ids: torch.Tensor) -> torch.Tensor:
    """Return random windows int [BATCH, CONTEXT + 1] of ids int [N]."""
    starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
    return torch.stack([ids[start : start + CONTEXT + 1] for start in starts])


def rate_at(iteration: int) -> float:
    """Return the learning rate: linear warm-up, then half a cosine."""
    if iteration < WARMUP:
        return RATE * iteration / WARMUP
    progress = (iteration - WARMUP) / (ITERATIONS - WARMUP)
    return LAST_RATE + (RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def train(training: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> Gpt:
    """Train on ids int [N]; print losses to the standard error stream."""
    model = Gpt(vocab_size)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
    for iteration in range(ITERATIONS + 1):  # nanoGPT's loop ends after iteration ITERATIONS
        if iteration % ESTIMATE_EVERY == 0:
            with torch.no_grad():
                for ids in (training, held_out):
                    losses = [loss_of(model, random_batch(ids)).item() for _ in range(ESTIMATE_BATCHES)]
                    print(f"estimate {sum(losses) / len(losses):.4f}", file=sys.stderr)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(iteration)
        loss = loss_of(model, random_batch(training))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"iteration {iteration}: {loss.item():.4f}", file=sys.stderr)
    return model


@torch.no_grad()
def score(model: Gpt, ids: torch.Tensor) -> float:
    """Return the nats of ids int [N] in windows of the context; every id but the first is predicted once."""
    whole = (len(ids) - 1) // CONTEXT * CONTEXT
    rows = torch.cat([ids[:whole].view(-1, CONTEXT), ids[1 : whole + 1].view(-1, CONTEXT)[:, -1:]], 1)
    nats = sum(loss_of(model, part, "sum").item() for part in rows.split(64))
    rest = ids[whole:]
    return nats + (loss_of(model, rest[None], "sum").item() if len(rest) > 1 else 0.0)


def main() -> None:
    """Train on the first file, and print a line when it is done, then the score of the second file."""
    texts = [Path(name).read_bytes().decode("utf-8") for name in sys.argv[1:3]]
    characters = {character: number for number, character in enumerate(sorted(set("".join(texts))))}
    training, held_out = (torch.tensor([characters[character] for character in text]) for text in texts)
    torch.manual_seed(0)
    model = train(training, held_out, len(characters))
    print("trained", flush=True)
    nats = score(model, held_out)
    print(json.dumps({"bits_per_byte": nats / math.log(2) / len(texts[1].encode())}))


if __name__ == "__main__":
    main()
