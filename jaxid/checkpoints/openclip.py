"""OpenCLIP's files: folders with `open_clip_config.json`, and single weight files of a named architecture."""

import hashlib
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxid.checkpoints.loading import downloaded
from jaxid.checkpoints.tensors import TensorFolder, Tensors
from jaxid.checkpoints.torch_files import read_torch_file
from jaxid.errors import CheckpointError
from jaxid.families.openclip import ARCHITECTURES
from jaxid.io import read_json
from jaxid.nn.fields import Json
from jaxid.prompts.words import read_tokenizer

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt")
PICKLED = (".pt", ".pth", ".bin")

TOKENIZER = "openai/clip-vit-base-patch32"
"""Whose tokenizer OpenCLIP's models share, for files that bring none."""

_ESCAPE = re.compile(r"&#?\w{1,32};?")

_STRAIGHT = {ord(curly): "'" for curly in "\u02bc\u2018\u2019\u201a\u201b"}
_STRAIGHT |= {ord(curly): '"' for curly in "\u201c\u201d\u201e\u201f"}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


class TensorArrays(Tensors):
    """Tensors of a file written by `torch.save`, in memory; what `TensorFolder` is for safetensors."""

    def __init__(self, path: Path):
        """Reads the file, tensors and plain values only.

        Takes what is under "state_dict", as training checkpoints have it, and drops the prefix "module." of runs on
        several devices.

        Raises:
            CheckpointError: if it cannot be read or holds no tensors.
        """
        self.files, self.folder = [path], path.parent
        tree = read_torch_file(path)
        tree = tree.get("state_dict", tree) if isinstance(tree, Mapping) else {}
        arrays = {name: value for name, value in tree.items() if isinstance(value, np.ndarray)}
        if not arrays:
            raise CheckpointError(f"{path} holds no tensors by name.")
        if all(name.startswith("module.") for name in arrays):
            arrays = {name.removeprefix("module."): value for name, value in arrays.items()}
        self.entries: Mapping[str, np.ndarray] = arrays

    def readable(self, key: str) -> bool:
        """Whether a tensor holds floating-point numbers."""
        kind = self.entries[key].dtype
        return np.issubdtype(kind, np.floating) or kind.name == "bfloat16"

    def read(self, key: str) -> Shaped[np.ndarray, "..."]:
        """A tensor."""
        return self.entries[key]


def open_weights(path: Path) -> Tensors:
    """The tensors of one weight file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return TensorArrays(path) if path.suffix in PICKLED else TensorFolder(path)


def find_weights(folder: Path) -> Path:
    """The weight file of an OpenCLIP folder.

    Raises:
        CheckpointError: if there is none.
    """
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has none of {', '.join(WEIGHT_FILES)}; copy or download it again.")
    return found[0]


def read_openclip_config(path: Path) -> tuple[Json, Json]:
    """`model_cfg` and `preprocess_cfg` of a folder's config.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path.parent} is not a checkpoint folder: it has neither config.json nor {CONFIG_FILE}. "
            "A weight file without a config is opened by its own path and the name of its architecture."
        )
    fields = read_json(path)
    parts = [fields.get("model_cfg"), fields.get("preprocess_cfg") or {}]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path} is not an OpenCLIP config: model_cfg and preprocess_cfg must be objects.")
    return parts[0], parts[1]


def architecture(name: str | None, path: Path) -> Json:
    """The `model_cfg` of a named architecture.

    Raises:
        CheckpointError: if there is no name, or it is unknown.
    """
    known = ", ".join(ARCHITECTURES)
    if name is None:
        raise CheckpointError(f"{path} is a weight file; say of which architecture: {known}.")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"the architecture {name!r} is not one of {known}.")
    return dict(ARCHITECTURES[name])


class OpenCLIPWords:
    """CLIP's tokenizer after OpenCLIP's cleaning of captions; used like a tokenizer of transformers.

    Escapes of HTML become what they stand for, twice, and curly quotes straight; CLIP's tokenizer itself lowers case
    and collapses blanks. OpenCLIP also repairs text that was decoded wrongly, which is not done here.
    """

    def __init__(self, tokenizer: Any):
        """Takes a fast tokenizer of transformers."""
        self.tokenizer = tokenizer
        self.unk_token, self.unk_token_id = tokenizer.unk_token, tokenizer.unk_token_id
        self.added_tokens_decoder = tokenizer.added_tokens_decoder

    def __call__(self, text: str, return_offsets_mapping: bool = True) -> dict[str, list[int] | list[tuple[int, int]]]:
        """Ids of a caption, and which of its characters, as it was given, every token stands for."""
        del return_offsets_mapping
        plain, spans = cleaned(text)
        found = self.tokenizer(plain, return_offsets_mapping=True)
        edges = [
            (spans[first][0], spans[last - 1][1]) if last > first else (0, 0) for first, last in found["offset_mapping"]
        ]
        return {"input_ids": found["input_ids"], "offset_mapping": edges}


def cleaned(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A caption without escapes of HTML and curly quotes.

    Returns:
        The caption, and for each of its characters the first and last + 1 of those in `text` that it stands for.
    """
    spans = [(index, index + 1) for index in range(len(text))]
    for _ in range(2):  # some captions of the web were escaped twice
        pieces, edges, end = [], [], 0
        for found in _ESCAPE.finditer(text):
            character = html.unescape(found.group())
            if character != found.group():
                first, last = found.span()
                pieces += [text[end:first], character]
                edges += [*spans[end:first], *[(spans[first][0], spans[last - 1][1])] * len(character)]
                end = last
        text, spans = "".join([*pieces, text[end:]]), [*edges, *spans[end:]]
    return text.translate(_STRAIGHT), spans


def load_words(folder: Path, tokenizer: str | Path | None, vocabulary: int) -> OpenCLIPWords:
    """The tokenizer of an OpenCLIP model.

    Args:
        folder: of its weights.
        tokenizer: folder or Hugging Face id of CLIP's tokenizer; by default `folder` if it holds one, else `TOKENIZER`.
        vocabulary: ids that the model knows.

    Raises:
        CheckpointError: if the tokenizer is missing, unreadable, or of another model.
    """
    if tokenizer is None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = folder
    where = Path(tokenizer or TOKENIZER).expanduser()
    if not where.is_dir():
        advice = "; give a folder that holds CLIP's tokenizer as `tokenizer`."
        where = downloaded(str(tokenizer or TOKENIZER), [*_TOKENIZER_FILES, "config.json"], advice)
    words = read_tokenizer(where)
    if len(words) != vocabulary:
        raise CheckpointError(f"the tokenizer in {where} has {len(words)} tokens, the model {vocabulary}.")
    if max(words.get_vocab().values()) >= vocabulary:
        raise CheckpointError(f"the tokenizer in {where} has ids beyond the model's {vocabulary} tokens.")
    return OpenCLIPWords(words)


def fingerprint(files: str, config: object, words: OpenCLIPWords) -> str:
    """Identifies a model by its files, its config and its tokenizer, which a file does not bring.

    The same weights are another model under another activation.

    Args:
        files: what `checkpoints.identity.fingerprint` made of the files.
        config: the network's config.
        words: the tokenizer.
    """
    tokens = words.tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(f"{files} {config} {tokens}".encode()).hexdigest()[:16]
