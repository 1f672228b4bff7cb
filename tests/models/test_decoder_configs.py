"""Settings of every kind of decoder mean what they mean in Hugging Face; what is not implemented is refused by name."""

import copy
import json
from typing import Any

import pytest
import transformers
from families.base import LLAMA3

from jaxid.errors import CheckpointError
from jaxid.nn.decoder_config import FULL, KINDS, SLIDING, DecoderConfig, RopeConfig, decoder_config

DIRECT = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
rms_norm_eps""".split()
"""Fields that every kind has under the same name."""

ALWAYS: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True},
    "qwen2_vl_text": {"attention_bias": True},
    "qwen2_5_vl_text": {"attention_bias": True},
    "gemma3_text": {"norm_offset": 1.0, "query_key_norm": True, "post_norms": True, "bidirectional_pictures": True},
    "mllama_text_model": {"extra_embeddings": 8},
}
"""What Hugging Face's code does whatever the config says."""


def rope_config(parameters: dict[str, Any], kind: str, context: int) -> RopeConfig:
    kept = {name: value for name, value in parameters.items() if name != "type"}
    if kept["rope_type"] == "dynamic":
        kept["context"] = context
    if "mrope_section" in kept or kind in ("qwen2_vl_text", "qwen2_5_vl_text"):
        kept["mrope_section"] = tuple(kept.get("mrope_section", (16, 24, 24)))
    return RopeConfig(**kept)


def as_ours(theirs: Any) -> DecoderConfig:
    """Hugging Face's text config, field by field."""
    kind, rope = theirs.model_type, theirs.rope_parameters
    types = tuple(getattr(theirs, "layer_types", None) or ())
    bias = getattr(theirs, "attention_bias", False)
    two = FULL in rope
    return DecoderConfig(
        **{name: getattr(theirs, name) for name in DIRECT},
        **{
            "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
            "hidden_act": getattr(theirs, "hidden_activation", None) or theirs.hidden_act,
            "attention_bias": bias,
            "attention_out_bias": bias,
            "mlp_bias": getattr(theirs, "mlp_bias", False),
            "tie_word_embeddings": getattr(theirs, "tie_word_embeddings", False),
            "rope": rope_config(rope[FULL] if two else rope, kind, theirs.max_position_embeddings),
            "sliding_rope": rope_config(rope[SLIDING], kind, theirs.max_position_embeddings) if two else None,
            "layer_types": types if SLIDING in types else (),
            "sliding_window": theirs.sliding_window if SLIDING in types else 0,
            "query_pre_attn_scalar": float(getattr(theirs, "query_pre_attn_scalar", 0)),
            "embedding_scale": theirs.hidden_size**0.5 if kind == "gemma3_text" else 1.0,
            "cross_attention_layers": tuple(getattr(theirs, "cross_attention_layers", ())),
            **ALWAYS.get(kind, {}),
        },
    )


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "num_key_value_heads": None}),
    ("llama", {"rope_theta": 5e5, "num_attention_heads": 16, "num_key_value_heads": 4}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 4.0}}),
    ("llama", {"head_dim": 64, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("qwen2", {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 80}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen2", {"layer_types": [FULL] * 32, "max_window_layers": 28}),
    ("qwen2_vl_text", {"rope_scaling": {"type": "mrope", "mrope_section": [8, 28, 28]}, "rope_theta": 3e5}),
    ("qwen2_vl_text", {"use_sliding_window": True, "num_hidden_layers": 82}),
    ("qwen2_5_vl_text", {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]}}),
    ("qwen2_5_vl_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0, "mrope_section": [60, 2, 2]}}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}),
    ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3}),
    ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}}}),
    ("gemma3_text", {"layer_types": [FULL, SLIDING] * 13, "query_pre_attn_scalar": 168}),
    ("gemma3_text", {"layer_types": [FULL] * 26, "hidden_activation": "gelu", "attention_bias": True}),
    ("gemma3_text", {"final_logit_softcapping": None, "attn_logit_softcapping": None, "hidden_size": 5376}),
    ("mllama_text_model", {"cross_attention_layers": [1, 2], "rope_scaling": LLAMA3}),
    ("mllama_text_model", {"cross_attention_layers": [], "rope_theta": 1e4}),
]
"""Kinds of decoder, and files that leave other things out, in their old and new forms."""


@pytest.mark.parametrize(
    ("kind", "fields"), SETTINGS, ids=lambda part: part if isinstance(part, str) else str(len(part))
)
def test_decoder_settings_mean_what_they_mean_in_hugging_face(kind: str, fields: dict[str, Any]) -> None:
    theirs = transformers.AutoConfig.for_model(kind, **copy.deepcopy(fields))
    given = {"model_type": kind, **fields}
    before = copy.deepcopy(given)
    assert decoder_config(given, "llama") == as_ours(theirs)
    assert given == before
    assert decoder_config(fields, kind) == as_ours(theirs)  # a file that leaves the kind to the family
    assert decoder_config(json.loads(theirs.to_json_string(use_diff=False)), "llama") == as_ours(theirs)


def test_no_kind_is_left_out() -> None:
    assert set(KINDS) == {kind for kind, _ in SETTINGS}


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("mistral", {}, r"'mistral' is not one of llama, qwen2, "),
        ("llama", {"clip_qkv": 8}, "text_config.*clip_qkv=8"),
        ("llama", {"hidden_act": "swish9"}, "text_config.*hidden_act='swish9'"),
        ("gemma3_text", {"hidden_activation": "swish9"}, "text_config.*hidden_act='swish9'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 26}, "'chunked_attention'"),
        ("gemma3_text", {"layer_types": [SLIDING, "linear_attention"] * 13}, "'linear_attention'"),
        ("gemma3_text", {"layer_types": [SLIDING] * 25}, "layer_types names 25 layers, not 26"),
        ("gemma3_text", {"sliding_window": 0}, "sliding_window is missing"),
        ("llama", {"layer_types": [FULL, SLIDING] * 16}, "sliding_window is missing"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is missing"),
        ("qwen2_vl_text", {"rope_parameters": {"mrope_section": [16, 24, 23]}}, r"mrope_section \(16, 24, 23\)"),
        ("qwen2_5_vl_text", {"hidden_size": 1024}, r"mrope_section \(16, 24, 24\) does not sum up to 8 pairs"),
        ("mllama_text_model", {"cross_attention_layers": [3, 40]}, r"cross_attention_layers \(3, 40\)"),
        ("mllama_text_model", {"cross_attention_layers": [-1]}, r"cross_attention_layers \(-1,\)"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional' is not implemented"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' lack factor"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "'mrope' is not implemented"),
        ("qwen2", {"rope_parameters": {FULL: {"rope_type": "default"}}}, FULL),
        ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, "entries, not 64"),
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' lack factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lack low_freq_factor, high_freq_factor"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear"}}, "'linear' lack factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("gemma3_text", {"rope_parameters": {SLIDING: {"beta_fast": 32}}}, "do not read beta_fast=32"),
    ],
)  # fmt: skip
def test_decoders_that_are_not_implemented_are_refused_by_name(kind: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        decoder_config({"model_type": kind, **fields}, "llama")
