"""Chat templates: programs written by others, rendered in a sandbox that limits their steps and their output.

The sandbox works like Hugging Face's, but on a budget: a template that loops without end, or builds endless texts or
numbers, fails after a fraction of a second. Steps are counted and not timed, so the limit is the same everywhere.
"""

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jinja2
from jinja2 import ext, nodes, sandbox, visitor
from jinja2.parser import Parser
from jinja2.runtime import Context

from jaxid.errors import CheckpointError, PromptError
from jaxid.io import first_line
from jaxid.prompts.words import shown

STEPS = 100_000
"""Limit of one rendering: each pass of a loop is a step, and so is producing 100 characters, items or bits."""

_UNIT, _CALL = 100, 10  # characters, items or bits per step; steps per call

_STAND_IN = "\ue000"  # a private character

_left: ContextVar[list[int]] = ContextVar("left")

T = TypeVar("T")
P = ParamSpec("P")
Message: TypeAlias = str | list[dict[str, str]]


class _Endless(jinja2.TemplateError):
    """A template that takes too many steps."""


def _spend(steps: int) -> None:
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        raise _Endless(f"it takes more than {STEPS} steps, so it loops or writes without end")


def _size(value: object) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, range)) else 0


def _made(value: T) -> T:
    _spend(_size(value) // _UNIT)
    return value


def _counted(values: Iterable[T]) -> Iterator[T]:
    for value in values:
        _spend(1)
        yield value


def _joined(*parts: object) -> str:
    return "".join(map(str, parts))


def _paid(function: Callable[P, T]) -> Callable[P, T]:
    """The function at a cost: steps for its arguments, before it runs, and for its result."""

    @functools.wraps(function)
    def call(*given: P.args, **named: P.kwargs) -> T:
        arguments = (*given, *named.values())
        _spend(_CALL + sum(abs(value) if isinstance(value, int) else _size(value) for value in arguments) // _UNIT)
        return _made(function(*given, **named))

    return call


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Guards(visitor.NodeTransformer):
    """Counts the passes of loops, and turns the joining of texts into calls."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("_counted", [node.iter], node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("_joined", node.nodes, node)


def _call(name: str, arguments: Sequence[nodes.Node], place: nodes.Node) -> nodes.Node:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None).set_lineno(place.lineno)


class _Generation(ext.Extension):
    """Hugging Face's tag around the assistant's text, whose content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - jinja's form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], finalize=_made
        )
        self.filters = {name: _paid(function) for name, function in (self.filters | {"tojson": _tojson}).items()}
        del self.globals["lipsum"]  # it can write for minutes
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "_counted": _counted, "_joined": _joined}

    def call(__self, __context: Context, __obj: object, *given: object, **named: object) -> object:
        return _paid(functools.partial(super().call, __context, __obj))(*given, **named)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _spend(abs(right) * _size(left))
        elif operator == "*":  # of two numbers, or repeats a text or list
            count, item = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int):
                made = _size(count) + _size(item) if isinstance(item, int) else max(count * _size(item), 0)
                _spend(made // _UNIT)
        return _made(super().call_binop(context, operator, left, right))


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = _Sandbox()
    return environment.from_string(_Guards().visit(environment.parse(template)))


def _rendered(
    template: str, content: Message, *, chat: bool, variables: Mapping[str, object], reply: Message | None = None
) -> str:
    """A template around one message of the user and, if there is one, the assistant's reply.

    Raises:
        PromptError: for whatever the template raises.
    """
    messages = [{"role": "user", "content": content}]
    if reply is not None:
        messages.append({"role": "assistant", "content": reply})
    given = {"messages": messages, "tools": None, "documents": None, **variables, "add_generation_prompt": chat}
    token = _left.set([STEPS + _size(content)])
    try:
        return _compiled(template).render(given)
    except Exception as error:  # a template is a program, which can raise anything
        raise PromptError(f"the chat template cannot be rendered: {first_line(error)}.") from error
    finally:
        _left.reset(token)


def _content(form: str, text: str, pictures: int, placeholder: str) -> Message:
    if form == "parts":
        return [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
    return f"{placeholder}\n" * pictures + text if form == "marked" else text


def render(
    template: str,
    text: str,
    *,
    placeholder: str,
    pictures: int,
    chat: bool,
    variables: Mapping[str, object],
    reply: str | None = None,
) -> tuple[str, int]:
    """Renders a template around a user's message: pictures, followed by a text.

    The message is a list of parts if the template takes one. Templates for text alone take a string, which begins with
    one line per picture that contains its placeholder, unless the template places pictures itself.

    Args:
        template: the source of the template.
        text: the user's text, without white space around it.
        placeholder: what stands for a picture in the rendered text.
        pictures: number of pictures.
        chat: end with the generation prompt.
        variables: the tokenizer's special tokens by name, which templates may use.
        reply: what the assistant replies; the template then also writes what ends a reply.

    Returns:
        The rendered text, and the index of the first character of `text` in it.

    Raises:
        PromptError: for a template that cannot be rendered, changes the text, or does not place every picture exactly
            once before it.
    """
    form, before = _form(template, placeholder, pictures, chat, json.dumps(dict(variables), default=str))
    if form:
        replied = None if reply is None else _content("parts" if form == "parts" else "bare", reply, 0, placeholder)
        content = _content(form, text, pictures, placeholder)
        rendered = _rendered(template, content, chat=chat, variables=variables, reply=replied)
        if rendered.startswith(before + text):
            return rendered, len(before)
    elif before:
        raise PromptError(before)
    raise PromptError(f"the chat template changes the question {shown(text)}; its words cannot be located.")


@functools.lru_cache(maxsize=256)
def _form(template: str, placeholder: str, pictures: int, chat: bool, variables: str) -> tuple[str, str]:
    """The form in which a template takes a message, and what it writes before the text.

    It is found with a stand-in that no template contains, since the text itself may occur in the template ("USER").

    Returns:
        The form, and what comes before the text; or "" and the problem, which is "" if the stand-in was changed.
    """
    problems = []
    for form in ("parts", "marked", "bare") if pictures else ("parts", "bare"):
        content = _content(form, _STAND_IN, pictures, placeholder)
        try:
            rendered = _rendered(template, content, chat=chat, variables=json.loads(variables))
        except PromptError as error:
            problems.append((1, str(error)))
            if isinstance(error.__cause__, _Endless):
                break
            continue
        before, found, _ = rendered.partition(_STAND_IN)
        placed = before.count(placeholder)
        if found and placed == pictures:
            return form, before
        problem = (
            f"the chat template places {placed} pictures as {placeholder!r} instead of {pictures}: "
            "it must place every picture exactly once, before the question."
        )
        problems.append((0, problem) if found else (0.5, ""))
    # A misplaced picture says more than that the template takes no list, or no string.
    return "", min(problems, key=lambda one: one[0])[1]


def check(template: object, where: str, *, placeholder: str, variables: Mapping[str, object]) -> str:
    """The template, if it can render a prompt with no, one or two pictures.

    Raises:
        CheckpointError: if it cannot, saying why, or is not a text.
    """
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise CheckpointError(f"{where} has no chat template: it must be text, not {type(template).__name__}.")
    problems = []
    for pictures in (1, 2, 0):
        try:
            render(template, "?", placeholder=placeholder, pictures=pictures, chat=True, variables=variables)
        except PromptError as error:
            problems.append(error)
    if len(problems) == 3:
        raise CheckpointError(f"{where}: {problems[0]}") from problems[0]
    return template
