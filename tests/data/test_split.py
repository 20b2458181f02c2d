"""The split of a source: whole documents by their hash, few long ones cut once with a gap, up to a cap."""

import itertools

import numpy as np
import pytest

from slm_jax.data.corpus import build, writing
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.corpus.plan import SplitPlan, cut_document, make_plan, split_digest
from slm_jax.data.corpus.splitting import SourceCounts, SplitAssigner
from slm_jax.data.sources import documents as sources
from slm_jax.data.sources.documents import Document
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_windows import text_digest
from tests.data.test_corpus import Killed, ListSource, contents
from tests.helpers import learned_tokenizer


def document(number, size):
    """Return a document of about a number of characters, with words that no other one has."""
    line = f"Line {{}} of document {number}.\n"
    return Document("".join(itertools.islice(map(line.format, itertools.count()), max(1, size // 24))))


def split(documents, fraction=0.05, max_held_out=0):
    """Return (plan, texts of train, texts of validation, counts)."""
    plan = make_plan(documents, fraction)
    counts = SourceCounts()
    assigner = SplitAssigner(plan, max_held_out=max_held_out)
    texts = [text for each in documents for text in assigner.assign(each, counts)]
    train, validation = ([text for text in texts if text.split == name] for name in ("train", "validation"))
    return plan, train, validation, counts


def share(train, validation):
    sizes = [sum(len(text.text) for text in part) for part in (train, validation)]
    return sizes[1] / sum(sizes)


def test_long_documents_stay_whole():
    """Version 0.1.0 cut documents of more than 15,000 characters, and ended each part with an <EOS>."""
    documents = [document(i, 60_000 if i % 10 == 0 else 3000) for i in range(200)]
    plan, train, validation, counts = split(documents)
    assert not plan.cut
    assert sorted(text.text for text in train + validation) == sorted(each.text for each in documents)
    assert all(text.ends for text in train + validation)
    assert 0.0125 <= share(train, validation) <= 0.1
    assert counts.held_out == sum(len(text.text) for text in validation)


@pytest.mark.parametrize("sizes", [[5000] * 20, [5000] * 12, [9000] * 10 + [400] * 30, [90_000] + [1000] * 30])
def test_of_few_documents_whole_ones_are_held_out(sizes):
    """Also if the hash alone would hold out none, or too much."""
    for seed in range(10):
        documents = [document(f"{seed}-{i}", size) for i, size in enumerate(sizes)]
        plan, train, validation, _ = split(documents)
        assert not plan.cut
        assert {text.text for text in train + validation} == {each.text for each in documents}
        assert 0.0125 <= share(train, validation) <= 0.101
        assert split(documents[::-1])[0] == plan


@pytest.mark.parametrize("sizes", [[60_000], [5000] * 2, [5000] * 7, [500_000] + [300] * 30])
def test_where_whole_documents_do_not_fit_each_is_cut_once(sizes):
    documents = [document(i, size) for i, size in enumerate(sizes)]
    plan, train, validation, counts = split(documents)
    assert plan.cut == 0.05
    assert counts.cut == len(validation) == sum(len(each.text) > 3000 for each in documents)
    assert len(train) == len(documents)
    assert all(text.ends for text in train)
    assert not any(text.ends for text in validation)
    assert share(train, validation) == pytest.approx(0.05, rel=0.1)
    for text, part in ((each.text, part.text) for each in documents for part in validation if part.text in each.text):
        rest = next(each.text for each in train if text.endswith(each.text))
        gap = text[len(part) : -len(rest)]
        assert text == part + gap + rest
        assert 0 < len(gap) <= 1100
        assert part.endswith("\n")
        assert rest.startswith("Line ")
    assert counts.gaps == sum(len(each.text) for each in documents) - sum(len(t.text) for t in train + validation)


@pytest.mark.parametrize("size", [300, 3000])
def test_beginning_of_a_source_decides_about_no_more_than_it_shows(size):
    """More documents follow those of the sample: their hash decides, and the sample has both splits."""
    for seed in range(30):
        documents = [document(f"{seed}-{i}", size) for i in range(4)]
        plan = make_plan(documents, 0.2, complete=False)
        assert not plan.cut
        assert plan.limit == int(0.2 * 2**64)
        held_out = [plan.holds_out(split_digest(each)) for each in documents]
        assert 0 < sum(held_out) < 4
    assert make_plan([document(i, 1_200_000) for i in range(4)], 0.05, complete=False).cut == 0.05


def test_cuts_of_random_texts():
    random = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(random.choice(list("abc  \n"), random.integers(0, 3000)))
        fraction = random.uniform(0.001, 0.9)
        limit = int(random.integers(0, 400))
        parts = cut_document(text, fraction, limit)
        if parts is None:
            assert len(text) < 60 or 0 < limit < 20  # white space only
            continue
        assert text.startswith(parts.held_out)
        assert text.endswith(parts.rest)
        assert len(parts.held_out) + len(parts.rest) < len(text) or len(text) < 50
        assert len(parts.held_out) <= max(200, fraction * len(text) + 1)
        assert not limit or len(parts.held_out) <= limit


def test_instructions_are_never_cut():
    documents = [Document(f"Question {i}? " * 50, f"Answer {i}. " * 50) for i in range(3)]
    _, train, validation, counts = split(documents)
    assert (len(train), len(validation), counts.cut) == (2, 1, 0)


def test_all_of_a_source_is_not_held_out():
    with pytest.raises(UserError, match="all of the text would be held out"):
        make_plan([document(i, 500) for i in range(30)], 0.9999)


def test_documents_of_a_group_are_on_one_side():
    groups = [document(f"group {i}", 200).text for i in range(100)]
    documents = [Document(f"{i} {k} {text}", group=text) for i, text in enumerate(groups) for k in range(3)]
    _, train, validation, _ = split(documents, 0.1)
    sides = [{text.text.split(maxsplit=1)[0] for text in part} for part in (train, validation)]
    assert not sides[0] & sides[1]
    assert len(validation) == 3 * len(sides[1])
    # A cap does not divide a group either.
    _, _, capped, _ = split(documents, 0.1, max_held_out=1)
    assert capped == validation


def test_each_document_is_hashed_once(monkeypatch):
    hashed = []
    monkeypatch.setattr(sources, "text_digest", lambda text: hashed.append(text) or text_digest(text))
    documents = [document(i, 500) for i in range(60)]
    split(documents)
    assert hashed == [each.text for each in documents]


def test_white_space_makes_no_other_document():
    texts = ["a  b\n", " a b", "a\tb"]
    assert len({Document(text).digest for text in texts}) == 1
    assert Document("a b c").digest != Document("a bc").digest
    assert split_digest(Document("x", group="a b")) == Document("a b").digest
    documents = [document(i, 500) for i in range(60)]
    copies = [Document(f"\n{each.text.strip()}  ") for each in documents]
    _, train, validation, counts = split(documents + copies)
    assert len(train + validation) == 60
    assert counts.duplicates == 60


def test_held_out_text_is_capped():
    documents = [document(i, 500) for i in range(1000)]
    _, train, validation, _ = split(documents, 0.2)
    _, capped_train, capped, counts = split(documents, 0.2, max_held_out=10_000)
    assert capped == validation[: len(capped)]  # the first ones
    assert 10_000 <= counts.held_out < 10_500
    assert len(capped_train) + len(capped) == len(train) + len(validation) == 1000
    _, train, validation, counts = split([document(0, 500_000)], 0.2, max_held_out=10_000)
    assert 9000 < counts.held_out <= 10_000
    assert len(train) == len(validation) == 1


def test_plan_is_restored():
    plan = SplitPlan(2**63, (5, 7), 9, 0.05, 100, True)
    assert SplitPlan.from_json(plan.to_json()) == plan


@pytest.fixture(scope="module")
def tokenizer():
    return learned_tokenizer([document(0, 5000).text])


@pytest.mark.parametrize("sizes", [[40_000], [3000] * 300])
def test_eos_ends_documents_and_nothing_else(tmp_path, tokenizer, monkeypatch, sizes):
    """Also after kills at every write: the cut and the cap are functions of the source."""
    monkeypatch.setattr(build, "GROUP_SIZE", 4000)
    monkeypatch.setattr(build, "SHARD_SIZE", 20_000)
    documents = [document(i, size) for i, size in enumerate(sizes)]
    source, options = ListSource(documents), CorpusOptions(0.1, max_validation_characters=20_000)
    build_corpus(tmp_path / "a", source, tokenizer, options)
    corpus = open_corpus(tmp_path / "a", tokenizer)
    eos = tokenizer.token2id["<EOS>"]
    expected = dict(zip(("train", "validation"), split(documents, 0.1, 20_000)[1:3], strict=True))
    for name, stream in (("train", corpus.train), ("validation", corpus.validation)):
        ids = stream[0 : len(stream)]
        texts = [tokenizer.decode(part[part != eos].tolist()) for part in np.split(ids, stream.ends[:-1])]
        assert texts == [text.text for text in expected[name]]
        ended = [bool(part[-1] == eos) for part in np.split(ids, stream.ends[:-1])]
        assert ended == [text.ends for text in expected[name]]
        assert np.count_nonzero(ids == eos) == sum(ended)
        assert stream.num_bytes_between(0, len(stream)) == sum(len(text.encode()) for text in texts)
    write = writing._write_file
    for number in itertools.count(1):
        left = iter(range(number))

        def interrupted(path, content, left=left):
            if next(left, None) is None:
                raise Killed
            write(path, content)

        monkeypatch.setattr(writing, "_write_file", interrupted)
        try:
            build_corpus(tmp_path / "b", source, tokenizer, options)
            break
        except Killed:
            continue
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
