"""Sources by name: what `data.source`, `data.files` and `data.mix` stand for."""

from slm_jax.config.checks import is_source
from slm_jax.config.schema import DataConfig
from slm_jax.data.sources.documents import RowMapper, Source
from slm_jax.data.sources.files import FileSource
from slm_jax.data.sources.python_docs import PythonDocs
from slm_jax.data.sources.python_qa import QA_COLUMNS, PythonQA
from slm_jax.utils.errors import UserError


def make_sources(config: DataConfig) -> list[tuple[Source, float]]:
    """The sources of a config with their weights: one, or those of a mixture. Raises UserError."""
    if not config.mix:
        return [(make_source(config.source, config), 1.0)]
    return [(make_source(name, config), weight) for name, weight in map(parse_weight, config.mix)]


def parse_weight(entry: str) -> tuple[str, float]:
    """`NAME=WEIGHT` of a mixture; the weight is 1 if it is not given. Raises UserError."""
    name, equals, text = entry.rpartition("=")
    if not equals:
        return entry, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(f"data.mix: {entry}: {text} is no weight (a number above 0), as in python-docs=0.3")
    return name, weight


def make_source(name: str, config: DataConfig) -> Source:
    """A source by its name; what is no name of one is a pattern of files. Raises UserError."""
    if name == "python-docs":
        return PythonDocs()
    if name == "python-qa":
        return PythonQA(make_columns(config, QA_COLUMNS))
    if name != "files" and is_source(name):
        from slm_jax.data.sources.hub import make_hub_source

        return make_hub_source(name, config)
    patterns = config.files if name == "files" else (name,)
    per_line = config.document == "line"
    return FileSource(patterns, make_columns(config), config.separator, per_line, config.encoding_errors)


def make_columns(config: DataConfig, default: RowMapper | None = None) -> RowMapper:
    """How the config says that rows become documents; where it says nothing, by default as `default`."""
    base = default or RowMapper()
    if config.text_field:
        return RowMapper(text=config.text_field)
    if not config.template:
        return base
    response = config.response_field or base.response or "output"
    template = config.template.replace("\\n", "\n")  # as one types it in a shell
    return RowMapper(template=template, response=response, also=base.also)
