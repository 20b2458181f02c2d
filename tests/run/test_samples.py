"""samples.md: what is written is read back, also after a crash has cut the file short anywhere."""

import pytest

from slm_jax.run.samples import Sample, append_samples, forget_samples_after, read_samples

TEXTS = ["a fox\n\n* * *\n    ## Step 9\n", "", "née\n## Step 3"]


@pytest.fixture
def path(tmp_path):
    for step in (2, 4):
        append_samples(tmp_path / "samples.md", step, TEXTS)
    return tmp_path / "samples.md"


def test_samples_are_read_back_as_written(path, tmp_path):
    expected = [text.strip("\n") for text in TEXTS]
    assert read_samples(path) == [Sample(2, expected), Sample(4, expected)]
    assert path.read_text().startswith("\n## Step 2\n\n    a fox\n    \n    * * *\n        ## Step 9\n\n* * *\n\n")
    assert read_samples(tmp_path / "none.md") == []


def test_forgetting_leaves_earlier_sections_byte_for_byte(path):
    content = path.read_bytes()
    forget_samples_after(path, 4)
    assert path.read_bytes() == content
    forget_samples_after(path, 3)
    assert path.read_bytes() == content[: content.rindex(b"\n## Step 4")]


def test_a_file_cut_short_anywhere_is_readable_and_repaired(path):
    content = path.read_bytes()
    second = content.rindex(b"\n## Step 4")
    for end in range(len(content)):
        path.write_bytes(content[:end] + (b"\n## Step \n## Step 5x\n" if end % 2 else b""))
        assert all(sample.step in (2, 4) for sample in read_samples(path))
        forget_samples_after(path, 3)
        if end >= second:
            assert path.read_bytes().rstrip(b"\n") == content[:second].rstrip(b"\n")
