"""Options of the section `data` that are given but have no effect on the sources of a config."""

import logging
from collections.abc import Iterator

from slm_jax.config.sections import Sections
from slm_jax.config.source_names import is_source, parse_weight
from slm_jax.config.unused_options import UnusedOption, given_of, unused_options
from slm_jax.data.sources.files import ROW_FORMATS, file_format, find_files
from slm_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

# The kinds of sources on which an option has an effect.
_USED_BY = {
    "separator": ("text files",),
    "document": ("text files",),
    "encoding_errors": ("text files", "files of rows"),
    "format": ("python-qa", "files of rows", "data sets of the hub"),
    "text_field": ("python-qa", "files of rows", "data sets of the hub"),
    "template": ("python-qa", "files of rows", "data sets of the hub"),
    "response_field": ("python-qa", "files of rows", "data sets of the hub"),
    "loss_on": ("python-qa", "python-chat", "files of rows", "data sets of the hub"),
    "revision": ("data sets of the hub",),
}


def log_unused_options(config: Sections) -> None:
    """Log the options that are given and have no effect, because of other options or of the source."""
    for option in (*unused_options(config), *unused_source_options(config)):
        logger.info("note: %s", option.text)


def unused_source_options(config: Sections) -> Iterator[UnusedOption]:
    """Yield the options of the section `data` that no source of a config uses.

    Files that do not exist are left to those who read them.
    """
    data = config.data
    try:
        kinds = _kinds(config)
    except UserError:
        return
    for name, users in _USED_BY.items():
        if not kinds & set(users):
            reason = f"on {' and '.join(sorted(kinds))} (it has on: {', '.join(users)})"
            yield from given_of(config, (f"data.{name}",), reason)
    if data.document == "line":
        yield from given_of(config, ("data.separator",), "with data.document line")
    if data.text_field:
        yield from given_of(config, ("data.template", "data.response_field"), "with data.text_field: the text is read")
    elif not data.template:
        yield from given_of(config, ("data.response_field",), "without data.template")


def _kinds(config: Sections) -> set[str]:
    """Return the kinds of the sources of a config, as `_USED_BY` names them."""
    data = config.data
    names = [parse_weight(entry)[0] for entry in data.mix] or [data.source]
    kinds = set()
    for name in names:
        if name in ("python-docs", "python-qa", "python-chat"):
            kinds.add(name)
        elif name != "files" and is_source(name):
            kinds.add("data sets of the hub")
        else:
            for path in find_files(data.files if name == "files" else (name,)):
                kinds.add("files of rows" if file_format(path) in ROW_FORMATS else "text files")
    return kinds
