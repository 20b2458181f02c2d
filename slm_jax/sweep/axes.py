"""The options that a sweep varies, and the settings that it tries.

optimizer.lr=0.003,0.01,0.03                        three values
model.dim+model.heads+model.mlp_dim=128+2+512,192+3+768    two values of three options that belong together
optimizer.lr=0.001..0.1                             a range, for random settings
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from slm_jax.config.schema import unknown_option
from slm_jax.config.sections import Sections
from slm_jax.utils.errors import UserError

_RANGE = re.compile(r"([\d.eE+-]+)\.\.([\d.eE+-]+)")
_SIGNIFICANT = 3  # digits of a value drawn from a range, so that it can be read and typed

Convert = Callable[[str, str], Any]
"""Converts the words of an option (name, word) to its value; raises UserError."""


@dataclass(frozen=True)
class Axis:
    """One dimension of a sweep.

    Attributes:
        names: The options that are set together.
        values: The values to choose from, each a tuple with a value for every option; empty for a range.
        bounds: Lower and upper bound of a range; None: there is none.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...] = ()
    bounds: tuple[float, float] | None = None

    def draw(self, source: random.Random) -> tuple[Any, ...]:
        """Return a random value: one of the list, or of the range, where the logarithm is distributed uniformly."""
        if self.bounds is None:
            return source.choice(self.values)
        low, high = self.bounds
        value = math.exp(source.uniform(math.log(low), math.log(high)))
        if _is_whole(self.names[0]):
            return (min(max(round(value), math.ceil(low)), math.floor(high)),)
        digits = _SIGNIFICANT - 1 - math.floor(math.log10(value))
        return (min(max(round(value, digits), low), high),)


@dataclass(frozen=True)
class Setting:
    """Values of the varied options, by dotted name."""

    values: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The values as text: `lr 0.01, dim 128`."""
        return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in self.values.items())

    @property
    def folder(self) -> str:
        """The values as a file name that no other setting has: `lr0.01-dim128-5f2a9c`."""
        text = "-".join(f"{name.rpartition('.')[2]}{value}" for name, value in self.values.items())
        digest = hashlib.sha256(json.dumps(dict(self.values), sort_keys=True).encode()).hexdigest()
        return f"{re.sub('[^A-Za-z0-9._-]+', '_', text)[:60]}-{digest[:6]}"


def parse_axis(text: str, convert: Convert) -> Axis:
    """Parse one `--vary`.

    Args:
        text: `NAME=VALUE,VALUE…`, `NAME+NAME=VALUE+VALUE,…` or `NAME=LOW..HIGH`.
        convert: Converts a word to the value of an option.

    Raises:
        UserError: It has another form, an option is unknown or cannot be varied, or a value is of a wrong type.
    """
    left, equals, right = text.partition("=")
    names = tuple(name.strip() for name in left.split("+"))
    if not equals or not right.strip() or not all(names):
        raise UserError(f"--vary {text}: give an option and its values, such as optimizer.lr=0.003,0.01")
    for name in names:
        if name not in Sections.fields():
            raise UserError(f"--vary {text}: {unknown_option(name)}")
        if name == "train.seed":
            raise UserError(f"--vary {text}: the seed is varied with --seeds N")
        if name == "model.recipe":  # resolved in the base config, where it would change nothing any more
            raise UserError(f"--vary {text}: give --model.recipe to the whole sweep, or vary the options that it sets")
        if get_origin(Sections.fields()[name].annotation) is tuple:
            raise UserError(f"--vary {text}: {name} is a list, which cannot be varied")
    if found := _RANGE.fullmatch(right.strip()):
        return _range_axis(text, names, found[1], found[2])
    values = tuple(_value(text, names, part, convert) for part in right.split(","))
    if len(set(values)) < len(values):
        raise UserError(f"--vary {text}: a value is given twice")
    return Axis(names, values)


def _range_axis(text: str, names: tuple[str, ...], low: str, high: str) -> Axis:
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = 0.0, 0.0
    if len(names) > 1 or not 0 < bounds[0] < bounds[1] < math.inf:
        raise UserError(f"--vary {text}: a range is NAME=LOW..HIGH, of one option, with 0 < LOW < HIGH")
    kinds = get_args(Sections.fields()[names[0]].annotation) or (Sections.fields()[names[0]].annotation,)
    if not {int, float} & set(kinds):
        raise UserError(f"--vary {text}: {names[0]} is not a number, which a range needs")
    return Axis(names, bounds=bounds)


def _value(text: str, names: tuple[str, ...], part: str, convert: Convert) -> tuple[Any, ...]:
    words = [word.strip() for word in part.split("+")] if len(names) > 1 else [part.strip()]
    if len(words) != len(names):
        raise UserError(f"--vary {text}: {part} has {len(words)} values for {len(names)} options ({'+'.join(names)})")
    return tuple(convert(name, word) for name, word in zip(names, words, strict=True))


def _is_whole(name: str) -> bool:
    annotation = Sections.fields()[name].annotation
    return annotation is int or (get_origin(annotation) is not Literal and int in get_args(annotation))


def settings(axes: Sequence[Axis], num_random: int = 0, seed: int = 0) -> list[Setting]:
    """Return the settings of a sweep: all combinations, or random ones.

    Args:
        axes: The axes; those with a range need random settings.
        num_random: Number of random settings, each drawn independently of the number; 0: all combinations.
        seed: Seed of the random settings.

    Raises:
        UserError: No axes, an option in two axes, a range without `num_random`, or fewer settings than that exist.
    """
    names = [name for axis in axes for name in axis.names]
    if not axes:
        raise UserError("nothing is varied: give --vary OPTION=VALUE,VALUE…")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--vary: {doubled[0]} is given twice")
    if num_random:
        drawn = list(itertools.islice(_random_settings(axes, seed), num_random))
        if len(drawn) < num_random:
            raise UserError(f"--random {num_random}: there are only {len(drawn)} different settings")
        return drawn
    if ranged := [axis.names[0] for axis in axes if axis.bounds]:
        raise UserError(f"--vary {ranged[0]}: a range needs --random N, the number of settings to try")
    return [_setting(axes, combination) for combination in itertools.product(*(axis.values for axis in axes))]


def _random_settings(axes: Sequence[Axis], seed: int) -> Iterator[Setting]:
    """Yield different settings; the first N are the same for every N, so that a sweep can be continued."""
    source = random.Random(seed)
    seen: set[tuple[Any, ...]] = set()
    misses = 0
    while misses < 1000:
        drawn = tuple(axis.draw(source) for axis in axes)
        if drawn in seen:
            misses += 1
            continue
        misses = 0
        seen.add(drawn)
        yield _setting(axes, drawn)


def _setting(axes: Sequence[Axis], values: Sequence[tuple[Any, ...]]) -> Setting:
    pairs = [pair for axis, value in zip(axes, values, strict=True) for pair in zip(axis.names, value, strict=True)]
    return Setting(dict(pairs))
