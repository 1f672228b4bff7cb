"""The families' records: one entry for every name, and the layers of published experiments."""

import pytest

from jaxid.errors import CheckpointError
from jaxid.families import registry
from jaxid.families.base import Published
from jaxid.families.registry import ALIASES, ENCODERS, FAMILIES, family, kind_of, published

EVERY = [*registry._MODELS, *registry._ENCODERS]


def test_every_name_stands_in_one_record() -> None:
    types = [name for one in EVERY for name in one.model_types]
    aliases = [name for one in EVERY for name in one.aliases]
    assert sorted(types) == sorted([*FAMILIES, *ENCODERS]) and sorted(aliases) == sorted(ALIASES)
    assert all(set(one.published) <= set(one.aliases) for one in EVERY)


def test_published_layers() -> None:
    assert published("llava-7b") == published("llava-hf/llava-1.5-7b-hf") == Published(range(7, 20), 12)
    assert published("llama-11b") == Published(range(9, 20), 14)
    assert published("internvl-14b") == Published(range(11, 24), None)
    assert published("llava-video") == published("tiny-llava") == published("clip-b16") == Published()


@pytest.mark.parametrize(("known", "others", "what"), [(FAMILIES, "clip", "vision"), (ENCODERS, "llava", "CLIP-like")])
def test_a_model_of_another_kind_is_refused(known: dict, others: str, what: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"place: model_type '{others}' is no {what}.*supported: .*{sorted(known)[0]}"
    ):
        family(others, "place", known)


def test_the_authors_llava_is_told_by_its_tower() -> None:
    assert kind_of({"model_type": "llava", "mm_vision_tower": "a"}) == "llava_qwen"
    assert kind_of({"model_type": "llava"}) == "llava" and kind_of({}) == "None"
