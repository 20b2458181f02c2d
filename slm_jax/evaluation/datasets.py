"""Records of evaluation data sets: from local files, or from the Hugging Face hub with a copy in the user's cache."""

import gzip
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.data.sources.catalog import HubDataset
from slm_jax.data.sources.documents import InvalidRow
from slm_jax.data.sources.file_source import FileSource
from slm_jax.data.sources.files import ROW_FORMATS, file_format
from slm_jax.data.sources.hub import HubSource, SplitEnd, UnreachableError, check_reachable
from slm_jax.data.sources.row_files import read_rows
from slm_jax.data.sources.rows import Row, columns_text
from slm_jax.utils.errors import UserError
from slm_jax.utils.files import replace_file, user_cache_folder
from slm_jax.utils.formatting import plural

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class HubLocation(NamedTuple):
    """Location of a data set on the hub: one split of each of the configurations."""

    repo: str
    split: str
    configs: tuple[str, ...] = ("",)


class Dataset(NamedTuple):
    """The records of a data set, and a text that names their origin."""

    records: list[Record]
    origin: str


class HubLoader:
    """Loads data sets from the hub, or from their copies in the user's cache.

    If the hub is unreachable, this is detected once: later loads fail immediately.

    Attributes:
        option: The option that names the tasks, for messages.
    """

    def __init__(self, option: str = "--tasks") -> None:
        """Start without a connection.

        Args:
            option: The option that names the tasks, for messages.
        """
        self.option = option
        self._failure = ""  # why the hub is unreachable

    def load(self, task: str, location: HubLocation, columns: Sequence[str]) -> Dataset:
        """Load all records of a data set.

        Args:
            task: Name of the task, for messages and for the name of the cached file.
            location: The data set.
            columns: Columns that every record must have.

        Raises:
            UserError: The hub is unreachable, or the data set or its cached copy cannot be read.
        """
        name = f"{location.repo.replace('/', '--')}--{location.split}--{task}.jsonl.gz"
        cached = user_cache_folder() / "evaluation" / name
        if cached.is_file():
            return _read_cached(cached)
        self._check_connection(task, columns)
        records: list[Record] = []
        commit = ""
        for number, config in enumerate(location.configs, start=1):
            part = f"{location.repo} {config}".strip()
            reader = HubSource(part, HubDataset(location.repo, "", config, split=location.split), commit).read_rows()
            rows = (item for item in reader if not isinstance(item, SplitEnd))
            records += _checked_records(rows, columns, part)
            commit = reader.version  # all configurations are read at the same commit
            if number in (1, len(location.configs)) or number % 10 == 0:
                logger.info(
                    "%s: %s of %s (%d of %d parts)",
                    task, plural(len(records), "record"), location.repo, number, len(location.configs),
                )  # fmt: skip
        origin = f"{location.repo} at {commit[:10]}"
        _write_cached(cached, origin, records)
        return Dataset(records, origin)

    def _check_connection(self, task: str, columns: Sequence[str]) -> None:
        """Raise UserError if the hub is unreachable, without another attempt after the first."""
        remedy = f"{self.option} {task}=FILE (JSONL or Parquet with {required_columns(columns)})"
        if self._failure:
            raise UserError(f"{task}{self._failure}{remedy}")
        try:
            check_reachable(task, remedy)
        except UnreachableError as error:
            self._failure = str(error).removeprefix(task).removesuffix(remedy)
            raise


def required_columns(columns: Sequence[str]) -> str:
    """Return the names of columns for a message: `the column text`, `the columns prompt, checks`."""
    return f"the column{'s' * (len(columns) != 1)} {', '.join(columns)}"


def read_files(path: str, columns: Sequence[str]) -> Dataset:
    """Read the records of JSONL, JSON or Parquet files, which may be compressed.

    Args:
        path: A file, folder or glob.
        columns: Columns that every record must have.

    Raises:
        UserError: There is no such file, it has another format, or a record is invalid.
    """
    files = FileSource((path,)).files
    for file in files:
        if file_format(file) not in ROW_FORMATS:
            raise UserError(
                f"{file} is not a .jsonl, .json or .parquet file: expected records with {required_columns(columns)}"
            )
    rows = (row for file in files for row in read_rows(file))
    return Dataset(_checked_records(rows, columns, path), path)


def _checked_records(rows: Iterable[Row | InvalidRow], columns: Sequence[str], name: str) -> list[Record]:
    """Return the values of all rows.

    Args:
        rows: The rows.
        columns: Columns that every row must have.
        name: What is read, for messages.

    Raises:
        UserError: A row is invalid: scores over a part would pass for complete ones. Or there are no rows.
    """
    records: list[Record] = []
    for row in rows:
        if isinstance(row, InvalidRow):
            raise UserError(f"{row.location}: {row.reason}")
        if not isinstance(row.value, dict):
            raise UserError(f"{row.location}: a record is not an object of columns")
        missing = [column for column in columns if row.value.get(column) is None]
        if missing:
            problem = "is empty (null)" if missing[0] in row.value else "is missing"
            raise UserError(f"{row.location}: column {missing[0]} {problem} (columns: {columns_text(row.value)})")
        records.append(row.value)
    if not records:
        raise UserError(f"{name} has no records")
    return records


def _write_cached(path: Path, origin: str, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as partial, gzip.open(partial, "wt", encoding="utf-8") as file:
        for record in ({"origin": origin}, *records):
            file.write(json.dumps(record) + "\n")


def _read_cached(path: Path) -> Dataset:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            header, *records = map(json.loads, file)
        return Dataset(records, f"{header['origin']} (kept in {path})")
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it to download the data set again") from None
