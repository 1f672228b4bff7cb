"""Passes on a mesh: results are those of one device, arrays lie where they should, and little crosses devices."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_files import Modules
from families import EVERY, Case, over
from fixtures import distance

import jaxid.interp.forward
import jaxid.interp.trace
from jaxid import meshes
from jaxid.checkpoints import sharding
from jaxid.checkpoints.loading import load
from jaxid.checkpoints.tensors import flatten
from jaxid.errors import JaxidWarning
from jaxid.families.base import Model
from jaxid.interp import programs
from jaxid.interp.forward import Output, forward
from jaxid.interp.generate import Generation, generate
from jaxid.interp.interventions import VectorEdit, add
from jaxid.interp.spreading import dealt, in_order, over_rows
from jaxid.interp.trace import Trace, rerun, residuals_at, trace
from jaxid.nn.sites import Capture
from jaxid.prompts.processor import Prompts

EXACT = 1e-5
PROMPTS = 4

FAST = ("internvl-tied-rms-qk-norm-earlier-layer", "video-grid")
"""Models whose tests take a few seconds."""

SHORT = (
    "internvl-tied-rms-qk-norm-earlier-layer",
    "llava-biases-llama3-list",
    "onevision-pictures-shrunk",
    "qwen2-vl-tied-wide-heads",
    "video-grid",
)
"""Models whose parameters lie on a mesh in other ways, and whose decoders are like others': their traces differ."""

UNLIKE = ("gemma3", "mllama", "qwen2.5-vl-windows")
"""Models whose decoders differ from LLaVA's."""

ODD = ("gemma3-untied-odd-every-third-full", "mllama-last-cross")
"""Variants of those whose heads divide in other ways."""

CASES = {case.name: case for case in EVERY}


@functools.cache
def model_on(case: Case, text: str) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JaxidWarning)  # about what such small models do not divide
        return load(fixtures.folder(case), dtype="float32", mesh=text)


@functools.cache
def prompts_of(case: Case, count: int) -> Prompts:
    """Prompts of unequal length, each with a picture."""
    shown = fixtures.shown(case)
    pictures = [shown[row % 2] for row in range(count)]
    return fixtures.model(case).prepare(pictures, [fixtures.QUESTIONS[row % 2] for row in range(count)])


def places(prompts: Prompts) -> np.ndarray:
    """A word of each prompt, and the place where its answer is read."""
    names = ["star" if row % 2 == 0 else "fish" for row in range(len(prompts))]
    return np.stack([prompts.word(names), prompts.last()], axis=1)


def edits(model: Model, prompts: Prompts) -> VectorEdit:
    """One edit of a word after every layer."""
    vectors = np.random.default_rng(0).standard_normal((model.num_layers, model.width)).astype(np.float32)
    return add(np.arange(model.num_layers), places(prompts)[:, :1], vectors, 2.0)


class Passes:
    """The passes of a model over prompts, each made on first use."""

    def __init__(self, model: Model, prompts: Prompts):
        self.model, self.prompts = model, prompts
        self.edit, self.at = edits(model, prompts), places(prompts)

    @functools.cached_property
    def forward(self) -> Output:
        capture = Capture(("resid_post",), positions=jnp.asarray(self.at))
        return forward(self.model, self.prompts, self.edit, capture)

    @functools.cached_property
    def trace(self) -> Trace:
        return trace(self.model, self.prompts)

    @functools.cached_property
    def rerun(self) -> Output:
        return rerun(self.model, self.trace, self.edit)

    @functools.cached_property
    def residuals(self) -> Any:
        return residuals_at(self.model, self.prompts, self.at)

    @functools.cached_property
    def written(self) -> Generation:
        return generate(self.model, self.trace, self.edit, max_new_tokens=3)

    def values(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the named passes give."""
        made = {
            "trace": lambda: {"logits": self.trace.logits, "residuals": self.trace.residuals},
            "forward": lambda: {"logits": self.forward.logits, "captured": self.forward.captured["resid_post"]},
            "rerun": lambda: {"hidden": self.rerun.hidden, "answers": self.rerun.logprobs([5, 6])},
            "residuals": lambda: {"residuals": self.residuals},
            "written": lambda: {"first": self.written.first.hidden},
        }
        return {name: made[name]() for name in names}


EVERYTHING = ("trace", "forward", "rerun", "residuals", "written")


@functools.cache
def on_one(case: Case, count: int) -> Passes:
    return Passes(fixtures.model(case), prompts_of(case, count))


def check_equal(found: Passes, *names: str) -> None:
    """The named passes give what one device gives."""
    case = next(case for case in EVERY if fixtures.folder(case).name == Path(found.model.name).name)
    wanted = on_one(case, len(found.prompts))
    ours, theirs = found.values(names), wanted.values(names)
    for name, values in theirs.items():
        for kind, value in values.items():
            assert distance(ours[name][kind], value) < EXACT, (name, kind)
    if "written" in names:
        np.testing.assert_array_equal(found.written.tokens, wanted.written.tokens)
        np.testing.assert_array_equal(found.written.lengths, wanted.written.lengths)


def check_places(array: jax.Array, model: Model, *axes: str | None) -> None:
    """The array is divided along just these axes of the model's mesh."""
    assert model.mesh is not None
    wanted = jax.NamedSharding(model.mesh, jax.P(*axes))
    assert array.sharding.is_equivalent_to(wanted, array.ndim), (array.sharding, axes)


def check_parameters(model: Model, alone: Model) -> None:
    """They lie where they should, and are those of one device."""
    leaves, expected = flatten(model.parameters), flatten(alone.parameters)
    assert leaves.keys() == expected.keys() and model.fingerprint == alone.fingerprint
    assert model.mesh is not None
    wanted = sharding.layout(model.definition, leaves, model.mesh).shardings
    for path, leaf in leaves.items():
        assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


@over(FAST, among=(*SHORT, *ODD))
def test_sharded_is_unsharded(case: Case) -> None:
    """Prompts over four devices, heads, columns and tokens over two."""
    found = Passes(model_on(case, "data=4,model=2"), prompts_of(case, PROMPTS))
    check_parameters(found.model, fixtures.model(case))
    check_sharded(found, "trace")


def check_sharded(found: Passes, *names: str) -> None:
    """The passes, or the trace alone, give what one device gives, and lie where they should."""
    model = found.model
    check_equal(found, *names)
    for kept in (found.trace.keys, found.trace.values):
        check_places(kept, model, None, "data", "model")
    check_places(found.trace.residuals, model, None, "data")
    check_places(found.trace.hidden, model, "data")
    if names == ("trace",):
        return
    check_places(found.forward.captured["resid_post"], model, None, None, "data")
    for given in (found.forward.hidden, found.rerun.hidden, found.residuals, found.written.first.hidden):
        check_places(given, model, None, "data")


@pytest.mark.parametrize("name", ["llava-plain", pytest.param("mllama", marks=pytest.mark.slow)])
def test_rows_are_divided_where_prompts_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts on four devices: every device runs all prompts, of some of the rows."""
    case, seen, names = CASES[name], [], ("forward", "rerun") if name == "llava-plain" else ("rerun",)
    model = model_on(case, "data=4,model=2")

    def watched(function: Any, shared: Any, rows: Any) -> Any:
        seen.append(jax.tree.leaves(rows)[0].shape[0])
        return over_rows(function, shared, rows)

    for module in (jaxid.interp.forward, jaxid.interp.trace):
        monkeypatch.setattr(module, "over_rows", watched)
    found = Passes(model, prompts_of(case, 3))
    check_equal(found, "trace", *names)
    assert seen and set(seen) == {4 * -(-model.num_layers // 4)}  # as many rows on every device, some of them padding
    check_places(found.trace.keys, model, None, None, "model")
    for one in names:
        check_places(getattr(found, one).hidden, model)


def test_rows_are_dealt_by_their_first_layers() -> None:
    """So every device has as much to do; and results come back in the order of the rows."""
    start = jnp.asarray([5, 0, 3, 1, 7, 2, 6, 4])
    order = dealt(jnp.argsort(start), 4)
    np.testing.assert_array_equal(start[order].reshape(4, 2), [[0, 4], [1, 5], [2, 6], [3, 7]])
    np.testing.assert_array_equal(in_order(start[order], order), start)


@pytest.mark.parametrize(
    ("name", "text", "divided"),
    [
        ("llava-grouped-tied-linear-full-odd", "data=2,model=4", True),  # two heads of keys for four of queries
        ("llava-plain", "data=1,model=8", False),  # the four heads do not divide, only the MLPs' columns do
    ],
)
def test_heads_that_devices_do_not_divide(name: str, text: str, divided: bool) -> None:
    """Every device keeps the keys and values that its queries read; or attention is replicated."""
    case, heads = CASES[name], 4
    model = model_on(case, text)
    found = Passes(model, prompts_of(case, 2))
    check_equal(found, *(("trace", "written") if divided else ("trace",)))
    assert found.trace.keys.shape[2] == heads
    check_places(found.trace.keys, model, None, "data", "model" if divided else None)
    theirs = np.asarray(on_one(case, 2).trace.keys)
    assert (theirs.shape[2] == 2) == divided
    assert distance(found.trace.keys, np.repeat(theirs, heads // theirs.shape[2], axis=2)) < EXACT


def test_edits_may_lie_on_any_device() -> None:
    case = CASES["llava-plain"]
    passes, wanted = Passes(model_on(case, "data=4,model=2"), prompts_of(case, PROMPTS)), on_one(case, PROMPTS)
    elsewhere = jax.device_put(passes.edit, jax.devices()[7])
    assert distance(rerun(passes.model, passes.trace, elsewhere).hidden, wanted.rerun.hidden) < EXACT


@pytest.mark.slow
def test_gradients_on_a_mesh() -> None:
    """The slope of an answer with respect to an edit, with and without a program of the user's own around it."""
    case = CASES["llava-plain"]
    ours, theirs = Passes(model_on(case, "data=4,model=2"), prompts_of(case, PROMPTS)), on_one(case, PROMPTS)
    vector = jnp.asarray(np.random.default_rng(1).standard_normal(ours.model.width), jnp.float32)

    def slope(passes: Passes) -> Any:
        def answer(vector: Any) -> Any:
            edit = add(1, passes.at[:, :1], vector, 2.0)
            return rerun(passes.model, passes.trace, edit).logprobs([5])[..., 0].sum()

        return jax.grad(answer)

    assert ours.trace and theirs.trace
    wanted = slope(theirs)(vector)
    assert distance(slope(ours)(vector), wanted) < EXACT
    assert distance(jax.jit(slope(ours))(vector), wanted) < EXACT


DATA_FREE = ("_record", "_resume", "_run", "_residuals", "_prefill", "_answer_log_probs")


@over((), among=UNLIKE)
def test_decoders_unlike_others(case: Case, modules: Modules) -> None:
    """Passes over whole prompts attend head by head on CPUs, for which XLA gathers heads: their blocks do not count."""
    found = check_collectives(case, modules, EVERYTHING, counted=("_resume", "_prefill"))
    check_parameters(found.model, fixtures.model(case))
    check_sharded(found, *EVERYTHING)


@pytest.mark.slow
def test_little_crosses_devices_for_clips(modules: Modules) -> None:
    check_collectives(CASES["video-grid"], modules, ("trace",), counted=())


def test_little_crosses_devices(modules: Modules) -> None:
    """Two sums over "model" in every block, and nothing over "data"; and all passes are those of one device."""
    counted = ("_resume", "_prefill", "_record", "_residuals")
    found = check_collectives(CASES["llava-plain"], modules, EVERYTHING, counted)
    check_parameters(found.model, fixtures.model(CASES["llava-plain"]))
    check_sharded(found, *EVERYTHING)


def check_collectives(case: Case, modules: Modules, names: Sequence[str], counted: Sequence[str]) -> Passes:
    """Runs the passes and counts the collectives of their programs, of some in every block."""
    text, collectives = modules("hlo_text"), modules("hlo_collectives")
    model, prompts = model_on(case, "data=4,model=2"), prompts_of(case, PROMPTS)
    sizes, found = {"data": 4, "model": 2}, {}

    def compiled(program: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        mesh = meshes.of(arguments)
        if mesh is None:  # a program within another
            with programs.watched(None):
                return program(*arguments, **settings)
        with jax.set_mesh(mesh):
            made = program.jitted.lower(*arguments, **settings).compile()
        parsed = text.parse(made.as_text())
        crossing = collectives.of_program(parsed, sizes)
        per_block = collectives.in_one_step(parsed, sizes, axis="model")
        # Head by head is how CPUs attend, and XLA gathers some heads for it; accelerators run kernels.
        found[program.__name__] = (
            per_block,
            [one for one in crossing if "data" in one.axes and not one.function.startswith("_headwise")],
        )
        # What was static is no argument of a compiled program.
        static = {"definition", "chunk", "rows", "steps"} & set(program.options.get("static_argnames", ()))
        given = arguments[1:] if program.options else arguments
        return made(*given, **{name: value for name, value in settings.items() if name not in static})

    passes = Passes(model, prompts)
    with programs.watched(compiled):
        passes.values(names)
    assert set(found) >= ({*DATA_FREE, "_decode"} if names == EVERYTHING else {"_record"})
    across = {name: crossing for name, (_, crossing) in found.items() if crossing}
    assert set(across) <= {"_decode"}
    assert all(one.size <= 1 for one in across.get("_decode", []))  # whether all rows have ended
    blocks = {name: found[name][0] for name in counted}
    assert blocks == dict.fromkeys(blocks, 2)
    return passes
