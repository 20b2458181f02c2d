"""Runs that start with a published model and its own tokenizer, up to an export that transformers loads."""

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.9", reason="pip install -e '.[bench]'")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install -e '.[bench]'")
pytest.importorskip("tokenizers")

import jax.numpy as jnp  # noqa: E402  # after the check for torch

from slm_jax.cli.train import parse_args  # noqa: E402
from slm_jax.data.corpus.corpus import open_corpus  # noqa: E402
from slm_jax.evaluation.heldout import documents_of_files, documents_of_run  # noqa: E402
from slm_jax.generation.decode import encode_prompt, generate  # noqa: E402
from slm_jax.generation.sampling import Sampling  # noqa: E402
from slm_jax.huggingface.export import export  # noqa: E402
from slm_jax.run.directory import Run  # noqa: E402
from slm_jax.run.load import load_run  # noqa: E402
from slm_jax.training.train import train  # noqa: E402
from slm_jax.utils.errors import UserError  # noqa: E402
from slm_jax.utils.text_tokenizer import document_prefix  # noqa: E402
from tests.helpers import logits_of  # noqa: E402
from tests.processes import Process  # noqa: E402
from tests.runs import assert_same_run  # noqa: E402
from tests.utils import foreign  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
ROWS = 448  # of the embedding; the tokenizers have fewer ids


def write_model(folder, kind, bos=False):
    """Write a random model with its tokenizer."""
    foreign.byte_level(folder, bos=bos)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=ROWS, **SIZES)
    generation = (folder / "generation_config.json").read_text()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(generation)
    return folder


def arguments(workspace, folder, *more):
    given = {
        "init.from_hf": folder,
        "data.files": workspace / "a.txt",
        "data.document": "line",
        "data.mode": "padded",
        "data.cache": workspace / "cache",
        "train.sequence_length": 32,
        "train.batch_size": 4,
        "train.steps": 4,
        "train.dtype": "float32",
        "checkpoint.every": 2,
        "eval.every": 4,
        "eval.sample_tokens": 0,
        "mesh.data": 1,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    torch.set_num_threads(1)  # small matrices: threads would only add overhead
    path = tmp_path_factory.mktemp("foreign_run")
    (path / "a.txt").write_text(foreign.TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["Qwen2", pytest.param("Llama", marks=pytest.mark.slow)])
def trained(request, workspace):
    """A short run from a folder, and the folder."""
    folder = write_model(workspace / request.param, request.param, bos=request.param == "Llama")
    config, _ = parse_args(arguments(workspace, folder))
    result = train(config, workspace / f"run {request.param}")
    assert result.step == 4
    return folder, load_run(str(result.run))


def test_the_run_keeps_the_tokenizer(trained):
    folder, loaded = trained
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded.run.tokenizer.name == "tokenizer.foreign.zip"
    assert not (loaded.run.path / "tokenizer.hybtok").exists()
    assert "of the initial weights" in loaded.run.report.read_text(encoding="utf-8")
    assert loaded.tokenizer.files["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    for text in ("Line 3: the quick", "שלום 🙂", f"a{foreign.TURN}b"):
        assert loaded.tokenizer.encode(text) == auto.encode(text, add_special_tokens=False)
        assert encode_prompt(loaded.tokenizer, text)[1:] == loaded.tokenizer.encode(text)
    first = auto.bos_token_id if auto.bos_token_id is not None else auto.eos_token_id
    assert encode_prompt(loaded.tokenizer, "") == [first]
    corpus = open_corpus(loaded.run.corpus, loaded.tokenizer)
    stream = corpus.train
    ids = stream[0 : int(stream.ends[0])].tolist()
    assert ids[-1] == auto.eos_token_id
    assert (ids[0] == auto.bos_token_id) == (auto.bos_token_id is not None)
    text = auto.decode(ids, skip_special_tokens=True)
    assert text in foreign.TEXT
    assert stream.documents["bytes"][0] == len(text.encode())
    assert stream.num_bytes_between(0, len(ids)) == len(text.encode())


def test_bits_per_byte_are_those_of_transformers(trained, workspace, tmp_path):
    """Bits per byte of the validation of training, in which each document is a row, and of the evaluation of a file."""
    _, loaded = trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export(loaded, tmp_path / "out")).eval()
    documents = documents_of_run(loaded.run, loaded.tokenizer)
    nll = 0.0
    for item in documents.items:
        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = theirs(ids).logits[0, :-1].double()
        nll -= torch.log_softmax(logits, -1)[torch.arange(len(item.ids) - 1), ids[0, 1:]].sum().item()
    row = json.loads(loaded.run.metrics.read_text().splitlines()[-1])
    bits = nll / math.log(2) / documents.bytes_D.sum()
    assert row["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    of_file = documents_of_files(str(workspace / "a.txt"), loaded.tokenizer)
    assert of_file.bytes_D.sum() == (workspace / "a.txt").stat().st_size
    prefix = [loaded.tokenizer.eos_id, *document_prefix(loaded.tokenizer)]
    for first in (documents.items[0].ids, of_file.items[0].ids):
        assert first[: len(prefix)].tolist() == prefix
        assert first[-1] == loaded.tokenizer.eos_id


def test_the_export_has_the_original_tokenizer_and_equal_logits(trained, tmp_path):
    folder, loaded = trained
    out = export(loaded, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not (out / "tokenization_slm_jax.py").exists()
    assert "trust_remote_code" not in (out / "README.md").read_text()
    auto = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    original = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hello"}]
    assert auto.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)
    stops = [auto.eos_token_id, auto.convert_tokens_to_ids(foreign.TURN)]
    assert theirs.generation_config.eos_token_id == stops
    ids = np.array([encode_prompt(loaded.tokenizer, "Line 7: the quick fox sees 10 dogs")])
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(np.asarray(logits_of(loaded.model, jnp.asarray(ids))) - logits).max() <= 1e-4
    prompts = ["Line 7: the", "שלום"]
    ours = generate(loaded.model, loaded.tokenizer, prompts, 10, Sampling(temperature=0), 64)
    for prompt, text in zip(prompts, ours, strict=True):
        ids = torch.tensor([encode_prompt(loaded.tokenizer, prompt)])
        with torch.no_grad():
            drawn = theirs.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        assert text == auto.decode(drawn, skip_special_tokens=True)


def test_unlikelihood_needs_segments_with_a_foreign_tokenizer(trained, workspace, tmp_path):
    folder, _ = trained
    config, _ = parse_args(arguments(workspace, folder, "--train.ul_alpha", "0.1", "--data.mode", "packed"))
    with pytest.raises(UserError, match=r"use --data\.mode segmented"):
        train(config, tmp_path / "ul")


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_bits(workspace, tmp_path):
    """SIGKILL after a checkpoint; the same command again ends with the bits of an uninterrupted run."""
    folder = write_model(tmp_path / "model", "Qwen2")
    more = {"train.steps": 40, "checkpoint.every": 5, "eval.every": 40, "eval.sample_tokens": 6}
    given = arguments(workspace, folder, *(f"--{name}={value}" for name, value in more.items()))
    command = [sys.executable, "-m", "slm_jax.train", *given, "--run"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    process = Process([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (Run(killed).newest_step() or 0) < 10 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 10 <= Run(killed).newest_step() < 40
    for path in folder.iterdir():  # the run does not need the folder any more
        path.unlink()
    folder.rmdir()
    subprocess.run([sys.executable, "-m", "slm_jax.train", "--run", str(killed)], check=True, capture_output=True)
    assert_same_run(whole, killed)
    out = export(load_run(str(killed)), tmp_path / "out")
    loaded = load_run(str(whole))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = np.array([transformers.AutoTokenizer.from_pretrained(out).encode("Line 7: the quick fox")])
    with torch.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(np.asarray(logits_of(loaded.model, jnp.asarray(ids))) - logits).max() <= 1e-4
