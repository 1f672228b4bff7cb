"""Temporal IDs: the part of an object word's activation that says when in a video the object comes, and their files.

Frames are numbered as in the published clips: of eight evenly spread frames 0..7, objects come at 1 to 7. Source: [ID]
arXiv 2601.12626, section on temporal IDs.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid.errors import InputError
from jaxid.ids import files as id_files
from jaxid.kernels import probing
from jaxid.nn.sites import as_integers

FRAMES = tuple(range(1, 8))
"""Frames at which objects come in the published clips."""

_FORMAT = "jaxid.ids.temporal"
_AXES = {
    "values": ["layer", "object", "frame", "width"],
    "counts": ["object", "frame"],
    "embeddings": ["object", "frame", "width"],
}

_accumulate = jax.jit(probing.accumulate, donate_argnums=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class TemporalIDs:
    """Temporal IDs of one model, by layer, object and frame.

    `ids[k, f]` is the universal ID (the mean over objects) of layer k for things that come at frame f.
    Traced layers and frames that do not exist give NaN.

    Raises:
        InputError: The arrays and names do not fit each other.
    """

    values: Float[np.ndarray, "L O F D"]  # float32; zero where counts is zero
    counts: Int[np.ndarray, "O F"]  # words read behind each ID; zero: there is none
    objects: tuple[str, ...]
    frames: tuple[int, ...]  # ascending
    layer_names: tuple[str, ...]
    embeddings: Float[np.ndarray, "O F D"] | None = None  # the same before the first block
    model: str = ""  # name of the model
    fingerprint: str = ""  # of the model's parameters

    def __post_init__(self) -> None:
        id_files.check(self.values, self.counts, self.embeddings)
        if self.values.ndim != 4:
            raise InputError(f"values must be [layer, object, frame, width], not {list(self.values.shape)}.")
        layers, objects, frames = self.values.shape[:3]
        for name, entries, length in (
            ("objects", self.objects, objects),
            ("frames", self.frames, frames),
            ("layer_names", self.layer_names, layers),
        ):
            if not length or len(entries) != length or len(set(entries)) != length:
                raise InputError(f"{name} must name {length} different entries, not {list(entries)}.")
        if not all(isinstance(frame, int | np.integer) for frame in self.frames):
            raise InputError(f"frames must be integers, not {list(self.frames)}.")
        if frames < 2 or list(self.frames) != sorted(self.frames):
            raise InputError(f"temporal IDs need two or more ascending frames, not {list(self.frames)}.")
        if self.counts.shape != self.values.shape[1:3]:
            raise InputError(f"counts is {list(self.counts.shape)}; values asks for {list(self.values.shape[1:3])}.")
        if self.embeddings is not None and self.embeddings.shape != self.values.shape[1:]:
            raise InputError(
                f"embeddings is {list(self.embeddings.shape)}; values asks for {list(self.values.shape[1:])}."
            )

    @cached_property
    def universal(self) -> Float[Array, "L F D"]:
        """Universal IDs: the mean over the objects that have data, weighted equally.

        Raises:
            InputError: No object has data at some frame.
        """
        present = self.counts > 0
        missing = np.array(self.frames)[~np.asarray(present.any(axis=0))].tolist()
        if missing:
            raise InputError(f"There is no ID at frames {missing}: extract from clips of every frame.")
        mean = np.einsum("lofd,of->lfd", np.asarray(self.values, np.float32), present.astype(np.float32))
        mean /= present.sum(axis=0, dtype=np.float32)[:, None]
        # The property keeps the array: one made inside a traced function would leak its tracer.
        with jax.ensure_compile_time_eval():
            return jnp.asarray(mean)

    def __getitem__(self, key: Any) -> Float[Array, "..."]:
        if not isinstance(key, tuple) or len(key) != 2:
            raise InputError("Index temporal IDs by layer and frame: ids[k, f].")
        layer = id_files.entries("layer", key[0], len(self.layer_names))
        frame, frames = as_integers("frame", key[1]), np.array(self.frames)
        if isinstance(frame, Tracer):
            place = jnp.searchsorted(frames, frame)
            place = jnp.where(jnp.isin(frame, frames), place, len(frames))
        elif np.isin(frame, frames).all():
            place = np.searchsorted(frames, frame)
        else:
            raise InputError(f"There are no IDs of frame {key[1]}; the frames are {list(self.frames)}.")
        return id_files.take(self.universal, layer, place)

    def line(self) -> "Line":
        """The direction along which each layer's universal IDs vary most, from early to late."""
        return early_to_late(np.asarray(self.universal), np.asarray(self.frames))

    def save(self, path: str | Path) -> None:
        """Writes the IDs as a safetensors file whose metadata names every axis; `load` reads it.

        Raises:
            OutputError: The file cannot be written. A file that was there is then unharmed.
        """
        tensors = {"values": self.values, "counts": self.counts}
        if self.embeddings is not None:
            tensors["embeddings"] = self.embeddings
        metadata = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "objects": json.dumps(self.objects),
            "frames": json.dumps([int(frame) for frame in self.frames]),
            "layer_names": json.dumps(self.layer_names),
        }
        id_files.write(path, _FORMAT, "Temporal IDs", _AXES, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "TemporalIDs":
        """Reads a file written by `save`.

        Raises:
            CheckpointError: The file is missing, damaged, or not a file of temporal IDs of this version.
        """
        tensors, metadata = id_files.read(path, _FORMAT, "temporal IDs", _AXES)
        with id_files.loading(path, "temporal IDs"):
            return cls(
                values=tensors["values"],
                counts=tensors["counts"],
                embeddings=tensors.get("embeddings"),
                objects=tuple(json.loads(metadata["objects"])),
                frames=tuple(json.loads(metadata["frames"])),
                layer_names=tuple(json.loads(metadata["layer_names"])),
                model=metadata["model"],
                fingerprint=metadata["fingerprint"],
            )


class Line(NamedTuple):
    """A direction in every layer, and where things lie along it.

    Attributes:
        origin: what has coordinate 0 before scaling, Float[L, D].
        direction: unit vectors, Float[L, D].
        low: of the IDs' coordinates, Float[L]; they are scaled to 0..1.
        high: likewise.
        share: of the IDs' variance along it, Float[L].
        order: Spearman's rank correlation of coordinate and frame, Float[L].
    """

    origin: Float[np.ndarray, "L D"]
    direction: Float[np.ndarray, "L D"]
    low: Float[np.ndarray, "L"]
    high: Float[np.ndarray, "L"]
    share: Float[np.ndarray, "L"]
    order: Float[np.ndarray, "L"]

    def coordinates(self, values: Float[np.ndarray, "L N D"], *, centred: bool = False) -> Float[np.ndarray, "L N"]:
        """Where vectors lie: 0 as the earliest ID, 1 as the latest.

        Args:
            values: the vectors.
            centred: they have no mean to take away; else that of the IDs is.
        """
        away = values if centred else values - self.origin[:, None]
        return (np.einsum("lnd,ld->ln", away, self.direction) - self.low[:, None]) / (self.high - self.low)[:, None]


def early_to_late(universal: Float[np.ndarray, "L F D"], frames: Int[np.ndarray, "F"]) -> Line:
    """The first principal component of every layer's IDs, turned so that later frames lie further."""
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
    """Spearman's; 0 where all values are equal."""
    from scipy import stats

    if np.ptp(values) == 0:
        return 0.0
    result: Any = stats.spearmanr(values, frames)
    return float(result.statistic)


class TemporalBatch(NamedTuple):
    """One batch of activations for `accumulate_temporal_ids`, a row a word. A row with pair -1 is padding.

    Attributes:
        activations: At the word's last sub-token; index 0 the embeddings, k + 1 the output of block k.
        object_index: Which object the word names.
        pair_index: Which object with which partner, in which role; an object of its own for each.
        frame: Index in `frames` of when the object comes.
        other: Index in `frames` of when its partner comes.
    """

    activations: Float[Array, "B L+1 D"] | Float[np.ndarray, "B L+1 D"]
    object_index: Int[np.ndarray, "B"]
    pair_index: Int[np.ndarray, "B"]
    frame: Int[np.ndarray, "B"]
    other: Int[np.ndarray, "B"]


def accumulate_temporal_ids(
    batches: Iterable[TemporalBatch],
    *,
    pairs: int,
    objects: Sequence[str],
    frames: Sequence[int] = FRAMES,
    compat: str = "none",
    model: str = "",
    fingerprint: str = "",
) -> TemporalIDs:
    """Temporal IDs from a stream of activations.

    For an object beside a partner that comes at one frame, its ID is its activation less the mean over its own frames;
    IDs are averaged over the partner's frames, then over all partners and roles. Memory does not grow with the clips.

    Args:
        batches: in any order; equal lengths (padded) compile once.
        pairs: number of different `pair_index`.
        objects: names of the objects.
        frames: at which objects come.
        compat: "reference" reproduces the published code: nothing is averaged, the last clip of an object and frame
            counts alone, and no mean is taken away.
        model: name of the model, kept in the container.
        fingerprint: of its parameters, kept in the container.

    Raises:
        InputError: for an index out of range, activations that are not finite, or no batch at all.
    """
    count = len(frames)
    crossings = np.zeros((pairs, count, count), np.int32)
    object_of_pair = np.full(pairs, -1)
    own_sums = other_sums = None
    last: dict[tuple[int, int], np.ndarray] = {}
    for number, batch in enumerate(batches):
        used = _checked(batch, number, pairs, len(objects), count)
        activations = jnp.asarray(batch.activations)
        if own_sums is None or other_sums is None:
            own_sums = probing.empty_sums(pairs, count, *activations.shape[1:])
            other_sums = probing.empty_sums(pairs, count, *activations.shape[1:])
        pair, own, other = (np.asarray(part).astype(np.int32) for part in (batch.pair_index, batch.frame, batch.other))
        np.add.at(crossings, (pair[used], other[used], own[used]), 1)
        object_of_pair[pair[used]] = np.asarray(batch.object_index)[used]
        own_sums = _accumulate(own_sums, activations, jnp.asarray(pair), jnp.asarray(own))
        other_sums = _accumulate(other_sums, activations, jnp.asarray(pair), jnp.asarray(other))
        if compat == "reference":
            for row in np.flatnonzero(used):
                key = int(batch.object_index[row]), int(own[row])
                last[key] = np.asarray(activations[row], np.float32)
    if own_sums is None or other_sums is None or not crossings.any():
        raise InputError("There are no activations to find IDs in: the batches hold no clip.")

    layers, width = own_sums.sums.shape[2:]
    values = np.zeros((layers, len(objects), count, width), np.float32)
    counts = np.zeros((len(objects), count), np.int32)
    if compat == "reference":
        for (row, frame), activation in last.items():
            values[:, row, frame], counts[row, frame] = activation, 1
    else:
        for row in np.unique(object_of_pair[object_of_pair >= 0]):
            chosen = np.flatnonzero(object_of_pair == row)
            ids, clips = probing.placed_ids(
                probing.CellSums(own_sums.sums[chosen], own_sums.counts[chosen]),
                probing.CellSums(other_sums.sums[chosen], other_sums.counts[chosen]),
                jnp.asarray(crossings[chosen]),
            )
            mean, clips = (np.asarray(array) for array in probing.average(ids, clips, axis=0))
            values[:, row], counts[row] = mean.swapaxes(0, 1), clips
    if not np.isfinite(values).all():
        raise InputError("Activations at the objects' words are not finite.")
    return TemporalIDs(
        values=values[1:],
        counts=counts,
        embeddings=values[0],
        objects=tuple(objects),
        frames=tuple(frames),
        layer_names=tuple(f"blocks.{k}.resid_post" for k in range(layers - 1)),
        model=model,
        fingerprint=fingerprint,
    )


def _checked(batch: TemporalBatch, number: int, pairs: int, objects: int, frames: int) -> np.ndarray:
    """Which rows are no padding; all indices in range."""
    used = np.asarray(batch.pair_index) != -1
    limits = {"object_index": objects, "pair_index": pairs, "frame": frames, "other": frames}
    for name, limit in limits.items():
        index = as_integers(name, getattr(batch, name))
        if index.shape != batch.activations.shape[:1]:
            raise InputError(f"Batch {number}: {name} is {list(index.shape)}, not one of every row.")
        if ((index < 0) | (index >= limit))[used].any():
            raise InputError(f"Batch {number}: {name} must be from 0 to {limit - 1} (pair -1 is padding).")
    return used
