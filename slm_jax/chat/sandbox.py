"""Chat templates of published models: programs in Jinja, run in a sandbox with bounds on steps and sizes.

Names, filters and tags are those that transformers gives to templates, so that both render the same text. Jinja's
sandbox denies access to Python's internals; the bounds here stop a template that loops or allocates without end. They
are far above what templates need, and no limit of the seconds that a hostile one takes.
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
MAX_STEPS = 50_000
"""Maximum number of loop iterations, calls and filters in the rendering of one conversation."""
MAX_STRING = 1 << 24
"""Maximum length of the strings that a template builds, of all in a list together, in characters."""
MAX_ITEMS = 1 << 17
"""Maximum number of items in a list, tuple or dict, those of nested ones included."""
MAX_WORK = 1 << 29
"""Maximum sum of the lengths of all strings and lists that a template passes on or builds in one rendering."""
_MAX_NUMBER = 1_000_000
"""Largest number that a template passes to a function or filter: a width, a count."""
_MAX_BITS = 4096
_NUMBERS = re.compile(r"\d+")
_DENIED_METHODS = frozenset(["expandtabs", "format_map", "maketrans", "translate"])
_GUARD_STRING = "_guard_string"
_GUARD_LOOP = "_guard_loop"
_GUARD_CONTAINER = "_guard_container"
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
        self._work = 0
        self._blocks: list[str] = []
        self._now: datetime | None = None
        self.spans: list[tuple[int, int]] = []
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters |= {
            "join": self._guarded(_join),
            "tojson": self._guarded(_to_json),
            _GUARD_STRING: self._charge,
            _GUARD_CONTAINER: self._charge,
            _GUARD_LOOP: self._guard_loop,
            _CONCATENATE: self._concatenate,
        }
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: (self._now or datetime.now()).strftime(format)

    def render(self, template: jinja2.Template, variables: Mapping[str, Any], now: datetime | None = None) -> str:
        """Render a template of this environment, and record its spans.

        Args:
            template: The template.
            variables: Its variables.
            now: The time that it reads; None: the present one.

        Returns:
            The text.

        Raises:
            jinja2.TemplateError: The template refuses the conversation, or exceeds a bound.
        """
        self._steps = 0
        self._work = 0
        self._now = now
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

    def _charge(self, value: Any) -> Any:
        """Count the size of a value, with everything in it, and return it."""
        self._work += _weight(value)
        if self._work > MAX_WORK:
            raise SecurityError(f"the template handles more than {MAX_WORK:,} characters")
        return value

    # Compilation: loops, concatenation, containers and blocks that become strings pass through filters that check them.

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filter(loop.iter, _GUARD_LOOP)
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = _filter(block.filter, _GUARD_STRING)
        _guard_expressions(tree)
        return tree

    # Execution

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may use an attribute."""
        return attr not in _DENIED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # signature of jinja2
        """Call a function for the template, if its arguments and its result are not too large."""
        self._step()
        own = getattr(__obj, "__self__", None)
        self._check_arguments((own, *args, *kwargs.values()))
        if isinstance(own, str) and getattr(__obj, "__name__", "") == "join" and args:
            return self._charge(_join(args[0], own))
        if isinstance(__obj, jinja2.runtime.LoopContext) and args:  # a recursive loop
            args = (self._guard_loop(args[0]), *args[1:])
        return self._charge(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the safe form of `str.format`, with checks of its arguments."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_arguments((text, *args, *kwargs.values()))
            _check_format(text, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation, if its result cannot be too large."""
        if operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            self._check_arguments((left, *values))
            _check_format(left, values)
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        return self._charge(super().call_binop(context, operator, left, right))

    def _check_arguments(self, values: Sequence[Any]) -> None:
        """Check numbers, which may be widths, and sizes: replacing and indenting can multiply two of them."""
        sizes = [1, 1]
        for value in values:
            self._charge(value)
            if isinstance(value, int | float) and abs(value) > _MAX_NUMBER:
                raise SecurityError(f"the template passes the number {value:.3g} to a function")
            if isinstance(value, str | list | tuple):
                sizes.append(len(value))
        *_, second, first = sorted(sizes)
        if first * second > 16 * MAX_STRING:
            raise SecurityError(f"the template builds more than {MAX_STRING:,} characters")

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks its arguments and its result."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._step()
            values = (*args, *kwargs.values())
            self._check_arguments(values)
            text = args[0] if args and isinstance(args[0], str) else ""
            if function is jinja2.filters.do_format:
                _check_format(text, values)
            if function is jinja2.filters.do_indent and any(isinstance(v, int) and v > 99 for v in values[1:]):
                raise SecurityError("the template indents by more than 99 characters")
            return self._charge(function(*args, **kwargs))

        # How jinja2 knows that a filter takes the environment or the context as its first argument.
        guarded.__dict__.update(getattr(function, "__dict__", {}))
        return guarded

    def _guard_loop(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _concatenate(self, *parts: Any) -> str:
        for part in parts:
            self._charge(part)
        return self._charge("".join([str(part) for part in parts]))


class _Namespace(jinja2.utils.Namespace):
    """Namespace of a template, whose text does not contain that of its values."""

    def __repr__(self) -> str:
        return "<Namespace>"


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


def _guard_expressions(node: nodes.Node) -> None:
    """Replace each ``a ~ b``, list, tuple and dict below a node by a filter."""
    for name, value in list(node.iter_fields()):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, nodes.Node):
                _guard_expressions(child)
        replaced = [_guarded_expression(child) for child in children]
        setattr(node, name, replaced if isinstance(value, list) else replaced[0])


def _guarded_expression(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filter(node.nodes[0], _CONCATENATE, node.nodes[1:])
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filter(node, _GUARD_CONTAINER)
    return node


def _weight(value: Any) -> int:
    """Return the length of a string, or of a container with everything in it.

    Raises:
        SecurityError: It is larger than `MAX_STRING`, or has more than `MAX_ITEMS`.
    """
    if isinstance(value, str) and len(value) <= MAX_STRING:
        return len(value)
    total = 0
    items = 0
    pending = [value]
    while pending:
        item = pending.pop()
        items += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list | tuple | dict):
            items += len(item)
            if items <= MAX_ITEMS:
                pending += [*item, *item.values()] if isinstance(item, dict) else item
        if total > MAX_STRING or items > MAX_ITEMS:
            raise SecurityError(f"the template builds more than {MAX_STRING:,} characters or {MAX_ITEMS:,} items")
    return total + items


def _join(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Return `jinja2.filters.do_join` without the escaping that templates here do not have."""
    items = list(value)
    if attribute is not None:
        items = [item.get(attribute, "") if isinstance(item, Mapping) else item for item in items]
    size = _weight(items) + len(d) * len(items)
    if size > MAX_STRING:
        raise SecurityError(f"the template builds more than {MAX_STRING:,} characters")
    return d.join([str(item) for item in items])


def _check_format(text: str, values: Sequence[Any]) -> None:
    """Check the widths in a format, and numbers that are widths."""
    widths = sum(int(digits[:9]) for digits in _NUMBERS.findall(text))
    if "*" in text or "{}}" in text:
        widths += sum(abs(value) for value in values if isinstance(value, int))
    if widths > 10_000:
        raise SecurityError("the template formats values with a width of more than 10,000")


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
