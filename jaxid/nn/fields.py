"""Rules for the fields of a model's config file, checked by name before anything is computed from them."""

import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from jaxid.errors import CheckpointError

Json = dict[str, Any]
"""A parsed JSON object."""

Rule = tuple[Callable[[object], bool], str]
"""Whether a value is allowed, and a description of the allowed values."""


def _integer(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}"


def _number(value: object) -> TypeGuard[int | float]:
    return (type(value) is int or type(value) is float) and abs(value) < 1e30 and math.isfinite(value)


def _list_of(rule: Rule, least: int = 0) -> Rule:
    def allowed(value: object) -> bool:
        return isinstance(value, list | tuple) and len(value) >= least and all(map(rule[0], value))

    return allowed, f"a list, each {rule[1]}"


def _either(one: Rule, other: Rule) -> Rule:
    return lambda value: one[0](value) or other[0](value), f"{one[1]}, or {other[1]}"


def _or_null(rule: Rule) -> Rule:
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


_COUNT, _SIZE, _LENGTH, _ID = _integer(1, 10_000), _integer(1, 10**7), _integer(1, 2**31 - 1), _integer(0, 10**7)
_POSITIVE: Rule = (lambda value: _number(value) and value > 0, "a finite number above 0")
_SLOPE: Rule = (_number, "a finite number")
_FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
_TEXT: Rule = (lambda value: isinstance(value, str), "a string")
_OBJECT: Rule = (lambda value: isinstance(value, Mapping), "an object")
_INDEX = _integer(-10_000, 10_000)
_PAIRS = _list_of(
    (
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_COUNT[0], value)),
        "a pair of integers",
    )
)

_GROUPS: Mapping[str, Rule] = {
    "num_hidden_layers num_global_layers depth layers num_attention_heads num_heads attention_heads heads head_width "
    "num_channels in_channels spatial_patch_size spatial_merge_size max_num_tiles "
    "attn_pooler_heads attn_pooler_queries type_vocab_size mm_tokens_per_image": _COUNT,
    "image_size patch_size temporal_patch_size": _either(_COUNT, _list_of(_COUNT, 1)),
    "vocab_size hidden_size intermediate_size embed_dim out_hidden_size image_text_hidden_size width "
    "context_length": _SIZE,
    "max_position_embeddings": _LENGTH,
    "rms_norm_eps layer_norm_eps norm_eps mlp_ratio downsample_ratio query_pre_attn_scalar": _POSITIVE,
    "hidden_act hidden_activation projector_hidden_act vision_feature_select_strategy mm_newline_position "
    "mm_spatial_pool_mode": _TEXT,
    "attention_bias mlp_bias qkv_bias use_qk_norm use_mean_pooling multimodal_projector_bias custom_text "
    "attentional_pool embed_cls quick_gelu use_absolute_position_embeddings use_mask_token": _FLAG,
    "image_token_index image_token_id video_token_index video_token_id boi_token_index boi_token_id eoi_token_index "
    "eoi_token_id": _ID,
    "vision_feature_layer": _either(_INDEX, _list_of(_INDEX, 1)),
}
_OPTIONAL: Mapping[str, Rule] = {
    "num_key_value_heads in_chans spatial_patch_size": _COUNT,
    "head_dim projection_dim projection_size vision_output_dim": _SIZE,
    "original_max_position_embeddings sliding_window": _LENGTH,
    "max_window_layers window_size sliding_window_pattern _sliding_window_pattern": _integer(0, 10**7),
    "rope_theta rope_local_base_freq factor low_freq_factor high_freq_factor attention_factor "
    "partial_rotary_factor": _POSITIVE,
    "beta_fast beta_slow mscale mscale_all_dim": _SLOPE,
    "short_factor long_factor": _list_of(_POSITIVE),
    "truncate tie_word_embeddings use_sliding_window": _FLAG,
    "model_type rope_type type norm_type vision_aspect_ratio mm_vision_tower position_embedding_type": _TEXT,
    "layer_types": _list_of(_TEXT),
    "cross_attention_layers intermediate_layers_indices fullatt_block_indexes mrope_section": _list_of(_ID),
    "image_grid_pinpoints supported_aspect_ratios": _PAIRS,
    "text_config vision_config image_config text_config_dict vision_config_dict text_cfg vision_cfg multimodal_cfg "
    "rope_parameters rope_scaling full_attention sliding_attention": _OBJECT,
}
"""Rules of fields by name; null is allowed in these as well."""

_RULES = {name: rule for names, rule in _GROUPS.items() for name in names.split()}
_RULES |= {name: _or_null(rule) for names, rule in _OPTIONAL.items() for name in names.split()}

_BY_TYPE: Mapping[object, Rule] = {
    int: _integer(-(2**31), 2**31 - 1),
    float: _SLOPE,
    bool: _FLAG,
    str: _TEXT,
}


def check_fields(fields: Mapping[str, object], where: str = "") -> None:
    """Refuses values that no model can have in a parsed config file and its nested objects.

    Args:
        fields: the parsed JSON object.
        where: prefix of its fields' names in an error.

    Raises:
        CheckpointError: naming the first such field and the allowed values, or if the weights are quantised.
    """
    for name, value in fields.items():
        if name in ("quantization_config", "compression_config") and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            raise CheckpointError(
                f"{where}{name}: the weights are quantised ({method}), which jaxid does not read; "
                "convert them to bfloat16 first."
            )
        allowed, words = _RULES.get(name, (lambda _: True, ""))
        if not allowed(value):
            raise CheckpointError(f"{where}{name} must be {words}, not {shown(value)}.")
        if isinstance(value, Mapping) and name in _RULES:
            check_fields(value, f"{where}{name}.")


def check_types(kind: type, values: Mapping[str, object], where: str) -> None:
    """Refuses values of other types than a config dataclass declares.

    Raises:
        CheckpointError: naming the first such field.
    """
    types = typing.get_type_hints(kind)
    for name, value in values.items():
        allowed, words = _BY_TYPE.get(types[name], (lambda _: True, ""))
        if not allowed(value):
            raise CheckpointError(f"{where}: {name} must be {words}, not {shown(value)}.")


def check_parts(where: str, whole: tuple[str, int], parts: tuple[str, int]) -> None:
    """Refuses a number that is not divisible by another; each is given with its field's name.

    Raises:
        CheckpointError: naming both fields.
    """
    if whole[1] % parts[1]:
        raise CheckpointError(f"{where}: {whole[0]} {whole[1]} is not divisible by {parts[0]} {parts[1]}.")


def check_patches(image_size: int, patch_size: int) -> None:
    """Refuses pictures of less than one patch, or of more than 1000 patches to a side.

    Raises:
        CheckpointError: naming both sizes.
    """
    if not 1 <= image_size // patch_size <= 1000:
        raise CheckpointError(
            f"image_size {image_size} with patch_size {patch_size}: a side must have 1 to 1000 patches."
        )


def shown(value: object) -> str:
    """A value as it appears in an error: shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
