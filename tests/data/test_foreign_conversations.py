"""Conversations encoded with the chat templates of published models."""

import re

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")

from slm_jax.chat.messages import Message
from slm_jax.chat.template import ChatTemplate
from slm_jax.config.schema import Config
from slm_jax.data.batches.padded import sequential_padded_batches
from slm_jax.data.corpus.build import CorpusOptions, build_corpus
from slm_jax.data.corpus.corpus import open_corpus
from slm_jax.data.corpus.splitting import SourceCounts
from slm_jax.data.inspection import inspect_corpus, overlap_summary
from slm_jax.data.sources.documents import Document
from slm_jax.evaluation.heldout import _documents_of_stream
from slm_jax.utils.batch import IGNORE_INDEX
from slm_jax.utils.foreign_tokenizer import ForeignTokenizer
from tests.chat.test_foreign_template import END, make_files
from tests.data.test_corpus import ListSource

CHATS = [
    Document(
        "", messages=tuple([Message("user", f"Question {i}?"), Message("assistant", f"Answer {i}!")] * (1 + i % 3))
    )
    for i in range(40)
]
SYSTEM = Document("", messages=(Message("system", "Be brief."), *CHATS[0].messages))
REFUSES_SYSTEM = {"mistral"}
ENDS_WITH_EOS = {"mistral"}  # its turns end with the token that ends documents


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_stored_ids_and_masks_are_those_of_the_template(tmp_path, name):
    tokenizer = ForeignTokenizer.load(make_files(tmp_path, name) / "tokenizer.json")
    template = ChatTemplate.of(tokenizer)
    build_corpus(tmp_path / "corpus", ListSource([*CHATS, SYSTEM]), tokenizer, CorpusOptions(0.2), workers=1)
    corpus = open_corpus(tmp_path / "corpus", tokenizer, verify=True)
    counts = SourceCounts.from_json(corpus.manifests[0]["counts"])
    assert ("refuses the conversation" in counts.invalid_text()) == (name in REFUSES_SYSTEM)
    assert counts.invalid.total() == (name in REFUSES_SYSTEM)
    expected = {}
    for document in [*CHATS, *([] if name in REFUSES_SYSTEM else [SYSTEM])]:
        chat = template.encode(document.messages)
        ids, predicted = chat.ids.tolist(), chat.predicted.tolist()
        if name not in ENDS_WITH_EOS:
            ids, predicted = [*ids, tokenizer.eos_id], [*predicted, False]
        expected[tuple(ids)] = (predicted, document)
    found = 0
    for stream in (corpus.train, corpus.validation):
        starts = [0, *stream.ends[:-1].tolist()]
        for start, end, size in zip(starts, stream.ends.tolist(), stream.documents["bytes"].tolist(), strict=True):
            predicted, document = expected[tuple(stream[start:end].tolist())]
            assert stream.response_mask(start, end).tolist() == predicted
            responses = [content for role, content in document.messages if role == "assistant"]
            assert size == stream.num_bytes_between(start, end) == sum(map(len, responses))
            found += 1
        assert stream.num_turns == sum(
            len(expected[tuple(stream[a:b].tolist())][1].messages) // 2
            for a, b in zip(starts, stream.ends.tolist(), strict=True)
        )
    assert found == len(expected)
    labels = [batch["labels"] for batch, _ in sequential_padded_batches(corpus.train, 4, 200)]
    marked = np.count_nonzero(corpus.train.response_mask(0, len(corpus.train)))
    assert sum(np.count_nonzero(each != IGNORE_INDEX) for each in labels) == marked
    documents = _documents_of_stream(corpus.validation, tokenizer, "chats")
    assert documents.bytes_D.sum() == corpus.validation.num_bytes


@pytest.mark.parametrize("name", ["chatml", "mistral"])
@pytest.mark.parametrize("documents", [CHATS, [Document(f"Text {i}, with words. " * 9) for i in range(40)]])
def test_a_corpus_is_described_with_texts_and_names_of_tokens(tmp_path, name, documents):
    """`data inspect`: sizes, samples and the overlap of the splits."""
    tokenizer = ForeignTokenizer.load(make_files(tmp_path, name) / "tokenizer.json")
    folder = tmp_path / "corpus"
    build_corpus(folder, ListSource(documents), tokenizer, CorpusOptions(0.2), workers=1)
    corpus = open_corpus(folder, tokenizer, verify=True)
    text = "\n".join(inspect_corpus(folder, corpus, tokenizer, Config()))
    assert f"tokenizer of {tokenizer.vocab_size} ids, all checksums match" in text
    if documents is CHATS:
        # The template's end of a turn is predicted as well.
        assert re.search(rf"\[\[ ?Answer \d+!{re.escape(END[name])}", text)
        assert re.search(r"Question \d+\?", text)
    else:
        assert re.search(r"document 0: ' ?Text \d+, with words\.", text)
    assert "of the documents" in overlap_summary([corpus], None, tokenizer, Config())
