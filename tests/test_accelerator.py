"""The accelerators' instrument: what it calls ideal, by hand, and a whole run, with this machine as the accelerator."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from benchmark_files import importable

from jaxid.checkpoints.tensors import flatten

with importable() as load:
    targets: Any = load("accelerator_targets")
    programs: Any = load("accelerator_programs")
    ideal: Any = load("accelerator_ideal")
    scores: Any = load("accelerator_scores")
    accelerator: Any = load("accelerator")

TINY = {
    "model_type": "llava",
    "image_token_index": 60,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "image_size": 28,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
}
"""Prompts of 5 + 4 + 63 = 72 tokens."""

KEYS, REST = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 48  # numbers in a layer's matrices
TOWER = 4 * 16 * 16 + 2 * 16 * 24
SCORE = 4 * 32  # operations of a query and a key, over all heads


@pytest.fixture
def tiny() -> Any:
    return programs.geometry("llava-7b", TINY)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine in place of an H100, and a tiny model in place of LLaVA-7B."""
    monkeypatch.setattr(targets, "devices", lambda name, chips: jax.devices()[:chips])
    monkeypatch.setitem(targets._OPTIONS, "gpu", {})
    monkeypatch.setitem(programs.CONFIGS, "llava-7b", TINY)


def test_trace_by_hand(tiny: Any) -> None:
    tower = 2 * 32 * (3 * 14 * 14 * 16 + 16 * 32 + 32 * 32) + 3 * (2 * 40 * TOWER + 4 * 16 * 40 * 5)
    layer = 2 * 576 * (KEYS + REST) + SCORE * 8 * (72 * 73 // 2)
    last = 2 * 576 * KEYS + 2 * 8 * 63 * REST + SCORE * 8 * ((10 + 72) * 63 // 2)
    found = ideal.trace(tiny)
    assert found.flop == tower + 2 * layer + last

    stored = 3 * 14 * 14 * 16 + 16 * 32 + 32 + 32 * 32 + 32  # patches and projector
    stored += 16 + 5 * 16 + 4 * 16  # the class token, positions and norms
    biases_and_norms = 4 * 16 + 24 + 16 + 4 * 16
    weights = 2 * (stored + 3 * (TOWER + biases_and_norms)) + 3 * 2 * (KEYS + REST)
    kept = 3 * 2 * 2 * 40 * 16 + 3 * 2 * 576 * 2 * 16  # keys and values of tower and decoder
    assert found.split == weights + kept
    pixels, table, recorded = 4 * 8 * 3 * 28 * 28, 2 * 2 * 576 * 32, 2 * 4 * 8 * 63 * 32
    through = 2 * 3 * 2 * 40 * 16 + 2 * 32 * (2 * 576 + 2 * 576 + 576 + 8 * 63)
    assert found.whole == pixels + table + recorded + through


def test_rerun_by_hand(tiny: Any) -> None:
    """Of 48 rows, 16 begin in layer 1, 32 pass through layer 2, and 16 through none."""
    middle = 2 * 16 * 8 * 24 * (KEYS + REST) + SCORE * 16 * 8 * ((49 + 72) * 24 // 2)
    last = 2 * 32 * 8 * 24 * KEYS + 2 * 32 * 8 * REST + SCORE * 32 * 8 * 72
    found = ideal.rerun(tiny)
    assert found.flop == middle + last
    keys = 2 * 2 * 16 * (2 * 8 * 48 + (16 + 32) * 8 * 24)
    assert found.split == 2 * 2 * (KEYS + REST) + keys
    assert found.whole == 2 * 32 * 8 * (48 * 24 + 2 * 16 * 24 + 32 * 24 + 32)


def test_decoding_by_hand(tiny: Any) -> None:
    """31 steps of 64 rows; the first token is chosen before them."""
    found, rows = ideal.decode(tiny), 64
    products = 31 * 3 * 2 * rows * (KEYS + REST) + 32 * 2 * rows * 32 * 64
    scores = SCORE * rows * 3 * sum(range(73, 73 + 31))
    assert found.flop == products + scores
    weights = 31 * 3 * 2 * (KEYS + REST) + 32 * 2 * 32 * 64
    own = sum(range(24, 24 + 31))  # of each row, before each step
    assert found.split == weights + 3 * 2 * 2 * 16 * (31 * (8 * 48 + rows) + rows * own)
    assert found.whole == 2 * 32 * rows * (31 * 3 * 2 + 32)


def test_scores_of_dense_maps_by_hand() -> None:
    found, numbers = ideal.dcsm(), 197 * 30
    assert found.flop == 2 * 256**2 * numbers * (512 + 9 * 4 + 9 * 16 + 128 * 4)
    assert found.moved == 4 * (256 * 512 * (197 + 30) + 128 * 4 * numbers + 256**2)


def test_windows_and_pictures_read_what_they_may() -> None:
    """Gemma's pictures read both ways; its sliding layers read no further than the window."""
    own = programs.geometry("gemma-4b")
    stack = ideal.Stack(own)
    assert own.tokens == 320 and stack.both_ways() == 256 * 255 / 2
    assert stack.causal(0, 0, 2000) == 1024 * 1025 / 2 + 976 * 1024 and stack.causal(5, 0, 2000) == 2000 * 2001 / 2


@pytest.mark.parametrize("alias", programs.CONFIGS)
def test_matrices_of_all_models(alias: str) -> None:
    """The decoder's sizes agree with its parameters, and all of a tower's matrices are counted somewhere."""
    own = programs.geometry(alias)
    stack, tower = ideal.Stack(own), ideal.tower_of(own)
    in_layers = ideal.matrices(own.leaves, "decoder.layers.")
    assert in_layers == stack.layers * (stack.keys + stack.rest)
    vision = own.config.vision_config
    assert ideal.matrices(own.leaves, "tower.layers.") == vision.num_hidden_layers * tower.size
    assert tower.before > 0 and tower.after > 0 and tower.tokens > 0
    assert 0 < ideal.trace(own).flop < 1e16


OPTIONS = ["--targets", "h100", "--models", "llava-7b", "--out"]


@pytest.mark.usefixtures("here")
def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model's rerun does what is ideal, nearly; a resumed run compiles only what is missing."""
    arguments = [*OPTIONS, str(tmp_path), "--works", "rerun"]
    assert accelerator.main(arguments) == 0
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert set(found) == {f"h100/llava-7b/rerun/{name}" for name in accelerator.FIGURES}
    own = {name: found[f"h100/llava-7b/rerun/{name}"] for name in accelerator.FIGURES}
    # Rows of unlike layers, and scores of later tokens.
    assert 1 < own["flop_ratio"] < 1.6 and own["bytes_ratio"] > 1 and own["bound_ratio"] > 1
    assert (own["unknown"], own["fits"], own["chips"]) == (0, 1, 1) and own["compile_s"] > 0
    assert "1 works in" in capsys.readouterr().out
    assert accelerator.main([*arguments, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "0 works in" in shown and "| h100 | llava-7b | rerun |" in shown
    assert json.loads((tmp_path / "accelerator.json").read_text()) == found


@pytest.mark.usefixtures("here")
def test_functions_of_other_names_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Had the library renamed a function, neither would its branches count in silence nor the bounds pass."""
    real = programs.resumed_shares
    renamed = {"resume.<locals>.through": "resume.<locals>.layers"}
    monkeypatch.setattr(
        programs, "resumed_shares", lambda *args: {renamed.get(name, name): one for name, one in real(*args).items()}
    )
    assert accelerator.main([*OPTIONS, str(tmp_path), "--works", "rerun"]) == 0
    assert "h100/llava-7b/rerun: no loop or branch belongs to resume.<locals>.layers\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert found["h100/llava-7b/rerun/unknown"] == 2  # the branch, and the name
    accelerator.report(found)
    assert "MISSED  h100/llava-7b/rerun/unknown = 2 (at most 0)" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_a_program_that_is_called_twice_is_not_counted_once(tiny: Any) -> None:
    def run(model: Any, prompts: Any) -> Any:
        return [programs.trace.trace(model, prompts).hidden for _ in range(2)]

    with pytest.raises(RuntimeError, match=r"_record is called twice"):
        programs._calls(tiny, targets.target("h100", 0), run)


@pytest.mark.usefixtures("here")
def test_a_program_of_two_models_compiles_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the time of the second one would be that of finding the first one's, some milliseconds."""
    monkeypatch.setitem(programs.CONFIGS, "llava-13b", TINY)
    models = ["llava-7b", "llava-13b"]
    arguments = ["--out", str(tmp_path), "--targets=h100", f"--models={','.join(models)}", "--works=rerun"]
    assert accelerator.main(arguments) == 0
    found = json.loads((tmp_path / "accelerator.json").read_text())
    assert min(found[f"h100/{model}/rerun/compile_s"] for model in models) > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("work", programs.WORKS)
def test_every_work(work: str, tmp_path: Path) -> None:
    """Its programs compile, all of their loops and branches are known, and they do little that is not ideal."""
    own = programs.ENCODER if work in ("dcsm", "encode") else "llava-7b"
    # optax is not written for strict promotion
    with jax.numpy_dtype_promotion("standard"):
        assert accelerator.main(["--targets", "h100", "--models", own, "--out", str(tmp_path), "--works", work]) == 0
    found = json.loads((tmp_path / "accelerator.json").read_text())
    for key, value in found.items():
        *_, part, figure = key.split("/")
        assert figure != "unknown" or value == 0, key
        # Dense maps are made for the CPU here; and in short prompts the last layer is a large part.
        assert figure != "flop_ratio" or 0.95 < value < (4 if part == "dcsm" else 1.6), key
    if work == "generate":
        total = [found[f"h100/llava-7b/{part}/roofline_ms"] for part in ("prefill", "decode", "generate")]
        assert total[0] + total[1] == pytest.approx(total[2], rel=1e-5)


@pytest.mark.usefixtures("here")
def test_a_program_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refused(*args: object, **options: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: 91 GB\nmore lines")

    monkeypatch.setattr(targets.Target, "compile", refused)
    assert accelerator.main(["--out", str(tmp_path), "--targets=h100", "--models=llava-7b", "--works=trace"]) == 1
    assert "h100/llava-7b/trace: RuntimeError: RESOURCE_EXHAUSTED: 91 GB\n" in capsys.readouterr().out


def test_several_programs_of_a_work() -> None:
    one = dict.fromkeys(accelerator.FIGURES, 1.0)
    other = {**one, "temporary_gb": 3.0, "arguments_gb": 5.0, "fits": 0, "roofline_ms": 4.0}
    both = accelerator.together([one, other])
    assert (both["temporary_gb"], both["arguments_gb"], both["chips"], both["fits"]) == (3, 5, 1, 0)
    assert (both["roofline_ms"], both["ideal_ms"], both["bound_ratio"]) == (5, 2, 2.5)


def test_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "h100/llava-7b/trace/temporary_gb": 1.6,
        "h100/llama-11b/trace/temporary_gb": 2.4,
        "v5e/llava-7b/trace/temporary_gb": 9.0,
        "h100/llava-7b/rerun/temporary_gb": 1.07,  # the suffixes' activations are 0.0755 GB
        "v5e/llava-7b/rerun/score_tensors": 0,
        "h100/gemma-12b/trace/weight_copies": 1,
        "h100/gemma-12b/finetune/weight_copies": 7,
        "h100/gemma-12b/decode/bound_ratio": 1.31,
        "h100/gemma-12b/generate/bound_ratio": 9.0,
        "h100/gemma-12b/extract/flop_ratio": 1.15,
        "h100/clip-b16/dcsm/bound_ratio": 1.4,
        "v5e-8/gemma-12b/rerun/collective_gb_data": 0.1,
        "h100-2x2/llava-7b/rerun/roofline_ms": 40.0,
        "h100-2x2/llava-7b/rerun/collective_ms": 9.0,
        "h100-2x2/llava-7b/rerun/bound_ratio": 1.3,
        "h100-2x2/llava-7b/trace/collective_ms": 18.0,
        "v5e-8/gemma-12b/rerun/collective_gb_model": 0.1,
        "v5e-8/gemma-12b/decode/collectives_per_block": 2,
        "v5e-8/gemma-12b/generate/collectives_per_block": 3,
    }
    assert accelerator.report(found) == 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "7 bounds passed, 5 missed" and len(lines) == 13
    assert [line.split()[1] for line in lines if line.startswith("MISSED")] == [
        "h100/llava-7b/trace/temporary_gb",
        "h100/gemma-12b/trace/weight_copies",
        "h100/gemma-12b/decode/bound_ratio",
        "v5e-8/gemma-12b/rerun/collective_gb_data",
        "h100-2x2/llava-7b/rerun/collective_ms",
    ]


def test_lengths_of_keys() -> None:
    """Of pictures and prompts; widths are no keys, nor their share of a chip, unless a picture has as many tokens."""
    keys, others = scores.axes_of_keys("llava-7b", "trace", 4)
    assert keys == [640, 577] and {4096, 11008, 2752, 8 * 640} <= {*others} and not {*keys} & {*others}
    keys, others = scores.axes_of_keys("gemma-12b", "trace")
    assert keys == [320, 4096] and 4096 not in others and 8 * 320 in others
    assert scores.axes_of_keys("gemma-12b", "rerun")[0] == [320]
    assert 4 * 1608 in scores.axes_of_keys("llama-11b", "rerun")[0]


def test_layers_that_a_rerun_skips() -> None:
    """Four rows in chunks of two, which begin in layers 1 and 3 of 4."""
    shares = programs.resumed_shares(4, np.array([3, 1, 2, 4]), 2)
    assert shares == {"resume.<locals>.through": 2 / 3, "resume.<locals>.advance": (3 + 1) / (3 * 2)}


@pytest.mark.usefixtures("here")
def test_parameters_and_recorded_keys_lie_as_the_library_divides_them(tiny: Any) -> None:
    """Heads and columns over "model", prompts over "data"; what enters a rerun comes from programs before it."""
    target = targets.Target(targets.DEVICES["h100"], 2, 2)
    (part,) = programs._OF_MODELS["rerun"](tiny, target)
    _, parameters, suffix, edits, *_ = part.args
    spec = {name: tuple(leaf.sharding.spec) for name, leaf in flatten(parameters).items()}
    assert spec["decoder.layers.attention.query"] == (None, None, "model")
    assert spec["decoder.layers.mlp.down.kernel"] == (None, "model", None)
    assert spec["decoder.layers.attention_norm.scale"] == ()
    assert suffix.prefix_keys.shape == (3, 16, 2, 72, 8) and suffix.residuals.shape == (4, 16, 24, 32)
    assert tuple(suffix.prefix_keys.sharding.spec) == (None, "data", "model")
    assert tuple(suffix.residuals.sharding.spec) == (None, "data")
    assert all(tuple(leaf.sharding.spec) in ((), ("data",)) for leaf in jax.tree.leaves(edits))


@pytest.mark.usefixtures("here")
def test_programs_on_several_chips() -> None:
    """Two sums over chips for every block, and a half of the operations on each of two."""
    alone, both = (accelerator.measure(name, "llava-7b", "rerun")["rerun"] for name in ("h100", "h100-2"))
    assert (alone["chips"], alone["collective_gb_model"], alone["collectives"]) == (1, 0, 0)
    assert (both["chips"], both["collective_gb_data"], both["collectives_per_block"]) == (2, 0, 2)
    for name in ("tflop", "ideal_tflop"):
        assert both[name] == pytest.approx(alone[name] / 2, rel=1e-4)
    # A sum sends on each of two chips as many bytes as it has: those of 8 prompts' suffixes under 3 rows, or of their
    # last tokens, after attention and after the MLP.
    runs, token = both["collectives"] / 4, 3 * 8 * 32 * 4
    assert both["collective_gb_model"] * 1e9 == pytest.approx(runs * 2 * token * (24 + 1), rel=1e-5)
    assert both["collective_ms"] == pytest.approx(both["collective_gb_model"] / 450e9 * 1e12, rel=1e-5)


def test_slices_hold_what_is_needed() -> None:
    chips = [
        targets.target("v5e", lambda target, size=size: size * 1e9 / target.chips).chips
        for size in (10, 17, 40, 60, 70, 200, 900)
    ]
    assert chips == [1, 2, 4, 4, 8, 16, 16]
    assert targets.target("h100", lambda target: 500e9).chips == 1
    assert targets.target("v5e-8", lambda target: 0.0).chips == targets.target("h100-8", lambda target: 0.0).chips == 8


def test_what_does_not_divide_is_needed_whole() -> None:
    """Five key heads of a hundred on four chips: the maps to keys and values are on each of them."""
    own = programs.geometry("gemma-12b")
    one, four, eight = (own.needed(targets.Target(targets.DEVICES["h100"], chips)) for chips in (1, 4, 8))
    assert 24e9 < one - 2e9 < 30e9 and 4 * (four - 2e9) > 1.001 * (one - 2e9) and eight < four


@pytest.mark.parametrize("option", ["--targets=h101", "--targets=v5e-x", "--works=tracing", "--models=llava"])
def test_unknown_names(option: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is not one of "):
        accelerator.main(["--out", str(tmp_path), option])
