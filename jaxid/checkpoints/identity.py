"""The identity of a checkpoint: a digest of its numbers and of the small files beside them, made during loading."""

import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxid.io import reading

_EXPONENTS = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "bfloat16": 0xFF << 7}
"""Bits that are all set in NaN and infinity, and in no other number."""

_BLOCK_BYTES = 1 << 20
"""Bytes digested and checked at a time, which fit a core's own cache."""

_SMALL_FILES = """config.json open_clip_config.json preprocessor_config.json processor_config.json
video_preprocessor_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
vocab.json vocab.txt merges.txt tokenizer.model spiece.model chat_template.json chat_template.jinja
generation_config.json""".split()
"""Files besides the weights on which a model's numbers depend."""


class Seen(NamedTuple):
    """What was found out about a piece of a tensor while it was copied.

    Attributes:
        source: the tensor's name in the key table's spelling.
        part: which part of it one key reads.
        index: which piece of that part.
        tensor: its name in the file.
        digest: of its numbers and their format.
        finite: whether none of them is NaN or infinite.
        fits: whether the parameters' format holds all of them.
    """

    source: str
    part: tuple[int, int]
    index: int
    tensor: str
    digest: str
    finite: bool
    fits: bool


def look(part: Shaped[np.ndarray, "..."]) -> tuple[str, bool]:
    """A digest of a part of a tensor, and whether all of it is finite."""
    memory, name = part.ravel(order="K"), part.dtype.name
    digest, exponent, finite = hashlib.sha256(f"{name} {part.shape}".encode()), _EXPONENTS[name], True
    step = _BLOCK_BYTES // part.itemsize
    for first in range(0, memory.size, step):
        bits = memory[first : first + step].view(f"u{part.itemsize}")
        # A cryptographic digest of every byte would take longer than all else in loading.
        digest.update(zlib.crc32(bits.data).to_bytes(4, "little"))
        finite = finite and int((bits & bits.dtype.type(exponent)).max()) != exponent
    return digest.hexdigest(), finite


def combined(seen: Iterable[Seen]) -> str:
    """One digest of all pieces, in an order that does not depend on how tensors are spread over files."""
    digest = hashlib.sha256()
    for piece in sorted(seen):
        digest.update(f"{piece.source} {piece.part} {piece.index} {piece.digest}\n".encode())
    return digest.hexdigest()


def fingerprint(folder: Path, digest: str) -> str:
    """Identifies a checkpoint by its numbers and by the small files that say how they are used.

    Args:
        folder: the folder of those files: config, tokenizer, chat template, settings of the image processor.
        digest: of the tensors, as `read_parameters` gives it.
    """
    whole = hashlib.sha256(digest.encode())
    for name in _SMALL_FILES:
        if (folder / name).is_file():
            with reading(folder / name, "a file of the checkpoint"):
                content = (folder / name).read_bytes()
            whole.update(f"{name} {len(content)} ".encode() + content)
    return whole.hexdigest()[:16]
