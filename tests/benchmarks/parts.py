"""Preparing text in parts: python tests/benchmarks/parts.py FILE … [--parts 4] [--rounds 3]

Each round measures in turn, on one core: one process that prepares the text, reading alone, each part, and the merge.
It prints the median, minimum and maximum over the rounds, in million characters of text that is encoded, read or merged
per second of processor time, and checks that the corpora have the same bytes. Use text of at least a million characters
per part.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).parents[2])  # not the folder of this script, whose tokenizer.py hides the package

from slm_jax.data.corpus.build import CorpusOptions, build_corpus  # noqa: E402
from slm_jax.data.corpus.merge import merge_parts  # noqa: E402
from slm_jax.data.corpus.part_files import Part  # noqa: E402
from slm_jax.data.corpus.parts import build_part  # noqa: E402
from slm_jax.data.sources.documents import Document  # noqa: E402
from slm_jax.data.sources.file_source import FileSource  # noqa: E402
from tokenizer import HybridTokenizer  # noqa: E402

PIECE = 3000  # characters of a document that a longer one is cut into, as pages of the web have


class Pages(FileSource):
    """The text of files, cut into documents of a page."""

    def documents(self, path):
        """Yield the documents of one file."""
        for item in super().documents(path):
            text = item.text if isinstance(item, Document) else ""
            yield from (Document(text[start : start + PIECE]) for start in range(0, len(text), PIECE))


def seconds_of(call: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(source: Pages, parts: int, folder: Path) -> dict[str, float]:
    """Return the seconds of each step of one round."""
    tokenizer = HybridTokenizer.pretrained("english-16k")
    options = CorpusOptions()
    one, merged = folder / "one", folder / "merged"

    def make(part: Part) -> None:
        build_part(part.folder(merged), source, tokenizer, options, part, workers=1)

    times = {
        "one process": seconds_of(lambda: build_corpus(one, source, tokenizer, options, workers=1)),
        "reading alone": seconds_of(lambda: sum(1 for _ in source.read())),
        "slowest part": max(seconds_of(lambda part=Part(i + 1, parts): make(part)) for i in range(parts)),
        "merge": seconds_of(lambda: merge_parts(merged, source, tokenizer, options, parts, workers=1)),
    }
    for path in one.iterdir():
        assert path.read_bytes() == (merged / path.name).read_bytes(), path.name
    return times


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="text files")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source = Pages(arguments.files)
    characters = sum(len(item.text) for item in source.read() if isinstance(item, Document))
    rounds = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(measure(source, arguments.parts, Path(folder)))
    print(f"{characters / 1e6:.1f} M characters, {arguments.parts} parts, the same bytes")
    for name in rounds[0]:
        speeds = [characters / each[name] / 1e6 for each in rounds]
        print(f"{name:14} {median(speeds):6.1f} M characters/s ({min(speeds):.1f} to {max(speeds):.1f})")


if __name__ == "__main__":
    main()
