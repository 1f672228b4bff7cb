"""Fine-tuning on grid scenes with a loss on spatial IDs ([ID] arXiv 2601.12626, section on fine-tuning).

The loss is the cross-entropy of the answer plus a weighted ID loss: one minus the mean cosine between the second
object's activations, less their mean over the batch, and the universal IDs of its cells.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxid import zoo
from jaxid.checkpoints.tensors import flatten, unflatten
from jaxid.checks import Count, Range, check_finite, check_options
from jaxid.data.coco_spatial import ANSWERS
from jaxid.data.grid import GridItem
from jaxid.errors import DataError, InputError
from jaxid.experiments.base import PUBLISHED_SUFFIX
from jaxid.experiments.relations import fill
from jaxid.experiments.session import padded, require_same_model, scaled
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.nn.inputs import Inputs
from jaxid.nn.layers import Recompute
from jaxid.nn.network import Network
from jaxid.nn.sites import Capture, clean
from jaxid.prompts.processor import Prompts
from jaxid.train.loop import Batch, Metrics, Stage
from jaxid.train.placement import Layout, complete, placed_as, shardings
from jaxid.train.trainable import Selection, Trained, choose, for_learning, tensors

QUESTIONS = {
    "horizontal": "Is the {b} to the left or right of the {a}?",
    "vertical": "Is the {b} above or below the {a}?",
}
"""As in the extraction of IDs, the object whose word is read is second in the pair and first in the question."""

PUBLISHED_LAYER = 11
"""The layer after which activations are compared with IDs, of 32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that determines the outcome of a run, besides model, data and IDs.

    Attributes:
        steps: optimiser steps.
        groups: small batches whose gradients a step averages.
        batch_size: pictures of a small batch, which differ only in the second object's cell.
        id_weight: weight of the ID loss; 0 trains on answers alone.
        id_layer: decoder layer after which the second object's word is compared with its ID; as deep as 11 of 32 by
            default.
        learning_rate: peak of the learning rate.
        weight_decay: of AdamW, on all trained tensors.
        warmup: share of the steps in which the learning rate ascends.
        schedule: decay of the learning rate after that, to zero along a line or a cosine; or constant.
        clip_norm: largest norm of the gradient.
        train: kinds of tensors, joined by commas: vision-mlp, projector, lm-attention, ..., all, random.
        vision_blocks: last blocks of the vision tower that may be trained.
        budget: share of all parameters that may be trained.
        recompute: what the backward pass recomputes: nothing, all but products with weights (cheap), or whole blocks.
        held_out: share of the object pairs that training never sees.
        template: the user's text, with {query}, {first}, {second}, {First}, {Second}; the published one by default.
        case: form of the answer that is trained; the one that the published code reads for the model's family by
            default.
        seed: of held-out pairs, the order of the data and random tensors.
    """

    steps: Count = 800
    groups: Count = 2
    batch_size: Count = 12
    id_weight: Annotated[float, Range(0)] = 1.0
    id_layer: Annotated[int, Range(0)] | None = None
    learning_rate: float = 5e-5
    weight_decay: Annotated[float, Range(0)] = 0.01
    warmup: Annotated[float, Range(0)] = 0.03
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_norm: float = 1.0
    train: str = "vision-mlp,projector"
    vision_blocks: Count | None = 6
    budget: Annotated[float, Range(0, 1)] = 0.3
    recompute: Recompute = "cheap"
    held_out: Annotated[float, Range(0)] = 0.15
    template: str | None = None
    case: Literal["lower", "capital"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: naming the option.
        """
        check_options(self)
        if self.batch_size < 2 and self.id_weight:
            raise InputError("the ID loss needs batches of 2 or more: activations are compared with their mean.")
        for name in ("learning_rate", "clip_norm", "budget"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, not {getattr(self, name)}.")
        for name in ("warmup", "held_out"):
            if not getattr(self, name) < 1:
                raise InputError(f"{name} is a share below 1, not {getattr(self, name)}.")
        if self.template is not None and "{query}" not in self.template:
            raise InputError(f"the template {self.template!r} does not contain {{query}}.")


Config = TypeVar("Config", bound=FinetuneConfig)


def resolved(config: Config, model: Model) -> Config:
    """The settings with the model's layer, template and case where none are given.

    Raises:
        InputError: if the model lacks the layer.
    """
    shipped = model.name in zoo.SHIPPED  # shipped models only know plain questions and lower-case answers
    (deep,) = scaled((PUBLISHED_LAYER,), model.num_layers)
    layer = deep if config.id_layer is None else config.id_layer
    if layer >= model.num_layers:
        raise InputError(f"id_layer {layer} is out of range: {model.name} has layers 0..{model.num_layers - 1}.")
    capital = model.processor.case == "capital" and not shipped
    return dataclasses.replace(
        config,
        id_layer=layer,
        template=config.template or ("{query}" if shipped else PUBLISHED_SUFFIX),
        case=config.case or ("capital" if capital else "lower"),
    )


# --- data ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures that differ only in the second object's cell, and the axis that they are asked about."""

    axis: str
    items: tuple[GridItem, ...]


def groups_of(items: Sequence[GridItem]) -> list[Group]:
    """All groups of two or more pictures: same pair, same cell of the first object, a true answer along the axis."""
    found: dict[tuple[str, tuple[int, int], str, str], list[GridItem]] = {}
    for item in items:
        for along, axis in enumerate(QUESTIONS):
            if item.cell_a[along] != item.cell_b[along]:
                found.setdefault((item.object_a, item.cell_a, item.object_b, axis), []).append(item)
    return [Group(axis=key[3], items=tuple(group)) for key, group in sorted(found.items()) if len(group) > 1]


def split_pairs(items: Sequence[GridItem], share: float, seed: int) -> tuple[list[GridItem], list[GridItem]]:
    """Training items, and items of held-out pairs of objects; a pair is held out in both orders.

    Raises:
        DataError: if there are too few pairs to hold out a share of them.
    """
    pairs = sorted({tuple(sorted((item.object_a, item.object_b))) for item in items})
    count = max(round(share * len(pairs)), 1) if share else 0
    if len(pairs) <= count:
        raise DataError(f"the pictures hold {len(pairs)} pairs of objects, too few to hold out {share:.0%} of them.")
    rows = np.random.default_rng((seed, 15)).permutation(len(pairs))[:count]
    held = {pairs[row] for row in rows}
    sides: tuple[list[GridItem], list[GridItem]] = ([], [])
    for item in items:
        sides[tuple(sorted((item.object_a, item.object_b))) in held].append(item)
    return sides


def group_batch(
    model: Model, group: Group, chosen: Sequence[int], ids: SpatialIDs, config: FinetuneConfig
) -> dict[str, PyTree]:
    """Arrays of one small batch.

    Args:
        model: whose processor reads the pictures.
        group: the pictures.
        chosen: which of them; fewer than the batch size are padded with the first one, of weight 0.
        ids: universal IDs of the model.
        config: the run's settings, resolved.

    Returns:
        "inputs": the arrays of `Inputs` by name.
        "positions" and "labels", Int[B, n]: where each token of the answer is read, and its id; -1 past its end.
        "word", Int[B]: position of the second object's word.
        "target", Float[B, D]: ID of that object's cell.
        "weight", Float[B]: 0 for rows of padding.

    Raises:
        PromptError: if a question does not contain a word, or an answer is not in the vocabulary.
    """
    items = padded([group.items[row] for row in chosen], config.batch_size)
    along, words = list(ANSWERS).index(group.axis), ANSWERS[group.axis]
    queries = [QUESTIONS[group.axis].format(a=item.object_a, b=item.object_b) for item in items]
    texts = [fill(config.template or "{query}", query, words) for query in queries]
    prompts = model.prepare([item.picture for item in items], texts)
    form = str.capitalize if config.case == "capital" else str.lower
    tokens = model.processor.answer_tokens([form(word) for word in words])
    answers = [tokens[int(item.cell_b[along] > item.cell_a[along])] for item in items]
    prompts, positions, labels = with_answers(prompts, answers)
    cells = np.array([item.cell_b for item in items])
    return {
        "inputs": arrays_of(prompts.inputs),
        "positions": positions,
        "labels": labels,
        "word": prompts.words([(item.object_b, item.object_a) for item in items])[:, 0],
        "target": np.asarray(ids.universal)[config.id_layer, cells[:, 0], cells[:, 1]],
        "weight": (np.arange(len(items)) < len(chosen)).astype(np.float32),
    }


def with_answers(
    prompts: Prompts, answers: Sequence[Sequence[int]]
) -> tuple[Prompts, Int[np.ndarray, "B n"], Int[np.ndarray, "B n"]]:
    """Prompts continued by all but the last token of their answers; where each token is read, and its id or -1."""
    longest = max(map(len, answers))
    lengths = np.array([len(answer) for answer in answers])
    labels = np.array([[*answer, *[-1] * (longest - len(answer))] for answer in answers], np.int32)
    positions = prompts.last()[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
    if longest > 1:
        prompts = prompts.extended(np.maximum(labels[:, :-1], 0), lengths - 1)
    return prompts, positions.astype(np.int32), labels


def step_batch(model: Model, groups: Sequence[Group], ids: SpatialIDs, config: FinetuneConfig, step: int) -> Batch:
    """The small batches of a step, stacked; a pure function of seed and step, so that a resumed run sees the same."""
    rng = np.random.default_rng((config.seed, step))
    parts = []
    for row in rng.choice(len(groups), config.groups, replace=len(groups) < config.groups):
        group = groups[row]
        size = min(config.batch_size, len(group.items))
        parts.append(group_batch(model, group, rng.permutation(len(group.items))[:size].tolist(), ids, config))
    longest = max(part["inputs"]["token_ids"].shape[1] for part in parts)
    for part in parts:
        part["inputs"] = lengthened(part["inputs"], -(-longest // 16) * 16)
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(part)) for part in parts}
    if len(shapes) > 1:
        raise InputError("the small batches of a step have pictures of different sizes; use pictures of one size.")
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def arrays_of(inputs: Inputs) -> dict[str, PyTree]:
    """The arrays of `Inputs` by name."""
    fields = dataclasses.fields(inputs)
    return {field.name: getattr(inputs, field.name) for field in fields if not field.metadata.get("static")}


def lengthened(inputs: Mapping[str, PyTree], tokens: int) -> dict[str, PyTree]:
    """The arrays of `Inputs`, padded to a number of tokens."""
    count, length = inputs["token_ids"].shape

    def longer(values: np.ndarray, padding: int) -> np.ndarray:
        widths = [(0, 0)] * (values.ndim - 1) + [(0, tokens - length)]
        return np.pad(np.asarray(values), widths, constant_values=padding)

    rope = inputs["rope_positions"]
    return {
        **inputs,
        "token_ids": longer(inputs["token_ids"], 0),
        "positions": np.tile(np.arange(tokens, dtype=np.int32), (count, 1)),
        "valid": longer(inputs["valid"], 0),
        "image_rows": longer(inputs["image_rows"], -1),
        "rope_positions": None if rope is None else longer(rope, 0),
    }


# --- loss ------------------------------------------------------------------------------------------------------------


def id_loss(
    activations: Float[Array, "B D"], targets: Float[Array, "B D"], weight: Float[Array, "B"]
) -> Float[Array, ""]:
    """One minus the mean cosine between activations, less their mean, and the IDs of their cells.

    Args:
        activations: activations at the second object's word, after one layer.
        targets: IDs of the cells.
        weight: 0 for rows of padding.
    """
    activations, total = activations.astype(jnp.float32), weight.sum()
    centred = activations - (activations * weight[:, None]).sum(axis=0) / total
    # In a batch of equal rows all lengths are zero, where only the clipped ones have a finite gradient.
    cosines = optax.cosine_similarity(centred, targets, epsilon=1e-6)
    return 1 - (cosines * weight).sum() / total


def answer_loss(
    logits: Float[Array, "B n V"], labels: Int[Array, "B n"], weight: Float[Array, "B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy over the answers' tokens, and the share of answers whose first token is the most probable."""
    counted = jnp.where(labels >= 0, weight[:, None], 0.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.maximum(labels, 0))
    hits = jnp.where(jnp.argmax(logits[:, 0], axis=-1) == labels[:, 0], weight, 0.0)
    return (losses * counted).sum() / counted.sum(), hits.sum() / weight.sum()


def loss(
    definition: nnx.GraphDef[Network], parameters: PyTree, batch: Batch, *, id_layer: int, id_weight: float
) -> tuple[Float[Array, ""], Metrics]:
    """The whole loss of a small batch and its parts, see above; the arrays are those of `group_batch`."""
    network = nnx.merge(definition, nnx.State(parameters))
    capture = Capture(("resid_post",), positions=batch["word"][:, None])
    output = network(Inputs(**batch["inputs"]), clean, capture, batch["positions"])
    matrix = network.decoder.unembed_matrix()
    logits = jnp.einsum("bnd,dv->bnv", output.hidden, matrix, preferred_element_type=jnp.float32)
    answer, accuracy = answer_loss(logits, batch["labels"], batch["weight"])
    identity = id_loss(output.captured["resid_post"][id_layer][:, 0], batch["target"], batch["weight"])
    total = answer + id_weight * identity if id_weight else answer
    return total, {"loss": total, "answer_loss": answer, "id_loss": identity, "accuracy": accuracy}


# --- training --------------------------------------------------------------------------------------------------------


def learning_rates(config: FinetuneConfig) -> optax.Schedule:
    """The learning rate of a step, counted from 0: a linear warm-up, then the schedule."""
    peak, warmup = config.learning_rate, math.ceil(config.warmup * config.steps)
    rest = max(1, config.steps - warmup)
    schedules = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }
    ascending = optax.linear_schedule(peak / max(1, warmup), peak, warmup - 1)
    return optax.join_schedules([ascending, schedules[config.schedule]], [warmup])


def optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    """AdamW on clipped gradients."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rates(config), weight_decay=config.weight_decay),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A run, ready to be trained.

    Attributes:
        model: the model that it begins with.
        selection: the trained tensors.
        definition: the network's structure, for training.
        groups: the training data.
        config: the settings, resolved.
        ids: the model's universal IDs.
        sparing: like `definition`, with everything recomputed; None if that is so already.
    """

    model: Model
    selection: Selection
    definition: nnx.GraphDef[Network]
    groups: tuple[Group, ...]
    config: FinetuneConfig
    ids: SpatialIDs
    sparing: nnx.GraphDef[Network] | None = None

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        shapes = jax.eval_shape(self.selection.split, self.model.parameters)
        return sum(leaf.size for leaf in shapes.values())

    def stage(self) -> Stage:
        """The whole run as one stage of `jaxid.train.loop`, whose parameters are the trained tensors only."""
        layer, weight = cast(int, self.config.id_layer), self.config.id_weight

        def of_trained(definition: nnx.GraphDef[Network], trained: Trained, batch: Batch) -> tuple[Array, Metrics]:
            parameters = self.selection.merge(batch["frozen"], trained)
            return loss(definition, parameters, batch, id_layer=layer, id_weight=weight)

        return Stage(
            name="fine-tuning",
            first=0,
            steps=self.config.steps,
            loss=partial(of_trained, self.definition),
            batch=lambda step: step_batch(self.model, self.groups, self.ids, self.config, step),
            optimizer=optimizer(self.config),
            constants={"frozen": self.model.parameters},
            accumulate=True,
            sparing=None if self.sparing is None else partial(of_trained, self.sparing),
        )

    @property
    def layout(self) -> Layout:
        """Where the model's parameters, and with them the trained tensors, lie on its mesh; empty without one."""
        return shardings(self.model.parameters)

    def initial(self) -> Trained:
        """The trained tensors that the run begins with, in host memory."""
        return complete(self.selection.split(self.model.parameters))

    def finished(self, trained: Trained) -> Model:
        """The model with the trained tensors in place, all of which are in host memory; all processes call this."""
        parameters = flatten(self.model_with(trained).parameters)
        own = {path: complete(parameters[path]) for path, _ in self.selection.rows}
        return self.model.with_parameters(unflatten({**parameters, **own}))

    def model_with(self, trained: Trained) -> Model:
        """The model with the trained tensors in place."""
        parameters = self.selection.merge(self.model.parameters, trained)
        return self.model.with_parameters(placed_as(parameters, self.layout))


def select(model: Model, config: FinetuneConfig) -> Selection:
    """The trained tensors of a model, whose parameters may be shapes only.

    Raises:
        InputError: for an unknown kind of tensors, or if none fits the budget.
    """
    every = tensors(model.parameters, tied=model.config.text_config.tie_word_embeddings)
    kinds = [kind.strip() for kind in config.train.split(",")]
    found = choose(every, kinds, budget=config.budget, vision_blocks=config.vision_blocks, seed=config.seed)
    return Selection.of(found)


def task(model: Model, items: Sequence[GridItem], ids: SpatialIDs, config: FinetuneConfig) -> Task:
    """Selects the trained tensors and groups the data.

    Args:
        model: the model that the run begins with.
        items: training pictures.
        ids: the model's universal IDs.
        config: the settings.

    Raises:
        InputError: if no tensor fits the budget, the layer is out of range, or the IDs are another model's.
        DataError: if no two pictures differ only in the second object's cell.
    """
    config = resolved(config, model)
    if config.id_weight:
        require_same_model(model, ids)
    selection, groups = select(model, config), groups_of(items)
    if not groups:
        raise DataError("no two pictures show the same pair with the first object in one cell: nothing to train on.")
    if config.id_weight:
        check_finite(f"the universal IDs of layer {config.id_layer}", np.asarray(ids.universal)[config.id_layer])
    learning = partial(for_learning, model.definition, model.parameters, selection)
    return Task(
        model=model,
        selection=selection,
        definition=learning(recompute=config.recompute),
        groups=tuple(groups),
        config=config,
        ids=ids,
        sparing=None if config.recompute == "all" else learning(recompute="all"),
    )
