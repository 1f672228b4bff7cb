"""One layer's array of a stack, for kernels that read it where it lies."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int


class LayerSlice(NamedTuple):
    """One layer's array of a stack.

    Attributes:
        stack: the arrays of all layers.
        index: the layer.
        value: its array, or the part of it that counts, sliced out of the stack. Programs that read the stack never
            use, and so never make the slice.
    """

    stack: Float[Array, "L *rest"]
    index: Int[Array, ""] | int
    value: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Type of its numbers."""
        return self.value.dtype
