"""The demo's runs as a page shows them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from jaxid.data.coco_spatial import SpatialItem
from jaxid.experiments.activation_swap import TOKEN_SETS, Patched
from jaxid.experiments.belief_swap import Swapped
from jaxid.experiments.compare import CONDITIONS
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.steering import CELLS, Steered
from jaxid.experiments.viewing import items_of, plane_of
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.viewer.content import Item, Run, Value


def swap_run(
    model: Model,
    items: Mapping[str, Sequence[SpatialItem]],
    batches: Mapping[str, RelationBatch],
    found: Mapping[str, Swapped],
    ids: SpatialIDs,
) -> Run:
    """The belief swap of both axes."""
    one = next(iter(found.values()))
    # The true answer first, so that effects have one sign and their mean says something.
    order = {axis: np.stack([own.truth, 1 - own.truth], axis=-1) for axis, own in found.items()}
    shown = [
        dataclasses.replace(item, words=(item.words[item.truth], item.words[1 - item.truth]), truth=0)
        for axis in found
        for item in _items(model, items[axis], batches[axis])
    ]
    before = [np.take_along_axis(own.control, order[axis], -1)[:, None, None, None] for axis, own in found.items()]
    after = [
        np.take_along_axis(np.moveaxis(own.steered, 3, 0), order[axis][:, None, None, None], -1)
        for axis, own in found.items()
    ]
    return Run(
        title="belief swap",
        about={"model": model.name, "items": str(sum(map(len, items.values())))},
        items=shown,
        axes={"condition": CONDITIONS, "layer": one.layers.tolist(), "strength": one.strengths.tolist()},
        before=np.concatenate(before),
        after=np.concatenate(after),
        values=[
            Value(
                name="belief swapped (1) or kept (0)",
                values=np.concatenate([np.moveaxis(own.swapped, 3, 0) for own in found.values()]).astype(np.float32),
                signed=False,
            )
        ],
        plane=plane_of(ids),
    )


def steering_run(
    model: Model, items: Sequence[SpatialItem], batch: RelationBatch, found: Steered, strength: float, ids: SpatialIDs
) -> Run:
    """Subjects steered to every cell."""
    return Run(
        title=f"steering · {'/'.join(batch.answers)}",
        about={"model": model.name, "items": str(len(items)), "strength": f"{strength:g}"},
        items=_items(model, items, batch, words=1),
        axes={"layer": range(model.num_layers), **CELLS},
        before=found.control[:, None, None, None],
        after=np.moveaxis(found.steered, 3, 0),
        plane=plane_of(ids),
    )


def mirror_run(model: Model, items: Sequence[SpatialItem], batch: RelationBatch, found: Patched) -> Run:
    """Activations of mirrored pictures swapped in."""
    scores = np.moveaxis(np.stack(list(found.scores.values())), 2, 0)
    prompts = batch.prompts
    sets = (prompts.image_tokens(), prompts.text_tokens(), batch.words[:, :2])
    edited: dict[str, Int[np.ndarray, "B P"]] = dict(zip(TOKEN_SETS, sets, strict=True))
    return Run(
        title="mirror swap",
        about={"model": model.name, "items": str(len(items))},
        items=items_of(model, batch, [item.key for item in items], [item.picture for item in items], edited),
        axes={"tokens": TOKEN_SETS, "layer": found.layers.tolist()},
        before=found.control[:, None, None],
        after=np.moveaxis(found.patched, 2, 0),
        values=[
            Value(name=f"swap score: 0 as without a swap, 1 as for the mirrored picture; {word}", values=scores[..., k])
            for k, word in enumerate(batch.answers)
        ],
    )


def _items(model: Model, items: Sequence[SpatialItem], batch: RelationBatch, words: int = 2) -> list[Item]:
    keys, pictures = [item.key for item in items], [item.picture for item in items]
    return items_of(model, batch, keys, pictures, {"": batch.words[:, :words]})
