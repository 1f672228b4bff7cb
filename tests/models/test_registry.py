"""The records of all families: each name has one entry, and the layers of published experiments are right."""

import pytest

from jaxid.errors import CheckpointError
from jaxid.families import registry
from jaxid.families.base import Checkpoint
from jaxid.families.registry import ALIASES, ENCODERS, FAMILIES, family, kind_of, published

EVERY = [*registry._MODELS, *registry._ENCODERS]


def test_every_name_is_in_one_record() -> None:
    types = [name for one in EVERY for name in one.model_types]
    aliases = [name for one in EVERY for name in one.checkpoints]
    assert sorted(types) == sorted([*FAMILIES, *ENCODERS]) and sorted(aliases) == sorted(ALIASES)


def test_published_layers() -> None:
    llava = "llava-hf/llava-1.5-7b-hf"
    assert published("llava-7b") == published(llava) == Checkpoint(llava, range(7, 20), 11)
    assert published("llama-11b") == Checkpoint("meta-llama/Llama-3.2-11B-Vision-Instruct", range(9, 20), 13)
    assert published("internvl-14b") == Checkpoint("OpenGVLab/InternVL3-14B-hf", range(11, 24), None)
    for name in ("llava-video", "tiny-llava", "clip-b16"):
        assert published(name) == Checkpoint(ALIASES.get(name, name), None, None)


@pytest.mark.parametrize(("known", "others", "what"), [(FAMILIES, "clip", "vision"), (ENCODERS, "llava", "CLIP-like")])
def test_a_model_of_another_kind_is_refused(known: dict, others: str, what: str) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"place: model_type '{others}' is not a supported {what}.*supported: .*{sorted(known)[0]}",
    ):
        family(others, "place", known)


def test_the_authors_llava_is_told_by_its_tower() -> None:
    assert kind_of({"model_type": "llava", "mm_vision_tower": "a"}) == "llava_qwen"
    assert kind_of({"model_type": "llava"}) == "llava" and kind_of({}) == "None"
