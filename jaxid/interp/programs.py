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
from jax.sharding import Mesh

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
        with _within(mesh):
            return self.jitted(*arguments, **settings)

    def __getattr__(self, name: str) -> Any:
        """Everything else is as in the compiled function."""
        return getattr(self.jitted, name)


def _within(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The mesh as JAX's context; while a user's own program is traced or differentiated, only its shape."""
    if mesh is None:
        return contextlib.nullcontext()
    try:
        return jax.set_mesh(mesh)
    except ValueError:  # not while something is traced
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


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
