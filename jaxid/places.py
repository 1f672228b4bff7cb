"""The place of a process among several, as the command line or a cluster says, before JAX is imported."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from jaxid.errors import InputError
from jaxid.io import reporting

JOIN_SECONDS = float(os.environ.get("JAXID_JOIN_SECONDS", "300"))
"""How long a process waits for the others to start."""

OPTIONS = ("--coordinator", "--processes", "--process")
"""Options that every command which several processes share takes besides its own."""


class Elsewhere(Exception):
    """Ends a command whose rest is done by process 0, or that has nothing to do; its text, if any, is printed."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among those of a command.

    Attributes:
        coordinator: host and port of process 0.
        processes: how many there are.
        process: the index of this one.
        local_devices: indices of the devices that it uses, where several processes share a machine; all by default.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: list[int] | None = None


def taken(tokens: Sequence[str]) -> tuple[list[str], Place | None]:
    """A command line without --coordinator, --processes and --process, and what they say.

    Raises:
        InputError: if they do not fit together, or --processes auto recognises no cluster.
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    remaining = iter(tokens)
    for token in remaining:
        name, equals, value = token.partition("=")
        if name not in OPTIONS:
            rest.append(token)
            continue
        text = value if equals else next(remaining, None)
        if text is None or name in given:
            raise InputError(f"{name} needs {'one value' if text is None else 'to be given once'}.")
        given[name] = text
    if not given:
        return rest, None
    if given == {"--processes": "auto"}:
        return rest, recognised()
    missing = [name for name in OPTIONS if name not in given]
    if missing or given["--processes"] == "auto":
        raise InputError(
            "several processes need --coordinator HOST:PORT, --processes N and --process I together, or --processes "
            f"auto alone{f'; {missing[0]} is missing' if missing else ''}."
        )
    count, index = (_natural(name, given[name]) for name in OPTIONS[1:])
    if not 0 <= index < count:
        raise InputError(f"--process {index} is out of range: of {count} processes, the last has index {count - 1}.")
    address(given["--coordinator"])
    return rest, Place(given["--coordinator"], count, index)


def _natural(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise InputError(f"{name} is a whole number, not {text!r}.")
    return int(text)


def address(text: str) -> tuple[str, int]:
    """The host and the port of process 0.

    Raises:
        InputError: if the text names none.
    """
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InputError(f"--coordinator is the address of process 0, such as node1:9876, not {text!r}.")
    return host.strip("[]"), int(port)


def recognised(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place as torchrun's variables say, or a cluster that JAX recognises.

    Raises:
        InputError: if there is neither.
    """
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        rank, size, port = (_natural(name, environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local = environment.get("LOCAL_RANK")
        own = None if local is None or environment.get("LOCAL_WORLD_SIZE") == "1" else [_natural("LOCAL_RANK", local)]
        return Place(f"{environment['MASTER_ADDR']}:{port + 1}", size, rank, own)  # torchrun listens at the port itself
    with reporting("--processes auto: the cluster could not be recognised", InputError):
        from jax._src.clusters import ClusterEnv

        coordinator, count, index, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(JOIN_SECONDS)
        )
    if coordinator is None or count is None or index is None:
        raise InputError(
            "--processes auto recognises Slurm, Open MPI, TPU pods, Kubernetes and torchrun, and finds none of them; "
            "give --coordinator, --processes and --process."
        )
    # JAX gives a process a single device, which is right only where others share its machine.
    own = None if local_devices is None or _alone(environment) else list(local_devices)
    return Place(coordinator, count, index, own)


def _alone(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or Open MPI started a single process on this machine."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    counts: list[int] = []
    for count, times in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "")
    return node.isdigit() and int(node) < len(counts) and counts[int(node)] == 1


_RELAY = r"""
import os, re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
fatal = False
for line in sys.stdin.buffer:
    if not fatal and re.match(rb"F\d{4} .*JAX distributed service detected fatal errors", line):
        fatal = True
        os.write(2, b"error: process 0 stopped, and with it the coordinator; what is finished is kept: run the same "
                    b"command again.\n")
    if not fatal:
        os.write(2, line)
"""


def quieten() -> None:
    """Keeps JAX from noting at length what it hears of other processes; to be called before it is imported."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # which is what JAX sets, here or in a parent process
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


@contextlib.contextmanager
def relayed() -> Iterator[None]:
    """Lets nothing of this process be seen but errors, for processes other than 0.

    What libraries print to its standard output is dropped, and the C++ stack with which JAX ends it when the
    coordinator dies becomes one line.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    relay = subprocess.Popen([sys.executable, "-I", "-S", "-c", _RELAY], stdin=subprocess.PIPE, close_fds=True)
    assert relay.stdin is not None
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    os.dup2(relay.stdin.fileno(), 2)
    relay.stdin.close()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        with contextlib.suppress(subprocess.TimeoutExpired):
            relay.wait(10)
