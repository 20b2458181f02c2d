"""What text there is and what was made of it: `python -m slm_jax.data list | prepare | inspect`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from slm_jax.cli.options import config_from_args, wrapped
from slm_jax.config.schema import Config
from slm_jax.data.batches.prefetch import make_batches
from slm_jax.data.corpus import cache
from slm_jax.data.corpus.corpus import Corpus, open_corpus, read_manifest
from slm_jax.data.prepare import describe_corpus, load_tokenizer, prepare_cached, resolve_tokenizer
from slm_jax.data.sources.catalog import CATALOG
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural, text_size
from tokenizer import HybridTokenizer

HELP = """Text: what there is, and what is prepared in the cache that all runs share.

  list              the sources that have a name, and the cache
  prepare           make the tokenizer and the corpus that these options need; a run then begins at once
  inspect [FOLDER]  a corpus (or that of a run, or else of these options): sizes, checksums, padding, texts

--config NAME|PATH   preset in configs/ or a TOML file; every option of training overrides it"""

_SAMPLES = 3
_SHOWN = 240  # characters of a sample text


def main() -> None:
    """The command line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(wrapped(HELP))
    elif command == "list":
        config = config_from_args(rest, "python -m slm_jax.data list", HELP)
        print("\n".join(_list(cache.cache_folder(config.data.cache))))
    elif command == "prepare":
        config = config_from_args(rest, "python -m slm_jax.data prepare", HELP)
        tokenizer, entries = prepare_cached(config, _say, resolve_tokenizer(config))
        for entry, _ in entries:
            print("\n".join([*describe_corpus(open_corpus(entry, tokenizer)), str(entry)]))
    elif command == "inspect":
        folder = Path(rest.pop(0)) if rest and not rest[0].startswith("--") else None
        config = config_from_args(rest, "python -m slm_jax.data inspect", HELP)
        for place, tokenizer in _corpora(folder, config):
            print("\n".join(_inspect(place, open_corpus(place, tokenizer, verify=True), tokenizer, config)))
    else:
        raise UserError(f"unknown command {command}: list, prepare or inspect")


def _list(folder: Path) -> Iterator[str]:
    yield "Sources (--data.source):"
    yield f"  {'python-docs':12} the documentation inside this Python, 2.5 MB; no network"
    yield f"  {'python-qa':12} 4,700 questions on its modules, classes and functions, 0.5 MB; no network"
    yield f"  {'files':12} your own text, with --data.files"
    for name, each in CATALOG.items():
        yield f"  {name:12} {each.about} (hf:{each.repo})"
    yield "  hf:OWNER/NAME[:CONFIG][:SPLIT]  any data set of the Hugging Face hub"
    yield f"\nPrepared, in {folder}:"
    found = sorted((folder / "corpora").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    for path in found:
        try:
            manifest = read_manifest(path.parent)
        except UserError as error:
            yield f"  {error}"
            continue
        size = sum(each.stat().st_size for each in path.parent.iterdir())
        train, held_out = manifest["train"], manifest["validation"]
        yield (
            f"  {manifest['name']}: {plural(train['tokens'], 'token')} of {text_size(train['bytes'])} to train on, "
            f"{text_size(held_out['bytes'])} held out; {text_size(size)} in {path.parent.name}"
        )
    for path in sorted((folder / "corpora").glob("*.partial")):
        yield f"  {path.name}: begun; the command that began it goes on with it"
    if not found:
        yield "  nothing yet"


def _corpora(folder: Path | None, config: Config) -> Iterator[tuple[Path, HybridTokenizer]]:
    """(folder, tokenizer) of what is to be inspected."""
    if folder is None:
        tokenizer, entries = prepare_cached(config, _say, resolve_tokenizer(config))
        yield from ((entry, tokenizer) for entry, _ in entries)
        return
    if (folder / "corpus").is_dir():  # of a run
        folder = folder / "corpus"
    if not (folder / "manifest.json").is_file():
        raise UserError(f"there is no corpus in {folder} (no manifest.json): list shows those that are prepared")
    mixed = [folder / each["folder"] for each in read_manifest(folder).get("mix", ())]
    for each in mixed or [folder]:
        yield each, load_tokenizer(str(each / "tokenizer.hybtok"))


def _inspect(folder: Path, corpus: Corpus, tokenizer: HybridTokenizer, config: Config) -> Iterator[str]:
    manifest = corpus.manifests[0]
    yield f"{manifest['name']} in {folder}"
    yield f"  fingerprint {corpus.fingerprint[:16]}, tokenizer of {tokenizer.vocab_size} ids, all checksums are right"
    yield f"  options: {', '.join(f'{name} {value}' for name, value in manifest['options'].items())}"
    for line in describe_corpus(corpus):
        yield f"  {line}"
    for side, split in (("train", corpus.train), ("validation", corpus.validation)):
        lengths = np.diff(split.ends, prepend=0)
        middle, most = (int(np.quantile(lengths, q)) for q in (0.5, 0.95))
        yield (
            f"  {side}: {plural(split.num_documents, 'document')} in {plural(len(split.shards), 'shard')}; tokens of "
            f"a document: median {middle:,}, 95 % up to {most:,}, longest {int(lengths.max()):,}"
        )
    for mode in ("packed", "padded"):
        data = config.data.model_copy(update={"mode": mode})
        try:
            batches = make_batches(config.model_copy(update={"data": data}), corpus)
        except UserError as error:
            yield f"  {mode}: {error}"
        else:
            size = f"{config.train.batch_size} x {config.train.sequence_length}"
            yield f"  {mode} at {size}: {'; '.join(batches.summary(config.train.steps))}"
    for number in np.linspace(0, corpus.train.num_documents - 1, _SAMPLES).astype(int):
        ends = corpus.train.ends
        start = int(ends[number - 1]) if number else 0
        text = tokenizer.decode(corpus.train[start : min(int(ends[number]), start + _SHOWN)].tolist())[:_SHOWN]
        yield f"  document {number:,}: {text!r}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
