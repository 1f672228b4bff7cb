"""`jaxid finetune`: training on grid scenes with an ID loss, resumable, to an HF folder; and comparisons of runs."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxid import plots
from jaxid.checkpoints.export import export
from jaxid.checkpoints.loading import Checkpoint, abstract_parameters, check_dtype, open_checkpoint
from jaxid.checkpoints.tensors import unflatten
from jaxid.checks import check_finite, check_seed
from jaxid.data.coco_spatial import SpatialItem, find_coco_spatial, read_coco_spatial
from jaxid.data.grid import GridItem, read_finetune_folder
from jaxid.errors import DataError, InputError, JaxidError
from jaxid.experiments import finetune
from jaxid.experiments.finetune import FinetuneConfig, Task
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.io import ensure_output_folder, first_line, locked, read_json, reading, to_json, whole_file, write_json
from jaxid.stats import confidence_interval
from jaxid.train import loop as training
from jaxid.train.trackers import Trackers

COLUMNS = ("step", "stage", "loss", "answer_loss", "id_loss", "accuracy")
_SETS = ("held_out", "coco_spatial")
_PARTS = ("", "_right", "_questions")
CHECKED = ("step", *(f"{name}{part}" for name in _SETS for part in _PARTS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """Options of a run.

    Attributes:
        out: folder of the run.
        data: fine-tuning set, or grid folder.
        ids: the model's spatial IDs.
        model: alias, Hugging Face id or folder.
        coco: COCO-Spatial folder that the model is evaluated on.
        questions: most questions of each evaluation, drawn by the seed.
        dtype: of parameters and activations; trained tensors are float32 besides.
        save_every: steps between saves.
        check_every: steps between evaluations.
        record_every: steps between rows of metrics.
        wandb: project of Weights & Biases.
        tensorboard: write events for TensorBoard.
        progress: show a progress bar.
        config: what decides the outcome.
    """

    out: Path
    data: Path
    ids: Path
    model: str = "tiny-llava"
    coco: Path | None = None
    questions: int = 500
    dtype: str = "float32"
    save_every: int = 100
    check_every: int = 100
    record_every: int = 10
    wandb: str | None = None
    tensorboard: bool = False
    progress: bool = True
    config: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: naming the option.
        """
        check_dtype(self.dtype)
        for name in ("questions", "save_every", "check_every", "record_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, not {getattr(self, name)}.")


def run(options: FinetuneRun) -> dict[str, Any]:
    """Trains, evaluating before, during and after; goes on where an earlier process was stopped.

    The folder holds `run.json`, `state/`, `metrics.csv`, `evaluations.csv`, `summary.json`, `curves.png`, and the
    trained model in Hugging Face layout in `model/`.

    Returns:
        The summary.

    Raises:
        InputError, DataError, CheckpointError, OutputError: for what cannot be used, naming it.
    """
    started = time.perf_counter()
    ensure_output_folder(options.out)
    checkpoint = open_checkpoint(options.model, dtype=options.dtype)
    ids = SpatialIDs.from_torch(options.ids) if options.ids.suffix == ".pt" else SpatialIDs.load(options.ids)
    items = read_finetune_folder(options.data)
    train_items, held = finetune.split_pairs(items, options.config.held_out, options.config.seed)
    sets = _evaluation_sets(options, held)
    settings = {
        "experiment": "finetune",
        "model": options.model,
        "fingerprint": "",
        "dtype": options.dtype,
        "items": len(items),
        "items_digest": _digest(items),
        "ids_digest": hashlib.sha256(np.asarray(ids.universal).tobytes()).hexdigest()[:16],
        "evaluated": {name: len(questions) for name, questions in sets.items()},
        "config": dataclasses.asdict(options.config),
    }
    board = options.out / "tensorboard" if options.tensorboard else None
    trackers = Trackers(settings, wandb=options.wandb, tensorboard=board)
    training.check_folder(options.out, settings, unknown=["fingerprint"])
    with locked(options.out):  # all that is wrong shows before the weights are read
        finetune.task(unloaded(checkpoint), train_items, ids, options.config).stage().batch(0)

    model = checkpoint.load()
    settings["fingerprint"] = model.fingerprint
    job = finetune.task(model, train_items, ids, options.config)
    with training.begun(options.out, settings):
        return _trained(options, job, sets, trackers, len(items), started)


def unloaded(checkpoint: Checkpoint) -> Model:
    """A model with the shapes of its parameters in their place."""
    definition, shapes = abstract_parameters(checkpoint.kind, checkpoint.model.config)
    return dataclasses.replace(checkpoint.model, definition=definition, parameters=unflatten(shapes))


def _trained(
    options: FinetuneRun,
    job: Task,
    sets: Mapping[str, Sequence[SpatialItem]],
    trackers: Trackers,
    items: int,
    started: float,
) -> dict[str, Any]:
    checked = options.out / "evaluations.csv"

    def check(step: int, trained: Mapping[str, Any]) -> None:
        row = {"step": step, **_evaluate(job.model_with(trained), sets, options.config.template)}
        training.append_metrics(checked, CHECKED, row)

    initial = job.selection.split(job.model.parameters)
    if not training.read_metrics(checked):
        check(0, initial)
    with trackers as log:
        trained = training.fit(
            options.out,
            initial,
            [job.stage()],
            columns=COLUMNS,
            save_every=options.save_every,
            record_every=options.record_every,
            progress=options.progress,
            log=log,
            check=check,
            check_every=options.check_every,
        )
    folder = export(job.model_with(trained), options.out / "model", {path for path, _ in job.selection.rows})
    return _finish(options, job, items, folder, time.perf_counter() - started)


def _evaluation_sets(options: FinetuneRun, held: Sequence[GridItem]) -> dict[str, list[SpatialItem]]:
    found = {"held_out": finetune.spatial_items(held)}
    if options.coco is not None:
        found["coco_spatial"] = read_coco_spatial(*find_coco_spatial(options.coco))
    rng = np.random.default_rng((options.config.seed, 99))
    sets = {}
    for name, items in found.items():
        if items:
            rows = rng.permutation(len(items))[: options.questions]
            sets[name] = [items[row] for row in sorted(rows)]
    return sets


def _evaluate(model: Model, sets: Mapping[str, Sequence[SpatialItem]], template: str) -> dict[str, Any]:
    row = {}
    for name, items in sets.items():
        right, count = finetune.evaluate(model, items, template=template)
        row |= {name: round(right / count, 4), f"{name}_right": right, f"{name}_questions": count}
    return row


def _finish(options: FinetuneRun, job: Task, items: int, folder: Path, seconds: float) -> dict[str, Any]:
    metrics = training.read_metrics(options.out / "metrics.csv")
    evaluations = training.read_metrics(options.out / "evaluations.csv")
    write_json(options.out / "metrics.json", {"training": metrics, "evaluations": evaluations})
    questions = {name: int(evaluations[0][f"{name}_questions"]) for name in _SETS if name in evaluations[0]}
    named = {name: f"{name.replace('_', ' ')} (n = {count})" for name, count in questions.items()}
    figure = plots.finetune_curves(
        {name: np.array([[row["step"], row[name]] for row in metrics]) for name in ("answer_loss", "id_loss")},
        {shown: np.array([[row["step"], row[name]] for row in evaluations]) for name, shown in named.items()},
        title=f"{job.model.name}, weight of the ID loss {job.config.id_weight:g}",
        intervals={
            shown: np.array([confidence_interval(int(row[f"{name}_right"]), questions[name]) for row in evaluations])
            for name, shown in named.items()
        },
        about=plots.About(model=job.model.name, items=items, unit="pictures, held-out ones included"),
    )
    plots.save(figure, options.out / "curves.png")
    every = sum(int(leaf.size) for leaf in jax.tree.leaves(job.model.parameters))
    summary = {
        "experiment": "finetune",
        "model": options.model,
        "config": dataclasses.asdict(job.config),
        "pictures": items,
        "groups": len(job.groups),
        "trained_parameters": job.trained,
        "trained_share": job.trained / every,
        "skipped_steps": int(metrics[-1]["skipped"]),
        "trained_tensors": [path if rows is None else f"{path}{list(rows)}" for path, rows in job.selection.rows],
        "evaluations": evaluations,
        "exported": str(folder),
        "seconds": round(seconds, 1),
    }
    write_json(options.out / "summary.json", summary)
    return summary


def _digest(items: Sequence[GridItem]) -> str:
    text = json.dumps([[item.object_a, item.cell_a, item.object_b, item.cell_b] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- comparison ------------------------------------------------------------------------------------------------------


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Finished runs with and without the ID loss side by side: table and figure with Student's 95 % intervals.

    Runs of one seed are also compared pair by pair.

    Args:
        folders: of the runs, equal but for seed and weight of the ID loss.
        out: gets `comparison.csv`, `comparison.json` and `comparison.png`.

    Returns:
        By set, then by "with_ids", "without_ids" and "difference": mean, low, high and the runs' values.

    Raises:
        DataError: if a folder holds no finished run, or they are not of both kinds.
        InputError: if they differ in more than seed and weight.
    """
    runs = [_read_summary(folder) for folder in folders]
    first = _shared(runs[0])
    for folder, other in zip(folders, runs, strict=True):
        if _shared(other) != first:
            raise InputError(f"{folder} differs from {folders[0]} in more than seed and weight of the ID loss.")
    given = [(run["config"]["seed"], bool(run["config"]["id_weight"])) for run in runs]
    for row, (folder, one) in enumerate(zip(folders, given, strict=True)):
        if one in given[:row]:
            raise InputError(f"{folder} and {folders[given.index(one)]} are runs of one kind with the same seed.")
    kinds = {
        "with_ids": {run["config"]["seed"]: run for run in runs if run["config"]["id_weight"]},
        "without_ids": {run["config"]["seed"]: run for run in runs if not run["config"]["id_weight"]},
    }
    if not all(kinds.values()):
        raise DataError("a comparison needs finished runs with the ID loss and without it (--id-weight 0).")
    steps = np.array([row["step"] for row in runs[0]["evaluations"]])
    found: dict[str, Any] = {}
    curves: dict[str, dict[str, np.ndarray]] = {}
    for name in _SETS:
        if name not in runs[0]["evaluations"][0]:
            continue
        values = {
            kind: np.array([[row[name] for row in run["evaluations"]] for _, run in sorted(of_kind.items())])
            for kind, of_kind in kinds.items()
        }
        curves[name.replace("_", " ")] = values
        found[name] = {kind: _interval(rows[:, -1]) for kind, rows in values.items()}
        found[name]["before"] = _interval(np.concatenate(list(values.values()))[:, 0])
        both = sorted(set(kinds["with_ids"]) & set(kinds["without_ids"]))
        if both:
            last = [[kinds[kind][seed]["evaluations"][-1][name] for seed in both] for kind in kinds]
            found[name]["difference"] = _interval(np.subtract(*map(np.array, last)))
    ensure_output_folder(out)
    write_json(out / "comparison.json", found)
    lines = ["set,runs,mean,low,high,values"]
    for name, entries in found.items():
        for kind, entry in entries.items():
            numbers = ",".join(f"{entry[part]:.4f}" for part in ("mean", "low", "high"))
            lines.append(f"{name},{kind},{numbers},{' '.join(f'{value:.4f}' for value in entry['values'])}")
    with whole_file(out / "comparison.csv") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    runs_of = {kind: len(of_kind) for kind, of_kind in kinds.items()}
    questions = {
        row[f"{name}_questions"] for run in runs for row in run["evaluations"] for name in _SETS if name in row
    }
    about = plots.About(
        model=str(runs[0]["model"]),
        items=f"{runs_of['with_ids']} and {runs_of['without_ids']}",
        unit="runs",
        note=f"{' to '.join(f'{count:g}' for count in sorted({min(questions), max(questions)}))} questions a point",
    )
    plots.save(plots.finetune_comparison(steps, curves, about=about), out / "comparison.png")
    return found


def is_finished(folder: Path, config: FinetuneConfig) -> bool:
    """Whether a folder holds the summary of a run with these settings."""
    try:
        return _read_summary(folder)["config"] == json.loads(to_json(config))
    except DataError:
        return False


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    try:
        found = read_json(path, DataError)
        with reading(path, "the summary of a fine-tuning run", DataError):
            if found["experiment"] != "finetune" or not found["evaluations"]:
                raise ValueError("it is of another experiment, or holds no evaluation")
            check_seed(found["config"]["seed"])
            check_finite("id_weight", float(found["config"]["id_weight"]))
            for row in found["evaluations"]:
                numbers = [row["step"], *(row[f"{name}{part}"] for name in _sets_of(found) for part in _PARTS)]
                check_finite("an evaluation", np.array(numbers, np.float64))
    except JaxidError as error:
        raise DataError(f"{folder} holds no finished fine-tuning run ({first_line(error)}).") from error
    return found


def _sets_of(summary: Mapping[str, Any]) -> list[str]:
    return [name for name in _SETS if name in summary["evaluations"][0]]


def _shared(summary: Mapping[str, Any]) -> Any:
    config = {name: value for name, value in summary["config"].items() if name not in ("seed", "id_weight")}
    return summary["model"], config, [row["step"] for row in summary["evaluations"]], _sets_of(summary)


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Mean and Student's 95 % interval; of a single run, the value alone."""
    from scipy import stats

    mean = float(values.mean())
    half = 0.0
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values.tolist()}
