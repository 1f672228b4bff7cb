"""What a family is, and what a loaded model is: a static description plus a pytree of parameters."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import PyTree

from jaxid.nn.decoder_config import ModelConfig
from jaxid.nn.dual import DualConfig, DualEncoder
from jaxid.nn.fields import Json
from jaxid.nn.keys import Key
from jaxid.nn.network import Network
from jaxid.prompts.dual import DualProcessor
from jaxid.prompts.processor import Processor, Prompts


@dataclasses.dataclass(frozen=True)
class Published:
    """The layers that published experiments use in one checkpoint, 0-based.

    Attributes:
        belief_swap: those swept by the belief swap ([ID], Figure 2).
        deviation: the one whose deviation is reported ([ID], Figure 8).
    """

    belief_swap: range | None = None
    deviation: int | None = None


def hidden_states(first: int, last: int) -> range:
    """The layers of which the paper names the first and last hidden state, which count the embeddings as 0."""
    return range(first - 1, last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """All that is particular to one model family, as its file declares it.

    Attributes:
        model_types: by which a config.json names it.
        config: from the parsed config.json to the config.
        network: (config, rngs=...) -> module.
        keys: the key table of a config.
        processor: turns pictures and text into arrays.
        renames: pairs of a pattern and its replacement, from other spellings of the tensors' names to the table's.
        unused: patterns of tensors that hold nothing learned, or nothing that the network reads.
        aliases: short names of published checkpoints, and their Hugging Face ids.
        published: the layers of published experiments by alias.
    """

    model_types: tuple[str, ...]
    config: Callable[[Json], Any]
    network: Callable[..., nnx.Module]
    keys: Callable[[Any], list[Key]]
    processor: type[Processor] | type[DualProcessor]
    renames: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    published: Mapping[str, Published] = dataclasses.field(default_factory=dict)


LoadedT = TypeVar("LoadedT", bound="Loaded")


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
    definition: Any
    config: Any
    processor: Any
    name: str
    fingerprint: str

    def with_parameters(self: LoadedT, parameters: PyTree) -> LoadedT:
        """The same network with other parameters, of which no checkpoint is known: it has no fingerprint."""
        return dataclasses.replace(self, parameters=parameters, fingerprint="")


class Model(Loaded):
    """A vision-language model."""

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

    def prepare(self, images: Any, questions: str | Sequence[str], **options: Any) -> Prompts:
        """Pictures and questions as `Prompts`; see `jaxid.prompts.processor.Processor.prepare`."""
        return self.processor.prepare(images, questions, **options)


class Encoder(Loaded):
    """A CLIP-like model: pictures and captions in one space."""

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
