"""List sources, and prepare or inspect text: `python -m slm_jax.data list | prepare | inspect`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm_jax.cli.options import config_from_args, wrapped
from slm_jax.config.schema import Config
from slm_jax.data.batches.modes import make_batches
from slm_jax.data.corpus import cache
from slm_jax.data.corpus.corpus import Corpus, open_corpus, read_manifest
from slm_jax.data.load import load_tokenizer
from slm_jax.data.prepare import describe_corpus, prepare_cached
from slm_jax.data.sources.catalog import CATALOG
from slm_jax.training.tokenizer import resolve_tokenizer
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural, text_size
from slm_jax.utils.progress import show_log
from tokenizer import HybridTokenizer

HELP = """List the sources of text, and prepare text in the cache that all runs share.

  list              the named sources, and the prepared text in the cache
  prepare           make the tokenizer and the corpus for these options; a run then starts at once
  inspect [FOLDER]  a corpus (or that of a run, or that of these options): sizes, checksums, padding, samples

--config NAME|PATH   preset in configs/ or a TOML file; every option of training overrides it"""

_SAMPLES = 3  # documents
_SAMPLE_CHARACTERS = 240


def main() -> None:
    """Run the command line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    show_log()
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(wrapped(HELP))
    elif command == "list":
        config = config_from_args(rest, "python -m slm_jax.data list", HELP)
        print("\n".join(_list(cache.cache_folder(config.data.cache))))
    elif command == "prepare":
        config = config_from_args(rest, "python -m slm_jax.data prepare", HELP)
        tokenizer, entries = prepare_cached(config, resolve_tokenizer(config))
        for entry in entries:
            print("\n".join([*describe_corpus(open_corpus(entry.folder, tokenizer)), str(entry.folder)]))
    elif command == "inspect":
        folder = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
        config = config_from_args(rest, "python -m slm_jax.data inspect", HELP)
        for path, tokenizer in _corpora(folder, config):
            print("\n".join(_inspect(path, open_corpus(path, tokenizer, verify=True), tokenizer, config)))
    else:
        raise UserError(f"unknown command {command}: use list, prepare or inspect")


def _list(folder: Path) -> Iterator[str]:
    """Yield lines about the named sources and the corpora in the cache."""
    yield "Sources (--data.source):"
    yield f"  {'python-docs':12} the documentation bundled with this Python, 2.5 MB; no network"
    yield f"  {'python-qa':12} 4,700 questions about its modules, classes and functions, 0.5 MB; no network"
    yield f"  {'files':12} your own text, with --data.files"
    for name, dataset in CATALOG.items():
        yield f"  {name:12} {dataset.description} (hf:{dataset.repo})"
    yield "  hf:OWNER/NAME[:CONFIG][:SPLIT]  any data set of the Hugging Face hub"
    yield f"\nPrepared, in {folder}:"
    manifests = sorted((folder / "corpora").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for path in manifests:
        try:
            manifest = read_manifest(path.parent)
        except UserError as error:
            yield f"  {error}"
            continue
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        train = manifest["train"]
        yield (
            f"  {manifest['name']}: {plural(train['tokens'], 'token')} of {text_size(train['bytes'])} to train on, "
            f"{text_size(manifest['validation']['bytes'])} held out; {text_size(size)} in {path.parent.name}"
        )
    for path in sorted((folder / "corpora").glob("*.partial")):
        yield f"  {path.name}: incomplete; the command that started it resumes it"
    if not manifests:
        yield "  nothing yet"


def _corpora(folder: Path | None, config: Config) -> Iterator[tuple[Path, HybridTokenizer]]:
    """Yield (folder, tokenizer) of the corpora to inspect."""
    if folder is None:
        tokenizer, entries = prepare_cached(config, resolve_tokenizer(config))
        for entry in entries:
            yield entry.folder, tokenizer
        return
    if (folder / "corpus").is_dir():  # the folder of a run
        folder = folder / "corpus"
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"there is no corpus in {folder} (no manifest.json): python -m slm_jax.data list shows the prepared ones"
        )
    mixed = [folder / entry["folder"] for entry in read_manifest(folder).get("mix", ())]
    for path in mixed or [folder]:
        yield path, load_tokenizer(str(path / "tokenizer.hybtok"))


def _inspect(folder: Path, corpus: Corpus, tokenizer: HybridTokenizer, config: Config) -> Iterator[str]:
    """Yield lines about a corpus whose checksums were verified."""
    manifest = corpus.manifests[0]
    yield f"{manifest['name']} in {folder}"
    yield f"  fingerprint {corpus.fingerprint[:16]}, tokenizer of {tokenizer.vocab_size} ids, all checksums match"
    yield f"  options: {', '.join(f'{name} {value}' for name, value in manifest['options'].items())}"
    for line in describe_corpus(corpus):
        yield f"  {line}"
    for name, stream in (("train", corpus.train), ("validation", corpus.validation)):
        lengths = np.diff(stream.ends, prepend=0)
        median, high = (int(np.quantile(lengths, q)) for q in (0.5, 0.95))
        yield (
            f"  {name}: {plural(stream.num_documents, 'document')} in {plural(len(stream.shards), 'shard')}; tokens "
            f"per document: median {median:,}, 95th percentile {high:,}, longest {int(lengths.max()):,}"
        )
    for mode in ("packed", "padded"):
        yield f"  {_mode_text(mode, corpus, config)}"
    ends = corpus.train.ends
    for number in np.linspace(0, corpus.train.num_documents - 1, _SAMPLES).astype(int):
        start = int(ends[number - 1]) if number else 0
        ids = corpus.train[start : min(int(ends[number]), start + _SAMPLE_CHARACTERS)]
        yield f"  document {number:,}: {tokenizer.decode(ids.tolist())[:_SAMPLE_CHARACTERS]!r}"


def _mode_text(mode: str, corpus: Corpus, config: Config) -> str:
    """Return the summary of a corpus in batches of a mode, or why there are none."""
    data = config.data.model_copy(update={"mode": mode})
    try:
        batches = make_batches(config.model_copy(update={"data": data}), corpus)
    except UserError as error:
        return f"{mode}: {error}"
    size = f"{config.train.batch_size} x {config.train.sequence_length}"
    return (
        f"{mode} at {size}: {'; '.join([*batches.summary(config.train.steps), *batches.warnings(config.train.steps)])}"
    )
