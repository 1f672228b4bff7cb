"""What all runs share: options, layers, data, batches of one shape, and what is written at the end."""

import dataclasses
import hashlib
import importlib.metadata
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxid import jobs, plots, zoo
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import check_options
from jaxid.data.coco_spatial import SpatialItem, find_coco_spatial, read_coco_spatial
from jaxid.errors import DataError, InputError, JaxidWarning, PromptError
from jaxid.experiments.belief_swap import require_same_model
from jaxid.experiments.relations import Case, Compat, RelationBatch, answer_forms, axis_of, prepare
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs
from jaxid.io import ensure_output_folder, locked, write_json

Item = TypeVar("Item")
Columns = dict[str, Any]

PUBLISHED_SUFFIX = ' Answer "{first}" or "{second}" only.'
"""Of the belief swap's questions ([ID] arXiv 2601.12626, belief steering)."""

PUBLISHED_TEMPLATE = "QUESTION: {query}Answer {First} or {Second}. ANSWER:"
"""Of the steering questions ([ID] arXiv 2601.12626, arbitrary steering)."""

PLAIN = "{query}"

LARGEST_BATCH = 32
"""Prompts that are traced together, however much memory there is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options that all runs have.

    Attributes:
        out: folder for parts, table, summary and figure.
        model: alias, Hugging Face id or folder.
        data: folder of the data set.
        ids: file of spatial IDs (`.safetensors`, or the authors' `.pt`).
        layers: decoder blocks such as "3,5-8"; the experiment's own by default.
        factor: strength of what is added; the experiment's own by default.
        batch_size: prompts that are traced together; chosen from the memory by default.
        dtype: of parameters and activations.
        limit: how many items, drawn by the seed.
        seed: of the sample and the noise.
        resume: go on with what the folder holds.
        skip_bad: leave out items that cannot be used, and list them.
        compat: "reference" reproduces the slips of the published code.
        template: the user's text with a place for the {query}; the published one by default.
        case: which form of the answer words is read: "lower", "capital", both added up, or the one that the published
            code reads for the model's family.
        split_words: "last" reads a word of several tokens at its last one; "refuse" counts it as a bad item.
        progress: show progress bars, where there is a terminal.
    """

    out: Path
    model: str = "tiny-llava"
    data: Path | None = None
    ids: Path | None = None
    layers: str | None = None
    factor: float | None = None
    batch_size: int | None = None
    dtype: str = "float32"
    limit: int | None = None
    seed: int = 0
    resume: bool = False
    skip_bad: bool = False
    compat: Compat = "none"
    template: str | None = None
    case: Case = "both"
    split_words: str = "last"
    progress: bool = True

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        check_options(self)
        for name, known in (
            ("compat", ("none", "reference")),
            ("case", ("lower", "capital", "both", "published")),
            ("split_words", ("last", "refuse")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}.")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, not {value}.")
        if self.template is not None and "{query}" not in self.template:
            raise InputError(f"the template {self.template!r} has no place for the {{query}}.")

    def text(self, published: str, plain: str = PLAIN) -> str:
        """The template given, else the published one; shipped models know plain questions only."""
        return self.template or (plain if self.model in zoo.SHIPPED else published)


class Run:
    """One run: the model, and the way from items to a folder of results.

    Whatever is quick to check comes before the model's weights are read.

    Attributes:
        model: without its parameters, until `load` has read them.
    """

    def __init__(self, config: RunConfig, experiment: str):
        """Checks that results can be written, then reads all of the model but its weights.

        Raises:
            OutputError: if they cannot.
            CheckpointError: if the model's config, tokenizer or image processor cannot be read.
        """
        self.config, self.experiment = config, experiment
        self.started = time.perf_counter()
        ensure_output_folder(config.out)
        self._checkpoint = open_checkpoint(config.model, dtype=config.dtype)
        self.model: Model = self._checkpoint.model
        self._ids: SpatialIDs | TemporalIDs | None = None
        self.bad: list[tuple[str, DataError]] = []
        self.split = 0
        self.unknown: Counter[str] = Counter()

    def ids(self) -> SpatialIDs:
        """The spatial IDs.

        Raises:
            InputError: if no file was given, or they are of another model.
            CheckpointError: if it cannot be read.
        """
        path = self.config.ids
        if path is None:
            raise InputError("give the model's spatial IDs with --ids; make them with jaxid ids extract.")
        self._ids = ids = SpatialIDs.from_torch(path) if path.suffix == ".pt" else SpatialIDs.load(path)
        require_same_model(self.model, ids)
        return ids

    def temporal_ids(self) -> TemporalIDs:
        """The temporal IDs.

        Raises:
            InputError: if no file was given, or they are of another model.
            CheckpointError: if it cannot be read.
        """
        if self.config.ids is None:
            raise InputError("give the model's temporal IDs with --ids; make them with jaxid ids temporal.")
        self._ids = ids = TemporalIDs.load(self.config.ids)
        require_same_model(self.model, ids)
        return ids

    def load(self) -> Model:
        """The model with its parameters.

        Raises:
            CheckpointError: if the weights cannot be read.
            InputError: if the IDs were extracted from other weights.
        """
        self.model = self._checkpoint.load()
        if self._ids is not None:
            require_same_model(self.model, self._ids)
        return self.model

    def begin(
        self,
        items: Sequence[Item],
        key: Callable[[Item], str],
        settings: Mapping[str, Any],
        prepare: Callable[[Item], Sequence[RelationBatch]],
        samples: Sequence[Item],
    ) -> Model:
        """Checks the folder and the prompts of some items, then loads the model.

        Args:
            items: all items of the run.
            key: an item's name, unlike all others.
            settings: what the rows depend on besides the options that all runs have.
            prepare: makes the prompts of one item.
            samples: items whose prompts are tried, one of each kind.

        Raises:
            OutputError: if the folder holds another run, or is in use.
            PromptError: for answers without a token of their own.
            JaxidError: for a sample that cannot be used, unless bad items are skipped.
        """
        self._items, self._key, self._settings = items, key, self._all_settings(settings)
        jobs.check(self.config.out, settings=self._settings, items=items, key=key, resume=self.config.resume)
        for item in samples:
            try:
                batches = prepare(item)
            except jobs.ITEM_ERRORS as error:
                if self.config.skip_bad:
                    continue
                raise jobs.bad_item(key(item), error) from error
            for batch in batches:
                answer_forms(self.model.processor, batch.answers, batch.case)
        return self.load()

    def layers(self, default: Sequence[int]) -> list[int]:
        """The chosen blocks, rising."""
        return parse_layers(self.config.layers, self.model, default)

    @property
    def case(self) -> Case:
        """The form of the answer words that is read."""
        chosen = self.config.case
        return self.model.processor.case if chosen == "published" else chosen

    def data_folder(self) -> Path:
        """The data folder.

        Raises:
            InputError: if none was given.
        """
        if self.config.data is None:
            raise InputError("give the data set's folder with --data; jaxid data draws one for the shipped model.")
        return self.config.data

    def spatial_items(self, axis: str | None = None) -> list[SpatialItem]:
        """COCO-Spatial items (of one axis), at most `limit` of them drawn by the seed, questions of a kind together.

        Raises:
            DataError: for a malformed row or a missing picture, unless bad items are skipped; or without items.
        """
        folder = self.data_folder()
        items = read_coco_spatial(*find_coco_spatial(folder), bad=self.bad_rows())
        chosen = [item for item in items if axis in (None, axis_of(item))]
        if not chosen:
            raise DataError(f"{folder} holds no {f'{axis} ' if axis else ''}items.")
        drawn = self.sample(chosen)
        # Prompts of one kind and length side by side share their programs.
        return sorted(drawn, key=lambda item: (axis_of(item), len(item.subject.split()) + len(item.object.split())))

    def bad_rows(self) -> list[tuple[str, DataError]] | None:
        """Where a reader notes rows that cannot be used; None if they are an error."""
        return self.bad if self.config.skip_bad else None

    def sample(self, items: Sequence[Item]) -> list[Item]:
        """At most `limit` items, drawn without repetition, in their own order."""
        if self.config.limit is None or self.config.limit >= len(items):
            return list(items)
        rows = np.random.default_rng(self.config.seed).choice(len(items), self.config.limit, replace=False)
        return [items[row] for row in sorted(rows)]

    def checked(self, batch: RelationBatch, names: Sequence[tuple[str, ...]], count: int) -> RelationBatch:
        """The batch, its first `count` questions' words looked at for being split into several tokens.

        Raises:
            PromptError: for such a word, if they are refused.
        """
        prompts = batch.prompts
        for column, words in enumerate(zip(*names, strict=True)):
            tokens = prompts.word_tokens(words, beside=names, occurrence=0)
            lengths = (tokens != tokens[:, -1:]).sum(axis=1)[:count] + 1
            if self.config.split_words == "refuse" and (lengths > 1).any():
                row = int(np.argmax(lengths > 1))
                raise PromptError(
                    f"the word {names[row][column]!r} is split into {lengths[row]} tokens; --split-words last reads it "
                    "at its last one."
                )
            self.split += int((lengths > 1).sum())
        self.note_unknown(prompts.unknown[:count])
        return batch

    def note_unknown(self, unknown: Sequence[Sequence[str]]) -> None:
        """Counts the items that each unknown word stands in, given every item's unknown words."""
        self.unknown.update(word for own in unknown for word in own)

    def begin_spatial(self, items: Sequence[SpatialItem], settings: Mapping[str, Any], template: str) -> Model:
        """`begin` for questions of COCO-Spatial, of which one of each axis is tried."""
        return self.begin(
            items,
            lambda item: item.key,
            settings,
            lambda item: [prepare(self.model, [item], template=template, case=self.case)],
            [group[0] for group in by_axis(items)],
        )

    def _all_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config
        files = {name: str(path.resolve()) for name in ("data", "ids") if (path := getattr(config, name)) is not None}
        return {
            "experiment": self.experiment,
            "model": config.model,
            **files,
            **({} if config.ids is None else {"ids_digest": _digest(config.ids)}),
            "dtype": config.dtype,
            "limit": config.limit,
            "seed": config.seed,
            "compat": config.compat,
            "case": self.case,
            "split_words": config.split_words,
            **settings,
        }

    def finish(self, compute: Callable[[list[Any]], Columns], *, batch_size: int) -> tuple[Columns, dict[str, Any]]:
        """Runs the job that `begin` checked, chunk by chunk, and writes the table.

        Returns:
            The table's columns, without items that have a number which is not finite, and what every summary says.

        Raises:
            DataError: if no item is left.
        """
        config = self.config
        counts: dict[frozenset[str], tuple[int, Counter[str]]] = {}

        def counted(chunk: list[Any]) -> Columns:
            self.split, self.unknown = 0, Counter()
            columns = compute(chunk)
            keys = frozenset(map(self._key, chunk))
            for own in [own for own in counts if own <= keys]:  # items that were tried alone count once
                del counts[own]
            counts[keys] = self.split, self.unknown
            return columns

        done = jobs.run(
            config.out,
            settings=self._settings | {"fingerprint": self.model.fingerprint},
            items=self._items,
            key=self._key,
            compute=counted,
            chunk_size=batch_size,
            resume=config.resume,
            skip_bad=config.skip_bad,
            progress=config.progress,
            first=f"compiling for batches of {batch_size}",
        )
        jobs.write_merged(config.out, done)
        table = {name: done.table[name].to_numpy(zero_copy_only=False) for name in done.table.column_names}
        if not table or not len(next(iter(table.values()))):
            reason = done.skipped[0].reason if done.skipped else "there are none"
            raise DataError(f"no item of {config.data} could be used: {reason}")
        table, lost = finite_items(table)
        skipped = [*(jobs.Skipped(key=key, reason=str(error)) for key, error in self.bad), *done.skipped]
        return table, {
            "experiment": self.experiment,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "items": len(self._items) - len(done.skipped) - len(lost),
            "skipped": {"count": len(skipped), "items": [dataclasses.asdict(entry) for entry in skipped]},
            "not_finite": {"count": len(lost), "items": lost},
            "resumed_items": done.resumed,
            # Of the items that this call computed, not of those that it resumed.
            "words_of_several_tokens": sum(split for split, _ in counts.values()),
            "unknown_words": dict(sum((unknown for _, unknown in counts.values()), Counter())),
            "settings": done.settings,
        }

    def write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json`, with versions and the time that this call took."""
        packages = ("jaxid-vlm", "jax", "flax", "transformers", "numpy")
        summary = summary | {
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        with locked(self.config.out):
            write_json(self.config.out / "summary.json", summary)
        return summary

    def batch_size(self, rows: int) -> int:
        """Prompts that are traced together: as given, or what a quarter of the free memory holds.

        Args:
            rows: interventions of a sweep.
        """
        if self.config.batch_size is not None:
            return self.config.batch_size
        text = self.model.config.text_config
        width = np.dtype(np.float32).itemsize if self.config.dtype == "float32" else 2
        tokens = self.model.processor.usual_tokens + 64
        trace_numbers = 2 * text.num_hidden_layers * tokens * text.num_key_value_heads * text.head_dim
        row_numbers = rows * 24 * text.hidden_size * 6
        scores = 2 * text.num_attention_heads * tokens * tokens
        return int(
            np.clip(free_memory() // 4 // (width * (trace_numbers + row_numbers) + 4 * scores), 1, LARGEST_BATCH)
        )


def free_memory() -> int:
    """Bytes that are free on the device, as far as it says; 4 GiB where nothing is known."""
    import jax

    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30


def filled(items: Sequence[Item], size: int) -> list[Item]:
    """The items and, up to `size`, the first one again: batches of one shape share their programs."""
    return [*items, *[items[0]] * (size - len(items))]


def by_axis(items: Sequence[SpatialItem]) -> list[list[SpatialItem]]:
    """The items of each axis."""
    axes = dict.fromkeys(axis_of(item) for item in items)
    return [[item for item in items if axis_of(item) == axis] for axis in axes]


def joined(parts: Sequence[Columns]) -> Columns:
    """Tables of the same columns, one below the other."""
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def about(summary: Mapping[str, Any], strength: float | None = None, note: str = "") -> plots.About:
    """What a figure says of a run, given what `finish` returned."""
    lost = summary["not_finite"]["count"]
    left_out = f"{lost} of {summary['items'] + lost} items not finite, left out" if lost else ""
    text = "; ".join(part for part in (left_out, note) if part)
    return plots.About(model=summary["model"], items=summary["items"], strength=strength, note=text)


def finite_items(table: Columns) -> tuple[Columns, list[str]]:
    """A table without the items that have a number which is not finite, and the keys of those items.

    Args:
        table: columns, `item` among them.

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
            "--dtype float32 or another --factor."
        )
    warnings.warn(
        f"{len(lost)} of {count} items are left out, as numbers of theirs are NaN or infinite: "
        f"{', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}.",
        JaxidWarning,
        stacklevel=2,
    )
    return {name: values[kept] for name, values in table.items()}, lost


_RANGE = re.compile(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?")


def parse_layers(text: str | None, model: Model, default: Sequence[int]) -> list[int]:
    """Decoder blocks from "3,5-8".

    Raises:
        InputError: if it is not of that form, or the model lacks a block.
    """
    ranges = [(layer, layer) for layer in default]
    if text is not None:
        found = [_RANGE.fullmatch(part) for part in text.split(",")]
        ranges = [(int(one[1]), int(one[2] or one[1])) for one in found if one]
        if None in found or any(first > last for first, last in ranges):
            raise InputError(f"layers are blocks and ascending ranges of them, such as 3,5-8; got {text!r}.")
    wrong = [layer for pair in ranges for layer in pair if not 0 <= layer < model.num_layers]
    if wrong or not ranges:
        raise InputError(
            f"layer {wrong[0] if wrong else text!r} is out of range: {model.name} has blocks "
            f"0..{model.num_layers - 1}; choose others with --layers."
        )
    return sorted({layer for first, last in ranges for layer in range(first, last + 1)})


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
