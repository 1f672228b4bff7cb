"""`jaxid finetune` and `jaxid compare-finetune`: train with an ID loss, export the model, and compare runs."""

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
from jaxid.checks import Count, check_finite, check_seed
from jaxid.costs import nbytes
from jaxid.data.coco_spatial import SpatialItem, find_coco_spatial, read_coco_spatial
from jaxid.data.files import write_csv
from jaxid.data.grid import GridItem, read_finetune_folder
from jaxid.devices import Device
from jaxid.errors import DataError, InputError, JaxidError
from jaxid.experiments.base import Command, read_spatial_ids, write_config
from jaxid.experiments.finetune import FinetuneConfig, Task, resolved, select, task
from jaxid.experiments.finetune_evaluation import evaluate, spatial_items
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.meshes import Axes
from jaxid.places import Elsewhere
from jaxid.stats import confidence_interval, mean_interval
from jaxid.train import loop as training
from jaxid.train.placement import every_device, shared
from jaxid.train.trackers import Trackers
from jaxid.train.trainable import Trained

COLUMNS = ("step", "stage", "loss", "answer_loss", "id_loss", "accuracy")
SETS = {"held_out": "held-out pairs", "coco_spatial": "COCO-Spatial"}
_PARTS = ("", "_right", "_questions")
CHECKED = ("step", *(f"{name}{part}" for name in SETS for part in _PARTS))


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
        evaluations: for each evaluated step, accuracy, number of correct answers and number of questions of every set.
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
        model: alias, Hugging Face id or folder.
        coco: COCO-Spatial folder to evaluate on as well.
        questions: largest number of questions in an evaluation, drawn by the seed.
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
            "ids_digest": hashlib.sha256(np.asarray(ids.universal).tobytes()).hexdigest()[:16],
            "evaluated": {name: len(questions) for name, questions in sets.items()},
            **settings_of(config),
        }
        first = training.leads()
        board = self.out / "tensorboard" if self.tensorboard and first else None
        trackers = Trackers(settings, wandb=self.wandb if first else None, tensorboard=board)
        training.check_folder(self.out, settings, restart=self.restart, part=True)
        with (
            io.locked(self.out) if first else contextlib.nullcontext()
        ):  # errors are raised before the weights are read
            task(unloaded(checkpoint), read.training, ids, config).stage().batch(0)

        model = checkpoint.load()
        job = task(model, read.training, ids, config)
        settings["fingerprint"] = model.fingerprint
        with training.begun(self.out, settings, restart=self.restart, made=["evaluations.csv"]):
            if first:
                write_config(self, self.out)
            found = job.finished(self._train(job, sets, trackers, mesh))
            if not first:
                raise Elsewhere
            export(found, self.out / "model", {path for path, _ in job.selection.rows})
            return self._finish(job, len(items), started)

    def read(self) -> "Read":
        """Reads everything but the model."""
        items = read_finetune_folder(self.data)
        training, held = self.split(items)
        return Read(ids=read_spatial_ids(self.ids), items=items, training=training, sets=self._evaluation_sets(held))

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

    def _train(self, job: Task, sets: Mapping[str, Sequence[SpatialItem]], trackers: Trackers, mesh: Mesh) -> Trained:
        """Returns the trained tensors; writes metrics and evaluations meanwhile."""
        path = self.out / "evaluations.csv"

        def check(step: int, trained: Trained) -> None:
            row: dict[str, float | str] = {"step": step}
            for name, items in sets.items():
                right, count = evaluate(
                    job.model_with(trained), items, prompt=job.config.prompt or "plain", answered=self.answered
                )
                row |= {name: round(right / count, 4), f"{name}_right": right, f"{name}_questions": count}
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

    def _finish(self, job: Task, pictures: int, started: float) -> FinetuneSummary:
        """Draws the curves, and writes and returns the summary."""
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
        ids: the model's spatial IDs.
        items: all pictures.
        training: those that are trained on.
        sets: questions for the evaluations, by name.
    """

    ids: SpatialIDs
    items: Sequence[GridItem]
    training: Sequence[GridItem]
    sets: Mapping[str, Sequence[SpatialItem]]


def settings_of(config: FinetuneConfig) -> dict[str, Any]:
    """Everything that determines the outcome of a run, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(FinetuneConfig)}


def unloaded(checkpoint: Checkpoint) -> Model:
    """A model with the shapes of its parameters instead of their values."""
    definition, shapes = abstract_parameters(checkpoint.kind, checkpoint.model.config)
    return dataclasses.replace(checkpoint.model, definition=definition, parameters=unflatten(shapes))


def _digest(items: Sequence[GridItem]) -> str:
    text = json.dumps([[item.object_a, item.cell_a, item.object_b, item.cell_b] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- comparison ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean over runs with Student's 95 % interval; for a single run, just its value."""

    mean: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, values: np.ndarray) -> "Interval":
        """The interval of some runs' values."""
        mean, half = float(values.mean()), float(np.nan_to_num(mean_interval(values)))
        return cls(mean=mean, low=mean - half, high=mean + half, values=values.tolist())


Comparison = Mapping[str, Mapping[str, Interval]]
"""Intervals by evaluation set, then by "with_ids", "without_ids", "before" and "difference"."""


@dataclasses.dataclass(frozen=True)
class CompareFinetune(Command[Comparison]):
    """Compare fine-tuning runs with and without the ID loss.

    Runs with the same seed are also compared in pairs.

    Attributes:
        folders: folders of runs that differ only in seed and weight of the ID loss.
        out: folder for `comparison.csv`, `comparison.json` and `comparison.png`.
    """

    name: ClassVar[str] = "compare-finetune"

    folders: tuple[Path, ...]
    out: Path = dataclasses.field(kw_only=True)

    def run(self) -> Comparison:
        """Reads the runs' summaries, compares the last evaluations and draws all of them.

        Raises:
            DataError: if a folder holds no finished run, or runs of one kind are missing.
            InputError: if the runs differ in more than seed and weight.
        """
        kinds = self._read()
        runs = [run for of_kind in kinds.values() for run in of_kind.values()]
        found: dict[str, dict[str, Interval]] = {}
        curves: dict[str, dict[str, np.ndarray]] = {}
        for name in _sets_of(runs[0]):
            values = {
                kind: np.array([[row[name] for row in run["evaluations"]] for _, run in sorted(of_kind.items())])
                for kind, of_kind in kinds.items()
            }
            curves[SETS[name]] = values
            found[name] = {kind: Interval.of(rows[:, -1]) for kind, rows in values.items()}
            found[name]["before"] = Interval.of(np.concatenate(list(values.values()))[:, 0])
            with_ids, without_ids = kinds["with_ids"], kinds["without_ids"]
            both = sorted(set(with_ids) & set(without_ids))
            if both:
                found[name]["difference"] = Interval.of(
                    np.array([_last(with_ids[seed], name) - _last(without_ids[seed], name) for seed in both])
                )
        io.ensure_output_folder(self.out)
        write_config(self, self.out)
        io.write_json(self.out / "comparison.json", found)
        lines = [["set", "runs", "mean", "low", "high", "values"]]
        for name, entries in found.items():
            for kind, entry in entries.items():
                numbers = (f"{value:.4f}" for value in (entry.mean, entry.low, entry.high))
                lines.append([name, kind, *numbers, " ".join(f"{value:.4f}" for value in entry.values)])
        write_csv(self.out / "comparison.csv", lines)
        questions = {row[f"{name}_questions"] for run in runs for row in run["evaluations"] for name in found}
        about = plots.About(
            model=str(runs[0]["model"]),
            items=" and ".join(str(len(of_kind)) for of_kind in kinds.values()),
            unit="runs",
            note=f"{' to '.join(f'{count:g}' for count in sorted({min(questions), max(questions)}))} questions a point",
        )
        steps = np.array([row["step"] for row in runs[0]["evaluations"]])
        plots.save(plots.finetune_comparison(steps, curves, about=about), self.out / "comparison.png")
        return found

    def _read(self) -> dict[str, dict[int, Mapping[str, Any]]]:
        """The runs' summaries by "with_ids" and "without_ids", and by seed."""
        kinds: dict[str, dict[int, Mapping[str, Any]]] = {"with_ids": {}, "without_ids": {}}
        seen: dict[tuple[str, int], Path] = {}
        shared: list[object] = []
        for folder in self.folders:
            run = _read_summary(folder)
            shared.append(_shared(run))
            if shared[-1] != shared[0]:
                raise InputError(f"{folder} differs from {self.folders[0]} in more than seed and ID loss.")
            kind, seed = "with_ids" if run["config"]["id_weight"] else "without_ids", run["config"]["seed"]
            if (kind, seed) in seen:
                raise InputError(f"{folder} and {seen[kind, seed]} are runs of one kind with the same seed.")
            seen[kind, seed], kinds[kind][seed] = folder, run
        if not all(kinds.values()):
            raise DataError("a comparison needs finished runs with the ID loss and without it (--id-weight 0).")
        return kinds

    def report(self, result: Comparison) -> Iterator[str]:
        """A line for each set and kind of run."""
        for name, entries in result.items():
            for kind, entry in entries.items():
                yield (
                    f"{name:13s} {kind:12s} {entry.mean:+7.1%}   95 % interval {entry.low:+.1%} to {entry.high:+.1%}   "
                    f"{len(entry.values)} runs"
                )
        yield str(self.out / "comparison.png")


def _read_summary(folder: Path) -> Mapping[str, Any]:
    path = folder / "summary.json"
    try:
        found = io.read_json(path, DataError)
        with io.reading(path, "the summary of a fine-tuning run", DataError):
            if found["experiment"] != Finetune.name or not found["evaluations"]:
                raise ValueError("it is of another experiment, or holds no evaluation")
            check_seed(found["config"]["seed"])
            check_finite("id_weight", float(found["config"]["id_weight"]))
            for row in found["evaluations"]:
                numbers = [row["step"], *(row[f"{name}{part}"] for name in _sets_of(found) for part in _PARTS)]
                check_finite("an evaluation", np.array(numbers, np.float64))
    except JaxidError as error:
        raise DataError(f"{folder} holds no finished fine-tuning run ({io.first_line(error)}).") from error
    return found


def _last(summary: Mapping[str, Any], name: str) -> float:
    return summary["evaluations"][-1][name]


def _sets_of(summary: Mapping[str, Any]) -> list[str]:
    return [name for name in SETS if name in summary["evaluations"][0]]


def _shared(summary: Mapping[str, Any]) -> object:
    """The part of a summary in which compared runs must agree."""
    config = {name: value for name, value in summary["config"].items() if name not in ("seed", "id_weight")}
    return summary["model"], config, [row["step"] for row in summary["evaluations"]], _sets_of(summary)
