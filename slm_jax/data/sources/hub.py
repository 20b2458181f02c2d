"""Data sets of the Hugging Face hub, streamed: rows are downloaded as they are read, and not kept.

The libraries `datasets` and `pyarrow` come with the extra [data].
"""

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from slm_jax.chat.formats import format_of_columns
from slm_jax.config.schema import DataConfig
from slm_jax.data.sources.catalog import HubDataset, find_dataset
from slm_jax.data.sources.documents import Document, InvalidRow, Split
from slm_jax.data.sources.rows import (
    ConversationMapper,
    Mapper,
    Row,
    RowMapper,
    make_row_mapper,
    resolved_mapper,
)
from slm_jax.data.sources.threads import THREADS, ThreadJoiner
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import import_optional

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 3.0  # seconds
RETRY_WAITS = (1, 2, 4, 8, 16, 32)  # seconds to wait after each of several failures in a row
_VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
_TITLE = re.compile(r" = [^=].* = \n?")
_NO_NETWORK = "--data.source python-docs, or your own text with --data.files"


class UnreachableError(UserError):
    """The hub cannot be reached: reported at once before the first row was read, retried after it."""


class SplitEnd(NamedTuple):
    """The end of a split; `split` is the one that the data set's rows are assigned to."""

    split: Split | None


def make_hub_source(name: str, config: DataConfig) -> "HubSource":
    """Return the source of a name or hub id, its columns overridden by the config.

    Raises:
        UserError: The name is neither in the catalog nor a hub id.
    """
    dataset = find_dataset(name)
    return HubSource(name, dataset._replace(mapper=make_row_mapper(config, dataset.mapper)), config.revision)


class HubSource:
    """A data set of the hub. A validation split of its own, if it has one, is read first."""

    def __init__(self, name: str, dataset: HubDataset, revision: str = ""):
        """Create the source; connects to nothing.

        Args:
            name: The name for messages.
            dataset: The data set.
            revision: A commit or branch; empty: the newest commit.
        """
        self.name = name
        self.dataset = dataset
        self.revision = revision

    def describe(self) -> Any:
        """Return what was asked for; the newest commit is determined, and recorded, when the first row is read."""
        dataset = self.dataset
        columns = dataset.mapper.describe()
        return ["hub", dataset.repo, dataset.config, dataset.split, self.revision, *columns, dataset.rows_are_lines]

    @property
    def reads_text_only(self) -> bool:
        """True if no row is read as a conversation, whatever its columns are."""
        return isinstance(self.dataset.mapper, RowMapper) and not self.dataset.mapper.detects

    def read(self, position: Any = None) -> "HubReader":
        """Read documents from a position, see `HubReader.position`."""
        return HubReader(self, position)

    def read_rows(
        self, position: Any = None, required_columns: Sequence[str] = (), mapper: Mapper | None = None
    ) -> "HubRowReader":
        """Read rows from a position, see `HubRowReader.position`.

        Args:
            position: Where to resume; None: at the beginning.
            required_columns: Columns that the data set must have.
            mapper: A mapper for whose columns the same holds.
        """
        return HubRowReader(self, position, required_columns, mapper)


class HubReader:
    """A `Reader` of a HubSource: maps rows to documents, and joins lines to articles and messages to threads."""

    def __init__(self, source: HubSource, position: Any = None):
        """Start at a position, see `position`; connects when the first document is read."""
        self._name = source.name
        self._dataset = source.dataset
        self._mapper: Mapper | None = None  # known when the first row was read
        # Whether rows are conversations, where that is detected; known when the first row of the data set was read.
        self._detected: bool | None = position.get("conversations") if position else None
        self._resumed = position is not None
        self._rows = source.read_rows(position, mapper=source.dataset.mapper)
        mapper = source.dataset.mapper
        is_threads = isinstance(mapper, ConversationMapper) and mapper.row_format == THREADS
        pending = list(position["lines"]) if position else []
        self._lines: list[str] = [] if is_threads else pending
        self._threads = ThreadJoiner(pending) if is_threads else None

    def position(self) -> Any:
        """Return the position of the rows with the lines of the current article, or the messages of the thread."""
        pending = self._lines if self._threads is None else self._threads.rows
        detected = {} if self._detected is None else {"conversations": self._detected}
        return {**self._rows.position(), "lines": list(pending), **detected}

    @property
    def version(self) -> str:
        """The commit; empty before the first row was read."""
        return self._rows.version

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        for item in self._rows:
            if self._threads is not None:
                yield from (self._threads.end(item.split) if isinstance(item, SplitEnd) else self._threads.add(item))
                continue
            if isinstance(item, SplitEnd):
                if self._lines:
                    yield self._end_article(item.split)
                continue
            document = self._resolved(item).to_document(item)
            if isinstance(document, InvalidRow) or not self._dataset.rows_are_lines:
                yield document
            elif _TITLE.fullmatch(document.text) and "".join(self._lines).strip():
                article = self._end_article(item.split)
                self._lines.append(document.text)
                yield article
            else:
                self._lines.append(document.text)

    def _resolved(self, row: Row) -> Mapper:
        """Return the mapper, which the columns of the first row decide, whatever their values are."""
        if self._mapper is None:
            self._mapper, note = resolved_mapper(self._dataset.mapper, [row.value])
            mapper = self._dataset.mapper
            if isinstance(mapper, RowMapper) and mapper.detects:
                if self._detected is None:
                    columns = row.value.keys()
                    self._detected = mapper.text_column not in columns and format_of_columns(columns) is not None
                self._mapper = ConversationMapper() if self._detected else replace(mapper, detects=False)
            if note and not self._resumed:
                logger.info("%s: %s", self._name, note)
        return self._mapper

    def _end_article(self, split: Split | None) -> Document:
        article = Document("".join(self._lines), split=split)
        self._lines = []
        return article


class HubRowReader:
    """The rows of a data set; after a lost connection it resumes after the last row."""

    def __init__(self, source: HubSource, position: Any, required_columns: Sequence[str], mapper: Mapper | None):
        """Start at a position, see `position`; connects when the first row is read."""
        self._source = source
        self._required_columns = required_columns
        self._mapper = mapper
        self._started = False
        self._commit = position["commit"] if position else None
        self._split = position["split"] if position else 0  # index in the list of splits to read
        self._state = position["state"] if position else None  # of the streamed split; None: its beginning

    def position(self) -> Any:
        """Return the commit, the index of the split, and the state of the library's iterator in it."""
        return {"commit": self._commit, "split": self._split, "state": self._state}

    @property
    def version(self) -> str:
        """The commit; empty before the first row was read."""
        return self._commit or ""

    def __iter__(self) -> Iterator[Row | SplitEnd]:
        """Yield the rows that have not been read yet, and a SplitEnd after each split.

        Raises:
            UserError: The data set cannot be read, or the connection failed too often in a row.
        """
        failures = 0
        while True:
            before = (self._split, self._state)
            try:
                yield from self._read()
                return
            except Exception as error:  # the libraries raise exceptions of many kinds
                is_outage = isinstance(error, UnreachableError) and self._started
                permanent = None if is_outage else self._permanent_error(error)
                if permanent is not None:
                    raise permanent from None
                if (self._split, self._state) != before:
                    failures = 0
                if failures == len(RETRY_WAITS):
                    raise UserError(
                        f"{self._source.name}: the connection failed {failures + 1} times ({_first_line(error)}); "
                        "what was prepared is kept: give the same command again"
                    ) from None
                wait = RETRY_WAITS[failures]
                failures += 1
                logger.warning("%s: %s; retrying in %s s", self._source.name, _first_line(error), wait)
                time.sleep(wait)

    def _read(self) -> Iterator[Row | SplitEnd]:
        """Yield the remaining rows; may fail at any point, and resumes after the last row when called again."""
        builder = self._builder()
        splits = self._splits(builder)
        while self._split < len(splits):
            name, split = splits[self._split]
            dataset = builder.as_streaming_dataset(split=name)
            self._check_columns(dataset.column_names)
            if self._state is not None:
                dataset.load_state_dict(self._state)
            for value in dataset:
                self._state = dataset.state_dict()
                self._started = True
                yield Row(value, f"{self._source.name}, split {name}", split)
            yield SplitEnd(split)
            self._split += 1
            self._state = None

    def _builder(self) -> Any:
        """Return the library's object for the data set, at one commit.

        Raises:
            UnreachableError: The hub cannot be reached.
        """
        name = self._source.name
        import_optional("pyarrow", f"reading {name}")
        check_reachable(name)
        datasets = import_optional("datasets", f"reading {name}")
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        # Retries are made here, from the last row on; the library would repeat the same request for two minutes.
        datasets.config.STREAMING_READ_MAX_RETRIES = 2
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 1
        dataset = self._source.dataset
        if self._commit is None:
            hub = import_optional("huggingface_hub", f"reading {name}")
            self._commit = hub.HfApi().dataset_info(dataset.repo, revision=self._source.revision or None).sha
        return datasets.load_dataset_builder(dataset.repo, dataset.config or None, revision=self._commit)

    def _splits(self, builder: Any) -> list[tuple[str, Split | None]]:
        """Return (name, assigned split) of the splits to read.

        Raises:
            UserError: The data set does not have the split.
        """
        names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
        wanted = self._source.dataset.split
        if wanted not in names:
            raise UserError(f"{self._source.name} has no split {wanted} (splits: {', '.join(names)})")
        if wanted == "train":
            for name in _VALIDATION_SPLITS:
                if name in names:
                    return [(name, "validation"), (wanted, "train")]
        return [(wanted, None)]

    def _check_columns(self, columns: list[str] | None) -> None:
        """Raise UserError if the data set declares its columns and a required one is missing."""
        if not columns:
            return
        missing = [name for name in self._required_columns if name not in columns]
        if self._mapper is not None and (name := self._mapper.missing_column(columns)):
            missing.append(name)
        if missing:
            raise UserError(
                f"{self._source.name} has no column {missing[0]} (columns: {', '.join(columns)}): name the column of "
                "the text with --data.text_field, or make a prompt of columns with --data.template and "
                "--data.response_field"
            )

    def _permanent_error(self, error: Exception) -> UserError | None:
        """Return the error to report if retrying cannot help; None for errors that may pass."""
        if isinstance(error, UserError):
            return error
        kinds = {kind.__name__ for kind in type(error).__mro__}
        text = " ".join(str(error).split())
        name = self._source.name
        repo = self._source.dataset.repo
        if "GatedRepoError" in kinds or "is a gated dataset" in text:
            return UserError(
                f"{name}: {repo} is gated: accept its terms on https://huggingface.co/datasets/{repo}, then "
                "`hf auth login` or set HF_TOKEN"
            )
        if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
            revision = f" at revision {self._source.revision}" if self._source.revision else ""
            return UserError(f"{name}: the hub has no data set {repo}{revision} (or it is private: set HF_TOKEN)")
        if isinstance(error, ValueError) and "onfig" in text:
            return UserError(f"{name}: {text}. Choose one with hf:{repo}:CONFIG")
        if "Dataset scripts are no longer supported" in text:
            return UserError(
                f"{name}: {repo} is generated by a script in its repository, which is not executed: use a copy in "
                "Parquet"
            )
        # A truncated download is not valid JSON or Parquet: retrying may help.
        is_truncation = bool(kinds & {"JSONDecodeError", "ArrowException"})
        if isinstance(error, ValueError | TypeError | KeyError) and not is_truncation:
            return UserError(f"{name}: {repo} cannot be read ({type(error).__name__}: {text[:300]})")
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}".rstrip(": ")


def check_reachable(name: str, alternative: str = _NO_NETWORK) -> None:
    """Check by a socket connection that the hub can be reached; the `datasets` library alone takes minutes to fail.

    Connects to the host of HF_ENDPOINT, or to the proxy that leads there.

    Args:
        name: What needs the network, for the message.
        alternative: What can be done without a network, for the message.

    Raises:
        UnreachableError: There is no connection within `CONNECT_TIMEOUT`.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scheme = urlsplit(endpoint).scheme
    proxy = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY")
    is_local = (urlsplit(endpoint).hostname or "") in ("127.0.0.1", "localhost")
    url = urlsplit(proxy if proxy and not is_local else endpoint)
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    failure: list[str] = [f"no answer in {CONNECT_TIMEOUT:.0f} s"]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=CONNECT_TIMEOUT).close()
            failure.clear()
        except OSError as error:
            failure[0] = str(error.strerror or error)

    thread = threading.Thread(target=connect, daemon=True)  # name resolution has no timeout of its own
    thread.start()
    thread.join(CONNECT_TIMEOUT)
    if failure:
        raise UnreachableError(
            f"{name} needs the network, but {address[0]} cannot be reached ({failure[0]}). "
            f"Without a network: {alternative}"
        )
