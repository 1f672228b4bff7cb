"""The attention kernels as JAX programs, against plain products: what is read, its weight, and all gradients."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxid.kernels import attention, flash
from jaxid.kernels.attention import (
    Implementation,
    chosen,
    part,
    prefix_part,
    shared_prefix_attention,
)
from jaxid.kernels.blocks import LOWEST, Target
from jaxid.kernels.masks import Reads, causal, everything, with_spans, within_spans
from jaxid.kernels.parts import Part, merge

Arrays = tuple[jax.Array, ...]

pytestmark = pytest.mark.parametrize("kernel", ["cuda-interpreted", "tpu-interpreted"])


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), jnp.float32)


def heads(batch: int, count: int, kv: int, queries: int, keys: int, width: int) -> Arrays:
    return (
        drawn(batch, count, queries, width),
        drawn(batch, kv, keys, width, seed=1),
        drawn(batch, kv, keys, width, seed=2),
    )


def numbered(batch: int, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """Positions of queries that are the last tokens, and of all keys."""
    positions = jnp.broadcast_to(jnp.arange(keys), (batch, keys))
    return positions[:, keys - queries :], positions


def masked(kind: str, batch: int, queries: int, keys: int) -> Reads | None:
    query, key = numbered(batch, queries, keys)
    valid = key < jnp.array([keys, keys // 3])[:batch, None]
    if kind == "none":
        return None
    if kind == "padded":
        return everything(queries, valid)
    if kind == "causal":  # the first prompt alone is long; what is left of the other ends before the last queries
        return causal(query, key, valid)._replace(high=jnp.where(query % 7 == 3, -1, query))  # some read nothing
    if kind == "window":
        return causal(query, key, valid).within(query, keys // 4, jnp.asarray(True))
    spans = jnp.where((key // 23) % 3 == 1, -1, key // 23)
    if kind == "pictures":
        return with_spans(causal(query, key, valid), spans[:, keys - queries :], spans)
    return within_spans(spans[:, keys - queries :], spans)


def total(kernel: Implementation, reads: Reads | None, query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    """A sum of what is read and of its weight, each with unequal factors, and the part itself."""
    found = part(query, key, value, reads, implementation=kernel)
    lse = jnp.where(found.lse == LOWEST, 0.0, found.lse)
    weighed = [
        (leaf.astype(jnp.float32) * jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)).sum()
        for leaf in (found.mixed, lse)
    ]
    return weighed[0] + weighed[1], found


@partial(jax.jit, static_argnums=0)
def slopes(kernel: Implementation, reads: Reads | None, arrays: Arrays) -> tuple[Part, tuple[jax.Array, ...]]:
    gradients, found = jax.grad(lambda *arrays: total(kernel, reads, *arrays), (0, 1, 2), has_aux=True)(*arrays)
    return found, gradients


read = jax.jit(part, static_argnames="implementation")
read_prefix = jax.jit(prefix_part, static_argnames="implementation")


CASES = [
    ("none", (1, 2, 2, 150, 300, 72)),
    ("padded", (2, 2, 2, 130, 140, 80)),
    ("causal", (2, 4, 2, 200, 200, 16)),
    ("window", (2, 2, 1, 260, 300, 40)),
    ("pictures", (1, 2, 2, 290, 290, 24)),
    ("own span", (2, 2, 2, 300, 300, 16)),
    ("window", (2, 6, 2, 5, 270, 88)),
]
"""Masks; prompts, heads, key heads, queries, keys, width of a head."""


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_equals_the_plain_form(kernel: Implementation, kind: str, sizes: tuple[int, ...]) -> None:
    batch, _, _, queries, keys, _ = sizes
    arrays, reads = heads(*sizes), masked(kind, batch, queries, keys)
    found, gradients = slopes(kernel, reads, arrays)
    wanted, expected = slopes("batched", reads, arrays)
    empty = np.asarray(wanted.lse == LOWEST)
    assert empty.any() == (kind in ("causal", "window", "own span")) and not empty.all()
    np.testing.assert_array_equal(np.asarray(found.mixed)[empty], 0)
    np.testing.assert_allclose(found.mixed, wanted.mixed, atol=1e-5)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16(kernel: Implementation) -> None:
    """Nearer to float32 than one step of bfloat16, which is 2**-8 of a value up to 3 here."""
    arrays = tuple(array.astype(jnp.bfloat16) for array in heads(2, 4, 2, 140, 140, 32))
    reads = masked("causal", 2, 140, 140)
    found, gradients = slopes(kernel, reads, arrays)
    assert found.mixed.dtype == jnp.bfloat16 and found.lse.dtype == jnp.float32
    exact, expected = slopes("batched", reads, tuple(array.astype(jnp.float32) for array in arrays))
    np.testing.assert_allclose(found.mixed.astype(jnp.float32), exact.mixed, atol=0.012)
    np.testing.assert_allclose(found.lse, exact.lse, atol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.006 * float(jnp.abs(theirs).max()))


def test_gradients_through_merged_parts(kernel: Implementation) -> None:
    """Two parts of the keys, merged by their weights, are one softmax: so are the gradients."""
    query, key, value = heads(1, 2, 1, 130, 200, 16)
    reads = masked("window", 1, 130, 200)
    assert reads is not None and reads.low is not None

    def halves(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        cut = 90
        names: tuple[Implementation, Implementation] = (kernel, "batched")
        parts = [
            part(
                query,
                key[:, :, some],
                value[:, :, some],
                reads._replace(positions=reads.positions[:, some]),
                implementation=name,
            )
            for some, name in zip((slice(0, cut), slice(cut, None)), names, strict=True)
        ]
        assert all(some.lse.dtype == jnp.float32 for some in parts)
        return merge(*parts)

    def loss(run: Any) -> Any:
        def weighed(*arrays: jax.Array) -> jax.Array:
            mixed = run(*arrays)
            return (mixed * jnp.cos(jnp.arange(mixed.size, dtype=jnp.float32)).reshape(mixed.shape)).sum()

        return jax.jit(jax.grad(weighed, (0, 1, 2)))(query, key, value)

    whole = loss(lambda q, k, v: part(q, k, v, reads, implementation="batched").mixed)
    for ours, theirs in zip(loss(halves), whole, strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@partial(jax.jit, static_argnums=0)
def prefix_slopes(kernel: Implementation, reads: Reads, query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    def weighed(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        found = prefix_part(query, key, value, reads, implementation=kernel)
        return (found.mixed**2).sum() + jnp.sin(found.lse).sum(), found

    return jax.grad(weighed, (0, 1, 2), has_aux=True)(query, key, value)


def test_a_prefix_that_rows_share(kernel: Implementation) -> None:
    """Axes [R, B, S, H]; queries of all rows and of all heads that share a key head go through the keys together."""
    rows, batch, queries, keys = 3, 2, 4, 150
    query = drawn(rows, batch, queries, 6, 16)
    _, key, value = heads(batch, 6, 2, queries, keys, 16)
    positions = jnp.array([[140, 141, 142, 143], [40, 41, 42, 43]])
    reads = causal(positions, numbered(batch, queries, keys)[1]).within(positions, 60, True)

    both = [prefix_slopes(name, reads, query, key, value) for name in (kernel, "batched")]
    for ours, theirs in zip(*(jax.tree.leaves(leaves) for leaves in both), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    alike = everything(1, numbered(batch, queries, keys)[1] < 99)  # the same for all queries
    both = [read_prefix(query, key, value, alike, implementation=name) for name in (kernel, "batched")]
    assert both[0].mixed.shape == query.shape
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_programs_share_the_keys_of_few_queries(kernel: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPU; the shares of some programs hold no key that a query may read, or none at all."""
    counts: list[int] = []
    splits = flash._splits
    monkeypatch.setattr(flash, "_splits", lambda *given: counts.append(splits(*given)) or counts[-1])
    flash._everywhere.cache_clear()
    (query, key, value), keys = heads(2, 4, 2, 5, 700, 16), jnp.broadcast_to(jnp.arange(700), (2, 700))
    queries = jnp.array([[600], [3]]) + 7 * jnp.arange(5)
    short = causal(queries, keys)
    empty = short._replace(high=short.high.at[:, 2].set(-1))
    for reads in (None, short, empty, empty.within(queries, 100, True)):
        found = part(query, key, value, reads, implementation=kernel)
        wanted = read(query, key, value, reads, implementation="batched")
        np.testing.assert_allclose(found.mixed, wanted.mixed, atol=1e-5)
        np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-5)
    assert set(counts) == ({5} if kernel.startswith("cuda") else {1})
    for sizes in ((2, 4, 2, 200, 700, 16), (9, 32, 32, 2, 700, 16)):
        query, key, value = heads(*sizes)
        part(query, key, value, implementation=kernel)
        assert counts[-1] == 1
    flash._everywhere.cache_clear()


@partial(jax.jit, static_argnums=0)
def row_slopes(kernel: Implementation | None, before: Reads, after: Reads, arrays: Arrays) -> Any:
    def weighed(query: Any, key: Any, value: Any, prefix_key: Any, prefix_value: Any) -> Any:
        given = (prefix_key, prefix_value, before, query, key, value, after)
        found = shared_prefix_attention(*given, implementation=kernel)
        return (found * jnp.sin(jnp.arange(found.size, dtype=jnp.float32)).reshape(found.shape)).sum(), found

    return jax.grad(weighed, range(5), has_aux=True)(*arrays)


@pytest.mark.parametrize("sliding", [True, False])
def test_rows_side_by_side(kernel: Implementation, sliding: bool) -> None:
    """Own tokens of all rows in one call, after prefixes of their own length, the last of a prompt padding."""
    rows, batch, queries, own, prefix = 3, 2, 44, 50, 70
    query = drawn(rows, batch, queries, 4, 16)
    _, prefix_key, prefix_value = heads(batch, 4, 2, queries, prefix, 16)
    key, value = (drawn(rows, batch, 2, own, 16, seed=seed) for seed in (1, 2))
    ends, index = jnp.array([[prefix], [prefix // 2]]), jnp.arange(own)
    positions, valid = ends + index, index < jnp.array([[own], [own - 9]])
    asked = positions[:, own - queries :]
    before = causal(asked, jnp.arange(prefix)[None], jnp.arange(prefix) < ends)
    after = causal(asked, positions, valid)
    before, after = (reads.within(asked, 30, jnp.asarray(sliding)) for reads in (before, after))

    arrays = query, key, value, prefix_key, prefix_value
    both = [row_slopes(name, before, after, arrays) for name in (kernel, None)]
    for ours, theirs in zip(*(jax.tree.leaves(leaves) for leaves in both), strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rows_are_side_by_side_where_the_kernel_takes_them(
    kernel: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the scores of all rows' queries with all rows' keys would be in memory."""
    platform, takes = kernel.partition("-")[0], flash.takes
    monkeypatch.setattr(flash, "takes", lambda target, *given: target.platform == platform and takes(target, *given))

    def kernels(width: int, dtype: Any, rows: int = 8, queries: int = 24) -> int:
        query, own = jnp.zeros((rows, 2, queries, 4, width), dtype), jnp.zeros((rows, 2, 2, 24, width), dtype)
        none, positions = jnp.zeros((2, 2, 0, width), dtype), jnp.arange(24)[None]
        before, after = causal(positions[:, :queries], positions[:, :0]), causal(positions[:, :queries], positions)
        run = jax.make_jaxpr(lambda q, k, v: shared_prefix_attention(none, none, before, q, k, v, after))
        return str(run(query, own, own)).count("attention_kernel[")

    assert kernels(16, jnp.float32) == 1
    assert kernels(16, jnp.float16) == (platform == "cuda")
    assert kernels(12, jnp.float32) == kernels(16, jnp.float32, rows=2) == kernels(16, jnp.float32, 200, 1) == 0


def test_vmap_reads_what_is_not_mapped_once_for_all(kernel: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped queries, keys mapped by another axis, mapped masks; no operand is copied for the rows of another."""
    value = drawn(2, 1, 140, 16)
    query, other = drawn(3, 2, 2, 40, 16), drawn(2, 2, 1, 140, 16)
    reads = masked("window", 2, 40, 140)
    assert reads is not None
    high = jnp.stack([reads.high, reads.high - 9, reads.high - 400])
    shapes: list[tuple[int, ...]] = []
    ran = flash._run_forward
    monkeypatch.setattr(
        flash, "_run_forward", lambda *given: shapes.append(tuple(leaf.shape[0] for leaf in given[2:5])) or ran(*given)
    )
    flash._everywhere.cache_clear()

    def run(kernel: Implementation) -> Any:
        def one(query: jax.Array, key: jax.Array, high: jax.Array) -> Any:
            some = reads._replace(high=high)
            return jax.value_and_grad(lambda *arrays: total(kernel, some, *arrays)[0], (0, 1, 2))(query, key, value)

        inner = jax.vmap(one, in_axes=(0, None, 0))
        return jax.jit(jax.vmap(inner, in_axes=(None, 0, None)))(query, other, high)

    for ours, theirs in zip(jax.tree.leaves(run(kernel)), jax.tree.leaves(run("batched")), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 if ours.ndim == 2 else 2e-5)
    assert set(shapes) == {(3, 6, 1)}
    flash._everywhere.cache_clear()


def test_calls_outside_of_jit_compile_once(kernel: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, traced, ran = heads(1, 2, 1, 20, 30, 16), [], flash._run_forward
    monkeypatch.setattr(flash, "_run_forward", lambda *given: traced.append(given) or ran(*given))
    flash._everywhere.cache_clear()
    for _ in range(3):
        part(arrays[0], arrays[1], arrays[2], implementation=kernel)
    assert len(traced) == 1
    flash._everywhere.cache_clear()


def test_layers_with_and_without_a_window_share_a_program(kernel: Implementation) -> None:
    """In `scan` with recomputation, the flag traced; and inside `cond`."""
    layers = tuple(drawn(2, *array.shape, seed=number) for number, array in enumerate(heads(1, 2, 1, 130, 130, 16)))
    query, key = numbered(1, 130, 130)

    def run(kernel: Implementation, *layers: jax.Array) -> jax.Array:
        def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
            (q, k, v), sliding = given
            reads = causal(query, key).within(query, 20, sliding)
            return jax.lax.cond(
                x.sum() < 1e9, lambda q: part(q, k, v, reads, implementation=kernel).mixed, jnp.cos, q + x
            ), None

        start = jnp.zeros_like(layers[0][0])
        return jax.lax.scan(jax.checkpoint(layer), start, (layers, jnp.array([True, False])))[0]

    both = [
        jax.jit(jax.value_and_grad(lambda *layers, name=name: (run(name, *layers) ** 2).sum(), (0, 1, 2)))(*layers)
        for name in (kernel, "batched")
    ]
    for ours, theirs in zip(*(jax.tree.leaves(leaves) for leaves in both), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


SPLIT = PartitionSpec("data", "model")


def test_every_device_runs_its_prompts_and_heads(kernel: Implementation, mesh: Mesh) -> None:
    """Nothing is gathered, and what is read and the gradients lie where the queries and keys did."""
    arrays, reads = heads(4, 4, 2, 40, 130, 16), masked("window", 2, 40, 130)
    assert reads is not None
    reads = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), reads)
    spread = tuple(jax.device_put(array, NamedSharding(mesh, SPLIT)) for array in arrays)
    rows = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data"))), reads)

    def run(reads: Reads, *arrays: jax.Array) -> Any:
        return jax.value_and_grad(lambda *arrays: total(kernel, reads, *arrays), (0, 1, 2), has_aux=True)(*arrays)

    compiled = jax.jit(run).lower(rows, *spread).compile()
    assert all(word not in (compiled.as_text() or "") for word in ("all-gather", "all-to-all", "collective-permute"))
    (_, found), gradients = compiled(rows, *spread)
    wanted, expected = slopes("batched", reads, arrays)
    for ours, theirs in zip((*found, *gradients), (*wanted, *expected), strict=True):
        assert ours.sharding.is_equivalent_to(NamedSharding(mesh, SPLIT), ours.ndim)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_mesh_that_does_not_divide(kernel: Implementation, mesh: Mesh) -> None:
    """Three prompts, three heads with one mask for all: every device computes all of it."""
    arrays, reads = heads(3, 3, 3, 40, 130, 16), masked("padded", 1, 40, 130)
    spread = tuple(jax.device_put(array, NamedSharding(mesh, PartitionSpec())) for array in arrays)
    found, gradients = slopes(kernel, reads, spread)
    wanted, expected = slopes("batched", reads, arrays)
    for ours, theirs in zip((*found, *gradients), (*wanted, *expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_inside_shard_map(kernel: Implementation, mesh: Mesh) -> None:
    arrays = heads(4, 4, 2, 40, 130, 16)

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return jax.grad(lambda *arrays: total(kernel, None, *arrays)[0] * 2, (0, 1, 2))(query, key, value)

    # The interpreter does not know which arrays vary over the devices; kernels do, as the next test shows.
    ran = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT, check_vma=False))(*arrays)
    one = [jax.tree.map(lambda leaf: leaf[:1, : leaf.shape[1] // 2], arrays)]
    for ours, theirs in zip(ran, slopes("batched", None, one[0])[1], strict=True):
        np.testing.assert_allclose(ours[:1, : theirs.shape[1]], 2 * theirs, atol=1e-5)


def test_inside_a_checked_shard_map(kernel: Implementation, mesh: Mesh) -> None:
    """Lowered for its own platform, where every result has to say over which axes of the mesh it varies."""
    platform: Any = kernel.partition("-")[0]

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return jax.grad(lambda *arrays: total(platform, None, *arrays)[0], (0, 1, 2))(query, key, value)

    divided = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=SPLIT, out_specs=SPLIT))
    text = divided.trace(*heads(4, 4, 2, 40, 130, 16)).lower(lowering_platforms=(platform,)).as_text()
    for name in ("attention_forward", "attention_query_gradient", "attention_key_gradient"):
        assert name in text


def test_no_kernel_on_gpus_before_ampere_and_tpus_before_v5(
    kernel: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform, shapes = kernel.partition("-")[0], ((8, 32, 640, 128), (8, 8, 640, 128))
    old = {"cuda": ["7.5"], "tpu": ["TPU v3", "TPU v4", "TPU v4 lite"]}[platform]
    new = {"cuda": ["8.0", "10.0"], "tpu": ["TPU v5 lite", "TPU v5p", "TPU v6e", "TPU7x"]}[platform]
    for name in old + new:
        devices = {platform: [SimpleNamespace(compute_capability=name, device_kind=name)]}
        monkeypatch.setattr(jax, "devices", devices.__getitem__)
        assert chosen(platform, *shapes) == ("batched" if name in old else platform)


def test_inside_shard_map_over_one_axis(kernel: Implementation, mesh: Mesh) -> None:
    """Prompts are divided there, heads here; nothing is gathered."""
    arrays = heads(4, 4, 2, 40, 130, 16)

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return part(query, key, value, implementation=kernel).mixed

    half = PartitionSpec("data")
    divided = jax.shard_map(run, mesh=mesh, in_specs=half, out_specs=half, axis_names={"data"}, check_vma=False)
    spread = tuple(jax.device_put(array, NamedSharding(mesh, SPLIT)) for array in arrays)
    compiled = jax.jit(divided).lower(*spread).compile()
    assert "all-gather" not in (compiled.as_text() or "")
    wanted = read(*arrays, implementation="batched").mixed
    np.testing.assert_allclose(compiled(*spread), wanted, atol=1e-5)


def test_which_implementation_is_chosen(kernel: Implementation) -> None:
    platform, query, key = kernel.partition("-")[0], (8, 32, 640, 128), (8, 8, 640, 128)
    for dtype in (jnp.bfloat16, jnp.float32):
        assert chosen(platform, query, key, dtype) == platform
    assert chosen(platform, (8, 32, 8, 128), (8, 8, 16, 128)) == "batched"  # few scores
    assert chosen(platform, (8, 32, 640, 130), (8, 8, 640, 130)) == "batched"
    assert chosen(platform, (8, 32, 640, 512), (8, 8, 640, 512)) == "batched"
    assert chosen(platform, query, key, jnp.float64) == "batched"
    assert chosen("cpu", query, key) == "headwise" and chosen("cpu", (1, 1, 9, 64), (1, 1, 9, 64)) == "batched"
    assert chosen("rocm", query, key) == "batched"
    assert chosen(platform, (1, 8, 4, 128), (1, 8, 10**6, 128)) == ("batched" if platform == "tpu" else "cuda")
    assert flash.takes(Target("cuda"), query, key, jnp.float16) and not flash.takes(
        Target("tpu"), query, key, jnp.float16
    )
    assert attention._KERNEL_FROM <= 8 * 3000  # decoding: the queries of eight rows and a long prefix
