"""Words in texts: where they are, which ones a tokenizer does not know, and which texts it cannot read."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int

from jaxid.errors import CheckpointError, JaxidError, UnknownWordsWarning
from jaxid.io import read_json, reading

Tokenizer: TypeAlias = Any
"""A fast tokenizer of transformers, or an object that works like one."""

_LETTER = r"[\w\u0300-\u036f]"
"""Includes combining accents, which are not part of words for Python."""

_PIECE = re.compile(rf"{_LETTER}+|[^\w\s]")

_NAMED = 10
"""The most unknown words that a warning names."""

_SHOWN = 200
"""The most characters of a text that an error repeats."""


def word_spans(text: str, names: Sequence[str], *, ignore_case: bool = False) -> list[list[tuple[int, int]]]:
    """Where each name occurs in a text as whole words; longer names take precedence, and no two spans overlap.

    Args:
        text: the text.
        names: the names; white space in a name matches any white space.
        ignore_case: whether upper and lower case match.

    Returns:
        First and last + 1 character of every occurrence of each name, in order.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in names]
    taken: list[tuple[int, int]] = []
    for index in sorted(range(len(names)), key=lambda index: -len(names[index])):
        spaced = r"\s+".join(re.escape(part) for part in names[index].split())
        if not spaced:
            continue
        whole = rf"(?<!{_LETTER}){spaced}(?!{_LETTER})"
        for match in re.finditer(whole, text, re.IGNORECASE if ignore_case else 0):
            start, stop = match.span()
            if all(stop <= first or start >= end for first, end in taken):
                found[index].append((start, stop))
                taken.append((start, stop))
    return found


def unknown(
    text: str, token_ids: Sequence[int], offsets: Int[np.ndarray, "T 2"], unknown_id: int | None
) -> tuple[str, ...]:
    """The words of a text that become the unknown token or lose letters in the tokenizer, without duplicates.

    Args:
        text: the text.
        token_ids: its tokens, and possibly tokens before and after the text.
        offsets: first and last + 1 character of every token, relative to the text; equal for a token without
            characters.
        unknown_id: id of the unknown token, None if the tokenizer has none.
    """
    lost, kept = np.zeros(len(text), bool), np.zeros(len(text), bool)
    for index in np.flatnonzero((offsets[:, 1] > 0) & (offsets[:, 0] < len(text))).tolist():
        start, stop = offsets[index]
        (lost if token_ids[index] == unknown_id else kept)[max(start, 0) : stop] = True
    found = {}
    for match in _PIECE.finditer(text):
        part = slice(*match.span())
        dropped = ~(lost[part] | kept[part])
        if lost[part].any() or any(text[match.start() + index].isalnum() for index in np.flatnonzero(dropped)):
            found[match.group()] = None
    return tuple(found)


def warn_unknown(rows: Iterable[Sequence[str]], what: str, token: str | None, *, stacklevel: int) -> None:
    """Warns once about all unknown words of a batch.

    Args:
        rows: the unknown words of each text.
        what: what the texts are, such as "questions".
        token: the token that the model reads instead.
        stacklevel: as in `warnings.warn`, counted from the caller.
    """
    words = list(dict.fromkeys(word for row in rows for word in row))
    if not words:
        return
    named = ", ".join(map(repr, words[:_NAMED])) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")
    warnings.warn(
        f"the {what} hold words that are not in the model's vocabulary, which reads them as {token or 'nothing'}: "
        f"{named}.",
        UnknownWordsWarning,
        stacklevel=stacklevel + 1,
    )


def check_text(text: str, what: str, specials: Iterable[str], error: type[JaxidError]) -> None:
    """Refuses a text that a tokenizer cannot read.

    Args:
        text: the text.
        what: its name in the message, such as "the question".
        specials: the tokenizer's special tokens.
        error: the class of error to raise.

    Raises:
        JaxidError: of the given class, for a value that is not a string, or contains NUL characters, lone surrogates
            or special tokens.
    """
    if not isinstance(text, str):
        raise error(f"{what} must be text, not {type(text).__name__}.")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise error(
            f"{what} {shown(text)} contains NUL characters or lone surrogates, which are not text; remove them."
        )
    for token in specials:
        if token in text:
            raise error(f"{what} {shown(text)} contains the tokenizer's special token {token!r}; remove it.")


def shown(text: str) -> str:
    """A text in quotes, shortened if it is long, for messages."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens that the tokenizer recognises as its own anywhere in a text."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content)


def read_tokenizer(folder: Path, kind: Any = None, options: Mapping[str, object] = {}) -> Tokenizer:
    """The tokenizer of a folder, after a trial on a short text.

    Args:
        folder: the folder of its files.
        kind: the class of transformers that reads it; `AutoTokenizer` by default.
        options: options of its `from_pretrained`.

    Raises:
        CheckpointError: if it is missing or unreadable, or does not report the positions of its tokens.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_json(folder / name, missing={})
    file = folder / "tokenizer.json"
    with reading(file if file.exists() else folder, "a tokenizer"):
        tokenizer = (kind or AutoTokenizer).from_pretrained(folder, local_files_only=True, **options)
        if not tokenizer.is_fast:
            raise CheckpointError(
                f"the tokenizer in {folder} has no tokenizer.json, which gives the positions of tokens."
            )
        # A damaged file may be readable but fail on the first text.
        tokenizer.decode(tokenizer(tokenizer.unk_token or "a", return_offsets_mapping=True)["input_ids"])
        for role in ("unk", "pad", "bos", "eos"):  # the lookup recurses without end if the vocabulary lacks "unk"
            getattr(tokenizer, f"{role}_token_id")
    return tokenizer
