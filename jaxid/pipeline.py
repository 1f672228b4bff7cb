"""Host and device at work at the same time: batches are read ahead in threads, and fetched and stored behind.

While the device computes a batch, threads open, resize and tokenise the next ones (`read_ahead`), and another thread
fetches the results of the one before and stores them (`overlapped`). Pillow, NumPy and the tokenizers release the
interpreter's lock. Steps are named "read", "compute" and "fetch" in the traces of `jax.profiler`.
"""

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

Input = TypeVar("Input")
Ready = TypeVar("Ready")
Begun = TypeVar("Begun")
Result = TypeVar("Result")

AHEAD = 2
"""Batches that are read or waiting while another one is computed: the bound on pictures in memory."""


@contextlib.contextmanager
def read_ahead(
    read: Callable[[Input], Ready], inputs: Iterable[Input], *, ahead: int = AHEAD
) -> Iterator[Iterator[tuple[Input, "Future[Ready]"]]]:
    """Reads inputs in background threads, in order, and at most `ahead` more than were handed over.

    Args:
        read: opens an input, in one of `ahead` threads.
        inputs: what to read; drawn in the calling thread, see `drawn_ahead`.
        ahead: number of inputs that are read, or were read and wait.

    Yields:
        An iterator over the inputs and what was read. An exception of `read` is raised by `result()` of its own input,
        after the inputs before it were handed over. On exit, no further input is begun.
    """
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="jaxid-read")
    try:
        yield _in_order(pool, _named("read", read), iter(inputs), ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, read: Callable[[Input], Ready], remaining: Iterator[Input], ahead: int
) -> Iterator[tuple[Input, "Future[Ready]"]]:
    waiting: deque[tuple[Input, Future[Ready]]] = deque()
    failed: list[Exception] = []

    def more(count: int) -> None:
        try:
            waiting.extend((one, pool.submit(read, one)) for one in itertools.islice(remaining, count))
        except Exception as error:  # of the iterable; those that it gave before come first
            failed.append(error)

    more(ahead)
    while waiting:
        wait([waiting[0][1]])
        more(0 if failed else 1)
        yield waiting.popleft()  # under no name here, so that what is handed over can be freed
    if failed:
        raise failed[0]


def drawn_ahead(inputs: Iterable[Input], size: int) -> Generator[list[Input], None, None]:
    """Lists of `size` inputs, and one of the rest, each drawn in a thread while the one before is used.

    For iterables that open files.
    """
    remaining = iter(inputs)
    with read_ahead(lambda _: list(itertools.islice(remaining, size)), itertools.repeat(None), ahead=1) as lists:
        for _, future in lists:
            if not (drawn := future.result()):
                return
            yield drawn


@contextlib.contextmanager
def overlapped(
    inputs: Iterable[Input],
    read: Callable[[Input], Ready],
    compute: Callable[[Ready], Begun],
    fetch: Callable[[Input, Begun], Result],
    *,
    ahead: int = AHEAD,
) -> Iterator[Iterator[tuple[Input, "Future[Result]"]]]:
    """Reads inputs ahead, computes one after the other, and fetches each while the next is computed.

    A batch is dispatched before the one before it is fetched, so the device need not wait for the host; JAX gives back
    arrays before they are computed. `compute` should therefore return without waiting for its results, holding only
    what `fetch` needs.

    Args:
        inputs: what to compute.
        read: opens an input, in a background thread.
        compute: begins the computation, in the calling thread.
        fetch: copies the results to the host and stores them, in one background thread.
        ahead: as in `read_ahead`.

    Yields:
        An iterator over the inputs and their results, in order. An exception of any step is raised by `result()` of its
        own input; one of `read` or `compute` before a further input is computed, one of `fetch` before a further one is
        fetched. On exit, also by KeyboardInterrupt, a fetch that has begun is completed.
    """
    with (
        ThreadPoolExecutor(1, thread_name_prefix="jaxid-fetch") as fetcher,
        read_ahead(read, inputs, ahead=ahead) as ready,
        contextlib.closing(_computed(ready, _named("compute", compute), _named("fetch", fetch), fetcher)) as results,
    ):
        yield results


def _computed(
    ready: Iterator[tuple[Input, "Future[Ready]"]],
    compute: Callable[[Ready], Begun],
    fetch: Callable[[Input, Begun], Result],
    fetcher: ThreadPoolExecutor,
) -> Generator[tuple[Input, "Future[Result]"], None, None]:
    previous: tuple[Input, Future[Result]] | None = None
    exhausted: Exception = StopIteration()
    while True:
        begun, failed = None, None
        try:
            one, future = next(ready)
        except Exception as error:  # StopIteration, or of the iterable
            exhausted = error
            break
        try:
            begun = (compute(future.result()),)
        except Exception as error:
            failed = error
        del future
        if previous is not None:
            yield previous
        previous = None
        if begun is not None:
            previous = one, fetcher.submit(fetch, one, *begun)
        else:
            raised: Future[Result] = Future()
            raised.set_exception(failed)
            yield one, raised
    if previous is not None:
        yield previous
    if not isinstance(exhausted, StopIteration):
        raise exhausted


def _named(name: str, step: Callable[..., Result]) -> Callable[..., Result]:
    """The step under a name that traces of `jax.profiler` show."""

    def named(*arguments: object) -> Result:
        profiler = sys.modules.get("jax.profiler")  # while nobody has imported JAX, nobody can trace
        with contextlib.nullcontext() if profiler is None else profiler.TraceAnnotation(name):
            return step(*arguments)

    return named
