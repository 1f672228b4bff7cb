"""Pictures and questions to arrays: chat template, tokenizer, image processor, and where each word sits."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.models.inputs import Inputs

_STAND_IN = "\ue000"  # a private character

Picture = Any
"""A path, a PIL image, or an array UInt8[Y, X, 3]."""


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
            places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", question)]
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


class Processor:
    """A checkpoint's tokenizer, chat template and image processor, without PyTorch."""

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        *,
        image_token_id: int,
        image_tokens: int,
        stop_ids: tuple[int, ...] = (),
    ):
        """Wraps loaded parts; see `from_folder`."""
        self.stop_ids = stop_ids
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        self.image_tokens = image_tokens
        self.image_token = tokenizer.convert_ids_to_tokens(image_token_id)

    @classmethod
    def from_folder(cls, folder: Path, config: Any) -> "Processor":
        """Loads the parts from a checkpoint folder.

        Raises:
            CheckpointError: naming the part that is missing or unreadable.
        """
        from transformers import AutoImageProcessor, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error
        try:
            image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise CheckpointError(f"the image processor in {folder} cannot be read: {_first_line(error)}") from error
        if tokenizer.convert_ids_to_tokens([config.image_token_index]) in ([None], [tokenizer.unk_token]):
            raise CheckpointError(
                f"the tokenizer in {folder} has no token of id {config.image_token_index}, "
                "which config.json names as image_token_index."
            )
        if tokenizer.chat_template is None:
            template = folder / "chat_template.json"
            if not template.exists():
                raise CheckpointError(f"{folder} has no chat template (chat_template.jinja or chat_template.json).")
            tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
        return cls(
            tokenizer,
            image_processor,
            image_token_id=config.image_token_index,
            image_tokens=config.image_tokens,
            stop_ids=_stop_ids(folder, tokenizer),
        )

    def pixels(self, images: Sequence[Picture]) -> Float[np.ndarray, "N C Y X"]:
        """Pictures through the image processor.

        Raises:
            InputError: for a picture that cannot be opened, naming it.
        """
        opened = [open_picture(image) for image in images]
        return np.asarray(self.image_processor(opened, return_tensors="np")["pixel_values"], np.float32)

    def render(self, question: str, *, image: bool, chat: bool = True) -> tuple[str, int]:
        """The prompt's text, image token expanded, and the first character of the question in it.

        Raises:
            PromptError: for an empty question, or one that the template does not keep as it is.
        """
        question = question.strip()
        if not question:
            raise PromptError("the question is empty.")
        if self.image_token in question:
            raise PromptError(f"the question {question!r} holds the image token {self.image_token!r}: leave it out.")
        rendered = self._rendered(question, image=image, chat=chat)
        # A stand-in that no template holds: the question itself may also stand in the template ("USER").
        start = self._rendered(_STAND_IN, image=image, chat=chat).find(_STAND_IN)
        if start < 0 or rendered[start : start + len(question)] != question:
            raise PromptError(f"the chat template changes the question {question!r}; its words cannot be located.")
        if not chat:
            rendered = rendered[: start + len(question)]
        before = rendered[:start].replace(self.image_token, self.image_token * self.image_tokens)
        return before + rendered[start:], len(before)

    def _rendered(self, text: str, *, image: bool, chat: bool) -> str:
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if image:
            content.insert(0, {"type": "image"})
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=chat)

    def prepare(
        self,
        images: Picture | Sequence[Picture] | None,
        questions: str | Sequence[str],
        *,
        chat: bool = True,
        pad_to_multiple: int = 8,
    ) -> Prompts:
        """Builds a batch of prompts.

        Args:
            images: one picture per prompt, or a single picture that all prompts share, or None for text alone.
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
        shared = images is not None and not isinstance(images, (list, tuple)) and not _is_batch(images)
        pictures: list[Picture] = [] if images is None else [images] if shared else list(images)
        if not asked or (images is not None and not pictures):
            raise InputError("there are no questions or no pictures to prepare.")
        if isinstance(questions, str):
            asked = asked * max(1, len(pictures))
        if pictures and len(pictures) not in (1, len(asked)):
            raise InputError(f"{len(pictures)} pictures were given for {len(asked)} questions.")

        rendered = [self.render(question, image=bool(pictures), chat=chat) for question in asked]
        encoded = self.tokenizer([text for text, _ in rendered], return_offsets_mapping=True)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        total = -(-max(lengths) // pad_to_multiple) * pad_to_multiple
        token_ids = np.full((len(asked), total), self.tokenizer.pad_token_id or 0, np.int32)
        offsets = np.zeros((len(asked), total, 2), np.int32)
        for row, ids in enumerate(encoded["input_ids"]):
            token_ids[row, : len(ids)] = ids
            offsets[row, : len(ids)] = encoded["offset_mapping"][row]
        valid = np.arange(total) < np.array(lengths)[:, None]
        spans = np.array([(start, start + len(asked[row].strip())) for row, (_, start) in enumerate(rendered)])
        return Prompts(
            inputs=Inputs(
                token_ids=token_ids,
                positions=np.tile(np.arange(total, dtype=np.int32), (len(asked), 1)),
                valid=valid,
                last=np.array(lengths, np.int32) - 1,
                pixels=self.pixels(pictures) if pictures else None,
                image_slots=self._slots(token_ids, valid, len(pictures)),
            ),
            questions=tuple(question.strip() for question in asked),
            texts=tuple(text for text, _ in rendered),
            spans=spans.astype(np.int32),
            offsets=offsets,
        )

    def _slots(self, token_ids: np.ndarray, valid: np.ndarray, pictures: int) -> Int[np.ndarray, "B T"]:
        slots = np.full(token_ids.shape, -1, np.int32)
        if not pictures:
            return slots
        for row, here in enumerate((token_ids == self.image_token_id) & valid):
            if here.sum() != self.image_tokens:
                raise PromptError(
                    f"prompt {row} holds {here.sum()} picture tokens instead of {self.image_tokens}: "
                    "the chat template must place exactly one picture."
                )
            slots[row, here] = np.arange(self.image_tokens) + self.image_tokens * (row if pictures > 1 else 0)
        return slots

    def answer_ids(self, words: Sequence[str]) -> Int[np.ndarray, "n"]:
        """Ids of the tokens with which the model would begin each answer, right after the generation prompt.

        Raises:
            PromptError: for a word that needs several tokens, or two words that share their token.
        """
        text, _ = self.render("?", image=False)
        head = self.tokenizer(text)["input_ids"]
        ids = []
        for word in words:
            # The tokenizer decides how a word continues the prompt: with a leading space or a marker of its own.
            whole = self.tokenizer(f"{text} {word}")["input_ids"]
            tail = whole[len(head) :]
            if whole[: len(head)] != head or len(tail) != 1:
                raise PromptError(f"the answer {word!r} is not a single token after the prompt: {tail}.")
            if tail[0] == self.tokenizer.unk_token_id:
                raise PromptError(f"the answer {word!r} is not in the model's vocabulary.")
            ids.append(tail[0])
        if len(set(ids)) < len(ids):
            raise PromptError(f"the answers {', '.join(words)} do not have tokens of their own: {ids}.")
        return np.array(ids, np.int32)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


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


def open_picture(image: Picture) -> Any:
    """A picture as an RGB PIL image.

    Raises:
        InputError: if it cannot be opened or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as file:
                return _rgb(file)
        except FileNotFoundError as error:
            raise InputError(f"there is no picture at {image}.") from error
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:  # PIL's, for broken PNGs
            raise InputError(f"{image} is not a readable picture ({_first_line(error)}).") from error
    if isinstance(image, Image.Image):
        return _rgb(image)
    array: UInt8[np.ndarray, "Y X 3"] = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise InputError(f"a picture must be uint8 of shape [Y, X, 3], not {array.dtype} of shape {array.shape}.")
    return Image.fromarray(array)


def _rgb(image: Any) -> Any:
    """In colour, transparent parts on white, as transformers shows them to the models."""
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _is_batch(images: Any) -> bool:
    return isinstance(images, np.ndarray) and images.ndim == 4


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
