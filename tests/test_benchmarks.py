"""The benchmarks: fair timing, a comparison that fails if systems differ, and whole runs of the scripts."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from benchmark_files import BENCHMARKS, Modules
from flax import nnx
from xla_flags import OLDER_EMITTERS

from jaxid.families.llava import Llava
from jaxid.zoo import llava_texts, tiny_llava
from jaxid.zoo.export import write_llava

SYSTEMS = ("published", "strongest", "rewritten", "nnsight")
WORKS = ("control", "steering", "belief_swap", "swaps", "extraction")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA checkpoint of three layers with random weights."""
    full = tiny_llava.config()
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 64, "head_dim": 16}
    text = dataclasses.replace(full.text_config, **sizes)
    config = dataclasses.replace(full, text_config=text)
    shapes = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: Llava(config, rngs=nnx.Rngs(0))))[1])
    rng = np.random.default_rng(0)

    def draw(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1.0 if path[-1].key == "scale" else 0.0
        return (around + 0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)

    parameters = jax.tree_util.tree_map_with_path(draw, shapes)
    path = tmp_path_factory.mktemp("models") / "random-llava"
    write_llava(
        path,
        config,
        parameters,
        vocabulary=llava_texts.VOCABULARY,
        chat_template=tiny_llava.CHAT_TEMPLATE,
        mean=tiny_llava.PIXEL_MEAN,
        std=tiny_llava.PIXEL_STD,
    )
    return path


def three_systems(perturbation: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    values = np.log(np.linspace(0.1, 0.9, 12, dtype=np.float32)).reshape(3, 2, 2)
    return {
        "published": {"control": values[0], "steered": values + perturbation},
        "batched": {"control": values[0], "steered": values},
        "jaxid": {"control": values[0], "steered": values},
    }


def perturbed(value: float) -> np.ndarray:
    change = np.zeros((3, 2, 2), np.float32)
    change[2, 0, 1] = value
    return change


def test_agreement_gives_the_largest_difference(modules: Modules) -> None:
    interventions = modules("interventions")
    assert interventions.check_agreement("steering", three_systems(perturbed(0.0))) == 0.0
    found = interventions.check_agreement("steering", three_systems(perturbed(5e-5)))
    assert found == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize("change", [2e-4, -2e-4, np.nan, np.inf, -np.inf])
def test_one_perturbed_value_is_a_disagreement(modules: Modules, change: float) -> None:
    interventions = modules("interventions")
    with pytest.raises(interventions.Disagreement, match=r"steering: steered of published .* at \(2, 0, 1\)"):
        interventions.check_agreement("steering", three_systems(perturbed(change)))


def test_other_shapes_and_quantities_are_disagreements(modules: Modules) -> None:
    interventions = modules("interventions")
    results = three_systems(perturbed(0.0))
    broadcastable = results | {"batched": results["batched"] | {"control": results["batched"]["control"][:1]}}
    with pytest.raises(interventions.Disagreement, match=r"control of batched has shape \(1, 2\)"):
        interventions.check_agreement("steering", broadcastable)
    with pytest.raises(interventions.Disagreement, match="batched gives"):
        interventions.check_agreement("steering", results | {"batched": {"steered": np.zeros(1)}})


def test_states_are_compared_by_their_scale_and_edits_by_index(modules: Modules) -> None:
    interventions = modules("interventions")
    states = np.full((2, 3, 4), 50.0, np.float32)
    found = interventions.check_agreement("extraction", {"a": {"states": states + 4e-3}, "jaxid": {"states": states}})
    assert found == pytest.approx(8e-5, rel=0.1)
    edited = np.arange(10, dtype=np.float32).reshape(5, 2, 1)
    some = {"a": {"edited": edited[[1, 4]]}, "jaxid": {"edited": edited}}
    assert interventions.check_agreement("steering", some, edits={"a": [1, 4]}) == 0
    with pytest.raises(interventions.Disagreement):
        interventions.check_agreement("steering", some, edits={"a": [1, 3]})


def test_operations_by_hand(modules: Modules) -> None:
    """A block of width 2, one head of 2, MLP of 3: every product written out."""
    text = SimpleNamespace(
        hidden_size=2, head_dim=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=3, vocab_size=5
    )
    text.num_hidden_layers = 4
    config, flops = SimpleNamespace(text_config=text), modules("flops")
    projections = 2 * 2 * 2
    keys, queries, context = 7, 3, 11
    by_hand = 2 * keys * projections + queries * (2 * projections + 3 * 2 * 2 * 3) + context * 2 * (2 * 2)
    assert flops.block(config, keys, queries, context) == by_hand
    last = flops.block(config, 3, 1, 10 + 3) + 2 * 2 * 5
    assert flops.edit(config, 3, prefix=10, suffix=3) == last
    assert flops.edit(config, 1, prefix=10, suffix=3) == last + 2 * flops.block(config, 3, 3, 3 * 10 + 6)
    assert flops.edit(config, 4, prefix=10, suffix=3) == 2 * 2 * 5


def test_systems_take_turns_and_the_first_call_is_separate(modules: Modules) -> None:
    timing = modules("timing")
    now, calls = [0.0], []
    durations = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([4.0, 3.0, 3.0, 3.0])}

    def system(name: str) -> Callable[[], int]:
        def call() -> int:
            now[0] += next(durations[name])
            calls.append(name)
            return len(calls)

        return call

    timed = timing.side_by_side({"a": system("a"), "b": system("b")}, 3, clock=lambda: now[0])
    assert calls == ["a", "b"] * 4
    assert timed["a"].rounds == (1.0, 5.0, 2.0)
    assert (timed["a"].first, timed["a"].median, timed["a"].warm_up) == (9.0, 2.0, 7.0)
    assert (timed["b"].median, timed["b"].warm_up, timed["b"].result) == (3.0, 1.0, 8)


def test_a_median_needs_three_rounds(modules: Modules) -> None:
    with pytest.raises(ValueError, match="3 or more rounds, not 2"):
        modules("timing").side_by_side({"a": lambda: None}, 2)


def test_hooks_refuse_what_is_not_a_bare_tensor(modules: Modules) -> None:
    import torch

    published = modules("published")
    good = torch.zeros(2, 5, 4)
    assert published.bare_tensor(good) is good
    for output in ((good,), good[0]):
        with pytest.raises(published.HookError, match="transformers 5"):
            published.bare_tensor(output)


@pytest.mark.slow
def test_one_by_one_equals_batched_on_padded_prompts(modules: Modules, folder: Path) -> None:
    import torch

    published = modules("published")
    network = published.load(folder)
    picture = llava_texts.encode("<s> USER :" + 36 * " <image>")
    texts = ["Is the star above or below the fish ? ASSISTANT :", "Where is the moon ? ASSISTANT :"]
    rows = [picture + llava_texts.encode(text) for text in texts]
    longest = max(map(len, rows))
    rng = np.random.default_rng(0)
    batch = published.Batch(
        token_ids=torch.tensor([row + [3] * (longest - len(row)) for row in rows]),
        valid=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        pixels=torch.from_numpy(rng.standard_normal((2, 3, 72, 72)).astype(np.float32)),
        last=torch.tensor([len(row) - 1 for row in rows]),
        answers=torch.tensor([10, 20]),
    )
    assert len(rows[0]) != len(rows[1])
    at = torch.tensor([[40, 42], [41, 43]])
    vectors = torch.from_numpy(rng.standard_normal((2, 2, 48)).astype(np.float32))
    edits = [
        published.Edit(layer=layer, positions=at, vectors=scale * vectors, strength=strength)
        for layer, scale, strength in itertools.product(range(3), (1.0, 7.0), (None, 2.0))
    ]
    clean, edited = published.batched(network, batch, edits)
    for mine, other in zip(published.one_by_one(network, batch, edits), (clean, edited), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)
    # By layer, scale and strength. A word's edit acts except after the last layer, where nothing reads it; the vectors'
    # own length matters unless they are rescaled.
    edited = edited.reshape(3, 2, 2, 2, 2)
    assert (np.abs(edited[:2] - clean).max(axis=-1) > 1e-3).all()
    np.testing.assert_allclose(edited[2], np.broadcast_to(clean, edited[2].shape), atol=1e-6)
    np.testing.assert_allclose(edited[:, 0, 1], edited[:, 1, 1], atol=1e-4)
    assert (np.abs(edited[:2, 0, 0] - edited[:2, 1, 0]).max(axis=-1) > 1e-3).all()


def start(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # Eight simulated devices would share the threads that the benchmark gives to one device.
    environment = os.environ | {"XLA_FLAGS": OLDER_EMITTERS}
    # Waiting threads sleep: times do not matter here, and other tests may run on the same cores.
    environment["OMP_WAIT_POLICY"] = "passive"
    environment["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"  # optax mixes dtypes
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
def test_quick_run_writes_every_figure(folder: Path, tmp_path: Path) -> None:
    script = str(BENCHMARKS / "interventions.py")
    process = start([script, "--quick", "--models", str(folder), "--out", str(tmp_path)])
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "interventions.json").read_text())
    systems = [name for name in SYSTEMS if name != "nnsight" or importlib.util.find_spec("nnsight")]
    names = {"jaxid_s", "compile_s", "peak_fraction", "flop_bound"}
    names |= {f"{system}_s" for system in systems} | {f"ratio_{system}" for system in systems}
    costs = {f"steering/random-llava/cost_per_edit_{count}" for count in (1, 8)}
    assert set(figures) == {f"{work}/random-llava/{name}" for work in WORKS for name in names} | costs
    assert min(figures.values()) > 0
    for work in WORKS:
        for system in systems:
            ratio = figures[f"{work}/random-llava/{system}_s"] / figures[f"{work}/random-llava/jaxid_s"]
            assert figures[f"{work}/random-llava/ratio_{system}"] == pytest.approx(ratio)
        assert f"{work}  " in process.stdout
    for part in ("machine ", "threads   2 each", "transformers 5.", "GFLOP/s"):
        assert part in process.stdout


@pytest.mark.slow
def test_systems_that_disagree_end_the_run_without_a_result(folder: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import interventions, published\n"
        "right = published.log_probs\n"
        "published.log_probs = lambda *arguments: right(*arguments) + 1e-3\n"
        f"sys.exit(interventions.main(['--quick', '--models', {str(folder)!r}, '--out', {str(tmp_path)!r}]))"
    )
    process = start(["-c", program])
    assert process.returncode == 1
    assert "error: the systems do not agree" in process.stderr
    assert "control of published" in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    process = start([str(BENCHMARKS / "interventions.py"), "--models", "/nowhere", "--out", str(tmp_path)])
    assert process.returncode == 2
    assert process.stderr.startswith("error: no model folder at /nowhere")


# --- training -------------------------------------------------------------------------------------------------------


def two_runs(**changes: float) -> dict[str, dict[str, dict[str, float | np.ndarray]]]:
    """Results of two systems' first steps; `changes` are added to those of jaxid."""
    found = {
        "losses": {"loss": 2.0},
        "tensors": {"weight": np.full((2, 3), 0.5, np.float32)},
        "gradients": {"weight": np.full((2, 3), 1e-3, np.float32)},
    }
    other = {kind: {name: value + changes.get(kind, 0.0) for name, value in own.items()} for kind, own in found.items()}
    return {"torch": found, "jaxid": other}


def test_agreement_of_training_steps(modules: Modules) -> None:
    training = modules("training")
    largest = training.check_agreement(two_runs(losses=1e-5, tensors=4e-6, gradients=5e-8), "torch")
    assert largest == pytest.approx({"losses": 5e-6, "tensors": 4e-6, "gradients": 5e-5}, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "change"), [("losses", 3e-5), ("tensors", 2e-5), ("gradients", -2e-6), ("tensors", np.nan)]
)
def test_another_training_step_is_a_disagreement(modules: Modules, kind: str, change: float) -> None:
    training, interventions = modules("training"), modules("interventions")
    with pytest.raises(interventions.Disagreement, match=f"{kind}: .* of jaxid is"):
        training.check_agreement(two_runs(**{kind: change}), "torch")
    lacking = two_runs()
    lacking["jaxid"][kind] = {}
    with pytest.raises(interventions.Disagreement, match=f"{kind}: jaxid gives"):
        training.check_agreement(lacking, "torch")


@pytest.mark.slow
def test_quick_training_run_writes_every_figure(modules: Modules, tmp_path: Path) -> None:
    process = start([str(BENCHMARKS / "training.py"), "--quick", "--pictures", "2", "--out", str(tmp_path)])
    assert process.returncode == 0, process.stderr
    training = modules("training")
    figures = json.loads((tmp_path / "training.json").read_text())
    systems = (*training.TORCH, *training.JAXID)
    names = {"tokens"} | {f"{system}_{part}" for system in systems for part in ("s", "tokens_per_s")}
    names |= {f"{ours}_compile_s" for ours in training.JAXID}
    names |= {f"{ours}_speed_of_{other}" for ours in training.JAXID for other in training.TORCH}
    assert set(figures) == {f"finetune_step/zoo/{name}" for name in names}
    assert min(figures.values()) > 0
    value = {key.rsplit("/", 1)[1]: number for key, number in figures.items()}
    assert value["jaxid-cheap_tokens_per_s"] == pytest.approx(value["tokens"] / value["jaxid-cheap_s"])
    assert value["jaxid-cheap_speed_of_torch"] == pytest.approx(value["torch_s"] / value["jaxid-cheap_s"])
    for part in (*systems, "aim 1.3x", "threads   2 each", "largest differences"):
        assert part in process.stdout


@pytest.mark.slow
def test_memory_of_a_training_step(modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One system of each kind, in separate processes, on the shipped model."""
    training = modules("training")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "standard")
    from jaxid.checkpoints.loading import find_folder, load

    folder = find_folder("tiny-llava")
    training.write_torch_inputs(training.make_task(load(folder), 2, recompute="cheap"), tmp_path)
    found = training.memory(folder, 2, tmp_path, ("torch", "jaxid-cheap"))
    assert min(found.values()) > 0
    for system in ("torch", "jaxid-cheap"):
        assert found[f"{system}_step_mb"] < found[f"{system}_peak_mb"]
    ratio = found["jaxid-cheap_step_mb"] / found["torch_step_mb"]
    assert found["jaxid-cheap_memory_of_torch"] == pytest.approx(ratio)
