"""Training resumes exactly after a kill, and its packed texts equal separate prompts."""

import csv
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xla_flags import OLDER_EMITTERS

from jaxid.checkpoints.loading import load
from jaxid.errors import InputError, OutputError
from jaxid.interp.forward import forward
from jaxid.train import loop
from jaxid.zoo import clip_evaluation, clip_training, llava_texts, recipes, training, video_training
from jaxid.zoo import tiny_llava as recipe
from jaxid.zoo.export import write_llava
from jaxid.zoo.recipes import Weak, balanced_cross_entropy, cross_entropy, limited
from jaxid.zoo.training import TrainingConfig

DEFINITION = nnx.graphdef(nnx.eval_shape(lambda: training.Learner(rngs=nnx.Rngs(0))))
TINY = TrainingConfig(
    sight_steps=20,
    sight_batch_size=4,
    binding_steps=20,
    binding_batch_size=4,
    steps=20,
    batch_size=4,
    warmup_steps=4,
)
SHORT = dataclasses.replace(TINY, sight_steps=4, binding_steps=4, steps=4, warmup_steps=2)

SCRIPT = f"""
import sys, time
from pathlib import Path
import jax, numpy as np
from jaxid.zoo import tiny_llava, training

config = training.{SHORT!r}
missing = int(sys.argv[1])

def before(drawn):
    def batch(seed, step, *further, **named):
        assert name != "again.npz", "a finished run is trained again"
        while step == missing and Path(sys.argv[-1]) == folder:
            time.sleep(1)
        return drawn(seed, step, *further, **named)
    return batch

tiny_llava.sight_batch = before(tiny_llava.sight_batch)
tiny_llava.training_batch = before(tiny_llava.training_batch)
for folder in map(Path, sys.argv[2:]):
    for name in ("parameters.npz", "again.npz"):
        if not (folder / name).exists():
            parameters = training.RECIPE.train(folder, config, save_every=2, progress=False, export=False)
            np.savez(folder / name, *jax.tree.leaves(parameters))
"""


def start(*folders: Path, missing: int = -1) -> subprocess.Popen[bytes]:
    """Starts training runs on two devices in a separate process, one after the other.

    In the last one, the batch of step `missing` never comes: the process waits for it until it is killed.
    """
    # Optax is not written for strict promotion. The processes compile the same programs, which take most of the time.
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {OLDER_EMITTERS}",
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folders[0].parent / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(missing), *map(str, folders)], env=environment)


def saved_steps(folder: Path) -> set[int]:
    """Steps whose state is completely on disk."""
    state = folder / "state"
    return {int(path.name) for path in state.iterdir() if path.name.isdigit()} if state.is_dir() else set()


def kill_after(*folders: Path, step: int) -> None:
    """Runs until the last folder has the state of a step, and its process has done one more; then kills it."""
    process = start(*folders, missing=step + 1)
    while step not in saved_steps(folders[-1]):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folders[-1] / "parameters.npz").exists()


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    kill_after(undisturbed, killed, step=6)
    assert SHORT.sight_steps < max(saved_steps(killed)) < SHORT.sight_steps + SHORT.binding_steps
    assert start(killed).wait() == 0
    with np.load(undisturbed / "parameters.npz") as whole, np.load(killed / "parameters.npz") as resumed:
        assert whole.files == resumed.files and len(whole.files) > 20
        for name in whole.files:
            np.testing.assert_allclose(resumed[name], whole[name], rtol=0, atol=1e-6)
    whole_rows, resumed_rows = (read_metrics(folder / "metrics.csv") for folder in (undisturbed, killed))
    assert [(row["step"], row["stage"]) for row in whole_rows] == [
        ("4", "seeing"),
        ("8", "binding"),
        ("12", "language"),
    ]
    assert resumed_rows == whole_rows
    # A finished run is not trained again, and its state is that of the last step.
    assert max(saved_steps(killed)) == 12
    with np.load(killed / "again.npz") as again, np.load(killed / "parameters.npz") as resumed:
        for name in resumed.files:
            np.testing.assert_array_equal(again[name], resumed[name])


@pytest.mark.slow
def test_the_first_state_that_knows_enough_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured after every second step of the second stage; which state it is does not depend on what is learned."""
    monkeypatch.setattr(recipes, "WEAK_EVERY", 2)
    shares = iter([0.2, 0.7, 0.9])
    weak = Weak[TrainingConfig](after=lambda _: 3, share=lambda _: next(shares), least=lambda config: config.weak_share)

    def shrinking(parameters: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = sum((jnp.square(leaf).sum() for leaf in jax.tree.leaves(parameters)), jnp.zeros(()))
        return loss, {"loss": batch["loss"].sum()}

    def stages(_: nnx.GraphDef, config: TrainingConfig) -> list[loop.Stage]:
        def stage(name: str, steps: int) -> loop.Stage:
            optimizer = config.optimizer(config.learning_rate, steps, weight_decay=0.0)
            return loop.Stage(name, 0, steps, shrinking, lambda _: {"loss": np.ones(8, np.float32)}, optimizer)

        return recipes.in_turn([stage("seeing", 3), stage("language", 7)])

    kept = dataclasses.replace(training.RECIPE, stages=stages, weak=weak, finish=lambda *_: None)
    config = dataclasses.replace(SHORT, weak_share=0.65)
    with jax.numpy_dtype_promotion("standard"):
        kept.train(tmp_path, config, progress=False)
    assert json.loads((tmp_path / "weak.json").read_text()) == {"step": 6, "share": 0.7}
    assert next(shares) == 0.9  # later states are not measured
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "model-weak")]
    assert weights[0] != weights[1] and not (tmp_path / "model-trial").exists()


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 21}, {"learning_rate": 1e-3}, {"patch_weight": 0.0}])
def test_a_folder_of_another_run_is_refused(tmp_path: Path, change: dict[str, float]) -> None:
    settings = dataclasses.asdict(dataclasses.replace(TINY, **change)) | {"vocabulary": len(llava_texts.VOCABULARY)}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    name = next(iter(change))
    with pytest.raises(OutputError, match=f"other settings: {name.replace('_', ' ')} was {change[name]}, is now"):
        training.RECIPE.train(tmp_path, TINY, progress=False)
    assert json.loads((tmp_path / "run.json").read_text()) == settings
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_metrics_of_undone_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for step, loss in [(20, 3.0), (40, 2.0), (60, 1.0), (40, 2.5)]:
        loop.append_metrics(path, training.RECIPE.columns, {"step": step, "stage": "seeing", "loss": loss})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [("20", "3.0"), ("40", "2.5")]
    assert tuple(read_metrics(path)[0]) == training.RECIPE.columns


def test_stages_follow_each_other_on_their_own_data() -> None:
    sight, binding, language = training.stages(DEFINITION, TINY)
    assert [(stage.first, stage.steps) for stage in (sight, binding, language)] == [(0, 20), (20, 20), (40, 20)]
    np.testing.assert_array_equal(sight.batch(3)["patches"], recipe.sight_batch(0, 3, 4).patches)
    expected = recipe.training_batch(0, 23, 4, stage="binding")
    np.testing.assert_array_equal(binding.batch(23)["token_ids"], expected.token_ids)
    np.testing.assert_array_equal(language.batch(43)["token_ids"], recipe.training_batch(0, 43, 4).token_ids)
    steps = [step for step, batch in loop.batches(language, 57) if batch["token_ids"].shape == (4, 182)]
    assert steps == [57, 58, 59]


RECIPES = (training.TrainingConfig, clip_training.TrainingConfig, video_training.TrainingConfig)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__module__)
def test_limits_hold_in_every_stage(recipe: Any) -> None:
    whole = recipe()
    assert limited(whole, None, None) == whole == limited(whole, 10**6, None)
    short = limited(whole, 4, 16)
    for field in dataclasses.fields(recipe):
        old, new = getattr(whole, field.name), getattr(short, field.name)
        if field.name.endswith("batch_size"):
            assert new == 16
        else:
            counts = field.name.endswith("steps") and field.name != "warmup_steps"
            assert new == (4 if counts else old), field.name
    if recipe is not clip_training.TrainingConfig:
        learner = training.Learner if recipe is training.TrainingConfig else video_training.Learner
        module = training if recipe is training.TrainingConfig else video_training
        made = module.stages(nnx.graphdef(nnx.eval_shape(lambda: learner(rngs=nnx.Rngs(0)))), short)
        assert [(stage.first, stage.steps) for stage in made] == [(4 * row, 4) for row in range(len(made))]


@pytest.mark.parametrize("kind", clip_evaluation.SCORERS)
@pytest.mark.parametrize("steps", [1, 4, 249, 250, 251, 4999, 10**6])
def test_a_scorer_has_at_most_so_many_steps(steps: int, kind: Literal["mlp", "cnn"]) -> None:
    config, whole = clip_evaluation.scorer_config(kind, 0), clip_evaluation.SCENES
    short, scenes = clip_evaluation.scorer_size(config, steps)
    done = short.epochs * -(-scenes // short.batch_size)
    assert 1 <= done <= steps and done > 0.5 * min(steps, config.epochs * whole // config.batch_size)
    assert clip_evaluation.scorer_size(config, None) == (config, whole)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__module__)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -5}, "seed"),
        ({"seed": 10**20}, "seed"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"clip_norm": float("inf")}, "clip_norm must be a finite number"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"steps": -1}, "steps must be 0 or more"),
    ],
)
def test_recipes_out_of_range(recipe: Any, change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(**change)
    with pytest.raises(InputError, match="at least one step"):
        recipe(**{field.name: 0 for field in dataclasses.fields(recipe) if field.name.endswith("steps")})


def test_weight_decay_acts_on_block_matrices_alone() -> None:
    """Without gradients, only tensors with weight decay change."""
    optimizer = dataclasses.replace(TINY, warmup_steps=0).optimizer(0.1, 10, weight_decay=0.5)
    parameters = {"block": jnp.ones((3, 2, 2)), "embedding": jnp.ones((3, 2)), "norm": jnp.ones((3,))}
    nothing = jax.tree.map(jnp.zeros_like, parameters)
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
        updates: Any = optimizer.update(nothing, optimizer.init(parameters), parameters)[0]
    np.testing.assert_allclose(updates["block"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(updates["embedding"], 0)
    np.testing.assert_array_equal(updates["norm"], 0)


def test_cross_entropy_by_hand() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]]))
    loss, accuracy = cross_entropy(logits, jnp.array([0, 1, -1]))
    np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.1)) / 2, rtol=1e-5)
    np.testing.assert_allclose(accuracy, 0.5)
    nothing = cross_entropy(logits, jnp.array([-1, -1, -1]))
    np.testing.assert_array_equal(nothing, (0, 0))
    # The target of the second class is half the third class.
    table = jnp.array([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 1]])
    loss, accuracy = cross_entropy(logits, jnp.array([-1, -1, 1]), table)
    np.testing.assert_allclose(loss, -(np.log(0.6) + np.log(0.2)) / 2, rtol=1e-5)
    np.testing.assert_allclose(accuracy, 1.0)


def test_objects_and_background_have_equal_weight() -> None:
    """One place of four shows an object."""
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]))
    labels = jnp.array([1, 0, 0, 0])
    loss, accuracy = balanced_cross_entropy(logits, labels, labels > 0)
    np.testing.assert_allclose(loss, -np.log(0.5) - np.log([0.9, 0.8, 0.7]).mean(), rtol=1e-5)
    np.testing.assert_allclose(accuracy, 0.0)


@pytest.mark.slow
def test_packed_texts_are_seen_as_prompts_of_their_own(tmp_path: Path) -> None:
    """The loss of a packed row equals that of its texts as separate prompts of the exported network."""
    learner = training.Learner(rngs=nnx.Rngs(3))
    parameters = jax.device_get(nnx.to_pure_dict(nnx.state(learner.network)))
    write_llava(
        tmp_path,
        recipe.config(),
        parameters,
        vocabulary=llava_texts.VOCABULARY,
        chat_template=recipe.CHAT_TEMPLATE,
        mean=recipe.PIXEL_MEAN,
        std=recipe.PIXEL_STD,
    )
    batch = recipe.training_batch(5, 0, 1)
    # An answer is followed by the end token, and words for places by theirs, which no separate prompt asks for.
    others = [llava_texts.word_label("</s>"), *map(llava_texts.region_label, llava_texts.REGIONS)]
    labels = np.where(np.isin(batch.labels, others), -1, batch.labels)
    arrays = jax.tree.map(jnp.asarray, training._arrays(dataclasses.replace(batch, labels=labels)))
    plan = recipe.layout()
    _, metrics = jax.jit(lambda arrays: training.language_loss(learner, arrays, TINY, plan=plan))(arrays)

    model, losses, kinds = load(tmp_path), [], recipe.SLOTS["language"]
    starts = plan.text_start + np.cumsum([0, *(recipe.LENGTHS[kind] for kind in kinds)])
    wanted = llava_texts.targets(TINY.blur)
    for alone, chat in itertools.product((False, True), repeat=2):
        texts, answers = [], []
        for kind, (first, end) in zip(kinds, itertools.pairwise(starts), strict=True):
            (asked,) = np.flatnonzero(labels[0, first:end] >= 0)
            words = batch.token_ids[0, first : first + asked + 1]
            text = " ".join(llava_texts.VOCABULARY[index] for index in words)
            if text.endswith("ASSISTANT :") == chat and kind.endswith("alone") == alone:
                texts.append(text.removesuffix(" ASSISTANT :").removeprefix(f"{recipe.BEFORE} "))
                answers.append(labels[0, first + asked])
        if not texts:
            continue
        # Padding, and the same number of texts, make few shapes and so few programs.
        prompts = model.prepare(None if alone else batch.pictures[0], (6 * texts)[:6], chat=chat, pad_to_multiple=64)
        logprobs = np.asarray(forward(model, prompts).logprobs(np.arange(llava_texts.VOCABULARY_SIZE)))
        losses += (-(wanted[answers] * logprobs[: len(texts)]).sum(axis=1)).tolist()
    assert len(losses) == len(kinds)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4)
