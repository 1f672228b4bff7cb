"""`jaxid zoo finetune-study`: does the ID loss help? A weaker tiny-llava, fine-tuned with and without it."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from jaxid import io
from jaxid.checkpoints.loading import load, open_checkpoint
from jaxid.checks import Count, Range
from jaxid.data.coco_spatial import write_coco_spatial
from jaxid.data.grid import read_finetune_folder, write_finetune_folder
from jaxid.data.scenes import OBJECTS, VARIED, sample_free
from jaxid.errors import InputError, InUseError
from jaxid.experiments.base import Command, write_config
from jaxid.experiments.finetune import FinetuneConfig, resolved, select
from jaxid.experiments.finetune_comparison import CompareFinetune, Comparison
from jaxid.experiments.finetune_geometry import cosines_of
from jaxid.experiments.finetune_run import Finetune, settings_of, unloaded
from jaxid.families.base import Model
from jaxid.ids.extract import extract_spatial
from jaxid.ids.spatial import SpatialIDs
from jaxid.train.folder import begun
from jaxid.zoo.tiny_llava import IMAGE_SIZE

_PAIRS = len(OBJECTS) * (len(OBJECTS) - 1) // 2
_OWN, _TEACHER = "ids.safetensors", "teacher-ids.safetensors"
_NONE = "none"
_SECONDS = 2.0
"""How long a process waits before it looks again whether another one is done."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Outcome of a study.

    Attributes:
        comparison: of the runs.
        agreement: cosine between the model's universal IDs and the teacher's, after the layer of the ID loss, by column
            and row; None without a teacher.
    """

    comparison: Comparison
    agreement: list[list[float]] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneStudy(FinetuneConfig, Command[Study]):
    """Fine-tune a weaker tiny-llava with and without the ID loss, over several seeds, and compare.

    Draws pictures, extracts the IDs, trains every run and compares them. Runs of one seed begin with the same
    parameters and see the same batches; with the bugs, those without the ID loss see others, as published. Several
    processes may be given the same command at once: each takes the runs that no other one has taken, and all end when
    the last run has.

    Attributes:
        out: folder for data, IDs, a folder for each run, and `comparison/`. A study that it holds is resumed if its
            settings agree.
        model: the model that all runs begin with.
        teacher: another model, whose IDs a third kind of runs takes; none leaves these out.
        seeds: number of runs of each kind; each seed holds out other pairs.
        pairs: number of ordered pairs of objects that are drawn, each at all 240 placements.
        questions: number of questions in each part of an evaluation.
        check_every: steps between evaluations.
        save_every: steps between saves.
        mesh: devices that share the model and the work of a run, such as data=4,model=2; auto takes all of them. By
            default one copy on every device.
        restart: discard the study that the folder holds, and begin anew.
        progress: show progress bars, on terminals.
        steps: optimiser steps of each run.
        train: kinds of tensors, joined by commas.
        learning_rate: peak of the learning rate.
        seed: the first of the runs' seeds.
    """

    name: ClassVar[str] = "finetune-study"

    out: Path
    model: str = "tiny-llava-weak"
    teacher: str = "tiny-llava"
    seeds: Annotated[int, Range(1, 1000)] = 5
    pairs: Annotated[int, Range(2, _PAIRS)] = 20
    questions: Count = 400
    check_every: Count = 800
    save_every: Count = 400
    mesh: str | None = None
    restart: bool = False
    progress: bool = True
    steps: Count = 3200
    train: str = "lm-attention"
    learning_rate: float = 3e-4

    def run(self) -> Study:
        """Makes what is missing of the study and compares the runs.

        Raises:
            InputError: if an option cannot be used, before anything is drawn.
            OutputError: if the folder holds a study with other settings, or one that is to be discarded is in use.
        """
        if not self.id_weight:
            raise InputError("a study compares training with the ID loss and without it: give an id_weight above 0.")
        model = unloaded(open_checkpoint(self.model))
        config = resolved(self, model)
        select(model, config)
        if self.teacher != _NONE:
            self._check_teacher(model, unloaded(open_checkpoint(self.teacher)))
        further = {name: getattr(self, name) for name in ("model", "teacher", "pairs", "questions", "check_every")}
        settings = {"experiment": self.name, **settings_of(self), **further}
        made = ["data", "coco", _OWN, _TEACHER, "agreement.json", "with-ids-*", "teacher-ids-*", "without-ids-*"]
        begin = {"settings": settings, "made": [*made, "comparison"]}
        with contextlib.ExitStack() as stack:
            if self.restart:
                for folder in self.out.glob("*-ids-*/"):
                    stack.enter_context(io.locked(folder))
            with self._alone(begin, restart=self.restart):
                write_config(self, self.out)
                if not (self.out / _OWN).exists():
                    self._draw()
        missing = {folder: make for folder, make in self._runs().items() if not (folder / "summary.json").exists()}
        while missing:
            done = self._made(missing)
            missing = {folder: make for folder, make in missing.items() if folder not in done}
            if missing and not done:
                time.sleep(_SECONDS)
        with self._alone(begin):
            comparison = CompareFinetune(tuple(self._runs()), out=self.out / "comparison").run()
            return Study(comparison=comparison, agreement=self._agreement(config.id_layer or 0))

    def _check_teacher(self, model: Model, teacher: Model) -> None:
        """Refuses a teacher whose IDs cannot be the model's.

        Raises:
            InputError: if it is the model, or has other layers or another width.
        """
        if self.teacher == self.model:
            raise InputError("the teacher is the model itself; give another one, or --teacher none.")
        if (teacher.num_layers, teacher.width) != (model.num_layers, model.width):
            raise InputError(
                f"the teacher {teacher.name} has {teacher.num_layers} layers of width {teacher.width}, {model.name} "
                f"{model.num_layers} of width {model.width}; give another one, or --teacher none."
            )

    @contextlib.contextmanager
    def _alone(self, begin: Mapping[str, Any], *, restart: bool = False) -> Iterator[None]:
        """The study's folder for this process, once the others that prepare or compare in it are done."""
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(begun(self.out, restart=restart, **begin))
                except InUseError:
                    if restart:
                        raise
                    time.sleep(_SECONDS)
                    continue
                yield
                return

    def _runs(self) -> dict[Path, Callable[[], object]]:
        """The folder of every run, and what makes it."""
        own, teacher = self.out / _OWN, self.out / _TEACHER
        also = None if self.teacher == _NONE else teacher
        kinds: dict[str, dict[str, Any]] = {
            "with": {"ids": own, "compared_ids": also},
            "without": {"ids": own, "compared_ids": also, "id_weight": 0.0},
        }
        if also is not None:
            kinds["teacher"] = {"ids": teacher, "compared_ids": own, "ids_from_another_model": True}
        found: dict[Path, Callable[[], object]] = {}
        for seed in range(self.seed, self.seed + self.seeds):
            for kind, options in kinds.items():
                folder = self.out / f"{kind}-ids-{seed}"
                found[folder] = self._finetune(folder, {**settings_of(self), "seed": seed, **options}).run
        return found

    def _finetune(self, folder: Path, options: Mapping[str, Any]) -> Finetune:
        return Finetune(
            **options,
            out=folder,
            data=self.out / "data",
            model=self.model,
            coco=self.out / "coco",
            questions=self.questions,
            check_every=self.check_every,
            save_every=self.save_every,
            mesh=self.mesh,
            progress=self.progress,
        )

    def _made(self, missing: Mapping[Path, Callable[[], object]]) -> set[Path]:
        """Makes runs that no other process is making, and gives the folders of all that are done."""
        done: set[Path] = set()
        for folder, make in missing.items():
            if not (folder / "summary.json").exists():
                try:
                    make()
                except InUseError:
                    continue
            done.add(folder)
        return done

    def _draw(self) -> None:
        """Draws all pictures, then extracts IDs; the model's own come last: their file shows that all is there."""
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
        items = read_finetune_folder(self.out / "data")
        for model, name in ((self.teacher, _TEACHER), (self.model, _OWN)):
            if model != _NONE:
                extract_spatial(load(model), items, pairs=named).save(self.out / name)

    def _agreement(self, layer: int) -> list[list[float]] | None:
        """The cosines between the model's IDs and the teacher's, by column and row; written to `agreement.json`."""
        if self.teacher == _NONE:
            return None
        found = cosines_of(*(SpatialIDs.load(self.out / name) for name in (_OWN, _TEACHER))).astype(np.float64)
        written = {
            "models": [self.model, self.teacher],
            "layer": layer,
            "cosines_by_column_and_row": found[layer].round(4).tolist(),
            "mean_by_layer": found.mean(axis=(1, 2)).round(4).tolist(),
        }
        io.write_json(self.out / "agreement.json", written)
        return written["cosines_by_column_and_row"]

    def report(self, result: Study) -> Iterator[str]:
        """A line for each set or measure and kind of run, and the agreement of both models' IDs."""
        yield from CompareFinetune((), out=self.out / "comparison").report(result.comparison)
        if result.agreement is not None:
            cells = np.array(result.agreement)
            yield (
                f"cosine between the IDs of {self.model} and {self.teacher}: mean {cells.mean():.2f}, by cell "
                f"{cells.min():.2f} to {cells.max():.2f}"
            )
