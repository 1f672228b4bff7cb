"""Temporal IDs: when in a video an object appears, and the line from early to late ([ID] arXiv 2601.12626).

A temporal ID is the part of an object word's activation that says when in a video the object appears. Frames are
counted as in the published clips: of eight evenly spaced frames 0..7, objects appear at 1 to 7.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid.errors import InputError
from jaxid.ids.accumulate import IDBatch, accumulate, layer_names
from jaxid.ids.container import IDs, mean_over_objects
from jaxid.nn.sites import AnyArray, as_integers
from jaxid.reprs import brief

FRAMES = tuple(range(1, 8))
"""Frames at which objects appear in the published clips."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TemporalIDs(IDs):
    """Temporal IDs of one model, by layer, object and frame.

    `ids[k, f]` is the universal ID (the mean over objects) of layer k for objects that appear at frame f; traced frames
    that do not exist give NaN.

    Raises:
        InputError: The arrays and names do not fit each other.
    """

    KIND: ClassVar = "temporal IDs"
    FORMAT: ClassVar = "jaxid.ids.temporal"
    AXES: ClassVar = ("layer", "object", "frame", "width")
    INDEXED: ClassVar = ("layer", "frame")
    NAMES: ClassVar[Mapping[str, str]] = {"object": "objects", "frame": "frames", "layer": "layer_names"}

    values: Float[np.ndarray, "L O F D"]
    counts: Int[np.ndarray, "O F"]
    frames: tuple[int, ...]  # ascending
    embeddings: Float[np.ndarray, "O F D"] | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(frame, int | np.integer) for frame in self.frames):
            raise InputError(f"frames must be integers, not {list(self.frames)}.")
        if len(self.frames) < 2 or list(self.frames) != sorted(self.frames):
            raise InputError(f"temporal IDs need two or more ascending frames, not {list(self.frames)}.")

    @cached_property
    def universal(self) -> Float[Array, "L F D"]:
        """Universal IDs: the mean over the objects that have data, weighted equally.

        Raises:
            InputError: No object has data at some frame.
        """
        missing = np.array(self.frames)[(self.counts == 0).all(axis=0)].tolist()
        if missing:
            raise InputError(f"There is no ID at frames {missing}: extract from clips of every frame.")
        return mean_over_objects(self.values, self.counts)

    def entry(self, axis: str, index: object) -> Int[AnyArray, "..."]:
        """As `IDs.entry`, but frames are selected by the names in `frames`.

        Raises:
            InputError: also for a frame that has no IDs.
        """
        if axis != "frame":
            return super().entry(axis, index)
        frame, frames = as_integers("frame", index), np.array(self.frames)
        if isinstance(frame, Tracer):
            return jnp.where(jnp.isin(frame, frames), jnp.searchsorted(frames, frame), len(frames))
        if not np.isin(frame, frames).all():
            raise InputError(f"There are no IDs of frame {index}; the frames are {list(self.frames)}.")
        return np.searchsorted(frames, frame)

    def line(self) -> "Line":
        """The direction along which each layer's universal IDs vary most, from early to late."""
        return early_to_late(np.asarray(self.universal), np.asarray(self.frames))


class Line(NamedTuple):
    """A direction in every layer, and coordinates along it.

    Attributes:
        origin: mean of the IDs, whose coordinate is 0 before scaling, Float[L, D].
        direction: unit vectors, Float[L, D].
        low: the lowest coordinate of the IDs, which is scaled to 0, Float[L].
        high: the highest one, which is scaled to 1, Float[L].
        share: share of the IDs' variance along the direction, Float[L].
        order: Spearman's rank correlation of coordinate and frame, Float[L].
    """

    origin: Float[np.ndarray, "L D"]
    direction: Float[np.ndarray, "L D"]
    low: Float[np.ndarray, "L"]
    high: Float[np.ndarray, "L"]
    share: Float[np.ndarray, "L"]
    order: Float[np.ndarray, "L"]

    def coordinates(self, values: Float[np.ndarray, "L N D"], *, centred: bool = False) -> Float[np.ndarray, "L N"]:
        """Coordinates of vectors: 0 for the lowest coordinate of the IDs, 1 for the highest.

        Args:
            values: the vectors.
            centred: the vectors are centred already; otherwise the IDs' mean is subtracted.
        """
        away = values if centred else values - self.origin[:, None]
        return (np.einsum("lnd,ld->ln", away, self.direction) - self.low[:, None]) / (self.high - self.low)[:, None]


def early_to_late(universal: Float[np.ndarray, "L F D"], frames: Int[np.ndarray, "F"]) -> Line:
    """The first principal component of every layer's IDs, with the sign that puts later frames further along."""
    origin = universal.mean(axis=1)
    centred = (universal - origin[:, None]).astype(np.float64)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    along = np.einsum("lfd,ld->lf", centred, directions[:, 0])
    sign = np.where(along @ (frames - frames.mean()) < 0, -1.0, 1.0)
    along, direction = along * sign[:, None], directions[:, 0] * sign[:, None]
    order = np.array([rank_correlation(row, frames) for row in along])
    variance = (sizes**2).sum(axis=1)
    return Line(
        origin=origin,
        direction=direction.astype(np.float32),
        low=along.min(axis=1).astype(np.float32),
        high=np.maximum(along.max(axis=1), along.min(axis=1) + 1e-12).astype(np.float32),
        share=(sizes[:, 0] ** 2 / np.maximum(variance, 1e-30)).astype(np.float32),
        order=order.astype(np.float32),
    )


def rank_correlation(values: Float[np.ndarray, "F"], frames: Int[np.ndarray, "F"]) -> float:
    """Spearman's rank correlation; 0 if all values are equal."""
    from scipy import stats

    if np.ptp(values) == 0:
        return 0.0
    return float(np.asarray(stats.spearmanr(values, frames))[0])


def accumulate_temporal_ids(
    batches: Iterable[IDBatch],
    *,
    pairs: int,
    objects: Sequence[str],
    frames: Sequence[int] = FRAMES,
    model: str = "",
    fingerprint: str = "",
) -> TemporalIDs:
    """Temporal IDs from a stream of activations; see `accumulate`.

    Args:
        batches: batches in any order; places are indices into `frames`. Equal lengths (padded) compile once.
        pairs: number of different `pair_index`.
        objects: names of the objects.
        frames: frames at which objects appear.
        model: name of the model, stored in the container.
        fingerprint: fingerprint of its parameters, stored in the container.

    Raises:
        InputError: as `accumulate`.
    """
    values, counts = accumulate(batches, pairs=pairs, objects=objects, places=len(frames))
    return TemporalIDs(
        values=values[1:, :, 0],
        counts=counts[:, 0],
        embeddings=values[0, :, 0],
        objects=tuple(objects),
        frames=tuple(frames),
        layer_names=layer_names(len(values) - 1),
        model=model,
        fingerprint=fingerprint,
    )
