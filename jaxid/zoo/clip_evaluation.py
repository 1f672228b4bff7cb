"""Evaluation of tiny-clip and its scorers on held-out scenes, and the training of those scorers."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from jaxid.checkpoints.encoders import load_encoder
from jaxid.dcsm import training
from jaxid.dcsm.embedding import embed_images
from jaxid.dcsm.evaluate import Scores, Wording, cosines, embedded, is_highest, map_scores
from jaxid.dcsm.own_scorers import KIND_FILE
from jaxid.dcsm.scoring import SCORER_FILE, Scorer
from jaxid.families.base import Encoder
from jaxid.io import write_json
from jaxid.stats import confidence_interval, mean_interval
from jaxid.zoo import tiny_dcsm

SCENES = 4000
"""Number of scenes in each of the scorer's training sets."""

QUESTIONS = 600
"""Number of held-out questions of each kind."""


SCORERS: tuple[Literal["mlp", "cnn"], ...] = ("cnn", "mlp")
"""Kinds of the shipped scorers, the default one first."""

SHOWN: dict[str, tuple[str, str] | None] = {"any two objects": None, "circle and triangle": ("circle", "triangle")}
"""What the scenes of the demonstrations show."""

DEMONSTRATIONS = 200
"""Number of scenes of a demonstration."""


def scorer_config(kind: Literal["mlp", "cnn"], seed: int) -> training.TrainingConfig:
    """Settings of the zoo's scorers."""
    own = {"mlp": (4, 12, 2e-3), "cnn": (2, 12, 1e-3)}
    batch_size, epochs, learning_rate = own[kind]
    return training.TrainingConfig(
        kind=kind,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        decay=True,
        dropout=0.0,
        augment=False,
        group="mixed",
        seed=seed,
    )


class Share(TypedDict):
    """A share of correct answers with its 95 % interval."""

    accuracy: float
    low: float
    high: float


class Shares(TypedDict):
    """Shares of correct answers to one kind of question."""

    chance: float
    methods: dict[str, Share]  # "cosine", the pooled one, and each scorer by its name


def evaluate(
    encoder: Encoder, scorers: Mapping[str, Scorer], *, count: int = QUESTIONS, seed: int = 100
) -> dict[str, Shares]:
    """Shares of correct answers by kind of question and method, with 95 % intervals over questions.

    Args:
        encoder: the model.
        scorers: score the model's maps; the pooled cosine is always evaluated.
        count: number of questions of each kind.
        seed: seed of the scenes.
    """
    found: dict[str, Shares] = {}
    for kind, asked in tiny_dcsm.questions(seed, count).items():
        scores = _scores(encoder, asked, scorers)
        shares = {method: _share(is_highest(own)) for method, own in scores.items()}
        found[kind] = {"chance": 1 / len(asked.captions[0]), "methods": shares}
    return found


def demonstrate(
    encoder: Encoder,
    scorers: Mapping[str, Scorer],
    *,
    count: int = DEMONSTRATIONS,
    seed: int = 100,
    shapes: tuple[str, str] | None = None,
) -> dict[str, Shares]:
    """How often the right caption wins in each pair of the published demonstration; chance is one half.

    The six captions of a scene are standardised together, as in one call of `jaxid dcsm score`. A fourth row,
    "absence", shows the scenes of the third pair without their second object: there the other caption is right, and a
    scorer that always prefers "with" fails.

    Args:
        encoder: the model.
        scorers: score the model's maps; the pooled cosine is always evaluated.
        count: number of scenes.
        seed: seed of the scenes.
        shapes: names of the two objects; any two by default.
    """
    asked = tiny_dcsm.demonstration(seed, count, shapes)
    rows = {name: (asked, pair) for pair, name in enumerate(tiny_dcsm.DEMONSTRATION)}
    rows["absence"] = (tiny_dcsm.demonstration(seed, count, shapes, alone=True), 2)
    scores = {id(asked): _scores(encoder, asked, scorers) for asked, _ in rows.values()}
    return {
        name: {
            "chance": 0.5,
            "methods": {
                method: _share(is_highest([one[2 * pair : 2 * pair + 2] for one in own]))
                for method, own in scores[id(asked)].items()
            },
        }
        for name, (asked, pair) in rows.items()
    }


def _scores(encoder: Encoder, asked: tiny_dcsm.Questions, scorers: Mapping[str, Scorer]) -> dict[str, Scores]:
    """Scores of every question's captions, by method; a question's maps are standardised together."""
    shown = range(len(asked.pictures))
    words, pictures = Wording.read(encoder, asked.captions), embed_images(encoder, list(asked.pictures))
    texts, told = embedded(encoder, words)
    found: dict[str, Scores] = {"cosine": cosines(pictures.pooled, texts.pooled, words, shown)}
    return found | {name: map_scores(scorer, pictures, told, words, shown) for name, scorer in scorers.items()}


def _share(right: np.ndarray) -> Share:
    low, high = confidence_interval(int(right.sum()), len(right))
    return {"accuracy": float(right.mean()), "low": low, "high": high}


def scorer_size(config: training.TrainingConfig, steps: int | None) -> tuple[training.TrainingConfig, int]:
    """Settings and number of scenes of a scorer that is trained for at most `steps` steps."""
    if steps is None:
        return config, SCENES
    scenes = min(SCENES, steps * config.batch_size)
    epochs = steps // (scenes // config.batch_size)
    return dataclasses.replace(config, epochs=min(config.epochs, epochs)), scenes


def train_scorers(
    folder: Path,
    model: Path,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    save_every: int = 500,
    steps: int | None = None,
) -> Path:
    """Trains a scorer of each kind for each seed, copies the first ones into the model's folder, and evaluates all.

    A seed decides the scenes, the scorer's initial parameters, its functional vectors and the order of the data. The
    encoder is the same for all seeds. Finished runs are not repeated.

    Args:
        folder: folder of the runs, `scorer-{kind}-{seed}`.
        model: folder of the encoder.
        seeds: one seed for each scorer of a kind.
        save_every: steps between saves.
        steps: most training steps of a scorer, by fewer scenes or epochs; the recipe's by default.

    Returns:
        Path of `accuracy.json`.
    """
    # A scorer names the encoder it belongs to, and this one ships with tiny-clip.
    encoder = dataclasses.replace(load_encoder(model), name="tiny-clip")
    found: list[dict[str, dict[str, Shares]]] = []
    for seed in seeds:
        scorers = {}
        for kind in SCORERS:
            config, scenes = scorer_size(scorer_config(kind, seed), steps)
            sets = tiny_dcsm.training_sets(seed, scenes)
            scorers[kind] = training.train(
                folder / f"scorer-{kind}-{seed}", encoder, sets, config, save_every=save_every
            )
        found.append({"held-out": evaluate(encoder, scorers)})
        for shown, shapes in SHOWN.items():
            found[-1][shown] = demonstrate(encoder, scorers, shapes=shapes)
    for kind in SCORERS:
        name = SCORER_FILE if kind == SCORERS[0] else KIND_FILE.format(kind)
        shutil.copyfile(folder / f"scorer-{kind}-{seeds[0]}" / SCORER_FILE, model / name)
    tables = {
        name: {kind: _over_seeds([one[name][kind] for one in found]) for kind in found[0][name]} for name in found[0]
    }
    counts = {"questions": QUESTIONS, "demonstrations": DEMONSTRATIONS, "seeds": list(seeds)}
    return write_json(folder / "accuracy.json", counts | {"tables": tables})


def _over_seeds(found: Sequence[Shares]) -> dict[str, object]:
    """The cosine, which no seed changes, and for each scorer the mean over seeds with Student's 95 % interval.

    The interval of a single seed is that over its questions.
    """
    table: dict[str, object] = {"chance": found[0]["chance"], "cosine": found[0]["methods"]["cosine"]}
    for kind in SCORERS:
        shares = [one["methods"][kind] for one in found]
        values = np.array([share["accuracy"] for share in shares])
        mean, half = float(values.mean()), float(mean_interval(values))
        over = shares[0] if len(shares) == 1 else {"accuracy": mean, "low": mean - half, "high": mean + half}
        table[kind] = {**over, "seeds": values.tolist()}
    return table
