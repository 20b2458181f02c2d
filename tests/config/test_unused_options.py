"""Options without effect: each combination is refused with one line, or logged."""

import logging

import pytest

from slm_jax.config.presets import preset_names
from slm_jax.config.schema import Config
from slm_jax.config.unused_options import unused_options
from slm_jax.data.sources.unused_options import log_unused_options, unused_source_options
from slm_jax.utils.errors import UserError

LORA = {"lora.rank": 4}
LLAMA3 = {"model.rope_scaling": "llama3", "model.rope_original_length": 64}
YARN = {"model.rope_scaling": "yarn", "model.rope_original_length": 64}
DPO = {"train.objective": "dpo", "data.mode": "padded", "data.source": "hf:a/b"}
CHAT = {"data.source": "python-chat"}

# Every option of four sections that depends on another one: the other options, and a value without effect.
REFUSED = [
    ("model.full_layers", (0,), {}),
    ("model.window_pattern", "SL", {}),
    ("model.rope_factor", 2.0, {}),
    ("model.rope_original_length", 64, {}),
    ("model.rope_low_turns", 2.0, {}),
    ("model.rope_high_turns", 9.0, {}),
    ("model.rope_attention_factor", 1.5, LLAMA3),
    ("optimizer.orthogonalization", "polar-express", {"optimizer.name": "adamw"}),
    ("optimizer.momentum", 0.9, {"optimizer.name": "adamw"}),
    ("optimizer.momentum_warmup_steps", 9, {"optimizer.name": "adamw"}),
    ("optimizer.momentum_cooldown_steps", 9, {"optimizer.momentum": 0.85}),
    ("optimizer.cautious_decay", True, {"optimizer.weight_decay": 0.0}),
    ("optimizer.head_lr_scale", 2.0, {}),
    ("optimizer.embedding_lr_scale", 2.0, LORA),
    ("optimizer.vector_lr_scale", 2.0, LORA),
    ("train.accumulation", 4, {"train.microbatch": 2, "train.batch_size": 4}),
    ("train.dpo_beta", 0.2, {}),
    ("train.z_loss", 0.1, DPO),
    ("train.ul_alpha", 0.1, DPO),
    ("data.loss_on", "all", DPO),
    ("data.files", ("a.txt",), {"data.source": "python-docs"}),
    ("data.template", "alpaca", CHAT),
    ("data.text_field", "a", CHAT),
    ("data.response_field", "a", CHAT),
    ("data.format", "alpaca", CHAT),
]
LOGGED = [
    ("model.window", 8, {"model.window_pattern": "L"}),
    ("model.window_pattern", "S", {"model.window": 8, "model.depth": 1}),
    ("model.full_layers", (0, 1), {"model.window": 8, "model.depth": 2}),
    ("model.window", 256, {"train.sequence_length": 256}),
    ("model.mlp_multiple", 32, {"model.mlp": "relu2"}),
    ("model.rope_base", 500.0, {"model.depth": 2, "model.nope_layers": (0, 1)}),
    ("model.rope_scaling", "linear", {}),
    ("model.rope_scaling", "llama3", {"model.rope_original_length": 64}),
    ("model.rope_high_turns", 9.0, YARN),
    ("model.max_positions", 256, {"train.sequence_length": 256}),
    ("model.init_std", 0.01, {"init.from_run": "runs/x"}),
    ("model.output_init", "zero", {"init.from_hf": "folder"}),
    ("optimizer.decay_fraction", 0.1, {"optimizer.schedule": "cosine"}),
    ("optimizer.final_lr_fraction", 0.1, {"optimizer.schedule": "constant"}),
    ("optimizer.beta1", 0.8, LORA),
    ("optimizer.beta2", 0.8, LORA),
    ("train.stop_early", 2, {"train.steps": 300, "eval.every": 100}),
    ("train.residual_dtype", "compute", {"train.dtype": "float32"}),
    ("data.separator", "###", {"data.source": "tinystories"}),
    ("data.separator", "###", {"data.files": ("text.txt",), "data.document": "line"}),
    ("data.document", "line", {"data.files": ("rows.jsonl",)}),
    ("data.encoding_errors", "replace", {}),
    ("data.format", "text", {}),
    ("data.text_field", "a", {"data.files": ("text.txt",)}),
    ("data.template", "alpaca", {"data.files": ("text.txt",)}),
    ("data.template", "alpaca", {"data.files": ("rows.jsonl",), "data.text_field": "a"}),
    ("data.response_field", "a", {"data.files": ("rows.jsonl",)}),
    ("data.loss_on", "all", {"data.mix": ("python-docs=1", "text.txt=2")}),
    ("data.revision", "abc", {"data.files": ("text.txt", "rows.jsonl")}),
]
# The same with effect.
USED = [
    {"model.window": 8, "model.window_pattern": "S", "model.depth": 2},
    {"model.mlp_multiple": 32},
    {"model.nope_layers": (0,), "model.rope_base": 500.0, **YARN, "model.rope_factor": 2.0},
    {"model.max_positions": 257, "train.sequence_length": 256},
    {"init.from_run": "runs/x", "model.recipe": "speedrun"},  # the recipe has output_init zero
    {"optimizer.decay_fraction": 0.1, "optimizer.final_lr_fraction": 0.1},
    {**LORA, "optimizer.name": "adamw", "optimizer.beta1": 0.8, "optimizer.beta2": 0.8},
    {**LORA, "optimizer.name": "normuon", "optimizer.beta2": 0.8},
    {"train.stop_early": 2, "train.steps": 301, "eval.every": 100},
    {"train.stop_early": 2, "train.steps": 3, "train.minutes": 9.0},
    {
        "data.files": ("text.txt", "rows.jsonl"),
        "data.template": "{a}",
        "data.response_field": "b",
        "data.loss_on": "all",
    },
    {"data.mix": ("python-docs", "tinystories"), "data.revision": "abc"},
    {**CHAT, "data.loss_on": "all"},
]
# Options whose value always has an effect, but for those that say how a step is computed (the trait `execution`).
INDEPENDENT = """
    model.recipe model.dim model.depth model.heads model.kv_heads model.head_dim model.mlp_dim model.mlp model.dropout
    model.tie_weights model.qk_norm model.qkv_bias model.attention_gate model.value_embeddings model.residual_scales
    model.logit_softcap model.norm_eps model.nope_layers model.vocab_multiple
    optimizer.name optimizer.lr optimizer.warmup_steps optimizer.schedule optimizer.weight_decay optimizer.clip
    optimizer.average_decay
    train.steps train.minutes train.batch_size train.sequence_length train.seed train.objective train.dtype train.debug
    train.deterministic
    data.source data.mix data.max_documents data.max_tokens data.deduplicate data.validation_fraction
    data.max_validation_characters data.mode data.cache data.workers
""".split()


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')


def notes(overrides):
    config = Config.load("minute", **overrides)
    return [*unused_options(config), *unused_source_options(config)]


def test_every_option_is_classified():
    names = [name for name in Config.fields() if name.split(".")[0] in ("model", "optimizer", "train", "data")]
    execution = Config.fields_with("execution")
    dependent = {name for name, _, _ in (*REFUSED, *LOGGED)}
    assert set(names) - execution == (dependent | set(INDEPENDENT)) - execution
    assert not dependent & set(INDEPENDENT)


@pytest.mark.parametrize(("name", "value", "others"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_refused(name, value, others):
    Config.load("minute", **others)
    with pytest.raises(UserError) as caught:
        Config.load("minute", **{**others, name: value})
    assert "\n" not in str(caught.value)
    assert name.partition(".")[2] in str(caught.value)


@pytest.mark.parametrize(("name", "value", "others"), LOGGED, ids=[name for name, _, _ in LOGGED])
def test_logged(files, caplog, name, value, others):
    overrides = {**others, name: value}
    assert name in [option.name for option in notes(overrides)]
    with caplog.at_level(logging.INFO):
        log_unused_options(Config.load("minute", **overrides))
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"note: {name} ") and "has no effect" in line for line in lines), lines


@pytest.mark.parametrize("overrides", USED)
def test_options_with_effect_are_not_logged(files, overrides):
    assert notes(overrides) == []


@pytest.mark.parametrize("preset", preset_names())
def test_presets_have_no_option_without_effect(preset):
    config = Config.load(preset)
    assert [*unused_options(config), *unused_source_options(config)] == []


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"eval.tasks_every": 9}, "eval.tasks_every 9 has no effect without eval.tasks"),
        ({"eval.prompts": ("A", "B"), "eval.sample_tokens": 0}, "eval.prompts A B has no effect with eval.sample_t"),
        ({"health.deviations": 3.0}, "health.deviations 3 has no effect with health.on_spike ignore"),
        ({"health.max_skips": 3}, "health.max_skips 3 has no effect with health.on_spike ignore and health.on_nan"),
        ({"tokenizer.portable": True, "tokenizer.byte_limit": 2}, "byte_limit 2 has no effect with tokenizer.portable"),
        (
            {"tokenizer.path": "english-8k", "tokenizer.vocab_size": 999},
            "vocab_size 999 has no effect with tokenizer.p",
        ),
    ],
)
def test_other_sections(overrides, text):
    (option,) = unused_options(Config.load("gpu_30m", **{"tokenizer.path": "", **overrides}))
    assert text in option.text
