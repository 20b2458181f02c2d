"""Documents of the Hugging Face hub, streamed: nothing is downloaded before it is read, nor kept.

`datasets` and `pyarrow` come with the extra [data].
"""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from slm_jax.config.schema import DataConfig
from slm_jax.data.sources.catalog import HubDataset, find_dataset
from slm_jax.data.sources.documents import Document, InvalidRow, Split
from slm_jax.data.sources.files import import_optional
from slm_jax.data.sources.registry import make_columns
from slm_jax.utils.errors import UserError

PATIENCE = 3.0  # seconds in which the hub must take a connection
RETRIES = (1, 2, 4, 8, 16, 32)  # seconds of waiting after failures that follow one another
_VALIDATION = ("validation", "valid", "val", "dev")
_TITLE = re.compile(r" = [^=].* = \n?")


def make_hub_source(name: str, config: DataConfig) -> "HubSource":
    """The source of a name or hub id, with what the config says about its columns. Raises UserError."""
    found = find_dataset(name)
    return HubSource(name, found._replace(columns=make_columns(config, found.columns)), config.revision)


class HubSource:
    """See `Source`. Its own validation split, if there is one, comes first."""

    def __init__(self, name: str, found: HubDataset, revision: str = ""):
        self.name, self.set, self.revision = name, found, revision

    def describe(self) -> Any:
        """What was asked for; what the newest revision was is decided, and noted, when the text is first read."""
        s, c = self.set, self.set.columns
        return ["hub", s.repo, s.config, s.split, self.revision, c.text, c.template, c.response, s.lines]

    def read(self, position: Any = None) -> "HubReader":
        """position: see `HubReader.position`."""
        return HubReader(self, position)


class HubReader:
    """See `Reader`; connects when the first document is asked for."""

    def __init__(self, source: HubSource, position: Any):
        self._source, self._begun = source, False
        at = position or {"commit": None, "split": 0, "state": None, "lines": []}
        self._commit, self._split, self._state, self._lines = (at[k] for k in ("commit", "split", "state", "lines"))

    def position(self) -> Any:
        """The commit, which split is read, where it is, and the lines of an article that has begun."""
        return {"commit": self._commit, "split": self._split, "state": self._state, "lines": self._lines}

    @property
    def version(self) -> str:
        """The commit; "" before the hub was asked."""
        return self._commit or ""

    def __iter__(self) -> Iterator[Document | InvalidRow]:
        failures = 0
        while True:
            before = (self._split, self._state)
            try:
                yield from self._read()
                return
            except Exception as error:  # the library and those below it raise what they like
                if not (isinstance(error, UnreachableError) and self._begun):
                    self._refuse_lasting(error)
                failures = 0 if (self._split, self._state) != before else failures
                if failures == len(RETRIES):
                    raise UserError(
                        f"{self._source.name}: the connection failed {failures + 1} times ({_first_line(error)}); "
                        "what was prepared is kept: give the same command again"
                    ) from None
                wait = RETRIES[failures]
                failures += 1
                print(f"{self._source.name}: {_first_line(error)}; again in {wait} s", file=sys.stderr, flush=True)
                time.sleep(wait)

    def _read(self) -> Iterator[Document | InvalidRow]:
        """What is left; may fail in the middle, and goes on after what it gave when it is called again."""
        builder = self._builder()
        splits = self._splits(builder)
        while self._split < len(splits):
            name, side = splits[self._split]
            dataset = builder.as_streaming_dataset(split=name)
            self._check_columns(dataset.column_names)
            if self._state is not None:
                dataset.load_state_dict(self._state)
            for row in dataset:
                self._state, self._begun = dataset.state_dict(), True
                yield from self._documents(row, side, name)
            if self._lines:
                article, self._lines = "".join(self._lines), []
                yield Document(article, split=side)
            self._split, self._state = self._split + 1, None

    def _documents(self, row: Any, side: Split | None, split: str) -> Iterator[Document | InvalidRow]:
        what = self._source.set.columns.to_document(row, f"{self._source.name}, split {split}")
        if isinstance(what, InvalidRow):
            yield what
        elif not self._source.set.lines:
            yield what._replace(split=side)
        elif _TITLE.fullmatch(what.text) and "".join(self._lines).strip():
            article, self._lines = "".join(self._lines), [what.text]
            yield Document(article, split=side)
        else:
            self._lines = [*self._lines, what.text]

    def _builder(self) -> Any:
        """The library's object for the data set, at one commit. Raises UserError if the hub cannot be reached."""
        import_optional("pyarrow", f"reading {self._source.name}")
        check_reachable(self._source.name)
        datasets = import_optional("datasets", f"reading {self._source.name}")
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        # We go on from where a failure was; the library would try the same for two minutes.
        datasets.config.STREAMING_READ_MAX_RETRIES, datasets.config.STREAMING_READ_RETRY_INTERVAL = 2, 1
        wanted = self._source.set
        if self._commit is None:
            hub = import_optional("huggingface_hub", f"reading {self._source.name}")
            self._commit = hub.HfApi().dataset_info(wanted.repo, revision=self._source.revision or None).sha
        return datasets.load_dataset_builder(wanted.repo, wanted.config or None, revision=self._commit)

    def _splits(self, builder: Any) -> list[tuple[str, Split | None]]:
        """(name, side) of the splits to read. Raises UserError if the wanted one is not there."""
        names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
        wanted = self._source.set.split
        if wanted not in names:
            raise UserError(f"{self._source.name} has no split {wanted}; there are: {', '.join(names)}")
        own = next((name for name in _VALIDATION if name in names), None) if wanted == "train" else None
        return [(own, "validation"), (wanted, "train")] if own else [(wanted, None)]

    def _check_columns(self, there: list[str] | None) -> None:
        for name in self._source.set.columns.required_columns() if there else ():
            if name not in there:  # type: ignore[operator]
                raise UserError(
                    f"{self._source.name} has no column {name} (there: {', '.join(there or ())}): name the text's with "
                    "--data.text_field, or make a prompt of columns with --data.template and --data.response_field"
                )

    def _refuse_lasting(self, error: Exception) -> None:
        """Raises UserError for what trying again does not mend."""
        if isinstance(error, UserError):
            raise error
        names, text = {kind.__name__ for kind in type(error).__mro__}, " ".join(str(error).split())
        name, repo = self._source.name, self._source.set.repo
        if "GatedRepoError" in names or "is a gated dataset" in text:
            raise UserError(
                f"{name}: {repo} is gated: accept its terms on https://huggingface.co/datasets/{repo}, then "
                "`hf auth login` or set HF_TOKEN"
            ) from None
        if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
            at = f" at revision {self._source.revision}" if self._source.revision else ""
            raise UserError(f"{name}: the hub has no data set {repo}{at} (or it is private: set HF_TOKEN)") from None
        if isinstance(error, ValueError) and "onfig" in text:
            raise UserError(f"{name}: {text}. Choose one with hf:{repo}:CONFIG") from None
        if "Dataset scripts are no longer supported" in text:
            raise UserError(f"{name}: {repo} is made by a script of its own, which is not run: use a copy in Parquet")
        # What was cut off on its way is no valid JSON or Parquet: that is worth another try.
        if isinstance(error, ValueError | TypeError | KeyError) and not names & {"JSONDecodeError", "ArrowException"}:
            raise UserError(f"{name}: {repo} cannot be read ({type(error).__name__}: {text[:300]})") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}".rstrip(": ")


class UnreachableError(UserError):
    """There is no connection to the hub: told at once before anything was read, after that worth another try."""


def check_reachable(name: str, instead: str = "--data.source python-docs, or your own text with --data.files") -> None:
    """Raises UnreachableError if the hub (HF_ENDPOINT, or the proxy that leads there) takes no connection within 3 s;
    without asking, the library tries for minutes. instead: what to do without a network."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    scheme = urlsplit(endpoint).scheme
    proxy = os.environ.get(f"{scheme}_proxy") or os.environ.get(f"{scheme.upper()}_PROXY")
    local = (urlsplit(endpoint).hostname or "") in ("127.0.0.1", "localhost")
    to = urlsplit(proxy if proxy and not local else endpoint)
    address = (to.hostname or "", to.port or (443 if to.scheme == "https" else 80))
    failure: list[str] = [f"no answer in {PATIENCE:.0f} s"]

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=PATIENCE).close()
            failure.clear()
        except OSError as error:
            failure[0] = str(error.strerror or error)

    thread = threading.Thread(target=connect, daemon=True)  # resolving the name has no time limit of its own
    thread.start()
    thread.join(PATIENCE)
    if failure:
        raise UnreachableError(
            f"{name} needs the network, but {address[0]} cannot be reached ({failure[0]}). Without a network: {instead}"
        )
