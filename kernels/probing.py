"""Finding spatial IDs in activations and measuring their geometry ([ID] arXiv 2601.12626).

There are two steps. First, running sums of activations over (group, cell) become centred means: the IDs. Then the IDs
of a grid, `[..., X, Y, D]` with columns X to the right and rows Y down, are measured: axes, plane, shares of variance,
agreement between objects, and the ID of a place between cells. All functions accept leading axes (layers), and all
results are float32, whatever the dtype of the activations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_HIGHEST = jax.lax.Precision.HIGHEST


class CellSums(NamedTuple):
    """Running sums of activations over (group, cell).

    The sums of two sets of pictures add up: `jax.tree.map(jnp.add, one, other)`.

    Attributes:
        sums: the sums, in float32.
        counts: number of rows summed.
    """

    sums: Float[Array, "G C L D"]
    counts: Int[Array, "G C"]


def empty_sums(groups: int, cells: int, layers: int, width: int) -> CellSums:
    """Sums over no rows, for `accumulate` to start from."""
    return CellSums(jnp.zeros((groups, cells, layers, width), jnp.float32), jnp.zeros((groups, cells), jnp.int32))


def accumulate(
    state: CellSums, activations: Float[Array, "B L D"], group: Int[Array, "B"], cell: Int[Array, "B"]
) -> CellSums:
    """Adds a batch of activations to the running sums.

    Args:
        state: sums so far.
        activations: one row per image, of any float type; summed in float32.
        group: group of each row (an object, a pair, a frame: the caller's choice).
        cell: cell of each row. A row whose group or cell is outside the state is skipped (-1 for padding).

    Returns:
        The sums with the batch added.
    """
    groups, cells = state.counts.shape
    # A negative index would wrap around, so skipped rows get an index past the end, which is dropped.
    inside = (group >= 0) & (cell >= 0)
    group = jnp.where(inside, group, groups)
    cell = jnp.where(inside, cell, cells)
    return CellSums(
        state.sums.at[group, cell].add(activations.astype(jnp.float32), mode="drop"),
        state.counts.at[group, cell].add(1, mode="drop"),
    )


def finish(state: CellSums) -> tuple[Float[Array, "G C L D"], Int[Array, "G C"]]:
    """Means and counts of the running sums; the mean of no rows is zero."""
    return _divide(state.sums, state.counts[..., None, None]), state.counts


def average(
    means: Float[Array, "G C *rest"], counts: Int[Array, "G C"], axis: int
) -> tuple[Float[Array, "N *rest"], Int[Array, "N"]]:
    """Mean over groups or over cells, in which all present entries weigh equally.

    Args:
        means: entries by group and cell.
        counts: number of rows that each entry averages; an entry with none is missing, and ignored.
        axis: 0 averages over groups, 1 over cells.

    Returns:
        The means over that axis (zero where nothing is present), and the number of rows that each averages.
    """
    present = _spread(counts > 0, means)
    total = jnp.where(present, means.astype(jnp.float32), 0.0).sum(axis=axis)
    return _divide(total, present.sum(axis=axis)), counts.sum(axis=axis)


def center(means: Float[Array, "G C *rest"], counts: Int[Array, "G C"], axis: int) -> Float[Array, "G C *rest"]:
    """Subtracts from each present entry the mean of the present entries along an axis.

    If a group is an image folder (a pair and a place of A) and the cells are the places and sizes of B, `axis=1` gives
    the IDs of B at that place of A ([ID] arXiv 2601.12626, extraction of spatial IDs). `placed_ids` computes their
    mean over A's places, for data too large to hold by folder.

    Args:
        means: entries by group and cell.
        counts: number of rows that each entry averages; an entry with none is missing, and becomes zero.
        axis: 0 centres over groups, 1 over cells.

    Returns:
        Centred entries, float32.
    """
    middle = jnp.expand_dims(average(means, counts, axis)[0], axis)
    return jnp.where(_spread(counts > 0, means), means.astype(jnp.float32) - middle, 0.0)


def placed_ids(
    places: CellSums, folders: CellSums, crossings: Int[Array, "P A C"]
) -> tuple[Float[Array, "P C L D"], Int[Array, "P C"]]:
    """IDs of the second object by pair, from two small tables of sums.

    A table of means by (pair, place of A, place of B) would not fit in memory. The ID of B at one place of A is its
    activation minus the mean of that folder, and the ID of a pair is its mean over A's places. Both means are linear,
    so sums over A's places and sums over folders suffice. If all placements have equally many images, this is the
    published mean of means; otherwise images, not placements, weigh equally.

    Args:
        places: sums whose groups are the P pairs and whose cells are the C places (and sizes) of B.
        folders: sums whose groups are the P pairs and whose cells are the A places of the first object.
        crossings: number of images of each pair at each place of A and each place of B.

    Returns:
        IDs by pair and place of B (zero without images), and the number of images that each averages.
    """
    folder_means, _ = finish(folders)
    removed = jnp.einsum("pac,pald->pcld", crossings.astype(jnp.float32), folder_means, precision=_HIGHEST)
    centred = jnp.where(places.counts[..., None, None] > 0, places.sums - removed, 0.0)
    return _divide(centred, places.counts[..., None, None]), places.counts


def axes(
    universal: Float[Array, "*batch X Y D"], *, equal_pairs: bool = False
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """Spatial axes: the mean step to the right and the mean step down.

    The x axis is the mean over rows and over pairs of columns x1 < x2 of U(x2, y) - U(x1, y); the y axis
    the same down the rows ([ID] arXiv 2601.12626, spatial axes).

    Args:
        universal: IDs of a grid.
        equal_pairs: whether the mean also counts, for every column x1 but the last, the pair of x1 with itself, whose
            difference is zero, as in the published code. On a 4 x 4 grid these are 3 of 9 pairs, so the axes are 2/3 as
            long; their directions are the same.

    Returns:
        The x axis (rightwards) and the y axis (downwards).
    """
    universal = universal.astype(jnp.float32)

    def mean_step(lines: Float[Array, "*batch N D"]) -> Float[Array, "*batch D"]:
        # In the sum over pairs, line i is added once for each line before it and subtracted once for each after.
        length = lines.shape[-2]
        weights = 2.0 * jnp.arange(length, dtype=jnp.float32) - (length - 1)
        pairs = length * (length - 1) / 2 + (length - 1 if equal_pairs else 0)
        return jnp.einsum("...nd,n->...d", lines, weights / pairs, precision=_HIGHEST)

    return mean_step(universal.mean(axis=-2)), mean_step(universal.mean(axis=-3))


def plane(
    x_axis: Float[Array, "*batch D"], y_axis: Float[Array, "*batch D"]
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """Orthonormal directions (u, v) of the plane of the axes.

    u points along the x axis, v along the part of the y axis orthogonal to u ([ID] arXiv 2601.12626, spatial axes). A
    zero axis gives a zero direction.
    """
    u = _unit(x_axis.astype(jnp.float32))
    y_axis = y_axis.astype(jnp.float32)
    return u, _unit(y_axis - _dot(y_axis, u)[..., None] * u)


def plane_coordinates(
    values: Float[Array, "*batch D"], u: Float[Array, "*directions D"], v: Float[Array, "*directions D"]
) -> Float[Array, "*batch 2"]:
    """Coordinates (value . u, value . v) in the plane, in activation units.

    Args:
        values: vectors to project. Their leading axes begin with those of u and v: values [L, X, Y, D] go with u and
            v [L, D].
        u: first direction of `plane`.
        v: second direction of `plane`.
    """
    directions = jnp.stack([u, v], axis=-1).astype(jnp.float32)  # [*directions, D, 2]
    lead = directions.shape[:-2]
    flat = values.astype(jnp.float32).reshape(*lead, -1, values.shape[-1])
    result = jnp.matmul(flat, directions, precision=_HIGHEST)
    return result.reshape(*values.shape[:-1], 2)


def explained_variance(
    universal: Float[Array, "*batch X Y D"], u: Float[Array, "*batch D"], v: Float[Array, "*batch D"]
) -> Float[Array, "*batch"]:
    """Share of the IDs' variance over cells in the plane: (var(e.u) + var(e.v)) / total variance.

    Zero where the IDs do not vary. Source: [ID] arXiv 2601.12626, linearity of spatial IDs.
    """
    inside = plane_coordinates(universal, u, v).var(axis=(-3, -2)).sum(axis=-1)
    return _divide(inside, universal.astype(jnp.float32).var(axis=(-3, -2)).sum(axis=-1))


def row_column_shares(
    universal: Float[Array, "*batch X Y D"],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Shares of the IDs' variance explained by the column means and by the row means.

    This is a two-way analysis of variance without interaction. The shares add up, and their sum is 1 exactly if every
    ID is a vector of its column plus a vector of its row. Unrelated cells in n rows and n columns give about
    2 / (n + 1).

    Returns:
        The column share (x) and the row share (y); zero where the IDs do not vary.
    """
    universal = universal.astype(jnp.float32)
    centred = universal - universal.mean(axis=(-3, -2), keepdims=True)
    total = (centred**2).mean(axis=(-3, -2)).sum(axis=-1)
    columns = (centred.mean(axis=-2) ** 2).mean(axis=-2).sum(axis=-1)
    rows = (centred.mean(axis=-3) ** 2).mean(axis=-2).sum(axis=-1)
    return _divide(columns, total), _divide(rows, total)


def axes_cosine(x_axis: Float[Array, "*batch D"], y_axis: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Cosine between the two axes, near 0 where columns and rows are encoded independently."""
    return _dot(_unit(x_axis.astype(jnp.float32)), _unit(y_axis.astype(jnp.float32)))


def cosine_agreement(
    per_object: Float[Array, "*batch O C D"], present: Bool[Array, "O C"] | None = None
) -> Float[Array, "*batch"]:
    """Mean cosine between two objects' IDs of the same cell, over all pairs of objects and all cells.

    Args:
        per_object: centred IDs of each object at each cell.
        present: which entries exist; all of them by default. Pairs with a missing one are skipped.

    Returns:
        The mean cosine; zero without pairs.
    """
    if present is None:
        present = jnp.ones(per_object.shape[-3:-1], bool)
    objects = per_object.shape[-3]
    kept = jnp.broadcast_to(present[..., None], per_object.shape)
    directions = _unit(jnp.where(kept, per_object.astype(jnp.float32), 0.0))
    cosines = jnp.einsum("...ocd,...pcd->...cop", directions, directions, precision=_HIGHEST)
    both = present.T[:, :, None] & present.T[:, None, :] & ~jnp.eye(objects, dtype=bool)[None]
    total = jnp.einsum("...cop,cop->...", cosines, both.astype(jnp.float32), precision=_HIGHEST)
    return _divide(total, both.sum())


def place_correlation(universal: Float[Array, "*batch X Y D"]) -> Float[Array, "*batch 2"]:
    """Correlation over cells of the plane coordinates with the true column and the true row.

    Returns:
        Pearson correlation of the first coordinate with the column, and of the second with the row; zero where a
        coordinate does not vary.
    """
    columns, rows = universal.shape[-3:-1]
    coordinates = plane_coordinates(universal, *plane(*axes(universal)))
    places = jnp.stack(
        jnp.meshgrid(jnp.arange(columns, dtype=jnp.float32), jnp.arange(rows, dtype=jnp.float32), indexing="ij"),
        axis=-1,
    )
    coordinates = coordinates - coordinates.mean(axis=(-3, -2), keepdims=True)
    places = places - places.mean(axis=(-3, -2), keepdims=True)
    together = jnp.einsum("...xyc,xyc->...c", coordinates, places, precision=_HIGHEST)
    squares = jnp.einsum("...xyc,ijc->...c", coordinates**2, places**2, precision=_HIGHEST)
    return _divide(together, jnp.sqrt(squares))


def separations(coordinates: Float[Array, "*batch X Y 2"]) -> Float[Array, "*batch 2"]:
    """Smallest gap between neighbouring columns and between neighbouring rows in the plane, in mean steps.

    Args:
        coordinates: plane coordinates of the cells.

    Returns:
        For columns, the smallest difference of the first coordinate of any cell of a column and any cell of the column
        before, as a share of the mean step between columns; for rows, the same of the second coordinate. 1 if cells
        are evenly spaced, and above 0 only if columns are in order and none overlaps the next. Zero without a step.
    """
    found = []
    for lines in (coordinates[..., 0], coordinates[..., 1].swapaxes(-1, -2)):
        gaps = lines.min(axis=-1)[..., 1:] - lines.max(axis=-1)[..., :-1]
        means = lines.mean(axis=-1)
        step = (means[..., -1] - means[..., 0]) / (lines.shape[-2] - 1)
        found.append(_divide(gaps.min(axis=-1), step))
    return jnp.stack(found, axis=-1)


def bilinear(
    universal: Float[Array, "*batch X Y D"],
    x: Float[Array, "*points"],
    y: Float[Array, "*points"],
    *,
    half_cell: bool = True,
) -> Float[Array, "..."]:
    """The ID at any place, interpolated bilinearly between the IDs of the four cells around it.

    Source: [ID] arXiv 2601.12626, ground-truth IDs of COCO boxes.

    Args:
        universal: IDs of a grid.
        x: distance from the left edge in cells, 0 to X: on a 4 x 4 grid, four times the fraction of the width.
        y: distance from the upper edge in cells, 0 to Y.
        half_cell: whether a cell's ID belongs to its centre, so that (x + 0.5, y + 0.5) gives exactly U(x, y). If
            false it belongs to the cell's upper left corner, half a cell off, as in the published code, which also
            loses weight in the last column and row: where the next cell would be outside the grid, the weight of the
            next cell replaces that of the last one instead of being added to it.

    Returns:
        IDs, float32 [*batch, *points, D]. Places beyond the outermost IDs get the nearest, if `half_cell` is true.
    """
    columns, rows = universal.shape[-3:-1]
    weights = _centred_weights if half_cell else _cornered_weights
    mixed = jnp.einsum(
        "...xyd,px,py->...pd",
        universal.astype(jnp.float32),
        weights(x, columns),
        weights(y, rows),
        precision=_HIGHEST,
    )
    return mixed.reshape(*universal.shape[:-3], *x.shape, universal.shape[-1])


def _centred_weights(places: Float[Array, "..."], length: int) -> Float[Array, "P N"]:
    """Weights of the cells of a line at places along it; a cell's place is its centre."""
    places = jnp.clip(places.astype(jnp.float32).reshape(-1, 1) - 0.5, 0.0, length - 1.0)
    return jnp.maximum(0.0, 1.0 - jnp.abs(places - jnp.arange(length, dtype=jnp.float32)[None]))


def _cornered_weights(places: Float[Array, "..."], length: int) -> Float[Array, "P N"]:
    """Weights of the published code, whose cells have their place at the corner.

    The code keeps the four products of a column's and a row's weight in a table with the cells as keys. Keys of the
    next column or row are written after those of the one before, and are limited to the last one. So where the two are
    the same, the next one's weight is kept, for columns and rows independently.
    """
    places = places.astype(jnp.float32).reshape(-1, 1)
    first, cells = jnp.floor(places), jnp.arange(length, dtype=jnp.float32)[None]
    share = places - first
    return jnp.where(cells == jnp.minimum(first + 1, length - 1), share, jnp.where(cells == first, 1 - share, 0.0))


def _divide(total: Float[Array, "..."], count: Float[Array, "..."] | Int[Array, "..."]) -> Float[Array, "..."]:
    """Quotient in float32, zero where the divisor is zero, without NaN in the value or the gradient."""
    count = count.astype(jnp.float32)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def _spread(present: Bool[Array, "G C"], means: Float[Array, "G C *rest"]) -> Bool[Array, "G C *ones"]:
    """`present` with trailing axes of length one, to broadcast against the means."""
    return present.reshape(*present.shape, *(1,) * (means.ndim - 2))


def _dot(left: Float[Array, "*batch D"], right: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Inner product over the last axis, in full float32."""
    return jnp.einsum("...d,...d->...", left, right, precision=_HIGHEST)


def _unit(vectors: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Vectors of length one; a zero vector stays zero."""
    # Divided by their largest entry first, so that no square overflows or vanishes.
    largest = jax.lax.stop_gradient(jnp.abs(vectors).max(axis=-1, keepdims=True))
    positive = largest > 0
    scaled = vectors / jnp.where(positive, largest, 1.0)
    return jnp.where(positive, scaled / jnp.sqrt(jnp.where(positive, _dot(scaled, scaled)[..., None], 1.0)), 0.0)
