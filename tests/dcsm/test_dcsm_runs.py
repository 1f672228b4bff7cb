"""`jaxid dcsm ...` as users run it: data, training, scores, evaluation, geometry, words; and what it refuses."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from jaxid.cli import main
from jaxid.data.files import save_picture
from jaxid.dcsm import benchmarks, training
from jaxid.dcsm.datasets import read_sets
from jaxid.dcsm.scoring import Scorer
from jaxid.experiments import dcsm_evaluate, dcsm_score, dcsm_train
from jaxid.experiments.reference_dcsm_training import common_order
from jaxid.stats import confidence_interval


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    main_ok(["dcsm", "data", "--out", str(folder), "--count", "12"])
    return folder


def main_ok(arguments: list[str]) -> None:
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
        try:
            main(arguments)
        except SystemExit as end:
            assert end.code in (0, None)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_training_goes_through_files(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--epochs", "1", "--no-augment", "--torch-file", str(tmp_path / "scorer.pt"), "--kind", "mlp"]
    main_ok(["dcsm", "train", "--data", str(drawn), "--out", str(out), *options])
    assert "items of spatial, attributes, negation" in capsys.readouterr().out
    assert (out / "scorer.safetensors").is_file() and size(out / "curves.png")[0] > 500
    picture = next((drawn / "spatial").glob("*.png"))
    captions = ["a star above a fish", "a fish above a star"]
    found = []
    for scorer in (out / "scorer.safetensors", tmp_path / "scorer.pt"):
        main_ok(["dcsm", "score", str(picture), *captions, "--scorer", str(scorer)])
        found.append([line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:]])
    assert len(found[0]) == 2 and len(found[1]) == 2
    main_ok(["dcsm", "export", str(out), "--out", str(tmp_path / "again.pt")])
    told = capsys.readouterr().out
    assert "11 functional words\n" in told and "at their own tokens" in told
    assert Scorer.load(tmp_path / "again.pt").placement == "replace"
    main_ok(["dcsm", "score", str(picture), *captions, "--scorer", str(tmp_path / "again.pt"), "--placement", "token"])
    assert [line.split()[-2:] for line in capsys.readouterr().out.splitlines()[1:]] == found[0]
    arguments = ["--data", str(drawn / "evaluation"), "--out", str(tmp_path / "eval"), "--benchmark", "ncd"]
    main_ok(["dcsm", "eval", *arguments, "--scorer", str(tmp_path / "again.pt")])
    assert capsys.readouterr().out.count("| tiny-clip | ") == 2  # cosine and dense maps
    assert "must end in .pt" in refused(["dcsm", "export", str(out), "--out", str(tmp_path / "scorer.bin")], capsys)


def test_published_training_is_another_one(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets under other names, too: the options name them."""
    data = shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("attributes", "sizes"))
    (data / "spatial").rename(data / "relations_withbg")
    (data / "negation.json").rename(data / "pairs.json")
    options = ["--epochs", "1", "--no-augment", "--kind", "mlp", "--placement", "insert"]
    options += ["--spatial", "relations_withbg", "--negation", "pairs.json"]
    given, train = [], training.train

    def noted(folder: Path, encoder: Any, sets: Any, config: Any, **settings: Any) -> Any:
        given.append((sets, settings["orders"]))
        return train(folder, encoder, sets, config, **settings)

    monkeypatch.setattr(training, "train", noted)
    arguments = ["dcsm", "train", "--data", str(data), "--out", str(tmp_path / "run"), *options]
    main_ok([*arguments, "--reference-bugs"])
    assert "items of spatial, negation" in capsys.readouterr().out
    assert Scorer.load(tmp_path / "run" / "scorer.safetensors").placement == "insert"
    assert "reference bugs was true, is now false" in refused(arguments, capsys)
    (published, common), (sound, own) = given
    assert common is common_order and own is training.own_orders
    assert published["negation"][0].alternatives and not sound["negation"][0].alternatives
    arguments[arguments.index("relations_withbg")] = "nothing"
    assert "nothing, the data set 'spatial', does not exist" in refused(arguments, capsys)


def test_six_captions_of_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    save_picture(tmp_path / "scene.png", rng.integers(0, 256, (90, 70, 3), np.uint8))
    captions = ["red circle blue triangle", "red triangle blue circle", "circle above triangle"]
    captions += ["circle below triangle", "circle with triangle", "circle without triangle"]
    figure = tmp_path / "maps.png"
    main_ok(["dcsm", "score", str(tmp_path / "scene.png"), *captions, "--out", str(figure)])
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 7 and sum(line.endswith("<-") for line in out) == 1
    assert size(figure)[1] > 800


def test_evaluation_is_one_table_and_resumes(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "eval"
    arguments = ["dcsm", "eval", "--data", str(drawn / "evaluation"), "--out", str(out), "--batch-size", "8"]
    main_ok(arguments)
    table = (out / "table.md").read_text()
    assert table.splitlines()[0] == "| model | method | ncd | ncd-reversed | whatsup-a | negbench-coco |"
    assert len((out / "table.csv").read_text().splitlines()) == 3 and size(out / "table.png")[0] > 500
    with (out / "table.csv").open() as file:
        row = next(csv.DictReader(file))
    for name, chance in (("ncd", 1 / 2), ("whatsup-a", 1 / 4), ("negbench-coco", 1 / 4)):
        low, high = confidence_interval(round(12 * float(row[name])), 12)
        told = [float(row[f"{name} {part}"]) for part in ("low", "high", "questions", "chance")]
        np.testing.assert_allclose(told, [low, high, 12, chance], atol=1e-5)
        assert f"{row['model']} | {row['method']} |" in table and f"{low:.3f} to {high:.3f}, n = 12)" in table
    assert "95 % Wilson intervals" in table and "Chance: ncd 0.5, ncd-reversed 0.5, whatsup-a 0.25" in table
    summary = json.loads((out / "summary.json").read_text())
    counts = {name: entry["questions"] for name, entry in summary["models"]["tiny-clip"]["dcsm"].items()}
    assert counts["whatsup-a"] == 12 and counts["negbench-coco"] == 12
    # A part that a kill took is computed anew, the others are kept.
    parts = sorted((out / "models" / "tiny-clip" / "parts").glob("*.parquet"))
    kept, times = parts[1:], [path.stat().st_mtime_ns for path in parts[1:]]
    parts[0].unlink()
    main_ok(arguments)
    assert (out / "table.md").read_text() == table
    assert [path.stat().st_mtime_ns for path in kept] == times
    config = (out / "config.yaml").read_text()
    assert "rewrite was true, is now false" in refused([*arguments, "--no-rewrite"], capsys)
    assert "reference bugs was false, is now true" in refused([*arguments, "--reference-bugs"], capsys)
    assert (out / "config.yaml").read_text() == config
    main_ok([*arguments, "--no-rewrite", "--restart"])
    assert [path.stat().st_mtime_ns for path in kept] != times
    capsys.readouterr()
    # What the run wrote repeats it.
    main_ok(["dcsm", "eval", "--config", str(out / "config.yaml")])
    assert capsys.readouterr().out.strip() == (out / "table.md").read_text().strip()


def test_bad_pictures_are_named_and_counted(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(drawn / "evaluation", tmp_path / "data")
    broken, gone = sorted((data / "controlled_images").glob("*.png"))[:2]
    broken.write_bytes(b"no picture")
    gone.unlink()
    arguments = ["dcsm", "eval", "--data", str(data), "--out", str(tmp_path / "out"), "--benchmark", "whatsup-a"]
    assert gone.name in refused(arguments, capsys)
    main_ok([*arguments, "--skip-bad"])
    skipped = json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"]
    assert len(skipped) == 2 and any(broken.name in one["reason"] for one in skipped)


def test_words_by_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.txt").write_text("A cat behind a dog\n\nno birds\n")
    main_ok(["dcsm", "words", str(tmp_path / "captions.txt"), "--out", str(tmp_path / "out")])
    words = (tmp_path / "out" / "words.txt").read_text().split("\n")
    assert "behind" in words and "no" in words
    assert (tmp_path / "out" / "marked.txt").read_text() == "A cat <BEHIND> a dog\n<NO> birds\n"
    assert "12 functional words" in capsys.readouterr().out


def test_geometry_writes_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_ok(["dcsm", "geometry", "--out", str(tmp_path), "--seeds", "2", "--steps", "3", "--dimension", "4"])
    assert (tmp_path / "geometry.parquet").is_file() and size(tmp_path / "geometry.png")[0] > 500
    assert "free:" in capsys.readouterr().out


def test_exactly_as_many_items_as_asked(tmp_path: Path) -> None:
    main_ok(["dcsm", "data", "--out", str(tmp_path), "--count", "40"])
    sets = read_sets(tmp_path)
    assert {name: len(items) for name, items in sets.items()} == {"spatial": 40, "attributes": 40, "negation": 40}
    numbered = [item for item in sets["spatial"] if "." in item.key]
    assert numbered, "no two scenes are alike: nothing is tested"
    for item in numbered:
        assert item.captions[0].split() == item.captions[0].replace(".", "").split()
    asked = benchmarks.read(tmp_path / "evaluation")
    assert {name: len(questions) for name, questions in asked.items()} == dict.fromkeys(asked, 40) and len(asked) == 4


def test_weights_come_last(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were read")

    for module in (dcsm_score, dcsm_train, dcsm_evaluate):
        monkeypatch.setattr(module, "load_encoder", reached)
    picture, out = str(next((drawn / "spatial").glob("*.png"))), str(tmp_path / "out")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    damaged = ["--scorer", str(tmp_path / "damaged.safetensors")]
    train, evaluation = ["train", "--data", str(drawn), "--out", out], ["eval", "--data", str(drawn / "evaluation")]
    for arguments, message in [
        (["score", "nowhere.png", "a"], "nowhere.png"),
        (["score", picture, " "], "no caption was given"),
        (["score", picture, "a", *damaged], "damaged.safetensors"),
        (["score", picture, "a", "--out", f"{out}.jpg"], "must end in .png"),
        ([*train, "--kind", "tree"], "tree"),
        ([*train, "--placement", "left"], "left"),
        ([*train, "--learning-rate", "nan"], "must be a finite number"),
        ([*train, "--learning-rate", "inf"], "must be a finite number"),
        ([*train, "--seed", "-5"], "the seed must be an integer"),
        ([*train, "--seed", "99999999999999999999"], "the seed must be an integer"),
        ([*train, "--batch-size", "500"], "a batch 500"),
        ([*evaluation, "--out", out, *damaged], "damaged.safetensors"),
        ([*evaluation, "--out", out, "--group", "call"], "call"),
    ]:
        assert message in refused(["dcsm", *arguments], capsys), arguments


def test_scorers_of_other_encoders_are_not_passed_over(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Scorer.init(jax.random.key(0), 17, 30, encoder="other").save(tmp_path / "other.safetensors")
    arguments = [
        "--data",
        str(drawn / "evaluation"),
        "--out",
        str(tmp_path),
        "--scorer",
        str(tmp_path / "other.safetensors"),
    ]
    assert "was trained on other, which is none of tiny-clip" in refused(["dcsm", "eval", *arguments], capsys)


@pytest.mark.parametrize("seed", ["-5", "99999999999999999999"])
@pytest.mark.parametrize("command", ["data", "geometry"])
def test_seeds_that_are_none(command: str, seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "seed must be an integer from 0" in refused(
        ["dcsm", command, "--out", str(tmp_path), "--seed", seed], capsys
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "PICTURE"], "captions requires an argument"),
        (["score", "nowhere.png", "a star"], "picture nowhere.png does not exist"),
        (["score", "PICTURE", "a star", "--model", "clip-z99"], "no model folder at clip-z99"),
        (["score", "PICTURE", "a star", "--model", "tiny-llava"], "'llava' is not a CLIP-like model"),
        (["score", "PICTURE", "a star", "--group", "all"], "all"),
        (["score", "PICTURE", "a star", "--scorer", "nowhere.safetensors"], "nowhere.safetensors is missing"),
        (["score", "PICTURE", "a star", "--mesh", "depth=2"], "a mesh is given as data=4,model=2, or as auto; not as"),
        (["score", "PICTURE", "a star", "--mesh", "data=99"], "has 99 devices, but JAX sees 8"),
        (["train", "--data", "EMPTY", "--out", "OUT"], "holds no data set"),
        (["eval", "--data", "EMPTY", "--out", "OUT"], "holds no evaluation set"),
        (["eval", "--data", "EMPTY", "--out", "OUT", "--benchmark", "imagenet"], "imagenet"),
        (["words", "nowhere.txt", "--out", "OUT"], "nowhere.txt is missing"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save_picture(tmp_path / "scene.png", np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    given = {"PICTURE": tmp_path / "scene.png", "EMPTY": tmp_path / "empty", "OUT": tmp_path / "out"}
    assert message in refused(["dcsm", *(str(given.get(part, part)) for part in arguments)], capsys)
