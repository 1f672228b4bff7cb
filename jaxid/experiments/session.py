"""The state of a run: its model, resolved options and job; and functions for the tables of all experiments."""

import contextlib
import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool

from jaxid import io, jobs, meshes, processes
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.data.coco_spatial import SpatialItem, axis_of, find_coco_spatial, read_coco_spatial
from jaxid.devices import Device, this
from jaxid.errors import DataError, InputError, JaxidWarning, PromptError
from jaxid.experiments.published import PLAIN, resolved
from jaxid.experiments.relations import Case, RelationBatch
from jaxid.families.base import Model
from jaxid.halving import Halving
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs
from jaxid.meshes import ONE
from jaxid.parts import Shard
from jaxid.places import Elsewhere
from jaxid.plan import fitting, plan

if TYPE_CHECKING:
    from jaxid.experiments.base import Experiment

Columns = Mapping[str, Any]
"""A table: the values of every column, one for each row."""

Later = Callable[[], Columns]
"""Fetches rows that are being computed."""

Item = TypeVar("Item")
Made = TypeVar("Made")


@runtime_checkable
class Keyed(Protocol):
    """An item of an experiment."""

    @property
    def key(self) -> str:
        """A unique name."""
        ...


class Words(NamedTuple):
    """Words of questions that were split into several tokens, and those that the vocabulary lacks, by count."""

    split: int
    unknown: Counter[str]


class Chunk(NamedTuple):
    """Items that are computed together, as they were read: their groups with prompts, and the words of each group."""

    items: list[Any]
    groups: list[tuple[list[Any], Any]]
    words: list[Words]


_NO_SETTINGS = {"out", "mesh", "shard", "batch_size", "restart", "skip_bad", "progress"}
"""Options that no row depends on."""


class Session:
    """The state of a run: its model, resolved options and counts.

    Whatever is quick to check is checked before the model's weights are read.

    Attributes:
        model: the model; its parameters are missing until `begin` has read them.
        ids: the IDs, if the experiment needs any.
        layers: the chosen layers, ascending.
        prompt: the user's text, with a place for the {query}.
        case: form of the answer words that is read.
        checkpoint: the model's files.
        device: the device that the run is for, or one of those of its mesh.
        axes: of the mesh, which is this process's part of the given one.
        team: the processes that share the run.
        halving: number of prompts that are traced together, halved when the device runs out of memory.
        bad: items that cannot be used, with the errors.
        items: all items of the run, also those of other shards; set by `about`.
        own: those that this run computes.
        index: index of every item, by its key.
    """

    def __init__(self, experiment: "Experiment[Any, Any, Any]", device: Device | None = None):
        """Checks that results can be written, then reads the model without its weights.

        Args:
            experiment: the options and steps.
            device: the one that the run is for; by default the one that JAX uses.

        Raises:
            OutputError: if results cannot be written.
            CheckpointError: if the model's config, tokenizer or image processor, or the IDs, cannot be read.
            InputError: for layers that the model does not have, or IDs of another model.
        """
        self.experiment = experiment
        io.ensure_output_folder(experiment.out)
        self.checkpoint = open_checkpoint(experiment.model, dtype=experiment.dtype)
        self.model: Model = self.checkpoint.model
        self.ids: Any = experiment.read_ids()
        if self.ids is not None:
            require_same_model(self.model, self.ids)
        self.layers = experiment.chosen_layers(self.model)
        self.prompt = resolved(experiment.prompt, experiment.model, experiment.published_text)
        published = experiment.reference_bugs and self.prompt != PLAIN
        self.case: Case = experiment.case or (experiment.published_case if published else "both")
        self.device = device or this()
        whole = self.checkpoint.axes(experiment.mesh, jax.device_count(), self.device)
        self.team = processes.team(whole)
        self.axes, self._devices = processes.worker_devices(whole)
        if experiment.batch_size and experiment.batch_size % self.axes.data:
            raise InputError(
                f"--batch-size {experiment.batch_size} does not divide over data={self.axes.data}; give a multiple."
            )
        fit = fitting(self.model, experiment.dtype, experiment.rows(self), self.axes.data, self.device)
        self.halving = Halving(
            experiment.batch_size or fit,
            unit="prompt",
            per_item=experiment.prompts_per_item,
            advice=f"`jaxid plan {experiment.name}` tells what fits; try --dtype bfloat16 or a larger device",
        )
        self.bad: list[tuple[str, DataError]] = []

    @property
    def prompts_together(self) -> int:
        """Number of prompts that are traced together."""
        return self.halving.together

    @property
    def batch_size(self) -> int:
        """Number of items that these prompts belong to."""
        return self.halving.size

    # --- reading items ---

    def bad_rows(self) -> list[tuple[str, DataError]] | None:
        """The list in which a reader notes rows that cannot be used; None if it should raise an error."""
        return self.bad if self.experiment.skip_bad else None

    def sample(self, items: Sequence[Item], limit: int | None = None) -> list[Item]:
        """At most `limit` items (the option by default), drawn without repetition; their order is kept."""
        limit = self.experiment.limit if limit is None else limit
        if limit is None or limit >= len(items):
            return list(items)
        rows = np.random.default_rng(self.experiment.seed).choice(len(items), limit, replace=False)
        return [items[row] for row in sorted(rows)]

    def spatial_items(self, axis: str | None = None) -> list[SpatialItem]:
        """At most `limit` COCO-Spatial items, of one axis if given, sorted by axis and length.

        Raises:
            DataError: for a malformed row or a missing picture, unless bad items are skipped; or if there are no items.
        """
        folder = self.experiment.data
        items = read_coco_spatial(*find_coco_spatial(folder), bad=self.bad_rows())
        chosen = [item for item in items if axis in (None, axis_of(item))]
        if not chosen:
            raise DataError(f"{folder} holds no {f'{axis} ' if axis else ''}items.")
        drawn = self.sample(chosen)
        # Prompts of one kind and length, side by side, share their programs.
        return sorted(drawn, key=lambda item: (axis_of(item), len(item.subject.split()) + len(item.object.split())))

    def usable(self, items: Sequence[Item], key: Callable[[Item], str], made: Callable[[Item], Made]) -> list[Made]:
        """Applies a function to every item; bad items are noted if they are to be skipped.

        Raises:
            DataError: for a bad item, unless bad items are skipped; or if no item is left.
        """
        found, bad = [], self.bad_rows()
        for item in items:
            try:
                found.append(made(item))
            except DataError as error:
                if bad is None:
                    raise jobs.bad_item(key(item), error) from error
                bad.append((key(item), error))
        if not found:
            raise DataError(f"no item of {self.experiment.data} could be used: {self.bad[-1][1]}")
        return found

    # --- the job ---

    def about(self, items: Sequence[Any]) -> None:
        """Tells the session its items."""
        self.items = items
        self.index = {item.key: index for index, item in enumerate(items)}
        self.own, self.shard = items, None
        if self.experiment.shard is not None:
            shard = Shard.parse(self.experiment.shard)
            self.own, self.shard = shard.part(items), shard.record(list(self.index))

    def begin(self, items: Sequence[Any]) -> None:
        """Checks the folder and the prompts of one item of each group, then loads the model's weights.

        Raises:
            OutputError: if the folder holds another run, or is in use.
            PromptError: if an answer is not a single token.
            JaxidError: if one of these items cannot be used, unless bad items are skipped.
            Elsewhere: if the shard has no items.
        """
        experiment = self.experiment
        self.checkpoint = self.checkpoint.on(None if self.axes == ONE else meshes.mesh(*self.axes, self._devices))
        self.about(items)
        self.settings = self.described()
        if self.shard is not None and items and not self.own:
            if self.team.first:
                jobs.write_empty(experiment.out, settings=self.settings, shard=self.shard, restart=experiment.restart)
            raise Elsewhere(f"{experiment.out}: of {len(items)} items, shard {experiment.shard} has none; it is done.")
        job: dict[str, Any] = {"settings": self.settings, "items": self.own, "key": _key, "restart": experiment.restart}
        jobs.check(experiment.out, **job, shard=self.shard, team=self.team)
        for item in [group[0] for group in experiment.groups(self.own)] if items else ():
            try:
                batches = experiment.asked(experiment.prepare(self, [item]))
            except jobs.ITEM_ERRORS as error:
                if experiment.skip_bad:
                    continue
                raise jobs.bad_item(item.key, error) from error
            for batch in batches:
                batch.forms(self.model.processor)
        if experiment.batch_size is None and self.device.platform != "cpu":
            from jaxid.experiments.planning import ExperimentJob

            # A bad item is met again by the job, which names it or skips it.
            with contextlib.suppress(*jobs.ITEM_ERRORS):
                self.halving.together = plan(ExperimentJob(self), self.device, measure=True).together
        if experiment.batch_size is None and self.team.workers > 1:  # so that none of them is idle
            each = -(-len(self.own) // self.team.workers)
            most = -(-each // self.axes.data) * self.axes.data
            self.halving.together = min(self.halving.together, most * self.halving.per_item)
        self.model = self.checkpoint.load()
        if self.ids is not None:
            require_same_model(self.model, self.ids)

    def described(self) -> dict[str, object]:
        """The settings of the run: every option that rows depend on, as it was resolved."""
        experiment = self.experiment
        found: dict[str, object] = {"experiment": experiment.name}
        for field in dataclasses.fields(experiment):
            value = getattr(experiment, field.name)
            if field.name not in _NO_SETTINGS | experiment.reporting and value is not None:
                found[field.name] = str(value.resolve()) if isinstance(value, Path) else value
        if self.ids is not None:
            found["ids_digest"] = io.digest(Path(str(found["ids"])))
        return found | {"prompt": self.prompt, "case": self.case, "layers": self.layers}

    def words_in(self, batch: RelationBatch, count: int) -> Words:
        """Counts split and unknown words in a batch's first `count` questions.

        Raises:
            PromptError: for a word of several tokens, if such words are refused.
        """
        found = 0
        for column, words in enumerate(zip(*batch.names, strict=True)):
            tokens = batch.prompts.word_tokens(words, beside=batch.names, occurrence=0)
            lengths = (tokens != tokens[:, -1:]).sum(axis=1)[:count] + 1
            if self.experiment.split_words == "refuse" and (lengths > 1).any():
                row = int(np.argmax(lengths > 1))
                raise PromptError(
                    f"the word {batch.names[row][column]!r} is split into {lengths[row]} tokens; --split-words last "
                    "reads it at its last one."
                )
            found += int((lengths > 1).sum())
        return Words(found, Counter(word for own in batch.prompts.unknown[:count] for word in own))

    def table(self) -> Columns:
        """Computes the missing rows; writes the table and returns it without items that are not finite.

        Raises:
            DataError: if no item is left.
        """
        experiment = self.experiment
        counts: dict[frozenset[str], list[Words]] = {}

        def read(items: list[Keyed]) -> Chunk:
            groups = experiment.read(self, items)
            words = [self.words_in(experiment.asked(batch)[0], len(group)) for group, batch in groups]
            return Chunk(items, groups, words)

        def compute(chunk: Chunk) -> Later:
            found = [experiment.compute(self, group, batch) for group, batch in chunk.groups]
            keys, words = frozenset(item.key for item in chunk.items), chunk.words

            def fetch() -> Columns:
                columns = io.joined([rows() if callable(rows) else rows for rows in found])
                for own in [own for own in counts if own <= keys]:  # items that were tried alone count once
                    del counts[own]
                counts[keys] = words
                return columns

            return fetch

        done = jobs.run(
            experiment.out,
            settings=self.settings | {"fingerprint": self.model.fingerprint},
            items=self.own,
            key=_key,
            read=read,
            compute=compute,
            chunk_size=self.batch_size,
            halving=self.halving,
            restart=experiment.restart,
            skip_bad=experiment.skip_bad,
            progress=experiment.progress,
            first=f"compiling for batches of {self.batch_size}",
            shard=self.shard,
            team=self.team,
            note=lambda: [words for own in counts.values() for words in own],
        )
        jobs.write_merged(experiment.out, done)
        table = {name: done.table[name].to_numpy(zero_copy_only=False) for name in done.table.column_names}
        if not table or not len(next(iter(table.values()))):
            reason = done.skipped[0].reason if done.skipped else "there are none"
            raise DataError(f"no item of {experiment.data} could be used: {reason}")
        table, lost = finite_items(table)
        skipped = [*(jobs.Skipped(key=key, reason=str(error)) for key, error in self.bad), *done.skipped]
        counted = [Words(split, Counter(unknown)) for note in done.notes for split, unknown in note]
        self.facts: dict[str, Any] = {
            "experiment": experiment.name,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "items": len(self.own) - len(done.skipped) - len(lost),
            "skipped": {"count": len(skipped), "items": [dataclasses.asdict(entry) for entry in skipped]},
            "not_finite": {"count": len(lost), "items": lost},
            "resumed_items": done.resumed,
            "words_of_several_tokens": sum(words.split for words in counted),
            "unknown_words": dict(sum((words.unknown for words in counted), Counter())),
            "settings": done.settings,
        }
        return table


def require_same_shape(model: Model, ids: SpatialIDs | TemporalIDs) -> None:
    """Raises InputError unless IDs have the model's layers and width."""
    if ids.values.shape[0] != model.num_layers or ids.values.shape[-1] != model.width:
        raise InputError(
            f"the IDs are of a model with {ids.values.shape[0]} layers of width {ids.values.shape[-1]}, "
            f"{model.name} has {model.num_layers} of width {model.width}."
        )


def of_same_model(model: Model, ids: SpatialIDs | TemporalIDs) -> bool:
    """Whether IDs were extracted from this model, or do not say from which."""
    return not ids.fingerprint or not model.fingerprint or ids.fingerprint == model.fingerprint


def require_same_model(model: Model, ids: SpatialIDs | TemporalIDs) -> None:
    """Checks that IDs were extracted from this model.

    Raises:
        InputError: if layers, width or fingerprint differ.
    """
    require_same_shape(model, ids)
    if not of_same_model(model, ids):
        raise InputError(
            f"the IDs were extracted from {ids.model} ({ids.fingerprint}), not from {model.name} "
            f"({model.fingerprint}); extract them again with jaxid ids extract."
        )


def padded(items: Sequence[Item], size: int) -> list[Item]:
    """Items padded up to `size` with the first one, since batches of one shape share their programs."""
    return [*items, *[items[0]] * (size - len(items))]


def by_axis(items: Sequence[Item], item_of: Callable[[Item], SpatialItem]) -> list[list[Item]]:
    """The items of each axis; `item_of` gives the COCO-Spatial item that each is about."""
    axes = dict.fromkeys(axis_of(item_of(item)) for item in items)
    return [[item for item in items if axis_of(item_of(item)) == axis] for axis in axes]


def on_host(found: Made) -> Made:
    """A dataclass of results with its arrays copied from the device."""
    import jax

    results: Any = found
    return dataclasses.replace(results, **jax.device_get(vars(found)))


def rows_where(table: Columns, chosen: Bool[np.ndarray, "N"]) -> Columns:
    """The chosen rows of a table."""
    return {name: values[chosen] for name, values in table.items()}


def spread(values: object, shape: tuple[int, ...], *over: int) -> np.ndarray:
    """A column of values that are the same along some axes of a table.

    Args:
        values: the values.
        shape: shape of the array that `jaxid.io.tidy` unrolls to the table.
        over: the axes that the values have; the last ones by default.
    """
    array = np.asarray(values)
    if over:
        array = np.expand_dims(array, [axis for axis in range(len(shape)) if axis not in over])
    return np.broadcast_to(array, shape).ravel()


def item_columns(items: Sequence[SpatialItem], shape: tuple[int, ...], axis: int) -> Columns:
    """The columns that describe COCO-Spatial items, which are along one axis of a table."""
    fields = ("image_id", "subject", "object", "relation")
    found = {name: spread([getattr(item, name) for item in items], shape, axis) for name in fields}
    return found | {"axis": spread([axis_of(item) for item in items], shape, axis)}


def as_array(table: Columns, name: str, axes: Mapping[str, Sequence[object]]) -> np.ndarray:
    """The array that `jaxid.io.tidy` unrolled to a column; rows with other labels are not read.

    Args:
        table: the table.
        name: name of the column.
        axes: axis name -> labels along that axis. Every combination of labels has a row.
    """
    places = {axis: {label: place for place, label in enumerate(labels)} for axis, labels in axes.items()}
    found = np.array([[of.get(label, -1) for label in table[axis].tolist()] for axis, of in places.items()])
    known = (found >= 0).all(axis=0)
    kind = table[name].dtype
    values = np.full([len(of) for of in places.values()], np.nan if kind.kind == "f" else kind.type(), kind)
    values[tuple(found[:, known])] = table[name][known]
    return values


def scaled(published: Iterable[int], layers: int) -> list[int]:
    """Scales layers of a model with 32 layers to the same depths in one with `layers`."""
    return sorted({min(layers - 1, round(layer * layers / 32)) for layer in published})


def finite_items(table: Columns) -> tuple[Columns, list[str]]:
    """Drops the items that have a number that is not finite.

    Args:
        table: the columns, including `item`.

    Returns:
        The other items' rows, and the keys of those that were dropped.

    Raises:
        DataError: if no item is left.
    """
    columns = [values for values in table.values() if values.dtype.kind == "f"]
    bad = ~np.logical_and.reduce([np.isfinite(values) for values in columns])
    lost = list(dict.fromkeys(table["item"][bad].tolist()))
    if not lost:
        return table, []
    kept = ~np.isin(table["item"], lost)
    count = len(set(table["item"].tolist()))
    if not kept.any():
        raise DataError(
            f"the model's numbers are NaN or infinite for all {count} items; look at table.parquet, and try "
            "--dtype float32 or another --strength."
        )
    warnings.warn(
        f"{len(lost)} of {count} items are skipped, since some of their numbers are NaN or infinite: "
        f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}.",
        JaxidWarning,
        stacklevel=2,
    )
    return rows_where(table, kept), lost


def _key(item: Keyed) -> str:
    return item.key


_RANGE = re.compile(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?")


def parse_layers(text: str | None, model: Model, default: Sequence[int]) -> list[int]:
    """Parses decoder layers such as "3,5-8".

    Raises:
        InputError: if the text is not of that form, or the model does not have a layer.
    """
    ranges = [(layer, layer) for layer in default]
    if text is not None:
        found = [_RANGE.fullmatch(part) for part in text.split(",")]
        ranges = [(int(one[1]), int(one[2] or one[1])) for one in found if one]
        if None in found or any(first > last for first, last in ranges):
            raise InputError(f"layers are indices and ascending ranges of them, such as 3,5-8; got {text!r}.")
    wrong = [layer for pair in ranges for layer in pair if not 0 <= layer < model.num_layers]
    if wrong or not ranges:
        raise InputError(
            f"layer {wrong[0] if wrong else text!r} is out of range: {model.name} has layers "
            f"0..{model.num_layers - 1}; choose others with --layers."
        )
    return sorted({layer for first, last in ranges for layer in range(first, last + 1)})
