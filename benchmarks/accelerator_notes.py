"""What the library hands to its compiled programs, noted while it runs on shapes alone."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from accelerator_targets import Target
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from jaxid import meshes
from jaxid.families.base import Loaded
from jaxid.interp import forward, generate, sweep, trace
from jaxid.interp.programs import Program

Call = tuple[Any, tuple[PyTree, ...], dict[str, PyTree]]

_NOTED = (
    (trace, ("_record", "_residuals", "_resume")),
    (generate, ("_prefill", "_decode")),
    (forward, ("_answer_log_probs",)),
)


@dataclasses.dataclass(frozen=True)
class Notes:
    """What the library hands to its programs; arrays by identity, so they are kept.

    Attributes:
        calls: calls of programs by name.
        placed: arrays that the library puts on a mesh, and how it divides them.
        results: results of programs.
    """

    calls: dict[str, Call] = dataclasses.field(default_factory=dict)
    placed: dict[int, tuple[Any, PartitionSpec]] = dataclasses.field(default_factory=dict)
    results: dict[int, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def noted(target: Target) -> Iterator[Notes]:
    """Within it, calls of the library's jitted functions are noted by name, and chunks are those of a device.

    The library sees models on the chips' mesh, but puts nothing there, as they hold no arrays.
    """
    notes, run = Notes(), Program.__call__

    def note(name: str, function: Any) -> Callable[..., Any]:
        def called(*args: PyTree, **options: PyTree) -> Any:
            if name in notes.calls:
                raise RuntimeError(f"{name} is called twice, and would be counted once")
            notes.calls[name] = (function, args, options)
            return function(*args, **options)

        return called

    def call(program: Any, *args: PyTree, **options: PyTree) -> Any:
        with target.traced():
            found = run(program, *args, **options)
        notes.results.update((id(leaf), leaf) for leaf in jax.tree.leaves(found))
        return found

    def put(mesh: Any, leaf: Any, spec: PartitionSpec) -> Any:
        array = jnp.asarray(leaf)
        notes.placed[id(array)] = (array, spec)
        return array

    with contextlib.ExitStack() as stack:
        for module, names in _NOTED:
            for name in names:
                function = note(name, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, function))
        stack.enter_context(mock.patch.object(jax, "default_backend", lambda: target.device.platform))
        stack.enter_context(mock.patch.object(sweep, "this", lambda: target.device))
        stack.enter_context(mock.patch.object(Program, "__call__", call))
        stack.enter_context(mock.patch.object(Loaded, "mesh", target.shared))
        stack.enter_context(mock.patch.object(meshes, "put", put))
        yield notes
