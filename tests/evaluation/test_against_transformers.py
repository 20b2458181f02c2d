"""Metrics of a model against its export in PyTorch transformers, one sentence at a time."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.9", reason="pip install -e '.[bench]'")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="pip install -e '.[bench]'")
pytest.importorskip("safetensors")

from slm_jax.evaluation import tasks  # noqa: E402  # after the check for torch
from slm_jax.evaluation.heldout import documents_of_files, measure_heldout  # noqa: E402
from slm_jax.evaluation.scoring import Scorer  # noqa: E402
from slm_jax.huggingface.export import export  # noqa: E402
from tests.huggingface.test_export import loaded_run  # noqa: E402
from tests.test_tokenizer.conftest import make  # noqa: E402

WORDS = "the old cat sat on a mat while seven dogs ran to Paris in France and nobody said why".split()


class Exported:
    """An exported model and tokenizer, loaded with transformers."""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def logprobs(self, ids, first):
        """Return the log-probabilities of ids[first:], float64 [n - first], and whether each is the greedy choice."""
        with torch.inference_mode():
            rows = self.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1).numpy()[first - 1 :]
        labels = np.array(ids[first:])
        return rows[np.arange(len(labels)), labels], rows.argmax(1) == labels

    def total(self, text):
        """Return the log-probability of a sentence, given the <EOS> that the tokenizer puts before it."""
        return self.logprobs(self.tokenizer(text).input_ids, 1)[0].sum()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A loaded run, and its export."""
    folder = tmp_path_factory.mktemp("exported")
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    loaded = loaded_run(folder, make(vocab_size=500), depth=2)
    yield loaded, Exported(export(loaded, folder / "out"))
    patch.undo()


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 12))).capitalize() for _ in range(count)]


@pytest.mark.slow
def test_blimp_and_lambada(both):
    loaded, exported = both
    scorer = Scorer(loaded.model, 128)  # longer than every text
    good, bad = texts(30), texts(30, seed=1)
    rows = [{"sentence_good": a, "sentence_bad": b} for a, b in zip(good, bad, strict=True)]
    hits = [exported.total(a) > exported.total(b) for a, b in zip(good, bad, strict=True)]
    (accuracy,) = tasks.measure_blimp(rows, loaded.tokenizer, scorer.score).metrics
    assert accuracy.estimate.value == np.mean(hits)
    assert 0 < sum(hits) < 30

    nats, greedy = [], []
    for text in good:
        context, _, word = text.rpartition(" ")
        before = exported.tokenizer(context).input_ids
        values, best = exported.logprobs(
            before + exported.tokenizer(f" {word}", add_special_tokens=False).input_ids, len(before)
        )
        nats.append(-values.sum())
        greedy.append(best.all())
    accuracy, perplexity = tasks.measure_lambada(
        [{"text": text} for text in good], loaded.tokenizer, scorer.score
    ).metrics
    assert accuracy.estimate.value == np.mean(greedy)
    assert perplexity.estimate.value == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)


@pytest.mark.slow
def test_heldout_text_in_windows(both, tmp_path):
    loaded, exported = both
    documents = [" ".join(texts(k, seed=k)) for k in (2, 9, 14)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(documents) + "\n")
    documents = [*(f"{text}\n" for text in documents)]
    scorer = Scorer(loaded.model, 24, stride=10)
    items = documents_of_files(str(tmp_path / "text.txt"), loaded.tokenizer)
    result = measure_heldout(items, loaded.tokenizer, scorer.score, 24, 10)
    values = {metric.name: metric.estimate.value for metric in result.metrics}
    nats, count = 0.0, 0
    for text in documents:
        ids = [*exported.tokenizer(text).input_ids, exported.tokenizer.eos_token_id]
        done = 0
        while done < len(ids) - 1:
            end = min(len(ids) - 1, max(24, done + 10))
            begin = max(0, end - 24)
            nats -= exported.logprobs(ids[begin : end + 1], done + 1 - begin)[0].sum()
            done = end
        count += len(ids) - 1
    assert count > 3 * 24
    assert values["loss"] == pytest.approx(nats / count, rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(len(t.encode()) for t in documents), rel=1e-4
    )
