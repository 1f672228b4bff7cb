"""tiny-clip's scorers: the truth of their training items, and the published demonstration on drawn scenes."""

import dataclasses
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from test_cli import run

from jaxid.checkpoints.encoders import load_encoder
from jaxid.checkpoints.loading import find_folder
from jaxid.data import scenes as drawn
from jaxid.data.files import save_picture
from jaxid.dcsm import evaluate, own_scorers
from jaxid.dcsm.scoring import Scorer
from jaxid.errors import InputError
from jaxid.experiments.dcsm_evaluate import EvaluateScorers
from jaxid.io import read_json
from jaxid.zoo import clip_evaluation, tiny_dcsm
from jaxid.zoo.tiny_clip import SHAPES, is_held_out, sample, seen


def names(caption: str) -> list[str]:
    return [word for word in caption.split() if word in SHAPES]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, set[str]]:
    """What each picture shows that was drawn in the test, by its bytes."""
    found: dict[bytes, set[str]] = {}
    render = drawn.render

    def noted(scenes: drawn.Scenes, size: int) -> np.ndarray:
        pictures = render(scenes, size)
        for picture, objects in zip(pictures, scenes.objects, strict=True):
            found[picture.tobytes()] = {SHAPES[index] for index in objects if index >= 0}
        return pictures

    monkeypatch.setattr(drawn, "render", noted)
    return found


def says_missing(caption: str) -> str | None:
    """The object that a caption says is missing."""
    words = caption.split()
    for index, word in enumerate(words):
        if word in ("no", "not", "without"):
            return next(word for word in words[index:] if word in SHAPES)
    return None


def test_captions_about_a_second_object_are_true_of_their_pictures_alone(shown: Mapping[bytes, set[str]]) -> None:
    items = tiny_dcsm.presence(np.random.default_rng(0), 80)
    thirds, bare, phrases = 0, 0, set[str]()
    for item in items:
        here, there = shown[np.asarray(item.picture).tobytes()], shown[np.asarray(item.opposite).tobytes()]
        assert len(here) == 2
        for right, wrong in zip(item.captions, item.opposite_captions, strict=True):
            missing = says_missing(wrong)
            assert set(names(right)) == set(names(wrong)) == here and says_missing(right) is None
            assert missing in here and missing not in there and here - {missing} <= there
            bare += "a" not in right.split() and "an" not in right.split()
            phrases |= {word for word in (right + " " + wrong).split() if word not in SHAPES}
        thirds += len(there) == 2
    assert 20 < thirds < 60 and 10 < bare < 70
    assert {"with", "and", "without", "no", "but", "not"} <= phrases
    assert items[0].captions[0] != items[0].captions[1]


def test_a_second_object_never_has_a_held_out_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[drawn.Scenes] = []
    render = drawn.render
    monkeypatch.setattr(drawn, "render", lambda scenes, size: (made.append(scenes), render(scenes, size))[1])
    tiny_dcsm.presence(np.random.default_rng(3), 200)
    assert len(made) == 2
    for scenes in made:
        assert len(scenes) == 200 and seen(scenes).all()


def test_a_missing_object_is_any_other() -> None:
    scenes = sample(np.random.default_rng(1), 500, 2, seen)
    found = tiny_dcsm.absent(np.random.default_rng(2), scenes)
    assert not (found[:, None] == scenes.objects).any() and len(set(found.tolist())) == len(SHAPES)
    alone = tiny_dcsm.with_second(scenes, np.where(np.arange(500) % 2, found, -1))
    assert (alone.objects[::2, 1] == -1).all() and (alone.colors[::2, 1] == -1).all()
    assert (alone.objects[1::2, 1] == found[1::2]).all() and (alone.objects[:, 0] == scenes.objects[:, 0]).all()


def test_training_sets_hold_the_old_kinds_and_the_new_one() -> None:
    sets = tiny_dcsm.training_sets(0, 8)
    assert list(sets) == ["spatial", "attributes", "negation", "presence"]
    assert all(len(items) == 8 for items in sets.values())


def test_presence_draws_on_where_few_opposite_scenes_are_kept() -> None:
    """A third object that is one of three of the ten: about one scene in nine."""
    items = tiny_dcsm.presence(
        np.random.default_rng(1), 20, lambda scenes: (scenes.objects[:, 1] >= 0) & (scenes.objects[:, 1] < 3)
    )
    assert len(items) == 20
    assert {item.key.split("_")[1] for item in items} == set(SHAPES[:3])


def test_questions_about_presence_are_balanced() -> None:
    asked = tiny_dcsm.questions(5, 60)["presence"]
    missing = [says_missing(right) is not None for right, _ in asked.captions]
    assert 15 < sum(missing) < 45
    assert all((says_missing(wrong) is None) == own for own, (_, wrong) in zip(missing, asked.captions, strict=True))


# --- the demonstration ---------------------------------------------------------------------------------------------


def test_captions_of_a_demonstration_are_true(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[drawn.Scenes] = []
    render = drawn.render
    monkeypatch.setattr(drawn, "render", lambda scenes, size: (made.append(scenes), render(scenes, size))[1])
    both, alone = (tiny_dcsm.demonstration(7, 30, alone=flag) for flag in (False, True))
    scenes = made[0]
    assert (made[1].objects[:, 1] == -1).all() and (made[1].centers == scenes.centers).all()
    for row, own in enumerate(both.captions):
        named = [f"{tiny_dcsm.COLOR_NAMES[c]} {SHAPES[o]}" for o, c in zip(*_row(scenes, row), strict=True)]
        assert own[0] == " ".join(named) and sorted(own[1].split()) == sorted(own[0].split()) and own[1] != own[0]
        first, how, second = own[2].split()
        ys = dict(zip([SHAPES[o] for o in scenes.objects[row]], scenes.centers[row, :, 1], strict=True))
        assert (how == "above") == (ys[first] < ys[second])
        assert own[3] == f"{first} {'below' if how == 'above' else 'above'} {second}"
        assert own[4:] == (f"{first} with {second}", f"{first} without {second}")
        assert alone.captions[row] == (*own[:4], *own[:3:-1])
    assert len({scenes.objects[row, 0] for row in range(30)}) > 5


def _row(scenes: drawn.Scenes, row: int) -> tuple[list[int], list[int]]:
    return scenes.objects[row].tolist(), scenes.colors[row].tolist()


def test_a_demonstration_of_two_named_objects() -> None:
    asked = tiny_dcsm.demonstration(7, 20, ("circle", "triangle"))
    firsts = [own[2].split()[0] for own in asked.captions]
    assert set(firsts) == {"circle", "triangle"}
    assert all(set(names(own[0])) == {"circle", "triangle"} for own in asked.captions)
    held = is_held_out(sample(np.random.default_rng(0), 40, 2, lambda scenes: np.ones(len(scenes), bool)))
    assert held[0].any()  # scenes of a demonstration are not filtered


def test_a_demonstration_counts_the_right_captions_of_each_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant scorer gets nothing, a perfect one everything, one that is always wrong nothing."""
    scorer = Scorer.init(jax.random.key(0), 37, 30, kind="mlp")
    given = {
        "constant": np.array([5.0, 5, 5, 5, 5, 5]),
        "perfect": np.array([6.0, 5, 6, 5, 6, 5]),
        "wrong": np.array([4.0, 5, 4, 5, 4, 5]),
        "some": np.array([1.0, 0, 0, 1, 9, 8]),
    }
    scorers = {name: dataclasses.replace(scorer, encoder=name) for name in given}

    def scores(scorer: Scorer, pictures: object, captions: object, words: evaluate.Wording, shown: range) -> object:
        return [given[scorer.encoder] for _ in shown]

    monkeypatch.setattr(clip_evaluation, "map_scores", scores)
    found = clip_evaluation.demonstrate(load_encoder("tiny-clip"), scorers, count=8)
    assert list(found) == ["binding", "relation", "presence", "absence"]
    shares = {name: [entry["methods"][name]["accuracy"] for entry in found.values()] for name in given}
    assert shares == {"constant": [0] * 4, "perfect": [1] * 4, "wrong": [0] * 4, "some": [1, 0, 1, 1]}
    assert all(list(entry["methods"]) == ["cosine", *given] for entry in found.values())


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_makes_both_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step each, on one of the sets; the folder gets both, the report all tables; a second call repeats nothing."""
    for name in ("evaluate", "demonstrate"):
        monkeypatch.setattr(clip_evaluation, name, partial(getattr(clip_evaluation, name), count=8))
    sets = tiny_dcsm.training_sets
    monkeypatch.setattr(tiny_dcsm, "training_sets", lambda *given: {"presence": sets(*given)["presence"]})
    shutil.copytree(find_folder("tiny-clip"), tmp_path / "model", ignore=shutil.ignore_patterns("scorer*"))
    times = []
    for _ in range(2):
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
            path = clip_evaluation.train_scorers(tmp_path / "run", tmp_path / "model", seeds=(3,), steps=1)
        times.append((tmp_path / "run" / "scorer-cnn-3" / "metrics.csv").stat().st_mtime_ns)
    assert times[0] == times[1]
    found = own_scorers.own_scorers(str(tmp_path / "model"))
    assert tuple(found) == clip_evaluation.SCORERS and all(one.encoder == "tiny-clip" for one in found.values())
    for kind in found:
        settings = read_json(tmp_path / "run" / f"scorer-{kind}-3" / "run.json", InputError)
        assert (settings["kind"], settings["group"], settings["decay"]) == (kind, "mixed", True)
        assert list(settings["items"]) == ["presence"]
    report = read_json(path, InputError)
    assert list(report["tables"]) == ["held-out", *clip_evaluation.SHOWN]
    for entry in report["tables"]["held-out"].values():
        assert {"chance", "cosine", "mlp", "cnn"} == set(entry) and len(entry["cnn"]["seeds"]) == 1
        assert entry["cnn"]["low"] < entry["cnn"]["high"], "questions alone leave an interval"


# --- the shipped scorers -------------------------------------------------------------------------------------------


def test_the_shipped_scorers_tell_the_demonstrations_captions_apart() -> None:
    encoder, scorers = load_encoder("tiny-clip"), own_scorers.own_scorers("tiny-clip")
    assert tuple(scorers) == clip_evaluation.SCORERS
    for shapes in clip_evaluation.SHOWN.values():
        for name, entry in clip_evaluation.demonstrate(encoder, scorers, seed=11, shapes=shapes).items():
            for kind in scorers:
                assert entry["methods"][kind]["accuracy"] >= 0.9, (name, kind, entry)


def test_a_model_s_own_scorer_of_a_kind(tmp_path: Path) -> None:
    kinds = clip_evaluation.SCORERS
    assert tuple(own_scorers.own_scorers("tiny-clip")) == kinds
    for kind in kinds:
        assert own_scorers.find_scorer("tiny-clip", Path(kind)).kind == kind
        made = EvaluateScorers(data=tmp_path, out=tmp_path, scorer=(Path(kind),))
        found = made.scorers()["tiny-clip"]
        assert found is not None and found.kind == kind
    default = own_scorers.find_scorer("tiny-clip")
    assert default.kind == kinds[0] and default.encoder == "tiny-clip"
    with pytest.raises(InputError, match="cnn and mlp are both for tiny-clip"):
        EvaluateScorers(data=tmp_path, out=tmp_path, scorer=(Path("cnn"), Path("mlp"))).scorers()


def test_a_model_without_a_scorer_of_that_kind(tmp_path: Path) -> None:
    shutil.copytree(find_folder("tiny-clip"), tmp_path / "model", ignore=shutil.ignore_patterns("scorer*"))
    model = str(tmp_path / "model")
    assert own_scorers.own_scorers(model) == {} and own_scorers.own_scorer(model) is None
    with pytest.raises(InputError, match="has no scorer of its own; give --scorer"):
        own_scorers.find_scorer(model, Path("cnn"))
    scorer = Scorer.init(jax.random.key(0), 37, 30, kind="mlp")
    scorer.save(tmp_path / "model" / "scorer.safetensors")
    assert own_scorers.find_scorer(model, Path("mlp")).kind == "mlp"
    with pytest.raises(InputError, match="has no scorer 'cnn' of its own, only mlp"):
        own_scorers.find_scorer(model, Path("cnn"))


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Scorer.init(jax.random.key(0), 5, 3, kind="mlp").save(tmp_path / "cnn.safetensors")
    (tmp_path / "cnn.safetensors").rename(tmp_path / "cnn")
    assert own_scorers.find_scorer("tiny-clip", Path("cnn")).map_shape == (5, 3)


def test_captions_are_scored_by_the_scorer_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, lines = tmp_path / "scene.png", {}
    save_picture(picture, tiny_dcsm.demonstration(1, 1).pictures[0])
    for kind in clip_evaluation.SCORERS:
        assert run("dcsm", "score", picture, "red circle", "no circle", "--scorer", kind) == 0
        lines[kind] = capsys.readouterr().out
    assert lines["mlp"] != lines["cnn"]
    assert run("dcsm", "score", picture, "red circle", "--scorer", "perceptron") == 2
    assert capsys.readouterr().err.count("\n") == 1
