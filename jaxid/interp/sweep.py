"""Sweeps as rows that run together, in few lengths, so that few programs are compiled.

A program is compiled for a number of rows. Rows are therefore padded to the next bucket, and the number of rows that go
through a layer together depends on the bucket alone. A sweep over other layers, or with a few more or fewer rows, finds
its program compiled.
"""

import dataclasses
import math
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxid.devices import Device, this

Tree = TypeVar("Tree")

_CPU_TOKENS = 2048
"""The most tokens that go through a layer together on a CPU, whose caches hold no more."""

_ACTIVATIONS = 0.45
"""Time to read and write what passes between the products of a layer, as a share of the products' own time.

Counted in LLaVA-1.5-7B's rerun, compiled for an H100 when gate and up were products of their own: 214 GB and 59.8 TFLOP
for 768 rows of 192 tokens, each through one layer. Of these bytes, 104 GB are weights and 21 GB keys and values of the
prompts. The rest is 0.6 MB for the 0.4 GFLOP of a token and layer. With the kernel of both products,
`benchmarks/accelerator.py --targets h100 --models llava-7b --works rerun` finds 195 GB, which would be a share of 0.35;
other accelerators, which still make them apart, are assumed to have the larger one.
"""


def bucket(count: int) -> int:
    """The length to which `count` rows are padded: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    At most a third of the padded rows are padding.
    """
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def rows_together(rows: int, tokens: int, device: Device | None = None) -> int:
    """The number of a sweep's rows that go through a layer together: a bucket that divides them.

    Larger chunks read the weights less often. Smaller ones compute fewer idle rows: rows are sorted by the layer in
    which they start, and a chunk starts with its first row. Of a sweep of R rows of t tokens whose first layers are
    spread evenly over the L layers, chunks of c rows run (R / c + 1) / 2 * L times. Time is counted in tokens: reading
    a layer's weights takes as long as the products of n tokens (`Device.tokens_per_weight_read`). An accelerator reads
    while it multiplies, and beside the weights it reads and writes what passes between the products, which takes the
    share a of their time (`_ACTIVATIONS`). A chunk then takes max(n + a c t, c t), and the best has about n / (1 - a)
    tokens; fewer would wait for the memory. A CPU does one after the other, n + c t, which is best at the square root
    of R n / t. The size with the least time is taken, the larger of two that take as long.

    The choice affects speed only. Since chunks that hold nothing but padding are skipped and the others end within
    the bucket, fewer than half as many rows as are wanted are computed in vain.

    Args:
        rows: number of rows, the length of a bucket.
        tokens: tokens of one row, over all prompts.
        device: the one that runs them; by default the one that JAX uses.
    """
    device = device or this()
    on_cpu = device.platform == "cpu"
    reading = device.tokens_per_weight_read(4 if on_cpu else 2)  # in the dtypes that are usual there
    largest = max(1, min(rows, _CPU_TOKENS // tokens)) if on_cpu else rows
    sizes = [size for size in range(1, largest + 1) if bucket(size) == size and rows % size == 0]
    if on_cpu:  # the time grows with the distance from the best size, on a logarithmic scale
        best = math.sqrt(rows * reading / tokens)
        return min(sizes, key=lambda size: abs(math.log(size / best)))

    def time(size: int) -> float:
        return (rows / size + 1) * max(reading + _ACTIVATIONS * size * tokens, size * tokens)

    return min(reversed(sizes), key=time)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The sweep axes S of an intervention, flattened to one axis of R rows that is padded to a bucket.

    Attributes:
        shape: lengths of the sweep axes.
        parts: number of devices, or groups of them, that divide the rows.
    """

    shape: tuple[int, ...]
    parts: int = 1

    @property
    def count(self) -> int:
        """Number of rows without padding."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of rows with padding."""
        return self.parts * self.own

    @property
    def own(self) -> int:
        """Number of rows of each of the parts, with padding."""
        return bucket(-(-self.count // self.parts))

    def flat(self, tree: Tree) -> Tree:
        """Arrays [S..., ...] as [R, ...]; the padding repeats the first row."""
        found = jax.tree.map(lambda leaf: leaf.reshape(self.count, *leaf.shape[len(self.shape) :]), tree)
        return found if self.rows == self.count else _padded(found, rows=self.rows)

    def unflat(self, tree: Tree) -> Tree:
        """Arrays [R, ...] as [S..., ...]."""
        return jax.tree.map(lambda leaf: leaf[: self.count].reshape(*self.shape, *leaf.shape[1:]), tree)


@partial(jax.jit, static_argnames="rows")
def _padded(tree: Tree, *, rows: int) -> Tree:
    def pad(leaf: Array) -> Array:
        return jnp.concatenate([leaf, jnp.broadcast_to(leaf[:1], (rows - leaf.shape[0], *leaf.shape[1:]))])

    return jax.tree.map(pad, tree)
