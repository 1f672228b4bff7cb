"""Model cards: their format, what they tell and what they say is not recorded, and the snippets that they show."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxid import cli, plots, zoo
from jaxid.errors import CheckpointError, DataError, InputError
from jaxid.io import write_json
from jaxid.train.folder import append_metrics
from jaxid.zoo import cards
from jaxid.zoo.records import RECORD_FILE

pytestmark = pytest.mark.optimized

SHARE = {"value": 0.9375, "low": 0.85, "high": 0.97, "count": 512}
COLUMNS = ("step", "stage", "loss", "accuracy", "patch_object", "skipped")


def copied(name: str, folder: Path) -> Path:
    """A shipped model without its card."""
    return Path(shutil.copytree(zoo.folder(name), folder, ignore=shutil.ignore_patterns("*.md", "*.png")))


def card_of(name: str, folder: Path, **options: Any) -> str:
    model = folder / "model"
    if not model.exists():
        copied(name, model)
    return cards.write_card(name, model, **options).read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of tiny-llava, as a run leaves it."""
    folder = tmp_path / "run"
    write_json(folder / "run.json", {"seed": 7, "steps": 40, "vocabulary": 122})
    write_json(folder / "weak.json", {"step": 20, "share": 0.7})
    for step, stage, numbers in ((20, "seeing", {"patch_object": 0.5}), (40, "language", {"accuracy": 0.875})):
        append_metrics(folder / "metrics.csv", COLUMNS, {"step": step, "stage": stage, "loss": 1 / step, **numbers})
    session = {"versions": {"jaxid": "0.2.0", "jax": "9.8.7"}, "cores": 2, "machine": "x86_64", "device": "cpu"}
    times = [("2026-01-02T03:04:05Z", 600.0, 0), ("2026-01-02T04:05:06Z", 330.0, 20)]
    sessions = [
        session | {"start": start, "end": start.replace("T0", "T1"), "seconds": seconds, "first_step": step}
        for start, seconds, step in times
    ]
    write_json(folder / RECORD_FILE, {"finished": True, "sessions": sessions})
    write_json(folder / "accuracy.json", {"left_right": SHARE, "near_far": SHARE | {"value": 0.75}})
    for name in ("model", "model-weak"):
        (folder / name).mkdir()
        weights = zoo.folder("tiny-llava" if name == "model" else "tiny-llava-weak") / "model.safetensors"
        shutil.copy(weights, folder / name)
    return folder


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    """A folder with the results of both measurements."""
    folder = tmp_path / "gates"
    gate = {"name": "correct: left_right", "value": 0.995, "low": 0.99, "high": 0.998, "least": 0.99, "most": None}
    angle = {"name": "angle of the words", "value": 41.25, "low": 8.0, "high": 41.25, "least": None, "most": 35.0}
    free = {"name": "near by", "value": 0.5, "low": 0.4, "high": 0.6, "least": None, "most": None}
    passed = [gate | {"passed": True}, angle | {"passed": False}, free | {"passed": True}]
    write_json(folder / "gates.json", passed)
    row = {"name": "grey", "about": "clean pictures without colours", "accuracy": {"exists": SHARE}}
    words = {"left_right": {"left": 0.75, "right": 0.25}}
    found = {"model": "tiny-llava", "fingerprint": None, "count": 256, "seed": 1, "rows": [row], "words": words}
    write_json(folder / "unknown.json", found)
    return folder


@pytest.mark.parametrize("name", zoo.SHIPPED)
def test_cards_have_hugging_faces_format_and_invent_nothing(name: str, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    text = card_of(name, tmp_path)
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en"] and "jaxid" in data["tags"]
    tasks = {"tiny-clip": "zero-shot-image-classification", "tiny-video": "video-text-to-text"}
    assert data["pipeline_tag"] == tasks.get(name, "image-text-to-text")
    assert data["library_name"] == ("jaxid" if name == "tiny-video" else "transformers")
    heads = re.findall(r"^#+ (.*)$", card.content, re.MULTILINE)
    assert heads[:2] == [name, "What it is for"] and heads[-2:] == ["What it does not do", "Licence"]
    missing = "the settings of the run; the run's date, duration, hardware and versions; the run's curves; results."
    assert f"Not recorded: {missing}" in " ".join(text.split())
    assert "Nothing of the run's date" in text and "curves.png" not in text and "```json" not in text
    assert "{{" not in text and "None" not in text and "\n\n\n" not in text


@pytest.mark.parametrize("name", zoo.SHIPPED)
def test_shipped_cards_are_about_the_shipped_weights(name: str) -> None:
    folder = zoo.folder(name)
    text = (folder / cards.CARD_FILE).read_text(encoding="utf-8")
    weights = cards._weights(folder)
    told = f"{weights['parameters']} parameters, stored as {weights['dtype']} ({weights['megabytes']} MB)"
    assert told in text and f"{weights['words']} words" in text
    if (folder / cards.CURVES_FILE).exists() != ("(curves.png)" in text):
        raise AssertionError("the figure and the card do not belong together")


def test_everything_recorded_is_told(run: Path, gates: Path, tmp_path: Path) -> None:
    text = card_of("tiny-llava", tmp_path, run=run, gates=gates)
    assert "Not recorded" not in text and "not recorded" not in text
    for part in (
        "| begun | 2026-01-02T03:04:05Z (UTC) |",
        "| ended | 2026-01-02T14:05:06Z (UTC) |",
        "| time | 16 minutes, evaluation included |",
        "| resumed | 1 time |",
        "| seed | 7 |",
        '| hardware | 2 cores, x86_64, JAX device "cpu" |',
        "| versions | jaxid 0.2.0, jax 9.8.7 |",
        "| seeing | 1 to 20 | 0.050 |  |",
        "| language | 21 to 40 | 0.025 | 0.875 |",
        "![Loss and shares of correct answers by step](curves.png)",
        "| correct: left_right | 0.995 | 0.990 to 0.998 | >= 0.99 | passed |",
        "| angle of the words | 41.250 | 8.000 to 41.250 | <= 35 | missed |",
        "| near by | 0.500 | 0.400 to 0.600 |  |  |",
        "| left right | 93.8% (85.0% to 97.0%) | 512 |",
        "| near far | 75.0% (85.0% to 97.0%) | 512 |",
        "| grey |  |  | 93.8% (85.0% to 97.0%) |  |",
        "- grey: clean pictures without colours.",
        '- "Is the dog to the left or right of the star?": "left" 75%, "right" 25%.',
        "256 pictures of each sort",
    ):
        assert part in text, part
    assert (tmp_path / "model" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model" / "curves.png").stat().st_size < 300e3


def test_records_of_a_part_and_of_an_unfinished_run(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / RECORD_FILE).read_text())
    record["sessions"], record["finished"] = record["sessions"][1:], False
    write_json(run / RECORD_FILE, record)
    text = card_of("tiny-llava", tmp_path, run=run)
    assert "| last update; the run was not finished | " in text and "| resumed | never |" in text
    assert "| time | 6 minutes from step 20 on; what came before was not recorded, evaluation included |" in text


def test_the_weak_model_has_not_the_results_of_the_other(run: Path, tmp_path: Path) -> None:
    text = card_of("tiny-llava-weak", tmp_path, run=run)
    said = "tiny-llava after 20 steps of the same run, when it answered 70 % of the questions"
    assert said in " ".join(text.split())
    assert "93.8%" not in text and "Not recorded: results." in text


def test_results_of_scorers(tmp_path: Path) -> None:
    share = {"accuracy": 0.875, "low": 0.8, "high": 0.9}
    table = {"binding": {"chance": 0.5, "cosine": share | {"accuracy": 0.5}, "mlp": share, "cnn": share}}
    tables = {"held-out": table, "circle and triangle": table}
    counts = {"questions": 600, "demonstrations": 200, "seeds": [0, 1, 2]}
    write_json(tmp_path / "run" / "accuracy.json", counts | {"tables": tables})
    write_json(tmp_path / "run" / "scorer-mlp-0" / "run.json", {"kind": "mlp", "epochs": 12})
    text = card_of("tiny-clip", tmp_path, run=tmp_path / "run")
    assert "Held-out, 600 questions of each kind:\n\n| question | chance | pooled cosine | dense maps, MLP |" in text
    assert "Circle and triangle, 200 scenes, six captions each:" in text
    cells = "| 50.0% (80.0% to 90.0%) | 87.5% (80.0% to 90.0%) | 87.5% (80.0% to 90.0%) |"
    assert text.count(f"| binding | 50% {cells}") == 2
    assert '"epochs": 12' in text and "Not recorded: the run's date" in text


def test_runs_and_results_of_other_models_are_refused(run: Path, gates: Path, tmp_path: Path) -> None:
    shutil.copy(run / "model" / "model.safetensors", run / "model-weak")
    with pytest.raises(InputError, match="the run trained another model"):
        card_of("tiny-llava-weak", tmp_path / "weak", run=run)
    found = json.loads((gates / "unknown.json").read_text())
    write_json(gates / "seed-101" / "summary.json", {"fingerprint": "0" * 16})
    with pytest.raises(InputError, match=r"summary\.json was measured on another model") as refused:
        card_of("tiny-llava", tmp_path, gates=gates)
    own = re.findall(r"\(([0-9a-f]+)\)", str(refused.value))[-1]
    for file in ("unknown.json", "seed-101/summary.json"):
        write_json(gates / file, found | {"fingerprint": own})
    assert "| grey |" in card_of("tiny-llava", tmp_path, gates=gates)


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="'huge-llava' has no card; cards exist for tiny-llava"):
        cards.write_card("huge-llava", empty)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        cards.write_card("tiny-llava", empty)
    with pytest.raises(InputError, match="not the folder of a run"):
        card_of("tiny-llava", tmp_path, run=empty)
    with pytest.raises(InputError, match=r"neither gates\.json nor unknown\.json"):
        card_of("tiny-llava", tmp_path, gates=empty)
    (empty / "gates.json").write_text('[{"name": "no value"}]')
    with pytest.raises(DataError, match=r"gates\.json"):
        card_of("tiny-llava", tmp_path, gates=empty)
    assert not (tmp_path / "model" / cards.CARD_FILE).exists()


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    model = copied("tiny-llava", tmp_path / "model")
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["zoo", "card", "tiny-llava", "--run", str(run), "--out", str(model)])
    assert capsys.readouterr().out == f"card: {model / 'README.md'}\n"
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["zoo", "card", "tiny-llava", "--run", str(tmp_path), "--out", str(model)])
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("tiny-llava", "left"), ("tiny-video", "before"), ("tiny-clip", "an image of a red circle and a blue square")],
)
def test_snippets_run(name: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block follows those before it; what a comment says of a printed line is printed."""
    blocks = re.findall(r"```python\n(.*?)```", card_of(name, tmp_path), re.DOTALL)
    names: dict[str, Any] = {}
    capsys.readouterr()
    answers = []
    for block in blocks:
        exec(block, names)
        answers += [names["answer"]] if "answer = " in block else []
    assert answers == [expected] * (2 if name == "tiny-llava" else 1)
    said = [line.split("  # ")[1].split(":")[0] for line in "\n".join(blocks).splitlines() if "print(" in line]
    assert [line for line in capsys.readouterr().out.splitlines() if line in said] == said


def test_curves_by_stage(tmp_path: Path) -> None:
    step = np.arange(20, 420, 20.0)
    stage = ["seeing"] * 12 + ["language"] * 6 + ["last"] * 2
    accuracy = np.where(step > 240, step / 500, np.nan)
    shares = {"accuracy": accuracy, "patch_object": step / 400, "never": np.full(20, np.nan)}
    figure = plots.recipe_curves(step, stage, 4 / step, shares, about=plots.About(model="some-model"))
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["seeing", "language", "last"]
    legend = right.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["accuracy", "patch object"]
    assert "some-model; 20 records" in " ".join(figure.get_supxlabel().split())
    plots.save(figure, tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).std() > 5
    with pytest.raises(InputError, match="needs one or more records"):
        plots.recipe_curves(step, stage[1:], 4 / step, shares)
    with pytest.raises(InputError, match="finite"):
        plots.recipe_curves(step, stage, np.full(20, np.nan), shares)
