"""Several runs: sorted, honest about what cannot be compared, and only the options that differ."""

import json
import shutil

import numpy as np
import pytest

from slm_jax.cli.report import main
from slm_jax.report.compare import names_of
from slm_jax.report.run_data import read_subject
from slm_jax.utils.errors import UserError
from tests.report.conftest import cut_held_out, rows_of, with_option, write_rows
from tests.report.pages import read_page


def with_score(run, bits):
    """The run as one that ended with other bits per byte."""
    rows = rows_of(run)
    rows[-1] |= {"val_bits_per_byte": bits}
    write_rows(run, rows)
    return run


def test_the_best_is_first(copy, capsys):
    runs = [with_score(copy(name), bits) for name, bits in (("a", 2.5), ("b", 1.25), ("c", 3.75))]
    with_option(runs[2], "train", seed=7)
    begun = copy("d")
    begun.metrics.unlink()
    main([str(run.path) for run in (*runs, begun)])
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:5]] == ["b", "a", "c", "d"]
    assert out[1].split()[1] == "1.2500"
    assert out[-1] == str(runs[0].path.parent / "comparison.html")

    page = read_page(runs[0].path.parent / "comparison.html")
    rows = page.by_id("runs").rows()
    assert [row[0] for row in rows[1:]] == ["b", "a", "c", "d"]
    assert page.by_id("config").rows() == [["option", "b", "a", "c", "d"], ["train.seed", "0", "0", "7", "0"]]
    assert not list(page.all("div", "note")), "the same text and tokenizer: nothing to warn of"
    validation = next(page.all("figure", "chart"))
    lines = json.loads(validation.one("script", "lines").text)
    assert [line["name"] for line in lines] == ["b", "a", "c"]
    assert [line["y"][-1] for line in lines] == [1.25, 2.5, 3.75]
    tracks = json.loads(page.by_id("tracks").text)
    subject = read_subject(runs[0].path)
    for axis, end in (*subject.columns.end.items(), ("flops", subject.flops)):
        assert tracks[lines[1]["track"]][axis][-1] == pytest.approx(end, rel=1e-6)


def test_other_held_out_text_is_told(copy, capsys):
    first, second = copy("a"), copy("b")
    path = second.corpus / "validation-00000.documents.npy"
    documents = np.load(path)
    documents["digest"] += 1
    path.unlink()  # a hard link, perhaps
    np.save(path, documents)
    main([str(first.path), str(second.path)])
    assert "Validated on different text" in capsys.readouterr().out
    assert "Validated on different text" in read_page(first.path.parent / "comparison.html").one("div", "note").text


@pytest.mark.parametrize(("most", "same"), [((300, 399), True), ((300, 400), False), ((0, 541), True)])
def test_the_text_is_that_of_the_documents_that_are_validated_on(copy, most, same):
    runs = [copy("a"), copy("b")]
    for run, tokens in zip(runs, most, strict=True):
        cut_held_out(run, 200, 400, 541)
        with_option(run, "eval", max_tokens=tokens)
    first, second = (read_subject(run.path).held_out for run in runs)
    assert (first == second) == same


def test_another_tokenizer_is_told_and_the_text_is_the_same(copy, capsys):
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
    ("change", "said"),
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
def test_evaluations_of_other_sets_are_told(copy, capsys, change, said):
    runs = [copy("a"), copy("b")]
    for run, changed in zip(runs, ({}, change), strict=True):
        how = {"data": "a/b at 0123", "count": 9, "context": 32, "stride": 16} | changed
        row = {"task": "blimp", "group": "all", "metric": "accuracy", "value": 0.5, "count": how["count"]}
        text = json.dumps({"results": [row, row | {"metric": "other"}], "tasks": {"blimp": how}})
        (run.path / "evaluation.json").write_text(text)
    main([str(run.path) for run in runs])
    out = capsys.readouterr().out
    assert out.count("blimp was not measured alike") == bool(said)
    assert said in out


def test_runs_of_the_same_name_are_told_apart(copy, tmp_path):
    first = copy("x/run")
    shutil.copytree(first.path, tmp_path / "y" / "run")
    paths = [first.path, tmp_path / "y" / "run", shutil.copytree(first.path, tmp_path / "other")]
    assert names_of([read_subject(path) for path in paths]) == ["x/run", "y/run", "other"]


def test_a_curriculum_can_be_compared(copy, curriculum, capsys):
    main([str(copy("a").path), str(curriculum), "--to", str(curriculum / "both.html")])
    assert "course" in capsys.readouterr().out
    assert [row[6] for row in read_page(curriculum / "both.html").by_id("runs").rows()[1:]] in (
        ["24", "48"],
        ["48", "24"],
    )


def test_one_run_on_the_command_line(copy, capsys, monkeypatch, tmp_path):
    run = copy("runs/one")
    monkeypatch.chdir(tmp_path)
    main([])
    out = capsys.readouterr().out
    assert out.startswith("one: finished: step 24 of 24\nvalidation: loss ")
    assert out.endswith("runs/one/report.html\n")
    main(["--run", str(run.path), "--to", "here.html"])
    assert (tmp_path / "here.html").read_text().startswith("<!doctype html>")


def test_evaluations_of_stages_are_told_apart(curriculum, capsys):
    for name in ("01-words", "02-more words"):
        row = {"task": "heldout", "group": "all", "metric": "loss", "value": len(name)}
        text = json.dumps({"results": [row], "tasks": {"heldout": {"note": f"noted of {name}"}}})
        (curriculum / "stages" / name / "evaluation.json").write_text(text)
    main([str(curriculum)])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "heldout" in line] == ["words: heldout loss: 8", "more words: heldout loss: 13"]
    said = read_page(curriculum / "report.html").by_id("evaluation").one("dl").text
    assert said == "words: heldoutnoted of 01-wordsmore words: heldoutnoted of 02-more words"


def test_mistakes(copy, tmp_path):
    run = copy("a")
    with pytest.raises(UserError, match="no run in"):
        main([str(tmp_path / "b")])
    with pytest.raises(UserError, match="given twice"):
        main([str(run.path), "--run", str(run.path)])
    with pytest.raises(UserError, match="is a folder"):
        main([str(run.path), "--to", str(tmp_path)])
    with pytest.raises(UserError, match="cannot write"):
        main([str(run.path), "--to", str(tmp_path / "no" / "report.html")])
