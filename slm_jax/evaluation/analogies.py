"""Analogies of word embeddings: a is to b as c is to which word?

Of all words of the file but a, b and c, the one whose embedding is nearest to b - a + c (3CosAdd, Mikolov et al. 2013),
or that has the greatest cos(b)·cos(c) / cos(a) (3CosMul, Levy & Goldberg 2014). A word's embedding is the mean of those
of its tokens, as it stands behind a space, case marks left out. Words of one token are told apart from all.
"""

import lzma
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_jax.data.sources.files import matching_files, open_binary
from slm_jax.evaluation.intervals import binomial
from slm_jax.evaluation.results import Figure, Measured
from slm_jax.utils.errors import UserError
from tokenizer import HybridTokenizer

COLUMNS = "lines of four words, and lines `: name` before each section"
_AT_ONCE = 1 << 22  # scores alive at a time
_EPSILON = 1e-3  # Levy & Goldberg's, against a division by zero


class Questions(NamedTuple):
    """Questions [Q] of four words each, as indices into words, and their sections."""

    words: list[str]
    index_Qx4: np.ndarray
    sections: list[str]

    def take(self, places: list[int]) -> "Questions":
        """Some of the questions; an answer is still sought among all words."""
        return Questions(self.words, self.index_Qx4[places], [self.sections[i] for i in places])


def read_questions(pattern: str) -> Questions:
    """Files as `questions-words.txt` of word2vec, also packed. Raises UserError on a line that is no question."""
    index: dict[str, int] = {}
    rows, sections = [], []
    for path in matching_files((pattern,)):
        section = path.name
        for number, line in enumerate(_lines(path), start=1):
            words = line.split()
            if words[:1] == [":"]:
                section = " ".join(words[1:])
            elif len(words) == 4:
                rows.append([index.setdefault(word, len(index)) for word in words])
                sections.append(section)
            elif words:
                raise UserError(f"{path} line {number} is no question: {line[:80]!r}; wanted are {COLUMNS}")
    if not rows:
        raise UserError(f"{pattern} holds no questions; wanted are {COLUMNS}")
    return Questions(list(index), np.array(rows), sections)


def _lines(path: Path) -> list[str]:
    try:
        with open_binary(path) as file:
            return file.read().decode("utf-8").splitlines()
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def word_vectors(
    words: list[str], tokenizer: HybridTokenizer, embedding_VxD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings float32 [W, D], each of length 1, and bool [W]: words that are one token."""
    names = ("<UP>", "<CAPS>")
    marks = [tokenizer.token2id[name] for name in names if name in tokenizer.token2id]
    vectors, single = [], []
    for ids in tokenizer.encode_arrays([f" {word}" for word in words]):
        ids = ids[~np.isin(ids, marks)]
        vectors.append(embedding_VxD[ids].mean(0))
        single.append(len(ids) == 1)
    found = np.array(vectors, np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12), np.array(single)


def answers(index_Qx4: np.ndarray, vectors_WxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The word that each question's first three lead to, int [Q]: by 3CosAdd and by 3CosMul."""
    cos_WxW = vectors_WxD @ vectors_WxD.T
    shifted_WxW = (1 + cos_WxW) / 2  # 3CosMul wants no negative ones
    found: list[list[np.ndarray]] = [[], []]
    rows = max(1, _AT_ONCE // len(vectors_WxD))
    for start in range(0, len(index_Qx4), rows):
        given_Rx3 = index_Qx4[start : start + rows, :3]
        a, b, c = given_Rx3.T
        both = (
            cos_WxW[b] - cos_WxW[a] + cos_WxW[c],
            shifted_WxW[b] * shifted_WxW[c] / (shifted_WxW[a] + _EPSILON),
        )
        for scores_RxW, into in zip(both, found, strict=True):
            np.put_along_axis(scores_RxW, given_Rx3, -np.inf, axis=1)
            into.append(scores_RxW.argmax(1))
    return np.concatenate(found[0]), np.concatenate(found[1])


def measure_analogies(questions: Questions, tokenizer: HybridTokenizer, embedding_VxD: np.ndarray) -> Measured:
    """Accuracy of both methods on all questions, on those of words of one token, and by section."""
    words, index_Qx4, sections = questions
    vectors_WxD, single_W = word_vectors(words, tokenizer, embedding_VxD)
    hits_2xQ = np.array(answers(index_Qx4, vectors_WxD)) == index_Qx4[:, 3]
    whole_Q = single_W[index_Qx4].all(1)
    groups: dict[str, np.ndarray] = {"all": np.ones(len(index_Qx4), bool), "words of one token": whole_Q}
    by_section: dict[str, list[int]] = defaultdict(list)
    for i, section in enumerate(sections):
        by_section[section].append(i)
    for section, members in by_section.items():
        groups[section] = np.isin(np.arange(len(sections)), members)
    chance = f"chance {100 / max(len(words) - 3, 1):.2f} %"
    figures = [
        Figure(group, metric, binomial(int(hits[of].sum()), int(of.sum())), int(of.sum()), chance)
        for group, of in groups.items()
        if of.any()
        for metric, hits in zip(("accuracy_3cosadd", "accuracy_3cosmul"), hits_2xQ, strict=True)
    ]
    note = (
        f"{len(words):,} words, {single_W.mean():.0%} of them one token, and so {whole_Q.mean():.0%} of the "
        f"{len(sections):,} questions; a word of several tokens has "
        "their mean, so that shared endings help; the answer is sought among the file's words"
    )
    return Measured(figures, note)
