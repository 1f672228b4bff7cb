"""CoCa's contrastive side: an attentional pooler over patches, a class token after captions (`open_clip.CoCa`)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import CheckpointError
from jaxid.families import openclip
from jaxid.families.base import Checkpoint, Family
from jaxid.kernels import attention
from jaxid.nn.dual import DualConfig, DualEncoder, Encoded
from jaxid.nn.fields import Json
from jaxid.nn.keys import LINEAR, Key, layer_norm, projection
from jaxid.nn.layers import LayerNorm, Linear, Projections, filled, normal
from jaxid.prompts.dual import DualProcessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoCaConfig(DualConfig):
    """Shape of a CoCa model, after OpenCLIP's `model_cfg`."""

    projection_dim: int  # E
    queries: int = 256  # number of the pooler's queries; the first is compared with captions
    pooler_heads: int = 8  # H of the pooler

    @classmethod
    def from_openclip(cls, fields: Json) -> "CoCaConfig":
        """Reads the `model_cfg` of a CoCa.

        Raises:
            CheckpointError: for a field that is not implemented.
        """
        text, vision = openclip.parts(fields, "multimodal_cfg", "custom_text")
        tower = fields["vision_cfg"]
        if tower.get("attentional_pool") is not True or not text.class_token:
            raise CheckpointError(
                "a CoCa without vision_cfg.attentional_pool or text_cfg.embed_cls is not implemented."
            )
        return cls(
            text_config=text,
            vision_config=vision,
            projection_dim=fields["embed_dim"],
            queries=tower.get("attn_pooler_queries", 256),
            pooler_heads=tower.get("attn_pooler_heads", 8),
        )


def coca_keys(config: CoCaConfig) -> list[Key]:
    """The key table of the contrastive side."""
    pooler = "visual.attn_pool"
    projections = [
        key
        for index, name in enumerate(("query", "key", "value"))
        for key in (
            Key(f"{pooler}.attn.{name[0]}_proj_weight", f"pooler.{name}", LINEAR),
            Key(f"{pooler}.attn.in_proj_bias", f"pooler.{name}_bias", part=(index, 3)),
        )
    ]
    return [
        *openclip.tower_keys(config.vision_config),
        Key(f"{pooler}.query", "pooler.queries"),
        *layer_norm(f"{pooler}.ln_q", "pooler.query_norm"),
        *layer_norm(f"{pooler}.ln_k", "pooler.key_norm"),
        *projections,
        *projection(f"{pooler}.attn.out_proj", "pooler.out", bias=True),
        *layer_norm("visual.ln_post", "pooler.post_norm"),
        Key("visual.proj", "image_projection.kernel"),
        *openclip.text_keys(config.text_config, "text."),
        Key("logit_scale", "logit_scale"),
    ]


class Pooler(Projections):
    """Attention of learned queries to the tower's tokens, and a norm (`open_clip`'s AttentionalPooler)."""

    def __init__(self, config: CoCaConfig, *, rngs: nnx.Rngs):
        """Builds the pooler."""
        width, embed, heads = config.vision_config.hidden_size, config.projection_dim, config.pooler_heads
        epsilon = config.vision_config.layer_norm_eps
        super().__init__(embed, heads, embed // heads, 1, source_width=width, bias=True, out_bias=True, rngs=rngs)
        self.queries = normal(rngs, (config.queries, embed), 1.0)
        self.query_norm, self.key_norm = LayerNorm(embed, epsilon), LayerNorm(width, epsilon)
        self.post_norm = LayerNorm(embed, epsilon)

    def __call__(self, x: Float[Array, "N I D"]) -> Float[Array, "N Q E"]:
        """Pools all tokens, once by each query."""
        query, key, value = self.into_heads(self.query_norm(self.queries[...]), self.key_norm(x))
        query = jnp.broadcast_to(query, (len(x), *query.shape))
        return self.post_norm(self.from_heads(attention.attend(query, key, value)))

    def each(self, x: Float[Array, "N I D"]) -> Float[Array, "N I E"]:
        """Pools each token as if it were the only one; queries then make no difference."""
        _, value = self.remembered(self.key_norm(x))
        return self.post_norm(self.from_heads(value))


class CoCa(DualEncoder):
    """The network."""

    def __init__(self, config: CoCaConfig, *, rngs: nnx.Rngs):
        """Builds both towers, the pooler and the projections."""
        super().__init__(config, config.projection_dim, bias=False, rngs=rngs)
        self.pooler = Pooler(config, rngs=rngs)
        self.image_projection = Linear(config.projection_dim, config.projection_dim, bias=False, rngs=rngs)
        self.logit_scale = filled(2.6592, ())

    def image(self, pixels: Float[Array, "N C Y X"]) -> Encoded:
        """Pictures in the joint space; class token and patches each as if the pooler saw it alone."""
        states = self.tower(pixels, [-1])[0]
        pooled = self.pooler(states)[:, 0]
        return Encoded(self.image_projection(self.pooler.each(states)), self.image_projection(pooled))

    def text(self, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]) -> Encoded:
        """Captions in the joint space; pooled at the class token, which comes after the window."""
        del valid
        # As in training, id 0 counts as padding, although "!" within a word has it too.
        states = self.text_encoder.normed(self.text_encoder(token_ids, token_ids != 0, [-1])[0])
        tokens = self.text_projection(states)
        return Encoded(tokens[:, :-1], tokens[:, -1])


FAMILY = Family(
    model_types=("open_clip_coca",),
    config=CoCaConfig.from_openclip,
    network=CoCa,
    keys=coca_keys,
    processor=DualProcessor,
    unused=(r"^text_decoder\.",),  # the captioner
    checkpoints={"coca-b32": Checkpoint("laion/CoCa-ViT-B-32-laion2B-s13B-b90k")},
)
