"""Tokenizers of published models: equal to the package `tokenizers`, kept and restored byte for byte."""

import json
import shutil
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")

from slm_jax.checks import trained  # noqa: E402
from slm_jax.cli import generate as command  # noqa: E402
from slm_jax.generation.decode import encode_prompt, generate, generate_ids  # noqa: E402
from slm_jax.generation.sampling import Sampling  # noqa: E402
from slm_jax.serve.detokenizer import IncrementalDetokenizer  # noqa: E402
from slm_jax.utils.text_tokenizer import decode_continuation, document_prefix, save_tokenizer  # noqa: E402
from slm_jax.utils.tokenizer_files import tokenizer_file  # noqa: E402
from slm_jax.utils.tokenizer_loading import load_tokenizer  # noqa: E402
from tests.helpers import tiny_model  # noqa: E402
from tests.test_tokenizer.conftest import make  # noqa: E402
from tests.test_tokenizer.samples import EDGE_CASES, LANGUAGES  # noqa: E402
from tests.utils import foreign  # noqa: E402
from tokenizer import TokenizerError  # noqa: E402

TEXTS = [*LANGUAGES.values(), *EDGE_CASES, foreign.TEXT]


@pytest.fixture(scope="module", params=["byte level", "with a first token", "byte fallback"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    if request.param == "byte fallback":
        return foreign.byte_fallback(folder)
    return foreign.byte_level(folder, bos=request.param == "with a first token")


def without_surrogates(text):
    return "".join("\ufffd" if 0xD800 <= ord(character) < 0xE000 else character for character in text)


def test_ids_and_texts_equal_those_of_the_package(path):
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.vocab_size == theirs.get_vocab_size()
    arrays = ours.encode_arrays(TEXTS)
    for text, array in zip(TEXTS, arrays, strict=True):
        expected = theirs.encode(without_surrogates(text), add_special_tokens=False).ids
        assert ours.encode(text) == array.tolist() == expected
        assert array.dtype == np.int32
        assert ours.decode(array.tolist()) == theirs.decode(expected)


def test_texts_id_by_id_are_the_decoded_text(path):
    tokenizer = load_tokenizer(path)
    random = np.random.default_rng(0)
    rows = [*(tokenizer.encode(text)[:300] for text in TEXTS), *random.integers(0, tokenizer.vocab_size, (30, 40))]
    for row in rows:
        decoder = tokenizer.stream_decoder()
        parts = [decoder.push(id_) for id_ in row]
        assert "".join(parts) + decoder.finish() == tokenizer.decode(row)
    decoder = tokenizer.stream_decoder()
    smile = tokenizer.encode("🙃")
    assert "".join([*map(decoder.push, smile), decoder.push(tokenizer.encode("a")[-1])]).endswith("🙃a")
    assert len(smile) > 1


@pytest.mark.parametrize("kind", [foreign.byte_level, foreign.byte_fallback, foreign.metaspace, foreign.word_piece])
def test_a_continuation_is_what_its_ids_add_to_the_text(tmp_path, kind):
    """Split at every id: the decoded whole without the decoded context, as far as that has no incomplete character."""
    tokenizer = load_tokenizer(kind(tmp_path))
    splits = 0
    for text in (foreign.TEXT[:300], "Once upon a time.\nA dog", " two  spaces", "éü🙂 שלום"):
        prompt = [tokenizer.start_id, *tokenizer.encode(text)]
        whole = tokenizer.decode(prompt)
        for split in range(len(prompt) + 1):
            before = tokenizer.decode(prompt[:split])
            if "\ufffd" in before:
                continue
            assert decode_continuation(tokenizer, prompt[:split], prompt[split:]) == whole.removeprefix(before)
            detokenizer = IncrementalDetokenizer(tokenizer, context_ids=prompt[:split])
            detokenizer.append(prompt[split:])
            detokenizer.finish()
            assert detokenizer.release(final=True)[0] == whole.removeprefix(before)
            splits += before != "" and before + tokenizer.decode(prompt[split:]) != whole
    assert (splits > 0) == (kind != foreign.byte_level)  # ids that mean another text on their own


def test_words_stay_apart_after_a_context(tmp_path):
    tokenizer = load_tokenizer(foreign.byte_fallback(tmp_path))
    word = tokenizer.encode("t")
    assert [tokenizer.id2token[id_] for id_ in word] == ["\u2581", "t"]
    newline, first_byte = tokenizer.token2id["<0x0A>"], tokenizer.token2id["<0xC3>"]
    unknown = tokenizer.vocab_size + 3  # a row of the model without a token
    for context in (
        tokenizer.encode("Line"),
        [newline],
        [*tokenizer.encode("Line"), first_byte, 2],
        [newline, unknown],
    ):
        assert decode_continuation(tokenizer, context, word) == " t"
    for context in ([], [tokenizer.start_id], [first_byte], [unknown]):
        assert decode_continuation(tokenizer, context, word) == "t"


def test_generated_texts_are_what_their_ids_add_to_the_prompt(tmp_path, capsys):
    """Tested with the function, and with the command for one text and for several."""
    tokenizer = load_tokenizer(foreign.byte_fallback(tmp_path))
    suppress = [id_ for name, id_ in tokenizer.token2id.items() if not name.startswith("\u2581")]
    tokenizer.suppressed_ids = suppress
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    sampling = Sampling(temperature=3.0, seed=3)
    prompt_ids = encode_prompt(tokenizer, "Line 3")
    row = generate_ids(model, [prompt_ids], 30, sampling, 0, suppress, tokenizer.stop_ids)[0]
    expected = tokenizer.decode(prompt_ids + row).removeprefix("Line 3")
    assert generate(model, tokenizer, "Line 3", 30, sampling) == [expected]
    loaded = SimpleNamespace(model=model, tokenizer=tokenizer)
    options = command.Options(max_tokens=30, sampling=sampling, format="jsonl")
    command._generate_all(loaded, ["Line 3"], [prompt_ids], options, 0, suppress)
    assert json.loads(capsys.readouterr().out)["text"] == expected
    command._stream_one(loaded, "Line 3", prompt_ids, options, 0, suppress)
    assert capsys.readouterr().out == f"Line 3{expected}\n"
    assert expected == f" {tokenizer.decode(row)}"


def test_texts_of_checks_keep_the_space_before_their_first_word(tmp_path):
    tokenizer = load_tokenizer(foreign.byte_fallback(tmp_path))
    words = [id_ for name, id_ in tokenizer.token2id.items() if name.startswith("\u2581") and len(name) > 2][:5]
    row = trained.RowLoss(float(len(words)), len(words), np.array(words, np.int32), (words[0],))
    (detail,) = trained.per_sample([row], tokenizer, 1).details
    assert detail == f"1.000  {(' ' + tokenizer.decode(words))[:70]!r}"
    tokenizer.suppressed_ids = [id_ for name, id_ in tokenizer.token2id.items() if not name.startswith("\u2581")]
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    (detail,) = trained.greedy_text(model, tokenizer, encode_prompt(tokenizer, "Line 3"), 32, 4).details
    assert detail.startswith("' ")


def test_a_context_does_not_change_a_text_of_the_projects_tokenizer():
    tokenizer = make(vocab_size=330)
    random = np.random.default_rng(0)
    for _ in range(50):
        context, row = random.integers(0, tokenizer.vocab_size, (2, 20)).tolist()
        assert decode_continuation(tokenizer, context, row) == tokenizer.decode(row)


def test_the_bytes_of_tokens_add_up_to_those_of_the_text(path):
    tokenizer = load_tokenizer(path)
    for text in (foreign.TEXT, *LANGUAGES.values()):
        total = b"".join(tokenizer.token_bytes[id_] for id_ in tokenizer.encode(text))
        assert total.removeprefix(b" ") == text.encode().removeprefix(b" ")
    special = [id_ for id_, data in enumerate(tokenizer.token_bytes) if not data]
    assert all(tokenizer.decode([id_]) == "" for id_ in special)


def test_only_word_piece_marks_parts_of_words(tmp_path):
    words = load_tokenizer(foreign.word_piece(tmp_path / "words"))
    name = next(name for name in words.token2id if name.startswith("##"))
    assert words.token_bytes[words.token2id[name]] == name[2:].encode()
    path = foreign.metaspace(tmp_path / "heading")
    content = json.loads(path.read_text())
    content["model"]["vocab"].append(["##", -1.0])
    path.write_text(json.dumps(content))
    headings = load_tokenizer(path)
    assert headings.token_bytes[headings.token2id["##"]] == headings.decode([headings.token2id["##"]]).encode() == b"##"


def test_special_ids_are_those_of_the_files(tmp_path):
    plain = load_tokenizer(foreign.byte_level(tmp_path / "plain"))
    eos, turn = plain.token2id[foreign.EOS], plain.token2id[foreign.TURN]
    assert (plain.eos_id, plain.start_id, plain.pad_id, plain.stop_ids) == (eos, eos, eos, [eos, turn])
    assert document_prefix(plain) == []
    begun = load_tokenizer(foreign.byte_level(tmp_path / "begun", bos=True))
    assert document_prefix(begun) == [begun.token2id["<|begin|>"]]
    assert plain.encode(f"a{foreign.TURN}b") == [*plain.encode("a"), turn, *plain.encode("b")]
    assert plain.decode(plain.encode("a<tool>b")) == "a<tool>b"  # added, but not special
    assert plain.fingerprint != begun.fingerprint
    assert load_tokenizer(foreign.byte_fallback(tmp_path / "old")).start_id == 1
    # Where the tokenizer's own files are silent, the model's count.
    (tmp_path / "plain" / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "plain" / "tokenizer.json").eos_id == turn
    (tmp_path / "plain" / "generation_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"nothing says which token ends a text: give its eos_token"):
        load_tokenizer(tmp_path / "plain" / "tokenizer.json")


def test_a_folder_keeps_the_tokenizer_byte_for_byte(path, tmp_path):
    tokenizer = load_tokenizer(path)
    assert tokenizer_file(tmp_path).name == "tokenizer.hybtok"
    saved = save_tokenizer(tokenizer, tmp_path)
    assert saved == tokenizer_file(tmp_path)
    again = load_tokenizer(saved)
    assert again.files == tokenizer.files
    assert again.files["tokenizer.json"] == path.read_bytes()
    assert (again.fingerprint, again.stop_ids) == (tokenizer.fingerprint, tokenizer.stop_ids)
    first = saved.read_bytes()
    again.save(saved)
    assert saved.read_bytes() == first
    own = make(vocab_size=330)
    assert load_tokenizer(save_tokenizer(own, tmp_path / "..")).fingerprint == own.fingerprint


def test_damage_is_reported(path, tmp_path):
    saved = save_tokenizer(load_tokenizer(path), tmp_path)
    data = saved.read_bytes()
    for position in range(40, len(data), max(1, len(data) // 60)):
        saved.write_bytes(data[:position] + bytes([data[position] ^ 8]) + data[position + 1 :])
        try:
            same = load_tokenizer(saved)
        except TokenizerError:
            continue
        assert same.files == load_tokenizer(path).files  # a date, or another field without meaning
    saved.write_bytes(data[:100])
    with pytest.raises(TokenizerError, match="damaged"):
        load_tokenizer(saved)
    with pytest.raises(TokenizerError, match="there is no tokenizer"):
        load_tokenizer(tmp_path / "none.zip")
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(tmp_path / "none" / "tokenizer.json")
    shutil.copytree(path.parent, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged, or newer"):
        load_tokenizer(tmp_path / "copy" / "tokenizer.json")


@pytest.mark.parametrize("name", ["../escaped.txt", "/escaped.txt", "a/tokenizer.json", "config.json"])
def test_an_archive_has_no_other_files(path, tmp_path, name):
    """An export writes the files under their names, so that others could land outside of its folder."""
    saved = save_tokenizer(load_tokenizer(path), tmp_path)
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr(name, b"{}")
    with pytest.raises(TokenizerError, match=f"{saved} is damaged .it contains {name!r}, which is no file"):
        load_tokenizer(saved)


def test_an_archive_has_no_file_twice(path, tmp_path):
    saved = save_tokenizer(load_tokenizer(path), tmp_path)
    with zipfile.ZipFile(saved, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("tokenizer.json", b"{}")
    with pytest.raises(TokenizerError, match=f"{saved} is damaged .it contains 'tokenizer.json' twice"):
        load_tokenizer(saved)


@pytest.mark.parametrize("pad", [-1, 2**33, 2**32, True, 1.0, [[]], {}, "a", None, 4000])
def test_an_id_of_the_model_that_is_no_token_is_none(tmp_path, pad):
    path = foreign.byte_fallback(tmp_path)
    for valid in (None, 5):
        (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": pad if valid is None else [pad, valid]}))
        assert load_tokenizer(path).pad_id == valid
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [pad, 2, 7]}))
    assert load_tokenizer(path).stop_ids == [2, 7]


def write_archive(saved, changes, compression=zipfile.ZIP_DEFLATED):
    """Write an archive again with the contents of some files changed."""
    with zipfile.ZipFile(saved) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(saved, "w", compression) as archive:
        for name, content in (files | changes).items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_id": 99999999}, "eos_id has 99999999: the ids of this tokenizer are 0 to "),
        ({"start_id": -5}, "start_id has -5: the ids"),
        ({"pad_id": True}, "pad_id has True: the ids"),
        ({"eos_id": 1.0}, "eos_id has 1.0: the ids"),
        ({"stop_ids": [1, "2"]}, "stop_ids has '2': the ids"),
        ({"stop_ids": []}, "eos_id, [0-9]+, must be among them"),
        ({"stop_ids": 3}, "stop_ids is 3: it must be a list"),
    ],
)
def test_the_special_ids_of_an_archive_are_checked(path, tmp_path, changes, message):
    saved = save_tokenizer(load_tokenizer(path), tmp_path)
    with zipfile.ZipFile(saved) as archive:
        ids = json.loads(archive.read("slm_jax.json"))
    write_archive(saved, {"slm_jax.json": json.dumps(ids)})
    assert load_tokenizer(saved).eos_id == ids["eos_id"]
    write_archive(saved, {"slm_jax.json": json.dumps(ids | changes)})
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(saved)


def test_memory_for_an_archive_is_bounded(path, tmp_path):
    saved = save_tokenizer(load_tokenizer(path), tmp_path)
    original = saved.read_bytes()
    write_archive(saved, {"merges.txt": bytes(257 << 20)})
    assert saved.stat().st_size < 1 << 20
    with pytest.raises(TokenizerError, match=r"its files have 269,[0-9,]+ bytes; the limit is 268,435,456"):
        load_tokenizer(saved)
    # The same with a false size: no more than the stated size is inflated, whose check value is another one.
    saved.write_bytes(original)
    write_archive(saved, {"merges.txt": bytes(67_654_321)})
    size = (67_654_321).to_bytes(4, "little")
    assert saved.read_bytes().count(size) == 2
    saved.write_bytes(saved.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(TokenizerError, match="Bad CRC-32"):
        load_tokenizer(saved)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    saved.write_bytes(original)
    write_archive(saved, {}, zipfile.ZIP_BZIP2)
    with pytest.raises(TokenizerError, match="has the unknown compression 12"):
        load_tokenizer(saved)


@pytest.mark.parametrize("id_", [1 << 20, 4_000_000_000])
def test_a_vocabulary_has_a_largest_id(tmp_path, id_):
    path = foreign.byte_level(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["vocab"]["\u0120far"] = id_
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=rf"has {id_ + 1:,} ids: it must have 1 to 1,048,576"):
        load_tokenizer(path)
    content["model"]["vocab"]["\u0120far"] = (1 << 20) - 1
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).vocab_size == 1 << 20


def test_an_id_outside_the_vocabulary_is_an_error(path):
    tokenizer = load_tokenizer(path)
    for id_ in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match="is not an id of this tokenizer"):
            tokenizer.decode([1, id_])
