"""Validation of JSON bodies: what is wrong, the value, and what is allowed, for every parameter by its full path.

The texts of pydantic are not used: they name neither the value nor, within lists and objects, the parameter, and for a
union they list one error for each alternative. What is allowed is described from the JSON schema of the model.
"""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import pydantic
from pydantic import BaseModel, ConfigDict, model_validator

from slm_jax.serve.errors import ApiError

_MAX_PROBLEMS = 10
_MAX_VALUE = 60  # characters of a value in a message


def _allow_nulls(schema: dict[str, Any]) -> None:
    """Add null to the types of parameters that may be left out."""
    for name, node in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in node.get("anyOf", ()):
            rest = {key: node.pop(key) for key in ("default", "title") if key in node}
            schema["properties"][name] = {"anyOf": [*node.get("anyOf", [node]), {"type": "null"}], **rest}


class Body(BaseModel):
    """Base class of JSON bodies and of objects in them: strict types, no unknown parameters, null as left out.

    Attributes:
        unsupported: Text for each declared parameter of OpenAI's API that only its default is accepted of.
        foreign: Text for parameters that are not declared, but that clients of similar servers send.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_allow_nulls)
    unsupported: ClassVar[dict[str, str]] = {}
    foreign: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, tree: Any) -> Any:
        """Drop nulls: clients write them for parameters they leave out."""
        if not isinstance(tree, dict):
            return tree
        return {name: value for name, value in tree.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse a JSON body.

        Raises:
            ApiError: The body is invalid; the message names all problems.
        """
        return cls._validate(parse_json(body))

    @classmethod
    def _validate(cls, tree: dict[str, Any]) -> Self:
        try:
            return cls.model_validate(tree)
        except pydantic.ValidationError as error:
            raise _to_api_error(cls, tree, error) from None


class Query(Body):
    """Base class of query strings: numbers are texts, unknown parameters are ignored."""

    model_config = ConfigDict(extra="ignore", strict=False, json_schema_extra=None)

    @classmethod
    def parse_query(cls, query: Mapping[str, str]) -> Self:
        """Parse the parameters of a query string.

        Raises:
            ApiError: They are invalid; the message names all problems.
        """
        return cls._validate(dict(query))


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. Lone surrogates in strings are accepted: the tokenizers encode them without loss.

    Raises:
        ApiError: The body is not a JSON object in UTF-8.
    """
    if not body.strip():
        raise ApiError(400, "the body is empty: send a JSON object")
    try:
        tree = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte 0x{body[error.start]:02x} at offset {error.start})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ApiError(400, f"the body is not valid JSON ({error.msg} at {where})") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError:  # Python reads integers of at most 4,300 digits
        raise ApiError(400, "an integer in the body has too many digits") from None
    if not isinstance(tree, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_excerpt(tree)}")
    return tree


class _Problem(NamedTuple):
    """An error of pydantic: the path to the value as far as it is in the body, the value, the type of the error."""

    path: tuple[str | int, ...]
    value: Any
    kind: str


def _to_api_error(model: type[Body], tree: dict[str, Any], error: pydantic.ValidationError) -> ApiError:
    """Return all problems in one line, one for each parameter."""
    problems: dict[tuple[str | int, ...], _Problem] = {}
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        location = each["loc"][:1] if each["loc"][:1] and each["loc"][0] in model.unsupported else each["loc"]
        problem = _locate(tree, location, each["type"])
        key = problem.path if problem.kind == "extra_forbidden" else problem.path[:1]
        # Of the alternative types of a parameter, report the one that fits furthest.
        if key not in problems or _progress(problem) > _progress(problems[key]):
            problems[key] = problem
    found = list(problems.values())
    messages = [_message(model, problem) for problem in found[:_MAX_PROBLEMS]]
    if len(found) > _MAX_PROBLEMS:
        messages.append(f"and {len(found) - _MAX_PROBLEMS:,} more problems")
    return ApiError(400, "; ".join(messages), format_path(found[0].path) or None)


def _locate(tree: Any, location: tuple[str | int, ...], kind: str) -> _Problem:
    """Follow a location of pydantic, which also names the alternatives of unions, through the body."""
    if kind == "missing":
        parent = _locate(tree, location[:-1], "").path
        return _Problem((*parent, location[-1]), None, kind)
    path: list[str | int] = []
    for part in location:
        is_key = isinstance(tree, dict) and part in tree
        if is_key or (isinstance(tree, list) and isinstance(part, int) and part < len(tree)):
            tree = tree[part]
            path.append(part)
    return _Problem(tuple(path), tree, kind)


def _progress(problem: _Problem) -> tuple[int, float]:
    """Return a key by which alternatives compare: the depth of the error and its index in the list there."""
    if problem.kind in ("too_long", "too_short"):  # all items of the list have the right type
        return len(problem.path) + 1, math.inf
    last = problem.path[-1] if problem.path else 0
    return len(problem.path), last if isinstance(last, int) else 0


def _message(model: type[Body], problem: _Problem) -> str:
    """Describe a problem: parameter, value, and what is allowed."""
    path = format_path(problem.path)
    too_long = problem.kind == "too_long" and isinstance(problem.value, list)
    value = f"a list of {len(problem.value):,}" if too_long else _excerpt(problem.value)
    if not path:
        return "a name of a parameter contains a lone surrogate, half of a UTF-16 character"
    if problem.kind == "extra_forbidden":
        return _unknown(model, problem.path)
    name = str(problem.path[0])
    if name in model.unsupported:
        return f"{name} {value} is not supported, a parameter of OpenAI's API: {model.unsupported[name]}"
    if problem.kind == "string_unicode":
        return f"{path} must not contain a lone surrogate, half of a UTF-16 character, as {value} does"
    schema = model.model_json_schema()
    node = _schema_at(schema, problem.path)
    if problem.kind == "missing":
        return f"{path} is required: {_allowed(node, schema)}"
    # Of a list of numbers or texts, all of it is described.
    if len(problem.path) == 1 or any(isinstance(part, str) for part in problem.path[1:]):
        return f"{path} must be {_allowed(node, schema)}, not {value}"
    return f"{name} must be {_allowed(schema['properties'][name], schema)}, but {path} is {value}"


def _schema_at(root: dict[str, Any], path: tuple[str | int, ...]) -> dict[str, Any]:
    """Return the schema of the value at a path."""
    node = root
    for part in path:
        for each in _alternatives(node):
            resolved = _resolve(each, root)
            if isinstance(part, str) and part in resolved.get("properties", {}):
                node = resolved["properties"][part]
                break
            if isinstance(part, str) and isinstance(resolved.get("additionalProperties"), dict):
                node = resolved["additionalProperties"]
                break
            if isinstance(part, int) and "items" in resolved:
                node = resolved["items"]
                break
    return node


def _unknown(model: type[Body], path: tuple[str | int, ...]) -> str:
    """Describe a parameter that is not declared."""
    name = str(path[-1])
    shown = format_path((*path[:-1], _cut(name)))
    owner = f"{format_path(path[:-1])} has" if len(path) > 1 else "there are"
    schema = model.model_json_schema()
    if len(path) > 1:
        schema = _resolve(_alternatives(_schema_at(schema, path[:-1]))[0], schema)
    elif name in model.foreign:
        return f"{shown} is not supported: {model.foreign[name]}"
    names = list(schema["properties"])
    close = difflib.get_close_matches(name[:_MAX_VALUE], names, 1)
    return f"unknown parameter {shown!r}: " + (f"did you mean {close[0]}?" if close else f"{owner} {', '.join(names)}")


def format_path(path: tuple[str | int, ...]) -> str:
    """Return a path as it is written in most languages: `stop[0]`, `stream_options.include_usage`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return _printable("".join(parts).removeprefix("."))


def _excerpt(value: Any) -> str:
    """Return a value as JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "that value"
    return _cut(text)


def _cut(text: str) -> str:
    text = _printable(text[: _MAX_VALUE + 1])
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - 1] + "…"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]


def _resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    return root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _allowed(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows: "an integer from 1 to 128"."""
    alternatives = _alternatives(schema)
    if len(alternatives) > 1:
        texts = [_allowed(each, root) for each in alternatives]
        return f"{', '.join(texts[:-1])} or {texts[-1]}"
    schema = _resolve(alternatives[0], root)
    kind = schema.get("type")
    if "enum" in schema or "const" in schema:
        texts = [json.dumps(each) for each in schema.get("enum", [schema.get("const")])]
        return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
    if kind == "array":
        return f"{_list(schema, 'a ', 'list')} of {_items(schema, root)}"
    if kind == "object" and isinstance(values := schema.get("additionalProperties"), dict):
        return f"an object whose values are each {_allowed(values, root)}"
    if kind == "object":
        return f"an object with {', '.join(schema.get('properties', ()))}"
    if kind == "boolean":
        return "true or false"
    if kind == "string":
        limits = _count(schema, "Length")
        return f"a text of {limits}characters" if limits else "a text"
    return ("an integer" if kind == "integer" else "a number") + _range(schema)


def _list(schema: dict[str, Any], article: str, noun: str) -> str:
    return f"{article}non-empty {noun}" if schema.get("minItems") == 1 and "maxItems" not in schema else article + noun


def _items(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """Describe the items of a list: "1 to 256 texts"."""
    item = _resolve(schema["items"], root)
    count = _count(schema, "Items") if "maxItems" in schema else ""
    if item.get("type") == "array":
        return f"{count}{_list(item, '', 'lists')} of {_items(item, root)}"
    if item.get("type") == "object":
        return f"{count}objects with {', '.join(item['properties'])}"
    limits = _count(item, "Length")
    nouns = {"integer": "integers", "string": "texts"}
    return count + nouns.get(item.get("type", ""), "numbers") + (f" of {limits}characters" if limits else "")


def _count(schema: dict[str, Any], unit: str) -> str:
    """Describe a number of items or characters: "1 to 200 ", "at most 16 "."""
    low = schema.get(f"min{unit}")
    high = schema.get(f"max{unit}")
    if low is None and high is None:
        return ""
    if high is None:
        return f"at least {low:,} "
    return f"{low:,} to {high:,} " if low is not None else f"at most {high:,} "


def _range(schema: dict[str, Any]) -> str:
    """Describe the bounds of a number."""
    low = schema.get("minimum")
    high = schema.get("maximum")
    if high is None and "exclusiveMaximum" in schema:  # of integers
        high = schema["exclusiveMaximum"] - 1
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']:g}" + (f", at most {high:g}" if high is not None else "")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    return f" of {low} or more" if low is not None else ""
