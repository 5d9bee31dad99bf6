"""Chat templates as programs: compiled and run in jinja2's immutable sandbox, within bounds of size and time.

A template comes with a checkpoint, or with a request, and may be anybody's. The sandbox keeps it from Python's internals; this
file adds what `transformers` gives templates (tojson, raise_exception, strftime_now, generation blocks, loop controls) and the
bounds: every loop step, call, filter and operator looks at the clock, and every string or list that they make is measured. What
remains is a bounded number of bounded C calls. It knows nothing of messages.
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from quire.errors import InvalidRequest

SECONDS = 1.0  # of processor time, so that a busy machine refuses nobody
MAX_TEMPLATE = 256 * 1024
SPARE = 1024 * 1024
MAX_COUNT = 1_000_000  # for numbers handed to filters and methods: paddings, widths, repetitions
_LONG_WIDTH = re.compile(r"%(?:\([^)]*\))?[-+ #0.\d]*(?:\d{5,}|\*)")  # of the % operator
_LONG_FIELD = re.compile(r"\{[^{}]*\d{5,}[^{}]*\}")  # of str.format
_MULTIPLYING = frozenset({"translate", "expandtabs", "wordwrap", "urlize", "xmlattr"})  # and no chat template needs them
_PACED, _MEASURED = "paced (Quire)", "measured (Quire)"  # no template can write these names


@dataclass
class Budget:
    """What one rendering may use: until `deadline` of the thread's processor clock, `size` characters or list entries."""

    deadline: float = math.inf
    size: int = SPARE


_budget: ContextVar[Budget] = ContextVar("budget", default=Budget())  # noqa: B039 - never changed after it is made


def _check_clock() -> None:
    if time.thread_time() > _budget.get().deadline:
        raise SecurityError(f"it ran longer than {SECONDS:g} s")


def _refuse_size() -> None:
    raise SecurityError(f"it made a value of more than {_budget.get().size} characters")


def _measured(value: Any) -> Any:
    """`value`, unless it is too large: strings by length, containers by everything inside them, as often as it appears."""
    if _size(value) > _budget.get().size:
        _refuse_size()
    return value


def _size(value: Any) -> int:
    """Characters and entries of a value; counting ends at the limit, so lists of lists of lists cost no more than that."""
    size, limit, open_values = 0, _budget.get().size, [value]
    while open_values and size <= limit:
        one = open_values.pop()
        if isinstance(one, (str, bytes)):
            size += len(one)
        elif isinstance(one, (list, tuple, dict)):
            size += len(one)
            open_values.extend(one.values() if isinstance(one, dict) else one)
        elif isinstance(one, int) and one.bit_length() > 4096:
            size += one.bit_length() ** 2  # its digits take quadratic time
    return size


def _paced(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _check_clock()
        yield value


def _check_arguments(name: str, subject: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Refuse what would make a huge value before it can be measured."""
    if name in _MULTIPLYING:
        raise SecurityError(f"chat templates cannot use {name}")
    for number in (*arguments, *keywords.values()):
        if isinstance(number, int) and abs(number) > (64 if name in ("tojson", "indent") else MAX_COUNT):
            raise SecurityError(f"{name} is called with {number}")
    if not isinstance(subject, str):
        return
    if name in ("format", "format_map"):
        _check_format(subject, (arguments, keywords))
    made = 0
    if name == "replace" and len(arguments) >= 2 and all(isinstance(word, str) for word in arguments[:2]):
        made = subject.count(arguments[0]) * len(arguments[1])
    if name == "join" and arguments and isinstance(arguments[0], (str, list, tuple)):
        made = len(subject) * len(arguments[0])
    if made > _budget.get().size:
        _refuse_size()


def _check_format(layout: str, values: Any) -> None:
    if _LONG_WIDTH.search(layout) or _LONG_FIELD.search(layout):
        raise SecurityError("a format has a long width")
    if (layout.count("%") + layout.count("{")) * _size(values) > _budget.get().size:
        _refuse_size()


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    takes_context = hasattr(function, "jinja_pass_arg")  # then the piped value comes second

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        _check_clock()
        front, piped = arguments[: int(takes_context)], list(arguments[int(takes_context) :])
        if name == "join" and piped:
            piped[0] = list(piped[0])  # it may be a generator, which is read once only
            _check_arguments(name, piped[1] if len(piped) > 1 else keywords.get("d", ""), (piped[0],), {})
        elif name not in ("default", "d") and piped:
            _check_arguments(name, piped[0], tuple(piped[1:]), keywords)
        return _measured(function(*front, *piped, **keywords))

    return run


class _Bounds(NodeTransformer):
    """Lets every loop and every value that a template builds by itself pass through `_paced` and `_measured`."""

    def _through(self, name: str, node: nodes.Expr | None, lineno: int) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through(_PACED, node.iter, node.lineno)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = self._through(_MEASURED, node.filter, node.lineno)
        return node

    def _build(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._through(_MEASURED, node, node.lineno)

    visit_Concat = visit_List = visit_Dict = visit_Tuple = _build


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; for a prompt it is plain text."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateNamespace(Namespace):
    """jinja2's namespace without underscore names, which would lead to Python's internals."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        attributes = dict(*arguments[1:], **attributes)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(arguments[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _make_dict(*arguments: Any, **entries: Any) -> dict[Any, Any]:
    return dict(*arguments, **entries)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    _check_format(layout, ())
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: jinja2's own filter escapes HTML characters."""
    if separators is not None and _size(separators) > 64:
        raise SecurityError("tojson is called with long separators")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that all chat templates share."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        # Constants are not folded, so that nothing of a template runs while it is compiled.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols])
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _TemplateNamespace,
            "dict": _make_dict,
        }
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_PACED: _paced, _MEASURED: _measured}

    def call(__self, __context: Any, __object: Any, *arguments: Any, **keywords: Any) -> Any:
        _check_clock()
        name = getattr(__object, "__name__", "")
        subject = getattr(getattr(__object, "__wrapped__", __object), "__self__", None)
        if subject is not None:  # a method; macros and functions build nothing by themselves
            _check_arguments(str(name), subject, arguments, keywords)
        return _measured(super().call(__context, __object, *arguments, **keywords))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_clock()
        size = _budget.get().size
        if operator == "*":
            for values, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(values, (str, list, tuple)) and len(values) * times > size:
                    _refuse_size()
        elif operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 64):
            raise SecurityError("an exponent is above 64")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        return _measured(super().call_binop(context, operator, left, right))


@dataclass(frozen=True)
class CompiledTemplate:
    """A template ready to run. variables: the names that it reads from outside. reads_parts: it walks over content lists."""

    program: jinja2.Template
    source: str
    variables: frozenset[str]
    reads_parts: bool

    def run(self, variables: Mapping[str, Any], *, input_size: int) -> str:
        """The rendered text, at most 4 x input_size + 1 MiB long. Whatever goes wrong is an InvalidRequest."""
        budget = Budget(time.thread_time() + SECONDS, 4 * input_size + SPARE)
        token = _budget.set(budget)
        try:
            chunks, size = [], 0
            for chunk in self.program.generate(**variables):
                chunks.append(chunk)
                size += len(chunk)
                if size > budget.size:
                    _refuse_size()
                _check_clock()
            return "".join(chunks)
        except Exception as error:  # templates fail in as many ways as programs do
            raise _failure(error) from None
        finally:
            _budget.reset(token)


def _failure(error: Exception) -> InvalidRequest:
    reason = f"{error}" or type(error).__name__
    if not isinstance(error, TemplateError):
        reason = f"{type(error).__name__}: {reason}"
    if isinstance(error, TemplateSyntaxError):
        reason = f"line {error.lineno}: {error.message}"
    reason = reason if len(reason) <= 500 else reason[:497] + "..."
    return InvalidRequest(f"the chat template failed: {reason}", parameter="messages")


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox()


@functools.lru_cache(maxsize=64)
def compile_template(source: str) -> CompiledTemplate:
    """Compile once per text. InvalidRequest when it is no template, or too long."""
    if len(source) > MAX_TEMPLATE:
        raise InvalidRequest(
            f"chat_template must have at most {MAX_TEMPLATE} characters, got {len(source)}.", parameter="chat_template"
        )
    sandbox = _sandbox()
    try:
        tree = sandbox.parse(source)
        variables = frozenset(meta.find_undeclared_variables(tree)) - set(sandbox.globals)
        reads_parts = any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))
        program = sandbox.from_string(_Bounds().visit(tree))
    except Exception as error:  # a syntax error, or a nesting too deep for the parser
        raise _failure(error) from None
    return CompiledTemplate(program, source, variables, reads_parts)


def _is_content(node: nodes.Node) -> bool:
    """`message.content`, `message['content']` or a variable of that name, filtered or not."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name == "content"
