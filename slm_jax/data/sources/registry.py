"""Sources by name: the options `data.source`, `data.files` and `data.mix`."""

from slm_jax.config.schema import DataConfig
from slm_jax.config.source_names import is_source, parse_weight
from slm_jax.data.sources.documents import Source
from slm_jax.data.sources.file_source import FileSource
from slm_jax.data.sources.files import ROW_FORMATS, file_format, find_files
from slm_jax.data.sources.hub import make_hub_source
from slm_jax.data.sources.python_chat import PythonChat
from slm_jax.data.sources.python_docs import PythonDocs
from slm_jax.data.sources.python_qa import QA_MAPPER, PythonQA
from slm_jax.data.sources.rows import RowMapper, make_row_mapper


def make_sources(config: DataConfig) -> list[tuple[Source, float]]:
    """Return the sources of a config with their weights: one, or those of a mixture.

    Raises:
        UserError: A source does not exist, or a weight is not a positive number.
    """
    if not config.mix:
        return [(make_source(config.source, config), 1.0)]
    return [(make_source(name, config), weight) for name, weight in map(parse_weight, config.mix)]


def make_source(name: str, config: DataConfig) -> Source:
    """Return the source of a name; any other name is a pattern of files.

    A new source needs a branch here and its name in `slm_jax.config.source_names.SOURCES`.

    Args:
        name: A name of `SOURCES`, a hub id (hf:OWNER/NAME), or a path, folder or glob.
        config: The options that the source takes (columns, template, separator, revision, …).

    Raises:
        UserError: No file matches, or the hub id is malformed.
    """
    if name == "python-docs":
        return PythonDocs()
    if name == "python-chat":
        return PythonChat()
    if name == "python-qa":
        return PythonQA(make_row_mapper(config, QA_MAPPER))
    if name != "files" and is_source(name):
        return make_hub_source(name, config)
    patterns = config.files if name == "files" else (name,)
    per_line = config.document == "line"
    mapper = make_row_mapper(config)
    if config.mix and not any(file_format(path) in ROW_FORMATS for path in find_files(patterns)):
        mapper = RowMapper()  # text beside conversations
    return FileSource(patterns, mapper, config.separator, per_line, config.encoding_errors)
