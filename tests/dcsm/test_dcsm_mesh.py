"""CLIP-like models and scorers on a mesh: the same numbers as on one device, divided as asked."""

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders
import fixtures
import jax
import numpy as np
import optax
import pytest
from benchmark_files import Modules
from encoders import ENCODER_CASES, EncoderCase
from jax.sharding import PartitionSpec
from test_dcsm_runs import main_ok
from test_dcsm_training import QUICK, items

from jaxid import meshes
from jaxid.checkpoints import sharding
from jaxid.checkpoints.encoders import load_encoder
from jaxid.checkpoints.tensors import flatten
from jaxid.data.files import save_picture
from jaxid.dcsm import embedding, training
from jaxid.dcsm.embedding import embed_images, embed_texts
from jaxid.dcsm.evaluate import answer
from jaxid.dcsm.scoring import Scorer, score, score_own
from jaxid.errors import InputError
from jaxid.experiments.dcsm_evaluate import EvaluateScorers
from jaxid.experiments.dcsm_score import ScoreCaptions
from jaxid.experiments.dcsm_train import TrainScorer
from jaxid.families.base import Encoder
from jaxid.interp import programs
from jaxid.kernels.similarity import GROUPS
from jaxid.train.loop import read_metrics

CASE = ENCODER_CASES[0]
CAPTIONS = ["red star above a fish", "a fish but no star", "star", "a big fish to the left of a star", "not small"]
LENGTH = 11
EXACT = 1e-5


def on_mesh(case: EncoderCase, mesh: str) -> Encoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not all tiny models divide
        return load_encoder(encoders.folder(case), mesh=mesh)


def pictures() -> list[np.ndarray]:
    return [*fixtures.pictures(), fixtures.pictures()[0][::-1].copy()]


def results(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[Any]:
    """Collects what programs of `embedding` return, after the first of their arrays."""
    found: list[Any] = []

    def kept(run: Callable[..., Any]) -> Callable[..., Any]:
        def called(encoder: Encoder, *arrays: Any) -> Any:
            made = run(encoder, *arrays)
            found.append((arrays[0], *made))
            return made

        return called

    for name in names:
        monkeypatch.setattr(embedding, name, kept(getattr(embedding, name)))
    return found


@pytest.mark.parametrize("case", ENCODER_CASES, ids=lambda case: case.name)
def test_encoders_on_a_mesh(case: EncoderCase, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, found = encoders.encoder(case), on_mesh(case, "data=4,model=2")
    assert found.fingerprint == alone.fingerprint and found.mesh == meshes.mesh(4, 2)
    leaves, expected = flatten(found.parameters), flatten(alone.parameters)
    wanted = sharding.layout(found.definition, expected, meshes.mesh(4, 2))
    for path, leaf in leaves.items():
        assert leaf.sharding == wanted.shardings[path], path
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert not [path for path in wanted.whole if ".layers." in path]
    divided = [path for path, leaf in leaves.items() if not leaf.sharding.is_fully_replicated]
    for stack in ("tower.layers", "text_encoder.layers"):
        names = {path.removeprefix(f"{stack}.") for path in divided if path.startswith(stack)}
        assert {"up.kernel", "down.kernel", *(f"attention.{name}" for name in ("query", "value", "out"))} <= names

    images, texts = embed_images(alone, pictures()), embed_texts(alone, CAPTIONS, LENGTH)
    made = results(monkeypatch, "_image", "_text")
    sharded = embed_images(found, pictures()), embed_texts(found, CAPTIONS, LENGTH)
    for ours, theirs in zip(sharded, (images, texts), strict=True):
        np.testing.assert_allclose(ours.tokens, theirs.tokens, atol=EXACT)
        np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=EXACT)
    for given, tokens, pooled in made:  # of 3 pictures and 5 captions
        assert len(tokens) in (4, 8)
        for value in (given, tokens, pooled):
            assert value.sharding.is_equivalent_to(
                jax.NamedSharding(meshes.mesh(4, 2), PartitionSpec("data")), value.ndim
            )


@pytest.mark.parametrize(
    "case", [CASE, pytest.param(ENCODER_CASES[2], marks=pytest.mark.slow)], ids=lambda case: case.name
)
def test_little_crosses_devices(case: EncoderCase, modules: Modules) -> None:
    """Two sums over "model" in every block, and nothing over "data"."""
    text, collectives = modules("hlo_text"), modules("hlo_collectives")
    sizes, found = {"data": 4, "model": 2}, {}

    def compiled(program: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        with jax.set_mesh(meshes.mesh(4, 2)):
            parsed = text.parse(program.jitted.lower(*arguments, **settings).compile().as_text())
        for axis in sizes:
            found[program.__name__, axis] = collectives.in_one_step(parsed, sizes, axis=axis)
        crossing = collectives.of_program(parsed, sizes)
        assert crossing and all(one.axes == ("model",) for one in crossing)
        with programs.watched(None):
            return program(*arguments, **settings)

    encoder = on_mesh(case, "data=4,model=2")
    with programs.watched(compiled):
        embed_images(encoder, pictures())
        embed_texts(encoder, CAPTIONS, LENGTH)
    assert found == {(name, axis): 2 * (axis == "model") for name in ("_image", "_text") for axis in sizes}


def test_auto_gives_every_device_a_copy() -> None:
    found = on_mesh(CASE, "auto")
    assert found.mesh == meshes.mesh(8, 1)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found.parameters))
    images = embed_images(found, pictures())
    np.testing.assert_allclose(images.tokens, embed_images(encoders.encoder(CASE), pictures()).tokens, atol=EXACT)


def test_batches_grow_with_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy encodes as many pictures as one device does alone."""
    monkeypatch.setattr(embedding, "BATCH", 2)
    monkeypatch.setattr(embedding, "_together", embedding._together.__wrapped__)
    shown, lengths = pictures() * 7, []
    for model in (encoders.encoder(CASE), on_mesh(CASE, "data=8")):
        with pytest.MonkeyPatch.context() as patched:
            made = results(patched, "_image")
            embed_images(model, shown)
        lengths.append([len(tokens) for _, tokens, _ in made])
    assert lengths == [[2] * 10 + [1], [16, 8]]


@pytest.mark.parametrize("mesh", ["data=0", "data=2,data=4", "device=4", "8", ""])
def test_what_is_no_mesh(mesh: str) -> None:
    with pytest.raises(InputError, match=r"^a mesh is given as data=4,model=2, or as auto; not as"):
        load_encoder(encoders.folder(CASE), mesh=mesh)


def test_meshes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"^the mesh data=16,model=1 has 16 devices, but JAX sees 8;"):
        load_encoder(encoders.folder(CASE), mesh="data=16")
    with pytest.raises(InputError, match=r"^model=3 divides none of the encoder's 2 heads, 40 rows; choose a divisor"):
        load_encoder(encoders.folder(CASE), mesh="model=3")


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_scores_on_a_mesh(group: str) -> None:
    scorer, mesh = Scorer.init(jax.random.key(1), 17, LENGTH), meshes.mesh(4, 2)
    images = embed_images(encoders.encoder(CASE), pictures())
    texts = embed_texts(encoders.encoder(CASE), CAPTIONS, LENGTH)
    there = dataclasses.replace(
        scorer, network=meshes.replicated(mesh, scorer.network), vectors=meshes.replicated(mesh, scorer.vectors)
    )
    alone = score(scorer, images, texts, group=group)
    for found in (score(scorer, images, texts, group=group, mesh=mesh), score(there, images, texts, group=group)):
        np.testing.assert_allclose(found, alone, atol=EXACT)
    if group == "call":
        return
    own = texts[[0, 1, 2, 3, 4, 0]]
    alone = score_own(scorer, images, own, 2, group=group)
    for found in (
        score_own(scorer, images, own, 2, group=group, mesh=mesh),
        score_own(there, images, own, 2, group=group),
    ):
        np.testing.assert_allclose(found, alone, atol=EXACT)


def test_answers_on_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes the encoder's mesh for its scores, too."""
    from jaxid.dcsm import scoring

    scorer, given, run = Scorer.init(jax.random.key(1), 17, LENGTH), [], scoring._score_own
    monkeypatch.setattr(scoring, "_score_own", lambda *arrays: (given.append(arrays[2]), run(*arrays))[1])
    questions = [CAPTIONS[:2], CAPTIONS[1:4], CAPTIONS[3:]]
    one, many = (
        answer(model, pictures(), questions, scorer) for model in (encoders.encoder(CASE), on_mesh(CASE, "auto"))
    )
    assert one.dcsm is not None and many.dcsm is not None
    assert one.cosine.tolist() == many.cosine.tolist() and one.dcsm.tolist() == many.dcsm.tolist()
    assert [images.sharding.spec for images in given[2:]] == [PartitionSpec("data")] * 2
    assert [len(images) for images in given] == [2, 1, 8, 8]


# --- training -------------------------------------------------------------------------------------------------------


def trained(folder: Path, encoder: Encoder, **changes: Any) -> tuple[Scorer, list[Any]]:
    config = dataclasses.replace(QUICK, **{"learning_rate": 0.1, **changes})
    # Adam would make steps of gradients that are 0 but for rounding. And optax is not written for strict promotion.
    with pytest.MonkeyPatch.context() as patched, jax.numpy_dtype_promotion("standard"):
        patched.setattr(training.optax, "adam", optax.sgd)
        scorer = training.train(folder, encoder, {"spatial": items(2)}, config, progress=False)
    return scorer, [row["loss"] for row in read_metrics(folder / "metrics.csv")]


@pytest.mark.parametrize(
    "change", [{"kind": "mlp"}, pytest.param({"augment": True, "dropout": 0.3}, marks=pytest.mark.slow)], ids=str
)
def test_training_on_a_mesh(tmp_path: Path, change: dict[str, Any]) -> None:
    """Pictures over four copies of an encoder of two devices each, and dropout that does not know of them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("jaxid.train.placement.every_device", lambda: meshes.mesh(1))
        alone, losses = trained(tmp_path / "one", encoders.encoder(CASE), **change)
    found, same = trained(tmp_path / "many", on_mesh(CASE, "data=4,model=2"), **change)
    np.testing.assert_allclose(same, losses, atol=2e-4)  # of what is written with four decimals
    start = Scorer.init(jax.random.fold_in(jax.random.key(QUICK.seed), 0), 17, 9, kind=change.get("kind", "cnn"))
    assert np.abs(alone.network.fc1 - start.network.fc1).max() > 1e-3
    for name, value in found.network._asdict().items():
        expected = alone.network._asdict()[name]
        np.testing.assert_allclose(value, expected, atol=EXACT * float(np.abs(expected).max()), err_msg=name)


def test_pictures_of_training_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def step(stage: Any, placement: Any = None) -> Any:
        def run(state: Any, batch: Any, constants: Any) -> Any:
            seen.update(batch=batch, constants=constants)
            raise Enough

        return run

    monkeypatch.setattr("jaxid.train.loop._step_function", step)
    encoder = on_mesh(CASE, "data=4,model=2")
    with pytest.raises(Enough):
        trained(tmp_path, encoder, augment=True)
    for name, array in seen["batch"].items():
        assert array.sharding.spec == (PartitionSpec("data") if name.endswith("images") else PartitionSpec()), name
    given, own = flatten(seen["constants"]["encoder"]), flatten(encoder.parameters)
    assert all(given[path] is own[path] for path in own)


# --- commands -------------------------------------------------------------------------------------------------------


def test_captions_are_scored_on_a_mesh(tmp_path: Path) -> None:
    save_picture(tmp_path / "scene.png", pictures()[0])
    command = ScoreCaptions(picture=tmp_path / "scene.png", captions=("a star above a fish", "a fish", "a key"))
    for one, many in zip(command.run(), dataclasses.replace(command, mesh="data=2").run(), strict=True):
        assert one.caption == many.caption
        np.testing.assert_allclose([many.score, many.cosine], [one.score, one.cosine], atol=EXACT)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    main_ok(["dcsm", "data", "--out", str(folder), "--count", "12"])
    return folder


@pytest.mark.slow
def test_an_evaluation_may_be_resumed_on_another_mesh(drawn: Path, tmp_path: Path) -> None:
    command = EvaluateScorers(
        data=drawn / "evaluation", out=tmp_path / "one", benchmark=("ncd",), batch_size=4, progress=False
    )
    alone = command.run()
    there = dataclasses.replace(command, out=tmp_path / "many", mesh="data=4")
    assert there.run().models == alone.models
    parts = sorted((tmp_path / "one").glob("models/*/parts/*.parquet"))
    kept = [path.stat().st_mtime_ns for path in parts[1:]]
    parts[0].unlink()
    assert dataclasses.replace(command, mesh="auto").run().models == alone.models
    assert [path.stat().st_mtime_ns for path in parts[1:]] == kept and parts[0].is_file() and kept


@pytest.mark.slow
def test_a_scorer_is_trained_on_a_mesh(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn / "spatial", tmp_path / "data" / "spatial")
    command = TrainScorer(
        data=tmp_path / "data", out=tmp_path / "run", mesh="data=2", epochs=1, kind="mlp", progress=False
    )
    with jax.numpy_dtype_promotion("standard"):
        found = command.run()
    assert found.rows and (tmp_path / "run" / "scorer.safetensors").is_file()
