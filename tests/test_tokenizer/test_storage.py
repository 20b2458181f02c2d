"""The saved file: equal tokenizers give equal files, and everything invalid is rejected with a one-line error."""

import hashlib
import json
import random
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.test_tokenizer.conftest import make
from tests.test_tokenizer.samples import LANGUAGES
from tokenizer import HybridTokenizer, TokenizerError
from tokenizer.storage import content_of, parse, write


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "a.hybtok"
    make(phrases=0.1).save(path)
    return path.read_bytes()


def test_load_inverts_save(tok, tmp_path):
    path = tmp_path / "tok.hybtok"
    tok.save(path)
    again = HybridTokenizer.load(path)
    assert again.fingerprint == tok.fingerprint
    assert again.vocab_size == tok.vocab_size
    for text in LANGUAGES.values():
        assert again.encode(text) == tok.encode(text)
    assert again.top_merges(50) == tok.top_merges(50)
    again.save(tmp_path / "again.hybtok")
    assert (tmp_path / "again.hybtok").read_bytes() == path.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again.hybtok", "tok.hybtok"]


def test_every_truncation_is_rejected(saved):
    for length in [*range(64), *range(64, len(saved), 37), len(saved) - 1]:
        with pytest.raises(TokenizerError):
            parse(saved[:length], "truncated")
    with pytest.raises(TokenizerError):
        parse(saved + b"\0", "longer")


def test_every_flipped_bit_is_rejected(saved):
    source = random.Random(3)
    for _ in range(400):
        at = source.randrange(len(saved))
        damaged = bytearray(saved)
        damaged[at] ^= 1 << source.randrange(8)
        with pytest.raises(TokenizerError):
            parse(bytes(damaged), "damaged")


def _with_checksum(content: bytes, claimed: int | None = None) -> bytes:
    """Return a file with a correct checksum around any content."""
    size = len(content) if claimed is None else claimed
    packed = zlib.compress(content)
    version = 3 if b'"turns"' in content else 2 if b'"pattern"' in content else 1
    return struct.pack("<8sH32sI", b"HYBTOK\r\n", version, hashlib.sha256(packed).digest(), size) + packed


@pytest.mark.parametrize("portable", [False, True])
def test_damage_with_a_correct_checksum(saved, portable):
    """Fuzzed content gives a one-line error or a tokenizer that is still consistent."""
    vocabulary = make(portable=True)._vocabulary if portable else parse(saved, "original")
    content = content_of(vocabulary)
    assert parse(_with_checksum(content), "copy") == vocabulary
    source = random.Random(4)
    rejected = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(source.randrange(1, 4)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        try:
            tokenizer = HybridTokenizer.from_vocabulary(parse(_with_checksum(bytes(damaged)), "fuzzed"))
        except TokenizerError as error:
            rejected += "\n" not in str(error)
        else:
            text = LANGUAGES["english"]
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert rejected > 100


def test_letters_with_two_cases_are_rejected(saved):
    content = content_of(parse(saved, "original"))
    damaged = content.replace(b'"pairs":"aAb', b'"pairs":"aAA', 1)
    assert damaged != content
    with pytest.raises(TokenizerError, match="two cases"):
        parse(_with_checksum(damaged), "damaged")


def test_sizes_are_checked_before_memory_is_allocated():
    bomb = struct.pack("<8sH32sI", b"HYBTOK\r\n", 1, bytes(32), 0xFFFFFFFF) + zlib.compress(bytes(1 << 20))
    with pytest.raises(TokenizerError, match="claims"):
        parse(bomb, "bomb")
    with pytest.raises(TokenizerError, match="length"):
        parse(_with_checksum(bytes(50 << 20), claimed=1000), "bomb")
    for field, value in (
        ("alphabet", "x" * (20 << 20)),
        ("bases", [""] * (3 << 20)),
        ("bases", ["x" * 100]),
        ("pairs", "x" * (4 << 20)),
    ):
        fields = {"alphabet": "", "bases": [], "byte_limit": 4, "counts": 0, "lowercase": False, "merges": 0}
        text = json.dumps({**fields, "note": "", "pairs": "", "phrases": 0, field: value}).encode()
        file = _with_checksum(struct.pack("<I", len(text)) + text)
        assert len(file) < 100_000
        tracemalloc.start()
        with pytest.raises(TokenizerError, match="damaged"):
            parse(file, "bomb")
        assert tracemalloc.get_traced_memory()[1] < 6 * len(text) + (1 << 20)
        tracemalloc.stop()
    nested = b"[" * 100_000
    with pytest.raises(TokenizerError, match="malformed"):
        parse(_with_checksum(struct.pack("<I", len(nested)) + nested), "nested")
    # Entries that double in length with each merge: 2 ** 40 characters if they were built.
    header = b'{"alphabet":"","bases":[],"byte_limit":4,"counts":0,"lowercase":false,"merges":40,"note":"",'
    header += b'"pairs":"","phrases":0}'
    pairs = [265 + max(0, index) - 1 if index else 105 for index in range(40)]
    numbers = struct.pack("<80I", *pairs, *pairs)
    with pytest.raises(TokenizerError, match="characters long"):
        parse(_with_checksum(struct.pack("<I", len(header)) + header + numbers), "bomb")


def test_foreign_and_newer_files(tmp_path, saved):
    for data in (b"", b"hello", b"\x1f\x8b\x08\0" * 20, b'{"model": {}}' * 10):
        path = tmp_path / "foreign"
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match="not a tokenizer file"):
            HybridTokenizer.load(path)
    newer = bytearray(saved)
    newer[8] = 4
    with pytest.raises(TokenizerError, match="version 4"):
        parse(bytes(newer), "newer")
    newer[8] = 2
    with pytest.raises(TokenizerError, match="another kind"):
        parse(bytes(newer), "newer")
    with pytest.raises(TokenizerError, match="cannot read"):
        HybridTokenizer.load(tmp_path / "missing")
    with pytest.raises(TokenizerError, match="cannot write"):
        write(parse(saved, "original"), tmp_path / "no folder" / "x")


def test_portable_files_have_a_version_of_their_own(tmp_path, saved):
    """Programs that do not know portable tokenizers refuse version 2, instead of giving other ids."""
    vocabulary = make(portable=True, turn_tokens=False)._vocabulary
    write(vocabulary, tmp_path / "a.hybtok")
    data = (tmp_path / "a.hybtok").read_bytes()
    assert data[8:10] == b"\2\0"
    assert saved[8:10] == b"\3\0"
    assert parse(data, "again") == vocabulary
    content = content_of(vocabulary)
    for damage, message in (
        ((b"Unicode 15.1", b"Unicode 99.9"), "not known here"),
        ((b'"alphabet":""', b'"alphabet":"x"'), "damaged"),
        ((b'"lowercase":false', b'"lowercase":true'), "damaged"),
    ):
        damaged = content.replace(*damage)
        size = len(damaged) - len(content) + struct.unpack_from("<I", content)[0]
        with pytest.raises(TokenizerError, match=message):
            parse(_with_checksum(struct.pack("<I", size) + damaged[4:]), "damaged")


def test_merges_of_portable_files_join_bytes_and_earlier_merges():
    vocabulary = make(portable=True)._vocabulary
    for wrong in (5, vocabulary.first_base, vocabulary.size - 1):
        damaged = replace(vocabulary, merges=(*vocabulary.merges[:-1], (wrong, 40)))
        with pytest.raises(TokenizerError, match="is made of"):
            parse(_with_checksum(content_of(damaged)), "damaged")
    repeated = replace(vocabulary, merges=(*vocabulary.merges[:-1], vocabulary.merges[0]))
    with pytest.raises(TokenizerError, match="repeated"):
        parse(_with_checksum(content_of(repeated)), "damaged")
    named = replace(vocabulary, bases=("<EOS>", *vocabulary.bases[1:]))
    with pytest.raises(TokenizerError, match="repeated"):
        parse(_with_checksum(content_of(named)), "damaged")


def test_names_of_temporary_files_differ(tok, tmp_path, monkeypatch):
    """Also between hosts that share a folder, on which processes have equal ids."""
    names = []
    replace_path = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: names.append(path.name) or replace_path(path, target))
    for _ in range(2):
        tok.save(tmp_path / "a.hybtok")
    assert len(set(names)) == 2
    assert all(name.startswith("a.hybtok.") and name.endswith(".tmp") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["a.hybtok"]
