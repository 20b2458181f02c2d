"""Log-probabilities of the reference of a DPO run, computed once and stored in the folder `reference` of the run.

    reference/fingerprint.txt    what they depend on: frozen weights, pairs, length, precision
              00000.npy          float32 [n, 2] of a block of pairs, and …
              00000.crc32        … its checksum

Each block appears complete or not at all, so that an interrupted computation resumes at the first missing one. Damaged
blocks are computed again.
"""

import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slm_jax.data.batches.pairs import PairBatches
from slm_jax.distributed import agreement, multihost
from slm_jax.utils.batch import Arrays
from slm_jax.utils.files import replace_file, replace_text

logger = logging.getLogger(__name__)

_BLOCK = 256  # pairs of a file

LogProbabilities = Callable[[Arrays], np.ndarray]
"""Function of a batch of pairs that returns float32 [B, 2]."""


def reference_log_probabilities(
    folder: Path,
    batches: PairBatches,
    fingerprint: str,
    batch_size: int,
    make_function: Callable[[], LogProbabilities],
) -> np.ndarray:
    """Read the log-probabilities of the reference; compute those that are missing.

    Args:
        folder: The folder `reference` of the run.
        batches: The pairs.
        fingerprint: What the values depend on.
        batch_size: Pairs that are computed at once.
        make_function: Loads the frozen weights and compiles a function of a batch; called at most once, by all
            processes or by none.

    Returns:
        float32 [P, 2]; 0 for pairs that are not used.
    """
    if multihost.is_first():
        _prepare(folder, fingerprint)
    values = np.zeros((len(batches.rows.pairs), 2), np.float32)
    used = np.concatenate([batches.rows.train, batches.rows.validation])
    function: LogProbabilities | None = None
    for number, start in enumerate(range(0, used.size, _BLOCK)):
        members = used[start : start + _BLOCK]
        path = folder / f"{number:05d}.npy"
        block = agreement.from_first("the reference of some pairs", lambda: _read(path, len(members)))  # noqa: B023
        if block is None:
            if function is None:
                logger.info("computing the log-probabilities of the reference for %d pairs", used.size - start)
                function = make_function()
            parts = [members[i : i + batch_size].tolist() for i in range(0, len(members), batch_size)]
            results = [function(batches.batch_of(part, batch_size))[: len(part)] for part in parts]
            block = np.concatenate(results).astype(np.float32).tolist()
            if multihost.is_first():
                _write(path, np.array(block, np.float32))
        values[members] = block
    return values


def _prepare(folder: Path, fingerprint: str) -> None:
    """Create the folder; remove values that depend on something else."""
    file = folder / "fingerprint.txt"
    if folder.is_dir() and not (file.is_file() and file.read_text(errors="replace").strip() == fingerprint):
        logger.warning("%s is damaged, or of other weights or pairs: computing it again", folder)
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    replace_text(file, f"{fingerprint}\n")


def _read(path: Path, count: int) -> list[list[float]] | None:
    """Return the values of a block; None if they are missing or damaged."""
    if not path.is_file():
        return None
    try:
        block = np.load(path, allow_pickle=False)
        checksum = path.with_suffix(".crc32").read_text().strip()
        if block.shape == (count, 2) and checksum == f"{zlib.crc32(block.tobytes()):08x}":
            values: list[list[float]] = block.tolist()
            return values
        problem = "it differs from its checksum"
    except (OSError, ValueError, EOFError) as error:
        problem = str(error)
    logger.warning("%s is damaged (%s): computing it again", path, problem)
    return None


def _write(path: Path, block: np.ndarray) -> None:
    """Write a block; its checksum, which comes first, is of no use without it."""
    replace_text(path.with_suffix(".crc32"), f"{zlib.crc32(block.tobytes()):08x}\n")
    with replace_file(path) as partial, partial.open("wb") as file:
        np.save(file, block, allow_pickle=False)
