"""The report of a run: complete, correct, self-contained, and safe with any text."""

import json
import math
import re
import time

import numpy as np
import pytest

from slm_jax.report.page import report_html, write_report, write_report_after_training
from slm_jax.report.run_data import read_report_data
from slm_jax.report.terminal import run_summary
from slm_jax.run.directory import Run
from slm_jax.run.samples import read_samples
from slm_jax.utils.errors import UserError
from tests.report.conftest import STEPS, cut_held_out, rows_of, with_option, write_rows
from tests.report.pages import Page, read_page
from tokenizer import HybridTokenizer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; <!-- </pre></style> \x00\x1b[31m ‮x"


def tiles(page):
    return {each.one("dt").text: each.one("dd").text for each in page.all("div", "tile")}


def properties(page):
    return {each.one("dt").text: each.one("dd").text for each in page.all("div") if len(list(each.all("dt"))) == 1}


def test_training_writes_the_report(trained):
    page = read_page(trained / "report.html")
    headings = [each.text for each in page.all("h2")]
    assert headings == "Curves|Validation|Samples|Tokenizer|Data|Config|Environment and cost".split("|")
    assert "finished: step 24 of 24" in page.one("header").text
    assert [each.attributes["href"] for each in page.one("nav").all("a")] == [
        "#" + each.attributes["id"] for each in page.all("section")
    ]
    titles = [each.one("h3").children[0].strip() for each in page.all("figure", "chart")]
    assert {"Loss", "Bits per byte", "Learning rate", "Gradient norm", "Speed", "Accuracy"} <= set(titles)


def test_key_values_and_validation_scores(trained):
    run, page = Run(trained), read_page(trained / "report.html")
    rows, values = rows_of(run), tiles(page)
    last = rows[-1]
    assert values["Bits per byte"].startswith(f"{last['val_bits_per_byte']:.3f}")
    assert values["Validation loss"].startswith(f"{last['val_loss']:.3f}")
    tokens = sum(row["tokens"] for row in rows)
    assert values["Tokens predicted"].startswith(f"{tokens:,}")
    # By hand: 4 attention matrices of 32 x 32, 3 MLP matrices of 32 x 64, and the tied head; 6 FLOPs per matrix
    # parameter and token, and 12 per channel and key, of which a token attends to 16.5 on average.
    vocab = HybridTokenizer.load(run.tokenizer).vocab_size
    matrices = 4 * 32 * 32 + 3 * 32 * 64 + vocab * 32
    assert values["Model FLOPs"].startswith(f"{tokens * (6 * matrices + 12 * 32 * 16.5):.2e}")
    assert values["Parameters"].startswith(f"{(matrices + 2 * 32 + 32 + 2 * 16) / 1000:.1f}k")

    table = page.by_id("validation").rows()
    assert [row[0] for row in table[1:4]] == ["24", "16", "8"]
    assert [float(row[1]) for row in table[1:4]] == [
        round(rows[step - 1]["val_bits_per_byte"], 4) for step in (24, 16, 8)
    ]


@pytest.mark.parametrize(("max_tokens", "kept"), [(0, 510), (300, 200)])
def test_baselines_against_a_loop_over_the_tokens(copy, max_tokens, kept):
    """Validation uses complete documents, as many as fit into eval.max_tokens."""
    run = copy()
    cut_held_out(run, 200, 400, 510)
    with_option(run, "eval", max_tokens=max_tokens)
    tokenizer = HybridTokenizer.load(run.tokenizer)
    ids = {side: np.load(run.corpus / f"{side}-00000.tokens.npy").tolist() for side in ("train", "validation")}
    assert len(ids["validation"]) == 510
    ids["validation"] = ids["validation"][:kept]
    uses = {i: ids["train"].count(i) for i in range(tokenizer.vocab_size)}
    total = len(ids["train"]) + tokenizer.vocab_size
    nats = -sum(math.log((uses[i] + 1) / total) for i in ids["validation"])
    num_bytes = 2 * kept
    common = max(uses, key=uses.get)

    rows = {row[0]: row for row in read_page(write_report(run.path)[1]).by_id("validation").rows()}
    row = rows["baseline: token frequencies"]
    assert float(row[1]) == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-4)
    assert float(row[2]) == pytest.approx(nats / len(ids["validation"]), abs=1e-4)
    assert float(row[4].split()[0]) == pytest.approx(
        100 * ids["validation"].count(common) / len(ids["validation"]), abs=0.06
    )
    assert float(rows["baseline: uniform"][2]) == pytest.approx(math.log(tokenizer.vocab_size), abs=1e-4)


def test_tokenizer_properties(trained):
    tokenizer = HybridTokenizer.load(trained / "tokenizer.hybtok")
    page = read_page(trained / "report.html").by_id("tokenizer")
    for side, name in (("train", "training"), ("validation", "held-out")):
        ids = np.load(trained / "corpus" / f"{side}-00000.tokens.npy").tolist()
        rate = len(tokenizer.decode(ids).encode()) / sum(i != tokenizer.token2id["<EOS>"] for i in ids)
        assert properties(page)[f"Bytes per token, {name} text"] == f"{rate:.3f}"
    _, longest = (table.rows()[1:] for table in page.all("table"))
    sizes = [len(row[0].replace("·", " ").encode()) for row in longest]
    assert sizes == sorted(sizes, reverse=True)
    assert [int(row[2]) for row in longest] == sizes


def test_split_and_overlap_are_stated(trained):
    text = read_page(trained / "report.html").by_id("data").text
    assert (
        "too few documents to hold out whole ones: the beginning of 1 document is held out, and 809 characters" in text
    )
    assert "Held-out text that is also in training text: 0.0% of the documents, " in text
    saved = json.loads((trained / "corpus" / "overlap.json").read_text())
    matched = saved["matched"] / saved["characters"]
    assert f", {matched:.1%} of the characters in matches of 50 and more." in text


def test_a_tokenized_sample(copy):
    run = copy()
    text = "The quick brown Fox\n  JUMPS over née Åse. 🙂"
    run.samples.write_text("\n## Step 24\n\n" + "".join(f"    {line}\n" for line in text.splitlines()))
    tokenizer = HybridTokenizer.load(run.tokenizer)
    pieces = list(read_page(write_report(run.path)[1]).one("div", "pieces").all("span", "piece"))
    assert len(pieces) == tokenizer.count(text)
    kinds = [(piece.classes[1].removeprefix("piece-"), piece.text) for piece in pieces]
    words = "".join(text for kind, text in kinds if kind in ("base", "merge", "byte", "char"))
    words = words.replace("<0xF0><0x9F><0x99><0x82>", "🙂").replace(" ", "")
    assert words == re.sub(r"\s", "", text)
    assert {"case", "space", "byte"} <= {kind for kind, _ in kinds}
    assert any("⏎\n" in piece for kind, piece in kinds if kind == "space")


def test_samples_match_those_written_by_training(trained):
    samples = read_samples(trained / "samples.md")
    assert [sample.step for sample in samples] == [8, 16, 24]
    assert all(len(sample.texts) == 2 for sample in samples)
    for text, prompt in zip(samples[-1].texts, ("Line 5", "The quick"), strict=True):
        assert text.startswith(prompt)
    shown = [pre.text for pre in read_page(trained / "report.html").by_id("samples").all("pre")]
    symbols = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
    assert shown == [text.translate(symbols) for sample in samples[::-1] for text in sample.texts]


def test_separators_inside_a_sample_are_text(tmp_path):
    path = tmp_path / "samples.md"
    path.write_text("\n## Step 5\n\n    a\n    * * *\n    \n    ## Step 9\n\n* * *\n\n        b\n")
    (sample,) = read_samples(path)
    assert sample == (5, ["a\n* * *\n\n## Step 9", "    b"])


def test_the_environment_is_recorded_during_training(trained):
    import jax

    (call,) = json.loads((trained / "environment.json").read_text())["calls"]
    assert call["step"] == 0
    assert call["packages"]["jax"] == jax.__version__
    assert (call["devices"], call["platform"]) == (1, "cpu")
    text = read_page(trained / "report.html").by_id("environment-and-cost").text
    assert jax.__version__ in text
    assert call["mfu_of"] in text


def test_changed_options_are_marked(trained):
    page = read_page(trained / "report.html").by_id("config")
    changed = next(page.all("table")).rows()[1:]
    assert ["train.steps", "24", "1000"] in changed
    assert ["data.mode", '"packed"', '"packed"'] not in changed
    marked = {each.text for each in page.all("span", "changed")}
    assert {row[1] for row in changed} == marked


def test_hostile_text_is_escaped(copy):
    run = copy('run"><script>alert(3)</script>')
    run.samples.write_text("\n## Step 24\n\n" + "".join(f"    {line}\n" for line in HOSTILE.split("\n")))
    config = run.read_config()
    run.save_config(config.model_copy(update={"eval": config.eval.model_copy(update={"prompts": (HOSTILE,)})}))
    row = {"task": HOSTILE, "group": "all", "metric": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "count": 9}
    about = {HOSTILE: {"note": HOSTILE}}
    (run.path / "evaluation.json").write_text(json.dumps({"results": [row | {"reference": HOSTILE}], "tasks": about}))
    (run.path / "benchmarks.csv").write_text(
        'stage,loss\n"' + HOSTILE.replace('"', '""').replace("\x00", "") + '",1.5\n'
    )
    calls = {"calls": [{"step": 3, "device": HOSTILE, "mfu_of": HOSTILE, "packages": {HOSTILE: HOSTILE}}]}
    run.environment.write_text(json.dumps(calls))
    page = read_page(write_report(run.path)[1])
    scripts = [each.attributes for each in page.all("script")]
    allowed = [{}, {"type": "application/json", "class": "lines"}, {"type": "application/json", "id": "x-values"}]
    assert all(each in allowed for each in scripts)
    assert not list(page.all("img"))
    assert not [name for each in page.all() for name in each.attributes if name.startswith("on")]
    expected = HOSTILE.replace("\x00", "␀").replace("\x1b", "␛")
    assert [pre.text for pre in page.by_id("samples").all("pre")] == [expected]
    assert expected in page.by_id("evaluation").text
    assert expected.replace("␀", "") in page.by_id("benchmarks").text
    assert expected in page.by_id("environment-and-cost").text
    assert page.one("h1").text == run.path.name
    for each in page.all("script"):
        if each.attributes:
            json.loads(each.text)


def test_the_page_loads_nothing(trained):
    text = (trained / "report.html").read_text()
    page = Page(text).root
    for element in page.all():
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = element.attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (element.tag, value)
    policy = next(e.attributes for e in page.all("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]
    style = page.one("style").text
    assert "url(" not in style
    assert "@import" not in style


def test_a_run_in_progress(copy):
    run = copy()
    text = run.metrics.read_text()
    lines = text.splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:10]) + lines[10][:40])
    data, path = write_report(run.path)
    assert data.last.step == 10
    note = read_page(path).one("div", "note").text
    assert "Not finished: step 10 of 24." in note
    run.metrics.unlink()
    data, path = write_report(run.path)
    assert "step 0 of 24" in read_page(path).one("header").text
    assert not list(read_page(path).all("figure"))


def test_a_run_that_has_only_started(copy):
    run = copy()
    for path in (run.metrics, run.tokenizer, run.samples, run.environment):
        path.unlink()
    for path in run.corpus.iterdir():
        path.unlink()
    headings = [each.text for each in read_page(write_report(run.path)[1]).all("h2")]
    assert headings == ["Config", "Environment and cost"]


def test_notes(copy):
    run = copy()
    rows = rows_of(run)
    rows[-1] |= {"val_loss": rows[7]["val_loss"] * 1.5}
    rows[15] |= {"val_loss": rows[7]["val_loss"] * 1.2}
    write_rows(run, [row | {"skipped": row["step"] // 10} for row in rows])
    calls = json.loads(run.environment.read_text())["calls"]
    run.environment.write_text(json.dumps({"calls": [*calls, calls[0] | {"step": 8}, calls[0] | {"step": 16}]}))
    note = read_page(write_report(run.path)[1]).one("div", "note").text
    assert "Resumed after steps 8 and 16." in note
    assert "2 batches were skipped" in note
    assert "lowest at step 8" in note


def test_a_damaged_row_is_reported_and_left_out(copy, caplog):
    run = copy()
    run.metrics.write_text(run.metrics.read_text().replace('"loss"', '"lo', 1))
    data, _ = write_report(run.path)
    assert "metrics.jsonl, line 1, is damaged and skipped" in caplog.text
    assert data.last.step == 24


def test_damaged_files_raise(copy):
    run = copy("other")
    (run.path / "evaluation.json").write_text('{"results": [{}]}')
    with pytest.raises(UserError, match=r"evaluation\.json is damaged"):
        write_report(run.path)
    with pytest.raises(UserError, match="no run in"):
        write_report(run.path / "nothing")


def test_evaluation_table(copy):
    run = copy()
    make = lambda task, group, metric, value, **more: {  # noqa: E731
        "task": task, "group": group, "metric": metric, "value": value, "low": value - 0.01, "high": value + 0.01,
        "count": 100, "step": 24, "time": 0.0, **more,
    }  # fmt: skip
    rows = [
        make("BLiMP", "all", "accuracy", 0.613, reference="chance 50 %; GPT-2 81.5 % (Warstadt et al. 2020)"),
        make("BLiMP", "syntax", "accuracy", 0.52, reference="chance 50 %"),
        make("LAMBADA", "all", "perplexity", 1234.5, low=None, high=None),
        make("chat-facts", "all", "right_share", 0.705),
    ]
    (run.path / "evaluation.json").write_text(json.dumps({"results": rows}))
    data, path = write_report(run.path)
    lines = [line.replace("\xa0", " ") for line in run_summary(data)]
    assert "BLiMP accuracy: 61.3 % (60.3 % – 62.3 %)" in lines
    section = read_page(path).by_id("evaluation")
    complete, parts = (table.rows() for table in section.all("table"))
    cells = [cell.replace("\xa0", " ") for cell in complete[1]]
    assert cells == ["BLiMP", "accuracy", "61.3 %", "60.3 % – 62.3 %", "", "100", "24", rows[0]["reference"]]
    assert complete[2][:4] == ["LAMBADA", "perplexity", "1,234", ""]  # without an interval
    assert complete[3][1:3] == ["right share", "70.5\xa0%"]
    assert len(list(section.all("svg", "whisker"))) == 3
    assert len(list(section.all("path", "ref"))) == 2
    assert parts[1][0] == "syntax"


def test_the_report_of_a_curriculum(curriculum, trained):
    data = read_report_data(curriculum)
    columns = data.columns
    assert columns["step"].tolist() == list(range(1, 2 * STEPS + 1))
    rows = rows_of(Run(trained))
    tokens = np.cumsum([row["tokens"] for row in rows] * 2)
    assert columns.x["tokens"].tolist() == tokens.tolist()
    assert np.all(np.diff(columns.x["seconds"]) > 0)
    assert [row["step"] for row in columns.validations] == [8, 16, 24, 32, 40, 48]
    assert data.flops == pytest.approx(2 * data.stages[0].columns["flops"].sum())

    page = Page(report_html(data)).root
    loss = next(page.all("figure", "chart"))
    views = {(each.attributes["data-axis"], "log" in each.classes): each for each in loss.all("div", "view")}
    assert len(views) == 6
    for name in ("words", "more words"):
        assert all(name in [each.text for each in view.all("span", "mark-name")] for view in views.values())
    view = views["step", False]
    low, high = (float(view.attributes[f"data-{end}"]) for end in ("low", "high"))
    positions = [float(each.attributes["d"][1:].split()[0]) for each in view.all("path", "mark")]
    assert positions == pytest.approx([1000 * (step - low) / (high - low) for step in (0, STEPS)], abs=0.06)
    assert "finished: stage 2 of 2 (more words), step 24 of 24" in page.one("header").text
    assert not list(page.all("div", "note"))
    with (curriculum / "curriculum.toml").open("a") as file:
        file.write('[[stages]]\nname = "third"\n')
    note = Page(report_html(read_report_data(curriculum))).root.one("div", "note").text
    assert "Not finished: stage 2 of 3 (more words), step 24 of 24." in note
    validations = page.by_id("validation").rows()[1:7]
    assert [row[:2] for row in validations[2:4]] == [["32", "more words"], ["24", "words"]]
    options = {row[0]: row[1:] for row in page.by_id("config").rows()}
    assert options["optimizer.lr"] == ["0.005", "0.002", "0.01"]


def test_the_end_of_a_stage_updates_the_report_of_the_curriculum(curriculum, caplog):
    stage = Run(curriculum / "stages" / "02-more words")
    write_report_after_training(stage)
    assert "course" in read_page(curriculum / "report.html").one("h1").text
    (stage.path / "evaluation.json").write_text("{")
    write_report_after_training(stage)  # does not raise: training itself has succeeded
    assert "no report was written" in caplog.text


def test_scores_of_each_stage_on_each_text(curriculum):
    scores = [
        ("01-words", "01-words", 1.5),
        ("02-more words", "01-words", 1.75),
        ("02-more words", "02-more words", 1.25),
    ]
    rows = [{"after": after, "text": text, "step": 24, "bits_per_byte": bits} for after, text, bits in scores]
    (curriculum / "stage_scores.json").write_text(json.dumps({"results": rows}))
    table = read_page(write_report(curriculum)[1]).by_id("stages")
    assert table.rows() == [
        ["model", "01-words", "02-more words"],
        ["after 01-words", "1.5000", ""],
        ["after 02-more words", "1.7500", "1.2500"],
    ]
    assert [each.text for each in table.all("b")] == ["1.5000", "1.2500"]


def test_layer_charts(copy):
    run = copy()
    norms = [{"embedding": 1.0 * step, **{f"blocks.{i}": 2.0**i for i in range(20)}} for step in range(2, 23, 4)]
    rows = [{"step": 4 * i + 2, "grad_norm": each, "param_norm": {}} for i, each in enumerate(norms)]
    rows[2]["grad_norm"] = rows[2]["grad_norm"] | {"embedding": None}  # not finite
    run.layers.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 99}]) + '{"st')
    page = read_page(write_report(run.path)[1])
    chart = list(page.all("figure", "chart"))[-1]
    assert chart.one("h3").text.startswith("Gradient norm by layer")
    lines = json.loads(chart.one("script", "lines").text)
    assert lines[0]["name"] == "embedding"
    assert lines[0]["y"] == [2, 6, None, 14, 18, 22]
    assert lines[-1]["name"] == "blocks.19"
    assert len(lines) == 10
    assert "11 more layers" in chart.text
    x_values = json.loads(page.by_id("x-values").text)
    assert x_values[lines[0]["x"]]["step"] == [2, 6, 10, 14, 18, 22]


def test_lines_are_interrupted_between_stages(curriculum):
    loss = next(Page(report_html(read_report_data(curriculum))).root.all("figure", "chart"))
    for line in json.loads(loss.one("script", "lines").text):
        values = line["y"]
        assert values.count(None) == 1
        assert values[: values.index(None)] == values[values.index(None) + 1 :]  # the same run twice
    thin = next(next(loss.all("div", "view")).all("path", "line")).attributes["d"]
    assert thin.count("M") == 2


def test_a_spike_among_many_rows_is_visible_and_the_page_stays_small(copy):
    run = copy()
    config = run.read_config()
    run.save_config(config.model_copy(update={"train": config.train.model_copy(update={"steps": 20_000})}))
    row = {k: v for k, v in rows_of(run)[0].items() if not k.startswith("val_")}
    rows = [row | {"step": step, "seconds": step / 10, "grad_norm": 0.5} for step in range(1, 20_001)]
    rows[12_345]["grad_norm"] = 77.0
    write_rows(run, rows)
    _, path = write_report(run.path)
    assert path.stat().st_size < 1_500_000
    norm = next(f for f in read_page(path).all("figure", "chart") if f.one("h3").text.startswith("Gradient norm"))
    assert "highest 77" in norm.one("div", "plot").attributes["aria-label"]
    view = next(norm.all("div", "view"))
    low, high = (float(view.attributes[f"data-{end}"]) for end in ("bottom", "top"))
    top = 1000 - 1000 * (77 - low) / (high - low)
    heights = [
        float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", view.one("path", "band").attributes["d"])
    ]
    assert min(heights) == pytest.approx(top, abs=0.1)


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_seconds(copy):
    run = copy()
    row = rows_of(run)[0]
    write_rows(run, [row | {"step": step, "seconds": step / 10} for step in range(1, 100_001)])
    begin = time.process_time()
    write_report(run.path)
    assert time.process_time() - begin < 10  # measured: 1.1 s; a loop over the rows for each chart would take minutes
