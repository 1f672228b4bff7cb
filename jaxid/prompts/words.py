"""Words in texts: where whole ones are, which ones a tokenizer does not know, and which texts it cannot take."""

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxid.errors import CheckpointError, JaxidError, UnknownWordsWarning
from jaxid.io import read_json, reading

_LETTER = r"[\w\u0300-\u036f]"
"""An accent may be a letter of its own, which Python counts to no word."""

_PIECE = re.compile(rf"{_LETTER}+|[^\w\s]")

_NAMED = 10
"""Unknown words that a warning names."""

_SHOWN = 200
"""Characters of a text that an error repeats."""


def word_spans(text: str, names: Sequence[str], *, ignore_case: bool = False) -> list[list[tuple[int, int]]]:
    """Where each name occurs in a text as whole words; longer names come first, and no two spans overlap.

    Args:
        text: the text.
        names: what to look for; white space in a name stands for any white space.
        ignore_case: take capitals and small letters as the same.

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
    """The words of a text that become the unknown token, or of which the tokenizer drops letters; each once.

    Args:
        text: the text.
        token_ids: its tokens.
        offsets: first and last + 1 character of every token, also of those before and after the text; equal where it
            stands for no characters.
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
    """Warns once of all unknown words of a batch.

    Args:
        rows: those of each text.
        what: the texts, such as "questions".
        token: what the model reads instead.
        stacklevel: as for `warnings.warn`, counted from the caller.
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
    """Refuses what is no text for a tokenizer.

    Args:
        text: the text.
        what: names it in the message, such as "the question".
        specials: the tokenizer's special tokens.
        error: the kind of error to raise.

    Raises:
        JaxidError: of the given kind, for a value that is no string, or one with NUL characters, lone surrogates or
            special tokens.
    """
    if not isinstance(text, str):
        raise error(f"{what} must be text, not {type(text).__name__}.")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise error(f"{what} {shown(text)} holds characters that are no text (NUL or lone surrogates); leave them out.")
    for token in specials:
        if token in text:
            raise error(f"{what} {shown(text)} holds the tokenizer's special token {token!r}: leave it out.")


def shown(text: str) -> str:
    """A text in quotes, as messages repeat it: its beginning, if it is long."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """What the tokenizer takes for its own signs anywhere in a text."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content)


def read_tokenizer(folder: Path, kind: Any = None, **options: Any) -> Any:
    """The tokenizer of a folder, once it has cut a text into tokens and put it together again.

    Args:
        folder: holds its files.
        kind: the class of transformers that reads it; `AutoTokenizer` by default.
        options: of its `from_pretrained`.

    Raises:
        CheckpointError: if it is missing, unreadable, or cannot tell where its tokens are.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        read_json(folder / name, missing={})
    file = folder / "tokenizer.json"
    with reading(file if file.exists() else folder, "a tokenizer"):
        tokenizer = (kind or AutoTokenizer).from_pretrained(folder, local_files_only=True, **options)
        if not tokenizer.is_fast:
            raise CheckpointError(f"the tokenizer in {folder} has no tokenizer.json, which tells where tokens are.")
        # A damaged file may be readable and fail at the first text.
        tokenizer.decode(tokenizer(tokenizer.unk_token or "a", return_offsets_mapping=True)["input_ids"])
        for role in ("unk", "pad", "bos", "eos"):  # looked up in the vocabulary, endlessly if that lacks "unk"
            getattr(tokenizer, f"{role}_token_id")
    return tokenizer
