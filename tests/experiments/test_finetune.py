"""Fine-tuning: what is trained, on what, with which loss; resumption after a kill; what is written and refused."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import fixtures
import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES, VOCABULARY
from forked import Child

from jaxid import meshes
from jaxid.checkpoints.loading import load
from jaxid.checkpoints.tensors import flatten
from jaxid.checks import check_values
from jaxid.cli import main
from jaxid.data.grid import FinetuneItem, GridItem, finetune_name, placements, read_finetune_folder
from jaxid.errors import CheckpointError, DataError, InputError, OutputError
from jaxid.experiments import finetune
from jaxid.experiments.finetune import FinetuneConfig
from jaxid.experiments.finetune_comparison import CompareFinetune
from jaxid.experiments.finetune_data import split_pairs, with_answers
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.nn.layers import Recompute
from jaxid.train import loop as training
from jaxid.train.trainable import Selection, choose, for_learning, tensors

CASE = CASES[0]
PAIRS = (("star", "fish"), ("cat", "star"), ("fish", "cat"))
QUICK = FinetuneConfig(
    steps=6,
    groups=2,
    batch_size=4,
    id_layer=1,
    learning_rate=1e-3,
    held_out=0.3,
    prompt="plain",
    case="lower",
    seed=3,
)


def model() -> Model:
    return fixtures.model(CASE)


def items(seed: int = 0) -> list[GridItem]:
    """Three pairs at a third of all placements, as noise."""
    rng = np.random.default_rng(seed)
    return [
        GridItem(
            picture=rng.integers(0, 256, (24, 24, 3), np.uint8),
            object_a=a,
            object_b=b,
            cell_a=cell_a,
            cell_b=cell_b,
            size=224,
        )
        for a, b in PAIRS
        for cell_a, cell_b in placements()
        if cell_a[0] == 1
    ]


@functools.cache
def ids() -> SpatialIDs:
    rng = np.random.default_rng(1)
    layers, width = model().num_layers, model().width
    return SpatialIDs(
        values=rng.standard_normal((layers, 1, 1, 4, 4, width)).astype(np.float32),
        counts=np.ones((1, 1, 4, 4), np.int32),
        objects=("star",),
        sizes=(224,),
        layer_names=tuple(f"blocks.{k}.resid_post" for k in range(layers)),
        model=model().name,
        fingerprint=model().fingerprint,
    )


# --- what is trained -------------------------------------------------------------------------------------------------


def slopes(definition: Any, chosen: Selection) -> dict[str, np.ndarray]:
    """Gradients of the chosen tensors on a small batch."""
    task = finetune.task(model(), items(), ids(), QUICK)
    batch = jax.tree.map(lambda leaf: leaf[0], finetune.step_batch(model(), task.groups, ids(), QUICK, 0))

    def loss(own: Any, batch: Any) -> Any:
        merged = chosen.merge(model().parameters, own)
        return finetune.loss(definition, merged, batch, id_layer=1, id_weight=1.0)[0]

    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(chosen.split(model().parameters), batch))


@functools.cache
def plain() -> dict[str, np.ndarray]:
    """Gradients of all tensors in the plain network."""
    every = choose(tensors(model().parameters, tied=False), ["all"], budget=1.0, vision_blocks=None)
    return slopes(model().definition, Selection.of(every))


@pytest.mark.parametrize(
    ("selectors", "recompute"),
    [("vision-mlp,projector", "nothing"), ("vision-mlp,projector", "all"), ("lm-mlp", "cheap"), ("all", "nothing")],
)
def test_skipped_backward_passes_change_nothing(selectors: str, recompute: Recompute) -> None:
    """Frozen and recomputed blocks: the same gradients as of the plain network."""
    every = tensors(model().parameters, tied=False)
    chosen = Selection.of(choose(every, selectors.split(","), budget=1.0, vision_blocks=1)[-6:])
    found = slopes(for_learning(model().definition, model().parameters, chosen, recompute=recompute), chosen)
    for name, rows in chosen.rows:
        expected = plain()[name] if rows is None else plain()[name][np.array(rows)]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7 + 1e-5 * np.abs(expected).max())


# --- data ------------------------------------------------------------------------------------------------------------


def test_groups_differ_in_the_second_cell_alone() -> None:
    groups = QUICK.grouped(items())
    assert len(groups) == 3 * 4 * 2
    for group in groups:
        (axis,) = {("horizontal", "vertical").index(question.axis) for question in group}
        own = [question.item for question in group]
        assert len({(item.object_a, item.cell_a, item.object_b) for item in own}) == 1
        assert len({item.cell_b for item in own}) == len(own) == 12
        assert all(item.cell_a[axis] != item.cell_b[axis] for item in own)


def test_held_out_pairs_are_whole_and_in_either_order() -> None:
    both = [*items(), *[dataclasses.replace(item, object_a=item.object_b, object_b=item.object_a) for item in items()]]
    train, held = split_pairs(both, 0.34, 0)
    pairs = [{frozenset((item.object_a, item.object_b)) for item in side} for side in (train, held)]
    assert [len(side) for side in pairs] == [2, 1] and not pairs[0] & pairs[1]
    assert len(train) + len(held) == len(both)
    with pytest.raises(DataError, match="3 pairs of objects, too few"):
        split_pairs(items(), 0.99, 0)


def test_batch_says_what_the_pictures_show() -> None:
    """The first object is the subject; the ID loss is on the second one, with the ID of its cell."""
    task = finetune.task(model(), items(), ids(), QUICK)
    assert {group[0].axis for group in task.groups} == {"horizontal", "vertical"}
    group = next(group for group in task.groups if group[0].axis == "vertical" and group[0].item.cell_a[1] == 2)
    chosen = [group[row] for row in (11, 7, 0)]
    batch = finetune.small_batch(model(), chosen, ids(), QUICK, 4)
    assert batch["weight"].tolist() == [1, 1, 1, 0]
    words = [model().processor.decode([int(label)]) for label in batch["labels"][:3, 0]]
    own = [question.item for question in chosen]
    truth = ["below" if item.cell_a[1] > item.cell_b[1] else "above" for item in own]
    assert words == truth and len(set(truth)) == 2
    for row, item in enumerate(own):
        np.testing.assert_array_equal(batch["target"][row], ids().universal[1][item.cell_b])
        told = np.asarray(batch["inputs"]["token_ids"])[row].tolist()
        names = [VOCABULARY.index(name) for name in (item.object_a, item.object_b)]
        assert told.index(names[0]) < told.index(names[1]) == batch["word"][row]
    # A pure function of seed and step.
    one, same, other = (finetune.step_batch(model(), task.groups, ids(), QUICK, step) for step in (4, 4, 5))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one["inputs"]["pixels"], other["inputs"]["pixels"])


def test_answers_of_several_tokens() -> None:
    prompts = model().prepare([items()[0].picture] * 2, ["Is the star above or below the fish?"] * 2)
    longer, positions, labels = with_answers(prompts, [[7, 8, 9], [5]])
    last = prompts.last()
    assert labels.tolist() == [[7, 8, 9], [5, -1, -1]]
    assert positions.tolist() == [[last[0], last[0] + 1, last[0] + 2], [last[1]] * 3]
    assert np.asarray(longer.inputs.token_ids)[0, last[0] + 1 : last[0] + 3].tolist() == [7, 8]
    assert not np.asarray(longer.inputs.valid)[1, last[1] + 1 :].any()
    logits = jax.random.normal(jax.random.key(0), (2, 3, 11))
    loss, _ = finetune.answer_loss(logits, jnp.asarray(labels), jnp.ones(2))
    table = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(
        loss, -(table[0, 0, 7] + table[0, 1, 8] + table[0, 2, 9] + table[1, 0, 5]) / 4, rtol=1e-5
    )


# --- loss and steps --------------------------------------------------------------------------------------------------


def test_id_loss_by_hand() -> None:
    activations = jnp.array([[1.0, 0.0], [3.0, 0.0], [50.0, 9.0]])
    targets = jnp.array([[-1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    # Of the first two alone: centred (-1, 0) and (1, 0); cosines 1 and 0.
    np.testing.assert_allclose(finetune.id_loss(activations, targets, jnp.array([1.0, 1.0, 0.0])), 0.5, atol=1e-6)
    equal = jnp.ones((3, 2))
    gradient = jax.grad(lambda x: finetune.id_loss(x, targets, jnp.ones(3)))(equal)
    assert np.isfinite(gradient).all()


def test_learning_rates() -> None:
    config = dataclasses.replace(QUICK, steps=100, warmup=0.1, learning_rate=2.0)
    for schedule, end in (("linear", 0.0), ("cosine", 0.0), ("constant", 2.0)):
        rate = dataclasses.replace(config, schedule=schedule).learning_rates()
        rates = np.array([np.asarray(rate(step)) for step in range(101)])
        np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-5)
        assert (np.diff(rates[10:]) <= 1e-6).all() and abs(rates[100] - end) < 1e-6


def test_a_step_that_is_not_finite_is_skipped() -> None:
    rule = training.skip_not_finite(finetune.optimizer(dataclasses.replace(QUICK, warmup=0.0)))
    update: Any = rule.update
    parameters = {"a": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):
        state: Any = rule.init(parameters)
        for value, moves in ((jnp.nan, False), (1.0, True), (jnp.inf, False), (jnp.nan, False), (1.0, True)):
            updates, new = update({"a": jnp.array([1.0, value, 1.0])}, state, parameters)
            assert bool((updates["a"] != 0).any()) == moves
            if not moves:
                jax.tree.map(np.testing.assert_array_equal, new.inner_state, state.inner_state)
            state = new


def test_bfloat16_with_float32_copies(tmp_path: Path) -> None:
    """Small steps add up in the copies, though each is below what the model's own format can tell."""
    small = dataclasses.replace(QUICK, steps=4, learning_rate=1e-5, warmup=0.0, schedule="constant")
    half = dataclasses.replace(fixtures.model(CASE, "bfloat16"), fingerprint=model().fingerprint)
    task = finetune.task(half, items(), ids(), small)
    start = task.selection.split(half.parameters)
    columns = ("step", "stage", "loss", "answer_loss", "id_loss", "accuracy")
    with jax.numpy_dtype_promotion("standard"):
        found: Any = training.fit(tmp_path, start, [task.stage()], columns=columns, progress=False, mesh=meshes.mesh(1))
    for name, leaf in found.items():
        assert leaf.dtype == np.float32
        assert np.abs(np.asarray(leaf) - np.asarray(start[name], np.float32)).max() > 1e-6, name
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(task.model_with(found).parameters))


# --- runs ------------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> Path:
    """Pictures, IDs and model of a run."""
    from PIL import Image

    (folder / "data").mkdir(parents=True)
    for item in items():
        name = FinetuneItem(object_a=item.object_a, object_b=item.object_b, cell_a=item.cell_a, cell_b=item.cell_b)
        Image.fromarray(np.asarray(item.picture)).save(folder / "data" / finetune_name(name))
    ids().save(folder / "ids.safetensors")
    return folder


def command(folder: Path, out: str, *further: str) -> list[str]:
    """A short run; further options take the place of its own."""
    options = {
        **{"--model": str(fixtures.folder(CASE)), "--data": str(folder / "data"), "--out": str(folder / out)},
        **{"--ids": str(folder / "ids.safetensors"), "--id-layer": "1", "--prompt": "plain", "--case": "lower"},
        **{"--held-out": "0.3", "--batch-size": "4", "--questions": "12", "--steps": "6", "--check-every": "2"},
        "--save-every": "2",
    }
    flags, rest = [], list(further)
    while rest:
        name = rest.pop(0)
        if rest and not rest[0].startswith("--"):
            options[name] = rest.pop(0)
        else:
            flags.append(name)
    return ["finetune", *(part for option in options.items() for part in option), *flags]


def process(folder: Path, arguments: list[str]) -> Child:
    """A process that runs a command."""
    settings = {"XLA_FLAGS": os.environ["XLA_FLAGS"], "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    return forked.begin(forked.command, arguments, told=folder / "told", environment=settings)


def ran(arguments: list[str]) -> str:
    """What a command that succeeds prints, in this process."""
    printed = io.StringIO()
    with (
        jax.numpy_dtype_promotion("standard"),
        contextlib.redirect_stdout(printed),
        pytest.raises(SystemExit) as ended,
    ):
        main(arguments)
    assert ended.value.code == 0
    return printed.getvalue()


LONGER = ["--steps", "12", "--groups", "3", "--learning-rate", "1e-3", "--seed", "3", "--mesh", "data=1"]
LONGER += ["--record-every", "1", "--check-every", "4", "--save-every", "4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with data and a run in `run`, and what the run printed."""
    folder = write_data(tmp_path_factory.mktemp("whole"))
    return folder, ran(command(folder, "run", "--tensorboard", *LONGER))


def test_training_moves_what_is_chosen_and_nothing_else(whole: tuple[Path, str]) -> None:
    before, after = flatten(model().parameters), flatten(load(whole[0] / "run" / "model").parameters)
    task = finetune.task(model(), items(), ids(), QUICK)
    rows = dict(task.selection.rows)
    for path, leaf in before.items():
        same = np.asarray(after[path]) == np.asarray(leaf)
        if path not in rows:
            assert same.all(), path
        else:
            moved = ~same.reshape(len(leaf), -1).all(axis=1)
            assert moved.all() if rows[path] is None else set(np.flatnonzero(moved)) == set(rows[path] or ()), path
    values = [float(row["loss"]) for row in training.read_metrics(whole[0] / "run" / "metrics.csv")]
    assert len(values) == 12 and np.mean(values[-3:]) < np.mean(values[:3])
    # Adam's two moments of what is trained, and counters: nothing of what is frozen.
    state = jax.eval_shape(task.stage().optimizer.init, task.selection.split(model().parameters))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) <= 2 * task.trained + 10


def test_a_run_and_what_it_leaves(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = whole
    assert "held-out pairs:" in out and "parameters trained" in out
    for name in ("metrics.csv", "evaluations.csv", "metrics.json", "summary.json", "curves.png", "model/config.json"):
        assert (folder / "run" / name).stat().st_size > 50, name
    assert any((folder / "run" / "tensorboard").iterdir())
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert [row["step"] for row in summary["evaluations"]] == [0, 4, 8, 12]
    assert 0 < summary["trained_share"] <= 0.3
    assert load(folder / "run" / "model").fingerprint != model().fingerprint
    assert len(read_finetune_folder(folder / "data")) == len(items())
    # Beside a run without the ID loss, which answered otherwise.
    last = summary["evaluations"][-1]
    right = last["held_out_questions"] - last["held_out_right"]
    last |= {"held_out": right / last["held_out_questions"], "held_out_right": right}
    summary["config"]["id_weight"] = 0.0
    (folder / "other").mkdir()
    (folder / "other" / "summary.json").write_text(json.dumps(summary))
    ran(["compare-finetune", str(folder / "run"), str(folder / "other"), "--out", str(folder / "both")])
    found = json.loads((folder / "both" / "comparison.json").read_text())["held_out"]
    paired = found["with_ids - without_ids"]["mean"]
    assert paired == pytest.approx(found["with_ids"]["mean"] - found["without_ids"]["mean"])
    assert (folder / "both" / "comparison.png").stat().st_size > 10_000
    # Other settings do not resume a run; a model is never written over.
    with pytest.raises(SystemExit) as ended:
        main(command(folder, "run", *LONGER, "--learning-rate", "0.5"))
    assert ended.value.code == 2
    assert "other settings: learning rate was 0.001, is now 0.5. Repeat those" in capsys.readouterr().err
    from jaxid.checkpoints.export import export

    with pytest.raises(OutputError, match="would overwrite the checkpoint"):
        export(model(), fixtures.folder(CASE))


def test_killed_and_resumed_equals_undisturbed(whole: tuple[Path, str]) -> None:
    folder, arguments = whole[0], command(whole[0], "killed", *LONGER)
    killed = process(folder, arguments)
    while not any(path.name.isdigit() for path in (folder / "killed" / "state").glob("*")):
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL and not (folder / "killed" / "summary.json").exists()
    ran(arguments)
    for name in ("metrics.csv", "evaluations.csv"):
        assert (folder / "run" / name).read_text() == (folder / "killed" / name).read_text()
    ours, theirs = (load(folder / name / "model").parameters for name in ("run", "killed"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"batch_size": 1}, "batches of 2 or more"),
        ({"warmup": 1.0}, "warmup is a share below 1"),
        ({"held_out": -0.1}, "held_out must be 0 or more"),
        ({"held_out": 1.0}, "held_out is a share below 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"id_weight": -1.0}, "id_weight must be 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, not nan"),
        ({"id_weight": float("inf")}, "id_weight must be a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"clip_norm": float("inf")}, "clip_norm must be a finite number"),
        ({"warmup": float("nan")}, "warmup must be a finite number"),
        ({"budget": float("nan")}, "budget must be a finite number"),
        ({"budget": 1.5}, "budget must be at most 1"),
        ({"budget": 0.0}, "budget must be above 0"),
        ({"vision_blocks": 0}, "vision_blocks must be 1 or more"),
        ({"id_layer": -1}, "id_layer must be 0 or more"),
        ({"seed": -5}, "the seed must be an integer from 0"),
        ({"seed": 10**20}, "the seed must be an integer from 0"),
        ({"prompt": "What?"}, "does not contain {query}"),
        ({"prompt": "<image>{query}"}, "leave out <image>"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        dataclasses.replace(QUICK, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "steps"}, "schedule is one of linear, cosine, constant, not 'steps'"),
        ({"case": "both"}, "case is one of lower, capital, not 'both'"),
        ({"recompute": "some"}, "recompute is one of nothing, cheap, all"),
    ],
)
def test_choices_that_do_not_exist(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_values(FinetuneConfig, change)  # what its constructor calls: here, types are checked before that


def test_options_that_are_not_given_follow_the_model() -> None:
    found = finetune.resolved(FinetuneConfig(), dataclasses.replace(model(), name="tiny-llava"))
    layer = round(10 * model().num_layers / 28)
    assert (found.id_layer, found.prompt, found.case, found.groups) == (layer, "plain", "lower", 2)
    other = finetune.resolved(FinetuneConfig(id_layer=0, groups=5, case="capital"), model())
    assert (other.id_layer, other.prompt, other.case, other.groups) == (0, "published", "capital", 5)
    assert finetune.resolved(other, model()) == other


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="id_layer 9 is out of range"):
        finetune.task(model(), items(), ids(), dataclasses.replace(QUICK, id_layer=9))
    with pytest.raises(InputError, match="no tensor of lm-mlp fits"):
        finetune.task(model(), items(), ids(), dataclasses.replace(QUICK, train="lm-mlp", budget=1e-6))
    with pytest.raises(DataError, match="nothing to train on"):
        finetune.task(model(), items()[:1], ids(), QUICK)
    other = dataclasses.replace(ids(), fingerprint="another")
    with pytest.raises((InputError, CheckpointError), match="another"):
        finetune.task(model(), items(), other, QUICK)
    (tmp_path / "star_0-0_fish.png").write_bytes(b"")
    with pytest.raises(DataError, match="does not name a fine-tuning picture"):
        read_finetune_folder(tmp_path)
    with pytest.raises(DataError, match="holds no finished fine-tuning run"):
        CompareFinetune((tmp_path,), out=tmp_path).run()
