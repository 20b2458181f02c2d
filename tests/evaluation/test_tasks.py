"""Each task against a slow reference: NumPy logits of one sentence at a time, summed in a loop."""

import json
import math

import numpy as np
import pytest

from slm_jax.config.schema import DataConfig
from slm_jax.data.corpus.stream import byte_table
from slm_jax.data.prepare import prepare
from slm_jax.evaluation import analogies, heldout, tasks
from slm_jax.evaluation.encoding import continuation_items
from slm_jax.evaluation.references import BLIMP_PARADIGMS
from slm_jax.evaluation.registry import TASKS
from slm_jax.evaluation.scoring import Item, Scorer, TokenScores
from slm_jax.run.directory import Run
from slm_jax.utils.errors import UserError
from slm_jax.utils.tokenizer_loading import load_tokenizer
from tests.evaluation.naive import NaiveModel
from tests.helpers import tiny_config, tiny_model
from tests.utils import foreign
from tokenizer import HybridTokenizer

TEXT = "".join(
    f"The old cat {i} sat on a mat; cats sit, dogs ran.\nParis is in France {i * 7 % 13}.\n" for i in range(60)
)


def trained_tokenizer(**options):
    tokenizer = HybridTokenizer()
    tokenizer.add_text(TEXT)
    tokenizer.freeze_vocab(vocab_size=330, **options)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer.vocab_size, depth=1, scale=3.0)


@pytest.fixture(scope="module")
def naive(model):
    return NaiveModel(model)


@pytest.fixture(scope="module")
def score(model):
    return Scorer(model, context=64, batch_tokens=1024).score


def eos_and(tokenizer, *texts):
    ids = [tokenizer.token2id["<EOS>"]]
    for text in texts:
        ids += tokenizer.encode(text)
    return np.array(ids)


def by_name(result):
    return {(metric.group, metric.name): metric for metric in result.metrics}


def test_blimp(tokenizer, naive, score):
    sentences = ["The cat sat.", "The cats sit.", "Dogs ran on a mat.", "A dog sat.", "Paris is old.", "cats in France"]
    rows = [
        {
            "sentence_good": good,
            "sentence_bad": bad,
            "UID": f"paradigm_{i % 3}",
            "linguistics_term": f"term_{i % 2}",
            "field": "syntax",
        }
        for i, (good, bad) in enumerate((a, b) for a in sentences for b in sentences if a != b)
    ]
    result = tasks.measure_blimp(rows, tokenizer, score)
    metrics = by_name(result)
    totals = {text: naive.total(eos_and(tokenizer, text)) for text in sentences}
    hits = [totals[row["sentence_good"]] > totals[row["sentence_bad"]] for row in rows]
    assert 0 < sum(hits) < len(rows)
    assert metrics["all", "accuracy"].estimate.value == sum(hits) / len(rows)
    assert metrics["all", "accuracy"].count == len(rows)
    name = "syntax / term_1 / paradigm_2"
    part = [
        hit
        for row, hit in zip(rows, hits, strict=True)
        if row["UID"] == "paradigm_2" and row["linguistics_term"] == "term_1"
    ]
    assert metrics[name, "accuracy"].estimate.value == sum(part) / len(part)
    assert {group.count(" / ") for group, _ in metrics} == {0, 1, 2}
    assert metrics["syntax", "accuracy"].estimate == metrics["all", "accuracy"].estimate
    assert "3 of 67 paradigms" in result.note
    assert len(set(BLIMP_PARADIGMS)) == 67


def test_lambada(tokenizer, naive, score):
    texts = [
        "The old cat 3 sat on a mat",
        "Paris is in France",
        "cats sit, dogs\nran",
        'He said "cats, “dogs',
        "A cat ",
    ]
    texts += [TEXT[: 40 * k].rstrip().rpartition(" ")[0] for k in (7, 9)]  # exceed the context
    result = tasks.measure_lambada([{"text": text} for text in texts], tokenizer, score)
    metrics = by_name(result)
    nats = []
    hits = []
    for text in texts:
        context, _, word = text.rstrip().rpartition(" ")
        ids = eos_and(tokenizer, context, f" {word}")
        first = len(eos_and(tokenizer, context))
        assert tokenizer.decode(ids[first:]) == f" {word}"
        assert ids[1:].tolist() == tokenizer.encode(text.rstrip())  # without phrases, the tokens of the complete text
        cut = max(0, len(ids) - 1 - 64)
        nats.append(-naive.total(ids[cut:], first - cut))
        hits.append(naive.greedy(ids[cut:], first - cut))
    assert metrics["all", "perplexity"].estimate.value == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)
    assert metrics["all", "accuracy"].estimate.value == np.mean(hits)
    assert f"(0 of {len(texts)} would" in result.note
    with pytest.raises(UserError, match="has only one word: 'Word '"):
        tasks.measure_lambada([{"text": "Word "}], tokenizer, score)


def test_greedy_continuations_count_as_right(tokenizer, naive, score):
    ids = eos_and(tokenizer, "The old cat")
    first = len(ids)
    for _ in range(6):
        ids = np.append(ids, naive.logprobs(np.append(ids, 0))[-1].argmax())
    other = ids.copy()
    other[-1] = (other[-1] + 1) % tokenizer.vocab_size
    assert [scores.greedy for scores in score([Item(ids, first), Item(other, first), Item(other, 1)])] == [
        True,
        False,
        False,
    ]


def test_boundaries_of_continuations():
    tokenizer = trained_tokenizer(phrases=0.3)
    pairs = [("The old cat ", "sat"), ("The old cat", " sat"), ("Paris is", " in France"), ("do", "g"), ("", "The")]
    continuations = continuation_items(tokenizer, pairs)
    for (context, rest), (ids, first) in zip(pairs, continuations.items, strict=True):
        assert tokenizer.decode(ids) == context + rest
        assert tokenizer.decode(ids[:first]) == context.rstrip()
    assert continuations.items[0].ids.tolist() == continuations.items[1].ids.tolist()
    encoded = [tokenizer.encode(context + rest) for context, rest in pairs]
    differ = [item.ids[1:].tolist() != joint for item, joint in zip(continuations.items, encoded, strict=True)]
    assert continuations.num_resplit == sum(differ) > 0


@pytest.mark.parametrize("kind", [foreign.byte_level, foreign.byte_fallback, foreign.metaspace, foreign.word_piece])
def test_continuations_have_the_ids_of_the_whole_text(tmp_path, kind):
    """Equal to what a foreign tokenizer makes of the text, so that SentencePiece adds no space at the boundary."""
    pytest.importorskip("tokenizers", reason="pip install -e '.[tokenizers]'")
    tokenizer = load_tokenizer(kind(tmp_path))
    text = "Line 3: a z q fox x sees y"
    pairs = [(text[:split], text[split:]) for split in range(len(text) + 1)]
    continuations = continuation_items(tokenizer, pairs)
    whole = [tokenizer.start_id, *tokenizer.encode(text)]
    num_other = 0
    separate = 0
    for (context, rest), (ids, first) in zip(pairs, continuations.items, strict=True):
        context_ids = tokenizer.encode(context.rstrip())
        assert ids[:first].tolist() == [tokenizer.start_id, *context_ids]
        if whole[1:first] == context_ids:
            assert ids.tolist() == whole
            separate += context_ids + tokenizer.encode(context[len(context.rstrip()) :] + rest) != whole[1:]
        else:
            num_other += ids.tolist() != whole
    assert continuations.num_resplit == num_other < len(pairs) - 10
    if kind in (foreign.byte_fallback, foreign.metaspace):
        assert separate > 0  # encoded on its own, the rest has a space that is not in the text


SCENE = {"activity_label": "Cats", "ctx_a": "The cat [header] sat.", "ctx_b": "it", "label": "1"}
SCIENCE = {"question": "Which ran?", "answerKey": "B"}


@pytest.mark.parametrize(
    ("name", "row", "context", "choices", "answer"),
    [
        (
            "hellaswag",
            SCENE | {"endings": ["ran  off.", " [title] sat"]},
            "Cats: The cat sat. It",
            ["ran off.", "sat"],
            1,
        ),
        (
            "piqa",
            {"goal": "Sit", "sol1": "on a mat", "sol2": "cats", "label": 0},
            "Question: Sit\nAnswer:",
            ["on a mat", "cats"],
            0,
        ),
        (
            "arc_easy",
            SCIENCE | {"choices": {"text": ["cats", "dogs", "a mat"], "label": ["A", "B", "C"]}},
            "Question: Which ran?\nAnswer:",
            ["cats", "dogs", "a mat"],
            1,
        ),
        ("choices", {"context": "The old", "choices": ["cat 5", "dogs"], "answer": 0}, "The old", ["cat 5", "dogs"], 0),
    ],
)
def test_multiple_choice(name, row, context, choices, answer, tokenizer, naive, score):
    metrics = by_name(TASKS[name].measure([row], tokenizer, score))
    first = len(eos_and(tokenizer, context))
    sums = np.array([naive.total(eos_and(tokenizer, context, f" {choice}"), first) for choice in choices])
    sizes = [len(choice.encode()) for choice in choices]
    assert metrics["all", "accuracy"].estimate.value == (sums.argmax() == answer)
    assert metrics["all", "accuracy_norm"].estimate.value == ((sums / sizes).argmax() == answer)
    assert metrics["all", "accuracy"].reference == f"chance {100 / len(choices):.0f} %"


GOOD = {
    "piqa": {"goal": "Sit", "sol1": "a", "sol2": "b", "label": 1},
    "choices": {"context": "Is it", "choices": ["yes", "no"], "answer": "1"},
    "hellaswag": {"activity_label": "A", "ctx_a": "a", "ctx_b": "", "endings": ["goes", "sits"], "label": "1"},
    "arc_easy": {"question": "Who?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("piqa", {"label": -1}, "answer -1 of 2 choices"),
        ("piqa", {"sol1": 3}, "sol1 is not text: 3"),
        ("piqa", {"goal": ["Sit"]}, "goal is not text"),
        ("choices", {"choices": "yes"}, "choices is not a list of texts: 'yes'"),
        ("choices", {"choices": ["yes", 1]}, "choices is not a list of texts"),
        ("choices", {"choices": ["yes"]}, "answer 1 of 1 choices"),
        ("choices", {"choices": ["yes", ""]}, "choice 1 is empty"),
        ("choices", {"choices": [" ", "no"]}, "choice 0 is empty"),
        ("choices", {"choices": ["yes", "no", " yes"]}, "choices 0 and 2 are the same"),
        ("choices", {"context": 1}, "context is not text: 1"),
        ("choices", {"answer": 1.7}, "answer is not an integer: 1.7"),
        ("choices", {"answer": True}, "answer is not an integer: True"),
        ("choices", {"answer": "²"}, "answer is not an integer: '²'"),
        ("hellaswag", {"endings": "goes"}, "endings is not a list of texts: 'goes'"),
        ("hellaswag", {"ctx_b": 3}, "ctx_b is not text: 3"),
        ("hellaswag", {"label": ""}, "label is not an integer: ''"),
        ("arc_easy", {"choices": {"text": "abcd", "label": "ABCD"}}, "text is not a list of texts: 'abcd'"),
        ("arc_easy", {"choices": {"text": ["a", "b"]}}, "label is not a list of texts: None"),
        ("arc_easy", {"choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}}, "labels A, B of 3 choices"),
        ("arc_easy", {"choices": ["a", "b"]}, "choices is not an object"),
        ("arc_easy", {"answerKey": "C"}, "answer C is not one of the labels A, B of 2 choices"),
    ],
)
def test_an_invalid_question_raises(name, values, message, tokenizer, score):
    TASKS[name].measure([GOOD[name]], tokenizer, score)
    with pytest.raises(UserError, match=f"record 2 is not a valid question: .*{message}"):
        TASKS[name].measure([GOOD[name], GOOD[name] | values], tokenizer, score)


@pytest.mark.parametrize("values", [{"field": 3}, {"UID": ["a"]}, {"linguistics_term": {}}])
def test_blimp_categories_must_be_text(values, tokenizer, score):
    row = {"sentence_good": "The cat sat.", "sentence_bad": "The cat sit.", "UID": None}
    assert by_name(tasks.measure_blimp([row], tokenizer, score)).keys() == {("all", "accuracy")}
    with pytest.raises(UserError, match=f"record 2: {next(iter(values))} is not text: "):
        tasks.measure_blimp([row, row | values], tokenizer, score)


def test_analogies_against_a_naive_search(tmp_path, tokenizer):
    file = tmp_path / "questions.txt"
    file.write_text(": one\ncat cats dog dogs\nsat sit ran run\n: two\nParis France Rome Italy\nmat mats cat cats\n")
    questions = analogies.read_questions(str(file))
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(tokenizer.vocab_size, 16)).astype(np.float32)
    metrics = by_name(analogies.measure_analogies(questions, tokenizer, embedding))
    marks = {tokenizer.token2id[name] for name in ("<UP>", "<CAPS>")}

    def vector(word):
        pieces = [embedding[i] for i in tokenizer.encode(f" {word}") if i not in marks]
        mean = np.mean(pieces, axis=0, dtype=np.float64)
        return mean / np.linalg.norm(mean)

    def cos(a, b):
        return float(vector(a) @ vector(b))

    hits = {"accuracy_3cosadd": [], "accuracy_3cosmul": []}
    lines = [line.split() for line in file.read_text().splitlines() if line[0] != ":"]
    for a, b, c, d in lines:
        others = [word for word in questions.words if word not in (a, b, c)]
        hits["accuracy_3cosadd"].append(d == max(others, key=lambda w: cos(w, b) - cos(w, a) + cos(w, c)))
        hits["accuracy_3cosmul"].append(
            d == max(others, key=lambda w: (1 + cos(w, b)) * (1 + cos(w, c)) / 4 / ((1 + cos(w, a)) / 2 + 0.001))
        )
    for metric, of in hits.items():
        assert metrics["all", metric].estimate.value == np.mean(of)
        assert metrics["two", metric].estimate.value == np.mean(of[2:])
    single = [all(len(set(tokenizer.encode(f" {word}")) - marks) == 1 for word in words) for words in lines]
    assert any(single) == (("words of one token", "accuracy_3cosadd") in metrics)
    file.write_text(": one\ncat cats dog\n")
    with pytest.raises(UserError, match="line 2 is not a question: 'cat cats dog'"):
        analogies.read_questions(str(file))


def test_exact_analogies_are_predicted(tokenizer):
    words = ["cat", "cats", "dog", "dogs", "mat", "mats"]
    stems = {"cat": (1, 0, 0, 0), "dog": (0, 1, 0, 0), "mat": (0, 0, 1, 0)}
    vectors = np.array([np.add(stems[w.rstrip("s")], (0, 0, 0, w.endswith("s"))) for w in words], np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = np.array([[0, 1, 2, 3], [2, 3, 4, 5], [1, 0, 5, 4]])
    for given in analogies.predict(index, vectors):
        assert given.tolist() == [3, 5, 4]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs with a corpus but without a model."""
    folder = tmp_path_factory.mktemp("held")
    lines = [{"instruction": f"Add {i}", "input": "", "output": f"It is {i}, the cat said."} for i in range(40)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text("<|endoftext|>\n".join(TEXT[i : i + 300] + "\n" for i in range(0, len(TEXT), 100)))
    runs = {}
    for name, fields in {
        "text": {"files": (str(folder / "text.txt"),)},
        "tasks": {"files": (str(folder / "tasks.jsonl"),), "template": "alpaca"},
    }.items():
        run = Run(folder / name)
        run.path.mkdir()
        fields = {f"data.{key}": value for key, value in fields.items()} | {"data.cache": str(folder / "cache")}
        config = tiny_config(**{"tokenizer.vocab_size": 330, "data.validation_fraction": 0.2, **fields})
        runs[name] = (run, prepare(config, run)[0])
    return runs


@pytest.mark.parametrize("name", ["text", "tasks"])
def test_heldout_text(runs, name):
    run, tokenizer = runs[name]
    model = tiny_model(tokenizer.vocab_size, depth=1, scale=3.0)
    naive = NaiveModel(model)
    scorer = Scorer(model, context=512, batch_tokens=2048)
    documents = heldout.documents_of_run(run, tokenizer)
    assert len(documents.items) >= 4
    result = heldout.measure_heldout(documents, tokenizer, scorer.score, 512, 256)
    metrics = by_name(result)
    sums = np.zeros(6)  # nats, tokens, top 1, top 5, bytes, words
    eos = tokenizer.token2id["<EOS>"]
    for ids, first in documents.items:
        assert ids[0] == ids[-1] == eos
        rows = naive.logprobs(ids)[first - 1 :]
        labels = ids[first:]
        own = rows[np.arange(len(labels)), labels][:, None]
        text = tokenizer.decode(ids[first:])
        assert name == "text" or text.endswith(" the cat said.")
        sums += (
            -own.sum(),
            len(labels),
            (rows <= own).all(1).sum(),
            ((rows > own).sum(1) < 5).sum(),
            len(text.encode()),
            len(text.split()),
        )
    expected = {
        "loss": sums[0] / sums[1],
        "perplexity": math.exp(sums[0] / sums[1]),
        "word_perplexity": math.exp(sums[0] / sums[5]),
        "bits_per_byte": sums[0] / math.log(2) / sums[4],
        "top1_accuracy": sums[2] / sums[1],
        "top5_accuracy": sums[3] / sums[1],
    }
    for metric, value in expected.items():
        estimate = metrics["all", metric].estimate
        assert estimate.value == pytest.approx(value, rel=1e-3), metric
        assert estimate.low <= estimate.value <= estimate.high
    assert f"{sums[4]:,.0f} bytes" in result.note


def test_files_instead_of_the_heldout_text(tmp_path, tokenizer, score):
    texts = ["The cat sat 1.\n", "Dogs ran; ü.\n", "cats " * 50]
    (tmp_path / "held.txt").write_text("<|endoftext|>\n".join(texts))
    documents = heldout.documents_of_files(str(tmp_path / "held.txt"), tokenizer)
    assert [tokenizer.decode(ids) for ids, _ in documents.items] == texts
    assert documents.bytes_D.tolist() == [len(text.encode()) for text in texts]
    assert len(heldout.documents_of_files(str(tmp_path / "held.txt"), tokenizer, max_tokens=20).items) < 3
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="contains no text"):
        heldout.documents_of_files(str(tmp_path / "empty.txt"), tokenizer)


def test_files_are_read_with_the_options_of_the_run(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO", "slm_jax")
    rows = [{"instruction": f"Cat {i}?", "output": f"mat {i}", "text": f"Dogs {i}"} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def decoded(**options):
        documents = heldout.documents_of_files(str(path), tokenizer, data=DataConfig(**options))
        return [(tokenizer.decode(ids[1:first]), tokenizer.decode(ids[first:-1])) for ids, first in documents.items]

    template = {"template": "Q: {instruction}", "response_field": "output"}
    assert decoded(**template) == [(f"Q: Cat {i}?", f"mat {i}") for i in range(3)]
    assert decoded(**template, loss_on="all") == [("", f"Q: Cat {i}?mat {i}") for i in range(3)]
    assert decoded(text_field="output") == [("", f"mat {i}") for i in range(3)]
    assert decoded() == [("", f"Dogs {i}") for i in range(3)]
    assert decoded(text_field="story") == [("", f"Dogs {i}") for i in range(3)]
    assert "has no column story: its column text is read" in caplog.text
    (tmp_path / "plain.txt").write_text("Cats sit.\n")  # the model of a run with conversations reads plain text, too
    chat = DataConfig(format="chat")
    assert len(heldout.documents_of_files(str(tmp_path / "plain.txt"), tokenizer, data=chat).items) == 1


def test_segments_of_a_long_document_add_up(tokenizer):
    ids = tokenizer.encode_array(TEXT * 40)
    assert ids.size > 2 * 4096
    rng = np.random.default_rng(0)
    scores = TokenScores(-rng.gamma(2, 1, ids.size).astype(np.float32), rng.integers(0, 9, ids.size))
    parts = heldout._segment_sums(ids, scores, len((TEXT * 40).encode()), 12345, byte_table(tokenizer))
    assert len(parts) == -(-ids.size // 4096)
    expected = [
        -scores.total,
        ids.size,
        (scores.ranks == 0).sum(),
        (scores.ranks < 5).sum(),
        len((TEXT * 40).encode()),
        12345,
    ]
    np.testing.assert_allclose(parts.sum(0), expected, rtol=1e-9)
