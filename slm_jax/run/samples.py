"""`samples.md` of a run: texts generated at each validation, as Markdown.

The file is a sequence of sections. Each begins with the line `## Step N`; the texts below it are indented by four
spaces, so that their lines cannot be mistaken for headings, and are separated by `* * *`:

    ## Step 250

        Once upon a time there was
        a fox.

    * * *

        The second prompt's text

This module has the only writer and the only reader of the file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from slm_jax.utils.files import replace_text

_HEADING = "\n## Step "
_SEPARATOR = "* * *"
_INDENT = "    "


class Sample(NamedTuple):
    """The texts generated at one step, one for each prompt, prompts included."""

    step: int
    texts: list[str]


def append_samples(path: Path, step: int, texts: Sequence[str]) -> None:
    """Append the texts of a step.

    Args:
        path: `samples.md`; created if missing.
        step: The step after which the texts were generated.
        texts: The texts, prompts included.
    """
    blocks = []
    for text in texts:
        blocks.append("\n" + "".join(f"{_INDENT}{line}\n" for line in text.strip("\n").splitlines()))
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{_HEADING}{step}\n" + f"\n{_SEPARATOR}\n".join(blocks))


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a file in its order; none if it is missing.

    A section whose heading has no step number (cut short by a crash or a full disk) is left out.
    """
    samples = []
    for step, section in _sections(path):
        texts: list[list[str]] = [[]]
        for line in section.partition("\n")[2].split("\n"):
            if line == _SEPARATOR:  # the lines of a text are indented
                texts.append([])
            else:
                texts[-1].append(line.removeprefix(_INDENT))
        samples.append(Sample(step, ["\n".join(lines).strip("\n") for lines in texts]))
    return samples


def forget_samples_after(path: Path, step: int) -> None:
    """Remove the samples of later steps, which a resumed run repeats, and sections that were cut short."""
    if path.is_file():
        head = _read(path).partition(_HEADING)[0]
        kept = [section for number, section in _sections(path) if number <= step]
        text = _HEADING.join([head, *kept])
        for length in range(len(_HEADING) - 1, 1, -1):  # a heading that was cut short before its number
            text = text.removesuffix(_HEADING[:length])
        replace_text(path, text)


def _sections(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the step and the raw text (step number first) of each section with a valid heading."""
    for section in _read(path).split(_HEADING)[1:]:
        number, newline, _ = section.partition("\n")
        if newline and number.isdecimal():
            yield int(number), section


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
