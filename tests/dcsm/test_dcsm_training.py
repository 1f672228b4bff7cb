"""Training of the scorer: the published step, exact resumption after a kill, and what is refused."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from benchmark_files import importable
from encoders import ENCODER_CASES, encoder, folder

from jaxid import meshes
from jaxid.dcsm import training
from jaxid.dcsm.datasets import Item
from jaxid.dcsm.embedding import embed_images, embed_texts
from jaxid.dcsm.scoring import Scorer
from jaxid.dcsm.training import TrainingConfig
from jaxid.errors import InputError, OutputError
from jaxid.experiments.reference_dcsm_training import common_order
from jaxid.kernels import scorer as kernels
from jaxid.kernels import similarity
from jaxid.train import loop

CASE = ENCODER_CASES[0]
QUICK = TrainingConfig(epochs=2, batch_size=2, augment=False, dropout=0.0, text_tokens=9, seed=3)


def items(count: int, seed: int = 0, *, opposites: bool = True) -> list[Item]:
    rng = np.random.default_rng(seed)
    names = [("star", "fish"), ("fish", "star"), ("red star", "blue fish"), ("small fish", "big star")]
    made = []
    for number in range(count):
        first, second = names[number % len(names)]
        picture, opposite = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
        made.append(
            Item(
                key=str(number),
                picture=picture,
                opposite=opposite if opposites else None,
                captions=(f"{first} above {second}", f"{second} below {first}"),
                opposite_captions=(f"{second} above {first}", f"{first} below {second}"),
            )
        )
    return made


def sets(**options: Any) -> dict[str, list[Item]]:
    return {"spatial": items(5, 1, **options), "negation": items(3, 2, **options)}


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_dcsm_mesh` divides the work."""
    monkeypatch.setattr("jaxid.train.placement.every_device", lambda: meshes.mesh(1))


def trained(folder: Path, config: TrainingConfig = QUICK, data: Any = None, **options: Any) -> Scorer:
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
        return training.train(folder, encoder(CASE), data or sets(), config, progress=False, **options)


@pytest.mark.slow
def test_the_loss_is_the_published_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gradients of a step too: against PyTorch, on the same maps, whose order does not matter."""
    with importable() as load:
        published: Any = load("published_dcsm")
    own = encoder(CASE)
    scorer = Scorer.init(jax.random.key(1), 17, 9)
    table = training.Table(own, scorer, list(sets().values()), pictures=True)
    batch: dict[str, Any] = {"step": jnp.asarray(0)}
    for number, name in enumerate(sets()):
        pictures, captions = table.batch(number, [0, 2])
        assert table.images is not None
        batch |= {f"{name}.images": jnp.asarray(table.images[pictures])}
        batch |= {f"{name}.{part}": jnp.asarray(value) for part, value in captions.items()}
    parameters = {"network": scorer.network._asdict()}

    def total(parameters: Any) -> Any:
        return training.loss(parameters, batch, scorer, list(sets()), QUICK, own, 1)[0]

    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        value, gradients = jax.jit(jax.value_and_grad(total))(parameters)

    monkeypatch.setattr(published, "TEXT_TOKENS", 9)
    network = published.ScorerCNN(17, 9, dropout=0.0)
    published.set_weights(network, scorer.network._asdict())
    losses: list[torch.Tensor] = []
    for name in sets():
        for version in range(2):
            images = torch.from_numpy(np.array(batch[f"{name}.images"]))
            texts = torch.from_numpy(np.array(batch[f"{name}.texts"][version]))
            maps = published.maps(images, texts)
            words = np.asarray(batch[f"{name}.words"][version])
            for row, column in np.argwhere(words >= 0):
                maps[:, row, :, column] = torch.from_numpy(np.array(scorer.vectors[words[row, column]]))
            flat = published.standardise(maps).reshape(-1, 1, 17, 9)
            scores = network(flat).reshape(len(images), len(texts))
            right = torch.arange(len(images))
            cross = torch.nn.functional.cross_entropy
            losses.append(cross(scores, right) + cross(scores.T, right))
    expected = torch.stack(losses).sum() / len(sets())
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for name, parameter in network.named_parameters():
        layer, kind = name.rsplit(".", 1)
        ours = np.asarray(gradients["network"][layer if kind == "weight" else f"{layer}_bias"])
        theirs = parameter.grad.numpy().reshape(ours.shape)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max() + 1e-7, name


@pytest.mark.slow
def test_whole_epochs_are_the_published_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two epochs of three sets in PyTorch: Adam on gradients summed over sets and versions, divided by three."""
    monkeypatch.undo()  # all devices, as by default
    with importable() as load:
        published: Any = load("published_dcsm")
    monkeypatch.setattr(published, "TEXT_TOKENS", 9)
    # Adam moves every number by about its rate, and rounding decides where a gradient is almost zero; not with this.
    epsilon = 1e-3
    monkeypatch.setattr(optax, "adam", partial(optax.adam, eps=epsilon))
    config, own = dataclasses.replace(QUICK, placement="insert"), encoder(CASE)
    data = {"spatial": items(7, 1), "attributes": items(4, 2), "negation": items(5, 3)}  # 4 items, 2 batches an epoch
    found = trained(tmp_path, config, data, orders=common_order)

    start = Scorer.init(jax.random.fold_in(jax.random.key(config.seed), 0), 17, 9)
    network = published.ScorerCNN(17, 9)
    published.set_weights(network, start.network._asdict())
    theirs = published.Scorer(network=network, vectors=torch.tensor(np.array(start.vectors)), placement="insert")
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, eps=epsilon)

    def batch(chosen: list[Item], version: int) -> Any:
        pictures = [item.picture for item in chosen] + [item.opposite for item in chosen if item.opposite is not None]
        captions = [item.captions[version] for item in chosen] + [item.opposite_captions[version] for item in chosen]
        images, texts = embed_images(own, pictures).tokens, embed_texts(own, captions, 9).tokens
        return published.Batch(images=torch.tensor(images), texts=torch.tensor(texts), captions=tuple(captions))

    for step in range(4):
        rows = common_order([len(own) for own in data.values()], step, 2, config.seed)
        chosen = [[own[row] for row in part] for own, part in zip(data.values(), rows, strict=True)]
        batches = [[batch(own, version) for version in range(2)] for own in chosen]
        published.train_step(theirs, optimizer, batches, torch.Generator().manual_seed(step))
    assert loop.read_metrics(tmp_path / "metrics.csv")[-1]["step"] == 4
    for name, parameter in network.named_parameters():
        if name == "fc2.bias":  # added to all scores, so that its gradient is nothing but rounding
            continue
        layer, kind = name.rsplit(".", 1)
        ours = np.asarray(getattr(found.network, layer if kind == "weight" else f"{layer}_bias"))
        expected = parameter.detach().numpy().reshape(ours.shape)
        begun = np.asarray(getattr(start.network, layer if kind == "weight" else f"{layer}_bias"))
        assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected - begun).max(), name
    np.testing.assert_array_equal(np.asarray(found.vectors), np.asarray(start.vectors))


def test_two_way_loss_by_hand() -> None:
    scores = jnp.array([[2.0, 0.0, 1.0], [0.5, 3.0, 0.0]])
    two_way_loss = jax.jit(training.two_way_loss)
    loss, accuracy = two_way_loss(scores, jnp.array([0, 1]))
    rows = [np.log(np.exp(2) + 1 + np.e) - 2, np.log(np.exp(0.5) + np.exp(3) + 1) - 3]
    columns = [np.log(np.exp(2) + np.exp(0.5)) - 2, np.log(1 + np.exp(3)) - 3]
    np.testing.assert_allclose(loss, np.mean(rows) + np.mean(columns), rtol=1e-5)
    assert accuracy == 1
    # The third caption is nobody's: moving the others moves nothing else.
    again, _ = two_way_loss(scores[:, jnp.array([1, 2, 0])], jnp.array([2, 0]))
    np.testing.assert_allclose(again, loss, rtol=1e-6)


def test_own_maps_are_those_of_a_picture_with_its_item_s_captions() -> None:
    """The loss, written out without shuffles: the pictures' maps with captions k and k + 2 say how all are scaled."""
    own, config = encoder(CASE), dataclasses.replace(QUICK, kind="mlp", group="own")
    scorer = Scorer.init(jax.random.key(1), 17, 9, kind="mlp")
    table = training.Table(own, scorer, [items(3, 1)], pictures=True)
    pictures, captions = table.batch(0, [0, 2])
    assert table.images is not None
    images = jnp.asarray(table.images[pictures])

    @jax.jit
    def two_way(texts: jax.Array, words: jax.Array) -> jax.Array:
        maps = similarity.similarity_maps(*similarity.with_functional_rows(images, texts, words, scorer.vectors))
        chosen = [maps[row, jnp.array([row % 2, row % 2 + 2])] for row in range(4)]
        scaled = [(maps[row] - part.mean()) / part.std(ddof=1) for row, part in enumerate(chosen)]
        scores = kernels.apply(scorer.network, jnp.concatenate(scaled)).reshape(4, 4)
        return training.two_way_loss(scores, jnp.arange(4))[0]

    expected = sum(two_way(captions["texts"][version], captions["words"][version]) for version in range(2))
    batch = {"step": jnp.asarray(0), "spatial.images": images}
    batch |= {f"spatial.{name}": jnp.asarray(value) for name, value in captions.items()}
    with jax.numpy_dtype_promotion("standard"):
        parameters = {"network": scorer.network._asdict()}

        @jax.jit
        def loss(parameters: Any, batch: Any) -> jax.Array:
            return training.loss(parameters, batch, scorer, ["spatial"], config, own, 1)[0]

        found = loss(parameters, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_mixed_groups_lie_on_both_sides_of_ones_own() -> None:
    scales = jnp.tile(jnp.array([0.3, 3, 0.5, 4]), 4)
    maps = jax.random.normal(jax.random.key(0), (16, 6, 3, 2)) * scales[:, None, None, None] + 3
    own = jnp.stack([jnp.arange(16) % 3, jnp.arange(16) % 3 + 3], axis=1)
    call, alone, mixed = (
        training.standardised(maps, own, group, jax.random.key(3)) for group in ("call", "own", "mixed")
    )
    np.testing.assert_allclose(jnp.take_along_axis(alone, own[..., None, None], 1).mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_array_equal(call, similarity.standardise(maps))
    # Every picture's maps are the same numbers on another scale: the offsets are blends, the slopes geometric ones.
    shares = []
    for row in range(len(maps)):
        (slope, offset), (first, start), (last, end) = (
            np.polyfit(np.ravel(maps[row]), np.ravel(kind[row]), 1) for kind in (mixed, call, alone)
        )
        shares.append(np.log(slope / first) / np.log(last / first))
        mean = shares[-1] * end / last + (1 - shares[-1]) * start / first
        np.testing.assert_allclose(offset / slope, mean, rtol=1e-3)
    assert 0 < min(shares) < 0.5 and 1.5 < max(shares) < 2


def test_decay_lowers_the_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps, the second one has half of the rate."""
    seen: list[np.ndarray] = []

    def check(step: int, parameters: Any) -> None:
        seen.append(np.array(parameters["network"]["fc1"]))

    monkeypatch.setattr(loop, "fit", partial(loop.fit, check=check, check_every=1))
    for decay in (False, True):
        trained(tmp_path / str(decay), dataclasses.replace(QUICK, kind="mlp", decay=decay), {"spatial": items(2)})
    one, plain, same, decayed = seen
    np.testing.assert_allclose(same, one, atol=1e-7)
    assert np.abs(plain - one).max() > 1e-4
    np.testing.assert_allclose(decayed - one, (plain - one) / 2, atol=1e-7)


def test_every_pass_takes_every_item_once() -> None:
    rows = np.concatenate([training.item_rows(7, step, 3, (1, 0)) for step in range(14)])
    for turn in range(6):
        assert sorted(rows[7 * turn : 7 * turn + 7]) == list(range(7))
    assert len({tuple(rows[7 * turn : 7 * turn + 7]) for turn in range(6)}) > 1


def test_an_epoch_ends_with_the_smallest_set_and_pictures_need_no_opposites(tmp_path: Path) -> None:
    """Five items and three make one batch of two in an epoch; the captions of opposites are hard ones."""
    scorer = trained(tmp_path, dataclasses.replace(QUICK, epochs=3, kind="mlp"), sets(opposites=False))
    assert scorer.map_shape == (17, 9)
    assert [row["step"] for row in loop.read_metrics(tmp_path / "metrics.csv")][-1] == 3


def test_dropout_is_off_unless_asked_for() -> None:
    assert TrainingConfig().dropout == 0


def test_the_published_order_cuts_sets_to_the_smallest() -> None:
    """Epochs of 5 // 2 steps: the same five items of each set, in one order for all; the rest is never seen."""
    counts = [9, 5, 12]
    epochs = [[common_order(counts, 2 * epoch + step, 2, 7) for step in range(2)] for epoch in range(60)]
    seen = [{int(row) for epoch in epochs for step in epoch for row in step[index]} for index in range(3)]
    assert [len(rows) for rows in seen] == [5, 5, 5] and seen[1] == set(range(5))
    partners = {tuple(int(rows[place]) for rows in step) for epoch in epochs for step in epoch for place in range(2)}
    assert len(partners) == 5  # items of different sets always come together
    for epoch in epochs:
        assert len({int(row) for step in epoch for row in step[0]}) == 4  # none twice; one of five is left over
    assert len({tuple(np.concatenate([step[0] for step in epoch]).tolist()) for epoch in epochs}) > 30
    ours = [training.own_orders(counts, step, 2, 7) for step in range(12)]
    assert [len({int(row) for step in ours for row in step[index]}) for index in range(3)] == counts


def test_every_caption_of_a_step_is_drawn_from_its_alternatives() -> None:
    """Those of an item by themselves, again in every step, and the same when a step is repeated."""
    plain = items(2)
    other = [dataclasses.replace(item, captions=("a", "fish"), opposite_captions=("red", "star")) for item in plain]
    data = [[dataclasses.replace(item, alternatives=(one,)) for item, one in zip(plain, other, strict=True)]]
    table = training.Table(encoder(CASE), Scorer.init(jax.random.key(1), 17, 9), data, pictures=False)
    steps = [table.batch(0, [0, 1], (3, step))[1]["texts"].sum(axis=2) for step in range(40)]
    kinds = {tuple((np.abs(own - steps[0]).max(axis=2) > 0).ravel().tolist()) for own in steps}
    assert len(kinds) > 30  # of the 256 ways to draw eight captions
    np.testing.assert_array_equal(table.batch(0, [0, 1], (3, 7))[1]["texts"].sum(axis=2), steps[7])


@pytest.mark.parametrize("change", [{"kind": "mlp"}, {"learn_vectors": True}])
def test_training_lowers_the_loss_and_writes_what_it_found(tmp_path: Path, change: dict[str, Any]) -> None:
    config = dataclasses.replace(QUICK, **{"epochs": 60, "learning_rate": 3e-3, **change})
    scorer = trained(tmp_path, config, {"spatial": items(4)[2:]})
    rows = loop.read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [20, 40, 60] and rows[-1]["epoch"] == 59
    assert json.loads((tmp_path / "metrics.json").read_text()) == rows
    again = Scorer.load(tmp_path / "scorer.safetensors")
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(scorer), jax.tree.leaves(again))
    start = Scorer.init(jax.random.fold_in(jax.random.key(3), 0), 17, 9, kind=config.kind)
    moved = not np.array_equal(start.vectors, scorer.vectors)
    assert moved == config.learn_vectors
    assert rows[-1]["loss"] < rows[0]["loss"] < 2 * np.log(4)  # chance


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        ({}, {}, "at least one data set"),
        ({"spatial": items(1)}, {}, "'spatial' has 1 items, a batch 2"),
        ({"spatial": [*items(2), *items(2, opposites=False)]}, {}, "mixes items with and without"),
        (None, {"batch_size": 1}, "batch_size must be 2 or more, not 1"),
        (None, {"dropout": 1.0}, "dropout must be at most 0.99, not 1"),
        (None, {"learning_rate": 0.0}, "learning rate must be above 0"),
        (None, {"vocabulary": ()}, "list of functional words is empty"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, data: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        training.train(tmp_path, encoder(CASE), sets() if data is None else data, dataclasses.replace(QUICK, **change))


def test_a_folder_of_another_run_is_refused_and_restarted(tmp_path: Path) -> None:
    """Of another seed, and of the published order."""
    data, config = {"spatial": items(2)}, dataclasses.replace(QUICK, epochs=1, kind="mlp")
    other = dataclasses.replace(config, seed=4)
    trained(tmp_path, config, data, orders=common_order)
    with pytest.raises(OutputError, match="reference bugs was true, is now false"):
        trained(tmp_path, config, data)
    with pytest.raises(OutputError, match="other settings: seed was 3, is now 4"):
        trained(tmp_path, other, data, orders=common_order)
    before = (tmp_path / "scorer.safetensors").read_bytes()
    trained(tmp_path, other, data, restart=True)
    assert (tmp_path / "scorer.safetensors").read_bytes() != before
    trained(tmp_path, other, data)


SCRIPT = """
import pickle, sys
from pathlib import Path
from jaxid.checkpoints.encoders import load_encoder
from jaxid.dcsm import training
config, data = pickle.loads(Path(sys.argv[1]).read_bytes())
encoder = load_encoder(sys.argv[2])
for out in sys.argv[3:]:
    training.train(Path(out), encoder, data, config, save_every=5, progress=False)
"""


def start(*folders: Path) -> subprocess.Popen[bytes]:
    """Trains in one folder after the other, in a separate process; the programs are compiled by the first one alone."""
    given = folders[0].parent / "given.pickle"
    given.write_bytes(pickle.dumps((dataclasses.replace(QUICK, epochs=20, dropout=0.2), {"spatial": items(5)})))
    environment = os.environ | {
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(given.parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [str(given), str(folder(CASE)), *map(str, folders)]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=environment)


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole, killed)
    while not any(path.name.isdigit() for path in (killed / "state").glob("*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (killed / "scorer.safetensors").exists()
    assert start(killed).wait() == 0
    one, other = (Scorer.load(path / "scorer.safetensors") for path in (whole, killed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.tree.leaves(one), jax.tree.leaves(other))
    assert (whole / "metrics.csv").read_text() == (killed / "metrics.csv").read_text()
