"""Training of tiny-video."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.checkpoints.loading import load
from jaxid.data.scenes import OBJECTS
from jaxid.data.videos import FRAMES
from jaxid.families.llava_video import LlavaVideo
from jaxid.io import write_json
from jaxid.kernels import masks
from jaxid.nn.layers import Linear
from jaxid.nn.passes import forward
from jaxid.nn.sites import Capture, clean
from jaxid.train.loop import Metrics, Stage
from jaxid.zoo import evaluation, video_evaluation
from jaxid.zoo import tiny_video as recipe
from jaxid.zoo.export import write_video
from jaxid.zoo.packing import Layout
from jaxid.zoo.recipes import Recipe, RecipeConfig, balanced_cross_entropy, begin, cross_entropy, in_turn
from jaxid.zoo.training import SEEING_LAYERS, shallow


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RecipeConfig):
    """Everything that decides the outcome of a training run."""

    sight_steps: int = 1600  # length of the first stage: tower and projector learn to see, without the decoder
    sight_batch_size: int = 160  # pictures per step of the first stage
    timing_steps: int = 500  # length of the second stage: the decoder's first layers learn when objects appear
    steps: int = 800  # length of the third stage, on questions and captions
    timed_steps: int = 200  # length of the last stage, with the text that gives the frames' times
    batch_size: int = 32  # clips per step of the later stages
    sight_learning_rate: float = 2e-3  # peak of the first two stages
    learning_rate: float = 1.5e-3  # peak of the third stage
    timed_learning_rate: float = 6e-4  # peak of the last stage
    warmup_steps: int = 60
    weight_decay: float = 0.02
    frame_weight: float = 0.3  # weight of the auxiliary loss on the frames' tokens
    blur: float = 1.5  # standard deviation of the target distribution over frames, in frames


CLASSES = (len(OBJECTS) + 1, FRAMES)
"""Number of classes of the auxiliary labels at every token of a frame: the object, and its first frame."""


class Learner(nnx.Module):
    """The network with the auxiliary heads that training adds."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Initialises all parameters."""
        config = recipe.config()
        self.network = LlavaVideo(config, rngs=rngs)
        width = config.text_config.hidden_size
        self.object_head = Linear(width, CLASSES[0], bias=True, rngs=rngs)
        self.time_head = Linear(width, sum(CLASSES), bias=True, rngs=rngs)


def frame_tokens(network: LlavaVideo, batch: dict[str, Array]) -> Float[Array, "N F 9 D"]:
    """Every clip's frames as decoder tokens; the tower encodes a picture that several frames show only once."""
    pixels = batch["pixels"]
    size, states = pixels.shape[:2]
    pooled = network.pooled(network.image_features(pixels.reshape(size * states, *pixels.shape[2:])))
    pooled = pooled.reshape(size, states, *pooled.shape[1:])
    return jnp.take_along_axis(pooled, batch["frames"][:, :, None, None], axis=1)


def clip_tokens(network: LlavaVideo, frames: Float[Array, "N F 9 D"]) -> Float[Array, "N I D"]:
    """A clip's tokens followed by `image_newline`."""
    flat = frames.reshape(len(frames), -1, frames.shape[-1])
    newline = jnp.broadcast_to(network.newline[...], (len(frames), 1, frames.shape[-1]))
    return jnp.concatenate([flat, newline], axis=1)


def near_frames(blur: float) -> Float[np.ndarray, "F F"]:
    """Target distribution over frames for each frame: it includes a share of the neighbours.

    With exact targets every frame would be a separate class, as far from its neighbours as from all other frames.
    """
    distance = np.arange(FRAMES)[:, None] - np.arange(FRAMES)
    weights = np.exp(-0.5 * (distance / blur) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _near_words(blur: float) -> Float[np.ndarray, "V V"]:
    """Target distribution for every word of the vocabulary: `near_frames` for the frames' names, else one-hot."""
    table = np.eye(recipe.config().text_config.vocab_size, dtype=np.float32)
    names = np.array(recipe.encode(" ".join(recipe.TIME_WORDS)))
    table[names[:, None], names] = near_frames(blur)
    return table


def _frame_loss(
    learner: Learner, tokens: Float[Array, "N I D"], cells: Int[Array, "N F 9 2"], blur: float
) -> tuple[Array, Metrics]:
    """Loss of the auxiliary head that reads the frames' tokens in the decoder."""
    states = learner.network.decoder.norm(tokens[:, :-1]).reshape(*cells.shape[:3], -1)
    objects, starts = jnp.split(learner.time_head(states), [CLASSES[0]], axis=-1)
    object_loss, object_accuracy = balanced_cross_entropy(objects, cells[..., 0], cells[..., 0] > 0)
    start_loss, start_accuracy = cross_entropy(starts, cells[..., 1], jnp.asarray(near_frames(blur)))
    return object_loss + start_loss, {"object": object_accuracy, "start": start_accuracy}


def sight_loss(learner: Learner, batch: dict[str, Array], config: TrainingConfig) -> tuple[Array, Metrics]:
    """Loss of the first stage: objects and their places, read from the projector's output."""
    del config
    tokens = frame_tokens(learner.network, batch)
    objects = batch["cells"][..., 0]
    loss, accuracy = balanced_cross_entropy(learner.object_head(tokens), objects, objects > 0)
    return loss, {"loss": loss, "object": accuracy}


def timing_loss(learner: Learner, batch: dict[str, Array], config: TrainingConfig) -> tuple[Array, Metrics]:
    """Loss of the second stage: objects, places and first frames, read from the decoder's first layers."""
    network, plan = learner.network, recipe.layout(timed=False)
    features = clip_tokens(network, frame_tokens(network, batch))
    size, end = len(features), plan.image_start + plan.image_tokens
    prefix = jnp.broadcast_to(jnp.asarray(plan.token_ids[: plan.image_start]), (size, plan.image_start))
    embeddings = jnp.concatenate([network.decoder.embed(prefix), features], axis=1)
    positions = jnp.broadcast_to(jnp.arange(end), (size, end))
    reads = masks.causal(positions, positions)
    capture = Capture(("resid_post",))
    states = forward(shallow(network.decoder), embeddings, positions, reads, clean, capture).captured["resid_post"]
    loss, metrics = _frame_loss(learner, states[-1][:, plan.image_start :], batch["cells"], config.blur)
    return loss, {"loss": loss, **metrics}


def language_loss(
    learner: Learner, batch: dict[str, Array], config: TrainingConfig, *, plan: Layout
) -> tuple[Array, Metrics]:
    """Loss of the later stages: next tokens at the ends of captions and questions, plus the weighted auxiliary loss."""
    network = learner.network
    features = clip_tokens(network, frame_tokens(network, batch))
    size, end = len(features), plan.image_start + plan.image_tokens
    text = network.decoder.embed(batch["token_ids"])
    embeddings = jnp.concatenate([text[:, : plan.image_start], features, text[:, end:]], axis=1)
    positions = jnp.broadcast_to(jnp.asarray(plan.positions), (size, len(plan.positions)))
    shown = jnp.broadcast_to(jnp.arange(plan.image_start, end), (size, plan.image_tokens))
    capture = Capture(("resid_post",), positions=shown)
    output = forward(network.decoder, embeddings, positions, plan.reads(), clean, capture)
    logits = output.hidden[:, plan.text_start :] @ network.decoder.unembed_matrix()
    labels = batch["labels"][:, plan.text_start :]
    text_loss, accuracy = cross_entropy(logits, labels, jnp.asarray(_near_words(config.blur)))
    seen = output.captured["resid_post"][SEEING_LAYERS - 1]
    frame_loss, metrics = _frame_loss(learner, seen, batch["cells"], config.blur)
    return text_loss + config.frame_weight * frame_loss, {"loss": text_loss, "accuracy": accuracy, **metrics}


def stages(definition: nnx.GraphDef, config: TrainingConfig) -> list[Stage]:
    """The stages of a run: seeing, timing, language, and language with the frames' times."""

    def loss(function: Callable[..., tuple[Array, Metrics]], **further: Layout) -> Callable[..., tuple[Array, Metrics]]:
        return lambda parameters, batch: function(
            nnx.merge(definition, nnx.State(parameters)), batch, config, **further
        )

    def drawn(step: int, timed: bool | None) -> dict[str, np.ndarray]:
        if timed is None:
            made = recipe.sight_batch(config.seed, step, config.sight_batch_size)
        else:
            made = recipe.training_batch(config.seed, step, config.batch_size, timed=timed)
        return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}

    rate, decay = config.sight_learning_rate, config.weight_decay
    return in_turn(
        [
            Stage(
                name=name,
                first=0,
                steps=steps,
                loss=function or loss(language_loss, plan=recipe.layout(timed=bool(timed))),
                batch=partial(drawn, timed=timed),
                optimizer=config.optimizer(peak, steps, weight_decay=weight),
            )
            for name, steps, peak, weight, timed, function in (
                ("seeing", config.sight_steps, rate, 0.0, None, loss(sight_loss)),
                ("timing", config.timing_steps, rate, 0.0, False, loss(timing_loss)),
                ("language", config.steps, config.learning_rate, decay, False, None),
                ("times", config.timed_steps, config.timed_learning_rate, decay, True, None),
            )
        ]
    )


RECIPE = Recipe(
    config=TrainingConfig,
    start=begin(Learner),
    stages=stages,
    columns=("step", "stage", "loss", "accuracy", "object", "start"),
    vocabulary=len(recipe.VOCABULARY),
    write=lambda folder, parameters: write_video(folder, recipe.config(), parameters, recipe.VOCABULARY),
    finish=lambda folder, model: write_json(
        folder / "accuracy.json", video_evaluation.evaluate(load(model), count=evaluation.QUESTIONS)
    ),
)
"""How tiny-video is trained."""
