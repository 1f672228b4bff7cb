"""The compiled programs of passes, which can be watched instead of run.

A plan of a job runs the job's own code, up to its programs: a watcher sees each with its arguments, whose arrays may be
abstract, and answers with arrays of the right shapes.

A program whose first array is placed on a mesh is traced with that mesh as JAX's context, see `jaxid.nn.placement`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

import jax

from jaxid import meshes

P = ParamSpec("P")
R = TypeVar("R")


class Program(Generic[P, R]):
    """A function under `jax.jit`, with its other methods: `lower`, `trace`, `clear_cache` ..."""

    def __init__(self, function: Callable[P, R], **options: Any):
        """Compiles a function; the options are those of `jax.jit`."""
        self.options = options
        self.jitted: Any = jax.jit(function, **options)
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: P.args, **settings: P.kwargs) -> R:
        """Runs the program, or asks the watcher."""
        watcher = _WATCHER.get()
        if watcher is not None:
            return watcher(self, arguments, settings)
        mesh = meshes.of(arguments)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return self.jitted(*arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        """Everything else is as in the compiled function."""
        return getattr(self.jitted, name)


Watcher = Callable[[Program[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with a program, its arguments and its keyword arguments; gives what the program would."""

_WATCHER: contextvars.ContextVar[Watcher | None] = contextvars.ContextVar("watcher", default=None)


def program(**options: Any) -> Callable[[Callable[P, R]], Program[P, R]]:
    """Decorates a function as `jax.jit` with these options does."""
    return lambda function: Program(function, **options)


@contextlib.contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Lets a watcher answer for all programs, or None run them."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)
