"""What fine-tuning does to the geometry of held-out activations: how close they are to IDs, and how straight these lie.

The word is the one that the ID loss reads, in the questions of training, and each picture is asked about both axes,
whether the question has an answer or not: the word is read before the answer.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxid.data.coco_spatial import ANSWERS
from jaxid.data.grid import GRID, GridItem
from jaxid.experiments.finetune import FinetuneConfig
from jaxid.experiments.finetune_data import Group, Question, groups_by, placed, text_of
from jaxid.experiments.finetune_evaluation import BATCH, in_batches
from jaxid.experiments.session import padded
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.trace import residuals_at
from jaxid.kernels import probing
from jaxid.prompts.processor import Prompts
from jaxid.train.placement import complete

OWN, OTHER = "cosine_own", "cosine_other"
"""Mean cosines with the model's own IDs, and with those of another model."""
MEASURES = {OWN: "cosine with its own IDs", OTHER: "cosine with the IDs of", "variance": "ID variance on two axes"}
"""What is measured, and how figures call it."""


def folders(items: Sequence[GridItem], most: int, seed: int) -> list[Group]:
    """Questions about whole folders of pictures, which share the pair and the first object's cell.

    Args:
        items: pictures of held-out pairs.
        most: the largest number of questions; two folders are always drawn.
        seed: of the draw.

    Returns:
        The questions of each folder, about one axis.
    """
    asked = [Question(item=item, axis=axis, row=row) for axis in ANSWERS for row, item in enumerate(items)]
    whole = [group for group in groups_by(asked, lambda one: (*placed(one), one.axis)) if len(group) > 1]
    found: list[Group] = []
    for row in np.random.default_rng((seed, 98)).permutation(len(whole)):
        if len(found) < 2 or sum(map(len, found)) + len(whole[row]) <= most:
            found.append(whole[row])
    return found


def geometry(
    activations: Float[Array, "N D"] | Float[np.ndarray, "N D"],
    folder: Int[np.ndarray, "N"],
    cell: Int[np.ndarray, "N"],
    targets: Mapping[str, Float[Array, "X Y D"] | Float[np.ndarray, "X Y D"]],
) -> dict[str, float]:
    """Mean cosines between activations, less their folder's mean, and IDs; and the straightness of the model's own.

    Args:
        activations: at the word of the second object.
        folder: index of each one's folder.
        cell: the second object's cell, row by row: y * 4 + x.
        targets: universal IDs after the same layer, by name.

    Returns:
        The mean cosine by name, and under "variance" the share of variance that two straight axes explain of the
        activations less their folder's mean, averaged by cell; without it if a cell has no picture.
    """
    sums = probing.empty_sums(int(folder.max()) + 1, GRID * GRID, 1, activations.shape[-1])
    sums = probing.accumulate(sums, jnp.asarray(activations)[:, None], jnp.asarray(folder), jnp.asarray(cell))
    means, counts = probing.finish(sums)
    centred, present = probing.center(means, counts, axis=1), counts > 0
    found = {}
    for name, grid in targets.items():
        by_cell = jnp.asarray(grid).swapaxes(0, 1).reshape(GRID * GRID, -1)
        cosines = optax.cosine_similarity(centred[:, :, 0], by_cell, epsilon=1e-6)
        found[name] = float(cosines.mean(where=present))
    ids, pictures = probing.average(centred, counts, axis=0)
    if (np.asarray(pictures) > 0).all():
        own = ids.reshape(GRID, GRID, -1).swapaxes(0, 1)
        found["variance"] = float(probing.explained_variance(own, *probing.plane(*probing.axes(own))))
    return found


def word_activations(model: Model, questions: Sequence[Question], config: FinetuneConfig) -> Float[np.ndarray, "N D"]:
    """Activations at the second object's word, after the layer of the ID loss.

    Args:
        model: the model.
        questions: questions about one axis.
        config: the run's settings, resolved.

    Raises:
        OutOfMemoryError: if the memory does not suffice for one question.
    """
    layer = config.id_layer or 0

    def read(part: list[Question], size: int) -> tuple[int, Prompts, Int[np.ndarray, "B"]]:
        asked = [row.spatial for row in padded(part, size)]
        texts = [text_of(question, config.prompt or "plain") for question in asked]
        prompts = model.prepare([question.picture for question in asked], texts)
        return len(part), prompts, config.word(prompts, [(question.subject, question.object) for question in asked])

    def begun(
        opened: tuple[int, Prompts, Int[np.ndarray, "B"]],
    ) -> Callable[[], Float[np.ndarray, "B D"]]:
        count, prompts, word = opened
        found = residuals_at(model, prompts, word[:, None])[layer + 1, :, 0]
        return lambda: np.asarray(complete(found))[:count].astype(np.float32)

    parts = [list(questions[start : start + BATCH]) for start in range(0, len(questions), BATCH)]
    return np.concatenate(list(in_batches(parts, read, begun, np.concatenate)))


def measured(
    model: Model, groups: Sequence[Group], ids: Mapping[str, SpatialIDs], config: FinetuneConfig
) -> dict[str, float]:
    """`geometry` of a model, rounded.

    Args:
        model: the model.
        groups: questions, as from `folders`.
        ids: IDs by name.
        config: the run's settings, resolved.
    """
    rows = [(question, index) for index, group in enumerate(groups) for question in group]
    by_axis = [[row for row in rows if row[0].axis == axis] for axis in ANSWERS]
    asked = [axis for axis in by_axis if axis]
    if not asked:
        return {}
    found = [word_activations(model, [question for question, _ in axis], config) for axis in asked]
    ordered = [row for axis in asked for row in axis]
    cells = [question.item.cell_b for question, _ in ordered]
    result = geometry(
        np.concatenate(found),
        np.array([index for _, index in ordered]),
        np.array([y * GRID + x for x, y in cells]),
        {name: one.universal[config.id_layer or 0] for name, one in ids.items()},
    )
    return {name: round(value, 4) for name, value in result.items()}


def cosines_of(one: SpatialIDs, other: SpatialIDs) -> Float[np.ndarray, "L X Y"]:
    """Cosines between the universal IDs of two models of one shape, by layer and cell."""
    return np.asarray(optax.cosine_similarity(one.universal, other.universal, epsilon=1e-6))
