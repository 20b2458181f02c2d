"""From options to a run's text: made once, shared by runs and processes, made again where it is lost."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slm_jax.config.schema import Config
from slm_jax.data import prepare
from slm_jax.data.corpus import cache
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError

HOME = Path(prepare.__file__).parents[2]


@pytest.fixture
def place(tmp_path):
    """A folder with text, and how to prepare it in this process and in others."""
    for name in "ab":
        text = "".join(f"Line {i} of {name}: the quick brown fox jumps over {i * 7 % 13} dogs.\n" for i in range(900))
        (tmp_path / f"{name}.txt").write_text(text)
    return Place(tmp_path)


class Place:
    def __init__(self, path):
        self.path, self.said = path, []
        self.options = ["--data.files", "a.txt", "--tokenizer.vocab_size", "400", "--data.cache", "cache"]

    def config(self, **fields):
        given = {} if "data__mix" in fields else {"data.files": (str(self.path / "a.txt"),)}
        overrides = {"data.cache": str(self.path / "cache"), "tokenizer.vocab_size": 400, **given}
        small = {"train.batch_size": 4, "train.sequence_length": 32}
        return Config.load(**{**overrides, **small, **{k.replace("__", "."): v for k, v in fields.items()}})

    def prepare(self, name, **fields):
        run = Run(self.path / name)
        run.path.mkdir(exist_ok=True)
        self.said.clear()
        return prepare.prepare(self.config(**fields), run, self.said.append)

    def command(self, *args):
        environment = {**os.environ, "PYTHONPATH": str(HOME)}
        return subprocess.Popen(
            [sys.executable, "-m", "slm_jax.data", *args],
            cwd=self.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def test_a_second_run_reads_and_makes_nothing(place, monkeypatch):
    _, first = place.prepare("one")
    assert any(text.startswith("learning") for text in place.said)
    monkeypatch.setattr("slm_jax.data.sources.files.open_binary", None)
    _, second = place.prepare("two")
    assert first.fingerprint == second.fingerprint
    assert not any(text.startswith(("reading", "learning")) for text in place.said)
    files = [place.path / name / "corpus" / "train-00000.tokens.npy" for name in ("one", "two")]
    assert files[0].stat().st_ino == files[1].stat().st_ino  # one file, not two
    with pytest.raises(TypeError):  # other options need the text again
        place.prepare("three", data__validation_fraction=0.2)


def test_a_run_outlives_the_cache(place):
    _, before = place.prepare("run")
    shutil.rmtree(place.path / "cache")
    _, after = place.prepare("run")
    assert after.fingerprint == before.fingerprint
    assert place.said == []


def test_first_words_are_those_of_a_held_out_document(place):
    assert prepare.example_prompt(Run(place.path / "none")) == "The"
    place.prepare("one")
    assert re.fullmatch(r"Line \d+ of a:", prepare.example_prompt(Run(place.path / "one")))
    (place.path / "long.txt").write_text("\n<|endoftext|>\n".join(f"{i:030} internationalisation" for i in range(99)))
    place.prepare("two", data__files=(str(place.path / "long.txt"),), tokenizer__vocab_size=300)
    assert prepare.example_prompt(Run(place.path / "two")) == "The"  # two words that take more than a line's part


def test_on_another_file_system_small_text_is_copied_and_large_linked_to(place, monkeypatch):
    def refuse(*_, **__):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    place.prepare("copied")
    assert not (place.path / "copied" / "corpus").is_symlink()
    monkeypatch.setattr(cache, "_COPIED", 0)
    _, before = place.prepare("linked")
    assert (place.path / "linked" / "corpus").is_symlink()
    shutil.rmtree(place.path / "cache")
    _, again = place.prepare("linked")
    assert any(text.endswith(" kB held out") for text in place.said)  # it was made again
    assert again.fingerprint == before.fingerprint


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache.cache_folder() == tmp_path / "user" / "slm_jax" / "data"
    assert cache.cache_folder("~/x") == Path.home() / "x"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # where nothing can be made
    assert cache.cache_folder() == Path("runs") / ".cache"


def test_damage_in_the_cache_is_told_and_mended(place):
    _, before = place.prepare("one")
    shutil.rmtree(place.path / "one")
    file = next((place.path / "cache").rglob("train-00000.tokens.npy"))
    file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    _, after = place.prepare("two")
    assert any("train-00000.tokens.npy: its checksum" in text and "making it again" in text for text in place.said)
    assert after.fingerprint == before.fingerprint


def test_sources_are_mixed(place):
    both = tuple(f"{place.path / name}.txt={weight}" for name, weight in (("a", 3), ("b", 1)))
    _, mixed = place.prepare("mixed", data__mix=both)
    assert [part.weight for part in mixed.parts] == [3, 1]
    assert [part.name.rpartition("/")[2] for part in mixed.parts] == ["a.txt", "b.txt"]
    assert len(mixed.train) == sum(len(part.train) for part in mixed.parts)
    assert mixed.validation.num_bytes == sum(m["validation"]["bytes"] for m in mixed.manifests)
    assert mixed.validation.num_bytes_between(0, len(mixed.validation)) == mixed.validation.num_bytes
    _, again = place.prepare("mixed", data__mix=both)
    assert (again.fingerprint, place.said) == (mixed.fingerprint, [])
    _, other = place.prepare("other", data__mix=(both[0], both[1].replace("=1", "=2")))
    assert other.fingerprint != mixed.fingerprint
    assert not any(text.startswith("reading a") for text in place.said)


def test_too_little_text_is_told_before_the_run_has_any(place):
    with pytest.raises(UserError, match=r"one batch takes 1,000,000"):
        place.prepare("run", train__batch_size=1000, train__sequence_length=1000)
    assert not (place.path / "run" / "corpus").exists()


def test_commands(place):
    both = [place.command("prepare", *place.options) for _ in range(2)]  # at once
    outs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert outs[0][0] == outs[1][0]
    assert sum("learning a tokenizer" in err for _, err in outs) == 1
    folder = outs[0][0].splitlines()[-1]
    listed = place.command("list", "--data.cache", "cache").communicate()[0]
    assert "tinystories" in listed
    assert Path(folder).name in listed
    shown = place.command("inspect", folder).communicate()[0]
    for expected in ("all checksums are right", "median", "padded at", "% padding", "document 0: 'Line 0 of a"):
        assert expected in shown
    assert place.command("inspect", *place.options).communicate()[0] == shown
    file = place.path / folder / "train-00000.documents.npy"
    file.write_bytes(file.read_bytes()[:-1])
    process = place.command("inspect", folder)
    assert "train-00000.documents.npy" in process.communicate()[1]
    assert process.returncode == 2
    process = place.command("inspect", "nowhere")
    assert "there is no corpus in nowhere" in process.communicate()[1]
    assert process.returncode == 2
