"""Every check passes on what is right, and fails on what it is there for."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slm_jax import ops, sharding
from slm_jax.batch import IGNORE
from slm_jax.check import check, main
from slm_jax.checks import FAIL, OK, SKIPPED, as_table, sight, step, text, trained, weights
from slm_jax.config import ModelConfig
from slm_jax.errors import UserError
from slm_jax.load import load_run
from slm_jax.metrics import read_rows
from slm_jax.run import Run
from slm_jax.train import train
from slm_jax.train_step import loss_sums
from slm_jax.transformer import Transformer
from tests.helpers import random_ids, tiny_config
from tokenizer import HybridTokenizer

VOCAB = 61
FIELDS = {"dim": 32, "depth": 2, "heads": 4, "mlp_dim": 96}


def fresh(**fields):
    """An untrained model, as `init` draws it."""
    return Transformer(ModelConfig(**{**FIELDS, **fields}), VOCAB, rngs=nnx.Rngs(0))


def changed(model, change):
    """The model with a function of (name, array) applied to its parameters."""
    graph, params = nnx.split(model, nnx.Param)
    tree = nnx.to_pure_dict(params)
    names = {id(leaf): name for name, leaf in weights.named(tree)}
    return nnx.merge(graph, jax.tree.map(lambda leaf: change(names[id(leaf)], leaf), tree))


def batch_of(rows=4, length=16):
    ids = np.asarray(random_ids((rows, length + 1)))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].copy()}


# What each position sees.

LENGTH = 16


WINDOWED = {"window": 5, "kv_heads": 2, "tie_weights": False}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, WINDOWED])
def test_a_right_model_sees_what_it_may(fields):
    model = fresh(**fields)
    for look in (sight.causality, sight.attention_window, sight.padding, sight.segments):
        found = look(model, LENGTH)
        assert found.verdict == (SKIPPED if look is sight.attention_window and not fields else OK), found


def attention_that(monkeypatch, mask):
    """Let the model attend under another mask: mask(length, window, valid, segments) -> bool [B or 1, T, T]."""

    def attend(q, k, v, dtype, window=0, valid=None, segments=None, implementation="auto"):
        return ops.masked_attention(q, k, v, mask(q.shape[1], window, valid, segments), dtype)

    monkeypatch.setattr(ops, "attention", attend)


def peeks(length, window, valid, segments):
    mask = ops.causal_mask(length, window, valid, segments)
    return mask | jnp.eye(length, k=1, dtype=bool)


BROKEN_MASKS = {
    "one token ahead": (sight.causality, 0, peeks),
    "a window one too wide": (sight.attention_window, 5, lambda t, w, v, s: ops.causal_mask(t, w + 1, v, s)),
    "a window one too narrow": (sight.attention_window, 5, lambda t, w, v, s: ops.causal_mask(t, w - 1, v, s)),
    "padding is seen": (sight.padding, 0, lambda t, w, v, s: ops.causal_mask(t, w, None, s)),
    "segments leak": (sight.segments, 0, lambda t, w, v, s: ops.causal_mask(t, w, v, None)),
    "no window": (sight.causality, 3, lambda t, w, v, s: ops.causal_mask(t, 0, v, s)),
}


@pytest.mark.parametrize("name", BROKEN_MASKS)
def test_a_wrong_mask_is_found(monkeypatch, name):
    look, window, mask = BROKEN_MASKS[name]
    attention_that(monkeypatch, mask)
    found = look(fresh(window=window), LENGTH)
    assert found.verdict == FAIL
    assert any("position" in line for line in found.details)


def test_the_dependence_is_that_of_finite_differences():
    """The gradient says of every token whether changing it changes the logits."""
    model = fresh(window=4)
    ids, at = np.asarray(random_ids((1, 12))), 9
    seen = sight.dependence(model, ids, np.array([at]))[0] > 0
    others = np.repeat(ids, 12, axis=0)
    others[np.arange(12), np.arange(12)] = (others[np.arange(12), np.arange(12)] + 1) % VOCAB
    logits = jax.jit(lambda ids: model(ids))(np.concatenate([ids, others]))[:, at]
    moved = np.asarray(jnp.any(logits[1:] != logits[0], axis=-1))
    assert moved.tolist() == seen.tolist() == [False] * 3 + [True] * 7 + [False] * 2


# Parameters.


def test_a_right_model_passes_and_shapes_are_counted():
    model = fresh()
    assert weights.shapes(model, model.config, VOCAB, 16).verdict == OK
    padded = fresh(vocab_multiple=64, tie_weights=False)
    assert weights.shapes(padded, padded.config, VOCAB, 16).verdict == OK
    assert weights.finite_weights(model).verdict == OK
    out = weights.outputs(model, batch_of())
    assert out.loss == pytest.approx(math.log(VOCAB), abs=0.1)
    assert weights.finite_logits(out).verdict == weights.initial_loss(out, model).verdict == OK


def test_wrong_shapes_are_found():
    model = fresh()
    assert weights.shapes(model, ModelConfig(**{**FIELDS, "depth": 3}), VOCAB, 16).verdict == FAIL
    assert weights.shapes(model, model.config, VOCAB + 1, 16).verdict == FAIL
    half = changed(model, lambda name, leaf: leaf.astype(jnp.bfloat16) if name == "embedding" else leaf)
    found = weights.shapes(half, half.config, VOCAB, 16)
    assert found.verdict == FAIL
    assert "embedding is bfloat16" in found.details


def test_nan_weights_are_found():
    def break_one(name, leaf):
        return leaf.at[1, 2, 3].set(jnp.nan) if name == "blocks.mlp.up.weight" else leaf

    model = changed(fresh(), break_one)
    found = weights.finite_weights(model)
    assert found.verdict == FAIL
    assert found.details == ("blocks.mlp.up.weight[1]: 1 of 2,048",)
    out = weights.outputs(model, batch_of())
    assert weights.finite_logits(out).verdict == weights.initial_loss(out, model).verdict == FAIL
    assert sight.causality(model, 8).verdict == FAIL


def test_a_dead_layer_is_found():
    """Its two outputs are 0: nothing comes out of it, and nothing of what lies behind them can learn."""
    dead = ("blocks.attention.out.weight", "blocks.mlp.down.weight")
    model = changed(fresh(), lambda name, leaf: leaf.at[1].set(0) if name in dead else leaf)
    found = weights.gradient_flow(model, batch_of())
    assert found.verdict == FAIL
    assert "blocks.mlp.up.weight[1]: no gradient" in found.details
    assert not any("[0]" in line for line in found.details)


@pytest.mark.parametrize("factor", [pytest.param(0.0, marks=pytest.mark.slow), 10.0])
def test_weights_of_another_size_are_found(factor):
    """With none the loss is ln V, but nothing can be learned; with large ones it is far above."""
    model = changed(fresh(), lambda name, leaf: leaf * factor if leaf.ndim > 1 else leaf)
    if factor:
        assert weights.initial_loss(weights.outputs(model, batch_of()), model).verdict == FAIL
    else:
        assert weights.gradient_flow(model, batch_of()).verdict == FAIL


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 256, 1024])
@pytest.mark.parametrize("tied", [True, False])
def test_the_untrained_loss_is_within_its_bounds(dim, tied):
    model = fresh(dim=dim, mlp_dim=3 * dim, tie_weights=tied)
    assert weights.initial_loss(weights.outputs(model, batch_of(8)), model).verdict == OK


def test_ties_are_found_out():
    tied, untied = fresh(), fresh(tie_weights=False)
    assert weights.tied(tied, True).verdict == weights.tied(untied, False).verdict == OK
    assert weights.tied(tied, False).verdict == FAIL
    assert weights.tied(untied, True).verdict == FAIL
    copy = fresh(tie_weights=False)
    copy.head.set_value(copy.embedding[...])
    assert weights.tied(copy, False).verdict == weights.tied(copy, True).verdict == FAIL
    assert "two arrays of equal values" in weights.tied(copy, True).found


# What the model is fed.


def test_labels_that_are_the_next_token():
    batch = batch_of()
    assert text.next_token(batch, VOCAB).verdict == OK
    batch["labels"][:, :5] = IGNORE  # a prompt
    assert text.next_token(batch, VOCAB).verdict == OK
    padded = batch | {"attention_mask": np.ones_like(batch["labels"])}
    padded["labels"][1, 9:], padded["attention_mask"][1, 9:] = IGNORE, 0
    assert text.next_token(padded, VOCAB).verdict == OK


def test_labels_that_are_not_the_next_token_are_found():
    batch = batch_of()
    ids = batch["input_ids"]
    unshifted = text.next_token(batch | {"labels": ids}, VOCAB)
    assert unshifted.verdict == FAIL
    assert "copying 100.0%" in unshifted.found
    assert text.next_token(batch | {"labels": np.roll(batch["labels"], -1, axis=1)}, VOCAB).verdict == FAIL
    one_wrong = batch["labels"].copy()
    one_wrong[2, 3] = (one_wrong[2, 3] + 1) % VOCAB
    assert text.next_token(batch | {"labels": one_wrong}, VOCAB).verdict == FAIL
    assert text.next_token(batch | {"labels": np.full_like(ids, IGNORE)}, VOCAB).verdict == FAIL


def test_a_loss_that_does_not_shift_is_found():
    """Right labels, and a loss that scores each position by the token it has just read."""

    def unshifted(model, batch):
        return loss_sums(model, batch | {"labels": jnp.where(batch["labels"] < 0, IGNORE, batch["input_ids"])})

    assert text.next_token(batch_of(), VOCAB, unshifted).verdict == FAIL


def test_ids_out_of_range_are_found():
    batch = batch_of()
    assert text.ids_in_range(batch, [], VOCAB).verdict == OK
    assert text.ids_in_range(batch, [np.array([3, VOCAB])], VOCAB).verdict == FAIL
    batch["labels"][0, 0] = VOCAB
    assert text.ids_in_range(batch, [], VOCAB).verdict == FAIL


class Lowercasing(HybridTokenizer):
    """Loses what the first tokenizers of this kind lost."""

    def decode(self, tokens, *args, **kwargs):
        return super().decode(tokens, *args, **kwargs).lower()


def test_a_lossy_tokenizer_is_found():
    tokenizer = HybridTokenizer.pretrained("english-8k")
    assert text.lossless(tokenizer, text.SAMPLES).verdict == OK
    tokenizer.__class__ = Lowercasing
    found = text.lossless(tokenizer, text.SAMPLES)
    assert found.verdict == FAIL
    assert "at 0: 'Hello, world! THE Th' came back as 'hello, world! the th'" in found.details


def test_a_vocabulary_that_is_not_the_models_is_found():
    tokenizer = HybridTokenizer.pretrained("english-8k")
    assert text.vocabulary(fresh(), tokenizer).verdict == FAIL
    model = Transformer(ModelConfig(**FIELDS), tokenizer.vocab_size, rngs=nnx.Rngs(0))
    assert text.vocabulary(model, tokenizer).verdict == OK


# The step.


def test_a_batch_that_does_not_divide_is_found():
    found, mesh = step.devices(tiny_config(train__batch_size=6))
    assert found.verdict == FAIL
    assert mesh is None
    assert "6 is not divisible by 8 devices" in found.found
    assert step.devices(tiny_config(train__batch_size=16))[0].verdict == OK


def fitted_step(**fields):
    config = tiny_config(mesh__data=1, **fields)
    mesh, batch = sharding.make_mesh(config), batch_of(config.train.batch_size, config.train.sequence_length)
    return (*step.memory_fit(config, VOCAB, mesh, sharding.put_batch(mesh, batch)), mesh, batch)


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_found():
    found, fitted, *_ = fitted_step(train__memory_gb=1e-5, train__batch_size=1, model__depth=1)
    assert found.verdict == FAIL
    assert fitted is None
    assert "--model.remat full" in found.found


def test_a_step_lowers_the_loss_or_is_found():
    found, fitted, mesh, batch = fitted_step(model__depth=1)
    assert found.verdict == OK
    assert step.one_step(fitted, fitted.steps.init(), mesh, batch).verdict == OK

    def uphill(state, batch):
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics = fitted.train(state, batch)
        return state._replace(params=jax.tree.map(lambda new, old: 2 * old - new, state.params, before)), metrics

    worse = dataclasses.replace(fitted, train=uphill)
    assert step.one_step(worse, fitted.steps.init(), mesh, batch).verdict == FAIL
    still = dataclasses.replace(fitted, train=lambda state, batch: (state, fitted.train(fitted.steps.init(), batch)[1]))
    assert step.one_step(still, fitted.steps.init(), mesh, batch).verdict == FAIL


# A trained run.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of forty steps, validated at the last."""
    folder = tmp_path_factory.mktemp("check")
    lines = (f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs.\n" for i in range(600))
    (folder / "text.txt").write_text("".join(lines))
    config = tiny_config(
        data__files=str(folder / "text.txt"), data__cache=str(folder / "cache"), tokenizer__vocab_size=400,
        train__steps=40, eval__every=40, eval__sample_tokens=0, checkpoint__every=20, mesh__data=1, model__depth=1,
        optimizer__name="adamw",
    )  # fmt: skip
    train(config, folder / "run")
    return Run(folder / "run")


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(str(run.path))


@pytest.fixture(scope="module")
def rows_and_corpus(loaded):
    from slm_jax.data.corpus import open_corpus

    corpus = open_corpus(loaded.run.corpus, loaded.tokenizer)
    return trained.row_losses(loaded.model, loaded.config, corpus.validation), corpus


def test_the_loss_of_a_run_is_its_own_and_below_the_baselines(run, loaded, rows_and_corpus):
    rows, corpus = rows_and_corpus
    loss, size = trained.held_out_loss(rows), loaded.tokenizer.vocab_size
    assert sum(row.tokens for row in rows) == len(corpus.validation)
    assert loss == pytest.approx(read_rows(run.metrics)[-1]["val_loss"], rel=1e-6)
    assert trained.reproduces(loss, read_rows(run.metrics), 40, "float32").verdict == OK
    assert trained.reproduces(loss + 1e-3, read_rows(run.metrics), 40, "float32").verdict == FAIL
    assert trained.reproduces(loss, read_rows(run.metrics), 39, "float32").verdict == SKIPPED
    unigram = trained.unigram_loss(corpus.train, rows, size)
    assert trained.below_baselines(loss, unigram, size).verdict == OK
    assert trained.below_baselines(unigram + 0.01, unigram, size).verdict == FAIL
    assert trained.below_baselines(float("nan"), unigram, size).verdict == FAIL


def test_the_baseline_is_the_entropy_of_the_frequencies():
    tokens = np.repeat(np.arange(4), [50, 25, 15, 10]).astype(np.uint16)
    row = trained.RowLoss(0.0, len(tokens), tokens.astype(np.int32))
    p = (np.array([50, 25, 15, 10]) + 1) / 104
    expected = -(np.array([50, 25, 15, 10]) / 100 * np.log(p)).sum()
    assert trained.unigram_loss(tokens, [row], 4) == pytest.approx(expected)


def test_the_worst_samples_are_shown(loaded, rows_and_corpus):
    rows, _ = rows_and_corpus
    found = trained.per_sample(rows, loaded.tokenizer, 2)
    assert found.verdict == OK
    worst = sorted((row.mean for row in rows), reverse=True)[:2]
    assert [float(line.split()[0]) for line in found.details] == pytest.approx(worst, abs=1e-3)
    broken = [*rows, rows[0]._replace(nll=float("nan"))]
    assert trained.per_sample(broken, loaded.tokenizer).verdict == FAIL


def test_a_broken_cache_is_found(loaded, monkeypatch):
    ids = loaded.tokenizer.encode("Line 5: the quick brown fox", mode="flat")[:16]
    assert trained.cached_logits(loaded.model, ids, loaded.context).verdict == OK
    right = ops.cache_mask

    def forgets(positions, cached, window=0):  # the token before
        return right(positions, cached, window) & (positions[:, :, None] - cached[:, None, :] != 1)

    monkeypatch.setattr(ops, "cache_mask", forgets)
    assert trained.cached_logits(loaded.model, ids, loaded.context).verdict == FAIL


def test_a_greedy_text_of_another_model_is_found(loaded, monkeypatch):
    prompt = loaded.tokenizer.encode("Line 5: the", mode="flat")
    arguments = (loaded.model, loaded.tokenizer, prompt, loaded.context, 8)
    monkeypatch.setattr(trained, "generate_ids", lambda *_: [[10] * 8])
    assert trained.greedy_text(*arguments).verdict == FAIL


def test_rows_of_metrics_that_are_not_each_step_once_are_found(run):
    rows = read_rows(run.metrics)
    assert trained.metrics_rows(rows, 40).verdict == OK
    for wrong in (rows[:-1], [*rows[:5], rows[4], *rows[5:]], rows[1:], [rows[1], rows[0], *rows[2:]]):
        assert trained.metrics_rows(wrong, 40).verdict == FAIL
    assert trained.metrics_rows([{**rows[0], "loss": float("inf")}, *rows[1:]], 40).verdict == FAIL


# The command.


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    """This process is not the command's own: it keeps its memory settings, and no programs in the user's cache."""
    monkeypatch.setattr("slm_jax.process.tune_process", lambda: None)


def test_a_trained_run_is_checked_by_the_command(run, capsys):
    assert main(["--run", str(run.path), "--format", "json", "--worst", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    names = {each["name"]: each["verdict"] for each in told["checks"]}
    assert {"labels", "finite weights", "causality", "held-out loss", "cached logits", "greedy text"} <= names.keys()
    assert set(names.values()) == {OK, SKIPPED}  # there is no window


@pytest.mark.slow
def test_a_damaged_checkpoint_and_a_lost_row_are_told(run, tmp_path, capsys):
    broken = Run(tmp_path / "run")
    shutil.copytree(run.path, broken.path)
    for file in (broken.checkpoints / "40").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"")
    broken.metrics.write_text("".join(broken.metrics.read_text().splitlines(keepends=True)[1:]))
    found = {each.name: each for each in check(run=broken.path)}
    assert found["checkpoint"].verdict == FAIL
    assert "step 20, the newest is of 40" in found["checkpoint"].found
    assert found["metrics"].verdict == FAIL
    assert found["held-out loss"].verdict == OK
    assert "2 of" in as_table(list(found.values())).splitlines()[-1]


@pytest.mark.slow
def test_a_config_is_checked_before_it_is_run(run, tmp_path, capsys):
    config = run.read_config()
    path = tmp_path / "mine.toml"
    path.write_text(config.to_toml())
    assert main(["--config", str(path), "--model.window", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "verdict", "found", "expected"]
    at = lines[0].index("verdict")
    verdicts = {line[:at].strip(): line[at:].split()[0] for line in lines[1:-2]}
    assert {"memory", "one step", "initial loss", "attention window"} <= verdicts.keys()
    assert set(verdicts.values()) == {OK}
    assert lines[-1].startswith("all ")
    assert not list(tmp_path.glob("runs"))


def test_a_text_that_cannot_be_read_is_told(run, tmp_path):
    config = run.read_config()
    (tmp_path / "short.txt").write_text("too short")
    data = config.data.model_copy(update={"files": (str(tmp_path / "short.txt"),)})
    (found,) = check(config=config.model_copy(update={"data": data}))
    assert found.verdict == FAIL
    assert "short" in found.found or "one batch takes" in found.found


def test_mistakes_of_the_command():
    with pytest.raises(UserError, match="no run in nowhere"):
        main(["--run", "nowhere"])
    with pytest.raises(UserError, match="--format xml"):
        main(["--format", "xml"])
    with pytest.raises(UserError, match="--worst many"):
        main(["--worst", "many"])
    wrong = [sys.executable, "-m", "slm_jax.check", "--model.dims", "3"]
    ended = subprocess.run(wrong, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip() == "error: unknown key model.dims, perhaps you meant model.dim (--help lists them all)"
