"""`jaxid zoo train`, `evaluate`, `unknown` and `card`."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from jaxid.checks import Count, Range, check_values
from jaxid.errors import CheckpointError, InputError
from jaxid.io import read_json
from jaxid.zoo import RECIPES


def train(
    name: str,
    out: Path,
    *,
    steps: Count | None = None,
    batch_size: Annotated[int, Range(8)] | None = None,
    seed: int = 0,
    save_every: Count = 100,
    restart: bool = False,
) -> str:
    """Train a shipped model from scratch, or resume from the last save after a kill.

    Args:
        name: which model: tiny-llava, tiny-video, or tiny-clip with its scorers.
        out: folder of the run, which is resumed if its settings agree; the checkpoint is written to its folder `model`.
        steps: most steps of each stage, and of each scorer; the recipe's by default.
        batch_size: pictures or clips per step, in all stages; the recipe's by default.
        seed: seed of parameters and data.
        save_every: steps between saves.
        restart: discard the run that the folder holds, and begin anew.

    Returns:
        What to print.
    """
    given = {"steps": steps, "batch_size": batch_size, "seed": seed, "save_every": save_every}
    check_values(train, given)
    if name not in RECIPES:
        raise InputError(f"{name!r} has no recipe; recipes exist for {', '.join(RECIPES)}.")
    from jaxid.zoo import clip_evaluation, clip_training, training, video_training
    from jaxid.zoo.recipes import Recipe, limited

    recipes: dict[str, Recipe[Any]] = {
        "tiny-llava": training.RECIPE,
        "tiny-video": video_training.RECIPE,
        "tiny-clip": dataclasses.replace(
            clip_training.RECIPE, finish=partial(clip_evaluation.train_scorers, steps=steps)
        ),
    }
    recipe = recipes[name]
    config = limited(recipe.config(seed=seed), steps, batch_size)
    recipe.train(out, config, save_every=save_every, restart=restart)
    return f"checkpoint: {out / 'model'}"


def evaluate(model: str = "tiny-llava", *, count: Annotated[int, Range(8)] = 512, seed: int = 1) -> str:
    """Print a model's accuracy on scenes that training never showed.

    Args:
        model: tiny-llava, tiny-video, tiny-clip, or the folder of a model trained by one of their recipes.
        count: number of questions of each kind.
        seed: seed of the scenes.

    Returns:
        What to print.
    """
    check_values(evaluate, {"count": count, "seed": seed})
    from jaxid.checkpoints.loading import find_folder

    # The loader checks the rest of the file.
    kind = read_json(find_folder(model, weights=False) / "config.json", CheckpointError, missing={}).get("model_type")
    return "\n".join((_encoder_lines if kind == "clip" else _model_lines)(model, count, seed))


def unknown(
    model: str = "tiny-llava",
    *,
    out: Path,
    count: Annotated[int, Range(8)] = 256,
    seed: int = 1,
    photographs: Path | None = None,
) -> str:
    """Measure tiny-llava on pictures and words that its training never shows, beside clean pictures.

    Objects drawn by other means and in other styles, glyphs of fonts, photographs behind them, noise, blur, JPEG, no
    colours, rotated pictures, other sizes, and names of things that it does not know; with 95 % intervals.

    Args:
        model: tiny-llava, or the folder of a model that was trained like it.
        out: folder for `unknown.json`, `unknown.md`, and some of the pictures, `unknown.png`.
        count: number of pictures of each sort.
        seed: seed of the scenes.
        photographs: folder of photographs for the backgrounds; by default the one that Matplotlib ships.

    Returns:
        What to print.
    """
    check_values(unknown, {"count": count, "seed": seed})
    from jaxid.checkpoints.loading import load
    from jaxid.families.llava import LlavaConfig
    from jaxid.io import ensure_output_folder, to_json, write_json, write_text
    from jaxid.zoo import unknown as measurement

    ensure_output_folder(out)
    loaded = load(model)
    if type(loaded.config) is not LlavaConfig:  # a model of clips has a subclass of it
        raise InputError(f"{model} is not a model like tiny-llava, whose questions are asked here.")
    found = measurement.measure(loaded, count=count, seed=seed, photographs=photographs, sheet=out / "unknown.png")
    lines = measurement.table(json.loads(to_json(found)))
    write_json(out / "unknown.json", found)
    write_text(out / "unknown.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


def card(name: str, *, out: Path, run: Path | None = None, gates: Path | None = None) -> str:
    """Write the model card of a shipped model, with a figure of its training, into its folder.

    What was not recorded is named in the card.

    Args:
        name: tiny-llava, tiny-llava-weak, tiny-video or tiny-clip.
        out: folder of the checkpoint; `README.md` and `curves.png` are written there.
        run: folder of the run of `jaxid zoo train` that made it.
        gates: folder with the results of `jaxid zoo gates` and `jaxid zoo unknown`.

    Returns:
        What to print.
    """
    from jaxid.zoo import cards

    return f"card: {cards.write_card(name, out, run=run, gates=gates)}"


def _model_lines(model: str, count: int, seed: int) -> Iterator[str]:
    from jaxid.checkpoints.loading import load
    from jaxid.families.llava_video import LlavaVideoConfig
    from jaxid.zoo import evaluation, video_evaluation

    loaded = load(model)
    video = isinstance(loaded.config, LlavaVideoConfig)
    found = (video_evaluation if video else evaluation).evaluate(loaded, count=count, seed=seed)
    for kind, result in found.items():
        bounds = f"{result.low:.1%} to {result.high:.1%}"
        yield f"{kind:14s} {result.value:7.1%}   95 % interval {bounds}   n = {result.count}"


def _encoder_lines(model: str, count: int, seed: int) -> Iterator[str]:
    from jaxid.checkpoints.encoders import load_encoder
    from jaxid.dcsm.own_scorers import own_scorers
    from jaxid.zoo import clip_evaluation

    encoder, scorers = load_encoder(model), own_scorers(model)
    names = {"cosine": "pooled cosine"} | {kind: f"dense maps, {kind.upper()}" for kind in scorers}
    tables = {"": clip_evaluation.evaluate(encoder, scorers, count=count, seed=seed)}
    for shown, shapes in clip_evaluation.SHOWN.items():
        found = clip_evaluation.demonstrate(encoder, scorers, count=count, seed=seed, shapes=shapes)
        tables[f"six captions of one picture, {shown}:"] = found
    for head, table in tables.items():
        if head:
            yield head
        for kind, entry in table.items():
            shares = ((name, entry["methods"][method]) for method, name in names.items())
            told = [f"{name} {own['accuracy']:.1%} ({own['low']:.1%} to {own['high']:.1%})" for name, own in shares]
            yield f"{kind:9s} chance {entry['chance']:.0%}   {'   '.join(told)}"
