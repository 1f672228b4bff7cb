"""What the recipes of the shipped models share: their settings, their losses, and a run from start to checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.checks import check_options
from jaxid.errors import InputError
from jaxid.train.loop import Stage, adamw, begun, fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """All that decides the outcome of a training run; fields that end in "steps" count those of a stage."""

    batch_size: int
    warmup_steps: int  # along a line, then a cosine to zero, in every stage
    weight_decay: float  # on block matrices only
    clip_norm: float = 1.0  # of the whole gradient
    seed: int = 0  # of parameters and data

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: naming the first one that is out of range.
        """
        check_options(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("batch_size", "learning_rate")) and not value > 0:
                raise InputError(f"{field.name} must be above 0, not {value}.")
            if value < 0:
                raise InputError(f"{field.name} must be 0 or more, not {value}.")
        if not sum(self.stage_steps().values()):
            raise InputError("a recipe needs at least one step.")

    def stage_steps(self) -> dict[str, int]:
        """The fields that count the steps of a stage."""
        names = [field.name for field in dataclasses.fields(self) if field.name.endswith("steps")]
        return {name: getattr(self, name) for name in names if name != "warmup_steps"}

    def optimizer(self, learning_rate: float, steps: int, *, weight_decay: float) -> optax.GradientTransformation:
        """The optimizer of a stage."""
        return adamw(
            learning_rate,
            steps,
            warmup_steps=self.warmup_steps,
            weight_decay=weight_decay,
            clip_norm=self.clip_norm,
        )


Config = TypeVar("Config", bound=RecipeConfig)


def limited(config: Config, steps: int | None, batch_size: int | None) -> Config:
    """A recipe with at most so many steps in every stage, and batches of another size in all of them."""
    changes = {} if steps is None else {name: min(steps, count) for name, count in config.stage_steps().items()}
    if batch_size is not None:
        names = [field.name for field in dataclasses.fields(config)]
        changes |= {name: batch_size for name in names if name.endswith("batch_size")}
    return dataclasses.replace(config, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Config]):
    """How a shipped model is trained.

    Attributes:
        config: the class of its settings.
        start: from a seed to the definition of what is trained, and its parameters, "network" among them.
        stages: from those and the settings to the stages, which follow each other.
        columns: of the metrics.
        vocabulary: how many words the model knows.
        write: writes the network's parameters as a checkpoint folder.
        finish: evaluates the checkpoint, given the run's folder and the checkpoint's.
        weak_at: the step after which a weaker model is kept in `model-weak`.
    """

    config: type[Config]
    start: Callable[[int], tuple[Any, dict[str, Any]]]
    stages: Callable[[Any, Config], Sequence[Stage]]
    columns: Sequence[str]
    vocabulary: int
    write: Callable[[Path, Any], None]
    finish: Callable[[Path, Path], object]
    weak_at: Callable[[Config], int] | None = None

    def train(
        self,
        folder: Path,
        config: Config,
        *,
        save_every: int = 100,
        restart: bool = False,
        progress: bool = True,
        export: bool = True,
    ) -> Any:
        """Trains the model, or resumes from the last saved step; writes and evaluates its checkpoint, `folder/model`.

        Args:
            folder: of the run; one begun with other settings is refused.
            config: the run's settings.
            save_every: steps between saves.
            restart: discard the run in the folder and begin anew.
            progress: show a progress bar.
            export: write and evaluate the checkpoint.

        Returns:
            The network's parameters.

        Raises:
            OutputError: if the folder holds a run with other settings.
        """
        definition, parameters = self.start(config.seed)
        kept_at = 0 if self.weak_at is None else self.weak_at(config)

        def keep(step: int, parameters: Any) -> None:
            if export and step == kept_at:
                self.write(folder / "model-weak", jax.device_get(parameters["network"]))

        settings = dataclasses.asdict(config) | {"vocabulary": self.vocabulary}
        with begun(folder, settings, restart=restart, made=["model", "model-weak", "scorer-*", "accuracy.json"]):
            trained = fit(
                folder,
                parameters,
                self.stages(definition, config),
                columns=self.columns,
                save_every=save_every,
                progress=progress,
                check=keep if kept_at else None,
                check_every=max(kept_at, 1),
            )
            if export:
                self.write(folder / "model", trained["network"])
                self.finish(folder, folder / "model")
        return trained["network"]


def begin(learner: Callable[..., nnx.Module]) -> Callable[[int], tuple[Any, dict[str, Any]]]:
    """The `start` of a recipe that trains a module."""

    def start(seed: int) -> tuple[Any, dict[str, Any]]:
        definition, parameters = nnx.split(learner(rngs=nnx.Rngs(seed)))
        return definition, nnx.to_pure_dict(parameters)

    return start


def in_turn(stages: Sequence[Stage]) -> list[Stage]:
    """Stages, each beginning where the one before ends."""
    found: list[Stage] = []
    for stage in stages:
        first = found[-1].first + found[-1].steps if found else 0
        found.append(stage._replace(first=first))
    return found


def cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], targets: Float[Array, "V V"] | None = None
) -> tuple[Array, Array]:
    """Mean loss and accuracy over the labels that are not negative.

    Args:
        logits: of the classes.
        labels: indices of the true ones.
        targets: what is asked for in the place of each class, as probabilities; the class alone by default.
    """
    counted = labels >= 0
    weight, known = counted.astype(jnp.float32), jnp.maximum(labels, 0)
    total = jnp.maximum(weight.sum(), 1.0)
    if targets is None:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, known)
    else:
        losses = optax.softmax_cross_entropy(logits, jnp.take(targets, known, axis=0))
    hits = (jnp.argmax(logits, axis=-1) == labels) & counted
    return (losses * weight).sum() / total, hits.sum().astype(jnp.float32) / total


def balanced_cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], shown: Bool[Array, "*B"]
) -> tuple[Array, Array]:
    """Loss in which what shows a thing and what shows none count alike, however few show one; accuracy on things."""
    loss, accuracy = cross_entropy(logits, jnp.where(shown, labels, -1))
    ground, _ = cross_entropy(logits, jnp.where(shown, -1, labels))
    return loss + ground, accuracy
