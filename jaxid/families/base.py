"""Loaded models: static description plus a pytree of parameters."""

import dataclasses
from typing import Any, TypeVar

import jax
from flax import nnx

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

    parameters: Any
    definition: Any
    config: Any
    processor: Any
    name: str
    fingerprint: str

    def network(self) -> Any:
        """The Flax module with these parameters."""
        return nnx.merge(self.definition, nnx.State(self.parameters))

    def with_parameters(self: LoadedT, parameters: Any) -> LoadedT:
        """The same network with other parameters, of which no checkpoint is known: it has no fingerprint."""
        return dataclasses.replace(self, parameters=parameters, fingerprint="")


class Model(Loaded):
    """A vision-language model."""

    @property
    def num_layers(self) -> int:
        """Number of decoder blocks, L."""
        return self.config.text_config.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of the decoder's residual stream, D."""
        return self.config.text_config.hidden_size

    def prepare(self, images: Any, questions: Any, **options: Any) -> Any:
        """Pictures and questions as `Prompts`; see `jaxid.prompts.processor.Processor.prepare`."""
        return self.processor.prepare(images, questions, **options)


class Encoder(Loaded):
    """A CLIP-like model: pictures and captions in one space."""


for kind in (Model, Encoder):
    jax.tree_util.register_dataclass(
        kind,
        data_fields=["parameters"],
        meta_fields=["definition", "config", "processor", "name", "fingerprint"],
    )
