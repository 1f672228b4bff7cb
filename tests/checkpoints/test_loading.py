"""The loader: every spelling of a checkpoint gives the same parameters; everything else is an error with a name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import CASES
from safetensors.torch import load_file, save_file

from jaxid.checkpoints import tensors
from jaxid.checkpoints.export import export
from jaxid.checkpoints.loading import find_folder, load
from jaxid.errors import CheckpointError, InputError
from jaxid.families.registry import ALIASES, FAMILIES

PLAIN, TIED = CASES[0], CASES[1]
Weights = dict[str, torch.Tensor]


def in_memory(weights: Weights) -> Weights:
    """The names of transformers >= 4.52's modules."""
    return {
        re.sub(r"^(?!lm_head)", "model.", re.sub(r"^language_model\.(model\.)?", "language_model.", name)).replace(
            "model.language_model.lm_head", "lm_head"
        ): value
        for name, value in weights.items()
    }


def published(weights: Weights) -> Weights:
    """The names of the checkpoints on the Hub."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}


def with_buffers(weights: Weights) -> Weights:
    """Old files also hold constants that are no parameters."""
    return {
        **published(weights),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Makes a changed copy of a tiny model's folder."""

    def make(change: Callable[[Weights], Weights] | None = None, case: Any = PLAIN, **config: Any) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(fixtures.folder(case), folder)
        if change:
            save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        if config:
            fields = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(fields | config))
        return folder

    return make


def shard(folder: Path, parts: int = 3) -> list[Path]:
    """Splits the weights as Hugging Face does."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number + 1:05}-of-{parts:05}.safetensors" for number in range(parts)]
    weight_map = {tensor: names[number % parts] for number, tensor in enumerate(weights)}
    for name in names:
        save_file({tensor: weights[tensor] for tensor, at in weight_map.items() if at == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in names]


def same(first: Any, second: Any) -> bool:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return all(
        bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


# --- what loads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [in_memory, published, with_buffers])
def test_every_spelling_of_the_keys(copy: Callable[..., Path], spelling: Callable[[Weights], Weights]) -> None:
    folder = copy(spelling)
    saved = set(load_file(fixtures.folder(PLAIN) / "model.safetensors"))
    assert set(load_file(folder / "model.safetensors")) != saved
    assert same(load(folder).parameters, fixtures.model(PLAIN).parameters)


def test_shards(copy: Callable[..., Path]) -> None:
    folder = copy()
    shard(folder)
    assert same(load(folder).parameters, fixtures.model(PLAIN).parameters)


def test_bfloat16_on_disk(copy: Callable[..., Path]) -> None:
    folder = copy(lambda weights: {name: value.to(torch.bfloat16) for name, value in weights.items()})
    exact, rounded = load(folder).parameters, load(folder, dtype="bfloat16").parameters
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {np.dtype("float32")}
    assert same(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded), exact)
    full = fixtures.model(PLAIN).parameters
    assert not same(exact, full)
    assert same(exact, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), full))


def test_a_tied_checkpoint_may_repeat_the_embedding(copy: Callable[..., Path]) -> None:
    def repeated(weights: Weights) -> Weights:
        return {**weights, "lm_head.weight": weights["language_model.model.embed_tokens.weight"].clone()}

    assert same(load(copy(repeated, TIED)).parameters, fixtures.model(TIED).parameters)


def test_every_value_stands_where_the_key_table_says() -> None:
    case = CASES[2]
    model = fixtures.model(case)
    leaves, weights = tensors.flatten(model.parameters), load_file(fixtures.folder(case) / "model.safetensors")
    block = "language_model.model.layers.1.self_attn."
    query = weights[block + "q_proj.weight"].numpy()  # [(H E), D]
    np.testing.assert_array_equal(leaves["decoder.layers.attention.query"][1, :, 2 * 12 + 5], query[2 * 12 + 5])
    out = weights[block + "o_proj.weight"].numpy()  # [D, (H E)]
    np.testing.assert_array_equal(leaves["decoder.layers.attention.out"][1, 2 * 12 + 5], out[:, 2 * 12 + 5])
    patch = weights["vision_tower.embeddings.patch_embedding.weight"].numpy()  # [D, C, Y, X]
    np.testing.assert_array_equal(leaves["tower.patch_kernel"][(3 * patch.shape[3] + 6) * 3 + 1], patch[:, 1, 3, 6])


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    for case in CASES:
        model, family = fixtures.model(case), FAMILIES["llava"]
        shutil.copytree(fixtures.folder(case), tmp_path / case.name)
        path = tmp_path / case.name / "model.safetensors"
        before = load_file(path)
        tensors.save_parameters(path, model.parameters, family.keys(model.config))
        after = load_file(path)
        assert set(after) == set(published(before))
        assert all(torch.equal(after[name], value) for name, value in published(before).items())
        assert not list(path.parent.glob("*.tmp"))
        assert same(load(path.parent).parameters, model.parameters)


def test_each_parameter_is_placed_once_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, family, placed, put = fixtures.model(PLAIN), FAMILIES["llava"], [], jax.device_put
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tensors.flatten(model.parameters).items()
    }

    def place(array: np.ndarray) -> jax.Array:
        placed.append(array.shape)
        return put(array)

    monkeypatch.setattr(jax, "device_put", place)
    with jax.default_device(jax.devices()[1]):
        parameters, _ = tensors.read_parameters(
            tensors.TensorFolder(fixtures.folder(PLAIN)),
            abstract,
            family.keys(model.config),
            renames=family.renames,
        )
    assert sorted(placed) == sorted(leaf.shape for leaf in abstract.values())
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(parameters)} == {jax.devices()[1]}


def test_the_fingerprint_tells_checkpoints_apart(copy: Callable[..., Path]) -> None:
    marks = {fixtures.model(case).fingerprint for case in CASES}
    assert len(marks) == len(CASES)
    assert load(fixtures.folder(PLAIN)).fingerprint == fixtures.model(PLAIN).fingerprint

    def nudged(weights: Weights) -> Weights:
        weights["multi_modal_projector.linear_2.bias"][0] += 1
        return weights

    folder = copy(nudged)
    marks.add(load(folder).fingerprint)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        if (folder / name).exists():  # blanks: nothing else changes
            (folder / name).write_text((folder / name).read_text() + "\n")
            marks.add(load(folder).fingerprint)
    assert len(marks) >= len(CASES) + 4
    before = load(folder).fingerprint
    shard(folder)
    assert load(folder).fingerprint == before


# --- what does not --------------------------------------------------------------------------------------------------

GATE, DOWN = (
    f"language_model.model.layers.{layer}.mlp.{name}_proj.weight" for layer, name in ((0, "gate"), (2, "down"))
)
QUERY, HEAD = "language_model.model.layers.1.self_attn.q_proj.weight", "language_model.lm_head.weight"


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def cloned(weights: Weights) -> Weights:
    return {name: value.clone() for name, value in weights.items()}


def with_query(*shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, QUERY: torch.ones(shape)}


def all_at_once(weights: Weights) -> Weights:
    return with_query(1, 1)({**without(DOWN)(weights), "new": torch.ones(1)})


UNFIT: dict[str, tuple[Callable[[Weights], Weights], list[str]]] = {
    "missing": (without(GATE), [f"{GATE}' is missing"]),
    "bias missing": (without("vision_tower.pre_layrnorm.bias"), ["pre_layrnorm.bias' is missing"]),
    "three missing": (without(GATE, DOWN, HEAD), [GATE, DOWN, HEAD]),
    "layer too many": (
        lambda weights: {**weights, GATE.replace("0", "3"): torch.ones(2)},
        ["unknown tensor", "layers.3.mlp"],
    ),
    "two unknown": (
        lambda weights: {**weights, "a.b": torch.ones(1), "c": torch.ones(1)},
        ["tensor 'a.b'", "tensor 'c'"],
    ),
    "width": (with_query(32, 31), [QUERY, "(32, 31)"]),
    "heads": (with_query(33, 32), [QUERY, "(33, 32)"]),
    "rank": (with_query(32), [QUERY, "(32,)"]),
    "twice": (lambda weights: weights | in_memory(cloned(weights)), [f"name '{GATE}'"]),
    "all at once": (all_at_once, [f"{DOWN}' is missing", "unknown tensor 'new'", QUERY]),
}


@pytest.mark.parametrize(("change", "named"), UNFIT.values(), ids=UNFIT)
def test_weights_that_do_not_fit(
    copy: Callable[..., Path], change: Callable[[Weights], Weights], named: list[str]
) -> None:
    folder = copy(change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for part in [*named, str(folder)]:
        assert part in str(caught.value), part


def test_a_long_list_of_problems_is_cut(copy: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        load(copy(text_config={"model_type": "llama"}))
    assert len(str(caught.value)) < 4000


def test_fewer_layers_in_the_config_than_in_the_file(copy: Callable[..., Path]) -> None:
    fields = json.loads((fixtures.folder(PLAIN) / "config.json").read_text())
    text = fields["text_config"] | {"num_hidden_layers": 2}
    with pytest.raises(CheckpointError, match=r"unknown tensor 'language_model\.model\.layers\.2"):
        load(copy(text_config=text))


def test_tied_weights_that_differ_are_two(copy: Callable[..., Path]) -> None:
    def differing(weights: Weights) -> Weights:
        other = weights["language_model.model.embed_tokens.weight"].clone()
        other[3, 4] += 1e-3
        return {**weights, "language_model.lm_head.weight": other}

    folder = copy(differing, TIED)
    model = load(folder)
    assert not model.config.text_config.tie_word_embeddings
    unembedding = model.network().decoder.unembed_matrix()
    np.testing.assert_array_equal(unembedding, load_file(folder / "model.safetensors")[HEAD].numpy().T)
    again = load(export(model, folder.with_name("exported")))
    assert same(again.parameters, model.parameters)


def test_a_tensor_in_two_shards(copy: Callable[..., Path]) -> None:
    folder = copy()
    first, second, _ = shard(folder)
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*more than one file"):
        load(folder)


def test_missing_shard(copy: Callable[..., Path]) -> None:
    folder = copy()
    shards = shard(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name) as caught:
        load(folder)
    assert shards[0].name not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_broken_index(copy: Callable[..., Path], text: str) -> None:
    folder = copy()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(folder)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-100], lambda data: data[:50], lambda data: b"", lambda data: b"\xff" * 16 + data[16:]],
    ids=["tail cut off", "header cut off", "empty", "header overwritten"],
)
def test_damaged_file(copy: Callable[..., Path], damage: Callable[[bytes], bytes]) -> None:
    path = copy() / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated or corrupt"):
        load(path.parent)


def test_pickled_weights_are_never_opened(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*pickled"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "llava_next"}, "config.json.*'llava_next'.*llava"),
        ({"model_type": None}, "config.json.*None"),
        ({"image_grid_pinpoints": [[1, 2]]}, "image_grid_pinpoints"),
        ({"vision_config": {"model_type": "mllama_vision_model"}}, "siglip_vision_model"),
        ({"text_config": "llama"}, "config.json"),
        ({"vision_feature_layer": "last"}, "config.json"),
        ({"image_token_index": 39_999}, "39999.*image token"),
    ],
)
def test_configs_that_do_not_fit(copy: Callable[..., Path], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        load(copy(**fields))


@pytest.mark.parametrize(
    ("text", "named"), [("{", "as a JSON file"), ("[1]", "a JSON object is expected"), (None, "no config.json")]
)
def test_broken_config_file(copy: Callable[..., Path], text: str | None, named: str) -> None:
    path = copy() / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=named) as caught:
        load(path.parent)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "chat_template.jinja"])
def test_processor_files_that_are_missing(copy: Callable[..., Path], name: str) -> None:
    folder = copy()
    (folder / name).unlink()
    if name == "preprocessor_config.json":
        (folder / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        load(folder)


def test_a_chat_template_in_json(copy: Callable[..., Path]) -> None:
    folder = copy()
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load(folder).prepare(None, "star").texts == fixtures.model(PLAIN).prepare(None, "star").texts


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "./absent/model", "/absent"])
def test_no_such_model(name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(name)) as caught:
        find_folder(name)
    assert "llava-7b" in str(caught.value)


def test_not_in_the_cache_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=ALIASES["llava-7b"]):
        find_folder("llava-7b")


def test_unknown_dtype() -> None:
    with pytest.raises(InputError, match=r"'int8'.*float32"):
        load(fixtures.folder(PLAIN), dtype="int8")
