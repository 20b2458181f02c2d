"""Sources: documents of Python's documentation and of files, complete, in order, from any position."""

import bz2
import codecs
import contextlib
import errno
import gzip
import itertools
import json
import lzma
import os
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from slm_jax.config.schema import DataConfig
from slm_jax.config.source_names import parse_weight
from slm_jax.data.sources import file_source, files, python_docs, python_qa
from slm_jax.data.sources.documents import Document, InvalidRow
from slm_jax.data.sources.file_source import FileSource
from slm_jax.data.sources.python_docs import PythonDocs
from slm_jax.data.sources.registry import make_source
from slm_jax.data.sources.rows import Row, RowMapper
from slm_jax.data.sources.similar import similar_groups
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import import_optional

with contextlib.suppress(ImportError):
    import zstandard  # noqa: F401


def source(*files, **fields):
    return make_source("files", DataConfig(source="files", files=tuple(str(f) for f in files), **fields))


def local(*files, **fields):
    """Return the texts of all documents."""
    return [item.text for item in source(*files, **fields).read() if isinstance(item, Document)]


def test_python_docs_is_megabytes_of_english_and_deterministic():
    first = [document.text for document in PythonDocs().read()]
    assert first == list(python_docs.documents())
    assert sum(map(len, first)) > 1_500_000
    text = "\n".join(first)
    assert text.count(" the ") > 10_000
    assert "Return a new" in text
    assert not any("\x00" in d for d in first)


def test_python_docs_skips_topics_that_are_sections_of_others():
    """Few paragraphs occur in two documents; unfiltered, a third of the topics are sections of others."""
    paragraphs = [{" ".join(p.split()) for p in d.split("\n\n") if len(p) > 80} for d in python_docs.documents()]
    seen: set[str] = set()
    repeated = total = 0
    for each in paragraphs:
        repeated += sum(len(p) for p in each & seen)
        total += sum(len(p) for p in each)
        seen |= each
    assert repeated / total < 0.05


def test_files_are_sorted_unique_and_split_at_separators(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"one\n<|endoftext|>\ntwo\r\nlines\n <|endoftext|> \r\n\n")
    (tmp_path / "a.txt").write_text("\ufefffirst <|endoftext|> inside a line\n")
    assert local(tmp_path / "*.txt", tmp_path / "b.txt") == [
        "first <|endoftext|> inside a line\n",
        "one\n",
        "two\r\nlines\n",
        "\n",
    ]
    assert len(local(tmp_path / "b.txt", separator="")) == 1
    assert local(tmp_path / "a.txt", tmp_path / "b.txt", document="line")[:3] == [
        "first <|endoftext|> inside a line",
        "one",
        "<|endoftext|>",
    ]


def test_file_name_with_brackets_is_not_a_pattern(tmp_path):
    (tmp_path / "notes [1].txt").write_text("here")
    assert local(tmp_path / "notes [1].txt") == ["here"]


def test_globs_and_folders_are_recursive(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "deep.txt").write_text("deep")
    (tmp_path / "x" / "notes.md.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "x" / "picture.png").write_bytes(b"\x89PNG")
    assert local(tmp_path / "**" / "*.txt") == ["deep"]
    assert local(tmp_path) == ["packed", "deep"]


def test_suffixes_are_compared_in_lower_case(tmp_path):
    (tmp_path / "BOOK.TXT").write_text("book")
    (tmp_path / "ROWS.JSONL").write_text('{"text": "row"}\n')
    (tmp_path / "Notes.Md.GZ").write_bytes(gzip.compress(b"notes"))
    (tmp_path / "More.Json.XZ").write_bytes(lzma.compress(b'[{"text": "more"}]'))
    (tmp_path / "PHOTO.JPG").write_bytes(b"\xff\xd8")
    assert local(tmp_path) == ["book", "more", "notes", "row"]
    assert local(tmp_path / "ROWS.JSONL") == ["row"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """As an unprivileged user: whoever runs the tests may be allowed to read everything."""
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("a")
    read = os.scandir

    def scandir(folder):
        if Path(folder).name in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return read(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the folder .*/texts/closed: Permission denied; change"):
        files.find_files([str(tmp_path / "texts")])
    (tmp_path / "texts" / "closed").rename(tmp_path / "texts" / "lost+found")  # of a file system, for its owner alone
    assert files.find_files([str(tmp_path / "texts")]) == [tmp_path / "texts" / "a.txt"]


def test_linked_folders_are_read_once(tmp_path):
    inner, outer = tmp_path / "texts" / "inner", tmp_path / "outer"
    inner.mkdir(parents=True)
    outer.mkdir()
    (inner / "a.txt").write_text("inner")
    (outer / "b.txt").write_text("outer")
    (tmp_path / "texts" / "linked").symlink_to(outer)
    assert local(tmp_path / "texts") == local(tmp_path / "texts" / "**" / "*.txt") == ["inner", "outer"]
    (outer / "back").symlink_to(tmp_path / "texts")
    (inner / "again").symlink_to(outer)
    assert sorted(local(tmp_path / "texts")) == ["inner", "outer"]
    (tmp_path / "alias").symlink_to(tmp_path / "texts")
    assert sorted(local(tmp_path / "alias")) == ["inner", "outer"]


UTF16 = "Привет, мир.\n" * 50


@pytest.mark.parametrize("encoding_errors", ["strict", "replace"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (UTF16.encode("utf-16"), r"looks like UTF-16; convert it, as in: iconv -f UTF-16 "),
        (codecs.BOM_UTF16_BE + UTF16.encode("utf-16-be"), "looks like UTF-16; "),
        (UTF16.encode("utf-32"), "looks like UTF-32; "),
        (UTF16.encode("utf-16-le"), r"looks like UTF-16 without a byte order mark; .*-f UTF-16LE "),
        (UTF16.encode("utf-16-be"), r"looks like UTF-16 without a byte order mark; .*-f UTF-16BE "),
        (gzip.compress(b"text", mtime=0), r"looks like a gzip file; .*suffix \.gz"),
        (bz2.compress(b"text"), "looks like a bzip2 file; unpack it"),
        (b"PK\x03\x04" + bytes(30), "looks like a zip archive"),
        (b"ARROW1\0\0" + bytes(30), "looks like an Arrow file; convert it to Parquet"),
        (b"Header\n\0\0\0\0", r"looks like binary data \(a NUL byte at offset 7\)"),
    ],
)
def test_binary_files_are_refused_with_their_format(tmp_path, data, message, encoding_errors):
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl").write_bytes(data)
    (tmp_path / "d.json").write_bytes(data)
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"{path.name} is not UTF-8 text.* it {message}"):
            local(path, encoding_errors=encoding_errors)


def test_nul_bytes_among_text_are_kept(tmp_path):
    """At odd offsets only, as in UTF-16."""
    text = "abc\0" * 1000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert local(tmp_path / "a.txt") == local(tmp_path / "b.txt.gz") == [text]


def test_tar_archive_is_refused(tmp_path):
    (tmp_path / "book.txt").write_text("A book. " * 1000)
    with tarfile.open(tmp_path / "books.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "book.txt", "book.txt")
    with pytest.raises(
        UserError, match=r"books\.tar\.gz is not UTF-8 text once decompressed: it looks like a tar archive"
    ):
        local(tmp_path / "books.tar.gz")


def test_whole_json_file_may_be_utf16(tmp_path):
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("utf-16"))
    assert local(tmp_path / "a.json") == [row["text"] for row in ROWS]


@pytest.mark.parametrize("path", ["", " "])
def test_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("private")
    with pytest.raises(UserError, match=r"data\.files: a path is empty"):
        local(path)
    with pytest.raises(UserError, match="a path is empty"):
        local("a.txt", path)
    with pytest.raises(UserError, match="names no source"):
        parse_weight(f"{path}=2")
    assert local(".") == ["private"]


def test_unreadable_files_are_reported(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"line\n<|endoftext|>\ncaf" + b"\xe9 au lait")
    (tmp_path / "broken.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-30])
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"no file matches .*nothing\*"):
        local(tmp_path / "nothing*")
    with pytest.raises(UserError, match=r"the folder .*pictures holds no \.txt"):
        local(tmp_path / "pictures")
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        local(tmp_path / "empty.txt")
    with pytest.raises(UserError, match=r"broken\.txt\.gz is damaged"):
        local(tmp_path / "broken.txt.gz")
    if zstandard := sys.modules.get("zstandard"):
        (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
        assert local(tmp_path / "b.txt.zst") == ["one two"]
        (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(bytes(range(65, 90)) * 99)[:-9])
        with pytest.raises(UserError, match=r"b\.txt\.zst is damaged: it ends in the middle"):
            local(tmp_path / "b.txt.zst")
    with pytest.raises(UserError, match=r"not UTF-8: byte 0xe9 at offset 22 \(line 3\).*encoding_errors replace"):
        local(tmp_path / "latin.txt")
    with pytest.raises(UserError, match=r"byte 0xe9 at offset 22 \(line 3\)"):
        local(tmp_path / "latin.txt", document="line")
    assert local(tmp_path / "latin.txt", encoding_errors="replace") == ["line\n", "caf\ufffd au lait"]


ROWS = [{"text": f"Row {i}, עברית 🙂.", "n": i} for i in range(7)]


def write_rows(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    if path.suffix == ".zst":
        pack = pytest.importorskip("zstandard").compress
    path.write_bytes(pack(data))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.xz", "a.jsonl.zst", "a.json"])
def test_json_lines_with_and_without_compression(tmp_path, name):
    write_rows(tmp_path / name, ROWS)
    assert local(tmp_path / name) == [row["text"] for row in ROWS]


def test_json_list_is_read_as_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert local(tmp_path / "a.json") == [row["text"] for row in ROWS]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=3)
    assert local(tmp_path / "a.parquet") == [row["text"] for row in ROWS]
    with pytest.raises(UserError, match=r"no column body \(columns: text, n\): .*--data.text_field"):
        local(tmp_path / "a.parquet", text_field="body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a valid Parquet file"):
        local(tmp_path / "b.parquet")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_parquet_with_text_that_is_not_utf8(tmp_path, pack):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"caf\xe9" if i in (1, 1500) else b"text %d" % i for i in range(2000)])
    table = pyarrow.table({"text": raw.view(pyarrow.string()), "n": list(range(2000))})
    parquet.write_table(table, tmp_path / "bad")
    path = tmp_path / ("a.parquet.gz" if pack is gzip.compress else "a.parquet")
    path.write_bytes(pack((tmp_path / "bad").read_bytes()))
    items = list(source(path).read())
    assert [item.text for item in items if isinstance(item, Document)] == [
        f"text {i}" for i in range(2000) if i not in (1, 1500)
    ]
    assert [item for item in items if isinstance(item, InvalidRow)] == [
        InvalidRow("column text is not UTF-8", f"{path} row {number}") for number in (2, 1501)
    ]
    replaced = local(path, encoding_errors="replace")
    assert len(replaced) == 2000
    assert (replaced[1], replaced[1500]) == ("caf\ufffd", "caf\ufffd")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines_that_are_not_utf8(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "two"}\n')
    assert [item for item in source(path).read() if isinstance(item, InvalidRow)] == [
        InvalidRow("a line is not UTF-8", f"{path} line 2")
    ]
    assert local(path) == ["one", "two"]
    assert local(path, encoding_errors="replace") == ["one", "caf\ufffd", "two"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[\n  {"text": "a"},\n  {"text": "b"},\n]\n', "line 3: a comma stands before a closing ]: remove it"),
        ('{\n  "text": "a",\n}\n', "line 2: a comma stands before a closing }: remove it"),
        ('[{"text": "a"} {"text": "b"}]', "line 1, column 16: Expecting ',' delimiter"),
        ("[" * 100_000, "it is nested too deeply"),
        ('[{"text": "caf\udce9"}]', "byte 0xe9 at offset 14 is not UTF-8"),
    ],
)
def test_damaged_json_file_is_refused_with_its_first_error(tmp_path, text, problem):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        local(path)
    assert str(error.value) == f"{path} is not valid JSON ({problem})"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_decompression_is_bounded(tmp_path, suffix, monkeypatch):
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(suffix) or pytest.importorskip("zstandard").compress
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(b"a" * 50_000_000))
    assert len(local(path)[0]) == 50_000_000  # small enough not to matter
    monkeypatch.setattr(files, "_ALWAYS_ALLOWED", 1 << 20)
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"a\.txt{suffix} decompresses to more than 300 times its size.*: .*unpack it"):
        local(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000
    monkeypatch.setattr(file_source, "MAX_DOCUMENT", 1000)
    (tmp_path / "b.txt").write_text("line\n" * 300)
    with pytest.raises(UserError, match=r"b\.txt has a document of more than .* GB, which is read as a whole"):
        local(tmp_path / "b.txt")


def test_blocks_of_a_file_give_the_documents_of_its_lines(tmp_path, monkeypatch):
    """Compare with a reader of single lines, with separators at and across the ends of blocks."""
    random = np.random.default_rng(0)
    pieces = ["---", "--", "-", "\n", "\r\n", " ", "é", "a", "\ufeff", " ---\n", "\n---\n", "\n---"]
    path = tmp_path / "a.txt"
    for size in (1, 2, 3, 5, 8, 100):
        monkeypatch.setattr(file_source, "_BLOCK", size)
        for _ in range(20):
            text = "".join(random.choice(pieces, int(random.integers(1, 14))))
            path.write_bytes(text.encode())
            expected = [[""]]
            for line in path.read_bytes().decode().splitlines(keepends=True):
                if line.strip() == "---":
                    expected.append([""])
                else:
                    expected[-1].append(line)
            documents = ["".join(lines) for lines in expected]
            documents = [documents[0].removeprefix("\ufeff"), *documents[1:]]
            if len(expected[-1]) == 1:
                documents.pop()
            assert [document.text for document in FileSource([str(path)], separator="---").documents(path)] == documents


def test_separators_among_text_are_warned_about(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("One.<|endoftext|>Two.\nThree.\n<|endoftext|>\nFour.<|endoftext|>\n")
    texts = source(path)
    for _ in range(2):
        assert len(list(texts.read())) == 2
    (message,) = caplog.messages
    assert message.startswith(f"{path}: <|endoftext|> stands 2 times among other text, where it does not end")
    assert message.endswith("as in sed 's/<|endoftext|>/\\n&\\n/g' OLD > NEW")


def test_separators_are_warned_about_where_each_line_is_a_document(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_text("One.<|endoftext|>Two.\n<|endoftext|>\nThree.\n")
    lines = FileSource([str(path)], per_line=True)
    for _ in range(2):
        assert [document.text for document in lines.read()] == ["One.<|endoftext|>Two.", "<|endoftext|>", "Three."]
    (message,) = caplog.messages
    assert message.startswith(f"{path}: <|endoftext|> stands 2 times in the text, where it does not end a document")
    assert len(list(FileSource([str(path)], separator="", per_line=True).read())) == 3
    assert len(caplog.messages) == 1


def test_invalid_rows_are_reported_with_their_location(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n\n{"body": "x"}\n[1]\nnonsense\n{"text": null}\n{"text": "too"}\n')
    items = list(source(path).read())
    assert [item.text for item in items if isinstance(item, Document)] == ["good", "too"]
    assert [(item.reason, item.location) for item in items if isinstance(item, InvalidRow)] == [
        ("column text is of type int, not text", f"{path} line 2"),
        ("column text is missing (columns: body)", f"{path} line 4"),
        ("a row is a list, not an object of columns", f"{path} line 5"),
        ("a line is not valid JSON", f"{path} line 6"),
        ("column text is empty (null), not text", f"{path} line 7"),
    ]


def test_reading_resumes_at_any_position(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree\n")
    write_rows(tmp_path / "c.jsonl.gz", ROWS[:3])
    local_files = source(tmp_path)
    assert len(list(local_files.read())) == 13
    for each in (local_files, PythonDocs()):
        reader = each.read()
        beginning = list(itertools.islice(each.read(), 20))  # all of the files
        for done, _ in zip(range(1, 15), reader, strict=False):
            position = json.loads(json.dumps(reader.position()))
            assert list(itertools.islice(each.read(position), 20 - done)) == beginning[done:]


def test_a_description_has_the_options_that_change_the_documents(tmp_path):
    """It is a part of the cache key: other columns of the same file are another text."""
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").write_text("text")
    mapper = RowMapper(text_column="body")
    plain = file_source.FileSource((str(tmp_path),)).describe()
    assert [len(entry) for entry in plain] == [3, 3]  # as versions before stored it
    changed = [
        file_source.FileSource((str(tmp_path),), **options).describe()
        for options in (
            {"mapper": mapper},
            {"mapper": RowMapper(template="{a}", response_column="b")},
            {"separator": "---"},
            {"per_line": True},
            {"encoding_errors": "replace"},
        )
    ]
    assert len({json.dumps(each) for each in [plain, *changed]}) == 6
    assert all(each[:2] == plain for each in changed)
    rows, text = str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")
    assert file_source.FileSource((rows,), per_line=True).describe() == plain[:1]  # not used for such files
    assert file_source.FileSource((text,), mapper).describe() == plain[1:]


def test_templates_map_rows_to_instructions():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    made = RowMapper(template="alpaca", response_column="output").to_document(Row(row, "here"))
    assert made.response == "2"
    assert "paired with an input" in made.text
    assert made.text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n")
    made = RowMapper(template="alpaca", response_column="output").to_document(Row({**row, "input": ""}, "here"))
    assert "Input" not in made.text
    assert made.text.endswith("### Instruction:\nAdd.\n\n### Response:\n")
    dolly = RowMapper(template="alpaca", response_column="response", aliases=(("input", "context"),))
    made = dolly.to_document(Row({"instruction": "Add.", "context": "1 + 1", "response": "2"}, "here"))
    assert (made.text.count("1 + 1"), made.response) == (1, "2")
    mine = RowMapper(template="Q: {q} {not a field}\nA:", response_column="a").to_document(
        Row({"q": "Why?", "a": " So."}, "here")
    )
    assert mine == Document("Q: Why? {not a field}\nA:", " So.")
    assert RowMapper(template="{q}", response_column="a").to_document(Row({"q": "x", "a": " "}, "")) == InvalidRow(
        "column a is empty", ""
    )
    assert (
        "column q is missing" in RowMapper(template="{q}", response_column="a").to_document(Row({"a": "x"}, "")).reason
    )


def test_missing_library_is_reported_with_its_extra():
    with pytest.raises(UserError, match=r"reading x\.parquet needs pyarroww, which is not installed: .*\[data\]"):
        import_optional("pyarroww", "reading x.parquet")


def test_weights_of_a_mixture():
    assert parse_weight("python-docs=0.3") == ("python-docs", 0.3)
    assert parse_weight("my/*.txt") == ("my/*.txt", 1.0)
    with pytest.raises(UserError, match="x is not a weight"):
        parse_weight("python-docs=x")
    with pytest.raises(UserError, match="0 is not a weight"):
        parse_weight("python-docs=0")
    with pytest.raises(UserError, match="' ' names no source"):
        parse_weight(" ")


def test_similar_texts_are_grouped_as_by_a_comparison_of_all_pairs():
    """The naive twin compares all windows of all pairs of texts."""
    random = np.random.default_rng(1)
    words = [f"word{i}" for i in range(5000)]
    for _ in range(20):
        texts = [" ".join(random.choice(words, random.integers(5, 120))) for _ in range(12)]
        for _ in range(8):  # copy a passage into another text
            a, b = random.integers(0, 12, 2)
            start, size = random.integers(0, 500), random.integers(0, 400)
            texts[b] += "\n  " + texts[a][start : start + size].replace(" ", "\n ")
        plain = [" ".join(text.split()) for text in texts]
        windows = [{text[i : i + 50] for i in range(len(text) - 49)} for text in plain]
        group = list(range(12))
        for a, b in itertools.permutations(range(12), 2):
            covered = {
                i + k for i in range(len(plain[a]) - 49) if plain[a][i : i + 50] in windows[b] for k in range(50)
            }
            if len(covered) >= 200:
                first, second = sorted((group[a], group[b]))
                group = [first if each == second else each for each in group]
        assert similar_groups(texts) == group
    assert similar_groups([]) == []
    assert similar_groups(["short", "short"]) == [0, 1]


def test_python_docs_and_python_qa_hold_out_the_same_modules():
    docs = {document.text: document.group for document in python_docs.PythonDocs().read()}
    module_text = dict(named for named in python_docs._named_documents() if named[0])
    assert docs[module_text["lzma"]] == docs[module_text["bz2"]] != docs[module_text["json"]]
    groups = {document.text: document.group for document in python_qa.PythonQA().read()}
    question = "Question: What does json.dumps do?\nAnswer: "
    assert groups[question] == docs[module_text["json"]]
    assert groups[question.replace("json.dumps", "bz2.open")] == docs[module_text["lzma"]]
