"""What a family declares, and what a loaded model is: a static description plus a pytree of parameters."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxid import meshes
from jaxid.errors import CheckpointError
from jaxid.nn.decoder_config import ModelConfig
from jaxid.nn.dual import DualConfig, DualEncoder
from jaxid.nn.fields import Json
from jaxid.nn.keys import Key
from jaxid.nn.layers import Config
from jaxid.nn.network import Network
from jaxid.prompts.dual import DualProcessor
from jaxid.prompts.pictures import Pictures
from jaxid.prompts.processor import Processor, Prompts

ConfigT = TypeVar("ConfigT", bound=Config)
LoadedT = TypeVar("LoadedT", bound="Loaded")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, and the layers (0-based) that published experiments use in it.

    Attributes:
        repository: its Hugging Face id.
        belief_swap: the layers swept by the belief swap ([ID], Figure 2).
        deviation: the layer whose deviation is reported ([ID], Figure 8).
    """

    repository: str
    belief_swap: range | None = None
    deviation: int | None = None


def hidden_states(first: int, last: int) -> range:
    """The layers between two hidden states as the paper counts them, where 0 is the embeddings; both included."""
    return range(first - 1, last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Generic[ConfigT]):
    """All that is particular to one model family, as its file declares it.

    Attributes:
        model_types: the values of `model_type` in the config.json files of the family.
        config: builds the config from a parsed config.json.
        network: (config, rngs=...) -> module.
        keys: the key table of a config.
        processor: turns pictures and text into arrays.
        renames: pairs of a pattern and its replacement, from other spellings of tensor names to the key table's.
        unused: patterns of tensors that the network does not read.
        checkpoints: published checkpoints by their short names.
    """

    model_types: tuple[str, ...]
    config: Callable[[Json], ConfigT]
    network: Callable[..., nnx.Module]
    keys: Callable[[ConfigT], list[Key]]
    processor: type[Processor] | type[DualProcessor]
    renames: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    checkpoints: Mapping[str, Checkpoint] = dataclasses.field(default_factory=dict)


def sections(
    fields: Json,
    *tokens: str,
    text_kind: str | None = None,
    vision_kind: str | None = None,
    tower: Json | None = None,
    tied: bool | None = None,
) -> tuple[Json, Json, Json]:
    """Splits a config.json into its top level, its `text_config` and its `vision_config`.

    Args:
        fields: the parsed JSON object, which is left as it is.
        tokens: "image" for the field `image_token_id` (transformers 5), which gets its older name `image_token_index`.
        text_kind: the only `model_type` of a `text_config` that is accepted; any by default.
        vision_kind: the only `model_type` of a `vision_config` that is accepted; any by default.
        tower: the `vision_config` of a file that has none.
        tied: whether Hugging Face's class ties the embeddings where the top level does not say so; None if it then
            reads the `text_config`.

    Raises:
        CheckpointError: for a section of another kind.
    """
    older = {f"{name}_token_id": f"{name}_token_index" for name in tokens}
    top = {older.get(name, name): value for name, value in fields.items()}
    text, vision = dict(top.pop("text_config", None) or {}), top.pop("vision_config", None)
    vision = dict((tower or {}) if vision is None else vision)
    for name, section, kind in (("text_config", text, text_kind), ("vision_config", vision, vision_kind)):
        if kind is not None and (section.get("model_type") or kind) != kind:
            raise CheckpointError(f"{name}.model_type {section['model_type']!r} is not {kind!r}.")
    ties = top.pop("tie_word_embeddings", tied)
    if ties or tied is not None:
        text["tie_word_embeddings"] = bool(ties)
    return top, text, vision


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A network ready for use in pure functions.

    Attributes:
        parameters: nested dictionaries of arrays, block parameters stacked over layers.
        definition: the network's structure (Flax NNX graph definition).
        config: the family's config.
        processor: turns pictures and text into arrays.
        name: how the user called it.
        fingerprint: identifies the checkpoint's files; empty for parameters of no checkpoint, see `with_parameters`.
    """

    parameters: PyTree
    definition: object
    config: object
    processor: object
    name: str
    fingerprint: str

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.parameters)
        count, dtypes = sum(math.prod(leaf.shape) for leaf in leaves), sorted({str(leaf.dtype) for leaf in leaves})
        on = "" if self.mesh is None else f" on {dict(self.mesh.shape)}"
        return f"{type(self).__name__}({self.name!r}, {count:,} parameters in {', '.join(dtypes)}{on})"

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the parameters; None for a single one, and for traced parameters."""
        return meshes.of(self.parameters)

    def with_parameters(self: LoadedT, parameters: PyTree) -> LoadedT:
        """The same network with other parameters; they belong to no checkpoint, so the fingerprint is empty."""
        return dataclasses.replace(self, parameters=parameters, fingerprint="")


class Model(Loaded):
    """A vision-language model."""

    definition: nnx.GraphDef[Network]
    config: ModelConfig
    processor: Processor

    def network(self) -> Network:
        """The Flax module with these parameters."""
        return nnx.merge(self.definition, nnx.State(self.parameters))

    @property
    def num_layers(self) -> int:
        """Number of layers of the decoder, L."""
        return self.config.text_config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of the decoder's residual stream, D."""
        return self.config.text_config.hidden_size

    def prepare(
        self,
        images: Pictures,
        questions: str | Sequence[str],
        *,
        chat: bool = True,
        raw: bool = False,
        pad_to_multiple: int = 8,
    ) -> Prompts:
        """Pictures and questions as `Prompts`; see `jaxid.prompts.processor.Processor.prepare`."""
        return self.processor.prepare(images, questions, chat=chat, raw=raw, pad_to_multiple=pad_to_multiple)


class Encoder(Loaded):
    """A CLIP-like model: pictures and captions in one space."""

    definition: nnx.GraphDef[DualEncoder]
    config: DualConfig
    processor: DualProcessor

    def network(self) -> DualEncoder:
        """The Flax module with these parameters."""
        return nnx.merge(self.definition, nnx.State(self.parameters))


for kind in (Model, Encoder):
    jax.tree_util.register_dataclass(
        kind,
        data_fields=["parameters"],
        meta_fields=["definition", "config", "processor", "name", "fingerprint"],
    )
