"""Batches that are halved when the device runs out of memory, for the rest of a run.

`Halving` says how many things go together. `Halving.slices` computes many things in batches of that size; `Batches`
does the same for the chunks of a job, which are read ahead in threads while others are computed.
"""

import dataclasses
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from jaxid.errors import JaxidWarning, OutOfMemoryError

Item = TypeVar("Item")
Made = TypeVar("Made")


class Exhausted(Exception):
    """The device ran out of memory for a batch of some size. Unlike JAX's own error, it holds on to no arrays."""

    def __init__(self, size: int, reason: str):
        """Keeps the size and the first line of JAX's message."""
        super().__init__(reason)
        self.size = size


class Halving:
    """How many things are computed together, which is halved whenever the device runs out of memory."""

    def __init__(self, together: int, *, unit: str = "item", per_item: int = 1, advice: str = ""):
        """Begins with a number of things together.

        Args:
            together: the number, at least 1.
            unit: what messages call one of them.
            per_item: how many of them belong to one item.
            advice: what to do if not even one fits, in half a sentence.
        """
        self.together, self.unit, self.per_item, self.advice = together, unit, per_item, advice
        self._first: int | None = None

    @property
    def size(self) -> int:
        """Number of items that go together."""
        return max(1, self.together // self.per_item)

    def halve(self, reason: str) -> None:
        """Halves the number.

        Raises:
            OutOfMemoryError: if it is 1.
        """
        if self.together == 1:
            advice = f"; {self.advice}" if self.advice else ""
            raise OutOfMemoryError(f"the device's memory does not suffice for one {self.unit}{advice}: {reason}.")
        self._first = self._first or self.together
        self.together //= 2

    def settle(self) -> None:
        """Says once that the number was halved, when it has been shown to fit."""
        if self._first is None:
            return
        warnings.warn(
            f"the device's memory did not suffice for {self._first} {self.unit}s together; from here on it computes "
            f"{self.together} together, and nothing is lost.",
            JaxidWarning,
            stacklevel=2,
        )
        self._first = None

    def guarded(self, compute: Callable[[], Made], together: int | None = None) -> Made:
        """The result of a computation for a number of things together, by default the present one.

        Raises:
            Exhausted: if the device runs out of memory. What the computation held is freed.
        """
        together = self.together if together is None else together
        try:
            return compute()
        except Exception as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            reason = str(error).splitlines()[0].rstrip(".")
        raise Exhausted(together, reason)  # outside of the handler: the error, and the arrays of its frames, are gone

    def tried(self, compute: Callable[[], Made]) -> Made:
        """The result of a computation that begins anew with half as many things whenever the memory does not suffice.

        Raises:
            OutOfMemoryError: if it does not even for one.
        """
        while True:
            try:
                found = self.guarded(compute)
            except Exhausted as shortage:
                self.halve(str(shortage))
            else:
                self.settle()
                return found

    def slices(self, count: int, compute: Callable[[slice], Made]) -> Iterator[tuple[slice, Made]]:
        """The results of things 0 to `count` - 1, batch by batch, each with its slice.

        Raises:
            OutOfMemoryError: if the memory does not suffice for one.
        """
        start = 0
        while start < count:

            def some(start: int = start) -> tuple[slice, Made]:
                rows = slice(start, min(start + self.size, count))
                return rows, compute(rows)

            rows, found = self.tried(some)
            start = rows.stop
            yield rows, found


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is JAX's when a device's memory does not suffice."""
    jax = sys.modules.get("jax")  # where nobody has imported it, the error is not JAX's
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@dataclasses.dataclass(frozen=True)
class Opened(Generic[Item]):
    """Items that were read, in batches.

    Attributes:
        items: the items.
        together: `Halving.together` when they were read.
        batches: what was read, a batch each.
    """

    items: list[Item]
    together: int
    batches: list[Any]


class Batches(Generic[Item, Made]):
    """The steps of a job whose batches are halved."""

    def __init__(
        self,
        halving: Halving,
        read: Callable[[list[Item]], Any],
        compute: Callable[[Any], Made | Callable[[], Made]],
        join: Callable[[list[Made]], Made],
    ):
        """Wraps three steps.

        Args:
            halving: the batch size.
            read: opens a batch of items. It may depend on the size.
            compute: gives the results of what was read, or a function that fetches them.
            join: makes one result of those of several batches.
        """
        self.halving, self._read, self._compute, self._join = halving, read, compute, join

    def read(self, items: Sequence[Item]) -> Opened[Item]:
        """Opens items, in any thread."""
        # First of all: what is read while the number changes is out of date.
        together, size = self.halving.together, self.halving.size
        batches = [self._read(list(items[start : start + size])) for start in range(0, len(items), size)]
        return Opened(list(items), together, batches)

    def compute(self, opened: Opened[Item]) -> Callable[[], Made]:
        """Begins the computation of what was read, and gives the function that fetches the results.

        What was read before the size was halved is read again.

        Raises:
            Exhausted: if the device runs out of memory, here or in the function.
        """
        halving = self.halving
        if opened.together != halving.together:
            opened = self.read(opened.items)
        together, batches = opened.together, opened.batches
        found = halving.guarded(lambda: [self._compute(batch) for batch in batches])

        def fetched() -> Made:
            parts: list[Any] = [part() if callable(part) else part for part in found]
            return self._join(parts)

        return lambda: halving.guarded(fetched, together)

    def again(self, items: Sequence[Item], shortage: Exhausted) -> Made:
        """The results of items for which the memory did not suffice."""
        if shortage.size == self.halving.together:
            self.halving.halve(str(shortage))
        return self.at_once(items)

    def at_once(self, items: Sequence[Item]) -> Made:
        """The results of items, read and computed here and now, with smaller batches if need be.

        Raises:
            OutOfMemoryError: if the memory does not suffice for one.
        """
        return self.halving.tried(lambda: self.compute(self.read(items))())
