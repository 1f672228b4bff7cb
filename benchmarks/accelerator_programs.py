"""The programs that users run, at full published size: their own jitted functions, with abstract arguments.

The functions of the library run on shapes alone (`jax.eval_shape`), and what they hand to their jitted programs is
noted. So the programs, their chunks and their arguments are those of a real run, for prompts of the lengths below.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator_notes import Call, noted
from accelerator_targets import Target, target
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import PyTree
from published_configs import CONFIGS

import jaxid
from jaxid import meshes
from jaxid.checkpoints import sharding
from jaxid.checkpoints.loading import abstract_parameters
from jaxid.checkpoints.tensors import Leaves, unflatten
from jaxid.dcsm import embedding, scoring
from jaxid.experiments import finetune
from jaxid.families import clip
from jaxid.families.base import Encoder, Model
from jaxid.families.llava_video import LlavaVideoConfig, clip_rows
from jaxid.families.mllama import MllamaConfig
from jaxid.families.qwen_vl import QwenVLConfig
from jaxid.families.registry import family
from jaxid.interp import generate, trace
from jaxid.nn.inputs import Inputs
from jaxid.prompts.processor import Prompts
from jaxid.train import loop
from jaxid.train.trainable import for_learning

PROMPTS = 8
EDITS = 48
SUFFIX = 24
BEFORE = 5
AFTER = 59
GENERATED = 8
NEW_TOKENS = 32
FRAMES = 8
TRAINED = 4
PAIRS = 256
CAPTION_TOKENS = 30
ENCODER = "clip-b16"
ENCODED = 32

LENGTHS = f"""{PROMPTS} prompts of {BEFORE} tokens, a square picture of 448 pixels (LLaVA-Video: a clip of {FRAMES}
frames; Llama 3.2: four tiles) and at least {AFTER} tokens. rerun: {EDITS} edits of the last {SUFFIX} tokens, one after
each of {EDITS} layers that are spread evenly. generate: {GENERATED} edits, {NEW_TOKENS} new tokens for each prompt.
extract: one word of every prompt. finetune: one step on {TRAINED} pictures with the library's default settings. dcsm:
{PAIRS} pictures x {PAIRS} captions of {CAPTION_TOKENS} tokens, from CLIP ViT-B/16, float32. encode: {ENCODED} pictures
and {ENCODED} captions. answers: two answer words of every row of rerun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A compiled program of a work.

    Attributes:
        name: what it does.
        function: the library's jitted function.
        args: its arguments, with shapes for arrays.
        options: its keyword arguments.
        shares: as in `hlo.count`.
        trips: as in `hlo.count`.
    """

    name: str
    function: Any
    args: tuple[PyTree, ...]
    options: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    trips: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """A published model's shapes, and those of its prompts.

    Attributes:
        alias: the model's short name.
        config: its config.
        definition: its network's structure.
        leaves: shapes of its parameters by path, bfloat16.
        pictures: shape of the pixels of all prompts.
        extras: the other arrays that the family reads.
        image_tokens: positions that a picture takes in a prompt.
    """

    alias: str
    config: Any
    definition: Any
    leaves: Leaves
    pictures: tuple[int, ...]
    extras: Mapping[str, np.ndarray]
    image_tokens: int

    @property
    def text(self) -> Any:
        """The decoder's config."""
        return self.config.text_config

    @property
    def tokens(self) -> int:
        """Length of a prompt, T."""
        return -(-(BEFORE + self.image_tokens + AFTER) // 8) * 8

    def needed(self, target: Target) -> float:
        """Bytes that each of some chips needs: its weights, its part of two traces, two gigabytes of temporaries."""
        mesh: Any = AbstractMesh((target.data, target.model), meshes.AXES)
        found = sharding.layout(self.definition, self.leaves, mesh).shardings
        weights = sum(
            math.prod(found[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize for path, leaf in self.leaves.items()
        )
        text = self.text
        heads = -(-text.num_key_value_heads // target.model)
        keys = text.num_hidden_layers * PROMPTS * self.tokens * heads * text.head_dim
        return weights + 2 * 4 * keys + 2 * 10**9

    def prompts(self, count: int = PROMPTS) -> Prompts:
        """Prompts of these lengths; only their shapes and positions matter."""
        tokens, start = self.tokens, BEFORE + self.image_tokens
        positions = np.tile(np.arange(tokens, dtype=np.int32), (count, 1))
        rows = np.full((count, tokens), -1, np.int32)
        cross = isinstance(self.config, MllamaConfig)
        rows[:, BEFORE:start] = 0 if cross else np.arange(count * self.image_tokens).reshape(count, -1)
        share = count / PROMPTS
        pictures = (round(self.pictures[0] * share), *self.pictures[1:])
        extras = {
            name: np.resize(value, (round(len(value) * share), *value.shape[1:])) for name, value in self.extras.items()
        }
        turned = np.tile(positions[:, None], (1, 3, 1)) if isinstance(self.config, QwenVLConfig) else None
        inputs = Inputs(
            token_ids=positions,
            positions=positions,
            valid=np.ones((count, tokens), bool),
            last=np.full(count, tokens - 1, np.int32),
            pixels=np.broadcast_to(np.float32(0), pictures),
            image_rows=rows,
            rope_positions=turned,
            extras=extras,
            apart=True,
        )
        texts = ("",) * count
        places = np.zeros((count, tokens, 2), np.int32)
        return Prompts(inputs=inputs, questions=texts, texts=texts, spans=places[:, 0], offsets=places)

    def model(self, parameters: PyTree) -> Model:
        """The model with these parameters, which may be traced; it reads no pictures."""
        processor: Any = SimpleNamespace(stop_ids=(2,))
        parts = {"definition": self.definition, "config": self.config, "processor": processor}
        return Model(parameters=parameters, name=self.alias, fingerprint="", **parts)


def geometry(alias: str, fields: Mapping[str, Any] | None = None) -> Geometry:
    """A published model at full size, or a network of another config.json."""
    fields = copy.deepcopy(dict(CONFIGS[alias] if fields is None else fields))
    kind = family(fields["model_type"], alias)
    config: Any = kind.config(fields)
    definition, leaves = abstract_parameters(kind, config)
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in leaves.items()}
    pictures, extras, tokens = _pictures(config)
    return Geometry(
        alias=alias,
        config=config,
        definition=definition,
        leaves=leaves,
        pictures=pictures,
        extras=extras,
        image_tokens=tokens,
    )


def _pictures(config: Any) -> tuple[tuple[int, ...], Mapping[str, np.ndarray], int]:
    """Shape of all prompts' pixels, the arrays beside them, and the positions that a picture takes."""
    vision = config.vision_config
    if isinstance(config, MllamaConfig):
        extras = {
            "aspect_ratio": np.ones(PROMPTS, np.int32),
            "tile_count": np.full(PROMPTS, vision.max_num_tiles, np.int32),
            "shown": np.arange(PROMPTS, dtype=np.int32)[:, None],
        }
        return (PROMPTS, vision.max_num_tiles, 3, vision.image_size, vision.image_size), extras, 1
    if isinstance(config, QwenVLConfig):
        side = 448 // vision.patch_size
        extras = {
            "patch_positions": np.zeros((PROMPTS, side**2, 2), np.int32),
            "patch_valid": np.ones((PROMPTS, side**2), bool),
        }
        return (PROMPTS, side**2, vision.patch_numbers), extras, (side // vision.spatial_merge_size) ** 2
    if isinstance(config, LlavaVideoConfig):
        frames = PROMPTS * FRAMES
        tokens = len(clip_rows(FRAMES, config.frame_side, config.mm_newline_position, 1))
        extras = {"frames": np.arange(frames, dtype=np.int32)}
        return (frames, 3, vision.image_size, vision.image_size), extras, tokens
    return (PROMPTS, 3, vision.image_size, vision.image_size), {}, config.image_tokens


def target_of(name: str, alias: str) -> Target:
    """The chips on which a model runs."""
    return target(name, (lambda chips: 0.0) if alias == ENCODER else geometry(alias).needed)


# --- what the library hands to its programs -------------------------------------------------------------------------


def _calls(own: Geometry, target: Target, run: Callable[[Model, Prompts], Any]) -> dict[str, Call]:
    """The programs that some use of the model calls, by name, with shapes for arrays as they lie on the chips."""
    found = sharding.layout(own.definition, own.leaves, target.mesh).shardings
    count = PROMPTS * target.data
    with noted(target) as notes:
        parameters = unflatten(dict(own.leaves))
        jax.eval_shape(lambda parameters: run(own.model(parameters), own.prompts(count)), parameters)

    def spec(name: str, leaf: Any) -> PartitionSpec:
        if name in found:
            return found[name].spec
        if id(leaf) in notes.placed:
            return notes.placed[id(leaf)][1]
        return _spec(leaf.shape, own, count) if id(leaf) in notes.results else PartitionSpec()

    def place(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return target.placed(jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), spec(name, leaf))

    def placed(call: Call) -> Call:
        function, args, options = call
        static = [isinstance(one, type(own.definition)) for one in args]
        args = (
            one if fixed else jax.tree_util.tree_map_with_path(place, one)
            for one, fixed in zip(args, static, strict=True)
        )
        return function, tuple(args), dict(options)

    return {name: placed(call) for name, call in notes.calls.items()}


def _spec(shape: tuple[int, ...], own: Geometry, prompts: int) -> PartitionSpec:
    """Where results of programs lie that are arguments of others: prompts over "data", recorded heads over "model".

    Keys and values have their axes of prompts, heads, tokens and numbers last; residual streams those of prompts,
    tokens and numbers.
    """
    if len(shape) >= 5 and shape[-1] == own.text.head_dim:
        return PartitionSpec(*[None] * (len(shape) - 4), meshes.DATA, meshes.MODEL)
    axes = [axis for axis, length in enumerate(shape) if length == prompts]
    axis = min(1, len(shape) - 2) if shape[-1:] == (own.text.hidden_size,) else min(axes, default=None)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, meshes.DATA)


# --- works ----------------------------------------------------------------------------------------------------------


def edited_layers(own: Geometry, count: int) -> np.ndarray:
    """The layers that a sweep edits, spread evenly."""
    return np.arange(count) * own.text.num_hidden_layers // count


def _edits(own: Geometry, prompts: Prompts, count: int) -> Any:
    positions = np.full(len(prompts), own.tokens - SUFFIX)
    vectors = np.zeros((count, own.text.hidden_size), np.float32)
    return jaxid.add(edited_layers(own, count), positions, vectors)


def decoder_shares(own: Geometry) -> dict[str, float]:
    """How often a decoder's own conditionals take their second branch."""
    layers = own.text.cross_attention_layers
    return {"Crossed.read": len(layers) / own.text.num_hidden_layers} if layers else {}


def shares_of(own: Geometry) -> dict[str, float]:
    """How often the conditionals of tower and decoder take their second branch."""
    found, vision = decoder_shares(own), own.config.vision_config
    if isinstance(own.config, QwenVLConfig) and vision.window_side:
        share = len(vision.fullatt_block_indexes) / vision.num_hidden_layers
        found["QwenTower.__call__.<locals>.read.<locals>.either"] = share
    return found


def resumed_shares(layers: int, first: np.ndarray, chunk: int) -> dict[str, float]:
    """How often a rerun's layers and chunks run, for rows that begin at these layers."""
    chunks = np.sort(first).reshape(-1, chunk)[:, 0]
    running = np.array([[start <= layer for start in chunks] for layer in range(layers)])
    active = np.flatnonzero(running.any(axis=1))
    return {
        "resume.<locals>.through": float((active < layers - 1).sum() / (layers - 1)),
        "resume.<locals>.advance": float(running[active].mean()),
    }


def _record_part(own: Geometry, target: Target) -> list[Part]:
    call = _calls(own, target, lambda model, prompts: trace.trace(model, prompts).hidden)["_record"]
    return [_part("trace", call, shares_of(own))]


def _part(name: str, call: Call, shares: Mapping[str, float], trips: Mapping[str, float] | None = None) -> Part:
    function, args, options = call
    return Part(name=name, function=function, args=args, options=options, shares=shares, trips=trips or {})


def _rerun(own: Geometry, target: Target) -> dict[str, Call]:
    def run(model: Model, prompts: Prompts) -> Any:
        return trace.rerun(model, trace.trace(model, prompts), _edits(own, prompts, EDITS)).logprobs(np.arange(2))

    return _calls(own, target, run)


def _rerun_part(own: Geometry, target: Target) -> list[Part]:
    call = _rerun(own, target)["_resume"]
    first = edited_layers(own, EDITS) + 1
    shares = resumed_shares(own.text.num_hidden_layers, first, call[2]["chunk"])
    return [_part("rerun", call, {**decoder_shares(own), **shares})]


def _answers_part(own: Geometry, target: Target) -> list[Part]:
    return [_part("answers", _rerun(own, target)["_answer_log_probs"], {})]


def _generate_parts(own: Geometry, target: Target) -> list[Part]:
    def run(model: Model, prompts: Prompts) -> Any:
        recorded, edits = trace.trace(model, prompts), _edits(own, prompts, GENERATED)
        return generate.generate(model, recorded, edits, max_new_tokens=NEW_TOKENS).tokens

    calls, shares = _calls(own, target, run), decoder_shares(own)
    return [
        _part("prefill", calls["_prefill"], shares),
        _part("decode", calls["_decode"], shares, {"decode": NEW_TOKENS - 1}),  # the first token is chosen before
    ]


def _extract_part(own: Geometry, target: Target) -> list[Part]:
    def run(model: Model, prompts: Prompts) -> Any:
        return trace.residuals_at(model, prompts, np.full((len(prompts), 1), own.tokens - SUFFIX))

    return [_part("extract", _calls(own, target, run)["_residuals"], shares_of(own))]


def finetune_task(own: Geometry, model: Model | None = None) -> finetune.Task:
    """The library's default fine-tuning of a model, by default of one without weights, in one small batch."""
    config = finetune.FinetuneConfig(groups=1, batch_size=TRAINED, id_layer=own.text.num_hidden_layers // 3)
    model = model or own.model(unflatten(dict(own.leaves)))
    selection = finetune.select(model, config)
    definition = for_learning(model.definition, model.parameters, selection, recompute=config.recompute)
    ids = object.__new__(finetune.SpatialIDs)  # no batch is made, so none is read
    return finetune.Task(model=model, selection=selection, definition=definition, groups=(), config=config, ids=ids)


def _finetune_part(own: Geometry, target: Target) -> list[Part]:
    task = finetune_task(own)
    stage, inputs = task.stage(), own.prompts(TRAINED).inputs
    batch = {
        "inputs": finetune.arrays_of(inputs),
        "positions": inputs.last[:, None],
        "labels": inputs.last[:, None],
        "word": inputs.last,
        "target": np.zeros((TRAINED, own.text.hidden_size), np.float32),
        "weight": np.zeros(TRAINED, np.float32),
    }
    batch = jax.tree.map(lambda leaf: np.broadcast_to(leaf[None], (1, *leaf.shape)), batch)

    layout = sharding.layout(own.definition, own.leaves, target.mesh).shardings
    parameters = jax.eval_shape(task.selection.split, task.model.parameters)
    state = jax.eval_shape(lambda parameters: loop._start(stage, parameters), parameters)
    frozen = unflatten({path: target.placed(leaf, layout[path].spec) for path, leaf in own.leaves.items()})
    args = (jax.tree.map(target.array, state), jax.tree.map(target.array, batch), {"frozen": frozen})
    shares = {**shares_of(own), "apply_if_finite.<locals>.update": 1.0}
    return [Part(name="finetune", function=loop._step_function(stage), args=args, shares=shares)]


def encoder_geometry() -> tuple[Any, Any, Leaves]:
    """Config, structure and parameters of CLIP ViT-B/16."""
    config: Any = clip.FAMILY.config({"model_type": "clip", "vision_config": {"patch_size": 16}})
    definition, leaves = abstract_parameters(clip.FAMILY, config)
    return config, definition, leaves


def map_sizes(config: Any) -> tuple[int, int, int]:
    """Tokens of a picture and of a caption, and the width of their space: I, T and E."""
    return config.vision_config.num_patches + 1, CAPTION_TOKENS, config.projection_dim


def scorer_arrays(config: Any) -> dict[str, PyTree]:
    """Shapes of the arrays of a CNN that scores the encoder's maps, by their names in a `Scorer`."""
    pictures, captions, _ = map_sizes(config)

    def arrays(key: Any) -> dict[str, PyTree]:
        scorer = scoring.Scorer.init(key, pictures, captions)
        return {"network": scorer.network, "vectors": scorer.vectors}

    return jax.eval_shape(arrays, jax.random.key(0))


def _dcsm_part(target: Target) -> list[Part]:
    config, _, _ = encoder_geometry()
    pictures, captions, width = map_sizes(config)
    arrays = (
        jax.ShapeDtypeStruct((PAIRS, pictures, width), jnp.float32),
        jax.ShapeDtypeStruct((PAIRS, captions, width), jnp.float32),
        jax.ShapeDtypeStruct((PAIRS, captions), jnp.int32),
    )

    @jax.jit  # a scorer checks that its arrays are arrays, where types are checked
    def score(scorer: dict[str, PyTree], images: Any, texts: Any, words: Any) -> Any:
        return scoring.score_tokens(scoring.Scorer(**scorer), images, texts, words, "call")

    args = jax.tree.map(target.array, (scorer_arrays(config), *arrays))
    return [Part(name="dcsm", function=score, args=args, shares={"_unless": 0.0})]


def _encode_parts(target: Target) -> list[Part]:
    config, definition, leaves = encoder_geometry()
    processor: Any = None
    encoder = Encoder(
        parameters=unflatten(leaves),
        definition=definition,
        config=config,
        processor=processor,
        name=ENCODER,
        fingerprint="",
    )
    encoder = jax.tree.map(target.array, encoder)
    side, tokens = config.vision_config.image_size, config.text_config.max_position_embeddings
    pixels = target.array(jax.ShapeDtypeStruct((ENCODED, 3, side, side), jnp.float32))
    ids, valid = (target.array(jax.ShapeDtypeStruct((ENCODED, tokens), dtype)) for dtype in (jnp.int32, jnp.bool_))
    return [
        Part(name="pictures", function=embedding._image, args=(encoder, pixels)),
        Part(name="captions", function=embedding._text, args=(encoder, ids, valid)),
    ]


_OF_MODELS: Mapping[str, Callable[[Geometry, Target], list[Part]]] = {
    "trace": _record_part,
    "rerun": _rerun_part,
    "answers": _answers_part,
    "generate": _generate_parts,
    "extract": _extract_part,
    "finetune": _finetune_part,
}
_OF_ENCODERS: Mapping[str, Callable[[Target], list[Part]]] = {"dcsm": _dcsm_part, "encode": _encode_parts}

WORKS = (*_OF_MODELS, *_OF_ENCODERS)
MODELS = (*CONFIGS, ENCODER)


def does(alias: str, work: str) -> bool:
    """Whether a model does a work."""
    return (work in _OF_ENCODERS) == (alias == ENCODER)


def parts(alias: str, work: str, target: Target) -> list[Part]:
    """The programs of a work."""
    return _OF_ENCODERS[work](target) if work in _OF_ENCODERS else _OF_MODELS[work](geometry(alias), target)
