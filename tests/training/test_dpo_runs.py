"""DPO runs: pairs from rows, a reference computed once, preferences that are learned, exact resume, and kills."""

import contextlib
import dataclasses
import gc
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.checks.run import check
from slm_jax.cli import check as check_command
from slm_jax.cli import mfu as mfu_command
from slm_jax.config.schema import Config
from slm_jax.curriculum import benchmarks
from slm_jax.data import pairs as pairs_module
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.load import load_tokenizer
from slm_jax.data.pairs import open_pairs
from slm_jax.data.sources.documents import InvalidRow
from slm_jax.data.sources.rows import ConversationMapper, Row
from slm_jax.huggingface.model_card import CardData, ExportedWeights, write_card
from slm_jax.report.compare import comparison_notes
from slm_jax.report.page import write_report
from slm_jax.report.run_data import read_report_data
from slm_jax.run import frozen
from slm_jax.run.directory import Run
from slm_jax.run.load import load_run
from slm_jax.training import warm_start
from slm_jax.training.dpo.run import set_reference
from slm_jax.training.recorder import StepRecorder
from slm_jax.training.resume import check_compatibility
from slm_jax.training.train import train
from slm_jax.utils.errors import UserError
from tests.helpers import TINY
from tests.processes import command_environment, kill_at
from tests.runs import assert_same_run, read_rows, saved_arrays

SMALL = {**TINY, "model.depth": 1, "model.heads": 2, "train.batch_size": 4, "train.sequence_length": 48}
SMALL |= {"tokenizer.vocab_size": 340, "eval.sample_tokens": 0, "mesh.data": 1, "data.mode": "padded"}
DPO = {"train.objective": "dpo", "train.steps": 24, "train.dpo_beta": 0.5, "optimizer.name": "adamw"}
DPO |= {"lora.rank": 4, "optimizer.weight_decay": 0.0, "eval.every": 12, "checkpoint.every": 6}


def rows_of(count, answers=("yes", "no")):
    """Pairs in the three forms, with the same rule: the first answer is preferred."""
    rows = []
    for i in range(count):
        prompt = f"Is line {i} of {i * 7 % 13} good?"
        good, bad = (f"{answer}, line {i}" for answer in answers)
        user = {"role": "user", "content": prompt}
        if i % 3 == 0:
            row = {
                name: [user, {"role": "assistant", "content": x}] for name, x in (("chosen", good), ("rejected", bad))
            }
        elif i % 3 == 1:
            row = {"prompt": prompt, "chosen": good, "rejected": bad}
        else:
            pair = (("chosen", good), ("rejected", bad))
            row = {"prompt": [user]} | {name: [{"role": "assistant", "content": x}] for name, x in pair}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with pairs, a base model of both answers, and a DPO run with adapters that starts with it."""
    path = tmp_path_factory.mktemp("dpo")
    rows = rows_of(60)
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = [rows[0]["chosen"], rows[0]["rejected"]]
    for row in rows_of(60)[::3]:
        both += [row["chosen"], row["rejected"]]
    (path / "base.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in both))
    train(config_of(path, "base", **{"train.steps": 12}), path / "base")
    real = warm_start.read_merged
    before = live_bytes()

    def read(*args, **options):
        (path / "live").write_text(str(live_bytes() - before))
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "read_merged", read)
        train(tuned(path), path / "dpo")
    return path


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def config_of(path, text, **overrides):
    given = {"data.files": str(path / f"{text}.jsonl"), "data.cache": str(path / "cache")}
    return Config.load(**{**SMALL, **given, **overrides})


def tuned(path, **overrides):
    return config_of(path, "pairs", **{"init.from_run": str(path / "base"), **DPO, **overrides})


class StoppedError(Exception):
    pass


def test_the_preferred_answers_become_more_likely(workspace):
    rows = read_rows(workspace / "dpo")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-3)
    validated = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in validated] == [12, 24]
    last = validated[-1]
    assert last["val_accuracy"] == 1.0
    assert last["val_loss"] < 0.5 < math.log(2)
    assert last["val_margin"] == pytest.approx(last["val_chosen_reward"] - last["val_rejected_reward"])
    assert last["val_bits_per_byte"] > 0
    models = [load_run(str(workspace / name)) for name in ("base", "dpo")]
    template = ChatTemplate.of(models[0].tokenizer)
    shift = []
    for answer in ("yes, line 70", "no, line 70"):
        chat = template.encode([Message("user", "Is line 70 of 9 good?"), Message("assistant", answer)])
        logps = []
        for loaded in models:
            logits = np.asarray(loaded.model(chat.ids[None, :-1])[0], np.float64)
            each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            labels = chat.ids[1:]
            logps.append(each[np.arange(len(labels)), labels][chat.predicted[1:]].sum())
        shift.append(logps[1] - logps[0])
    assert shift[0] > shift[1] + 1


def test_pairs_are_those_of_the_source_with_the_shared_prompt_left_out(workspace):
    run = Run(workspace / "dpo")
    tokenizer = load_tokenizer(str(run.tokenizer))
    config = run.read_config()
    corpus = open_corpus(run.corpus, tokenizer)
    pairs = open_pairs(run.pairs, config, corpus, tokenizer)
    assert pairs.train == corpus.train.num_documents
    assert len(pairs) - pairs.train == corpus.validation.num_documents
    texts = set()
    for pair in range(len(pairs)):
        sides = []
        for side in (0, 1):
            ids, predicted = pairs.sequence(pair, side)
            sides.append(tokenizer.decode([int(i) for i in ids[predicted]]))
        assert sides[0].startswith("yes, line") and sides[1].startswith("no, line")  # noqa: PT018
        assert sides[0][3:] == sides[1][2:]
        texts.add(sides[0])
    assert len(texts) == len(pairs) >= 55
    content = bytearray((run.pairs / "tokens.npy").read_bytes())
    content[-5] ^= 1
    (run.pairs / "tokens.npy").write_bytes(content)
    again = open_pairs(run.pairs, config, corpus, tokenizer)
    assert again.fingerprint == pairs.fingerprint


def test_pairs_of_repeated_documents_and_a_long_source(workspace, tmp_path, monkeypatch, caplog):
    """Each document of a corpus has a pair, however often it is in it, and the source is read no further than that."""
    run = Run(workspace / "dpo")
    tokenizer, config = load_tokenizer(str(run.tokenizer)), run.read_config()
    mapper = ConversationMapper()
    documents = [mapper.to_document(Row(row, "file")) for row in rows_of(3)]
    other = mapper.to_document(Row({**rows_of(2)[1], "rejected": "never"}, "file"))
    digests = [each.digest for each in documents]
    assert other.digest == digests[1]
    splits = {
        name: SimpleNamespace(documents={"digest": np.array(each, np.uint64)})
        for name, each in (("train", [*digests[:2], digests[1]]), ("validation", digests[2:]))
    }

    def source(*_):
        yield from (*documents, other)
        raise AssertionError("it is read on")

    monkeypatch.setattr(pairs_module, "_documents", source)
    corpus = SimpleNamespace(fingerprint="x", **splits)
    pairs = open_pairs(tmp_path / "pairs", config, corpus, tokenizer)
    assert (len(pairs), pairs.train) == (4, 3)
    texts = [tokenizer.decode([int(i) for i in pairs.sequence(pair, 1)[0]]) for pair in range(4)]
    assert [text.count("never") for text in texts] == [0, 0, 1, 0]
    manifest = tmp_path / "pairs" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    assert open_pairs(tmp_path / "pairs", config, corpus, tokenizer).fingerprint == pairs.fingerprint
    assert "its format is 2, not 1" in caplog.text


def test_no_random_weights_are_held_while_those_of_the_source_are_read(workspace):
    _, base = saved_arrays(workspace / "dpo" / "checkpoints" / "base")
    _, trained = saved_arrays(workspace / "dpo" / "checkpoints")
    weights, adapters = (sum(array.nbytes for array in arrays.values()) for arrays in (base, trained))
    assert 0 < int((workspace / "live").read_text()) < adapters + weights / 2


def test_checkpoints_hold_the_adapters_and_the_base_is_the_reference(workspace):
    _, arrays = saved_arrays(workspace / "dpo" / "checkpoints")
    assert all("adapter" in name for name in arrays if "['params']" in name)
    _, base = saved_arrays(workspace / "dpo" / "checkpoints" / "base")
    _, source = saved_arrays(workspace / "base" / "checkpoints")
    assert base
    assert all(np.array_equal(value, source[name]) for name, value in base.items())
    merged = load_run(str(workspace / "dpo")).model.blocks.mlp.up.weight[...]
    up = "['params']['blocks']['mlp']['up']"
    a, b = (arrays[f"{up}['adapter']['{name}']"].astype(np.float64) for name in "ab")
    assert np.allclose(merged, base[f"{up}['weight']"] + 16 / 4 * a @ b, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0])
def test_an_interrupted_run_ends_with_the_same_bits(workspace, tmp_path, monkeypatch, caplog, rank):
    """The base is gone, and one block of the reference is damaged."""
    shutil.copytree(workspace / "base", tmp_path / "source")
    more = {"train.steps": 8, "checkpoint.every": 3, "eval.every": 4, "eval.sample_tokens": 4}
    config = tuned(workspace, **{"init.from_run": str(tmp_path / "source"), "lora.rank": rank, **more})
    train(config, tmp_path / "whole")
    real = StepRecorder.record

    def record(self, step, *args):
        if step == 5:
            raise StoppedError
        return real(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "record", record)
        with pytest.raises(StoppedError):
            train(config, tmp_path / "broken")
    shutil.rmtree(tmp_path / "source")
    block = tmp_path / "broken" / "reference" / "00000.npy"
    before = block.read_bytes()
    block.write_bytes(before[:-3] + b"abc")
    caplog.set_level("WARNING", "slm_jax")
    train(config, tmp_path / "broken")
    assert "00000.npy is damaged (it differs from its checksum): computing it again" in caplog.text
    assert block.read_bytes() == before
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    caplog.clear()
    (tmp_path / "broken" / "reference" / "fingerprint.txt").write_text("another")
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 9})}), tmp_path / "broken")
    assert "of other weights or pairs: computing it again" in caplog.text


def test_the_report_and_the_summary_show_preferences(workspace, capsys):
    from slm_jax.cli.train import print_summary
    from slm_jax.run.trend import Trend
    from slm_jax.training.result import Result

    write_report(workspace / "dpo")
    page = (workspace / "dpo" / "report.html").read_text()
    assert "margin" in page.lower()
    rows = read_rows(workspace / "dpo")
    print_summary(Run(workspace / "dpo"), Result(workspace / "dpo", 24, rows[-1], trend=Trend.from_rows(rows)), 1.0)
    assert "100.0% of preferences" in capsys.readouterr().out


def test_scores_are_named_by_the_objective(workspace):
    """No loss of pairs is shown as one of tokens, and no accuracy of preferences as one of next tokens."""
    row = [row for row in read_rows(workspace / "dpo") if "val_loss" in row][-1]
    run = Run(workspace / "dpo")
    benchmark = benchmarks.measure(run)
    assert benchmark.loss == pytest.approx(math.log(row["val_perplexity"]))
    assert math.isnan(benchmark.accuracy)
    assert math.isnan(benchmark.train_loss)
    assert "nan" not in benchmarks.table([dataclasses.asdict(benchmark)])
    weights = ExportedWeights(24, 1, "Qwen3ForCausalLM", 340)
    card = write_card(CardData("x", "", run.read_config(), weights, [row], [], [], ""))
    assert f"step 24: pairs whose chosen response is preferred 100.0%, loss per pair {row['val_loss']:.4f}" in card
    assert "preferences (DPO), beta 0.5" in card
    assert "next-token" not in card
    _, path = write_report(run.path)
    page = path.read_text()
    assert "of held-out pairs" in page
    assert f"{row['val_loss']:.4f} per pair" in page
    assert "% of pairs" in page
    data = [read_report_data(workspace / name) for name in ("base", "dpo")]
    assert any(
        "train.objective (next-token: base; dpo: dpo)" in note for note in comparison_notes(data, ["base", "dpo"])
    )


def test_the_mfu_of_a_step_of_pairs_is_not_measured(workspace):
    with pytest.raises(UserError, match=r"train\.objective dpo: slm_jax\.mfu measures next-token steps"):
        mfu_command.main(["--run", str(workspace / "dpo"), "--lora.rank", "0"])


def test_a_missing_base_deletes_no_reference(workspace, tmp_path):
    run = Run(tmp_path / "run")
    shutil.copytree(workspace / "dpo", run.path)
    shutil.rmtree(run.checkpoints / "base")
    with pytest.raises(UserError, match=r"frozen weights in .* cannot be used.*\(it is missing\)"):
        set_reference(None, run.read_config(), run, 340, None)
    assert min(path.name for path in run.reference.iterdir()) == "00000.crc32"


def test_a_checkpoint_of_a_version_without_dpo_is_not_continued_with_it():
    saved = {"step": 3, "config": {"train.batch_size": 4}}
    current = {"config": {"train.batch_size": 4, "train.objective": "dpo", "lora.rank": 0}}
    with pytest.raises(UserError, match=r"train\.objective is 'next-token' saved, 'dpo' current"):
        check_compatibility(saved, current)
    check_compatibility(saved, {"config": {**current["config"], "train.objective": "next-token"}})


def test_other_rejected_responses_are_not_continued_with(workspace, tmp_path):
    """The corpus of the run, which holds the chosen conversations, is still the same."""
    run = Run(tmp_path / "run")
    shutil.copytree(workspace / "dpo", run.path)
    shutil.rmtree(run.pairs)
    changed = (workspace / "pairs.jsonl").read_text().replace("no, line 1", "no, not line 1")
    source = tmp_path / "pairs.jsonl"
    source.write_text(changed)
    run.save_config(tuned(workspace, **{"data.files": str(source)}))
    with pytest.raises(UserError, match=r"saved with other preference pairs \(.*, now .*\): restore what"):
        train(tuned(workspace, **{"data.files": str(source), "train.steps": 25}), run.path)
    saved = {"step": 3, "corpus": "a", "config": {}}  # of an earlier version
    check_compatibility(saved, {"corpus": "a", "pairs": "b", "config": {}})


def test_adapters_that_bfloat16_would_round_away_are_reported(workspace, tmp_path, caplog, monkeypatch):
    load_run(str(workspace / "dpo"))
    assert "small next to the weights" not in caplog.text  # it computes in float32
    shutil.copytree(workspace / "dpo", tmp_path / "run")
    run = Run(tmp_path / "run")
    config = run.read_config()
    run.save_config(config.model_copy(update={"train": config.train.model_copy(update={"dtype": "bfloat16"})}))
    monkeypatch.setattr(frozen, "_LARGE_ERROR", 0.0)
    load_run(str(run.path))
    assert "computing in bfloat16 rounds them by" in caplog.text


def test_what_has_no_pairs_or_no_weights_is_refused(workspace, tmp_path):
    with pytest.raises(UserError, match=r"train\.objective dpo compares with the model that training starts from"):
        train(tuned(workspace, **{"init.from_run": "", "lora.rank": 0}), tmp_path / "none")
    with pytest.raises(UserError, match=r"base\.jsonl has no preference pairs to train on"):
        train(tuned(workspace, **{"data.files": str(workspace / "base.jsonl")}), tmp_path / "text")
    with pytest.raises(UserError, match="every prompt fills a row of 8 tokens"):
        train(tuned(workspace, **{"train.sequence_length": 8}), tmp_path / "short")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "column chosen is text, and column prompt is empty (null), not text"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "the columns chosen and rejected are equal"),
        ({"prompt": "p", "chosen": "a"}, "column rejected is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "column rejected is of type int, not a list of messages"),
        ({"prompt": "p", "chosen": "a", "rejected": [["user", "x"]]}, "a message is a list"),
    ],
)
def test_a_malformed_pair_is_an_invalid_row(row, reason):
    found = ConversationMapper(None if "rejected" in row else _preferences()).to_document(Row(row, "file line 1"))
    assert isinstance(found, InvalidRow)
    assert found.reason.startswith(reason)


def _preferences():
    from slm_jax.chat.formats import PREFERENCES

    return PREFERENCES


def test_only_what_follows_the_shared_prompt_is_the_response():
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2")]
    shared = [{"role": role, "content": text} for role, text in turns]
    row = {name: [*shared, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    document = ConversationMapper().to_document(Row(row, "file line 1"))
    assert document.messages[:3] == document.rejected[:3]
    assert (document.messages[3].content, document.rejected[3].content) == ("chosen", "rejected")
    assert document.group == "q1\na1\nq2"
    other = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "x"}]
    mixed = ConversationMapper().to_document(Row({"chosen": row["chosen"], "rejected": other}, "file line 2"))
    assert "do not begin with the same prompt" in mixed.reason


@pytest.mark.slow
def test_checks_treat_the_model_as_one_of_its_chosen_conversations(workspace, capsys):
    with contextlib.suppress(SystemExit):
        check_command.main(["--run", str(workspace / "dpo")])
    shown = capsys.readouterr().out
    assert "the validations of this run are of preference pairs" in shown
    failed = [line for line in shown.splitlines() if "FAIL" in line]
    assert all("below token frequencies" in line for line in failed), failed  # a few steps teach it little


@pytest.mark.slow
@pytest.mark.parametrize("text", ["pairs", "base"])
def test_checks_before_training_look_for_pairs_and_compile_their_step(workspace, text):
    found = {
        each.name: each for each in check(config=tuned(workspace, **{"data.files": str(workspace / f"{text}.jsonl")}))
    }
    assert found["preference pairs"].verdict == ("ok" if text == "pairs" else "FAIL")
    assert found["memory"].verdict == "ok"
    assert found["one step"].verdict == "skipped"


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical(workspace, tmp_path):
    """SIGKILL while the reference is computed, and after a checkpoint."""
    more = {"train.steps": 60, "eval.every": 20, "checkpoint.every": 5, "eval.sample_tokens": 4}
    config = tuned(workspace, **more)
    train(config, tmp_path / "whole")
    given = {**SMALL, **DPO, **more, "init.from_run": workspace / "base", "data.files": workspace / "pairs.jsonl"}
    args = [f"--{name}={value}" for name, value in given.items()]
    args += [f"--data.cache={workspace / 'cache'}", f"--config={workspace / 'dpo' / 'config.toml'}"]
    command = [sys.executable, "-m", "slm_jax.train", *args, "--run", str(tmp_path / "killed")]
    environment = command_environment(tmp_path / "cache")
    run = Run(tmp_path / "killed")
    instants = (lambda: run.reference.is_dir(), lambda: run.exists() and (run.newest_step() or 0) >= 15)
    kill_at(command, instants, environment)
    assert (run.newest_step() or 0) < 60
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert (Path(tmp_path / "killed" / "reference" / "00000.npy")).read_bytes() == (
        tmp_path / "whole" / "reference" / "00000.npy"
    ).read_bytes()
