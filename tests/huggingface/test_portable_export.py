"""The export of a portable run: stock files, verified when they are written, and equal in transformers."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")

from slm_jax.generation.decode import encode_prompt, generate
from slm_jax.generation.sampling import Sampling
from slm_jax.huggingface import import_folder, portable_tokenizer
from slm_jax.huggingface.export import export
from slm_jax.utils.errors import UserError
from tests.huggingface.test_export import imported, loaded_run, params_of
from tests.test_tokenizer.conftest import make
from tests.test_tokenizer.samples import EDGE_CASES, LANGUAGES, corpus
from tokenizer import HybridTokenizer

STOCK = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return loaded_run(tmp_path_factory.mktemp("portable"), make(portable=True, vocab_size=500))


@pytest.fixture(scope="module")
def folder(run):
    return export(run, run.run.path.parent / "out")


def test_files(run, folder, caplog):
    names = {path.name for path in folder.iterdir()}
    assert names >= STOCK
    assert not [name for name in names if name.endswith(".py")]
    assert HybridTokenizer.load(folder / "tokenizer.hybtok").fingerprint == run.tokenizer.fingerprint
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    card = (folder / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained(folder)\n" in card
    assert "trust_remote_code" not in card
    assert "== s` for every string without lone surrogates." in card
    with caplog.at_level(logging.INFO):
        export(run, folder, overwrite=True)
    assert "tokenizer.json: ids and decoded texts equal those of the run's tokenizer on" in caplog.text


def test_the_folder_is_imported_again(run, folder):
    opened = import_folder.open_folder(str(folder))
    assert import_folder.find_tokenizer(opened, "") == str(folder / "tokenizer.hybtok")
    params = imported(folder, run.model)
    assert np.array_equal(params["embedding"], params_of(run.model)["embedding"])


def test_a_difference_stops_the_export(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.portable.tokenizer_json.PATTERN", r"\s+|\S+")
    with pytest.raises(UserError, match=r"tokenizer\.json does not match"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_without_the_comparison_says_so(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(portable_tokenizer.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        export(run, tmp_path / "out")
    assert "were not compared" in caplog.text
    assert "equal those" not in caplog.text


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install -e '.[bench]'")
    return transformers.AutoTokenizer.from_pretrained(folder)  # without trust_remote_code


@pytest.mark.parametrize("text", [*LANGUAGES.values(), *EDGE_CASES, corpus()[:5000]])
def test_ids_and_texts_in_transformers(run, theirs, text):
    text = text.encode("utf-8", "replace").decode()
    ids = run.tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs(text).input_ids == encode_prompt(run.tokenizer, text)
    assert theirs.decode(ids) == text
    assert theirs.decode([5, *ids, 0], skip_special_tokens=True) == text


def test_special_tokens_in_transformers(run, theirs):
    assert len(theirs) == theirs.vocab_size == run.tokenizer.vocab_size
    assert sorted(theirs.all_special_ids) == [*range(9), *run.tokenizer.turn_ids]
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 5, 5)
    batch = theirs(["a longer text than the other", "short"], padding=True)
    assert batch.input_ids[1][0] == 0  # padded on the left


def test_logits_and_greedy_text_in_transformers(run, folder, theirs):
    torch = pytest.importorskip("torch", reason="pip install -e '.[bench]'")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts = ["The cat", LANGUAGES["hebrew"][:9]]
    ids = encode_prompt(run.tokenizer, prompts[0])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits.numpy()
        out = model.generate(**theirs(prompts, padding=True, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    assert np.abs(logits - np.asarray(run.model(jnp.array([ids])))).max() < 1e-4
    texts = generate(run.model, run.tokenizer, prompts, 12, Sampling(temperature=0), 64)
    assert theirs.batch_decode(out, skip_special_tokens=True) == [a + b for a, b in zip(prompts, texts, strict=True)]
