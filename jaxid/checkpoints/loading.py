"""From a name to a model: alias, Hugging Face id or local folder."""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxid import meshes, zoo
from jaxid.checkpoints import sharding, tensors
from jaxid.checkpoints.identity import fingerprint
from jaxid.devices import Device, this
from jaxid.errors import CheckpointError, InputError, JaxidWarning
from jaxid.families.base import Family, Model
from jaxid.families.registry import ALIASES, FAMILIES, family, kind_of
from jaxid.io import first_line, read_json, reading, redacted, without_advice
from jaxid.nn.fields import Json, check_fields

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""Parameter dtypes by name."""

_ROOM = 0.6
"""The share of a device's memory that `--mesh auto` gives to parameters; the rest is for recorded passes and rows."""


def find_folder(name: str | Path, further: tuple[str, ...] = (), *, weights: bool = True) -> Path:
    """Local folder of a model: a shipped model's, a folder itself, or the Hub's cache (downloaded if need be).

    Args:
        name: alias, Hugging Face id or folder.
        further: names of further files to download.
        weights: download the weights too.

    Raises:
        CheckpointError: if there is no such folder, and no such repository can be reached.
    """
    if str(name) in zoo.SHIPPED:
        return zoo.folder(str(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    repository = ALIASES.get(str(name), str(name))
    if path.exists() or path.is_absolute() or repository.count("/") != 1 or repository.startswith("."):
        known = ", ".join([*zoo.SHIPPED, *ALIASES])
        raise CheckpointError(
            f"no model folder at {redacted(str(name))}; give a folder, a Hugging Face id or one of: {known}."
        )
    patterns = ["*.json", "*.model", "*.jinja", "*.txt", *further, *(["*.safetensors"] if weights else [])]
    return downloaded(repository, patterns)


def downloaded(repository: str, patterns: Sequence[str], advice: str = "") -> Path:
    """The Hub's cache of a repository, downloaded if need be.

    Args:
        repository: its Hugging Face id.
        patterns: of the files that are wanted.
        advice: what to do if it cannot be reached, appended to the message.

    Raises:
        CheckpointError: if it is not in the cache and cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        # Some repositories hold the weights once more, in folders or as consolidated files of another layout.
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(repository, allow_patterns=list(patterns), ignore_patterns=ignored))
    except Exception as error:  # the client's own kinds, and all those of the HTTP library below it
        reason = first_line(error)
        if isinstance(error, GatedRepoError):
            reason = f"accept its terms at https://huggingface.co/{repository}, and log in with `hf auth login`"
        raise CheckpointError(
            f"{redacted(repository)} is neither in the Hugging Face cache nor reachable: {reason}{advice}"
        ) from error


def described(folder: Path, known: Mapping[str, Family] = FAMILIES) -> tuple[Family, Any]:
    """The family and the config that a checkpoint folder's config.json tells.

    Args:
        folder: the checkpoint's.
        known: the families to choose from.

    Raises:
        CheckpointError: if it is missing, not a JSON object, of another family, or holds what is not implemented.
    """
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no config.json.")
    fields = read_json(path)
    kind = family(kind_of(fields), str(path), known)
    return kind, parsed(kind, fields, path)


def abstract_parameters(kind: Family, config: Any) -> tuple[Any, tensors.Leaves]:
    """The network's definition and the shape of every parameter, without allocating any."""
    definition, state = nnx.split(nnx.eval_shape(lambda: kind.network(config, rngs=nnx.Rngs(0))))
    return definition, tensors.flatten(nnx.to_pure_dict(state))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A vision-language model whose weights are not read yet, so that everything else can be checked first.

    Attributes:
        model: the model without parameters and fingerprint; it has a config and prepares prompts.
        kind: its family.
        dtype: of parameters and activations.
        mesh: the devices that are to share the parameters; None for the default device.
    """

    model: Model
    kind: Family
    dtype: str
    mesh: Mesh | None = None

    def abstract(self) -> Model:
        """The model with the shapes of its parameters in their place, for plans."""
        definition, leaves = abstract_parameters(self.kind, self.model.config)
        dtype = DTYPES[self.dtype]
        if self.mesh is None:
            shapes = {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in leaves.items()}
        else:
            shapes = sharding.abstract_arrays(sharding.layout(definition, leaves, self.mesh), leaves, dtype)
        return dataclasses.replace(self.model, definition=definition, parameters=tensors.unflatten(shapes))

    def on(self, mesh: Mesh | str | None) -> "Checkpoint":
        """The same checkpoint, to be loaded onto the devices of a mesh.

        Args:
            mesh: the mesh, or a text as `axes` takes it, of all devices that JAX has.

        Raises:
            InputError: if the mesh has unknown axes or more devices than there are, or divides neither the heads nor
                the MLPs of the model.
        """
        if isinstance(mesh, str):
            mesh = meshes.mesh(*self.axes(mesh, jax.device_count()))
        if mesh is None or mesh.size == 1:
            return dataclasses.replace(self, mesh=None)
        mesh = meshes.checked(mesh)
        definition, leaves = abstract_parameters(self.kind, self.model.config)
        sharding.layout(definition, leaves, mesh)
        return dataclasses.replace(self, mesh=mesh)

    def axes(
        self, text: str | None, devices: int, device: Device | None = None, *, further: float = 0.0
    ) -> meshes.Axes:
        """The axes of the mesh that a text asks for: "data=4,model=2"; one device by default.

        Under "auto", as few devices share a copy of the model as hold its parameters in 60 % of their memory, and there
        are as many copies as there are devices for.

        Args:
            text: the text.
            devices: number of devices.
            device: one of them; by default the one that JAX uses.
            further: bytes that a copy's devices divide besides the parameters.

        Raises:
            InputError: for a text that does not describe a mesh, or a model that all devices together do not hold.
        """
        if text != "auto":
            return meshes.ONE if text is None else meshes.sizes(text)
        device, width = device or this(), jnp.dtype(DTYPES[self.dtype]).itemsize
        _, leaves = abstract_parameters(self.kind, self.model.config)
        needed = further + width * sum(math.prod(leaf.shape) for leaf in leaves.values())
        room = math.inf if device.platform == "cpu" else _ROOM * device.memory
        model = meshes.fewest(needed, room, self.model.config.text_config.num_attention_heads, devices)
        return meshes.Axes(devices // model, model)

    def held(self, axes: meshes.Axes) -> float:
        """Bytes of the parameters that each device of a mesh with these axes holds.

        Raises:
            InputError: if it divides neither the heads nor the MLPs of the model.
        """
        definition, leaves = abstract_parameters(self.kind, self.model.config)
        mesh = AbstractMesh(tuple(axes), meshes.AXES)
        shardings = sharding.layout(definition, leaves, mesh).shardings
        numbers = sum(math.prod(shardings[name].shard_shape(leaf.shape)) for name, leaf in leaves.items())
        return float(numbers * jnp.dtype(DTYPES[self.dtype]).itemsize)

    def load(self) -> Model:
        """The model with its parameters, on the default device or the devices of the mesh.

        Raises:
            CheckpointError: if the weights are missing, incomplete or corrupt.
        """
        files = tensors.TensorFolder(find_folder(self.model.name))
        found = load_network(self.kind, self.model.config, files, self.dtype, self.mesh)
        return dataclasses.replace(self.model, **found)


@without_advice()
def open_checkpoint(name: str | Path, *, dtype: str = "float32") -> Checkpoint:
    """Reads everything of a vision-language model except its weights, which may take minutes.

    Args:
        name: an alias ("tiny-llava", "llava-7b"), a Hugging Face id, or a folder in Hugging Face layout.
        dtype: of parameters and activations: "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: if the folder is missing or foreign, or its config, tokenizer or image processor unreadable.
        InputError: for an unknown dtype.
    """
    check_dtype(dtype)
    folder = find_folder(name, weights=False)
    kind, config = described(folder)
    processor = kind.processor.from_folder(folder, config)
    model = Model(parameters={}, definition=None, config=config, processor=processor, name=str(name), fingerprint="")
    return Checkpoint(model=model, kind=kind, dtype=dtype)


def load(name: str | Path, *, dtype: str = "float32", mesh: Mesh | str | None = None) -> Model:
    """Loads a vision-language model, onto one device or many.

    On a mesh, heads, MLPs and the vocabulary are sharded over axis "model". The passes shard prompts over axis "data",
    or edits if the number of prompts is not a multiple of it. Every shard of a parameter is read straight to its
    device.

    Args:
        name: an alias ("tiny-llava", "llava-7b"), a Hugging Face id, or a folder in Hugging Face layout.
        dtype: of parameters and activations: "float32", "bfloat16" or "float16".
        mesh: devices with axes "data" and "model": a mesh, a text such as "data=4,model=2", or "auto", which lets as
            few devices share a copy of the model as hold it; by default one device.

    Returns:
        The model.

    Raises:
        CheckpointError: if the folder is missing, foreign, incomplete or corrupt.
        InputError: for an unknown dtype, a mesh with more devices than there are, or one that divides neither the heads
            nor the MLPs of the model.
    """
    return open_checkpoint(name, dtype=dtype).on(mesh).load()


def check_dtype(dtype: str) -> None:
    """Refuses an unknown number format.

    Raises:
        InputError: naming those that are known.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")


def parsed(kind: Family, fields: Json, path: Path) -> Any:
    """A family's config from the fields of a file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        check_fields(fields)
        with reading(path, "a config"):
            return kind.config(fields)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def load_network(
    kind: Family, config: Any, files: tensors.Tensors, dtype: str, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The fields of a loaded model that come from its config and weights.

    Warns about parameters that the mesh does not divide.

    Raises:
        CheckpointError: if the tensors do not fit the config.
    """
    config, renames, unused = as_stored(kind, config, files)
    with reading(files.folder / "config.json", "the config of a network that can be built"):
        definition, abstract = abstract_parameters(kind, config)
    placed = None
    if mesh is not None:
        layout = sharding.layout(definition, abstract, mesh)
        placed = layout.shardings
        note = sharding.note(layout, abstract, mesh, jnp.dtype(DTYPES[dtype]).itemsize)
        if note is not None:
            warnings.warn(note, JaxidWarning, stacklevel=4)
    parameters, digest = tensors.read_parameters(
        files, abstract, kind.keys(config), renames=renames, unused=unused, dtype=DTYPES[dtype], shardings=placed
    )
    mark = fingerprint(files.folder, digest)
    return {"parameters": parameters, "definition": definition, "config": config, "fingerprint": mark}


Patterns = tuple[str, ...]
Renames = tuple[tuple[str, str], ...]


def as_stored(kind: Family, config: Any, files: tensors.Tensors) -> tuple[Any, Renames, Patterns]:
    """The config that the tensors obey, and how they are then to be read.

    Where a config ties the unembedding to the embedding, Hugging Face's `tie_weights` looks at the tensors: two of
    other values are two, and one that is alone serves as both. So does this.

    Returns:
        The config, and the family's renames and unused tensors, extended.
    """
    renames, unused = kind.renames, kind.unused
    names = {tensors.published_name(name, renames): name for name in files.entries}
    with reading(files.folder / "config.json", "the config of a network that can be built"):
        keys = kind.keys(config)
    sources = {key.target: key.source for key in keys if not key.copy}
    for key in keys:
        if not key.copy or key.source not in names:
            continue
        original, copy = sources[key.target], names[key.source]
        if original not in names:
            renames = (*renames, (f"^{re.escape(key.source)}$", original))
        elif not (files.readable(copy) and files.readable(names[original])):
            continue  # which is refused when they are read
        elif tensors.same_numbers(files, copy, names[original]):
            unused = (*unused, f"^{re.escape(copy)}$")
        else:
            text = dataclasses.replace(config.text_config, tie_word_embeddings=False)
            return dataclasses.replace(config, text_config=text), renames, unused
    return config, renames, unused
