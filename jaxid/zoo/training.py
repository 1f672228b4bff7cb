"""Training of tiny-llava."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxid.checkpoints.loading import load
from jaxid.data.scenes import COLORS, OBJECTS
from jaxid.families.llava import Llava
from jaxid.io import write_json
from jaxid.kernels import masks
from jaxid.nn.decoder import Decoder
from jaxid.nn.layers import Linear
from jaxid.nn.passes import forward
from jaxid.nn.sites import Capture, clean
from jaxid.train.loop import Metrics, Stage
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.export import write_llava
from jaxid.zoo.llava_texts import VOCABULARY, near_cells, targets
from jaxid.zoo.packing import Layout
from jaxid.zoo.recipes import Recipe, RecipeConfig, Weak, balanced_cross_entropy, begin, cross_entropy, in_turn
from jaxid.zoo.sampling import normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RecipeConfig):
    """Everything that decides the outcome of a training run."""

    sight_steps: int = 2200  # length of the first stage, in which the model learns to see
    sight_batch_size: int = 128  # pictures per step of the first stage
    sight_learning_rate: float = 2e-3  # peak of the first stage
    binding_steps: int = 400  # length of the second stage, on captions
    binding_batch_size: int = 64  # pictures per step of the second stage
    steps: int = 1700  # length of the third stage, on questions and captions
    batch_size: int = 40  # pictures per step of the third stage
    learning_rate: float = 1.5e-3  # peak of the second and the third stage
    weak_share: float = 0.65  # share of relations that a weaker model knows, for fine-tuning experiments
    warmup_steps: int = 100
    weight_decay: float = 0.02
    patch_weight: float = 0.3  # weight of the auxiliary loss on the picture's tokens
    blur: float = 0.7  # standard deviation of the target distributions over columns and rows, in cells


PATCH_CLASSES = (len(OBJECTS) + 1, 4, 4, len(COLORS), 2, recipe.SIZES)
"""Number of classes of the auxiliary head's labels: object, column, row, colour, overlap, size."""

SEEING_LAYERS = 3
"""The auxiliary head reads the picture's tokens after this many decoder layers.

The tower is shallow on purpose. As in large models, pictures are then understood in the decoder's first layers, and
words can receive their objects' places only in the middle ones.
"""


class Learner(nnx.Module):
    """The network with the auxiliary head that training adds."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Initialises all parameters."""
        config = recipe.config()
        self.network = Llava(config, rngs=rngs)
        self.patch_head = Linear(config.text_config.hidden_size, sum(PATCH_CLASSES), bias=True, rngs=rngs)


def _patch_loss(
    learner: Learner, tokens: Float[Array, "N I D"], patches: Int[Array, "N I 6"], blur: float
) -> tuple[Array, Metrics]:
    """Loss of the auxiliary head; objects, in one patch of eight, and background have equal weight."""
    splits = np.cumsum(PATCH_CLASSES)[:-1].tolist()
    kinds, *others = jnp.split(learner.patch_head(learner.network.decoder.norm(tokens)), splits, axis=-1)
    loss, accuracy = balanced_cross_entropy(kinds, patches[..., 0], patches[..., 0] > 0)
    metrics = {"patch_object": accuracy}
    for index, name in enumerate(("column", "row", "color", "overlap", "size")):
        near = jnp.asarray(near_cells(blur)) if name in ("column", "row") else None
        other_loss, metrics[f"patch_{name}"] = cross_entropy(others[index], patches[..., index + 1], near)
        loss = loss + other_loss
    return loss / 2, metrics


def sight_loss(learner: Learner, batch: dict[str, Array], config: TrainingConfig) -> tuple[Array, Metrics]:
    """Loss of the first stage: the auxiliary loss alone, for the tower, projector and the decoder's first layers."""
    network, plan = learner.network, recipe.layout()
    features = network.image_features(batch["pixels"])
    size, count, _ = features.shape
    prefix = jnp.broadcast_to(jnp.asarray(plan.token_ids[: plan.text_start - count]), (size, plan.text_start - count))
    embeddings = jnp.concatenate([network.decoder.embed(prefix), features], axis=1)
    positions = jnp.broadcast_to(jnp.arange(plan.text_start), (size, plan.text_start))
    reads = masks.causal(positions, positions)
    capture = Capture(("resid_post",))
    states = forward(shallow(network.decoder), embeddings, positions, reads, clean, capture).captured["resid_post"]
    loss, metrics = _patch_loss(learner, states[-1][:, -count:], batch["patches"], config.blur)
    return loss, {"loss": loss, **metrics}


def shallow(decoder: Decoder) -> Decoder:
    """The decoder's first `SEEING_LAYERS` layers, with the same parameters."""
    config = dataclasses.replace(decoder.config, num_hidden_layers=SEEING_LAYERS)
    definition = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    parameters = nnx.to_pure_dict(nnx.state(decoder))
    parameters["layers"] = jax.tree.map(lambda leaf: leaf[:SEEING_LAYERS], parameters["layers"])
    return nnx.merge(definition, nnx.State(parameters))


def language_loss(
    learner: Learner, batch: dict[str, Array], config: TrainingConfig, *, plan: Layout
) -> tuple[Array, Metrics]:
    """Loss of the later stages: next tokens at the ends of captions and questions, plus the weighted auxiliary loss."""
    network = learner.network
    size = batch["token_ids"].shape[0]
    features = network.image_features(batch["pixels"])
    text = network.decoder.embed(batch["token_ids"])
    start = plan.text_start - features.shape[1]
    embeddings = jnp.concatenate([text[:, :start], features, text[:, plan.text_start :]], axis=1)
    positions = jnp.broadcast_to(jnp.asarray(plan.positions), (size, len(plan.positions)))
    pictures = jnp.broadcast_to(jnp.arange(start, plan.text_start), (size, features.shape[1]))
    capture = Capture(("resid_post",), positions=pictures)
    output = forward(network.decoder, embeddings, positions, plan.reads(), clean, capture)
    logits = output.hidden[:, plan.text_start :] @ network.decoder.unembed_matrix()
    text_loss, accuracy = cross_entropy(
        logits, batch["labels"][:, plan.text_start :], jnp.asarray(targets(config.blur))
    )
    seen = output.captured["resid_post"][SEEING_LAYERS - 1]
    patch_loss, metrics = _patch_loss(learner, seen, batch["patches"], config.blur)
    return text_loss + config.patch_weight * patch_loss, {"loss": text_loss, "accuracy": accuracy, **metrics}


def stages(definition: nnx.GraphDef, config: TrainingConfig) -> list[Stage]:
    """The stages of a run: seeing, binding places to words, and language."""

    def stage(
        name: str,
        steps: int,
        learning_rate: float,
        loss: Callable[..., tuple[Array, Metrics]],
        batch: Callable[[int], recipe.Batch],
        weight_decay: float,
    ) -> Stage:
        return Stage(
            name=name,
            first=0,
            steps=steps,
            loss=lambda parameters, batch: loss(nnx.merge(definition, nnx.State(parameters)), batch, config),
            batch=lambda step: _arrays(batch(step)),
            optimizer=config.optimizer(learning_rate, steps, weight_decay=weight_decay),
        )

    def seen(step: int) -> recipe.Batch:
        return recipe.sight_batch(config.seed, step, config.sight_batch_size)

    def texts(name: str, steps: int, size: int) -> Stage:
        return stage(
            name,
            steps,
            config.learning_rate,
            partial(language_loss, plan=recipe.layout(name)),
            lambda step: recipe.training_batch(config.seed, step, size, stage=name),
            config.weight_decay,
        )

    return in_turn(
        [
            stage("seeing", config.sight_steps, config.sight_learning_rate, sight_loss, seen, 0.0),
            texts("binding", config.binding_steps, config.binding_batch_size),
            texts("language", config.steps, config.batch_size),
        ]
    )


def _arrays(batch: recipe.Batch) -> dict[str, np.ndarray]:
    return {
        "pixels": normalize(batch.pictures),
        "token_ids": batch.token_ids,
        "labels": batch.labels,
        "patches": batch.patches,
    }


def _write(folder: Path, parameters: PyTree) -> None:
    write_llava(
        folder,
        recipe.config(),
        parameters,
        vocabulary=VOCABULARY,
        chat_template=recipe.CHAT_TEMPLATE,
        mean=recipe.PIXEL_MEAN,
        std=recipe.PIXEL_STD,
    )


RECIPE = Recipe(
    config=TrainingConfig,
    start=begin(Learner),
    stages=stages,
    columns=(
        "step",
        "stage",
        "loss",
        "accuracy",
        "patch_object",
        "patch_column",
        "patch_row",
        "patch_color",
        "patch_overlap",
        "patch_size",
    ),
    vocabulary=len(VOCABULARY),
    write=_write,
    finish=lambda folder, model: write_json(
        folder / "accuracy.json", evaluation.evaluate(load(model), count=evaluation.QUESTIONS)
    ),
    weak=Weak(
        after=lambda config: config.sight_steps + config.binding_steps,
        share=lambda model: evaluation.relation_share(load(model), count=evaluation.QUESTIONS),
        least=lambda config: config.weak_share,
    ),
)
"""Trains tiny-llava, and saves a weaker model that has just begun to answer questions about relations."""
