"""Adapters in the layout of PEFT: logits and gradients of both sides are equal, and what cannot be read is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", minversion="2.9", reason="pip install -e '.[bench]'")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install -e '.[bench]'")
peft = pytest.importorskip("peft", reason="pip install peft")
pytest.importorskip("safetensors")

from slm_jax.cli import export as export_command  # noqa: E402
from slm_jax.cli.options import config_from_args  # noqa: E402
from slm_jax.config.schema import Config  # noqa: E402
from slm_jax.huggingface import peft_folder  # noqa: E402
from slm_jax.huggingface.import_folder import open_folder, read_parameters  # noqa: E402
from slm_jax.model import lora  # noqa: E402
from slm_jax.model.abstract import abstract_model  # noqa: E402
from slm_jax.model.params import join  # noqa: E402
from slm_jax.run.load import load_run  # noqa: E402
from slm_jax.training.objective import NextToken  # noqa: E402
from slm_jax.training.resume import check_compatibility  # noqa: E402
from slm_jax.training.train import train  # noqa: E402
from slm_jax.training.train_step import gradients  # noqa: E402
from slm_jax.utils.errors import UserError  # noqa: E402
from tests.helpers import TINY, learned_tokenizer, random_ids  # noqa: E402

VOCAB = 320  # more rows than the tokenizer has ids
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def theirs_of(folder, **options):
    """Write a random base and adapters that matter, and return the model of PEFT."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**SIZES, head_dim=8))
    base.save_pretrained(folder / "base")
    given = {"r": 3, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapters")
    return model


def ours_of(folder):
    """Return the config, the graph with adapters, the base and the adapters of the folders."""
    opened = open_folder(str(folder / "base"))
    options = peft_folder.open_adapters(str(folder / "adapters")).options()
    config = Config.from_tree({"model": opened.model, "lora": options, "train": {"dtype": "float32"}})
    graph, _ = abstract_model(config, VOCAB, adapters=True)
    _, shapes = abstract_model(config, VOCAB)
    base = jax.tree.map(jnp.asarray, read_parameters(opened, shapes, VOCAB))
    like = lora.init_adapters(base, config.lora, jax.random.key(0))
    peft_folder.check_adapters(str(folder / "adapters"), config.lora)
    return config, graph, base, peft_folder.read_adapters(str(folder / "adapters"), config.lora, like)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}],
    ids=["all", "some"],
)
def test_logits_and_gradients_of_imported_adapters_are_those_of_peft(tmp_path, options):
    theirs = theirs_of(tmp_path, **options)
    config, graph, base, adapters = ours_of(tmp_path)
    ids = random_ids((2, 12), VOCAB)
    their_ids = torch.from_numpy(np.array(ids, np.int64))
    result = theirs(their_ids, labels=their_ids)  # shifts the labels itself
    logits = nnx.merge(graph, join(base, adapters))(ids)
    assert np.abs(np.asarray(logits) - result.logits.detach().numpy()).max() <= 1e-4
    result.loss.backward()
    labels = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    batch = {"input_ids": ids, "labels": labels}
    grads, sums = gradients(adapters, batch, None, graph=graph, objective=NextToken(), base=base)
    assert float(sums.nll / sums.tokens) == pytest.approx(float(result.loss.detach()), rel=1e-5)
    their_grads = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    seen = 0
    for target in config.lora.targets:
        pair = grads["blocks"][lora.SUBLAYERS[target]][target]["adapter"]
        for key, letter in (("a", "A"), ("b", "B")):
            for layer, found in enumerate(np.asarray(pair[key])):
                name = (
                    f"base_model.model.model.layers.{layer}.{peft_folder.MODULES[target]}.lora_{letter}.default.weight"
                )
                assert np.abs(found - their_grads[name].T).max() <= 1e-4 * max(1, np.abs(found).max()), name
                seen += 1
    assert seen == len(their_grads)


@pytest.mark.slow
def test_adapters_of_a_run_go_to_peft_and_back(tmp_path, capsys):
    """Import in a run, train it, export base and adapters, and load both with PEFT."""
    theirs = theirs_of(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} {i * 7 % 13}\n" for i in range(300)))
    tokenizer = learned_tokenizer([text.read_text()], 300)
    tokenizer.save(tmp_path / "base" / "tokenizer.hybtok")
    fields = {name: value for name, value in TINY.items() if not name.startswith("model.")}
    fields |= {"train.steps": 3, "train.batch_size": 4, "eval.sample_tokens": 0, "mesh.data": 1, "eval.max_tokens": 100}
    args = [f"--{name}={value}" for name, value in fields.items()]
    args += [f"--init.from_hf={tmp_path / 'base'}", f"--lora.from_peft={tmp_path / 'adapters'}"]
    args += [f"--data.files={text}", f"--data.cache={tmp_path / 'cache'}"]
    config = config_from_args(args, "x", "x")
    assert (config.lora.rank, config.lora.alpha, len(config.lora.targets)) == (3, 12, 7)
    assert config.optimizer.lr == 2e-4
    train(config, tmp_path / "run")
    for step in ("0", "3"):
        out = tmp_path / f"out-{step}"
        export_command.main(["--run", str(tmp_path / "run"), "--to", str(out), "--format", "peft", "--step", step])
        assert "PeftModel.from_pretrained" in capsys.readouterr().out
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(base, out)
        ours = load_run(str(tmp_path / "run"), step=step).model
        ids = random_ids((2, 12), tokenizer.vocab_size)
        with torch.no_grad():
            logits = again(torch.from_numpy(np.array(ids, np.int64))).logits.numpy()[..., : tokenizer.vocab_size]
            first = theirs(torch.from_numpy(np.array(ids, np.int64))).logits.numpy()[..., : tokenizer.vocab_size]
        assert np.abs(np.asarray(ours(ids)) - logits).max() <= 1e-4
        assert (np.abs(first - logits).max() <= 1e-4) == (step == "0")


def changed(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_other_adapters_are_refused(tmp_path):
    theirs_of(tmp_path, target_modules=["q_proj"])
    folder = str(tmp_path / "adapters")
    original = (tmp_path / "adapters" / "adapter_config.json").read_text()
    config, *_ = ours_of(tmp_path)
    other = config.lora.model_copy(update={"alpha": 1.0, "targets": ("query", "up")})
    with pytest.raises(UserError, match=r"(?s)lora\.alpha: 12\.0 in the folder, 1\.0 .*lora\.targets: \('query',\)"):
        peft_folder.check_adapters(folder, other)
    deeper = config.model_copy(update={"model": config.model.model_copy(update={"depth": 3})})
    like = lora.init_adapters(abstract_model(deeper, VOCAB)[1], config.lora, jax.random.key(0))
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.q_proj\.lora_A\.weight is missing"):
        peft_folder.read_adapters(folder, config.lora, like)
    for fields, message in (
        ({"use_dora": True}, "use_dora is True, supported is False"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', supported is True"),
        ({"use_qalora": True}, "use_qalora is True, supported is False"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\], supported is None"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', supported is 'LORA'"),
        ({"r": 0, "rank_pattern": {"q": 4}}, "2 problems"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x', not a number above 0"),
    ):
        changed(tmp_path / "adapters", **fields)
        with pytest.raises(UserError, match=message):
            peft_folder.open_adapters(folder)
        (tmp_path / "adapters" / "adapter_config.json").write_text(original)
    weights = tmp_path / "adapters" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        peft_folder.open_adapters(folder)
    weights.unlink()
    with pytest.raises(UserError, match="adapters are read from safetensors only"):
        peft_folder.open_adapters(folder)
    with pytest.raises(UserError, match="not a folder of PEFT"):
        peft_folder.open_adapters(str(tmp_path / "base"))


def test_a_config_file_may_name_the_folder(tmp_path):
    theirs_of(tmp_path, target_modules=["q_proj"])
    file = tmp_path / "tuned.toml"
    folder = f'[lora]\nfrom_peft = "{tmp_path / "adapters"}"\n'
    file.write_text(folder)
    lora_config = config_from_args(["--config", str(file)], "x", "x").lora
    assert (lora_config.rank, lora_config.alpha, lora_config.targets) == (3, 12.0, ("query",))
    file.write_text(f"{folder}rank = 4\n")
    other = config_from_args(["--config", str(file)], "x", "x").lora
    with pytest.raises(UserError, match=r"lora\.rank: 3 in the folder, 4 in this config"):
        peft_folder.check_adapters(other.from_peft, other)
    with pytest.raises(UserError, match=r"with lora\.rank 0: give rank, alpha and targets of its adapters"):
        Config.load(**{"lora.from_peft": str(tmp_path / "adapters")})
    saved = {"step": 3, "config": {"lora.rank": 3, "lora.from_peft": "moved"}}
    check_compatibility(saved, {"config": {"lora.rank": 3, "lora.from_peft": "", "train.objective": "next-token"}})
