"""The decorator that checks annotations at run time; `conftest.py` applies it to every function of jaxid."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# As for static checkers, an int is accepted where a float is expected.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

_INNER: dict[tuple[object, ...], Any] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks arguments and results of the functions that jaxtyping makes of a function's annotations.

    They do nothing else, so those of a function inside another one serve whenever the outer one makes it anew.
    """
    if "<locals>" not in function.__qualname__:
        return _checked(function)
    code = function.__code__
    key = function.__module__, function.__qualname__, code.co_varnames, repr(function.__annotations__)
    if key not in _INNER:
        _INNER[key] = _checked(function)
    return _INNER[key]
