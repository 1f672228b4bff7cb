"""The tasks of the benchmark, which every system performs on the same prompts, vectors and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:  # this module is imported before JAX and PyTorch may be, see `timing.use_cpus`
    import published
    import torch

    from jaxid.experiments.relations import RelationBatch
    from jaxid.families.base import Model
    from jaxid.ids.spatial import SpatialIDs

SEED = 0
SUBSET = 6
"""Number of edits on which systems that make full passes are timed: each edit costs them the same."""

CLIP_SUBSET = 3
"""The same for clips, whose passes take long: one edit of every token set."""

CLIP_QUESTION = (
    "In this video, two objects appear at different times. Does the {} come before or after the {}? Answer in one word."
)
"""The published question about synthetic clips."""

SWAPS = ("swaps", "temporal_swap")
"""Tasks that replace activations by those of a changed picture, or of a clip played backwards."""

Edits = Mapping[str, "Sequence[published.Edit] | Sequence[published.Swap]"]
"""Edits of a sweep by task."""

Found = Mapping[str, Float[np.ndarray, "..."]]
"""Results of a system by quantity; "edited" has a leading axis of edits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One system's way of doing a task.

    Attributes:
        call: does the task, and returns once the result is ready.
        edits: indices of the edits that it does; None for all of them.
    """

    call: Callable[[], Found]
    edits: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A task that every system does on the same prompts.

    Attributes:
        name: name of the task.
        edits: number of edits per prompt.
        prompts: number of prompts.
        systems: the systems by name.
        flops: floating-point operations per prompt, of jaxid and of the published procedure.
    """

    name: str
    edits: int
    prompts: int
    systems: Mapping[str, System]
    flops: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model with its prompts, for all systems."""

    model: Model
    folder: Path
    batch: RelationBatch
    mirrored: RelationBatch  # the same questions about mirrored pictures, or about clips played backwards
    ids: SpatialIDs | None  # None for clips
    torch_batch: published.Batch
    torch_other: torch.Tensor  # pixels of the mirrored pictures, or of the clips played backwards

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self.batch.prompts)


def setting(model: Model, folder: Path, count: int) -> Setting:
    """Random pictures and random IDs; their content does not affect times."""
    from jaxid.data.objects import OBJECTS
    from jaxid.experiments.relations import ANSWERS, prepare_questions

    rng = np.random.default_rng(SEED)
    side = model.config.vision_config.image_size
    pairs = [tuple(OBJECTS[index] for index in rng.permutation(len(OBJECTS))[:2]) for _ in range(count)]
    pictures = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    questions = [f"Is the {subject} to the left or right of the {other}?" for subject, other in pairs]
    batches = [
        prepare_questions(
            model,
            list(shown),
            questions,
            pairs,
            axis="horizontal",
            answers=ANSWERS["horizontal"],
            truth=[row % 2 for row in range(count)],
        )
        for shown in (pictures, pictures[:, :, ::-1])
    ]
    return _setting(model, folder, batches, _random_ids(model, batches[0]))


def _setting(model: Model, folder: Path, batches: Sequence[RelationBatch], ids: SpatialIDs | None) -> Setting:
    """The setting of two prepared batches; the pixels of clips get an axis of frames."""
    import published
    import torch

    inputs = batches[0].prompts.inputs
    length = int(inputs.last.max()) + 1
    pixels = [torch.from_numpy(batch.prompts.inputs.pixels) for batch in batches]
    if is_video(model):
        pixels = [values.unflatten(0, (len(inputs.last), -1)) for values in pixels]
    torch_batch = published.Batch(
        token_ids=torch.from_numpy(inputs.token_ids[:, :length].astype(np.int64)),
        valid=torch.from_numpy(inputs.valid[:, :length].astype(np.int64)),
        pixels=pixels[0],
        last=torch.from_numpy(inputs.last.astype(np.int64)),
        answers=torch.from_numpy(model.processor.answer_ids(batches[0].answers).astype(np.int64)),
    )
    return Setting(
        model=model,
        folder=folder,
        batch=batches[0],
        mirrored=batches[1],
        ids=ids,
        torch_batch=torch_batch,
        torch_other=pixels[1],
    )


def is_video(model: Model) -> bool:
    """Whether a model reads clips."""
    return hasattr(model.config, "mm_newline_position")


def clip_setting(model: Model, folder: Path, count: int, frames: int = 8) -> Setting:
    """Clips of random frames, the same clips played backwards, and the published question."""
    from jaxid.data.scenes import OBJECTS
    from jaxid.data.videos import time_text
    from jaxid.experiments.relations import prepare_questions
    from jaxid.prompts.pictures import Clip

    rng = np.random.default_rng(SEED)
    side = model.config.vision_config.image_size
    pairs = [tuple(OBJECTS[index] for index in rng.permutation(len(OBJECTS))[:2]) for _ in range(count)]
    times = tuple(np.linspace(0, frames - 1, frames).tolist())
    clips = [
        Clip(list(rng.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)), times, float(frames))
        for _ in range(count)
    ]
    questions = [f"{time_text(clips[0])}\n{CLIP_QUESTION.format(*pair)}" for pair in pairs]
    batches = [
        prepare_questions(
            model,
            list(shown),
            questions,
            pairs,
            axis="time",
            answers=["before", "after"],
            truth=[row % 2 for row in range(count)],
        )
        for shown in (clips, [clip.reversed() for clip in clips])
    ]
    return _setting(model, folder, batches, None)


def _random_ids(model: Model, batch: RelationBatch) -> SpatialIDs:
    """IDs in random directions, with the mean norm of the words' activations at each layer."""
    from jaxid.data.grid import CELL_SIZE, GRID
    from jaxid.ids.spatial import SpatialIDs
    from jaxid.interp.trace import trace

    lengths = np.linalg.norm(trace(model, batch.prompts).at(batch.words)[1:], axis=-1).mean(axis=(1, 2))
    shape = (model.num_layers, 1, 1, GRID, GRID, model.width)
    values = np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)
    values *= lengths.reshape(-1, 1, 1, 1, 1, 1) / np.linalg.norm(values, axis=-1, keepdims=True)
    return SpatialIDs(
        values=values,
        counts=np.ones(shape[1:-1], np.int32),
        objects=("random",),
        sizes=(CELL_SIZE,),
        layer_names=tuple(f"blocks.{layer}.resid_post" for layer in range(model.num_layers)),
        model=model.name,
    )


def steering_layers(model: Model) -> list[int]:
    """Three layers at the relative depth of the published ones, 12 to 14 of 32."""
    first = max(0, min(12 * model.num_layers // 32, model.num_layers - 3))
    return list(range(model.num_layers))[first : first + 3]


def jaxid_calls(work: Setting) -> dict[str, Callable[[], Found]]:
    """The tasks as jaxid's experiments do them."""
    from jaxid.experiments import activation_swap, belief_swap, steering
    from jaxid.ids.extract import activations_at
    from jaxid.interp.trace import trace

    model, batch, count, ids = work.model, work.batch, work.count, work.ids
    words = [batch.prompts.questions[row].split()[2] for row in range(count)]

    def control() -> Found:
        return {"control": np.asarray(trace(model, batch.prompts).logprobs(batch.answers))}

    def steer() -> Found:
        assert ids is not None
        found = steering.steer_to_cells(model, batch, ids, layers=steering_layers(model), strength=1.0)
        return {"control": found.control, "edited": found.steered.reshape(-1, count, 2)}

    def swap_beliefs() -> Found:
        layers = range(model.num_layers)
        assert ids is not None
        found = belief_swap.swap_beliefs(model, batch, ids, layers=layers, strengths=(1.0,), seed=SEED)
        return {"control": found.control, "edited": found.steered.reshape(-1, count, 2)}

    def swap_activations() -> Found:
        found = activation_swap.swap_activations(model, batch, work.mirrored.prompts)
        return {
            "control": found.control,
            "intervened": found.intervened,
            "edited": found.patched.reshape(-1, count, 2),
        }

    def extract() -> Found:
        return {"states": activations_at(model, batch.prompts, batch.prompts.word(words))}

    return {
        "control": control,
        "steering": steer,
        "belief_swap": swap_beliefs,
        "swaps": swap_activations,
        "temporal_swap": swap_activations,
        "extraction": extract,
    }


def _swaps(work: Setting) -> list[published.Swap]:
    """Each token set at every layer."""
    import published
    import torch

    prompts = work.batch.prompts
    return [
        published.Swap(layer=layer, positions=torch.from_numpy(positions.astype(np.int64)))
        for positions in (prompts.image_tokens(), prompts.text_tokens(), work.batch.words[:, :2])
        for layer in range(work.model.num_layers)
    ]


def torch_edits(work: Setting) -> Edits:
    """The tasks' edits for PyTorch, in jaxid's order."""
    import published
    import torch

    from jaxid.experiments import belief_swap, steering

    model, batch, count = work.model, work.batch, work.count
    if is_video(model):
        return {"temporal_swap": _swaps(work)}
    assert work.ids is not None
    at = torch.from_numpy(batch.words.astype(np.int64))
    layers = steering_layers(model)
    pushes = np.asarray(steering.cell_vectors(work.ids, "horizontal", layers))
    steering_edits = [
        published.Edit(
            layer=layer, positions=at[:, :1], vectors=torch.from_numpy(np.tile(pushes[row, x, y], (count, 1, 1)))
        )
        for row, layer in enumerate(layers)
        for x in range(4)
        for y in range(4)
    ]
    # The beliefs of PyTorch's own control run, and the published directions, computed independently of jaxid.
    believed = published.control_batched(published.load(work.folder), work.torch_batch).argmax(axis=-1)
    universal = np.asarray(work.ids.universal)
    toward_left = universal[:, 0, 0] - universal[:, 3, 0]
    subject = toward_left[:, None] * np.where(believed == 1, 1, -1).astype(np.float32)[None, :, None]
    ids = np.stack([subject, -subject], axis=2)
    noise = np.asarray(belief_swap.noise(SEED, np.arange(count), model.num_layers, model.width))
    belief_edits = [
        published.Edit(layer=layer, positions=at, vectors=torch.from_numpy(vectors[layer].copy()), strength=1.0)
        for vectors in (ids, noise)
        for layer in range(model.num_layers)
    ]
    return {"steering": steering_edits, "belief_swap": belief_edits, "swaps": _swaps(work)}


def spread(edits: int, count: int = SUBSET) -> list[int]:
    """Evenly spaced indices of edits, from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, edits - 1, min(count, edits))})


def torch_calls(
    module: ModuleType | SimpleNamespace, network: object, work: Setting, edits: Edits, subset: bool
) -> dict[str, tuple[Callable[[], Found], Sequence[int] | None]]:
    """The tasks as a module of PyTorch procedures does them, and the indices of the edits that it does."""
    import torch

    batch, other = work.torch_batch, work.torch_other
    asked = torch.from_numpy(work.batch.words[:, 0].astype(np.int64))
    calls: dict[str, tuple[Callable[[], Found], Sequence[int] | None]] = {
        "control": (lambda: {"control": module.control(network, batch)}, None),
        "extraction": (lambda: {"states": module.extract(network, batch, asked)}, None),
    }
    for name in edits:
        count = CLIP_SUBSET if is_video(work.model) else SUBSET
        chosen = spread(len(edits[name]), count) if subset else list(range(len(edits[name])))
        some = [edits[name][index] for index in chosen]

        def edited(some: Sequence[Any] = some) -> Found:
            control, found = module.steer(network, batch, some)
            return {"control": control, "edited": found}

        def swapped(some: Sequence[Any] = some) -> Found:
            found = module.swap(network, batch, other, some)
            return {"control": found.control, "intervened": found.intervened, "edited": found.patched}

        calls[name] = (swapped if name in SWAPS else edited, chosen if subset else None)
    return calls
