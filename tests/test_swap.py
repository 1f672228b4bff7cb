"""Activation swaps, of pictures by their keys and values and of text by its values, against full passes."""

import functools
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from families import CASES
from fixtures import distance

import jaxid.interp.trace
from jaxid.errors import InputError, PromptError
from jaxid.families.base import Model
from jaxid.interp.forward import forward
from jaxid.interp.interventions import add, chain, replace, scale
from jaxid.interp.trace import Trace, rerun, swap, trace
from jaxid.nn.sites import Capture, clean

EXACT = 1e-5
PLAIN, GQA, BIASED = CASES
LAYERS = np.arange(3)


@pytest.fixture
def model() -> Model:
    return fixtures.model(GQA)


@pytest.fixture
def ours() -> Trace:
    return fixtures.recorded(GQA)


@functools.cache
def mirrored(questions: tuple[str, ...] | str = fixtures.QUESTIONS, **options: Any) -> Trace:
    """The pictures the other way round."""
    pictures = [picture[:, ::-1] for picture in fixtures.pictures()]
    asked = questions if isinstance(questions, str) else list(questions)
    return trace(fixtures.model(GQA), fixtures.model(GQA).prepare(pictures, asked, **options))


@functools.cache
def activations() -> np.ndarray:
    """What a full pass over the mirrored pictures has after every block, Float[L, B, T, D]."""
    found = forward(fixtures.model(GQA), mirrored().prompts, clean, Capture(("resid_post",)))
    return np.asarray(found.captured["resid_post"])


def by_hand(layers: np.ndarray, at: np.ndarray) -> Any:
    """The swap as a plain replacement."""
    return replace(layers, at, activations()[layers][:, np.arange(2)[:, None], at])


def full(edit: Any) -> jax.Array:
    return forward(fixtures.model(GQA), fixtures.prompts(GQA), edit).hidden


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((*shape, 32)).astype(np.float32)


def test_pictures(model: Model, ours: Trace) -> None:
    swapped = rerun(model, ours, pictures_of=mirrored(), after=LAYERS).hidden
    assert distance(swapped, full(by_hand(LAYERS, ours.prompts.image_tokens()))) < EXACT
    assert distance(swapped[0], ours.hidden) > 1e-3
    assert distance(swapped[2], ours.hidden) < 1e-6  # nothing reads what leaves the last block
    same = rerun(model, ours, pictures_of=ours, after=LAYERS).hidden
    assert distance(same, np.broadcast_to(ours.hidden, same.shape)) < 1e-6


def test_what_was_asked_about_the_other_pictures_does_not_matter(model: Model, ours: Trace) -> None:
    """Nor how long those prompts are: pictures stand before the questions."""
    pushed = add(LAYERS, ours.prompts.last(), vectors(3))
    for edit, asked, options in (
        (pushed, ("Where is the star?", "Is the cat left of the fish?"), {}),
        (clean, "Where", {"chat": False, "pad_to_multiple": 1}),
    ):
        source = mirrored(asked, **options)
        assert source.keys.shape[3] < ours.keys.shape[3]
        found, wanted = (
            rerun(model, ours, edit, pictures_of=other, after=LAYERS).hidden for other in (source, mirrored())
        )
        assert distance(found, wanted) < 1e-6


def test_pictures_beside_edits(model: Model, ours: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in which edits begin below, at and above the layer of the swap."""
    at, layers = ours.prompts.word("fish"), np.array([2, 0, 1, 1, 0])
    before = add(np.array([0, 1, 1, 0, 2]), at, vectors(5), 2.0)
    after = scale(np.array([2, 0, 2, 1, 2]), ours.prompts.last(), 0.3, site="mlp_out")
    wanted = full(chain(before, by_hand(layers, ours.prompts.image_tokens()), after))
    monkeypatch.setattr(jaxid.interp.trace, "forward", None)  # nothing falls back
    edits = chain(clean, chain(after, before))
    found, unswapped = (
        rerun(model, ours, edits, pictures_of=source, after=layers, chunk=2).hidden for source in (mirrored(), ours)
    )
    assert distance(found, wanted) < EXACT
    assert (np.abs(unswapped - wanted).max(axis=(1, 2)) > 1e-3).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("what", ["text", "words"])
def test_text(what: str, model: Model, ours: Trace) -> None:
    words = np.stack([ours.prompts.word("fish"), ours.prompts.last()], axis=1)
    at = {"text": ours.prompts.text_tokens(), "words": words}[what]
    swapped, wanted = swap(mirrored(), LAYERS, "text" if what == "text" else at), by_hand(LAYERS, at)
    np.testing.assert_allclose(swapped.vector, wanted.vector, atol=1e-5)
    again = rerun(model, ours, swapped).hidden
    assert distance(again, full(wanted)) < EXACT
    assert distance(again[0], ours.hidden) > 1e-3
    assert distance(again[2], mirrored().hidden) < EXACT  # all that is read of the last block


def test_one_word_and_one_layer(ours: Trace) -> None:
    at = ours.prompts.word("fish")
    single = swap(mirrored(), 1, at)
    assert single.sweep_shape == () and single.positions.shape == (2, 1) and single.vector.shape == (2, 1, 32)
    np.testing.assert_allclose(single.vector[:, 0], activations()[1][np.arange(2), at], atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "at", "named"),
    [
        (
            3,
            "text",
            r"layer 3 is out of range for site 'resid_post': .* has layers 0\.\.2, the last is model.num_layers - 1",
        ),
        ([0, -1], "text", "layer -1 is out of range"),
        (1.0, "text", "`layer` must hold integers, not float64"),
        (1, "picture", "`positions` is \"text\" or an array of positions, not 'picture'"),
        (1, "image", r"pictures are swapped by jaxid\.rerun\(\.\.\., pictures_of=source, after=layer\)"),
        (1, np.array([4, 14]), "position 4 is not among the text tokens after the picture"),
        (1, np.array([[14, 40], [14, 15]]), "position 40 lies outside prompt 0, which ends at 26"),
    ],
)
def test_what_a_swap_cannot_take(layer: Any, at: Any, named: str, ours: Trace) -> None:
    with pytest.raises(InputError, match=named):
        swap(ours, layer, at)


def test_prompts_without_pictures_have_none_to_swap(model: Model) -> None:
    bare = trace(model, model.prepare(None, "Where is the fish?"))
    with pytest.raises(PromptError, match="picture tokens"):
        rerun(model, bare, pictures_of=bare, after=1)


def test_what_cannot_stand_beside_a_swapped_picture(model: Model, ours: Trace) -> None:
    for beside in (add(1, ours.prompts.image_tokens(), vectors()), lambda site, value: value):
        with pytest.raises(InputError, match="beside `pictures_of`, only edits of text tokens at known positions"):
            rerun(model, ours, beside, pictures_of=mirrored(), after=1)
    with pytest.raises(InputError, match=r"`after` has the sweep axes \[\], the intervention \[2\]"):
        rerun(model, ours, add([0, 1], ours.prompts.last(), vectors(2)), pictures_of=mirrored(), after=1)


@pytest.mark.parametrize(
    ("after", "named"),
    [
        (3, r"layer 3 is out of range for site 'resid_post': .* has layers 0\.\.2, the last is model.num_layers - 1"),
        ([0, -1], "layer -1 is out of range"),
        (1.0, "`after` must hold integers, not float64"),
        (None, "`pictures_of` and `after` go together"),
    ],
)
def test_after_which_layers_pictures_cannot_be_swapped(after: Any, named: str, model: Model, ours: Trace) -> None:
    with pytest.raises(InputError, match=named):
        rerun(model, ours, pictures_of=mirrored(), after=after)
    with pytest.raises(InputError, match="`pictures_of` and `after` go together"):
        rerun(model, ours, after=1)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside an edit"])
def test_unlike_traces(beside: bool, model: Model, ours: Trace) -> None:
    one = trace(model, model.prepare(fixtures.pictures()[:1], list(fixtures.QUESTIONS[:1])))
    for own, source in (
        (ours, one),
        (one, ours),
        (fixtures.recorded(PLAIN), fixtures.recorded(BIASED)),  # the same prompts
        (fixtures.recorded(PLAIN), ours),  # pictures of fewer tokens
    ):
        edit = add(1, own.prompts.last(), vectors()) if beside else clean
        with pytest.raises(InputError, match="of the same model whose prompts are equal up to the picture's end"):
            rerun(own.model, own, edit, pictures_of=source, after=1)
