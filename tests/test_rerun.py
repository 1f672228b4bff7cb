"""`rerun` against full passes: the same numbers, whatever is edited where."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES, Case
from fixtures import distance
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jaxid.interp.trace
from jaxid.interp.forward import forward
from jaxid.interp.interventions import Reach, add, chain, project_out, replace, scale, stack
from jaxid.interp.trace import Trace, rerun, trace
from jaxid.nn.sites import SITES, Site, clean
from jaxid.prompts.processor import Prompts

EXACT = 1e-5
_, GQA, BIASED = CASES


def mixed(case: Case) -> Prompts:
    """One prompt with a picture, one without."""
    pictured = fixtures.model(case).prepare(fixtures.pictures()[:1], fixtures.QUESTIONS[1:])
    bare = fixtures.model(case).prepare(None, fixtures.QUESTIONS[0])

    def join(name: str) -> np.ndarray:
        a, b = (np.asarray(getattr(prompts.inputs, name)) for prompts in (pictured, bare))
        rest = a.shape[-1] - b.shape[-1]
        if name == "positions":
            b = a
        elif b.ndim == 2:
            b = np.pad(b, ((0, 0), (0, rest)), constant_values={"image_rows": -1, "token_ids": 3}.get(name, 0))
        return np.concatenate([a, b])

    names = ("token_ids", "positions", "valid", "last", "image_rows")
    inputs = dataclasses.replace(pictured.inputs, **{name: join(name) for name in names})
    rest = pictured.offsets.shape[1] - bare.offsets.shape[1]
    return Prompts(
        inputs=inputs,
        questions=pictured.questions + bare.questions,
        texts=pictured.texts + bare.texts,
        spans=np.concatenate([pictured.spans, bare.spans]),
        offsets=np.concatenate([pictured.offsets, np.pad(bare.offsets, ((0, 0), (0, rest), (0, 0)))]),
    )


BATCHES: dict[str, Callable[[Case], Prompts]] = {
    "one": lambda case: fixtures.model(case).prepare(fixtures.pictures()[1], fixtures.QUESTIONS[0]),
    "two": fixtures.prompts,
    "text": lambda case: fixtures.model(case).prepare(None, list(fixtures.QUESTIONS)),
    "mixed": mixed,
}


@functools.cache
def recorded(case: Case, batch: str = "two") -> Trace:
    return trace(fixtures.model(case), BATCHES[batch](case))


def full(case: Case, edit: Any, batch: str = "two") -> jax.Array:
    return forward(fixtures.model(case), recorded(case, batch).prompts, edit).hidden


def vectors(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, 32)).astype(np.float32)


@pytest.fixture
def no_full_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rerun that falls back fails."""
    monkeypatch.setattr(jaxid.interp.trace, "forward", None)


# --- drawn at random ------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[..., Any]] = {
    "add": add,
    "replace": replace,
    "scale": lambda layer, at, _, strength, site: scale(layer, at, strength, site=site),
    "project_out": project_out,
}


@dataclasses.dataclass(frozen=True)
class Frame:
    """What decides which programs are compiled; all else is drawn.

    Attributes:
        case: the model.
        batch: the prompts, by name.
        firsts: the first edited place of every prompt.
        rows: length of the sweep.
        chunk: rows that go together.
        parts: operation and site of every edit of the chain.
    """

    case: Case
    batch: str
    firsts: tuple[int, ...]
    rows: int
    chunk: int | None
    parts: tuple[tuple[str, str], ...]


# Texts after the picture begin at 13 (19 in the second model), and end at 26 and 19 (32 and 25).
FRAMES = [
    Frame(GQA, "one", (26,), 1, None, (("replace", "attn_out"),)),
    Frame(GQA, "two", (13, 19), 5, 2, (("add", "resid_post"), ("project_out", "mlp_out"))),
    Frame(BIASED, "two", (24, 19), 4, 3, (("scale", "mlp_out"), ("replace", "resid_pre"), ("add", "resid_mid"))),
    Frame(GQA, "text", (0, 4), 3, 9, (("add", "embed"), ("scale", "attn_out"), ("replace", "mlp_out"))),
    Frame(GQA, "mixed", (15, 3), 4, 2, (("project_out", "resid_pre"), ("scale", "resid_post"))),
    Frame(GQA, "two", (7, 16), 3, 2, (("add", "resid_post"), ("project_out", "mlp_out"))),  # in the picture
]


def test_all_sites_and_operations_are_drawn() -> None:
    parts = list(itertools.chain.from_iterable(frame.parts for frame in FRAMES))
    assert {name for name, _ in parts} == set(MAKERS) and {site for _, site in parts} == set(SITES)
    assert {len(frame.parts) for frame in FRAMES} == {1, 2, 3}


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: f"{frame.batch}-{frame.firsts[0]}")
@given(st.data())
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
def test_a_rerun_is_the_full_pass(frame: Frame, data: st.DataObject) -> None:
    """Rows with layers, places, vectors and strengths of their own."""
    prompts, layers = recorded(frame.case, frame.batch).prompts, fixtures.model(frame.case).num_layers
    batch, last = len(prompts), prompts.last().tolist()
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))

    def places(row: int, part: int) -> list[list[int]]:
        ranges = zip(frame.firsts, last, strict=True)
        drawn = [[data.draw(st.integers(first, end)) for _ in "ab"] for first, end in ranges]
        if (row, part) == pinned:
            drawn = [[other, first] for (_, other), first in zip(drawn, frame.firsts, strict=True)]
        return drawn

    pinned = data.draw(st.tuples(st.integers(0, frame.rows - 1), st.integers(0, len(frame.parts) - 1)))
    edits = []
    for row in range(frame.rows):
        chained = []
        for part, (operation, site) in enumerate(frame.parts):
            layer = -1 if site == "embed" else data.draw(st.integers(0, layers - 1))
            vector = rng.standard_normal((batch, 2, 32)).astype(np.float32)
            strength = data.draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]))
            chained.append(MAKERS[operation](layer, np.array(places(row, part)), vector, strength, site=site))
        edits.append(chain(*chained))
    again = rerun(fixtures.model(frame.case), recorded(frame.case, frame.batch), stack(edits), chunk=frame.chunk)
    assert again.captured == {}
    for row, edit in enumerate(edits):
        assert distance(again.hidden[row], full(frame.case, edit, frame.batch)) < EXACT


# --- every model ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_full_pass")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_at_all_layers_from_different_words(case: Case) -> None:
    """The prompts differ in length, and in where the edited word stands."""
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    at = np.stack([prompts.word(["star", "Where"]), prompts.last()], axis=1)
    edit = add(np.array([[2, 0, 1], [1, 1, 2]]), at, vectors(2, 3), 2.0)
    again = rerun(model, recorded(case), edit, chunk=5)  # rows of all first blocks, even past the last one
    whole = forward(model, prompts, edit)
    assert again.hidden.shape == (2, 3, 2, model.width)
    assert distance(again.hidden, whole.hidden) < EXACT
    assert distance(again.hidden[0, 0], recorded(case).hidden) > 0.01
    assert distance(again.logits, whole.logits) < EXACT


# --- what falls back to a full pass, and what need not --------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Damp:
    """An intervention of a user's own: all MLPs from a block on, at all places from one on."""

    layer: Any
    factor: Any
    start: int = dataclasses.field(metadata={"static": True})
    known: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def sweep_shape(self) -> tuple[int, ...]:
        return np.shape(self.layer)

    @property
    def reach(self) -> Reach | None:
        return Reach(np.asarray(self.layer), np.array([self.start])) if self.known else None

    def __call__(self, site: Site, value: jax.Array) -> jax.Array:
        here = (site.positions >= self.start) & (site.layer >= self.layer) & (site.name == "mlp_out")
        return jnp.where(here[..., None], value * self.factor, value)


@pytest.fixture
def full_passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The interventions for which a rerun fell back."""
    found: list[Any] = []

    def counted(model: Any, prompts: Any, intervention: Any) -> Any:
        found.append(intervention)
        return forward(model, prompts, intervention)

    monkeypatch.setattr(jaxid.interp.trace, "forward", counted)
    return found


def test_interventions_of_ones_own(full_passes: list[Any]) -> None:
    """Those that say where they begin are run again from there; also beside edits, and without being a pytree."""
    model, at = fixtures.model(GQA), fixtures.prompts(GQA).last()
    own = Damp(np.array([2, 0, 1]), np.array([0.5, -1.0, 2.0], np.float32), 16)
    beside = chain(own, add(np.arange(3), at, vectors(3)))
    assert distance(rerun(model, recorded(GQA), beside).hidden, full(GQA, beside)) < EXACT

    def function(site: Site, value: jax.Array) -> jax.Array:
        return Damp(1, jnp.float32(0.5), 16)(site, value)

    plain = full(GQA, function)
    assert distance(plain, recorded(GQA).hidden) > 0.01
    function.reach = Reach(np.asarray(1), np.array([16]))  # pyright: ignore[reportFunctionMemberAccess]
    assert distance(rerun(model, recorded(GQA), function).hidden, plain) < EXACT
    assert not full_passes


def test_what_does_not_say_where_it_begins_falls_back(full_passes: list[Any]) -> None:
    model, prompts = fixtures.model(GQA), fixtures.prompts(GQA)
    silent = Damp(np.array([2, 0, 1]), np.array([0.5, -1.0, 2.0], np.float32), 16, known=False)
    assert distance(rerun(model, recorded(GQA), silent).hidden, full(GQA, silent)) < 1e-6
    shrink = Damp(1, jnp.float32(0.5), 0).__call__
    assert distance(rerun(model, recorded(GQA), shrink).hidden, full(GQA, shrink)) < 1e-6
    image = add(1, prompts.image_tokens()[:, 0], vectors(), 20.0)
    assert distance(rerun(model, recorded(GQA), image).hidden, full(GQA, image)) < 1e-6
    assert distance(full(GQA, image), recorded(GQA).hidden) > 1e-3
    # The place before the picture's end is enough, in one prompt of two.
    near = add(1, np.array([12, 19]), vectors())
    assert distance(rerun(model, recorded(GQA), near).hidden, full(GQA, near)) < 1e-6
    assert len(full_passes) == 4
    assert distance(rerun(model, recorded(GQA), clean).hidden, recorded(GQA).hidden) == 0
    assert distance(rerun(model, recorded(GQA), chain()).hidden, recorded(GQA).hidden) < 1e-6
    assert len(full_passes) == 4
