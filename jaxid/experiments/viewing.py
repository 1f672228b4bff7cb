"""Runs, IDs and dense maps as contents of a page: tables from the folders, questions and pictures from the data."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from jaxid import io
from jaxid.data.coco_spatial import OPPOSITE
from jaxid.errors import CheckpointError, InputError, JaxidError, JaxidWarning
from jaxid.experiments.base import Experiment, Reading
from jaxid.experiments.dcsm_score import MAPS_FILE, read_maps
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.session import Columns, Session, as_array, rows_where
from jaxid.experiments.stored import stored_experiment
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs
from jaxid.prompts.pictures import Picture
from jaxid.viewer.content import Content, Geometry, Item, Plane, Run, Texts, Value, chips
from jaxid.viewer.page import PICTURE_SIZE, Page, write_page

Viewable = str | Path | SpatialIDs | TemporalIDs | Content
"""A run's folder, a file of IDs, IDs, or a content."""


def view(*shown: Viewable, limit: int | None = None, height: int = 900) -> Page:
    """Shows runs, IDs or dense maps in a notebook, as `jaxid view` does in a browser.

    Args:
        shown: folders of runs, files of IDs, or IDs.
        limit: number of items of each run, from its first; all by default.
        height: of the frame, in pixels.

    Raises:
        InputError: for a folder or file that cannot be shown.
    """
    return Page(tuple(content for one in shown for content in contents_of(one, limit)), height)


def write(shown: Sequence[Path], out: Path | None, *, limit: int | None, picture_size: int = PICTURE_SIZE) -> Path:
    """Writes the page of `jaxid view`.

    Args:
        shown: folders of runs, and files of IDs.
        out: the page; view.html in the first folder, or beside the first file, by default.
        limit: number of items of each run.
        picture_size: longest side of the embedded pictures, in pixels.

    Raises:
        InputError: if there is nothing to show, or a folder or file cannot be shown.
        OutputError: if the page cannot be written.
    """
    if not shown:
        raise InputError("view needs at least one folder of a run, or a file of IDs.")
    first = shown[0] if shown[0].is_dir() else shown[0].parent
    found = [content for one in shown for content in contents_of(one, limit)]
    return write_page(out or first / "view.html", found, picture_size=picture_size)


def contents_of(shown: Viewable, limit: int | None = None) -> list[Content]:
    """The contents of a folder, a file of IDs, or IDs.

    Raises:
        InputError: if they cannot be shown.
    """
    if isinstance(shown, SpatialIDs | TemporalIDs):
        return [geometry(shown)]
    if not isinstance(shown, str | Path):
        return [shown]
    path = Path(shown)
    if path.suffix == ".safetensors" and path.is_file():
        return [geometry(read_ids(path))]
    if not path.is_dir():
        raise InputError(f"{path} is neither a folder nor a .safetensors file of IDs.")
    if (path / MAPS_FILE).is_file():
        return [read_maps(path / MAPS_FILE)]
    summary = io.read_json(path / "summary.json", InputError, missing={})
    if "experiment" not in summary or not (path / "table.parquet").is_file():
        page = path / "view.html"
        hint = f"; its page is {page}" if page.is_file() else ""
        raise InputError(
            f"{path} holds no finished `jaxid run` or `jaxid dcsm score --out DIR` (summary.json and table.parquet, or "
            f"{MAPS_FILE}){hint}."
        )
    return [*runs(path, summary, limit)]


def read_ids(path: Path) -> SpatialIDs | TemporalIDs:
    """Spatial or temporal IDs from a file.

    Raises:
        InputError: if it holds neither.
    """
    try:
        return SpatialIDs.load(path)
    except CheckpointError as spatial:
        try:
            return TemporalIDs.load(path)
        except CheckpointError:
            raise InputError(str(spatial)) from spatial


def runs(folder: Path, summary: Mapping[str, Any], limit: int | None = None) -> list[Run]:
    """A run of an experiment, one content for each kind of question.

    Args:
        folder: the run's folder.
        summary: its summary.
        limit: number of items, from the first.

    Raises:
        InputError: if the experiment cannot be viewed.
        OutputError: if the folder does not hold the experiment's options.
    """
    experiment = stored_experiment(folder, str(summary["experiment"]))
    reading = experiment.reading
    if reading is None:
        raise InputError(f"runs of {experiment.name} cannot be viewed: the experiment has no `reading` of its table.")
    stored = io.read_table(folder / "table.parquet")
    table = {name: stored[name].to_numpy(zero_copy_only=False) for name in stored.column_names}
    keys = list(dict.fromkeys(table["item"].tolist()))[:limit]
    table = rows_where(table, np.isin(table["item"], keys))
    kinds = list(dict.fromkeys(table[reading.split].tolist())) if reading.split else [None]
    shown, plane = _displayed(experiment, folder, keys, len(kinds))
    about = {
        "model": str(summary["model"]),
        "items": str(len(keys)),
        **{
            name: str(value)
            for name in ("strength", "relation")
            if (value := getattr(experiment, name, None)) is not None
        },
    }
    found = []
    for index, kind in enumerate(kinds):
        rows = table if reading.split is None else rows_where(table, table[reading.split] == kind)
        title = " · ".join(part for part in (experiment.name, kind, folder.name) if part)
        found.append(_run(title, reading, rows, keys, [one.get(index) for one in shown], plane, about))
    return found


def _run(
    title: str,
    reading: Reading,
    table: Columns,
    keys: list[str],
    shown: Sequence[Item | None],
    plane: Plane | None,
    about: Mapping[str, str],
) -> Run:
    """One kind of question of a run."""
    entries = {name: list(dict.fromkeys(table[name].tolist())) for name in reading.axes}
    axes = {"item": keys, **entries}
    by_word = isinstance(reading.before, str)
    words = list(dict.fromkeys(table["word"].tolist())) if by_word else []

    def answers(columns: str | tuple[str, str]) -> Float[np.ndarray, "N *axes 2"]:
        if isinstance(columns, str):
            return as_array(table, columns, axes | {"word": words})
        return np.stack([as_array(table, column, axes) for column in columns], axis=-1)

    after = None if reading.after is None else answers(reading.after)
    if reading.before is None:
        assert after is not None and len(entries) == 1
        before = after[:, :1]
    else:
        before = _reduced(answers(reading.before))
    values = []
    for name, text in reading.values.items():
        if by_word:
            found = as_array(table, name, axes | {"word": words})
            values += [Value(name=f"{text}; {word}", values=found[..., k]) for k, word in enumerate(words)]
        else:
            found = as_array(table, name, axes)
            signed = found.dtype.kind == "f"
            values.append(Value(name=text, values=found.astype(np.float32), signed=signed))
    texts = None
    if reading.texts is not None and (table[reading.texts[0]] != "").any():
        first, then = (as_array(table, name, axes) for name in reading.texts)
        texts = Texts(before=first.reshape(len(keys), -1)[:, 0], after=then)
    return Run(
        title=title,
        items=_items(table, keys, shown, words),
        axes={name: reading.labels.get(name, own) for name, own in entries.items()},
        before=before,
        after=after,
        values=values,
        texts=texts,
        plane=plane,
        about=about,
    )


def _reduced(before: Float[np.ndarray, "N *axes 2"]) -> Float[np.ndarray, "N *reduced 2"]:
    """The array with length 1 along axes on which it does not depend."""
    for axis in range(1, before.ndim - 1):
        first = before.take([0], axis)
        if (before == first).all():
            before = first
    return before


def _items(table: Columns, keys: list[str], shown: Sequence[Item | None], words: Sequence[str]) -> list[Item]:
    """The items, with as much of their questions and pictures as is known."""
    known = {item.key: item for item in shown if item is not None}
    first = dict(zip(*np.unique(table["item"], return_index=True), strict=True))
    found = []
    for key in keys:
        pair, truth = tuple(words), -1
        if not pair:  # the table has columns of the correct answer and of the wrong one
            relation = str(table["relation"][first[key]])
            pair, truth = (relation, OPPOSITE[relation]), 0
        item = known.get(key)
        if item is None:
            item = Item(key=key, words=(pair[0], pair[1]), truth=truth)
        elif item.words != pair:
            truth = {item.words: item.truth, item.words[::-1]: 1 - item.truth}.get((pair[0], pair[1]), truth)
            item = Item(**vars(item) | {"words": pair, "truth": truth})
        found.append(item)
    return found


def _displayed(
    experiment: Experiment[Any, Any, Any], folder: Path, keys: Sequence[str], kinds: int
) -> tuple[list[dict[int, Item]], Plane | None]:
    """The items of each key by kind of question, and the IDs; less, with a warning, if data or model are missing."""
    found: dict[str, dict[int, Item]] = {key: {} for key in keys}
    plane = None
    try:
        ids = experiment.read_ids()
        plane = None if ids is None else plane_of(ids)
        session = Session(dataclasses.replace(experiment, out=folder, mesh=None, shard=None))
        session.about(experiment.items(session))
        wanted = [item for item in session.items if item.key in found]
        with tqdm(total=len(wanted), unit="item", desc="reading", disable=None if experiment.progress else True) as bar:
            for group in experiment.groups(wanted) if wanted else ():
                for start in range(0, len(group), session.batch_size):
                    part = group[start : start + session.batch_size]
                    shown = experiment.displayed(session, part)
                    own = [one.key for one in part]
                    for kind, batch in enumerate(shown.asked[:kinds]):
                        for item in items_of(session.model, batch, own, shown.pictures, shown.edited):
                            found[item.key][kind] = item
                    bar.update(len(part))
    except JaxidError as error:
        warnings.warn(f"{folder} is shown without all pictures and questions: {error}", JaxidWarning, stacklevel=2)
    return list(found.values()), plane


# --- contents of what is at hand -------------------------------------------------------------------------------------


def items_of(
    model: Model,
    batch: RelationBatch,
    keys: Sequence[str],
    pictures: Sequence[Picture | None],
    edited: Mapping[str, Int[np.ndarray, "B P"]],
) -> list[Item]:
    """Prepared questions as a page shows them.

    Args:
        model: the model; its parameters are not needed.
        batch: the questions, at least as many as keys.
        keys: the items' names.
        pictures: their pictures.
        edited: positions of the edited tokens, by the entry of an axis on which they depend, or else by "".
    """
    prompts, found = batch.prompts, []
    ids, valid, pictured = (
        np.asarray(values)
        for values in (prompts.inputs.token_ids, prompts.inputs.valid, prompts.inputs.image_rows >= 0)
    )
    for row, (key, picture) in enumerate(zip(keys, pictures, strict=True)):
        places = np.flatnonzero(valid[row])
        spans = prompts.offsets[row, places].tolist()
        # Special tokens may have no characters of their own in the text.
        names = model.processor.tokenizer.convert_ids_to_tokens(ids[row, places].tolist())
        texts = [prompts.texts[row][start:stop] or name for (start, stop), name in zip(spans, names, strict=True)]
        own = {label: np.searchsorted(places, positions[row]) for label, positions in edited.items()}
        tokens, marks = chips(texts, pictured[row, places].tolist(), own)
        first, second = batch.answers
        found.append(
            Item(
                key=key,
                words=(first, second),
                truth=int(batch.truth[row]),
                question=prompts.questions[row],
                tokens=tokens,
                edited=marks,
                picture=picture,
            )
        )
    return found


def geometry(ids: SpatialIDs | TemporalIDs) -> Geometry:
    """IDs on their own."""
    return Geometry(title=f"{ids.KIND} of {ids.model or 'a model'}", plane=plane_of(ids), about={"model": ids.model})


def plane_of(ids: SpatialIDs | TemporalIDs) -> Plane:
    """IDs in the plane of their axes, or along their line: the mean over objects, and every object with all its IDs."""
    layers = range(len(ids.values))
    if isinstance(ids, TemporalIDs):
        universal = np.asarray(ids.universal)
        line = ids.line()
        whole = [row for row, counts in enumerate(ids.counts) if (counts > 0).all()]
        groups = [universal, *(ids.values[:, row] for row in whole)]
        along = np.stack([line.coordinates(values) for values in groups], axis=1)
        frames = np.broadcast_to(np.asarray(ids.frames, np.float32), along.shape)
        return Plane(
            layers=layers,
            groups=["all objects", *(ids.objects[row] for row in whole)],
            labels=[f"frame {frame}" for frame in ids.frames],
            points=np.stack([along, frames], axis=-1),
            lines=[range(len(ids.frames))],
            axes=("early (0) to late (1)", "frame"),
        )
    index = int(np.argmax(ids.sizes))
    whole = [name for name, counts in zip(ids.objects, ids.counts[:, index], strict=True) if (counts > 0).all()]
    points = [ids.plane_coordinates(), *(ids.plane_coordinates(ids.for_object(name)) for name in whole)]
    columns, rows = ids.universal.shape[1:3]
    place = np.arange(columns * rows).reshape(columns, rows)
    return Plane(
        layers=layers,
        groups=["all objects", *whole],
        labels=[f"{x},{y}" for x in range(columns) for y in range(rows)],
        points=np.stack([np.asarray(one).reshape(len(ids.values), -1, 2) for one in points], axis=1),
        lines=[*place.tolist(), *place.T.tolist()],
        axes=("along the x axis (rightwards)", "along the y axis (downwards)"),
    )
