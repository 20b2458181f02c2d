"""The tokenizer of a run, which must be that of its initial weights; and the preparation of its data with it."""

from slm_jax.config.schema import Config, TokenizerConfig
from slm_jax.data.corpus.corpus import Corpus, open_corpus
from slm_jax.data.load import load_tokenizer
from slm_jax.data.prepare import has_tokenizer, prepare
from slm_jax.distributed import agreement, multihost
from slm_jax.run.directory import Run, find_run
from slm_jax.utils.errors import UserError
from slm_jax.utils.text_tokenizer import TextTokenizer
from tokenizer import HybridTokenizer


def prepare_data(config: Config, run: Run) -> tuple[TextTokenizer, Corpus]:
    """Prepare the data of a run with the tokenizer that its config asks for, see `data.prepare.prepare`.

    Raises:
        UserError: The text cannot be read or is too small, or the tokenizer is not that of the initial weights.
    """
    return prepare(config, run, "" if has_tokenizer(run) else resolve_tokenizer(config))


def prepare_data_together(config: Config, run: Run) -> tuple[TextTokenizer, Corpus]:
    """Prepare the data of a run in the first process; the others open what it has made, and never write.

    Raises:
        UserError: As in `prepare_data`, or if a process does not see the same text; in all processes.
    """
    opened: list[tuple[TextTokenizer, Corpus]] = []
    agreement.from_first("preparation of the data", lambda: opened.append(prepare_data(config, run)))

    def fingerprints() -> dict[str, str]:
        if not multihost.is_first():
            if not run.corpus.is_dir():
                raise UserError(
                    f"{run.corpus} cannot be read (a link to a cache on another host?): use a --data.cache that all "
                    "hosts see"
                )
            tokenizer = load_tokenizer(str(run.tokenizer))
            opened.append((tokenizer, open_corpus(run.corpus, tokenizer)))
        tokenizer, corpus = opened[0]
        return {"tokenizer": tokenizer.fingerprint, "corpus": corpus.fingerprint}

    agreement.require_same("the data", fingerprints, "all hosts must see the same file system")
    return opened[0]


def resolve_tokenizer(config: Config) -> str:
    """Return the tokenizer that a config asks for: that of the initial weights, or `tokenizer.path`.

    Returns:
        Path or name of the tokenizer; empty: learn one.

    Raises:
        UserError: The config asks for another tokenizer than that of the initial weights.
    """
    if config.init.from_hf:
        return _tokenizer_of_folder(config)
    if config.init.from_run:
        return _tokenizer_of_run(config)
    return config.tokenizer.path


def _tokenizer_of_run(config: Config) -> str:
    """Return the tokenizer of the run of `init.from_run`."""
    options = config.tokenizer
    run = find_run(config.init.from_run, trained=True)
    if options.path:
        if load_tokenizer(options.path).fingerprint != load_tokenizer(str(run.tokenizer)).fingerprint:
            raise UserError(
                f"tokenizer.path {options.path} is not the tokenizer of {run.path}, whose weights fit no other: "
                "leave it out"
            )
    elif options != TokenizerConfig():  # options that were not given are those of the run
        saved = dict(run.read_config().tokenizer)
        default = dict(TokenizerConfig())
        differing = [
            f"tokenizer.{name}: {saved[name]!r} saved, {value!r} current"
            for name, value in options
            if value not in (saved[name], default[name])
        ]
        if differing:
            raise UserError(
                f"the weights of {run.path} fit no tokenizer but their own; leave out tokenizer.*: "
                f"{'; '.join(differing)}"
            )
    return str(run.tokenizer)


def _tokenizer_of_folder(config: Config) -> str:
    """Return the tokenizer of the weights of `init.from_hf`."""
    from slm_jax.huggingface.import_folder import check_vocabulary, find_tokenizer, open_folder  # imports JAX

    folder = open_folder(config.init.from_hf)
    options = config.tokenizer
    name = find_tokenizer(folder, options.path)
    tokenizer = load_tokenizer(name)
    check_vocabulary(folder, tokenizer.vocab_size, name)
    if options.path and load_tokenizer(options.path).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer.path {options.path} is not the tokenizer of {folder.path}, whose weights fit no other: leave "
            "it out"
        )
    if not isinstance(tokenizer, HybridTokenizer):  # the options are of a tokenizer that is learned
        return name
    for field in ("vocab_size", "lowercase", "byte_limit", "portable"):
        given = getattr(options, field)
        saved = getattr(tokenizer, field)
        fits = given >= saved if field == "vocab_size" else given == saved  # the option is an upper bound of the ids
        if not fits and given != getattr(TokenizerConfig(), field):
            raise UserError(
                f"tokenizer.{field}: {saved!r} in {folder.path}, {given!r} current; its weights fit no other: leave it "
                "out"
            )
    return name
