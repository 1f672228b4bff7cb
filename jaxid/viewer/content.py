"""What a page shows, as arrays: runs with their items and answers, IDs in the plane, and dense maps."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxid.errors import InputError
from jaxid.prompts.pictures import Picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A question about a picture.

    Attributes:
        key: its unique name.
        words: the two answers whose log-probabilities are read.
        truth: index of the true one, -1 if unknown.
        question: the user's text.
        tokens: the prompt's tokens as text; those of the picture are one entry.
        edited: indices among `tokens` that are edited; by the label of an axis where they depend on it, else by "".
        picture: the picture, if it is at hand.
    """

    key: str
    words: tuple[str, str]
    truth: int = -1
    question: str = ""
    tokens: tuple[str, ...] = ()
    edited: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    picture: Picture | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Value:
    """A number for each item and entry of the axes.

    Attributes:
        name: what it is.
        values: the numbers.
        unit: their unit.
        signed: whether zero is the middle of the colours, not their start.
    """

    name: str
    values: Float[np.ndarray, "N *axes"]
    unit: str = ""
    signed: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Generated answers.

    Attributes:
        before: without an edit.
        after: with each edit.
    """

    before: np.ndarray
    after: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plane:
    """IDs in the plane of their axes, or along their line, by layer.

    Attributes:
        layers: names of the layers.
        groups: names of the objects; the first entry is their mean.
        labels: names of the places.
        points: coordinates. Along a line the second one counts the places.
        lines: the places that are joined, as indices.
        axes: names of the two coordinates.
    """

    layers: Sequence[int]
    groups: Sequence[str]
    labels: Sequence[str]
    points: Float[np.ndarray, "L G P 2"]
    lines: Sequence[Sequence[int]]
    axes: tuple[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Answers before and after edits, for every item and every entry of some axes.

    Attributes:
        title: its name.
        about: facts in words, by name.
        items: the questions, N of them.
        axes: entries by the name of the axis, such as condition and layer.
        before: log-probabilities of the two answers without an edit; axes on which they do not depend have length 1.
        after: the same with the edit.
        values: further numbers.
        texts: generated answers, if there are any.
        plane: the IDs that were used.

    Raises:
        InputError: The arrays do not fit the items and axes.
    """

    title: str
    items: Sequence[Item]
    axes: Mapping[str, Sequence[object]]
    before: Float[np.ndarray, "N *reduced 2"]
    after: Float[np.ndarray, "N *axes 2"] | None = None
    values: Sequence[Value] = ()
    texts: Texts | None = None
    plane: Plane | None = None
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.items), *(len(entries) for entries in self.axes.values()))
        found = {value.name: value.values.shape for value in self.values}
        if self.after is not None:
            found["after"] = self.after.shape[:-1]
        if self.texts is not None:
            found["texts"] = self.texts.after.shape
        for name, own in found.items():
            if own != shape:
                raise InputError(f"{name} of {self.title} is {list(own)}; its items and axes need {list(shape)}.")
        reduced = self.before.shape[:-1]
        if len(reduced) != len(shape) or any(have not in (1, need) for have, need in zip(reduced, shape, strict=True)):
            raise InputError(f"before of {self.title} is {list(reduced)}; its items and axes need {list(shape)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps:
    """Dense maps of a picture's captions.

    Attributes:
        title: its name.
        about: facts in words, by name.
        picture: the picture as the encoder sees it.
        captions: the texts.
        tokens: of every caption: column, text, and whether the word is functional.
        maps: cosine of patches, row by row from the upper left, and caption tokens.
        scores: of every caption.
        cosines: of the pooled picture and every caption.
    """

    title: str
    picture: Picture
    captions: Sequence[str]
    tokens: Sequence[Sequence[tuple[int, str, bool]]]
    maps: Float[np.ndarray, "M S S T"]
    scores: Float[np.ndarray, "M"]
    cosines: Float[np.ndarray, "M"]
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """IDs on their own.

    Attributes:
        title: its name.
        plane: the IDs.
        about: facts in words, by name.
    """

    title: str
    plane: Plane
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)


Content = Run | Maps | Geometry


def chips(
    texts: Sequence[str], pictured: Sequence[bool], positions: Mapping[str, Int[np.ndarray, "P"]]
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """A prompt's tokens, each run of picture tokens as one, and which of them are edited.

    Args:
        texts: the tokens' texts.
        pictured: which of them are a picture's.
        positions: the edited positions by label.
    """
    found: list[str] = []
    place: list[int] = []
    count = 0
    for text, picture in zip(texts, pictured, strict=True):
        count = count + 1 if picture else 0
        if count <= 1:
            found.append(text)
        if count:
            found[-1] = f"[{count} picture tokens]"
        place.append(len(found) - 1)
    edited = {label: sorted({place[at] for at in own.tolist()}) for label, own in positions.items()}
    return tuple(found), edited
