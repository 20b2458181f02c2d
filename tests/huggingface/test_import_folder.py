"""A real run exported by the command, and another one initialized from the folder."""

import json
import shutil
import tomllib

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors")

from safetensors.numpy import load_file, save_file

from slm_jax.cli import export
from slm_jax.cli.train import parse_args
from slm_jax.config.schema import Config
from slm_jax.huggingface.export import export as export_run
from slm_jax.huggingface.import_folder import open_folder
from slm_jax.huggingface.weights import weight_files
from slm_jax.run.directory import Run
from slm_jax.run.load import load_run
from slm_jax.run.read_checkpoint import read_params
from slm_jax.training.schedule import make_schedule
from slm_jax.training.tokenizer import resolve_tokenizer
from slm_jax.training.train import train
from slm_jax.training.warm_start import find_initial_weights
from slm_jax.utils.errors import UserError
from tests.helpers import TINY
from tests.huggingface.test_export import params_of

SMALL = {**TINY, "model.depth": 1, "model.kv_heads": 2, "model.vocab_multiple": 64, "tokenizer.vocab_size": 330}
SMALL |= {
    "optimizer.lr": 0.01,
    "eval.max_tokens": 200,
    "eval.sample_tokens": 0,
    "train.steps": 3,
    "checkpoint.every": 100,
    "mesh.data": 1,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Folder with a text file, a run trained on it and its export."""
    path = tmp_path_factory.mktemp("hf")
    (path / "a.txt").write_text("".join(f"Line {i}: the fox sees {i * 7 % 13} dogs.\n" for i in range(400)))
    train(small(path), path / "first")
    export.main(["--run", str(path / "first"), "--to", str(path / "out"), "--license", "mit"])
    return path


def small(path, **overrides):
    given = {"data.files": str(path / "a.txt"), "data.cache": str(path / "cache")}
    return Config.load(**{**SMALL, **given, **{k.replace("__", "."): v for k, v in overrides.items()}})


def first_params(run):
    """Return the newest step and its parameters as stored, by name."""
    loaded = load_run(str(run))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), params_of(loaded.model))
    params, step = read_params(Run(run).checkpoints, target)
    return step, {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(params)}


def test_the_command_prints_the_next_steps(workspace, tmp_path, capsys):
    export.main(["--run", str(workspace / "first"), "--to", str(tmp_path / "My Model"), "--dtype", "bfloat16"])
    out = capsys.readouterr().out
    assert "step 3 (best and last), as Qwen3ForCausalLM in bfloat16" in out
    assert "trust_remote_code=True" in out
    assert f"hf upload USER/first '{tmp_path}/My Model'" in out
    with pytest.raises(UserError, match="average 0"):
        export.main(["--run", str(workspace / "first"), "--to", str(tmp_path / "x"), "--average", "0"])
    with pytest.raises(UserError, match="not empty"):
        export.main(["--run", str(workspace / "first"), "--to", str(workspace / "out")])
    with pytest.raises(UserError, match="no run in"):
        export.main(["--run", str(workspace / "nowhere"), "--to", str(tmp_path / "x")])
    card = (workspace / "out" / "README.md").read_text()
    row = json.loads((workspace / "first" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"step 3: loss {row['val_loss']:.4f}" in card
    assert "- Text: text files, " in card
    assert str(workspace) not in card


def test_a_run_starts_from_the_bits_of_the_folder(workspace, tmp_path):
    shutil.copytree(workspace / "out", tmp_path / "out")
    tuned = small(
        workspace, init__from_hf=str(tmp_path / "out"), model__vocab_multiple=1, train__seed=5, train__steps=2
    )
    result = train(tuned, tmp_path / "tuned")
    assert result.step == 2
    assert result.metrics["val_loss"] < 5
    (tmp_path / "tuned" / "checkpoints" / "2").rename(tmp_path / "aside")
    step, initial = first_params(tmp_path / "tuned")
    assert step == 0
    _, source = first_params(workspace / "first")
    for name, value in initial.items():
        assert np.array_equal(value, source[name][: len(value)]), name
    again = export_run(load_run(str(tmp_path / "tuned")), tmp_path / "again", average=2)
    card = (again / "README.md").read_text()
    assert "Initialized from the weights of `out`" in card
    assert "the mean of the newest 2 checkpoints" in card
    assert Run(tmp_path / "tuned").tokenizer.read_bytes() == (workspace / "out" / "tokenizer.hybtok").read_bytes()


def test_model_options_default_to_those_of_the_folder(workspace):
    folder = str(workspace / "out")
    config, _ = parse_args(
        ["--init.from_hf", folder, "--model.dropout", "0.1", "--data.files", str(workspace / "a.txt")]
    )
    model = config.model
    assert (model.dim, model.depth, model.heads, model.kv_heads, model.dropout) == (32, 1, 4, 2, 0.1)
    assert find_initial_weights(config).path == workspace / "out"
    assert resolve_tokenizer(config) == str(workspace / "out" / "tokenizer.hybtok")
    config, _ = parse_args(["--init.from_hf", folder, "--model.depth", "3", "--model.mlp_dim", "300"])
    with pytest.raises(
        UserError, match=r"(?s)depth: 1 in the folder, 3 in this config.*SwiGLU width: 64 in the folder"
    ):
        find_initial_weights(config)
    with pytest.raises(UserError, match=r"no config\.json"):
        parse_args(["--init.from_hf", str(workspace)])
    with pytest.raises(UserError, match="both given"):
        small(workspace, init__from_hf=folder, init__from_run=str(workspace / "first"))
    with pytest.raises(UserError, match="no run whose optimizer state could be kept"):
        small(workspace, init__from_hf=folder, init__optimizer="carry")


def test_the_optimizer_has_settings_for_fine_tuning(workspace, caplog):
    given = ["--init.from_hf", str(workspace / "out"), "--train.steps", "200", "--data.files", str(workspace / "a.txt")]
    config, _ = parse_args(given)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.warmup_steps) == ("adamw", 5e-5, 0.0, 6)
    assert [make_schedule(optimizer, 200)(step) for step in (6, 103, 200)] == pytest.approx([5e-5, 2.5e-5, 0])
    assert tomllib.loads(config.to_toml())["optimizer"]["lr"] == 5e-5
    with caplog.at_level("INFO", "slm_jax"):
        find_initial_weights(config)
        assert "optimizer: name adamw, lr 5e-05" in caplog.text
        assert "(for fine-tuning; --optimizer.* changes them)" in caplog.text
        config, _ = parse_args([*given, "--optimizer.lr", "0.001", "--optimizer.warmup_steps", "0"])
        assert (config.optimizer.name, config.optimizer.lr, config.optimizer.warmup_steps) == ("adamw", 0.001, 0)
        find_initial_weights(config)
        assert "the settings for fine-tuning differ: lr 5e-05, warmup_steps 6" in caplog.text
    config, _ = parse_args([*given, "--config", "quickstart"])  # a preset is taken as it is
    assert config.optimizer.name == "muon"


def padded(folder, to, rows):
    """Copy a folder and append rows to its embedding."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.vstack([embedding, np.ones((rows, embedding.shape[1]), np.float32)])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"vocab_size": len(embedding) + rows}))
    return to


def test_a_run_starts_from_a_folder_with_a_padded_vocabulary(workspace, tmp_path):
    folder = padded(workspace / "out", tmp_path / "out", 54)
    tuned = small(workspace, init__from_hf=str(folder), model__vocab_multiple=1, train__steps=1)
    train(tuned, tmp_path / "tuned")
    (tmp_path / "tuned" / "checkpoints" / "1").rename(tmp_path / "aside")
    _, initial = first_params(tmp_path / "tuned")
    _, source = first_params(workspace / "first")
    for name, value in initial.items():
        assert np.array_equal(value, source[name][: len(value)]), name


def test_padding_is_told_from_a_different_tokenizer(workspace, tmp_path):
    """With a tokenizer from elsewhere, more rows than any padding has are those of other ids."""
    for number, (rows, message) in enumerate(((1023, ""), (1024, "fit no other tokenizer"), (-1, "fit no other"))):
        folder = tmp_path / str(number)
        shutil.copytree(workspace / "out", folder)
        (folder / "tokenizer.hybtok").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + rows}))
        given = small(workspace, init__from_hf=str(folder), tokenizer__path=str(workspace / "out" / "tokenizer.hybtok"))
        if message:
            with pytest.raises(UserError, match=message):
                resolve_tokenizer(given)
        else:
            assert resolve_tokenizer(given) == str(workspace / "out" / "tokenizer.hybtok")


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 1000, "layer_types": None}, {"vocab_size": 2**31 - 1}, {"intermediate_size": 2**19}],
)
def test_sizes_are_checked_before_anything_is_allocated(workspace, tmp_path, change):
    folder = tmp_path / "out"
    shutil.copytree(workspace / "out", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    given = small(
        workspace, init__from_hf=str(folder), **{f"model__{k}": v for k, v in open_folder(str(folder)).model.items()}
    )
    with pytest.raises(UserError, match=r"config\.json describes a model of [\d,]+ parameters.*the weights are"):
        find_initial_weights(given)


@pytest.mark.parametrize("name", ["x" * 5000, "../../etc/passwd", "a\0b"])
def test_an_index_with_an_impossible_name_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"is missing; weights are read from safetensors only") as error:
        weight_files(tmp_path)
    assert len(str(error.value)) < 300


def test_a_different_tokenizer_is_refused(workspace, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(workspace / "out", folder)
    rows = open_folder(str(folder)).vocab_size
    for given, message in (
        ({"tokenizer__path": "english-8k"}, "is not the tokenizer of .* fit no other: leave it out"),
        ({"tokenizer__vocab_size": 301}, rf"tokenizer\.vocab_size: {rows} in .*, 301 current"),
        ({"tokenizer__lowercase": False}, r"tokenizer\.lowercase: True in .*, False current"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_tokenizer(small(workspace, init__from_hf=str(folder), **given))
    own = tmp_path / "own.hybtok"
    (folder / "tokenizer.hybtok").rename(own)
    config = small(workspace, init__from_hf=str(folder), tokenizer__path="english-8k")
    with pytest.raises(UserError, match=rf"has {rows} rows, but the tokenizer english-8k has 8192 ids"):
        resolve_tokenizer(config)
    assert resolve_tokenizer(small(workspace, init__from_hf=str(folder), tokenizer__path=str(own))) == str(own)
    with pytest.raises(UserError, match=r"give that tokenizer as --tokenizer\.path"):
        resolve_tokenizer(small(workspace, init__from_hf=str(folder)))
