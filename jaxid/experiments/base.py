"""The shape of every command: a dataclass of options that runs. Of an experiment: steps, which a resumable job calls.

From an `Experiment` follow its command and help (`jaxid.cli`), the job and its table, the summary, and the figures.
"""

import abc
import dataclasses
import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from jaxid import io, plots
from jaxid.checks import Count, check_options
from jaxid.errors import InputError
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.session import Columns, Session, joined, padded, parse_layers
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")
Batch = TypeVar("Batch")
Result = TypeVar("Result")

PUBLISHED_SUFFIX = '{query} Answer "{first}" or "{second}" only.'
"""The belief swap's questions ([ID] arXiv 2601.12626, belief steering)."""

PUBLISHED_TEMPLATE = "QUESTION: {query}Answer {First} or {Second}. ANSWER:"
"""The steering questions ([ID] arXiv 2601.12626, arbitrary steering)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(abc.ABC, Generic[Result]):
    """What a user can run: options, each documented once, from which the command line follows."""

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        check_options(self)

    @abc.abstractmethod
    def run(self) -> Result:
        """Does the work and returns what came of it."""

    def report(self, result: Result) -> Iterable[str]:
        """What came of it, line by line."""
        return ()

    def printed(self, result: Result) -> Iterable[str]:
        """What the command prints in the end."""
        return self.report(result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What every run's `summary.json` says.

    Attributes:
        experiment: its command.
        model: the model's name.
        fingerprint: of its checkpoint.
        items: how many items the numbers come from.
        skipped: items that could not be used: their count, keys and reasons.
        not_finite: items with a number that is NaN or infinite, which are in the table but in no other number.
        resumed_items: how many items were done when this call began.
        words_of_several_tokens: how many words were read at the last of their tokens, in the items of this call.
        unknown_words: words that the vocabulary lacks, and in how many items of this call they stand.
        settings: all that the rows depend on.
        versions: of the packages.
        seconds: that this call took.
    """

    experiment: str
    model: str
    fingerprint: str
    items: int
    skipped: Mapping[str, Any]
    not_finite: Mapping[str, Any]
    resumed_items: int
    words_of_several_tokens: int
    unknown_words: Mapping[str, int]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def about(self, strength: float | None = None, note: str = "", items: int | None = None) -> plots.About:
        """What a figure says of the run below it."""
        lost = self.not_finite["count"]
        skipped = f"{lost} of {self.items + lost} items not finite, skipped" if lost else ""
        text = "; ".join(part for part in (skipped, note) if part)
        return plots.About(model=self.model, items=self.items if items is None else items, strength=strength, note=text)

    @property
    def skipped_note(self) -> str:
        """What a command says of skipped items."""
        count = self.skipped["count"]
        return f"; {count} bad items skipped, see the summary" if count else ""


SummaryT = TypeVar("SummaryT", bound=Summary)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Command[SummaryT], Generic[Item, Batch, SummaryT]):
    """A published experiment: options and steps.

    A subclass says what its items are (`items`), how they are asked (`prepare`), what rows come of a batch
    (`compute`), what the table amounts to (`summarise`), and how that is drawn (`figures`). `run` is the same for all.

    Attributes:
        out: folder for parts, table, summary and figures. A run that it holds is resumed if its settings agree.
        data: folder of the data set.
        model: alias, Hugging Face id or folder.
        batch_size: prompts traced together; chosen from the free memory by default.
        dtype: of parameters and activations.
        limit: how many items, drawn by the seed; all by default.
        seed: of the sample, and of everything else that is random.
        restart: discard the run that the folder holds, and begin anew.
        skip_bad: skip items that cannot be used, and list them.
        reference_bugs: reproduce the bugs of the published code.
        template: the user's text, with {query}, {first}, {second}, {First}, {Second}; the published one by default.
        case: form of the answer words that is read: lower, capital, both added up, or the one that the published code
            reads for the model's family.
        split_words: read a word of several tokens at its last one, or refuse it.
        progress: show progress bars, on terminals.
    """

    name: ClassVar[str]
    published_text: ClassVar[str] = PUBLISHED_SUFFIX
    reporting: ClassVar[frozenset[str]] = frozenset()
    """Options that summary and figures depend on, but no row."""
    prompts_per_item: ClassVar[int] = 1

    out: Path
    data: Path
    model: str = "tiny-llava"
    batch_size: Count | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    limit: Count | None = None
    seed: int = 0
    restart: bool = False
    skip_bad: bool = False
    reference_bugs: bool = False
    template: str | None = None
    case: Literal["lower", "capital", "both", "published"] = "both"
    split_words: Literal["last", "refuse"] = "last"
    progress: bool = True

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        super().__post_init__()
        if self.template is not None and "{query}" not in self.template:
            raise InputError(f"the template {self.template!r} has no place for the {{query}}.")

    @abc.abstractmethod
    def items(self, session: Session) -> Sequence[Item]:
        """All items of the run, read from `data`."""

    def key(self, item: Item) -> str:
        """An item's name, unlike all others."""
        return getattr(item, "key")  # noqa: B009 - items are of any class with a key

    def groups(self, items: Sequence[Item]) -> list[list[Item]]:
        """The items that can be prepared together, such as those of one axis; also: one item of each is tried first."""
        return [list(items)]

    @abc.abstractmethod
    def prepare(self, session: Session, items: Sequence[Item]) -> Batch:
        """The prompts of items of one group."""

    def asked(self, batch: Batch) -> Sequence[RelationBatch]:
        """The questions in what `prepare` made; the words of the first are counted."""
        return [batch]  # pyright: ignore[reportReturnType] - true of the experiments that do not override it

    def rows(self, session: Session) -> int:
        """Interventions that run side by side for each prompt, for the estimate of memory."""
        return 0

    @abc.abstractmethod
    def compute(self, session: Session, items: Sequence[Item], batch: Batch) -> Columns:
        """The table's rows of items.

        Args:
            session: the loaded model, and what was resolved from the options.
            items: of one group.
            batch: made of them, padded with the first one up to the batch size; no row comes of padding.
        """

    @abc.abstractmethod
    def summarise(self, session: Session, table: Columns) -> SummaryT:
        """What the table amounts to, `**session.facts` among it."""

    def figures(self, session: Session, table: Columns, summary: SummaryT) -> "Iterator[tuple[str, Figure]]":
        """Name and figure of all that is drawn."""
        yield from ()

    def printed(self, result: SummaryT) -> Iterator[str]:
        """The report, and where the summary is."""
        yield from self.report(result)
        yield str(self.out / "summary.json")

    def read_ids(self) -> SpatialIDs | TemporalIDs | None:
        """The file of IDs that the experiment works with, if it does."""
        return None

    def default_layers(self, model: Model) -> Iterable[int]:
        """The layers of the experiment where the user gives none."""
        return range(model.num_layers)

    def chosen_layers(self, model: Model) -> list[int]:
        """The layers of the run, ascending."""
        return parse_layers(None, model, tuple(self.default_layers(model)))

    def chunk(self, session: Session, items: list[Item]) -> Columns:
        """The table's rows of items that are computed together."""
        tables = []
        for group in self.groups(items):
            batch = self.prepare(session, padded(group, session.batch_size))
            session.count_words(self.asked(batch)[0], len(group))
            tables.append(self.compute(session, group, batch))
        return joined(tables)

    def run(self) -> SummaryT:
        """Runs the experiment, or resumes the run in its folder; writes parts, table, summary and figures.

        Raises:
            OutputError: if the folder holds another run, is in use, or cannot be written to.
            CheckpointError: if the model or the IDs cannot be read.
            DataError: for an item that cannot be used, unless those are skipped; or if none is left.
        """
        if self.reference_bugs:
            from jaxid.experiments.reference import with_bugs  # it knows all experiments

            return with_bugs(self)._run()
        return self._run()

    def _run(self) -> SummaryT:
        started = time.perf_counter()
        session = Session(self)
        session.begin(self.items(session))
        write_config(self, self.out)
        table = session.table()
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
        layers: decoder layers, counted from 0, such as 3,5-8; the experiment's own by default.
    """

    layers: str | None = None

    def chosen_layers(self, model: Model) -> list[int]:
        """The layers given, else the experiment's own."""
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
        strength: of what is added; 5 as published.
    """

    strength: float = 5.0


def read_spatial_ids(path: Path) -> SpatialIDs:
    """Spatial IDs from a .safetensors file or the authors' .pt."""
    return SpatialIDs.from_torch(path) if path.suffix == ".pt" else SpatialIDs.load(path)


def write_config(command: Command[Any], folder: Path, name: str = "config.yaml") -> Path:
    """Writes `config.yaml`, with which `--config` repeats a command, whatever the folder it is given in."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.resolve())
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    options = {field.name: plain(getattr(command, field.name)) for field in dataclasses.fields(command)}
    given = {name: value for name, value in options.items() if value is not None and name != "restart"}
    return io.write_text(folder / name, yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
