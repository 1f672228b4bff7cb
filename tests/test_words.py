"""Where words of a question sit, and which tokens begin answers, with tokenizers of words and of all sub-words."""

import contextlib
import re
from typing import Any

import fixtures
import numpy as np
import pytest
from processors import (
    PLAIN,
    SUBWORD,
    bytes_tokenizer,
    ending,
    processor_of,
    read,
    sentencepiece_tokenizer,
    with_template,
)

from jaxid.errors import InputError, PromptError, UnknownWordsWarning
from jaxid.prompts.processor import Processor, Prompts
from jaxid.prompts.words import unknown

ASKED = "Is the star to the left or right of the fish?"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return fixtures.model(PLAIN).processor


# --- where words sit ------------------------------------------------------------------------------------------------


def test_word_positions(processor: Processor) -> None:
    prompts = processor.prepare(fixtures.pictures(), [ASKED, "Where is the fish?"])
    fish = prompts.word("fish")
    assert fish.shape == (2,) and fish[0] != fish[1]
    assert [read(processor, prompts, row, fish[row]) for row in range(2)] == [["fish"], ["fish"]]
    star, where = prompts.word(["star", "Where"])
    assert read(processor, prompts, 0, star) == ["star"] and read(processor, prompts, 1, where) == ["Where"]
    assert prompts.word_tokens("fish").tolist() == fish[:, None].tolist()


def test_repeated_words(processor: Processor) -> None:
    prompts = processor.prepare(None, ASKED)
    with pytest.raises(PromptError, match=r"'the' 3 times; .*occurrence=0\.\.2"):
        prompts.word("the")
    places = [int(prompts.word("the", occurrence=which)[0]) for which in range(3)]
    assert places == sorted(set(places))
    for place, following in zip(places, ("star", "left", "fish"), strict=True):
        assert read(processor, prompts, 0, [place, place + 1]) == ["the", following]
    for which in (3, -1):
        with pytest.raises(PromptError, match=f"no occurrence {which} of 'the'"):
            prompts.word("the", occurrence=which)


@pytest.mark.parametrize(
    "word", ["cat", "Star", "sta", "tar", "", "USER", "ASSISTANT", "<image>", "fish? ASSISTANT", "f.sh"]
)
def test_words_that_are_not_in_the_question(processor: Processor, word: str) -> None:
    with pytest.raises(PromptError, match=f"prompt 0 .*{re.escape(ASKED)}.*{re.escape(repr(word))}"):
        processor.prepare(fixtures.pictures()[0], ASKED).word(word)


def test_as_many_words_as_prompts(processor: Processor) -> None:
    with pytest.raises(InputError, match="3 words were given for 1 prompts"):
        processor.prepare(None, ASKED).word(["star", "fish", "left"])


@pytest.mark.parametrize("question", ["USER", "ASSISTANT", "A", "S", ":", "USER: star ASSISTANT:"])
def test_a_question_that_also_stands_in_the_template(processor: Processor, question: str) -> None:
    prompts = prepared(processor, fixtures.pictures()[0], question)
    (text,), (start, end) = prompts.texts, prompts.spans[0]
    assert text[start:end] == question
    assert text[:start].endswith("<image>\n") and text[end:] == " ASSISTANT:"
    assert processor.render(question, chat=False)[0].endswith(f"USER: {question}")


def test_text_tokens_and_the_last(processor: Processor) -> None:
    prompts = processor.prepare(fixtures.pictures(), [ASKED, "Where is the fish?"])
    text = prompts.text_tokens()
    assert read(processor, prompts, 0, text[0]) == [*ASKED[:-1].split(), "?", "ASSISTANT", ":"]
    assert read(processor, prompts, 1, text[1][:7]) == ["Where", "is", "the", "fish", "?", "ASSISTANT", ":"]
    assert set(text[1][6:]) == {prompts.last()[1]}
    bare = processor.prepare(fixtures.pictures(), [ASKED, "Where is the fish?"], chat=False)
    assert [read(processor, bare, row, bare.last()[row]) for row in range(2)] == [["?"], ["?"]]
    assert processor.prepare(None, "star").text_tokens()[0, 0] == 0
    with pytest.raises(PromptError, match="picture tokens"):
        processor.prepare(None, "star").image_tokens()


def test_padding(processor: Processor) -> None:
    short = processor.prepare(fixtures.pictures()[0], "star", pad_to_multiple=1)
    long = processor.prepare(fixtures.pictures()[0], "star", pad_to_multiple=64)
    tokens = short.inputs.token_ids.shape[1]
    assert long.inputs.token_ids.shape == (1, 64) and np.asarray(short.inputs.valid).all()
    assert (long.inputs.token_ids[:, tokens:] == 3).all() and (long.inputs.image_rows[:, tokens:] == -1).all()
    np.testing.assert_array_equal(long.inputs.token_ids[:, :tokens], short.inputs.token_ids)
    np.testing.assert_array_equal(short.last(), long.last())


# --- several names together -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Is the dog left of the hot dog?", ("dog", "hot dog")),
        ("Is the hot dog left of the dog?", ("dog", "hot dog")),
        ("Is the teddy bear above or below the bear?", ("teddy bear", "bear")),
        ("Is the light near the traffic light? The light.", ("light", "traffic light")),
        ("Is the left star between the star and the far left star?", ("star", "left star", "far left star")),
        ("Is the fish tank left of the tank?", ("tank", "fish tank")),
        ("Is the sea-horse left of the horse?", ("horse", "sea-horse")),
        ("Is the bears' den left of the bear?", ("bear", "bears' den")),
    ],
)
def test_names_inside_names(anything: Processor, question: str, names: tuple[str, ...]) -> None:
    """Found by taking out the longer names first, letter by letter."""
    prompts = prepared(anything, fixtures.pictures()[0], question)
    left, expected = question, {}
    for name in sorted(names, key=len, reverse=True):
        found = re.search(rf"\b{name}\b", left)
        assert found is not None
        expected[name] = found.end()
        left = left.replace(name, "#" * len(name))
    for order in (names, names[::-1]):
        (places,) = prompts.words([order])
        ends = prompts.offsets[0, places, 1] - prompts.spans[0, 0]
        assert ends.tolist() == [expected[name] for name in order]
        for number, name in enumerate(order):
            alone = prompts.word_tokens(name, beside=[order], occurrence=0)[0]
            assert alone[-1] == places[number] == prompts.word([name], beside=[order], occurrence=0)[0]


def test_every_prompt_has_names_of_its_own(anything: Processor) -> None:
    prompts = prepared(anything, None, ["the star, the left star", "the left star, the star"])
    places = prompts.words([("star", "left star"), ("star", "left star")])
    assert places[0, 0] < places[0, 1] and places[1, 0] > places[1, 1]
    np.testing.assert_array_equal(prompts.words([("left star", "star")] * 2), places[:, ::-1])


def test_names_that_cannot_be_told_apart(processor: Processor) -> None:
    prompts = processor.prepare(None, "Is the left star above the fish?")
    with pytest.raises(PromptError, match="does not hold the word 'star' on its own, outside its other names"):
        prompts.words([("star", "left star")])
    assert prompts.word("star") == prompts.word("left star")
    with pytest.raises(InputError, match="item 0 asks for two objects of the same name, 'star'"):
        prompts.words([("star", "star")])
    with pytest.raises(InputError, match=r"as many names, not \[1, 2\]"):
        processor.prepare(None, ["star", "the star"]).words([("star",), ("star", "the")])
    with pytest.raises(InputError, match="2 words were given for 1 prompts"):
        prompts.words([("star",), ("star",)])


# --- unknown words ----------------------------------------------------------------------------------------------------


def test_unknown_words_are_named_once(processor: Processor) -> None:
    questions = ["Is the zebra left of the giraffe?", "Is the zebra left of the star?", ASKED, "Is the café; the star?"]
    with pytest.warns(UnknownWordsWarning) as told:
        prompts = processor.prepare(fixtures.pictures()[0], questions)
    assert prompts.unknown == (("zebra", "giraffe"), ("zebra",), (), ("café", ";"))
    assert [str(one.message) for one in told] == [
        "the questions hold words that are not in the model's vocabulary, which reads them as <unk>: "
        "'zebra', 'giraffe', 'café', ';'."
    ]


def test_many_unknown_words_are_counted(processor: Processor) -> None:
    words = [f"word{chr(97 + number)}" for number in range(13)]
    with pytest.warns(UnknownWordsWarning, match=r"'worda', .*'wordj' and 3 more\.$"):
        assert processor.prepare(None, " ".join(words)).unknown == (tuple(words),)


def test_subword_tokenizers_know_every_word(subword: Processor) -> None:
    assert subword.prepare(None, "Is the zebra ♞ left of the 長頸鹿?").unknown == ((),)


def test_words_that_a_tokenizer_drops() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # no unknown token: other letters vanish
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = tokenizer.encode("ab éa c a")
    offsets = np.array(found.offsets)
    assert found.tokens == ["a", "b", "a", "a"]
    assert unknown("ab éa c a", found.ids, offsets, None) == ("éa", "c")
    assert unknown("ab éa c a", found.ids, offsets, 1) == ("ab", "éa", "c")


# --- texts that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "named"),
    [
        ("Is the star </s> left?", "special token '</s>'"),
        ("<s>", "special token '<s>'"),
        ("a <unk> b", "special token '<unk>'"),
        ("<image>", "image token '<image>'"),
        ("the \0 star", "NUL characters or lone surrogates"),
        ("the \ud83d star", "NUL characters or lone surrogates"),
        ("\udcff", "NUL characters or lone surrogates"),
    ],
)
def test_questions_that_are_no_text(anything: Processor, question: Any, named: str) -> None:
    with pytest.raises(PromptError, match=named) as raised:
        anything.prepare(None, [question])
    assert "\n" not in str(raised.value)


def test_very_long_questions(subword: Processor) -> None:
    long = "star " * 40_000
    prompts = subword.prepare(None, f"{long}fish")
    assert prompts.inputs.token_ids.shape[1] > 40_000 and prompts.word("fish")[0] > 40_000
    with pytest.raises(PromptError, match="does not hold") as raised:
        prompts.word("cat")
    assert len(str(raised.value)) < 400


# --- tokenizers of sub-words -----------------------------------------------------------------------------------------


@pytest.fixture(params=SUBWORD, ids=lambda build: build.__name__)
def subword(request: pytest.FixtureRequest) -> Processor:
    return processor_of(request.param)


@pytest.fixture(params=[None, *SUBWORD], ids=lambda build: build.__name__ if build else "words")
def anything(request: pytest.FixtureRequest) -> Processor:
    """Processors with tokenizers of words, and of all kinds of sub-words."""
    return fixtures.model(PLAIN).processor if request.param is None else processor_of(request.param)


def prepared(processor: Processor, pictures: Any, questions: str | list[str]) -> Prompts:
    """Prompts of words that the tokenizer of words may not know, which is warned of then and only then."""
    tokenizer = processor.tokenizer.backend_tokenizer
    asked = [questions] if isinstance(questions, str) else questions
    lost: list[set[str]] = [set() for _ in asked]
    if type(tokenizer.model).__name__ == "WordLevel":
        pieces = [[piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] for text in asked]
        lost = [{letter for one in own if not tokenizer.token_to_id(one) for letter in one} for own in pieces]
    with pytest.warns(UnknownWordsWarning) if any(lost) else contextlib.nullcontext():
        prompts = processor.prepare(pictures, questions)
    assert [{letter for word in own for letter in word} for own in prompts.unknown] == lost
    return prompts


def spoken(processor: Processor, prompts: Prompts, word: str, occurrence: int | None = None) -> str:
    """The text that the word's tokens cover, after checking that they are adjacent and complete."""
    (tokens,) = prompts.word_tokens(word, occurrence=occurrence)
    np.testing.assert_array_equal(tokens, np.arange(tokens[0], tokens[-1] + 1))
    assert prompts.word(word, occurrence=occurrence).tolist() == [tokens[-1]]
    ids = np.asarray(prompts.inputs.token_ids)[0]
    starts, ends = prompts.offsets[0, tokens, 0], prompts.offsets[0, tokens, 1]
    found = prompts.texts[0][starts.min() : ends.max()]
    unk = processor.tokenizer.unk_token_id
    if unk not in ids[tokens]:
        assert processor.tokenizer.decode(ids[tokens].tolist()).strip() == found.strip()
    return found.strip()


@pytest.mark.parametrize(
    ("question", "word", "occurrence", "before"),
    [
        ("Is the frog near?", "frog", None, "Is the "),  # several tokens in all but the tokenizer of words
        ("frog", "frog", None, ""),
        ("frog near the star", "frog", None, ""),
        ("Is the hourglasses' star left?", "hourglasses", None, "Is the "),
        ("A category of cat", "cat", None, "A category of "),
        ("The cat is a category", "cat", None, "The "),
        ("concat cat category", "cat", None, "concat "),
        ("star starfish star", "star", 1, "star starfish "),
        ("star, starfish; star!", "star", 0, ""),
        ("Is USER left of ASSISTANT?", "USER", None, "Is "),
        ("USER", "USER", None, ""),
        ("Is USER or USER the ASSISTANT?", "USER", 1, "Is USER or "),
        ("Is the café left of the cafe?", "café", None, "Is the "),
        ("Is the café left of the cafe?", "cafe", None, "Is the café left of the "),
        ("Is the naïve fish öd?", "öd", None, "Is the naïve fish "),
        ("Ist die Straße links?", "Straße", None, "Ist die "),
        ("это рыба или звезда", "рыба", None, "это "),
        ("the 星 is left", "星", None, "the "),
        ("the 🐸 is left", "left", None, "the 🐸 is "),
        ("the 🐸🐸 frog", "frog", None, "the 🐸🐸 "),
        ("fish (frog) fish", "frog", None, "fish ("),
        ("the sea-horse, the star", "sea-horse", None, "the "),
        ("the sea-horse, the star", "horse", None, "the sea-"),
        ("Is the left star the left fish", "left star", None, "Is the "),
        ("  left  left ", "left", 1, "left  "),
        ("the\nfrog\nis", "frog", None, "the\n"),
    ],
)
def test_where_words_sit_in_every_tokenizer(
    anything: Processor, question: str, word: str, occurrence: int | None, before: str
) -> None:
    prompts = prepared(anything, fixtures.pictures()[0], question)
    covered = spoken(anything, prompts, word, occurrence)
    (tokens,) = prompts.word_tokens(word, occurrence=occurrence)
    first = prompts.spans[0, 0] + len(before)
    text = prompts.texts[0]
    assert text[first : first + len(word)] == word and text[prompts.spans[0, 0] :].startswith(question.strip())
    # The last token holds the word's last letter, the first its first; no token of the word is missing.
    starts, ends = prompts.offsets[0, :, 0], prompts.offsets[0, :, 1]
    inside = (starts < first + len(word)) & (ends > first)
    np.testing.assert_array_equal(np.flatnonzero(inside), tokens)
    assert word in covered
    alone = prepared(anything, None, question)
    assert prompts.word(word, occurrence=occurrence) - alone.word(word, occurrence=occurrence) > 15


def test_words_of_prompts_of_unequal_length(anything: Processor) -> None:
    questions = ["frog", "Is the frog near the starfish?", "the left hourglasses, the right frog"]
    prompts = prepared(anything, fixtures.pictures()[0], questions)
    together, rows = prompts.word("frog"), prompts.word_tokens("frog")
    for row, question in enumerate(questions):
        alone = prepared(anything, fixtures.pictures()[0], question).word_tokens("frog")[0]
        assert together[row] == alone[-1] and sorted(set(rows[row].tolist())) == alone.tolist()
    mixed = prompts.word(["frog", "starfish", "hourglasses"])
    assert mixed[0] == together[0] and mixed[1] > together[1] and mixed[2] < together[2]


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("A category", "cat"),
        ("concat", "cat"),
        ("cat_1 and cats", "cat"),
        ("a cat2", "cat"),
        ("the café", "caf"),
        ("the Frog", "frog"),
        ("the cafe\u0301", "cafe"),  # an accent as a letter of its own
        ("ASK THE USERS", "USER"),
    ],
)
def test_parts_of_words_are_no_words(anything: Processor, question: str, word: str) -> None:
    with pytest.raises(PromptError, match=f"does not hold the word {word!r}"):
        prepared(anything, None, question).word(word)


def test_words_of_extended_prompts(processor: Processor) -> None:
    """New tokens follow each prompt directly; words keep their positions."""
    prompts = processor.prepare(fixtures.pictures(), [ASKED, "Where is the fish?"])
    new = np.array([[7, 8, 9], [10, 11, 12]], np.int32)
    longer = prompts.extended(new, np.array([3, 1]))
    ids, last = np.asarray(longer.inputs.token_ids), prompts.last()
    assert ids.shape == longer.inputs.valid.shape == longer.inputs.image_rows.shape
    np.testing.assert_array_equal(longer.last(), last + np.array([3, 1]))
    for row, count in enumerate((3, 1)):
        end = last[row] + 1
        np.testing.assert_array_equal(ids[row, :end], np.asarray(prompts.inputs.token_ids)[row, :end])
        np.testing.assert_array_equal(ids[row, end : end + count], new[row, :count])
        np.testing.assert_array_equal(longer.inputs.valid[row], np.arange(ids.shape[1]) < end + count)
    np.testing.assert_array_equal(longer.word("fish"), prompts.word("fish"))


def test_sub_tokens_of_a_word(subword: Processor) -> None:
    question = "Is the starfish, a fish, near the star or the hourglasses in the café's naïve fish?"
    prompts = subword.prepare(fixtures.pictures()[0], question)
    text = prompts.texts[0]
    for word, occurrence, after in (
        ("star", None, " or"),
        ("starfish", None, ", a"),
        ("fish", 0, ", near"),
        ("fish", 1, "?"),
        ("hourglasses", None, " in"),
        ("café", None, "'s"),
        ("naïve", None, " fish"),
        ("Is", None, " the starfish"),
    ):
        tokens = prompts.word_tokens(word, occurrence=occurrence)[0]
        np.testing.assert_array_equal(tokens, np.arange(tokens[0], tokens[-1] + 1))
        pieces = [subword.tokenizer.decode([int(prompts.inputs.token_ids[0, token])]) for token in tokens]
        whole = subword.tokenizer.decode([int(prompts.inputs.token_ids[0, token]) for token in tokens])
        assert whole.strip() == word, (pieces, word)
        assert prompts.word(word, occurrence=occurrence)[0] == tokens[-1]
        end = prompts.offsets[0, tokens[-1], 1]
        assert text[:end].endswith(word) and text[end:].startswith(after)
    assert len(prompts.word_tokens("hourglasses")[0]) > 1 and len(prompts.word_tokens("naïve")[0]) > 2
    np.testing.assert_array_equal(np.diff(prompts.image_tokens()), 1)
    assert prompts.image_tokens().shape == (1, 16)


def test_shorter_words_are_padded_with_their_last_token(subword: Processor) -> None:
    prompts = subword.prepare(None, ["Is the star near?", "Is the hourglasses near?"])
    rows = prompts.word_tokens(["star", "hourglasses"])
    alone = subword.prepare(None, "Is the star near?").word_tokens("star")[0]
    assert rows.shape[1] > len(alone)
    assert rows[0].tolist() == [*alone, *[alone[-1]] * (rows.shape[1] - len(alone))]
    np.testing.assert_array_equal(prompts.word(["star", "hourglasses"]), rows[:, -1])


def test_answers_of_several_tokens_are_refused(subword: Processor) -> None:
    left, right = subword.answer_ids(["left", "right"]).tolist()
    assert subword.decode([left]) == "left" and subword.decode([right]) == "right"
    with pytest.raises(PromptError, match="'hourglasses' is not a single token"):
        subword.answer_ids(["left", "hourglasses"])


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers(processor: Processor) -> None:
    ids = processor.answer_ids(["left", "right", "yes"])
    assert processor.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["left", "right", "yes"]
    assert processor.decode([1, *ids.tolist(), 2]) == "left right yes"
    for words, named in (
        (["left", "elephant"], "'elephant' is not in the model's vocabulary"),
        (["left", "to the left"], "'to the left' is not a single token"),
        (["left", ""], "'' does not begin with a new token"),
        (["left", "left"], "left, left do not have different tokens"),
    ):
        with pytest.raises(PromptError, match=re.escape(named)):
            processor.answer_ids(words)


ENDS = [":", "", "?", "\n", "\n\n", " \n", "</s>", "</s>\n", "<|turn|>", "<|turn|>\n", "<|end|>"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("build", [None, *SUBWORD], ids=lambda build: build.__name__ if build else "words")
def test_answers_begin_as_the_prompt_continues(build: Any, end: str) -> None:
    """With a space after a word or a colon; directly after a line break or a special token."""
    source = fixtures.model(PLAIN).processor if build is None else processor_of(build)
    answering = with_template(source, ending(end))
    assert {"<|turn|>", "<|end|>"} & set(answering.tokenizer.all_special_tokens) == {"<|turn|>"}
    text = answering.prepare(None, "Is the star left?").texts[0]
    assert text.endswith(f"ASSISTANT{end}")
    words, direct = ["left", "right", "star"], end.endswith(("\n", ">"))
    ids = answering.answer_ids(words).tolist()
    before = answering.tokenizer(text)["input_ids"]
    for word, token in zip(words, ids, strict=True):
        whole = answering.tokenizer(text + ("" if direct else " ") + word)["input_ids"]
        assert whole == [*before, token] and answering.decode([token]) == word
    pieces = answering.tokenizer.convert_ids_to_tokens(ids)
    # A special token cuts the text: older tokenizers start again after it.
    marked = not direct or (build is sentencepiece_tokenizer and end.endswith(">"))
    marker = {None: "", bytes_tokenizer: "Ġ"}.get(build, "▁") if marked else ""
    assert pieces == [marker + word for word in words]
