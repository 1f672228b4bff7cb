"""Gemma 3: SigLIP, average pooling, a decoder of sliding and full layers (HF Gemma3ForConditionalGeneration)."""

import dataclasses
from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

from jaxid.errors import CheckpointError
from jaxid.families.base import Checkpoint, Family, hidden_states, sections
from jaxid.families.llava import RENAMES, UNUSED
from jaxid.nn.decoder import Decoder
from jaxid.nn.decoder_config import ModelConfig, decoder_config, decoder_keys, unembedding_key
from jaxid.nn.fields import Json
from jaxid.nn.inputs import Inputs
from jaxid.nn.keys import Key, prefixed
from jaxid.nn.layers import Linear, RMSNorm
from jaxid.nn.network import Network
from jaxid.nn.vision import VisionConfig, VisionTower, vision_config, vision_keys
from jaxid.prompts.base import Encoded, ImageProcessor, Tokenizer
from jaxid.prompts.pictures import Clip, Picture
from jaxid.prompts.processor import Processor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(ModelConfig):
    """Shape of a Gemma 3 model; names and defaults as in HF's Gemma3Config."""

    vision_config: VisionConfig  # the tower
    mm_tokens_per_image: int = 256  # decoder tokens of a picture
    image_token_index: int = 262144  # id of the token that pictures replace
    boi_token_index: int = 255999  # id of the token before a picture
    eoi_token_index: int = 256000  # id of the token after a picture

    @classmethod
    def from_hf(cls, fields: Json) -> "Gemma3Config":
        """Reads a Gemma 3 config.json.

        Raises:
            CheckpointError: for a part of another kind, or an unknown field.
        """
        fields, text, vision = sections(
            fields, "image", "boi", "eoi", text_kind="gemma3_text", vision_kind="siglip_vision_model", tied=True
        )
        parts = {
            "text_config": decoder_config(text, "gemma3_text"),
            "vision_config": vision_config(vision, "siglip_vision_model"),
        }
        config = cls.from_fields(fields | parts, where="the top level")
        side = config.vision_config.patch_side
        tokens = int(config.mm_tokens_per_image**0.5)
        # Squares of `side // tokens` patches are pooled to a token; the patches that remain must not make another one.
        if not tokens or tokens**2 != config.mm_tokens_per_image or side // max(1, side // tokens) != tokens:
            raise CheckpointError(
                f"mm_tokens_per_image {config.mm_tokens_per_image} is not a square to which {side} x {side} patches "
                "can be pooled."
            )
        return config

    @property
    def image_tokens(self) -> int:
        """Decoder tokens per picture, I."""
        return self.mm_tokens_per_image


def gemma3_keys(config: Gemma3Config) -> list[Key]:
    """The family's key table, in the names that published checkpoints use."""
    return [
        *prefixed(vision_keys(config.vision_config), "vision_tower.vision_model.", "tower."),
        Key("multi_modal_projector.mm_soft_emb_norm.weight", "projector_norm.scale"),
        Key("multi_modal_projector.mm_input_projection_weight", "projector.kernel"),
        *prefixed(decoder_keys(config.text_config), "language_model.model.", "decoder."),
        unembedding_key(config.text_config, "language_model.lm_head.weight"),
    ]


class Gemma3(Network):
    """The network."""

    def __init__(self, config: Gemma3Config, *, rngs: nnx.Rngs):
        """Builds tower, projector and decoder."""
        self.config = config
        tower = config.vision_config
        self.tower = VisionTower(tower, rngs=rngs)
        self.projector_norm = RMSNorm(tower.hidden_size, tower.layer_norm_eps, 1.0)
        self.projector = Linear(tower.hidden_size, config.text_config.hidden_size, bias=False, rngs=rngs)
        self.decoder = Decoder(config.text_config, rngs=rngs)

    def features(self, inputs: Inputs) -> Float[Array, "N I D"]:
        """The pictures' decoder tokens, means over squares of the tower's outputs."""
        last = self.tower.post_norm(self.tower(self.pixels(inputs), [-1])[0])
        side = self.config.vision_config.patch_side
        tokens = int(self.config.mm_tokens_per_image**0.5)
        square = side // tokens
        grid = last.reshape(last.shape[0], side, side, -1)[:, : tokens * square, : tokens * square]
        pooled = grid.reshape(last.shape[0], tokens, square, tokens, square, -1).mean(axis=(2, 4))
        return self.projector(self.projector_norm(pooled.reshape(last.shape[0], tokens * tokens, -1)))


class Gemma3Processor(Processor):
    """Every picture takes the same number of tokens; pan and scan is off, as published."""

    config: Gemma3Config

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor, config: Gemma3Config):
        """Takes loaded parts and the network's config.

        Raises:
            CheckpointError: if pan and scan is on, or the tokenizer lacks the tokens around a picture.
        """
        super().__init__(tokenizer, image_processor, config)
        if getattr(image_processor, "do_pan_and_scan", None):
            raise CheckpointError("the image processor asks for pan and scan, which is not implemented; turn it off.")
        self.image_token: str = self.placeholder
        marks = {"boi_token_index": config.boi_token_index, "eoi_token_index": config.eoi_token_index}
        for name, index in marks.items():
            if tokenizer.convert_ids_to_tokens(index) in (None, tokenizer.unk_token):
                raise CheckpointError(f"the tokenizer has no token for config.json's {name} {index}.")
        self.placeholder, self.end = (tokenizer.convert_ids_to_tokens(index) for index in marks.values())

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as arrays, and their tokens between marks and blank lines."""
        encoded = super().encode(pictures, members)
        text = f"\n\n{self.placeholder}{self.image_token * self.config.image_tokens}{self.end}\n\n"
        return encoded._replace(tokens=tuple(own._replace(text=text) for own in encoded.tokens))


FAMILY = Family(
    model_types=("gemma3",),
    config=Gemma3Config.from_hf,
    network=Gemma3,
    keys=gemma3_keys,
    processor=Gemma3Processor,
    renames=RENAMES,
    unused=UNUSED,
    checkpoints={
        "gemma-4b": Checkpoint("google/gemma-3-4b-it", belief_swap=hidden_states(10, 22)),
        "gemma-12b": Checkpoint("google/gemma-3-12b-it", belief_swap=hidden_states(10, 22)),
    },
)
