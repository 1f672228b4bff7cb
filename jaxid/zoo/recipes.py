"""Shared by the recipes of the shipped models: settings, losses, and a training run from start to checkpoint."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxid.checks import check_options
from jaxid.errors import InputError
from jaxid.io import write_json
from jaxid.train.loop import Stage, adamw, begun, fit
from jaxid.zoo.records import RECORD_FILE, recorded


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Everything that decides the outcome of a training run; a field ending in "steps" is the length of a stage."""

    batch_size: int
    warmup_steps: int  # steps of linear warm-up in every stage, before a cosine decay to zero
    weight_decay: float  # on block matrices only
    clip_norm: float = 1.0  # largest norm of the whole gradient
    seed: int = 0  # seed of parameters and data

    def __post_init__(self) -> None:
        """Checks all values.

        Raises:
            InputError: naming the first value that is out of range.
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
        """Number of steps by stage, by the name of its field."""
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
    """The settings with at most `steps` steps in each stage and with another batch size; None changes nothing."""
    changes = {} if steps is None else {name: min(steps, count) for name, count in config.stage_steps().items()}
    if batch_size is not None:
        names = [field.name for field in dataclasses.fields(config)]
        changes |= {name: batch_size for name in names if name.endswith("batch_size")}
    return dataclasses.replace(config, **changes)


WEAK_FILE = "weak.json"
"""The step after which a weaker model was saved, and its share of correct answers."""
WEAK_EVERY = 25
"""Steps between measurements of that share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weak(Generic[Config]):
    """Which earlier state of a run is saved as a weaker model.

    Attributes:
        after: (settings) -> the step after which states are measured.
        share: (folder of a checkpoint) -> its share of correct answers.
        least: (settings) -> the share of the state that is saved, which is the first one that reaches it.
    """

    after: Callable[[Config], int]
    share: Callable[[Path], float]
    least: Callable[[Config], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Generic[Config]):
    """How a shipped model is trained.

    Attributes:
        config: class of the settings.
        start: (seed) -> the definition of the trained modules, and their parameters; the entry "network" is exported.
        stages: (definition, settings) -> the stages of the run, in order.
        columns: columns of the metrics.
        vocabulary: number of words that the model knows.
        write: writes the network's parameters as a checkpoint folder.
        finish: (folder of the run, folder of the checkpoint) -> evaluates the checkpoint.
        weak: if given, a weaker model is saved as `model-weak`.
    """

    config: type[Config]
    start: Callable[[int], tuple[nnx.GraphDef, PyTree]]
    stages: Callable[[nnx.GraphDef, Config], Sequence[Stage]]
    columns: Sequence[str]
    vocabulary: int
    write: Callable[[Path, PyTree], None]
    finish: Callable[[Path, Path], object]
    weak: "Weak[Config] | None" = None

    def train(
        self,
        folder: Path,
        config: Config,
        *,
        save_every: int = 100,
        restart: bool = False,
        progress: bool = True,
        export: bool = True,
    ) -> PyTree:
        """Trains the model, or resumes from the last saved step, then writes `folder/model` and evaluates it.

        Args:
            folder: folder of the run.
            config: settings of the run.
            save_every: steps between saves.
            restart: discard the run that the folder holds and begin anew.
            progress: show a progress bar.
            export: write and evaluate the checkpoint.

        Returns:
            The network's parameters.

        Raises:
            OutputError: if the folder holds a run with other settings.
        """
        definition, parameters = self.start(config.seed)

        def keep(step: int, parameters: PyTree) -> None:
            """Saves the weaker model if it is the first one that knows enough."""
            kept, trial = folder / "model-weak", folder / "model-trial"
            if not export or self.weak is None or step <= self.weak.after(config) or (folder / WEAK_FILE).exists():
                return
            self.write(trial, jax.device_get(parameters["network"]))
            share = self.weak.share(trial)
            if share >= self.weak.least(config):
                shutil.rmtree(kept, ignore_errors=True)
                trial.rename(kept)
                write_json(folder / WEAK_FILE, {"step": step, "share": share})

        settings = dataclasses.asdict(config) | {"vocabulary": self.vocabulary}
        made = ["model", "model-weak", "model-trial", WEAK_FILE, "scorer-*", "accuracy.json", RECORD_FILE]
        with begun(folder, settings, restart=restart, made=made), recorded(folder):
            trained = fit(
                folder,
                parameters,
                self.stages(definition, config),
                columns=self.columns,
                save_every=save_every,
                progress=progress,
                check=keep if self.weak is not None else None,
                check_every=WEAK_EVERY,
            )
            if export:
                shutil.rmtree(folder / "model-trial", ignore_errors=True)
                self.write(folder / "model", trained["network"])
                self.finish(folder, folder / "model")
        return trained["network"]


def begin(learner: Callable[..., nnx.Module]) -> Callable[[int], tuple[nnx.GraphDef, PyTree]]:
    """The `start` of a recipe that trains one module."""

    def start(seed: int) -> tuple[nnx.GraphDef, PyTree]:
        definition, parameters = nnx.split(learner(rngs=nnx.Rngs(seed)))
        return definition, nnx.to_pure_dict(parameters)

    return start


def in_turn(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, each beginning where the one before ends."""
    found: list[Stage] = []
    for stage in stages:
        first = found[-1].first + found[-1].steps if found else 0
        found.append(stage._replace(first=first))
    return found


def cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], targets: Float[Array, "M V"] | None = None
) -> tuple[Array, Array]:
    """Mean loss and accuracy over the labels that are not negative.

    Args:
        logits: logits of the classes.
        labels: indices of the true classes; negative ones are skipped.
        targets: target distribution for each label, one row a label; one-hot by default.
    """
    counted = labels >= 0
    weight, known = counted.astype(jnp.float32), jnp.maximum(labels, 0)
    total = jnp.maximum(weight.sum(), 1.0)
    if targets is None:
        losses, best = optax.softmax_cross_entropy_with_integer_labels(logits, known), known
    else:
        wanted = jnp.take(targets, known, axis=0)
        losses, best = optax.softmax_cross_entropy(logits, wanted), jnp.argmax(wanted, axis=-1)
    hits = (jnp.argmax(logits, axis=-1) == best) & counted
    return (losses * weight).sum() / total, hits.sum().astype(jnp.float32) / total


def balanced_cross_entropy(
    logits: Float[Array, "*B V"], labels: Int[Array, "*B"], shown: Bool[Array, "*B"]
) -> tuple[Array, Array]:
    """Loss that gives objects and background equal weight, however few show an object; accuracy on objects alone."""
    loss, accuracy = cross_entropy(logits, jnp.where(shown, labels, -1))
    ground, _ = cross_entropy(logits, jnp.where(shown, -1, labels))
    return loss + ground, accuracy
