"""The benchmark's PyTorch systems agree with each other and with a plain computation."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_files import Modules

import jaxid
from jaxid.errors import InputError
from jaxid.families.llava import LlavaConfig
from jaxid.zoo import llava_texts

pytestmark = pytest.mark.optimized

QUESTIONS = (
    "Is the star to the left or right of the fish ? ASSISTANT :",
    "Is the moon in the picture to the left or right of the cup ? ASSISTANT :",
)
WORDS = (("star", "fish"), ("moon", "cup"))
WORKS = ("control", "steering", "belief_swap", "swaps", "extraction")
LAYERS, WIDTH, PICTURE = 4, 48, 9

Results = Mapping[str, Mapping[str, np.ndarray]]
"""What a system finds, by task and quantity."""

Network = Any
"""Hugging Face's class, whose parts have no static types."""


def tiny(full: LlavaConfig) -> LlavaConfig:
    """A small version of the benchmark's model: 9 picture tokens, 4 layers."""
    text = dataclasses.replace(
        full.text_config,
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
    )
    vision = dataclasses.replace(
        full.vision_config,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    return dataclasses.replace(full, text_config=text, vision_config=vision)


@pytest.fixture(scope="module")
def folder(modules: Modules, tmp_path_factory: pytest.TempPathFactory) -> Path:
    geometry = modules("geometry")
    return geometry.write(tmp_path_factory.mktemp("models") / "tiny", tiny(geometry.CONFIG))


@pytest.fixture(scope="module")
def network(modules: Modules, folder: Path) -> Network:
    """Hugging Face's class."""
    return modules("published").load(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Two prompts of unequal length, and the edits of each task."""

    batch: Any
    words: torch.Tensor
    mirrored: torch.Tensor
    steering: list[Any]
    belief_swap: list[Any]
    swaps: list[Any]


@pytest.fixture(scope="module")
def case(modules: Modules) -> Case:
    published = modules("published")
    rows = [llava_texts.encode("<s> USER :" + PICTURE * " <image>" + " " + question) for question in QUESTIONS]
    longest = max(map(len, rows))
    assert len(rows[0]) < longest
    rng = torch.Generator().manual_seed(1)
    batch = published.Batch(
        token_ids=torch.tensor([row + [3] * (longest - len(row)) for row in rows]),
        valid=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        pixels=torch.randn(2, 3, 24, 24, generator=rng),
        last=torch.tensor([len(row) - 1 for row in rows]),
        answers=torch.tensor(llava_texts.encode("left right")),
    )
    words = torch.tensor(
        [[row.index(*llava_texts.encode(word)) for word in pair] for row, pair in zip(rows, WORDS, strict=True)]
    )
    text = torch.tensor([[min(place, len(row) - 1) for place in range(3 + PICTURE, longest)] for row in rows])

    def vectors(count: int) -> torch.Tensor:
        return 3 * torch.randn(2, count, WIDTH, generator=rng)

    edit, swap = published.Edit, published.Swap
    return Case(
        batch=batch,
        words=words,
        mirrored=batch.pixels.flip(-1),
        # Not in the order of layers, and two at the same layer.
        steering=[edit(layer=layer, positions=words[:, :1], vectors=vectors(1)) for layer in (2, 1, 2, 0)],
        belief_swap=[
            edit(layer=layer, positions=words, vectors=vectors(2), strength=strength)
            for strength in (1.0, 3.0)
            for layer in range(LAYERS)
        ],
        swaps=[
            swap(layer=layer, positions=at)
            for at in (torch.arange(3, 3 + PICTURE).expand(2, -1), text, words)
            for layer in reversed(range(LAYERS))
        ],
    )


def compute(system: ModuleType, handle: object, case: Case) -> Results:
    """Runs all tasks on a system."""
    one_by_one = {"control": "control_one_by_one", "steer": "one_by_one"}

    def call(name: str, *arguments: object) -> Any:
        published_name = one_by_one.get(name, f"{name}_one_by_one")
        return getattr(system, published_name if hasattr(system, published_name) else name)(handle, *arguments)

    def steered(edits: list[Any]) -> dict[str, np.ndarray]:
        return dict(zip(("control", "edited"), call("steer", case.batch, edits), strict=True))

    return {
        "control": {"control": call("control", case.batch)},
        "steering": steered(case.steering),
        "belief_swap": steered(case.belief_swap),
        "swaps": vars(call("swap", case.batch, case.mirrored, case.swaps)),
        "extraction": {"states": call("extract", case.batch, case.words[:, 0])},
    }


@pytest.fixture(scope="module")
def found(modules: Modules, network: Network, case: Case) -> Results:
    """Results of the published procedure."""
    return compute(modules("published"), network, case)


def assert_same(mine: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert set(mine) == set(theirs)
    for name, values in mine.items():
        assert isinstance(values, np.ndarray)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, theirs[name], atol=2e-5, rtol=1e-5, err_msg=name, strict=True)


def test_shapes_and_effects(found: Results) -> None:
    shapes = {work: {name: values.shape for name, values in parts.items()} for work, parts in found.items()}
    assert shapes == {
        "control": {"control": (2, 2)},
        "steering": {"control": (2, 2), "edited": (4, 2, 2)},
        "belief_swap": {"control": (2, 2), "edited": (2 * LAYERS, 2, 2)},
        "swaps": {"control": (2, 2), "intervened": (2, 2), "patched": (3 * LAYERS, 2, 2)},
        "extraction": {"states": (2, LAYERS + 1, WIDTH)},
    }
    swaps = found["swaps"]
    assert (np.abs(swaps["intervened"] - swaps["control"]) > 1e-3).all()
    for work, name in (("steering", "edited"), ("belief_swap", "edited"), ("swaps", "patched")):
        change = np.abs(found[work][name] - found[work]["control"]).max(axis=-1)
        # After the last layer nothing reads the words or the picture.
        late = {"belief_swap": [3, 7], "swaps": [0, 8]}.get(work, [])
        early = np.delete(change, late, axis=0)
        assert (early > 1e-3).all(), (work, early)
        np.testing.assert_allclose(change[late], 0, atol=1e-5)
    patched = swaps["patched"].reshape(3, LAYERS, 2, 2)
    np.testing.assert_allclose(patched[1, 0], swaps["intervened"], atol=1e-5)  # all text after the last layer


Change = Callable[[int, torch.Tensor], torch.Tensor]


def plainly(
    network: Network, case: Case, row: int, pixels: torch.Tensor, change: Change = lambda _, states: states
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs Hugging Face's parts on one prompt, one by one: the answers' log-probabilities, and hidden states."""
    decoder, length = network.model.language_model, int(case.batch.last[row]) + 1
    token_ids = case.batch.token_ids[row, :length]
    with torch.no_grad():
        tower = network.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
        states = decoder.embed_tokens(token_ids).clone()
        states[3 : 3 + PICTURE] = network.model.multi_modal_projector(tower)
        states = states[None]
        rotations = decoder.rotary_emb(states, torch.arange(length)[None])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        kept = [states[0]]
        for layer, block in enumerate(decoder.layers):
            states = change(layer, block(states, attention_mask=mask, position_embeddings=rotations)[0])[None]
            kept.append(states[0])
        logits = network.lm_head(decoder.norm(states[0, -1]))
        return logits.log_softmax(-1)[case.batch.answers], kept


def change_of(edit: Any, row: int, control: list[torch.Tensor], intervened: list[torch.Tensor]) -> Change:
    """An edit or a swap of one prompt, token by token, from the hidden states of two clean runs."""

    def change(layer: int, states: torch.Tensor) -> torch.Tensor:
        if layer != edit.layer:
            return states
        edited = states.clone()
        for index, place in enumerate(edit.positions[row].tolist()):
            if not hasattr(edit, "vectors"):
                edited[place] = intervened[layer + 1][place]
                continue
            vector = edit.vectors[row, index]
            if edit.strength is not None:
                vector = vector * edit.strength * control[layer + 1][place].norm() / vector.norm()
            edited[place] = states[place] + vector
        return edited

    return change


@pytest.mark.parametrize("row", [0, 1])
def test_published_equals_a_plain_computation(network: Network, case: Case, found: Results, row: int) -> None:
    clean, control = plainly(network, case, row, case.batch.pixels[row])
    other, intervened = plainly(network, case, row, case.mirrored[row])
    np.testing.assert_allclose(found["control"]["control"][row], clean, atol=1e-5)
    np.testing.assert_allclose(found["swaps"]["intervened"][row], other, atol=1e-5)
    word = int(case.words[row, 0])
    expected = torch.stack([states[word] for states in control])
    np.testing.assert_allclose(found["extraction"]["states"][row], expected, atol=1e-5)
    for edits, values in (
        (case.steering, found["steering"]["edited"]),
        (case.belief_swap, found["belief_swap"]["edited"]),
        (case.swaps, found["swaps"]["patched"]),
    ):
        for edit, value in zip(edits, values, strict=True):
            change = change_of(edit, row, control, intervened)
            patched, _ = plainly(network, case, row, case.batch.pixels[row], change)
            np.testing.assert_allclose(value[row], patched, atol=1e-5)


def test_strongest_equals_published(modules: Modules, network: Network, case: Case, found: Results) -> None:
    mine = compute(modules("strongest"), network, case)
    for work in WORKS:
        assert_same(mine[work], found[work])


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_rewritten_equals_published(
    modules: Modules,
    folder: Path,
    case: Case,
    found: Results,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    onednn: bool,
) -> None:
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    rewritten = modules("rewritten")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        mine = compute(rewritten, rewritten.load(folder), case)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for work in WORKS:
        assert_same(mine[work], found[work])


def test_rewritten_attends_to_long_prompts_in_chunks(
    modules: Modules, folder: Path, case: Case, found: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten = modules("rewritten")
    monkeypatch.setattr(modules("packed"), "QUERIES", 7)
    mine = compute(rewritten, rewritten.load(folder), case)
    for work in WORKS:
        assert_same(mine[work], found[work])


def test_systems_leave_the_network_as_it_was(modules: Modules, folder: Path, network: Network, case: Case) -> None:
    fresh = modules("published").load(folder)
    compute(modules("rewritten"), modules("packed").Packed(fresh), case)
    compute(modules("strongest"), fresh, case)
    for name, tensor in network.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_rewritten_refuses_swaps_it_would_get_wrong(modules: Modules, network: Network, case: Case) -> None:
    rewritten, packed, swap = modules("rewritten"), modules("packed"), modules("published").Swap
    for places in ([3], [3, 20], [0]):
        wrong = swap(layer=0, positions=torch.tensor([places, places]))
        with pytest.raises(ValueError, match="all picture tokens, or of tokens after"):
            rewritten.swap(packed.Packed(network), case.batch, case.mirrored, [wrong])


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("text_config", "hidden_act", "gelu", "decoder of LLaVA-1.5's kind"),
        ("vision_config", "hidden_act", "gelu", "quick_gelu"),
        (None, "vision_feature_select_strategy", "full", "without the class token"),
    ],
)
def test_rewritten_refuses_other_networks(
    modules: Modules, folder: Path, part: str | None, name: str, value: str, message: str
) -> None:
    network = modules("published").load(folder)
    setattr(getattr(network.config, part) if part else network.config, name, value)
    with pytest.raises(ValueError, match=message):
        modules("packed").Packed(network)


@pytest.mark.slow
def test_nnsight_equals_published(modules: Modules, folder: Path, case: Case, found: Results) -> None:
    pytest.importorskip("nnsight", reason="comes with the extra `bench`")
    nnsight_way = modules("nnsight_way")
    model = nnsight_way.load(folder)
    mine = compute(nnsight_way, model, case)
    for work in WORKS:
        assert_same(mine[work], found[work])
    _, edited = nnsight_way.steer(model, case.batch, case.steering, invokes=3)
    np.testing.assert_allclose(edited, found["steering"]["edited"], atol=2e-5)
    states = nnsight_way.extract(model, case.batch, case.words[:, 0], pictures=1)
    np.testing.assert_allclose(states, found["extraction"]["states"], atol=2e-5)


def test_geometry_is_made_once_and_refuses_another_model(modules: Modules, tmp_path: Path) -> None:
    geometry = modules("geometry")
    config = tiny(geometry.CONFIG)
    first = geometry.write(tmp_path / "a" / "model", config)
    weights = (first / "model.safetensors").read_bytes()
    changed = first / "model.safetensors"
    changed.write_bytes(b"kept")
    assert geometry.write(first, config) == first
    assert changed.read_bytes() == b"kept"
    assert (geometry.write(tmp_path / "b", config) / "model.safetensors").read_bytes() == weights
    assert (geometry.write(tmp_path / "c", config, seed=1) / "model.safetensors").read_bytes() != weights
    with pytest.raises(InputError, match="something other"):
        geometry.write(first, dataclasses.replace(config, vision_feature_layer=(-1,)))
    with pytest.raises(InputError, match="something other"):
        geometry.write(tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_geometry_has_a_word_for_every_id(modules: Modules, folder: Path) -> None:
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(words.values()) == list(range(128))
    geometry = modules("geometry")
    assert geometry.CONFIG.text_config.vocab_size == 32064
    assert geometry.CONFIG.image_tokens == 576


def test_jaxid_reads_the_geometry_as_hugging_face_does(folder: Path, case: Case, found: Results) -> None:
    model = jaxid.load(str(folder))
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in QUESTIONS]
    prompts = model.prepare(pictures, [question.removesuffix(" ASSISTANT :") for question in QUESTIONS])
    length = case.batch.token_ids.shape[1]
    np.testing.assert_array_equal(
        prompts.inputs.token_ids[:, :length] * case.batch.valid.numpy(),
        case.batch.token_ids.numpy() * case.batch.valid.numpy(),
    )
    same_pixels = dataclasses.replace(prompts.inputs, pixels=case.batch.pixels.numpy())
    prompts = dataclasses.replace(prompts, inputs=same_pixels)
    mine = np.asarray(jaxid.forward(model, prompts).logprobs(["left", "right"]))
    np.testing.assert_allclose(mine, found["control"]["control"], atol=2e-5)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(modules: Modules, folder: Path, case: Case) -> Callable[..., Any]:
    """Makes fine-tuning runs of the tiny LLaVA on the tower's MLPs and the projector."""
    training = modules("published_training")
    examples = training.Examples(
        token_ids=case.batch.token_ids,
        valid=case.batch.valid,
        pixels=case.batch.pixels,
        places=case.batch.last,
        labels=case.batch.answers,
        word=case.words[:, 1],
        target=torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)),
    )
    settings = training.Settings(id_layer=1, id_weight=0.7, rates=(1e-4, 2e-4), weight_decay=0.1, clip_norm=1e-2)
    names = [f"model.vision_tower.encoder.layers.{layer}.mlp.fc1.weight" for layer in (1, 2)]
    names.append("model.multi_modal_projector.linear_1.bias")

    def make(**options: bool) -> Any:
        return training.Steps(training.load(folder), names, examples, settings, **options)

    return make


def test_training_steps_of_all_kinds_are_alike(steps: Callable[..., Any]) -> None:
    plain = steps()
    losses = [plain(), plain()]
    for options in ({"checkpointed": True}, {"lean": True}, {"checkpointed": True, "lean": True}):
        other = steps(**options)
        for expected in losses:
            assert other() == pytest.approx(expected, rel=1e-5)
        for name, value in other.tensors().items():
            np.testing.assert_allclose(value, plain.tensors()[name], atol=1e-6)


def test_a_training_step_by_hand(steps: Callable[..., Any], network: Network, case: Case) -> None:
    run = steps()
    before = run.tensors()
    losses = run()
    last, word = [], []
    for row in range(2):
        log_probs, kept = plainly(network, case, row, case.batch.pixels[row])
        last.append(-float(log_probs[row]))
        word.append(kept[2][int(case.words[row, 1])])
    states = torch.stack(word) - torch.stack(word).mean(dim=0)
    near = torch.nn.functional.cosine_similarity(states, run.examples.target, dim=-1).mean()
    assert losses["answer_loss"] == pytest.approx(np.mean(last), rel=1e-5)
    assert losses["id_loss"] == pytest.approx(1 - float(near), rel=1e-4)
    assert losses["loss"] == pytest.approx(losses["answer_loss"] + 0.7 * losses["id_loss"])
    gradients = run.gradients()
    assert np.sqrt(sum((value**2).sum() for value in gradients.values())) == pytest.approx(1e-2, rel=1e-3)
    for name, value in run.tensors().items():
        step = gradients[name] / (np.abs(gradients[name]) + 1e-8)
        np.testing.assert_allclose(value, before[name] * (1 - 1e-4 * 0.1) - 1e-4 * step, atol=1e-6)
    # The last block comes after the hidden state that is read, so it only decays.
    assert not gradients["model.vision_tower.encoder.layers.2.mlp.fc1.weight"].any()


def test_training_runs_take_turns_on_one_network(steps: Callable[..., Any], modules: Modules) -> None:
    one = steps()
    other = modules("published_training").Steps(one.network, one.places, one.examples, one.settings, lean=True)
    alone = steps()
    expected = [alone()["loss"], alone()["loss"]]
    assert [one()["loss"], one()["loss"]] == pytest.approx(expected, rel=1e-6)
    assert [other()["loss"], other()["loss"]] == pytest.approx(expected, rel=1e-5)
    assert expected[0] != expected[1]
