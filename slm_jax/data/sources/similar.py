"""Group texts that have passages in common, so that the split into training and validation divides none of them."""

from collections.abc import Sequence

import numpy as np

from slm_jax.utils.text_windows import code_points, normalize_space, window_hashes

WINDOW = 50  # characters; shorter passages in common are coincidence or idiom
_COMMON = 200  # characters that two texts of a group have in common


def similar_groups(texts: Sequence[str]) -> list[int]:
    """Group texts that share long passages, directly or through others.

    Two texts belong together if windows of 50 characters that occur in both cover 200 characters of either. Runs of
    white space count as one space, since copies are often indented differently.

    Args:
        texts: The texts; all are held in memory.

    Returns:
        For each text, the index of the first text of its group.
    """
    arrays = [code_points(normalize_space(text)) for text in texts]
    sizes = [array.size for array in arrays]
    hashes = window_hashes(np.concatenate([np.zeros(0, np.uint32), *arrays]), WINDOW)
    owners = np.repeat(np.arange(len(texts)), sizes)
    starts = np.flatnonzero(owners[: hashes.size] == owners[owners.size - hashes.size :])  # windows within one text
    starts = starts[np.argsort(hashes[starts], kind="stable")]
    repeats = np.flatnonzero(np.diff(hashes[starts]) == 0)
    runs = np.split(repeats, np.flatnonzero(np.diff(repeats) > 1) + 1) if repeats.size else []
    shared: dict[tuple[int, int], list[int]] = {}  # (text, other text): starts of the windows of text that other has
    for run in runs:
        windows = starts[run[0] : run[-1] + 2].tolist()
        members = set(owners[windows].tolist())
        if len(members) > 1:
            for start in windows:
                for other in members - {owners[start]}:
                    shared.setdefault((int(owners[start]), other), []).append(start)
    groups = list(range(len(texts)))
    for (text, other), common in shared.items():
        if _covered(common) >= _COMMON:
            first, second = _root(groups, text), _root(groups, other)
            groups[max(first, second)] = min(first, second)
    return [_root(groups, index) for index in range(len(texts))]


def _root(groups: list[int], index: int) -> int:
    while groups[index] != index:
        index = groups[index]
    return index


def _covered(starts: Sequence[int]) -> int:
    """Return the number of characters that windows cover."""
    gaps = np.diff(np.sort(starts))
    return WINDOW + int(np.minimum(gaps, WINDOW).sum())
