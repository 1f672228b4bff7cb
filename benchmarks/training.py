"""Compares one fine-tuning step of jaxid with PyTorch: the same loss, weights, pictures and CPUs.

    pip install -e ".[bench]"
    python benchmarks/training.py --out results/ [--quick]

Prints a table and writes `training.json`, a flat map "finetune_step/{model}/{figure}" -> number. A step computes the
answer's cross-entropy plus the ID loss on a few pictures and its gradient with respect to the MLPs of the tower's last
six blocks and the projector, clips the gradient and applies AdamW. Tokens are all tokens of the prompts, those of
pictures included. Times are medians of rounds in which the systems take turns. `compile_s` is the time of jaxid's first
step beyond that of a later one. If the systems do not find the same losses, gradients and trained tensors, there is no
result and the exit code is 1.

Memory is measured in a fresh process for every system: `step_mb` is the peak during two steps (and their compilation)
beyond the memory with loaded weights, `peak_mb` the peak in all.

Systems:
    torch                    Hugging Face's class, frozen parameters without gradients, logits of every token.
    torch-checkpointed       the same, but the backward pass recomputes the inside of every block.
    torch-lean               the same as torch, but logits of the answers only.
    torch-lean-checkpointed  both.
    jaxid-nothing            jaxid's training step, as `jaxid finetune` runs it, with nothing recomputed.
    jaxid-cheap              everything but products with weights is recomputed, which is the default.
    jaxid-all                everything within a block is recomputed.
"""

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timing
from interventions import MAX_DISTURBANCE, Disagreement
from loading import status

from jaxid.errors import JaxidError
from jaxid.io import ensure_output_folder, write_json
from jaxid.nn.layers import Recompute

if TYPE_CHECKING:  # JAX and PyTorch may only be imported after `timing.use_cpus`
    import jax
    import published_training

    from jaxid.experiments.finetune import Task
    from jaxid.families.base import Model
    from jaxid.nn.keys import Key

TORCH = {
    "torch": {},
    "torch-checkpointed": {"checkpointed": True},
    "torch-lean": {"lean": True},
    "torch-lean-checkpointed": {"checkpointed": True, "lean": True},
}
JAXID: dict[str, Recompute] = {"jaxid-nothing": "nothing", "jaxid-cheap": "cheap", "jaxid-all": "all"}
"""What each of jaxid's systems recomputes."""

DEFAULT = "jaxid-cheap"

WORK = "finetune_step"
PICTURES = 4
SEED = 0
SPEED_AIM, MEMORY_AIM = 1.3, 0.7
TOLERANCES = {"losses": 1e-5, "tensors": 1e-5, "gradients": 1e-4}
"""Largest allowed differences: of a loss, relative to it; of a trained tensor after one step, absolute; of a gradient,
relative to its largest element."""

Found = Mapping[str, Mapping[str, float | np.ndarray]]
"""Results of a system's first step: numbers or arrays by name, for each key of `TOLERANCES`."""


def check_agreement(results: Mapping[str, Found], reference: str) -> dict[str, float]:
    """Compares every system's first step with the reference's.

    Returns:
        The largest difference of each kind, in the units of `TOLERANCES`.

    Raises:
        Disagreement: naming the system and the value.
    """
    largest = dict.fromkeys(TOLERANCES, 0.0)
    expected = results[reference]
    for system, found in results.items():
        for kind, tolerance in TOLERANCES.items():
            if set(found[kind]) != set(expected[kind]):
                raise Disagreement(f"{kind}: {system} gives {sorted(found[kind])}, not {sorted(expected[kind])}.")
            for name, value in found[kind].items():
                mine, theirs = np.asarray(value, np.float64), np.asarray(expected[kind][name], np.float64)
                if mine.shape != theirs.shape:
                    raise Disagreement(f"{kind}: {name} of {system} has shape {mine.shape}, not {theirs.shape}.")
                scale = 1.0 if kind == "tensors" else max(float(np.abs(theirs).max()), 1e-12)
                difference = float(np.max(np.abs(mine - theirs))) / scale
                if not difference <= tolerance:
                    raise Disagreement(
                        f"{kind}: {name} of {system} is off by {difference:.2g}; {tolerance:g} is allowed."
                    )
                largest[kind] = max(largest[kind], difference)
    return largest


# --- jaxid -----------------------------------------------------------------------------------------------------------


def make_task(model: "Model", pictures: int, *, recompute: Recompute) -> "Task":
    """A run on random pictures of one pair of objects and random IDs; their content does not affect times."""
    from jaxid.data.grid import CELL_SIZE, GRID, GridItem
    from jaxid.experiments.finetune import FinetuneConfig, task
    from jaxid.ids.spatial import SpatialIDs

    rng = np.random.default_rng(SEED)
    side, layers = model.config.vision_config.image_size, model.num_layers
    cells = [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (3, 1)]
    items = [
        GridItem(
            picture=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
            object_a="fish",
            object_b="star",
            cell_a=(0, 0),
            cell_b=cells[index],
            size=CELL_SIZE,
        )
        for index in range(pictures)
    ]
    shape = (layers, 1, 1, GRID, GRID, model.width)
    ids = SpatialIDs(
        values=rng.standard_normal(shape).astype(np.float32),
        counts=np.ones(shape[1:-1], np.int32),
        objects=("random",),
        sizes=(CELL_SIZE,),
        layer_names=tuple(f"blocks.{layer}.resid_post" for layer in range(layers)),
        model=model.name,
    )
    config = FinetuneConfig(
        groups=1,
        batch_size=pictures,
        id_layer=11 * layers // 32,
        recompute=recompute,
        prompt="plain",
        case="lower",
    )
    return task(model, items, ids, config)


class JaxidSteps:
    """Steps of a run on its first batch."""

    def __init__(self, task: "Task"):
        """Moves everything that a step reads to the device."""
        import jax

        from jaxid.train import loop as training

        stage = task.stage()
        self.task = task
        self.batch = jax.device_put(dict(stage.batch(0)))
        self.constants = jax.device_put(dict(stage.constants))
        trained = task.selection.split(task.model.parameters)
        self.state = training._start(stage, trained)
        self.step = training._step_function(stage)

    def __call__(self) -> Mapping[str, float]:
        """Runs a step and returns its losses."""
        import jax

        self.state, metrics = jax.block_until_ready(self.step(self.state, self.batch, self.constants))
        return {name: float(metrics[name]) for name in ("loss", "answer_loss", "id_loss")}

    def gradients(self) -> dict[str, np.ndarray]:
        """The first step's clipped gradients, recovered from AdamW's first moment."""
        import optax

        return {name: 10 * value for name, value in self._published(optax.tree.get(self.state, "mu")).items()}

    def tensors(self) -> dict[str, np.ndarray]:
        """The current trained tensors."""
        return self._published(self.state["parameters"])

    def _published(self, trained: Mapping[str, "jax.Array"]) -> dict[str, np.ndarray]:
        """Trained tensors by their names in the checkpoint."""
        arrays = {path: np.asarray(value) for path, value in trained.items()}
        found = {}
        for name, key, index in trained_names(self.task):
            values = arrays[key.target]
            found[name] = np.array(key.to_checkpoint(values if index is None else values[index]))
        return found


def trained_names(task: "Task") -> Iterator[tuple[str, "Key", int | None]]:
    """Every trained tensor: its name in the checkpoint, its key, and its index among the parameter's trained rows."""
    from jaxid.checkpoints.tensors import flatten
    from jaxid.families.llava import LlavaConfig, llava_keys

    config = task.model.config
    assert isinstance(config, LlavaConfig)
    rows, parameters = dict(task.selection.rows), flatten(task.model.parameters)
    for key in llava_keys(config):
        if key.target not in rows:
            continue
        chosen = rows[key.target]
        if chosen is None:
            yield key.source, key, None
            continue
        for name, row in key.tensors(parameters[key.target].shape):
            if row in chosen:
                yield name, key, chosen.index(row)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def write_torch_inputs(task: "Task", folder: Path) -> None:
    """Writes the run's first batch, its settings and the names of trained tensors, for processes without JAX."""
    batch = task.stage().batch(0)
    inputs = batch["inputs"]
    if batch["labels"].shape[-1] != 1:
        raise JaxidError("the answers have more than one token, which the PyTorch step does not support.")
    length = int(batch["positions"].max()) + 1
    np.savez(
        folder / "batch.npz",
        token_ids=inputs["token_ids"][0, :, :length].astype(np.int64),
        valid=inputs["valid"][0, :, :length].astype(np.int64),
        pixels=inputs["pixels"][0],
        places=batch["positions"][0, :, 0].astype(np.int64),
        labels=batch["labels"][0, :, 0].astype(np.int64),
        word=batch["word"][0].reshape(-1).astype(np.int64),
        target=batch["target"][0],
    )
    config = task.config
    rise = math.ceil(config.warmup * config.steps)
    settings = {
        "id_layer": config.id_layer,
        "id_weight": config.id_weight,
        "rates": [config.learning_rate * (step + 1) / rise for step in range(rise)],
        "weight_decay": config.weight_decay,
        "clip_norm": config.clip_norm,
    }
    write_json(folder / "settings.json", settings | {"trained": [name for name, _, _ in trained_names(task)]})


def torch_steps(folder: Path, inputs: Path, systems: Sequence[str]) -> dict[str, "published_training.Steps"]:
    """PyTorch's systems, which share one network.

    Args:
        folder: the checkpoint.
        inputs: folder that `write_torch_inputs` wrote.
        systems: names of the systems.
    """
    import published_training
    import torch

    from jaxid.checkpoints.tensors import published_name
    from jaxid.families.llava import RENAMES

    torch.set_num_threads(timing.THREADS)
    network = published_training.load(folder)
    for parameter in network.parameters():  # reads the memory-mapped files before anything is timed
        parameter.data = parameter.data.clone()
    settings = json.loads((inputs / "settings.json").read_text())
    spelled = {published_name(name, RENAMES): name for name, _ in network.named_parameters()}
    chosen = [spelled[name] for name in settings.pop("trained")]
    made = published_training.Settings(**{**settings, "rates": tuple(settings["rates"])})
    examples = published_training.Examples.read(inputs / "batch.npz")
    return {system: published_training.Steps(network, chosen, examples, made, **TORCH[system]) for system in systems}


def published_names(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames tensors from Hugging Face's names in memory to those in the checkpoint."""
    from jaxid.checkpoints.tensors import published_name
    from jaxid.families.llava import RENAMES

    return {published_name(name, RENAMES): value for name, value in found.items()}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(folder: Path, pictures: int, rounds: int, scratch: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Times a step of all systems, in turn.

    Args:
        folder: the checkpoint.
        pictures: number of pictures in the batch.
        rounds: number of timed steps of each system.
        scratch: an empty folder.

    Returns:
        Figures by name, and the largest differences between the systems.

    Raises:
        Disagreement: if the systems do not agree.
    """
    from jaxid.checkpoints.loading import load

    model = load(folder)
    tasks = {name: make_task(model, pictures, recompute=recompute) for name, recompute in JAXID.items()}
    write_torch_inputs(tasks[DEFAULT], scratch)
    steps: dict[str, published_training.Steps | JaxidSteps] = {**torch_steps(folder, scratch, list(TORCH))}
    steps |= {name: JaxidSteps(task) for name, task in tasks.items()}
    first: dict[str, Found] = {}

    def call(name: str) -> Callable[[], None]:
        def step() -> None:
            losses = steps[name]()
            if name not in first:
                # Copied in the first call, which is not timed.
                first[name] = {
                    "losses": losses,
                    "tensors": published_names(steps[name].tensors()),
                    "gradients": published_names(steps[name].gradients()),
                }

        return step

    timed = timing.side_by_side({name: call(name) for name in steps}, rounds)
    largest = check_agreement(first, "torch")
    tokens = int(np.load(scratch / "batch.npz")["valid"].sum())
    figures = {"tokens": float(tokens)}
    for name, times in timed.items():
        figures |= {f"{name}_s": times.median, f"{name}_tokens_per_s": tokens / times.median}
    figures |= {f"{name}_compile_s": timed[name].warm_up for name in JAXID}
    for ours in JAXID:
        figures |= {f"{ours}_speed_of_{name}": timed[name].median / timed[ours].median for name in TORCH}
    return figures, largest


def memory(folder: Path, pictures: int, scratch: Path, systems: Sequence[str]) -> dict[str, float]:
    """Memory of a step in MB, in a separate process for every system; `scratch` is the folder that `measure` filled."""
    found: dict[str, float] = {}
    for system in systems:
        command = [sys.executable, __file__, "--out", ".", "--memory-of", system, str(folder), str(scratch)]
        done = subprocess.run([*command, "--pictures", str(pictures)], capture_output=True, text=True, check=True)
        step, peak = json.loads(done.stdout.splitlines()[-1])
        found |= {f"{system}_step_mb": step, f"{system}_peak_mb": peak}
    for ours in JAXID:
        if ours in systems:
            others = [name for name in TORCH if name in systems]
            own = found[f"{ours}_step_mb"]
            found |= {f"{ours}_memory_of_{name}": own / found[f"{name}_step_mb"] for name in others}
    return found


def own_memory(system: str, folder: Path, scratch: Path, pictures: int) -> tuple[float, float]:
    """Peak memory of this process during two steps in MB: beyond its memory with loaded weights, and in all."""
    if system in JAXID:
        import jax

        from jaxid.checkpoints.loading import load

        model = load(folder)
        for leaf in jax.tree.leaves(model.parameters):
            np.asarray(leaf).sum()
        made = make_task(model, pictures, recompute=JAXID[system])
        before = _forget_peak()
        steps = JaxidSteps(made)
    else:
        import published_training  # noqa: F401 - the memory of PyTorch itself is not part of a step

        steps = torch_steps(folder, scratch, [system])[system]
        before = _forget_peak()
    for _ in range(2):
        steps()
    peak = status("VmHWM")
    return (peak - before) / 2**20, peak / 2**20


def _forget_peak() -> int:
    """Resets this process's peak memory, if the operating system can, and returns its current memory in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def print_table(model: str, results: Mapping[str, float], largest: Mapping[str, float]) -> None:
    """Prints one row for each system, and the aims."""
    value = {key.rsplit("/", 1)[1]: number for key, number in results.items()}
    rows = [["system", "s/step", "tokens/s", "of torch", "compile s", "step MB", "all MB"]]
    for name in (*TORCH, *JAXID):
        speed = value[f"{name}_tokens_per_s"] / value["torch_tokens_per_s"]
        row = [name, f"{value[f'{name}_s']:.3f}", f"{value[f'{name}_tokens_per_s']:.0f}", f"{speed:.2f}x"]
        compiled = value.get(f"{name}_compile_s")
        row.append("" if compiled is None else f"{compiled:.1f}")
        row += [f"{value.get(f'{name}_{kind}_mb', float('nan')):.0f}" for kind in ("step", "peak")]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{WORK}, {model}, {value['tokens']:.0f} tokens")
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("largest differences: " + ", ".join(f"{name} {one:.1g}" for name, one in largest.items()))
    for ours in JAXID:
        speeds = [f"{value[f'{ours}_speed_of_{name}']:.2f}x" for name in TORCH]
        print(f"speed of {ours}: {', '.join(speeds)} of PyTorch's in their order; aim {SPEED_AIM:g}x of torch")
        if f"{ours}_step_mb" in value:
            shares = [f"{value[f'{ours}_memory_of_{name}']:.2f}" for name in TORCH]
            print(f"memory of {ours}: {', '.join(shares)} of PyTorch's; aim {MEMORY_AIM:g} of torch's", flush=True)


def run(out: Path, *, quick: bool, pictures: int, rounds: int) -> dict[str, float]:
    """Measures, prints the table and writes `training.json`.

    Raises:
        JaxidError: if the model cannot be loaded or the results cannot be written.
        Disagreement: if the systems do not agree; nothing is written then.
    """
    cpus = timing.use_cpus()
    import geometry

    from jaxid.checkpoints.loading import find_folder

    ensure_output_folder(out)
    for line in timing.describe_machine(cpus):
        print(line, flush=True)
    model = "zoo" if quick else "geometry"
    with tempfile.TemporaryDirectory() as temporary, timing.Disturbance(cpus) as disturbance:
        scratch = Path(temporary)
        folder = find_folder("tiny-llava") if quick else geometry.write(scratch / "geometry")
        figures, largest = measure(folder, pictures, rounds, scratch)
        if not quick:
            print(
                "timed: " + ", ".join(f"{name} {figures[f'{name}_s']:.3f} s" for name in (*TORCH, *JAXID)), flush=True
            )
            figures |= memory(folder, pictures, scratch, (*TORCH, *JAXID))
    results = {f"{WORK}/{model}/{name}": value for name, value in figures.items()}
    print_table(model, results, largest)
    if disturbance.share is not None and not quick:
        verdict = "" if disturbance.share < MAX_DISTURBANCE else ": the machine is too busy, do not quote these numbers"
        print(f"other processes took {disturbance.share:.1%} of these CPUs{verdict}")
    print(f"wrote {write_json(out / 'training.json', results)}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 for a result, 1 if systems disagree, 2 for an invalid argument."""
    parser = argparse.ArgumentParser(description="Compares a fine-tuning step of jaxid with PyTorch on CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for training.json")
    parser.add_argument("--quick", action="store_true", help="the shipped tiny-llava; does not measure memory")
    parser.add_argument("--pictures", type=int, default=PICTURES, choices=range(2, 5), help="pictures per step")
    parser.add_argument("--rounds", type=int, default=timing.MIN_ROUNDS, help="timed steps of each system")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.memory_of:
            timing.use_cpus()
            system, folder, scratch = options.memory_of
            print(json.dumps(own_memory(system, Path(folder), Path(scratch), options.pictures)))
            return 0
        run(options.out, quick=options.quick, pictures=options.pictures, rounds=options.rounds)
    except Disagreement as error:
        print(f"error: the systems do not agree, so their times are meaningless. {error}", file=sys.stderr)
        return 1
    except JaxidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
