"""Training of a scorer of dense similarity maps over a frozen encoder ([DCSM] arXiv 2503.08723, section 5).

A step draws a batch of each data set. Its pictures and their opposites meet its captions and theirs, in both caption
versions, in one square of scores whose diagonal is right: cross-entropy over rows plus cross-entropy over columns.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxid import meshes
from jaxid.checks import Count, Range, check_finite, check_options
from jaxid.dcsm import augment
from jaxid.dcsm.datasets import Item
from jaxid.dcsm.embedding import TEXT_TOKENS, embed_images, embed_pixels, embed_texts
from jaxid.dcsm.placement import PUBLISHED, Placement
from jaxid.dcsm.scoring import SCORER_FILE, Scorer, caption_columns, check_vocabulary
from jaxid.errors import InputError
from jaxid.families.base import Encoder
from jaxid.io import write_json
from jaxid.kernels import scorer as kernels
from jaxid.kernels import similarity
from jaxid.nn.placement import placed
from jaxid.prompts.pictures import Picture
from jaxid.train import loop as training
from jaxid.train.loop import Batch, Metrics, Stage

COLUMNS = ("step", "stage", "epoch", "loss", "accuracy")
VERSIONS = 2
"""Every item has its caption in two wordings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that determines a training run, apart from the encoder and the data.

    Attributes:
        kind: of scorer.
        epochs: passes over the smallest data set, in whole batches; 26 as published.
        batch_size: items of each data set per step.
        learning_rate: of Adam; 1e-3, 1e-4 and 1e-5 as published.
        decay: lower the learning rate to zero along half a cosine; it stays as it is by default, as published.
        dropout: of the CNN's channels after its convolutions, of its hidden layer and of its score; 0 as published.
        augment: distort, rotate and sprinkle pictures at every step, instead of encoding them once.
        learn_vectors: train the functional vectors too.
        vocabulary: functional words.
        placement: where their columns are put: at the word's own token, or as published, replace or insert.
        text_tokens: caption tokens of a map.
        group: maps that are standardised together: call, all of a step, as published; own, for each picture those with
            its item's captions, as when it is asked about them; or mixed, at random between the former and as far on
            the other side of the latter.
        seed: of the scorer, the vectors, the order of items, dropout and augmentation.
    """

    kind: Literal["cnn", "mlp"] = "cnn"
    epochs: Count = 26
    batch_size: Annotated[int, Range(2)] = 8
    learning_rate: float = 1e-3
    decay: bool = False
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    augment: bool = True
    learn_vectors: bool = False
    vocabulary: tuple[str, ...] = PUBLISHED
    placement: Placement = "token"
    text_tokens: Count = TEXT_TOKENS
    group: Literal["call", "own", "mixed"] = "call"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            InputError: naming an option that is out of range.
        """
        check_options(self)
        check_vocabulary(self.vocabulary)
        if not self.learning_rate > 0:
            raise InputError(f"the learning rate must be above 0, not {self.learning_rate}.")


def settings_of(config: TrainingConfig) -> dict[str, object]:
    """The options of a run by name, without those that a subclass adds."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainingConfig)}


def two_way_loss(scores: Float[Array, "N M"], columns: Int[Array, "N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of every picture over captions plus that of every right caption over pictures; and accuracy.

    Args:
        scores: of pictures and captions; captions that belong to no picture count in the rows alone.
        columns: index of the correct caption of every picture.
    """
    rows = optax.softmax_cross_entropy_with_integer_labels(scores, columns).mean()
    own = jnp.take(scores, columns, axis=1).T  # captions in the order of the pictures
    across = optax.softmax_cross_entropy_with_integer_labels(own, jnp.arange(len(own))).mean()
    return rows + across, (jnp.argmax(scores, axis=1) == columns).mean()


def item_rows(count: int, step: int, size: int, seed: tuple[int, ...]) -> Int[np.ndarray, "B"]:
    """Indices of the items of a step, from an endless stream that is reshuffled for every pass."""
    passes, rows = np.divmod(np.arange(step * size, (step + 1) * size), count)
    orders = {one: np.random.default_rng((*seed, one)).permutation(count) for one in set(passes.tolist())}
    return np.array([orders[one][row] for one, row in zip(passes.tolist(), rows.tolist(), strict=True)])


def own_orders(counts: Sequence[int], step: int, size: int, seed: int) -> list[Int[np.ndarray, "B"]]:
    """Rows of each data set in a step: every set goes through all its items, at its own pace.

    Args:
        counts: number of items of each set.
        step: the step.
        size: items of a set in a step.
        seed: of the orders.
    """
    return [item_rows(count, step, size, (seed, index)) for index, count in enumerate(counts)]


Orders = Callable[[Sequence[int], int, int, int], list[Int[np.ndarray, "B"]]]
"""The form of `own_orders`."""


class Table:
    """The pictures and captions of the data sets, encoded once, and those of every item."""

    def __init__(
        self,
        encoder: Encoder,
        scorer: Scorer,
        sets: Sequence[Sequence[Item]],
        *,
        pictures: bool,
        progress: bool = False,
    ):
        """Encodes captions and, if asked, pictures.

        Args:
            encoder: the frozen model.
            scorer: says which words are functional.
            sets: data sets.
            pictures: whether to encode the pictures as well.
            progress: show a progress bar, on terminals.
        """
        captions: dict[str, int] = {}
        self.paths: list[Picture] = []
        self.items: list[list[tuple[list[int], list[list[list[int]]]]]] = []
        for items in sets:
            rows = []
            for item in items:
                shown = [item.picture] if item.opposite is None else [item.picture, item.opposite]
                indices = list(range(len(self.paths), len(self.paths) + len(shown)))
                self.paths += shown
                said = [(own.captions, own.opposite_captions) for own in (item, *item.alternatives)]
                texts = [
                    [[captions.setdefault(own[side][version], len(captions)) for own in said] for side in range(2)]
                    for version in range(VERSIONS)
                ]
                rows.append((indices, texts))
            self.items.append(rows)
        texts = embed_texts(encoder, list(captions), scorer.map_shape[1])
        self.words, self.texts = caption_columns(scorer, texts)
        self.images = embed_images(encoder, self.paths, progress=progress).tokens if pictures else None
        check_finite("the encoder's caption tokens", self.texts)
        if self.images is not None:
            check_finite("the encoder's image tokens", self.images)

    def batch(
        self, index: int, chosen: Sequence[int], seed: Sequence[int] = (0,)
    ) -> tuple[list[int], dict[str, np.ndarray]]:
        """Indices of the pictures of some items of a data set, and the arrays of their captions.

        Pictures come first, then their opposites, if they have any. Captions have the same order, in both versions.

        Args:
            index: of the data set.
            chosen: rows of the items.
            seed: of the choice among alternatives.
        """
        rng = np.random.default_rng([*seed, index])
        rows = [self.items[index][row] for row in chosen]
        sides = len(rows[0][0])
        pictures = [row[0][side] for side in range(sides) for row in rows]
        said = [[row[1][version][side] for side in range(2) for row in rows] for version in range(VERSIONS)]
        captions = np.array([[texts[rng.integers(len(texts))] for texts in own] for own in said])
        return pictures, {"texts": self.texts[captions], "words": self.words[captions]}


def train(
    folder: Path,
    encoder: Encoder,
    sets: Mapping[str, Sequence[Item]],
    config: TrainingConfig,
    *,
    save_every: int = 100,
    restart: bool = False,
    progress: bool = True,
    log: Callable[[dict[str, Any]], None] | None = None,
    started: Callable[[], object] | None = None,
    orders: Orders = own_orders,
) -> Scorer:
    """Trains a scorer, or resumes from the last saved step; writes `scorer.safetensors` beside state and metrics.

    Args:
        folder: of the run.
        encoder: the frozen model. The devices of its mesh share the training; those of all, if it is on one.
        sets: data sets by name; within a set, either all items have an opposite picture or none has.
        config: the run's settings; a folder begun with other settings, another encoder or other data is refused.
        save_every: steps between saves.
        restart: discard the run that the folder holds, and begin anew.
        progress: show progress bars, on terminals.
        log: also receives every row of metrics.
        started: called once, before the first step, when the folder is known to be this run's.
        orders: which items a step has.

    Raises:
        InputError: if there are no data sets, or one has fewer items than a batch or only some opposite pictures; or if
            the encoder gives NaN, or training diverges.
        OutputError: if the folder holds a run with other settings, is in use, or cannot be written to.
        CheckpointError: if its saved states are damaged.
        OutOfMemoryError: if the device's memory does not suffice for a step.
    """
    check_sets(sets, config)
    settings = settings_of(config) | {"encoder": encoder.name, "fingerprint": encoder.fingerprint}
    counts = [len(items) for items in sets.values()]
    settings |= {"items": dict(zip(sets, counts, strict=True)), "reference_bugs": orders is not own_orders}
    training.check_folder(folder, settings, restart=restart)
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
    table = Table(encoder, scorer, list(sets.values()), pictures=not config.augment, progress=progress)
    per_epoch = min(counts) // config.batch_size

    def batch(step: int) -> Batch:
        arrays: dict[str, np.ndarray] = {"step": np.asarray(step, np.int32)}
        rows = orders(counts, step, config.batch_size, config.seed)
        for index, (name, chosen) in enumerate(zip(sets, rows, strict=True)):
            pictures, captions = table.batch(index, chosen.tolist(), (config.seed, step))
            if table.images is None:
                shown = encoder.processor.pixels([table.paths[row] for row in pictures])
            else:
                shown = table.images[pictures]
            arrays |= {f"{name}.images": shown} | {f"{name}.{part}": value for part, value in captions.items()}
        return arrays

    parameters: dict[str, Any] = {"network": scorer.network._asdict()}
    if config.learn_vectors:
        parameters["vectors"] = scorer.vectors
    steps = config.epochs * per_epoch
    rate = optax.cosine_decay_schedule(config.learning_rate, steps) if config.decay else config.learning_rate
    stage = Stage(
        name="scorer",
        first=0,
        steps=steps,
        loss=lambda parameters, batch: loss(parameters, batch, scorer, list(sets), config, encoder, per_epoch),
        batch=batch,
        optimizer=optax.adam(rate),
        # Every picture meets every caption: devices share the pictures.
        whole=tuple(name for name in batch(0) if not name.endswith(".images")),
        constants={"encoder": encoder.parameters} if config.augment else {},
    )
    with training.begun(folder, settings, restart=restart, made=(SCORER_FILE, "metrics.json")):
        if started is not None:
            started()
        trained = training.fit(
            folder,
            parameters,
            [stage],
            columns=COLUMNS,
            save_every=save_every,
            progress=progress,
            log=log,
            advice="use a larger device, or begin anew with a smaller --batch-size",
            mesh=encoder.mesh,
        )
        found = dataclasses.replace(
            scorer,
            network=type(scorer.network)(**trained["network"]),
            vectors=jnp.asarray(trained.get("vectors", scorer.vectors)),
        )
        found.save(folder / SCORER_FILE)
        write_json(folder / "metrics.json", training.read_metrics(folder / "metrics.csv"))
    return found


def loss(
    parameters: PyTree,
    batch: Mapping[str, Any],
    scorer: Scorer,
    sets: Sequence[str],
    config: TrainingConfig,
    encoder: Encoder,
    per_epoch: int,
) -> tuple[Array, Metrics]:
    """The mean over data sets of both versions' two-way losses.

    Args:
        parameters: "network", and "vectors" if they are learned.
        batch: arrays of `train`'s batches; and "encoder", its parameters, if they are not those of `encoder`.
        scorer: kind of network, and the vectors if they are not learned.
        sets: names of the data sets.
        config: the run's settings.
        encoder: the frozen model, for augmented pictures.
        per_epoch: steps of an epoch.
    """
    network = type(scorer.network)(**parameters["network"])
    encoder = dataclasses.replace(encoder, parameters=batch.get("encoder", encoder.parameters))
    vectors = parameters.get("vectors", scorer.vectors)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), batch["step"])
    total, hits = jnp.zeros(()), jnp.zeros(())
    for index, name in enumerate(sets):
        own = jax.random.fold_in(key, index)
        images = batch[f"{name}.images"]
        if config.augment:
            images = jax.lax.stop_gradient(embed_pixels(encoder, _augmented(encoder, own, images)))
        for version in range(VERSIONS):
            texts, words = batch[f"{name}.texts"][version], batch[f"{name}.words"][version]
            first, second, third = jax.random.split(jax.random.fold_in(own, version), 3)
            rows = jax.random.permutation(first, len(images))
            columns = jax.random.permutation(second, len(texts))
            left, right = similarity.with_functional_rows(images[rows], texts[columns], words[columns], vectors)
            left = placed(left, (meshes.DATA, None, None))
            maps = similarity.similarity_maps(left, right)
            # Before the shuffle, caption k belonged to picture k, and its opposite came half of them later.
            places, half = jnp.argsort(columns), len(texts) // 2
            pair = jnp.stack([places[rows % half], places[rows % half + half]], axis=1)
            maps = standardised(maps, pair, config.group, jax.random.fold_in(third, 1))
            flat = maps.reshape(-1, *maps.shape[2:])
            scores = kernels.apply(network, flat, third, config.dropout).reshape(maps.shape[:2])
            loss, accuracy = two_way_loss(scores, places[rows])
            total, hits = total + loss, hits + accuracy
    epoch = batch["step"] / per_epoch
    mean = total / len(sets)
    return mean, {"epoch": epoch, "loss": mean, "accuracy": hits / (VERSIONS * len(sets))}


def standardised(
    maps: Float[Array, "N M I T"], own: Int[Array, "N C"], group: str, key: Array
) -> Float[Array, "N M I T"]:
    """The maps of a step, standardised as the option `group` says.

    Args:
        maps: of every picture with every caption.
        own: indices of the captions of every picture's item.
        group: call, own or mixed.
        key: of each picture's share of its own captions, if mixed: 0 to 2.
    """
    if group == "call":
        return similarity.standardise(maps)
    chosen = jnp.take_along_axis(maps, own[:, :, None, None], axis=1)
    mean, deviation = (f(chosen, axis=(1, 2, 3), keepdims=True) for f in (jnp.mean, partial(jnp.std, ddof=1)))
    if group == "mixed":
        # Captions of other kinds about a picture move the moments further from a step's than its own captions do.
        share = jax.random.uniform(key, (len(maps), 1, 1, 1), maps.dtype, maxval=2.0)
        mean = share * mean + (1 - share) * maps.mean()
        deviation = deviation**share * maps.std(ddof=1) ** (1 - share)  # positive beyond both, too
    return (maps - mean) / deviation


def _augmented(encoder: Encoder, key: Array, pixels: Float[Array, "N C Y X"]) -> Float[Array, "N C Y X"]:
    """Augments prepared pictures, in colours of 0..1."""
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
        InputError: if there are none, or one has fewer items than a batch or only some opposite pictures.
    """
    if not sets:
        raise InputError("training needs at least one data set.")
    for name, items in sets.items():
        if len(items) < config.batch_size:
            raise InputError(f"the data set {name!r} has {len(items)} items, a batch {config.batch_size}.")
        if len({item.opposite is None for item in items}) > 1:
            raise InputError(f"the data set {name!r} mixes items with and without an opposite picture.")
