"""Several processes that run one command: how they connect, and what they exchange.

`join` connects a process with `jax.distributed`. After that JAX sees the devices of all processes, and they exchange
short texts through the store of its coordinator, process 0. Every process writes there once a second that it lives;
process 0 finds out in this way who stopped, and why. Nothing here computes or writes results.

A process other than 0 that dies takes nothing with it but the items it had begun. If process 0 dies, the coordinator is
gone, and JAX ends the other processes at once; `jaxid.places.relayed` makes one line of what it prints then.
"""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from jaxid import meshes
from jaxid.errors import InputError, JaxidError
from jaxid.io import reporting
from jaxid.places import JOIN_SECONDS, Elsewhere, Place, address

PATIENCE_SECONDS = float(os.environ.get("JAXID_PATIENCE_SECONDS", "60"))
"""Seconds of silence after which a process is considered dead."""

_BEAT_SECONDS = 1.0
_GRACE_SECONDS = 1.0
"""Seconds that process 0, which runs the coordinator, gives the others to disconnect."""

_PREFIX = "jaxid"


# --- joining ---


def join(place: Place) -> None:
    """Connects this process with the others; must come before anything uses JAX's devices.

    Raises:
        InputError: if the others do not answer in time, or the coordinator's port is in use.
    """
    global _link
    if _link is not None:
        raise InputError("this process has joined others before.")
    if place.processes == 1:
        return
    import jax

    deadline = time.monotonic() + JOIN_SECONDS
    host, port = address(place.coordinator)
    if place.process == 0:
        _require_free(port)
    else:
        _await(host, port, deadline)
    # Gloo carries what CPU devices of several processes compute together. Recoverable: the death of one process, but
    # for process 0, does not end the others.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending the process
    failed: list[Exception | None] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                place.local_devices,
                "deactivate",  # of the detection of clusters, which `jaxid.places` did
                # JAX ends the process at its own time-out, with a C++ stack: ours comes first.
                initialization_timeout=int(2 * JOIN_SECONDS) + 60,
                heartbeat_timeout_seconds=max(10, int(PATIENCE_SECONDS)),
                shutdown_timeout_seconds=10,
            )
            failed.append(None)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=connect, name="jaxid-join", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if not failed:
        _forget()
        raise InputError(
            f"not all of the {place.processes} processes joined at {place.coordinator} within {JOIN_SECONDS:g} s; "
            "start each of them, with its own --process and the same --coordinator and --processes."
        )
    if failed[0] is not None:
        _forget()
        with reporting(f"process {place.process} could not join at {place.coordinator}", InputError):
            raise failed[0]
    link = Link(place.process, place.processes, _state().client)
    counts = link.exchange(place.processes)
    if len(set(counts)) > 1:
        raise InputError(f"the processes do not agree on how many they are: --processes was {counts}.")
    _link = link


def _state() -> Any:
    """JAX's connection with the other processes, which has no public API."""
    from jax._src.distributed import global_state

    return global_state


def _forget() -> None:
    """Lets JAX's end of the process pass over a connection that is not complete."""
    state = _state()
    state.client = state.service = state.preemption_sync_manager = None


def _require_free(port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(
                    f"port {port} of --coordinator is in use on this machine, or may not be used; choose another one."
                ) from error


def _await(host: str, port: int, deadline: float) -> None:
    reason = "time-out"
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=min(left, 10.0)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(0.25, left))
    raise InputError(
        f"the coordinator {host}:{port} does not answer ({reason}, tried for {JOIN_SECONDS:g} s); is process 0 running "
        "there, and may this machine reach it?"
    )


# --- talking ---


class Link:
    """What a process hears from the others.

    Attributes:
        process: the index of this process.
        processes: how many there are.
        bound: those with which this one computes in lockstep; it ends if one of them stops.
    """

    def __init__(self, process: int, processes: int, client: Any):
        """Begins to say that this process lives, and to listen to the others."""
        self.process, self.processes = process, processes
        self.bound = frozenset(range(processes)) - {process}
        self._client = client
        self._names = itertools.count()
        self._own: dict[str, Any] = {"beat": 0, "items": 0, "failed": None, "left": False}
        self._others: dict[int, dict[str, Any]] = {}
        self._changed: dict[int, float] = dict.fromkeys(range(processes), time.monotonic())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beat()
        threading.Thread(target=self._live, name="jaxid-processes", daemon=True).start()

    # what others are told

    def exchange(self, value: Any) -> list[Any]:
        """One value of every process, in their order; all of them call this.

        Args:
            value: of types that JSON has.

        Raises:
            JaxidError: if another process stopped.
        """
        name = f"{_PREFIX}/value/{next(self._names)}"
        self._client.key_value_set(f"{name}/{self.process}", json.dumps(value))
        if self.process == 0:
            found = [self._get(f"{name}/{process}", process) for process in range(self.processes)]
            self._client.key_value_set(name, json.dumps([json.loads(text) for text in found]))
        return json.loads(self._get(name, 0))

    def _get(self, key: str, process: int) -> str:
        """A text that a process writes sooner or later."""
        while True:
            try:
                return self._client.blocking_key_value_get(key, 500)
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if process != self.process:
                for other in {process, 0} - {self.process}:
                    if (reason := self.stopped(other)) is not None:
                        raise JaxidError(f"process {other} stopped: {reason}")

    def report(self, items: int) -> None:
        """Says how many items this process has finished."""
        self._own["items"] = items

    def leave(self, failed: str | None) -> None:
        """Disconnects from the others, with the reason if something failed; process 0 waits for those still running.

        No method may be called after this one.
        """
        self._own |= {"failed": failed, "left": True}
        self._ended.set()
        with contextlib.suppress(Exception):
            self._beat()
        if self.process == 0:
            limit = time.monotonic() + (PATIENCE_SECONDS if failed is None else min(PATIENCE_SECONDS, 10))
            others = range(1, self.processes)
            while any(self.stopped(one) is None and not self.left(one) for one in others):
                if time.monotonic() > limit:
                    break
                time.sleep(_BEAT_SECONDS / 4)
                with contextlib.suppress(Exception):
                    self._beat()
            time.sleep(_GRACE_SECONDS)
        import jax

        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        _forget()

    def collect(self, value: Any, tick: Callable[[], None]) -> tuple[list[Any], dict[int, str]]:
        """Waits until every process has given its value or stopped; called by process 0, while the others `give`.

        Args:
            value: of this process.
            tick: called now and then.

        Returns:
            The values, and of those that stopped the reasons.
        """
        found, stopped = [value], {}
        for process in range(1, self.processes):
            while True:
                try:
                    found.append(json.loads(self._client.blocking_key_value_get(f"{_PREFIX}/end/{process}", 500)))
                    break
                except Exception as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        raise
                if (reason := self.stopped(process)) is not None:
                    stopped[process] = reason
                    break
                tick()
        return found, stopped

    def give(self, value: Any) -> None:
        """Gives process 0 the value for which `collect` waits."""
        self._client.key_value_set(f"{_PREFIX}/end/{self.process}", json.dumps(value))

    # what others say

    def items(self) -> int:
        """How many items the other processes have finished."""
        return sum(state["items"] for state in self._others.values())

    def left(self, process: int) -> bool:
        """Whether a process is done with all it had to do."""
        return self._others.get(process, {}).get("left", False)

    def stopped(self, process: int) -> str | None:
        """Why a process stopped early; None if it is running or done."""
        state = self._others.get(process, {})
        if state.get("failed") is not None:
            return state["failed"]
        silent = time.monotonic() - self._changed[process]
        if process != self.process and not state.get("left") and silent > PATIENCE_SECONDS:
            return f"it was not heard of for {silent:.0f} s."
        return None

    def _beat(self) -> None:
        with self._lock:
            self._own["beat"] += 1
            state = json.dumps(self._own)
            self._client.key_value_set(f"{_PREFIX}/state/{self.process}", state, allow_overwrite=True)
            for key, text in self._client.key_value_dir_get(f"{_PREFIX}/state/"):
                process, found = int(key.rpartition("/")[2]), json.loads(text)
                if process != self.process and found != self._others.get(process):
                    self._others[process] = found
                    self._changed[process] = time.monotonic()

    def _live(self) -> None:
        since: float | None = None
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                self._beat()
            except Exception:  # the coordinator is gone, and JAX ends this process
                return
            reasons = [(one, reason) for one in sorted(self.bound) if (reason := self.stopped(one)) is not None]
            if not reasons:
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() - since > 10 and not self._ended.is_set():
                # Whatever the main thread waits for does not come; a computation of several devices cannot be stopped.
                one, reason = reasons[0]
                _end(f"process {one} stopped: {reason}")


def _end(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


_link: Link | None = None


def link() -> Link | None:
    """The connection with the other processes, if this one has joined any."""
    return _link


def leave(error: BaseException | None) -> None:
    """Disconnects from the other processes, if there are any, and tells them what failed."""
    global _link
    if _link is not None:
        failed = None if error is None else " ".join(str(error).split()) or type(error).__name__
        _link.leave(failed)
        _link = None


@contextlib.contextmanager
def joined(place: Place) -> Iterator[None]:
    """Joins the others, and leaves them at the end; see `join` and `leave`."""
    join(place)
    failed: BaseException | None = None
    try:
        yield
    except Exception as error:
        failed = _explained(error)
        if failed is error:
            raise
        raise failed from error
    except BaseException as error:
        failed = error
        raise
    finally:
        leave(failed)


def _explained(error: Exception) -> Exception:
    """The error, or if it came of the end of a process that computes together with this one, one that says so."""
    import jax

    if _link is None or not _link.bound or not isinstance(error, jax.errors.JaxRuntimeError):
        return error
    limit = time.monotonic() + PATIENCE_SECONDS + 5
    while time.monotonic() < limit:
        for one in sorted(_link.bound):
            if (reason := _link.stopped(one)) is not None:
                return JaxidError(f"process {one} stopped: {reason}")
        time.sleep(_BEAT_SECONDS / 4)
    return error


# --- workers ---


@dataclasses.dataclass(frozen=True)
class Team:
    """The workers of a job, each of which has a whole copy of the model, and this process's part in them.

    Attributes:
        worker: the index of this process's worker.
        workers: how many there are.
        leads: whether this process writes what its worker computes.
        spans: whether several processes are one worker, which compute the same on devices of all of them.
        link: the connection with the other processes.
    """

    worker: int = 0
    workers: int = 1
    leads: bool = True
    spans: bool = False
    link: Link | None = None

    @property
    def first(self) -> bool:
        """Whether this process begins the job and ends it."""
        return self.link is None or self.link.process == 0

    def exchange(self, value: Any) -> list[Any]:
        """As `Link.exchange`."""
        return [value] if self.link is None else self.link.exchange(value)

    def finished(self, value: Any, tick: Callable[[], None]) -> tuple[list[Any], dict[int, str]]:
        """Waits in process 0 until all processes are done; see `Link.collect`.

        Raises:
            Elsewhere: in the other processes.
        """
        if self.link is None:
            return [value], {}
        if not self.first:
            self.link.give(value)
            raise Elsewhere
        return self.link.collect(value, tick)

    def require_first(self) -> None:
        """Checks that process 0 is still there, without which nothing is joined.

        Raises:
            JaxidError: if it stopped.
        """
        if self.link is not None and not self.first and (reason := self.link.stopped(0)) is not None:
            raise JaxidError(f"process 0 stopped: {reason}")

    def share(self, things: Sequence[Any], worker: int | None = None) -> list[Any]:
        """An even part of things that all workers divide, contiguous: this worker's, or another's."""
        index = self.worker if worker is None else worker
        return list(things[len(things) * index // self.workers : len(things) * (index + 1) // self.workers])


ALONE = Team()
"""A single process."""


def team(axes: meshes.Axes = meshes.ONE) -> Team:
    """The workers of a mesh over the devices of all processes.

    Args:
        axes: of the mesh; with a single device, every process is a worker on its first one.

    Raises:
        InputError: if the mesh cannot be divided among the processes.
    """
    if _link is None:
        return ALONE
    span = 1 if axes == meshes.ONE else meshes.local(axes.data, axes.model, _link.processes)[1]
    worker, place = divmod(_link.process, span)
    _link.bound = frozenset(range(worker * span, (worker + 1) * span)) - {_link.process}
    return Team(worker, _link.processes // span, place == 0, span > 1, _link)


def worker_devices(axes: meshes.Axes) -> tuple[meshes.Axes, list[Any]]:
    """The axes of the mesh of this process's worker, and its devices in order.

    Args:
        axes: of the mesh over the devices of all processes.

    Raises:
        InputError: if the mesh cannot be divided among the processes, or one of them has too few devices.
    """
    import jax

    if _link is None or axes == meshes.ONE:
        return axes, list(jax.local_devices())[: axes.data * axes.model]
    copies, span = meshes.local(axes.data, axes.model, _link.processes)
    each, first = axes.data * axes.model // _link.processes, _link.process // span * span
    found = []
    for process in range(first, first + span):
        own = [device for device in jax.devices() if device.process_index == process]
        if len(own) < each:
            raise InputError(
                f"the mesh {axes} takes {each} devices of each of the {_link.processes} processes, but process "
                f"{process} has {len(own)}; choose smaller axes."
            )
        found.extend(own[:each])
    return meshes.Axes(copies, axes.model), found
