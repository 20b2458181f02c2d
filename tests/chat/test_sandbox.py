"""The sandbox of chat templates: what templates need works, and no template runs or allocates without end."""

import jinja2
import pytest

from slm_jax.chat.sandbox import compile_template

VARIABLES = {"messages": [{"a": 1}, {"a": 2}]}
DOUBLE = "{% set ns = namespace(x='aa') %}{% for i in range(80) %}"


def render(source: str) -> tuple[str, list[tuple[int, int]]]:
    environment, template = compile_template(source)
    return environment.render(template, VARIABLES), environment.spans


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.a ~ 'x' ~ loop.index }}{% if loop.first %},{% endif %}{% endfor %}", "1x1,2x2"),
        ("{{ messages | length }}{{ messages | map(attribute='a') | join('-') }}{{ loop is defined }}", "21-2False"),
        ("{{ messages | selectattr('a', 'equalto', 1) | list | tojson }}", '[{"a": 1}]'),
        ("{{ '<&>' | tojson }}{{ ' a ' | trim }}{{ 'b'.upper() }}{{ '%s' % 5 }}{{ '{}'.format(6) }}", '"<&>"aB56'),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "013"),
        ("{% set x %}a1{% endset %}{{ x }}{% set y | upper %}b{% endset %}{{ y ~ strftime_now('x') }}", "a1Bx"),
        ("{% macro m(n) %}({{ n }}){% endmacro %}{{ m(1) ~ m(2) }}{{ ('a' ~ 1 ~ ('b' ~ 2)) }}", "(1)(2)a1b2"),
        ("{%- for m in messages[::-1] %}{{ m['a'] }}{{ loop.revindex }}{% endfor -%} ", "2211"),
    ],
)  # fmt: skip
def test_what_templates_use(source, expected):
    assert render(source)[0] == expected


def test_spans_of_generated_text():
    source = "{% for m in messages %}ab{% generation %}{{ m.a }}cd{% endgeneration %}e{% endfor %}"
    assert render(source) == ("ab1cdeab2cde", [(2, 5), (8, 11)])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10**100000 }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{{ range(10**9) | list }}",
        DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        DOUBLE + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLE + "{% set ns.x = d(ns.x) %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
        "{{ (['a'] * 10**6) | join('b' * 10**6) }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ lipsum(1000) }}",
        "{{ (['a' * 10**6] * 1000) | join }}",
        "{{ ''.join(['a' * 10**6] * 1000) }}",
        "{{ ('%9999d' * 10**5) % ((1,) * 10**5) }}",
        "{{ ('{0}' * 10**5).format('a' * 10**5) }}",
        "{{ ('\\t' * 10**6).expandtabs(10**5) }}",
        "{{ ('\\n' * 10**6) | indent(10**5) }}",
        "{{ 'a'.translate({97: 'b'}) }}",
        DOUBLE + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        DOUBLE + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
        DOUBLE + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
        DOUBLE + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
        "{% for i in [1] recursive %}{{ loop([1, 1]) if loop.depth0 < 40 }}{% endfor %}",
        "{% set x = 'a' * 10**7 %}{% for i in range(1000) %}{% set y = x.upper() %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "a" * (1 << 21),
    ],
)
def test_what_is_refused(source):
    with pytest.raises((jinja2.TemplateError, TypeError)):
        render(source)


def test_the_text_of_nested_namespaces_is_short():
    source = "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ namespace(a=ns, b=ns) }}"
    assert render(source)[0] == "<Namespace>"


def test_endless_recursion():
    with pytest.raises(RecursionError):
        render("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}")
