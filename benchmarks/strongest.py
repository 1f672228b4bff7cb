"""The strongest procedure on Hugging Face's own modules: one control pass, whose KV cache all edits share.

Only tokens from the first edited one on run again, from the first edited layer on. All edits of a prompt pass through a
block as one long row of tokens. An attention mask lets each edit's tokens read the cached prefix and their own tokens,
so that the cache is not copied for every edit, as a batch would require. The tower stops at the hidden state that is
read, and the last block's MLP sees only the last token. Results have the shapes and order of `published`.
"""

import dataclasses
import inspect
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from published import Batch, Edit, Network, Swap, Swapped
from published import load as load
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

TOKENS_TOGETHER = 768
"""Number of the edits' tokens that pass through a block together."""

_CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"
"""The blocks' argument for keys and values, which transformers 5.24 renamed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """What a control pass over a prompt keeps.

    Attributes:
        states: residual stream from `start` on: the embeddings, then every block's output, Float[L + 1, S, D].
        cache: keys and values of all tokens.
        start: position of the first kept token.
    """

    states: Float[Tensor, "L1 S D"]
    cache: DynamicCache
    start: int


def pictures(network: Network, pixels: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B I D"]:
    """The projected picture tokens; the tower stops at the hidden state that is read."""
    model = network.model
    tower = getattr(model.vision_tower, "vision_model", model.vision_tower)
    layers = tower.encoder.layers
    layer = model.config.vision_feature_layer
    depth = layer if layer >= 0 else len(layers) + 1 + layer
    states = tower.pre_layrnorm(tower.embeddings(pixels))
    for block in layers[:depth]:
        states = block(states, attention_mask=None)
    return model.multi_modal_projector(states[:, 1:])


def embeddings(network: Network, token_ids: Int[Tensor, "B T"], pixels: Tensor) -> Float[Tensor, "B T D"]:
    """The decoder's input."""
    model = network.model
    embedded = model.language_model.embed_tokens(token_ids)
    embedded[token_ids == model.config.image_token_index] = pictures(network, pixels).flatten(0, 1)
    return embedded


def run(network: Network, token_ids: Int[Tensor, "T"], pixels: Tensor, start: int) -> Control:
    """A control pass over one prompt; the last block returns only the kept tokens."""
    decoder = network.model.language_model
    x = embeddings(network, token_ids[None], pixels[None])
    rotation = decoder.rotary_emb(x, torch.arange(len(token_ids))[None])
    cache, kept = DynamicCache(), [x[0, start:]]
    for block in decoder.layers[:-1]:
        x = block(x, attention_mask=None, position_embeddings=rotation, **{_CACHE: cache})
        kept.append(x[0, start:])
    kept.append(_last_block(decoder.layers[-1], x, None, rotation, cache, slice(start, None))[0])
    return Control(states=torch.stack(kept), cache=cache, start=start)


def _last_block(
    block: Network,
    x: Float[Tensor, "B T D"],
    mask: Tensor | None,
    rotation: tuple[Tensor, Tensor],
    cache: DynamicCache,
    keep: slice | Tensor,
) -> Float[Tensor, "B S D"]:
    """A decoder block whose MLP sees only the kept tokens."""
    mixed = block.self_attn(
        block.input_layernorm(x), attention_mask=mask, position_embeddings=rotation, **{_CACHE: cache}
    )[0]
    x = x[:, keep] + mixed[:, keep]
    return x + block.mlp(block.post_attention_layernorm(x))


def log_probs(network: Network, states: Float[Tensor, "N D"], answers: Int[Tensor, "n"]) -> Float[np.ndarray, "N n"]:
    """Log-probabilities of the answers, from outputs of the last block."""
    hidden = network.model.language_model.norm(states)
    return torch.log_softmax(network.lm_head(hidden).float(), dim=-1)[:, answers].numpy()


def resume(
    network: Network, source: Control, first: int, joins: Sequence[tuple[int, Float[Tensor, "S D"]]]
) -> Float[Tensor, "E D"]:
    """Last token's output of the last block, for edits that share the tokens before `first`.

    Args:
        network: Hugging Face's class.
        source: the pass whose keys and values are read.
        first: position of the first token that runs again.
        joins: for every edit its layer, and the edited output of that layer from `first` on.
    """
    length = len(joins[0][1])
    together = max(1, TOKENS_TOGETHER // length)
    order = sorted(range(len(joins)), key=lambda index: joins[index][0])
    found: dict[int, Tensor] = {}
    for begin in range(0, len(order), together):
        chosen = order[begin : begin + together]
        for index, last in zip(chosen, _resume_some(network, source, first, [joins[i] for i in chosen]), strict=True):
            found[index] = last
    return torch.stack([found[index] for index in range(len(joins))])


def _resume_some(
    network: Network, source: Control, first: int, joins: Sequence[tuple[int, Tensor]]
) -> Float[Tensor, "E D"]:
    decoder = network.model.language_model
    blocks, (length, width) = len(decoder.layers), joins[0][1].shape
    cache = DynamicCache()
    layers: list[Network] = source.cache.layers
    for index, layer in enumerate(layers):
        cache.update(layer.keys[:, :, :first], layer.values[:, :, :first], index)
    positions = torch.arange(first, first + length)
    own = torch.ones(length, length, dtype=torch.bool).tril()
    x = torch.empty(1, 0, width)
    waiting = list(joins)
    finished: list[Tensor] = []
    for number in range(joins[0][0] + 1, blocks + 1):
        joining = [states for layer, states in waiting if layer == number - 1]
        if joining:
            x = torch.cat([x, *(states[None] for states in joining)], dim=1)
        if number == blocks:
            finished = [x[0].reshape(-1, length, width)[-len(joining) :, -1]] if joining else []
            break
        rows = x.shape[1] // length
        rotation = decoder.rotary_emb(x, positions.repeat(rows)[None])
        mask = torch.ones(rows * length, first + rows * length, dtype=torch.bool)
        mask[:, first:] = torch.block_diag(*[own] * rows).bool()
        arguments = {"position_embeddings": rotation, _CACHE: cache}
        if number < blocks - 1:
            x = decoder.layers[number](x, attention_mask=mask[None, None], **arguments)
        else:
            last = torch.arange(length - 1, rows * length, length)
            ended = _last_block(decoder.layers[number], x, mask[None, None], rotation, cache, last)[0]
            late = [states[-1] for layer, states in waiting if layer == blocks - 1]
            return torch.cat([ended, torch.stack(late)]) if late else ended
    return torch.cat(finished)


def control(network: Network, batch: Batch) -> Float[np.ndarray, "B n"]:
    """One pass for every prompt."""
    with torch.inference_mode():
        rows = [
            run(network, batch.prompt(row).token_ids[0], batch.pixels[row], int(batch.last[row])).states[-1, -1]
            for row in range(len(batch.last))
        ]
        return log_probs(network, torch.stack(rows), batch.answers)


def steer(
    network: Network, batch: Batch, edits: Sequence[Edit]
) -> tuple[Float[np.ndarray, "B n"], Float[np.ndarray, "E B n"]]:
    """One control pass for every prompt, and all its edits together.

    Returns:
        Log-probabilities of the answers in the control pass, and after every edit.
    """
    found = []
    with torch.inference_mode():
        for row in range(len(batch.last)):
            mine = [edit.prompt(row) for edit in edits]
            start = min(int(edit.positions.min()) for edit in mine)
            source = run(network, batch.prompt(row).token_ids[0], batch.pixels[row], start)
            joins = [(edit.layer, _edited(source, edit)) for edit in mine]
            last = torch.cat([source.states[-1, -1:], resume(network, source, start, joins)])
            found.append(log_probs(network, last, batch.answers))
    stacked = np.stack(found, axis=1)
    return stacked[0], stacked[1:]


def _edited(source: Control, edit: Edit) -> Float[Tensor, "S D"]:
    states = source.states[edit.layer + 1].clone()
    at, vectors = edit.positions[0] - source.start, edit.vectors[0]
    if edit.strength is not None:
        lengths = states[at].norm(dim=-1, keepdim=True)
        vectors = edit.strength * lengths * vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    states[at] += vectors
    return states


def swap(network: Network, batch: Batch, other: Float[Tensor, "B C Y X"], swaps: Sequence[Swap]) -> Swapped:
    """One control and one intervened pass for every prompt, and all its swaps together.

    A swap of all picture tokens uses the intervened run's keys and values. The arguments are those of `published`.
    """
    found = []
    with torch.inference_mode():
        for row in range(len(batch.last)):
            token_ids = batch.prompt(row).token_ids[0]
            picture = torch.nonzero(token_ids == network.model.config.image_token_index)[:, 0]
            start = int(picture[-1]) + 1
            clean = run(network, token_ids, batch.pixels[row], start)
            changed = run(network, token_ids, other[row], start)
            kinds: dict[tuple[bool, int], list[int]] = {}
            joins: list[tuple[int, Tensor]] = []
            for index, edit in enumerate(swaps):
                at = edit.positions[row].unique()
                whole = torch.equal(at, picture)
                if not whole and int(at[0]) < start:
                    raise ValueError("a swap must be of all picture tokens, or of tokens after the picture.")
                states = clean.states[edit.layer + 1].clone()
                if not whole:
                    states[at - start] = changed.states[edit.layer + 1, at - start]
                first = start if whole else int(at[0])
                joins.append((edit.layer, states[first - start :]))
                kinds.setdefault((whole, first), []).append(index)
            last = torch.empty(len(swaps) + 2, clean.states.shape[-1])
            last[0], last[1] = clean.states[-1, -1], changed.states[-1, -1]
            for (whole, first), chosen in kinds.items():
                source = changed if whole else clean
                last[torch.tensor(chosen) + 2] = resume(network, source, first, [joins[i] for i in chosen])
            found.append(log_probs(network, last, batch.answers))
    stacked = np.stack(found, axis=1)
    return Swapped(control=stacked[0], intervened=stacked[1], patched=stacked[2:])


def extract(network: Network, batch: Batch, at: Int[Tensor, "B"]) -> Float[np.ndarray, "B L1 D"]:
    """One pass for every picture, which ends at the requested token; the last block computes only that token.

    Returns:
        Hidden states at each prompt's position: the embeddings, then every block's output.
    """
    found = []
    with torch.inference_mode():
        for row, position in enumerate(at.tolist()):
            control_ = run(network, batch.token_ids[row, : position + 1], batch.pixels[row], position)
            found.append(control_.states[:, 0].numpy())
    return np.stack(found)
