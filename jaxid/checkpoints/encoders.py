"""From a name to a CLIP-like model: alias, Hugging Face id, local folder, or OpenCLIP weight file."""

import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxid import meshes
from jaxid.checkpoints import openclip, sharding, tensors
from jaxid.checkpoints.loading import (
    DTYPES,
    abstract_parameters,
    check_dtype,
    described,
    find_folder,
    load_network,
    parsed,
)
from jaxid.errors import InputError
from jaxid.families.base import Encoder, Family
from jaxid.families.openclip import OpenCLIPImages, kind_of
from jaxid.families.registry import ENCODERS
from jaxid.io import without_advice
from jaxid.nn.fields import Json
from jaxid.prompts.dual import DualProcessor


@without_advice()
def load_encoder(
    name: str | Path,
    *,
    dtype: str = "float32",
    architecture: str | None = None,
    tokenizer: str | Path | None = None,
    mesh: Mesh | str | None = None,
    abstract: bool = False,
) -> Encoder:
    """Loads a CLIP-like model, onto one device or many.

    On a mesh, axis "data" divides pictures and captions, and axis "model" heads, MLPs and the vocabulary.

    Args:
        name: an alias ("tiny-clip", "clip-b16"), a Hugging Face id, a folder in Hugging Face's or OpenCLIP's layout, or
            an OpenCLIP weight file (NegCLIP's too): safetensors, or `.pt`, which is never executed.
        dtype: of parameters and activations: "float32", "bfloat16" or "float16".
        architecture: OpenCLIP's name of a weight file's architecture, such as "ViT-B-32-quickgelu". It also says which
            activation the MLPs have, which the file itself does not: NegCLIP was tuned from weights with QuickGELU, but
            its authors evaluate it as "ViT-B-32", with the exact GELU.
        tokenizer: folder or Hugging Face id of CLIP's tokenizer, for OpenCLIP files; by default the one beside the
            weights, or else that of OpenAI's CLIP.
        mesh: devices with axes "data" and "model": a mesh, a text such as "data=8", or "auto", which gives every device
            a copy of the model; by default one device.
        abstract: give the shapes of the parameters in their place, for plans; no tensor is read.

    Returns:
        The encoder, its parameters on the default device or those of the mesh.

    Raises:
        CheckpointError: if the checkpoint is missing, foreign, incomplete or corrupt.
        InputError: for an unknown dtype, an architecture or tokenizer where none is needed, a mesh with more devices
            than there are, or one that divides neither heads nor MLPs.
    """
    check_dtype(dtype)
    devices = _mesh(mesh)
    path = Path(name).expanduser()
    if path.is_file():
        fields = openclip.architecture(architecture, path)
        return _open_clip(str(name), fields, {}, path, dtype, tokenizer, devices, abstract)
    if architecture is not None:
        raise InputError(f"architecture applies to a single weight file only, and {name} is not a file.")
    folder = find_folder(name, () if abstract else ("open_clip_pytorch_model.bin",), weights=not abstract)
    if not (folder / "config.json").is_file():
        fields, settings = openclip.read_openclip_config(folder / openclip.CONFIG_FILE)
        weights = openclip.find_weights(folder)
        return _open_clip(str(name), fields, settings, weights, dtype, tokenizer, devices, abstract)
    if tokenizer is not None:
        raise InputError(f"{folder} is in Hugging Face's layout, which brings its own tokenizer; give none.")
    kind, config = described(folder, ENCODERS)
    processor = kind.processor.from_folder(folder, config)
    if abstract:
        return Encoder(**_shapes(kind, config, dtype), processor=processor, name=str(name))
    network = load_network(kind, config, tensors.TensorFolder(folder), dtype, devices)
    return Encoder(**network, processor=processor, name=str(name))


def axes(mesh: str | None, devices: int) -> meshes.Axes:
    """The axes of the mesh that a text asks for, as `load_encoder` takes it; one device by default.

    Args:
        mesh: the text.
        devices: number of devices.

    Raises:
        InputError: for any other text.
    """
    if mesh is None:
        return meshes.ONE
    return meshes.Axes(data=devices) if mesh == "auto" else meshes.sizes(mesh)


def held(encoder: Encoder, axes: meshes.Axes) -> float:
    """Bytes of an encoder's parameters, which may be abstract, that each device of a mesh with some axes holds.

    Raises:
        InputError: if the mesh divides neither heads nor MLPs.
    """
    leaves = tensors.flatten(encoder.parameters)
    shardings = sharding.layout(encoder.definition, leaves, AbstractMesh(tuple(axes), meshes.AXES)).shardings
    parts = ((math.prod(shardings[path].shard_shape(leaf.shape)), leaf.dtype) for path, leaf in leaves.items())
    return float(sum(numbers * dtype.itemsize for numbers, dtype in parts))


def _mesh(given: Mesh | str | None) -> Mesh | None:
    """The devices of an encoder; None for a single one."""
    mesh = meshes.mesh(*axes(given, jax.device_count())) if isinstance(given, str) else given
    return None if mesh is None or mesh.size == 1 else meshes.checked(mesh)


def _open_clip(
    name: str,
    fields: Json,
    settings: Json,
    weights: Path,
    dtype: str,
    tokenizer: str | Path | None,
    mesh: Mesh | None,
    abstract: bool,
) -> Encoder:
    """A model from OpenCLIP's config and weights; its captions are padded with zeros."""
    kind = ENCODERS[kind_of(fields)]
    config = parsed(kind, fields, weights.parent / openclip.CONFIG_FILE)
    words = openclip.load_words(weights.parent, tokenizer, config.text_config.vocab_size)
    processor = DualProcessor(words, OpenCLIPImages(config.vision_config.image_size, settings), config, padding=0)
    processor.check(weights.parent)
    if abstract:
        return Encoder(**_shapes(kind, config, dtype), processor=processor, name=name)
    loaded = load_network(kind, config, openclip.open_weights(weights), dtype, mesh)
    loaded["fingerprint"] = openclip.fingerprint(loaded["fingerprint"], config, words)
    return Encoder(**loaded, processor=processor, name=name)


def _shapes(kind: Family, config: Any, dtype: str) -> dict[str, Any]:
    """The fields of a model that `load_network` reads, with shapes instead of parameters and without a fingerprint."""
    definition, leaves = abstract_parameters(kind, config)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, DTYPES[dtype]) for name, leaf in leaves.items()}
    return {"parameters": tensors.unflatten(shapes), "definition": definition, "config": config, "fingerprint": ""}
