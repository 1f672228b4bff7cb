"""Training of a scorer of dense similarity maps over a frozen encoder ([DCSM] arXiv 2503.08723, section 5).

A step draws a batch of each data set. Its pictures and their opposites meet its captions and theirs, in both caption
versions, in one square of scores whose diagonal is right: cross-entropy over rows plus cross-entropy over columns.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxid.checks import check_finite, check_options
from jaxid.dcsm import augment
from jaxid.dcsm.datasets import Item
from jaxid.dcsm.embedding import TEXT_TOKENS, embed_images, embed_pixels, embed_texts
from jaxid.dcsm.placement import PLACEMENTS, PUBLISHED
from jaxid.dcsm.scoring import KINDS, Scorer, caption_columns, check_vocabulary
from jaxid.errors import InputError
from jaxid.families.base import Encoder
from jaxid.io import write_json
from jaxid.kernels import scorer as kernels
from jaxid.kernels import similarity
from jaxid.train import loop as training
from jaxid.train.loop import Batch, Metrics, Stage

COLUMNS = ("step", "stage", "epoch", "loss", "accuracy")
VERSIONS = 2
"""Every item has its caption in two wordings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """All that decides the outcome of a training run, besides encoder and data."""

    kind: str = "cnn"  # of scorer: cnn or mlp
    epochs: int = 26  # passes over the largest data set; the authors' number
    batch_size: int = 8  # items of each data set per step
    learning_rate: float = 1e-3  # of Adam
    dropout: float = 0.5  # behind the CNN's hidden layers
    augment: bool = True  # turn, tilt and sprinkle the pictures anew at every step
    learn_vectors: bool = False  # functional vectors are trained with the scorer
    vocabulary: tuple[str, ...] = PUBLISHED  # functional words
    placement: str = "token"  # where their columns are put
    text_tokens: int = TEXT_TOKENS  # caption tokens of a map
    seed: int = 0  # of the scorer, the vectors, the order of items, dropout and augmentation

    def __post_init__(self) -> None:
        """Refuses numbers that make no sense.

        Raises:
            InputError: naming the setting.
        """
        check_options(self)
        if self.kind not in KINDS or self.placement not in PLACEMENTS:
            raise InputError(
                f"the scorer {self.kind!r} is not one of {', '.join(KINDS)}, or the placement {self.placement!r} not "
                f"one of {', '.join(PLACEMENTS)}."
            )
        check_vocabulary(self.vocabulary)
        if self.text_tokens < 1:
            raise InputError(f"maps need at least one caption token, not {self.text_tokens}.")
        if self.epochs < 1 or self.batch_size < 2:
            raise InputError(f"{self.epochs} epochs of batches of {self.batch_size}: at least 1 and 2 are needed.")
        if not 0 <= self.dropout < 1 or not self.learning_rate > 0:
            raise InputError("dropout must be at least 0 and below 1, the learning rate above 0.")


def two_way_loss(scores: Float[Array, "N M"], columns: Int[Array, "N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of every picture over captions plus that of every right caption over pictures; and accuracy.

    Args:
        scores: of pictures and captions; captions that are nobody's count in the rows alone.
        columns: the right caption of every picture.
    """
    rows = optax.softmax_cross_entropy_with_integer_labels(scores, columns).mean()
    own = jnp.take(scores, columns, axis=1).T  # captions in the order of the pictures
    across = optax.softmax_cross_entropy_with_integer_labels(own, jnp.arange(len(own))).mean()
    return rows + across, (jnp.argmax(scores, axis=1) == columns).mean()


def item_rows(count: int, step: int, size: int, seed: tuple[int, ...]) -> Int[np.ndarray, "B"]:
    """Which items a step takes of a data set: an endless stream, shuffled anew for every pass."""
    places = np.arange(step * size, (step + 1) * size)
    orders = {turn: np.random.default_rng((*seed, turn)).permutation(count) for turn in set((places // count).tolist())}
    return np.array([orders[place // count][place % count] for place in places.tolist()])


class Table:
    """All pictures and captions of the data sets, encoded once, and which of them every item has."""

    def __init__(self, encoder: Encoder, scorer: Scorer, sets: Sequence[Sequence[Item]], *, pictures: bool):
        """Encodes captions, and pictures if they never change.

        Args:
            encoder: the frozen model.
            scorer: tells functional words.
            sets: data sets.
            pictures: whether to encode the pictures as well.
        """
        captions: dict[str, int] = {}
        self.paths: list[Any] = []
        self.items: list[list[tuple[list[int], list[list[int]]]]] = []
        for items in sets:
            rows = []
            for item in items:
                shown = [item.picture] if item.opposite is None else [item.picture, item.opposite]
                numbers = list(range(len(self.paths), len(self.paths) + len(shown)))
                self.paths += shown
                texts = [
                    [captions.setdefault(text, len(captions)) for text in (right, wrong)]
                    for right, wrong in zip(item.captions, item.opposite_captions, strict=True)
                ]
                rows.append((numbers, texts))
            self.items.append(rows)
        texts = embed_texts(encoder, list(captions), scorer.map_shape[1])
        self.words, self.texts = caption_columns(scorer, texts)
        self.images = embed_images(encoder, self.paths, progress=True).tokens if pictures else None
        check_finite("the encoder's caption tokens", self.texts)
        if self.images is not None:
            check_finite("the encoder's image tokens", self.images)

    def batch(self, number: int, chosen: Sequence[int]) -> tuple[list[int], dict[str, np.ndarray]]:
        """Numbers of the pictures of some items of a data set, and the arrays of their captions.

        Pictures stand first, then their opposites, where they have any; captions likewise, in both versions.
        """
        rows = [self.items[number][place] for place in chosen]
        sides = len(rows[0][0])
        pictures = [row[0][side] for side in range(sides) for row in rows]
        captions = np.array(
            [[row[1][version][side] for side in range(2) for row in rows] for version in range(VERSIONS)]
        )
        return pictures, {"texts": self.texts[captions], "words": self.words[captions]}


def train(
    folder: Path,
    encoder: Encoder,
    sets: Mapping[str, Sequence[Item]],
    config: TrainingConfig,
    *,
    save_every: int = 100,
    progress: bool = True,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> Scorer:
    """Trains a scorer, or goes on from the last saved step; writes `scorer.safetensors` beside state and metrics.

    Args:
        folder: of the run.
        encoder: the frozen model.
        sets: data sets by name; within one, all items have an opposite picture or none has.
        config: the run's settings; a folder begun with others, another encoder or other data is refused.
        save_every: steps between saves.
        progress: show a progress bar.
        log: is also given every row of metrics.

    Raises:
        InputError: if there are no data sets, one has fewer items than a batch, or mixes both kinds; or if the encoder
            gives NaN, or training diverges.
        CheckpointError: if the folder holds a run with other settings.
    """
    check_sets(sets, config)
    key = jax.random.key(config.seed)
    image_tokens = jax.eval_shape(lambda: encoder.network().image(_blank(encoder))).tokens.shape[1]
    scorer = Scorer.init(
        jax.random.fold_in(key, 0),
        image_tokens,
        config.text_tokens,
        kind=config.kind,
        vocabulary=config.vocabulary,
        placement=config.placement,
        encoder=encoder.name,
    )
    table = Table(encoder, scorer, list(sets.values()), pictures=not config.augment)
    longest = max(len(items) for items in sets.values())
    per_epoch = -(-longest // config.batch_size)

    def batch(step: int) -> Batch:
        arrays: dict[str, np.ndarray] = {"step": np.asarray(step, np.int32)}
        for number, (name, items) in enumerate(sets.items()):
            chosen = item_rows(len(items), step, config.batch_size, (config.seed, number))
            pictures, captions = table.batch(number, chosen.tolist())
            if table.images is None:
                shown = encoder.processor.pixels([table.paths[row] for row in pictures])
            else:
                shown = table.images[pictures]
            arrays |= {f"{name}.images": shown} | {f"{name}.{part}": value for part, value in captions.items()}
        return arrays

    parameters: dict[str, Any] = {"network": scorer.network._asdict()}
    if config.learn_vectors:
        parameters["vectors"] = scorer.vectors
    stage = Stage(
        name="scorer",
        first=0,
        steps=config.epochs * per_epoch,
        loss=lambda parameters, batch: loss(parameters, batch, scorer, list(sets), config, encoder, per_epoch),
        batch=batch,
        optimizer=optax.adam(config.learning_rate),
        whole=tuple(batch(0)),
    )
    settings = dataclasses.asdict(config) | {"encoder": encoder.name, "fingerprint": encoder.fingerprint}
    settings["items"] = {name: len(items) for name, items in sets.items()}
    with training.begun(folder, settings):
        trained = training.fit(
            folder, parameters, [stage], columns=COLUMNS, save_every=save_every, progress=progress, log=log
        )
        found = dataclasses.replace(
            scorer,
            network=type(scorer.network)(**trained["network"]),
            vectors=jnp.asarray(trained.get("vectors", scorer.vectors)),
        )
        found.save(folder / "scorer.safetensors")
        write_json(folder / "metrics.json", training.read_metrics(folder / "metrics.csv"))
    return found


def loss(
    parameters: Any,
    batch: Mapping[str, Array],
    scorer: Scorer,
    sets: Sequence[str],
    config: TrainingConfig,
    encoder: Encoder,
    per_epoch: int,
) -> tuple[Array, Metrics]:
    """The mean over data sets of both versions' two-way losses.

    Args:
        parameters: "network", and "vectors" if they are learned.
        batch: arrays of `train`'s batches.
        scorer: kind of network, and the vectors if they are not learned.
        sets: names of the data sets.
        config: the run's settings.
        encoder: the frozen model, for augmented pictures.
        per_epoch: steps of an epoch.
    """
    network = type(scorer.network)(**parameters["network"])
    vectors = parameters.get("vectors", scorer.vectors)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), batch["step"])
    total, hits = jnp.zeros(()), jnp.zeros(())
    for number, name in enumerate(sets):
        own = jax.random.fold_in(key, number)
        images = batch[f"{name}.images"]
        if config.augment:
            images = jax.lax.stop_gradient(embed_pixels(encoder, _augmented(encoder, own, images)))
        for version in range(VERSIONS):
            texts, words = batch[f"{name}.texts"][version], batch[f"{name}.words"][version]
            first, second, third = jax.random.split(jax.random.fold_in(own, version), 3)
            rows = jax.random.permutation(first, len(images))
            columns = jax.random.permutation(second, len(texts))
            left, right = similarity.with_functional_rows(images[rows], texts[columns], words[columns], vectors)
            maps = similarity.standardise(similarity.similarity_maps(left, right))
            flat = maps.reshape(-1, *maps.shape[2:])
            scores = kernels.apply(network, flat, third, config.dropout).reshape(maps.shape[:2])
            # Where the caption of each picture has gone: captions begin with the pictures' own, in their order.
            loss, accuracy = two_way_loss(scores, jnp.argsort(columns)[rows])
            total, hits = total + loss, hits + accuracy
    epoch = batch["step"] / per_epoch
    mean = total / len(sets)
    return mean, {"epoch": epoch, "loss": mean, "accuracy": hits / (VERSIONS * len(sets))}


def _augmented(encoder: Encoder, key: Array, pixels: Float[Array, "N C Y X"]) -> Float[Array, "N C Y X"]:
    """Prepared pictures turned, tilted and sprinkled, in their own colours."""
    settings = encoder.processor.image_processor
    mean, std = (jnp.asarray(value, jnp.float32)[:, None, None] for value in (settings.image_mean, settings.image_std))
    pictures = jnp.moveaxis(pixels * std + mean, 1, -1)
    changed = jnp.moveaxis(augment.augment(key, jnp.clip(pictures, 0, 1)), -1, 1)
    return (changed - mean) / std


def _blank(encoder: Encoder) -> Float[Array, "1 C Y X"]:
    config = encoder.config.vision_config
    return jnp.zeros((1, config.num_channels, config.image_size, config.image_size))


def check_sets(sets: Mapping[str, Sequence[Item]], config: TrainingConfig) -> None:
    """Refuses data sets that training cannot use.

    Raises:
        InputError: if there are none, one has fewer items than a batch, or mixes both kinds.
    """
    if not sets:
        raise InputError("training needs at least one data set.")
    for name, items in sets.items():
        if len(items) < config.batch_size:
            raise InputError(f"the data set {name!r} has {len(items)} items, a batch {config.batch_size}.")
        if len({item.opposite is None for item in items}) > 1:
            raise InputError(f"the data set {name!r} mixes items with and without an opposite picture.")
