"""Processes for tests, which start at once: each is forked from one that has imported what jaxid's commands need."""

import dataclasses
import fcntl
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

# A server of its own: the one of `joint_job` has imported much less, and starts sooner for that.
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(
    [
        "joint_job",  # first, since it quietens JAX
        "jaxid.experiments.belief_swap",
        "jaxid.experiments.finetune_run",
        "orbax.checkpoint",
        "pandas",
        "scipy.stats",
        "transformers.models.auto.image_processing_auto",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.clip.image_processing_pil_clip",
        "transformers.models.llava.configuration_llava",
    ]
)


@dataclasses.dataclass(frozen=True)
class Child:
    """A process that was begun.

    Attributes:
        process: itself.
        out: file with what it prints.
        err: file with what it prints to stderr.
    """

    process: ForkServerProcess
    out: Path
    err: Path

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self, seconds: float = 400.0) -> int:
        """Its exit code; it is killed if it takes longer."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds:g} s: {self.err.read_text()}")
        with self.err.open() as file:  # what relays its last words may still be at it
            fcntl.flock(file, fcntl.LOCK_SH)
        return code


def begin(
    work: Callable[..., None],
    *arguments: Any,
    told: Path,
    environment: Mapping[str, str],
    patience: float = 60.0,
    join: float = 120.0,
) -> Child:
    """Begins a process, which is told the variables of the environment before it uses JAX's devices.

    Args:
        work: function of a module that can be imported.
        arguments: of the function.
        told: path without suffix of the files for what the process prints.
        environment: variables besides those of the tests.
        patience: as JAXID_PATIENCE_SECONDS.
        join: as JAXID_JOIN_SECONDS.
    """
    child = multiprocessing.get_context("forkserver").Process(
        target=_begun,
        args=(work, arguments, told, dict(environment), patience, join),
    )
    files = told.with_suffix(".out"), told.with_suffix(".err")
    for file in files:
        file.write_text("")
    with mock.patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
        child.start()
    return Child(child, *files)


def command(words: Sequence[str]) -> None:
    """Runs a command of jaxid and ends the process, as `jaxid` does."""
    from jaxid.cli import main

    main(list(words))


def _begun(
    work: Callable[..., None],
    arguments: Sequence[Any],
    told: Path,
    environment: dict[str, str],
    patience: float,
    join: float,
) -> None:
    import jax

    from jaxid import jobs, places, processes

    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(told.with_suffix(suffix), os.O_WRONLY), descriptor)
    fcntl.flock(2, fcntl.LOCK_EX)  # held until everything that inherits it has ended
    # Those which jaxid and JAX have read by now are told them as well.
    os.environ.update(environment)
    jax.config.update("jax_disable_most_optimizations", True)  # most programs are compiled here, and run a few times
    jax.config.update("jax_numpy_dtype_promotion", os.environ["JAX_NUMPY_DTYPE_PROMOTION"])
    processes.PATIENCE_SECONDS = jobs.PATIENCE_SECONDS = patience
    processes.JOIN_SECONDS = places.JOIN_SECONDS = join
    work(*arguments)
