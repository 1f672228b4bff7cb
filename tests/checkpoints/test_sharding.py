"""The table of rules: which axis of which parameter a mesh divides, and what is said of the rest."""

import copy
import functools
import math
import re
from typing import Any

import pytest
from families import llava_config
from full_size import CONFIGS
from jax.sharding import AbstractMesh, PartitionSpec

from jaxid.checkpoints.loading import abstract_parameters
from jaxid.checkpoints.sharding import RULES, Layout, layout, note
from jaxid.errors import InputError
from jaxid.families.openclip import ARCHITECTURES, kind_of
from jaxid.families.registry import ENCODERS, FAMILIES, family
from jaxid.meshes import AXES

MODEL = "model"


def mesh(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), AXES)


def tiny(model: int, vision: dict[str, Any] | None = None, **text: Any) -> tuple[Layout, dict[str, Any]]:
    """The layout of a tiny LLaVA: 4 heads of 8 numbers, MLPs of 48, 40 tokens; in the tower 2 heads of 12, MLPs of 40.

    With it, the parameters' shapes.
    """
    kind = FAMILIES["llava"]
    definition, abstract = abstract_parameters(
        kind, kind.config(llava_config(text=text, vision=vision or {}).to_dict())
    )
    return layout(definition, abstract, mesh(2, model)), abstract


def specs(found: Layout, prefix: str) -> dict[str, PartitionSpec]:
    return {path: place.spec for path, place in found.shardings.items() if path.startswith(prefix)}


def test_heads_columns_and_tokens_are_divided() -> None:
    found, abstract = tiny(2, attention_bias=True, mlp_bias=True)
    into, out, bias = (PartitionSpec(*spec) for spec in ((None, None, MODEL), (None, MODEL, None), (None, MODEL)))
    assert not found.whole and note(found, abstract, mesh(2, 2), 4) is None
    for stack, mlp in (("decoder.layers", "mlp."), ("tower.layers", "")):
        own = specs(found, stack)
        for name in ("query", "key", "value"):
            assert own[f"{stack}.attention.{name}"] == into, name
            assert own[f"{stack}.attention.{name}_bias"] == bias, name
        assert own[f"{stack}.attention.out"] == out
        assert own[f"{stack}.{mlp}up.kernel"] == into and own[f"{stack}.{mlp}down.kernel"] == out
        assert own[f"{stack}.{mlp}up.bias"] == bias
    assert found.shardings["decoder.embedding"].spec == PartitionSpec(MODEL, None)
    assert found.shardings["decoder.unembedding"].spec == PartitionSpec(None, MODEL)
    plain = [path for path in abstract if path.endswith(("scale", "out_bias", "down.bias", "position"))]
    assert len(plain) > 10 and all(found.shardings[path].spec == PartitionSpec() for path in plain)


def test_all_of_it_is_on_every_device_of_data() -> None:
    """Axis "data" divides no parameter, nor does "model" of one device."""
    assert {name for place in tiny(2)[0].shardings.values() for name in place.spec} == {None, MODEL}
    assert {place.spec for place in tiny(1)[0].shardings.values()} == {PartitionSpec()}


def test_a_head_is_never_split() -> None:
    """Two heads of 12 numbers, 24 in all: four devices would divide the numbers, but not the heads."""
    found, _ = tiny(4)
    for name in ("query", "key", "value", "out", "query_bias"):
        path = f"tower.layers.attention.{name}"
        assert found.shardings[path].spec == PartitionSpec() and found.whole[path] == "2 heads", name
    assert found.shardings["tower.layers.up.kernel"].spec == PartitionSpec(None, None, MODEL)
    assert found.shardings["decoder.layers.attention.query"].spec == PartitionSpec(None, None, MODEL)


@pytest.mark.parametrize("heads", [1, 2])
def test_few_heads_of_keys_and_values_are_whole(heads: int) -> None:
    found, abstract = tiny(4, {"num_attention_heads": 4}, num_key_value_heads=heads)
    assert set(found.whole) == {f"decoder.layers.attention.{name}" for name in ("key", "value")}
    attention = specs(found, "decoder.layers.attention")
    assert attention["decoder.layers.attention.query"] == PartitionSpec(None, None, MODEL)
    assert attention["decoder.layers.attention.out"] == PartitionSpec(None, MODEL, None)
    said = note(found, abstract, mesh(2, 4), 4)
    assert said is not None and "\n" not in said
    assert f"model=4 does not divide key/value of decoder.layers.attention ({heads} heads)" in said


def test_odd_vocabularies_are_whole_and_the_note_names_them() -> None:
    found, abstract = tiny(2, vocab_size=41)
    assert found.whole == {"decoder.embedding": "41 tokens", "decoder.unembedding": "41 tokens"}
    said = note(found, abstract, mesh(2, 2), 4)
    assert said is not None and "embedding/unembedding of decoder (41 tokens)" in said
    size = 2 * 41 * 32 * 4 / 1e9
    assert f"({size:.2f} GB each)" in said


def test_the_note_counts_what_is_whole() -> None:
    found, abstract = tiny(2, vocab_size=5_000_001)
    said = note(found, abstract, mesh(2, 2), 2)
    assert said is not None and f"({2 * 5_000_001 * 32 * 2 / 1e9:.2f} GB each)" in said


def test_nothing_to_divide_is_refused() -> None:
    with pytest.raises(InputError, match=r"^model=5 divides none of the decoder's 4 heads, 48 rows; choose a divisor"):
        tiny(5)
    assert "decoder.layers.attention.out" in tiny(3)[0].whole  # 48 columns divide


PUBLISHED = {
    name: (family(CONFIGS[name]["model_type"], name), CONFIGS[name])
    for name in ("llava-13b", "qwen2-2b", "qwen-3b", "llama-11b", "internvl-14b", "gemma-12b", "llava-video")
} | {name: (ENCODERS[kind_of(ARCHITECTURES[name])], ARCHITECTURES[name]) for name in ("ViT-B-32", "coca_ViT-L-14")}
"""A published model of every architecture."""


@functools.cache
def published(name: str) -> tuple[Any, dict[str, Any]]:
    kind, fields = PUBLISHED[name]
    return abstract_parameters(kind, kind.config(copy.deepcopy(fields)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_divided(name: str) -> None:
    """Each of two devices holds little more than half of the numbers, and of every matrix in a stack exactly half."""
    definition, abstract = published(name)
    found = layout(definition, abstract, mesh(1, 2))
    assert not found.whole
    held = sum(math.prod(found.shardings[path].shard_shape(leaf.shape)) for path, leaf in abstract.items())
    assert held < 0.515 * sum(math.prod(leaf.shape) for leaf in abstract.values())
    for path, leaf in abstract.items():
        if ".layers." in path and len(leaf.shape) == 3:
            assert MODEL in found.shardings[path].spec, path


def test_every_rule_divides_something() -> None:
    paths = {path for name in PUBLISHED for path in published(name)[1]}
    counts = [sum(bool(re.search(rule.pattern, path)) for path in paths) for rule in RULES]
    assert all(counts), counts


def test_a_clip_like_model_with_nothing_to_divide_is_refused() -> None:
    definition, abstract = published("ViT-B-32")
    with pytest.raises(
        InputError, match=r"^model=5 divides none of the encoder's 8 heads, 2048 rows, 12 heads, 3072 rows; choose"
    ):
        layout(definition, abstract, mesh(1, 5))
