"""Training of tiny-clip: pictures against captions, and patches against the words for what they show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxid.families.clip import CLIP
from jaxid.kernels.similarity import unit
from jaxid.train.loop import Metrics, Stage
from jaxid.zoo import clip_evaluation
from jaxid.zoo import tiny_clip as recipe
from jaxid.zoo.export import write_clip
from jaxid.zoo.recipes import Recipe, RecipeConfig, balanced_cross_entropy, begin, cross_entropy
from jaxid.zoo.sampling import normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(RecipeConfig):
    """Everything that decides the outcome of a training run."""

    steps: int = 2400  # training steps
    batch_size: int = 128  # pictures, each with one caption, per step
    learning_rate: float = 2e-3  # peak
    warmup_steps: int = 100
    weight_decay: float = 0.05
    patch_weight: float = 0.5  # weight of the auxiliary loss on patches and words


def _prototypes(x: Float[Array, "N S E"], labels: Int[Array, "N S"], count: int) -> Float[Array, "C E"]:
    """Unit vector along the mean of every class; rows with a negative label are skipped."""
    member = jax.nn.one_hot(labels, count).reshape(-1, count)
    return unit(member.T @ x.reshape(-1, x.shape[-1]))


def word_loss(
    patches: Float[Array, "N I E"],
    words: Float[Array, "N T E"],
    shown: Int[Array, "N I"],
    named: Int[Array, "N T"],
    count: int,
    scale: Array,
    nothing: Array,
) -> tuple[Array, Array]:
    """Auxiliary loss: classifies patches by the words for what they show, and words by the patches that show it.

    Args:
        patches: unit vectors of the patches.
        words: unit vectors of the caption tokens.
        shown: class that each patch shows, or -1.
        named: class that each token names, or -1.
        count: number of classes.
        scale: factor of the cosines, an inverse temperature.
        nothing: cosine of the class "none of them".

    Returns:
        The loss, in which patches with and without an object have equal weight, and the share of patches with an object
        that are classified correctly.
    """
    logits = scale * patches @ _prototypes(words, named, count).T
    none = jnp.broadcast_to(scale * nothing, (*shown.shape, 1))
    labels = jnp.where(shown >= 0, shown, count)
    loss, _ = balanced_cross_entropy(jnp.concatenate([logits, none], axis=-1), labels, shown >= 0)
    word_loss, _ = cross_entropy(scale * words @ _prototypes(patches, shown, count).T, named)
    _, right = cross_entropy(logits, shown)
    return loss + word_loss, right


def loss(
    definition: nnx.GraphDef, parameters: PyTree, batch: dict[str, Array], patch_weight: float
) -> tuple[Array, Metrics]:
    """CLIP's symmetric loss over the batch plus the weighted auxiliary losses."""
    network = nnx.merge(definition, nnx.State(parameters["network"]))
    auxiliary = parameters["auxiliary"]
    image = network.image(batch["pixels"])
    text = network.text(batch["token_ids"], batch["token_ids"] > 0)
    scale = jnp.minimum(jnp.exp(network.logit_scale[...]), 100.0)
    logits = scale * unit(image.pooled) @ unit(text.pooled).T
    own = jnp.arange(len(logits))
    both = [optax.softmax_cross_entropy_with_integer_labels(side, own).mean() for side in (logits, logits.T)]
    contrast = (both[0] + both[1]) / 2
    metrics = {"loss": contrast, "accuracy": (jnp.argmax(logits, axis=1) == own).mean()}
    patches, words = unit(image.tokens[:, 1:]), unit(text.tokens)
    total = contrast
    for index, (name, classes) in enumerate(zip(("object", "color"), recipe.word_classes(), strict=True)):
        named = jnp.asarray(classes)[batch["token_ids"]]
        extra, metrics[name] = word_loss(
            patches,
            words,
            batch["patches"][..., index],
            named,
            int(classes.max()) + 1,
            jnp.exp(auxiliary["scale"]),
            auxiliary["nothing"][index],
        )
        total = total + patch_weight * extra
    return total, metrics


def start(seed: int) -> tuple[nnx.GraphDef, PyTree]:
    """The network's definition, and the parameters of the network and of the auxiliary loss."""
    definition, parameters = begin(lambda rngs: CLIP(recipe.config(), rngs=rngs))(seed)
    return definition, {"network": parameters, "auxiliary": {"scale": jnp.array(2.3), "nothing": jnp.zeros(2)}}


def stages(definition: nnx.GraphDef, config: TrainingConfig) -> list[Stage]:
    """The single stage of a run."""
    return [
        Stage(
            name="contrast",
            first=0,
            steps=config.steps,
            loss=lambda parameters, batch: loss(definition, parameters, batch, config.patch_weight),
            batch=lambda step: _arrays(recipe.training_batch(config.seed, step, config.batch_size)),
            optimizer=config.optimizer(config.learning_rate, config.steps, weight_decay=config.weight_decay),
        )
    ]


def _arrays(batch: recipe.Batch) -> dict[str, np.ndarray]:
    return {"pixels": normalize(batch.pictures), "token_ids": batch.token_ids, "patches": batch.patches}


RECIPE = Recipe(
    config=TrainingConfig,
    start=start,
    stages=stages,
    columns=("step", "stage", "loss", "accuracy", "object", "color"),
    vocabulary=len(recipe.VOCABULARY),
    write=lambda folder, parameters: write_clip(folder, recipe.config(), parameters, recipe.VOCABULARY),
    finish=clip_evaluation.train_scorers,
)
"""Trains tiny-clip, then its scorers."""
