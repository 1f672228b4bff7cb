"""The scorer's weights in the authors' `.pt` layout, read and written.

Their checkpoint holds the layers in `model_state_dict`, as PyTorch names them: `conv1`, `conv2`, `fc1`, `fc2` (the MLP:
`fc1` to `fc3`); the functional vectors [W, I] in `external_logic_token_embeddings`, a pickled `torch.nn.Embedding`; and
in `learned_lookup` their words, or None for the published ones. Beside them are the state of the optimizer, the frozen
encoder and its pickled tokenizer, which are not needed. The flat order of `fc1`'s inputs is channel, image token, text
token. Source: [DCSM] arXiv 2503.08723.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxid.checkpoints.torch_files import Embedding, read_torch_file, write_torch_file
from jaxid.checks import check_finite
from jaxid.errors import CheckpointError
from jaxid.io import whole_file
from jaxid.kernels.scorer import CHANNELS, CNN, MLP

LAYERS, VECTORS, WORDS = "model_state_dict", "external_logic_token_embeddings", "learned_lookup"
"""Keys of the authors' checkpoints."""

_CLIP = "transformers.models.clip.tokenization_clip"
_OBJECTS = frozenset(
    {
        "torch.nn.modules.sparse.Embedding",
        *(f"{_CLIP}.CLIPTokenizer", f"{_CLIP}.BasicTokenizer", f"{_CLIP}_fast.CLIPTokenizerFast"),
        *("transformers.tokenization_utils.Trie", "regex._regex.compile", "_regex.compile", "ftfy.fix_text"),
        *("tokenizers.AddedToken", "tokenizers.Tokenizer", "tokenizers.models.Model"),
    }
)
"""What their checkpoints mention: the embedding, and the tokenizer in the versions of transformers before and since 5.
"""

_CONVERT = (
    "jaxid reads what it needs and runs no code of the file. If you trust it, run once where the authors' code runs: "
    "python -c \"import sys, torch; f = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
    "torch.save({{'model_state_dict': f['model_state_dict'], "
    "'external_logic_token_embeddings': f['external_logic_token_embeddings'].weight.detach(), "
    "'learned_lookup': f.get('learned_lookup')}}, sys.argv[2])\" {path} {converted}"
)


class AuthorsScorer(NamedTuple):
    """A scorer of the authors' layout.

    Attributes:
        network: the layers.
        vectors: functional vectors.
        words: their words; None for the published ones.
    """

    network: CNN | MLP
    vectors: Float[np.ndarray, "W I"]
    words: tuple[str, ...] | None


def read_authors_scorer(path: str | Path, text_tokens: int | None = None) -> AuthorsScorer:
    """A scorer and its functional vectors.

    Reads other nested dictionaries too: the layers may be stored under any name, the vectors under any name with "func"
    or "embed" in it.

    Args:
        path: the file.
        text_tokens: caption tokens of a map; by default as many as the inputs of `fc1` make with the vectors' length.

    Raises:
        CheckpointError: if torch is not installed, or the file is missing, damaged, or does not hold such a scorer; or
            if it mentions classes that none of theirs do, in which case the message says how to convert it.
    """
    converted = Path(path).with_name(f"{Path(path).stem}-plain.pt")
    advice = _CONVERT.format(path=shlex.quote(str(path)), converted=shlex.quote(str(converted)))
    tree = read_torch_file(path, _OBJECTS, advice)
    words = None
    if isinstance(tree, Mapping):
        words = _words(tree.get(WORDS), f"{path}: {WORDS}")
        if LAYERS in tree:
            tree = {LAYERS: tree[LAYERS], VECTORS: tree.get(VECTORS)}
    arrays = dict(_arrays(tree))
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
    _check_shapes(layers, str(path))
    flat, columns = layers["fc1.weight"].shape[1], channels * image_tokens
    text_tokens = flat // max(columns, 1) if text_tokens is None else text_tokens
    if not flat or flat != columns * text_tokens:
        raise CheckpointError(
            f"{path}: fc1 reads {flat} numbers, which are not {channels} x {image_tokens} "
            f"image tokens (of the functional vectors) x {text_tokens} caption tokens."
        )
    first = layers["fc1.weight"].reshape(-1, channels, image_tokens, text_tokens)
    last = names[-1]
    ends = {last: layers[f"{last}.weight"][0], f"{last}_bias": layers[f"{last}.bias"].reshape(())}
    if kind == "mlp":
        hidden = {"fc2": layers["fc2.weight"], "fc2_bias": layers["fc2.bias"]}
        network = MLP(fc1=first[:, 0], fc1_bias=layers["fc1.bias"], **hidden, **ends)
        return AuthorsScorer(network, vectors[0], words)
    network = CNN(
        conv1=layers["conv1.weight"][:, 0],
        conv1_bias=layers["conv1.bias"],
        conv2=layers["conv2.weight"],
        conv2_bias=layers["conv2.bias"],
        fc1=first,
        fc1_bias=layers["fc1.bias"],
        **ends,
    )
    return AuthorsScorer(network, vectors[0], words)


def _words(found: object, where: str) -> tuple[str, ...] | None:
    if found is None:
        return None
    if not isinstance(found, list | tuple) or not all(isinstance(word, str) for word in found):
        raise CheckpointError(f"{where} is neither None nor a list of words.")
    return tuple(found)


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


def write_authors_scorer(
    path: str | Path, network: CNN | MLP, vectors: Float[np.ndarray, "W I"], words: Sequence[str] | None = None
) -> None:
    """Writes a scorer with the keys of the authors' checkpoints, atomically; needs PyTorch.

    Their loader takes the layers, the vectors and the words, and keeps the encoder that it has, since the file brings
    none. There is no state of the optimizer either.

    Args:
        path: the file.
        network: the layers.
        vectors: functional vectors.
        words: their words, if they are not the published ones.

    Raises:
        CheckpointError: if torch is not installed.
        OutputError: if the file cannot be written.
    """
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
        nothing = {"optimizer_state_dict": {}, "clip_state_dict": {}, "clip_text_tokenizer": None, "grads": {}}
        losses: dict[str, object] = {"epoch": 0, "train_loss": [], "valid_loss": []}
        own = {LAYERS: layers, VECTORS: Embedding(np.asarray(vectors)), WORDS: None if words is None else list(words)}
        write_torch_file(temporary, {**losses, **nothing, **own})


def _arrays(tree: object, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """All arrays of nested dictionaries by their dotted names."""
    if isinstance(tree, np.ndarray):
        yield prefix.removesuffix("."), tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _arrays(value, f"{prefix}{name}.")
