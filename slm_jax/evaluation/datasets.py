"""Rows of an evaluation set: from local files, or from the Hugging Face hub, kept in the user's cache."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.data.sources.catalog import HubDataset
from slm_jax.data.sources.documents import Document, InvalidRow, RowMapper, Source
from slm_jax.data.sources.files import FileSource
from slm_jax.data.sources.hub import HubSource, UnreachableError, check_reachable
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import user_cache_folder

Row = dict[str, Any]


@dataclass(frozen=True)
class WholeRows(RowMapper):
    """Each row whole, as the JSON text of a document, so that every reader of documents reads rows too."""

    names: tuple[str, ...] = ()  # columns that each must have

    def required_columns(self) -> list[str]:
        """None that the readers check: `document` tells which is missing, and what is there."""
        return []

    def to_document(self, row: Any, where: str) -> Document | InvalidRow:
        """The row, or what is wrong with it."""
        if not isinstance(row, dict):
            return InvalidRow("a row is no object of columns", where)
        if missing := [name for name in self.names if row.get(name) is None]:
            return InvalidRow(f"column {missing[0]} is missing (there: {', '.join(map(str, list(row)[:12]))})", where)
        return Document(json.dumps(row))


class HubRows(NamedTuple):
    """Where a set lies on the hub: the rows of one split of each configuration."""

    repo: str
    split: str
    configs: tuple[str, ...] = ("",)


class Rows(NamedTuple):
    """The rows of a set, and where they are from."""

    rows: list[Row]
    origin: str


class Hub:
    """The hub for the length of one evaluation: that it cannot be reached is found out once."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._unreachable = say, ""

    def read(self, task: str, where: HubRows, names: Sequence[str]) -> Rows:
        """All rows of a set, from the cache if they are there. Raises UserError; at once if the hub was not reached
        before."""
        kept = user_cache_folder() / "evaluation" / f"{where.repo.replace('/', '--')}--{where.split}--{task}.jsonl.gz"
        if kept.is_file():
            return _read_kept(kept)
        instead = f"--tasks {task}=FILE (JSONL or Parquet with the columns {', '.join(names)})"
        if self._unreachable:
            raise UserError(f"{task}{self._unreachable}{instead}")
        try:
            check_reachable(task, instead)
        except UnreachableError as error:
            self._unreachable = str(error).removeprefix(task).removesuffix(instead)
            raise
        rows: list[Row] = []
        commit = ""
        for number, config in enumerate(where.configs, start=1):
            found = HubDataset(where.repo, "", config, split=where.split, columns=WholeRows(names=tuple(names)))
            source = HubSource(f"{where.repo} {config}".strip(), found, commit)
            reader = source.read()
            rows += _whole(source, reader)
            commit = reader.version
            if number in (1, len(where.configs)) or number % 10 == 0:
                self._say(f"{task}: {len(rows):,} rows of {where.repo} ({number} of {len(where.configs)} parts)")
        origin = f"{where.repo} at {commit[:10]}"
        _keep(kept, origin, rows)
        return Rows(rows, origin)


def read_files(path: str, names: Sequence[str]) -> Rows:
    """The rows of JSONL, JSON or Parquet files (also packed) that a path, folder or glob names. Raises UserError."""
    source = FileSource((path,), WholeRows(names=tuple(names)))
    for file in source.files:
        if not set(file.suffixes) & {".jsonl", ".ndjson", ".json", ".parquet"}:
            raise UserError(f"{file} is no .jsonl, .json or .parquet: each row wants the columns {', '.join(names)}")
    return Rows(_whole(source, source.read()), path)


def _whole(source: Source, reader: Any) -> list[Row]:
    """All rows. Raises UserError at the first that is none: a figure of half a set would be taken for that of all."""
    rows = []
    for what in reader:
        if isinstance(what, InvalidRow):
            raise UserError(f"{what.where}: {what.reason}")
        rows.append(json.loads(what.text))
    if not rows:
        raise UserError(f"{source.name} has no rows")
    return rows


def _keep(path: Path, origin: str, rows: list[Row]) -> None:
    """Write rows to the cache, so that they are there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with gzip.open(partial, "wt", encoding="utf-8") as file:
        for row in ({"origin": origin}, *rows):
            file.write(json.dumps(row) + "\n")
    partial.replace(path)


def _read_kept(path: Path) -> Rows:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            first, *rows = map(json.loads, file)
        return Rows(rows, f"{first['origin']} (kept in {path})")
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, to have it fetched again") from None
