"""Chat templates of published models: programs in Jinja, run in a sandbox with bounds on time and memory.

Names, filters and tags are those that transformers gives to templates, so that both render the same text. Jinja's
sandbox denies access to Python's internals; the bounds here stop a template that loops or allocates without end. They
are far above what templates need.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_SOURCE = 1 << 20
"""Maximum length of a template, in characters."""
MAX_STEPS = 100_000
"""Maximum number of loop iterations, calls and filters in the rendering of one conversation."""
MAX_STRING = 1 << 26
"""Maximum length of a string that a template builds, in characters."""
_MAX_NUMBER = 1_000_000
"""Largest number that a template passes to a function or filter: a width, a count."""
_MAX_BITS = 4096
_LARGE_WIDTH = re.compile(r"\d{6}")
_GUARD_STRING = "_guard_string"
_GUARD_LOOP = "_guard_loop"
_CONCATENATE = "_concatenate"


class GenerationTag(Extension):
    """The tag ``{% generation %}``, with which a template marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  # class attribute by the convention of jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body as a call to a method of the environment, which records its place."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        environment = self.environment
        assert isinstance(environment, ChatEnvironment)
        return environment.mark(caller())


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Environment of one template; rendering is not thread-safe.

    Attributes:
        spans: Character ranges of the bodies of ``{% generation %}`` in the text rendered last.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self._steps = 0
        self._blocks: list[str] = []
        self.spans: list[tuple[int, int]] = []
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._guarded(_to_json)
        self.filters |= {_GUARD_STRING: _check_string, _GUARD_LOOP: self._guard_loop, _CONCATENATE: _concatenate}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Render a template of this environment, and record its spans.

        Raises:
            jinja2.TemplateError: The template refuses the conversation, or exceeds a bound.
        """
        self._steps = 0
        self._blocks = []
        self.spans = []
        size = 0
        for block in template.generate(variables):
            size += len(block)
            if size > MAX_STRING:
                raise SecurityError(f"the template writes more than {MAX_STRING:,} characters")
            self._blocks.append(block)
        return "".join(self._blocks)

    def mark(self, text: str) -> str:
        """Record that a text, which is written next, is the assistant's."""
        start = sum(map(len, self._blocks))
        self.spans.append((start, start + len(text)))
        return text

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")

    # Compilation: loops, concatenation and blocks that become strings pass through filters that check them.

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filter(loop.iter, _GUARD_LOOP)
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = _filter(block.filter, _GUARD_STRING)
        _replace_concatenations(tree)
        return tree

    # Execution

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # signature of jinja2
        """Call a function for the template, if its arguments and its result are not too large."""
        self._step()
        _check_arguments((getattr(__obj, "__self__", None), *args, *kwargs.values()))
        return _check_string(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the safe form of `str.format`, if its string has no large widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation, if its result cannot be too large."""
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            values = right if isinstance(right, tuple) else (right,)
            _check_arguments(tuple(value for value in values if "*" in left))
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        return _check_string(super().call_binop(context, operator, left, right))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks its arguments and its result."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._step()
            _check_arguments((*args, *kwargs.values()))
            if function is jinja2.filters.do_format and args and isinstance(args[0], str):
                _check_format(args[0])
            return _check_string(function(*args, **kwargs))

        # How jinja2 knows that a filter takes the environment or the context as its first argument.
        guarded.__dict__.update(getattr(function, "__dict__", {}))
        return guarded

    def _guard_loop(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item


def compile_template(source: str) -> tuple[ChatEnvironment, jinja2.Template]:
    """Compile a template.

    Raises:
        jinja2.TemplateError: It is not valid.
    """
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"the template has {len(source):,} characters: the maximum is {MAX_SOURCE:,}")
    environment = ChatEnvironment()
    return environment, environment.from_string(source)


def _filter(node: nodes.Node | None, name: str, args: Sequence[nodes.Expr] = ()) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None)  # a block assignment has no node


def _replace_concatenations(node: nodes.Node) -> None:
    """Replace each ``a ~ b`` below a node by a filter."""
    for name, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, nodes.Node):
                _replace_concatenations(child)
        replaced = [
            _filter(child.nodes[0], _CONCATENATE, child.nodes[1:]) if isinstance(child, nodes.Concat) else child
            for child in children
        ]
        setattr(node, name, replaced if isinstance(value, list) else replaced[0])


def _concatenate(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MAX_STRING:
        raise SecurityError(f"the template builds more than {MAX_STRING:,} characters")
    return "".join(texts)


def _check_string(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_STRING:
        raise SecurityError(f"the template builds more than {MAX_STRING:,} characters")
    return value


def _check_arguments(values: Sequence[Any]) -> None:
    """Check numbers, which may be widths, and sizes: replacing and joining can multiply two of them."""
    sizes = [1, 1]
    for value in values:
        if isinstance(value, int | float) and abs(value) > _MAX_NUMBER:
            raise SecurityError(f"the template passes the number {value:.3g} to a function")
        if isinstance(value, str | list | tuple):
            sizes.append(len(value))
    *_, second, first = sorted(sizes)
    if first * second > 4 * MAX_STRING:
        raise SecurityError(f"the template builds more than {MAX_STRING:,} characters")


def _check_format(text: str) -> None:
    if _LARGE_WIDTH.search(text):
        raise SecurityError("the template formats a value with a width of six digits or more")


def _check_product(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_BITS:
            raise SecurityError("the template computes a number that is too large")
        return
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str | list | tuple) and len(value) * count > MAX_STRING:
            raise SecurityError(f"the template builds more than {MAX_STRING:,} characters")
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
        raise SecurityError("the template computes a number that is too large")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON: Jinja's own filter escapes HTML, which the templates of published models do not expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
