"""Conversations from rows to batches: ids, masks and bytes against a construction by hand."""

import gzip
import itertools
import json
import logging
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from slm_jax.chat.messages import Message
from slm_jax.config.schema import Config, DataConfig
from slm_jax.data.batches.best_fit import BestFitBatches, sequential_best_fit_batches
from slm_jax.data.batches.packed import PackedBatches, sequential_batches
from slm_jax.data.batches.padded import PaddedBatches, PaddedRows, sequential_padded_batches
from slm_jax.data.corpus import build, marks
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.corpus.disjoint import copy_without, find_exclusions, read_digests
from slm_jax.data.corpus.splitting import SourceSample
from slm_jax.data.mask_view import masked_lines, uses_color
from slm_jax.data.overlap import corpus_overlap
from slm_jax.data.prepare import describe_corpus
from slm_jax.data.sources.documents import Document, InvalidRow
from slm_jax.data.sources.registry import make_source, make_sources
from slm_jax.data.turns import boundary_ids, stream_pieces
from slm_jax.evaluation.heldout import _documents_of_stream, documents_of_files
from slm_jax.training import sample_texts
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.errors import UserError
from tests.data.test_corpus import ListSource
from tests.helpers import learned_tokenizer, tiny_config

NASTY = "<|end|> <|assistant|> <EOS> é🙂\n \ud800"


def conversations(count, seed=0):
    """Return conversations of one to four turns, some with a system message, one with names of special tokens."""
    random = np.random.default_rng(seed)
    result = []
    for number in range(count):
        messages = [Message("system", "Be Brief.\n")] if random.random() < 0.3 else []
        for turn in range(int(random.integers(1, 4))):
            words = int(random.integers(1, 40))
            messages.append(Message("user", f"Question {number}.{turn}? " + "why " * (words // 3)))
            messages.append(Message("assistant", f"Answer {number}: " + "because so " * words + NASTY * (number == 3)))
        if random.random() < 0.2:
            messages.append(Message("user", "Unanswered."))
        result.append(Document("", messages=tuple(messages)))
    return result


CHATS = conversations(60)


@pytest.fixture(scope="module")
def tokenizer():
    return learned_tokenizer([content for chat in CHATS for content in chat.strings])


@pytest.fixture(scope="module")
def corpora(tokenizer, tmp_path_factory):
    """Return corpora of the conversations by `loss_on`, in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "GROUP_SIZE", 900)
        patch.setattr(build, "SHARD_SIZE", 900)
        patch.setattr("slm_jax.data.corpus.splitting.SAMPLE_SIZE", 4000)
        folder = tmp_path_factory.mktemp("corpora")
        patch.setattr("slm_jax.data.corpus.encode.MIN_PARALLEL", 5000)
        for workers, loss_on in enumerate(("all", "response"), start=1):
            options = CorpusOptions(0.2, loss_on=loss_on)
            build_corpus(folder / loss_on, ListSource(CHATS), tokenizer, options, workers=workers)
        return {name: (folder / name, open_corpus(folder / name, tokenizer)) for name in ("response", "all")}


def by_hand(document, tokenizer):
    """Return (ids with <EOS>, is predicted, texts of the responses) of a conversation, written out."""
    turns = tokenizer.turn_ids
    ids, predicted, responses = [], [], []
    for role, content in document.messages:
        encoded = tokenizer.encode(content)
        is_response = role == "assistant"
        ids += [getattr(turns, role), *encoded, turns.end]
        predicted += [False, *[is_response] * (len(encoded) + 1)]
        responses += [content] if is_response else []
    return [*ids, tokenizer.eos_id], [*predicted, False], responses


def expected_rows(corpus, split, tokenizer):
    """Return `by_hand` of the documents of a split, in order."""
    stream = getattr(corpus, split)
    known = {tuple(by_hand(each, tokenizer)[0]): by_hand(each, tokenizer) for each in CHATS}
    starts = [0, *stream.ends[:-1].tolist()]
    return [known[tuple(stream[a:b].tolist())] for a, b in zip(starts, stream.ends.tolist(), strict=True)]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_ids_masks_bytes_and_turns(corpora, tokenizer, split, loss_on):
    folder, corpus = corpora[loss_on]
    stream = getattr(corpus, split)
    rows = expected_rows(corpus, split, tokenizer)
    assert len(stream.shards) > 1 or split == "validation"
    ids, predicted = (np.concatenate([row[k] for row in rows]) for k in (0, 1))
    assert (stream[:] == ids).all()
    assert (stream.response_mask(0, len(stream)) == predicted).all()
    mask = stream.prompt_mask(0, len(stream))
    assert mask is None if loss_on == "all" else (mask == ~predicted.astype(bool)).all()
    for a, b in [(3, 40), (len(stream) // 2, len(stream) - 1)]:  # across shards
        assert (stream.response_mask(a, b) == predicted[a:b]).all()
    contents = {tuple(by_hand(each, tokenizer)[0]): each for each in CHATS}
    texts = [row[2] if loss_on == "response" else contents[tuple(row[0])].strings for row in rows]
    sizes = [sum(len(text.encode("utf-8", "surrogatepass")) for text in each) for each in texts]
    assert stream.documents["bytes"].tolist() == sizes
    starts = [0, *stream.ends[:-1].tolist()]
    counted = [stream.num_bytes_between(a, b) for a, b in zip(starts, stream.ends.tolist(), strict=True)]
    assert counted == sizes
    assert stream.num_bytes == sum(sizes) == stream.num_bytes_between(0, len(stream))
    assert stream.num_turns == sum(len(row[2]) for row in rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["dtype"], manifest[split]["turns"]) == (4, "uint16", stream.num_turns)


def test_every_text_is_restored_and_no_text_becomes_a_turn(corpora, tokenizer):
    assert any(NASTY in "".join(each.strings) for each in CHATS)
    texts = []
    for stream in (corpora["response"][1].train, corpora["response"][1].validation):
        for a, b in zip([0, *stream.ends[:-1].tolist()], stream.ends.tolist(), strict=True):
            texts.append([tuple(each) for each in stream_pieces(stream, a, b, tokenizer, boundary_ids(tokenizer))])
    expected = [[(content, role == "assistant") for role, content in document.messages] for document in CHATS]
    assert sorted(texts) == sorted(expected)


def label_pairs(batch, into):
    """Add (input, label) of every predicted position."""
    known = batch["labels"] != IGNORE_INDEX
    into += zip(batch["input_ids"][known].tolist(), batch["labels"][known].tolist(), strict=True)


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("mode", ["packed", "segmented", "best-fit", "padded"])
def test_labels_are_the_responses(corpora, tokenizer, mode, loss_on):
    """Over an epoch each predicted token is a label once, after the token before it; bytes add up."""
    corpus = corpora[loss_on][1]
    expected = []
    for ids, predicted, _ in expected_rows(corpus, "train", tokenizer):
        pairs = zip([tokenizer.eos_id, *ids], ids, predicted, strict=False)
        expected += [(before, id_) for before, id_, is_label in pairs if is_label or loss_on == "all"]
    longest = int(np.diff(corpus.train.ends, prepend=0).max())
    length = longest if mode in ("padded", "best-fit") else 48
    if mode == "padded":
        batches = PaddedBatches(corpus.parts, 4, length, seed=1)
        epoch = batches.batches
        once = [batch for batch, _ in sequential_padded_batches(corpus.train, 3, length)]
    elif mode == "best-fit":
        batches = BestFitBatches(corpus.parts, 1, length, seed=1)
        epoch = batches.windows
        once = [batch for batch, _ in sequential_best_fit_batches(corpus.train, 3, length)]
    else:
        batches = PackedBatches(corpus.parts, 1, length, seed=1, segments=mode == "segmented")
        epoch = batches.windows
        once = list(sequential_batches(corpus.train, 3, length, mode == "segmented"))
    shuffled, in_order = [], []
    for step in range(epoch):
        label_pairs(batches.at(step), shuffled)
    for batch in once:
        label_pairs(batch, in_order)
    assert sorted(shuffled) == sorted(in_order) == sorted(expected)
    if mode in ("packed", "segmented"):
        assert in_order == expected
    assert sum(batches.num_bytes(step) for step in range(epoch)) == corpus.train.num_bytes
    # Nothing is cut; rows of so few texts have much padding.
    assert not [warning for warning in batches.warnings(epoch) if "padding" not in warning]


def test_a_segment_is_a_conversation(corpora, tokenizer):
    """The first token of each is predicted from position 0, whose input is the <EOS> before the conversation."""
    corpus = corpora["response"][1]
    starts = {tuple(row[0][:3]) for row in expected_rows(corpus, "train", tokenizer)}
    found = 0
    for batch in sequential_batches(corpus.train, 1, 256, segments=True):
        for at in np.flatnonzero(batch["positions"][0] == 0)[1:].tolist():
            if batch["positions"][0, at : at + 4].tolist() == [0, 1, 2, 3]:
                assert batch["input_ids"][0, at] == tokenizer.eos_id
                assert tuple(batch["input_ids"][0, at + 1 : at + 4].tolist()) in starts
                found += 1
    assert found > 10


def test_what_padded_rows_lose_is_counted(corpora, tokenizer):
    corpus = corpora["response"][1]
    rows = expected_rows(corpus, "train", tokenizer)
    for length in (20, 90, 200):
        ends = [
            [at for at, (now, after) in enumerate(itertools.pairwise(predicted)) if now and not after]
            for _, predicted, _ in rows
        ]
        firsts = [predicted.index(True) for _, predicted, _ in rows]
        skipped = sum(first >= length for first in firsts)
        lost = sum(sum(at >= length for at in each) for each, first in zip(ends, firsts, strict=True) if first < length)
        padded = PaddedRows(corpus.train, length)
        assert (padded.skipped, padded.truncated_turns()) == (skipped, lost)
        text = "\n".join(PaddedBatches(corpus.parts, 4, length, seed=0).warnings(1))
        assert (f"{lost:,} of {corpus.train.num_turns:,} turns of the assistant are truncated" in text) == (lost > 0)
        assert (f"{skipped:,} of {len(rows):,} conversations are skipped" in text) == (skipped > 0)
    with pytest.raises(UserError, match=r"raise --train\.sequence_length"):
        PaddedBatches(corpus.parts, 4, min(firsts), seed=0)


def test_held_out_responses_are_scored_and_compared(corpora, tokenizer):
    corpus = corpora["response"][1]
    rows = expected_rows(corpus, "validation", tokenizer)
    documents = _documents_of_stream(corpus.validation, tokenizer, "chats")
    assert documents.bytes_D.sum() == corpus.validation.num_bytes
    assert documents.words_D.tolist() == [sum(len(text.split()) for text in row[2]) for row in rows]
    for item, response, (ids, predicted, _) in zip(documents.items, documents.responses, rows, strict=True):
        scored = item.ids[item.first :][response].tolist()
        assert scored == [id_ for id_, is_label in zip(ids, predicted, strict=True) if is_label]
    overlap = corpus_overlap([corpus], tokenizer)
    characters = sum(len(" ".join(text.split())) for row in rows for text in row[2])
    assert (overlap.documents, overlap.whole, overlap.characters) == (len(rows), 0, characters)
    assert 0 < overlap.matched <= characters  # "because so" repeats in all of them


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_conversations_of_a_file_are_scored_like_those_of_a_corpus(corpora, tokenizer, loss_on, tmp_path):
    stream = corpora[loss_on][1].train
    expected = _documents_of_stream(stream, tokenizer, "chats")
    rows = ({"messages": [message._asdict() for message in chat.messages]} for chat in CHATS)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = documents_of_files(str(tmp_path / "chats.jsonl"), tokenizer, data=DataConfig(loss_on=loss_on))
    assert len(found.items) == len(CHATS)
    index = {item.ids.tobytes(): i for i, item in enumerate(found.items)}
    for i, (item, response) in enumerate(zip(expected.items, expected.responses, strict=True)):
        at = index[item.ids.tobytes()]
        assert found.items[at].first == item.first
        assert found.responses[at].tolist() == response.tolist()
        assert (found.bytes_D[at], found.words_D[at]) == (expected.bytes_D[i], expected.words_D[i])


def test_samples_of_a_run_with_conversations_are_replies(tokenizer, monkeypatch):
    """Prompts are messages of the user, and an empty one is a held-out question."""
    seen = {}

    def generate_ids(model, prompts, size, sampling, context, suppress, stop):
        seen.update(prompts=prompts, size=size, suppress=suppress)
        return [[*tokenizer.encode(f"Answer {i}."), stop[0]] for i in range(len(prompts))]

    monkeypatch.setattr(sample_texts, "generate_ids", generate_ids)
    monkeypatch.setattr(sample_texts, "has_conversations", lambda run: True)
    monkeypatch.setattr(sample_texts, "example_prompt", lambda run: "Why?")
    config = tiny_config(eval__prompts=["Hello <|end|>", ""], eval__sample_tokens=9)
    steps = SimpleNamespace(model=lambda params: None)
    texts = sample_texts.sampling_function(config, None, tokenizer, steps)({})
    assert texts == ["user: Hello <|end|>\n\nassistant: Answer 0.", "user: Why?\n\nassistant: Answer 1."]
    ids = tokenizer.turn_ids
    for prompt, text in zip(seen["prompts"], ("Hello <|end|>", "Why?"), strict=True):
        assert prompt == [tokenizer.eos_id, ids.user, *tokenizer.encode(text), ids.end, ids.assistant]
    assert ids.user in seen["suppress"]
    assert ids.end not in seen["suppress"]


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_the_mask_is_shown(corpora, tokenizer, loss_on):
    stream = corpora[loss_on][1].train
    known = {tuple(by_hand(each, tokenizer)[0]): each for each in CHATS}
    spans = list(itertools.pairwise([0, *stream.ends.tolist()]))
    start, end = next(span for span in spans if len(known[tuple(stream[slice(*span)].tolist())].messages) == 3)
    messages = known[tuple(stream[start:end].tolist())].messages
    names = {name: tokenizer.id2token[id_] for name, id_ in tokenizer.turn_ids._asdict().items()}
    assert messages[0].role == "system"
    marked = f"[[{messages[2].content}{names['end']}]]" if loss_on == "response" else None
    shown = "\n".join(masked_lines(stream, start, end, tokenizer))
    plain = "".join(f"{names[role]}{content}{names['end']}" for role, content in messages) + "<EOS>"
    assert shown.replace("[[", "").replace("]]", "") == plain
    assert (shown.count("[["), marked is None or marked in shown) == (1, True)
    if loss_on == "all":
        assert shown == f"[[{plain}]]"
    colored = "\n".join(masked_lines(stream, start, end, tokenizer, color=True))
    assert re.sub("\x1b\\[[0-9]+m", "", colored) == plain
    assert colored.count("\x1b[32m") == colored.count("\x1b[0m") > 0
    assert all(line.count("\x1b[32m") == line.count("\x1b[0m") for line in colored.split("\n"))


@pytest.mark.parametrize("beginnings", [60, 3])
def test_conversations_with_the_same_beginning_are_on_one_side(tokenizer, tmp_path, beginnings):
    """Unless there are few beginnings, such as one greeting."""
    chats = [
        Document("", messages=(Message("user", f"Question {n % beginnings}?"), Message("assistant", f"Answer {n}.")))
        for n in range(240)
    ]
    build_corpus(tmp_path / "corpus", ListSource(chats), tokenizer, CorpusOptions(0.2), workers=1)
    corpus = open_corpus(tmp_path / "corpus", tokenizer)
    sides = []
    for stream in (corpus.train, corpus.validation):
        spans = itertools.pairwise([0, *stream.ends.tolist()])
        texts = [stream_pieces(stream, a, b, tokenizer, boundary_ids(tokenizer)) for a, b in spans]
        sides.append({each[0].text for each in texts})
        assert len(texts) > 20
    assert len(sides[0] & sides[1]) == (0 if beginnings == 60 else 3)


def test_text_beside_conversations_stays_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    write_rows(tmp_path / "b.jsonl", map(openai, CHATS[:2]))
    config = DataConfig(mix=(str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")), format="chat")
    text, chats = (list(source.read()) for source, _ in make_sources(config))
    assert (text, chats) == ([Document("text")], CHATS[:2])


@pytest.mark.parametrize(
    "options",
    [
        {"data.source": "python-chat", "data.text_field": "body"},
        {"data.source": "python-chat", "data.format": "text"},
        {"data.source": "python-chat", "data.template": "{a}"},
        {"data.source": "dolly", "data.format": "dolly", "data.text_field": "x"},
        {"data.source": "dolly", "data.format": "preferences", "data.text_field": "x"},
        {"data.source": "dolly", "data.format": "chat", "data.template": "{a}"},
    ],
)
def test_options_without_effect_are_refused(options):
    with pytest.raises(UserError, match=r"leave (out|one out)"):
        Config.load("quickstart", **options)


def test_color_is_for_terminals(monkeypatch):
    class Stream:
        def __init__(self, is_terminal):
            self.isatty = lambda: is_terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert (uses_color(Stream(True)), uses_color(Stream(False))) == (True, False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not uses_color(Stream(True))


def test_documents_held_out_elsewhere_are_left_out(corpora, tokenizer, tmp_path):
    """Also if the other source has the same conversations as instructions of one turn."""
    single = [each for each in CHATS if len(each.messages) == 2]
    other = ListSource([Document(*each.strings, split="validation") for each in single] + [Document("x y " * 50)] * 2)
    build_corpus(tmp_path / "other", other, tokenizer, CorpusOptions(0.2), workers=1)
    folder = corpora["response"][0]
    exclusion = find_exclusions([read_digests(folder)[0], read_digests(tmp_path / "other")[0]])[0]
    copy_without(folder, tmp_path / "copy", exclusion)
    copy, whole = open_corpus(tmp_path / "copy", tokenizer, verify=True).train, corpora["response"][1].train
    kept = [tuple(row[0]) for row in expected_rows(corpora["response"][1], "train", tokenizer)]
    kept = [row for row in kept if row not in {tuple(by_hand(each, tokenizer)[0]) for each in single}]
    assert [id_ for row in kept for id_ in row] == copy[:].tolist()
    assert copy.num_turns < whole.num_turns
    assert copy.num_turns == json.loads((tmp_path / "copy" / "manifest.json").read_text())["train"]["turns"]


def write_rows(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def openai(document):
    return {"messages": [message._asdict() for message in document.messages]}


def sharegpt(document):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[role], "value": content} for role, content in document.messages]}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
@pytest.mark.parametrize("form", [openai, sharegpt])
def test_files_of_conversations(tmp_path, caplog, name, form):
    caplog.set_level(logging.INFO)
    chats = [each for each in CHATS if NASTY not in "".join(each.strings)]
    rows = list(map(form, chats))
    if name.endswith("parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), tmp_path / name)
    elif name == "a.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        write_rows(tmp_path / name, rows)
    source = make_source(str(tmp_path / name), DataConfig())
    assert list(source.read()) == chats
    title = "OpenAI format (column messages)" if form is openai else "ShareGPT format (column conversations)"
    assert f"conversations in {title}" in caplog.text
    reader = source.read()
    first = list(itertools.islice(reader, 7))
    assert first + list(source.read(reader.position())) == chats


def test_malformed_rows_are_reported_with_file_and_line(tmp_path, tokenizer):
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    write_rows(tmp_path / "a.jsonl", [openai(CHATS[0]), bad, openai(CHATS[1]), {"messages": 3}, bad])
    write_rows(tmp_path / "b.jsonl", [sharegpt(each) for each in CHATS[2:20]])  # another format
    source = make_source(str(tmp_path), DataConfig())
    build_corpus(tmp_path / "corpus", source, tokenizer, CorpusOptions(0.2), workers=1)
    lines = list(describe_corpus(open_corpus(tmp_path / "corpus", tokenizer)))
    assert "conversations with" in lines[0]
    assert "of responses to train on" in lines[0]
    assert "3 invalid rows skipped" in lines[-1]
    assert f"2 x no message is the assistant's (first: {tmp_path / 'a.jsonl'} line 2)" in lines[-1]
    assert (
        f"1 x column messages is of type int, not a list of messages (first: {tmp_path / 'a.jsonl'} line 4)"
        in lines[-1]
    )


def test_text_keeps_its_cache_key_and_bytes(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    write_rows(tmp_path / "a.jsonl", [{"text": f"Text {i}. " * 9, **openai(CHATS[i])} for i in range(30)])
    source = make_source(str(tmp_path / "a.jsonl"), DataConfig())
    assert [len(entry) for entry in source.describe()] == [3]  # path, size and time of the file, as before
    build_corpus(tmp_path / "corpus", source, tokenizer, CorpusOptions(0.2), workers=1)
    assert "the column text is read; --data.format chat reads the conversations in OpenAI format" in caplog.text
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["format"] == 3
    assert "turns" not in manifest["train"]
    assert not open_corpus(tmp_path / "corpus", tokenizer).train.has_prompts
    chat = make_source(str(tmp_path / "a.jsonl"), DataConfig(format="chat"))
    assert chat.describe() != source.describe()
    assert next(iter(chat.read())).messages == CHATS[0].messages


def test_conversations_are_refused_where_there_are_none(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"data.format asks for conversations, but .*a.txt is a text file"):
        make_source(str(tmp_path / "a.txt"), DataConfig(format="chat"))
    with pytest.raises(UserError, match=r"data.format chat makes conversations, but data.source python-docs is plain"):
        Config.load("quickstart", **{"data.format": "chat"})
    monkeypatch.setattr("slm_jax.data.corpus.splitting.SAMPLE_SIZE", 1000)
    late = ListSource([*[Document(f"Text {i}. " * 99) for i in range(5)], *CHATS])
    with pytest.raises(UserError, match=r"conversations begin after .* --data.mix"):
        build_corpus(tmp_path / "corpus", late, tokenizer, CorpusOptions(0.2), workers=1)
    sample = SourceSample(ListSource([InvalidRow("x", "y"), *CHATS]).read())
    assert sample.has_conversations()


@pytest.mark.parametrize(("size", "dtype"), [(2**15, np.uint16), (2**15 + 1, np.uint32), (2**31, np.uint32)])
def test_marks_leave_every_id_as_it_was(size, dtype):
    class Sized:
        vocab_size = size

    stored_dtype = marks.token_dtype(Sized(), marked=True)
    assert stored_dtype == dtype
    ids = np.array([0, 1, size - 1, size - 1, 0], np.int64).astype(np.int32)
    predicted = np.array([False, True, False, True, False])
    stored = marks.to_stored(marks.marked_ids(marks.EncodedChat(ids, predicted)), stored_dtype)
    assert (marks.without_marks(stored) == ids).all()
    assert (marks.is_marked(stored) == ~predicted).all()
