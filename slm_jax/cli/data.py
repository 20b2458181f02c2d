"""List sources, and prepare or inspect text: `python -m slm_jax.data list | prepare | inspect`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from slm_jax.cli import bare_words
from slm_jax.cli.help import wrapped
from slm_jax.cli.options import Flag, make_config, read_options_and_config
from slm_jax.config.schema import Config
from slm_jax.run.directory import Run, find_run
from slm_jax.utils.errors import UserError
from slm_jax.utils.formatting import plural
from slm_jax.utils.progress import show_log
from slm_jax.utils.text_tokenizer import TextTokenizer
from slm_jax.utils.tokenizer_files import tokenizer_file

HELP = """List the sources of text, and prepare text in the cache that all runs share.

  list             the named sources, and the prepared text in the cache
  prepare [FILE]   make the tokenizer and the corpus for these options; a run then starts at once
  inspect [PATH]   sizes, checksums, padding and samples of a corpus: that of a run, of a folder, or of text files

python -m slm_jax.data COMMAND --help lists the options."""

_SHAPES_CORPUS = ("data.", "tokenizer.", "init.from_")
_SHAPES_BATCHES = ("train.batch_size", "train.sequence_length", "train.steps")


@dataclass(frozen=True)
class ListOptions:
    """List the named sources of text, and the prepared text in the cache."""

    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file, which names the cache."""


@dataclass(frozen=True)
class PrepareOptions:
    """Make the tokenizer and the corpus for these options in the cache that all runs share.

    A run with the same options then starts at once. Other options of training are accepted and have no effect.
    """

    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file; the options of the config override it."""
    run: Annotated[str, Flag(metavar="PATH")] = ""
    """Use the config and the tokenizer of this run."""
    part: Annotated[str, Flag(metavar="I/N")] = ""
    """Prepare part I of N only, for several processes or hosts that share the cache; 0/N: the tokenizer only."""
    merge: Annotated[int, Flag(metavar="N")] = 0
    """Merge N parts; the result has the same bytes as without parts."""
    ray: Annotated[int, Flag(metavar="N")] = 0
    """Prepare N parts as tasks of Ray, and merge them (extra [ray])."""


@dataclass(frozen=True)
class InspectOptions:
    """Show sizes, checksums, padding and samples of a corpus.

        python -m slm_jax.data inspect runs/NAME      that of a run, in batches of its size
        python -m slm_jax.data inspect my.txt         that of text files, which is prepared first

    Without a path: that of these options. Other options of training are accepted and have no effect.
    """

    path: Annotated[tuple[str, ...], Flag(positional=True, metavar="PATH …")] = ()
    """A run, the folder of a corpus (`data list` names those of the cache), or text files."""
    config: Annotated[str, Flag(metavar="NAME|PATH")] = ""
    """Preset in configs/, or a TOML file; the options of the config override it."""
    run: Annotated[str, Flag(metavar="PATH")] = ""
    """A run, as for the other commands."""


def main() -> None:
    """Run the command line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    show_log()
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(wrapped(HELP))
    elif command in _COMMANDS:
        _COMMANDS[command](rest)
    else:
        raise UserError(f"unknown command {command}: use {', '.join(_COMMANDS)}")


def _list(args: Sequence[str]) -> None:
    used = ("data.cache",)
    options, overrides = read_options_and_config(ListOptions, args, "python -m slm_jax.data list", used=used)
    if unused := [name for name in overrides if name not in used]:
        raise UserError(f"unknown option --{unused[0]} (data list has no options but --data.cache and --config)")
    config = make_config(overrides, options.config)
    from slm_jax.data.corpus import cache
    from slm_jax.data.inspection import describe_sources

    print("\n".join(describe_sources(cache.cache_folder(config.data.cache))))


def _prepare(args: Sequence[str]) -> None:
    options, overrides = read_options_and_config(
        PrepareOptions, args, "python -m slm_jax.data prepare", files=True, used=_SHAPES_CORPUS
    )
    part = _part(options)
    run = find_run(options.run) if options.run else None
    config = _config(options.config, overrides, run)
    from slm_jax.data.corpus.corpus import open_corpus
    from slm_jax.data.prepare import describe_corpus, prepare_cached
    from slm_jax.training.tokenizer import resolve_tokenizer

    saved = str(run.tokenizer) if run is not None and run.tokenizer.is_file() else ""
    tokenizer_path = saved or resolve_tokenizer(config)
    if part is not None:
        _prepare_part(config, part, tokenizer_path)
        return
    if options.ray:
        from slm_jax.data.ray_runner import prepare_parts

        prepare_parts(config, options.ray, tokenizer_path)
    tokenizer, entries = prepare_cached(config, tokenizer_path, merge=options.merge or options.ray)
    for entry in entries:
        print("\n".join([*describe_corpus(open_corpus(entry.folder, tokenizer)), str(entry.folder)]))


def _part(options: PrepareOptions) -> tuple[int, int] | None:
    """Return number and count of the part that is asked for.

    Raises:
        UserError: It is not a part, or the options exclude each other.
    """
    given = [f"--{name}" for name in ("part", "merge", "ray") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one of them")
    for name in ("merge", "ray"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} is not a number of parts: use 1 or more")
    if not options.part:
        return None
    number, slash, count = options.part.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) <= int(count) and int(count)):
        raise UserError(f"--part {options.part} is not I/N: use --part 1/3 to --part 3/3, or 0/3 for the tokenizer")
    return int(number), int(count)


def _prepare_part(config: Config, part: tuple[int, int], tokenizer_path: str) -> None:
    from slm_jax.data.corpus.part_files import Part
    from slm_jax.data.prepare import prepare_part

    states = prepare_part(config, Part(*part), tokenizer_path)
    if not part[0]:
        print("the tokenizer is ready")
    for state in states:
        if state is None:
            print("this text is prepared already")
        else:
            print(f"{state.header['name']}: part {part[0]} of {part[1]} has {plural(state.total('tokens'), 'token')}")


def _inspect(args: Sequence[str]) -> None:
    options, overrides = read_options_and_config(
        InspectOptions, args, "python -m slm_jax.data inspect", used=(*_SHAPES_CORPUS, *_SHAPES_BATCHES)
    )
    words = [*([options.run] if options.run else []), *options.path]
    folder: Path | None = None
    run: Run | None = None
    if options.run or (len(words) == 1 and bare_words.is_run(words[0])):
        if len(words) > 1:
            raise UserError(f"{' '.join(words)}: inspect one run at a time")
        run = find_run(words[0])
        folder = run.corpus
        if not folder.is_dir():
            raise UserError(
                f"{run.path} has no text (corpus/ is missing): python -m slm_jax.data prepare --run {run.path} makes it"
            )
    elif len(words) == 1 and (manifests := [path for path in _manifests(words[0]) if path.is_file()]):
        folder = manifests[0].parent
    elif len(words) == 1 and not bare_words.exists(words[0]) and not bare_words.is_glob(words[0]):
        raise UserError(
            f"no file, folder, run or prepared text {words[0]!r} (python -m slm_jax.data list shows prepared text)"
        )
    elif words:
        bare_words.text_files(words)
        overrides["data.files"] = tuple(words)
    config = _config(options.config, overrides, run)
    from slm_jax.data.corpus.corpus import open_corpus
    from slm_jax.data.inspection import inspect_corpus, overlap_summary
    from slm_jax.data.mask_view import uses_color

    corpora = []
    for path, tokenizer in _corpora(folder, config):
        corpora.append(open_corpus(path, tokenizer, verify=True))
        print("\n".join(inspect_corpus(path, corpora[-1], tokenizer, config, uses_color(sys.stdout))))
    print(overlap_summary(corpora, folder, tokenizer, config))


def _manifests(word: str) -> list[Path]:
    """Return the files that make a path the folder of a corpus, or a run without its config."""
    return [Path(word, *path) for path in (("manifest.json",), ("corpus", "manifest.json"))]


def _config(preset: str, overrides: dict[str, Any], run: Run | None) -> Config:
    return make_config(overrides, preset, run.read_options() if run is not None else None)


def _corpora(folder: Path | None, config: Config) -> Iterator[tuple[Path, TextTokenizer]]:
    """Yield (folder, tokenizer) of the corpora to inspect: those in a folder, or else those of a config."""
    from slm_jax.data.corpus.corpus import read_manifest
    from slm_jax.data.load import load_tokenizer
    from slm_jax.data.prepare import prepare_cached
    from slm_jax.training.tokenizer import resolve_tokenizer

    if folder is None:
        tokenizer, entries = prepare_cached(config, resolve_tokenizer(config))
        for entry in entries:
            yield entry.folder, tokenizer
        return
    mixed = [folder / entry["folder"] for entry in read_manifest(folder).get("mix", ())]
    for path in mixed or [folder]:
        yield path, load_tokenizer(str(tokenizer_file(path)))


_COMMANDS = {"list": _list, "prepare": _prepare, "inspect": _inspect}
