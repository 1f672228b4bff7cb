"""Damaged files of every kind, from a fixed seed: readers read them, or name the file in a one-line error."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from damage import how
from dcsm import layouts_benchmarks
from encoders import ENCODER_CASES
from encoders import folder as encoder_folder
from families import EACH, EVERY
from fixtures import QUESTIONS, folder, shown
from PIL import Image

from jaxid import io as results
from jaxid import jobs
from jaxid.checkpoints.encoders import load_encoder
from jaxid.checkpoints.loading import load
from jaxid.checkpoints.scorer_files import read_authors_scorer, write_authors_scorer
from jaxid.data import clips, coco_boxes, coco_spatial, grid, scenes, three_objects, videos
from jaxid.dcsm import benchmarks, datasets
from jaxid.dcsm.scoring import Scorer
from jaxid.errors import JaxidError
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import FRAMES, TemporalIDs
from jaxid.kernels.scorer import init_cnn
from jaxid.prompts.pictures import open_picture

pytestmark = pytest.mark.slow

SECONDS = 20
"""A reader that takes longer has stalled."""

SCRATCH = tempfile.TemporaryDirectory(prefix="jaxid-fuzz-")
GOLDEN = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """Something that reads files.

    Attributes:
        name: how test reports call it.
        make: writes whole files into an empty folder.
        read: reads them, given the folder.
        cases: how many damaged copies it is given.
        damaged: which files are damaged, by pattern.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    cases: int = 60
    damaged: tuple[str, ...] = ("*",)


class Stalled(BaseException):
    """Not an `Exception`, so that no reader can take it for a damaged file."""


def copied(source: Callable[[], Path]) -> Callable[[Path], object]:
    return lambda target: shutil.copytree(source(), target, dirs_exist_ok=True)


def prepared(place: Path, pictures: Any) -> None:
    """Loads a model and prepares prompts with it, which must be numbers if nothing complains."""
    inputs = load(place).prepare(pictures, QUESTIONS).inputs
    assert np.isfinite(np.asarray(inputs.pixels)).all()


def embedded(place: Path) -> None:
    processor = load_encoder(place).processor
    assert np.isfinite(processor.pixels([np.full((9, 8, 3), 200, np.uint8)])).all()
    processor.captions(["a red star", "a fish"])


def openclip_folder(place: Path) -> None:
    from checkpoints.test_openclip_files import write_bpe_tokenizer

    write_bpe_tokenizer(place)
    shutil.copy(GOLDEN / "clip" / "open_clip_config.json", place)
    shutil.copy(GOLDEN / "clip" / "weights.safetensors", place / "open_clip_model.safetensors")


def spatial_ids() -> SpatialIDs:
    rng = np.random.default_rng(0)
    return SpatialIDs(
        values=rng.standard_normal((2, 2, 1, 4, 4, 3)).astype(np.float32),
        counts=np.full((2, 1, 4, 4), 5),
        objects=("star", "fish"),
        sizes=(224,),
        layer_names=("0", "1"),
    )


def temporal_ids() -> TemporalIDs:
    rng = np.random.default_rng(0)
    return TemporalIDs(
        values=rng.standard_normal((2, 2, len(FRAMES), 3)).astype(np.float32),
        counts=np.full((2, len(FRAMES)), 5),
        objects=("star", "fish"),
        frames=FRAMES,
        layer_names=("0", "1"),
    )


def finite(ids: Any) -> None:
    assert np.isfinite(np.asarray(ids.values)).all()


def authors_ids(place: Path) -> None:
    import torch

    cells = [(x, y) for x in range(4) for y in range(4)]
    torch.save({layer: {cell: torch.ones(3) for cell in cells} for layer in range(3)}, place / "ids.pt")


def scorer_file(place: Path) -> None:
    network = init_cnn(jax.random.key(0), 5, 7)
    vectors = np.random.default_rng(0).random((2, 5), np.float32)
    scorer = Scorer(network=network, vectors=jax.numpy.asarray(vectors), vocabulary=("above", "no"))
    scorer.save(place / "scorer.safetensors")


def authors_scorer(place: Path) -> None:
    vectors = np.random.default_rng(0).random((11, 5), np.float32)
    write_authors_scorer(place / "scorer.pt", init_cnn(jax.random.key(0), 5, 7), vectors)


def picture_files(place: Path) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (12, 9, 3), np.uint8)
    turned = Image.Exif()
    turned[274] = 6
    for name in ("a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"):
        Image.fromarray(colours).save(place / name, exif=turned)
    Image.fromarray(colours).quantize(8).save(
        place / "palette.gif", save_all=True, append_images=[Image.new("P", (9, 12))]
    )
    Image.fromarray(rng.integers(0, 2**16, (12, 9), np.uint16)).save(place / "grey.png")
    Image.fromarray(rng.integers(0, 2**16, (12, 9), np.uint16)).save(place / "grey.tif")
    Image.fromarray(rng.integers(0, 256, (12, 9, 4), np.uint8)).save(place / "alpha.png")
    Image.fromarray(colours).convert("CMYK").save(place / "ink.jpg")


def opened(place: Path) -> None:
    """Every picture of a folder, so that it is the damaged one that fails."""
    for path in sorted(place.iterdir()):
        assert np.asarray(open_picture(path)).shape[2] == 3


def video_file(place: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    videos.write_video(place / "clip.mp4", frames, rate=2)


def coco_folder(place: Path) -> None:
    drawn = scenes.sample_free(np.random.default_rng(0), 3, num_objects=(2, 2))
    coco_spatial.write_coco_spatial(place, drawn, 48)


def coco_read(place: Path) -> None:
    items = coco_spatial.read_coco_spatial(*coco_spatial.find_coco_spatial(place))
    boxes = coco_boxes.read_instances(coco_boxes.find_instances(place))
    for item in items:
        assert np.isfinite(boxes.locate(item).boxes).all()


def three_objects_folder(place: Path) -> None:
    three_objects.write_three_objects(place, three_objects.sample_in_between(np.random.default_rng(0), 2), 48)


def clips_folder(place: Path) -> None:
    clips.write_mvbench(place, 2, picture_size=32)


def manifest_read(place: Path) -> None:
    for item in clips.read_mvbench(place):
        item.open()


def grid_folder(place: Path) -> None:
    grid.write_grid_folder(place, [("star", "fish")], seed=0, picture_size=32, object_sizes=[224], cells=grid.NEAR_FAR)


def negation_file(place: Path) -> None:
    row = {"img1_path": "a.png", "img2_path": "b.png", "img1_obj": ["cat", "kitten"], "img2_obj": ["owl", "bird"]}
    (place / "negation.json").write_text(json.dumps([row, row]))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(place / name)


def benchmarks_read(place: Path) -> None:
    for questions in benchmarks.read(place).values():
        for question in questions:
            benchmarks.load_picture(question)


def job_folder(place: Path) -> None:
    job(place)


def job(place: Path) -> None:
    items = [f"item {number}" for number in range(6)]

    def compute(chunk: list[str]) -> dict[str, Any]:
        return {"item": chunk, "value": [float(len(item)) for item in chunk]}

    jobs.run(
        place,
        settings={"model": "tiny", "layers": [1, 2]},
        items=items,
        key=str,
        compute=compute,
        chunk_size=2,
        progress=False,
    )


def table_file(place: Path) -> None:
    results.write_table(place / "table.parquet", {"layer": [1, 2, 3], "word": ["a", "b", "c"]})


OWN = ("config.json", "*processor_config.json", "tokenizer_config.json")
"""What every kind of model reads in its own way; weights, tokenizers and chat templates are read alike."""

ALL_FILES = ("llava-plain", "clip")
"""Models of which every file is damaged."""

READERS: tuple[Reader, ...] = (
    *(
        Reader(
            name=case.name,
            make=copied(functools.partial(folder, case)),
            read=lambda place, case=case: prepared(place, shown(case)),
            cases=30 if case.name in ALL_FILES else 20,
            damaged=("*",) if case.name in ALL_FILES else OWN,
        )
        for case in EVERY
        if case.name in EACH
    ),
    *(
        Reader(
            name=case.name,
            make=copied(functools.partial(encoder_folder, case)),
            read=embedded,
            cases=40 if case.name in ALL_FILES else 20,
            damaged=("*",) if case.name in ALL_FILES else OWN,
        )
        for case in ENCODER_CASES
    ),
    Reader(name="openclip", make=openclip_folder, read=embedded, cases=40),
    Reader(
        name="spatial-ids",
        make=lambda place: spatial_ids().save(place / "ids.safetensors"),
        read=lambda place: finite(SpatialIDs.load(place / "ids.safetensors")),
        cases=120,
    ),
    Reader(
        name="temporal-ids",
        make=lambda place: temporal_ids().save(place / "ids.safetensors"),
        read=lambda place: finite(TemporalIDs.load(place / "ids.safetensors")),
        cases=120,
    ),
    Reader(
        name="authors-ids",
        make=authors_ids,
        read=lambda place: finite(SpatialIDs.from_torch(place / "ids.pt")),
        cases=120,
    ),
    Reader(name="scorer", make=scorer_file, read=lambda place: Scorer.load(place / "scorer.safetensors"), cases=120),
    Reader(
        name="authors-scorer",
        make=authors_scorer,
        read=lambda place: read_authors_scorer(place / "scorer.pt", 7),
        cases=120,
    ),
    Reader(name="pictures", make=picture_files, read=opened, cases=250),
    Reader(name="video", make=video_file, read=lambda place: videos.read_video(place / "clip.mp4", frames=4)),
    Reader(name="coco", make=coco_folder, read=coco_read, cases=120, damaged=("*.json", "*.jpg")),
    Reader(
        name="three-objects",
        make=three_objects_folder,
        read=three_objects.read_three_objects,
        cases=120,
        damaged=("*.json",),
    ),
    Reader(name="manifest", make=clips_folder, read=manifest_read, cases=50, damaged=("manifest*",)),
    Reader(name="grid", make=grid_folder, read=grid.read_grid_folder, cases=10),
    Reader(
        name="negation",
        make=negation_file,
        read=lambda place: datasets.read_negation(place / "negation.json"),
        cases=120,
    ),
    Reader(
        name="benchmarks",
        make=layouts_benchmarks.everything,
        read=benchmarks_read,
        cases=120,
        damaged=("*.csv", "*.json", "*.jpg", "*.jpeg"),
    ),
    Reader(name="job", make=job_folder, read=job, cases=100),
    Reader(name="table", make=table_file, read=lambda place: results.read_table(place / "table.parquet"), cases=120),
)


@functools.cache
def whole(reader: Reader) -> Path:
    """The reader's whole files, made once."""
    place = Path(SCRATCH.name) / reader.name
    place.mkdir()
    reader.make(place)
    return place


def linked(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stalled(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def complaint(reader: Reader, place: Path, name: str) -> str | None:
    """What is wrong with how a reader takes a damaged file; None if nothing is."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(place)
    except JaxidError as error:
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > 2000:
            return f"the message is not one line: {message!r:.300}"
        known = (Path(name).name, Path(name).stem.replace("_", " "), place.name)
        return None if any(part in message for part in known) else f"the message names no file: {message}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_whole_files_are_read(reader: Reader, tmp_path: Path) -> None:
    place = tmp_path / "whole"
    linked(whole(reader), place)
    reader.read(place)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files_are_read_or_named(reader: Reader, tmp_path: Path) -> None:
    source = whole(reader)
    files = sorted({path for pattern in reader.damaged for path in source.rglob(pattern) if path.is_file()})
    rng = np.random.default_rng(zlib.crc32(reader.name.encode()))
    found = []
    for number in range(reader.cases):
        name = str(files[rng.integers(len(files))].relative_to(source))
        ways = how(name)
        data = ways[rng.integers(len(ways))]((source / name).read_bytes(), rng)
        place = tmp_path / f"case{number}"
        linked(source, place)
        (place / name).unlink()
        (place / name).write_bytes(data)
        wrong = complaint(reader, place, name)
        if wrong is None:
            shutil.rmtree(place)
        else:
            found.append(f"case {number}, {name}: {wrong}")
    assert not found, f"{len(found)} of {reader.cases}:\n" + "\n".join(found)


def test_there_are_two_thousand_cases() -> None:
    assert sum(reader.cases for reader in READERS) >= 2000
