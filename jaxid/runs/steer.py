"""`jaxid run steer`: subjects steered to every cell, three relations and single pictures (Figure 6)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import plots
from jaxid.data.grid import near_far_items
from jaxid.data.three_objects import read_three_objects
from jaxid.errors import DataError, InputError, OutputError
from jaxid.experiments import steering
from jaxid.experiments.relations import ANSWERS, RelationBatch, answer_forms, fill, prepare_questions
from jaxid.io import tidy, write_table
from jaxid.prompts.pictures import open_picture
from jaxid.runs.common import PUBLISHED_TEMPLATE, Columns, Run, RunConfig, about, filled, parse_layers
from jaxid.stats import mean_interval

RELATIONS = ("left-right", "above-below", "near-far", "between")
_ANSWERS = {
    "left-right": ANSWERS["horizontal"],
    "above-below": ANSWERS["vertical"],
    "near-far": ("near", "far"),
    "between": ("yes", "no"),
}
_AXIS = {"left-right": "horizontal", "above-below": "vertical", "near-far": "horizontal", "between": "vertical"}
_QUESTIONS = {
    "left-right": "Is the {0} to the left or right of the {1}?",
    "above-below": "Is the {0} above or below the {1}?",
    "near-far": "Is the {0} near or far from the {1}?",
    "between": "Is the {0} in between the {1} and the {2}?",
}
PUBLISHED_LAYERS = (12, 13, 14)
"""Blocks of the published sweeps, of 32."""

PUBLISHED_SINGLE = (range(5, 20), 13)
"""Blocks steered in a single picture, and the block whose IDs are added, of 32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteerConfig(RunConfig):
    """Options of steering.

    Attributes:
        relation: "left-right", "above-below", "near-far" or "between".
        picture: a single picture instead of a data set.
        subject: in the single picture.
        object: likewise.
        cells: those of subject and object in the single picture, (column, row) from the upper left: the subject gets
            the ID of its own cell minus that of the object's, the object the opposite.
        id_layer: the block whose IDs are added in the single picture.
    """

    relation: str = "left-right"
    picture: Path | None = None
    subject: str | None = None
    object: str | None = None
    cells: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (3, 0))
    id_layer: int | None = None

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        super().__post_init__()
        if self.relation not in RELATIONS:
            raise InputError(f"relation is one of {', '.join(RELATIONS)}, not {self.relation!r}.")
        if any(not 0 <= place <= 3 for cell in self.cells for place in cell) or self.cells[0] == self.cells[1]:
            raise InputError(f"cells are two different ones, columns and rows from 0 to 3, not {self.cells}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A picture, its objects (the steered one first) and the index of the true answer, -1 if unknown."""

    key: str
    picture: Any
    names: tuple[str, ...]
    truth: int


def scaled(published: Sequence[int], blocks: int) -> list[int]:
    """Blocks as deep in a model as the published ones are in one of 32."""
    return sorted({min(blocks - 1, round(layer * blocks / 32)) for layer in published})


def read_questions(job: Run, relation: str) -> list[Question]:
    """The items of a relation, from the data set that holds them.

    Raises:
        DataError: if the folder does not hold such items.
    """
    if relation in ("left-right", "above-below"):
        answers = _ANSWERS[relation]
        return [
            Question(
                key=item.key,
                picture=item.picture,
                names=(item.subject, item.object),
                truth=answers.index(item.relation),
            )
            for item in job.spatial_items(_AXIS[relation])
        ]
    folder = job.data_folder()
    if relation == "near-far":
        questions = [
            Question(
                key=f"{item.object_b}-{item.object_a}-{item.cell_b[0]}_{item.cell_b[1]}-{item.size:g}",
                picture=item.picture,
                names=(item.object_b, item.object_a),
                truth=1,
            )
            for item in near_far_items(folder)
        ]
    else:
        items = read_three_objects(folder, bad=job.bad_rows())
        questions = [
            Question(key=item.key, picture=item.picture, names=(item.c, item.a, item.b), truth=0 if item.between else 1)
            for item in items
        ]
    if not questions:
        raise DataError(f"{folder} holds no {relation} items.")
    return job.sample(questions)


def prepare(job: Run, relation: str, questions: Sequence[Question], template: str) -> RelationBatch:
    """Prompts of questions of one relation."""
    answers = _ANSWERS[relation]
    return prepare_questions(
        job.model,
        [question.picture for question in questions],
        [fill(template, _QUESTIONS[relation].format(*question.names), answers) for question in questions],
        [question.names for question in questions],
        axis=_AXIS[relation],
        answers=answers,
        truth=[question.truth for question in questions],
        case=job.case,
    )


def run(config: SteerConfig) -> dict[str, Any]:
    """Steers every item's subject to all 16 cells; writes parts, table, summary and figures.

    Returns:
        The summary.
    """
    if config.picture is not None:
        return run_single(config)
    job = Run(config, f"steer-{config.relation}")
    ids = job.ids()
    layers = job.layers(scaled(PUBLISHED_LAYERS, job.model.num_layers))
    factor = 5.0 if config.factor is None else config.factor
    template = config.text(PUBLISHED_TEMPLATE)
    questions = read_questions(job, config.relation)
    settings = {"layers": layers, "factor": factor, "template": template, "relation": config.relation}
    model = job.begin(
        questions,
        lambda question: question.key,
        settings,
        lambda question: [prepare(job, config.relation, [question], template)],
        questions[:1],
    )
    batch_size = job.batch_size(16 * len(layers))

    def compute(chunk: list[Question]) -> Columns:
        full = filled(chunk, batch_size)
        batch = prepare(job, config.relation, full, template)
        job.checked(batch, [question.names for question in full], len(chunk))
        found = steering.run(model, batch, ids, layers=layers, multiplier=factor, compat=config.compat)
        return steering_rows(found, layers, [question.key for question in chunk], batch.answers, model.name)

    table, summary = job.finish(compute, batch_size=batch_size)
    change, words, within = mean_change(table, layers)
    summary |= {"layers": layers, "words": words, "change": change, "change_interval": within}
    asked = _QUESTIONS[config.relation].format("subject", "object", "other")
    title = f"{asked}\n{model.name}, {'mean of blocks' if len(layers) > 1 else 'block'} {', '.join(map(str, layers))}"
    figure = plots.steering_maps(
        change.mean(axis=0), words, title, about=about(summary, factor, plots.means_note(within))
    )
    plots.save(figure, config.out / f"steering_{config.relation.replace('-', '_')}.png")
    return job.write_summary(summary)


def steering_rows(
    found: steering.Steering, layers: Sequence[int], keys: Sequence[str], words: Sequence[str], model: str
) -> Columns:
    """A row for each item, layer, cell and word."""
    count = len(keys)
    steered, change = found.steered[:, :, :, :count], found.change[:, :, :, :count]
    axes = {"layer": layers, "x": range(4), "y": range(4), "item": keys, "word": words}
    return tidy(steered, axes, name="steered") | {
        "model": np.full(steered.size, model),
        "control": np.broadcast_to(found.control[:count], steered.shape).ravel(),
        "change": change.ravel(),
    }


def mean_change(table: Columns, layers: Sequence[int], **chosen: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Mean change of log-probability over items, Float[L, 4, 4, 2], the words, half of the means' 95 % intervals."""
    rows = np.ones(len(table["change"]), bool)
    for name, value in chosen.items():
        rows &= table[name] == value
    words = list(dict.fromkeys(table["word"][rows].tolist()))
    items, item = np.unique(table["item"][rows], return_inverse=True)
    places = (
        item,
        np.searchsorted(layers, table["layer"][rows]),
        table["x"][rows],
        table["y"][rows],
        np.array([words.index(word) for word in table["word"][rows]]),
    )
    changes = np.zeros((len(items), len(layers), 4, 4, 2))
    changes[places] = table["change"][rows]
    return changes.mean(axis=0).astype(np.float32), words, mean_interval(changes)


def run_single(config: SteerConfig) -> dict[str, Any]:
    """Steers the two words of one picture at every layer in turn; writes table, summary and figure.

    Returns:
        The summary.

    Raises:
        InputError: if the objects are not named, or the relation has none of two.
        OutputError: if the folder holds a run over a data set.
    """
    if config.subject is None or config.object is None or config.relation == "between":
        raise InputError("a single picture needs --subject and --object, and a relation of two objects.")
    if (config.out / "settings.json").exists():
        raise OutputError(f"{config.out} holds a run over a data set; give another --out.")
    job = Run(config, "steer-single")
    ids, blocks = job.ids(), job.model.num_layers
    layers = job.layers(scaled(PUBLISHED_SINGLE[0], blocks))
    id_layer = scaled([PUBLISHED_SINGLE[1]], blocks)[0] if config.id_layer is None else config.id_layer
    parse_layers(str(id_layer), job.model, ())
    picture = np.asarray(open_picture(config.picture))
    question = Question(key="single", picture=picture, names=(config.subject, config.object), truth=-1)
    batch = prepare(job, config.relation, [question], config.text(PUBLISHED_TEMPLATE))
    answer_forms(job.model.processor, batch.answers, batch.case)
    model = job.load()
    factor = 5.0 if config.factor is None else config.factor
    found = steering.single(
        model, batch, ids, layers=layers, cells=config.cells, id_layer=id_layer, multiplier=factor, compat=config.compat
    )
    change = found.change[:, 0]
    columns = tidy(found.steered[:, 0], {"layer": layers, "word": batch.answers}, name="steered")
    columns |= {
        "model": np.full(change.size, model.name),
        "control": np.broadcast_to(found.control[0], change.shape).ravel(),
        "change": change.ravel(),
        **{
            f"{role}_{axis}": np.full(change.size, place)
            for role, cell in zip(("subject", "object"), config.cells, strict=True)
            for axis, place in zip("xy", cell, strict=True)
        },
    }
    if not np.isfinite(columns["change"]).all():
        raise DataError(f"the model's numbers for {config.picture} are NaN or infinite; try --dtype float32.")
    write_table(config.out / "table.parquet", columns)
    figure = plots.steering_by_layer(
        np.array(layers),
        change,
        batch.answers,
        picture=picture,
        title=batch.prompts.questions[0],
        about=plots.About(
            model=model.name,
            items=1,
            unit="picture",
            strength=factor,
            note=f"{config.subject}: ID of cell {config.cells[0]} less that of {config.cells[1]}, block {id_layer}; "
            f"{config.object}: the opposite; cells: (column, row) from the upper left",
        ),
    )
    plots.save(figure, config.out / "steering_single.png")
    return job.write_summary(
        {
            "experiment": job.experiment,
            "model": model.name,
            "fingerprint": model.fingerprint,
            "question": batch.prompts.questions[0],
            "words": batch.answers,
            "control": found.control[0],
            "layers": layers,
            "id_layer": id_layer,
            "cells": config.cells,
            "subject": {"name": config.subject, "cell": config.cells[0]},
            "object": {"name": config.object, "cell": config.cells[1]},
            "factor": factor,
            "change": change,
        }
    )
