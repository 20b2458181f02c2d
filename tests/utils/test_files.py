"""Files are replaced as a whole, also by several writers at the same time; locks exclude each other."""

import pytest

from slm_jax.utils.errors import UserError
from slm_jax.utils.files import is_partial, locked_file, locked_folder, replace_file


def test_two_writers_of_one_file_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "rows.json"
    with replace_file(path) as outer:
        outer.write_text("outer")
        with replace_file(path) as inner:
            inner.write_text("inner")
            assert is_partial(inner)
            assert not path.exists()
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("old")

    def write_and_fail():
        with replace_file(path) as partial:
            partial.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_locked_folder_is_refused_until_it_is_released(tmp_path):
    folder = tmp_path / "runs" / "a"
    with locked_folder(folder, "training a", "--run"):
        message = r"^another process is training a: wait for it, or use another --run$"
        with pytest.raises(UserError, match=message), locked_folder(folder, "training a", "--run"):
            pass
    with locked_folder(folder, "training a", "--run"):
        pass
    file = tmp_path / "file"
    file.touch()
    with (
        pytest.raises(UserError, match="is a file, not a folder: use another --run"),
        locked_folder(file, "x", "--run"),
    ):
        pass


def test_waiting_for_a_locked_file_is_reported_once(tmp_path):
    waits = []
    with locked_file(tmp_path / "rows.csv", lambda: waits.append(1)):
        pass
    assert waits == []

    def give_up():
        waits.append(1)
        raise TimeoutError

    with (
        locked_file(tmp_path / "rows.csv"),
        pytest.raises(TimeoutError),
        locked_file(tmp_path / "rows.csv", give_up),
    ):
        pass
    assert waits == [1]
