"""The names that `slm_jax` exports: plain, typed, picklable functions and classes, listed by `help`."""

import inspect
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import slm_jax
from slm_jax.config.conversion import loaded
from slm_jax.utils.errors import UserError

CONSUMER = """
from pathlib import Path

from slm_jax import Config, Curriculum, Transformer, generate, load_run, orchestrate, train
from tokenizer import HybridTokenizer

config: Config = Config.load("quickstart", **{"train.steps": 3})
result = train(config, run=Path("runs/typed"))
step: int = result.step
run = load_run(str(result.run))
model: Transformer = run.model
ids: list[int] = run.tokenizer.encode("Once")
assert isinstance(run.tokenizer, HybridTokenizer)  # the runs of published models have tokenizers of another kind
tokenizer: HybridTokenizer = run.tokenizer
texts: list[str] = generate(model, tokenizer, ["Once upon a time"], max_tokens=8, context=run.context)
outcome = orchestrate(Curriculum.load("curriculum-offline"))
"""


@pytest.mark.parametrize("name", ["generate", "load_run", "orchestrate", "train"])
def test_functions_are_plain_functions(name):
    function = getattr(slm_jax, name)
    assert inspect.isfunction(function)
    assert function.__name__ == name
    signature = inspect.signature(function)
    assert signature.parameters
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert signature.return_annotation is not inspect.Signature.empty
    assert inspect.getdoc(function)


@pytest.mark.parametrize("name", slm_jax.__all__)
def test_names_are_picklable(name):
    value = getattr(slm_jax, name)
    assert pickle.loads(pickle.dumps(value)) is value
    assert name in dir(slm_jax)


def test_options_may_be_named():
    """By every public function alike: the options themselves, a preset, a TOML file, nested dicts."""
    with pytest.raises(UserError, match="no preset named quikstart, perhaps you meant quickstart"):
        slm_jax.train("quikstart")
    with pytest.raises(UserError, match="no preset named curriculum-ofline, perhaps you meant curriculum-offline"):
        slm_jax.orchestrate("curriculum-ofline")
    with pytest.raises(UserError, match=r"train\.steps = 0"):
        slm_jax.train({"train": {"steps": 0}})
    with pytest.raises(UserError, match=r"cannot read no\.toml"):
        slm_jax.train(Path("no.toml"))
    config = slm_jax.Config.load()
    assert loaded("quickstart", slm_jax.Config) == config
    assert loaded(config, slm_jax.Config) is config


def test_other_options_are_refused():
    config = slm_jax.Config.load()
    with pytest.raises(TypeError, match=r"expected a Config, .* not ModelConfig: such as Config\.load"):
        slm_jax.train(config.model)
    with pytest.raises(TypeError, match=r"expected a Curriculum, .* not Config: such as Curriculum\.load"):
        slm_jax.orchestrate(config)
    with pytest.raises(TypeError, match=r"expected a ModelConfig, not Config: such as Config\.load"):
        slm_jax.Transformer(config, 300, rngs=None)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        _ = slm_jax.trane


def test_help_reads_like_a_table_of_contents():
    text = pydoc.plain(pydoc.render_doc(slm_jax))
    for name in slm_jax.__all__:
        assert name in text.partition("PACKAGE CONTENTS")[0], f"{name} is missing from the introduction"
    assert "train(config" in text
    assert "ModuleType" not in text


@pytest.mark.slow  # mypy reads everything; tests/test_tokenizer/test_typing.py is its quick sibling
def test_a_typed_program_can_use_it(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "consumer.py"
    script.write_text(CONSUMER)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from slm_jax import train\ntrain(3)\nresult: str = train\n")
    root = Path(slm_jax.__file__).parents[1]

    def check(path):
        options = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
        command = [sys.executable, "-m", "mypy", *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)

    done = check(script)
    assert done.returncode == 0, done.stdout
    refused = check(wrong)
    assert 'wrong.py:2: error: Argument 1 to "train"' in refused.stdout
    assert "wrong.py:3: error: Incompatible types in assignment" in refused.stdout
