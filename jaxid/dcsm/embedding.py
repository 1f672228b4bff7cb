"""Pictures and captions in a CLIP-like model's joint space: every token, and pooled."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxid import meshes
from jaxid.errors import InputError
from jaxid.families.base import Encoder
from jaxid.halving import Batches, Exhausted, Halving
from jaxid.interp.programs import program
from jaxid.io import joined
from jaxid.kernels.similarity import unit
from jaxid.meshes import DATA
from jaxid.nn.dual import Encoded
from jaxid.nn.placement import placed
from jaxid.pipeline import overlapped
from jaxid.prompts.dual import Captions
from jaxid.prompts.pictures import Picture

TEXT_TOKENS = 30
"""Caption tokens of a map, T, as published."""

BATCH = 32
"""Pictures or captions encoded at a time by each copy of the model, unless the device's memory does not suffice."""

READERS = min(8, os.cpu_count() or 1)
"""Batches that are opened at a time: encoders are small and fast, and so are the pixels that they take."""


@functools.cache
def _together(copies: int) -> Halving:
    """How many inputs a number of copies of a model encode at a time."""
    return Halving(BATCH * copies, unit="input", advice="use a smaller model or a larger device")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Encoded pictures, every vector of length one.

    Attributes:
        tokens: of the class token, if the encoder has one, and the patches.
        pooled: of whole pictures.
    """

    tokens: Float[np.ndarray, "N I E"]
    pooled: Float[np.ndarray, "N E"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: slice | list[int]) -> "Pictures":
        """The pictures at a slice or a list of indices."""
        return Pictures(tokens=self.tokens[chosen], pooled=self.pooled[chosen])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Texts:
    """Encoded captions, every vector of length one.

    Attributes:
        captions: texts, ids, and the position of every token in its text; padded or cut to the same length.
        tokens: of all caption tokens, including padding.
        pooled: of whole captions.
    """

    captions: Captions
    tokens: Float[np.ndarray, "M T E"]
    pooled: Float[np.ndarray, "M E"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: list[int]) -> "Texts":
        """The captions at some indices."""
        return Texts(captions=self.captions[chosen], tokens=self.tokens[chosen], pooled=self.pooled[chosen])


@program()
def _image(encoder: Encoder, pixels: Float[Array, "N C Y X"]) -> tuple[Float[Array, "N I E"], Float[Array, "N E"]]:
    found = encoder.network().image(placed(pixels, (DATA, None, None, None)))
    return _units(found)


@program()
def _text(
    encoder: Encoder, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]
) -> tuple[Float[Array, "N T E"], Float[Array, "N E"]]:
    return _units(encoder.network().text(token_ids, valid))


@program()
def _image_class(encoder: Encoder, pixels: Float[Array, "N C Y X"]) -> tuple[Float[Array, "N D"]]:
    states = encoder.network().image_states(placed(pixels, (DATA, None, None, None)))
    return (placed(unit(states[:, 0].astype(jnp.float32)), (DATA, None)),)


@program()
def _text_class(
    encoder: Encoder, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]
) -> tuple[Float[Array, "N D"]]:
    states = encoder.network().text_states(token_ids, valid)
    return (placed(unit(states[:, 0].astype(jnp.float32)), (DATA, None)),)


def _units(found: Encoded) -> tuple[Float[Array, "N S E"], Float[Array, "N E"]]:
    """Vectors of length one in float32, sharded over the copies of the model as their pictures or captions are."""
    tokens, pooled = (unit(value.astype(jnp.float32)) for value in found)
    return placed(tokens, (DATA, None, None)), placed(pooled, (DATA, None))


def embed_pixels(encoder: Encoder, pixels: Float[Array, "N C Y X"]) -> Float[Array, "N I E"]:
    """Unit vectors of every token of prepared pictures; a pure function of arrays.

    Args:
        encoder: the model.
        pixels: as `encoder.processor.pixels` makes them.
    """
    return _image(encoder, jnp.asarray(pixels, _dtype(encoder)))[0]


def _dtype(encoder: Encoder) -> Any:
    return jax.tree.leaves(encoder.parameters)[0].dtype


def embed_images(
    encoder: Encoder, pictures: Sequence[Picture] | Float[np.ndarray, "N C Y X"], *, progress: bool = False
) -> Pictures:
    """Encodes pictures, a batch at a time; while one is encoded, the next ones are opened and resized in threads.

    Args:
        encoder: the model.
        pictures: paths, PIL images or arrays UInt8[Y, X, 3]; or pixels, as `encoder.processor.pixels` makes them.
        progress: show a progress bar, on terminals only.

    Raises:
        InputError: if there are none, or one cannot be opened.
    """
    if not len(pictures):
        raise InputError("give at least one picture.")

    def pixels(rows: list[int]) -> tuple[np.ndarray]:
        if isinstance(pictures, np.ndarray) and pictures.dtype.kind == "f":
            return (pictures[rows].astype(_dtype(encoder)),)
        return (encoder.processor.pixels([pictures[row] for row in rows]).astype(_dtype(encoder)),)

    tokens, pooled = _in_batches(_image, encoder, len(pictures), pixels, progress=progress)
    return Pictures(tokens=tokens, pooled=pooled)


def embed_class_tokens(
    encoder: Encoder, pixels: Float[np.ndarray, "N C Y X"], captions: Captions
) -> tuple[Float[np.ndarray, "N D"], Float[np.ndarray, "M D"]]:
    """Unit vectors of the first tokens of pictures and captions, not projected into the joint space.

    Args:
        encoder: a model whose towers have the same width.
        pixels: as `encoder.processor.pixels` makes them.
        captions: as `encoder.processor.captions` makes them.
    """
    shown = pixels.astype(_dtype(encoder))
    (left,) = _in_batches(_image_class, encoder, len(shown), lambda rows: (shown[rows],))
    ids, valid = captions.token_ids, captions.valid
    (right,) = _in_batches(_text_class, encoder, len(captions), lambda rows: (ids[rows], valid[rows]))
    return left, right


def embed_texts(encoder: Encoder, captions: Sequence[str] | Captions, length: int = TEXT_TOKENS) -> Texts:
    """Encodes captions, a batch at a time.

    Args:
        encoder: the model.
        captions: the texts; or what `encoder.processor.captions` made of them, for the same length.
        length: tokens of every caption, T; longer captions are cut, with a warning that names the lost words.

    Raises:
        InputError: if there are none, one is blank, or the encoder does not take that many tokens.
    """
    batch = captions if isinstance(captions, Captions) else encoder.processor.captions(captions, length)
    tokens, pooled = _in_batches(_text, encoder, len(batch), lambda rows: (batch.token_ids[rows], batch.valid[rows]))
    return Texts(captions=batch.cut(length), tokens=tokens[:, :length], pooled=pooled)


def _in_batches(
    run: Callable[..., Any],
    encoder: Encoder,
    count: int,
    arrays: Callable[[list[int]], tuple[np.ndarray, ...]],
    *,
    progress: bool = False,
) -> list[np.ndarray]:
    """Runs a program in batches, padded to a power of two so that few programs are compiled.

    Args:
        run: the program; all its results have an axis of rows in front, which the copies of the model divide.
        encoder: the model, its first argument.
        count: number of rows.
        arrays: reads some rows; called in background threads.
        progress: show a progress bar, on terminals only.
    """
    from tqdm import tqdm

    mesh = encoder.mesh
    copies = meshes.size(mesh, DATA)

    def begun(own: tuple[np.ndarray, ...]) -> Callable[[], dict[str, np.ndarray]]:
        rows = len(own[0])
        most = copies * (1 << (-(-rows // copies) - 1).bit_length())
        filled = tuple(np.concatenate([array, np.repeat(array[-1:], most - rows, axis=0)]) for array in own)
        found = run(encoder, *(filled if mesh is None else meshes.sharded(mesh, filled)))
        return lambda: {str(index): value[:rows] for index, value in enumerate(jax.device_get(found))}

    halving = _together(copies)
    steps, size, parts = Batches(halving, arrays, begun, joined), halving.size, []
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    with (
        tqdm(total=count, unit="picture", disable=None if progress else True) as bar,
        overlapped(chunks, steps.read, steps.compute, lambda _, fetch: fetch(), ahead=READERS) as results,
    ):
        for chunk, result in results:
            try:
                parts.append(result.result())
            except Exhausted as shortage:
                parts.append(steps.again(chunk, shortage))
            bar.update(len(chunk))
    return [np.concatenate([part[name] for part in parts]) for name in parts[0]]
