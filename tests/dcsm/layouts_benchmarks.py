"""A data folder with a few questions of every evaluation set, laid out as they are published."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLEVR = "file_name,pos,neg_0,neg_1,neg_2,neg_3"
NEGBENCH = "caption_0,caption_1,caption_2,caption_3,correct_answer_template,image_path"
NEGBENCH_FOLDER = "NegBench/evaluation data/images"

NEGATIONS = ("This image features a dog", "There is no dog", "A dog, but no cat", "A cat; no, a dog")


def pixels(seed: int = 0) -> np.ndarray:
    """Five rows of seven pixels, no two alike."""
    return np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)


def picture(path: Path) -> None:
    """Writes them; as a PNG file exactly, whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels()).save(path, "PNG")


def table(path: Path, header: str, rows: Sequence[Sequence[object]], *, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def save(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def clevr_bind(folder: Path) -> None:
    place = folder / "clevr_bind" / "two_object"
    for split, count in (("train", 3), ("val", 2), ("gen", 1)):
        names = [f"CLEVR_{split}_{number:06d}.png" for number in range(count)]
        captions = ("red cube", "blue cube", "red sphere", "gray cube", "red cylinder")
        table(place / f"{split}.csv", CLEVR, [(name, *captions) for name in names])
        for name in names:
            picture(place / "images" / split / name)


def ncd(folder: Path) -> None:
    for name in ("red_apple_yellow_banana.png", "green_pear_purple_plum_7.jpg", "MIRROR_red_apple_yellow_banana.png"):
        picture(folder / "NCD_colorful_composite_squares" / name)
    (folder / "NCD_colorful_composite_squares" / "notes.txt").write_text("not a picture")


def attribution(**fields: object) -> dict[str, object]:
    """A row of VG-Attribution, with some fields of it changed."""
    box = {"bbox_x": 1, "bbox_y": 2, "bbox_w": 4, "bbox_h": 3}
    captions = {"true_caption": "the white top and the open door", "false_caption": "the open top and the white door"}
    return {"image_path": "2370.jpg", **box, **captions, "attributes": ["white", "open"], **fields}


def aro(folder: Path) -> None:
    """All four sets."""
    save(folder / "visual_genome_attribution.json", [attribution()])
    captions = {"true_caption": "the man is behind the top", "false_caption": "the top is behind the man"}
    save(folder / "visual_genome_relation.json", [attribution(**captions, relation_name="behind")])
    picture(folder / "VG_100K" / "2370.jpg")
    options = ["a cat on top of a dog", "a dog on top of a cat", "of a cat dog on top a"]
    named = {"coco_karpathy_test": "val2014/COCO_val2014_1.jpg", "flickr30k_test": "flickr30k-images/1.jpg"}
    for file, name in named.items():
        save(folder / f"{file}.json", [{"image": name, "caption_options": options}])
        picture(folder / name)


def whatsup(folder: Path) -> None:
    relations = {"controlled_images": ("on", "under"), "controlled_clevr": ("in front of", "behind")}
    for stem, (one, other) in relations.items():
        words = (one, other, "to the left of", "to the right of")
        captions = [f"A mug {word} a armchair" for word in words]
        names = [
            f"mug_{one.replace('in front', 'in-front').replace(' ', '_')}_armchair.jpeg",
            "mug_left_of_armchair.jpeg",
        ]
        rows = [captions, [captions[2], captions[0], captions[1], captions[3]]]
        items = [
            {"image_path": f"data/{stem}/{name}", "caption_options": row} for name, row in zip(names, rows, strict=True)
        ]
        save(folder / f"{stem}_dataset.json", items)
        for name in names:
            picture(folder / stem / name)


def spatial(folder: Path) -> None:
    one = ["A photo of a cat on the left", "A photo of a cat on the right"]
    top = ["A photo of a cat at the top", "A photo of a cat at the bottom"]
    two = ["A photo of a cat behind a dog", "A photo of a cat in front of a dog"]
    save(folder / "coco_qa_one_obj.json", [[139, *one], [139, *top]])
    save(folder / "coco_qa_two_obj.json", [[285, "A photo of a cat above a dog", "A photo of a cat below a dog"]])
    save(folder / "vg_qa_one_obj.json", [[2370, *top]])
    save(folder / "vg_qa_two_obj.json", [["61", *two]])
    for name in ("val2017/000000000139.jpg", "val2017/000000000285.jpg", "vg_images/2370.jpg", "vg_images/61.jpg"):
        picture(folder / name)


def negbench(folder: Path) -> None:
    name = "mcq_llama3.1_rephrased.csv"
    coco = [
        (*NEGATIONS, "positive", "/data/coco/images/val2017/000000000139.jpg"),
        (*NEGATIONS[2:], *NEGATIONS[:2], "hybrid", "/data/coco/images/val2017/000000000285.jpg"),
    ]
    voc = [(*NEGATIONS[1:], NEGATIONS[0], "negative", "data/VOCtest/JPEGImages/000001.jpg")]
    table(folder / NEGBENCH_FOLDER / f"COCO_val_{name}", NEGBENCH, coco, encoding="utf-8-sig")
    table(folder / NEGBENCH_FOLDER / f"VOC2007_{name}", NEGBENCH, voc)
    for place in ("val2017/000000000139.jpg", "val2017/000000000285.jpg", "VOC2007/JPEGImages/000001.jpg"):
        picture(folder / place)


def everything(folder: Path) -> None:
    """Writes every set."""
    for write in (clevr_bind, ncd, aro, whatsup, spatial, negbench):
        write(folder)


def changed(row: Sequence[Any] | Mapping[str, Any], field: int | str, value: object) -> Any:
    """A copy of a row with another value in one field."""
    copy: Any = dict(row) if isinstance(row, Mapping) else list(row)
    copy[field] = value
    return copy
