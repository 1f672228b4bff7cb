"""Fine-tuning on grid scenes with a loss on spatial IDs ([ID] arXiv 2601.12626, section on fine-tuning).

The loss is the cross-entropy of the answer plus a weighted ID loss: one minus the mean cosine between the second
object's activations, less their mean over the batch, and the universal IDs of its cells.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal, TypeVar, cast

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
from jaxid.experiments.finetune_data import (
    Group,
    Question,
    arrays_of,
    groups_by,
    lengthened,
    placed,
    questions_of,
    split_pairs,
    text_of,
    with_answers,
)
from jaxid.experiments.finetune_evaluation import by_probability
from jaxid.experiments.published import PICTURE, check_prompt, is_raw
from jaxid.experiments.session import of_same_model, padded, require_same_shape
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.nn.inputs import Inputs
from jaxid.nn.layers import Recompute
from jaxid.nn.network import Network
from jaxid.nn.sites import Capture, clean
from jaxid.prompts.processor import Processor, Prompts
from jaxid.train.loop import Batch, Metrics, Stage
from jaxid.train.placement import Layout, complete, placed_as, shardings
from jaxid.train.trainable import Selection, Tensor, Trained, choose, for_learning, tensors

PUBLISHED_LAYER, PUBLISHED_LAYERS = 10, 28
"""The layer after which activations are compared with IDs, Hugging Face's hidden state 11; of Qwen2-VL-2B's layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that determines the outcome of a run, besides model, data and IDs.

    Attributes:
        steps: optimiser steps.
        groups: small batches whose gradients a step averages; 2 by default, with the bugs 1.
        batch_size: most questions in a small batch; their pictures differ only in the second object's cell.
        id_weight: weight of the ID loss; 0 trains on answers alone.
        id_layer: decoder layer after which the second object's word is compared with its ID; as deep as 10 of 28 by
            default, with the bugs always 10.
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
        prompt: published, plain (the query alone), or your own text with {query}, {first}, {second}, {First}, {Second}.
            Shipped models are asked plain questions by default, others the published ones.
        case: form of the answer that is trained; by default the one that the published code reads for the model's
            family, with the bugs lower.
        seed: of held-out pairs, the order of the data and random tensors.
        reference_bugs: reproduce the conventions and bugs of the published code.
    """

    default_groups: ClassVar[int] = 2
    answered = staticmethod(by_probability)
    """How an evaluation reads answers."""

    steps: Count = 800
    groups: Count | None = None
    batch_size: Count = 16
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
    prompt: str | None = None
    case: Literal["lower", "capital"] | None = None
    seed: int = 0
    reference_bugs: bool = False

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
        check_prompt(self.prompt)
        if is_raw(self.prompt or ""):
            raise InputError(f"fine-tuning asks in the chat template: leave out {PICTURE} of the prompt.")

    def default_layer(self, model: Model) -> int:
        """The layer of the ID loss."""
        return min(model.num_layers - 1, round(PUBLISHED_LAYER * model.num_layers / PUBLISHED_LAYERS))

    def default_case(self, model: Model) -> Literal["lower", "capital"]:
        """The form of the answer; shipped models only know lower-case ones."""
        return "capital" if model.processor.case == "capital" and model.name not in zoo.SHIPPED else "lower"

    def split(self, items: Sequence[GridItem]) -> tuple[list[GridItem], list[GridItem]]:
        """Training items, and items of held-out pairs of objects."""
        return split_pairs(items, self.held_out, self.seed)

    def grouped(self, items: Sequence[GridItem]) -> list[Group]:
        """Groups of two or more questions about the same axis, pair and cell of the first object."""
        groups = groups_by(questions_of(items), lambda question: (*placed(question), question.axis))
        return [group for group in groups if len(group) > 1]

    def drawn(self, groups: Sequence[Group], step: int) -> list[Group]:
        """The small batches of a step; a pure function of seed and step, so that a resumed run sees the same."""
        rng, count, found = np.random.default_rng((self.seed, step)), self.groups or self.default_groups, []
        for row in rng.choice(len(groups), count, replace=len(groups) < count):
            order = rng.permutation(len(groups[row]))[: self.batch_size]
            found.append(tuple(groups[row][index] for index in order))
        return found

    def word(self, prompts: Prompts, names: Sequence[tuple[str, str]]) -> Int[np.ndarray, "B"]:
        """Position of the second object's word, whose activations the ID loss compares."""
        return prompts.words(names)[:, 1]

    def answer_tokens(self, processor: Processor, words: Sequence[str]) -> list[list[int]]:
        """The tokens that are trained, for each answer word."""
        return processor.answer_tokens(words)

    def may_train(self, tensor: Tensor) -> bool:
        """Whether selectors may choose a tensor."""
        return True

    def learning_rates(self) -> optax.Schedule:
        """The learning rate of a step, counted from 0: a linear warm-up, then the schedule."""
        warmup = math.ceil(self.warmup * self.steps)
        peak = self.learning_rate
        return self.after(optax.linear_schedule(peak / max(1, warmup), peak, warmup - 1), warmup)

    def after(self, ascending: optax.Schedule, warmup: int) -> optax.Schedule:
        """A warm-up of so many steps, then the schedule."""
        peak, rest = self.learning_rate, max(1, self.steps - warmup)
        schedules = {
            "linear": optax.linear_schedule(peak, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(peak, rest),
            "constant": optax.constant_schedule(peak),
        }
        return optax.join_schedules([ascending, schedules[self.schedule]], [warmup])


Config = TypeVar("Config", bound=FinetuneConfig)


def resolved(config: Config, model: Model) -> Config:
    """The settings with the model's layer, prompt and case, and the number of groups, where none are given.

    Raises:
        InputError: if the model lacks the layer.
    """
    layer = config.default_layer(model) if config.id_layer is None else config.id_layer
    if layer >= model.num_layers:
        raise InputError(f"id_layer {layer} is out of range: {model.name} has layers 0..{model.num_layers - 1}.")
    return dataclasses.replace(
        config,
        groups=config.groups or config.default_groups,
        id_layer=layer,
        prompt=config.prompt or ("plain" if model.name in zoo.SHIPPED else "published"),
        case=config.case or config.default_case(model),
    )


# --- batches ---------------------------------------------------------------------------------------------------------


def small_batch(
    model: Model, questions: Sequence[Question], ids: SpatialIDs, config: FinetuneConfig, size: int
) -> dict[str, PyTree]:
    """Arrays of one small batch.

    Args:
        model: whose processor reads the pictures.
        questions: the questions; they are padded with the first one, of weight 0.
        ids: universal IDs of the model.
        config: the run's settings, resolved.
        size: number of rows, B.

    Returns:
        "inputs": the arrays of `Inputs` by name.
        "positions" and "labels", Int[B, n]: where each token of the answer is read, and its id; -1 past its end.
        "word", Int[B]: position of the second object's word.
        "target", Float[B, D]: ID of that object's cell.
        "weight", Float[B]: 0 for rows of padding.

    Raises:
        PromptError: if a question does not contain a word, or an answer is not in the vocabulary.
    """
    rows = padded(list(questions), size)
    asked, form = [row.spatial for row in rows], str.capitalize if config.case == "capital" else str.lower
    texts = [text_of(question, config.prompt or "plain") for question in asked]
    prompts = model.prepare([question.picture for question in asked], texts)
    words = [word for axis in dict.fromkeys(row.axis for row in rows) for word in ANSWERS[axis]]
    tokens = dict(zip(words, config.answer_tokens(model.processor, [form(word) for word in words]), strict=True))
    names = [(question.subject, question.object) for question in asked]
    word = config.word(prompts, names)
    prompts, positions, labels = with_answers(prompts, [tokens[question.relation] for question in asked])
    cells = np.array([row.item.cell_b for row in rows])
    return {
        "inputs": arrays_of(prompts.inputs),
        "positions": positions,
        "labels": labels,
        "word": word,
        "target": np.asarray(ids.universal)[config.id_layer, cells[:, 0], cells[:, 1]],
        "weight": (np.arange(len(rows)) < len(questions)).astype(np.float32),
    }


def rows_of(groups: Sequence[Group], config: FinetuneConfig) -> int:
    """The number of rows of every small batch."""
    return min(config.batch_size, max(map(len, groups)))


def step_batch(model: Model, groups: Sequence[Group], ids: SpatialIDs, config: FinetuneConfig, step: int) -> Batch:
    """The small batches of a step, stacked."""
    size = rows_of(groups, config)
    parts = [small_batch(model, questions, ids, config, size) for questions in config.drawn(groups, step)]
    tokens = max(part["inputs"]["token_ids"].shape[1] for part in parts)
    answers = max(part["labels"].shape[1] for part in parts)
    for part in parts:
        part["inputs"] = lengthened(part["inputs"], tokens)
        further = [(0, 0), (0, answers - part["labels"].shape[1])]
        part["labels"] = np.pad(part["labels"], further, constant_values=-1)
        part["positions"] = np.pad(part["positions"], further, mode="edge")
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(part)) for part in parts}
    if len(shapes) > 1:
        raise InputError("the small batches of a step have pictures of different sizes; use pictures of one size.")
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


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


def optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    """AdamW on clipped gradients."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(config.learning_rates(), weight_decay=config.weight_decay),
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
    found = choose(
        tensors(model.parameters, tied=model.config.text_config.tie_word_embeddings),
        [kind.strip() for kind in config.train.split(",")],
        budget=config.budget,
        vision_blocks=config.vision_blocks,
        seed=config.seed,
        among=config.may_train,
    )
    return Selection.of(found)


def task(
    model: Model, items: Sequence[GridItem], ids: SpatialIDs, config: FinetuneConfig, *, foreign: bool = False
) -> Task:
    """Selects the trained tensors and groups the data.

    Args:
        model: the model that the run begins with.
        items: training pictures.
        ids: the model's universal IDs.
        config: the settings.
        foreign: the ID loss may take IDs of another model.

    Raises:
        InputError: if no tensor fits the budget, the layer is out of range, or the IDs are another model's.
        DataError: if no two pictures differ only in the second object's cell.
    """
    config = resolved(config, model)
    require_same_shape(model, ids)
    if config.id_weight and not foreign and not of_same_model(model, ids):
        raise InputError(
            f"the IDs were extracted from {ids.model} ({ids.fingerprint}), not from {model.name} "
            f"({model.fingerprint}); extract them again with jaxid ids extract, or give --ids-from-another-model if "
            "that is meant."
        )
    selection, groups = select(model, config), config.grouped(items)
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
