"""Shared by the samplers of training batches: tables of held-out pairs, and pixels as the processors make them."""

import numpy as np
from jaxtyping import Bool, Float, UInt8


def symmetric_sample(size: int, count: int, *, seed: int) -> Bool[np.ndarray, "S S"]:
    """A symmetric table in which `count` random pairs of different indices are true."""
    first, second = np.triu_indices(size, 1)
    chosen = np.random.default_rng(seed).choice(len(first), count, replace=False)
    table = np.zeros((size, size), bool)
    table[first[chosen], second[chosen]] = table[second[chosen], first[chosen]] = True
    return table


def normalize(pictures: UInt8[np.ndarray, "N Y X 3"]) -> Float[np.ndarray, "N 3 Y X"]:
    """Pixels as the shipped image processors make them of pictures that already have the right size."""
    scaled = (pictures.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
