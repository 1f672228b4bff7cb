"""Compares jaxid with PyTorch on one GPU: the same weights, prompts, edits and device, in bfloat16.

    bash benchmarks/gpu.sh                  installs what is needed, then does the following
    python benchmarks/gpu.py --out results/ [--models llava-7b,qwen-7b,gemma-12b,dcsm] [--seconds 460] [--tiny]

Each model has the geometry of the published one and random weights, which PyTorch makes on the device and hands over
through DLPack (`gpu_models`). Models run one after the other in processes of their own, so that both copies fit into 80
GB. Every part has a time budget. Results are written after every part: `gpu.jsonl` has a line for each, `gpu.json` is a
flat map "{model}/{part}/{figure}" -> number, `gpu.md` a table with date, device and versions. A part for which there is
no time left is skipped and said to be. `--tiny` runs the same code on CPU in float32 with small shapes and fails where
the two frameworks differ.

Parts:
    trace       log-probabilities of the answers of 8 prompts; PyTorch: a pass of the batch, or of one prompt at a time
    steering    48 edits of one word in three layers x 8 prompts, with the control pass
    belief_swap edits of two words in every layer x 8 prompts, with the control pass
    extraction  one word's residual stream of 8 prompts in all layers
    finetune    a step on 4 prompts: the MLPs of the tower's last blocks and the projector, answer and ID loss
    dcsm        scores of 256 x 256 pairs of a picture and a caption, maps of 197 x 30 tokens

Times are medians in milliseconds: per prompt for trace and extraction, per prompt and edit for the edits, per step, and
per 1,000 pairs. `published` (one prompt at a time, a control pass for every edit) is timed on two edits of two prompts.
`batched` runs all prompts together, one pass for each edit, and is timed on four edits. `nnsight` is measured where it
is installed. In `dcsm`, `published` is the procedure in float32 (products in TF32), `batched` under float16 autocast.
`roofline` is the least time of the work on this device, from `accelerator_ideal`. Memory is the peak of
each framework's own allocator in GB since the process began (jaxid) or in the part (PyTorch); both include its weights.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MODELS = ("llava-7b", "qwen-7b", "gemma-12b", "dcsm")
SHARES = {"llava-7b": 0.28, "qwen-7b": 0.28, "gemma-12b": 0.34, "dcsm": 0.1}
"""Of the time, for each model."""

UNITS = {
    "trace": "prompt",
    "extraction": "prompt",
    "steering": "prompt and edit",
    "belief_swap": "prompt and edit",
    "finetune": "step",
    "dcsm": "1,000 pairs",
}
TOLERANCE = 1e-3
"""Largest difference in float32, of log-probabilities and losses, and of numbers relative to the largest one."""


class Report:
    """Results that are written as soon as they are known."""

    def __init__(self, out: Path):
        """Opens the folder's `gpu.jsonl`."""
        self.path = out / "gpu.jsonl"

    def add(self, model: str, part: str, figures: Mapping[str, Any]) -> None:
        """Writes a part's figures."""
        with self.path.open("a") as file:
            file.write(json.dumps({"model": model, "part": part, **figures}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{model} {part}: " + ", ".join(f"{name} {_short(value)}" for name, value in figures.items()), flush=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- one model -------------------------------------------------------------------------------------------------------


def run_parts(
    model: str, parts: Mapping[str, Callable[[], dict[str, float]]], report: Report, memory: "Memory"
) -> None:
    """Runs parts in turn; one that fails or has no time left is reported, and the next one begins."""
    for name, part in parts.items():
        memory.reset()
        try:
            figures: dict[str, Any] = {**part(), **memory.figures()}
        except TimeoutError as error:
            figures = {"skipped": str(error)}
        except Exception as error:
            traceback.print_exc()
            figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
        report.add(model, name, figures)
        gc.collect()


class Memory:
    """Peaks of both frameworks' allocators; nothing on a device that has none."""

    def __init__(self, cuda: bool):
        """For a GPU or not."""
        self.cuda = cuda

    def reset(self) -> None:
        """Begins a part."""
        if self.cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def figures(self) -> dict[str, float]:
        """The peaks in GB."""
        if not self.cuda:
            return {}
        import jax
        import torch

        found = {"torch_gb": torch.cuda.max_memory_allocated() / 1e9}
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return found if peak is None else found | {"jaxid_gb": peak / 1e9}


def run_model(model: str, out: Path, seconds: float, *, tiny: bool) -> None:
    """All parts of one model, in this process."""
    deadline, report = time.monotonic() + seconds, Report(out)
    import torch

    from jaxid.errors import InputError

    if not tiny and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU; --tiny runs the same code on CPU.")
    device = torch.device("cpu" if tiny else "cuda")
    if tiny:
        torch.set_num_threads(1)
    import gpu_models
    import gpu_parts
    import jax

    if not tiny and jax.default_backend() != "gpu":
        raise InputError("JAX finds no GPU; install jax[cuda12].")
    clock = gpu_parts.Clock(deadline, lambda: None if tiny else torch.cuda.synchronize())
    memory = Memory(not tiny)
    if model == "dcsm":
        run_parts(model, {"dcsm": lambda: gpu_parts.dcsm_part(clock, device, tiny=tiny)}, report, memory)
        return
    started = time.monotonic()
    setting = gpu_models.make(model, device, tiny=tiny)
    report.add(model, "made", {"seconds": time.monotonic() - started, "tokens": float(setting.geometry.tokens)})
    run_parts(model, gpu_parts.model_parts(setting, clock), report, memory)


# --- all models ------------------------------------------------------------------------------------------------------


def collect(out: Path) -> dict[str, float]:
    """Writes `gpu.json` and `gpu.md` from the lines so far, and returns the numbers."""
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    numbers: dict[str, float] = {}
    columns = ("jaxid_ms", "batched_ms", "published_ms", "nnsight_ms", "roofline_ms")
    table = [
        "| model | part | per | jaxid ms | batched | published | nnsight | roofline | difference | GB | torch GB |"
    ]
    table.append("|" + " --- |" * 11)
    for line in lines:
        name = f"{line['model']}/{line['part']}"
        numbers |= {f"{name}/{key}": value for key, value in line.items() if isinstance(value, float)}
        if line["part"] not in UNITS:
            continue
        cells = [line["model"], line["part"], UNITS[line["part"]]]
        if "jaxid_ms" not in line:
            cells += [str(line.get("failed") or line.get("skipped")), *[""] * 7]
        else:
            ours = line["jaxid_ms"]
            for key in columns:
                ratio = f" ({line[key] / ours:.3g}x)" if key in line and key != "jaxid_ms" else ""
                cells.append(f"{line[key]:.4g}{ratio}" if key in line else "")
            cells += [f"{line['difference']:.1e}", *(_short(line.get(key, "")) for key in ("jaxid_gb", "torch_gb"))]
        table.append("| " + " | ".join(cells) + " |")
    (out / "gpu.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (out / "gpu.md").write_text("\n".join([*describe(), "", *table]) + "\n")
    return numbers


def describe() -> list[str]:
    """Date, device and versions."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        device = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or "no GPU"
    except (OSError, subprocess.TimeoutExpired):
        device = "no GPU"
    versions = []
    for package in ("jax", "jaxlib", "jax-cuda12-plugin", "torch", "transformers", "nnsight", "flax"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [f"{datetime.date.today().isoformat()}, {device}, {', '.join(versions)}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 if a part failed, or differs in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.jsonl, gpu.json and gpu.md")
    parser.add_argument("--models", default=",".join(MODELS), help="models, separated by commas; dcsm is one of them")
    parser.add_argument("--seconds", type=float, default=460.0, help="time for everything")
    parser.add_argument("--tiny", action="store_true", help="small shapes in float32 on CPU")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.model:
        run_model(options.model, options.out, options.seconds, tiny=options.tiny)
        return 0
    models = options.models.split(",")
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        parser.error(f"unknown models: {', '.join(unknown)}; there are {', '.join(MODELS)}.")
    (options.out / "gpu.jsonl").write_text("")
    # Both frameworks take what they need as they need it.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if options.tiny:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    deadline, failed = time.monotonic() + options.seconds, []
    for index, model in enumerate(models):
        left = deadline - time.monotonic()
        seconds = left * SHARES[model] / sum(SHARES[name] for name in models[index:])
        command = [sys.executable, __file__, "--out", str(options.out), "--model", model, "--seconds", f"{seconds:.0f}"]
        try:
            # A part that began before its deadline may end after it.
            limit = min(1.15 * seconds + 5, left)
            done = subprocess.run(command + ["--tiny"] * options.tiny, env=environment, timeout=limit)
            failed += [model] * (done.returncode != 0)
        except subprocess.TimeoutExpired:
            print(f"{model} was stopped after {limit:.0f} s", flush=True)
            failed.append(model)
        numbers = collect(options.out)
    print((options.out / "gpu.md").read_text())
    parts = [json.loads(line) for line in (options.out / "gpu.jsonl").read_text().splitlines()]
    failed += [f"{part['model']} {part['part']}" for part in parts if "failed" in part]
    if options.tiny:
        failed += [name for name, value in numbers.items() if name.endswith("/difference") and not value <= TOLERANCE]
    if failed:
        print(f"error: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
