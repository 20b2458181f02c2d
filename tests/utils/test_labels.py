"""Labels of sources: short, readable and distinct."""

import pytest

from slm_jax.utils.labels import file_name_part, source_labels


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["../texts/plays.txt"], ["plays.txt"]),
        (["../my/*.txt"], ["my"]),
        (["/a/my/**/*.txt", "~/b.md"], ["my", "b.md"]),
        (["my/", "."], ["my", "."]),
        (["*.txt"], ["*.txt"]),
        (["../my/a.txt and 2 more"], ["a.txt and 2 more"]),
        (
            ["python-docs", "wikipedia:he", "hf:owner/name:config"],
            ["python-docs", "wikipedia:he", "hf:owner/name:config"],
        ),
        (["x/a/data.txt", "x/b/data.txt", "c.txt"], ["a/data.txt", "b/data.txt", "c.txt"]),
        (["/x/a/d.txt", "/y/a/d.txt"], ["x/a/d.txt", "y/a/d.txt"]),
        (["a.txt", "a.txt"], ["a.txt", "a.txt (2)"]),
        ([], []),
    ],
)
def test_labels(names, labels):
    assert source_labels(names) == labels


def test_names_of_folders():
    assert file_name_part("Shakespeare's Plays") == "shakespeare-s-plays"
    assert file_name_part("fineweb-edu:sample-10BT-of-the-web") == "fineweb-edu-sample-1"
    assert file_name_part("שירים") == "text"
