"""The published fine-tuning: what its code does differently from ours, as overrides of a run's steps.

Source: the code of [ID] arXiv 2601.12626, section on fine-tuning.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
import optax
from jaxtyping import Int

from jaxid.data.grid import GridItem
from jaxid.errors import InputError, PromptError
from jaxid.experiments.finetune import PUBLISHED_LAYER, FinetuneConfig
from jaxid.experiments.finetune_data import Group, groups_by, pair_of, placed, questions_of, split_by
from jaxid.experiments.relations import RelationBatch
from jaxid.families.base import Model
from jaxid.interp.generate import generate
from jaxid.prompts import templates
from jaxid.prompts.processor import Processor, Prompts
from jaxid.train.trainable import Tensor

NEW_TOKENS = 5
"""How many tokens an evaluation generates."""


def first_written(text: str, words: Sequence[str]) -> int:
    """Index of the word that occurs first in a text, even within another word; -1 if none does."""
    places = [text.lower().find(word.lower()) for word in words]
    found = [(place, index) for index, place in enumerate(places) if place >= 0]
    return min(found)[1] if found else -1


def by_writing(model: Model, batch: RelationBatch) -> Callable[[], Int[np.ndarray, "B"]]:
    """The answer is the word that the model writes first."""
    texts = generate(model, batch.prompts, max_new_tokens=NEW_TOKENS).texts
    return lambda: np.array([first_written(text, batch.answers) for text in texts])


def last_occurrences(prompts: Prompts, names: Sequence[tuple[str, str]]) -> Int[np.ndarray, "B"]:
    """Position of the last sub-token where the second name's sub-tokens occur for the last time in the prompt."""
    spans = prompts.word_tokens([second for _, second in names], beside=names, occurrence=0)
    token_ids, found = np.asarray(prompts.inputs.token_ids), []
    for row, (span, last) in enumerate(zip(spans, prompts.last(), strict=True)):
        word = token_ids[row, np.unique(span)]
        windows = np.lib.stride_tricks.sliding_window_view(token_ids[row, : last + 1], len(word))
        found.append(int(np.flatnonzero((windows == word).all(axis=1))[-1]) + len(word) - 1)
    return np.array(found, np.int32)


def reply_tokens(processor: Processor, words: Sequence[str]) -> list[list[int]]:
    """Ids of all tokens that follow the generation prompt if the assistant replies with a word.

    Unlike those of `Processor.answer_tokens`, they include what the chat template writes after a reply.

    Raises:
        PromptError: if the template does not begin a reply as the generation prompt does.
    """
    tokenizer, text = processor.tokenizer, processor.render("?")[0]

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    head, found = tokens(text), []
    for word in words:
        whole, _ = templates.render(
            tokenizer.chat_template,
            "?",
            placeholder=processor.placeholder,
            pictures=0,
            chat=False,
            variables=tokenizer.special_tokens_map,
            reply=word,
        )
        ids = tokens(whole)
        if not whole.startswith(text) or ids[: len(head)] != head or len(ids) == len(head):
            raise PromptError(f"the chat template does not write the reply {word!r} after the generation prompt.")
        found.append(ids[len(head) :])
    return found


def is_weight(path: str) -> bool:
    """Whether a parameter's published name ends in ".weight", and is not of Qwen-VL's merger."""
    last = path.rsplit(".", 1)[-1]
    return not last.endswith(("bias", "_scale", "newline")) and not path.startswith("tower.merge")


def epoch_batch(groups: Sequence[Group], size: int, seed: int, index: int) -> Group:
    """A batch of endless training: in every epoch, groups are shuffled and cut, and the batches are shuffled.

    Args:
        groups: the questions that may share a batch.
        size: the largest number of questions in a batch.
        seed: of the shuffles.
        index: index of the batch, counted over all epochs.
    """
    starts = [(row, first) for row, group in enumerate(groups) for first in range(0, len(group), size)]
    epoch, place = divmod(index, len(starts))
    row, first = starts[np.random.default_rng((seed, epoch)).permutation(len(starts))[place]]
    order = np.random.default_rng((seed, epoch, row)).permutation(len(groups[row]))
    return tuple(groups[row][index] for index in order[first : first + size])


class FinetuneAsPublished(FinetuneConfig):
    """The settings and steps of the published code."""

    default_groups = 1
    answered = staticmethod(by_writing)

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: naming the option; and where several processes train together.
        """
        super().__post_init__()
        if jax.process_count() > 1:
            raise InputError(
                "the published evaluation writes text, which takes a single process: leave out --processes."
            )

    def default_layer(self, model: Model) -> int:
        """The published layer, if the model has it."""
        return PUBLISHED_LAYER if model.num_layers > PUBLISHED_LAYER else super().default_layer(model)

    def default_case(self, model: Model) -> Literal["lower", "capital"]:
        """Answers are written as the prompt writes them."""
        return "lower"

    def split(self, items: Sequence[GridItem]) -> tuple[list[GridItem], list[GridItem]]:
        """Pairs are ordered, so that the model may have seen a held-out pair in the other order; int() counts them.

        The alpha channel of pictures is dropped: what is transparent has its stored colour, usually black.
        """
        pairs = len({pair_of(item) for item in items})
        shown = [item.without_alpha() for item in items]
        return split_by(shown, pair_of, int(self.held_out * pairs), self.seed)

    def grouped(self, items: Sequence[GridItem]) -> list[Group]:
        """With the ID loss, both axes' questions about a pair and a cell of its first object; otherwise all."""
        questions = questions_of(items)
        return groups_by(questions, placed if self.id_weight else lambda _: ())

    def drawn(self, groups: Sequence[Group], step: int) -> list[Group]:
        """Batches without replacement, see `epoch_batch`."""
        count = self.groups or self.default_groups
        return [epoch_batch(groups, self.batch_size, self.seed, count * step + index) for index in range(count)]

    def word(self, prompts: Prompts, names: Sequence[tuple[str, str]]) -> Int[np.ndarray, "B"]:
        """The last occurrence."""
        return last_occurrences(prompts, names)

    def answer_tokens(self, processor: Processor, words: Sequence[str]) -> list[list[int]]:
        """Everything after the prompt, with the end of the chat template."""
        return reply_tokens(processor, words)

    def may_train(self, tensor: Tensor) -> bool:
        """Weights alone, see `is_weight`."""
        return is_weight(tensor.path)

    def learning_rates(self) -> optax.Schedule:
        """The warm-up begins at 0, and its length is rounded down."""
        warmup = int(self.warmup * self.steps)
        return self.after(optax.linear_schedule(0.0, self.learning_rate, max(1, warmup)), warmup)
