"""`jaxid.dcsm.geometry`: hand-made embeddings pass and fail each condition, searches reach known optima, and the
table says attainable where a proof or an embedding says so."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.dcsm import geometry
from jaxid.dcsm.geometry import CONDITIONS, LAWS, Inequality, Parameters, World
from jaxid.errors import InputError
from jaxid.plots.geometry import attainable_margins

WORLD = geometry.world()
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "geometry.ipynb"


def vector(**amounts: float) -> dict[str, float]:
    return amounts


@pytest.fixture
def optax_dtypes() -> Iterator[None]:
    """Optax is not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def arranged(named: dict[str, dict[str, float]], names: tuple[str, ...], axes: list[str]) -> jax.Array:
    """One vector a name: the one given, or else an axis that nothing else uses."""
    axes = [*axes, *(name for name in names if name not in named)]
    return jnp.array([[named.get(name, {name: 1.0}).get(axis, 0.0) for axis in axes] for name in names], jnp.float32)


def weakest(world: World, images: jax.Array, texts: jax.Array, condition: str) -> tuple[float, Inequality]:
    """The smallest slack of a condition's inequalities, and which one has it."""
    slacks = np.asarray(geometry.slacks(world, images, texts))
    values = np.where(geometry.chosen(world, [condition]), slacks, np.inf)
    return float(values.min()), world.inequalities[int(values.argmin())]


def margin_of(
    world: World, condition: str, images: dict[str, dict[str, float]], texts: dict[str, dict[str, float]]
) -> tuple[float, Inequality]:
    """Of hand-made pictures and captions, all on the same named axes; what is not given is orthogonal to the rest."""
    axes = sorted({axis for named in (images, texts) for amounts in named.values() for axis in amounts})
    some_images = arranged(images, world.images, axes)
    some_texts = arranged(texts, world.texts, axes)
    width = max(some_images.shape[1], some_texts.shape[1])
    some_images, some_texts = (
        jnp.pad(some, ((0, 0), (0, width - some.shape[1]))) for some in (some_images, some_texts)
    )
    return weakest(world, some_images, some_texts, condition)


def bags(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {name: dict.fromkeys(geometry.words(name), 1.0) for name in names}


@functools.partial(jax.jit, static_argnames="law")
def random_embedding(law: str, seed: int) -> tuple[jax.Array, jax.Array]:
    parameters = geometry.random_parameters(jax.random.key(seed), WORLD, law, 7)
    return geometry.embed(WORLD, law, parameters)


def test_the_world_is_complete_and_names_only_what_is_in_it() -> None:
    # 3 objects, 3 pairs, 3 pairs x 2 bindings, 3 pairs x 4 relations; captions also 2 colours, 3 + 6 negations
    assert len(WORLD.images) == len(set(WORLD.images)) == 3 + 3 + 6 + 12
    assert len(WORLD.texts) == len(set(WORLD.texts)) == 24 + 2 + 3 + 6
    assert len(set(WORLD.inequalities)) == len(WORLD.inequalities)
    counts = {name: sum(one.condition == name for one in WORLD.inequalities) for name in CONDITIONS}
    # binding: 3 groups of 2 captions; relations: 3 of 4; both ways each
    assert (counts["binding"], counts["relations"]) == (3 * 2 * 2, 3 * 12 * 2)
    # "not star": 3 pictures without x 3 with, and 6 choices, for 3 objects; 3 groups of 3 captions, both ways
    assert counts["negation"] == 3 * (9 + 6) + 3 * 6 * 2
    for one in WORLD.inequalities:
        assert one.image == one.other_image or one.text == one.other_text
        assert (one.image, one.text) != (one.other_image, one.other_text)


@pytest.mark.parametrize(("objects", "colours"), [(1, 2), (5, 2), (3, 1), (3, 4)])
def test_a_world_of_another_size_is_refused(objects: int, colours: int) -> None:
    with pytest.raises(InputError, match="it must be from 2 to"):
        geometry.world(objects, colours)


def test_content_holds_for_bags_of_orthogonal_words_and_fails_where_a_picture_lacks_what_it_shows() -> None:
    images = bags(WORLD.images)
    texts = bags(("star", "disc", "ring", "red", "blue"))
    # The weakest: "star" in a picture of four words, 1/2, against pictures and names of nothing it shows, 0.
    assert margin_of(WORLD, "content", images, texts)[0] == pytest.approx(0.5, abs=1e-6)
    images["star and disc"] = vector(star=1.0, ring=0.5)
    value, worst = margin_of(WORLD, "content", images, texts)
    assert value == pytest.approx(-0.5 / 1.25**0.5, abs=1e-6)
    assert (worst.image, worst.text) == ("star and disc", "disc")


def test_binding_holds_for_opposite_captions_and_fails_for_exchanged_ones() -> None:
    one, two = "red star and blue disc", "blue star and red disc"
    own = {one: vector(way=1.0), two: vector(way=-1.0)}
    exchanged = {one: own[two], two: own[one]}
    world = geometry.world(objects=2)
    assert margin_of(world, "binding", own, own)[0] == pytest.approx(2.0)
    assert margin_of(world, "binding", own, exchanged)[0] == pytest.approx(-2.0)
    # A caption nearest to its own picture is not enough if that picture has a nearer caption.
    value, worst = margin_of(world, "binding", {one: vector(way=1.0), two: vector(other=1.0)}, own)
    assert value == pytest.approx(-0.0, abs=1e-6)
    assert two in (worst.image, worst.other_image)


def test_relations_hold_for_four_directions_and_fail_for_a_mirrored_picture() -> None:
    left, right = "star left of disc", "disc left of star"
    above, below = "star above disc", "disc above star"
    compass = {left: vector(x=-1.0), right: vector(x=1.0), above: vector(y=1.0), below: vector(y=-1.0)}
    world = geometry.world(objects=2)
    # own 1, neighbours 0, opposite -1
    assert margin_of(world, "relations", compass, compass)[0] == pytest.approx(1.0)
    value, worst = margin_of(world, "relations", compass | {left: vector(x=1.0)}, compass)
    assert value == pytest.approx(-2.0)
    assert (worst.image, worst.text, worst.other_text) == (left, left, right)


def test_negation_holds_where_a_negated_name_points_away_and_fails_where_it_does_not() -> None:
    images = {"star": vector(star=1.0, disc=-1.0), "disc": vector(star=-1.0, disc=1.0)}
    images["star and disc"] = vector(star=1.0, disc=1.0)
    texts = {"star": vector(star=1.0), "disc": vector(disc=1.0)}
    texts |= {"not star": vector(star=-1.0), "not disc": vector(disc=-1.0)}
    texts |= {"star and not disc": images["star"], "disc and not star": images["disc"]}
    texts["star and disc"] = images["star and disc"]
    world = geometry.world(objects=2)
    # Own captions 1 against 0 or -1; "star" and "not star" ±1/sqrt(2).
    assert margin_of(world, "negation", images, texts)[0] == pytest.approx(1.0, abs=1e-6)
    value, worst = margin_of(world, "negation", images, texts | {"not star": texts["star"]})
    assert value == pytest.approx(-(2**0.5), abs=1e-6)
    assert worst == Inequality("negation", "disc", "not star", "star", "not star")


def test_a_collapsed_embedding_has_no_slack_anywhere() -> None:
    slacks = geometry.slacks(WORLD, jnp.ones((len(WORLD.images), 3)), jnp.ones((len(WORLD.texts), 3)))
    np.testing.assert_allclose(np.asarray(slacks), 0.0, atol=1e-6)


def test_unknown_conditions_and_laws_are_refused() -> None:
    for wrong in ([], ["content", "counting"]):
        with pytest.raises(InputError, match="choose one or more of content, binding"):
            geometry.chosen(WORLD, wrong)
    with pytest.raises(InputError, match="choose one of free, weighted"):
        geometry.membership(WORLD, "equals")


@pytest.mark.parametrize("law", LAWS)
def test_laws_hold_by_construction(law: str) -> None:
    images, texts = random_embedding(law, 0)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1.0, atol=1e-5)
    image, text = dict(zip(WORLD.images, images, strict=True)), dict(zip(WORLD.texts, texts, strict=True))
    if law == "equal":
        expected = text["star"] + text["disc"]
        np.testing.assert_allclose(text["star and disc"], expected / np.linalg.norm(expected), atol=1e-5)
        np.testing.assert_allclose(text["star and not disc"], text["disc and not star"], atol=1e-5)
    if law == "fused":
        expected = text["star"] + text["not disc"]
        np.testing.assert_allclose(text["star and not disc"], expected / np.linalg.norm(expected), atol=1e-5)
    # A non-negative combination of two vectors lies between them: the angles to them add up to the one between.
    between = [
        float(jnp.arccos(image[a] @ image[b])) for a, b in (("star", "star and disc"), ("star and disc", "disc"))
    ]
    lies_between = abs(sum(between) - float(jnp.arccos(image["star"] @ image["disc"]))) < 1e-3
    assert lies_between == (law != "free")
    swapped = (text["red star and blue disc"], text["blue star and red disc"])
    assert np.allclose(*swapped, atol=1e-5) == (law in ("fused", "equal"))


@pytest.mark.parametrize("seed", range(5))
def test_equal_weights_leave_binding_and_relations_no_slack(seed: int) -> None:
    for law in ("fused", "equal"):
        images, texts = random_embedding(law, seed)
        assert weakest(WORLD, images, texts, "binding")[0] <= 0
        assert weakest(WORLD, images, texts, "relations")[0] <= 0


@pytest.mark.parametrize("seed", range(20))
def test_content_and_negation_contradict_each_other_wherever_not_is_a_word(seed: int) -> None:
    """The four inequalities of the proof, in single precision: never all four hold."""
    law = ("weighted", "equal")[seed % 2]
    found = dict(zip(WORLD.inequalities, np.asarray(geometry.slacks(WORLD, *random_embedding(law, seed))), strict=True))
    four = [Inequality("content", a, a, b, a) for a, b in (("star", "disc"), ("disc", "star"))]
    four += [Inequality("negation", b, f"not {a}", a, f"not {a}") for a, b in (("star", "disc"), ("disc", "star"))]
    assert min(found[one] for one in four) <= 0


@pytest.mark.usefixtures("optax_dtypes")
@pytest.mark.parametrize(("count", "best"), [(2, 2.0), (4, 4 / 3)])
def test_the_search_finds_the_simplex(count: int, best: float) -> None:
    """Each of n pictures is nearest to its own caption: n(n - 1) slacks add up to at most n * n."""
    names = tuple("abcd"[:count])
    pairs = [(a, b) for a in names for b in names if a != b]
    world = World(images=names, texts=names, inequalities=tuple(Inequality("binding", a, a, a, b) for a, b in pairs))
    wanted = jnp.ones((1, len(pairs)), bool)
    keys = jax.random.split(jax.random.key(0), 4)
    found, exact = geometry.search(keys, wanted, small_world=world, law="free", dimension=3, steps=300)
    assert exact.min(axis=2).max() == pytest.approx(best, abs=2e-3)
    # What is returned is what was measured.
    first = Parameters(*(array[0, 0] for array in found))
    again = geometry.slacks(world, *geometry.embed(world, "free", first))
    np.testing.assert_allclose(np.asarray(again), np.asarray(exact[0, 0]), atol=1e-5)


ATTAINABLE: dict[str, Callable[[set[str]], bool]] = {
    "free": lambda group: True,
    "weighted": lambda group: not {"content", "negation"} <= group,
    "fused": lambda group: not group & {"binding", "relations"},
    "equal": lambda group: group == {"content"},
}
"""All that the proofs in the module's description do not rule out."""


@functools.cache
def table_of(objects: int, law: str) -> dict[str, np.ndarray]:
    seeds, steps = (24, 250) if objects == 2 else (8, 400)
    return geometry.study(jax.random.key(0), seeds=seeds, steps=steps, objects=objects, laws=[law])


@pytest.mark.usefixtures("optax_dtypes")
@pytest.mark.parametrize(
    ("objects", "law"),
    [*((2, law) for law in LAWS), *(pytest.param(3, law, marks=pytest.mark.slow) for law in ("free", "weighted"))],
)
def test_main_table(objects: int, law: str) -> None:
    """Everything that is not ruled out is found, and nothing else."""
    table = table_of(objects, law)
    best = {group: table["margin"][table["conditions"] == group].max() for group in table["conditions"]}
    attained = {group: bool(value > geometry.RESOLUTION) for group, value in best.items()}
    assert attained == {group: ATTAINABLE[law](set(group.split(" + "))) for group in best}
    assert min(best.values()) > -geometry.RESOLUTION  # a collapse is always within reach
    if law == "free":
        assert best["binding"] == pytest.approx(2, abs=0.01)
        assert best["relations"] == pytest.approx(4 / 3, abs=0.01)


@pytest.mark.usefixtures("optax_dtypes")
def test_study_is_tidy_and_reproducible() -> None:
    one = table_of(2, "equal")
    two = geometry.study(jax.random.key(0), seeds=24, steps=250, objects=2, laws=["equal"])
    assert list(one) == ["law", "conditions", "size", "seed", "margin", "worst"]
    assert {len(column) for column in one.values()} == {15 * 24}
    np.testing.assert_array_equal(one["margin"], two["margin"])
    np.testing.assert_array_equal(one["size"], [1 + text.count("+") for text in one["conditions"]])
    binding = one["worst"][one["conditions"] == "binding"]
    assert all("red" in text and "blue" in text for text in binding)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="seeds is 0; it must be 1 or more"):
        geometry.study(jax.random.key(0), seeds=0)


def test_the_figure_shows_every_set_and_says_what_was_not_attained() -> None:
    law = np.repeat(["free", "equal"], 4)
    conditions = np.tile(np.repeat(["content", "content + binding"], 2), 2)
    margin = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, -0.002, 0.0])
    figure = attainable_margins(law, conditions, margin)
    bars = [[round(float(bar.get_width()), 3) for bar in axes.patches] for axes in figure.axes[1:]]  # pyright: ignore
    assert bars == [[0.9, 0.7], [0.5]]
    texts = [text.get_text() for axes in figure.axes[1:] for text in axes.texts]
    assert [text for text in texts if text[0].isdigit()] == ["0.90", "0.70", "0.50", "0"]
    with pytest.raises(InputError, match="no search for binding under free"):
        attainable_margins(law, np.where((law == "equal"), "binding", conditions), margin)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """With searches that are too short to find anything."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    lines = [line.rstrip() for cell in cells if cell["cell_type"] == "code" for line in [*cell["source"], ""]]
    code = "\n".join(line for line in lines if not line.lstrip().startswith("%"))  # Jupyter's own commands
    searches = "seeds=16, steps=250"
    assert code.count(searches) == 1
    code = code.replace(searches, "seeds=2, steps=3")
    environment = os.environ | {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}  # optax is not written for strict promotion
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=300)
