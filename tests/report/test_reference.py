"""Reference results: written from seeds, read back, and runs compared with them."""

import json

import numpy as np
import pytest
from scipy.stats import t

from slm_jax.cli.report import main
from slm_jax.config.presets import reference_names, reference_path
from slm_jax.config.schema import Config
from slm_jax.report.reference import find_references, read_reference, result_options
from slm_jax.utils.errors import UserError
from tests.report.conftest import cut_held_out, rows_of, with_option, write_rows
from tests.report.pages import read_page

SCORES = [[3.0, 2.5, 2.0], [3.1, 2.4, 2.1], [2.9, 2.45, 2.05]]


def with_scores(run, scores):
    """Change the bits per byte of the three validations of a run."""
    rows = rows_of(run)
    validated = [row for row in rows if row.get("val_loss") is not None]
    for row, score in zip(validated, scores, strict=False):
        row["val_bits_per_byte"] = score
    write_rows(run, rows)
    return run


@pytest.fixture
def reference(copy, tmp_path, capsys):
    """The file of a reference of three seeds."""
    runs = []
    for seed, scores in enumerate(SCORES):
        runs.append(with_scores(copy(f"seed{seed}"), scores))
        with_option(runs[-1], "train", seed=seed)
    main([*(str(run.path) for run in runs), "--reference", str(tmp_path / "tiny.json")])
    assert "over 3 seeds" in capsys.readouterr().out
    return tmp_path / "tiny.json"


def test_the_band_is_that_of_one_more_seed(reference):
    read = read_reference(reference)
    assert read.steps.tolist() == [8, 16, 24]
    assert [curve.bits_per_byte for curve in read.curves] == SCORES
    scores = np.array(SCORES)
    relative = np.sqrt(np.mean([np.var(column, ddof=1) / np.mean(column) ** 2 for column in scores.T]))
    low, high = read.band
    assert high - low == pytest.approx(2 * t.ppf(0.975, 2) * np.sqrt(4 / 3) * relative * scores.mean(0))
    assert read.final == pytest.approx((2.05, 0.05))


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [([3.0, 2.5, 2.06], "on track"), ([3.0, 2.5, 2.9], "BEHIND the reference"), ([3.0, 2.5, 1.1], "ahead of the")],
)
def test_a_run_is_on_track_or_not(reference, copy, capsys, scores, verdict):
    run = with_scores(copy("mine"), scores)
    with_option(run, "train", seed=9)
    main([str(run.path), "--against", str(reference)])
    out = capsys.readouterr().out
    assert f"\n{verdict}" in out
    assert "at step 24, tiny 2.0500" in out
    assert "differs" not in out
    page = read_page(run.report)
    assert [row[0] for row in page.by_id("reference").rows()] == ["step", "8", "16", "24"]
    names = [line["name"] for chart in page.all("figure", "chart") for line in json.loads(chart.one("script").text)]
    assert "tiny (reference, 3 seeds)" in names


def test_a_curve_is_compared_where_both_have_values(reference, copy, capsys):
    """A run with other validation steps, longer than the reference and at its beginning."""
    run = with_scores(copy("mine"), [3.0, 2.5, 2.0])
    rows = rows_of(run)
    for row, step in zip([row for row in rows if row.get("val_loss") is not None], (4, 12, 99), strict=True):
        row["step"] = step
    write_rows(run, sorted(rows, key=lambda row: row["step"]))
    main([str(run.path), "--against", str(reference)])
    out = capsys.readouterr().out
    assert "at step 12, tiny 2.7250" in out  # halfway from 3.0 to 2.45
    short = with_scores(copy("short"), [3.0, 2.5, 2.0])
    write_rows(short, rows_of(short)[:5])
    main([str(short.path), "--against", str(reference)])
    assert "nothing to compare yet: the first validation of the reference is at step 8" in capsys.readouterr().out
    write_rows(run, [row | {"step": row["step"] + 100} for row in rows_of(run)])
    main([str(run.path), "--against", str(reference)])
    assert "all validations of the run are after step 24, the reference's last" in capsys.readouterr().out


def test_differing_options_are_listed_and_change_the_verdict(reference, copy, capsys):
    run = with_scores(copy("mine"), [3.0, 2.5, 2.9])
    with_option(run, "optimizer", lr=0.5)
    main([str(run.path), "--against", str(reference)])
    out = capsys.readouterr().out
    assert "worse than the reference, whose options differ" in out
    assert f"differs: optimizer.lr is 0.5, there {Config.load().optimizer.lr}" in out


def test_meaningless_comparisons_are_refused(reference, copy, curriculum):
    for section, option, value in (("data", "mode", "segmented"), ("train", "sequence_length", 8)):
        run = copy(option)
        with_option(run, section, **{option: value})
        with pytest.raises(UserError, match=f"cannot be compared with a reference.*{section}.{option} is {value!r}"):
            main([str(run.path), "--against", str(reference)])
    run = copy("text")
    cut_held_out(run, 40, 90)
    with pytest.raises(UserError, match="other held-out text"):
        main([str(run.path), "--against", str(reference)])
    with pytest.raises(UserError, match="is a curriculum"):
        main([str(curriculum), "--against", str(reference)])
    for name, message in (
        ("nothing", "no such reference"),
        (str(run.path), "is a folder"),
        (str(run.metrics.with_suffix(".json")), "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(run.path), "--against", name])
    with pytest.raises(UserError, match="give one run"):
        main([str(run.path), str(copy("b").path), "--against", str(reference)])
    with pytest.raises(UserError, match="give one of them"):
        main([str(run.path), "--against", str(reference), "--reference", "new.json"])


def test_runs_that_are_no_seeds_of_one_config_make_no_reference(copy, tmp_path):
    a, b = copy("a"), copy("b")

    def write(*runs):
        main([*(str(run.path) for run in runs), "--reference", str(tmp_path / "new.json")])

    with pytest.raises(UserError, match="needs 2 runs or more"):
        write(a)
    with pytest.raises(UserError, match=r"have the same train.seed"):
        write(a, b)
    with_option(b, "train", seed=1)
    with_option(b, "optimizer", lr=0.5)
    with pytest.raises(UserError, match=r"differ in optimizer.lr"):
        write(a, b)
    write_rows(b, rows_of(b)[:-1])
    with pytest.raises(UserError, match="is not a finished run"):
        write(a, b)
    assert not (tmp_path / "new.json").exists()
    (tmp_path / "bad.json").write_text('{"format": 1, "curves": []}')
    with pytest.raises(UserError, match="is not a reference"):
        read_reference(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [], "tokens": [], "bits_per_byte": [], "seconds": []},
        {"steps": ["a", "b"]},
        {"steps": [1, 3]},
        {"seconds": [None, None]},
        {"bits_per_byte": [0.0, 0.0]},
        {"tokens": [16, 16]},
        {"options": []},
    ],
)
def test_a_damaged_reference_is_reported(change, tmp_path):
    curve = {"steps": [1, 2], "tokens": [8, 16], "bits_per_byte": [2.0, 1.5], "seconds": [0.1, 0.2]}
    other = {"name": "a", "options": {}, "held_out": "", "text": {}, "environment": {}}
    top = {name: value for name, value in change.items() if name in other}
    first = curve | {name: value for name, value in change.items() if name in curve}
    path = tmp_path / "a.json"

    def write(first, top):
        curves = [{"seed": 0, **first}, {"seed": 1, **curve}]
        path.write_text(json.dumps({"format": 1, **other, **top, "curves": curves}))

    write(curve, {})
    read_reference(path)
    write(first, top)
    with pytest.raises(UserError, match="is not a reference"):
        read_reference(path)
    for steps in ([2, 1], [2, 2]):  # the same in all curves
        path.write_text(
            json.dumps({"format": 1, **other, "curves": [{"seed": seed, **curve, "steps": steps} for seed in (0, 1)]})
        )
        with pytest.raises(UserError, match="steps or tokens that do not ascend"):
            read_reference(path)
    if len(change) == 4:  # also where all curves are empty
        path.write_text(json.dumps({"format": 1, **other, "curves": [{"seed": seed, **first} for seed in (0, 1)]}))
        with pytest.raises(UserError, match="its curves are incomplete"):
            read_reference(path)


def test_the_references_of_the_package_are_those_of_its_presets():
    """A changed preset needs its reference again: python tests/benchmarks/references.py NAME"""
    for name in reference_names():
        stored = read_reference(reference_path(name)).options
        current = json.loads(json.dumps(result_options(Config.load(name))))
        added = {option: value for option, value in Config().flat().items() if option not in stored}
        changed = {option for option in stored if stored[option] != current.get(option)}
        changed |= {
            option
            for option in added.keys() & current.keys()
            if current[option] != json.loads(json.dumps(added[option]))
        }
        assert not changed, f"python tests/benchmarks/references.py {name}"
    assert len(find_references("reference")) == len(reference_names())
