"""The scorer's weights in the authors' `.pt` layout, read and written.

Layers as PyTorch names them, `conv1`, `conv2`, `fc1`, `fc2` (the MLP: `fc1` to `fc3`), and beside them the functional
vectors [W, I]. The flat order of `fc1`'s inputs is channel, image token, text token. Source: [DCSM] arXiv 2503.08723.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxid.checkpoints.torch_files import read_torch_file
from jaxid.checks import check_finite
from jaxid.errors import CheckpointError
from jaxid.io import whole_file
from jaxid.kernels.scorer import CHANNELS, CNN, MLP

_FUNCTIONAL = "functional"


def read_authors_scorer(path: str | Path, text_tokens: int = 30) -> tuple[CNN | MLP, Float[np.ndarray, "W I"]]:
    """A scorer and its functional vectors.

    Reads nested dictionaries too: the layers may be stored under any name, the vectors under any name with "func" or
    "embed" in it.

    Args:
        path: the file.
        text_tokens: caption tokens of a map, which the flat `fc1` does not tell.

    Raises:
        CheckpointError: if torch is not installed, or the file is missing, damaged, or does not hold such a scorer.
    """
    arrays = dict(_arrays(read_torch_file(path)))
    layers, vectors = {}, []
    for name, array in arrays.items():
        *_, layer, kind = name.split(".") if "." in name else ("", name, "")
        if kind in ("weight", "bias") and layer in ("conv1", "conv2", "fc1", "fc2", "fc3"):
            if f"{layer}.{kind}" in layers:
                raise CheckpointError(
                    f"{path} holds {layer}.{kind} twice, again as {name}; keep one scorer in the file."
                )
            layers[f"{layer}.{kind}"] = _real(array, f"{path}: {name}")
        elif array.ndim == 2 and any(word in name.lower() for word in ("func", "embed")):
            vectors.append(_real(array, f"{path}: {name}"))
    kind = "cnn" if "conv1.weight" in layers else "mlp"
    names = ("conv1", "conv2", "fc1", "fc2") if kind == "cnn" else ("fc1", "fc2", "fc3")
    missing = [f"{name}.{part}" for name in names for part in ("weight", "bias") if f"{name}.{part}" not in layers]
    if missing or len(vectors) != 1:
        raise CheckpointError(
            f"{path} is not a scorer: missing {', '.join(missing) or 'nothing'}; {len(vectors)} tables of functional "
            f"vectors instead of one; it holds {', '.join(sorted(arrays)[:12])}."
        )
    for name, array in [*layers.items(), ("the functional vectors", vectors[0])]:
        check_finite(f"{path}: {name}", array, CheckpointError)
    image_tokens = vectors[0].shape[1]
    channels = CHANNELS if kind == "cnn" else 1
    flat = channels * image_tokens * text_tokens
    _check_shapes(layers, str(path))
    if layers["fc1.weight"].shape[1] != flat:
        raise CheckpointError(
            f"{path}: fc1 reads {layers['fc1.weight'].shape[1]} numbers, which are not {channels} x {image_tokens} "
            f"image tokens (of the functional vectors) x {text_tokens} caption tokens."
        )
    first = layers["fc1.weight"].reshape(-1, channels, image_tokens, text_tokens)
    last = names[-1]
    ends = {last: layers[f"{last}.weight"][0], f"{last}_bias": layers[f"{last}.bias"].reshape(())}
    if kind == "mlp":
        hidden = {"fc2": layers["fc2.weight"], "fc2_bias": layers["fc2.bias"]}
        return MLP(fc1=first[:, 0], fc1_bias=layers["fc1.bias"], **hidden, **ends), vectors[0]
    return (
        CNN(
            conv1=layers["conv1.weight"][:, 0],
            conv1_bias=layers["conv1.bias"],
            conv2=layers["conv2.weight"],
            conv2_bias=layers["conv2.bias"],
            fc1=first,
            fc1_bias=layers["fc1.bias"],
            **ends,
        ),
        vectors[0],
    )


def _real(array: np.ndarray, where: str) -> np.ndarray:
    if array.dtype.kind not in "fV":  # V: bfloat16
        raise CheckpointError(f"{where} holds {array.dtype}, not floating-point numbers.")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _check_shapes(layers: Mapping[str, np.ndarray], path: str) -> None:
    """Refuses layers that do not follow one another; how many numbers the first wide one reads is left open."""
    convolved = "conv1.weight" in layers
    scalar = next((name for name, value in layers.items() if not value.ndim), None)
    if scalar is not None:
        raise CheckpointError(f"{path}: {scalar} is a single number.")
    outputs = {name: value.shape[:1] for name, value in layers.items() if name.endswith(".weight")}
    hidden = ("fc1", "fc2") if convolved else ("fc1", "fc2", "fc3")
    expected: dict[str, tuple[int, ...]] = {f"{hidden[-1]}.weight": (1, *outputs[f"{hidden[-2]}.weight"])}
    if convolved:
        expected |= {"conv1.weight": (CHANNELS, 1, 3, 3), "conv2.weight": (CHANNELS, CHANNELS, 3, 3)}
    else:
        expected["fc2.weight"] = (*outputs["fc2.weight"], *outputs["fc1.weight"])
    expected |= {f"{name.removesuffix('.weight')}.bias": own for name, own in outputs.items()}
    for name, shape in expected.items():
        if layers[name].shape != shape:
            raise CheckpointError(f"{path}: {name} has the shape {layers[name].shape}, not {shape}.")
    if layers["fc1.weight"].ndim != 2:
        raise CheckpointError(f"{path}: fc1.weight has the shape {layers['fc1.weight'].shape}, not two axes.")


def write_authors_scorer(path: str | Path, network: CNN | MLP, vectors: Float[np.ndarray, "W I"]) -> None:
    """Writes a scorer as `{"scorer": layers, "functional": vectors}`, atomically; needs PyTorch.

    Raises:
        CheckpointError: if torch is not installed.
        OutputError: if the file cannot be written.
    """
    from jaxid.checkpoints.torch_files import write_torch_file

    layers = {}
    for name, value in network._asdict().items():
        layer, kind = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        array = np.asarray(value)
        if name == "conv1":
            array = array[:, None]
        elif name == "fc1":
            array = array.reshape(len(array), math.prod(array.shape[1:]))
        elif kind == "weight" and array.ndim == 1:
            array = array[None]
        layers[f"{layer}.{kind}"] = array.reshape(1) if array.ndim == 0 else array
    with whole_file(path) as temporary:
        write_torch_file(temporary, {"scorer": layers, _FUNCTIONAL: np.asarray(vectors)})


def _arrays(tree: object, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """All arrays of nested dictionaries by their dotted names."""
    if isinstance(tree, np.ndarray):
        yield prefix.removesuffix("."), tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _arrays(value, f"{prefix}{name}.")
