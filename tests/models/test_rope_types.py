"""Every kind of rotary embedding is Hugging Face's, within the context that a model was trained on and beyond it."""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families.base import LLAMA3, Case, as_written, randomized
from families.llava import llava
from flax import nnx
from key_tables import module_of
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding, MllamaTextModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

import jaxid
from jaxid.kernels.masks import causal
from jaxid.nn.decoder import Decoder
from jaxid.nn.decoder_config import FULL, SLIDING, decoder_config, decoder_keys
from jaxid.nn.passes import forward
from jaxid.nn.sites import Capture, clean

CONTEXT, PAIRS = 8, 6
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "yarn-all": {
        "factor": 3.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 6.0,
        "beta_slow": 1.5,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "yarn-attention": {"factor": 8.0, "attention_factor": 1.3, "rope_theta": 50.0},
    "yarn-null": {"factor": None, "original_max_position_embeddings": 2},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0],
        "original_max_position_embeddings": CONTEXT,
        "factor": 4.0,
    },
    "longrope-ratio": {
        "short_factor": [1.0] * PAIRS,
        "long_factor": [1.5] * PAIRS,
        "original_max_position_embeddings": 4,
    },
}
"""Settings of every kind; the suffix after a dash distinguishes settings of one kind."""

ROTARY: dict[str, Any] = {
    "llama": LlamaRotaryEmbedding,
    "qwen2_5_vl_text": Qwen2_5_VLRotaryEmbedding,
    "gemma3_text": Gemma3RotaryEmbedding,
    "mllama_text_model": MllamaRotaryEmbedding,
}
SIZES = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2 * PAIRS,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


WHOLE = [
    ("llama", "dynamic"),
    ("llama", "longrope"),
    ("qwen2", "yarn-all"),
    ("qwen2_vl_text", "longrope-ratio"),
    ("qwen2_5_vl_text", "yarn"),
    ("gemma3_text", "dynamic"),
    ("gemma3_text", "yarn-attention"),
]
"""Each compiles once, whatever the lengths of the prompts."""


def fields_of(decoder: str, name: str) -> dict[str, Any]:
    """A text config with one kind of rotary embedding."""
    settings = {"rope_type": name.split("-")[0], "rope_theta": 300.0, **copy.deepcopy(KINDS[name])}
    fields = {**SIZES, "rope_parameters": settings}
    if decoder.startswith("qwen2_"):
        settings["mrope_section"] = [1, 2, 3]
    if decoder == "gemma3_text":
        settings.pop("truncate", None)
        sliding = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 40.0}
        fields |= {"layer_types": [FULL, SLIDING], "sliding_window": 5}
        fields["rope_parameters"] = {FULL: settings, SLIDING: sliding}
    if decoder == "mllama_text_model":
        fields["cross_attention_layers"] = []
    return fields


def config_of(decoder: str, fields: dict[str, Any]) -> Any:
    config: Any = transformers.AutoConfig.for_model(decoder, **copy.deepcopy(fields))
    config._attn_implementation = "eager"
    return config


def build(config: Any) -> Any:
    kind = MllamaTextModel if config.model_type == "mllama_text_model" else transformers.AutoModel.from_config
    return randomized(kind(config), config.model_type)


def ours_of(theirs: Any, fields: dict[str, Any]) -> Decoder:
    config = decoder_config({"model_type": theirs.config.model_type, **copy.deepcopy(fields)}, "llama")
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return module_of(lambda: Decoder(config, rngs=nnx.Rngs(0)), decoder_keys(config), tensors)


@functools.partial(jax.jit, static_argnames="definition")
@chex.assert_max_traces(len(WHOLE))
def run(definition: Any, state: Any, ids: Any, valid: Any, last: Any) -> jax.Array:
    decoder = nnx.merge(definition, state)
    places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    rope_positions = None
    if decoder.config.rope.mrope_section:
        rope_positions = jnp.broadcast_to(places[:, None], (len(ids), 3, ids.shape[1]))
    mask = causal(places, places, valid)
    embedded = decoder.embed(ids)
    given = (embedded, places, mask, clean, Capture())
    return forward(decoder, *given, rope_positions=rope_positions, last=last).hidden


@pytest.mark.parametrize(("decoder", "name"), WHOLE)
def test_whole_prompts_are_hugging_faces(decoder: str, name: str) -> None:
    """Within the context and beyond it, in padded batches; different amounts of padding change nothing."""
    fields, padded = fields_of(decoder, name), 16
    theirs = build(config_of(decoder, fields))
    ours = ours_of(theirs, fields)
    for lengths in ([5, 3], [CONTEXT, 6], [13, 6], [3, 16]):  # ascending: Hugging Face remembers longer prompts
        ids = np.random.default_rng(0).integers(4, 40, (2, padded))
        valid = np.arange(padded) < np.array(lengths)[:, None]
        longest = max(lengths)
        with torch.no_grad():
            wanted = theirs(
                input_ids=torch.tensor(ids[:, :longest]),
                attention_mask=torch.tensor(valid[:, :longest]).long(),
                use_cache=False,
            ).last_hidden_state.numpy()
        found = np.asarray(run(*nnx.split(ours), ids, valid, np.array(lengths) - 1))[:, :longest]
        np.testing.assert_allclose(found[valid[:, :longest]], wanted[valid[:, :longest]], atol=3e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("decoder", ["llama", "qwen2_5_vl_text", "gemma3_text", "mllama_text_model"])
def test_rotations_are_hugging_faces(decoder: str, name: str) -> None:
    fields = fields_of(decoder, name)
    settings = config_of(decoder, fields)
    config = decoder_config({"model_type": decoder, **copy.deepcopy(fields)}, "llama")
    ours = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    for length in (5, CONTEXT, 13, 40):
        theirs = ROTARY[decoder](settings)
        places = np.tile(np.arange(length), (2, 1))
        if decoder == "qwen2_5_vl_text":
            places = np.stack([places, places[:, ::-1], places * 0], axis=1)
            wanted = theirs(torch.zeros(1), torch.tensor(places.swapaxes(0, 1)))
        elif decoder == "gemma3_text":
            both = [theirs(torch.zeros(1), torch.tensor(places), kind) for kind in (FULL, SLIDING)]
            wanted = [torch.stack(parts) for parts in zip(*both, strict=True)]
        else:
            wanted = theirs(torch.zeros(1), torch.tensor(places))
        for found, reference in zip(ours.rotations(jnp.asarray(places)), wanted, strict=True):
            np.testing.assert_allclose(found, reference.numpy()[..., :PAIRS], atol=4e-6)


@pytest.mark.parametrize("name", KINDS)
def test_the_kinds_differ_from_the_default(name: str) -> None:
    """So that the comparisons above can fail."""
    lengths = jnp.arange(13)[None]
    found = []
    for fields in (fields_of("llama", name), {**SIZES, "rope_theta": 300.0}):
        config = decoder_config(fields, "llama")
        decoder = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
        found.append(decoder.rotations(lengths)[0])
    assert np.abs(found[0] - found[1]).max() > 0.05


MROPE = {"mrope_section": [1, 2, 3]}
PRECEDENCE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 77.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rope_theta": 77.0, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 55.0}}),
    ("llama", {"rope_theta": 77.0, "rope_parameters": {"factor": 2.0, "type": "linear"}}),
    ("llama", {"rope_theta": 77.0, "rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 50.0}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 31.0}}),
    ("llama", {"rope_scaling": {}, "rope_theta": 9.0, "rope_parameters": {"rope_theta": 31.0}}),
    ("llama", {"rope_scaling": None, "rope_theta": 9.0}),
    ("llama", {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}}),
    ("llama", {"original_max_position_embeddings": 6, "rope_scaling": {"type": "yarn", "factor": 2.0}}),
    ("llama", {"original_max_position_embeddings": 6, "rope_parameters": {**KINDS["yarn"], "rope_type": "yarn"}}),
    ("qwen2", {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default"}}),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
    ("mllama_text_model", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    ("mllama_text_model", {"rope_scaling": LLAMA3, "rope_theta": 12.0}),
    ("qwen2_vl_text", {"rope_scaling": {"type": "mrope", **MROPE}}),
    ("qwen2_vl_text", {"rope_scaling": {"type": "mrope", "rope_type": "yarn", "factor": 2.0, **MROPE}}),
    ("qwen2_5_vl_text", {"rope_scaling": {"type": "yarn", "factor": 4.0, **MROPE}, "rope_theta": 80.0}),
    ("qwen2_5_vl_text", {"rope_theta": 80.0, "rope_parameters": {"type": "mrope", **MROPE}}),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 70.0}),
    ("gemma3_text", {"rope_theta": 70.0, "rope_local_base_freq": 7.0, "rope_parameters": {FULL: {"rope_theta": 8.0}}}),
    ("gemma3_text", {"rope_parameters": {FULL: {"type": "linear", "factor": 3.0}, SLIDING: None}}),
    ("gemma3_text", {"rope_parameters": {FULL: {"factor": 3.0}}, "rope_scaling": {"rope_type": "linear"}}),
]  # fmt: skip
"""Files that name a setting in several places, or by its old name."""


@pytest.mark.parametrize(("kind", "fields"), PRECEDENCE, ids=[str(number) for number in range(len(PRECEDENCE))])
def test_what_counts_of_several_settings_is_what_counts_in_hugging_face(kind: str, fields: dict[str, Any]) -> None:
    more = {"mllama_text_model": {"cross_attention_layers": []}, "gemma3_text": {"layer_types": [FULL, SLIDING]}}
    fields = SIZES | more.get(kind, {}) | fields
    theirs = build(config_of(kind, fields)).rotary_emb
    config = decoder_config({"model_type": kind, **copy.deepcopy(fields)}, "llama")
    two = kind == "gemma3_text"
    for settings, name in ((config.rope, f"{FULL}_"), (config.sliding_rope, f"{SLIDING}_")):
        if settings is not None:
            frequencies = getattr(theirs, f"{name if two else ''}inv_freq").numpy()
            np.testing.assert_allclose(settings.frequencies(2 * PAIRS), frequencies, rtol=1e-6)
            scaling = getattr(theirs, f"{name if two else ''}attention_scaling")
            assert settings.attention_factor == pytest.approx(scaling, rel=1e-6)


# --- whole models ---------------------------------------------------------------------------------------------------


def long_case(name: str) -> Case:
    """A tiny LLaVA whose prompts, with their sixteen picture tokens, are longer than the context."""
    settings = {"rope_type": name.split("-")[0], "rope_theta": 300.0, **copy.deepcopy(KINDS[name])}
    text = {"rope_parameters": settings, "max_position_embeddings": CONTEXT, "num_hidden_layers": 2}
    return llava(f"rope-{name}", text=text | {"head_dim": 2 * PAIRS})


def written(case: Case, folder: Path) -> Path:
    case.build().save_pretrained(folder)
    case.describe(folder)
    return folder


QUESTIONS = ["Is the star left of the fish ?", "Where is the cat"]


@pytest.mark.parametrize("name", ["dynamic", pytest.param("longrope", marks=pytest.mark.slow)])
def test_forward_rerun_and_generate_agree_with_hugging_face_beyond_the_context(name: str, tmp_path: Path) -> None:
    case = long_case(name)
    folder = written(case, tmp_path / "model")
    model = jaxid.load(folder)
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 255, (2, 32, 32, 3), np.uint8))
    batch = model.prepare(pictures, QUESTIONS)
    assert batch.last().min() >= CONTEXT
    arguments = case.arguments(batch)
    longest = int(batch.last().max()) + 1
    short = {name: value[:, :longest] if value.ndim == 2 else value for name, value in arguments.items()}
    with torch.no_grad():
        logits = as_written(folder)(**short).logits.numpy()
    wanted = logits[np.arange(2), batch.last()]
    np.testing.assert_allclose(jaxid.forward(model, batch).logits, wanted, atol=1e-4)

    trace = jaxid.trace(model, batch)
    np.testing.assert_allclose(trace.logits, wanted, atol=1e-4)
    edit = jaxid.add(np.arange(2), batch.last()[:, None], rng.standard_normal((2, 32)).astype(np.float32), 0.5)
    np.testing.assert_allclose(
        jaxid.rerun(model, trace, edit).logits, jaxid.forward(model, batch, edit).logits, atol=1e-4
    )

    for row in range(2):  # alone: the paddings of both libraries stand on different sides
        alone = model.prepare(pictures[row : row + 1], QUESTIONS[row : row + 1])
        length = int(alone.last()[0]) + 1
        given = {name: value[:, :length] if value.ndim == 2 else value for name, value in case.arguments(alone).items()}
        with torch.no_grad():
            theirs = as_written(folder).generate(
                **given, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=3
            )
        ours = jaxid.generate(without_stops(model), alone, max_new_tokens=8)
        np.testing.assert_array_equal(ours.tokens[0], theirs[0, length:].numpy())


def without_stops(model: Any) -> Any:
    """The model, which does not stop at a stop token."""
    processor = copy.copy(model.processor)
    processor.stop_ids = ()
    return dataclasses.replace(model, processor=processor)
