"""From counted pre-tokens to the weighted words in which merges may grow."""

from __future__ import annotations

import re
from collections import Counter

from tokenizer.encoding.pretokenization import MAX_PRETOKEN, PUNCTUATION, split_long_pretoken

_LETTER = rf"[^ \n\t\r0-9{PUNCTUATION}]"
# Merges stay within a match. "words": a word with the space before it (an apostrophe within a word belongs to it), up
# to three digits, punctuation, white space. "spaces": white space and everything up to the next white space.
BOUNDARIES = {
    "words": re.compile(
        rf"[ \n\t\r]+(?=[ ])|[ ]?(?:{_LETTER}|(?<={_LETTER})['’](?={_LETTER}))+"
        rf"|[ ]?[0-9]{{1,3}}|[ ]?(?![\t\r])[{PUNCTUATION}]+|[ \n\t\r]+"
    ),
    "spaces": re.compile(r"[ \n\t\r]*[^ \n\t\r]+|[ \n\t\r]+"),
}
_THINNED_FROM = 100_000
"""Number of distinct pre-tokens from which a part of those that occur once represents all of them."""
_THINNING = 4


def split_and_thin(counts: dict[str, int]) -> Counter[str]:
    """Return the counts with long pre-tokens split, and thinned out."""
    result = Counter({pretoken: count for pretoken, count in counts.items() if len(pretoken) <= MAX_PRETOKEN})
    for pretoken, count in counts.items():
        if len(pretoken) > MAX_PRETOKEN:
            for part in split_long_pretoken(pretoken):
                result[part] += count
    return thin_out(result)


def thin_out(result: Counter[str]) -> Counter[str]:
    """Return counts that are cheaper to learn from.

    If there are very many, every fourth pre-token that occurs once gets the weight of four, and the others are dropped.
    """
    if len(result) > _THINNED_FROM:
        single = sorted(pretoken for pretoken, count in result.items() if count == 1)
        result = Counter({pretoken: count for pretoken, count in result.items() if count > 1})
        result.update(dict.fromkeys(single[::_THINNING], _THINNING))
    return result


def count_words(pretokens: Counter[str], boundaries: str) -> Counter[str]:
    """Split weighted pre-tokens at the boundaries that merges must not cross; see `BOUNDARIES`."""
    words: Counter[str] = Counter()
    find = BOUNDARIES[boundaries].findall
    for pretoken, count in pretokens.items():
        for word in find(pretoken):
            words[word] += count
    return words


def fold_case(words: Counter[str], pairs: dict[str, str]) -> Counter[str]:
    """Return the words in lower case, split before upper-case letters within them.

    Args:
        words: {word: count}.
        pairs: {lower: upper}; empty leaves the words as they are.
    """
    if not pairs:
        return words
    lower = re.escape("".join(pairs))
    upper = re.escape("".join(pairs.values()))
    runs = re.compile(rf"[ \n]*[{upper}]+(?![{lower}])|[ \n]*[{upper}]?[^{upper}]+|[{upper}]+|[ \n]+")
    has_upper = re.compile(rf"[{upper}]").search
    table = {ord(big): small for small, big in pairs.items()}
    folded: Counter[str] = Counter()
    for word, count in words.items():
        if has_upper(word):
            for run in runs.findall(word):
                folded[run.translate(table)] += count
        else:
            folded[word] += count
    return folded
