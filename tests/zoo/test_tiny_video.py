"""The recipe of tiny-video: its labels, its prompts, and what it holds out."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from numpy.typing import ArrayLike
from xla_flags import OLDER_EMITTERS

from jaxid.checkpoints.loading import load
from jaxid.data.clips import write_appear_folder
from jaxid.data.scenes import OBJECTS
from jaxid.data.videos import time_text
from jaxid.experiments.temporal import ANSWERS, IN_ONE_WORD, earlier_or_later
from jaxid.families.base import Model
from jaxid.families.llava_video import LlavaVideo
from jaxid.ids.extract import TEMPORAL_QUESTION, centred_words, extract_temporal
from jaxid.zoo import tiny_video as recipe
from jaxid.zoo import video_evaluation
from jaxid.zoo.export import write_video

pytestmark = pytest.mark.optimized

WORDS = recipe.VOCABULARY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An untrained network in an exported folder."""
    folder = tmp_path_factory.mktemp("exported")
    network = LlavaVideo(recipe.config(), rngs=nnx.Rngs(0))
    write_video(folder, recipe.config(), nnx.to_pure_dict(nnx.state(network)), WORDS)
    return load(folder)


def words(ids: ArrayLike) -> list[str]:
    return [WORDS[index] for index in np.asarray(ids).tolist()]


def test_the_config_read_back(model: Model) -> None:
    assert model.config == recipe.config()


@pytest.mark.parametrize("timed", [False, True])
def test_training_rows_are_the_prompts_that_the_processor_makes(model: Model, timed: bool) -> None:
    """Token by token: prefix, clip, time text, question, generation prompt."""
    rng = np.random.default_rng(0)
    drawn = recipe.held_out_clips(rng, 2, stay=True)
    clip = video_evaluation.as_clips(rng, drawn)[0]
    question = TEMPORAL_QUESTION.format(a="star", b="fish")
    prompts = model.prepare([clip], f"{time_text(clip)}\n{question}" if timed else question)
    plan = recipe.layout(timed=timed)
    ids = np.asarray(prompts.inputs.token_ids)[0]
    assert clip.seconds is not None
    expected = plan.token_ids[: plan.text_start].copy()
    if timed:
        expected[plan.image_start + plan.image_tokens :] = recipe.time_tokens(32 / clip.seconds)
    shown = np.asarray(prompts.inputs.image_rows)[0] >= 0
    assert np.flatnonzero(shown).tolist() == list(range(plan.image_start, plan.image_start + plan.image_tokens))
    assert words(ids[: plan.text_start][~shown[: plan.text_start]]) == words(expected[~shown[: plan.text_start]])
    text = recipe.PUBLISHED_QUESTION.format("star", "fish") + recipe.CLOSING
    assert words(ids[plan.text_start : prompts.last()[0] + 1]) == words(recipe.encode(text))
    assert "<unk>" not in words(ids)
    (before, after) = model.processor.answer_ids(["before", "after"])
    assert words([before, after]) == ["before", "after"]


def test_training_asks_as_the_published_prompts_do(model: Model) -> None:
    """Also where the published swap loses spaces, and where its prompt repeats the end of the query."""
    rng, question = np.random.default_rng(0), "Does the star come before or after the fish? Answer in one word."
    asked = {recipe.order_question(rng, "star", "fish")[0] for _ in range(200)}
    for wording in (str, earlier_or_later):
        prompt = IN_ONE_WORD.format(query=wording(question))
        ids = np.asarray(model.prepare(None, [prompt]).inputs.token_ids)[0]
        text = " ".join(words(ids)).removeprefix(recipe.BEFORE)
        assert text.split(recipe.CLOSING)[0].strip() in asked


def test_every_rate_makes_as_many_tokens() -> None:
    assert len({len(recipe.time_tokens(rate)) for rate in recipe.RATES}) == 1
    assert len({tuple(recipe.time_tokens(rate)) for rate in recipe.RATES}) == len(recipe.RATES)


def told_times(text: str) -> dict[str, int]:
    """When objects come according to the facts in a text, which end in " ."."""
    found: dict[str, int] = {}
    for fact in text.split(" .")[:-1]:
        parts = fact.split()
        if parts[1] == ":":
            found[parts[0]] = recipe.TIME_WORDS.index(parts[2])
        else:
            found |= dict(
                zip((parts[1], parts[-1]), (0, 1) if {"before", "earlier"} & set(parts) else (1, 0), strict=True)
            )
    return found


def right_answer(text: str, times: dict[str, int]) -> str:
    """The answer to a text of the training rows, about objects that come at these times."""
    if text.endswith(("before", "earlier")):
        return "second"
    if text.endswith(("after", "later")):
        return "seventh"
    names = [word for word in text.split() if word in OBJECTS]
    if text.startswith(("time of the", "When does")):
        return recipe.TIME_WORDS[times[names[0]]]
    if text.startswith("Is there"):
        return "yes" if names[0] in times else "no"
    comes_first = times[names[0]] < times[names[1]]
    if text.startswith("Is it true"):
        return "yes" if comes_first == bool({"before", "earlier"} & set(text.split())) else "no"
    words = ("earlier", "later") if "earlier or later" in text else ("before", "after")
    return words[0] if comes_first else words[1]


@pytest.mark.parametrize("timed", [False, True])
def test_labels_say_what_is_in_the_clip(timed: bool) -> None:
    """At every labelled position, the next token follows from the batch's own frames, or from the text itself."""
    batch = recipe.training_batch(5, 3, 24, timed=timed)
    plan = recipe.layout(timed=timed)
    kinds = set()
    for row in range(24):
        cells = batch.cells[row]
        first: dict[str, int] = {}
        for frame, cell in itertools.product(range(8), range(9)):
            kind, came = cells[frame, cell]
            if kind:
                name = OBJECTS[kind - 1]
                first.setdefault(name, frame)
                assert first[name] == came
        place = plan.text_start
        for length in recipe.SLOTS:
            ids = words(batch.token_ids[row, place : place + length])
            labels = {
                index: WORDS[label]
                for index, label in enumerate(batch.labels[row, place : place + length])
                if label >= 0
            }
            closing = [
                index for index, pair in enumerate(itertools.pairwise(ids), 1) if pair == ("<|im_start|>", "assistant")
            ]
            end = closing[0] if closing else max(labels)
            text = " ".join(ids[: end + 1]).removesuffix(recipe.CLOSING)
            timed_words = {
                index: recipe.WORD_TIMES[word] for index, word in enumerate(ids[:end]) if word in recipe.WORD_TIMES
            }
            answer = labels.get(end) if closing else labels.pop(end)
            assert {index: label for index, label in labels.items() if index < end} == timed_words
            assert plan.alone[place] == text.startswith(recipe.BEFORE)
            text = text.removeprefix(recipe.BEFORE).strip()
            facts, _, question = text.rpartition(" . Does ")
            kind = (
                text.split()[0]
                if not plan.alone[place] or text.startswith(("time", "When"))
                else "told"
                if answer
                else "untold"
            )
            kinds.add(kind)
            if kind != "untold":
                assert answer == right_answer(question, told_times(f"{facts} .") if kind == "told" else first)
            if answer and closing and end + 1 < length:
                assert labels[end + 1] == "<|im_end|>" and ids[end + 1] == answer
            place += length
    assert kinds == {"time", "When", "Is", "Does", "In", "told", "untold"}


def test_training_never_shows_what_is_held_out() -> None:
    pairs, times = recipe.held_out_pairs(), recipe.held_out_times()
    drawn = recipe.training_clips(np.random.default_rng(1), 300)
    for objects, starts in zip(drawn.scenes.objects, drawn.starts, strict=True):
        present = np.flatnonzero(objects >= 0)
        for one, other in itertools.combinations(present.tolist(), 2):
            assert not pairs[objects[one], objects[other]] and not times[starts[one], starts[other]]
    pictures = recipe.sight_batch(0, 0, 40).cells[:, 0, :, 0]
    for row in pictures:
        for one, other in itertools.combinations([kind - 1 for kind in row if kind], 2):
            assert not pairs[one, other]
    for stay in (True, False):
        held = recipe.held_out_clips(np.random.default_rng(2), 60, stay=stay)
        for row in range(60):
            objects, starts = held.scenes.objects[row], held.starts[row]
            assert pairs[objects[0], objects[1]] or times[starts[0], starts[1]]


def test_a_frame_is_the_picture_that_it_names() -> None:
    drawn = recipe.training_clips(np.random.default_rng(4), 6)
    shown, frames = recipe.pictures(drawn)
    from jaxid.data.clips import draw_clip

    for row in range(6):
        whole = draw_clip(drawn.scenes[row : row + 1], drawn.present[row], recipe.IMAGE_SIZE)
        np.testing.assert_array_equal(shown[row][frames[row]], whole)


@pytest.mark.slow
def test_the_shipped_model_knows_the_times_of_objects_and_words(tmp_path: Path) -> None:
    """Accuracy on clips never shown, and "before" and "after" apart on the line of IDs, read without a clip."""
    shipped = load("tiny-video")
    found = video_evaluation.evaluate(shipped, count=256, seed=21)
    for kind in ("before_after", "untimed", "one_then_other", "reversed"):
        assert found[kind].value >= 0.97, (kind, found[kind])
    pairs = [("star", "fish"), ("moon", "cup"), ("tree", "key"), ("house", "bolt")]
    items = write_appear_folder(tmp_path, pairs)
    line = extract_temporal(shipped, items, pairs=pairs).line()
    assert (line.order[2:] > 0.99).all()
    question = TEMPORAL_QUESTION.format(a="star", b="fish")
    before, after = line.coordinates(centred_words(shipped, question, ANSWERS), centred=True).T
    assert (after - before)[3:].min() > 0.4


SCRIPT = """
import sys
from pathlib import Path
from jaxid.zoo import video_evaluation, video_training
video_evaluation.evaluate = lambda *_, **__: {}
config = video_training.TrainingConfig(
    sight_steps=2, sight_batch_size=2, timing_steps=2, steps=2, timed_steps=2, batch_size=2, warmup_steps=1
)
video_training.RECIPE.train(Path(sys.argv[1]), config, save_every=8, progress=False)
"""


@pytest.mark.slow
def test_one_short_training(tmp_path: Path) -> None:
    """All stages run in turn, and the folder contains a model."""
    # Optax is not written for strict promotion. Nearly all of the time goes into compilation.
    environment = os.environ | {
        "XLA_FLAGS": OLDER_EMITTERS,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert load(tmp_path / "model").num_layers == 8
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    assert list(dict.fromkeys(row[1] for row in rows)) == ["seeing", "timing", "language", "times"]
