"""Comparison of several runs: order, notes about comparability, and the options that differ."""

import json
import shutil

import numpy as np
import pytest

from slm_jax.cli.report import main
from slm_jax.report.compare import run_names
from slm_jax.report.run_data import read_report_data
from slm_jax.utils.errors import UserError
from tests.report.conftest import cut_held_out, rows_of, with_option, write_rows
from tests.report.pages import read_page


def with_score(run, bits):
    """Change the last bits per byte of a run."""
    rows = rows_of(run)
    rows[-1] |= {"val_bits_per_byte": bits}
    write_rows(run, rows)
    return run


def test_runs_are_sorted_by_bits_per_byte(copy, capsys):
    runs = [with_score(copy(name), bits) for name, bits in (("a", 2.5), ("b", 1.25), ("c", 3.75))]
    with_option(runs[2], "train", seed=7)
    started = copy("d")
    started.metrics.unlink()
    main([str(run.path) for run in (*runs, started)])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:5]] == ["b", "a", "c", "d"]
    assert out[1].split()[1] == "1.2500"
    assert out[-1] == str(runs[0].path.parent / "comparison.html")

    page = read_page(runs[0].path.parent / "comparison.html")
    rows = page.by_id("runs").rows()
    assert [row[0] for row in rows[1:]] == ["b", "a", "c", "d"]
    assert page.by_id("config").rows() == [["option", "b", "a", "c", "d"], ["train.seed", "0", "0", "7", "0"]]
    assert not list(page.all("div", "note")), "the text and the tokenizer are the same"
    validation = next(page.all("figure", "chart"))
    lines = json.loads(validation.one("script", "lines").text)
    assert [line["name"] for line in lines] == ["b", "a", "c"]
    assert [line["y"][-1] for line in lines] == [1.25, 2.5, 3.75]
    x_values = json.loads(page.by_id("x-values").text)
    data = read_report_data(runs[0].path)
    for axis, end in (*data.columns.end.items(), ("flops", data.flops)):
        assert x_values[lines[1]["x"]][axis][-1] == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("data", {"mode": "segmented"}),
        ("train", {"sequence_length": 8}),
        ("data", {"loss_on": "all"}),
        ("eval", {"max_tokens": 10**9}),
    ],
    ids=str,
)
def test_different_ways_of_validating_are_noted(copy, capsys, section, options):
    """Their scores differ by more than models do: the length of the windows alone moves the quickstart by 2 %."""
    first, second = copy("a"), copy("b")
    main([str(first.path), str(second.path)])
    assert "Validated in different ways" not in capsys.readouterr().out
    with_option(second, section, **options)
    main([str(first.path), str(second.path)])
    ((name, value),) = options.items()
    out = capsys.readouterr().out
    assert "Validated in different ways, so the scores and their order are not comparable" in out
    assert f"{section}.{name} (" in out
    assert f"{value}: b" in out


def test_different_held_out_text_is_noted(copy, capsys):
    first, second = copy("a"), copy("b")
    path = second.corpus / "validation-00000.documents.npy"
    documents = np.load(path)
    documents["digest"] += 1
    path.unlink()  # it may be a hard link
    np.save(path, documents)
    main([str(first.path), str(second.path)])
    assert "Validated on different text" in capsys.readouterr().out
    assert "Validated on different text" in read_page(first.path.parent / "comparison.html").one("div", "note").text


@pytest.mark.parametrize(("max_tokens", "same"), [((300, 399), True), ((300, 400), False), ((0, 510), True)])
def test_the_text_is_identified_by_the_documents_used_for_validation(copy, max_tokens, same):
    runs = [copy("a"), copy("b")]
    for run, tokens in zip(runs, max_tokens, strict=True):
        cut_held_out(run, 200, 400, 510)
        with_option(run, "eval", max_tokens=tokens)
    first, second = (read_report_data(run.path).held_out_digest for run in runs)
    assert (first == second) == same


def test_a_different_tokenizer_is_noted_and_the_text_is_the_same(copy, capsys):
    from tokenizer import HybridTokenizer

    first, second = copy("a"), copy("b")
    other = HybridTokenizer()
    other.add_text("the quick brown fox " * 20)
    other.freeze_vocab(vocab_size=300)
    other.save(second.tokenizer)
    main([str(first.path), str(second.path)])
    out = capsys.readouterr().out
    assert "compare bits per byte" in out
    assert "different text" not in out


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({}, ""),
        ({"data": "a/b at 0123 (kept in /cache)"}, ""),
        (
            {"data": "other.jsonl"},
            "a: a/b at 0123, 9 items, context 32, stride 16; b: other.jsonl, 9 items, context 32",
        ),
        ({"count": 5}, "b: a/b at 0123, 5 items"),
        ({"context": 8}, "b: a/b at 0123, 9 items, context 8, stride 16"),
    ],
)
def test_evaluations_on_different_data_are_noted(copy, capsys, change, note):
    runs = [copy("a"), copy("b")]
    for run, changed in zip(runs, ({}, change), strict=True):
        method = {"data": "a/b at 0123", "count": 9, "context": 32, "stride": 16} | changed
        row = {"task": "blimp", "group": "all", "metric": "accuracy", "value": 0.5, "count": method["count"]}
        text = json.dumps({"results": [row, row | {"metric": "other"}], "tasks": {"blimp": method}})
        (run.path / "evaluation.json").write_text(text)
    main([str(run.path) for run in runs])
    out = capsys.readouterr().out
    assert out.count("blimp was measured in different ways") == bool(note)
    assert note in out


def test_runs_with_the_same_name_are_distinguished(copy, tmp_path):
    first = copy("x/run")
    shutil.copytree(first.path, tmp_path / "y" / "run")
    paths = [first.path, tmp_path / "y" / "run", shutil.copytree(first.path, tmp_path / "other")]
    assert run_names([read_report_data(path) for path in paths]) == ["x/run", "y/run", "other"]


def test_a_curriculum_can_be_compared(copy, curriculum, capsys):
    main([str(copy("a").path), str(curriculum), "--to", str(curriculum / "both.html")])
    assert "course" in capsys.readouterr().out
    assert [row[6] for row in read_page(curriculum / "both.html").by_id("runs").rows()[1:]] in (
        ["24", "48"],
        ["48", "24"],
    )


def test_the_command_with_one_run(copy, capsys, monkeypatch, tmp_path):
    run = copy("runs/one")
    monkeypatch.chdir(tmp_path)
    main([])
    out = capsys.readouterr().out
    assert out.startswith("one: finished: step 24 of 24\nvalidation: loss ")
    assert out.endswith("runs/one/report.html\n")
    main(["--run", str(run.path), "--to", "here.html"])
    assert (tmp_path / "here.html").read_text().startswith("<!doctype html>")


def test_evaluations_of_stages_are_distinguished(curriculum, capsys):
    for name in ("01-words", "02-more words"):
        row = {"task": "heldout", "group": "all", "metric": "loss", "value": len(name)}
        text = json.dumps({"results": [row], "tasks": {"heldout": {"note": f"method of {name}"}}})
        (curriculum / "stages" / name / "evaluation.json").write_text(text)
    main([str(curriculum)])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "heldout" in line] == ["words: heldout loss: 8", "more words: heldout loss: 13"]
    notes = read_page(curriculum / "report.html").by_id("evaluation").one("dl").text
    assert notes == "words: heldoutmethod of 01-wordsmore words: heldoutmethod of 02-more words"


def test_invalid_arguments(copy, tmp_path):
    run = copy("a")
    with pytest.raises(UserError, match="no run in"):
        main([str(tmp_path / "b")])
    with pytest.raises(UserError, match=r"a is given twice: give each run once$"):
        main([str(run.path), "--run", str(run.path)])
    with pytest.raises(UserError, match="is a folder"):
        main([str(run.path), "--to", str(tmp_path)])
    with pytest.raises(UserError, match="cannot write"):
        main([str(run.path), "--to", str(tmp_path / "no" / "report.html")])
