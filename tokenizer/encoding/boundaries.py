"""Find where pre-tokens and the parts of long ones start, with NumPy: `tokenizer.encoding.pretokenization`."""

from __future__ import annotations

import numpy as np

from tokenizer.encoding.bulk import Block
from tokenizer.encoding.pretokenization import MAX_PRETOKEN, split_long_pretoken


def find_starts(block: Block) -> np.ndarray:
    """Return whether a pre-token, or a part of a long one, starts at each character, bool [T].

    One starts at the characters between texts, and after each of them.
    """
    codes = block.codes
    is_space = (codes == ord(" ")) | (codes == ord("\n"))
    is_space[block.ends] = False
    starts = is_space.copy()
    starts[1:] &= ~is_space[:-1]
    starts[0] = True
    starts[block.ends] = True
    starts[block.ends[:-1] + 1] = True
    places = np.flatnonzero(starts)
    lengths = np.diff(places, append=len(codes))
    for index in np.flatnonzero(lengths > MAX_PRETOKEN).tolist():
        start = int(places[index])
        for part in split_long_pretoken(block.text[start : start + int(lengths[index])]):
            starts[start] = True
            start += len(part)
    return starts
