"""Functional words of captions, by rules or by a language model ([DCSM] arXiv 2503.08723)."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from jaxid.checks import Count
from jaxid.dcsm.functional_words import Endpoint, Found, by_model, by_rules, read_lines
from jaxid.dcsm.placement import PUBLISHED, find
from jaxid.experiments.base import Command, write_config
from jaxid.io import ensure_output_folder, write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class FindWords(Command[Found]):
    """Find functional words in captions; `jaxid dcsm train --words` takes the list.

    Attributes:
        captions: file of captions, one a line.
        out: folder for words, captions, and captions with the words marked.
        base_url: an OpenAI-compatible endpoint; without one, functional words are found by rules.
        llm: name of the endpoint's language model.
        key_variable: environment variable that holds the key; empty for none.
        keep: start with the published functional words.
        together: captions that the language model sees at once, to say what distinguishes each from the others.
        progress: show a progress bar, on terminals.
    """

    name: ClassVar[str] = "dcsm words"

    captions: Path = dataclasses.field(kw_only=False)
    out: Path
    base_url: str | None = None
    llm: str = "gpt-4o-mini"
    key_variable: str = "OPENAI_API_KEY"
    keep: bool = True
    together: Count = 16
    progress: bool = True

    def run(self) -> Found:
        """Finds the words and writes `words.txt`, `captions.txt` and `marked.txt`.

        Raises:
            DataError: if the captions cannot be read, or the endpoint gives no usable answer.
            InputError: if the endpoint's address or key cannot be used.
        """
        lines = read_lines(self.captions)
        known, ask = PUBLISHED if self.keep else (), None
        if self.base_url is not None:
            ask = Endpoint(self.base_url, self.llm, self.out / "answers", key_variable=self.key_variable or None)
        ensure_output_folder(self.out)
        write_config(self, self.out)
        if ask is None:
            found = by_rules(lines, known)
        else:
            found = by_model(lines, ask, known, together=self.together, progress=self.progress)
        marked = [_marked(caption, found.vocabulary) for caption in found.captions]
        for name, texts in (("words", found.vocabulary), ("captions", found.captions), ("marked", marked)):
            write_text(self.out / f"{name}.txt", "\n".join(texts) + "\n")
        return found

    def report(self, result: Found) -> Iterator[str]:
        """The words and their file."""
        yield f"{len(result.vocabulary)} functional words: {', '.join(result.vocabulary)}"
        yield str(self.out / "words.txt")


def _marked(caption: str, vocabulary: Sequence[str]) -> str:
    """A caption with its functional words <LIKE THIS>."""
    for _, start, stop in reversed(find(caption, vocabulary)):
        caption = f"{caption[:start]}<{caption[start:stop].upper()}>{caption[stop:]}"
    return caption
