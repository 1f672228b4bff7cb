"""The training loop of tiny-llava: seeded, resumable after a kill, data-parallel over local devices."""

import csv
import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxid.checkpoints.loading import load
from jaxid.data.scenes import OBJECTS
from jaxid.errors import CheckpointError
from jaxid.models.common import Linear
from jaxid.models.llava import Llava
from jaxid.models.sites import Capture, clean
from jaxid.results import whole_file, write_json
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.export import write_llava


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All that decides the outcome of a training run."""

    steps: int = 2400  # optimiser steps
    batch_size: int = 64  # pictures per step
    learning_rate: float = 1.5e-3  # peak
    warmup_steps: int = 100  # linear, then cosine to zero
    weight_decay: float = 0.02  # on matrices only
    clip_norm: float = 1.0  # of the whole gradient
    patch_weight: float = 0.5  # of the auxiliary loss on the tower's patches
    seed: int = 0  # of parameters and data


class Learner(nnx.Module):
    """The network with the auxiliary head that training adds to the tower."""

    def __init__(self, *, rngs: nnx.Rngs):
        """Draws all parameters."""
        config = recipe.config()
        self.network = Llava(config, rngs=rngs)
        self.patch_head = Linear(config.text_config.hidden_size, len(OBJECTS) + 1, bias=True, rngs=rngs)


def _cross_entropy(logits: Float[Array, "... V"], labels: Array) -> tuple[Array, Array]:
    """Mean loss and accuracy over the labels that are not negative."""
    counted = labels >= 0
    weight = counted.astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    hits = (jnp.argmax(logits, axis=-1) == labels) & counted
    return (losses * weight).sum() / total, hits.sum().astype(jnp.float32) / total


def _loss(
    parameters: Any, definition: Any, batch: dict[str, Array], patch_weight: float
) -> tuple[Array, dict[str, Array]]:
    learner: Learner = nnx.merge(definition, parameters)
    network, plan = learner.network, recipe.layout()
    size = batch["token_ids"].shape[0]
    features = network.image_features(batch["pixels"])
    text = network.decoder.embed(batch["token_ids"])
    start = plan.text_start - features.shape[1]
    embeddings = jnp.concatenate([text[:, :start], features, text[:, plan.text_start :]], axis=1)
    positions = jnp.broadcast_to(jnp.asarray(plan.positions), (size, len(plan.positions)))
    hidden = network.decoder(embeddings, positions, jnp.asarray(plan.mask)[None], clean, Capture()).hidden
    # Labels stand at the same places in every row: gather those columns before the unembedding.
    text_hidden = hidden[:, plan.text_start :]
    logits = text_hidden @ network.decoder.unembed_matrix()
    text_loss, accuracy = _cross_entropy(logits, batch["labels"][:, plan.text_start :])
    # Patches of objects and of background count alike, though one in eight holds an object.
    patch_logits, patches = learner.patch_head(features), batch["patches"]
    object_loss, patch_accuracy = _cross_entropy(patch_logits, jnp.where(patches > 0, patches, -1))
    ground_loss, _ = _cross_entropy(patch_logits, jnp.where(patches > 0, -1, patches))
    patch_loss = (object_loss + ground_loss) / 2
    metrics = {"loss": text_loss, "accuracy": accuracy, "patch_accuracy": patch_accuracy}
    return text_loss + patch_weight * patch_loss, metrics


def _optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, max(config.steps, config.warmup_steps + 1)
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=config.weight_decay,
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree),
        ),
    )


def _batches(config: TrainingConfig, first: int) -> Iterator[recipe.Batch]:
    """Batches from a step on, the next one drawn while the current one trains."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(recipe.training_batch, config.seed, first, config.batch_size)
        for step in range(first, config.steps):
            batch = upcoming.result()
            upcoming = pool.submit(recipe.training_batch, config.seed, step + 1, config.batch_size)
            yield batch


def train(folder: Path, config: TrainingConfig, *, save_every: int = 100, progress: bool = True) -> dict[str, Any]:
    """Trains tiny-llava, or goes on from the last saved step, and returns the network's parameters.

    Args:
        folder: where the run's state and metrics live (`state/`, `metrics.csv`, `run.json`).
        config: the run's settings; a folder begun with other settings is refused.
        save_every: steps between saves.
        progress: show a progress bar.

    Returns:
        The trained parameters of `Llava`, without the auxiliary head.

    Raises:
        CheckpointError: if the folder holds a run with other settings.
    """
    import orbax.checkpoint as ocp
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config) | {"vocabulary": len(recipe.VOCABULARY)}
    record = folder / "run.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise CheckpointError(f"{folder} holds a training run with other settings; choose another folder.")
    write_json(record, settings)

    learner = Learner(rngs=nnx.Rngs(config.seed))
    definition, parameters = nnx.split(learner)
    parameters = nnx.to_pure_dict(parameters)
    optimizer = _optimizer(config)
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, same = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    state = jax.device_put({"parameters": parameters, "optimizer": optimizer.init(parameters)}, same)

    @partial(jax.jit, donate_argnums=0)
    def step_function(state: dict[str, Any], batch: dict[str, Array]) -> tuple[dict[str, Any], dict[str, Array]]:
        def loss(parameters: Any) -> tuple[Array, dict[str, Array]]:
            return _loss(nnx.State(parameters), definition, batch, config.patch_weight)

        gradients, metrics = jax.grad(loss, has_aux=True)(state["parameters"])
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
        parameters = optax.apply_updates(state["parameters"], updates)
        return {"parameters": parameters, "optimizer": optimizer_state}, metrics

    with ocp.CheckpointManager(
        (folder / "state").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    ) as manager:
        first = manager.latest_step() or 0
        if first:
            state = manager.restore(first, args=ocp.args.StandardRestore(state))
        bar = tqdm(total=config.steps, initial=first, unit="step", disable=not progress, desc="training")
        started = time.perf_counter()
        for step, batch in enumerate(_batches(config, first), start=first):
            arrays = {
                "pixels": recipe.normalize(batch.pictures),
                "token_ids": batch.token_ids,
                "labels": batch.labels,
                "patches": batch.patches.astype(np.int32),
            }
            state, metrics = step_function(state, jax.device_put(arrays, split))
            if (step + 1) % 20 == 0:
                numbers = {name: round(float(value), 5) for name, value in metrics.items()}
                _append_metrics(folder / "metrics.csv", {"step": step + 1, **numbers})
                rate = (step + 1 - first) * config.batch_size / (time.perf_counter() - started)
                bar.set_postfix(**numbers, pictures_per_second=round(rate))
                bar.update(step + 1 - bar.n)
            if (step + 1) % save_every == 0 or step + 1 == config.steps:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
        bar.close()
        manager.wait_until_finished()
    return jax.device_get(state["parameters"]["network"])


def train_and_export(folder: Path, config: TrainingConfig, *, save_every: int = 100) -> Path:
    """Trains tiny-llava and writes its checkpoint folder in Hugging Face layout, with its accuracy beside it.

    Args:
        folder: of the run.
        config: the run's settings.
        save_every: steps between saves.

    Returns:
        The checkpoint folder, `folder / "model"`.
    """
    parameters = train(folder, config, save_every=save_every)
    model_folder = folder / "model"
    write_llava(
        model_folder,
        recipe.config(),
        parameters,
        vocabulary=recipe.VOCABULARY,
        chat_template=recipe.CHAT_TEMPLATE,
        mean=recipe.PIXEL_MEAN,
        std=recipe.PIXEL_STD,
    )
    results = evaluation.evaluate(load(model_folder), count=512)
    write_json(folder / "accuracy.json", {name: dataclasses.asdict(result) for name, result in results.items()})
    return model_folder


def _append_metrics(path: Path, row: dict[str, float]) -> None:
    """Adds a row; rows of steps that a kill undid are dropped first."""
    rows = []
    if path.exists():
        with path.open() as file:
            rows = [old for old in csv.DictReader(file) if int(old["step"]) < row["step"]]
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerows([*rows, row])
