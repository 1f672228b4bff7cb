"""What tiny-clip and its scorer answer on scenes that training never showed."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
"""Scenes of each of the scorer's data sets."""

QUESTIONS = 600
"""Held-out questions of each kind."""


def scorer_config(seed: int) -> training.TrainingConfig:
    """The settings of a scorer of the zoo."""
    return training.TrainingConfig(kind="mlp", epochs=20, dropout=0.0, augment=False, seed=seed)


def evaluate(
    encoder: Encoder, scorer: Scorer | None, *, count: int = QUESTIONS, seed: int = 100
) -> dict[str, dict[str, Any]]:
    """Shares of right answers by kind of question and method, with 95 % intervals over questions.

    Args:
        encoder: the model.
        scorer: of its maps; without one, pooled cosine alone.
        count: questions of each kind.
        seed: of the scenes.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind, asked in tiny_dcsm.questions(seed, count).items():
        answers = answer(encoder, list(asked.pictures), asked.captions, scorer)
        found[kind] = {"chance": 1 / len(asked.captions[0])}
        for method, right in answers._asdict().items():
            if right is not None:
                low, high = confidence_interval(int(right.sum()), count)
                found[kind][method] = {"accuracy": float(right.mean()), "low": low, "high": high}
    return found


def scorer_size(config: training.TrainingConfig, steps: int | None) -> tuple[training.TrainingConfig, int]:
    """Settings and number of scenes of a scorer that is trained for at most so many steps."""
    if steps is None:
        return config, SCENES
    scenes = min(SCENES, steps * config.batch_size)
    epochs = steps // -(-scenes // config.batch_size)
    return dataclasses.replace(config, epochs=min(config.epochs, epochs)), scenes


def train_scorers(
    folder: Path,
    model: Path,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    save_every: int = 500,
    steps: int | None = None,
) -> Path:
    """Trains a scorer for each seed, keeps the first in the model's folder, and writes `accuracy.json`.

    The seeds draw scenes, scorers, vectors and order; the encoder stays. Runs that were finished are not repeated.

    Args:
        folder: of the runs.
        model: folder of the encoder.
        seeds: of the scorers.
        save_every: steps between saves.
        steps: the most that a scorer is trained for, with fewer scenes or epochs; the recipe's by default.

    Returns:
        The file.
    """
    # By its shipped name, which is the one that the scorer is found by.
    encoder = dataclasses.replace(load_encoder(model), name="tiny-clip")
    found = []
    for seed in seeds:
        config, scenes = scorer_size(scorer_config(seed), steps)
        sets = tiny_dcsm.training_sets(seed, scenes)
        out = folder / f"scorer-{seed}"
        scorer = training.train(out, encoder, sets, config, save_every=save_every)
        found.append(evaluate(encoder, scorer))
    shutil.copyfile(folder / f"scorer-{seeds[0]}" / SCORER_FILE, model / SCORER_FILE)
    table: dict[str, Any] = {}
    for kind, first in found[0].items():
        values = np.array([entry[kind]["dcsm"]["accuracy"] for entry in found])
        table[kind] = {"chance": first["chance"], "cosine": first["cosine"], "dcsm": _over_seeds(values)}
    return write_json(folder / "accuracy.json", {"questions": QUESTIONS, "seeds": list(seeds), "kinds": table})


def _over_seeds(values: np.ndarray) -> dict[str, Any]:
    """Mean of accuracies over seeds, and Student's 95 % interval; of a single seed, the value alone."""
    mean, half = float(values.mean()), float(np.nan_to_num(mean_interval(values)))
    return {"accuracy": mean, "low": mean - half, "high": mean + half, "seeds": values.tolist()}
