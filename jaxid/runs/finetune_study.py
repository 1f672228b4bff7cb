"""`jaxid zoo finetune-study`: does the ID loss help? A weaker tiny-llava, fine-tuned with and without it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid.checkpoints.loading import load, open_checkpoint
from jaxid.data.coco_spatial import write_coco_spatial
from jaxid.data.grid import read_finetune_folder, write_finetune_folder
from jaxid.data.scenes import OBJECTS, VARIED, sample_free
from jaxid.errors import InputError
from jaxid.experiments.finetune import FinetuneConfig, trained_tensors
from jaxid.ids.extract import extract_spatial
from jaxid.runs import finetune
from jaxid.train.folder import begun
from jaxid.zoo.tiny_llava import IMAGE_SIZE

CONFIG = FinetuneConfig(
    steps=300,
    groups=2,
    id_layer=3,  # where tiny-llava's words hold places; as deep as the published 11 of 32
    selectors=("lm-attention",),  # of a tiny network's tower and projector alone nothing comes
    learning_rate=3e-4,  # a network of a million parameters moves too little at the published 5e-5
)
"""Of the runs, but for seed and weight of the ID loss."""

PAIRS, QUESTIONS = 20, 400


def run(
    out: Path,
    *,
    model: str = "tiny-llava-weak",
    seeds: Sequence[int] = (0, 1, 2),
    config: FinetuneConfig = CONFIG,
    pairs: int = PAIRS,
    questions: int = QUESTIONS,
    check_every: int = 75,
    progress: bool = True,
) -> dict[str, Any]:
    """Draws pictures, extracts the model's IDs, trains every run and compares them; goes on where it was stopped.

    Args:
        out: gets data, IDs, a folder for every run, and `comparison/`.
        model: what all runs begin with.
        seeds: of the runs; each holds out other pairs.
        config: of the runs.
        pairs: ordered pairs of objects that are drawn, each at all 240 placements.
        questions: of an evaluation.
        check_every: steps between evaluations.
        progress: show progress bars.

    Returns:
        What `finetune.compare` returns.

    Raises:
        InputError: for a number out of its range, before anything is drawn.
        CheckpointError, OutputError: if the folder holds a study with other settings, or is in use.
    """
    most = len(OBJECTS) * (len(OBJECTS) - 1) // 2
    if not seeds or not 2 <= pairs <= most or questions < 1 or check_every < 1 or not config.id_weight:
        raise InputError(
            f"a study needs seeds, 2 to {most} pairs, questions, steps between checks and a weight of the ID loss."
        )
    own = {
        out / f"{'with' if weight else 'without'}-ids-{seed}": dataclasses.replace(config, seed=seed, id_weight=weight)
        for seed in seeds
        for weight in (config.id_weight, 0.0)
    }
    trained_tensors(finetune.unloaded(open_checkpoint(model)), config)
    settings = {"experiment": "finetune-study", "model": model, "config": dataclasses.asdict(config)}
    with begun(out, settings | {"pairs": pairs, "questions": questions, "check_every": check_every}):
        if not (out / "ids.safetensors").exists():
            _draw(out, model, pairs, questions)
        for folder, one in own.items():
            if not finetune.is_finished(folder, one):
                options = finetune.FinetuneRun(
                    out=folder,
                    data=out / "data",
                    ids=out / "ids.safetensors",
                    model=model,
                    coco=out / "coco",
                    questions=questions,
                    check_every=check_every,
                    progress=progress,
                    config=one,
                )
                finetune.run(options)
        return finetune.compare(list(own), out / "comparison")


def _draw(out: Path, model: str, pairs: int, questions: int) -> None:
    """Makes the pictures of all runs and, last, the model's IDs."""
    rng = np.random.default_rng(31)
    first, second = np.triu_indices(len(OBJECTS), 1)
    chosen = rng.choice(len(first), pairs, replace=False)
    named = [tuple(OBJECTS[number] for number in rng.permutation([first[row], second[row]])) for row in sorted(chosen)]
    write_finetune_folder(
        out / "data",
        [(a, b) for a, b in named],
        picture_size=IMAGE_SIZE,
        backgrounds=VARIED,
        jitter_size=0.1,
        jitter_angle=15.0,
    )
    scenes = sample_free(np.random.default_rng(32), questions, num_objects=(2, 2))
    write_coco_spatial(out / "coco", scenes, IMAGE_SIZE)
    found = extract_spatial(load(model), read_finetune_folder(out / "data"), pairs=[(a, b) for a, b in named])
    found.save(out / "ids.safetensors")
