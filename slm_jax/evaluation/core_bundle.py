"""The data of CORE: the evaluation bundle that nanochat publishes, from a folder, a zip file, a URL or the hub.

core.yaml            the tasks: label, file, type, number of examples, delimiter of the continuation
eval_meta_data.csv   the random baseline of each task, in percent
eval_data/           the records, JSON Lines
"""

import csv
import hashlib
import io
import json
import logging
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.data.sources.hub import UnreachableError, check_reachable
from slm_jax.evaluation.datasets import Record
from slm_jax.utils.errors import UserError
from slm_jax.utils.extras import import_optional
from slm_jax.utils.files import replace_file, user_cache_folder

logger = logging.getLogger(__name__)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
HUB = "hf:"
_TASKS = "core.yaml"
_BASELINES = "eval_meta_data.csv"
_RECORDS = "eval_data"
_TIMEOUT = 30  # seconds without an answer
_COLUMNS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
"""The columns of the records of each type of task."""


class CoreTask(NamedTuple):
    """One of the tasks of CORE.

    Attributes:
        label: Its name.
        file: Its records, below eval_data/.
        kind: `multiple_choice`, `schema` or `language_modeling`.
        shots: Number of examples in a prompt.
        delimiter: Text between the context and the continuation.
        baseline: Accuracy of guessing, from 0 to 1.
    """

    label: str
    file: str
    kind: str
    shots: int
    delimiter: str
    baseline: float


class Bundle(NamedTuple):
    """The files of a bundle, and a text that names their origin."""

    read: Callable[[str], bytes]
    origin: str


def open_bundle(path: str, option: str = "--tasks") -> Bundle:
    """Open a bundle.

    Args:
        path: A folder, a zip file, or `hf:OWNER/NAME`, a data set of the hub with these files; empty: the bundle that
            nanochat publishes, downloaded once to the user's cache.
        option: The option that names the task, for messages.

    Raises:
        UserError: There is no such folder or file, or it cannot be downloaded.
    """
    if path.startswith(HUB):
        return _hub_bundle(path.removeprefix(HUB), option)
    if not path:
        return _zip_bundle(_downloaded(option), BUNDLE_URL)
    if Path(path).is_dir():
        return Bundle(_folder_reader(Path(path)), path)
    return _zip_bundle(Path(path), path)


def check_path(path: str) -> None:
    """Raise UserError if a path names no bundle; one on the hub is looked for when it is read."""
    if path.startswith(HUB):
        if len([part for part in path.removeprefix(HUB).split("/") if part]) != 2:
            raise UserError(f"{path} is no data set of the hub: expected hf:OWNER/NAME")
        return
    if Path(path).is_dir():
        if not (Path(path) / _TASKS).is_file():
            raise UserError(f"{path} has no {_TASKS}: name the folder of the evaluation bundle")
    elif not zipfile.is_zipfile(path):
        raise UserError(f"{path} is neither a folder nor a zip file: name the evaluation bundle")


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    root = folder.resolve()

    def read(name: str) -> bytes:
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise UserError(f"{_TASKS} of {folder} names a file outside of it: {name}")
        try:
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {folder / name}: {error.strerror}") from None

    return read


def _zip_bundle(path: Path, origin: str) -> Bundle:
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        archive = zipfile.ZipFile(path)
        top = next((name.removesuffix(_TASKS) for name in archive.namelist() if Path(name).name == _TASKS), None)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a valid zip file ({error}): remove it, or name another one") from None
    if top is None:
        raise UserError(f"{path} has no {_TASKS}: name the evaluation bundle")

    def read(name: str) -> bytes:
        try:
            return archive.read(f"{top}{name}")
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {name} of {path}: {error}") from None

    return Bundle(read, f"{origin} (sha256 {digest[:12]})")


def _hub_bundle(repo: str, option: str) -> Bundle:
    check_reachable("core", f"{option} core=DIR (the evaluation bundle)")
    hub = import_optional("huggingface_hub", f"reading {repo}")
    try:
        commit = hub.HfApi().dataset_info(repo).sha
    except Exception as error:  # the library raises its own types, and those of its HTTP client
        raise UserError(f"cannot read the data set {repo} of the hub: {str(error).partition(chr(10))[0]}") from None

    def read(name: str) -> bytes:
        try:
            return Path(hub.hf_hub_download(repo, name, repo_type="dataset", revision=commit)).read_bytes()
        except Exception as error:
            raise UserError(f"cannot read {name} of {repo}: {str(error).partition(chr(10))[0]}") from None

    return Bundle(read, f"{HUB}{repo} at {commit[:10]}")


def _downloaded(option: str) -> Path:
    """Return the published bundle in the user's cache, downloaded if it is missing."""
    target = user_cache_folder() / "evaluation" / "core_bundle.zip"
    if target.is_file():
        return target
    logger.info("core: downloading %s to %s", BUNDLE_URL, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(BUNDLE_URL, timeout=_TIMEOUT) as answer, replace_file(target) as partial:
            with partial.open("wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
            if not zipfile.is_zipfile(partial):
                raise UserError(f"{BUNDLE_URL} did not answer with a zip file")
    except (OSError, urllib.error.URLError) as error:
        raise UnreachableError(
            f"core needs the network, but {BUNDLE_URL} cannot be read ({error}). Without a network: {option} core=DIR "
            "(the evaluation bundle, a folder or zip file)"
        ) from None
    return target


def read_tasks(bundle: Bundle) -> list[tuple[CoreTask, list[Record]]]:
    """Return the tasks of a bundle with their records.

    Raises:
        UserError: A file is missing or malformed.
    """
    baselines = _baselines(bundle)
    tasks = [_core_task(entry, baselines, bundle) for entry in _entries(bundle)]
    return [(task, _records(task, bundle)) for task in tasks]


def _entries(bundle: Bundle) -> list[Any]:
    import yaml

    try:
        content = yaml.safe_load(bundle.read(_TASKS))
        entries = content["icl_tasks"]
        if not isinstance(entries, list) or not entries:
            raise TypeError("icl_tasks is not a list of tasks")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{_TASKS} of {bundle.origin} is malformed: {' '.join(str(error).split())}") from None
    return entries


def _baselines(bundle: Bundle) -> dict[str, float]:
    text = bundle.read(_BASELINES).decode("utf-8-sig", "replace")
    try:
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(io.StringIO(text))}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(
            f"{_BASELINES} of {bundle.origin} is malformed ({error}): expected the columns Eval Task and Random "
            "baseline, in percent"
        ) from None


def _core_task(entry: Any, baselines: dict[str, float], bundle: Bundle) -> CoreTask:
    try:
        shots = entry["num_fewshot"]
        task = CoreTask(
            label=str(entry["label"]),
            file=str(entry["dataset_uri"]),
            kind=str(entry["icl_task_type"]),
            shots=int(shots[0] if isinstance(shots, list) else shots),
            delimiter=str(entry.get("continuation_delimiter", " ")),
            baseline=baselines.get(str(entry["label"]), -1.0),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{_TASKS} of {bundle.origin}: a task is malformed ({error}): {entry!r:.120}") from None
    if task.kind not in _COLUMNS:
        known = ", ".join(_COLUMNS)
        raise UserError(f"{_TASKS} of {bundle.origin}: {task.label} has the type {task.kind}; expected one of {known}")
    if task.shots < 0:
        raise UserError(f"{_TASKS} of {bundle.origin}: {task.label} has num_fewshot {task.shots}: should be 0 or more")
    if not 0 <= task.baseline < 1:
        raise UserError(f"{bundle.origin}: {task.label} has no random baseline below 100 % in {_BASELINES}")
    return task


def _records(task: CoreTask, bundle: Bundle) -> list[Record]:
    """Return the records of a task. Raises UserError for one that is malformed."""
    records = []
    name = f"{_RECORDS}/{task.file}"
    try:
        lines = bundle.read(name).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{bundle.origin}: {name} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            for column, kind in _COLUMNS[task.kind].items():
                if not isinstance(record[column], kind):
                    raise TypeError(f"{column} is not {kind.__name__}")
            options = record.get("choices" if task.kind == "multiple_choice" else "context_options")
            if task.kind != "language_modeling" and not 0 <= record["gold"] < len(options):
                raise ValueError(f"gold {record['gold']} of {len(options)} options")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{bundle.origin}: {name} line {number} is malformed: {error}") from None
        records.append(record)
    if not records:
        raise UserError(f"{bundle.origin}: {name} has no records")
    return records
