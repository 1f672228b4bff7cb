"""What the published code does when it trains a scorer of dense maps ([DCSM] arXiv 2503.08723)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxid.dcsm.datasets import NEGATIONS, Item, Negated, read_sets


def common_order(counts: Sequence[int], step: int, size: int, seed: int) -> list[Int[np.ndarray, "B"]]:
    """Rows of each data set in a step, from as many items of every set as the smallest has; the others are never seen.

    The items that are kept are drawn once. All sets then share one order, drawn anew for every epoch. Arguments as in
    `jaxid.dcsm.training.own_orders`, whose place it takes.
    """
    fewest = min(counts)
    epoch, batch = divmod(step, fewest // size)
    kept = [np.random.default_rng((seed, 0, index)).permutation(count)[:fewest] for index, count in enumerate(counts)]
    order = np.random.default_rng((seed, 1, epoch)).permutation(fewest)[batch * size : (batch + 1) * size]
    return [rows[order] for rows in kept]


def always_a(name: str) -> str:
    """The name after "a", before vowels too."""
    return f"a {name}"


def _always(words: str) -> Negated:
    return lambda row, version, side: words


class TrainingAsPublished:
    """Beside the training of a scorer: see `common_order` and `always_a`; every step draws negations."""

    orders = staticmethod(common_order)

    def read_sets(self) -> dict[str, list[Item]]:
        """The data sets, with the published captions."""
        own: Any = self
        found, *others = (read_sets(own.data, own.layout, always_a, _always(words)) for words in NEGATIONS)
        for name in {"negation"} & set(found):
            items = zip(*(sets[name] for sets in (found, *others)), strict=True)
            found[name] = [dataclasses.replace(item, alternatives=tuple(rest)) for item, *rest in items]
        return found
