"""Templates cannot get out, cannot grow without bound and cannot run for long; every failure is the caller's 400."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from quire.errors import InvalidRequest
from quire.text.sandbox import MAX_TEMPLATE, SECONDS, compile_template

MESSAGES = [{"role": "user", "content": "Hello"}]
DOUBLING = "{% set s = 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' %}"


def run(source: str) -> str:
    return compile_template(source).run({"messages": MESSAGES, "text": "AB"}, input_size=1000)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for x in [1, 2] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "1/2False 2/2True "),
        ("{% for x in text %}{{ x }}{% break %}{% endfor %}", "A"),
        ("{% for x in [] %}{{ x }}{% else %}none{% endfor %}", "none"),
        ("{% for x in [3, 1] if x > 1 %}{{ x }}{% endfor %}", "3"),
        ("{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "12"),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "10"),
        ("{% set s %}a{{ text }}{% endset %}{{ s ~ 1 }}", "aAB1"),
        ("{% set s | upper %}a{{ text }}b{% endset %}{{ s }}", "AABB"),
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ '**%s** %05d' % (text, 7) }} {{ '{:*^6}'.format(text) }}", "**AB** 00007 **AB**"),
        ("{{ dict(a=1).items() | list }} {{ messages | map(attribute='role') | join(', ') }}", "[('a', 1)] user"),
        ("{% generation %}{{ text }}{% endgeneration %}", "AB"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ undefined_thing }}{{ 1700000000 | default(1) }}{{ 2 ** 10 }}", "17000000001024"),
    ],
)
def test_templates_work_as_usual(source: str, text: str) -> None:
    assert run(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__name__ }}",
        "{{ messages[0]['__class__']['__init__'] }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ (raise_exception | attr('__globals__')).json }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ '{0.__class__.__mro__}'.format(text).x }}{{ ('{0.__class__}' | format(text)).x.y }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{{ dict.fromkeys.__self__.__mro__ }}",
        "{% include '/etc/hosts' %}",
        "{% import 'os' as os %}",
        "{% extends 'base' %}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum(n=1000000) }}",
    ],
)
def test_there_is_no_way_out(source: str) -> None:
    with pytest.raises(InvalidRequest, match="the chat template failed"):
        run(source)
    assert MESSAGES == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ [1] * 10000000000 }}",
        "{{ 10 ** 1000000 }}",
        "{% set ns = namespace(n=9) %}{% for i in range(30) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x' | indent(1000000000, first=true) }}",
        "{{ text | map('center', 1000000000) | list }}",
        "{{ [[1], [2]] | tojson(indent=1000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ ('{0}' * 100000).format('x' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
        "{{ ('b' * 100000).join('a' * 100000) }}",
        "{{ ('a' * 100000) | list | join('b' * 100000) }}",
        "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
        "{{ strftime_now('%1000000000Y') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(100000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
        DOUBLING + "{% set s = s ~ s %}" * 40,
        DOUBLING + "{% set s = s + s %}" * 40,
        DOUBLING + "{% set s %}{{ s }}{{ s }}{% endset %}" * 40,
        DOUBLING + "{% set s = [s, s] %}" * 40 + "{{ s }}",
        DOUBLING + "{% set s = {'a': s, 'b': s} %}" * 40 + "{{ s }}",
        DOUBLING + "{% set s = (s, s) %}" * 40 + "{{ s | string }}",
        "{% macro m(s, n) %}{{ m(s ~ s, n - 1) if n else s }}{% endmacro %}{{ m('aaaaaaaa', 40) }}",
    ],
)
def test_values_have_a_bound(source: str) -> None:
    begin = time.thread_time()
    with pytest.raises(InvalidRequest, match="the chat template failed"):
        run(source)
    assert time.thread_time() - begin < SECONDS + 1


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set s = 'a' * 99999 %}{% for i in s %}{% for j in s %}{% if i != j %}x{% endif %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{% set x = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_time_has_a_bound(source: str) -> None:
    begin = time.thread_time()
    with pytest.raises(InvalidRequest, match="it ran longer than 1 s"):
        run(source)
    assert SECONDS <= time.thread_time() - begin < SECONDS + 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "failed: roles must alternate"),
        ("line\n{% if %}", "failed: line 2: Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | unknown }}", "No filter named 'unknown'"),
        ("{{ text + 1 }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{" + "(" * 5000, "RecursionError"),
        ("a" * (MAX_TEMPLATE + 1), "chat_template must have at most"),
    ],
)
def test_failures_are_400_with_the_reason(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        run(source)
    assert caught.value.status == 400
    assert reason in caught.value.message
    assert len(caught.value.message) < 600


def test_a_failed_rendering_leaves_nothing_behind() -> None:
    template = compile_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            bad = [pool.submit(run, "{{ 1 / 0 }}") for _ in range(4)]
            good = [pool.submit(template.run, {"messages": MESSAGES * 500}, input_size=10) for _ in range(4)]
            assert all(one.exception() for one in bad)
            assert {one.result() for one in good} == {"Hello" * 500}


def test_what_a_template_reads() -> None:
    template = compile_template("{% set ns = namespace() %}{{ bos_token ~ date }}{% for m in messages %}{{ m.x }}{% endfor %}")
    assert template.variables == {"bos_token", "date", "messages"}
    assert not template.reads_parts
    walks = "{% for m in messages %}{% for part in m['content'] | list %}{{ part }}{% endfor %}{% endfor %}"
    assert compile_template(walks).reads_parts
    assert compile_template(walks) is compile_template(walks)
