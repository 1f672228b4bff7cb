"""Chat templates: programs that others wrote, rendered in a sandbox that bounds their steps and what they write.

The sandbox does what Hugging Face's does, on a budget: a template that loops without end, or makes endless texts or
numbers, is an error after a fraction of a second. Nothing is timed, so that this holds on any thread and machine.
"""

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, visitor

from jaxid.errors import CheckpointError, PromptError
from jaxid.io import first_line
from jaxid.prompts.words import shown

STEPS = 100_000
"""What one rendering may take: a pass of a loop is a step, and so are 100 characters, items or bits that are made."""

_UNIT, _CALL = 100, 10  # what is made for a step; steps of a call

_STAND_IN = "\ue000"  # a private character

_left: ContextVar[list[int]] = ContextVar("left")


class _Endless(jinja2.TemplateError):
    """A template that takes too many steps."""


def _spend(steps: int) -> None:
    left = _left.get()
    left[0] -= steps
    if left[0] < 0:
        raise _Endless(f"it takes more than {STEPS} steps, so it loops or writes without end")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, range)) else 0


def _made(value: Any) -> Any:
    _spend(_size(value) // _UNIT)
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(1)
        yield value


def _joined(*parts: Any) -> str:
    return "".join(map(str, parts))


def _paid(function: Callable[..., Any], given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Calls a function, which costs steps for what it is given, before it does anything, and for what it returns."""
    _spend(_CALL + sum(abs(value) if isinstance(value, int) else _size(value) for value in given) // _UNIT)
    _spend(sum(abs(value) if isinstance(value, int) else _size(value) for value in named.values()) // _UNIT)
    return _made(function(*given, **named))


def _filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return _paid(function, given, named)

    return call


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Guards(visitor.NodeTransformer):
    """Lets loops be counted, and makes calls of joined texts."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("_counted", [node.iter], node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("_joined", node.nodes, node)


def _call(name: str, arguments: list[Any], place: nodes.Node) -> Any:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None).set_lineno(place.lineno)


class _Generation(ext.Extension):
    """Hugging Face's tag around what the assistant says; what it holds is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's form

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], finalize=_made
        )
        self.filters = {name: _filter(function) for name, function in (self.filters | {"tojson": _tojson}).items()}
        del self.globals["lipsum"]  # writes for minutes
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "_counted": _counted, "_joined": _joined}

    def call(__self, __context: Any, __obj: Any, *given: Any, **named: Any) -> Any:
        return _paid(functools.partial(super().call, __context, __obj), given, named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        whole, sizes = (isinstance(left, int), isinstance(right, int)), (_size(left), _size(right))
        if operator == "**" and all(whole):
            _spend(abs(right) * sizes[0])
        elif operator == "*" and any(whole):  # of two numbers, or repeats a text or list
            _spend(sum(sizes) if all(whole) else max(left * sizes[1] if whole[0] else right * sizes[0], 0) // _UNIT)
        return _made(super().call_binop(context, operator, left, right))


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = _Sandbox()
    return environment.from_string(_Guards().visit(environment.parse(template)))


def _rendered(template: str, content: Any, *, chat: bool, variables: Mapping[str, Any]) -> str:
    """A template around one message of the user.

    Raises:
        PromptError: for whatever the template raises.
    """
    messages = [{"role": "user", "content": content}]
    given = {"messages": messages, "tools": None, "documents": None, **variables, "add_generation_prompt": chat}
    token = _left.set([STEPS + _size(content)])
    try:
        return _compiled(template).render(given)
    except Exception as error:  # the template is a program: it can raise anything
        raise PromptError(f"the chat template cannot be rendered: {first_line(error)}.") from error
    finally:
        _left.reset(token)


def _content(form: str, text: str, pictures: int, placeholder: str) -> Any:
    if form == "parts":
        return [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
    return f"{placeholder}\n" * pictures + text if form == "marked" else text


def render(
    template: str, text: str, *, placeholder: str, pictures: int, chat: bool, variables: Mapping[str, Any]
) -> tuple[str, int]:
    """What a template makes of a user's message of some pictures and a text after them.

    The message is a list of parts where the template takes one. Templates for text alone want a string: then the
    pictures' placeholders begin it, a line each, unless the template places them itself.

    Args:
        template: the source.
        text: the user's, without white space around it.
        placeholder: what a picture is in the rendered text.
        pictures: how many there are.
        chat: end with the generation prompt.
        variables: the tokenizer's special tokens by name, which templates may use.

    Returns:
        The rendered text, and the first character of `text` in it.

    Raises:
        PromptError: for a template that cannot be rendered, changes the text, or does not place every picture once
            before it.
    """
    form, before = _form(template, placeholder, pictures, chat, json.dumps(dict(variables), default=str))
    if form:
        rendered = _rendered(template, _content(form, text, pictures, placeholder), chat=chat, variables=variables)
        if rendered.startswith(before + text):
            return rendered, len(before)
    elif before:
        raise PromptError(before)
    raise PromptError(f"the chat template changes the question {shown(text)}; its words cannot be located.")


@functools.lru_cache(maxsize=256)
def _form(template: str, placeholder: str, pictures: int, chat: bool, variables: str) -> tuple[str, str]:
    """In which form a template takes a message, and what it writes before the text.

    Found with a stand-in that no template holds: the text itself may also occur in the template ("USER").

    Returns:
        The form and the text; or "" and what is wrong, "" again if the stand-in is gone.
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
            "it must place every picture once, before the question."
        )
        problems.append((0, problem) if found else (0.5, ""))
    # What a template does wrong says more than that it takes no list, or no string.
    return "", min(problems, key=lambda one: one[0])[1]


def check(template: Any, where: str, *, placeholder: str, variables: Mapping[str, Any]) -> str:
    """The template, if it renders a prompt of no, one or two pictures.

    Raises:
        CheckpointError: if it does not, saying why, or is no text.
    """
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str):
        raise CheckpointError(f"{where} holds no chat template: it must be text, not {type(template).__name__}.")
    problems = []
    for pictures in (1, 2, 0):
        try:
            render(template, "?", placeholder=placeholder, pictures=pictures, chat=True, variables=variables)
        except PromptError as error:
            problems.append(error)
    if len(problems) == 3:
        raise CheckpointError(f"{where}: {problems[0]}") from problems[0]
    return template
