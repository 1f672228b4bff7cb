"""What the pages of the site take from the code: options of commands, and errors.

A line `<!-- jaxid: WORD ... -->` in a page is replaced by what `GENERATED[WORD]` makes of the other words. Links to
files of the repository that are no pages, such as model cards, lead to their copies in the site.
"""

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple

import docstring_parser
import jaxid_columns
from cyclopts import Parameter

from jaxid import errors
from jaxid.checks import Range
from jaxid.commands import COMMANDS, GROUPS
from jaxid.experiments.base import Experiment

ROOT = Path(__file__).resolve().parents[2]

MARK = re.compile(r"^<!-- jaxid: (.+?) -->$", re.MULTILINE)

PLACEHOLDERS: dict[object, str] = {Path: "PATH", str: "TEXT", int: "N", float: "NUMBER"}

SHIPPED = ("tiny-llava", "tiny-llava-weak", "tiny-video", "tiny-clip")

OUTSIDE = {
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "jaxid/zoo/TRIALS.md": "cards/trials",
    **{
        f"jaxid/zoo/{name}/README.md": f"cards/{name}"
        for name in ("tiny-llava", "tiny-llava-weak", "tiny-video", "tiny-clip")
    },
}
"""Files of the repository that the site shows, and their pages."""


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        name: in Python.
        usage: as it is written on the command line.
        default: what is taken if it is not given; empty if that is nothing, None if it must be given.
        about: its documentation.
        shared: whether every run has it.
    """

    name: str
    usage: str
    default: str | None
    about: str
    shared: bool


def command(path: str) -> Any:
    """The dataclass or function of a command such as "run belief-swap"."""
    module, name = COMMANDS[path].split(":")
    return getattr(importlib.import_module(module), name)


def parameters(path: str) -> dict[str, inspect.Parameter]:
    """The parameters of a command, by name."""
    return dict(inspect.signature(command(path)).parameters)


def documented(target: Any) -> dict[str, str]:
    """What the docstrings of a function, or of a class and its bases, say of every parameter."""
    sources = reversed(target.__mro__) if isinstance(target, type) else [target]
    said: dict[str, str] = {}
    for source in sources:
        for entry in docstring_parser.parse(source.__doc__ or "").params:
            said[entry.arg_name] = " ".join((entry.description or "").split())
    return said


def description(target: Any) -> str:
    """A docstring without its sections."""
    parsed = docstring_parser.parse(inspect.cleandoc(target.__doc__ or ""))
    return "\n\n".join(text for text in (parsed.short_description, parsed.long_description) if text)


def value_of(hint: Any) -> str:
    """What stands for the value of an option of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = next((entry for entry in arguments[1:] if isinstance(entry, Range)), None)
        low = f"{bounds.low:g}" if bounds else ""
        return (
            value_of(arguments[0])
            + (f" (at least {low})" if bounds and bounds.high == float("inf") else "")
            + (f" ({low} to {bounds.high:g})" if bounds and bounds.high < float("inf") else "")
        )
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, UnionType):
        return " or ".join(value_of(entry) for entry in arguments if entry is not NoneType)
    if origin in (tuple, list):
        return value_of(arguments[0])
    return PLACEHOLDERS.get(hint, "")


def options(path: str) -> list[Option]:
    """The options of a command, in the order of its signature."""
    target = command(path)
    said, hints = documented(target), typing.get_type_hints(target, include_extras=True)
    common = {field.name: field.default for field in dataclasses.fields(Experiment)}
    experiment = isinstance(target, type) and issubclass(target, Experiment)
    return [
        _option(parameter, hints[name], said.get(name, ""), experiment and common.get(name, ...) == parameter.default)
        for name, parameter in parameters(path).items()
        if not _hidden(hints[name])
    ]


def _hidden(hint: Any) -> bool:
    extras = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return any(isinstance(entry, Parameter) and entry.parse is False for entry in extras)


def _option(parameter: inspect.Parameter, hint: Any, about: str, shared: bool) -> Option:
    default: str | None = None if parameter.default is inspect.Parameter.empty else _written(parameter.default)
    if parameter.default is dataclasses.MISSING:
        default = None
    flag = "--" + parameter.name.replace("_", "-")
    value = value_of(hint)
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        usage, default = f"{parameter.name.upper()} ...", None
    elif hint is bool:
        usage = f"{flag}, --no-{flag[2:]}"
    elif parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        usage = f"{parameter.name.upper().replace('_', '-')}, {flag} {value}"
    else:
        usage = f"{flag} {value}".strip()
    if parameter.kind is not inspect.Parameter.VAR_POSITIONAL and typing.get_origin(hint) in (tuple, list):
        about = f"{about.removesuffix('.')}; may be given several times"
    return Option(parameter.name, usage, default, about, shared)


def _written(default: object) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _entry(option: Option) -> Iterator[str]:
    yield f"```{{option}} {option.usage}"
    about = re.sub(r"(?<!`)<\w+>", r"`\g<0>`", option.about)  # which Markdown would take for HTML
    about = about if about.endswith((".", "?", "!")) else f"{about}."
    ends = {None: "Required.", "": "", "on": "On by default.", "off": ""}
    yield " ".join(text for text in (about, ends.get(option.default, f"Default: `{option.default}`.")) if text)
    yield from ("```", "")


def commands(group: str) -> str:
    """The reference of all commands of a group; `-` are the commands without one."""
    paths = [path for path in COMMANDS if (path.split(" ")[0] if " " in path else "-") == group]
    lines: list[str] = []
    if group == "run":
        lines += ["## Options of every run", "", "```{program} jaxid run", "```", ""]
        for option in options("run belief-swap"):
            lines += _entry(option) if option.shared else []
    for path in paths:
        lines += [f"## jaxid {path}", "", description(command(path)), "", f"```{{program}} jaxid {path}", "```", ""]
        found = options(path)
        for option in found:
            lines += () if option.shared else _entry(option)
        if any(option.shared for option in found):
            lines += ["It also takes the [options of every run](#options-of-every-run).", ""]
    return "\n".join(lines)


def error_classes() -> str:
    """A table of the errors and warnings."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    rows = [f"| `{kind.__name__}` | {inspect.cleandoc(kind.__doc__ or '')} |" for kind in kinds]
    return "\n".join(["| class | what it says |", "| --- | --- |", *rows])


def repository_file(name: str) -> str:
    """A Markdown file of the repository, such as a model card, without its front matter.

    Args:
        name: its path in the repository.
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL).lstrip()
    # Files of code are no pages.
    text = re.sub(r"(?<!!)\[([^]]+)\]\((?!https?:|#)[^)]*\.py\)", r"\1", text)
    return re.sub(r"!\[([^]]*)\]\((?!https?:)([^)]+)\)", rf"![\1](/../{Path(name).parent.as_posix()}/\2)", text)


GENERATED: dict[str, Callable[..., str]] = {
    "columns": jaxid_columns.table,
    "commands": commands,
    "errors": error_classes,
    "file": repository_file,
}


def generated(text: str) -> str:
    """A page's text with what its marks ask for."""

    def made(mark: re.Match[str]) -> str:
        word, *others = mark[1].split()
        return GENERATED[word](*others)

    return MARK.sub(made, text)


def linked(text: str, page: str) -> str:
    """A page's text, whose links to files outside the folder of pages lead to the pages that show them."""
    up = "../" * page.count("/")

    def led(link: re.Match[str]) -> str:
        inside = link[1].removeprefix(up).removeprefix("../")
        return f"]({up}{OUTSIDE[inside]}.md{link[2] or ''})" if inside in OUTSIDE else link[0]

    return re.sub(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)", led, text)


def _read(app: Any, page: str, source: list[str]) -> None:
    if app.env.doc2path(page).suffix == ".md":
        for file in (__file__, jaxid_columns.__file__) if MARK.search(source[0]) else ():
            app.env.note_dependency(file)
        source[0] = linked(generated(source[0]), page)


def _escaped(app: Any, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    # The star of a shape such as [*S, B] is no emphasis.
    lines[:] = [re.sub(r"(?<![*\w])\*(?=\w+[ ,\]])", r"\\*", line) for line in lines]


def _linked_notebooks(app: Any, doctree: Any) -> None:
    # docs/notebooks is a link, which references follow to a folder that is not one of pages.
    outside = f"{ROOT / 'notebooks'}/"
    for node in doctree.findall(
        lambda node: str(node.get("reftarget", "")).startswith(outside) if hasattr(node, "get") else False
    ):
        node["reftarget"] = f"notebooks/{node['reftarget'].removeprefix(outside)}"


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _escaped)
    app.connect("doctree-read", _linked_notebooks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


assert set(GROUPS) == {path.split(" ")[0] for path in COMMANDS if " " in path}
