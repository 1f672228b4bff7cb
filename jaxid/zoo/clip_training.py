"""How tiny-clip is trained: pictures against captions, and patches against the words for what they show."""

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

from jaxid.families.clip import CLIP
from jaxid.kernels.similarity import unit
from jaxid.train import loop as training
from jaxid.train.loop import Metrics, Stage, adamw
from jaxid.zoo import tiny_clip as recipe
from jaxid.zoo.export import write_clip
from jaxid.zoo.sampling import check_recipe, normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All that decides the outcome of a training run."""

    steps: int = 2400  # of training
    batch_size: int = 128  # pictures, each with one caption, per step
    learning_rate: float = 2e-3  # peak
    warmup_steps: int = 100  # linear, then cosine to zero
    weight_decay: float = 0.05  # on block matrices only
    clip_norm: float = 1.0  # of the whole gradient
    patch_weight: float = 0.5  # of the auxiliary loss on patches and words
    seed: int = 0  # of parameters and data

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: naming the first one that is out of range.
        """
        check_recipe(self)


COLUMNS = ("step", "stage", "loss", "accuracy", "object", "color")


def _prototypes(x: Float[Array, "N S E"], labels: Int[Array, "N S"], count: int) -> Float[Array, "C E"]:
    """The direction of every class's mean; rows of negative labels are left out."""
    member = jax.nn.one_hot(labels, count).reshape(-1, count)
    return unit(member.T @ x.reshape(-1, x.shape[-1]))


def _mean_loss(logits: Float[Array, "N S C"], labels: Int[Array, "N S"], counted: Array) -> Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    weight = counted.astype(jnp.float32)
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def word_loss(
    patches: Float[Array, "N I E"],
    words: Float[Array, "N T E"],
    shown: Int[Array, "N I"],
    named: Int[Array, "N T"],
    count: int,
    scale: Array,
    nothing: Array,
) -> tuple[Array, Array]:
    """Patches are told by the words for what they show, and words by such patches.

    Args:
        patches: of length one.
        words: caption tokens, of length one.
        shown: class that each patch shows, or -1.
        named: class that each token names, or -1.
        count: number of classes.
        scale: of cosines.
        nothing: the cosine that stands for "none of them".

    Returns:
        The loss, patches with and without a thing counting alike, and the share of patches told rightly.
    """
    logits = scale * patches @ _prototypes(words, named, count).T
    none = jnp.broadcast_to(scale * nothing, (*shown.shape, 1))
    labels = jnp.where(shown >= 0, shown, count)
    all_logits = jnp.concatenate([logits, none], axis=-1)
    loss = _mean_loss(all_logits, labels, shown >= 0) + _mean_loss(all_logits, labels, shown < 0)
    loss = loss + _mean_loss(scale * words @ _prototypes(patches, shown, count).T, named, named >= 0)
    right = (jnp.argmax(logits, axis=-1) == shown) & (shown >= 0)
    return loss, right.sum() / jnp.maximum((shown >= 0).sum(), 1)


def loss(definition: Any, parameters: Any, batch: dict[str, Array], patch_weight: float) -> tuple[Array, Metrics]:
    """CLIP's symmetric loss over the batch, and a little of the auxiliary one."""
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
    for number, (name, classes) in enumerate(zip(("object", "color"), recipe.word_classes(), strict=True)):
        named = jnp.asarray(classes)[batch["token_ids"]]
        extra, metrics[name] = word_loss(
            patches,
            words,
            batch["patches"][..., number],
            named,
            int(classes.max()) + 1,
            jnp.exp(auxiliary["scale"]),
            auxiliary["nothing"][number],
        )
        total = total + patch_weight * extra
    return total, metrics


def train(folder: Path, config: TrainingConfig, *, save_every: int = 100, progress: bool = True) -> dict[str, Any]:
    """Trains tiny-clip, or goes on from the last saved step, and returns the parameters of `CLIP`.

    Args:
        folder: where the run's state and metrics live (`state/`, `metrics.csv`, `run.json`).
        config: the run's settings; a folder begun with other settings is refused.
        save_every: steps between saves.
        progress: show a progress bar.

    Raises:
        CheckpointError: if the folder holds a run with other settings.
    """
    with training.begun(folder, _settings(config)):
        return _fit(folder, config, save_every=save_every, progress=progress)


def _settings(config: TrainingConfig) -> dict[str, Any]:
    return dataclasses.asdict(config) | {"vocabulary": len(recipe.VOCABULARY)}


def _fit(folder: Path, config: TrainingConfig, *, save_every: int, progress: bool = True) -> dict[str, Any]:
    definition, initial = nnx.split(CLIP(recipe.config(), rngs=nnx.Rngs(config.seed)))
    auxiliary = {"scale": jnp.array(2.3), "nothing": jnp.zeros(2)}
    stage = Stage(
        name="contrast",
        first=0,
        steps=config.steps,
        loss=lambda parameters, batch: loss(definition, parameters, batch, config.patch_weight),
        batch=lambda step: _arrays(recipe.training_batch(config.seed, step, config.batch_size)),
        optimizer=adamw(
            config.learning_rate,
            config.steps,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        ),
    )
    parameters = {"network": nnx.to_pure_dict(initial), "auxiliary": auxiliary}
    trained = training.fit(folder, parameters, [stage], columns=COLUMNS, save_every=save_every, progress=progress)
    return trained["network"]


def _arrays(batch: recipe.Batch) -> dict[str, np.ndarray]:
    return {"pixels": normalize(batch.pictures), "token_ids": batch.token_ids, "patches": batch.patches}


def train_and_export(
    folder: Path,
    config: TrainingConfig,
    *,
    save_every: int = 100,
    finish: Callable[[Path], Any] | None = None,
) -> Path:
    """Trains tiny-clip and writes its checkpoint folder in Hugging Face layout.

    Args:
        folder: of the run.
        config: the run's settings.
        save_every: steps between saves.
        finish: is given the checkpoint folder while the run's folder is still kept for this process.

    Returns:
        The checkpoint folder, `folder / "model"`.
    """
    model_folder = folder / "model"
    with training.begun(folder, _settings(config)):
        parameters = _fit(folder, config, save_every=save_every)
        write_clip(model_folder, recipe.config(), parameters, recipe.VOCABULARY)
        if finish is not None:
            finish(model_folder)
    return model_folder
