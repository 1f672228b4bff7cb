"""What one unit vector per picture and per caption can express ([DCSM] arXiv 2503.08723).

A small world of pictures and captions, and four conditions on their cosines, each a list of strict inequalities:

- **content**: a picture is nearer to the name of every object and colour that it shows than to the name of one that it
  does not show; and a name is nearer to every picture that shows the thing than to one that does not.
- **binding**: "red star and blue disc" and "blue star and red disc" each belong to their own picture.
- **relations**: so do "star left of disc", "disc left of star", "star above disc" and "disc above star".
- **negation**: "not star" is nearer to pictures without a star than to pictures with one; a picture is nearer to the
  true one of "star" and "not star"; "star and not disc", "disc and not star" and "star and disc" each belong to their
  own picture.

"Belongs" works both ways: a picture is nearest to its own caption among those named, and the reverse.

The inequalities alone do not contradict each other: with enough dimensions, a finite table of cosines can have any
order. Contradictions arise because compositions are made of their parts. A **law** says how; it holds by construction,
not as a penalty, so that embeddings that it forbids cannot be reached:

- **free**: no law. Every picture and caption has its own unit vector.
- **weighted**: every word has a vector, pictures and captions each their own, and a composition is a non-negative
  combination of its words' vectors, scaled to length one. Every composition has its own weights.
- **fused**: the same with equal weights, and "not star" counts as one word.
- **equal**: the same with equal weights; `not` is a word like any other.

`and` and `of` are never counted as words; `left` and `above` are. Equal weights are the strictest reading of "a
composition is the superposition of its parts": of all unit vectors, the one whose smallest cosine to a set of equally
spread parts is largest. The conditions and laws are stated here in this module's own terms, not the paper's.

The margin of an embedding is the smallest slack of the inequalities asked for; a set of conditions is attainable if
the best margin over all embeddings is above zero. The best margin is never below zero, since every slack is zero where
all vectors are the same. Some sets are provably unattainable, without any search:

- Under equal weights, "red star and blue disc" and "blue star and red disc" are one vector, and so are "star left of
  disc" and "disc left of star": binding and relations have margin zero, alone or with others. Where `not` is a word,
  "star and not disc" and "disc and not star" are one vector too.
- Where `not` is a word, content and negation contradict each other under any non-negative weights. Let d be the
  picture of the disc minus that of the star. Content asks for d · star < 0 < d · disc, and negation for
  d · not-star > 0 > d · not-disc. As not-star = u not + v star, the one needs d · not > 0, the other d · not < 0.

If a search finds a set attainable, the embedding proves it; if it does not, nothing is proved.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from jaxid.errors import InputError
from jaxid.kernels.similarity import unit

CONDITIONS = ("content", "binding", "relations", "negation")
LAWS = ("free", "weighted", "fused", "equal")
OBJECTS = ("star", "disc", "ring", "cross")
COLOURS = ("red", "blue", "green")

RESOLUTION = 0.01
"""Margins up to this count as zero: searches end this close to zero, on either side, if nothing better exists."""

_SHARPNESS = (4.0, 400.0)
"""First and last sharpness of the smoothed minimum, at most log(inequalities) / sharpness below the minimum."""


class Inequality(NamedTuple):
    """cos(image, text) > cos(other_image, other_text), asked by one condition; pictures and captions by name."""

    condition: str
    image: str
    text: str
    other_image: str
    other_text: str

    def __str__(self) -> str:
        return f"[{self.image}]·“{self.text}” > [{self.other_image}]·“{self.other_text}”"


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Pictures, captions, and the inequalities that the four conditions ask for; made by `world`."""

    images: tuple[str, ...]
    """The pictures, each named by the caption that describes it completely."""
    texts: tuple[str, ...]
    inequalities: tuple[Inequality, ...]


class Parameters(NamedTuple):
    """An embedding before its law is applied: I pictures and T captions made of P parts."""

    image_parts: Float[Array, "P dimension"]
    text_parts: Float[Array, "P dimension"]
    image_weights: Float[Array, "I P"]
    """Square roots of the weights, so that these are not negative; used by the law `weighted` alone."""
    text_weights: Float[Array, "T P"]


def words(name: str) -> tuple[str, ...]:
    """The parts of a picture or caption: its words without `and` and `of`."""
    return tuple(word for word in name.split() if word not in ("and", "of"))


def world(objects: int = 3, colours: int = 2) -> World:
    """Makes the world of all compositions of some objects and colours.

    Args:
        objects: how many, 2 to 4; content needs a third one that is absent from pictures of two.
        colours: how many, 2 or 3.

    Raises:
        InputError: if a number is out of range.
    """
    for name, count, most in (("objects", objects, len(OBJECTS)), ("colours", colours, len(COLOURS))):
        if not 2 <= count <= most:
            raise InputError(f"{name} is {count}; it must be from 2 to {most}.")
    singles, tints = OBJECTS[:objects], COLOURS[:colours]
    pairs = [f"{a} and {b}" for a, b in itertools.combinations(singles, 2)]
    bindings = [
        (f"{c} {a} and {d} {b}", f"{d} {a} and {c} {b}")
        for a, b in itertools.combinations(singles, 2)
        for c, d in itertools.combinations(tints, 2)
    ]
    relations = [
        (f"{a} left of {b}", f"{b} left of {a}", f"{a} above {b}", f"{b} above {a}")
        for a, b in itertools.combinations(singles, 2)
    ]
    images = (*singles, *pairs, *itertools.chain(*bindings), *itertools.chain(*relations))
    negated = (*(f"not {a}" for a in singles), *(f"{a} and not {b}" for a, b in itertools.permutations(singles, 2)))
    inequalities = itertools.chain(
        _content((*singles, *tints), images),
        *(_own_captions("binding", zip(group, group, strict=True)) for group in bindings),
        *(_own_captions("relations", zip(group, group, strict=True)) for group in relations),
        _negation(singles, (*singles, *pairs)),
    )
    return World(images=images, texts=(*images, *tints, *negated), inequalities=tuple(inequalities))


def _content(concepts: Sequence[str], images: Sequence[str]) -> Iterator[Inequality]:
    for image, shown in itertools.product(images, concepts):
        if shown in words(image):
            for absent in concepts:
                if absent not in words(image):
                    yield Inequality("content", image, shown, image, absent)
            for other in images:
                if shown not in words(other):
                    yield Inequality("content", image, shown, other, shown)


def _own_captions(condition: str, pairs: Iterable[tuple[str, str]]) -> Iterator[Inequality]:
    """Every picture of some (picture, caption) pairs belongs to its own caption."""
    for (image, text), (other_image, other_text) in itertools.permutations(pairs, 2):
        yield Inequality(condition, image, text, image, other_text)
        yield Inequality(condition, image, text, other_image, text)


def _negation(objects: Sequence[str], images: Sequence[str]) -> Iterator[Inequality]:
    for item in objects:
        shown = [image for image in images if item in words(image)]
        lacking = [image for image in images if item not in words(image)]
        for image, other in itertools.product(lacking, shown):
            yield Inequality("negation", image, f"not {item}", other, f"not {item}")
        for image in shown:
            yield Inequality("negation", image, item, image, f"not {item}")
        for image in lacking:
            yield Inequality("negation", image, f"not {item}", image, item)
    for a, b in itertools.combinations(objects, 2):
        captions = [(a, f"{a} and not {b}"), (b, f"{b} and not {a}"), (f"{a} and {b}", f"{a} and {b}")]
        yield from _own_captions("negation", captions)


def slacks(
    small_world: World, images: Float[Array, "I dimension"], texts: Float[Array, "T dimension"]
) -> Float[Array, "inequalities"]:
    """By how much each inequality of a world holds; below zero where it is violated.

    Args:
        small_world: the world.
        images: one vector per picture, in the world's order, of any length above zero.
        texts: one vector per caption, in the world's order, of any length above zero.
    """
    at = _indices(small_world)
    cosines = unit(images) @ unit(texts).T
    return cosines[at[:, 0], at[:, 1]] - cosines[at[:, 2], at[:, 3]]


@functools.cache
def _indices(small_world: World) -> Int[np.ndarray, "inequalities 4"]:
    image = {name: index for index, name in enumerate(small_world.images)}
    text = {name: index for index, name in enumerate(small_world.texts)}
    rows = [
        (image[one.image], text[one.text], image[one.other_image], text[one.other_text])
        for one in small_world.inequalities
    ]
    return np.array(rows)


def chosen(small_world: World, conditions: Sequence[str]) -> Bool[np.ndarray, "inequalities"]:
    """Which inequalities of a world belong to some conditions.

    Raises:
        InputError: if a condition is unknown, or none is given.
    """
    if not conditions or not set(conditions) <= set(CONDITIONS):
        raise InputError(f"conditions are {list(conditions)}; choose one or more of {', '.join(CONDITIONS)}.")
    return np.array([one.condition in conditions for one in small_world.inequalities])


def membership(small_world: World, law: str) -> tuple[Float[np.ndarray, "I P"], Float[np.ndarray, "T P"]]:
    """Which of the P parts each picture and each caption is made of under a law, as ones and zeros.

    Raises:
        InputError: if the law is unknown.
    """
    if law not in LAWS:
        raise InputError(f"law is {law!r}; choose one of {', '.join(LAWS)}.")

    def parts(name: str) -> tuple[str, ...]:
        if law == "free":
            return (name,)
        return words(name.replace("not ", "not-") if law == "fused" else name)

    names = (small_world.images, small_world.texts)
    everything = sorted({part for name in itertools.chain(*names) for part in parts(name)})
    made_of = [np.array([[part in parts(name) for part in everything] for name in some], np.float32) for some in names]
    return made_of[0], made_of[1]


def embed(
    small_world: World, law: str, parameters: Parameters
) -> tuple[Float[Array, "I dimension"], Float[Array, "T dimension"]]:
    """The unit vectors of all pictures and captions of a world, which obey a law whatever the parameters are.

    Raises:
        InputError: if the law is unknown.
    """
    of_images, of_texts = map(jnp.asarray, membership(small_world, law))
    if law == "weighted":
        of_images *= jnp.square(parameters.image_weights)
        of_texts *= jnp.square(parameters.text_weights)
    return unit(of_images @ unit(parameters.image_parts)), unit(of_texts @ unit(parameters.text_parts))


def random_parameters(key: PRNGKeyArray, small_world: World, law: str, dimension: int) -> Parameters:
    """Parameters to start from: parts in all directions, weights around one.

    A part's vectors for pictures and for captions start somewhere between equal and opposite, the same for all parts:
    starts near one end find binding and relations more often, and starts near the other negation.

    Raises:
        InputError: if the law is unknown.
    """
    of_images, of_texts = membership(small_world, law)
    for_images, for_texts, for_mixture, *for_weights = jax.random.split(key, 5)
    image_parts = jax.random.normal(for_images, (of_images.shape[1], dimension))
    others = jax.random.normal(for_texts, image_parts.shape)
    same = jax.random.uniform(for_mixture, minval=-1.0)
    weights = [
        jax.random.uniform(key, made_of.shape, minval=0.5, maxval=1.5)
        for key, made_of in zip(for_weights, (of_images, of_texts), strict=True)
    ]
    return Parameters(image_parts, same * image_parts + jnp.sqrt(1 - same**2) * others, *weights)


@functools.partial(jax.jit, static_argnames=("small_world", "law", "dimension", "steps", "rate"))
def search(
    keys: Key[Array, "seeds"],
    wanted: Bool[Array, "problems inequalities"],
    *,
    small_world: World,
    law: str,
    dimension: int = 16,
    steps: int = 600,
    rate: float = 0.05,
) -> tuple[Parameters, Float[Array, "problems seeds inequalities"]]:
    """Searches for the embeddings of largest margin, for all problems and seeds in one program.

    Adam maximises a smoothed minimum of the wanted slacks, which becomes sharper with every step while the learning
    rate falls to zero.

    Args:
        keys: one per seed; every problem starts from the same embeddings.
        wanted: the inequalities of each problem, as `chosen` gives them, at least one each.
        small_world: the world.
        law: a name from `LAWS`.
        dimension: of the vectors.
        steps: of Adam.
        rate: its first learning rate.

    Returns:
        The parameters found, with leading axes problems and seeds; and the exact slacks of all inequalities there.

    Raises:
        InputError: if the law is unknown.
    """
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def climb(start: Parameters, wanted: Bool[Array, "inequalities"]) -> Parameters:
        def loss(parameters: Parameters, sharpness: Float[Array, ""]) -> Float[Array, ""]:
            values = slacks(small_world, *embed(small_world, law, parameters))
            return jax.nn.logsumexp(-sharpness * values, where=wanted) / sharpness

        def step(
            state: tuple[Parameters, optax.OptState], sharpness: Float[Array, ""]
        ) -> tuple[tuple[Parameters, optax.OptState], None]:
            parameters, moments = state
            change, moments = optimiser.update(jax.grad(loss)(parameters, sharpness), moments)
            return (optax.apply_updates(parameters, change), moments), None  # pyright: ignore[reportReturnType]

        (found, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), jnp.geomspace(*_SHARPNESS, steps))
        return found

    starts = jax.vmap(lambda key: random_parameters(key, small_world, law, dimension))(keys)
    found = jax.vmap(jax.vmap(climb, (0, None)), (None, 0))(starts, wanted)
    exact = jax.vmap(jax.vmap(lambda parameters: slacks(small_world, *embed(small_world, law, parameters))))(found)
    return found, exact


def subsets() -> list[tuple[str, ...]]:
    """All fifteen sets of conditions, the small ones first."""
    return [group for size in range(1, 5) for group in itertools.combinations(CONDITIONS, size)]


def study(
    key: PRNGKeyArray,
    *,
    seeds: int = 16,
    dimension: int = 16,
    objects: int = 3,
    colours: int = 2,
    laws: Sequence[str] = LAWS,
    steps: int = 600,
) -> dict[str, np.ndarray]:
    """The best margins found for all sets of conditions under some laws, as a tidy table.

    Args:
        key: of the starting embeddings.
        seeds: searches for each set and law.
        dimension: of the vectors.
        objects: of the world, 2 to 4.
        colours: of the world, 2 or 3.
        laws: names from `LAWS`.
        steps: of each search.

    Returns:
        Column -> one value per search: `law`, `conditions` (joined by " + "), `size` (how many), `seed`, `margin`, and
        `worst`, the inequality with that slack. A set whose best margin is not above `RESOLUTION` was not attained.

    Raises:
        InputError: if a number is out of range, or a law is unknown.
    """
    for name, count in (("seeds", seeds), ("dimension", dimension), ("steps", steps)):
        if count < 1:
            raise InputError(f"{name} is {count}; it must be 1 or more.")
    small_world, groups = world(objects, colours), subsets()
    wanted = np.stack([chosen(small_world, group) for group in groups])
    rows = []
    for law in laws:
        found = search(
            jax.random.split(key, seeds),
            jnp.asarray(wanted),
            small_world=small_world,
            law=law,
            dimension=dimension,
            steps=steps,
        )[1]
        exact = np.where(wanted[:, None], np.asarray(found), np.inf)
        for group, values in zip(groups, exact, strict=True):
            for seed, at in enumerate(values.argmin(axis=1)):
                worst = str(small_world.inequalities[at])
                rows.append((law, " + ".join(group), len(group), seed, values[seed, at], worst))
    names = ("law", "conditions", "size", "seed", "margin", "worst")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
