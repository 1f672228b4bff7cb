"""Sweeps compile once per bucket of rows, and waste little on the rows that pad them."""

import functools
from typing import Any

import chex
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES
from fixtures import distance
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxid.devices import DEVICES, Device
from jaxid.interp import forward as forwards
from jaxid.interp import generate as generation
from jaxid.interp import trace
from jaxid.interp.forward import forward
from jaxid.interp.generate import generate
from jaxid.interp.interventions import add
from jaxid.interp.sweep import Sweep, bucket, rows_together
from jaxid.interp.trace import rerun, swap
from jaxid.nn import passes

EXACT = 1e-5
GQA = CASES[1]


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((*shape, 32)).astype(np.float32)


# --- buckets and chunks ---------------------------------------------------------------------------------------------


def test_buckets() -> None:
    found = [bucket(count) for count in range(1, 2000)]
    assert sorted(set(found))[:12] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(count <= size < 1.5 * count for count, size in enumerate(found, 1))
    assert all(bucket(size) == size for size in found)


def test_rows_keep_their_places() -> None:
    values = {"a": np.arange(30).reshape(5, 1, 3, 2), "b": jnp.arange(5.0).reshape(5, 1)}
    rows = Sweep((5, 1))
    flat = rows.flat(values)
    assert (rows.count, rows.rows) == (5, 6) and flat["a"].shape == (6, 3, 2) and flat["b"].shape == (6,)
    assert flat["b"].tolist() == [0, 1, 2, 3, 4, 0]
    back = rows.unflat(flat)
    for name, value in values.items():
        np.testing.assert_array_equal(back[name], value)
    assert Sweep(()).flat(np.arange(3)).shape == (1, 3) and Sweep(()).unflat(np.arange(3)[None]).shape == (3,)


def cost(start: np.ndarray, chunk: int, tokens: int, layers: int, device: Device) -> float:
    """The modelled time of the blocks that run, in tokens: rows are sorted, and the first of a chunk lets it join."""
    firsts, computing = np.sort(start)[::chunk], chunk * tokens
    # In bfloat16 a weight of two bytes takes two operations for each token; a CPU has 16 operations a byte, in float32.
    reading = device.flops / device.bandwidth * (2 if device.platform == "cpu" else 1)
    each = computing + reading if device.platform == "cpu" else max(computing, reading + 0.45 * computing)
    return float((firsts[:, None] <= np.arange(layers)).sum() * each)


@given(st.integers(1, 600), st.integers(1, 3000), st.sampled_from(list(DEVICES.values())))
@settings(derandomize=True, deadline=None, max_examples=400)
def test_chunks_fit(count: int, tokens: int, device: Device) -> None:
    rows = bucket(count)
    chunk = rows_together(rows, tokens, device)
    assert 1 <= chunk <= rows and chunk == bucket(chunk)
    if device.platform == "cpu":
        assert chunk == 1 or chunk * tokens <= 2048
    else:  # nothing is gained by twice what hides the reading of the weights, beside that of activations
        assert chunk == 1 or chunk * tokens < 2 * device.flops / device.bandwidth / 0.55


def test_chunks_on_a_cpu_are_those_that_were_measured() -> None:
    """(rows, tokens) -> rows together, as the benchmarks against PyTorch ran them."""
    chosen = {(48, 20): 8, (48, 80): 4, (48, 160): 3, (48, 640): 2, (512, 20): 32, (512, 160): 8, (24, 3000): 1}
    assert {pair: rows_together(*pair) for pair in chosen} == chosen


def test_an_accelerator_reads_weights_while_it_computes() -> None:
    """An H100 multiplies 295 tokens in the time in which it reads their weights in bfloat16; 537 with activations."""
    assert [rows_together(48, tokens, DEVICES["h100"]) for tokens in (20, 80, 160, 295, 640)] == [24, 8, 4, 2, 1]


@pytest.mark.parametrize("tokens", [1, 7, 20, 80, 160, 640, 3000])
@pytest.mark.parametrize("device", ["cpu", "h100", "v6e"])
def test_fewer_than_half_as_many_rows_are_computed_in_vain(tokens: int, device: str) -> None:
    """Whatever the number of rows: chunks divide the bucket, and those that hold only padding are skipped."""
    sizes = np.array([bucket(count) for count in range(1, 601)])
    chunks = {size: rows_together(size, tokens, DEVICES[device]) for size in set(sizes.tolist())}
    for count, size in enumerate(sizes.tolist(), 1):
        chunk = chunks[size]
        assert size % chunk == 0 and -(-count // chunk) * chunk < 1.5 * count


SWEEPS = {
    "every layer once": np.arange(32),
    "every fourth layer": np.arange(0, 32, 4),
    "a grid at every layer": np.repeat(np.arange(32), 16),
    "a grid at every second layer": np.repeat(np.arange(0, 32, 2), 16),
    "a grid at five layers": np.repeat([4, 10, 16, 22, 28], 16),
    "a grid at one layer": np.full(16, 10),
    "one edit": np.array([31]),
}


@pytest.mark.parametrize("tokens", [20, 80, 160, 640])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SWEEPS)
def test_chunks_cost_little_more_than_the_best(name: str, device: str, tokens: int) -> None:
    """Though the layers are not looked at."""
    start, layers, chip = SWEEPS[name], 32, DEVICES[device]
    chunk = rows_together(bucket(len(start)), tokens, chip)
    most = 2048 if device == "cpu" else 10**9
    costs = [cost(start, size, tokens, layers, chip) for size in range(1, len(start) + 1) if size * tokens <= most]
    limit = 1.35 if name == "a grid at one layer" else 1.2
    assert cost(start, chunk, tokens, layers, chip) <= limit * min(costs)


# --- compilation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the programs that run a sweep may be compiled once."""
    programs = (trace._resume, forwards._run, forwards._answer_log_probs, generation._prefill, generation._decode)
    for program in programs:
        getattr(program, "clear_cache")()  # noqa: B009 - jax.jit's type does not list it
    chex.clear_trace_counter()
    for module, name in (
        (passes, "resume"),
        (passes, "prefill"),
        (passes, "decode"),
        (forwards, "_pass"),
        (forwards, "log_probs"),
    ):
        monkeypatch.setattr(module, name, chex.assert_max_traces(getattr(module, name), n=1))


LAYER_SETS: list[list[int]] = [[0, 1, 2, 0, 1], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0], [1, 0, 2, 2, 1, 0]]
"""Of five layers and six, which share a bucket."""


@pytest.mark.usefixtures("once")
def test_edits_at_other_layers_and_other_numbers_of_layers() -> None:
    model, recorded, prompts = fixtures.model(GQA), fixtures.recorded(GQA), fixtures.prompts(GQA)
    words, pushes = np.stack([prompts.word("fish"), prompts.last()], axis=1), vectors(6, 2, 2)
    outputs = [rerun(model, recorded, add(layers, words, pushes[: len(layers)])) for layers in LAYER_SETS]
    found = [np.asarray(output.logprobs([14, 16])) for output in outputs]
    by_layer = np.stack([np.asarray(outputs[k].hidden[0]) for k in (0, 3, 1)])
    assert [len(values) for values in found] == [5, 5, 6, 6]
    for output, layers in zip(outputs, LAYER_SETS, strict=True):
        assert distance(output.hidden[0], by_layer[layers[0]]) < EXACT


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("pictures", [False, True])
def test_swaps_after_other_layers(pictures: bool) -> None:
    model, recorded = fixtures.model(GQA), fixtures.recorded(GQA)
    mirrored = model.prepare([picture[:, ::-1] for picture in fixtures.pictures()], fixtures.QUESTIONS)
    other = trace.trace(model, mirrored)
    for layers in LAYER_SETS:
        if pictures:
            output = rerun(model, recorded, pictures_of=other, after=layers)
        else:
            output = rerun(model, recorded, swap(other, layers, "text"))
        output.logprobs([14, 16])


@pytest.mark.usefixtures("once")
def test_a_grid_of_cells_at_other_layers() -> None:
    """Steering: every layer times 4 x 4 cells."""
    model, recorded, prompts = fixtures.model(GQA), fixtures.recorded(GQA), fixtures.prompts(GQA)
    for layers in ([0, 1], [1, 2], [2, 0]):
        grid = np.broadcast_to(np.array(layers)[:, None, None], (2, 4, 4))
        output = rerun(model, recorded, add(grid, prompts.last(), vectors(2, 4, 4)))
        assert output.logprobs([14, 16]).shape == (2, 4, 4, 2, 2)


@pytest.mark.usefixtures("once")
def test_full_passes_of_other_layers() -> None:
    model, prompts = fixtures.model(GQA), fixtures.prompts(GQA)
    for layers in LAYER_SETS:
        forward(model, prompts, add(layers, prompts.last(), vectors(len(layers)))).logprobs([14, 16])


@pytest.mark.usefixtures("once")
def test_texts_written_under_edits_at_other_layers() -> None:
    model, recorded, prompts = fixtures.model(GQA), fixtures.recorded(GQA), fixtures.prompts(GQA)
    for layers in LAYER_SETS:
        edit = add(layers, prompts.last(), 10 * vectors(len(layers)))
        assert generate(model, recorded, edit, max_new_tokens=3).tokens.shape == (len(layers), 2, 3)


# --- padding changes nothing ----------------------------------------------------------------------------------------


PADDED = [2, 0, 1, 0, 2]
"""Layers of the rows; their bucket has a sixth."""


def edit(vector: Any, row: int | None = None) -> Any:
    """Of all rows, or of one."""
    layers, at = PADDED if row is None else PADDED[row], fixtures.prompts(GQA).last()
    return add(layers, at, vector if row is None else vector[row])


@functools.cache
def rows_alone() -> list[tuple[Any, Any]]:
    """What a full pass finds for each row by itself, and the tokens that are written after it."""
    model, recorded, prompts, pushes = (
        fixtures.model(GQA),
        fixtures.recorded(GQA),
        fixtures.prompts(GQA),
        10 * vectors(5),
    )
    singles = [edit(pushes, row) for row in range(5)]
    return [
        (forward(model, prompts, single), np.asarray(generate(model, recorded, single, max_new_tokens=3).tokens))
        for single in singles
    ]


@functools.cache
def slope() -> np.ndarray:
    """Of full passes, by the pushes."""
    model, prompts = fixtures.model(GQA), fixtures.prompts(GQA)
    return np.asarray(jax.grad(lambda v: forward(model, prompts, edit(v)).hidden.sum())(10 * vectors(5)))


@pytest.mark.parametrize("chunk", [None, 1, 4, 7])
def test_padded_sweeps_are_their_rows(chunk: int | None) -> None:
    """Also where the last chunk holds only padding, or more than the bucket does."""
    model, recorded, prompts, pushes = (
        fixtures.model(GQA),
        fixtures.recorded(GQA),
        fixtures.prompts(GQA),
        10 * vectors(5),
    )
    again, whole = (
        rerun(model, recorded, edit(pushes), chunk=chunk),
        forward(model, prompts, edit(pushes), chunk=chunk),
    )
    written = generate(model, recorded, edit(pushes), max_new_tokens=3, chunk=chunk or 64)
    for row, (alone, tokens) in enumerate(rows_alone()):
        assert distance(again.hidden[row], alone.hidden) < EXACT and distance(whole.hidden[row], alone.hidden) < EXACT
        assert distance(again.logits[row], alone.logits) < EXACT
        np.testing.assert_array_equal(written.tokens[row], tokens)
    found = jax.grad(lambda v: rerun(model, recorded, edit(v), chunk=chunk).hidden.sum())(pushes)
    assert distance(found, slope()) < EXACT
