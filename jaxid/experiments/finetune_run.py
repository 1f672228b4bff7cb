"""`jaxid finetune`: train with an ID loss, evaluate before, during and after, and export the model."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from matplotlib.figure import Figure

from jaxid import io, plots
from jaxid.checkpoints.export import export
from jaxid.checkpoints.loading import Checkpoint, abstract_parameters, open_checkpoint
from jaxid.checkpoints.tensors import unflatten
from jaxid.checks import Count
from jaxid.costs import nbytes
from jaxid.data.coco_spatial import SpatialItem, find_coco_spatial, read_coco_spatial
from jaxid.data.grid import GridItem, read_finetune_folder
from jaxid.devices import Device
from jaxid.errors import InputError
from jaxid.experiments.base import Command, read_spatial_ids, write_config
from jaxid.experiments.finetune import FinetuneConfig, Task, resolved, select, task
from jaxid.experiments.finetune_data import Group
from jaxid.experiments.finetune_evaluation import evaluate, spatial_items
from jaxid.experiments.finetune_geometry import MEASURES, OTHER, OWN, folders, measured
from jaxid.experiments.session import of_same_model, require_same_shape
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.meshes import Axes
from jaxid.places import Elsewhere
from jaxid.stats import confidence_interval
from jaxid.train import loop as training
from jaxid.train.placement import every_device, shared
from jaxid.train.trackers import Trackers
from jaxid.train.trainable import Trained

COLUMNS = ("step", "stage", "loss", "answer_loss", "id_loss", "accuracy")
SETS = {"held_out": "held-out pairs", "coco_spatial": "COCO-Spatial"}
PARTS = ("", "_right", "_questions")
"""Endings of the columns of an evaluation set: accuracy, number of correct answers, number of questions."""
CHECKED = ("step", *(f"{name}{part}" for name in SETS for part in PARTS), *MEASURES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSummary:
    """Summary of a fine-tuning run.

    Attributes:
        experiment: "finetune".
        model: the model that the run began with.
        config: everything that determined the outcome, besides model, data and IDs.
        pictures: number of pictures, including those of held-out pairs.
        groups: number of groups of pictures.
        trained_parameters: number of trained parameters.
        trained_share: their share of all the model's parameters.
        skipped_steps: number of steps skipped because their gradient was not finite.
        trained_tensors: paths of the trained tensors, with their layers.
        own_ids: whether the IDs are those of the model that the run began with, as far as they say.
        ids_model: the model that the IDs were extracted from, if they say so.
        compared_model: the model that the further IDs were extracted from, if there are any.
        evaluations: for each evaluated step, accuracy, number of correct answers and number of questions of every set;
            and the geometry of held-out activations, see `finetune_geometry`.
        exported: folder of the trained model.
        seconds: duration of this call.
    """

    experiment: str
    model: str
    config: Mapping[str, object]
    pictures: int
    groups: int
    trained_parameters: int
    trained_share: float
    skipped_steps: int
    trained_tensors: Sequence[str]
    own_ids: bool
    ids_model: str
    compared_model: str
    evaluations: Sequence[Mapping[str, Any]]
    exported: Path
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(FinetuneConfig, Command[FinetuneSummary]):
    """Fine-tune on grid scenes with a loss on spatial IDs.

    The folder holds `run.json`, `state/`, `metrics.csv`, `evaluations.csv`, `summary.json`, `curves.png`, and the
    trained model in Hugging Face layout in `model/`.

    Attributes:
        out: folder of the run. A run that it holds is resumed if its settings agree.
        data: folder of pictures {A}_{ax}-{ay}_{B}_{bx}-{by}.png, or a grid folder.
        ids: the model's spatial IDs, .safetensors or the authors' .pt; `jaxid ids extract` makes them.
        ids_from_another_model: the IDs are meant to be another model's, such as those of the same model trained longer;
            it must have as many layers of the same width.
        compared_ids: further IDs, with which evaluations compare the activations too: another model's if `ids` are the
            model's own, else the model's own.
        model: alias, Hugging Face id or folder.
        coco: COCO-Spatial folder to evaluate on as well.
        questions: largest number of questions in each part of an evaluation, drawn by the seed.
        dtype: of parameters and activations; trained tensors also have a float32 copy.
        mesh: devices that share the model and the work, such as data=4,model=2; auto takes all of them. By default one
            copy on every device.
        save_every: steps between saves.
        check_every: steps between evaluations.
        record_every: steps between rows of metrics.
        restart: discard the run that the folder holds, and begin anew.
        wandb: project of Weights & Biases to log to.
        tensorboard: write events for TensorBoard.
        progress: show a progress bar, on terminals.
    """

    name: ClassVar[str] = "finetune"

    out: Path
    data: Path
    ids: Path
    model: str = "tiny-llava"
    ids_from_another_model: bool = False
    compared_ids: Path | None = None
    coco: Path | None = None
    questions: Count = 500
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: str | None = None
    save_every: Count = 100
    check_every: Count = 100
    record_every: Count = 10
    restart: bool = False
    wandb: str | None = None
    tensorboard: bool = False
    progress: bool = True

    def run(self) -> FinetuneSummary:
        """Trains, or resumes the run in the folder; evaluates before, during and after, exports and draws.

        Several processes train together, on a mesh of all their devices; the first one writes.

        Raises:
            InputError, DataError, CheckpointError, OutputError: naming what cannot be used.
            OutOfMemoryError: if the device's memory does not suffice for a training step or a question.
            Elsewhere: in processes but the first, when all is trained.
        """
        if self.reference_bugs:
            from jaxid.experiments.reference import with_bugs  # it knows all experiments

            return with_bugs(self)._run()
        return self._run()

    def _run(self) -> FinetuneSummary:
        started = time.perf_counter()
        io.ensure_output_folder(self.out)
        checkpoint = open_checkpoint(self.model, dtype=self.dtype)
        mesh = self.devices(checkpoint)
        checkpoint = checkpoint.on(mesh)
        config = resolved(self, checkpoint.model)
        read = self.read()
        ids, items, sets = read.ids, read.items, read.sets
        settings = {
            "experiment": self.name,
            "model": self.model,
            "dtype": self.dtype,
            "items": len(items),
            "items_digest": _digest(items),
            "ids_digest": _ids_digest(ids),
            "evaluated": {name: len(questions) for name, questions in sets.items()},
            **settings_of(config),
        }
        if read.compared is not None:
            settings["compared_ids_digest"] = _ids_digest(read.compared)
        first = training.leads()
        board = self.out / "tensorboard" if self.tensorboard and first else None
        trackers = Trackers(settings, wandb=self.wandb if first else None, tensorboard=board)
        training.check_folder(self.out, settings, restart=self.restart, part=True)
        with (
            io.locked(self.out) if first else contextlib.nullcontext()
        ):  # errors are raised before the weights are read
            abstract = unloaded(checkpoint)
            task(abstract, read.training, ids, config, foreign=self.ids_from_another_model).stage().batch(0)
            read.check(abstract)

        model = checkpoint.load()
        job = task(model, read.training, ids, config, foreign=self.ids_from_another_model)
        read.sources(model)
        settings["fingerprint"] = model.fingerprint
        with training.begun(self.out, settings, restart=self.restart, made=["evaluations.csv"]):
            if first:
                write_config(self, self.out)
            found = job.finished(self._train(job, read, trackers, mesh))
            if not first:
                raise Elsewhere
            export(found, self.out / "model", {path for path, _ in job.selection.rows})
            return self._finish(job, read, started)

    def read(self) -> "Read":
        """Reads everything but the model."""
        items = read_finetune_folder(self.data)
        training, held = self.split(items)
        return Read(
            ids=read_spatial_ids(self.ids),
            compared=None if self.compared_ids is None else read_spatial_ids(self.compared_ids),
            items=items,
            training=training,
            sets=self._evaluation_sets(held),
            folders=folders(held, self.questions, self.seed),
        )

    @property
    def evaluated(self) -> int:
        """How often the model is evaluated: before, every `check_every` steps, and at the end."""
        return 1 + -(-self.steps // self.check_every)

    def _evaluation_sets(self, held: Sequence[GridItem]) -> dict[str, list[SpatialItem]]:
        found = {"held_out": spatial_items(held)}
        if self.coco is not None:
            found["coco_spatial"] = read_coco_spatial(*find_coco_spatial(self.coco))
        rng = np.random.default_rng((self.seed, 99))
        sets = {}
        for name, items in found.items():
            if items:
                rows = rng.permutation(len(items))[: self.questions]
                sets[name] = [items[row] for row in sorted(rows)]
        return sets

    def devices(self, checkpoint: Checkpoint) -> Mesh:
        """The mesh that the run asks for.

        Raises:
            InputError: for a text that does not describe a mesh, or a mesh with more devices than there are, or not
                equally many of each process.
        """
        return every_device() if self.mesh is None else shared(self.axes(checkpoint, jax.device_count()))

    def axes(self, checkpoint: Checkpoint, devices: int, device: Device | None = None) -> Axes:
        """The axes of the mesh, as `Checkpoint.axes`; under "auto" there is room for what training adds, too."""
        further = 0.0
        if self.mesh == "auto":
            model = unloaded(checkpoint)
            trained = jax.eval_shape(select(model, resolved(self, model)).split, model.parameters)
            # A copy in float32, the optimizer's two, and a gradient.
            further = 4.0 * sum(nbytes(leaf) for leaf in trained.values())
        return checkpoint.axes(self.mesh, devices, device, further=further)

    def _train(self, job: Task, read: "Read", trackers: Trackers, mesh: Mesh) -> Trained:
        """Returns the trained tensors; writes metrics and evaluations meanwhile."""
        path, sources = self.out / "evaluations.csv", read.sources(job.model)

        def check(step: int, trained: Trained) -> None:
            row: dict[str, float | str] = {"step": step}
            model = job.model_with(trained)
            for name, items in read.sets.items():
                right, count = evaluate(model, items, prompt=job.config.prompt or "plain", answered=self.answered)
                row |= {name: round(right / count, 4), f"{name}_right": right, f"{name}_questions": count}
            row |= measured(model, read.folders, sources, job.config)
            if training.leads():
                training.append_metrics(path, CHECKED, row)

        initial = job.initial()
        if not training.read_metrics(path):
            check(0, initial)
        with trackers as log:
            return training.fit(
                self.out,
                initial,
                [job.stage()],
                columns=COLUMNS,
                save_every=self.save_every,
                record_every=self.record_every,
                progress=self.progress,
                log=log,
                check=check,
                check_every=self.check_every,
                advice="use a larger device, or begin anew with a smaller --batch-size or --dtype bfloat16; `jaxid "
                "plan finetune` tells what fits",
                mesh=mesh,
                layout=job.layout,
            )

    def _finish(self, job: Task, read: "Read", started: float) -> FinetuneSummary:
        """Draws the curves, and writes and returns the summary."""
        pictures = len(read.items)
        metrics, evaluations = (training.read_metrics(self.out / f"{name}.csv") for name in ("metrics", "evaluations"))
        io.write_json(self.out / "metrics.json", {"training": metrics, "evaluations": evaluations})
        plots.save(self._curves(job, pictures, metrics, evaluations), self.out / "curves.png")
        every = sum(int(leaf.size) for leaf in jax.tree.leaves(job.model.parameters))
        summary = FinetuneSummary(
            experiment=self.name,
            model=self.model,
            config=settings_of(job.config),
            pictures=pictures,
            groups=len(job.groups),
            trained_parameters=job.trained,
            trained_share=job.trained / every,
            skipped_steps=int(metrics[-1]["skipped"]),
            trained_tensors=[path if rows is None else f"{path}{list(rows)}" for path, rows in job.selection.rows],
            own_ids=of_same_model(job.model, read.ids),
            ids_model=read.ids.model,
            compared_model="" if read.compared is None else read.compared.model,
            evaluations=evaluations,
            exported=self.out / "model",
            seconds=round(time.perf_counter() - started, 1),
        )
        io.write_json(self.out / "summary.json", summary)
        return summary

    def _curves(
        self, job: Task, pictures: int, metrics: list[dict[str, Any]], evaluations: list[dict[str, Any]]
    ) -> Figure:
        questions = {name: int(evaluations[0][f"{name}_questions"]) for name in SETS if name in evaluations[0]}
        shown = {name: f"{SETS[name]} (n = {count})" for name, count in questions.items()}
        return plots.finetune_curves(
            {
                label: np.array([[row["step"], row[name]] for row in metrics])
                for name, label in (("answer_loss", "answer loss"), ("id_loss", "ID loss"))
            },
            {label: np.array([[row["step"], row[name]] for row in evaluations]) for name, label in shown.items()},
            title=f"{job.model.name}, weight of the ID loss {self.id_weight:g}",
            intervals={
                label: np.array(
                    [confidence_interval(int(row[f"{name}_right"]), questions[name]) for row in evaluations]
                )
                for name, label in shown.items()
            },
            about=plots.About(model=job.model.name, items=pictures, unit="pictures, held-out ones included"),
        )

    def report(self, result: FinetuneSummary) -> Iterator[str]:
        """Accuracies before and after, and what was trained."""
        first, last = result.evaluations[0], result.evaluations[-1]
        for name, shown in SETS.items():
            if name in first:
                yield f"{shown}: {first[name]:.1%} -> {last[name]:.1%} of {int(last[f'{name}_questions'])} questions"
        yield f"{result.trained_parameters} parameters trained ({result.trained_share:.1%})"
        yield str(result.exported)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """What a run reads besides the model.

    Attributes:
        ids: the spatial IDs of the ID loss.
        compared: further ones, with which activations are compared too.
        items: all pictures.
        training: those that are trained on.
        sets: questions for the evaluations, by name.
        folders: questions about held-out pictures whose activations are compared with IDs.
    """

    ids: SpatialIDs
    compared: SpatialIDs | None
    items: Sequence[GridItem]
    training: Sequence[GridItem]
    sets: Mapping[str, Sequence[SpatialItem]]
    folders: Sequence[Group]

    def check(self, model: Model) -> None:
        """Checks that further IDs have the model's layers and width.

        Raises:
            InputError: if they have not.
        """
        if self.compared is not None:
            require_same_shape(model, self.compared)

    def sources(self, model: Model) -> dict[str, SpatialIDs]:
        """The IDs with which activations are compared, by the name of the column: the model's own, and others.

        Raises:
            InputError: if both are the model's own, or neither is.
        """
        found: dict[str, SpatialIDs] = {}
        for ids in (self.ids, self.compared):
            if ids is None:
                continue
            name = OWN if of_same_model(model, ids) else OTHER
            if name in found:
                whose = f"{model.name}'s own" if name == OWN else f"other models' than {model.name}"
                raise InputError(f"ids and compared_ids are both {whose}; one of them must be, and the other not.")
            found[name] = ids
        return found


def settings_of(config: FinetuneConfig) -> dict[str, Any]:
    """Everything that determines the outcome of a run, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)}


def unloaded(checkpoint: Checkpoint) -> Model:
    """A model with the shapes of its parameters instead of their values."""
    definition, shapes = abstract_parameters(checkpoint.kind, checkpoint.model.config)
    return dataclasses.replace(checkpoint.model, definition=definition, parameters=unflatten(shapes))


def _ids_digest(ids: SpatialIDs) -> str:
    return hashlib.sha256(np.asarray(ids.universal).tobytes()).hexdigest()[:16]


def _digest(items: Sequence[GridItem]) -> str:
    text = json.dumps([[item.object_a, item.cell_a, item.object_b, item.cell_b] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
