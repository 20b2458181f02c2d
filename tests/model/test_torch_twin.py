"""Test slm_jax against the same model in PyTorch: logits, loss, every gradient, optimizer steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", minversion="2.9", reason="pip install -e '.[bench]'")

from slm_jax.config.schema import OptimizerConfig  # noqa: E402  # torch is optional
from slm_jax.model.ops import LossWeights  # noqa: E402
from slm_jax.training.objective import loss_sums  # noqa: E402
from slm_jax.training.optimizer import make_optimizer  # noqa: E402
from tests.helpers import FLOAT32, tiny_model  # noqa: E402
from tests.model import torch_twin  # noqa: E402

B = 3
T = 19
V = 61

MODELS = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window of all": {"window": T},
    "grouped": {"kv_heads": 2},
    "one kv head, window": {"kv_heads": 1, "window": 4},
    "no qk_norm": {"qk_norm": False},
    "untied": {"tie_weights": False},
    "scanned, recomputed": {"scan_layers": True, "remat": "full", "window": 7},
    "linear layers saved": {"remat": "dots", "kv_heads": 1},
    "padded": {"vocab_multiple": 32, "mlp_multiple": 48, "tie_weights": False},
    "everything": {"kv_heads": 2, "window": 6, "tie_weights": False, "qk_norm": False, "rope_base": 500.0},
    "another epsilon": {"norm_eps": 0.1, "kv_heads": 2},
}
MASKS = ("none", "right padding", "left padding", "segments", "segments and padding")
TERMS = [LossWeights(z_loss=0.01), LossWeights(ul_alpha=0.7), LossWeights(0.01, 0.7)]


def make_batch(masked, seed=0):
    """Return int32 arrays; few distinct ids, so that many repeat, and a fifth of the labels is missing."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 20, (B, T))
    labels = np.concatenate([ids[:, 1:], np.full((B, 1), -100)], axis=1)
    labels[rng.random((B, T)) < 0.2] = -100
    batch = {"input_ids": ids, "labels": labels}
    lengths = np.array([T, T - 7, 2])[:, None]
    index = np.arange(T)[None]
    if masked in ("right padding", "segments and padding"):
        batch["attention_mask"] = index < lengths
    if masked == "left padding":
        batch["attention_mask"] = index >= T - lengths
        batch["positions"] = np.maximum(index - (T - lengths), 0)
    if masked in ("segments", "segments and padding"):
        starts = np.array([[4, 11], [1, 2], [9, 18]])
        batch["segment_ids"] = (index[..., None] >= starts[:, None]).sum(-1)
        first = np.where(index[..., None] >= starts[:, None], starts[:, None], 0).max(-1)
        batch["positions"] = index - first
    if "attention_mask" in batch:
        batch["labels"] = np.where(batch["attention_mask"], labels, -100)
    return {name: value.astype(np.int32) for name, value in batch.items()}


def as_torch(batch):
    return {name: torch.from_numpy(np.asarray(value)).long() for name, value in batch.items()}


def twin_of(model, params):
    """Return the PyTorch model in float64, so that differences are the rounding of slm_jax."""
    twin = torch_twin.TorchTransformer(model.config, model.vocab_size).double()
    torch_twin.load_weights(twin, params)
    return twin


def inputs_of(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def jax_results(model, batch, terms):
    """Return (logits, mean loss, gradients as a pure dict)."""
    graph, params = nnx.split(model, nnx.Param)

    @jax.jit
    def compute(params, batch):
        def mean(params):
            sums = loss_sums(nnx.merge(graph, params), batch, terms)
            return sums.loss / sums.tokens

        return nnx.merge(graph, params)(**inputs_of(batch)), *jax.value_and_grad(mean)(params)

    logits, loss, gradients = compute(nnx.to_pure_dict(params), batch)
    return logits, float(loss), gradients


def torch_results(twin, batch, terms=LossWeights()):
    """Return (logits, mean loss, gradients by name)."""
    twin.zero_grad()
    logits = twin(**inputs_of(batch))
    loss = torch_twin.mean_loss(logits, batch, **terms._asdict())
    loss.backward()
    return logits.detach().numpy(), loss.item(), {name: p.grad.numpy() for name, p in twin.named_parameters()}


def assert_close(actual, expected):
    """Assert equality to 1e-5 of the largest entry, or to 1e-7: float32 sums."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(0.01, float(np.abs(expected).max())))


def assert_equal_to_twin(options, masked, terms=LossWeights()):
    model = tiny_model(V, scale=3.0, **options)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    batch = make_batch(masked)
    logits, loss, gradients = jax_results(model, batch, terms)
    expected_logits, expected_loss, expected_gradients = torch_results(twin_of(model, params), as_torch(batch), terms)
    assert_close(logits, expected_logits)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    actual_gradients = torch_twin.weights_of(gradients, V)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in actual_gradients.items():
        assert_close(gradient, expected_gradients[name])


QUICK = ("plain", "scanned, recomputed", "linear layers saved", "padded", "everything", "another epsilon")


@pytest.mark.parametrize(
    "options",
    [pytest.param(MODELS[name], id=name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS],
)
def test_every_model_equals_its_twin(options):
    assert_equal_to_twin(options, "none")


@pytest.mark.parametrize("masked", MASKS[1:])
def test_every_mask_equals_that_of_the_twin(masked):
    assert_equal_to_twin(MODELS["everything"], masked)


@pytest.mark.parametrize("masked", ["none", "segments and padding"])
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_every_loss_term_equals_that_of_the_twin(terms, masked):
    assert_equal_to_twin(MODELS["plain"], masked, terms)


@pytest.mark.slow
@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_every_combination_equals_the_twin(options, masked):
    assert_equal_to_twin(options, masked, LossWeights(z_loss=0.01, ul_alpha=0.3))


@pytest.mark.parametrize("masked", MASKS)
def test_unlikelihood_of_the_twin_matches_its_definition(masked):
    """Compare with sets and loops (arXiv:1908.04319, token level)."""
    batch = make_batch(masked)
    log_p = torch.log_softmax(torch.from_numpy(np.random.default_rng(1).normal(size=(B, T, V))), dim=-1)
    total = 0.0
    for b in range(B):
        for t in range(T):
            if batch["labels"][b, t] == -100:
                continue
            seen = set()
            for s in range(t, -1, -1):
                real = "attention_mask" not in batch or batch["attention_mask"][b, s]
                same = "segment_ids" not in batch or batch["segment_ids"][b, s] == batch["segment_ids"][b, t]
                if real and same:
                    seen.add(int(batch["input_ids"][b, s]))
                if "segment_ids" not in batch and batch["input_ids"][b, s] == torch_twin.EOS_ID:
                    break  # the document begins here
            total -= sum(np.log(1 - np.exp(log_p[b, t, c].item())) for c in seen - {int(batch["labels"][b, t])})
    assert torch_twin.unlikelihood(log_p, as_torch(batch)).item() == pytest.approx(total, rel=1e-9)


def steps(model, config, count=5):
    """Return (parameters after `count` steps of slm_jax on one batch, a twin of the initial model, the batch)."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    twin = twin_of(model, params)
    batch = make_batch("right padding")
    graph, _ = nnx.split(model, nnx.Param)
    optimizer = make_optimizer(config, 100, FLOAT32)

    @jax.jit
    def step(params, state):
        def mean(params):
            sums = loss_sums(nnx.merge(graph, params), batch)
            return sums.loss / sums.tokens

        updates, state = optimizer.update(jax.grad(mean)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = optimizer.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return torch_twin.weights_of(params, V), twin, as_torch(batch)


def test_adamw_with_clipping_equals_that_of_torch():
    config = OptimizerConfig(name="adamw", lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.3, clip=0.5)
    params, twin, batch = steps(tiny_model(V, scale=3.0, tie_weights=False), config)
    optimizer = torch_twin.make_adamw(twin, config, fused=True)
    for _ in range(5):
        torch_results(twin, batch)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), config.clip)
        optimizer.step()
    for name, parameter in twin.named_parameters():  # changed by about 5 * lr
        np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=0, atol=1e-5)


def test_muon_agrees_with_that_of_torch():
    """PyTorch orthogonalizes in bfloat16, this test in float32, so that directions agree and digits do not."""
    config = OptimizerConfig(name="muon", lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.3, clip=0)
    model = tiny_model(V, scale=3.0)
    before = torch_twin.weights_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)), V)
    params, twin, batch = steps(model, config)
    hidden = {n: p for n, p in twin.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    muon = torch.optim.Muon(
        hidden.values(), lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    rest = torch.nn.ParameterList([p for n, p in twin.named_parameters() if n not in hidden])
    adamw = torch_twin.make_adamw(rest, config)
    for _ in range(5):
        torch_results(twin, batch)
        muon.step()
        adamw.step()
    for name, parameter in twin.named_parameters():
        change, expected = (x.ravel() - before[name].ravel() for x in (params[name], parameter.detach().numpy()))
        cosine = float(change @ expected / np.linalg.norm(change) / np.linalg.norm(expected))
        assert cosine > 0.99, (name, cosine)
        assert float(np.linalg.norm(change)) == pytest.approx(float(np.linalg.norm(expected)), rel=0.02)
