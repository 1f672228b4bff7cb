"""What users' programs cost on accelerators: compiled at full size by the real compilers, without the devices.

`python benchmarks/accelerator.py --out DIR` writes `DIR/accelerator.json`, flat, `"{target}/{model}/{work}/{figure}"`,
and the table `DIR/accelerator.md`. `--quick` compiles a few of them and fails if a bound is missed.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import accelerator_ideal
import accelerator_programs as programs
import accelerator_scaling as scaling
import accelerator_targets as targets
import hlo
import hlo_collectives
import jax
from accelerator_scores import axes_of_keys

from jaxid.io import write_json, write_text

HEADER = f"""Programs compiled by XLA for devices that are not here; nothing was run.

{programs.LENGTHS}

On several chips, figures are for each of them. Operations are those of products, convolutions and attention. Bytes are
operands and outputs of every top-level instruction in the device's memory, loops as often as they run, branches as
often as the work takes them; of updates in place and of slices, the touched part. Among them are those of products and
kernels, and those of moves, which only write what they read elsewhere; the rest is arithmetic on every number of arrays
that are not kept on the chip. The roofline is the larger of
operations at the peak and bytes at the peak bandwidth, for each program of a work, added up; every product counts at
the peak of bfloat16, also those of float32. `accelerator_ideal.py` says what is ideal.

Not seen: the insides of kernels of cuBLAS, cuDNN, Triton and Mosaic (they count with their operands and outputs, and
with all scores, masked ones included); what autotuning would choose, which is off here, as are Triton's products; what
the caches save; the latency of collectives, whose time follows from what is sent alone and is not in the roofline; and
the time of launches and the host."""

FIGURES = (
    "chips",
    "arguments_gb",
    "temporary_gb",
    "output_gb",
    "fits",
    "tflop",
    "hbm_gb",
    "products_gb",
    "moves_gb",
    "ideal_tflop",
    "ideal_hbm_gb",
    "flop_ratio",
    "bytes_ratio",
    "weight_copies",
    "copied_gb",
    "score_tensors",
    "collective_gb_model",
    "collective_gb_data",
    "collectives",
    "collectives_per_block",
    "collective_ms",
    "roofline_ms",
    "ideal_ms",
    "bound_ratio",
    "compile_s",
    "unknown",
)
"""Names of the figures; `unknown` counts loops, branches and kernels of which it is not known what they do, and names
of functions to which none of them belongs."""

SHOWN = {
    "chips": "d",
    "arguments_gb": ".1f",
    "temporary_gb": ".2f",
    "fits": "d",
    "tflop": ".1f",
    "hbm_gb": ".1f",
    "products_gb": ".1f",
    "moves_gb": ".1f",
    "flop_ratio": ".2f",
    "bytes_ratio": ".2f",
    "weight_copies": "d",
    "score_tensors": "d",
    "collective_gb_model": ".2f",
    "collective_gb_data": ".2f",
    "collectives_per_block": "d",
    "collective_ms": ".2f",
    "roofline_ms": ".2f",
    "ideal_ms": ".2f",
    "bound_ratio": ".2f",
    "compile_s": ".0f",
}
"""The table's columns and their format."""

QUICK_TARGETS = {"llava-7b": ("h100", "v5e"), "gemma-12b": ("h100", "v5e"), programs.ENCODER: ("h100",)}
"""Dense maps do not fill the matrix units of TPUs, and there they miss their bound."""

QUICK_WORKS = ("trace", "rerun", "extract", "generate", "dcsm")

QUICK_MESH = ("h100-2x2", "llava-7b", "rerun")
"""Two copies of the model on two GPUs each."""

_WEIGHTS = re.compile(r"""op_name="(parameters|state\\?\[\\?'parameters|constants|scorer|encoder)""")

Figures = dict[str, float]


def figures(part: programs.Part, target: targets.Target, ideal: accelerator_ideal.Ideal, alias: str) -> Figures:
    """All figures of a program."""
    jax.clear_caches()  # two models may share a program, and `compile_s` would be the time of finding it
    started = time.perf_counter()
    compiled = target.compile(part.function, *part.args, **part.options)
    seconds = time.perf_counter() - started
    memory, program = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    counts = counted(program, part, alias, target)
    unknown = counts.unknown_loops + counts.unknown_branches
    absent = {*part.shares, *part.trips} - counts.functions
    for text in (
        *(f"the operations of kernel {name} do not count" for name in sorted(counts.unknown_kernels)),
        *([f"{unknown} loops or branches of which it is not known how often they run"] if unknown else []),
        *(f"no loop or branch belongs to {name}" for name in sorted(absent)),
        *sorted(counts.faults),
    ):
        print(f"  {target.name}/{alias}/{part.name}: {text}", flush=True)
    sent, links = sum(one.sent for one in counts.collectives), target.device.links
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    device, least = target.device, ideal.on(target.model)
    return with_ratios(
        {
            "chips": target.chips,
            "arguments_gb": memory.argument_size_in_bytes / 1e9,
            "temporary_gb": memory.temp_size_in_bytes / 1e9,
            "output_gb": memory.output_size_in_bytes / 1e9,
            "fits": int(held + memory.temp_size_in_bytes <= device.memory),
            "tflop": counts.flop / 1e12,
            "hbm_gb": counts.moved / 1e9,
            "products_gb": counts.in_products / 1e9,
            "moves_gb": counts.in_moves / 1e9,
            "ideal_tflop": least.flop / 1e12,
            "ideal_hbm_gb": least.moved / 1e9,
            "weight_copies": counts.weight_copies,
            "copied_gb": counts.copied / 1e9,
            "score_tensors": counts.score_tensors,
            "collective_gb_model": counts.sent("model") / 1e9,
            "collective_gb_data": counts.sent("data") / 1e9,
            "collectives": sum(one.runs for one in counts.collectives),
            "collectives_per_block": hlo_collectives.in_one_step(
                program, target.mesh.shape, axis="model", skipped=part.trips
            ),
            "collective_ms": 1e3 * sent / links.ring if links else 0.0,
            "roofline_ms": 1e3 * device.seconds(counts.flop, counts.moved),
            "ideal_ms": 1e3 * least.seconds(device),
            "compile_s": seconds,
            "unknown": unknown + len(absent) + len(counts.unknown_kernels),
        }
    )


def counted(program: hlo.Program, part: programs.Part, alias: str, target: targets.Target) -> hlo.Counts:
    """What a compiled program does."""
    entry = program.computations[program.entry].parameters
    weights = [index for index, parameter in enumerate(entry) if _WEIGHTS.search(parameter.rest)]
    if not weights:
        raise RuntimeError(f"no parameter of {alias}/{part.name} is a weight: {entry[0].rest:.100}")
    keys, widths = axes_of_keys(alias, part.name, target.model)
    return hlo.count(
        program,
        weights=weights,
        keys=keys,
        widths=widths,
        shares=part.shares,
        trips=part.trips,
        mesh=target.mesh.shape,
    )


def with_ratios(found: Figures) -> Figures:
    """Figures with the ratios of the real ones to the ideal ones."""
    pairs = {
        "flop_ratio": ("tflop", "ideal_tflop"),
        "bytes_ratio": ("hbm_gb", "ideal_hbm_gb"),
        "bound_ratio": ("roofline_ms", "ideal_ms"),
    }
    found = {**found, **{name: found[real] / found[least] for name, (real, least) in pairs.items()}}
    return {name: float(f"{found[name]:.6g}") for name in FIGURES}


def together(several: Sequence[Figures]) -> Figures:
    """The figures of programs that run in turn: work adds up, memory is that of the one that needs most."""
    most = max(several, key=lambda one: one["arguments_gb"] + one["temporary_gb"])
    memory = {name: most[name] for name in ("chips", "arguments_gb", "temporary_gb", "output_gb")}
    sums = {name: sum(one[name] for one in several) for name in FIGURES if not name.endswith("_ratio")}
    per_block = max(one["collectives_per_block"] for one in several)
    return with_ratios(
        {**sums, **memory, "fits": min(one["fits"] for one in several), "collectives_per_block": per_block}
    )


def measure(name: str, alias: str, work: str) -> dict[str, Figures]:
    """Figures of a work on the chips of a name, and of its programs if there are several, by name."""
    return measure_on(programs.target_of(name, alias), alias, work)


def measure_on(target: targets.Target, alias: str, work: str) -> dict[str, Figures]:
    """Figures of a work on some chips."""
    own = None if alias == programs.ENCODER else programs.geometry(alias)
    parts, least = programs.parts(alias, work, target), accelerator_ideal.ideals(own, work)
    found = {part.name: figures(part, target, ideal, alias) for part, ideal in zip(parts, least, strict=True)}
    return {work: together(list(found.values()))} | (found if len(found) > 1 else {})


# --- bounds ---------------------------------------------------------------------------------------------------------

RATIOS = {"trace": 1.2, "rerun": 1.2, "extract": 1.2, "decode": 1.3, "dcsm": 1.5}
DIVIDED_RATIO = 1.35
"""Of a rerun on two GPUs that share a model: what lies between the products is not divided among them."""

SENT_SHARE = 0.2
"""Time of that rerun's collectives as a share of its roofline; sums in float32 would take 0.28."""

FLOP_RATIO = 1.15
TRACE_GB = 1.5
LARGE_TRACE_GB = {"llama-11b": 2.5, "llava-cot": 2.5}
RERUN_GB = 1.0


def suffix_gb(alias: str) -> float:
    """The activations of a rerun's suffixes: what enters a layer, for all rows."""
    own = programs.geometry(alias)
    return 2e-9 * programs.EDITS * programs.PROMPTS * programs.SUFFIX * own.text.hidden_size


def bounds(found: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Keys, values and bounds of all figures that have one."""
    checked = []
    for key, value in found.items():
        name, alias, work, figure = key.split("/")
        limit = None
        if figure == "unknown":
            limit = 0.0
        elif figure == "bound_ratio":
            limit = DIVIDED_RATIO if (name, alias, work) == QUICK_MESH else RATIOS.get(work)
        elif figure == "flop_ratio" and work in ("trace", "rerun", "extract", "decode"):
            limit = FLOP_RATIO
        elif figure in ("weight_copies", "score_tensors", "collective_gb_data") and work in ("trace", "rerun"):
            limit = 0.0
        elif figure == "collective_ms" and (name, alias, work) == QUICK_MESH:
            limit = SENT_SHARE * found[f"{name}/{alias}/{work}/roofline_ms"]
        elif figure == "collectives_per_block" and work in ("trace", "rerun", "extract", "decode"):
            limit = 2.0
        elif figure == "temporary_gb" and name == "h100" and work == "trace":
            limit = LARGE_TRACE_GB.get(alias, TRACE_GB)
        elif figure == "temporary_gb" and name == "h100" and work == "rerun":
            limit = RERUN_GB + suffix_gb(alias)
        if limit is not None:
            checked.append((key, value, limit))
    return checked


def report(found: Mapping[str, float]) -> int:
    """Prints the bounds as passed or missed; returns the number of those that are missed."""
    checked = bounds(found)
    for key, value, limit in checked:
        print(f"{'passed' if value <= limit else 'MISSED'}  {key} = {value:.4g} (at most {limit:.4g})")
    missed = sum(value > limit for _, value, limit in checked)
    print(f"{len(checked) - missed} bounds passed, {missed} missed")
    return missed


# --- results --------------------------------------------------------------------------------------------------------


def table(found: Mapping[str, float]) -> str:
    """All figures as a Markdown table."""
    rows: dict[tuple[str, ...], Figures] = {}
    for key, value in found.items():
        *row, figure = key.split("/")
        rows.setdefault(tuple(row), {})[figure] = value
    lines = ["| target | model | work | " + " | ".join(SHOWN) + " |", "| --- " * (3 + len(SHOWN)) + "|"]
    for row, own in rows.items():
        shown = [format(int(own[name]) if form == "d" else own[name], form) for name, form in SHOWN.items()]
        lines.append("| " + " | ".join([*row, *shown]) + " |")
    return "\n".join(lines)


def write(folder: Path, found: Mapping[str, float]) -> None:
    """Writes both files."""
    write_json(folder / "accelerator.json", found)
    write_text(folder / "accelerator.md", f"{HEADER}\n\nCompiled with jax {jax.__version__}.\n\n{table(found)}\n")


def chosen(text: str | None, known: Iterable[str], default: Iterable[str]) -> list[str]:
    """Names joined by commas."""
    names, every = default if text is None else text.split(","), [*known]
    for name in names:
        if name not in every:
            raise SystemExit(f"{name!r} is not one of {', '.join(every)}")
    return [*names]


def combinations(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Targets, models and works that are asked for."""
    quick = options.quick
    works = chosen(options.works, programs.WORKS, QUICK_WORKS if quick else programs.WORKS)
    models = chosen(options.models, programs.MODELS, QUICK_TARGETS if quick else programs.MODELS)
    names = ["h100", "v5e", "v5p"] if options.targets is None else options.targets.split(",")
    wanted = []
    for alias in models:
        own = QUICK_TARGETS[alias] if quick and options.targets is None and alias in QUICK_TARGETS else names
        wanted += [(name, alias, work) for name in own for work in works if programs.does(alias, work)]
    everything = quick and options.targets is None and options.models is None and options.works is None
    return [QUICK_MESH, *wanted] if everything else wanted


def measured(wanted: Sequence[tuple[str, str, str]], jobs: int) -> Iterator[tuple[str, dict[str, Figures] | str]]:
    """Results of works, or why there are none, as they become known; in this process or in several."""
    if jobs == 1:
        yield from ((f"{name}/{alias}", attempt(name, alias, work)) for name, alias, work in wanted)
        return
    # Programs for TPUs take longest to compile, and so come first.
    order = sorted(wanted, key=lambda one: targets.DEVICES[targets.named(one[0])[0]].platform != "tpu")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), compile_anew) as pool:
        running = {pool.submit(attempt, *one): "/".join(one[:2]) for one in order}
        yield from ((running[done], done.result()) for done in as_completed(running))


def scaling_cases(options: argparse.Namespace) -> list[scaling.Case]:
    """Cases of the chosen accelerators and models."""
    names = chosen(options.targets, [case.name for case in scaling.CASES], [case.name for case in scaling.CASES])
    models = chosen(options.models, [case.alias for case in scaling.CASES], [case.alias for case in scaling.CASES])
    return [case for case in scaling.CASES if case.name in names and case.alias in models]


def scale(folder: Path, cases: Sequence[scaling.Case], *, resume: bool) -> int:
    """Compiles sweeps for more and more devices; returns 1 if one does not compile.

    What is compiled is kept in `scaling_works.json`, from which `--resume` continues.
    """
    path = folder / "scaling_works.json"
    known: dict[str, dict[str, Figures]] = json.loads(path.read_text()) if resume and path.exists() else {}
    rows: dict[str, Figures] = {}
    failures: list[str] = []

    def measure_once(target: targets.Target, alias: str, work: str) -> dict[str, Figures]:
        name = f"{target.name}-{target.data}x{target.model}/{alias}/{work}"
        if name not in known:
            known[name] = measure_on(target, alias, work)
            path.write_text(json.dumps(known, indent=1))
        return known[name]

    def failed(row: str, error: Exception) -> None:
        failures.append(row)
        print(f"{row}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}", flush=True)

    print(scaling.HEADER, "\n", flush=True)
    for found in scaling.scaled(cases, measure_once, failed):
        rows |= found
        row, own = [*found.items()][-1]
        print(f"{row}: bound {own['bound_ms']:.4g} ms, efficiency {own['efficiency']:.1%}", flush=True)
        scaling.write(folder, rows)
    print(f"\n{scaling.table(rows)}\n")
    for key, value, least in scaling.bounds(rows):
        print(f"{'reached' if value >= least else 'MISSED '}  {key} = {value:.3g} (aim: {least:.2g})")
    return int(bool(failures))


def compile_anew() -> None:
    """Reads no program from JAX's cache, or `compile_s` would be the time that this takes."""
    jax.config.update("jax_enable_compilation_cache", False)


def attempt(name: str, alias: str, work: str) -> dict[str, Figures] | str:
    """`measure`, or a line that says why it failed."""
    try:
        return measure(name, alias, work)
    except Exception as error:  # compilers raise many kinds; the other works still count
        return f"{work}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, counts, writes; returns 1 if a bound is missed in quick mode, or a program does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--targets",
        help=f"some of {', '.join(targets.TARGETS)}, or v5e-8 and so on for so many chips; h100,v5e,v5p by default",
    )
    parser.add_argument("--models", help="short names of published models; all by default")
    parser.add_argument("--works", help=f"some of {', '.join(programs.WORKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="two models and the scorer; fails if a bound is missed")
    parser.add_argument("--scaling", action="store_true", help="sweeps on more and more devices, into scaling.json")
    parser.add_argument("--resume", action="store_true", help="keep what the folder holds, and add what is missing")
    parser.add_argument("--jobs", type=int, help="programs that are compiled at a time; 1 by default, 2 in quick mode")
    options = parser.parse_args(arguments)
    cases, wanted = scaling_cases(options) if options.scaling else [], combinations(options)
    names = [case.name for case in cases] or [targets.named(name)[0] for name, _, _ in wanted]
    for name in dict.fromkeys(names):
        if problem := targets.missing(name):
            raise SystemExit(problem)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.scaling:
        return scale(options.out, cases, resume=options.resume)
    path, failed, started = options.out / "accelerator.json", 0, time.perf_counter()
    found: dict[str, float] = json.loads(path.read_text()) if options.resume and path.exists() else {}
    wanted = [one for one in wanted if f"{'/'.join(one)}/compile_s" not in found]
    print(HEADER, "\n", flush=True)
    for row, result in measured(wanted, options.jobs or (2 if options.quick else 1)):
        if isinstance(result, str):
            failed += 1
            print(f"{row}/{result}", flush=True)
            continue
        for part, own in result.items():
            found |= {f"{row}/{part}/{figure}": value for figure, value in own.items()}
            shown = ("temporary_gb", "flop_ratio", "bytes_ratio", "weight_copies", "score_tensors", "bound_ratio")
            text = ", ".join(f"{figure} {own[figure]:.4g}" for figure in (*shown, "compile_s"))
            print(f"{row}/{part}: {text}", flush=True)
        write(options.out, found)
    elapsed, used = time.perf_counter() - started, os.times()
    processors = sum((used.user, used.system, used.children_user, used.children_system))
    print(f"\n{table(found)}\n\n{len(wanted)} works in {elapsed:.0f} s, {processors:.0f} s of one core")
    missed = report(found) if options.quick else 0
    return int(bool(missed or failed))


if __name__ == "__main__":
    compile_anew()
    sys.exit(main())
