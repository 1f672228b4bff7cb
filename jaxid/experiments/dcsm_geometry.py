"""Which conditions can be met together with one vector per picture and caption ([DCSM] arXiv 2503.08723)."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import numpy as np

from jaxid import plots
from jaxid.checks import Count, Range
from jaxid.dcsm.geometry import LAWS, RESOLUTION, study
from jaxid.experiments.base import Command, write_config
from jaxid.io import ensure_output_folder, write_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttainableMargins(Command[Mapping[str, np.ndarray]]):
    """Search which conditions can be met together with one vector per picture and caption.

    Attributes:
        out: folder for table and figure.
        seeds: searches for every set of conditions.
        dimension: dimension of the vectors.
        steps: steps of each search.
        seed: seed of the starting vectors.
    """

    name: ClassVar[str] = "dcsm geometry"

    out: Path
    seeds: Count = 16
    dimension: Annotated[int, Range(2)] = 16
    steps: Count = 600
    seed: int = 0

    def run(self) -> Mapping[str, np.ndarray]:
        """Searches; writes and returns the table, and draws it.

        Raises:
            OutputError: if the folder cannot be written to.
        """
        ensure_output_folder(self.out)
        write_config(self, self.out)
        table = study(jax.random.key(self.seed), seeds=self.seeds, dimension=self.dimension, steps=self.steps)
        write_table(self.out / "geometry.parquet", table)
        note = f"{self.dimension} coordinates, seed {self.seed}"
        about = plots.About(items=self.seeds, unit="searches of each set", note=note)
        columns = (table[name] for name in ("law", "conditions", "margin"))
        plots.save(plots.attainable_margins(*columns, resolution=RESOLUTION, about=about), self.out / "geometry.png")
        return table

    def report(self, result: Mapping[str, np.ndarray]) -> Iterator[str]:
        """The sets of conditions that can be met under each law."""
        for law in LAWS:
            sets = dict.fromkeys(result["conditions"][result["law"] == law].tolist())
            reached = result["margin"] > RESOLUTION
            met = [name for name in sets if (reached & (result["law"] == law) & (result["conditions"] == name)).any()]
            yield f"{law}: {len(met)} of {len(sets)} sets can be met: {'; '.join(met)}"
        yield str(self.out / "geometry.png")
