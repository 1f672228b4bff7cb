"""Pictures and questions as arrays (chat template, tokenizer, image processor), and the positions of words."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
from jaxtyping import Float, Int

from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.io import reading, reporting
from jaxid.nn.decoder_config import ModelConfig
from jaxid.nn.inputs import Inputs
from jaxid.prompts import files, templates, words
from jaxid.prompts.base import PictureReader
from jaxid.prompts.pictures import Picture, Pictures
from jaxid.prompts.words import shown

ProcessorT = TypeVar("ProcessorT", bound="Processor")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
    """A batch of prompts as arrays.

    Attributes:
        inputs: the arrays that a model reads.
        questions: the user's text of each prompt, length B.
        texts: the rendered prompts with image tokens expanded, length B.
        spans: first and last + 1 character of the question in the text, Int[B, 2].
        offsets: first and last + 1 character of every token in the text, Int[B, T, 2].
        unknown: the words of each question that are not in the vocabulary, length B.
        raw: whether the prompts are the pictures and the questions alone, without the chat template.
    """

    inputs: Inputs
    questions: tuple[str, ...]
    texts: tuple[str, ...]
    spans: Int[np.ndarray, "B 2"]
    offsets: Int[np.ndarray, "B T 2"]
    unknown: tuple[tuple[str, ...], ...] = ()
    raw: bool = False

    def __repr__(self) -> str:
        tokens, first = np.shape(self.inputs.token_ids)[1], shown(self.questions[0]) if self.questions else ""
        return f"Prompts({len(self)} of up to {tokens} tokens, the first {first})"

    def __len__(self) -> int:
        """Number of prompts, B."""
        return len(self.questions)

    def words(self, names: Sequence[Sequence[str]], *, occurrence: int | None = 0) -> Int[np.ndarray, "B N"]:
        """Positions of the last sub-token of several names in each question, all located together.

        Longer names are located first and no two overlap: next to "hot dog", "dog" is another dog.

        Args:
            names: the names in each prompt, equally many for all.
            occurrence: which occurrence, 0-based, to take of a name that occurs several times; None refuses such names.

        Returns:
            Int[B, N], positions in the prompt.

        Raises:
            InputError: if two names of a prompt are the same, or prompts have different numbers of names.
            PromptError: if a prompt's question does not contain a name.
        """
        if len({len(own) for own in names}) > 1:
            raise InputError(f"every prompt needs as many names, not {sorted({len(own) for own in names})}.")
        columns = zip(*names, strict=True)
        return np.stack([self.word(column, beside=names, occurrence=occurrence) for column in columns], axis=1)

    def word(
        self, word: str | Sequence[str], *, beside: Sequence[Sequence[str]] = (), occurrence: int | None = None
    ) -> Int[np.ndarray, "B"]:
        """Position of the last sub-token of a word of the question.

        Args:
            word: the word, the same for all prompts or one per prompt; matched as a whole word, case-sensitively.
            beside: other names in each prompt's question; the word is not matched inside longer ones. May include the
                word itself.
            occurrence: which occurrence, 0-based, to take of a word that occurs several times.

        Returns:
            Int[B], positions in the prompt.

        Raises:
            InputError: if two names of a prompt are the same.
            PromptError: if a prompt's question does not contain the word, or contains it several times and
                `occurrence` is not given.
        """
        return np.array([tokens[-1] for tokens in self._word_tokens(word, beside, occurrence)], np.int32)

    def word_tokens(
        self, word: str | Sequence[str], *, beside: Sequence[Sequence[str]] = (), occurrence: int | None = None
    ) -> Int[np.ndarray, "B P"]:
        """Positions of all sub-tokens of a word, see `word`; rows are padded with their last position."""
        return padded_rows(self._word_tokens(word, beside, occurrence))

    def _word_tokens(
        self, word: str | Sequence[str], beside: Sequence[Sequence[str]], occurrence: int | None
    ) -> list[list[int]]:
        wanted = [word] * len(self) if isinstance(word, str) else list(word)
        others = list(beside) or [()] * len(self)
        for given in (wanted, others):
            if len(given) != len(self):
                raise InputError(f"{len(given)} words were given for {len(self)} prompts.")
        found = []
        for row, (word, names) in enumerate(zip(wanted, others, strict=True)):
            if len(set(names)) < len(names):
                same = next(name for name in names if list(names).count(name) > 1)
                raise InputError(f"item {row} asks for two objects of the same name, {same!r}.")
            question = shown(self.questions[row])
            spans = words.word_spans(self.questions[row], [word, *(name for name in names if name != word)])[0]
            if not spans:
                inside = (
                    " on its own, outside its other names" if words.word_spans(self.questions[row], [word])[0] else ""
                )
                raise PromptError(f"prompt {row} ({question}) does not hold the word {word!r}{inside}.")
            if occurrence is None and len(spans) > 1:
                raise PromptError(
                    f"prompt {row} ({question}) holds the word {word!r} {len(spans)} times; "
                    f"say which one with occurrence=0..{len(spans) - 1}."
                )
            if not 0 <= (occurrence or 0) < len(spans):
                raise PromptError(f"prompt {row} ({question}) has no occurrence {occurrence} of {word!r}.")
            found.append(self._tokens_in(row, spans[occurrence or 0]))
            if not found[-1]:
                raise PromptError(f"prompt {row} ({question}): the tokenizer makes no token of the word {word!r}.")
        return found

    def _tokens_in(self, row: int, span: tuple[int, int]) -> list[int]:
        """Positions of the tokens that share a character with a part of a question."""
        first, end = (edge + int(self.spans[row, 0]) for edge in span)
        starts, ends = self.offsets[row, :, 0], self.offsets[row, :, 1]
        return np.flatnonzero((starts < end) & (ends > first) & (ends > starts)).tolist()

    def tokens_in(self, spans: Sequence[tuple[int, int]]) -> Int[np.ndarray, "B P"]:
        """Positions of all tokens that share a character with a part of each question.

        Args:
            spans: first and last + 1 character of the part in each question.

        Returns:
            Int[B, P], rows padded with their last position.

        Raises:
            PromptError: if the tokenizer makes no token of a part.
        """
        rows = [self._tokens_in(row, span) for row, span in enumerate(spans)]
        for row, tokens in enumerate(rows):
            if not tokens:
                part = self.questions[row][slice(*spans[row])]
                raise PromptError(f"prompt {row}: the tokenizer makes no token of {shown(part)}.")
        return padded_rows(rows)

    def image_tokens(self) -> Int[np.ndarray, "B I"]:
        """Positions of the pictures' tokens.

        Raises:
            PromptError: if the prompts contain different numbers of them.
        """
        return self._where(np.asarray(self.inputs.image_rows) >= 0, "picture tokens", equal=True)

    def text_tokens(self) -> Int[np.ndarray, "B P"]:
        """Positions of all tokens after the picture; rows are padded with their last position."""
        valid = np.asarray(self.inputs.valid)
        after = np.arange(valid.shape[1]) >= self.text_start()[:, None]
        return self._where(after & valid, "text tokens", equal=False)

    def text_start(self) -> Int[np.ndarray, "B"]:
        """Position of the first token after the picture; 0 without one."""
        pictured = np.asarray(self.inputs.image_rows) >= 0
        after = pictured.shape[1] - np.argmax(pictured[:, ::-1], axis=1)
        return np.where(pictured.any(axis=1), after, 0).astype(np.int32)

    def _where(self, chosen: np.ndarray, what: str, *, equal: bool) -> Int[np.ndarray, "B P"]:
        rows = [np.flatnonzero(row) for row in chosen]
        lengths = {len(row) for row in rows}
        if 0 in lengths or (equal and len(lengths) > 1):
            raise PromptError(f"the prompts contain {sorted(lengths)} {what}; take them in groups of equal size.")
        return padded_rows([row.tolist() for row in rows])

    def last(self) -> Int[np.ndarray, "B"]:
        """Position of the last token, where the answer is read."""
        return np.asarray(self.inputs.last)

    def extended(self, tokens: Int[np.ndarray, "B N"], lengths: Int[np.ndarray, "B"]) -> "Prompts":
        """The prompts with new tokens after their last ones.

        Args:
            tokens: new tokens, Int[B, N].
            lengths: how many of them to use, Int[B].

        Returns:
            Prompts with N more positions, whose last token is the last new one. `texts` do not include the new tokens.
        """
        inputs, last = self.inputs, self.last()
        batch, room = tokens.shape
        positions = np.arange(self.offsets.shape[1] + room, dtype=np.int32)
        ends = (last + lengths).astype(np.int32)
        valid = positions <= ends[:, None]

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
                positions=np.tile(positions, (batch, 1)),
                valid=valid,
                last=ends,
                image_rows=longer(inputs.image_rows, -1),
                rope_positions=rope_positions,
            ),
            offsets=np.pad(self.offsets, [(0, 0), (0, room), (0, 0)]),
        )


class Processor(PictureReader):
    """A checkpoint's tokenizer, chat template and image processor, without PyTorch.

    Attributes:
        stop_ids: tokens that end an answer.
    """

    stop_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls: type[ProcessorT], folder: Path, config: ModelConfig) -> ProcessorT:
        """Loads the parts from a checkpoint folder.

        Args:
            folder: the checkpoint's folder.
            config: the network's config.

        Raises:
            CheckpointError: naming the part that is missing or unreadable.
        """
        from transformers import AutoConfig, PreTrainedTokenizerFast

        # For a `model_type` that transformers does not know, it would read the config.json and warn about it.
        known = {"config": AutoConfig.for_model(cls.tokenizer_of)} if cls.tokenizer_of else {}
        # For one that it knows, it would split words as that model does even if the folder has only tokenizer.json.
        if known and files.takes_any(folder):
            tokenizer = words.read_tokenizer(folder, PreTrainedTokenizerFast)
        else:
            tokenizer = words.read_tokenizer(folder, options=known)
        image_processor = cls.load_image_processor(folder, config)
        token = cls.token_id(tokenizer, config)
        with reading(folder, "a tokenizer"):
            missing = tokenizer.convert_ids_to_tokens([token]) in ([None], [tokenizer.unk_token])
        if missing:
            raise CheckpointError(
                f"the tokenizer in {folder} has no token with id {token}, the image token of config.json."
            )
        found = cls(tokenizer, image_processor, config)
        found.check(folder)
        tokenizer.chat_template = files.chat_template(folder, tokenizer, found)
        found.stop_ids = files.stop_ids(folder, tokenizer, config)
        return found

    @functools.cached_property
    def specials(self) -> tuple[str, ...]:
        """The tokenizer's special tokens, which questions must not contain."""
        return words.special_tokens(self.tokenizer)

    def pixels(self, images: Sequence[Picture]) -> Float[np.ndarray, "N ..."]:
        """Pictures as the family's tower takes them when each is alone in its prompt.

        Raises:
            InputError: for a picture that cannot be opened.
        """
        return self.encode(images, [[index] for index in range(len(images))]).pixels

    def render(
        self, question: str, *, pictures: Sequence[str] = (), chat: bool = True, raw: bool = False
    ) -> tuple[str, int]:
        """The prompt's text including the pictures' tokens, and the index of the question's first character in it.

        Args:
            question: the user's text.
            pictures: the text of each picture's tokens.
            chat: end with the generation prompt.
            raw: see `prepare`.

        Raises:
            PromptError: for an empty question, or one that the template changes.
        """
        words.check_text(question, "the question", (), PromptError)
        question, placeholder = question if raw else question.strip(), self.placeholder
        if not question.strip():
            raise PromptError("the question is empty.")
        if placeholder in question:
            raise PromptError(f"the question {shown(question)} contains the image token {placeholder!r}; remove it.")
        words.check_text(question, "the question", self.specials, PromptError)
        if raw:
            begin, end = self.frame
            before = "".join(f"{begin}{text}{end}" for text in pictures)
            return before + question, len(before)
        rendered, start = templates.render(
            self.tokenizer.chat_template,
            question,
            placeholder=placeholder,
            pictures=len(pictures),
            chat=chat,
            variables=self.tokenizer.special_tokens_map,
        )
        if not chat:
            rendered = rendered[: start + len(question)]
        pieces = rendered[:start].split(placeholder)
        before = pieces[0] + "".join(text + piece for text, piece in zip(pictures, pieces[1:], strict=True))
        return before + rendered[start:], len(before)

    def _tokenized(self, texts: Sequence[str]) -> Mapping[str, Any]:
        """Token ids and offsets of prompts; the first token is not added if the template has written it."""
        first = self.tokenizer.bos_token
        written = first is not None and texts[0].startswith(first)
        with reporting("the tokenizer cannot read the prompt", PromptError):
            return self.tokenizer(list(texts), return_offsets_mapping=True, add_special_tokens=not written)

    def prepare(
        self,
        images: Pictures,
        questions: str | Sequence[str],
        *,
        chat: bool = True,
        raw: bool = False,
        pad_to_multiple: int = 8,
    ) -> Prompts:
        """Builds a batch of prompts.

        Args:
            images: one picture per prompt, or a single picture for all prompts, or None for text alone. A prompt with
                several pictures takes a sequence of them.
            questions: one question per prompt, or a single one for all pictures.
            chat: end with the generation prompt ("ASSISTANT:"); False ends at the question's last word.
            raw: a prompt is its pictures and the question exactly as given, without the chat template. A space at the
                end of the question stays.
            pad_to_multiple: prompts are padded to a multiple of this length, so that few programs are compiled.

        Returns:
            The batch, with B the length of the longer sequence.

        Raises:
            InputError: if the numbers of pictures and questions do not match, or a picture cannot be opened.
            PromptError: for an empty question.
        """
        asked = [questions] if isinstance(questions, str) else list(questions)
        given = [] if images is None else list(images) if _several(images) else [images]
        if not asked or (images is not None and not given):
            raise InputError("there are no questions or no pictures to prepare.")
        if isinstance(questions, str):
            asked = asked * max(1, len(given))
        if len(given) not in (0, 1, len(asked)):
            raise InputError(f"{len(given)} pictures were given for {len(asked)} questions.")
        groups: list[list[Any]] = [list(entry) if _several(entry) else [entry] for entry in given]
        if any(not group for group in groups):
            raise InputError("a prompt was given an empty list of pictures; give None for text alone.")
        counts = np.cumsum([0, *(len(group) for group in groups)])
        shared = [list(range(first, end)) for first, end in itertools.pairwise(counts.tolist())]
        members = shared * len(asked) if len(shared) == 1 else shared or [[] for _ in asked]
        pictures = [picture for group in groups for picture in group]
        encoded = self.encode(pictures, members) if pictures else None
        shown = [[encoded.tokens[index] for index in some] if encoded else [] for some in members]

        texts, starts = [], []
        for question, some in zip(asked, shown, strict=True):
            text, start = self.render(question, pictures=[picture.text for picture in some], chat=chat, raw=raw)
            texts.append(text)
            starts.append(start)
        tokens = self._tokenized(texts)
        lengths = [len(ids) for ids in tokens["input_ids"]]
        total = -(-max(lengths) // pad_to_multiple) * pad_to_multiple
        token_ids = np.full((len(asked), total), self.tokenizer.pad_token_id or 0, np.int32)
        offsets = np.zeros((len(asked), total, 2), np.int32)
        for row, ids in enumerate(tokens["input_ids"]):
            token_ids[row, : len(ids)] = ids
            offsets[row, : len(ids)] = tokens["offset_mapping"][row]
        valid = np.arange(total) < np.array(lengths)[:, None]
        asked = asked if raw else [question.strip() for question in asked]
        spans = [(start, start + len(question)) for start, question in zip(starts, asked, strict=True)]
        unknown = tuple(
            words.unknown(question, ids, np.array(edges).reshape(-1, 2) - start, self.tokenizer.unk_token_id)
            for question, start, ids, edges in zip(
                asked, starts, tokens["input_ids"], tokens["offset_mapping"], strict=True
            )
        )
        words.warn_unknown(unknown, "questions", self.tokenizer.unk_token, stacklevel=3)
        return Prompts(
            inputs=Inputs(
                token_ids=token_ids,
                positions=np.tile(np.arange(total, dtype=np.int32), (len(asked), 1)),
                valid=valid,
                last=np.array(lengths, np.int32) - 1,
                pixels=encoded.pixels if encoded else None,
                image_rows=self.image_rows(token_ids, valid, shown),
                rope_positions=self.rope_positions(token_ids, valid, shown),
                extras=encoded.extras if encoded else {},
                apart=encoded is not None and encoded.apart,
            ),
            questions=tuple(asked),
            texts=tuple(texts),
            spans=np.array(spans, np.int32),
            offsets=offsets,
            unknown=unknown,
            raw=raw,
        )

    def answer_tokens(self, words: Sequence[str], *, after: str | None = None) -> list[list[int]]:
        """Ids of the tokens of each answer, right after the generation prompt.

        Args:
            words: the answers.
            after: the end of a raw prompt, which the answers follow instead; spaces at its end are one with those
                before the answers.

        Raises:
            PromptError: for a word that would change the prompt's tokens, or is not in the vocabulary.
        """
        text = self.render("?")[0] if after is None else after.rstrip(" ")
        head = self._tokenized([text])["input_ids"][0]
        # After a line break or a special token, a word follows directly; after "ASSISTANT:", a space comes first.
        specials = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        joint = "" if text[-1].isspace() or text.endswith(specials) else " "
        found = []
        for word in words:
            whole = self._tokenized([f"{text}{joint}{word}"])["input_ids"][0]
            tail = list(whole[len(head) :])
            if whole[: len(head)] != head or not tail:
                raise PromptError(f"the answer {word!r} does not begin with a new token after the prompt.")
            if self.tokenizer.unk_token_id in tail:
                raise PromptError(f"the answer {word!r} is not in the model's vocabulary.")
            found.append(tail)
        return found

    def answer_ids(
        self, words: Sequence[str], *, after: str | None = None, spaced: bool = True
    ) -> Int[np.ndarray, "n"]:
        """Id of the token that is each answer, right after the generation prompt.

        Args:
            words: the answers.
            after: the end of a raw prompt, which the answers follow instead.
            spaced: whether the token stands for the space before the answer, too. If not, the space is a token of its
                own at the end of the raw prompt.

        Raises:
            PromptError: for a word of several tokens, or two words with the same token.
        """
        if spaced:
            tails = self.answer_tokens(words, after=after)
        else:
            whole = self.tokenizer.get_vocab()
            tails = [[whole[word]] if word in whole else [] for word in words]
        ids = []
        for word, tail in zip(words, tails, strict=True):
            if len(tail) != 1:
                raise PromptError(f"the answer {word!r} is not a single token after the prompt: {tail}.")
            ids.append(tail[0])
        if len(set(ids)) < len(ids):
            raise PromptError(f"the answers {', '.join(words)} do not have different tokens: {ids}.")
        return np.array(ids, np.int32)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; special ones are skipped."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def padded_rows(rows: Sequence[list[int]]) -> Int[np.ndarray, "B P"]:
    """Rows of positions, those that are shorter padded with their last one."""
    longest = max(len(row) for row in rows)
    return np.array([row + row[-1:] * (longest - len(row)) for row in rows], np.int32)


def _several(images: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4)
