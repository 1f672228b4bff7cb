"""Greedy generation against Hugging Face's, against PyTorch hooks, and against full passes over growing prompts."""

import copy
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families.llava
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import CASES, Case
from fixtures import distance

from jaxid.errors import CheckpointError, InputError
from jaxid.families.base import Model
from jaxid.families.llava import LlavaProcessor
from jaxid.interp.forward import forward
from jaxid.interp.generate import Generation, generate
from jaxid.interp.interventions import Chain, Edit, add, chain, replace, scale
from jaxid.interp.trace import trace
from jaxid.nn.sites import Site, clean
from jaxid.prompts.processor import Prompts

over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
STEPS = 7
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
WRITER = families.llava.llava("llava-writer-8", text={"num_key_value_heads": 2, "rope_parameters": LINEAR})
"""Grouped queries. Of random models, named by their seeds, one that does not repeat itself."""


def vectors(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, 32)).astype(np.float32)


def stopping(model: Model, *stop_ids: int) -> Model:
    """The model with other stop tokens."""
    processor = copy.copy(model.processor)
    processor.stop_ids = stop_ids
    return dataclasses.replace(model, processor=processor)


@functools.cache
def writer() -> Model:
    """Never stops."""
    return stopping(fixtures.model(WRITER))


@pytest.fixture
def prompts() -> Prompts:
    return fixtures.prompts(WRITER)


def same(found: Generation, tokens: Any) -> None:
    np.testing.assert_array_equal(found.tokens, tokens)
    assert (found.lengths == found.tokens.shape[-1]).all()


# --- against PyTorch ------------------------------------------------------------------------------------------------


def torch_inputs(case: Case, row: int) -> dict[str, torch.Tensor]:
    """One prompt without padding."""
    inputs = fixtures.prompts(case).inputs
    ids = torch.tensor(np.asarray(inputs.token_ids[row : row + 1, : inputs.last[row] + 1])).long()
    pixels = torch.tensor(np.asarray(inputs.pixels)[row : row + 1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@over_cases
def test_tokens_are_those_of_hugging_face(case: Case) -> None:
    """Prompts of unequal length in one batch; one model's second prompt ends at once."""
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    written = generate(model, prompts, max_new_tokens=12)
    assert written.tokens.shape == (2, 12) and written.lengths.shape == written.texts.shape == (2,)
    for row in range(2):
        given = torch_inputs(case, row)
        theirs = fixtures.reference(case).generate(**given, max_new_tokens=12, do_sample=False)
        theirs = theirs[0, given["input_ids"].shape[1] :].numpy()
        np.testing.assert_array_equal(written.tokens[row, : written.lengths[row]], theirs)
        assert (written.tokens[row, written.lengths[row] :] == model.processor.stop_ids[0]).all()
        assert written.texts[row] == model.processor.tokenizer.decode(theirs, skip_special_tokens=True).strip()
    assert distance(written.first.logits, fixtures.recorded(case).logits) < 1e-5
    again = generate(model, fixtures.recorded(case), max_new_tokens=12)
    np.testing.assert_array_equal(again.tokens, written.tokens)


def written_by_torch(case: Case, row: int, layer: int, position: int, push: np.ndarray) -> list[int]:
    """A loop over PyTorch's own cache; a hook edits the prompt's pass alone."""
    network = fixtures.reference(case)

    def hook(_: Any, __: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        value = value.clone()
        value[0, position] += torch.tensor(push)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    given, tokens = torch_inputs(case, row), []
    handle = network.get_submodule(case.parts["blocks"])[layer].register_forward_hook(hook)
    with torch.no_grad():
        for _ in range(STEPS):
            try:
                output = network(**given, use_cache=True)
            finally:
                handle.remove()
            tokens.append(int(output.logits[0, -1].argmax()))
            mask = torch.ones(1, given["attention_mask"].shape[1] + 1, dtype=torch.long)
            given = {"input_ids": torch.tensor([tokens[-1:]]), "attention_mask": mask, **fixtures.carried(output)}
    return tokens


@over_cases
def test_steered_prompts_are_written_on_as_by_pytorch(case: Case) -> None:
    model, prompts = stopping(fixtures.model(case)), fixtures.prompts(case)
    layers, at, pushes = [0, 2], prompts.word(["star", "fish"]), 4 * vectors(2, 2)
    written = generate(model, fixtures.recorded(case), add(layers, at, pushes), max_new_tokens=STEPS)
    theirs = [
        [written_by_torch(case, row, layer, at[row], push[row]) for row in range(2)]
        for layer, push in zip(layers, pushes, strict=True)
    ]
    same(written, theirs)


# --- against full passes --------------------------------------------------------------------------------------------


def grown(prompts: Prompts, new: np.ndarray, room: int) -> Prompts:
    """The prompts with new tokens [B, n] behind them, and padding up to `room` tokens more."""
    inputs, batch = prompts.inputs, len(prompts)

    def longer(name: str, fill: int) -> np.ndarray:
        return np.pad(np.asarray(getattr(inputs, name)), ((0, 0), (0, room)), constant_values=fill)

    token_ids, valid, slots = longer("token_ids", 3), longer("valid", 0), longer("image_rows", -1)
    for row, last in enumerate(prompts.last()):
        token_ids[row, last + 1 : last + 1 + new.shape[1]] = new[row]
        valid[row, last + 1 : last + 1 + new.shape[1]] = True
    places = np.tile(np.arange(token_ids.shape[1], dtype=np.int32), (batch, 1))
    last = (prompts.last() + new.shape[1]).astype(np.int32)
    whole = dataclasses.replace(inputs, token_ids=token_ids, valid=valid, image_rows=slots, positions=places, last=last)
    return dataclasses.replace(prompts, inputs=whole, offsets=np.pad(prompts.offsets, ((0, 0), (0, room), (0, 0))))


def by_full_passes(model: Model, prompts: Prompts, edit: Any = clean, steps: int = STEPS) -> np.ndarray:
    """A pass over everything for every new token, under the edit each time."""
    tokens = np.zeros((len(prompts), 0), np.int32)
    for _ in range(steps):
        longer = grown(prompts, tokens, STEPS)
        logits = np.asarray(forward(model, longer, inside(edit, longer.last())).logits)
        tokens = np.concatenate([tokens, logits.argmax(axis=-1)[:, None].astype(np.int32)], axis=1)
    return tokens


def at_row(edit: Any, row: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[row], edit)


def inside(edit: Any, last: np.ndarray) -> Any:
    """The edit without the tokens after the last one: their positions repeat the first."""
    if isinstance(edit, Chain):
        return chain(*(inside(part, last) for part in edit.parts))
    if not isinstance(edit, Edit):
        return edit
    return dataclasses.replace(
        edit, positions=np.where(edit.positions <= last[:, None], edit.positions, edit.positions[..., :1])
    )


@functools.cache
def steered() -> Any:
    """Three rows of edits, at words of the prompt and at new tokens, in blocks and in the embedding."""
    prompts = fixtures.prompts(WRITER)
    word, last = prompts.word(["star", "fish"]), prompts.last()
    pushed = add([0, 2, 1], np.stack([word, last + 1, last + 4], axis=1), vectors(3), [3.0, 5.0, 4.0])
    damped = scale([1, 0, 2], np.stack([last, last + 2], axis=1), [-2.0, 3.0, 0.0], site="mlp_out")
    embedded = add([-1] * 3, np.stack([word, last + 2, last + 5], axis=1), vectors(3, seed=8), 2.0, site="embed")
    return chain(pushed, damped, embedded)


@functools.cache
def written(every_step: bool, chunk: int = 64) -> Generation:
    prompts = fixtures.prompts(WRITER)
    edit = steered() if every_step else inside(steered(), prompts.last())
    return generate(writer(), prompts, edit, max_new_tokens=STEPS, every_step=every_step, chunk=chunk)


def test_edits_at_every_step() -> None:
    """The recomputation edits new tokens whenever they are read; so does what is kept of them."""
    prompts = fixtures.prompts(WRITER)
    expected = [by_full_passes(writer(), prompts, at_row(steered(), row)) for row in range(3)]
    same(written(True), expected)
    unedited = by_full_passes(writer(), prompts)
    assert len(np.unique(unedited)) > 8
    assert all((tokens != unedited).any() for tokens in expected)


def test_edits_of_the_prompt_alone() -> None:
    prompts = fixtures.prompts(WRITER)
    kept = inside(steered(), prompts.last())
    same(written(False), [by_full_passes(writer(), prompts, at_row(kept, row)) for row in range(3)])
    assert (written(False).tokens != written(True).tokens).any()


def test_a_sweep_equals_a_loop_whatever_the_chunk(prompts: Prompts) -> None:
    whole, chunked = written(True), written(True, 2)
    np.testing.assert_array_equal(whole.tokens, chunked.tokens)
    assert distance(whole.first.hidden, chunked.first.hidden) < 1e-5
    alone = generate(writer(), prompts, at_row(steered(), 2), max_new_tokens=STEPS, every_step=True)
    assert alone.tokens.shape == (2, STEPS) and alone.first.hidden.shape == (2, 32)
    same(alone, written(True).tokens[2])


def test_the_first_token_is_read_as_in_a_full_pass(prompts: Prompts) -> None:
    full = forward(writer(), prompts, inside(steered(), prompts.last()))
    for every_step in (False, True):
        first = written(every_step).first
        assert first.logits.shape == (3, 2, 40) and first.captured == {}
        assert distance(first.logits, full.logits) < 1e-5
        np.testing.assert_array_equal(written(every_step).tokens[:, :, 0], np.argmax(full.logits, axis=-1))
        np.testing.assert_allclose(first.logprobs(["left", "right"]), full.logprobs(["left", "right"]), atol=1e-4)


def test_sweep_axes_and_texts(prompts: Prompts) -> None:
    """Axes of the sweep lead everywhere; a text holds what stands before the stop token."""
    grid = jax.tree.map(lambda leaf: np.asarray(leaf)[:, None], inside(steered(), prompts.last()))
    model = stopping(fixtures.model(WRITER), 2, *np.unique(written(False).tokens[:, :, 2]).tolist())
    found = generate(model, prompts, grid, max_new_tokens=STEPS)
    assert found.tokens.shape == (3, 1, 2, STEPS)
    assert found.lengths.shape == found.texts.shape == (3, 1, 2) and found.first.logits.shape == (3, 1, 2, 40)
    assert found.lengths.max() <= 3
    for row, prompt in np.ndindex(3, 2):
        length, tokens = found.lengths[row, 0, prompt], found.tokens[row, 0, prompt]
        np.testing.assert_array_equal(tokens[:length], written(False).tokens[row, prompt, :length])
        assert (tokens[length:] == 2).all()
        words = [families.VOCABULARY[token] for token in tokens[:length] if 5 <= token < len(families.VOCABULARY)]
        assert [*found.texts[row, 0, prompt].split()] == words


# --- full passes where nothing can be shared ------------------------------------------------------------------------


def damp(site: Site, value: jax.Array) -> jax.Array:
    """Acts at all places, new ones too."""
    here = (site.layer == 1) & (site.name == "mlp_out")
    return jnp.where(here, -2 * value, value)


def damp_until(last: np.ndarray) -> Callable[..., jax.Array]:
    def limited(site: Site, value: jax.Array) -> jax.Array:
        return jnp.where((site.positions <= jnp.asarray(last)[:, None])[..., None], damp(site, value), value)

    return limited


def test_plain_functions(prompts: Prompts) -> None:
    everywhere = generate(writer(), prompts, damp, max_new_tokens=STEPS, every_step=True)
    same(everywhere, by_full_passes(writer(), prompts, damp))
    in_prompt = generate(writer(), fixtures.recorded(WRITER), damp, max_new_tokens=STEPS)
    same(in_prompt, by_full_passes(writer(), prompts, damp_until(prompts.last())))
    assert (everywhere.tokens != in_prompt.tokens).any()


def test_edits_of_pictures_and_of_new_tokens(prompts: Prompts) -> None:
    at = np.concatenate([prompts.image_tokens(), prompts.last()[:, None] + [1, 3]], axis=1)
    edit = add([1, 0], at, 5 * vectors(2))
    found = generate(writer(), prompts, edit, max_new_tokens=STEPS, every_step=True)
    same(found, [by_full_passes(writer(), prompts, at_row(edit, row)) for row in range(2)])


def test_prompts_without_pictures() -> None:
    """Edited from their first token on: nothing is shared."""
    bare = writer().prepare(None, list(fixtures.QUESTIONS))
    edit = replace(1, np.array([[0, 5], [4, 9]]), vectors(2, 2), 0.7)
    same(generate(writer(), bare, edit, max_new_tokens=STEPS), by_full_passes(writer(), bare, edit))


def test_an_edited_trace_is_written_on(prompts: Prompts) -> None:
    edit = add(1, prompts.word("fish"), 5 * vectors())
    found = generate(writer(), trace(writer(), prompts, edit), max_new_tokens=STEPS)
    same(found, by_full_passes(writer(), prompts, edit))


# --- ends -----------------------------------------------------------------------------------------------------------


def cut(tokens: np.ndarray, stop_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens up to the first stop token, filled up; and how many they are."""
    tokens, ended = tokens.copy(), np.isin(tokens, stop_ids)
    lengths = np.where(ended.any(axis=-1), ended.argmax(axis=-1) + 1, tokens.shape[-1])
    tokens[np.arange(tokens.shape[-1]) >= lengths[..., None]] = stop_ids[0]
    return tokens, lengths


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_rows_end_with_a_stop_token_each_at_its_own(several: bool, prompts: Prompts) -> None:
    free = by_full_passes(writer(), prompts)
    rows = [tuple(dict.fromkeys(row.tolist())) for row in free]
    pairs = [(rows[0][2], rows[1][1])] if several else [(token,) for row in rows for token in row]
    seen = set()
    for stop_ids in pairs:
        found = generate(stopping(writer(), *stop_ids), fixtures.recorded(WRITER), max_new_tokens=STEPS)
        tokens, lengths = cut(free, stop_ids)
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_array_equal(found.lengths, lengths)
        seen |= set(lengths.tolist())
    assert several or {1, 2, STEPS} <= seen


def test_no_pass_is_run_once_all_rows_have_ended(prompts: Prompts) -> None:
    free = by_full_passes(writer(), prompts, damp)
    stop_ids = (int(free[0, 1]), int(free[1, 3]))
    passes = []

    def counted(site: Site, value: jax.Array) -> jax.Array:
        if site.name == "embed":
            jax.debug.callback(lambda: passes.append(value.shape[1]))
        return damp(site, value)

    model = stopping(writer(), *stop_ids)
    found = generate(model, prompts, counted, max_new_tokens=STEPS, every_step=True)
    jax.effects_barrier()
    tokens, lengths = cut(free, stop_ids)
    np.testing.assert_array_equal(found.tokens, tokens)
    assert 1 < lengths.max() < STEPS
    assert passes == [prompts.offsets.shape[1]] + [1] * (lengths.max() - 1)


def test_a_single_token(prompts: Prompts) -> None:
    found = generate(writer(), prompts, inside(steered(), prompts.last()), max_new_tokens=1, every_step=True)
    same(found, written(True).tokens[:, :, :1])


def test_bfloat16_writes_too() -> None:
    model = fixtures.model(CASES[0], "bfloat16")
    edit = add([0, 2], fixtures.prompts(CASES[0]).last(), vectors(2))
    found = generate(model, fixtures.prompts(CASES[0]), edit, max_new_tokens=3)
    assert found.tokens.shape == (2, 2, 3) and found.first.hidden.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.tokens[:, :, 0], np.argmax(found.first.logits, axis=-1))


@pytest.mark.parametrize(
    ("files", "stop_ids"),
    [
        ({"generation_config.json": {"eos_token_id": 7}, "config.json": {"eos_token_id": 8}}, (7,)),
        ({"generation_config.json": {"eos_token_id": [7, 9]}, "config.json": {"eos_token_id": 8}}, (7, 9)),
        ({"generation_config.json": {"max_length": 20}, "config.json": {"eos_token_id": 8}}, (8,)),
        ({"config.json": {"text_config": {"eos_token_id": [8, 5]}}}, (8, 5)),
        ({"config.json": {"eos_token_id": 0, "text_config": {"eos_token_id": 8}}}, (0,)),
        ({"config.json": {"eos_token_id": None, "text_config": None}}, (2,)),  # the tokenizer's </s>
    ],
)
def test_where_stop_tokens_are_found(tmp_path: Path, files: dict[str, Any], stop_ids: tuple[int, ...]) -> None:
    parts = shutil.ignore_patterns("config.json", "generation_config.json", "*.safetensors")
    folder = shutil.copytree(fixtures.folder(CASES[0]), tmp_path / "model", ignore=parts)
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields))
    assert LlavaProcessor.from_folder(folder, fixtures.model(CASES[0]).config).stop_ids == stop_ids


def test_an_unreadable_generation_config_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(fixtures.folder(CASES[0]), tmp_path / "model")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read as a JSON file"):
        LlavaProcessor.from_folder(folder, fixtures.model(CASES[0]).config)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_numbers_that_make_no_sense(prompts: Prompts) -> None:
    for number in (0, -3):
        with pytest.raises(InputError, match=f"max_new_tokens must be 1 or more, not {number}"):
            generate(writer(), prompts, max_new_tokens=number)
        with pytest.raises(InputError, match=f"chunk must be 1 or more, not {number}"):
            generate(writer(), prompts, chunk=number)


def test_edits_that_do_not_fit(prompts: Prompts) -> None:
    last = prompts.last()
    beyond = add(1, last + np.array([0, STEPS]), vectors())
    named = f"position {last[1] + STEPS} lies outside prompt 1, which ends at {last[1]}"
    with pytest.raises(InputError, match=f"{named}; what follows is padding"):
        generate(writer(), prompts, beyond, max_new_tokens=STEPS)
    with pytest.raises(InputError, match=f"{named} before {STEPS - 1} new tokens"):
        generate(writer(), prompts, beyond, max_new_tokens=STEPS - 1, every_step=True)
    with pytest.raises(InputError, match="layer 3 is out of range"):
        generate(writer(), prompts, scale(3, prompts.last(), 1.0), max_new_tokens=STEPS)


def test_traces_that_do_not_fit(prompts: Prompts) -> None:
    edit = add(1, prompts.last(), vectors())
    for intervention in (clean, edit):
        with pytest.raises(InputError, match=r"the trace was made by .*writer-8, not by .*llava-plain"):
            generate(fixtures.model(CASES[0]), fixtures.recorded(WRITER), intervention)
    edited = dataclasses.replace(fixtures.recorded(WRITER), edited=True)
    with pytest.raises(InputError, match="the trace is of an edited pass"):
        generate(writer(), edited, edit)
