"""Extraction of IDs: the words' activations in padded batches of pictures or clips ([ID] arXiv 2601.12626)."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.data.clips import AppearItem
from jaxid.data.grid import CELL_SIZE, GRID, GridItem
from jaxid.data.videos import with_times
from jaxid.errors import InputError
from jaxid.families.base import Model
from jaxid.halving import Batches, Exhausted, Halving
from jaxid.ids.accumulate import IDBatch
from jaxid.ids.spatial import SpatialIDs, accumulate_ids
from jaxid.ids.temporal import FRAMES, TemporalIDs, accumulate_temporal_ids
from jaxid.interp.trace import residuals_at
from jaxid.pipeline import drawn_ahead, overlapped
from jaxid.prompts.pictures import Clip, Picture
from jaxid.prompts.processor import Prompts

SPATIAL_QUESTION = "Is the {b} to the left or right of the {a}?"
"""The published question about grid pictures; its word {b} is the one that is read."""

TEMPORAL_QUESTION = (
    "In this video, two objects appear at different times. Does the {a} come before or after the {b}? "
    "Answer in one word."
)
"""The published question about synthetic clips; both words' activations are read."""

Item = TypeVar("Item", GridItem, AppearItem)


class _Word(NamedTuple):
    """A word of an item: the object it names, the places of that and of its partner, and the index of its size."""

    name: str
    own: int
    other: int
    size: int = 0


def ask(model: Model, names: Sequence[tuple[str, str]], shown: Sequence[Picture | Clip], question: str) -> Prompts:
    """The prompts of pairs of objects, each with its picture or clip; {a} and {b} in the question are the names."""
    questions = [question.format(a=a, b=b) for a, b in names]
    timed = [
        with_times(one, asked) if isinstance(one, Clip) else asked for one, asked in zip(shown, questions, strict=True)
    ]
    return model.prepare(list(shown), timed)


def activations_at(model: Model, prompts: Prompts, positions: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B L1 D"]:
    """Residual stream at a position of each prompt; index 0 the embeddings."""
    return np.asarray(_activations(model, prompts, positions))


def _activations(model: Model, prompts: Prompts, positions: Int[np.ndarray, "B"]) -> Float[Array, "B L1 D"]:
    return residuals_at(model, prompts, positions)[:, :, 0].swapaxes(0, 1)


def extract_spatial(
    model: Model,
    items: Iterable[GridItem],
    *,
    pairs: Sequence[tuple[str, str]],
    sizes: Sequence[float] = (CELL_SIZE,),
    question: str = SPATIAL_QUESTION,
    batch_size: int = 128,
) -> SpatialIDs:
    """Extracts spatial IDs, reading only the asked word's positions.

    Args:
        model: the model.
        items: grid pictures in any order; wrap the iterable in tqdm for a progress bar.
        pairs: all ordered pairs (A, B) that may occur.
        sizes: all object sizes that may occur, in pixels.
        question: the question, with {a} and {b} for the names.
        batch_size: pictures per forward pass.

    Returns:
        IDs of every object that is second in a pair.

    Raises:
        InputError: if an item's pair or size is not among those announced, or its objects have the same name.
        PromptError: if the question does not hold the object's word exactly once.
    """
    objects = tuple(dict.fromkeys(b for _, b in pairs))

    def words(item: GridItem) -> list[_Word]:
        if item.size not in sizes:
            raise InputError(f"grid item {item.object_a}/{item.object_b} of size {item.size} was not announced.")
        own, other = (y * GRID + x for x, y in (item.cell_b, item.cell_a))
        return [_Word(item.object_b, own, other, sizes.index(item.size))]

    return accumulate_ids(
        _batches(model, items, pairs, objects, question, batch_size, lambda item: item.picture, words),
        pairs=len(pairs),
        objects=objects,
        sizes=tuple(sizes),
        model=model.name,
        fingerprint=model.fingerprint,
    )


def extract_temporal(
    model: Model,
    items: Iterable[AppearItem],
    *,
    pairs: Sequence[tuple[str, str]],
    question: str = TEMPORAL_QUESTION,
    batch_size: int = 16,
    accumulate: Callable[..., TemporalIDs] = accumulate_temporal_ids,
) -> TemporalIDs:
    """Extracts temporal IDs, reading only the two words' positions.

    Args:
        model: the model.
        items: clips in any order; wrap the iterable in tqdm for a progress bar.
        pairs: all ordered pairs (A, B) that may occur.
        question: the question, with {a} and {b} for the names.
        batch_size: clips per forward pass.
        accumulate: computes the IDs from the batches; has the signature of `accumulate_temporal_ids`.

    Raises:
        InputError: if an item's pair is not among those announced, or its clip cannot be read.
        DataError: for a video that is unreadable or too short.
        PromptError: if the question does not hold an object's word.
    """
    objects = tuple(dict.fromkeys(name for pair in pairs for name in pair))

    def words(item: AppearItem) -> list[_Word]:
        first, second = item.frame_a - FRAMES[0], item.frame_b - FRAMES[0]
        return [_Word(item.object_a, first, second), _Word(item.object_b, second, first)]

    return accumulate(
        _batches(model, items, pairs, objects, question, batch_size, AppearItem.open, words),
        pairs=2 * len(pairs),
        objects=objects,
        model=model.name,
        fingerprint=model.fingerprint,
    )


def _batches(
    model: Model,
    items: Iterable[Item],
    pairs: Sequence[tuple[str, str]],
    objects: Sequence[str],
    question: str,
    batch_size: int,
    picture: Callable[[Item], Picture | Clip],
    words: Callable[[Item], list[_Word]],
) -> Iterator[IDBatch]:
    """Activations at the words, with one batch for each word of a batch of items.

    A short last batch of items is padded with its first, so that one program serves all batches. While a batch is
    computed, the next ones are read. If the device runs out of memory, batches are halved from then on.
    """
    pair_index = {pair: index for index, pair in enumerate(pairs)}
    halving = Halving(batch_size, advice="use --dtype bfloat16, a smaller model or a larger device")

    def opened(batch: list[Item]) -> tuple[Prompts, list[tuple[Int[np.ndarray, "B"], dict[str, np.ndarray]]]]:
        """The prompts of items; and for each of their words, its positions and the indices of a batch."""
        names = [(item.object_a, item.object_b) for item in batch]
        for pair in names:
            if pair not in pair_index:
                raise InputError(f"the pair {pair[0]}/{pair[1]} was not announced; the pairs are {list(pairs)}.")
        rows = [*zip(names, map(words, batch), map(picture, batch), strict=True)]
        names, read, pictures = zip(*(rows + rows[:1] * (halving.size - len(batch))), strict=True)
        prompts = ask(model, names, pictures, question)
        pair = np.array([pair_index[pair] for pair in names])
        padded, found = np.arange(len(names)) >= len(batch), []
        for role, column in enumerate(zip(*read, strict=True)):
            name, own, other, size = zip(*column, strict=True)
            indices = {
                "object_index": np.array([objects.index(one) for one in name]),
                "pair_index": np.where(padded, -1, len(read[0]) * pair + role),
                "own_index": np.array(own),
                "other_index": np.array(other),
                "size_index": np.array(size),
                "order": len(read[0]) * np.arange(len(names)) + role,
            }
            found.append((prompts.word(list(name), beside=list(names)), indices))
        return prompts, found

    def begun(
        batch: tuple[Prompts, list[tuple[Int[np.ndarray, "B"], dict[str, np.ndarray]]]],
    ) -> Callable[[], list[IDBatch]]:
        prompts, found = batch
        made = [IDBatch(activations=_activations(model, prompts, at), **indices) for at, indices in found]
        return lambda: jax.block_until_ready(made)

    def join(parts: list[list[IDBatch]]) -> list[IDBatch]:
        return [made for part in parts for made in part]

    first = following = 0  # in the order of reading
    steps, lists = Batches(halving, opened, begun, join), contextlib.closing(drawn_ahead(items, batch_size))
    with lists as inputs, overlapped(inputs, steps.read, steps.compute, lambda _, fetch: fetch()) as results:
        for batch, result in results:
            try:
                made = result.result()
            except Exhausted as shortage:
                made = steps.again(batch, shortage)
            for one in made:
                order = np.asarray(one.order)
                first = following if order[0] == 0 else first
                following = first + int(order[-1]) + 1
                yield one._replace(order=first + order)


def centred_words(model: Model, question: str, words: Sequence[str]) -> Float[np.ndarray, "L W D"]:
    """Activations of words in a question that is asked without a picture, after every layer, minus the words' mean.

    They show where the words for places and times are among the IDs ([ID] arXiv 2601.12626, Figures 5 and 10 b). A
    word by itself would be read in another context than the objects' words.

    Args:
        model: the model.
        question: the question.
        words: words that it contains.

    Raises:
        PromptError: if the question does not hold a word.
    """
    prompts = model.prepare(None, [question])
    states = residuals_at(model, prompts, prompts.words([tuple(words)]))[1:, 0]
    states = np.asarray(states).astype(np.float32)
    return states - states.mean(axis=1, keepdims=True)
