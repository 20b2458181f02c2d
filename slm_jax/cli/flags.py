"""Command-line flags, generated from option dataclasses and from the schema of the config.

A command declares its own options as a frozen dataclass: a field is a flag, its default the flag's default, and the
docstring below it the help text. A field whose default is itself a dataclass is a group of further flags. `argparse`
splits the command line into flags and their values; conversion and messages are here, so that every message names
the flag, the value and what would be accepted.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, get_args, get_origin

from slm_jax.config.option import former_values_of, traits_of
from slm_jax.config.schema import format_problems, nearest_name
from slm_jax.config.sections import Sections
from slm_jax.utils.errors import UserError

_BOOLEANS = {"True": True, "true": True, "False": False, "false": False}
_DASH = "\0"  # stands for the first dash of a word that is no option, as argparse takes -3M for one


@dataclass(frozen=True)
class Flag:
    """Presentation of a field of an option dataclass: `Annotated[str, Flag(metavar="PATH")]`."""

    metavar: str = ""
    """Placeholder of the value in the help; empty: derived from the type."""
    name: str = ""
    """Name of the flag; empty: that of the field."""
    positional: bool = False
    """The values are given without the flag's name."""
    repeated: bool = False
    """One value each time the flag is given."""
    bare: Callable[[Sequence[str]], None] | None = None
    """The values may also be given without the flag's name; the function refuses words that mean something else."""
    empty: bool = False
    """An empty value has a meaning. Other options of a command refuse it: it usually means an unset shell variable."""


@dataclass(frozen=True)
class Option:
    """One option of a command line."""

    name: str  # without the dashes: `run`, `train.steps`
    type: Any
    help: str
    default: Any = dataclasses.MISSING
    flag: Flag = Flag()
    group: str = ""  # heading in the help; of a config option its section
    common: bool = True
    path: tuple[str, ...] = ()  # fields that lead to its value in the dataclass
    former_values: dict[str, str] = field(default_factory=dict)

    @property
    def is_config(self) -> bool:
        """True for an option of the config, False for one of the command."""
        return not self.path

    @property
    def is_list(self) -> bool:
        """True if the option has several values."""
        return get_origin(self.type) is tuple

    @property
    def title(self) -> str:
        """Name as written on a command line."""
        return self.name if self.flag.positional else f"--{self.name}"

    @property
    def takes_bare_words(self) -> bool:
        """True if its values may be given without its name."""
        return self.flag.positional or self.flag.bare is not None

    def value(self, words: Sequence[str]) -> Any:
        """Convert the words of the command line.

        Raises:
            UserError: A value is missing or of a wrong type.
        """
        if self.is_list:
            if not words:
                raise UserError(f"{self.title} needs at least one value")
            return tuple(self._convert(get_args(self.type)[0], word) for word in words)
        if not words and self.type is not bool:
            raise UserError(f"{self.title} needs a value")
        return self._convert(self.type, words[0]) if words else True

    def _convert(self, kind: Any, word: str) -> Any:
        """Convert one word to the first type that accepts it."""
        if not (word or self.is_config or self.flag.empty):
            raise UserError(f"{self.title} is empty: give a value, or leave it out")
        for each in _alternatives(kind):
            if get_origin(each) is Literal:
                choices = {str(choice): choice for choice in get_args(each)}
                word = self.former_values.get(word, word)
                if word in choices:
                    return choices[word]
            elif each is bool:
                if word in _BOOLEANS:
                    return _BOOLEANS[word]
            else:
                try:
                    return each(word)
                except ValueError:
                    continue
        given = f"{self.title} {word}" if word else f"{self.title} is empty"
        raise UserError(f"{given}: should be {' or '.join(map(_expected, _alternatives(kind)))}")


def _alternatives(kind: Any) -> list[Any]:
    """Return the types of a union, None left out; any other type alone."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return [each for each in get_args(kind) if each is not type(None)]
    return [kind]


def _expected(kind: Any) -> str:
    """Return what a value of a type looks like, for messages."""
    if get_origin(kind) is Literal:
        choices = ", ".join(map(repr, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    return {int: "a whole number", float: "a number", bool: "one of 'True', 'False'"}.get(kind, "a text")


def command_options(kind: type, path: tuple[str, ...] = (), group: str = "") -> Iterator[Option]:
    """Yield the options of an option dataclass, those of nested dataclasses included.

    Args:
        kind: The dataclass.
        path: Fields that lead to it.
        group: Heading of its options in the help.
    """
    helps = field_docstrings(kind)
    hints = typing.get_type_hints(kind, include_extras=True)
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(each.default):
            nested = type(each.default)
            yield from command_options(nested, (*path, each.name), (inspect.getdoc(nested) or "").strip())
            continue
        annotation = hints[each.name]
        flag = Flag()
        if get_origin(annotation) is typing.Annotated:
            annotation, *marks = get_args(annotation)
            flag = next((mark for mark in marks if isinstance(mark, Flag)), flag)
        yield Option(
            name=flag.name or each.name,
            type=annotation,
            help=helps.get(each.name, ""),
            default=each.default,
            flag=flag,
            group=group,
            path=(*path, each.name),
        )


def field_docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class, each on one line, by name of the field."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    descriptions = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value if isinstance(following, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                descriptions[statement.target.id] = " ".join(text.value.split())
    return descriptions


def config_options(preset: dict[str, Any]) -> Iterator[Option]:
    """Yield the options of the config.

    Args:
        preset: Nested values that the help shows as defaults where they are given.
    """
    for name, info in Sections.fields().items():
        section, _, key = name.partition(".")
        given = preset.get(section)
        default = given.get(key, info.default) if isinstance(given, dict) else info.default
        yield Option(
            name=name,
            type=info.annotation,
            help=info.description or "",
            default=default,
            group=section,
            common="common" in traits_of(info),
            former_values=former_values_of(info),
        )


class InvalidValuesError(UserError):
    """Values of a wrong type, all of a command line.

    Attributes:
        problems: The message for each.
        valid: The other values by name of the option.
    """

    def __init__(self, problems: Sequence[str], valid: dict[str, Any]):
        """Create the error.

        Args:
            problems: The message for each value.
            valid: The other values by name of the option.
        """
        super().__init__(problems[0] if len(problems) == 1 else format_problems("command line", list(problems)))
        self.problems = list(problems)
        self.valid = valid


class _Parser(argparse.ArgumentParser):
    """Parser that raises UserError instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Collect(argparse.Action):
    """Collect the words of an option; commands' own options may be given once, unless they are repeated."""

    option: Option

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is None:
            words = []
        elif isinstance(values, str):
            words = [values]
        else:
            words = list(values)
        words = [_restored(word) for word in words]
        given = vars(namespace)
        option = self.option
        if option.flag.repeated:
            if not words:
                raise UserError(f"{option.title} needs a value")
            words = [*given.get(option.name, ()), *words]
        elif option.name in given and not option.is_config:
            raise UserError(f"{option.title} is given twice")
        given[option.name] = words


def parse(options: Iterable[Option], args: Sequence[str]) -> dict[str, Any]:
    """Parse a command line.

    `--name value`, `--name=value`, several values for a list, a bare `--name` for True; dashes and underscores in
    names are the same. The last of several values of a config option counts.

    Args:
        options: What may be given.
        args: The command line, without `--help`.

    Returns:
        The values that were given, by name of the option.

    Raises:
        UserError: An unknown option.
        InvalidValuesError: Wrong or missing values.
    """
    known = {option.name: option for option in options}
    target = next((option for option in known.values() if option.takes_bare_words), None)
    parser = _Parser(add_help=False, allow_abbrev=False, usage="", argument_default=argparse.SUPPRESS)
    for option in known.values():
        if not option.flag.positional:
            nargs = "*" if option.is_list and not option.flag.repeated else "?"
            action = parser.add_argument(f"--{option.name}", dest=option.name, nargs=nargs, action=_Collect)
            typing.cast(_Collect, action).option = option
    end = args.index("--") if "--" in args else len(args)
    namespace, bare = parser.parse_known_args(list(_canonical(args[:end], known, target is not None)))
    bare = [_restored(word) for word in bare]
    if unknown := [word for word in bare if word.startswith("-") and word != "-"]:
        raise UserError(f"unknown: {' '.join(unknown)} (--help lists the options)")
    bare += args[end + 1 :]
    words = dict(vars(namespace))
    if bare and target is None:
        raise UserError(f"unknown: {' '.join(bare)} (--help lists the options)")
    if bare and target is not None:
        words[target.name] = _with_bare_words(target, bare, words.get(target.name, []))
    values = {}
    problems = []
    for name, given in words.items():
        try:
            values[name] = known[name].value(given)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise InvalidValuesError(problems, values)
    return values


def _with_bare_words(option: Option, bare: list[str], named: list[str]) -> list[str]:
    """Return the words of an option that are given without its name, and after these the ones given with it.

    Raises:
        UserError: They mean something else, or are too many.
    """
    if option.flag.bare is not None:
        option.flag.bare(bare)
    words = [*bare, *named]
    if len(words) > 1 and not option.is_list:
        raise UserError(f"{' '.join(words)}: {option.title} takes one value, not {len(words)}")
    return words


def _canonical(args: Sequence[str], known: dict[str, Option], takes_bare_words: bool) -> Iterator[str]:
    """Yield the arguments with the names of the options as they are declared, and escape words that are not options.

    Raises:
        UserError: An option does not exist.
    """
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        if not arg.startswith("--"):
            yield _DASH + arg[1:] if arg.startswith("-") else arg
            continue
        name, equals, value = _option_of(arg, known)
        is_bool = known[name].type is bool
        if is_bool and not equals and takes_bare_words and following not in _BOOLEANS:
            yield f"--{name}=True"  # what follows is no value of it
        else:
            yield f"--{name}{equals}{value}"


def _restored(word: str) -> str:
    return "-" + word[1:] if word.startswith(_DASH) else word


def _option_of(arg: str, known: dict[str, Option]) -> tuple[str, str, str]:
    """Return the name of an option as it is declared, "=" if its value follows in the same argument, and the value.

    Raises:
        UserError: The option does not exist.
    """
    given, equals, value = arg[2:].partition("=")
    name = given.replace("-", "_")
    option = known.get(name)
    if option is not None and not option.flag.positional:
        return name, equals, value
    positive = known.get(name.removeprefix("no_"))
    if positive is not None and positive.type is bool and not equals and not positive.is_config:
        return positive.name, "=", "False"
    hint = f", perhaps you meant --{near}" if (near := nearest_name(name, list(known))) else ""
    where = "--help all lists every option" if any(each.is_config for each in known.values()) else "see --help"
    raise UserError(f"unknown option --{given}{hint} ({where})")


def build(kind: type, options: Iterable[Option], given: dict[str, Any]) -> Any:
    """Return an instance of an option dataclass with the given values.

    Args:
        kind: The dataclass.
        options: Its options, as `command_options` yields them.
        given: Values by name of the option.

    Raises:
        UserError: A required option is missing.
    """
    values: dict[tuple[str, ...], Any] = {}
    for option in options:
        if option.name in given:
            values[option.path] = given[option.name]
        elif option.default is dataclasses.MISSING:
            is_choice = get_origin(option.type) is Literal
            expected = _expected(option.type) if is_choice else f"a value ({option.help.removesuffix('.')})"
            raise UserError(f"{option.title} is missing: give {expected}")
    return _instance(kind, values)


def _instance(kind: type, values: dict[tuple[str, ...], Any]) -> Any:
    """Return an instance of a dataclass, its nested dataclasses included, from values by path of the field."""
    arguments = {path[0]: value for path, value in values.items() if len(path) == 1}
    for each in dataclasses.fields(kind):
        if dataclasses.is_dataclass(each.default):
            nested = {path[1:]: value for path, value in values.items() if len(path) > 1 and path[0] == each.name}
            arguments[each.name] = _instance(type(each.default), nested)
    return kind(**arguments)
