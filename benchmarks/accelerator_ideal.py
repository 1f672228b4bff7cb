"""The least that a work can do, from the model's shapes alone.

Operations are those of products: two for every weight and token, and four for every number of a query and every key
that it may read. Tokens whose result nobody reads are not counted: in the last layer, only keys and values are of all
tokens. Bytes are those that have to pass between memory and chip if every block were a single kernel:

- every weight once in a pass, or once in every decoding step; of tables only the rows that are looked up;
- every block's input and output;
- keys and values of every block once: where they are made, or where a rerun or a decoding step reads them;
- what the work reads and returns: pixels, recorded residual streams, logits' inputs.

In fine-tuning, the backward pass computes gradients of tokens down to the first trained block, and those of weights in
trained parameters; attention's costs two and a half times its forward pass. It reads the weights again that it passes,
and every block's input and output and its gradients. A trained number has four float32 numbers (itself, its gradient,
two means), each read and written.

A dense map of I x T numbers costs its product, 9 and 36 multiply-adds a number and channel for the convolutions, and
the first wide layer. Tokens and that layer are read once, scores written.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from accelerator_programs import (
    EDITS,
    ENCODED,
    GENERATED,
    NEW_TOKENS,
    PAIRS,
    PROMPTS,
    SUFFIX,
    TRAINED,
    Geometry,
    edited_layers,
    encoder_geometry,
    finetune_task,
    map_sizes,
    scorer_arrays,
)

from jaxid.checkpoints.tensors import Leaves
from jaxid.devices import Device
from jaxid.families.mllama import MllamaConfig
from jaxid.families.qwen_vl import QwenVLConfig
from jaxid.nn.vision import VisionConfig, state_indices

HALF = 2
"""Bytes of a bfloat16 number."""

SINGLE = 4
"""Bytes of a float32 number."""


@dataclasses.dataclass(frozen=True)
class Ideal:
    """The least that a program does.

    Attributes:
        flop: operations, which chips share.
        split: bytes that chips share: weights, keys and values.
        whole: bytes that pass on every chip: what enters and leaves blocks.
    """

    flop: float = 0.0
    split: float = 0.0
    whole: float = 0.0

    def __add__(self, other: "Ideal") -> "Ideal":
        """Both in turn."""
        return Ideal(self.flop + other.flop, self.split + other.split, self.whole + other.whole)

    def times(self, count: float) -> "Ideal":
        """As often as that."""
        return Ideal(count * self.flop, count * self.split, count * self.whole)

    def on(self, chips: int) -> "Ideal":
        """The share of one chip."""
        return Ideal(self.flop / chips, self.split / chips, self.whole)

    @property
    def moved(self) -> float:
        """All bytes."""
        return self.split + self.whole

    def seconds(self, device: Device) -> float:
        """The least time on a device."""
        return device.seconds(self.flop, self.moved)


def matrices(leaves: Leaves, *prefixes: str) -> int:
    """Numbers in the matrices of parameters whose path begins like that: not in biases, norms and gates."""
    names = (".scale", "bias", "gate", "position", "class_token", "newline", "_scale", "before", "after")
    return sum(
        leaf.size
        for path, leaf in leaves.items()
        if path.startswith(prefixes) and not path.endswith(names) and len(leaf.shape) > 1
    )


def block_input_and_output(tokens: float, width: int) -> float:
    """Bytes of what enters and leaves a block."""
    return 2.0 * HALF * tokens * width


# --- tower ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tower:
    """The picture side of a model.

    Attributes:
        tokens: tokens of all pictures, in the blocks.
        width: of these tokens.
        blocks: number of blocks that run.
        size: numbers in the matrices of one block.
        pairs: pairs of a query and a key, in all blocks.
        before: multiply-adds of the patches.
        after: multiply-adds of everything from the blocks to the decoder.
        stored: numbers in all parameters that are read.
        pixels: numbers of all pictures.
    """

    tokens: int
    width: int
    blocks: int
    size: int
    pairs: float
    before: float
    after: float
    stored: int
    pixels: int

    @property
    def block(self) -> float:
        """Operations of the matrices of one block."""
        return 2.0 * self.tokens * self.size

    @property
    def forward(self) -> Ideal:
        """One pass."""
        flop = 2 * (self.before + self.after) + self.blocks * self.block + 4 * self.width * self.pairs
        keys = 2 * HALF * self.tokens * self.width
        return Ideal(
            flop=flop,
            split=HALF * self.stored + self.blocks * keys,
            whole=SINGLE * self.pixels + self.blocks * block_input_and_output(self.tokens, self.width),
        )


def tower_of(own: Geometry, count: int = PROMPTS) -> Tower:
    """The tower, for a number of prompts."""
    config, leaves = own.config, own.leaves
    vision, outside = config.vision_config, [path for path in leaves if not path.startswith(("tower.", "decoder."))]
    pictures = round(own.pictures[0] * count / PROMPTS)
    in_block = matrices(leaves, "tower.layers.") // vision.num_hidden_layers
    blocks = vision.num_hidden_layers
    if isinstance(config, MllamaConfig):
        length, blocks = vision.max_num_tiles * vision.tile_tokens, blocks + vision.num_global_layers
        tokens = patches = pictures * length
        pairs = float(blocks * tokens * length)
        after = tokens * matrices(leaves, *outside)
    elif isinstance(config, QwenVLConfig):
        length = own.pictures[1]
        tokens = patches = pictures * length
        window = (vision.window_side * vision.spatial_merge_size) ** 2
        full = len(vision.fullatt_block_indexes) if window else blocks
        pairs = float(tokens * (full * length + (blocks - full) * min(window, length)))
        after = tokens // vision.spatial_merge_size**2 * matrices(leaves, "tower.merge")
    else:
        blocks, per_picture = _depth(config, vision), vision.num_patches
        tokens, patches = pictures * (per_picture + vision.class_token), pictures * per_picture
        pairs = float(blocks * tokens * (per_picture + vision.class_token))
        # Where tokens are pooled before the projector, it runs for these; frames are pooled after it.
        projected = config.image_tokens if "frames" not in own.extras else per_picture
        after = pictures * projected * matrices(leaves, *outside)
    read = sum(leaf.size for path, leaf in leaves.items() if not path.startswith("decoder."))
    in_layers = sum(leaf.size for path, leaf in leaves.items() if path.startswith("tower.layers."))
    unused = max(0, vision.num_hidden_layers - blocks) * in_layers // vision.num_hidden_layers
    return Tower(
        tokens=tokens,
        width=vision.hidden_size,
        blocks=blocks,
        size=in_block,
        pairs=pairs,
        before=float(patches * matrices(leaves, "tower.patch_kernel")),
        after=float(after),
        stored=read - unused,
        pixels=math.prod(own.pictures) * count // PROMPTS,
    )


def _depth(config: Any, vision: VisionConfig) -> int:
    layers = getattr(config, "vision_feature_layer", -1)
    return max(state_indices([layers] if isinstance(layers, int) else layers, vision.num_hidden_layers))


# --- decoder --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stack:
    """The decoder's sizes, with the letters of its config."""

    own: Geometry

    @property
    def layers(self) -> int:
        """Number of layers, L."""
        return self.own.text.num_hidden_layers

    @property
    def width(self) -> int:
        """Width of the residual stream, D."""
        return self.own.text.hidden_size

    @property
    def heads_width(self) -> int:
        """Width of all query heads together."""
        return self.own.text.num_attention_heads * self.own.text.head_dim

    @property
    def keys_width(self) -> int:
        """Width of all key heads together."""
        return self.own.text.num_key_value_heads * self.own.text.head_dim

    @property
    def keys(self) -> int:
        """Numbers in a layer's maps to keys and values."""
        return 2 * self.width * self.keys_width

    @property
    def rest(self) -> int:
        """Numbers in a layer's other matrices."""
        return 2 * self.width * self.heads_width + 3 * self.width * self.own.text.intermediate_size

    @property
    def vocabulary(self) -> int:
        """Numbers in the map to the vocabulary."""
        return self.width * self.own.text.vocab_size

    @property
    def crossing(self) -> Sequence[int]:
        """The layers that read pictures by cross-attention."""
        return self.own.text.cross_attention_layers

    @property
    def memory(self) -> int:
        """Tokens of a prompt's pictures that such a layer reads."""
        vision = self.own.config.vision_config
        return vision.max_num_tiles * vision.tile_tokens if self.crossing else 0

    def layer(
        self, layer: int, tokens: float, kept: float, pairs: float, read: float, *, prompts: int, made: bool = False
    ) -> Ideal:
        """One layer in one pass, without its weights.

        Args:
            layer: its index.
            tokens: tokens that enter it, over all prompts and rows; their keys and values are made.
            kept: those whose output is wanted.
            pairs: pairs of a kept query and a key.
            read: keys and values that were made before and are read, in tokens.
            prompts: number of prompts, for the pictures' keys and values.
            made: the pictures' keys and values are made in this pass.
        """
        flop = 2.0 * kept * self.rest
        moved = HALF * self.width * (tokens + kept)
        if layer in self.crossing:
            flop += 4 * self.heads_width * kept * self.memory + (2.0 * prompts * self.memory * self.keys if made else 0)
            keys = 2 * HALF * self.keys_width * prompts * self.memory
            moved += HALF * self.width * prompts * self.memory if made else 0
        else:
            flop += 2.0 * tokens * self.keys + 4 * self.heads_width * pairs
            keys = 2 * HALF * self.keys_width * (tokens + read)
        return Ideal(flop, keys, moved)

    def weights(self, layers: float) -> Ideal:
        """Reading the weights of some layers."""
        return Ideal(split=HALF * layers * (self.keys + self.rest))

    def window(self, layer: int) -> int | None:
        """Positions that a layer reads; None for all."""
        slides = self.own.text.slides
        return self.own.text.sliding_window if slides and slides[layer] else None

    def causal(self, layer: int, first: int, count: int) -> float:
        """Pairs of the queries at `count` positions from `first` on, and the keys that each reads."""
        positions = np.arange(first, first + count) + 1
        window = self.window(layer)
        return float((positions if window is None else np.minimum(positions, window)).sum())

    def both_ways(self) -> float:
        """Further pairs of a prompt, where pictures' tokens read later ones of the same picture."""
        count = self.own.image_tokens
        return count * (count - 1) / 2 if self.own.text.bidirectional_pictures else 0.0

    def whole(self, wanted: int, prompts: int = PROMPTS) -> Ideal:
        """A pass over whole prompts, whose last layer computes `wanted` tokens of each."""
        tokens, total = self.own.tokens, self.weights(self.layers)
        total += Ideal(whole=2.0 * HALF * prompts * tokens * self.width)  # the rows of the table
        for layer in range(self.layers):
            kept = wanted if layer == self.layers - 1 else tokens
            pairs = self.causal(layer, tokens - kept, kept) + (self.both_ways() if kept == tokens else 0)
            total += self.layer(layer, prompts * tokens, prompts * kept, prompts * pairs, 0, prompts=prompts, made=True)
        return total

    def suffix(self, rows: Iterable[int], *, every_layer: bool = False) -> Ideal:
        """Rows of edits that run the suffix from their first layer on, against the recorded prefix."""
        first, prefix = np.array(list(rows)), self.own.tokens - SUFFIX
        total = Ideal(whole=float(HALF * len(first) * PROMPTS * SUFFIX * self.width))  # where they begin
        for layer in range(self.layers):
            count = len(first) if every_layer else int((first <= layer).sum())
            if not count:
                continue
            kept = 1 if layer == self.layers - 1 else SUFFIX
            total += self.weights(1) + self.layer(
                layer,
                count * PROMPTS * SUFFIX,
                count * PROMPTS * kept,
                count * PROMPTS * self.causal(layer, self.own.tokens - kept, kept),
                PROMPTS * prefix,
                prompts=PROMPTS,
            )
        return total


def trace(own: Geometry) -> Ideal:
    """Tower and decoder once, with the residual stream of the text after the picture."""
    stack, text = Stack(own), own.tokens - own.image_tokens - 5
    recorded = Ideal(whole=float(HALF * (stack.layers + 1) * PROMPTS * text * stack.width))
    return tower_of(own).forward + stack.whole(text) + recorded


def extract(own: Geometry) -> Ideal:
    """Tower and decoder once; the last layer for one token of every prompt."""
    stack = Stack(own)
    recorded = Ideal(whole=float(HALF * (stack.layers + 1) * PROMPTS * stack.width))
    return tower_of(own).forward + stack.whole(1) + recorded


def rerun(own: Geometry) -> Ideal:
    """Every row from its own first layer on."""
    return Stack(own).suffix(edited_layers(own, EDITS) + 1)


def answers(own: Geometry) -> Ideal:
    """The map to the vocabulary for every row."""
    stack, rows = Stack(own), EDITS * PROMPTS
    return Ideal(2.0 * rows * stack.vocabulary, float(HALF * stack.vocabulary), float(HALF * rows * stack.width))


def prefill(own: Geometry) -> Ideal:
    """The suffix of every row through all layers."""
    return Stack(own).suffix([0] * GENERATED, every_layer=True)


def decode(own: Geometry) -> Ideal:
    """All steps: one token of every row through all layers, and the choice of the next."""
    stack, rows, total = Stack(own), GENERATED * PROMPTS, Ideal()
    choose = Ideal(2.0 * rows * stack.vocabulary, float(HALF * stack.vocabulary), float(HALF * rows * stack.width))
    prefix = own.tokens - SUFFIX
    for step in range(NEW_TOKENS - 1):
        total += stack.weights(stack.layers) + choose
        for layer in range(stack.layers):
            behind = SUFFIX + step
            total += stack.layer(
                layer,
                rows,
                rows,
                rows * stack.causal(layer, own.tokens + step, 1),
                PROMPTS * prefix + rows * behind,
                prompts=PROMPTS,
            )
    return total + choose  # the first token is chosen before the first step


def finetune(own: Geometry) -> Ideal:
    """One step: forward, backward down to the first trained block, and the update."""
    stack, tower, selection = Stack(own), tower_of(own, TRAINED), finetune_task(own).selection
    sizes = {
        path: own.leaves[path].size * (1.0 if rows is None else len(rows) / own.leaves[path].shape[0])
        for path, rows in selection.rows
    }
    lowest = selection.lowest("tower.layers.")
    above = 0 if lowest is None else tower.blocks - lowest
    through = stack.whole(1, TRAINED)
    pairs = sum(stack.causal(layer, 0, own.tokens) + stack.both_ways() for layer in range(stack.layers - 1))
    backward = Ideal(
        flop=through.flop
        + 1.5 * 4 * stack.heads_width * TRAINED * pairs
        + above * (tower.block + 2.5 * 4 * tower.width * tower.pairs / tower.blocks)
        + 2.0 * tower.tokens * sum(size for path, size in sizes.items() if path.startswith("tower.layers."))
        + 4.0 * tower.after,  # of the projector's inputs and weights
        split=through.split + HALF * above * tower.size,
        whole=2 * through.whole + 2 * above * block_input_and_output(tower.tokens, tower.width),
    )
    update = Ideal(split=2.0 * 4 * SINGLE * sum(sizes.values()))
    return tower.forward + through + backward + update


# --- CLIP-like models -----------------------------------------------------------------------------------------------


def dcsm() -> Ideal:
    """Scores of the benchmark's pairs."""
    config, _, _ = encoder_geometry()
    return map_scores(scorer_arrays(config)["network"], map_sizes(config)[2], PAIRS)


def map_scores(network: Any, width: int, count: int) -> Ideal:
    """Scores of `count` pictures with as many captions by a CNN, from tokens of some width."""
    hidden, channels, pictures, captions = network.fc1.shape
    size, pairs = pictures * captions, count * count
    multiplied = width + 9 * channels + 9 * channels**2 + hidden * channels
    tokens = SINGLE * count * width * (pictures + captions)
    wide = SINGLE * hidden * channels * size
    return Ideal(2.0 * pairs * size * multiplied, float(wide + tokens), float(SINGLE * pairs))


def encode() -> tuple[Ideal, Ideal]:
    """A batch of pictures, and one of captions; weights are float32."""
    config, _, leaves = encoder_geometry()
    vision, text, found = config.vision_config, config.text_config, []
    for part, prefix, side, tokens in (
        ("pictures", ("tower.", "image_projection"), vision, vision.num_patches + 1),
        ("captions", ("text_encoder.", "text_projection"), text, text.max_position_embeddings),
    ):
        count, size = ENCODED * tokens, matrices(leaves, *[f"{prefix[0]}layers."])
        causal = part == "captions"
        pairs = side.num_hidden_layers * ENCODED * (tokens * (tokens + 1) / 2 if causal else tokens**2)
        flop = 2.0 * count * size + 4 * side.hidden_size * pairs
        flop += 2.0 * count * matrices(leaves, prefix[1])
        stored = sum(
            leaf.size for path, leaf in leaves.items() if path.startswith(prefix) and "token_embedding" not in path
        )
        if part == "pictures":
            flop += 2.0 * ENCODED * (tokens - 1) * matrices(leaves, "tower.patch_kernel")
        blocks = 2.0 * SINGLE * count * side.hidden_size * side.num_hidden_layers
        outputs = SINGLE * count * config.projection_dim
        found.append(Ideal(flop, float(SINGLE * stored) + blocks, blocks + outputs))
    return found[0], found[1]


def ideals(own: Geometry | None, work: str) -> list[Ideal]:
    """The least that each program of a work does, in the order of `accelerator_programs.parts`."""
    if own is None:
        return [dcsm()] if work == "dcsm" else list(encode())
    if work == "generate":
        return [prefill(own), decode(own)]
    return [{"trace": trace, "extract": extract, "rerun": rerun, "answers": answers, "finetune": finetune}[work](own)]
