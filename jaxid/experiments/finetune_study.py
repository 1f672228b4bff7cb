"""`jaxid zoo finetune-study`: does the ID loss help? A weaker tiny-llava, fine-tuned with and without it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from jaxid.checkpoints.loading import load, open_checkpoint
from jaxid.checks import Count, Range
from jaxid.data.coco_spatial import write_coco_spatial
from jaxid.data.grid import read_finetune_folder, write_finetune_folder
from jaxid.data.scenes import OBJECTS, VARIED, sample_free
from jaxid.errors import InputError
from jaxid.experiments.base import Command, write_config
from jaxid.experiments.finetune import FinetuneConfig, resolved, select
from jaxid.experiments.finetune_run import CompareFinetune, Comparison, Finetune, settings_of, unloaded
from jaxid.ids.extract import extract_spatial
from jaxid.train.folder import begun
from jaxid.zoo.tiny_llava import IMAGE_SIZE

_PAIRS = len(OBJECTS) * (len(OBJECTS) - 1) // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneStudy(FinetuneConfig, Command[Comparison]):
    """Fine-tune a weaker tiny-llava with and without the ID loss, over several seeds, and compare.

    Draws pictures, extracts the model's IDs, trains every run and compares them.

    Attributes:
        out: folder for data, IDs, a folder for each run, and `comparison/`. A study that it holds is resumed if its
            settings agree.
        model: the model that all runs begin with.
        seeds: number of runs of each kind; each seed holds out other pairs.
        pairs: number of ordered pairs of objects that are drawn, each at all 240 placements.
        questions: number of questions in an evaluation.
        check_every: steps between evaluations.
        mesh: devices that share the model and the work of a run, such as data=4,model=2; auto takes all of them. By
            default one copy on every device.
        restart: discard the study that the folder holds, and begin anew.
        progress: show progress bars, on terminals.
        steps: optimiser steps of each run.
        id_layer: decoder layer after which the second object's word is compared with its ID.
        train: kinds of tensors, joined by commas.
        learning_rate: peak of the learning rate.
        seed: the first of the runs' seeds.
    """

    name: ClassVar[str] = "finetune-study"

    out: Path
    model: str = "tiny-llava-weak"
    seeds: Annotated[int, Range(1, 1000)] = 3
    pairs: Annotated[int, Range(2, _PAIRS)] = 20
    questions: Count = 400
    check_every: Count = 75
    mesh: str | None = None
    restart: bool = False
    progress: bool = True
    steps: Count = 300
    id_layer: Annotated[int, Range(0)] | None = 3
    train: str = "lm-attention"
    learning_rate: float = 3e-4

    def run(self) -> Comparison:
        """Makes what is missing of the study and compares the runs.

        Raises:
            InputError: if an option cannot be used, before anything is drawn.
            OutputError: if the folder holds a study with other settings, or is in use.
        """
        if not self.id_weight:
            raise InputError("a study compares training with the ID loss and without it: give an id_weight above 0.")
        model = unloaded(open_checkpoint(self.model))
        select(model, resolved(self, model))
        further = {name: getattr(self, name) for name in ("model", "pairs", "questions", "check_every")}
        settings = {"experiment": self.name, **settings_of(self), **further}
        made = ["data", "coco", "ids.safetensors", "with-ids-*", "without-ids-*", "comparison"]
        with begun(self.out, settings, restart=self.restart, made=made):
            write_config(self, self.out)
            if not (self.out / "ids.safetensors").exists():
                self._draw()
            folders = []
            for seed in range(self.seed, self.seed + self.seeds):
                for kind, weight in (("with", self.id_weight), ("without", 0.0)):
                    folders.append(self.out / f"{kind}-ids-{seed}")
                    self._finetune(folders[-1], seed, weight)
            return CompareFinetune(tuple(folders), out=self.out / "comparison").run()

    def _finetune(self, folder: Path, seed: int, id_weight: float) -> None:
        Finetune(
            **settings_of(self) | {"seed": seed, "id_weight": id_weight},
            out=folder,
            data=self.out / "data",
            ids=self.out / "ids.safetensors",
            model=self.model,
            coco=self.out / "coco",
            questions=self.questions,
            check_every=self.check_every,
            mesh=self.mesh,
            progress=self.progress,
        ).run()

    def _draw(self) -> None:
        """Draws the pictures of all runs; then extracts the model's IDs, whose file shows that all is there."""
        rng = np.random.default_rng(31)
        first, second = np.triu_indices(len(OBJECTS), 1)
        chosen = rng.choice(len(first), self.pairs, replace=False)
        orders = [rng.permutation([first[row], second[row]]) for row in sorted(chosen)]
        named = [(OBJECTS[a], OBJECTS[b]) for a, b in orders]
        write_finetune_folder(
            self.out / "data",
            named,
            picture_size=IMAGE_SIZE,
            backgrounds=VARIED,
            jitter_size=0.1,
            jitter_angle=15.0,
        )
        scenes = sample_free(np.random.default_rng(32), self.questions, num_objects=(2, 2))
        write_coco_spatial(self.out / "coco", scenes, IMAGE_SIZE)
        found = extract_spatial(load(self.model), read_finetune_folder(self.out / "data"), pairs=named)
        found.save(self.out / "ids.safetensors")

    def report(self, result: Comparison) -> Iterator[str]:
        """A line for each set and kind of run."""
        return CompareFinetune((), out=self.out / "comparison").report(result)
