"""Word analogies by the embeddings: a is to b as c is to which word?

Among all words of the file except a, b and c, the answer is the one whose embedding is nearest to b - a + c (3CosAdd,
Mikolov et al. 2013), or the one with the largest cos(b)·cos(c) / cos(a) (3CosMul, Levy & Goldberg 2014). The embedding
of a word is the mean over its tokens as encoded after a space, without case marks. Questions whose words are all single
tokens are also reported separately.
"""

import lzma
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.data.sources.files import find_files, open_text
from slm_jax.evaluation.intervals import binomial_interval
from slm_jax.evaluation.results import Metric, TaskResult
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer

FORMAT = "lines of four words, and a line `: name` before each section"
_MAX_SCORES = 1 << 22  # scores in memory at a time
_EPSILON = 1e-3  # of Levy & Goldberg, against a division by zero


class Questions(NamedTuple):
    """Q questions of four words each.

    Attributes:
        words: The vocabulary of the file.
        index_Qx4: Indices into `words`, int [Q, 4]; the fourth is the answer.
        sections: Name of the section of each question.
    """

    words: list[str]
    index_Qx4: np.ndarray
    sections: list[str]

    def select(self, indices: list[int]) -> "Questions":
        """Return some of the questions; the candidate answers remain all words of the file."""
        return Questions(self.words, self.index_Qx4[indices], [self.sections[i] for i in indices])


def read_questions(pattern: str) -> Questions:
    """Read files in the format of word2vec's `questions-words.txt`, which may be compressed.

    Raises:
        UserError: A file cannot be read, a line is not a question, or there are no questions.
    """
    index: dict[str, int] = {}
    rows = []
    sections = []
    for path in find_files((pattern,)):
        section = path.name
        for number, line in enumerate(_read_lines(path), start=1):
            words = line.split()
            if words[:1] == [":"]:
                section = " ".join(words[1:])
            elif len(words) == 4:
                rows.append([index.setdefault(word, len(index)) for word in words])
                sections.append(section)
            elif words:
                raise UserError(f"{path} line {number} is not a question: {line[:80]!r}; expected {FORMAT}")
    if not rows:
        raise UserError(f"{pattern} contains no questions; expected {FORMAT}")
    return Questions(list(index), np.array(rows), sections)


def _read_lines(path: Path) -> list[str]:
    try:
        with open_text(path) as file:
            return file.read().decode("utf-8-sig").splitlines()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def word_vectors(
    words: list[str], tokenizer: TextTokenizer, embedding_VxD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the embeddings of words.

    Args:
        words: W words.
        tokenizer: The tokenizer of the model.
        embedding_VxD: The token embeddings of the model.

    Returns:
        The embeddings, float32 [W, D], of length 1; and a mask of the words that are single tokens, bool [W].
    """
    mark_names = ("<UP>", "<CAPS>")
    marks = [tokenizer.token2id[name] for name in mark_names if name in tokenizer.token2id]
    means = []
    is_single = []
    for word_ids in tokenizer.encode_arrays([f" {word}" for word in words]):
        ids = word_ids[~np.isin(word_ids, marks)]
        means.append(embedding_VxD[ids].mean(0))
        is_single.append(len(ids) == 1)
    vectors_WxD = np.array(means, np.float32)
    lengths_Wx1 = np.linalg.norm(vectors_WxD, axis=1, keepdims=True)
    return vectors_WxD / np.maximum(lengths_Wx1, 1e-12), np.array(is_single)


def predict(index_Qx4: np.ndarray, vectors_WxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predict the fourth word of each question from the first three.

    Args:
        index_Qx4: The questions, as indices of words.
        vectors_WxD: Embeddings of the words, of length 1.

    Returns:
        Indices of words, int [Q], by 3CosAdd and by 3CosMul.
    """
    cos_WxW = vectors_WxD @ vectors_WxD.T
    shifted_WxW = (1 + cos_WxW) / 2  # 3CosMul needs values that are not negative
    added: list[np.ndarray] = []
    multiplied: list[np.ndarray] = []
    step = max(1, _MAX_SCORES // len(vectors_WxD))
    for start in range(0, len(index_Qx4), step):
        given_Rx3 = index_Qx4[start : start + step, :3]
        a, b, c = given_Rx3.T
        add_RxW = cos_WxW[b] - cos_WxW[a] + cos_WxW[c]
        multiply_RxW = shifted_WxW[b] * shifted_WxW[c] / (shifted_WxW[a] + _EPSILON)
        for scores_RxW, answers in ((add_RxW, added), (multiply_RxW, multiplied)):
            np.put_along_axis(scores_RxW, given_Rx3, -np.inf, axis=1)
            answers.append(scores_RxW.argmax(1))
    return np.concatenate(added), np.concatenate(multiplied)


def measure_analogies(questions: Questions, tokenizer: TextTokenizer, embedding_VxD: np.ndarray) -> TaskResult:
    """Compute the accuracy of both methods over all questions, those of single-token words, and each section.

    Args:
        questions: The questions.
        tokenizer: The tokenizer of the model.
        embedding_VxD: The token embeddings of the model.
    """
    words, index_Qx4, sections = questions
    vectors_WxD, is_single_W = word_vectors(words, tokenizer, embedding_VxD)
    hits_2xQ = np.array(predict(index_Qx4, vectors_WxD)) == index_Qx4[:, 3]
    all_single_Q = is_single_W[index_Qx4].all(1)
    groups: dict[str, np.ndarray] = {"all": np.ones(len(index_Qx4), bool), "words of one token": all_single_Q}
    by_section: dict[str, list[int]] = defaultdict(list)
    for i, section in enumerate(sections):
        by_section[section].append(i)
    for section, indices in by_section.items():
        groups[section] = np.isin(np.arange(len(sections)), indices)
    chance = f"chance {100 / max(len(words) - 3, 1):.2f} %"
    metrics = []
    for group, members in groups.items():
        count = int(members.sum())
        if not count:
            continue
        for name, hits_Q in zip(("accuracy_3cosadd", "accuracy_3cosmul"), hits_2xQ, strict=True):
            metrics.append(Metric(group, name, binomial_interval(int(hits_Q[members].sum()), count), count, chance))
    note = (
        f"{len(words):,} words, {is_single_W.mean():.0%} of them single tokens, and {all_single_Q.mean():.0%} of the "
        f"{len(sections):,} questions of such words only; the embedding of other words is the mean over their tokens, "
        "so shared endings help; candidate answers are the words of the file"
    )
    return TaskResult(metrics, note)
