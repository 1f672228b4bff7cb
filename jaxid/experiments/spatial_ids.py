"""Extracts spatial IDs from a folder of grid pictures ([ID] arXiv 2601.12626, Figures 3 and 5)."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import numpy as np

from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import Count, check_finite
from jaxid.data.grid import GridItem, read_finetune_folder, read_grid_folder
from jaxid.errors import DataError, OutputError
from jaxid.experiments.base import Command, write_config
from jaxid.ids.extract import SPATIAL_QUESTION, extract_spatial
from jaxid.io import ensure_output_folder

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction(Command[Result]):
    """Base class of the commands that extract IDs.

    Attributes:
        data: folder of the pictures or clips.
        out: file for the IDs, .safetensors.
        model: alias, Hugging Face id or folder.
        batch_size: pictures or clips read together.
        dtype: of parameters and activations.
        mesh: devices that share the model and the work, such as data=4,model=2; auto takes all of them. By default one.
    """

    data: Path
    out: Path
    model: str = "tiny-llava"
    batch_size: Count = 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: str | None = None

    def check_output(self) -> None:
        """Checks that the IDs can be written.

        Raises:
            OutputError: if they cannot be written.
        """
        if self.out.suffix != ".safetensors":
            raise OutputError(f"{self.out} cannot hold IDs: the name must end in .safetensors.")
        if self.out.is_dir():
            raise OutputError(f"cannot write {self.out}: a folder is in the way; choose another name.")
        ensure_output_folder(self.out.parent)

    def with_bar(self, items: Sequence[Item], unit: str) -> Iterator[Item]:
        """The items, with a progress bar on terminals that explains the wait for the first batch."""
        from tqdm import tqdm

        with tqdm(items, unit=unit, disable=None, desc=f"compiling for batches of {self.batch_size}") as bar:
            for index, item in enumerate(bar):
                if index == self.batch_size:
                    bar.set_description(refresh=False)
                yield item


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialExtraction:
    """Result of an extraction of spatial IDs.

    Attributes:
        pictures: number of pictures.
        pairs: number of ordered pairs of objects.
        explained_variance: share of the IDs' variance that two axes explain, by layer.
    """

    pictures: int
    pairs: int
    explained_variance: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractIDs(Extraction[SpatialExtraction]):
    """Extract spatial IDs from grid pictures in the published layout, or a fine-tuning set (Figures 3 and 5).

    Attributes:
        articles: ask about "the" objects; the published batch script asks "Is B to the left or right of A?".
        reference_bugs: reproduce the bugs of the published code, which drops the alpha channel of pictures: what is
            transparent is not white but has its stored colour, usually black.
    """

    name: ClassVar[str] = "ids extract"

    articles: bool = True
    reference_bugs: bool = False

    @property
    def question(self) -> str:
        """The question, with {a} and {b} for the names."""
        return SPATIAL_QUESTION if self.articles else SPATIAL_QUESTION.replace("the {", "{")

    def items(self) -> list[GridItem]:
        """The pictures, in either layout.

        Raises:
            DataError: if the folder holds none.
        """
        return read_finetune_folder(self.data) if any(self.data.glob("*.png")) else read_grid_folder(self.data)

    def run(self) -> SpatialExtraction:
        """Extracts the IDs and writes them.

        Raises:
            DataError: if the folder holds no such pictures, or the model's activations are not finite.
            OutputError: if the file cannot be written.
        """
        if self.reference_bugs:
            from jaxid.experiments.reference import with_bugs  # it knows all experiments

            return with_bugs(self)._run()
        return self._run()

    def _run(self) -> SpatialExtraction:
        self.check_output()
        items, checkpoint = self.items(), open_checkpoint(self.model, dtype=self.dtype).on(self.mesh)
        first = items[0]
        asked = checkpoint.model.prepare([first.picture], self.question.format(a=first.object_a, b=first.object_b))
        asked.word(first.object_b)
        pairs = list(dict.fromkeys((item.object_a, item.object_b) for item in items))
        found = extract_spatial(
            checkpoint.load(),
            self.with_bar(items, "picture"),
            pairs=pairs,
            sizes=sorted({item.size for item in items}, reverse=True),
            question=self.question,
            batch_size=self.batch_size,
        )
        check_finite(f"the IDs of {self.model} in {self.dtype}", np.asarray(found.values), DataError)
        found.save(self.out)
        write_config(self, self.out.parent, f"{self.out.stem}.yaml")
        shares = np.asarray(found.explained_variance()).tolist()
        return SpatialExtraction(pictures=len(items), pairs=len(pairs), explained_variance=shares)

    def report(self, result: SpatialExtraction) -> Iterator[str]:
        """The numbers of pictures and pairs, and how much two axes explain."""
        shares = ", ".join(f"{share:.1%}" for share in result.explained_variance)
        yield (
            f"{self.out}: {result.pictures} pictures, {result.pairs} pairs; two axes explain of the IDs' variance, by "
            f"layer: {shares}"
        )
