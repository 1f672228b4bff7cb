"""Pictures and questions to arrays: chat template, tokenizer, image processor, and where each word sits."""

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.models.inputs import Inputs
from jaxid.processing.base import PictureSide
from jaxid.processing.pictures import Picture, first_line

_STAND_IN = "\ue000"  # a private character


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """A batch of prompts: the arrays, and where everything stands in them.

    Attributes:
        inputs: the arrays a model reads.
        questions: the user's text of every prompt, length B.
        texts: the rendered prompts, image tokens expanded, length B.
        spans: first and last + 1 character of the question in the text, Int[B, 2].
        offsets: first and last + 1 character of every token in the text, Int[B, T, 2].
    """

    inputs: Inputs
    questions: tuple[str, ...]
    texts: tuple[str, ...]
    spans: Int[np.ndarray, "B 2"]
    offsets: Int[np.ndarray, "B T 2"]

    def __len__(self) -> int:
        """Number of prompts, B."""
        return len(self.questions)

    def word(self, word: str | Sequence[str], *, occurrence: int | None = None) -> Int[np.ndarray, "B"]:
        """Position of the last sub-token of a word of the question.

        Args:
            word: the word, the same for all prompts or one per prompt; matched whole, case-sensitively.
            occurrence: which one, 0-based, where the word stands more than once.

        Returns:
            Int[B], positions in the prompt.

        Raises:
            PromptError: if a prompt's question does not hold the word, or holds it several times and
                `occurrence` is not given.
        """
        words = self._per_prompt(word)
        return np.array([tokens[-1] for tokens in self._word_tokens(words, occurrence)], np.int32)

    def word_tokens(self, word: str | Sequence[str], *, occurrence: int | None = None) -> Int[np.ndarray, "B P"]:
        """Positions of all sub-tokens of a word, shorter rows filled up with their last position."""
        rows = self._word_tokens(self._per_prompt(word), occurrence)
        longest = max(len(row) for row in rows)
        return np.array([row + row[-1:] * (longest - len(row)) for row in rows], np.int32)

    def _per_prompt(self, word: str | Sequence[str]) -> list[str]:
        words = [word] * len(self) if isinstance(word, str) else list(word)
        if len(words) != len(self):
            raise InputError(f"{len(words)} words were given for {len(self)} prompts.")
        return words

    def _word_tokens(self, words: list[str], occurrence: int | None) -> list[list[int]]:
        found = []
        for row, word in enumerate(words):
            question = self.questions[row]
            # An accent may be a letter of its own, which Python counts to no word.
            whole = rf"(?<!\w){re.escape(word)}(?![\w\u0300-\u036f])"
            places = [match.span() for match in re.finditer(whole, question)]
            if not word.strip() or not places:
                raise PromptError(f"prompt {row} ({question!r}) does not hold the word {word!r}.")
            if occurrence is None and len(places) > 1:
                raise PromptError(
                    f"prompt {row} ({question!r}) holds the word {word!r} {len(places)} times; "
                    f"say which one with occurrence=0..{len(places) - 1}."
                )
            if not 0 <= (occurrence or 0) < len(places):
                raise PromptError(f"prompt {row} ({question!r}) has no occurrence {occurrence} of {word!r}.")
            first, end = (place + int(self.spans[row, 0]) for place in places[occurrence or 0])
            starts, ends = self.offsets[row, :, 0], self.offsets[row, :, 1]
            tokens = np.flatnonzero((starts < end) & (ends > first) & (ends > starts))
            found.append([int(token) for token in tokens])
        return found

    def image_tokens(self) -> Int[np.ndarray, "B I"]:
        """Positions of the picture's tokens.

        Raises:
            PromptError: if the prompts hold different numbers of them.
        """
        return self._where(np.asarray(self.inputs.image_slots) >= 0, "picture tokens", equal=True)

    def text_tokens(self) -> Int[np.ndarray, "B P"]:
        """Positions of all tokens after the picture, shorter rows filled up with their last position."""
        valid = np.asarray(self.inputs.valid)
        after = np.arange(valid.shape[1]) >= self.text_start()[:, None]
        return self._where(after & valid, "text tokens", equal=False)

    def text_start(self) -> Int[np.ndarray, "B"]:
        """Position of the first token after the picture; 0 without one."""
        pictured = np.asarray(self.inputs.image_slots) >= 0
        after = pictured.shape[1] - np.argmax(pictured[:, ::-1], axis=1)
        return np.where(pictured.any(axis=1), after, 0).astype(np.int32)

    def _where(self, chosen: np.ndarray, what: str, *, equal: bool) -> Int[np.ndarray, "B P"]:
        rows = [np.flatnonzero(row) for row in chosen]
        lengths = {len(row) for row in rows}
        if 0 in lengths or (equal and len(lengths) > 1):
            raise PromptError(f"the prompts hold {sorted(lengths)} {what}; take them in groups of equal number.")
        longest = max(lengths)
        return np.array([np.append(row, [row[-1]] * (longest - len(row))) for row in rows], np.int32)

    def last(self) -> Int[np.ndarray, "B"]:
        """Position at which the answer is read."""
        return np.asarray(self.inputs.last)

    def extended(self, tokens: Int[np.ndarray, "B N"], lengths: Int[np.ndarray, "B"]) -> "Prompts":
        """The prompts with new tokens behind them, as if they had been written so.

        Args:
            tokens: new tokens, Int[B, N].
            lengths: how many of them count, Int[B].

        Returns:
            Prompts of N places more, whose last token is the last new one; the new tokens stand in no text.
        """
        inputs, last = self.inputs, self.last()
        batch, room = tokens.shape
        places = np.arange(self.offsets.shape[1] + room, dtype=np.int32)
        ends = (last + lengths).astype(np.int32)
        valid = places <= ends[:, None]

        def longer(values: np.ndarray, fill: int) -> np.ndarray:
            widths = [(0, 0)] * (values.ndim - 1) + [(0, room)]
            return np.pad(np.asarray(values), widths, constant_values=fill)

        token_ids = longer(inputs.token_ids, 0)
        rope_positions = None if inputs.rope_positions is None else longer(inputs.rope_positions, 0)
        for row in range(batch):
            new = slice(last[row] + 1, ends[row] + 1)
            token_ids[row, new] = tokens[row, : lengths[row]]
            if rope_positions is not None:
                rope_positions[row, :, new] = rope_positions[row, :, last[row], None] + 1 + np.arange(lengths[row])
        return dataclasses.replace(
            self,
            inputs=dataclasses.replace(
                inputs,
                token_ids=token_ids,
                positions=np.tile(places, (batch, 1)),
                valid=valid,
                last=ends,
                image_slots=longer(inputs.image_slots, -1),
                rope_positions=rope_positions,
            ),
            offsets=np.pad(self.offsets, [(0, 0), (0, room), (0, 0)]),
        )


class Processor:
    """A checkpoint's tokenizer, chat template and image processor, without PyTorch."""

    def __init__(self, tokenizer: Any, side: PictureSide, *, stop_ids: tuple[int, ...] = ()):
        """Wraps loaded parts; see `from_folder`."""
        self.tokenizer = tokenizer
        self.side = side
        self.stop_ids = stop_ids

    @classmethod
    def from_folder(cls, folder: Path, config: Any, side: type[PictureSide]) -> "Processor":
        """Loads the parts from a checkpoint folder.

        Args:
            folder: the checkpoint's folder.
            config: the network's config.
            side: what the family does with pictures.

        Raises:
            CheckpointError: naming the part that is missing or unreadable.
        """
        from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

        # Of a kind of model that it does not know, transformers would read the config.json and warn of what it finds.
        known = {"config": AutoConfig.for_model(side.tokenizer_of)} if side.tokenizer_of else {}
        # Of a kind that it knows, it would cut words that kind's way, though the folder asks for tokenizer.json alone.
        kind: Any = PreTrainedTokenizerFast if known and _takes_any(folder) else AutoTokenizer
        try:
            tokenizer = kind.from_pretrained(
                folder, local_files_only=True, **({} if kind is not AutoTokenizer else known)
            )
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
        image_processor = side.load_image_processor(folder, config)
        token = side.token_id(tokenizer, config)
        if tokenizer.convert_ids_to_tokens([token]) in ([None], [tokenizer.unk_token]):
            raise CheckpointError(
                f"the tokenizer in {folder} has no token of id {token}, which config.json names as the image token."
            )
        tokenizer.chat_template = _chat_template(folder, tokenizer, side)
        return cls(tokenizer, side(tokenizer, image_processor, config), stop_ids=_stop_ids(folder, tokenizer))

    def pixels(self, images: Sequence[Picture]) -> Float[np.ndarray, "N ..."]:
        """Pictures as the family's tower takes them, each in a prompt of its own.

        Raises:
            InputError: for a picture that cannot be opened, naming it.
        """
        return self.side.encode(images, [[number] for number in range(len(images))]).pixels

    def render(self, question: str, *, pictures: Sequence[str] = (), chat: bool = True) -> tuple[str, int]:
        """The prompt's text, pictures' tokens filled in, and the first character of the question in it.

        Args:
            question: the user's text.
            pictures: what stands in the text for every picture.
            chat: end with the generation prompt.

        Raises:
            PromptError: for an empty question, or one that the template does not keep as it is.
        """
        question = question.strip()
        placeholder = self.side.placeholder
        if not question:
            raise PromptError("the question is empty.")
        if placeholder in question:
            raise PromptError(f"the question {question!r} holds the image token {placeholder!r}: leave it out.")
        rendered = self._rendered(question, pictures=len(pictures), chat=chat)
        # A stand-in that no template holds: the question itself may also stand in the template ("USER").
        start = self._rendered(_STAND_IN, pictures=len(pictures), chat=chat).find(_STAND_IN)
        if start < 0 or rendered[start : start + len(question)] != question:
            raise PromptError(f"the chat template changes the question {question!r}; its words cannot be located.")
        if not chat:
            rendered = rendered[: start + len(question)]
        pieces = rendered[:start].split(placeholder)
        if len(pieces) != len(pictures) + 1:
            raise PromptError(
                f"the chat template places {len(pieces) - 1} pictures as {placeholder!r} instead of {len(pictures)}: "
                "it must place every picture once, before the question."
            )
        before = pieces[0] + "".join(text + piece for text, piece in zip(pictures, pieces[1:], strict=True))
        return before + rendered[start:], len(before)

    def _rendered(self, text: str, *, pictures: int, chat: bool) -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=chat)

    def _encode(self, texts: Sequence[str]) -> Any:
        """Token ids and offsets of prompts, whose template may have written the first token itself."""
        first = self.tokenizer.bos_token
        written = first is not None and texts[0].startswith(first)
        return self.tokenizer(list(texts), return_offsets_mapping=True, add_special_tokens=not written)

    def prepare(
        self,
        images: Any,
        questions: str | Sequence[str],
        *,
        chat: bool = True,
        pad_to_multiple: int = 8,
    ) -> Prompts:
        """Builds a batch of prompts.

        Args:
            images: one picture per prompt, or a single picture that all prompts share, or None for text alone; a
                prompt about several pictures takes a sequence of them.
            questions: one question per prompt, or a single one for all pictures.
            chat: end with the generation prompt ("ASSISTANT:"); False ends at the question's last word.
            pad_to_multiple: prompts are padded to a multiple of this length, so that few programs are compiled.

        Returns:
            The batch, B = the longer of the two sequences.

        Raises:
            InputError: for numbers that do not fit or a picture that cannot be opened.
            PromptError: for an empty question.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        single = images is not None and not isinstance(images, (list, tuple)) and not _is_batch(images)
        given: list[Any] = [] if images is None else [images] if single else [*images]
        if not asked or (images is not None and not given):
            raise InputError("there are no questions or no pictures to prepare.")
        if isinstance(questions, str):
            asked = asked * max(1, len(given))
        if given and len(given) not in (1, len(asked)):
            raise InputError(f"{len(given)} pictures were given for {len(asked)} questions.")
        groups = [list(entry) if isinstance(entry, (list, tuple)) or _is_batch(entry) else [entry] for entry in given]
        if any(not group for group in groups):
            raise InputError("a prompt was given an empty list of pictures; give None for text alone.")
        counts = np.cumsum([0, *(len(group) for group in groups)])
        numbers = [list(range(first, end)) for first, end in itertools.pairwise(counts.tolist())]
        members = numbers * len(asked) if len(numbers) == 1 else numbers or [[] for _ in asked]
        pictures = [picture for group in groups for picture in group]
        encoded = self.side.encode(pictures, members) if pictures else None
        shown = [[encoded.tokens[number] for number in some] if encoded else [] for some in members]

        texts, starts = [], []
        for question, some in zip(asked, shown, strict=True):
            text, start = self.render(question, pictures=[picture.text for picture in some], chat=chat)
            texts.append(text)
            starts.append(start)
        tokens = self._encode(texts)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        total = -(-max(lengths) // pad_to_multiple) * pad_to_multiple
        token_ids = np.full((len(asked), total), self.tokenizer.pad_token_id or 0, np.int32)
        offsets = np.zeros((len(asked), total, 2), np.int32)
        for row, ids in enumerate(tokens["input_ids"]):
            token_ids[row, : len(ids)] = ids
            offsets[row, : len(ids)] = tokens["offset_mapping"][row]
        valid = np.arange(total) < np.array(lengths)[:, None]
        spans = [(start, start + len(question.strip())) for start, question in zip(starts, asked, strict=True)]
        return Prompts(
            inputs=Inputs(
                token_ids=token_ids,
                positions=np.tile(np.arange(total, dtype=np.int32), (len(asked), 1)),
                valid=valid,
                last=np.array(lengths, np.int32) - 1,
                pixels=encoded.pixels if encoded else None,
                image_slots=self.side.slots(token_ids, valid, shown),
                rope_positions=self.side.rope_positions(token_ids, valid, shown),
                extras=encoded.extras if encoded else {},
            ),
            questions=tuple(question.strip() for question in asked),
            texts=tuple(texts),
            spans=np.array(spans, np.int32),
            offsets=offsets,
        )

    def answer_tokens(self, words: Sequence[str]) -> list[list[int]]:
        """Ids of the tokens of each answer, right after the generation prompt.

        Raises:
            PromptError: for a word that would change the prompt's own tokens, or is not in the vocabulary.
        """
        text, _ = self.render("?")
        head = self._encode([text])["input_ids"][0]
        # After a line break or a special token a word begins at once; after "ASSISTANT:" with a space or its marker.
        specials = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        joint = "" if text[-1].isspace() or text.endswith(specials) else " "
        found = []
        for word in words:
            whole = self._encode([f"{text}{joint}{word}"])["input_ids"][0]
            tail = list(whole[len(head) :])
            if whole[: len(head)] != head or not tail:
                raise PromptError(f"the answer {word!r} does not begin with a token of its own after the prompt.")
            if self.tokenizer.unk_token_id in tail:
                raise PromptError(f"the answer {word!r} is not in the model's vocabulary.")
            found.append(tail)
        return found

    def answer_ids(self, words: Sequence[str]) -> Int[np.ndarray, "n"]:
        """Ids of the tokens with which the model would begin each answer, right after the generation prompt.

        Raises:
            PromptError: for a word that needs several tokens, or two words that share their token.
        """
        ids = []
        for word, tail in zip(words, self.answer_tokens(words), strict=True):
            if len(tail) != 1:
                raise PromptError(f"the answer {word!r} is not a single token after the prompt: {tail}.")
            ids.append(tail[0])
        if len(set(ids)) < len(ids):
            raise PromptError(f"the answers {', '.join(words)} do not have tokens of their own: {ids}.")
        return np.array(ids, np.int32)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def _takes_any(folder: Path) -> bool:
    """Whether a folder names the tokenizer class that is made of tokenizer.json alone."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):  # the tokenizer's own loader will say what is wrong
        return False
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _chat_template(folder: Path, tokenizer: Any, side: type[PictureSide]) -> str:
    """The template that places pictures: the processor's, else the tokenizer's, else the family's own."""
    path = folder / "chat_template.json"
    if path.exists():
        try:
            return json.loads(path.read_text())["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} holds no chat template ({error!r}).") from error
    template = side.template or tokenizer.chat_template
    if template is None:
        raise CheckpointError(f"{folder} has no chat template (chat_template.jinja or chat_template.json).")
    return template


def _stop_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer, from where Hugging Face's `generate` takes them; else the tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            fields = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise CheckpointError(f"{path} is not readable JSON ({error}).") from error
        for part in (fields, fields.get("text_config") or {}):
            ids = part.get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (ids,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def _is_batch(images: Any) -> bool:
    return isinstance(images, np.ndarray) and images.ndim == 4
