"""What the recipes share: limits of their settings, tables of what is held out, pixels as the processors make them."""

import dataclasses
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, UInt8

from jaxid.checks import check_options
from jaxid.errors import InputError

Config = TypeVar("Config")


def symmetric_sample(size: int, count: int, *, seed: int) -> Bool[np.ndarray, "S S"]:
    """A symmetric table with `count` pairs of different entries drawn."""
    first, second = np.triu_indices(size, 1)
    chosen = np.random.default_rng(seed).choice(len(first), count, replace=False)
    table = np.zeros((size, size), bool)
    table[first[chosen], second[chosen]] = table[second[chosen], first[chosen]] = True
    return table


def normalize(pictures: UInt8[np.ndarray, "N Y X 3"]) -> Float[np.ndarray, "N 3 Y X"]:
    """What a shipped image processor does to a picture of the right size."""
    scaled = (pictures.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def check_recipe(config: Any) -> None:
    """Checks the numbers of a recipe.

    Raises:
        InputError: naming the first one that is out of range.
    """
    check_options(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name.endswith(("batch_size", "learning_rate")) and not value > 0:
            raise InputError(f"{field.name} must be above 0, not {value}.")
        if value < 0:
            raise InputError(f"{field.name} must be 0 or more, not {value}.")
    if not sum(_stages(config).values()):
        raise InputError("a recipe needs at least one step.")


def limited(config: Config, steps: int | None, batch_size: int | None) -> Config:
    """A recipe with at most so many steps in every stage, and batches of another size in all of them."""
    changes = {} if steps is None else {name: min(steps, count) for name, count in _stages(config).items()}
    if batch_size is not None:
        names = [field.name for field in dataclasses.fields(config)]  # pyright: ignore[reportArgumentType]
        changes |= {name: batch_size for name in names if name.endswith("batch_size")}
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]


def _stages(config: Any) -> dict[str, int]:
    """The fields of a recipe that count the steps of a stage."""
    names = [field.name for field in dataclasses.fields(config) if field.name.endswith("steps")]
    return {name: getattr(config, name) for name in names if name != "warmup_steps"}
