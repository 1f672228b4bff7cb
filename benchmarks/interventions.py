"""Compares jaxid with PyTorch: the published experiments on the same weights, prompts, vectors and CPUs.

    pip install -e ".[bench]"
    python benchmarks/interventions.py --out results/ [--models zoo,geometry,video] [--quick]

The second command prints a table for each model and writes `interventions.json`, a flat map "{work}/{model}/{figure}"
-> number. Times are seconds per prompt (for the extraction, per picture), medians of rounds in which the systems take
turns. `compile_s` is the time of jaxid's first call beyond that of a later one. If the systems do not find the same
numbers, there is no result and the exit code is 1.

Models: `zoo` is the shipped tiny-llava; `geometry` has random weights and the prompt of LLaVA-1.5 with 576 picture
tokens; `video` has random weights, and the depth and the prompt of LLaVA-Video: 8 frames with 1,680 tokens. For models
of clips only `temporal_swap` is measured, the swap of activations with those of the clip played backwards, for
`published` and `jaxid`.

Systems:
    published   hooks on Hugging Face's class, one prompt at a time, with a full control pass and a full patched pass
                for every edit (and an intervened pass for every swap). Timed on a few edits, as all edits cost the
                same. For clips, a network written from LLaVA-NeXT's definition replaces Hugging Face's class.
    nnsight     traces with the edits batched as invokes; timed on its control pass and a few edits.
    strongest   Hugging Face's modules with one control pass, whose KV cache all edits share; edits run only the tokens
                and layers that they can change.
    rewritten   the same procedure on a network rewritten for oneDNN: weights reordered once, prompts in parallel.
    jaxid       jaxid's experiments, as a user calls them.
"""

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import flops
import numpy as np
import timing
import works
from works import Edits, Found, Setting, System, Work

from jaxid.errors import JaxidError
from jaxid.io import ensure_output_folder, write_json

if TYPE_CHECKING:  # JAX may only be imported after `timing.use_cpus`
    from jaxid.families.base import Model
    from jaxid.interp.interventions import Intervention

OtherSystem = tuple[ModuleType | SimpleNamespace, object, bool]
"""A module of PyTorch procedures, its network, and whether it is timed on a few edits only."""

TOLERANCE = 1e-4
"""Largest allowed difference: of log-probabilities in nats; of hidden states as a share of the largest value."""

MAX_DISTURBANCE = 0.05
"""Share of the CPUs that other processes may take before times are reported as unreliable."""

REFERENCE = "jaxid"
WORKS = ("control", "steering", "belief_swap", "swaps", "extraction")
CLIP_WORKS = ("temporal_swap",)
PROMPTS = {"zoo": (16, 64), "geometry": (1, 4), "video": (1, 1)}
"""By model: number of prompts of a task, and of pictures of the extraction."""

AIMS = {"steering": 55, "swaps": 45, "belief_swap": 20, "extraction": 1.5, "temporal_swap": 60}


class Disagreement(RuntimeError):
    """Systems that should compute the same numbers do not."""


def check_agreement(
    work: str,
    results: Mapping[str, Found],
    *,
    reference: str = REFERENCE,
    tolerance: float = TOLERANCE,
    edits: Mapping[str, Sequence[int] | None] | None = None,
) -> float:
    """Compares every system's numbers with the reference's.

    Args:
        work: name of the task, for the message.
        results: results by system.
        reference: the system that the others are compared with.
        tolerance: largest allowed difference; for "states", as a share of the largest value.
        edits: by system, the indices of the edits that it did; all by default.

    Returns:
        The largest difference found.

    Raises:
        Disagreement: naming the system, the quantity and the place, if a value differs by more than the tolerance or is
            not finite, or if systems return different quantities or shapes.
    """
    largest = 0.0
    for system, found in results.items():
        expected = dict(results[reference])
        chosen = (edits or {}).get(system)
        if chosen is not None and "edited" in expected:
            expected["edited"] = expected["edited"][list(chosen)]
        if set(found) != set(expected):
            raise Disagreement(f"{work}: {system} gives {sorted(found)}, {reference} {sorted(expected)}.")
        for name, values in found.items():
            if values.shape != expected[name].shape:
                raise Disagreement(
                    f"{work}: {name} of {system} has shape {values.shape}, of {reference} {expected[name].shape}."
                )
            difference = np.abs(values.astype(np.float64) - expected[name].astype(np.float64))
            if name == "states":
                difference = difference / max(1.0, float(np.abs(expected[name]).max()))
            place = np.unravel_index(int(np.argmax(difference)), difference.shape)  # a NaN counts as the largest
            if not difference[place] <= tolerance:
                raise Disagreement(
                    f"{work}: {name} of {system} is {values[place]:.7g} at {tuple(map(int, place))}, "
                    f"{reference} has {expected[name][place]:.7g}; they may differ by {tolerance:g} at most."
                )
            largest = max(largest, float(difference[place]))
    return largest


def make_works(model: "Model", folder: Path, counts: tuple[int, int], *, alone: bool = False) -> list[Work]:
    """The tasks on a model.

    Args:
        model: the model, loaded by jaxid.
        folder: its checkpoint.
        counts: number of prompts, and of pictures of the extraction.
        alone: only jaxid, without loading PyTorch's models.
    """
    settings: dict[str, Setting]
    if works.is_video(model):
        prompts = works.clip_setting(model, folder, counts[0])
        settings = dict.fromkeys(CLIP_WORKS, prompts)
    else:
        prompts, pictures = works.setting(model, folder, counts[0]), works.setting(model, folder, counts[1])
        settings = {name: pictures if name == "extraction" else prompts for name in WORKS}
    calls = {name: works.jaxid_calls(own)[name] for name, own in settings.items()}
    systems: dict[str, dict[str, System]] = {name: {REFERENCE: System(call=call)} for name, call in calls.items()}
    edits: Edits = {}
    one_pass = 0.0
    if not alone:
        edits = works.torch_edits(prompts)
        one_pass = _add_torch(systems, settings, edits, folder)
    return [
        Work(
            name=name,
            edits=len(edits.get(name, ())),
            prompts=settings[name].count,
            systems=systems[name],
            flops=_flops(name, settings[name], edits, one_pass),
        )
        for name in settings
    ]


def _add_torch(
    systems: dict[str, dict[str, System]],
    settings: Mapping[str, Setting],
    edits: Edits,
    folder: Path,
) -> float:
    """Adds PyTorch's systems; returns the operations of one full pass."""
    import published
    import torch

    torch.set_num_threads(timing.THREADS)
    network, any_setting = published.load(folder), next(iter(settings.values()))
    one_by_one = SimpleNamespace(
        control=published.control_one_by_one,
        steer=published.one_by_one,
        swap=published.swap_one_by_one,
        extract=published.extract_one_by_one,
    )
    modules: dict[str, OtherSystem] = {"published": (one_by_one, network, True)}
    if not works.is_video(any_setting.model):
        modules |= _add_others(network, folder)
    for system, (module, loaded, subset) in modules.items():
        for name in systems:
            call, chosen = works.torch_calls(module, loaded, settings[name], edits, subset)[name]
            systems[name][system] = System(call=call, edits=chosen)
    return published.flops(network, any_setting.torch_batch)


def _add_others(network: object, folder: Path) -> dict[str, OtherSystem]:
    """The systems that support only LLaVA."""
    import rewritten
    import strongest

    found: dict[str, OtherSystem] = {
        "strongest": (strongest, network, False),
        "rewritten": (rewritten, rewritten.load(folder), False),
    }
    if importlib.util.find_spec("nnsight") is not None:
        import nnsight_way

        found["nnsight"] = (nnsight_way, nnsight_way.load(folder), True)
    return found


def _flops(name: str, work: Setting, edits: Edits, one_pass: float) -> tuple[float, float]:
    """Operations per prompt, of jaxid and of the published procedure."""
    config, prompts = work.model.config, work.batch.prompts
    tokens, start = int(prompts.last()[0]) + 1, int(prompts.text_start()[0])
    first = {"words": int(work.batch.words[0, :2].min()), "subject": int(work.batch.words[0, 0]), "text": start}
    assert prompts.inputs.pixels is not None
    pictures = len(prompts.inputs.pixels) // work.count
    clean = flops.control(config, tokens, tokens - start, pictures)
    layers = [edit.layer for edit in edits.get(name, ())]

    def suffix(kind: str, some: Sequence[int]) -> float:
        return flops.edits(config, some, first[kind], tokens - first[kind])

    if name == "control":
        return clean, one_pass
    if name == "extraction":
        return flops.control(config, tokens, 1), one_pass
    if name in works.SWAPS:
        third = layers[: len(layers) // 3]
        return 2 * clean + 2 * suffix("text", third) + suffix("words", third), 3 * len(layers) * one_pass
    kind = "subject" if name == "steering" else "words"
    return clean + suffix(kind, layers), 2 * len(layers) * one_pass


def measure(work: Work, peak: float, shared: Mapping[str, float], rounds: int) -> tuple[dict[str, float], float]:
    """Times one task on all systems, in turn.

    Args:
        work: the task.
        peak: peak rate of matrix products, in operations per second.
        shared: seconds that a system's control pass takes for as many prompts, whatever the number of edits.
        rounds: number of timed calls.

    Returns:
        Figures by name, and the largest difference between the systems' numbers.

    Raises:
        Disagreement: if the systems do not agree.
    """
    import jax

    jax.clear_caches()  # jaxid's first call has to compile everything that the task needs, whatever ran before
    gc.collect()
    timed = timing.side_by_side({name: system.call for name, system in work.systems.items()}, rounds)
    largest = check_agreement(
        work.name,
        {name: times.result for name, times in timed.items()},
        edits={name: system.edits for name, system in work.systems.items()},
    )
    seconds = {}
    for name, system in work.systems.items():
        taken = timed[name].median
        if system.edits is not None:
            fixed = shared.get(name, 0.0)
            taken = fixed + (taken - fixed) * work.edits / len(system.edits)
        seconds[name] = taken / work.prompts
    figures = {f"{name}_s": value for name, value in seconds.items()}
    ours = seconds[REFERENCE]
    figures |= {f"ratio_{name}": value / ours for name, value in seconds.items() if name != REFERENCE}
    figures |= {
        "compile_s": timed[REFERENCE].warm_up,
        "peak_fraction": work.flops[0] / ours / peak,
        "flop_bound": work.flops[1] / work.flops[0],
    }
    return figures, largest


def cost_per_edit(
    model: "Model", folder: Path, peak: float, counts: Sequence[int] = (1, 8, 64, 512)
) -> dict[str, float]:
    """Time of one steering edit, without the shared trace, relative to its own operations at the peak rate."""
    from jaxid.interp.interventions import add
    from jaxid.interp.trace import rerun, trace

    work = works.setting(model, folder, 1)
    recorded, word = trace(model, work.batch.prompts), work.batch.words[:, 0]
    last, start = int(work.batch.prompts.last()[0]), int(word[0])
    layers = works.steering_layers(model)
    vectors = np.random.default_rng(1).standard_normal((max(counts), model.width), np.float32)
    found = {}
    for count in counts:
        chosen = np.array([layers[index % len(layers)] for index in range(count)])
        push = add(layer=chosen, positions=word, vector=vectors[:count])

        def call(push: "Intervention" = push) -> np.ndarray:
            return np.asarray(rerun(model, recorded, push).logprobs(work.batch.answers))

        taken = timing.side_by_side({"jaxid": call})["jaxid"].median
        needed = flops.edits(model.config, chosen.tolist(), start, last + 1 - start)
        found[f"cost_per_edit_{count}"] = taken / (needed / peak)
    return found


def peak_memory(model: str, folder: Path, counts: tuple[int, int], names: Sequence[str]) -> dict[str, float]:
    """Peak resident memory of jaxid alone in MB, in a separate process for every task."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, "--out", ".", "--memory-of", name, str(folder), *map(str, counts)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{name}/{model}/peak_mb"] = float(json.loads(done.stdout.splitlines()[-1]))
    return found


def _report_memory(name: str, folder: Path, counts: tuple[int, int]) -> None:
    timing.use_cpus()
    from jaxid.checkpoints.loading import load

    chosen = {work.name: work for work in make_works(load(folder), folder, counts, alone=True)}[name]
    chosen.systems[REFERENCE].call()
    print(json.dumps(timing.peak_memory_mb()))


def _print_table(model: str, results: Mapping[str, float], made: Sequence[Work], largest: Mapping[str, float]) -> None:
    names = [
        name
        for name in ("published", "nnsight", "strongest", "rewritten")
        if f"{made[0].name}/{model}/{name}_s" in results
    ]
    header = ["work", "edits", *(f"{name} ms" for name in names), "jaxid ms", *(f"/{name}" for name in names)]
    header += ["FLOP bound", "of peak", "compile s", "MB", "max diff"]
    rows = [header]
    for work in made:
        value = {
            key.split("/")[2]: number for key, number in results.items() if key.startswith(f"{work.name}/{model}/")
        }
        rows.append(
            [
                work.name,
                str(work.edits),
                *(f"{1e3 * value[f'{name}_s']:.1f}" for name in (*names, REFERENCE)),
                *(f"{value[f'ratio_{name}']:.1f}x" for name in names),
                f"{value['flop_bound']:.1f}x",
                f"{value['peak_fraction']:.0%}",
                f"{value['compile_s']:.1f}",
                f"{value.get('peak_mb', float('nan')):.0f}",
                f"{largest[work.name]:.0e}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    print(f"\n{model}")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)
    aims = ", ".join(f"{work.name} {AIMS[work.name]:g}x" for work in made if work.name in AIMS)
    others = "" if len(names) == 1 else "; steering over nnsight 10x, over strongest 1.5x; control 75% of peak"
    if model in ("geometry", "video"):
        print(f"aims over published: {aims}{others}")


def run(models: Mapping[str, Path], out: Path, *, quick: bool) -> dict[str, float]:
    """Measures every task on every model, prints the tables and writes `interventions.json`.

    Raises:
        JaxidError: if a model cannot be loaded or the results cannot be written.
        Disagreement: if the systems do not agree; nothing is written then.
    """
    cpus = timing.use_cpus()
    from jaxid.checkpoints.loading import load

    ensure_output_folder(out)
    for line in timing.describe_machine(cpus):
        print(line)
    peak = flops.matrix_peak()
    print(f"peak      {peak / 1e9:.0f} GFLOP/s of a float32 matrix product, the better of JAX and PyTorch")
    print("times     milliseconds per prompt (extraction: per picture), medians of rounds in turn", flush=True)
    results: dict[str, float] = {}
    with timing.Disturbance(cpus) as disturbance:
        for name, folder in models.items():
            counts = (1, 2) if quick else PROMPTS.get(name, PROMPTS["zoo"])
            model = load(folder)
            made = make_works(model, folder, counts)
            shared: dict[str, float] = {}
            largest: dict[str, float] = {}
            for work in made:
                figures, largest[work.name] = measure(work, peak, shared, timing.MIN_ROUNDS)
                if work.name == "control" and "nnsight_s" in figures:
                    shared["nnsight"] = figures["nnsight_s"] * work.prompts
                results |= {f"{work.name}/{name}/{figure}": value for figure, value in figures.items()}
            costs: dict[str, float] = {}
            if "steering" in largest:
                costs = cost_per_edit(model, folder, peak, (1, 8) if quick else (1, 8, 64, 512))
            results |= {f"steering/{name}/{figure}": value for figure, value in costs.items()}
            if not quick:
                results |= peak_memory(name, folder, counts, list(largest))
            _print_table(name, results, made, largest)
            if costs:
                print("cost of one edit, relative to its own operations at the peak rate: " + ", ".join(
                    f"{key.rsplit('_', 1)[1]} edits {value:.2f}" for key, value in costs.items()))  # fmt: skip
    print()
    if disturbance.share is not None:
        verdict = "" if disturbance.share < MAX_DISTURBANCE else ": the machine is too busy, do not quote these numbers"
        print(f"other processes took {disturbance.share:.1%} of these CPUs{verdict}")
    path = write_json(out / "interventions.json", results)
    print(f"all systems agree to {TOLERANCE:g}; wrote {path}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 for a result, 1 if systems disagree, 2 for an invalid argument or model."""
    parser = argparse.ArgumentParser(description="Compares jaxid with PyTorch on CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for interventions.json")
    parser.add_argument(
        "--models", default="zoo,geometry,video", help="zoo, geometry, video, or folders of models, separated by commas"
    )
    parser.add_argument("--quick", action="store_true", help="one prompt, two pictures, few edits, no memory")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.memory_of:
            name, folder, *counts = options.memory_of
            _report_memory(name, Path(folder), (int(counts[0]), int(counts[1])))
            return 0
        with tempfile.TemporaryDirectory() as temporary:
            run(_folders(options.models, Path(temporary)), options.out, quick=options.quick)
    except Disagreement as error:
        print(f"error: the systems do not agree, so their times are meaningless. {error}", file=sys.stderr)
        return 1
    except JaxidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _folders(names: str, temporary: Path) -> dict[str, Path]:
    """The models' folders; random models are written first."""
    timing.use_cpus()
    import geometry
    import geometry_video

    from jaxid.checkpoints.loading import find_folder

    folders = {}
    for name in names.split(","):
        if name == "zoo":
            folders[name] = find_folder("tiny-llava")
        elif name == "geometry":
            folders[name] = geometry.write(temporary / "geometry")
        elif name == "video":
            folders[name] = geometry_video.write(temporary / "video")
        else:
            folders[Path(name).name] = find_folder(name)
    return folders


if __name__ == "__main__":
    sys.exit(main())
