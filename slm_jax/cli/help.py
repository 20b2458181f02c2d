"""Help of a command, as wide as the terminal and in levels.

`--help` lists the command's own options and the common options of the config, `--help SECTION` one section of the
config, `--help all` everything.
"""

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from slm_jax.cli.flags import Option
from slm_jax.config.schema import nearest_name
from slm_jax.config.sections import Sections
from slm_jax.utils.errors import UserError

_COLUMN = 30  # width of the column of flags
_MIN_COLUMN = 24  # a second column that is narrower goes below the first


def help_text(description: str, prog: str, options: Sequence[Option], topic: str = "") -> str:
    """Return the help of a command.

    Args:
        description: Its description.
        prog: The command, `python -m slm_jax.train`.
        options: Its options.
        topic: Empty, a section of the config, or `all`.

    Raises:
        UserError: There is no such section.
    """
    own = [option for option in options if not option.is_config]
    config = [option for option in options if option.is_config]
    shown = {option.group for option in config}
    sections = [name for name in Sections.model_fields if name in shown]
    if topic and topic not in (*sections, "all"):
        hint = f", perhaps you meant {near}" if (near := nearest_name(topic, [*sections, "all"])) else ""
        raise UserError(f"--help {topic}: there is no such section{hint} ({', '.join([*sections, 'all'])})")
    if topic in sections:
        return "\n".join(_section(topic, config))
    lines = [wrapped(description), "", *_usage(prog, options)]
    for group in dict.fromkeys(option.group for option in own):
        lines += ["", wrapped(group or "Options:")]
        lines += [line for option in own if option.group == group for line in _lines(option)]
    if topic == "all":
        for section in sections:
            lines += ["", *_section(section, config)]
    elif config:
        lines += ["", "Common options of the config:"]
        lines += [line for option in config if option.common for line in _lines(option)]
        lines += ["", "All options: --help SECTION for one section of the config, --help all for everything."]
        for section in sections:
            lines += _columns(f"  {section}", str(Sections.model_fields[section].description))
    return "\n".join(lines)


def _usage(prog: str, options: Sequence[Option]) -> Iterator[str]:
    words = [f"{option.title} {metavar(option)}" for option in options if option.default is dataclasses.MISSING]
    words += ["[--option value …]"] if options else []
    for option in options:
        if option.takes_bare_words:
            several = " …" if option.flag.repeated else ""
            words.append(f"[{metavar(option)}{several}]")
    yield f"Usage: {' '.join([prog, *words])}"


def _section(section: str, config: Sequence[Option]) -> Iterator[str]:
    yield f"[{section}] {Sections.model_fields[section].description}"
    for option in config:
        if option.group == section:
            yield from _lines(option)


def _lines(option: Option) -> Iterator[str]:
    """Yield the lines of one option: its flag and value, its help, its default."""
    words = metavar(option) if option.flag.positional else f"{option.title} {metavar(option)}".rstrip()
    about = option.help
    if not _is_empty(option.default) and not (option.default is False and not option.is_config):
        about += f" Default: {_shown(option.default)}"
    yield from _columns(f"  {words}", about)


def _is_empty(default: Any) -> bool:
    """Return whether there is no default worth showing: the help says what an empty value means."""
    return default in (dataclasses.MISSING, None, "", (), [], ("",), [""])


def _columns(left: str, right: str) -> list[str]:
    """Return a text next to, or below, the words that it explains."""
    width = max(40, shutil.get_terminal_size().columns)
    lines = textwrap.wrap(right, width - _COLUMN, break_on_hyphens=False, break_long_words=False) or [""]
    if len(left) > _COLUMN - 2:
        return [left, *(f"{'':{_COLUMN}}{line}" for line in lines)]
    return [f"{left:{_COLUMN}}{lines[0]}", *(f"{'':{_COLUMN}}{line}" for line in lines[1:])]


def metavar(option: Option) -> str:
    """Return the placeholder of an option's value."""
    if option.flag.metavar:
        return option.flag.metavar
    kind = get_args(option.type)[0] if option.is_list else option.type
    name = _type_name(kind)
    if option.flag.positional:
        return f"{option.name.upper()} …"
    if option.type is bool:
        return name if option.is_config else ""
    return f"{name} …" if option.is_list and not option.flag.repeated else name


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_args(kind):
        return "|".join(_type_name(each) for each in get_args(kind) if each is not type(None))
    return {int: "INT", float: "FLOAT", bool: "True|False"}.get(kind, "STR")


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(repr, value)) or "none"
    return repr(value) if isinstance(value, str) else str(value)


def wrapped(text: str) -> str:
    """Return a text filled to the width of the terminal.

    Paragraphs are filled. A line that is indented or begins with an option is kept as a line and continues below its
    second column; without one, or where little space is left for it, it continues with four more spaces.
    """
    width = shutil.get_terminal_size().columns
    blocks: list[str] = []
    for line in text.strip().splitlines():
        if blocks and line[:1] not in ("", " ", "-") and blocks[-1][:1] not in ("", " ", "-"):
            blocks[-1] += f" {line}"
        else:
            blocks.append(line)
    filled = []
    for block in blocks:
        columns = re.match(r"( *\S.*?)  +", block) if block[:1] in (" ", "-") else None
        below = " " * (len(block) - len(block.lstrip(" ")) + 4)
        if columns and width - len(columns[0]) < _MIN_COLUMN:
            filled += [_filled(columns[1], width, "", below), _filled(block[columns.end() :], width, below, below)]
        elif columns:
            filled.append(_filled(block, width, "", " " * len(columns[0])))
        else:
            filled.append(_filled(block, width, "", below if block[:1] in (" ", "-") else ""))
    return "\n".join(filled)


def _filled(text: str, width: int, first: str, other: str) -> str:
    """Return a text filled to a width, with the indents of its first and its other lines; words are never divided."""
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=other, break_long_words=False, break_on_hyphens=False
    )
