"""What the published code does when it trains a scorer of dense maps ([DCSM] arXiv 2503.08723)."""

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


def drawn_negations(seed: int) -> Negated:
    """A negation for every caption by itself, so that those of an item may differ."""

    def drawn(row: int, version: int, side: int) -> str:
        return NEGATIONS[np.random.default_rng((seed, row, version, side)).integers(len(NEGATIONS))]

    return drawn


class TrainingAsPublished:
    """Beside the training of a scorer: see `common_order`, and captions of `always_a` and `drawn_negations`."""

    orders = staticmethod(common_order)

    def read_sets(self) -> dict[str, list[Item]]:
        """The data sets, with the published captions."""
        own: Any = self
        return read_sets(own.data, own.layout, always_a, drawn_negations(own.seed))
