"""Evaluation of tiny-video on held-out clips."""

import numpy as np

from jaxid.data.clips import draw_clip
from jaxid.data.scenes import OBJECTS
from jaxid.data.videos import spread, time_text
from jaxid.families.base import Model
from jaxid.prompts.pictures import Clip
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_video as recipe
from jaxid.zoo.evaluation import Accuracy


def as_clips(rng: np.random.Generator, drawn: recipe.Clips) -> list[Clip]:
    """The clips as eight frames of 32-frame videos with random frame rates."""
    found = []
    for row, present in enumerate(drawn.present):
        rate = recipe.RATES[int(rng.integers(len(recipe.RATES)))]
        times = tuple(float(index) / rate for index in spread(32))
        frames = draw_clip(drawn.scenes[row : row + 1], present, recipe.IMAGE_SIZE)
        found.append(Clip(frames, times, 32 / rate))
    return found


def accuracy(model: Model, clips: list[Clip], questions: list[str], truths: list[str], *, timed: bool) -> Accuracy:
    """Share of questions that are answered with the true word; `timed` puts the frames' times before the question."""
    texts = [
        f"{time_text(clip)}\n{question}" if timed else question for clip, question in zip(clips, questions, strict=True)
    ]
    return evaluation.accuracy(model, clips, texts, truths, batch_size=64)


def evaluate(model: Model, *, count: int = 256, seed: int = 1) -> dict[str, Accuracy]:
    """Accuracy on held-out clips, by kind of question.

    "before_after" is the published question about objects that stay, after the text with the frames' times; "untimed"
    is the same without that text. "when" asks for the frame in which an object appears. In the clips of
    "one_then_other" one object disappears before the other appears; "reversed" plays them backwards. "exists" asks
    whether an object appears at all.
    """
    rng = np.random.default_rng((978, seed))
    drawn = recipe.held_out_clips(rng, count, stay=True)
    clips = as_clips(rng, drawn)
    names = [[OBJECTS[index] for index in row] for row in drawn.scenes.objects]
    asked = [rng.permutation(2) for _ in clips]
    words = [
        "before" if starts[first] < starts[second] else "after"
        for starts, (first, second) in zip(drawn.starts, asked, strict=True)
    ]
    published = recipe.PUBLISHED_QUESTION.replace(" ?", "?").replace(" .", ".").replace(" ,", ",")
    questions = [published.format(own[first], own[second]) for own, (first, second) in zip(names, asked, strict=True)]
    results = {
        "before_after": accuracy(model, clips, questions, words, timed=True),
        "untimed": accuracy(model, clips, questions, words, timed=False),
    }
    times = [recipe.TIME_WORDS[starts[first]] for starts, (first, _) in zip(drawn.starts, asked, strict=True)]
    questions = [f"When does the {own[first]} come?" for own, (first, _) in zip(names, asked, strict=True)]
    results["when"] = accuracy(model, clips, questions, times, timed=True)

    drawn = recipe.held_out_clips(rng, count, stay=False)
    clips = as_clips(rng, drawn)
    names = [[OBJECTS[index] for index in row] for row in drawn.scenes.objects]
    words = ["before" if starts[0] < starts[1] else "after" for starts in drawn.starts]
    questions = [f"Does the {own[0]} come before or after the {own[1]}? Answer in one word." for own in names]
    results["one_then_other"] = accuracy(model, clips, questions, words, timed=True)
    backwards = [clip.reversed() for clip in clips]
    other = ["after" if word == "before" else "before" for word in words]
    results["reversed"] = accuracy(model, backwards, questions, other, timed=True)

    absent = [OBJECTS[rng.choice([index for index, name in enumerate(OBJECTS) if name not in own])] for own in names]
    half = count // 2
    questions = [f"Is there a {name}?" for name in [*(own[0] for own in names[:half]), *absent[half:]]]
    results["exists"] = accuracy(model, clips, questions, ["yes"] * half + ["no"] * (count - half), timed=True)
    return results
