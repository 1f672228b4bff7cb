"""Evaluation of tiny-clip and its scorers on held-out scenes, and the training of those scorers."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from jaxid.checkpoints.encoders import load_encoder
from jaxid.dcsm import training
from jaxid.dcsm.evaluate import answer
from jaxid.dcsm.scoring import SCORER_FILE, Scorer
from jaxid.families.base import Encoder
from jaxid.io import write_json
from jaxid.stats import confidence_interval, mean_interval
from jaxid.zoo import tiny_dcsm

SCENES = 2000
"""Number of scenes in each of the scorer's training sets."""

QUESTIONS = 600
"""Number of held-out questions of each kind."""


def scorer_config(seed: int) -> training.TrainingConfig:
    """Settings of the zoo's scorers."""
    return training.TrainingConfig(kind="mlp", epochs=20, dropout=0.0, augment=False, seed=seed)


class Share(TypedDict):
    """A share of correct answers with its 95 % interval."""

    accuracy: float
    low: float
    high: float


class Shares(TypedDict):
    """Shares of correct answers to one kind of question, by method."""

    chance: float
    cosine: Share
    dcsm: NotRequired[Share]


def evaluate(encoder: Encoder, scorer: Scorer | None, *, count: int = QUESTIONS, seed: int = 100) -> dict[str, Shares]:
    """Shares of correct answers by kind of question and method, with 95 % intervals over questions.

    Args:
        encoder: the model.
        scorer: scores the model's maps; if None, only the pooled cosine is evaluated.
        count: number of questions of each kind.
        seed: seed of the scenes.
    """

    def share(right: np.ndarray) -> Share:
        low, high = confidence_interval(int(right.sum()), count)
        return {"accuracy": float(right.mean()), "low": low, "high": high}

    found: dict[str, Shares] = {}
    for kind, asked in tiny_dcsm.questions(seed, count).items():
        answers = answer(encoder, list(asked.pictures), asked.captions, scorer)
        found[kind] = {"chance": 1 / len(asked.captions[0]), "cosine": share(answers.cosine)}
        if answers.dcsm is not None:
            found[kind]["dcsm"] = share(answers.dcsm)
    return found


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
    """Trains a scorer for each seed, copies the first into the model's folder, and writes `accuracy.json`.

    A seed decides the scenes, the scorer's initial parameters, its functional vectors and the order of the data. The
    encoder is the same for all seeds. Finished runs are not repeated.

    Args:
        folder: folder of the runs.
        model: folder of the encoder.
        seeds: one seed for each scorer.
        save_every: steps between saves.
        steps: most training steps of a scorer, by fewer scenes or epochs; the recipe's by default.

    Returns:
        Path of `accuracy.json`.
    """
    # A scorer names the encoder it belongs to, and this one ships with tiny-clip.
    encoder = dataclasses.replace(load_encoder(model), name="tiny-clip")
    found = []
    for seed in seeds:
        config, scenes = scorer_size(scorer_config(seed), steps)
        sets = tiny_dcsm.training_sets(seed, scenes)
        out = folder / f"scorer-{seed}"
        scorer = training.train(out, encoder, sets, config, save_every=save_every)
        found.append(evaluate(encoder, scorer))
    shutil.copyfile(folder / f"scorer-{seeds[0]}" / SCORER_FILE, model / SCORER_FILE)
    table: dict[str, dict[str, object]] = {}
    for kind, first in found[0].items():
        values = np.array([entry[kind]["dcsm"]["accuracy"] for entry in found])
        table[kind] = {"chance": first["chance"], "cosine": first["cosine"], "dcsm": _over_seeds(values)}
    return write_json(folder / "accuracy.json", {"questions": QUESTIONS, "seeds": list(seeds), "kinds": table})


def _over_seeds(values: np.ndarray) -> dict[str, object]:
    """Mean of accuracies over seeds, and Student's 95 % interval; a single seed has an interval of width 0."""
    mean, half = float(values.mean()), float(np.nan_to_num(mean_interval(values)))
    return {"accuracy": mean, "low": mean - half, "high": mean + half, "seeds": values.tolist()}
