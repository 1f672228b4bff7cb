"""How tiny-llava is trained."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.checkpoints.loading import load
from jaxid.data.scenes import COLORS, OBJECTS
from jaxid.families.llava import Llava
from jaxid.io import write_json
from jaxid.nn.decoder import Decoder
from jaxid.nn.layers import Linear
from jaxid.nn.passes import forward
from jaxid.nn.sites import Capture, clean
from jaxid.train import loop as training
from jaxid.train.loop import Metrics, Stage, adamw
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.export import write_llava
from jaxid.zoo.sampling import check_recipe, normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All that decides the outcome of a training run."""

    sight_steps: int = 2200  # steps in which the model first learns to see
    sight_batch_size: int = 128  # pictures per step of these
    sight_learning_rate: float = 2e-3  # peak, in these
    steps: int = 1050  # steps on questions and captions, after those
    batch_size: int = 64  # pictures per step
    learning_rate: float = 1.5e-3  # peak
    weak_steps: int = 500  # of these, after which a weaker model is kept for the fine-tuning experiments
    polish_steps: int = 240  # steps in which existence, the hardest question, is asked more often
    polish_learning_rate: float = 5e-4  # peak, in these
    warmup_steps: int = 100  # linear, then cosine to zero, in every stage
    weight_decay: float = 0.02  # on block matrices only
    clip_norm: float = 1.0  # of the whole gradient
    patch_weight: float = 0.3  # of the auxiliary loss on the tower's patches
    seed: int = 0  # of parameters and data

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: naming the first one that is out of range.
        """
        check_recipe(self)


PATCH_CLASSES = (len(OBJECTS) + 1, 4, 4, len(COLORS))
"""Classes that the auxiliary head tells apart at every patch: object, column, row, colour."""

SEEING_BLOCKS = 3
"""The auxiliary head reads the picture's tokens after this many decoder blocks.

The tower is shallow on purpose: pictures are understood in the decoder's first blocks, as in large models, so that the
words can take up their objects' places only in the middle ones.
"""


class Learner(nnx.Module):
    """The network with the auxiliary head that training adds to the tower."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Draws all parameters."""
        config = recipe.config()
        self.network = Llava(config, rngs=rngs)
        self.patch_head = Linear(config.text_config.hidden_size, sum(PATCH_CLASSES), bias=True, rngs=rngs)


def cross_entropy(logits: Float[Array, "*B V"], labels: Int[Array, "*B"]) -> tuple[Array, Array]:
    """Mean loss and accuracy over the labels that are not negative."""
    counted = labels >= 0
    weight = counted.astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    hits = (jnp.argmax(logits, axis=-1) == labels) & counted
    return (losses * weight).sum() / total, hits.sum().astype(jnp.float32) / total


def _patch_loss(learner: Learner, tokens: Float[Array, "N I D"], patches: Int[Array, "N I 4"]) -> tuple[Array, Metrics]:
    """Loss of the auxiliary head: objects and background count alike, though one patch in eight holds an object."""
    splits = np.cumsum(PATCH_CLASSES)[:-1].tolist()
    kinds, *others = jnp.split(learner.patch_head(learner.network.decoder.norm(tokens)), splits, axis=-1)
    objects = patches[..., 0]
    loss, object_accuracy = cross_entropy(kinds, jnp.where(objects > 0, objects, -1))
    ground_loss, _ = cross_entropy(kinds, jnp.where(objects > 0, -1, objects))
    loss, metrics = loss + ground_loss, {"patch_object": object_accuracy}
    for number, name in enumerate(("column", "row", "color"), start=1):
        other_loss, metrics[f"patch_{name}"] = cross_entropy(others[number - 1], patches[..., number])
        loss = loss + other_loss
    return loss / 2, metrics


def sight_loss(learner: Learner, batch: dict[str, Array], config: TrainingConfig) -> tuple[Array, Metrics]:
    """The first stage's loss: the auxiliary head alone, on tower, projector and the decoder's first blocks."""
    del config
    network, plan = learner.network, recipe.layout()
    features = network.image_features(batch["pixels"])
    size, count, _ = features.shape
    prefix = jnp.broadcast_to(jnp.asarray(plan.token_ids[: plan.text_start - count]), (size, plan.text_start - count))
    embeddings = jnp.concatenate([network.decoder.embed(prefix), features], axis=1)
    positions = jnp.broadcast_to(jnp.arange(plan.text_start), (size, plan.text_start))
    mask = jnp.asarray(plan.mask[: plan.text_start, : plan.text_start])[None]
    capture = Capture(("resid_post",))
    states = forward(shallow(network.decoder), embeddings, positions, mask, clean, capture).captured["resid_post"]
    loss, metrics = _patch_loss(learner, states[-1][:, -count:], batch["patches"])
    return loss, {"loss": loss, **metrics}


def shallow(decoder: Decoder) -> Decoder:
    """The decoder cut after its seeing blocks, with the same parameters."""
    config = dataclasses.replace(decoder.config, num_hidden_layers=SEEING_BLOCKS)
    definition = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    parameters = nnx.to_pure_dict(nnx.state(decoder))
    parameters["layers"] = jax.tree.map(lambda leaf: leaf[:SEEING_BLOCKS], parameters["layers"])
    return nnx.merge(definition, nnx.State(parameters))


def language_loss(learner: Learner, batch: dict[str, Array], config: TrainingConfig) -> tuple[Array, Metrics]:
    """The second stage's loss: next tokens at the ends of captions and questions, and a little of the first."""
    network, plan = learner.network, recipe.layout()
    size = batch["token_ids"].shape[0]
    features = network.image_features(batch["pixels"])
    text = network.decoder.embed(batch["token_ids"])
    start = plan.text_start - features.shape[1]
    embeddings = jnp.concatenate([text[:, :start], features, text[:, plan.text_start :]], axis=1)
    positions = jnp.broadcast_to(jnp.asarray(plan.positions), (size, len(plan.positions)))
    pictures = jnp.broadcast_to(jnp.arange(start, plan.text_start), (size, features.shape[1]))
    capture = Capture(("resid_post",), positions=pictures)
    output = forward(network.decoder, embeddings, positions, jnp.asarray(plan.mask)[None], clean, capture)
    logits = output.hidden[:, plan.text_start :] @ network.decoder.unembed_matrix()
    text_loss, accuracy = cross_entropy(logits, batch["labels"][:, plan.text_start :])
    seen = output.captured["resid_post"][SEEING_BLOCKS - 1]
    patch_loss, metrics = _patch_loss(learner, seen, batch["patches"])
    return text_loss + config.patch_weight * patch_loss, {"loss": text_loss, "accuracy": accuracy, **metrics}


def stages(definition: Any, config: TrainingConfig) -> tuple[Stage, ...]:
    """The stages of a run: seeing, language, and polishing of what is hardest."""
    sight = Stage(
        name="seeing",
        first=0,
        steps=config.sight_steps,
        loss=_loss(sight_loss, definition, config),
        batch=lambda step: _arrays(recipe.sight_batch(config.seed, step, config.sight_batch_size)),
        optimizer=_optimizer(config, config.sight_learning_rate, config.sight_steps, weight_decay=0.0),
    )
    language = Stage(
        name="language",
        first=config.sight_steps,
        steps=config.steps,
        loss=_loss(language_loss, definition, config),
        batch=lambda step: _arrays(recipe.training_batch(config.seed, step, config.batch_size)),
        optimizer=_optimizer(config, config.learning_rate, config.steps, weight_decay=config.weight_decay),
    )
    existence = recipe.Mix(relation=0.25, where=0.1, exists=0.6)
    polish = Stage(
        name="polishing",
        first=config.sight_steps + config.steps,
        steps=config.polish_steps,
        loss=_loss(language_loss, definition, config),
        batch=lambda step: _arrays(recipe.training_batch(config.seed, step, config.batch_size, existence)),
        optimizer=_optimizer(
            config, config.polish_learning_rate, config.polish_steps, weight_decay=config.weight_decay
        ),
    )
    return sight, language, polish


def _loss(loss: Callable[..., tuple[Array, Metrics]], definition: Any, config: TrainingConfig) -> Callable[..., Any]:
    """A stage's loss as a function of parameters."""
    return lambda parameters, batch: loss(nnx.merge(definition, nnx.State(parameters)), batch, config)


def _optimizer(
    config: TrainingConfig, learning_rate: float, steps: int, *, weight_decay: float
) -> optax.GradientTransformation:
    return adamw(
        learning_rate,
        steps,
        warmup_steps=config.warmup_steps,
        weight_decay=weight_decay,
        clip_norm=config.clip_norm,
    )


def train(
    folder: Path,
    config: TrainingConfig,
    *,
    save_every: int = 100,
    progress: bool = True,
    weak: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Trains tiny-llava, or goes on from the last saved step, and returns the network's parameters.

    Args:
        folder: where the run's state and metrics live (`state/`, `metrics.csv`, `run.json`).
        config: the run's settings; a folder begun with other settings is refused.
        save_every: steps between saves.
        progress: show a progress bar.
        weak: is given the network's parameters after the first `weak_steps` on questions and captions.

    Returns:
        The trained parameters of `Llava`, without the auxiliary head.

    Raises:
        CheckpointError: if the folder holds a run with other settings.
    """
    with training.begun(folder, _settings(config)):
        return _fit(folder, config, save_every=save_every, progress=progress, weak=weak)


def _settings(config: TrainingConfig) -> dict[str, Any]:
    return dataclasses.asdict(config) | {"vocabulary": len(recipe.VOCABULARY)}


def _fit(
    folder: Path,
    config: TrainingConfig,
    *,
    save_every: int,
    progress: bool = True,
    weak: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    definition, initial = nnx.split(Learner(rngs=nnx.Rngs(config.seed)))
    kept_at = config.sight_steps + config.weak_steps

    def check(step: int, parameters: Any) -> None:
        if weak is not None and step == kept_at:
            weak(parameters["network"])

    parameters = training.fit(
        folder,
        nnx.to_pure_dict(initial),
        stages(definition, config),
        columns=COLUMNS,
        save_every=save_every,
        progress=progress,
        check=check,
        check_every=max(kept_at, 1),
    )
    return parameters["network"]


def _arrays(batch: recipe.Batch) -> dict[str, np.ndarray]:
    return {
        "pixels": normalize(batch.pictures),
        "token_ids": batch.token_ids,
        "labels": batch.labels,
        "patches": batch.patches,
    }


def train_and_export(folder: Path, config: TrainingConfig, *, save_every: int = 100) -> Path:
    """Trains tiny-llava and writes its checkpoint folder in Hugging Face layout, with its accuracy beside it.

    The weaker model is written to `folder / "model-weak"`.

    Args:
        folder: of the run.
        config: the run's settings.
        save_every: steps between saves.

    Returns:
        The checkpoint folder, `folder / "model"`.
    """
    model_folder = folder / "model"
    with training.begun(folder, _settings(config)):
        parameters = _fit(
            folder, config, save_every=save_every, weak=lambda parameters: _export(folder / "model-weak", parameters)
        )
        _export(model_folder, parameters)
        results = evaluation.evaluate(load(model_folder), count=512)
        write_json(folder / "accuracy.json", {name: dataclasses.asdict(result) for name, result in results.items()})
    return model_folder


def _export(folder: Path, parameters: Any) -> None:
    write_llava(
        folder,
        recipe.config(),
        jax.device_get(parameters),
        vocabulary=recipe.VOCABULARY,
        chat_template=recipe.CHAT_TEMPLATE,
        mean=recipe.PIXEL_MEAN,
        std=recipe.PIXEL_STD,
    )


COLUMNS: tuple[str, ...] = (
    "step",
    "stage",
    "loss",
    "accuracy",
    "patch_object",
    "patch_column",
    "patch_row",
    "patch_color",
)
