"""LLaVA-1.5 in few, fast PyTorch operations for one prompt at a time, made from Hugging Face's loaded class.

These things make it fast on a CPU:

- Weight matrices are reordered once into the blocks that oneDNN multiplies by. That reaches the processor's peak, of
  which PyTorch's own `linear` reaches 85 %, and half of that for a dozen tokens. The residual sum, the gate's product
  and the activation functions are fused into the products.
- The tower stops at the hidden state that is read, and no block computes tokens that nothing reads.
- Norm weights, CLIP's factor 1.702 and the rotary embedding's pairing of channels are folded into the weights.
- A pass returns its keys and values. `resume` runs edited rows from any block on against such a prefix, which all rows
  share without a copy: attention over the prefix and over a row's own tokens are two calls, merged by their
  log-sum-exponentials.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Complex, Float, Int
from published import Network
from torch import Tensor
from torch.nn import functional

TOKENS = 600
"""Number of tokens for which oneDNN chooses the weights' blocks."""

QUERIES = 64
"""Number of queries of a long prompt that attend together; their scores fit in the processor's cache."""


class Linear:
    """A matrix product fused with what follows it; weights are reordered if PyTorch has oneDNN."""

    def __init__(self, weight: Float[Tensor, "M N"], bias: Float[Tensor, "M"] | None = None):
        """Reorders the weights."""
        self.fast = torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS) if self.fast else weight
        self.bias = bias

    def __call__(self, values: Float[Tensor, "*S N"]) -> Float[Tensor, "*S M"]:
        """The product."""
        if self.fast:
            return torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "none", [], "")
        return functional.linear(values, self.weight, self.bias)

    def silu(self, values: Float[Tensor, "*S N"]) -> Float[Tensor, "*S M"]:
        """SiLU of the product."""
        if self.fast:
            return torch.ops.mkldnn._linear_pointwise(values, self.weight, self.bias, "swish", [], "")
        return functional.silu(self(values), inplace=True)

    def plus(self, values: Float[Tensor, "*S N"], other: Float[Tensor, "*S M"]) -> Float[Tensor, "*S M"]:
        """The product plus another value."""
        if self.fast:
            return torch.ops.mkldnn._linear_pointwise.binary(values, other, self.weight, self.bias, "add")
        return self(values).add_(other)

    def times(self, values: Float[Tensor, "*S N"], other: Float[Tensor, "*S M"]) -> Float[Tensor, "*S M"]:
        """The product times another value."""
        if self.fast:
            return torch.ops.mkldnn._linear_pointwise.binary(values, other, self.weight, self.bias, "mul")
        return self(values).mul_(other)


def attend(
    queries: Float[Tensor, "R H S C"],
    keys: Float[Tensor, "R H T C"],
    values: Float[Tensor, "R H T C"],
    *,
    causal: bool = False,
) -> tuple[Float[Tensor, "R H S C"], Float[Tensor, "R H S"]]:
    """Attention with scaled queries, and the log-sum-exponentials of its scores."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, causal, scale=1.0)


def attend_causally(
    queries: Float[Tensor, "T H C"], keys: Float[Tensor, "T H C"], values: Float[Tensor, "T H C"]
) -> Float[Tensor, "T H C"]:
    """Causal attention over a long prompt, a few queries at a time."""
    mixed = torch.empty_like(queries)
    later = torch.full((QUERIES, QUERIES), -torch.inf).triu(1)
    for first in range(0, len(queries), QUERIES):
        end = min(first + QUERIES, len(queries))
        scores = torch.bmm(queries[first:end].transpose(0, 1), keys[:end].permute(1, 2, 0))
        scores[:, :, first:].add_(later[: end - first, : end - first])
        torch.softmax(scores, -1, out=scores)
        torch.bmm(scores, values[:end].transpose(0, 1), out=mixed[first:end].transpose(0, 1))
    return mixed


# --- the tower and the projector -----------------------------------------------------------------------------------

QUICK_GELU = 1.702


class TowerBlock:
    """A block of CLIP's tower."""

    def __init__(self, block: Network):
        """Converts Hugging Face's block."""
        attention = block.self_attn
        if attention.config.hidden_act != "quick_gelu":
            raise ValueError("only towers with quick_gelu are supported")
        self.heads = attention.num_heads
        self.norms = [(norm.weight, norm.bias, norm.eps) for norm in (block.layer_norm1, block.layer_norm2)]
        query = attention.q_proj
        self.query = Linear(query.weight * attention.scale, query.bias * attention.scale)
        self.key, self.value, self.out = (
            Linear(part.weight, part.bias) for part in (attention.k_proj, attention.v_proj, attention.out_proj)
        )
        # x * sigmoid(1.702 x) is silu(1.702 x) / 1.702.
        self.up = Linear(block.mlp.fc1.weight * QUICK_GELU, block.mlp.fc1.bias * QUICK_GELU)
        self.down = Linear(block.mlp.fc2.weight / QUICK_GELU, block.mlp.fc2.bias)

    def __call__(self, states: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The block's output for one picture's tokens."""
        normed = self._norm(states, 0)
        queries, keys, values = (
            part(normed).view(1, len(states), self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed, _ = attend(queries, keys, values)
        states = self.out.plus(mixed.transpose(1, 2).reshape(states.shape), states)
        return self.down.plus(self.up.silu(self._norm(states, 1)), states)

    def _norm(self, states: Float[Tensor, "T D"], index: int) -> Float[Tensor, "T D"]:
        weight, bias, epsilon = self.norms[index]
        return functional.layer_norm(states, weight.shape, weight, bias, epsilon)


class Tower:
    """CLIP's tower up to the hidden state that LLaVA reads, and the projector."""

    def __init__(self, network: Network):
        """Converts Hugging Face's LLaVA."""
        tower, projector, config = network.model.vision_tower, network.model.multi_modal_projector, network.config
        if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
            raise ValueError("only a single feature layer without the class token is supported")
        blocks = tower.encoder.layers
        count = config.vision_feature_layer % (len(blocks) + 1)
        embeddings = tower.embeddings
        self.patch = embeddings.patch_size
        self.side = embeddings.image_size // self.patch
        kernel = embeddings.patch_embedding.weight
        self.patches = Linear(kernel.reshape(len(kernel), -1))
        position = embeddings.position_embedding.weight
        self.class_token, self.position = embeddings.class_embedding + position[:1], position[1:].contiguous()
        self.norm = (tower.pre_layrnorm.weight, tower.pre_layrnorm.bias, tower.pre_layrnorm.eps)
        self.blocks = [TowerBlock(block) for block in blocks[:count]]
        self.first = Linear(projector.linear_1.weight, projector.linear_1.bias)
        self.activation = projector.act
        self.second = Linear(projector.linear_2.weight, projector.linear_2.bias)

    def __call__(self, picture: Float[Tensor, "C Y X"]) -> Float[Tensor, "I D"]:
        """One picture as decoder tokens."""
        edge = self.side * self.patch
        cut = picture[:, :edge, :edge].reshape(-1, self.side, self.patch, self.side, self.patch)
        flat = cut.permute(1, 3, 0, 2, 4).reshape(self.side**2, -1)
        states = torch.cat([self.class_token, self.patches.plus(flat, self.position)])
        weight, bias, epsilon = self.norm
        states = functional.layer_norm(states, weight.shape, weight, bias, epsilon)
        for block in self.blocks:
            states = block(states)
        return self.second(self.activation(self.first(states[1:])))


# --- the decoder ---------------------------------------------------------------------------------------------------

Cache = Sequence[tuple[Float[Tensor, "T H C"], Float[Tensor, "T H C"]]]
"""Keys and values of every block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """Keys, values and hidden states of a pass over a prompt.

    Attributes:
        cache: keys and values of all tokens.
        start: position of the first token whose hidden states are kept.
        states: hidden states of the kept tokens: the embeddings, then every block's output, Float[L1, S, D].
    """

    cache: Cache
    start: int
    states: Float[Tensor, "L1 S D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that continue a pass from position `start` on and read its keys and values before that position.

    Attributes:
        source: the pass.
        start: position of the first token that the rows compute again.
        joins: by layer, outputs of that layer from `start` on, with which rows begin: Float[R, S, D].
    """

    source: Pass
    start: int
    joins: Mapping[int, Float[Tensor, "R S D"]]


class DecoderBlock:
    """A block of Llama."""

    def __init__(self, block: Network):
        """Converts Hugging Face's block."""
        attention, mlp = block.self_attn, block.mlp
        config = attention.config
        if (
            attention.num_key_value_groups != 1
            or config.attention_bias
            or config.mlp_bias
            or config.hidden_act != "silu"
        ):
            raise ValueError("only a decoder of LLaVA-1.5's kind is supported")
        self.channels, self.epsilon = attention.head_dim, block.input_layernorm.variance_epsilon
        first, second = block.input_layernorm.weight, block.post_attention_layernorm.weight
        self.query = Linear(self._paired(attention.q_proj.weight) * first * attention.scaling)
        self.key = Linear(self._paired(attention.k_proj.weight) * first)
        self.value = Linear(attention.v_proj.weight * first)
        self.out = Linear(attention.o_proj.weight)
        self.gate, self.up = Linear(mlp.gate_proj.weight * second), Linear(mlp.up_proj.weight * second)
        self.down = Linear(mlp.down_proj.weight)

    def _paired(self, weight: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
        """Reorders rows so that the two channels of each rotary pair are adjacent."""
        halves = weight.view(-1, 2, self.channels // 2, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape)

    def keys_and_values(
        self, normed: Float[Tensor, "T D"], rotations: Complex[Tensor, "T 1 C2"]
    ) -> tuple[Float[Tensor, "T H C"], Float[Tensor, "T H C"]]:
        """Keys, rotated to their positions, and values."""
        return self.rotated(self.key(normed), rotations), self.value(normed).view(len(normed), -1, self.channels)

    def rotated(self, flat: Float[Tensor, "T M"], rotations: Complex[Tensor, "T 1 C2"]) -> Float[Tensor, "T H C"]:
        """Queries or keys, rotated in place to their positions."""
        heads = flat.view(len(flat), -1, self.channels)
        torch.view_as_complex(heads.view(*heads.shape[:2], -1, 2)).mul_(rotations)
        return heads

    def normed(self, states: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """The norm without its weight, which is folded into the matrices."""
        return functional.rms_norm(states, states.shape[-1:], None, self.epsilon)

    def finish(self, states: Float[Tensor, "T D"], mixed: Float[Tensor, "T H C"]) -> Float[Tensor, "T D"]:
        """The block's output, from its input and the output of its attention heads."""
        states = self.out.plus(mixed.reshape(states.shape), states)
        normed = self.normed(states)
        return self.down.plus(self.up.times(normed, self.gate.silu(normed)), states)


class Packed:
    """The whole network; all methods must be called in `torch.inference_mode`."""

    def __init__(self, network: Network):
        """Converts Hugging Face's LLaVA, which stays unchanged.

        Raises:
            ValueError: if it is not of LLaVA-1.5's kind.
        """
        decoder = network.model.language_model
        with torch.inference_mode():
            self.tower = Tower(network)
            self.embedding = decoder.embed_tokens.weight
            self.blocks = [DecoderBlock(block) for block in decoder.layers]
            self.unembedding = Linear(network.lm_head.weight * decoder.norm.weight)
        self.rotary = decoder.rotary_emb
        self.image_token = network.config.image_token_id

    @functools.cached_property
    def rotations(self) -> Complex[Tensor, "T C2"]:
        """The rotary embedding's cosine and sine at every position."""
        length = self.rotary.max_seq_len_cached
        cosine, sine = self.rotary(self.embedding, torch.arange(length)[None])
        half = cosine.shape[-1] // 2
        return torch.complex(cosine[0, :, :half], sine[0, :, :half]).contiguous()

    def run(self, token_ids: Int[Tensor, "T"], picture: Float[Tensor, "C Y X"], start: int) -> Pass:
        """A whole pass over one prompt without padding; the last block computes only the tokens from `start` on."""
        states = self.embedding[token_ids]
        states[token_ids == self.image_token] = self.tower(picture)
        rotations = self.rotations[: len(states), None]
        kept, cache = [states[start:]], []
        for block in self.blocks[:-1]:
            normed = block.normed(states)
            keys, values = block.keys_and_values(normed, rotations)
            queries = block.rotated(block.query(normed), rotations)
            states = block.finish(states, attend_causally(queries, keys, values))
            kept.append(states[start:])
            cache.append((keys, values))
        last = self.blocks[-1]
        cache.append(last.keys_and_values(last.normed(states), rotations))
        unfinished = Group(source=Pass(cache=cache, start=start, states=states), start=start, joins={})
        (rest,) = self._step(len(cache) - 1, [unfinished], [states[None, start:]])
        return Pass(cache=cache, start=start, states=torch.stack([*kept, rest[0]]))

    def resume(self, groups: Sequence[Group]) -> list[Float[Tensor, "R D"]]:
        """Runs the rows of all groups together to the last block.

        Returns:
            For each group the last token's hidden state before the final norm, with rows in the order of their layers.
        """
        last = len(self.blocks) - 1
        rows = [group.source.states[:0, group.start - group.source.start :] for group in groups]
        for layer in range(len(self.blocks)):
            active = [index for index, states in enumerate(rows) if len(states)]
            done = self._step(layer, [groups[i] for i in active], [rows[i] for i in active], tail=layer == last)
            for index, states in zip(active, done, strict=True):
                rows[index] = states
            for index, group in enumerate(groups):
                if layer == last:
                    rows[index] = rows[index][:, -1:]
                if layer in group.joins:
                    joining = group.joins[layer][:, -1:] if layer == last else group.joins[layer]
                    rows[index] = torch.cat([rows[index], joining])
        return [states[:, -1] for states in rows]

    def _step(
        self, layer: int, groups: Sequence[Group], rows: Sequence[Float[Tensor, "R S D"]], *, tail: bool = False
    ) -> list[Float[Tensor, "R S D"]]:
        """Runs one block on all rows; with `tail`, outputs are computed for each row's last token only."""
        if not rows:
            return []
        block = self.blocks[layer]
        states = torch.cat([part.flatten(0, 1) for part in rows])
        rotations = torch.cat(
            [self._rotations(group, part).flatten(0, 1) for group, part in zip(groups, rows, strict=True)]
        )
        normed = block.normed(states)
        keys, values = block.keys_and_values(normed, rotations)
        computed = asked = [len(part) * part.shape[1] for part in rows]
        if tail:
            asked = [len(part) for part in rows]
            ends = torch.cat([torch.full((len(part),), part.shape[1]) for part in rows]).cumsum(0) - 1
            states, normed, rotations = states[ends], normed[ends], rotations[ends]
        queries = block.rotated(block.query(normed), rotations)
        own = zip(queries.split(asked), keys.split(computed), values.split(computed), strict=True)
        mixed = [
            _shared_prefix_attention(mine, len(part), group.source.cache[layer], group.start)
            for mine, part, group in zip(own, rows, groups, strict=True)
        ]
        done = block.finish(states, torch.cat(mixed)).split(asked)
        return [part.view(len(before), -1, part.shape[-1]) for part, before in zip(done, rows, strict=True)]

    def _rotations(self, group: Group, rows: Float[Tensor, "R S D"]) -> Complex[Tensor, "R S 1 C2"]:
        rotations = self.rotations[group.start : group.start + rows.shape[1], None]
        return rotations.expand(len(rows), *rotations.shape)

    def log_probs(self, states: Float[Tensor, "R D"], answers: Int[Tensor, "n"]) -> Float[Tensor, "R n"]:
        """Log-probabilities of the answers as the next token, from outputs of the last block."""
        logits = self.unembedding(self.blocks[-1].normed(states))
        return logits[:, answers] - logits.logsumexp(dim=-1, keepdim=True)


def _shared_prefix_attention(
    own: tuple[Float[Tensor, "Q H C"], Float[Tensor, "N H C"], Float[Tensor, "N H C"]],
    rows: int,
    prefix: tuple[Float[Tensor, "T H C"], Float[Tensor, "T H C"]],
    length: int,
) -> Float[Tensor, "Q H C"]:
    """Attention of all rows to the prefix they share, merged with each row's causal attention to its own tokens.

    Args:
        own: queries of every row's last token or of all its tokens, and keys and values of all its tokens; rows are
            concatenated.
        rows: number of rows.
        prefix: keys and values of the pass that the rows continue.
        length: number of its tokens that the rows share.
    """
    shared_keys, shared_values = (part[:length].transpose(0, 1)[None] for part in prefix)
    before, sums = attend(own[0].transpose(0, 1)[None], shared_keys, shared_values)
    queries, keys, values = (part.unflatten(0, (rows, -1)).transpose(1, 2) for part in own)
    after, own_sums = attend(queries, keys, values, causal=queries.shape == keys.shape)
    share = torch.sigmoid(own_sums.transpose(1, 2).flatten(0, 1) - sums[0].transpose(0, 1))
    return torch.lerp(before[0].transpose(0, 1), after.transpose(1, 2).flatten(0, 1), share[..., None])
