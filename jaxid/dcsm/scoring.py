"""Scores of pictures and captions by a trained scorer of their dense similarity maps."""

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxid.dcsm.embedding import Pictures, Texts
from jaxid.dcsm.placement import PLACEMENTS, PUBLISHED, place
from jaxid.errors import CheckpointError, InputError, OutputError
from jaxid.kernels import scorer as kernels
from jaxid.kernels import similarity
from jaxid.kernels.scorer import CNN, MLP
from jaxid.results import whole_file

KINDS = {"cnn": CNN, "mlp": MLP}
"""Kinds of scorers by name."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scorer:
    """A scorer of maps, and what its maps are made with.

    Attributes:
        network: the CNN or MLP.
        vectors: columns of functional words.
        vocabulary: functional words, in the order of the vectors.
        placement: where their columns are put, see `placement.PLACEMENTS`.
        encoder: name of the encoder whose maps it was trained on.
    """

    network: CNN | MLP
    vectors: Float[Array, "W I"]
    vocabulary: tuple[str, ...] = PUBLISHED
    placement: str = "token"
    encoder: str = ""

    def __post_init__(self) -> None:
        """Refuses vectors that do not fit."""
        if self.placement not in PLACEMENTS:
            raise InputError(f"placement {self.placement!r} is not one of {', '.join(PLACEMENTS)}.")

    @property
    def map_shape(self) -> tuple[int, int]:
        """Picture and caption tokens of its maps, I and T."""
        return kernels.map_shape(self.network)

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
        if not vocabulary:
            raise InputError("the list of functional words is empty.")
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
        described = {name: getattr(self, name) for name in ("vocabulary", "placement", "encoder")}
        described["kind"] = next(kind for kind, found in KINDS.items() if isinstance(self.network, found))
        with whole_file(path) as temporary:
            save_file(
                {**arrays, "vectors": np.asarray(self.vectors)}, temporary, metadata={"scorer": json.dumps(described)}
            )

    @classmethod
    def load(cls, path: str | Path) -> "Scorer":
        """Reads a `.safetensors` file that `save` wrote, or a `.pt` file in the authors' layout.

        Raises:
            CheckpointError: if the file is missing, damaged, or no scorer.
        """
        if Path(path).suffix in (".pt", ".pth"):
            from jaxid.checkpoints.scorer_files import read_authors_scorer

            network, vectors = read_authors_scorer(path)
            return cls(network=network, vectors=jnp.asarray(vectors), placement="replace")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                described = json.loads((file.metadata() or {})["scorer"])
                arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            vectors, kind = arrays.pop("vectors"), KINDS[described["kind"]]
            network = kind(**{name.removeprefix("network."): value for name, value in arrays.items()})
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no scorer at {path}.") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no scorer that jaxid wrote ({error!r}).") from error
        return cls(
            network=network,
            vectors=vectors,
            vocabulary=tuple(described["vocabulary"]),
            placement=described["placement"],
            encoder=described["encoder"],
        )


jax.tree_util.register_dataclass(
    Scorer, data_fields=["network", "vectors"], meta_fields=["vocabulary", "placement", "encoder"]
)


def score(
    scorer: Scorer, pictures: Pictures, texts: Texts, *, group: str = "call", mesh: Mesh | None = None
) -> Float[np.ndarray, "N M"]:
    """Scores of every picture with every caption.

    A score depends on what its map is standardised over: "pair" (the map alone), "row" (the picture's maps with all
    these captions), or "call" (all maps of the call, as published).

    Args:
        scorer: the trained scorer.
        pictures: encoded.
        texts: encoded.
        group: what maps are standardised over.
        mesh: splits the pictures over the devices of its axis "data".

    Raises:
        InputError: for an unknown group, or maps of another size than the scorer's.
    """
    check_fit(scorer, pictures.tokens.shape[1], texts.tokens.shape[1], group)
    words, tokens = caption_columns(scorer, texts)
    if mesh is not None:
        return _score_sharded(scorer, pictures.tokens, tokens, words, group, mesh)
    return np.asarray(score_tokens(scorer, jnp.asarray(pictures.tokens), tokens, words, group))


def score_own(
    scorer: Scorer, pictures: Pictures, texts: Texts, captions: int, *, group: str = "row"
) -> Float[np.ndarray, "N C"]:
    """Scores of every picture with captions of its own, C in a row for each picture.

    Args:
        scorer: the trained scorer.
        pictures: encoded, N.
        texts: encoded, N * C.
        captions: of each picture, C.
        group: "pair" or "row": a picture's maps with its captions, which is one call as published.

    Raises:
        InputError: for an unknown group, maps of another size, or a number of texts that is not N * C.
    """
    check_fit(scorer, pictures.tokens.shape[1], texts.tokens.shape[1], group)
    if group == "call" or len(texts) != len(pictures) * captions:
        raise InputError(f"{len(pictures)} pictures need {captions} captions each, and a group 'pair' or 'row'.")
    words, tokens = caption_columns(scorer, texts)
    shape = (len(pictures), captions)
    return np.asarray(
        _score_own(scorer, pictures.tokens, tokens.reshape(*shape, *tokens.shape[1:]), words.reshape(*shape, -1), group)
    )


def caption_columns(scorer: Scorer, texts: Texts) -> tuple[Int[np.ndarray, "M T"], Float[np.ndarray, "M T E"]]:
    """Functional words at every column of captions' maps, and the caption token that stands there otherwise."""
    columns = place(texts.captions, scorer.vocabulary, scorer.placement)
    return columns.words, np.take_along_axis(texts.tokens, columns.sources[..., None], axis=1)


def check_fit(scorer: Scorer, image_tokens: int, text_tokens: int, group: str) -> None:
    """Refuses maps of another size than the scorer's.

    Raises:
        InputError: naming both sizes, or the unknown group.
    """
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

    Memory does not grow with the number of pairs.

    Args:
        scorer: the scorer.
        images: tokens of pictures, of length one.
        texts: tokens of captions, of length one.
        words: functional word at every caption token, or -1.
        group: what maps are standardised over.
    """
    images, texts = similarity.with_functional_rows(images, texts, words, scorer.vectors)
    return kernels.score(scorer.network, images, texts, similarity.moments(images, texts, group))


@partial(jax.jit, static_argnums=4)
def _score_own(
    scorer: Scorer,
    images: Float[Array, "N I E"],
    texts: Float[Array, "N C T E"],
    words: Int[Array, "N C T"],
    group: str,
) -> Float[Array, "N C"]:
    images, texts = similarity.with_functional_rows(images, texts, words, scorer.vectors)
    found = jax.vmap(lambda picture, captions: similarity.moments(picture[None], captions, group))(images, texts)
    own = similarity.Moments(*(value[:, 0] for value in found))
    return kernels.score_rows(scorer.network, images, texts, own)


def _score_sharded(
    scorer: Scorer,
    images: Float[np.ndarray, "N I E"],
    texts: Float[np.ndarray, "M T E"],
    words: Int[np.ndarray, "M T"],
    group: str,
    mesh: Mesh,
) -> Float[np.ndarray, "N M"]:
    """Scores with the pictures split over devices, which share nothing but what was standardised over."""
    left, right = similarity.with_functional_rows(
        jnp.asarray(images), jnp.asarray(texts), jnp.asarray(words), scorer.vectors
    )
    found = similarity.moments(left, right, group)
    count, gap = len(images), -len(images) % mesh.shape["data"]
    left = jnp.pad(left, ((0, gap), (0, 0), (0, 0)))
    spread = [jnp.broadcast_to(value, (count, value.shape[1])) for value in found]
    spread = similarity.Moments(*(jnp.pad(value, ((0, gap), (0, 0)), constant_values=1) for value in spread))
    split, whole = PartitionSpec("data"), PartitionSpec()
    left, spread = jax.device_put((left, spread), NamedSharding(mesh, split))
    network, right = jax.device_put((scorer.network, right), NamedSharding(mesh, whole))
    tiles = jax.shard_map(
        kernels.score, mesh=mesh, in_specs=(whole, split, whole, split), out_specs=split, check_vma=False
    )
    return np.asarray(jax.jit(tiles)(network, left, right, spread))[:count]
