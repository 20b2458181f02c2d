"""Names that look like those of Python's library and do not exist: what an assistant must say it does not know."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from slm_jax.data.sources.python_facts import exists, facts, owners

STYLES = ("coined function", "coined module", "other module", "compound", "misspelled", "coined built-in")

_ONSETS = "b br c cl d dr f fl g gr h j k l m n p pl qu r s sn sp st t tr v w z".split()
_VOWELS = "a e i o u oo ee".split()
_CODAS = ["", "", "b", "g", "l", "m", "n", "p", "r", "sk", "t", "x", "zz"]
_ENDINGS = ["", "", "", "ate", "er", "ify", "ize", "le"]


class InventedName(NamedTuple):
    """A name that does not exist, and the style in which it was invented."""

    name: str
    style: str


def invented_names(seed: str, excluded: frozenset[str] = frozenset()) -> Iterator[InventedName]:
    """Yield different names without end, the styles in turn.

    Args:
        seed: Seed of the sequence.
        excluded: Names that are left out.
    """
    rng = random.Random(seed)
    known = [fact for fact in facts() if fact.kind != "module"]
    names = [fact.name for fact in known]
    lasts = sorted({fact.last for fact in known})
    homes = list(owners())
    seen = set(excluded)
    while True:
        for style in STYLES:
            name = ""
            while not name or name in seen or exists(name):
                name = _invent(style, rng, homes, lasts, names)
            seen.add(name)
            yield InventedName(name, style)


def _invent(style: str, rng: random.Random, homes: list[str], lasts: list[str], names: list[str]) -> str:
    if style == "coined function":
        return f"{rng.choice(homes)}.{_word(rng)}"
    if style == "coined module":
        return f"{_word(rng)}.{rng.choice(lasts)}"
    if style == "other module":
        return f"{rng.choice(homes)}.{rng.choice(lasts)}"
    if style == "compound":
        return f"{rng.choice(homes)}.{rng.choice(lasts).lower()}_{rng.choice(lasts).lower()}"
    if style == "misspelled":
        return _misspelled(rng.choice(names), rng)
    return _word(rng)


def _word(rng: random.Random) -> str:
    """Return a pronounceable word of two or three syllables."""
    syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice([1, 2, 2])))
    return "".join(syllables) + rng.choice(_ENDINGS)


def _misspelled(name: str, rng: random.Random) -> str:
    """Return a name with one letter of its last part replaced, doubled or left out."""
    owner, dot, last = name.rpartition(".")
    place = rng.randrange(len(last))
    middle = rng.choice([rng.choice("abcdefghijklmnopqrstuvwxyz"), 2 * last[place], ""])
    return owner + dot + last[:place] + middle + last[place + 1 :]
