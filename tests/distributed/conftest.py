"""A folder to start the processes of a run in."""

import pytest


@pytest.fixture
def folder(tmp_path):
    text = "".join(f"Line {i}: the quick brown fox jumps over {i * 7 % 13} lazy dogs.\n" for i in range(900))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path
