"""Names of sources: values of `data.source`, and entries of `data.mix` with their weights."""

from collections.abc import Iterator, Sequence

from slm_jax.utils.errors import UserError

# Named sources; `hf:owner/name[:config][:split]` is any data set on the Hugging Face hub.
SOURCES: tuple[str, ...] = (
    "python-docs",
    "python-qa",
    "python-chat",
    "files",
    "tinystories",
    "wikitext",
    "wikitext-2",
    "openwebtext",
    "fineweb-edu",
    "cosmopedia",
    "wikipedia",
    "alpaca",
    "dolly",
    "smoltalk",
    "oasst",
)
ROWS_PER_MIX = 1_000_000  # every source of a mixture gets at least one of so many rows


def is_source(name: str) -> bool:
    """Return whether `data.source` may have this value: a name, `NAME:CONFIG` (wikipedia:he), or `hf:…`."""
    return name.startswith("hf:") or name.partition(":")[0] in SOURCES


def parse_hub_name(name: str) -> tuple[str, str, str]:
    """Return the OWNER/NAME, the configuration and the split of `hf:OWNER/NAME[:CONFIG][:SPLIT]`; empty: not given.

    Raises:
        UserError: The name is malformed.
    """
    prefix, repo, config, split, *more = [*name.split(":"), "", "", ""]
    if prefix != "hf" or repo.count("/") != 1 or not all(repo.split("/")) or any(more):
        raise UserError(f"{name}: a data set of the hub is written as hf:OWNER/NAME[:CONFIG][:SPLIT]")
    return repo, config, split


def parse_weight(entry: str) -> tuple[str, float]:
    """Split an entry `NAME=WEIGHT` of a mixture; the default weight is 1.

    Raises:
        UserError: The weight is not a positive number, or the name is empty.
    """
    name, equals, text = entry.rpartition("=")
    if not equals:
        name, text = entry, "1"
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"data.mix: {entry}: {text} is not a weight (a number above 0), as in python-docs=0.3")
    if not name.strip():
        raise UserError(f"data.mix: {entry!r} names no source: expected NAME=WEIGHT, as in python-docs=0.3")
    return name, weight


def hub_name_problems(option: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the problems of malformed names of data sets on the hub, which are values of an option."""
    for name in names:
        if name.startswith("hf:"):
            try:
                parse_hub_name(name)
            except UserError as error:
                yield f"{option}: {error}"


def mix_problems(entries: Sequence[str]) -> Iterator[str]:
    """Yield the problems of `data.mix`: invalid entries, and shares so small that a source would get no rows."""
    weights = []
    for entry in entries:
        try:
            weights.append(parse_weight(entry))
        except UserError as error:
            yield str(error)
    total = sum(weight for _, weight in weights)
    yield from hub_name_problems("data.mix", [name for name, _ in weights])
    for name, weight in weights:
        if name == "files":
            yield "data.mix: files is the source of data.files: name paths or patterns instead, as in 'my/*.txt=1'"
        if weight / total * ROWS_PER_MIX < 1 - 1e-9:
            yield (
                f"data.mix: {name} with weight {weight:g} of {total:g} would get fewer than one in {ROWS_PER_MIX:,} "
                "rows: raise its weight, or leave it out"
            )
