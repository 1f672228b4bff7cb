"""`kernels.probing` on planted geometry."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels import probing

WIDTH = 24


def _orthonormal() -> np.ndarray:
    """Three directions: to the right, down, and across both."""
    matrix = np.random.default_rng(0).normal(size=(WIDTH, 3))
    return np.linalg.qr(matrix)[0].T.astype(np.float32)


def _linear_plant(step_x: float = 2.0, step_y: float = 1.5) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """IDs on a regular grid of a plane: [4, 4, D] and the two planted steps."""
    right, down, _ = _orthonormal()
    x, y = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")
    grid = step_x * (x - 1.5)[..., None] * right + step_y * (y - 1.5)[..., None] * down
    return jnp.asarray(grid, jnp.float32), step_x * right, step_y * down


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def _random_grid(*lead: int) -> jax.Array:
    return _normal(*lead, 4, 4, WIDTH)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_accumulate_equals_means_by_hand(dtype):
    rng = np.random.default_rng(0)
    rows, groups, cells = 60, 3, 4
    activations = jnp.asarray(rng.normal(size=(rows, 2, WIDTH)), dtype)
    group, cell = rng.integers(0, groups, rows), rng.integers(0, cells, rows)
    group[(group == 1) & (cell == 2)] = 0  # one entry without rows
    state = probing.empty_sums(groups, cells, 2, WIDTH)
    for part in np.array_split(np.arange(rows), 4):  # several rows of one entry in a batch, and over batches
        state = jax.jit(probing.accumulate)(state, activations[part], jnp.asarray(group[part]), jnp.asarray(cell[part]))
    means, counts = probing.finish(state)
    assert means.dtype == jnp.float32
    exact = np.asarray(activations.astype(jnp.float32), np.float64)
    for g in range(groups):
        for c in range(cells):
            chosen = exact[(group == g) & (cell == c)]
            assert counts[g, c] == len(chosen)
            expected = chosen.mean(axis=0) if len(chosen) else np.zeros((2, WIDTH))
            np.testing.assert_allclose(means[g, c], expected, atol=1e-6)
    assert counts[1, 2] == 0


def test_accumulate_skips_padding_even_if_it_is_nan():
    state = probing.empty_sums(2, 2, 1, 3)
    rows = jnp.array([[[1.0, 2, 3]], [[np.nan] * 3], [[np.nan] * 3], [[np.nan] * 3]])
    state = probing.accumulate(state, rows, jnp.array([1, -1, 0, 2]), jnp.array([1, 0, -1, 0]))
    np.testing.assert_array_equal(state.counts, [[0, 0], [0, 1]])
    np.testing.assert_array_equal(state.sums[1, 1, 0], [1, 2, 3])
    assert np.isfinite(state.sums).all()


def test_sums_of_two_sets_add_up():
    rows = _normal(6, 1, 3)
    group, cell = jnp.array([0, 1, 0, 1, 0, 1]), jnp.array([0, 1, 1, 0, 0, 1])
    empty = probing.empty_sums(2, 2, 1, 3)
    whole = probing.accumulate(empty, rows, group, cell)
    halves = [probing.accumulate(empty, rows[part], group[part], cell[part]) for part in (slice(2), slice(2, 6))]
    for one, other in zip(whole, jax.tree.map(jnp.add, *halves), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_center_uses_present_entries_only(axis):
    means = _normal(3, 4, 2, 5).at[1, 2].set(jnp.nan)
    counts = jnp.ones((3, 4), jnp.int32).at[1, 2].set(0).at[0, 0].set(7)
    centred = probing.center(means, counts, axis)
    expected = np.asarray(means) - np.nanmean(np.asarray(means), axis=axis, keepdims=True)
    np.testing.assert_allclose(centred, np.nan_to_num(expected), atol=1e-6)
    np.testing.assert_array_equal(centred[1, 2], 0.0)
    averaged, rows = probing.average(means, counts, axis)
    np.testing.assert_allclose(averaged, np.nanmean(np.asarray(means), axis=axis), atol=1e-6)
    np.testing.assert_array_equal(rows, counts.sum(axis=axis))


@pytest.mark.parametrize("pictures", ["all", "no shared row or column", "some"])
def test_placed_ids_equal_the_published_mean_of_means(pictures):
    """Two small tables of sums give what centring each folder and averaging over A's places gives."""
    rng = np.random.default_rng(2)
    pairs, places, cells = 2, 16, 16
    means = jnp.asarray(rng.normal(size=(pairs, places, cells, 1, 3)) + 50, jnp.float32)
    a, b = np.arange(places)[:, None], np.arange(cells)[None]
    present = a != b
    if pictures == "no shared row or column":
        present = (a // 4 != b // 4) & (a % 4 != b % 4)
    crossings = np.repeat(present[None], pairs, axis=0)
    if pictures == "some":
        crossings = crossings & (rng.random(crossings.shape) < 0.6)
        crossings[1, :, 5] = False
    crossings = jnp.asarray(crossings, jnp.int32)

    sums = jnp.where(crossings[..., None, None] > 0, means, 0.0)
    ids, counts = probing.placed_ids(
        probing.CellSums(sums.sum(axis=1), crossings.sum(axis=1)),
        probing.CellSums(sums.sum(axis=2), crossings.sum(axis=2)),
        crossings,
    )
    for pair in range(pairs):
        centred = probing.center(means[pair], crossings[pair], axis=1)
        expected, rows = probing.average(centred, crossings[pair], axis=0)
        np.testing.assert_allclose(ids[pair], expected, atol=2e-5)
        np.testing.assert_array_equal(counts[pair], rows)
    assert np.isfinite(ids).all()


def test_axes_recover_planted_steps():
    grid, right, down = _linear_plant()
    x_axis, y_axis = probing.axes(grid)
    # The mean of x2 - x1 over the six pairs of four columns is 10/6 columns.
    np.testing.assert_allclose(x_axis, right * 10 / 6, atol=1e-5)
    np.testing.assert_allclose(y_axis, down * 10 / 6, atol=1e-5)
    np.testing.assert_allclose(probing.axes_cosine(x_axis, y_axis), 0.0, atol=1e-6)


@pytest.mark.parametrize("equal_pairs", [False, True])
def test_axes_equal_the_loop_over_pairs(equal_pairs: bool):
    grid = np.asarray(_random_grid())
    x_steps, y_steps = [], []
    for low in range(3):
        for high in range(low if equal_pairs else low + 1, 4):
            for line in range(4):
                x_steps.append(grid[high, line] - grid[low, line])
                y_steps.append(grid[line, high] - grid[line, low])
    assert len(x_steps) == 4 * (9 if equal_pairs else 6)
    x_axis, y_axis = probing.axes(jnp.asarray(grid), equal_pairs=equal_pairs)
    np.testing.assert_allclose(x_axis, np.mean(x_steps, axis=0), atol=1e-6)
    np.testing.assert_allclose(y_axis, np.mean(y_steps, axis=0), atol=1e-6)


def test_axes_with_equal_pairs_are_two_thirds_as_long_in_the_same_plane():
    grid = _random_grid(2)
    whole, shorter = probing.axes(grid), probing.axes(grid, equal_pairs=True)
    for one, other in zip(whole, shorter, strict=True):
        np.testing.assert_allclose(other, one * 2 / 3, atol=1e-6)
    for one, other in zip(probing.plane(*whole), probing.plane(*shorter), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


def test_plane_is_orthonormal_with_u_along_x():
    x_axis, y_axis = _normal(2, 3, WIDTH)
    u, v = probing.plane(x_axis, y_axis)
    np.testing.assert_allclose(jnp.sum(u * u, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(v * v, axis=-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(u * v, axis=-1), 0.0, atol=1e-6)
    np.testing.assert_allclose(probing.axes_cosine(u, x_axis), 1.0, atol=1e-6)
    assert (jnp.sum(v * y_axis, axis=-1) > 0).all()


def test_zero_axes_give_no_nan():
    zero = jnp.zeros((4, 4, WIDTH))
    for result in (
        *probing.plane(*probing.axes(zero)),
        probing.explained_variance(zero, *probing.plane(*probing.axes(zero))),
        *probing.row_column_shares(zero),
        probing.place_correlation(zero),
        probing.cosine_agreement(zero),
    ):
        np.testing.assert_array_equal(result, 0.0)


def test_plane_coordinates_recover_places():
    grid, _, _ = _linear_plant()
    coordinates = probing.plane_coordinates(grid, *probing.plane(*probing.axes(grid)))
    assert coordinates.shape == (4, 4, 2)
    x, y = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    np.testing.assert_allclose(coordinates[..., 0], 2.0 * (x - 1.5), atol=1e-5)
    np.testing.assert_allclose(coordinates[..., 1], 1.5 * (y - 1.5), atol=1e-5)


def test_explained_variance_of_a_plane_and_of_a_plane_with_noise_across_it():
    grid, _, _ = _linear_plant()
    directions = probing.plane(*probing.axes(grid))
    np.testing.assert_allclose(probing.explained_variance(grid, *directions), 1.0, atol=1e-5)
    # A part across the plane that is no trend over columns or rows leaves the axes as they are.
    across = _orthonormal()[2]
    checkers = np.where(np.indices((4, 4)).sum(axis=0) % 2, 1.0, -1.0)[..., None] * across
    mixed = grid + jnp.asarray(checkers, jnp.float32)
    inside = 1.25 * (2.0**2 + 1.5**2)
    result = probing.explained_variance(mixed, *probing.plane(*probing.axes(mixed)))
    np.testing.assert_allclose(result, inside / (inside + 1.0), atol=1e-5)


def test_shares_of_additive_and_categorical_ids():
    grid, _, _ = _linear_plant()
    column_share, row_share = probing.row_column_shares(grid)
    np.testing.assert_allclose(column_share, 4.0 / 6.25, atol=1e-5)
    np.testing.assert_allclose(column_share + row_share, 1.0, atol=1e-5)

    # Additive but bent: a free vector for each column and for each row.
    columns, rows = _normal(2, 4, WIDTH)
    shares = probing.row_column_shares(columns[:, None] + rows[None])
    np.testing.assert_allclose(sum(shares), 1.0, atol=1e-5)

    # Every cell its own direction: 3 of the 15 degrees of freedom are columns, 3 are rows.
    categorical = jnp.eye(16, WIDTH).reshape(4, 4, WIDTH)
    shares = probing.row_column_shares(categorical)
    np.testing.assert_allclose(shares, 3 / 15, atol=1e-6)
    directions = probing.plane(*probing.axes(categorical))
    np.testing.assert_allclose(probing.explained_variance(categorical, *directions), 2 / 15, atol=1e-6)


def test_place_correlation_of_planted_and_unordered_columns():
    grid, _, _ = _linear_plant()
    np.testing.assert_allclose(probing.place_correlation(grid), [1.0, 1.0], atol=1e-5)
    categorical = jnp.eye(16, WIDTH).reshape(4, 4, WIDTH)
    assert (probing.place_correlation(grid[jnp.array([1, 0, 3, 2])])[0] < 0.95).all()
    assert (probing.place_correlation(categorical) <= 1.0 + 1e-6).all()


def test_separations_of_columns_and_rows_in_the_plane():
    x, y = jnp.meshgrid(jnp.arange(4.0), jnp.arange(4.0), indexing="ij")
    even = jnp.stack([3 * x, 5 * y], axis=-1)
    np.testing.assert_allclose(probing.separations(even), [1.0, 1.0], atol=1e-6)
    # Column 2 begins a tenth of a step after column 1 ends; row 3 reaches into row 2.
    moved = even.at[2, 1, 0].add(-2.7).at[1, 3, 1].add(-6.0)
    x_step, y_step = 3.0, (15 - 6.0 / 4) / 3
    np.testing.assert_allclose(probing.separations(moved), [0.3 / x_step, -1.0 / y_step], atol=1e-5)
    assert (probing.separations(even[jnp.array([1, 0, 2, 3])])[0] < 0).all()
    np.testing.assert_array_equal(probing.separations(jnp.zeros((4, 4, 2))), [0.0, 0.0])


def test_cosine_agreement():
    shared = _normal(1, 16, WIDTH)
    same = jnp.concatenate([shared, 3.0 * shared, 0.5 * shared])
    np.testing.assert_allclose(probing.cosine_agreement(same), 1.0, atol=1e-6)
    opposed = jnp.concatenate([shared, shared, -shared])
    np.testing.assert_allclose(probing.cosine_agreement(opposed), -1 / 3, atol=1e-6)
    # Without the cells of the opposed object the others agree.
    present = jnp.ones((3, 16), bool).at[2].set(False)
    for missing in (opposed, opposed.at[2].set(jnp.nan)):
        np.testing.assert_allclose(probing.cosine_agreement(missing, present), 1.0, atol=1e-6)


def test_leading_axes_equal_vmap():
    grids = _random_grid(3)
    objects = _normal(3, 2, 16, WIDTH)

    def everything(grid, several):
        x_axis, y_axis = probing.axes(grid)
        u, v = probing.plane(x_axis, y_axis)
        return {
            "axes": (x_axis, y_axis, u, v, probing.axes_cosine(x_axis, y_axis)),
            "coordinates": probing.plane_coordinates(grid, u, v),
            "explained": probing.explained_variance(grid, u, v),
            "shares": probing.row_column_shares(grid),
            "correlation": probing.place_correlation(grid),
            "place": probing.bilinear(grid, jnp.array([0.3, 2.2]), jnp.array([1.7, 3.9])),
            "agreement": probing.cosine_agreement(several),
            "separations": probing.separations(probing.plane_coordinates(grid, u, v)),
        }

    together = jax.jit(everything)(grids, objects)
    mapped = jax.jit(jax.vmap(everything))(grids, objects)
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(mapped), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_bilinear_at_cell_centres_and_between():
    grid = _random_grid()
    x, y = jnp.meshgrid(jnp.arange(4.0), jnp.arange(4.0), indexing="ij")
    centres = probing.bilinear(grid, x + 0.5, y + 0.5)
    np.testing.assert_allclose(centres, grid, atol=1e-6)
    middle = probing.bilinear(grid, jnp.array(2.0), jnp.array(1.0))
    np.testing.assert_allclose(middle, grid[1:3, 0:2].mean(axis=(0, 1)), atol=1e-6)
    quarter = probing.bilinear(grid, jnp.array(1.75), jnp.array(3.5))
    np.testing.assert_allclose(quarter, 0.75 * grid[1, 3] + 0.25 * grid[2, 3], atol=1e-6)
    corners = probing.bilinear(grid, jnp.array([0.0, 4.0, 0.2]), jnp.array([0.0, 4.0, 4.0]))
    np.testing.assert_allclose(corners, grid[jnp.array([0, 3, 0]), jnp.array([0, 3, 3])], atol=1e-6)


def _published_place(grid: np.ndarray, fx: float, fy: float) -> np.ndarray:
    """The four weights in a dict keyed by clamped cells, where a later weight replaces an earlier one."""
    x0, y0 = math.floor(fx), math.floor(fy)
    x1, y1 = min(x0 + 1, 3), min(y0 + 1, 3)
    right, down = fx - x0, fy - y0
    weights = {(x0, y0): (1 - right) * (1 - down)}
    weights[x1, y0] = right * (1 - down)
    weights[x0, y1] = (1 - right) * down
    weights[x1, y1] = right * down
    mixed = np.zeros(grid.shape[-1])
    for (x, y), weight in weights.items():
        if x < 4 and y < 4:
            mixed += weight * grid[x, y]
    return mixed


def test_bilinear_reproduces_the_published_mapping():
    grid = np.asarray(_random_grid())
    places = np.random.default_rng(4).uniform(0, 4, size=(40, 2))
    places[:3] = [[3.2, 1.2], [1.5, 3.75], [2, 3]]
    assert (places >= 3).all(axis=1).any() and (places < 3).all(axis=1).any()
    x, y = jnp.asarray(places.T, jnp.float32)
    result = jax.jit(partial(probing.bilinear, half_cell=False))(jnp.asarray(grid), x, y)
    np.testing.assert_allclose(result, [_published_place(grid, *place) for place in places], atol=1e-5)
    # Beyond three quarters of the picture, a fifth of the mix is left, or of what is left of it.
    np.testing.assert_allclose(result[0], 0.2 * (0.8 * grid[3, 1] + 0.2 * grid[3, 2]), atol=1e-5)
    corner = probing.bilinear(jnp.asarray(grid), jnp.array(3.2), jnp.array(3.2), half_cell=False)
    np.testing.assert_allclose(corner, 0.2 * 0.2 * grid[3, 3], atol=1e-5)
    # The corner of a cell has its ID, except in the last row, where nothing is left.
    np.testing.assert_allclose(result[2], 0 * grid[2, 3], atol=1e-6)
    # By default nothing is lost: the place is between the centres of columns 2 and 3, rows 0 and 1.
    mixed = np.einsum("x,y,xyd->d", [0.3, 0.7], [0.3, 0.7], grid[2:, :2])
    np.testing.assert_allclose(probing.bilinear(jnp.asarray(grid), x[:1], y[:1])[0], mixed, atol=1e-5)


def test_bfloat16_ids_give_float32_geometry():
    grid = _random_grid().astype(jnp.bfloat16)
    exact = grid.astype(jnp.float32)
    directions = probing.plane(*probing.axes(grid))
    assert directions[0].dtype == jnp.float32
    np.testing.assert_allclose(
        probing.explained_variance(grid, *directions), probing.explained_variance(exact, *directions)
    )
    np.testing.assert_allclose(probing.row_column_shares(grid), probing.row_column_shares(exact))
