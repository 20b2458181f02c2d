"""Test that a mesh distributes the work and changes nothing else."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from slm_jax import load_run, train
from slm_jax.config.schema import Config
from slm_jax.distributed import sharding
from slm_jax.generation import decode
from slm_jax.run.directory import Run
from slm_jax.run.metrics import read_metrics
from slm_jax.run.read_checkpoint import read_fields
from slm_jax.training.sample_texts import sampling_function
from slm_jax.training.steps import make_steps
from slm_jax.utils.errors import UserError
from tests.helpers import TINY, largest_difference, random_ids, tiny_config
from tokenizer import HybridTokenizer

VOCAB = 64
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
MESHES += [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1, 1, 4), (2, 4, 1), (1, 2, 4))]


def run(steps: int = 3, mesh: tuple[int, int, int] = (1, 1, 1), **fields):
    """Return the state and losses after some steps on random batches, and the mesh."""
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    config = tiny_config(**{"optimizer__warmup_steps": 1, **sizes, **fields})
    devices = sharding.make_mesh(config)
    made = make_steps(config, VOCAB, devices)
    state = made.init()
    losses = []
    for step in range(steps):
        ids = np.asarray(random_ids((8, 33), VOCAB, seed=step))
        batch = sharding.shard_batch(devices, {"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
        state, metrics = made.train(state, batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    sums = made.evaluate(state.params, batch)
    return state, np.array([*losses, [float(sums.nll), float(sums.correct)]]), devices


@pytest.fixture(scope="module")
def single_device():
    return run()


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_equals_one_device(mesh, single_device):
    state, losses, devices = run(mesh=mesh)
    np.testing.assert_allclose(losses, single_device[1], rtol=1e-5)
    # Muon amplifies the rounding of near-zero directions to small differences of the updates.
    assert largest_difference(jax.device_get(state.params), single_device[0].params) < 2e-4
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        parts = mesh[1] * mesh[2] if re.search("weight|embedding", name) else 1
        assert leaf.size == parts * leaf.addressable_shards[0].data.size, name
        assert len(leaf.sharding.device_set) == devices.size


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {"optimizer__name": "adamw", "optimizer__lr": 0.001, "model__tie_weights": False}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"model__kv_heads": 2, "model__scan_layers": True, "model__remat": "full", "train__ul_alpha": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"model__head_dim": 16, "model__qkv_bias": True, "model__qk_norm": False, "model__kv_heads": 2}
            | {"model__window": 7, "model__full_layers": (1,), "model__nope_layers": (1,), "model__scan_layers": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"model__kv_heads": 2, "model__mlp": "relu2", "model__logit_softcap": 6.0, "model__attention_gate": True}
            | {"model__value_embeddings": (1,), "model__residual_scales": True, "model__window": 7}
            | {"model__window_pattern": "SL", "model__output_init": "zero"},
            marks=pytest.mark.slow,
        ),
        {"train__accumulation": 2, "train__z_loss": 0.01, "model__window": 7, "model__vocab_multiple": 48}
        | {"optimizer__name": "normuon", "optimizer__orthogonalization": "polar-express"}
        | {"optimizer__cautious_decay": True, "optimizer__momentum_warmup_steps": 2, "optimizer__average_decay": 0.9}
        | {"optimizer__embedding_lr_scale": 2.0, "optimizer__vector_lr_scale": 0.5},
    ],
)
def test_every_feature_on_a_mesh_of_three_axes(fields):
    _, expected, _ = run(**fields)
    _, losses, _ = run(mesh=(2, 2, 2), **fields)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_dropout_draws_the_same_on_every_mesh():
    _, expected, _ = run(model__dropout=0.3)
    _, losses, _ = run(mesh=(2, 2, 2), model__dropout=0.3)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def sample_texts(sizes):
    """Return the samples of an untrained model during training, generated on a mesh, and its vocabulary's size."""
    tokenizer = HybridTokenizer()
    tokenizer.add_text("the quick brown fox jumps over the lazy dogs. " * 9)
    tokenizer.freeze_vocab(vocab_size=272)
    fields = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes, strict=True))
    config = tiny_config(**fields, eval__sample_tokens=12, eval__prompts=["the quick", "dogs"])
    made = make_steps(config, tokenizer.vocab_size, sharding.make_mesh(config))
    return sampling_function(config, Run(Path("none")), tokenizer, made)(made.init().params), tokenizer.vocab_size


@pytest.fixture(scope="module")
def samples_of_one_device():
    return sample_texts((1, 1, 1))[0]


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 2, 4), (8, 1, 1)])
def test_samples_are_generated_with_split_parameters(mesh, monkeypatch, samples_of_one_device):
    """Each device holds its part of the matrices only, and no program of generation gathers them."""
    programs, resident = [], []

    def observe(name):
        function = getattr(decode, name)

        def call(graph, params, *args, **kwargs):
            programs.append(function.lower(graph, params, *args, **kwargs).compile().as_text())
            result = function(graph, params, *args, **kwargs)
            resident.extend([params, result] if name == "prepare_weights" else [])
            return result

        monkeypatch.setattr(decode, name, call)

    for name in ("prepare_weights", "_prefill", "_decode"):
        observe(name)
    texts, vocab_size = sample_texts(mesh)
    assert texts == samples_of_one_device
    for tree in resident:
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        # The scales of norms are replicated.
        assert sharding.bytes_per_device(tree) < whole / (mesh[1] * mesh[2]) + 2000
    gathered = {shape for text in programs for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)}
    # Activations of the two sequences, and the rows of the embedding where "tensor" splits them.
    assert all(shape.startswith(("2,", f"{vocab_size},")) for shape in gathered), gathered


def test_validation_gathers_one_layer_at_a_time():
    config = tiny_config(mesh__fsdp=8, model__depth=4, model__scan_layers=True)
    mesh = sharding.make_mesh(config)
    made = make_steps(config, VOCAB, mesh)
    batch = {name: jax.ShapeDtypeStruct((8, 16), np.int32) for name in ("input_ids", "labels")}
    params = jax.eval_shape(made.init).params
    params = sharding.abstract_arrays(mesh, params, made.partitions)
    program = made.evaluate.lower(params, batch).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
    assert gathered
    assert max(np.prod(list(map(int, shape.split(",")))) for shape in gathered) <= 32 * 64


@pytest.mark.parametrize("length", [16, 160])  # attention in one and in two blocks
def test_a_step_contains_no_array_without_elements(length):
    """XLA of jax 0.11.2 crashes if `shard_map` passes one, such as the indices of an update of a full axis."""
    options = {"model__window": 7, "model__full_layers": (1,), "train__ul_alpha": 0.5}
    config = tiny_config(mesh__data=2, train__sequence_length=length, **options)
    made = make_steps(config, VOCAB, sharding.make_mesh(config))
    names = ("input_ids", "labels", "attention_mask")
    batch = {name: jax.ShapeDtypeStruct((8, length), np.int32) for name in names}
    text = made.train.lower(jax.eval_shape(made.init), batch).as_text()
    assert "manual_computation" in text
    assert "tensor<0x" not in text


def test_initial_parameters_are_bit_identical_on_every_mesh():
    states = []
    for sizes in ({"mesh__data": 1}, {"mesh__fsdp": 4, "mesh__tensor": 2}):
        config = tiny_config(**sizes)
        states.append(jax.device_get(make_steps(config, VOCAB, sharding.make_mesh(config)).init().params))
    assert largest_difference(*states) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mesh.fsdp": 3, "model.dim": 36, "model.heads": 3, "train.batch_size": 12},
            "mesh.fsdp 3 x mesh.tensor 1 does not divide the 8 devices",
        ),
        (
            {"mesh.fsdp": 16, "train.batch_size": 16},
            "asks for 16 devices (fsdp 16 x tensor 1), there are 8 (cpu): use smaller sizes, such as --mesh.fsdp 1",
        ),
        ({"mesh.data": 2, "mesh.fsdp": 4, "train.batch_size": 12}, "12 is not divisible by 8 devices: use 8 or 16"),
        (
            {"mesh.tensor": 8},
            "model.heads 4 is not divisible by mesh.tensor 8: use mesh.tensor 1 or 2 or 4, or 8 heads",
        ),
        ({"mesh.fsdp": 8, "model.dim": 36}, "model.dim 36 is not divisible by mesh.fsdp 8: use dim 32 or 40"),
    ],
)
def test_mesh_that_does_not_divide_is_rejected_with_one_that_does(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sharding.make_mesh(Config.load(**{**TINY, **fields}))


def test_vocabulary_that_does_not_divide_is_rejected():
    config = tiny_config(mesh__tensor=4)
    with pytest.raises(UserError, match=re.escape("--model.vocab_multiple 4")):
        make_steps(config, 61, sharding.make_mesh(config))
    make_steps(tiny_config(mesh__tensor=4, model__vocab_multiple=4), 61, sharding.make_mesh(config))


def test_array_that_nothing_declares_is_an_error_that_names_it():
    """Parameters and moments alike; scalars need no declaration."""
    config = tiny_config(mesh__fsdp=2)
    mesh = sharding.make_mesh(config)
    steps = make_steps(config, VOCAB)
    shapes = jax.eval_shape(steps.init)
    undeclared = {path: p for path, p in steps.partitions.items() if path != ("blocks", "mlp", "up", "weight")}
    for tree in (shapes.params, {"opt_state": shapes.opt_state}):
        with pytest.raises(ValueError, match=r"no partition is declared for .*blocks\.mlp\.up\.weight \[2, 32, 64\]"):
            sharding.tree_shardings(mesh, tree, undeclared)
        sharding.tree_shardings(mesh, tree, steps.partitions)
    assert sharding.tree_shardings(mesh, {"step": shapes.step}, {})["step"] == sharding.replicated(mesh)


@pytest.mark.parametrize("name", ["adamw", "muon", "normuon"])
def test_moments_are_split_like_their_parameters(name):
    config = tiny_config(mesh__fsdp=2, mesh__tensor=2, optimizer__name=name, health__on_nan="skip")
    mesh = sharding.make_mesh(config)
    steps = make_steps(config, VOCAB)
    shapes = jax.eval_shape(steps.init)
    shardings = sharding.tree_shardings(mesh, shapes, steps.partitions)
    expected = {}
    for (path, leaf), of_leaf in zip(
        jax.tree_util.tree_leaves_with_path(shapes.params), jax.tree.leaves(shardings.params), strict=True
    ):
        expected[jax.tree_util.keystr(path)] = (leaf.shape, of_leaf.spec)
    moments = 0
    for (path, leaf), of_leaf in zip(
        jax.tree_util.tree_leaves_with_path(shapes.opt_state), jax.tree.leaves(shardings.opt_state), strict=True
    ):
        parameter = next((k for k in expected if jax.tree_util.keystr(path).endswith(k)), None)
        if ".second_moment" in jax.tree_util.keystr(path):  # one value for each output
            assert leaf.shape == (2, 1, expected[parameter][0][-1])
            assert of_leaf.spec == jax.sharding.PartitionSpec(None, None, expected[parameter][1][-1])
            continue
        assert (leaf.shape, of_leaf.spec) == expected.get(parameter, ((), sharding.replicated(mesh).spec))
        moments += parameter is not None
    assert moments == 2 * len(expected) - (0 if name == "adamw" else 7)  # 7 matrices with one moment
    assert shardings.health.mean.is_fully_replicated


@pytest.mark.slow
def test_run_resumes_on_any_mesh(tmp_path):
    """Resume on 1 device, FSDP x tensor, 8 devices and 1 again; restores are bit-identical, the losses agree."""
    lines = (f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs.\n" for i in range(600))
    (tmp_path / "text.txt").write_text("".join(lines))
    fields = {**TINY, "model.depth": 1, "model.vocab_multiple": 2, "tokenizer.vocab_size": 320, "eval.sample_tokens": 4}
    fields |= {"data.files": str(tmp_path / "text.txt"), "data.cache": str(tmp_path / "cache"), "eval.max_tokens": 200}

    def rows(run, stages):
        for steps, mesh in stages:
            sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
            train(Config.load(**{**fields, **sizes, "train.steps": steps, "optimizer.schedule": "constant"}), run)
        return read_metrics(Run(run).metrics)

    moved = rows(tmp_path / "moved", [(3, (1, 1, 1)), (6, (1, 4, 2)), (9, (8, 1, 1)), (12, (1, 1, 1))])
    stayed = rows(tmp_path / "stayed", [(3, (1, 1, 1)), (6, (1, 1, 1)), (9, (1, 1, 1)), (12, (1, 1, 1))])
    assert [row["step"] for row in moved] == list(range(1, 13))
    for name in ("loss", "grad_norm", "tokens", "bytes"):
        np.testing.assert_allclose([r[name] for r in moved], [r[name] for r in stayed], rtol=1e-4)

    run = Run(tmp_path / "moved")
    restored = []
    for mesh in ((1, 1, 1), (1, 4, 2), (2, 2, 2)):
        sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
        config = Config.load(**{**fields, **sizes})
        steps = make_steps(config, load_run(str(run.path)).tokenizer.vocab_size)
        target = sharding.abstract_arrays(sharding.make_mesh(config), jax.eval_shape(steps.init), steps.partitions)
        saved, _ = read_fields(run.checkpoints, {"params": target.params, "opt_state": target.opt_state})
        assert jax.tree.leaves(saved)[0].sharding.mesh.size == np.prod(mesh)
        restored.append(jax.device_get(saved))
    assert largest_difference(restored[0], restored[1]) == largest_difference(restored[0], restored[2]) == 0


@pytest.mark.parametrize(("platform", "fsdp"), [("cuda", 1), ("tpu", 2)])
def test_xla_knows_the_options_of_the_programs(platform, fsdp):
    """A removed option would end every run on that hardware; XLA rejects unknown ones on all of it."""
    devices = np.array([SimpleNamespace(platform=platform, compute_capability="9.0")])
    options = sharding.compiler_options(SimpleNamespace(devices=devices, shape={"fsdp": fsdp}))
    assert options
    known_here = {name: value for name, value in options.items() if not name.startswith("xla_jf_")}  # TPU's own
    assert jax.jit(lambda: 1).lower().compile(compiler_options=known_here)() == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        jax.jit(lambda: 1).lower().compile(compiler_options={"xla_gpu_no_such_option": False})


def test_flags_of_the_user_win(monkeypatch):
    gpu = SimpleNamespace(platform="cuda", compute_capability="9.0")
    mesh = SimpleNamespace(devices=np.array([gpu]), shape={"fsdp": 1})
    options = sharding.compiler_options(mesh)
    for name in options:
        monkeypatch.setenv("XLA_FLAGS", f"--{name}=64")
        assert sharding.compiler_options(mesh) == {other: options[other] for other in options if other != name}
