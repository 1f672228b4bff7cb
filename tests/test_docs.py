"""The site's pages that are made from the code, and the hand-written ones that must agree with it."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import jaxid
from jaxid.commands import COMMANDS, GROUPS
from jaxid.data import commands as data
from jaxid.data.coco_spatial import find_coco_spatial, read_coco_spatial
from jaxid.devices import DEVICES
from jaxid.dry_run import dry_run
from jaxid.experiments import planning
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap
from jaxid.experiments.base import Experiment
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.blank_image import BlankImage
from jaxid.experiments.depth import Depth
from jaxid.experiments.deviation import Deviation
from jaxid.experiments.occlusion import Occlusion
from jaxid.experiments.session import Session
from jaxid.experiments.spatial_ids import ExtractIDs
from jaxid.experiments.steer_picture import SteerPicture
from jaxid.experiments.steering import Steer
from jaxid.experiments.temporal import TemporalSteer, TemporalSwap
from jaxid.ids.accumulate import layer_names
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

sys.path.insert(0, str(DOCS / "_ext"))
import jaxid_columns  # noqa: E402 # pyright: ignore[reportMissingImports]
import jaxid_site  # noqa: E402 # pyright: ignore[reportMissingImports]

CPU = DEVICES["cpu"]

EXPERIMENTS: dict[type[Experiment[Any, Any, Any]], dict[str, Any]] = {
    BeliefSwap: {"max_new_tokens": 2, "ids": "ids.safetensors"},
    MirrorSwap: {},
    AttributeSwap: {},
    BlankImage: {"ids": "ids.safetensors"},
    Steer: {"ids": "ids.safetensors"},
    SteerPicture: {
        "ids": "ids.safetensors",
        "picture": "val2017/000000000001.jpg",
        "subject": "star",
        "object": "fish",
        "data": None,
        "limit": None,
    },
    Depth: {"ids": "ids.safetensors"},
    Deviation: {"ids": "ids.safetensors"},
    Occlusion: {},
    TemporalSwap: {"model": "tiny-video"},
    TemporalSteer: {"model": "tiny-video", "ids": "temporal.safetensors"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few items for every experiment."""
    folder = tmp_path_factory.mktemp("docs")
    data.coco_spatial(out=folder, count=4, picture_size=72)
    data.mvbench(out=folder / "clips", count=2, picture_size=72)
    rng, objects = np.random.default_rng(0), ("star", "fish")
    model, video = jaxid.load("tiny-llava"), jaxid.load("tiny-video")
    SpatialIDs(
        values=rng.normal(size=(model.num_layers, 2, 1, 4, 4, model.width)).astype(np.float32),
        counts=np.ones((2, 1, 4, 4), int),
        objects=objects,
        sizes=(72,),
        layer_names=layer_names(model.num_layers),
    ).save(folder / "ids.safetensors")
    TemporalIDs(
        values=rng.normal(size=(video.num_layers, 2, 7, video.width)).astype(np.float32),
        counts=np.ones((2, 7), int),
        objects=objects,
        frames=tuple(range(1, 8)),
        layer_names=layer_names(video.num_layers),
    ).save(folder / "temporal.safetensors")
    return folder


def columns_of(kind: type[Experiment[Any, Any, Any]], place: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The columns of the table that an experiment writes, found by its dry run."""
    found = set[str]()
    compute = kind.compute

    def watched(self: Any, session: Any, items: Any, batch: Any) -> Any:
        rows = compute(self, session, items, batch)
        table = rows() if callable(rows) else rows
        found.update(table)
        return table

    monkeypatch.setattr(kind, "compute", watched)
    given: dict[str, Any] = {"out": place / "out", "data": place, "batch_size": 1, "limit": 1, **EXPERIMENTS[kind]}
    if "video" in given.get("model", ""):
        given["data"] = place / "clips"
    given |= {name: place / given[name] for name in ("ids", "picture") if name in given}
    if hasattr(kind, "layers") and kind is not Occlusion:
        given["layers"] = "3"
    session = Session(kind(**given), device=CPU)
    session.about(session.experiment.items(session))
    for _, run in planning.ExperimentJob(session).batches(session.experiment.prompts_per_item):
        dry_run(run, CPU)
    return found


@pytest.mark.parametrize("kind", EXPERIMENTS, ids=lambda kind: kind.name)
def test_every_column_of_a_table_is_explained(
    kind: type[Experiment[Any, Any, Any]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert columns_of(kind, place, monkeypatch) == set(jaxid_columns.columns(kind.name))


def test_every_experiment_has_a_section_on_its_columns() -> None:
    named = {path.removeprefix("run ") for path in COMMANDS if path.startswith("run ")} - {"compare"}
    assert named == set(jaxid_columns.COLUMNS) == {kind.name for kind in EXPERIMENTS}
    page = (DOCS / "reference" / "tables.md").read_text(encoding="utf-8")
    assert named == set(re.findall(r"<!-- jaxid: columns (\S+) -->", page))


def test_only_explained_columns_are_in_the_common_ones() -> None:
    used = {name for common, _ in jaxid_columns.COLUMNS.values() for name in common}
    assert used == set(jaxid_columns.COMMON)
    assert not any(set(common) & set(own) for common, own in jaxid_columns.COLUMNS.values())


# --- options of commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_explained_once_with_its_default(path: str) -> None:
    options = jaxid_site.options(path)
    assert options and all(option.about for option in options)
    names = [option.name for option in options]
    assert len(set(names)) == len(names)
    hidden = {"data", "limit"} if path == "run steer-picture" else set()
    assert set(names) == set(jaxid_site.parameters(path)) - hidden


def test_the_reference_holds_every_command() -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("command-*.md")}
    assert set(pages) == {"command-main", *(f"command-{group}" for group in GROUPS)}
    whole = "".join(jaxid_site.generated(page) for page in pages.values())
    assert [path for path in COMMANDS if f"\n## jaxid {path}\n" not in whole] == []


def test_options_as_they_are_written() -> None:
    found = {option.name: option for option in jaxid_site.options("run belief-swap")}
    assert found["strength"].usage == "--strength NUMBER" and found["strength"].default == "5.0"
    assert found["data"].default is None and found["layers"].default == ""
    assert found["restart"].usage == "--restart, --no-restart" and found["restart"].default == "off"
    assert found["dtype"].usage == "--dtype float32|bfloat16|float16"
    assert found["max_new_tokens"].usage == "--max-new-tokens N (at least 0)"
    shared = {name for name, option in found.items() if option.shared}
    assert shared >= {"model", "seed", "limit", "prompt"} and not shared & {"strength", "ids", "layers"}
    asked = {option.name: option.usage for option in jaxid_site.options("ask")}
    assert asked["picture"] == "PICTURE, --picture PATH"
    assert jaxid_site.options("merge")[0].usage == "FOLDERS ..."


# --- other pages ----------------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(r"^\.\. auto\w+:: jaxid\.(\w+)$", text, re.MULTILINE))
    errors = set(re.findall(r"^\| `(\w+)` \|", jaxid_site.error_classes(), re.MULTILINE))
    assert set(jaxid._HOME) <= listed | errors


def literal_parts(message: str) -> Iterator[str]:
    for part in re.split(r"\.\.\.", message):
        if len(part.strip(" .,;:()")) > 3:
            yield part.strip(" .,;:()")


def test_messages_on_the_page_of_errors_are_those_of_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "jaxid").rglob("*.py")))
    # Adjacent literals are one text, and what is put in is unknown.
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    source = re.sub(r"\{[^{}]*\}", "...", source)
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    messages = [row.split("` |")[0] for row in re.findall(r"^\| (?:warning: )?`(.+)$", page, re.MULTILINE)]
    assert len(messages) > 30
    assert [part for message in messages for part in literal_parts(message) if part not in source] == []


def test_links_to_files_outside_lead_to_pages() -> None:
    for name, page in jaxid_site.OUTSIDE.items():
        assert (ROOT / name).is_file() and f"<!-- jaxid: file {name} -->" in (DOCS / f"{page}.md").read_text("utf-8")
    found = jaxid_site.linked("[a](../../jaxid/zoo/TRIALS.md#b) [c](../x.md)", "how-to/page")
    assert found == "[a](../cards/trials.md#b) [c](../x.md)"


def test_cards_lose_their_front_matter() -> None:
    text = jaxid_site.repository_file("jaxid/zoo/tiny-llava/README.md")
    assert text.startswith("# tiny-llava") and "](/../jaxid/zoo/tiny-llava/curves.png)" in text


def test_notebooks_are_all_in_the_table() -> None:
    page = (DOCS / "notebooks.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| \[.+?\]\(notebooks/(\w+)\.ipynb\)", page, re.MULTILINE)
    assert sorted(named) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert (DOCS / "notebooks").resolve() == ROOT / "notebooks"


SNIPPETS = ("export-ids/read-ids", "export-ids/save-vector", "llama-cpp/everywhere")


@pytest.mark.slow
def test_examples_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = ["star,fish", "fish,star", "cup,key", "key,cup"]
    data.grid(out=tmp_path / "grids", pair=pairs, picture_size=224)
    ExtractIDs(data=tmp_path / "grids", out=tmp_path / "ids.safetensors").run()
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(example(DOCS / "getting-started.md", "first-example"), names)
        changed = (names["left"] > names["right"]).sum(axis=1)
        assert changed[:3].sum() == 0 and changed.max() >= 3
        names |= {"picture": names["pictures"][0]}
        for snippet in SNIPPETS:
            page, _, mark = snippet.partition("/")
            exec(example(DOCS / "how-to" / f"{page}.md", mark), names)
    assert load_file(tmp_path / "leftwards.safetensors")["layers.3"].shape == (names["model"].width,)
    for name in ("desk.jpg", "yard.jpg"):
        Image.new("RGB", (60, 60)).save(name)
    exec(example(DOCS / "how-to" / "your-data.md", "own-data"), {})
    assert [item.subject for item in read_coco_spatial(*find_coco_spatial("mine"))] == ["cup", "dog"]
    exec(example(DOCS / "how-to" / "llama-cpp.md", "gguf-example"), {})


def example(page: Path, mark: str) -> str:
    """The code block after a mark."""
    found = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]
