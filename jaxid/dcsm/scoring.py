"""Scores of pictures and captions by a trained scorer of their dense similarity maps."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxid import meshes
from jaxid.checks import check_finite
from jaxid.dcsm.embedding import Pictures, Texts
from jaxid.dcsm.placement import PLACEMENTS, PUBLISHED, place
from jaxid.errors import CheckpointError, InputError, JaxidError, OutputError
from jaxid.halving import Halving
from jaxid.interp.programs import program
from jaxid.io import reading, whole_file
from jaxid.kernels import scorer as kernels
from jaxid.kernels import similarity
from jaxid.kernels.scorer import CNN, MLP
from jaxid.meshes import DATA

KINDS = {"cnn": CNN, "mlp": MLP}
"""Kinds of scorers by name."""

SCORER_FILE = "scorer.safetensors"
"""Name of a training run's scorer, and of the scorer in a model's folder."""

_TORCH = (".pt", ".pth")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scorer:
    """A scorer of maps, with the settings of the maps that it reads.

    Attributes:
        network: the CNN or MLP.
        vectors: columns of functional words.
        vocabulary: functional words, in the order of the vectors.
        placement: where their columns are put, see `placement.Placement`.
        encoder: name of the encoder whose maps it was trained on.
    """

    network: CNN | MLP
    vectors: Float[Array, "W I"]
    vocabulary: tuple[str, ...] = PUBLISHED
    placement: str = "token"
    encoder: str = ""

    def __post_init__(self) -> None:
        """Refuses an invalid placement or vocabulary; arrays may be traced, and are checked where they are used.

        Raises:
            InputError: saying which.
        """
        if self.placement not in PLACEMENTS:
            raise InputError(f"placement {self.placement!r} is not one of {', '.join(PLACEMENTS)}.")
        check_vocabulary(self.vocabulary)

    @property
    def map_shape(self) -> tuple[int, int]:
        """Number of picture and caption tokens of its maps, I and T."""
        return kernels.map_shape(self.network)

    @property
    def kind(self) -> str:
        """Kind of its network, a name in `KINDS`."""
        return next(kind for kind, found in KINDS.items() if isinstance(self.network, found))

    @classmethod
    def init(
        cls,
        key: Array,
        image_tokens: int,
        text_tokens: int,
        *,
        kind: str = "cnn",
        vocabulary: Sequence[str] = PUBLISHED,
        placement: str = "token",
        encoder: str = "",
    ) -> "Scorer":
        """An untrained scorer.

        Raises:
            InputError: for an unknown kind or placement, or an empty vocabulary.
        """
        if kind not in KINDS:
            raise InputError(f"the scorer {kind!r} is not one of {', '.join(KINDS)}.")
        check_vocabulary(vocabulary)
        first, second = jax.random.split(key)
        make = kernels.init_cnn if kind == "cnn" else kernels.init_mlp
        return cls(
            network=make(first, image_tokens, text_tokens),
            vectors=similarity.functional_vectors(second, len(vocabulary), image_tokens),
            vocabulary=tuple(vocabulary),
            placement=placement,
            encoder=encoder,
        )

    def save(self, path: str | Path) -> None:
        """Writes a `.safetensors` file, atomically.

        Raises:
            OutputError: if it cannot be written.
        """
        from safetensors.numpy import save_file

        if Path(path).suffix != ".safetensors":
            raise OutputError(f"{path} cannot be written: a scorer's name must end in .safetensors.")
        arrays = {f"network.{name}": np.asarray(value) for name, value in self.network._asdict().items()}
        described = {name: getattr(self, name) for name in ("vocabulary", "placement", "encoder", "kind")}
        with whole_file(path) as temporary:
            save_file(
                {**arrays, "vectors": np.asarray(self.vectors)}, temporary, metadata={"scorer": json.dumps(described)}
            )

    def export(self, path: str | Path) -> None:
        """Writes a `.pt` file with the keys of the authors' checkpoints, which their loader takes; needs PyTorch.

        Such a file does not say where columns are put: the published evaluation replaces, the published demo inserts.

        Raises:
            CheckpointError: if torch is not installed.
            OutputError: if it cannot be written.
        """
        from jaxid.checkpoints.scorer_files import write_authors_scorer

        if Path(path).suffix not in _TORCH:
            raise OutputError(f"{path} cannot be written: the name of such a file must end in .pt.")
        words = None if self.vocabulary == PUBLISHED else self.vocabulary
        write_authors_scorer(path, self.network, np.asarray(self.vectors), words)

    @classmethod
    def load(cls, path: str | Path) -> "Scorer":
        """Reads a `.safetensors` file that `save` wrote, or a `.pt` file in the authors' layout.

        Raises:
            CheckpointError: if the file is missing, damaged, or no scorer.
        """
        if Path(path).suffix in _TORCH:
            from jaxid.checkpoints.scorer_files import read_authors_scorer

            network, vectors, words = read_authors_scorer(path)
            network, vectors = jax.tree.map(jnp.asarray, (network, vectors))
            vocabulary = PUBLISHED if words is None else words
            what = f"{path} does not list its words, so the published list is used" if words is None else str(path)
            try:
                found = cls(network=network, vectors=vectors, vocabulary=vocabulary, placement="replace")
            except InputError as error:
                raise CheckpointError(f"{path}: {error}") from error
            _check_arrays(found, what, CheckpointError)
            return found
        from safetensors import safe_open

        with reading(path, "a scorer that jaxid wrote"):
            with safe_open(path, framework="numpy") as file:
                described = json.loads((file.metadata() or {})["scorer"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, value in arrays.items():
                if not jnp.issubdtype(value.dtype, jnp.floating):
                    raise CheckpointError(f"{path}: {name} holds {value.dtype}, not floating-point numbers.")
                with np.errstate(over="ignore"):
                    arrays[name] = value.astype(np.float32)
                check_finite(f"{path}: {name}", arrays[name], CheckpointError)
            vectors, kind = jnp.asarray(arrays.pop("vectors")), KINDS[described["kind"]]
            network = kind(**{name.removeprefix("network."): jnp.asarray(value) for name, value in arrays.items()})
            vocabulary, placement, encoder = (described[name] for name in ("vocabulary", "placement", "encoder"))
            words = vocabulary if isinstance(vocabulary, list) else [None]
            if not all(isinstance(text, str) for text in (*words, placement, encoder)):
                raise CheckpointError(f"{path}: the vocabulary must be a list of texts, placement and encoder texts.")
            try:
                found = cls(
                    network=network, vectors=vectors, vocabulary=tuple(vocabulary), placement=placement, encoder=encoder
                )
            except InputError as error:
                raise CheckpointError(f"{path}: {error}") from error
        _check_arrays(found, str(path), CheckpointError)
        return found


def check_vocabulary(words: Sequence[str]) -> None:
    """Refuses functional words that a scorer cannot have.

    Raises:
        InputError: if there are none, one is no word, or one is there twice.
    """
    if not words:
        raise InputError("the list of functional words is empty.")
    for index, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            raise InputError(f"functional word {index} is {word!r:.80}, not a text.")
    twice = next((word for index, word in enumerate(words) if word in words[:index]), None)
    if twice is not None:
        raise InputError(f"the functional word {twice!r:.80} is there twice; keep it once.")


def _check_arrays(scorer: Scorer, what: str, error: type[JaxidError] = InputError) -> None:
    """Refuses arrays that do not fit each other or the vocabulary."""
    wrong = kernels.misfit(scorer.network)
    if wrong is None:
        rows, expected = scorer.vectors.shape, (len(scorer.vocabulary), scorer.map_shape[0])
        if rows != expected:
            wrong = f"{expected[0]} functional words at {expected[1]} image tokens need vectors {expected}, not {rows}"
    if wrong is not None:
        raise error(f"{what}: {wrong}.")


jax.tree_util.register_dataclass(
    Scorer, data_fields=["network", "vectors"], meta_fields=["vocabulary", "placement", "encoder"]
)


def score(
    scorer: Scorer, pictures: Pictures, texts: Texts, *, group: str = "call", mesh: Mesh | None = None
) -> Float[np.ndarray, "N M"]:
    """Scores of every picture with every caption.

    A score depends on what its map is standardised over: "pair" (the map alone), "row" (the picture's maps with all
    these captions), or "call" (all maps of the call, as published). Maps all of whose numbers are alike have no
    deviation, and so no score.

    Args:
        scorer: the trained scorer.
        pictures: encoded.
        texts: encoded.
        group: what maps are standardised over.
        mesh: its axis "data" divides the pictures, whatever their number; by default the mesh on which the scorer is,
            if there is one.

    Raises:
        InputError: for an unknown group, maps of another size than the scorer's, or scores that are not finite: it
            names the pictures and captions that hold NaN, or whose maps are constant.
    """
    check_fit(scorer, pictures.tokens.shape[1], texts.tokens.shape[1], group)
    words, tokens = caption_columns(scorer, texts)
    mesh = mesh or meshes.of(scorer)
    if mesh is not None:
        scores = _score_sharded(scorer, pictures.tokens, tokens, words, group, mesh)
    else:
        scores = _score_halved(scorer, pictures.tokens, tokens, words, group)
    return _finite(scores, scorer, pictures, texts, lambda _, column: column, "picture {}".format)


def score_own(
    scorer: Scorer,
    pictures: Pictures,
    texts: Texts,
    captions: int,
    *,
    group: str = "row",
    name: Callable[[int], str] = "picture {}".format,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "N C"]:
    """Scores of every picture with its own captions, C adjacent ones for each picture.

    Args:
        scorer: the trained scorer.
        pictures: encoded, N.
        texts: encoded, N * C.
        captions: of each picture, C.
        group: "pair" or "row": a picture's maps with its captions, which is one call as published.
        name: how messages call a picture, by its index.
        mesh: as in `score`.

    Raises:
        InputError: for an unknown group, maps of another size, a number of texts that is not N * C, or scores that are
            not finite, as in `score`.
    """
    check_fit(scorer, pictures.tokens.shape[1], texts.tokens.shape[1], group)
    if group == "call" or len(texts) != len(pictures) * captions:
        raise InputError(f"{len(pictures)} pictures need {captions} captions each, and a group 'pair' or 'row'.")
    words, tokens = caption_columns(scorer, texts)
    shape = (len(pictures), captions)
    own: Any = pictures.tokens, tokens.reshape(*shape, *tokens.shape[1:]), words.reshape(*shape, -1)
    network, vectors = scorer.network, scorer.vectors
    mesh = mesh or meshes.of(scorer)
    if mesh is not None:
        gap = -len(pictures) % meshes.size(mesh, DATA)
        filled = [np.concatenate([array, np.repeat(array[-1:], gap, axis=0)]) for array in own]
        (network, vectors), own = meshes.replicated(mesh, (network, vectors)), meshes.sharded(mesh, filled)
    scores = np.asarray(_score_own(network, vectors, own[0], own[1], own[2], group))[: len(pictures)]
    return _finite(scores, scorer, pictures, texts, lambda row, column: row * captions + column, name)


def _finite(
    scores: Float[np.ndarray, "N C"],
    scorer: Scorer,
    pictures: Pictures,
    texts: Texts,
    caption: Callable[[int, int], int],
    name: Callable[[int], str],
) -> Float[np.ndarray, "N C"]:
    """The scores; refuses those that are not finite, saying why."""
    bad = np.argwhere(~np.isfinite(scores)).tolist()
    if not bad:
        return scores
    for part, value in [*scorer.network._asdict().items(), ("vectors", scorer.vectors)]:
        check_finite(f"the scorer's {part}", value)
    for side, label in ((pictures, name), (texts, lambda row: repr(texts.captions.texts[row]))):
        rows = np.flatnonzero(~np.isfinite(side.tokens).all(axis=(1, 2))).tolist()
        if rows:
            raise InputError(f"the tokens of {_listed([label(row) for row in rows])} hold NaN or infinity.")
    shown = [f"{name(row)} with {texts.captions.texts[caption(row, column)]!r}" for row, column in bad]
    raise InputError(
        f"the scores of {_listed(shown)} are not finite: where all numbers of the maps are alike, there is nothing to "
        "standardise; else the scorer's parameters are too large."
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few, and a count of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def caption_columns(scorer: Scorer, texts: Texts) -> tuple[Int[np.ndarray, "M T"], Float[np.ndarray, "M T E"]]:
    """The functional word of every column of captions' maps, and the caption token of columns without one."""
    columns = place(texts.captions, scorer.vocabulary, scorer.placement)
    return columns.words, np.take_along_axis(texts.tokens, columns.sources[..., None], axis=1)


def check_fit(scorer: Scorer, image_tokens: int, text_tokens: int, group: str) -> None:
    """Refuses maps whose size is not the scorer's.

    Raises:
        InputError: naming both sizes, the unknown group, or arrays of the scorer that do not fit each other.
    """
    _check_arrays(scorer, "the scorer")
    if group not in similarity.GROUPS:
        raise InputError(f"group {group!r} is not one of {', '.join(similarity.GROUPS)}.")
    if scorer.map_shape != (image_tokens, text_tokens):
        own = " x ".join(map(str, scorer.map_shape))
        trained = f", trained on {scorer.encoder}," if scorer.encoder else ""
        raise InputError(
            f"the scorer{trained} reads maps of {own} tokens; these pictures and captions make {image_tokens} x "
            f"{text_tokens}. Use the encoder that it was trained with, or train one for this encoder."
        )


@partial(jax.jit, static_argnums=4)
def score_tokens(
    scorer: Scorer,
    images: Float[Array, "N I E"],
    texts: Float[Array, "M T E"],
    words: Int[Array, "M T"],
    group: str = "call",
) -> Float[Array, "N M"]:
    """Scores of every picture with every caption, from their tokens; works under `jit`, `vmap` and `grad`.

    Memory does not grow with the number of pairs. Maps all of whose numbers are alike have the score NaN.

    Args:
        scorer: the scorer.
        images: tokens of pictures, of length one.
        texts: tokens of captions, of length one.
        words: functional word at every caption token, or -1.
        group: what maps are standardised over.
    """
    images, texts = similarity.with_functional_rows(images, texts, words, scorer.vectors)
    return kernels.score(scorer.network, images, texts, similarity.moments(images, texts, group))


@program(static_argnums=5)
def _score_own(
    network: CNN | MLP,
    vectors: Float[Array, "W I"],
    images: Float[Array, "N I E"],
    texts: Float[Array, "N C T E"],
    words: Int[Array, "N C T"],
    group: str,
) -> Float[Array, "N C"]:
    def scores(network: CNN | MLP, vectors: Array, images: Array, texts: Array, words: Array) -> Float[Array, "n C"]:
        images, texts = similarity.with_functional_rows(images, texts, words, vectors)
        found = jax.vmap(lambda picture, captions: similarity.moments(picture[None], captions, group))(images, texts)
        own = similarity.Moments(*(value[:, 0] for value in found))
        return kernels.score_rows(network, images, texts, own)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        whole, split = PartitionSpec(), _by_rows(mesh)
        specs = (whole, whole, split, split, split)
        scores = jax.shard_map(scores, in_specs=specs, out_specs=split, check_vma=False)
    return scores(network, vectors, images, texts, words)


def _score_halved(
    scorer: Scorer,
    images: Float[np.ndarray, "N I E"],
    texts: Float[np.ndarray, "M T E"],
    words: Int[np.ndarray, "M T"],
    group: str,
) -> Float[np.ndarray, "N M"]:
    """Scores of all pictures at once; of fewer, standardised over all, where the device's memory does not suffice."""
    halving, count = Halving(len(images), unit="picture", advice="use fewer captions or a larger device"), len(images)
    prepared = cache(lambda: _prepared(scorer, images, texts, words, group))

    def some(rows: slice) -> np.ndarray:
        if halving.size == count:
            return np.asarray(score_tokens(scorer, jnp.asarray(images), texts, words, group))
        left, right, found = prepared()
        own = similarity.Moments(*(value[rows] for value in found))
        return np.asarray(_score_some(scorer.network, left[rows], right, own))

    return np.concatenate([found for _, found in halving.slices(count, some)])


_score_some = jax.jit(kernels.score)


def _prepared(scorer: Scorer, images: Any, texts: Any, words: Any, group: str) -> tuple[Any, Any, similarity.Moments]:
    """Tokens with functional rows, and the moments of every picture's maps with every caption."""
    left, right = similarity.with_functional_rows(
        jnp.asarray(images), jnp.asarray(texts), jnp.asarray(words), scorer.vectors
    )
    found = similarity.moments(left, right, group)
    return left, right, similarity.Moments(*(jnp.broadcast_to(one, (len(images), one.shape[1])) for one in found))


def _score_sharded(
    scorer: Scorer,
    images: Float[np.ndarray, "N I E"],
    texts: Float[np.ndarray, "M T E"],
    words: Int[np.ndarray, "M T"],
    group: str,
    mesh: Mesh,
) -> Float[np.ndarray, "N M"]:
    """Scores with the pictures split over devices, which share only the moments for standardising."""
    left, right, found = _prepared(scorer, images, texts, words, group)
    count, gap = len(images), -len(images) % meshes.size(mesh, DATA)
    left = jnp.pad(left, ((0, gap), (0, 0), (0, 0)))
    spread = similarity.Moments(*(jnp.pad(value, ((0, gap), (0, 0)), constant_values=1) for value in found))
    split, whole = _by_rows(mesh), PartitionSpec()
    left, spread = jax.device_put((left, spread), NamedSharding(mesh, split))
    network, right = jax.device_put((scorer.network, right), NamedSharding(mesh, whole))
    tiles = jax.shard_map(
        kernels.score, mesh=mesh, in_specs=(whole, split, whole, split), out_specs=split, check_vma=False
    )
    return np.asarray(jax.jit(tiles)(network, left, right, spread))[:count]


def _by_rows(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Pictures over axis "data", if the mesh has it."""
    return PartitionSpec(DATA) if DATA in mesh.axis_names else PartitionSpec()
