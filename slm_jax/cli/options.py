"""Command lines made from the config tree: `--section.field value`, by tyro.

tyro parses words into types and prints the help; bounds and cross-field checks are `Config.from_tree`'s, so that
a TOML file and a command line get the same messages, all at once.
"""

import contextlib
import inspect
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import pydantic
import tyro
from pydantic import BaseModel, ConfigDict, Field

from slm_jax.config.presets import read_preset, read_toml
from slm_jax.config.schema import Config, unknown_option
from slm_jax.run.directory import find_run
from slm_jax.utils.errors import UserError

Options = TypeVar("Options")
_SENTENCES = (  # what tyro says, and how we do
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'", r"\1 \2: should be a whole number"),
    (r"Error parsing (\S+): could not convert string to float: '(.*)'", r"\1 \2: should be a number"),
    (r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*?),?\) ?\.", r"\2 \1: should be one of \3"),
    (r"Missing value for argument '(.*)'\..*", r"\1 needs a value"),
    (r"Missing from .*?: (--\S+) .*", r"\1 is missing"),
    (r"Unrecognized options: (.*)", r"unknown: \1 (--help lists what there is)"),
)


def read_options(
    kind: type[Options], args: Sequence[str] | None, prog: str, description: str = "", **more: Any
) -> Options:
    """The options of a command line (None: the process's), `kind` being their dataclass or model, by tyro.

    `--help` prints the description (that of `kind` by default) and every option, and exits. Raises UserError.
    """
    args = list(sys.argv[1:] if args is None else args)
    if {"-h", "--help"} & set(args):  # tyro would run its lines together
        print(f"{wrapped(description or inspect.getdoc(kind) or '')}\n")
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, args=args, prog=prog, description="", use_underscores=True, **more)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_sentence(told.getvalue())) from None


def _sentence(box: str) -> str:
    """The first part of the box that tyro prints of a mistake, as a sentence."""
    box = "\n".join(line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", box).splitlines())
    under_title = box.partition("\n")[2]
    parts = re.split(r"^[─-]+$", under_title, flags=re.M)  # in ASCII the title has a rule of its own
    text = " ".join(next(filter(str.strip, parts), box).split())
    for pattern, sentence in _SENTENCES:
        if found := re.fullmatch(pattern, text):
            text = found.expand(sentence)
    near = re.search(r"^Perhaps you meant:\n(--\w+)", box, re.M)
    return f"{text}, perhaps you meant {near[1]}" if near else text


def wrapped(text: str) -> str:
    """A help text as wide as the terminal: paragraphs are filled; lines that are indented or name an option stay lines
    of their own, which go on under their second column."""
    blocks: list[str] = []
    for line in text.strip().splitlines():
        if blocks and line[:1] not in ("", " ", "-") and blocks[-1][:1] not in ("", " ", "-"):
            blocks[-1] += f" {line}"
        else:
            blocks.append(line)
    filled = []
    for block in blocks:
        columns = re.match(r" *\S.*?  +", block) if block[:1] in (" ", "-") else None
        indent = " " * len(columns[0] if columns else "")
        filled.append(textwrap.fill(block, shutil.get_terminal_size().columns, subsequent_indent=indent))
    return "\n".join(filled)


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take `--name VALUE` or `--name=VALUE` out of args: (value or None, the rest). Raises UserError if it has none."""
    for i, arg in enumerate(args):
        if arg == f"--{name}":
            if i + 1 == len(args) or args[i + 1].startswith("--"):
                raise UserError(f"--{name} needs a value")
            return args[i + 1], _once(name, args[:i] + args[i + 2 :])
        if arg.startswith(f"--{name}="):
            return arg.partition("=")[2], _once(name, args[:i] + args[i + 1 :])
    return None, args


def take_multihost_options(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `join` out of a command line, and the rest of it. Raises UserError."""
    found: dict[str, Any] = {}
    for name in ("coordinator", "processes", "process"):
        found[name], args = take_option(args, name)
        if found[name] is not None and name != "coordinator":
            if not found[name].isdecimal():
                raise UserError(f"--{name} {found[name]}: should be a number")
            found[name] = int(found[name])
    return found, args


def _once(name: str, rest: list[str]) -> list[str]:
    if any(arg == f"--{name}" or arg.startswith(f"--{name}=") for arg in rest):
        raise UserError(f"--{name} is given twice")
    return rest


def parse_overrides(args: Sequence[str], defaults: dict[str, Any], prog: str, description: str) -> dict[str, Any]:
    """Nested dicts of `defaults` (a preset's) with the `--section.field value` of args on top.

    `--help` prints every option with the preset's values as defaults and exits. Raises UserError on an unknown name.
    """
    known = set(Config().flat())
    for arg in args:
        name = arg[2:].partition("=")[0].replace("-", "_")
        if arg.startswith("--") and name.strip("_") and name not in known and name != "help":
            raise UserError(f"{unknown_option(name)} (--help lists them all)")
    args = _capital_booleans(args)
    loose, start = _without_bounds(defaults)
    parsed = read_options(loose, args, prog, description, default=start, config=(tyro.conf.FlagConversionOff,))
    given = {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    tree = {section: dict(fields) if isinstance(fields, dict) else fields for section, fields in defaults.items()}
    if given & {"data.files", "data.mix"} and "data.source" not in given and isinstance(tree.get("data"), dict):
        tree["data"].pop("source", None)  # files imply it; what the preset said is overridden
    for name in given:
        section, _, field = name.partition(".")
        if getattr(getattr(parsed, section), field) == ():
            raise UserError(f"--{name} needs at least one value")
        if isinstance(tree.setdefault(section, {}), dict):  # else from_tree says so
            tree[section][field] = getattr(getattr(parsed, section), field)
    return tree


def _capital_booleans(args: Sequence[str]) -> list[str]:
    """`true` and `false`, as TOML writes them, where an option takes them."""
    booleans = {f"--{name}" for name, value in Config().flat().items() if isinstance(value, bool)}
    result = list(args)
    for i, arg in enumerate(result):
        option, _, value = arg.partition("=")
        if option in booleans and value in ("true", "false"):
            result[i] = f"{option}={value.capitalize()}"
        elif arg in ("true", "false") and i and result[i - 1] in booleans:
            result[i] = arg.capitalize()
    return result


def _without_bounds(defaults: dict[str, Any]) -> tuple[type[BaseModel], BaseModel]:
    """The config tree with types but without bounds, so that every value reaches `Config.from_tree`; and its start."""
    sections: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for section, section_info in Config.model_fields.items():
        fields: dict[str, Any] = {}
        kind = section_info.annotation
        assert kind is not None
        given = defaults.get(section, {})
        given = given if isinstance(given, dict) else {}
        for name, info in kind.model_fields.items():
            default = _shown_default(info.annotation, given.get(name, info.default), info.default)
            fields[name] = (info.annotation, Field(default, description=info.description))
        model = pydantic.create_model(kind.__name__, __config__=ConfigDict(frozen=True), **fields)
        sections[section] = (Annotated[model, tyro.conf.arg(help=section_info.description)], model())
        values[section] = model()
    root = pydantic.create_model("Options", __config__=ConfigDict(frozen=True), **sections)
    return root, root(**values)


def _shown_default(annotation: Any, value: Any, fallback: Any) -> Any:
    """A preset's value as help shows it; one of a wrong type (reported later) is replaced by the field's default."""
    try:
        return pydantic.TypeAdapter(annotation).validate_python(value)
    except pydantic.ValidationError:
        return fallback


def config_from_args(args: list[str], prog: str, description: str, base: dict[str, Any] | None = None) -> Config:
    """The Config of a command line: `--config NAME|PATH` (or `base`), then overrides. Raises UserError.

    With `--init.from_run` or `--init.from_hf`, and without a preset, the model is that of the run or folder.
    """
    preset, args = take_option(args, "config")
    defaults = read_preset(preset or "quickstart") if preset or base is None else base
    start, _ = take_option(args, "init.from_run")
    folder, _ = take_option(args, "init.from_hf")
    if start and not preset and base is None:  # the model is that run's, unless a preset says what it is
        defaults = {**defaults, "model": read_toml(find_run(start, trained=True).config).get("model", {})}
    elif folder and not preset and base is None:
        from slm_jax.huggingface.import_folder import open_folder  # with JAX, which other options are checked without

        defaults = {**defaults, "model": {**defaults.get("model", {}), **open_folder(folder).model}}
    tree = parse_overrides(args, defaults, prog, description)
    return Config.from_tree(tree, origin=preset or "config")
