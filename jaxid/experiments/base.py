"""The base classes of commands and experiments.

A command is a dataclass of options with a method that runs it. An experiment adds the steps that a resumable job calls.
Its command line and help (`jaxid.cli`), its table, summary and figures follow from it.
"""

import abc
import dataclasses
import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, NamedTuple, TypedDict, TypeVar

import numpy as np
from jaxtyping import Int

from jaxid import io, plots
from jaxid.checks import Count, check_options
from jaxid.experiments.published import QUOTED, check_prompt
from jaxid.experiments.relations import Case, RelationBatch
from jaxid.experiments.session import Columns, Keyed, Later, Session, padded, parse_layers
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs
from jaxid.parts import Shard
from jaxid.prompts.pictures import Picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item", bound=Keyed)
Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(abc.ABC, Generic[Result]):
    """Something a user can run. The command line follows from its options, each of which is documented once."""

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        check_options(self)

    @abc.abstractmethod
    def run(self) -> Result:
        """Runs the command."""

    def report(self, result: Result) -> Iterable[str]:
        """The result in lines of text."""
        return ()

    def printed(self, result: Result) -> Iterable[str]:
        """The lines that the command prints when it is done."""
        return self.report(result)


class SkippedItems(TypedDict):
    """How many items were skipped, and the key of each with the reason."""

    count: int
    items: list[dict[str, str]]


class LostItems(TypedDict):
    """How many items had numbers that are not finite, and their keys."""

    count: int
    items: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The fields of every run's `summary.json`.

    Attributes:
        experiment: name of the command.
        model: the model's name.
        fingerprint: of the model's checkpoint.
        items: number of items that the numbers come from.
        skipped: items that could not be used.
        not_finite: items with NaN or infinite numbers. They are in the table, but no other number includes them.
        resumed_items: items that were done when this call began.
        words_of_several_tokens: words that were read at the last of their tokens, in the items of this call.
        unknown_words: words missing from the vocabulary, and how many items of this call contain them.
        settings: everything that the rows depend on.
        versions: of the packages.
        seconds: duration of this call.
    """

    experiment: str
    model: str
    fingerprint: str
    items: int
    skipped: SkippedItems
    not_finite: LostItems
    resumed_items: int
    words_of_several_tokens: int
    unknown_words: Mapping[str, int]
    settings: Mapping[str, object]
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def about(self, strength: float | None = None, note: str = "", items: int | None = None) -> plots.About:
        """The line below a figure that describes the run."""
        lost = self.not_finite["count"]
        skipped = f"{lost} of {self.items + lost} items not finite, skipped" if lost else ""
        text = "; ".join(part for part in (skipped, note) if part)
        return plots.About(model=self.model, items=self.items if items is None else items, strength=strength, note=text)

    @property
    def skipped_note(self) -> str:
        """The end of a report that mentions skipped items; empty without any."""
        count = self.skipped["count"]
        return f"; {count} bad items skipped, see the summary" if count else ""


SummaryT = TypeVar("SummaryT", bound=Summary)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How `jaxid view` reads an experiment's table.

    Attributes:
        axes: columns whose entries, with the item and the word, tell the rows apart.
        before: column of the answers' log-probabilities without an edit, by word; or two columns, of the correct answer
            and of the wrong one. None if the first entry of the only axis is without an edit.
        after: the same with the edit; None if there is no edit.
        values: further columns, each with what it is.
        texts: columns of the generated answers without and with the edit.
        labels: names of an axis's entries, where they say more than the entries.
        split: column whose entries are different questions, in the order of `Experiment.asked`.
    """

    axes: tuple[str, ...]
    before: str | tuple[str, str] | None
    after: str | tuple[str, str] | None = None
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    texts: tuple[str, str] | None = None
    labels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    split: str | None = None


class Displayed(NamedTuple):
    """Prompts as `jaxid view` shows them.

    Attributes:
        asked: the questions, as `Experiment.asked` has them.
        edited: positions of the edited tokens, by the entry of an axis on which they depend, or else by "".
        pictures: the items' pictures.
    """

    asked: Sequence[RelationBatch]
    edited: Mapping[str, Int[np.ndarray, "B P"]]
    pictures: Sequence[Picture | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Command[SummaryT], Generic[Item, Batch, SummaryT]):
    """A published experiment: options and steps.

    A subclass lists its items (`items`), makes prompts of them (`prepare`), computes the rows of a batch (`compute`),
    summarises the table (`summarise`) and draws the summary (`figures`). `run` is the same for all. While a batch is
    computed, the next ones are prepared, and the rows of the one before are fetched and stored.

    Attributes:
        out: folder for parts, table, summary and figures. If it holds a run with the same settings, that is resumed.
        data: folder of the data set.
        model: alias, Hugging Face id or folder.
        batch_size: prompts traced together; chosen from the free memory by default.
        dtype: of parameters and activations.
        mesh: devices that share the model and the work, such as data=4,model=2; auto takes all of them. By default one.
        shard: slice of the items that is run on its own, such as 3/16; `jaxid merge` joins the folders.
        limit: number of items, drawn by the seed; all by default.
        seed: of the sample, and of everything else that is random.
        restart: discard the run in the folder and start again.
        skip_bad: skip items that cannot be used, and list them.
        reference_bugs: reproduce the bugs of the published code.
        prompt: published, plain (the query alone), or your own text with {query}, {first}, {second}, {First}, {Second};
            one that begins with <image> is sent without the chat template. Shipped models are asked plain questions by
            default, others the published ones.
        case: form of the answer words that is read: lower, capital, both (their probabilities are added), or the one
            that the published code reads for the model's family; by default both, or with the bugs and a prompt that is
            not plain the published one.
        split_words: what to do with a word of several tokens: read it at its last one, or refuse it.
        progress: show progress bars, on terminals.
    """

    name: ClassVar[str]
    published_text: ClassVar[str] = QUOTED
    """The published prompt, as the option takes it."""
    published_case: ClassVar[Case] = "published"
    """The form of the answer words that is read with the reference bugs."""
    reporting: ClassVar[frozenset[str]] = frozenset()
    """Options that the summary and the figures depend on, but not the rows."""
    prompts_per_item: ClassVar[int] = 1
    reading: ClassVar[Reading | None] = None
    """How `jaxid view` reads the table; without it, runs cannot be viewed."""

    out: Path
    data: Path
    model: str = "tiny-llava"
    batch_size: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: str | None = None
    shard: str | None = None
    limit: Count | None = None
    seed: int = 0
    restart: bool = False
    skip_bad: bool = False
    reference_bugs: bool = False
    prompt: str | None = None
    case: Literal["lower", "capital", "both", "published"] | None = None
    split_words: Literal["last", "refuse"] = "last"
    progress: bool = True

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        super().__post_init__()
        check_prompt(self.prompt)
        if self.shard is not None:
            Shard.parse(self.shard)

    @abc.abstractmethod
    def items(self, session: Session) -> Sequence[Item]:
        """All items of the run, read from `data`."""

    def groups(self, items: Sequence[Item]) -> list[list[Item]]:
        """Groups of items that can be prepared together, such as those of one axis.

        One item of each group is tried before the weights are loaded.
        """
        return [list(items)]

    @abc.abstractmethod
    def prepare(self, session: Session, items: Sequence[Item]) -> Batch:
        """The prompts of items of one group, with all that must be read from files; called in background threads."""

    def asked(self, batch: Batch) -> Sequence[RelationBatch]:
        """The questions of a batch; the words of the first are counted."""
        return [batch]  # pyright: ignore[reportReturnType] - true of the experiments that do not override it

    def rows(self, session: Session) -> int:
        """Number of interventions per prompt that run together; the estimate of memory needs it."""
        return 0

    @abc.abstractmethod
    def compute(self, session: Session, items: Sequence[Item], batch: Batch) -> Columns | Later:
        """The table's rows of items; or, best, a function that fetches them once they are computed.

        The function is called in the background, while the next batch is computed. It should hold on to results only.

        Args:
            session: the loaded model and the resolved options.
            items: items of one group.
            batch: their prompts, padded up to the batch size with the first item; padding gets no rows.
        """

    @abc.abstractmethod
    def summarise(self, session: Session, table: Columns) -> SummaryT:
        """Summarises the table; `**session.facts` are the fields that all summaries share."""

    def figures(self, session: Session, table: Columns, summary: SummaryT) -> "Iterator[tuple[str, Figure]]":
        """The figures with the names of their files."""
        yield from ()

    def printed(self, result: SummaryT) -> Iterator[str]:
        """The report, and the path of the summary."""
        yield from self.report(result)
        yield str(self.out / "summary.json")

    def pictured(self, item: Item) -> Picture | None:
        """The picture of an item, as `jaxid view` shows it."""
        return None

    def edited(self, batch: Batch) -> Mapping[str, Int[np.ndarray, "B P"]]:
        """Positions of the tokens that are edited, by the entry of an axis on which they depend, or else by ""."""
        return {}

    def displayed(self, session: Session, items: Sequence[Item]) -> Displayed:
        """The prompts of items of one group, as `jaxid view` shows them."""
        batch = self.prepare(session, items)
        return Displayed(self.asked(batch), self.edited(batch), [self.pictured(item) for item in items])

    def read_ids(self) -> SpatialIDs | TemporalIDs | None:
        """The IDs, if the experiment needs any."""
        return None

    def default_layers(self, model: Model) -> Iterable[int]:
        """The layers that are used if the user gives none."""
        return range(model.num_layers)

    def chosen_layers(self, model: Model) -> list[int]:
        """The layers of the run, ascending."""
        return parse_layers(None, model, tuple(self.default_layers(model)))

    def read(self, session: Session, items: list[Item]) -> list[tuple[list[Item], Batch]]:
        """Items that are computed together, group by group, with the prompts of each group."""
        return [(group, self.prepare(session, padded(group, session.batch_size))) for group in self.groups(items)]

    def run(self) -> SummaryT:
        """Runs the experiment, or resumes the run in its folder; writes parts, table, summary and figures.

        Raises:
            OutputError: if the folder holds another run, is in use, or cannot be written to.
            CheckpointError: if the model or the IDs cannot be read.
            DataError: if an item cannot be used and bad items are not skipped, or if no item is left.
            Elsewhere: in processes that share the run with this one, except for process 0; or if a shard has no items.
        """
        if self.reference_bugs:
            from jaxid.experiments.reference import with_bugs  # it knows all experiments

            return with_bugs(self)._run()
        return self._run()

    def _run(self) -> SummaryT:
        started = time.perf_counter()
        session = Session(self)
        session.begin(self.items(session))
        if session.team.first:
            write_config(self, self.out)
        return self.finish(session, session.table(), started)

    def finish(self, session: Session, table: Columns, started: float) -> SummaryT:
        """Writes the summary and the figures of a table.

        Args:
            session: that of the table.
            table: the rows.
            started: `time.perf_counter` when the run began.
        """
        summary = self.summarise(session, table)
        for name, figure in self.figures(session, table, summary):
            plots.save(figure, self.out / f"{name}.png")
        packages = ("jaxid-vlm", "jax", "flax", "transformers", "numpy")
        summary = dataclasses.replace(
            summary,
            versions={name: importlib.metadata.version(name) for name in packages},
            seconds=round(time.perf_counter() - started, 1),
        )
        with io.locked(self.out):
            io.write_json(self.out / "summary.json", summary)
        return summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithLayers(Experiment[Item, Batch, SummaryT]):
    """An experiment on chosen layers.

    Attributes:
        layers: decoder layers, counted from 0, such as 3,5-8; the default depends on experiment and model.
    """

    layers: str | None = None

    def chosen_layers(self, model: Model) -> list[int]:
        """The given layers, or the default ones."""
        return parse_layers(self.layers, model, tuple(self.default_layers(model)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithSpatialIDs(Experiment[Item, Batch, SummaryT]):
    """An experiment with spatial IDs.

    Attributes:
        ids: the model's spatial IDs, .safetensors or the authors' .pt; `jaxid ids extract` makes them.
    """

    ids: Path

    def read_ids(self) -> SpatialIDs:
        """The spatial IDs."""
        return read_spatial_ids(self.ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithStrength(Experiment[Item, Batch, SummaryT]):
    """An experiment that adds vectors.

    Attributes:
        strength: factor of the added vectors; 5 as published.
    """

    strength: float = 5.0


def read_spatial_ids(path: Path) -> SpatialIDs:
    """Spatial IDs from a .safetensors file or the authors' .pt."""
    return SpatialIDs.from_torch(path) if path.suffix == ".pt" else SpatialIDs.load(path)


def write_config(command: Command[Result], folder: Path, name: str = "config.yaml") -> Path:
    """Writes the file with which `--config` repeats a command from any working directory."""
    import yaml

    def plain(value: object) -> object:
        if isinstance(value, Path):
            return str(value.resolve())
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    options = {field.name: plain(getattr(command, field.name)) for field in dataclasses.fields(command)}
    given = {name: value for name, value in options.items() if value is not None and name != "restart"}
    return io.write_text(folder / name, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
