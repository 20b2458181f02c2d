"""Documents come whole, in order, from Python's own documentation and from files."""

import pytest

from slm_jax.config import DataConfig
from slm_jax.data import python_docs
from slm_jax.data.sources import documents
from slm_jax.errors import UserError


def local(*files, **fields):
    return list(documents(DataConfig(source="files", files=tuple(str(f) for f in files), **fields)))


def test_python_docs_is_megabytes_of_english_always_the_same():
    first = list(python_docs.documents())
    assert first == list(python_docs.documents())
    assert sum(map(len, first)) > 1_500_000
    text = "\n".join(first)
    assert text.count(" the ") > 10_000
    assert "Return a new" in text
    assert not any("\x00" in d for d in first)


def test_python_docs_leaves_out_sections_of_other_topics():
    """Few paragraphs stand in two documents; as they come in Python, a third of the topics are parts of others."""
    paragraphs = [{" ".join(p.split()) for p in d.split("\n\n") if len(p) > 80} for d in python_docs.documents()]
    seen: set[str] = set()
    repeated = total = 0
    for each in paragraphs:
        repeated += sum(len(p) for p in each & seen)
        total += sum(len(p) for p in each)
        seen |= each
    assert repeated / total < 0.05


def test_files_are_sorted_unique_and_split_at_separators(tmp_path):
    (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo\r\nlines\n<|endoftext|>\n\n")
    (tmp_path / "a.txt").write_text("\ufefffirst <|endoftext|> inside a line\n")
    assert local(tmp_path / "*.txt", tmp_path / "b.txt") == [
        "first <|endoftext|> inside a line\n",
        "one\n",
        "two\r\nlines\n",
    ]
    assert len(local(tmp_path / "b.txt", separator="")) == 1


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "notes [1].txt").write_text("here")
    assert local(tmp_path / "notes [1].txt") == ["here"]


def test_globs_reach_into_folders(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "deep.txt").write_text("deep")
    assert local(tmp_path / "**" / "*.txt") == ["deep"]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"line\ncaf" + b"\xe9 au lait")
    with pytest.raises(UserError, match=r"no file matches .*nothing\*"):
        local(tmp_path / "nothing*")
    with pytest.raises(UserError, match="is a folder"):
        local(tmp_path)
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        local(tmp_path / "empty.txt")
    with pytest.raises(UserError, match=r"not UTF-8: byte 0xe9 at offset 8 \(line 2\).*encoding_errors replace"):
        local(tmp_path / "latin.txt")
    assert local(tmp_path / "latin.txt", encoding_errors="replace") == ["line\ncaf\ufffd au lait"]
