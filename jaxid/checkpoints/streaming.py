"""Parameters from views of tensors to the memory of their devices, piece by piece."""

import math
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Shaped

from jaxid.checkpoints.identity import Seen, look

Box = tuple[tuple[int, int], ...]
"""A box of an array: the start and stop index along each axis."""

_PIECE_BYTES = 1 << 23
"""What one thread reads at a time: small beside any model, large beside the cost of a call."""

_TILE = 256
"""Rows and columns that are transposed at a time: 128 KB of bfloat16 stay in a core's own cache."""

_PADDING = 8
"""Numbers between the rows of a tile: rows a power of two apart would compete for the same lines of that cache."""

_LARGE = 1 << 24
"""Bytes from which an array gets memory pages of its own."""

_ALIGNMENT = 64
"""Bytes; on a CPU, JAX takes host memory that begins at such an address over instead of copying it."""

_HELD_BYTES = 1 << 30
"""What a host holds of a parameter on its way to accelerators, unless one device's part of it is larger: parts that are
filled together are read from the file once, also where every piece of a tensor has something of each."""


class Row(NamedTuple):
    """A tensor, or the part of one, that makes up a parameter or one row of it.

    Attributes:
        index: the row of a stacked parameter that it fills; None if it is all of it.
        array: the tensor in the axes of the parameter, a view of the file where possible.
        release: lets go of the memory in which a part of the view was read.
        seen: what is known of its pieces, without index, digest, and checks.
    """

    index: int | None
    array: Shaped[np.ndarray, "..."]
    release: Callable[[Shaped[np.ndarray, "..."]], None]
    seen: Seen


class _Part(NamedTuple):
    """A part of a parameter, in host memory.

    Attributes:
        box: which part.
        host: its numbers.
    """

    box: Box
    host: Shaped[np.ndarray, "..."]


def placed(
    shape: tuple[int, ...],
    dtype: DTypeLike,
    rows: Sequence[Row],
    sharding: NamedSharding | None,
    pool: ThreadPoolExecutor,
) -> tuple[Any, list[Seen]]:
    """Reads a parameter and places it on its devices; only what this process's devices hold is read for it.

    A part that several of them hold is read once. Processes that share a parameter divide its pieces for their digests:
    one that holds all of a piece comes before one that has to read more for it.

    Args:
        shape: of the parameter.
        dtype: of the parameter.
        rows: what it is made of.
        sharding: where it goes; None for the default device.
        pool: threads that read.

    Returns:
        The array, and what was found out about every piece. Where it is another process's to find out, the digest is
        empty.
    """
    if sharding is None:
        host = empty(shape, dtype)
        seen = _fill([_Part(_all(shape), host)], rows, _everything, pool)
        return jax.device_put(host), seen
    arrays: list[jax.Array] = []
    found: list[Seen] = []
    devices = _holders(sharding, shape, jax.process_index())
    for group in _groups(devices, np.dtype(dtype).itemsize):
        jax.block_until_ready(arrays)  # so that the host has room for the next ones
        parts = [_Part(box, empty(tuple(stop - first for first, stop in box), dtype)) for box in group]
        own = _nothing if found else _share(sharding, shape)
        seen = _fill(parts, rows, own, pool)
        found = [_both(*pair) for pair in zip(found, seen, strict=True)] if found else seen
        arrays += [jax.device_put(part.host, device) for part in parts for device in devices[part.box]]
        del parts
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays), found


def agreed(seen: Sequence[Seen], devices: Collection[Any]) -> list[Seen]:
    """What processes found out about each piece together; all of them call this at the same time.

    Args:
        seen: what this one found out; each has the same pieces in the same order.
        devices: those that they load a model onto.
    """
    firsts = {device.process_index: device for device in sorted(devices, key=lambda device: -device.id)}
    if len(firsts) == 1:
        return list(seen)
    table = np.zeros((1, len(seen), 34), np.uint8)
    for line, piece in zip(table[0], seen, strict=True):
        digest = bytes.fromhex(piece.digest)
        line[: len(digest)] = np.frombuffer(digest, np.uint8)
        line[32:] = not piece.finite, not piece.fits
    group = Mesh(np.array([firsts[index] for index in sorted(firsts)]), ("processes",))
    own = jax.device_put(table, firsts[jax.process_index()])
    apart, together = (NamedSharding(group, PartitionSpec(*names)) for names in (("processes",), ()))
    tables = jax.make_array_from_single_device_arrays((len(firsts), *table.shape[1:]), apart, [own])
    # A digest is known to one process, and zeros to the others.
    found = np.asarray(jax.jit(partial(jnp.max, axis=0), out_shardings=together)(tables))
    return [
        piece._replace(digest=line[:32].tobytes().hex(), finite=not line[32], fits=not line[33])
        for piece, line in zip(seen, found, strict=True)
    ]


def _both(one: Seen, other: Seen) -> Seen:
    """What was found out about a piece in two readings, of which the first made the digest."""
    return one._replace(finite=one.finite and other.finite, fits=one.fits and other.fits)


def _all(shape: tuple[int, ...]) -> Box:
    return tuple((0, length) for length in shape)


def _holders(sharding: NamedSharding, shape: tuple[int, ...], process: int) -> dict[Box, list[Any]]:
    """The devices of a process by the part of an array that they hold."""
    found: dict[Box, list[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        if device.process_index == process:
            bounds = (one.indices(length) for one, length in zip(index, shape, strict=True))
            found.setdefault(tuple((first, stop) for first, stop, _ in bounds), []).append(device)
    return found


def _groups(devices: Mapping[Box, Sequence[Any]], itemsize: int) -> Iterator[list[Box]]:
    """Parts that are filled together: all whose memory is the devices' own, else few enough for the host."""
    group: list[Box] = []
    held = 0
    for box, holders in devices.items():
        size = _size(box) * itemsize
        if group and not _own_memory(holders[0]) and held + size > _HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(box)
        held += size
    yield group


def _own_memory(device: Any) -> bool:
    """Whether a device takes the host's memory over."""
    return device.platform == "cpu"


def _size(box: Box | None) -> int:
    return 0 if box is None else math.prod(stop - first for first, stop in box)


def _everything(index: int | None, piece: Box, turn: int) -> bool:
    """Takes every piece's digest."""
    del index, piece, turn
    return True


def _nothing(index: int | None, piece: Box, turn: int) -> bool:
    """Takes no digest."""
    del index, piece, turn
    return False


def _share(sharding: NamedSharding, shape: tuple[int, ...]) -> Callable[[int | None, Box, int], bool]:
    """Which digests are this process's to make; every process of the mesh divides them alike."""
    processes = sorted({device.process_index for device in sharding.device_set})
    if len(processes) == 1:
        return _everything
    held = {process: list(_holders(sharding, shape, process)) for process in processes}

    def mine(index: int | None, piece: Box, turn: int) -> bool:
        ordered = [processes[(turn + step) % len(processes)] for step in range(len(processes))]
        reads = {process: sum(_size(_common(piece, index, box)) for box in held[process]) for process in ordered}
        return max(ordered, key=lambda process: reads[process]) == jax.process_index()

    return mine


def _common(piece: Box, index: int | None, box: Box) -> Box | None:
    """What a row's piece and a part of the parameter have in common, in the axes of the row; None if nothing."""
    if index is not None:
        (first, stop), *rest = box
        if not first <= index < stop:
            return None
        box = tuple(rest)
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(piece, box, strict=True))
    return common if all(first < stop for first, stop in common) else None


def slices(box: Box, origin: Sequence[int] | None = None) -> tuple[Any, ...]:
    """An index that gives a view of a box, whose numbers are counted from an origin."""
    origin = [0] * len(box) if origin is None else origin
    return (*(slice(first - zero, stop - zero) for (first, stop), zero in zip(box, origin, strict=True)), ...)


def _fill(
    parts: Sequence[_Part],
    rows: Sequence[Row],
    own: Callable[[int | None, Box, int], bool],
    pool: ThreadPoolExecutor,
) -> list[Seen]:
    """Writes what parts of a parameter have of its tensors to them.

    Args:
        parts: the parts.
        rows: what the parameter is made of.
        own: whether a piece's digest is to be made here, by its row, place, and number.
        pool: threads that read.
    """

    def move(source: np.ndarray, piece: Box, row: Row, seen: Seen, digested: bool, targets: list[Any]) -> Seen:
        part = source[slices(piece)]
        if digested:
            digest, finite = look(part)
            seen = seen._replace(digest=digest, finite=finite)
        for target, common in targets:
            with np.errstate(over="ignore"):
                copy(target, source[slices(common)])
            fits = target.dtype != np.float16 or bool(np.isfinite(target).all())
            seen = seen._replace(fits=seen.fits and fits)
        row.release(part)
        return seen

    moves: list[Future[Seen] | Seen] = []
    for row in rows:
        for index, piece in enumerate(pieces(row.array)):
            targets = []
            for box, host in parts:
                common = _common(piece, row.index, box)
                if common is not None:
                    first = [start for start, _ in box]
                    target = host if row.index is None else host[row.index - first.pop(0), ...]
                    targets.append((target[slices(common, first)], common))
            seen, digested = row.seen._replace(index=index), own(row.index, piece, len(moves))
            if targets or digested:
                moves.append(pool.submit(move, row.array, piece, row, seen, digested, targets))
            else:
                moves.append(seen)
    return [one.result() if isinstance(one, Future) else one for one in moves]


def pieces(array: Shaped[np.ndarray, "..."]) -> Iterator[Box]:
    """Cuts a view of a tensor where its memory is contiguous, in pieces of about `_PIECE_BYTES`."""
    if array.nbytes <= _PIECE_BYTES:
        yield _all(array.shape)
        return
    axis = max(range(array.ndim), key=lambda axis: (array.shape[axis] > 1, array.strides[axis]))
    length = array.shape[axis]
    step = max(1, length * _PIECE_BYTES // array.nbytes)
    for first in range(0, length, step):
        yield (*_all(array.shape[:axis]), (first, min(first + step, length)), *_all(array.shape[axis + 1 :]))


def copy(target: Shaped[np.ndarray, "..."], source: Shaped[np.ndarray, "..."]) -> None:
    """Writes `source`, in any order of axes and number format, to `target`, whose last axis is contiguous."""
    target, source = target.squeeze(), source.squeeze()
    if target.dtype == source.dtype:  # NumPy moves bits faster than numbers of a format that is not its own
        bits = f"u{target.itemsize}"
        target, source = target.view(bits), source.view(bits)
    contiguous, last = int(np.argmin(source.strides)) if source.ndim else -1, source.ndim - 1
    if contiguous == last:
        target[...] = source
        return
    # A transposing copy leaves a cache line after one number: tiles go through a small array that caches hold.
    target, source = (np.moveaxis(array, (contiguous, last), (-2, -1)) for array in (target, source))
    held = np.empty((_TILE, _TILE + _PADDING), target.dtype)
    for outer in np.ndindex(target.shape[:-2]):
        for row in range(0, target.shape[-2], _TILE):
            for column in range(0, target.shape[-1], _TILE):
                tile = (*outer, slice(row, row + _TILE), slice(column, column + _TILE))
                numbers = source[tile].T
                transposed = held[: numbers.shape[0], : numbers.shape[1]]
                transposed[...] = numbers
                target[tile] = transposed.T


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Shaped[np.ndarray, "..."]:
    """An uninitialised array, in memory that JAX can take over."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # In large pages: handing out 4 KB at a time takes the kernel longer than all copies.
        pages = mmap.mmap(-1, size)
        pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, dtype).reshape(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)
