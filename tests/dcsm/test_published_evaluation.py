"""`jaxid dcsm eval --reference-bugs` against the published evaluation, written out with Hugging Face's classes.

One picture and its captions are a call. What'sUp's captions say above and below for on and under; words for depth and
edges become above and below too; then the prefix is put before them. The cosine is that of pooled embeddings (BLIP:
of class tokens before their projections) of captions padded to the longest of the call. Maps are standardised over the
call. The caption of the highest score is chosen, the first of several.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import layouts_benchmarks as layouts
import numpy as np
import pytest
import torch
import transformers
from benchmark_files import importable
from encoders import ENCODER_CASES, EncoderCase, folder, reference
from PIL import Image
from torch.nn import functional

from jaxid.dcsm.scoring import Scorer
from jaxid.experiments.dcsm_evaluate import EvaluateScorers
from jaxid.io import read_table

CASES = {case.name: case for case in ENCODER_CASES if case.name in ("clip", "siglip", "blip")}
IMAGE_TOKENS, TEXT_TOKENS = 17, 12
PROCESSORS = {"clip": "CLIPImageProcessorPil", "siglip": "SiglipImageProcessorPil", "blip": "BlipImageProcessorPil"}

RELATIONS = ("on", "under", "to the left of", "to the right of")
FILES = ("star_on_fish", "star_under_fish", "star_left_of_fish", "star_right_of_fish")
NEGATED = ("a star but no fish", "a fish but no star", "no star and no fish", "a blue star and a red fish")
TWICE = ("a small red star", "a small red star", "a fish", "a fish without a star")
TRIPLES = [[1, "a big star at the top", "a big star at the bottom"], [2, "a fish behind it", "a fish in front of it"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine questions of four sets, about noise of several tints; the captions of one are the same twice."""
    place, rng = tmp_path_factory.mktemp("benchmarks"), np.random.default_rng(4)
    rows = []
    for index, stem in enumerate(FILES):
        options = [f"a star {RELATIONS[(index + turn) % 4]} a fish" for turn in range(4)]
        rows.append({"image_path": f"data/controlled_images/{stem}.jpeg", "caption_options": options})
    layouts.save(place / "controlled_images_dataset.json", rows)
    layouts.save(place / "vg_qa_one_obj.json", TRIPLES)
    layouts.save(place / "visual_genome_attribution.json", [layouts.attribution(**attributed())])
    lines = [(*captions, "hybrid", f"images/{index}.jpg") for index, captions in enumerate((NEGATED, TWICE))]
    layouts.table(place / "images" / "VOC2007_mcq_llama3.1_rephrased.csv", layouts.NEGBENCH, lines)
    names = [f"controlled_images/{stem}.jpeg" for stem in FILES] + ["vg_images/1.jpg", "vg_images/2.jpg"]
    for name in [*names, "VOC2007/JPEGImages/0.jpg", "VOC2007/JPEGImages/1.jpg", "VG_100K/2370.jpg"]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 36, 3)) * rng.uniform(0.1, 1, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(place / name, "PNG")
    return place


def attributed() -> dict[str, Any]:
    captions = {"true_caption": "top star and a red fish", "false_caption": "red star and a top fish"}
    return {**captions, "bbox_x": 3, "bbox_y": 5, "bbox_w": 30, "bbox_h": 21}


@dataclasses.dataclass
class Call:
    picture: Image.Image
    captions: list[str]
    flat: bool = True


def calls(data: Path) -> dict[tuple[str, str], Call]:
    """The questions by their set and their key, captions as the cosine sees them."""
    found: dict[tuple[str, str], Call] = {}

    def opened(name: str) -> Image.Image:
        return Image.open(data / name).convert("RGB")

    for index, stem in enumerate(FILES):
        said = [RELATIONS[(index + turn) % 4].replace("on", "above").replace("under", "below") for turn in range(4)]
        captions = [f"An image of a star {word} a fish" for word in said]
        found["whatsup-a", f"{index:05d}-{stem}"] = Call(opened(f"controlled_images/{stem}.jpeg"), captions)
    for index, (number, *captions) in enumerate(TRIPLES):
        found["vg-spatial-one", f"{index:05d}-{number}"] = Call(opened(f"vg_images/{number}.jpg"), captions)
    for index, captions in enumerate((NEGATED, TWICE)):
        picture = opened(f"VOC2007/JPEGImages/{index}.jpg")
        found["negbench-voc", f"{index:05d}-{index}-hybrid"] = Call(picture, list(captions))
    row = attributed()
    captions = [f"An image of {row[name]}" for name in ("true_caption", "false_caption")]
    found["vg-attribution", "00000-2370"] = Call(opened("VG_100K/2370.jpg").crop((3, 5, 33, 26)), captions, flat=False)
    return found


@functools.cache
def scorer_file() -> Path:
    """Of random weights, for the tiny CLIP."""
    made = Scorer.init(
        jax.random.key(3), IMAGE_TOKENS, TEXT_TOKENS, placement="replace", encoder=str(folder(CASES["clip"]))
    )
    path = folder(CASES["clip"]).parent / "published.safetensors"
    made.save(path)
    return path


def run(case: EncoderCase, data: Path, out: Path, **options: Any) -> tuple[dict[tuple[str, str], dict[str, Any]], Any]:
    """The rows of the table by set and key, and the summary."""
    scorer = (scorer_file(),) if case.name == "clip" else ()
    made = EvaluateScorers(data=data, out=out, model=(str(folder(case)),), scorer=scorer, progress=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # words that the tiny vocabulary lacks, captions longer than its window
        summary = made.run()
    rows = read_table(next(out.glob("models/*/*.parquet"))).to_pylist()
    return {(row["benchmark"], row["question"]): row for row in rows}, summary


Answered = Callable[..., tuple[dict[tuple[str, str], dict[str, Any]], Any, Path]]


@pytest.fixture(scope="module")
def answered(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    """Rows and summary of an encoder's answers to all questions, and their folder."""

    @functools.cache
    def made(name: str, *, bugs: bool) -> tuple[dict[tuple[str, str], dict[str, Any]], Any, Path]:
        out = tmp_path_factory.mktemp("answers")
        return *run(CASES[name], data, out, reference_bugs=bugs, batch_size=4), out

    return made


class Oracle:
    """The published evaluation of one model."""

    def __init__(self, case: EncoderCase):
        self.case, self.model = case, reference(case)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder(case))
        self.pixels = getattr(transformers, PROCESSORS[case.name]).from_pretrained(folder(case))

    def tokens(self, captions: list[str], **padding: Any) -> tuple[torch.Tensor, torch.Tensor]:
        read = self.tokenizer(captions, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt", **padding)
        return read["input_ids"], read["attention_mask"]

    def cosine(self, call: Call) -> np.ndarray:
        model, pixels = self.model, self.pixels(images=[call.picture], return_tensors="pt")["pixel_values"]
        ids, mask = self.tokens(call.captions, padding=True)
        with torch.no_grad():
            if self.case.name == "blip":
                left = model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
                right = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
            elif self.case.name == "siglip":
                left = model.get_image_features(pixel_values=pixels).pooler_output
                right = model.get_text_features(input_ids=ids).pooler_output
            else:
                left = model.get_image_features(pixel_values=pixels).pooler_output
                right = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return (functional.normalize(left, dim=-1) @ functional.normalize(right, dim=-1).T)[0].numpy()

    def maps(self, call: Call, network: Any, vectors: torch.Tensor, placement: str = "replace") -> np.ndarray:
        model, pixels = self.model, self.pixels(images=[call.picture], return_tensors="pt")["pixel_values"]
        captions = call.captions
        if call.flat:
            for word, other in {" behind ": " above ", " in front of ": " below ", " bottom": " below"}.items():
                captions = [caption.replace(word, other) for caption in captions]
            captions = [caption.replace(" top", " above") for caption in captions]
        ids, mask = self.tokens(captions, padding="max_length")
        words = "above below left right small big not no without but absent".split()
        with torch.no_grad():
            states = model.vision_model(pixel_values=pixels).last_hidden_state
            left = functional.normalize(model.visual_projection(model.vision_model.post_layernorm(states)), dim=-1)
            read = model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
            right = functional.normalize(model.text_projection(read), dim=-1)
            S = torch.einsum("ie,cte->cit", left[0], right)
            for row, caption in enumerate(captions):
                split = caption.split(" ")
                for index, word in enumerate(words):
                    if word not in split or split.index(word) >= TEXT_TOKENS:
                        continue
                    if placement == "insert":  # one word after another, in the vocabulary's order
                        S[row, :, split.index(word) + 1 :] = S[row, :, split.index(word) : -1].clone()
                    S[row, :, split.index(word)] = vectors[index]
            S = (S - S.mean()) / S.std()
            return network(S[:, None]).numpy()


def scores(row: dict[str, Any], method: str, count: int) -> np.ndarray:
    return np.array([row[f"{method}_{index}"] for index in range(count)])


@pytest.fixture(scope="module")
def published() -> tuple[Any, torch.Tensor]:
    """The scorer's network and its functional vectors in PyTorch."""
    ours = Scorer.load(scorer_file())
    with importable() as load:
        module = load("published_dcsm")
    network = module.ScorerCNN(IMAGE_TOKENS, TEXT_TOKENS).eval()
    module.set_weights(network, ours.network._asdict())
    return network, torch.from_numpy(np.array(ours.vectors))


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_score_of_every_question(case: EncoderCase, data: Path, published: Any, answered: Answered) -> None:
    rows, _, _ = answered(case.name, bugs=True)
    default, _, _ = answered(case.name, bugs=False)
    oracle, asked, moved = Oracle(case), calls(data), []
    assert set(rows) == set(asked) == set(default) and len(asked) == 9
    for key, call in asked.items():
        expected, count = oracle.cosine(call), len(call.captions)
        np.testing.assert_allclose(scores(rows[key], "cosine", count), expected, atol=2e-5)
        if call.captions != list(TWICE):
            assert rows[key]["cosine"] == (expected.argmax() == 0)
        moved.append(np.abs(scores(default[key], "cosine", count) - expected).max())
        if case.name == "clip":
            expected = oracle.maps(call, *published)
            np.testing.assert_allclose(scores(rows[key], "dcsm", count), expected, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(scores(default[key], "dcsm", count), expected, rtol=1e-3, atol=1e-4)
            if call.captions != list(TWICE):
                assert rows[key]["dcsm"] == (expected.argmax() == 0)
    if case.name == "clip":
        assert max(moved) < 2e-5
    else:  # a question whose captions fill the window is read alike
        assert sorted(moved)[len(moved) // 2] > 1e-3


def test_the_inserting_path(data: Path, tmp_path: Path, published: Any) -> None:
    ours = Scorer.load(scorer_file())
    dataclasses.replace(ours, placement="insert").save(tmp_path / "insert.safetensors")
    made = EvaluateScorers(
        data=data,
        out=tmp_path / "out",
        model=(str(folder(CASES["clip"])),),
        scorer=(tmp_path / "insert.safetensors",),
        benchmark=("negbench-voc",),
        reference_bugs=True,
        progress=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.run()
    rows = read_table(next((tmp_path / "out").glob("models/*/*.parquet"))).to_pylist()
    oracle, asked = Oracle(CASES["clip"]), calls(data)
    for row in rows:
        call = asked[row["benchmark"], row["question"]]
        found = scores(row, "dcsm", 4)
        np.testing.assert_allclose(found, oracle.maps(call, *published, placement="insert"), rtol=1e-3, atol=1e-4)
        assert np.abs(found - oracle.maps(call, *published)).max() > 1e-2
    assert len(rows) == 2


def test_captions_alike_are_right_as_published_and_wrong_by_default(answered: Answered) -> None:
    """Neither is a guess: the first of the two is chosen there, and cannot be told from the second here."""
    key = "negbench-voc", "00001-1-hybrid"
    right: set[tuple[bool, bool]] = set()
    for bugs in (True, False):
        rows, _, _ = answered("clip", bugs=bugs)
        best = max(range(4), key=lambda index: rows[key][f"dcsm_{index}"])
        assert rows[key]["dcsm_0"] == pytest.approx(rows[key]["dcsm_1"], abs=1e-6)
        right.add((bugs, bool(rows[key]["dcsm"])))
        assert best in (0, 1), "another caption wins: choose other weights"
    assert right == {(True, True), (False, False)}


def test_pairs_and_sets_are_in_the_summary_and_the_table(answered: Answered) -> None:
    rows, summary, out = answered("clip", bugs=False)
    for method in ("cosine", "dcsm"):
        right = {stem: rows["whatsup-a", f"{index:05d}-{stem}"][method] for index, stem in enumerate(FILES)}
        on, under, left, right_of = right.values()
        entry = next(iter(summary.models.values()))[method]["whatsup-a"]
        assert (entry["pairs"], entry["sets"]) == (2, 1)
        assert entry["pair_accuracy"] == ((on and under) + (left and right_of)) / 2
        assert entry["set_accuracy"] == (on and under and left and right_of)
        assert {kind: own["accuracy"] for kind, own in entry["kinds"].items()} == {
            "above": on,
            "below": under,
            "left": left,
            "right": right_of,
        }
    head = (out / "table.csv").read_text().splitlines()[0].split(",")
    extra = [name for name in head if "pair" in name or "set" in name]
    assert extra == [f"whatsup-a {name}" for name in ("pair accuracy", "set accuracy", "pairs", "sets")]
    assert "; pairs " in (out / "table.md").read_text()
    kinds = (out / "kinds.csv").read_text().splitlines()
    assert len(kinds) == 1 + 2 * 4 and kinds[0] == "model,method,benchmark,kind,accuracy,low,high,questions"
