"""Decoders of every kind: tensors and outputs are Hugging Face's; norms, sliding windows, cross-attention."""

import copy
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families.base import LLAMA3, randomized
from flax import nnx
from key_tables import abstract_of, assert_table_fits, module_of
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mllama.modeling_mllama import MllamaTextModel, _prepare_cross_attention_mask

from jaxid.checkpoints.tensors import flatten, unflatten
from jaxid.errors import CheckpointError
from jaxid.families.mllama_decoder import MllamaDecoder, mllama_decoder_keys
from jaxid.kernels.masks import Reads, causal
from jaxid.nn.decoder import Decoder
from jaxid.nn.decoder_config import FULL, KINDS, SLIDING, DecoderConfig, RopeConfig, decoder_config, decoder_keys
from jaxid.nn.layers import RMSNorm, rms_norm
from jaxid.nn.passes import forward
from jaxid.nn.sites import DECODER_SITES, Capture, clean
from jaxid.nn.views import Memory, Prefix, Tokens

# --- tensors and outputs --------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {"rope_theta": 70.0},
    "qwen2_vl_text": {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "rope_theta": 80.0},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 90.0, "mrope_section": [1, 2, 3]}},
    "gemma3_text": {
        "head_dim": 20,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": [FULL, SLIDING, FULL],
        "sliding_window": 3,
    },
    "mllama_text_model": {"cross_attention_layers": [1], "rope_scaling": LLAMA3},
}
"""Additional settings of the tiny decoders of every kind."""


@functools.cache
def reference(kind: str) -> Any:
    """A tiny random PyTorch decoder of that kind."""
    config: Any = transformers.AutoConfig.for_model(kind, **copy.deepcopy(SMALL | TINY[kind]))
    config._attn_implementation = "eager"
    # The Auto classes know no Mllama decoder without its tower.
    build = MllamaTextModel if kind == "mllama_text_model" else transformers.AutoModel.from_config
    return randomized(build(config), kind)


def build(kind: str, config: DecoderConfig) -> Decoder:
    """A decoder of that kind."""
    return (MllamaDecoder if kind == "mllama_text_model" else Decoder)(config, rngs=nnx.Rngs(0))


def keys_of(kind: str, config: DecoderConfig) -> Any:
    """Its key table."""
    return (mllama_decoder_keys if kind == "mllama_text_model" else decoder_keys)(config)


@functools.cache
def ours(kind: str) -> Decoder:
    """The same decoder here."""
    theirs = reference(kind)
    config = decoder_config(json.loads(theirs.config.to_json_string()), "llama")
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return module_of(lambda: build(kind, config), keys_of(kind, config), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_frequencies_are_hugging_faces(kind: str) -> None:
    theirs, decoder = reference(kind), ours(kind)
    config, rotary = decoder.config, theirs.rotary_emb
    abstract = abstract_of(lambda: build(kind, config))
    keys = keys_of(kind, config)
    assert_table_fits(keys, abstract, {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()})
    assert {key.target for key in keys} == set(abstract) - {"unembedding"}
    assert ("unembedding" in abstract) == (not config.tie_word_embeddings)
    assert decoder.unembed_matrix().shape == (config.hidden_size, config.vocab_size)
    two = kind == "gemma3_text"
    for rope, buffer in ((config.rope, "full_attention_inv_freq"), (config.sliding_rope, "sliding_attention_inv_freq")):
        if rope is not None:
            frequencies = getattr(rotary, buffer if two else "inv_freq").numpy()
            np.testing.assert_allclose(rope.frequencies(config.head_dim), frequencies, rtol=1e-6)
    if config.rope.mrope_section:
        assert config.rope.mrope_section == tuple(rotary.mrope_section)


IDS = np.random.default_rng(0).integers(4, 40, (2, 9)).astype(np.int32)
VALID = np.arange(9) < np.array([9, 6])[:, None]
PLACES = jnp.tile(jnp.arange(9), (2, 1))
CAUSAL = causal(PLACES, PLACES, jnp.asarray(VALID))


@functools.partial(jax.jit, static_argnames="definition")
def _run(definition: Any, state: Any, x: Any, rope_positions: Any, memory: Any) -> Any:
    decoder = nnx.merge(definition, state)
    return forward(decoder, x, PLACES, CAUSAL, clean, Capture(), rope_positions=rope_positions, memory=memory).hidden


def run(decoder: Decoder, *, x: Any = None, rope_positions: Any = None, memory: Memory | None = None) -> np.ndarray:
    """Final hidden states of the prompts."""
    x = decoder.embed(jnp.asarray(IDS)) if x is None else x
    return np.asarray(_run(*nnx.split(decoder), x, rope_positions, memory))


def theirs_run(model: Any, **more: Any) -> np.ndarray:
    with torch.no_grad():
        ids, valid = torch.tensor(IDS).long(), torch.tensor(VALID).long()
        return model(input_ids=ids, attention_mask=valid, use_cache=False, **more).last_hidden_state.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_hugging_faces(kind: str) -> None:
    """Mllama's without a picture; Gemma's in prompts longer than its window."""
    decoder, wanted = ours(kind), theirs_run(reference(kind))
    assert (decoder.window(9) is not None) == (kind == "gemma3_text")
    np.testing.assert_allclose(run(decoder)[VALID], wanted[VALID], atol=2e-5)


@pytest.mark.parametrize("kind", ["qwen2_vl_text", "qwen2_5_vl_text"])
def test_positions_along_three_axes_are_hugging_faces(kind: str) -> None:
    positions = np.random.default_rng(1).integers(0, 30, (2, 3, 9))
    wanted = theirs_run(reference(kind), position_ids=torch.tensor(positions.swapaxes(0, 1)))
    found = run(ours(kind), rope_positions=jnp.asarray(positions))
    np.testing.assert_allclose(found[VALID], wanted[VALID], atol=2e-5)
    assert np.abs(found - run(ours(kind)))[VALID].max() > 0.01


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_are_hugging_faces(offset: float, dtype: str) -> None:
    """To the last bit in bfloat16: Gemma rounds after the multiplication, Llama before it."""
    rng = np.random.default_rng(2)
    x, scale = 3 * rng.standard_normal((5, 64), np.float32), rng.standard_normal(64, np.float32)
    theirs = (Gemma3RMSNorm if offset else LlamaRMSNorm)(64, eps=1e-3).to(getattr(torch, dtype))
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        wanted = theirs(torch.tensor(x).to(getattr(torch, dtype))).float().numpy()
    found = rms_norm(jnp.asarray(x, dtype), jnp.asarray(scale, dtype), 1e-3, offset)
    assert found.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=1e-6, atol=1e-6 if dtype == "float32" else 0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_start_as_plain_division(offset: float) -> None:
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 8), np.float32))
    np.testing.assert_allclose(jnp.square(RMSNorm(8, 0.0, offset)(100 * x)).mean(axis=-1), 1.0, rtol=1e-5)
    plain = rms_norm(x, jnp.ones(8), 0.1)
    np.testing.assert_array_equal(RMSNorm(8, 0.1, offset)(x), plain)
    assert float(jnp.square(plain).mean()) < 0.98  # epsilon counts


# --- sliding windows, embeddings, scores ----------------------------------------------------------------------------


def tiny(kind: Any = Decoder, **fields: Any) -> Any:
    sizes = {name: value for name, value in SMALL.items() if not name.endswith("token_id")}
    return kind(DecoderConfig(**{**sizes, "head_dim": 12, **fields}), rngs=nnx.Rngs(4))


def test_window_counts_only_where_prompts_are_longer() -> None:
    sliding = tiny(layer_types=(FULL, SLIDING, FULL), sliding_window=6)
    assert sliding.config.slides == (False, True, False)
    assert [sliding.window(tokens) for tokens in (1, 6, 7, 100)] == [None, None, 6, 6]
    for everywhere in (tiny(), tiny(sliding_window=6), tiny(layer_types=(FULL,) * 3, sliding_window=6)):
        assert everywhere.config.slides == (False,) * 3 and everywhere.window(100) is None
    with pytest.raises(CheckpointError, match="sliding_window is missing"):
        tiny(layer_types=(FULL, SLIDING, FULL))


@pytest.mark.parametrize(
    ("types", "changed"),
    [((SLIDING,) * 3, 7), ((SLIDING, FULL, SLIDING), 9), ((FULL, SLIDING, SLIDING), 9), ((SLIDING,), 3), ((), 9)],
    ids=lambda part: " ".join(kind[0] for kind in part) if isinstance(part, tuple) else str(part),
)
def test_how_far_a_token_reaches(types: tuple[str, ...], changed: int) -> None:
    """Every sliding layer carries it on by two places; a single layer of full attention to the end."""
    decoder = tiny(layer_types=types, sliding_window=3, num_hidden_layers=len(types) or 1)
    x = decoder.embed(jnp.asarray(IDS))
    other = x.at[:, 0].add(1.0)
    difference = np.abs(run(decoder, x=x) - run(decoder, x=other)).max(axis=-1)
    reached = np.arange(9) < changed
    # Padding whose window holds nothing reads anything.
    np.testing.assert_array_equal((difference > 1e-6)[VALID], np.tile(reached, (2, 1))[VALID])
    assert (difference[0, ~reached] == 0).all()


def test_a_window_longer_than_the_prompt_changes_nothing() -> None:
    wide, none = tiny(layer_types=(SLIDING,) * 3, sliding_window=9), tiny()
    np.testing.assert_array_equal(run(wide), run(none))
    narrow = tiny(layer_types=(SLIDING,) * 3, sliding_window=8)
    difference = np.abs(run(narrow) - run(none)).max(axis=-1)
    assert difference[0, 8] > 1e-6 and difference[:, :8].max() < 1e-6


def test_sliding_layers_turn_by_their_own_frequencies() -> None:
    slow, fast = RopeConfig(rope_theta=1e6), RopeConfig(rope_theta=3.0)

    def hidden(first: str, **ropes: RopeConfig) -> np.ndarray:
        return run(tiny(num_hidden_layers=1, layer_types=(first,), sliding_window=50, **ropes))

    np.testing.assert_allclose(hidden(SLIDING, rope=slow, sliding_rope=fast), hidden(FULL, rope=fast), atol=1e-6)
    np.testing.assert_allclose(hidden(FULL, rope=slow, sliding_rope=fast), hidden(FULL, rope=slow), atol=1e-6)
    assert np.abs(hidden(FULL, rope=slow) - hidden(FULL, rope=fast)).max() > 1e-3


def test_scores_are_divided_by_the_root_of_their_own_number() -> None:
    """As if queries were that much larger."""
    same, four = tiny(query_pre_attn_scalar=12.0), tiny(query_pre_attn_scalar=3.0)
    np.testing.assert_allclose(run(same), run(tiny()), atol=1e-6)
    larger = tiny()
    larger.layers.attention.query[...] = 2 * larger.layers.attention.query[...]
    np.testing.assert_allclose(run(four), run(larger), atol=1e-5)
    assert np.abs(run(four) - run(same)).max() > 1e-3


def test_embeddings() -> None:
    """Of tokens that are never written too; scaled by a rounded number, as published."""
    decoder = tiny(extra_embeddings=8, embedding_scale=48**0.5)
    assert decoder.embedding.shape == (48, 48) and decoder.unembed_matrix().shape == (48, 40)
    ids = jnp.array([[0, 39, 47]])
    np.testing.assert_allclose(decoder.embed(ids)[0], 48**0.5 * decoder.embedding[...][ids[0]], rtol=1e-6)
    tied = tiny(tie_word_embeddings=True)
    assert not hasattr(tied, "unembedding")
    np.testing.assert_array_equal(tied.unembed_matrix(), tied.embedding[...].T)
    decoder.embedding = nnx.Param(decoder.embedding[...].astype(jnp.bfloat16))
    scale = jnp.asarray(48**0.5, jnp.bfloat16)
    np.testing.assert_array_equal(decoder.embed(ids)[0], decoder.embedding[...][ids[0]] * scale)


# --- cross-attention ------------------------------------------------------------------------------------------------

FLOAT32: Any = torch.float32
STATES = np.random.default_rng(5).standard_normal((2, 8, 48), np.float32)
SEEN = np.ones((2, 9, 8), bool)
SEEN[:, :2] = False  # the text before the picture
SEEN[0, 2:5, 4:] = False  # the first prompt's second picture comes later
SEEN[1, :, 4:] = False  # the second prompt has one only
ROWS = np.asarray(SEEN.any(axis=-1))


@functools.partial(jax.jit, static_argnames="definition")
def _remember(definition: Any, state: Any, states: Any, reads: Reads) -> Memory:
    return nnx.merge(definition, state).remember(states, reads, jnp.asarray(ROWS))


def memory_of(decoder: Any, states: np.ndarray = STATES) -> Memory:
    """The second picture's tokens have the position 1; tokens before the picture read all of them."""
    high = np.where(ROWS, SEEN[:, :, 4].astype(np.int32), 1)
    reads = Reads(high=jnp.asarray(high), positions=jnp.asarray(np.repeat([[0, 1]], 4, axis=1).repeat(2, axis=0)))
    np.testing.assert_array_equal(reads.mask(), SEEN | ~ROWS[..., None])
    return _remember(*nnx.split(decoder), states, reads)


CROSSED = {"cross_attention_layers": (1, 2), "num_hidden_layers": 4}


def test_memory_of_every_cross_attention_layer() -> None:
    decoder = tiny(MllamaDecoder, **CROSSED)
    memory = memory_of(decoder)
    assert memory.keys.shape == memory.values.shape == (2, 2, 2, 8, 12)  # layers, prompts, heads, tokens, width
    np.testing.assert_array_equal(memory.rows, ROWS)
    norms = jnp.square(memory.keys).mean(axis=-1)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-3)
    for number, layer in enumerate((1, 2)):
        kernel = decoder.layers.attention.value[...][layer]
        wanted = (STATES @ kernel).reshape(2, 8, 2, 12).swapaxes(1, 2)
        np.testing.assert_allclose(memory.values[number], wanted, atol=1e-5)


def test_pictures_are_hugging_faces() -> None:
    """With tokens that see no picture, some that see one of two, and a prompt with one only."""
    kind = "mllama_text_model"
    tiles = torch.tensor(SEEN[:, :, ::4]).float()[:, :, None]  # [B, T, pictures, tiles], four tokens a tile
    allowed, rows = _prepare_cross_attention_mask(tiles, num_vision_tokens=4, dtype=FLOAT32)
    wanted = theirs_run(
        reference(kind),
        cross_attention_states=torch.tensor(STATES),
        cross_attention_mask=allowed,
        full_text_row_masked_out_mask=rows,
    )
    np.testing.assert_array_equal(rows[:, 0, :, 0].numpy().astype(bool), ROWS)
    found = run(ours(kind), memory=memory_of(ours(kind)))
    np.testing.assert_allclose(found[VALID], wanted[VALID], atol=2e-5)
    assert np.abs(found - run(ours(kind)))[VALID].max() > 0.01


def test_text_alone_skips_the_cross_attention_blocks() -> None:
    crossed, short = tiny(MllamaDecoder, **CROSSED), tiny(num_hidden_layers=2)
    leaves = flatten(nnx.to_pure_dict(nnx.state(crossed)))
    kept = {
        name: leaf[jnp.array([0, 3])] if name.startswith("layers.") else leaf
        for name, leaf in leaves.items()
        if not name.startswith("crossing.")
    }
    nnx.update(short, nnx.State(unflatten(kept)))
    np.testing.assert_allclose(run(crossed), run(short), atol=1e-6)


def test_a_token_is_changed_by_the_pictures_it_sees_only() -> None:
    decoder = tiny(MllamaDecoder, **CROSSED)
    second = STATES.copy()
    second[:, 4:] += np.random.default_rng(6).standard_normal((2, 4, 48), np.float32)
    difference = np.abs(run(decoder, memory=memory_of(decoder)) - run(decoder, memory=memory_of(decoder, second)))
    # Tokens that see none read all of them here, and their MLP is shut: what they read goes on nevertheless.
    assert (difference.max(axis=-1)[0, 5:] > 1e-5).all()
    crossed = tiny(MllamaDecoder, cross_attention_layers=(0,), num_hidden_layers=1)
    one = np.abs(run(crossed, memory=memory_of(crossed)) - run(crossed, memory=memory_of(crossed, second)))
    changed = (one.max(axis=-1) > 1e-6)[VALID]
    sees = (SEEN[:, :, 4:].any(axis=-1) | ~ROWS)[VALID]
    np.testing.assert_array_equal(changed, sees)


def test_shut_gates_leave_the_text_as_it_is() -> None:
    decoder = tiny(MllamaDecoder, **CROSSED)
    for gate in (decoder.crossing.attention_gate, decoder.crossing.mlp_gate):
        assert gate.shape == (2, 1)
        gate[...] = jnp.zeros_like(gate[...])
    np.testing.assert_allclose(run(decoder, memory=memory_of(decoder)), run(decoder), atol=1e-6)


def test_values_of_every_site_have_one_shape() -> None:
    """Also where blocks differ: a cross-attention layer's values are stacked with the others'."""
    decoder = tiny(MllamaDecoder, **CROSSED)
    memory, x = memory_of(decoder), decoder.embed(jnp.asarray(IDS))
    capture = Capture(("embed", *DECODER_SITES), jnp.array([[0, 8], [1, 5]]))
    hidden, captured = forward(decoder, x, PLACES, CAUSAL, clean, capture, memory=memory)
    assert hidden.shape == (2, 9, 48) and captured["embed"].shape == (2, 2, 48)
    assert {captured[site].shape for site in DECODER_SITES} == {(4, 2, 2, 48)}
    np.testing.assert_array_equal(captured["resid_post"][:-1], captured["resid_pre"][1:])
    after = captured["resid_pre"] + captured["attn_out"] + captured["mlp_out"]
    np.testing.assert_allclose(after, captured["resid_post"], atol=1e-5)
    # The MLP of a cross-attention layer adds nothing to a token that sees no picture.
    silent = np.abs(captured["mlp_out"]).max(axis=-1) == 0
    assert not ROWS[0, 0] and not ROWS[1, 1]
    np.testing.assert_array_equal(silent[:, :, 0], [[False] * 2, [True] * 2, [True] * 2, [False] * 2])
    assert not silent[:, :, 1].any()


# --- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 2])
def test_padding_at_the_last_position_is_not_read(window: int | None) -> None:
    """Tokens after the end of the prompts' arrays have the position of the last one, and no real token reads them."""
    angles = (jnp.ones((1, 4, 6)), jnp.zeros((1, 4, 6)))
    tokens = Tokens(jnp.array([[5, 6, 7, 7]]), angles, (True,), window)
    empty = jnp.zeros((1, 1, 2, 8, 12))
    view = Prefix(tokens, empty, empty, jnp.ones((1, 5), bool))
    stored = (jnp.zeros((1, 1, 2, 4, 12)), jnp.zeros((1, 1, 2, 4, 12)))
    for keep in (None, jnp.array([[2, 0]])):
        *_, reads = view.own(0, stored, keep)
        mask = np.asarray(tokens.within(0, reads, keep).mask())[0]
        seen = np.tril(np.ones((4, 4), bool)) & (np.triu(np.ones((4, 4), bool), -1) if window else True)
        rows = [0, 1, 2] if keep is None else [2, 0]  # the last row is padding
        np.testing.assert_array_equal(mask[: len(rows)], seen[rows])
