"""Documents that one corpus holds out are not trained on by another: mixtures, warm starts, parts of cut documents."""

import json

import numpy as np
import pytest

from slm_jax.config.schema import Config
from slm_jax.data.corpus import build
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.corpus.disjoint import (
    CorpusDigests,
    copy_without,
    find_exclusions,
    read_digests,
    trained_corpus_errors,
)
from slm_jax.data.prepare import describe_corpus, prepare
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from tests.data.test_corpus import TEXTS, ListSource, decoded
from tests.helpers import learned_tokenizer
from tokenizer import HybridTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return learned_tokenizer(TEXTS)


def test_exclusions_of_random_corpora_as_by_sets():
    random = np.random.default_rng(0)
    for _ in range(100):
        corpora = []
        for _ in range(4):
            digests = random.permutation(30)[: random.integers(5, 30)]
            held_out = random.integers(1, len(digests))
            train, validation = digests[held_out:].astype(np.uint64), digests[:held_out].astype(np.uint64)
            corpora.append(CorpusDigests(train, validation, {}))
        given, before = corpora[:2], corpora[2:]
        for index, exclusion in enumerate(find_exclusions(given, before)):
            train, validation = set(given[index].train.tolist()), set(given[index].validation.tolist())
            elsewhere = set().union(*(other.validation.tolist() for other in [given[1 - index], *before]))
            seen = validation & set().union(*(other.train.tolist() for other in before))
            assert set(exclusion.train.tolist()) == train & elsewhere
            assert exclusion.all_seen == (seen == validation)
            assert set(exclusion.validation.tolist()) == (set() if exclusion.all_seen else seen)


def test_copy_without_documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(build, "GROUP_SIZE", 500)
    monkeypatch.setattr(build, "SHARD_SIZE", 200)
    monkeypatch.setattr("slm_jax.data.corpus.splitting.SAMPLE_SIZE", 5000)  # no shard ends within the sample
    build_corpus(tmp_path / "a", ListSource(TEXTS), tokenizer, CorpusOptions(0.2))
    before = open_corpus(tmp_path / "a", tokenizer)
    digests = read_digests(tmp_path / "a")[0]
    shard = len(before.train.shards[2].documents)
    first = sum(len(each.documents) for each in before.train.shards[:2])
    dropped = np.sort(np.concatenate([digests.train[[1, -1]], digests.train[first : first + shard]]))  # a whole shard
    other = CorpusDigests(np.zeros(0, np.uint64), dropped, {})
    seen = CorpusDigests(digests.validation[3:4], np.zeros(0, np.uint64), {})
    (exclusion,) = find_exclusions([digests], [other, seen])
    copy_without(tmp_path / "a", tmp_path / "b", exclusion)
    after = open_corpus(tmp_path / "b", tokenizer, verify=True)
    texts = decoded(before.train, tokenizer)
    is_dropped = np.isin(digests.train, dropped)
    assert decoded(after.train, tokenizer) == [t for t, drop in zip(texts, is_dropped, strict=True) if not drop]
    texts = decoded(before.validation, tokenizer)
    assert decoded(after.validation, tokenizer) == texts[:3] + texts[4:]
    assert after.train.num_bytes == sum(len(text.encode()) for text in decoded(after.train, tokenizer))
    assert after.manifests[0]["excluded"] == {"all_seen": False, "train": shard + 2, "validation": 1}
    assert after.fingerprint != before.fingerprint
    assert len(after.train.shards) == len(before.train.shards) - 1
    shared = [(tmp_path / name / "train-00001.tokens.npy").stat().st_ino for name in "ab"]
    assert shared[0] == shared[1]
    lines = list(describe_corpus(after))
    assert f"{shard + 2} documents left out of training: held out elsewhere" in lines
    assert "1 held-out document left out of validation: the initial weights were trained on this text" in lines
    (everything,) = find_exclusions([digests], [CorpusDigests(digests.validation, digests.train, {})])
    assert everything.all_seen
    with pytest.raises(UserError, match="list: all of its training text is held out"):
        copy_without(tmp_path / "a", tmp_path / "c", everything)
    assert not list(tmp_path.glob("c*"))


def test_parts_of_a_document_that_is_cut(tmp_path, tokenizer):
    """The same cut is no conflict; a cut at another place, or the whole document, is one."""
    text = "".join(f"Line {i} of a novel.\n" for i in range(400))
    for name, documents, fraction in (
        ("same", [text], 0.1),
        ("longer", [text], 0.3),
        ("whole", [text, *TEXTS], 0.2),
    ):
        build_corpus(tmp_path / name, ListSource(documents), tokenizer, CorpusOptions(fraction))
    cut, longer, whole = (read_digests(tmp_path / name)[0] for name in ("same", "longer", "whole"))
    assert len(cut.cuts) == len(longer.cuts) == 1
    assert not whole.cuts
    assert all(exclusion.is_empty for exclusion in find_exclusions([cut, cut], [cut]))
    assert [len(exclusion.train) for exclusion in find_exclusions([cut, longer])] == [1, 1]
    side = "train" if np.isin(cut.train, whole.train).any() else "validation"
    exclusions = find_exclusions([cut, whole])
    assert [len(exclusion.train) for exclusion in exclusions] == ([0, 1] if side == "train" else [1, 0])
    assert find_exclusions([cut], [whole])[0].all_seen == (side == "train")


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def config(tmp_path, **fields):
    options = {"tokenizer.vocab_size": 350, "train.batch_size": 2, "train.sequence_length": 16}
    return Config.load(**options, **{"data.cache": str(tmp_path / "cache")}, **fields)


def prepared(tmp_path, name, **fields):
    run = Run(tmp_path / name)
    run.path.mkdir()
    given = config(tmp_path, **fields)
    run.save_config(given)
    return prepare(given, run)


def texts_of(corpus, tokenizer):
    return [[t.strip() for t in decoded(stream, tokenizer)] for stream in (corpus.train, corpus.validation)]


def test_mixture_trains_on_nothing_that_one_of_its_sources_holds_out(tmp_path):
    """With a cap, the second source would hold out other documents, since it has them in another order."""
    more = [text.replace("Document", "Another") for text in TEXTS]
    first = lines(tmp_path / "a.jsonl", TEXTS)
    second = lines(tmp_path / "b.jsonl", [f"\n {text}" for text in TEXTS[::-1] + more])
    tokenizer, corpus = prepared(tmp_path, "same", **{"data.mix": (first, second)})
    train, validation = texts_of(corpus, tokenizer)
    assert not set(train) & set(validation)
    assert all("excluded" not in manifest for manifest in corpus.manifests)  # equal texts are on one side anyway
    _, corpus = prepared(tmp_path, "capped", **{"data.mix": (first, second), "data.max_validation_characters": 600})
    train, validation = texts_of(corpus, tokenizer)
    assert not set(train) & set(validation)
    assert any(manifest["excluded"]["train"] for manifest in corpus.manifests if "excluded" in manifest)


def test_warm_start_neither_trains_on_held_out_text_nor_validates_on_what_was_trained_on(tmp_path):
    files = {"data.files": (lines(tmp_path / "a.jsonl", TEXTS),)}
    tokenizer, base = prepared(tmp_path, "base", **files)
    old_train, old_validation = texts_of(base, tokenizer)
    fields = files | {"init.from_run": str(tmp_path / "base")}
    _, same = prepared(tmp_path, "same", **fields)
    assert same.fingerprint == base.fingerprint
    for name, fraction in (("more", 0.4), ("less", 0.02)):
        run = Run(tmp_path / name)
        run.path.mkdir()
        given = config(tmp_path, **fields, **{"data.validation_fraction": fraction})
        _, corpus = prepare(given, run, str(tmp_path / "base" / "tokenizer.hybtok"))
        train, validation = texts_of(corpus, tokenizer)
        assert validation
        assert not set(train) & set(old_validation)
        assert not set(validation) & set(old_train)
    # A run after that one compares with both.
    Run(tmp_path / "more").save_config(config(tmp_path, **fields))
    shared = {"init.from_run": str(tmp_path / "more"), "data.files": (lines(tmp_path / "c.jsonl", old_validation),)}
    shared["data.validation_fraction"] = 0.3
    with pytest.raises(UserError, match=r"c\.jsonl: all of its training text is held out"):
        prepare(config(tmp_path, **shared), Run(tmp_path / "none"), str(tmp_path / "base" / "tokenizer.hybtok"))


def test_tokenizer_does_not_learn_from_what_another_source_holds_out(tmp_path, monkeypatch):
    learned = []
    monkeypatch.setattr(HybridTokenizer, "add_text", lambda self, text: learned.append(text.strip()))
    monkeypatch.setattr(HybridTokenizer, "freeze_vocab", lambda self, **_: (_ for _ in ()).throw(UserError("enough")))
    first, second = lines(tmp_path / "a.jsonl", TEXTS), lines(tmp_path / "b.jsonl", TEXTS[::-1])
    with pytest.raises(UserError, match="enough"):
        prepared(tmp_path, "run", **{"data.mix": (first, second), "data.max_validation_characters": 300})
    assert 150 < len(set(learned)) < len(TEXTS)
    held_out = {text.strip() for text in TEXTS} - set(learned)
    assert len(held_out) == 4 or len(held_out) == 3


def test_a_damaged_corpus_is_reported_not_compared(tmp_path, tokenizer):
    """Changed digests would let held-out text into the training text, with checksums of its own in the copy."""
    build_corpus(tmp_path / "a", ListSource(TEXTS), tokenizer, CorpusOptions(0.2))
    digests = read_digests(tmp_path / "a")[0]
    (exclusion,) = find_exclusions([digests], [CorpusDigests(digests.validation[:0], digests.train[:2], {})])
    for name in ("train-00000.documents.npy", "train-00000.tokens.npy"):
        file = tmp_path / "a" / name
        content = file.read_bytes()
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        for damaged in (flipped, content[:-1], content.replace(b"{", b"[", 1)):
            file.write_bytes(damaged)
            if "documents" in name:
                with pytest.raises(UserError, match=rf"a is damaged \({name}: .*remove that folder"):
                    read_digests(tmp_path / "a")
                with pytest.raises(UserError, match=r"a is damaged \(") as error, trained_corpus_errors():
                    read_digests(tmp_path / "a")
                assert "restore it from a backup" in str(error.value)
                assert "build it again" not in str(error.value)  # that needs the run that it belongs to
            with pytest.raises(UserError, match=rf"a is damaged \({name}: .*remove that folder"):
                copy_without(tmp_path / "a", tmp_path / "b", exclusion)
            assert not (tmp_path / "b").exists()
        file.write_bytes(content)
    copy_without(tmp_path / "a", tmp_path / "b", exclusion)
    assert open_corpus(tmp_path / "b", tokenizer, verify=True).train.num_documents == digests.train.size - 2
