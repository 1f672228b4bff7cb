"""The base of all families' networks: merges pictures into the text and runs the decoder on both."""

import abc
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.kernels import masks
from jaxid.kernels.masks import Reads
from jaxid.nn import placement
from jaxid.nn.decoder import Decoder
from jaxid.nn.inputs import Inputs
from jaxid.nn.layers import take_tokens
from jaxid.nn.passes import DecoderOutput, forward
from jaxid.nn.sites import Capture, SiteFunction
from jaxid.nn.views import Memory


class Network(nnx.Module):
    """A vision-language model; families define how pictures become decoder tokens (`features`)."""

    tower: Any  # of pictures, the family's own
    decoder: Decoder
    config: Any

    @abc.abstractmethod
    def features(self, inputs: Inputs) -> Float[Array, "... D"]:
        """All pictures' decoder tokens; `inputs.image_rows` indexes them with all leading axes flattened."""

    def pixels(self, inputs: Inputs) -> Float[Array, "N ..."]:
        """The pictures in the dtype of the parameters."""
        return jnp.asarray(inputs.pixels, self.decoder.embedding[...].dtype)

    def spans(self, inputs: Inputs) -> Int[Array, "B T"]:
        """Index of the picture that every token belongs to, or -1; adjacent pictures count as one."""
        pictured = inputs.image_rows >= 0
        starts = pictured & ~jnp.pad(pictured, ((0, 0), (1, 0)))[:, :-1]
        return jnp.where(pictured, jnp.cumsum(starts, axis=1, dtype=jnp.int32) - 1, -1)

    def embed(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """Token embeddings with the pictures' tokens merged in."""
        if inputs.pixels is None:
            return self.decoder.embed(inputs.token_ids)
        pictured = inputs.image_rows >= 0
        # The image token itself may have no row in the embedding.
        text = self.decoder.embed(jnp.where(pictured, 0, inputs.token_ids))
        pictures = self.pictured(inputs).astype(text.dtype)
        return placement.stream(jnp.where(pictured[..., None], pictures, text))

    def pictured(self, inputs: Inputs) -> Float[Array, "B T D"]:
        """The picture's token at every position that has one; any at the others."""
        with placement.undivided(not inputs.apart):
            features = self.features(inputs)
        if inputs.apart:
            return of_own(features, inputs.image_rows)
        return jnp.take(features.reshape(-1, features.shape[-1]), jnp.maximum(inputs.image_rows, 0), axis=0)

    def reads(self, inputs: Inputs) -> Reads:
        """Which tokens each token reads: earlier ones except padding, in some models also those of its picture."""
        reads = masks.causal(inputs.positions, inputs.positions, inputs.valid)
        if self.config.text_config.bidirectional_pictures and inputs.pixels is not None:
            spans = self.spans(inputs)
            reads = masks.with_spans(reads, spans, jnp.where(inputs.valid, spans, -1))
        return reads

    def memory(self, inputs: Inputs) -> Memory | None:
        """The pictures' keys and values, in families with cross-attention layers."""
        del inputs
        return None

    def __call__(
        self, inputs: Inputs, intervention: SiteFunction, capture: Capture, wanted: Int[Array, "B S"] | None = None
    ) -> DecoderOutput:
        """Runs the whole network on a batch of prompts; `wanted` as in `forward`."""
        return forward(
            self.decoder,
            self.embed(inputs),
            inputs.positions,
            self.reads(inputs),
            intervention,
            capture,
            rope_positions=inputs.rope_positions,
            memory=self.memory(inputs),
            wanted=wanted,
            last=inputs.last,
        )


def of_own(features: Float[Array, "... D"], rows: Int[Array, "B T"], shared: int = 0) -> Float[Array, "B T D"]:
    """Tokens of pictures, of which every prompt has an equal share to itself.

    Devices that divide the prompts read their own pictures only.

    Args:
        features: tokens of all pictures, in the prompts' order.
        rows: index of every token among them with all leading axes flattened.
        shared: number by which the indices of the first picture's tokens are larger.
    """
    batch = rows.shape[0]
    own = features.reshape(batch, -1, features.shape[-1])
    first = shared + jnp.arange(batch)[:, None] * own.shape[1]
    return take_tokens(own, jnp.clip(rows - first, 0, own.shape[1] - 1))
