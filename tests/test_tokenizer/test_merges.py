"""Every merge is the best one: compared with a twin that counts all pairs again before each merge."""

from collections import Counter

import pytest

from tests.test_tokenizer.samples import corpus
from tokenizer.learning.learn import TrainingSymbols
from tokenizer.learning.merges import SCORES, PairMerger, learn_merges
from tokenizer.learning.training_words import count_words

MERGES = 150
WORDS = count_words(Counter(corpus()[:20_000].split(" ")), "words")


def fast_merges(score: str, min_count: int) -> list[str]:
    symbols = TrainingSymbols(WORDS, 1000, 1)
    merger = PairMerger(symbols.symbols, symbols.weights, symbols.texts(), score, min_count)
    return learn_merges(merger, MERGES, lambda text: len(text) > 12)


def naive_merges(score: str, min_count: int) -> list[str]:
    """Learn merges by definition; of pairs with the same score, the one of older symbols is merged first."""
    first = TrainingSymbols(WORDS, 1000, 1)
    texts = first.texts()
    ids = {text: symbol for symbol, text in texts.items()}
    words = [([ids[letter] for letter in word], count) for word, count in WORDS.items()]
    forbidden = set()
    merged: list[str] = []
    while len(merged) < MERGES:
        pairs: Counter[tuple[int, int]] = Counter()
        symbols: Counter[int] = Counter()
        for word, count in words:
            for symbol in word:
                symbols[symbol] += count
            at = 0
            while at < len(word) - 1:
                pairs[word[at], word[at + 1]] += count
                # "aaa" has one pair of equal symbols, "aaaa" two.
                overlap = at < len(word) - 2 and word[at] == word[at + 1] == word[at + 2]
                at += 2 if overlap else 1
        total = symbols.total()
        candidates = [
            (-SCORES[score](count, symbols[left], symbols[right], total), left, right)
            for (left, right), count in pairs.items()
            if count >= min_count and (left, right) not in forbidden
        ]
        if not candidates:
            break
        _, left, right = min(candidates)
        text = texts[left] + texts[right]
        if text not in ids and len(text) > 12:
            forbidden.add((left, right))
            continue
        if text not in ids:
            ids[text] = max(texts) + 1
            texts[ids[text]] = text
            merged.append(text)
        for word, _ in words:
            at = 0
            while at < len(word) - 1:
                if word[at] == left and word[at + 1] == right:
                    word[at : at + 2] = [ids[text]]
                at += 1
    return merged


@pytest.mark.parametrize("min_count", [1, 3])
@pytest.mark.parametrize("score", SCORES)
def test_every_merge_is_the_best_one(score, min_count):
    expected = naive_merges(score, min_count)
    assert len(expected) == MERGES
    assert fast_merges(score, min_count) == expected
