"""The networks that score a dense similarity map: a small CNN, and an MLP.

Source: [DCSM] arXiv 2503.08723, section 4.
"""

from typing import NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHANNELS = 4
HIDDEN = 128


class CNN(NamedTuple):
    """Two 3 x 3 convolutions and a hidden layer."""

    conv1: Float[Array, "C 3 3"]
    conv1_bias: Float[Array, "C"]
    conv2: Float[Array, "C C 3 3"]  # outputs first
    conv2_bias: Float[Array, "C"]
    fc1: Float[Array, "H C I T"]
    fc1_bias: Float[Array, "H"]
    fc2: Float[Array, "H"]
    fc2_bias: Float[Array, ""]


class MLP(NamedTuple):
    """Two hidden layers over the flat map."""

    fc1: Float[Array, "H I T"]
    fc1_bias: Float[Array, "H"]
    fc2: Float[Array, "G H"]
    fc2_bias: Float[Array, "G"]
    fc3: Float[Array, "G"]
    fc3_bias: Float[Array, ""]


Network = CNN | MLP


def init_cnn(key: Array, image_tokens: int, text_tokens: int) -> CNN:
    """A CNN initialised like PyTorch's layers: uniform within 1 / sqrt(inputs)."""
    flat = CHANNELS * image_tokens * text_tokens
    shapes = {
        "conv1": ((CHANNELS, 3, 3), 9),
        "conv1_bias": ((CHANNELS,), 9),
        "conv2": ((CHANNELS, CHANNELS, 3, 3), 9 * CHANNELS),
        "conv2_bias": ((CHANNELS,), 9 * CHANNELS),
        "fc1": ((HIDDEN, CHANNELS, image_tokens, text_tokens), flat),
        "fc1_bias": ((HIDDEN,), flat),
        "fc2": ((HIDDEN,), HIDDEN),
        "fc2_bias": ((), HIDDEN),
    }
    return CNN(**_uniform(key, shapes))


def init_mlp(key: Array, image_tokens: int, text_tokens: int) -> MLP:
    """An MLP initialised like PyTorch's layers: uniform within 1 / sqrt(inputs)."""
    flat = image_tokens * text_tokens
    shapes = {
        "fc1": ((64, image_tokens, text_tokens), flat),
        "fc1_bias": ((64,), flat),
        "fc2": ((32, 64), 64),
        "fc2_bias": ((32,), 64),
        "fc3": ((32,), 32),
        "fc3_bias": ((), 32),
    }
    return MLP(**_uniform(key, shapes))


def _uniform(key: Array, shapes: dict[str, tuple[tuple[int, ...], int]]) -> dict[str, Array]:
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(own, shape, jnp.float32, -1, 1) * inputs**-0.5
        for own, (name, (shape, inputs)) in zip(keys, shapes.items(), strict=True)
    }


def misfit(network: Network) -> str | None:
    """The first inconsistency between the shapes of a scorer's arrays, as a message; None if they are consistent."""
    sizes: dict[str, int] = {}
    for name, value in network._asdict().items():
        axes = get_type_hints(type(network))[name].dim_str.split()
        shape = jnp.shape(value)
        fits = len(shape) == len(axes) and all(
            size > 0 and size == (int(axis) if axis.isdecimal() else sizes.setdefault(axis, size))
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{axis} = {sizes[axis]}" for axis in axes if axis in sizes)
            return f"{name} has the shape {shape} instead of ({', '.join(axes)}){' with ' * bool(known)}{known}"
    return None


def map_shape(network: Network) -> tuple[int, int]:
    """Shape (I, T) of the maps that a scorer reads."""
    image_tokens, text_tokens = network.fc1.shape[-2:]
    return image_tokens, text_tokens
