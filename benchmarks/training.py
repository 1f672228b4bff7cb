"""One fine-tuning step, jaxid beside PyTorch: the same loss, weights, pictures and CPUs.

    pip install -e ".[bench]"
    python benchmarks/training.py --out results/ [--quick]

Prints a table and writes `training.json`, a flat map "finetune_step/{model}/{figure}" -> number. A step is the answer's
cross-entropy plus the ID loss on a few pictures, its gradient with respect to the MLPs of the tower's last six blocks
and the projector, clipping and AdamW. Tokens are all tokens of the prompts, the pictures' included. Times are medians
of rounds in which the systems take turns; `compile_s` is what jaxid's first step took beyond a later one. All systems
have to find the same losses, gradients and trained tensors, or there is no result: the exit code is then 1.

Memory is measured in a fresh process for every system: `step_mb` is the most that two steps (and their compilation)
held beyond what the process held with the weights loaded, `peak_mb` the most that it held in all.

Systems:
    torch                    Hugging Face's class, frozen parameters without gradients, logits of every token.
    torch-checkpointed       the backward pass recomputes the inside of every block.
    torch-lean               logits of the answers alone.
    torch-lean-checkpointed  both.
    jaxid-nothing            its training step, as `jaxid finetune` runs it, with nothing recomputed.
    jaxid-cheap              all but the products with weights is recomputed, as is the default.
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
from typing import Any

import numpy as np
import timing
from interventions import MAX_DISTURBANCE, Disagreement
from loading import status

from jaxid.errors import JaxidError
from jaxid.io import ensure_output_folder, write_json
from jaxid.nn.layers import Recompute

TORCH = {
    "torch": {},
    "torch-checkpointed": {"checkpointed": True},
    "torch-lean": {"lean": True},
    "torch-lean-checkpointed": {"checkpointed": True, "lean": True},
}
JAXID: dict[str, Recompute] = {"jaxid-nothing": "nothing", "jaxid-cheap": "cheap", "jaxid-all": "all"}
"""What is recomputed."""

DEFAULT = "jaxid-cheap"

WORK = "finetune_step"
PICTURES = 4
SEED = 0
SPEED_AIM, MEMORY_AIM = 1.3, 0.7
TOLERANCES = {"losses": 1e-5, "tensors": 1e-5, "gradients": 1e-4}
"""Largest differences that count as agreement: of a loss, as a share of it; of a trained tensor after one step; of a
gradient, as a share of the tensor's largest."""

Found = Mapping[str, Mapping[str, Any]]
"""What a system's first step finds, by the names of `TOLERANCES`: numbers or arrays by name."""


def check_agreement(results: Mapping[str, Found], reference: str) -> dict[str, float]:
    """Compares every system's first step with the reference's.

    Returns:
        The largest difference of each kind, measured as `TOLERANCES` are.

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
                    raise Disagreement(f"{kind}: {name} of {system} is {difference:.2g} off, {tolerance:g} is allowed.")
                largest[kind] = max(largest[kind], difference)
    return largest


# --- jaxid -----------------------------------------------------------------------------------------------------------


def make_task(model: Any, pictures: int, *, recompute: Recompute) -> Any:
    """A run on random pictures of one pair of objects, and random IDs, whose content costs no time."""
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
            cell_b=cells[number],
            size=CELL_SIZE,
        )
        for number in range(pictures)
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
        template="{query}",
        case="lower",
    )
    return task(model, items, ids, config)


class JaxidSteps:
    """Steps of a run on its first batch."""

    def __init__(self, task: Any):
        """Puts everything that a step reads on the device."""
        import jax

        from jaxid.train import loop as training

        stage = task.stage()
        self.task = task
        self.batch = jax.device_put(dict(stage.batch(0)))
        self.constants = jax.device_put(dict(stage.constants))
        trained = task.selection.split(task.model.parameters)
        self.state = training._start(stage, trained)
        self.step = training._step_function(stage, 1)

    def __call__(self) -> Mapping[str, float]:
        """A step; its losses."""
        import jax

        self.state, metrics = jax.block_until_ready(self.step(self.state, self.batch, self.constants))
        return {name: float(metrics[name]) for name in ("loss", "answer_loss", "id_loss")}

    def gradients(self) -> dict[str, np.ndarray]:
        """The first step's gradients, clipped, read off AdamW's first moment."""
        import optax

        return {name: 10 * value for name, value in self._published(optax.tree.get(self.state, "mu")).items()}

    def tensors(self) -> dict[str, np.ndarray]:
        """What is trained, as it is now."""
        return self._published(self.state["parameters"])

    def _published(self, trained: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Trained tensors by the checkpoint's names."""
        arrays = {path: np.asarray(value) for path, value in trained.items()}
        found = {}
        for name, key, index in trained_names(self.task):
            values = arrays[key.target]
            found[name] = np.array(key.to_checkpoint(values if index is None else values[index]))
        return found


def trained_names(task: Any) -> Iterator[tuple[str, Any, int | None]]:
    """Every trained tensor: the checkpoint's name, its key, and its place among the parameter's trained rows."""
    from jaxid.checkpoints.tensors import flatten
    from jaxid.families.llava import llava_keys

    rows, parameters = dict(task.selection.rows), flatten(task.model.parameters)
    for key in llava_keys(task.model.config):
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


def write_torch_inputs(task: Any, folder: Path) -> None:
    """Writes the run's first batch, the names of what is trained and the settings, for processes without JAX."""
    batch = task.stage().batch(0)
    inputs = batch["inputs"]
    if batch["labels"].shape[-1] != 1:
        raise JaxidError("the answers have more than one token, for which the PyTorch step is not written.")
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


def torch_steps(folder: Path, inputs: Path, systems: Sequence[str]) -> dict[str, Any]:
    """PyTorch's systems on one network.

    Args:
        folder: the checkpoint.
        inputs: what `write_torch_inputs` wrote.
        systems: names.
    """
    import published_training
    import torch

    from jaxid.checkpoints.tensors import published_name
    from jaxid.families.llava import RENAMES

    torch.set_num_threads(timing.THREADS)
    network = published_training.load(folder)
    for parameter in network.parameters():  # files are mapped: so that loading is over
        parameter.data = parameter.data.clone()
    settings = json.loads((inputs / "settings.json").read_text())
    spelled = {published_name(name, RENAMES): name for name, _ in network.named_parameters()}
    chosen = [spelled[name] for name in settings.pop("trained")]
    made = published_training.Settings(**{**settings, "rates": tuple(settings["rates"])})
    examples = published_training.Examples.read(inputs / "batch.npz")
    return {system: published_training.Steps(network, chosen, examples, made, **TORCH[system]) for system in systems}


def published_names(found: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's names in memory as the checkpoint's."""
    from jaxid.checkpoints.tensors import published_name
    from jaxid.families.llava import RENAMES

    return {published_name(name, RENAMES): value for name, value in found.items()}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(folder: Path, pictures: int, rounds: int, scratch: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Times a step of all systems, side by side.

    Args:
        folder: the checkpoint.
        pictures: of the batch.
        rounds: timed steps of each system.
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
    steps: dict[str, Any] = torch_steps(folder, scratch, list(TORCH))
    steps |= {name: JaxidSteps(task) for name, task in tasks.items()}
    first: dict[str, Found] = {}

    def call(name: str) -> Callable[[], None]:
        def step() -> None:
            losses = steps[name]()
            if name not in first:
                # Copied in the call that compiles, which is not among the timed ones.
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
    """Memory of a step, every system in a process of its own, MB; `scratch` is what `measure` filled."""
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
    """What two steps hold at most, in this process: beyond what it holds with the weights loaded, and in all; MB."""
    if system in JAXID:
        import jax

        from jaxid.checkpoints.loading import load

        model = load(folder)
        for leaf in jax.tree.leaves(model.parameters):
            np.asarray(leaf).sum()
        made = make_task(model, pictures, recompute=JAXID[system])
        before = _forget_peak()
        steps: Any = JaxidSteps(made)
    else:
        import published_training  # noqa: F401 - what PyTorch itself takes is no part of a step

        steps = torch_steps(folder, scratch, [system])[system]
        before = _forget_peak()
    for _ in range(2):
        steps()
    peak = status("VmHWM")
    return (peak - before) / 2**20, peak / 2**20


def _forget_peak() -> int:
    """Forgets the most that this process has held so far, where the system can; what it holds now, bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def print_table(model: str, results: Mapping[str, float], largest: Mapping[str, float]) -> None:
    """One row a system, and the aims."""
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
        JaxidError: if the model cannot be loaded or the results not be written.
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
        verdict = "" if disturbance.share < MAX_DISTURBANCE else ": too busy a machine, do not quote these numbers"
        print(f"other processes took {disturbance.share:.1%} of these CPUs{verdict}")
    print(f"wrote {write_json(out / 'training.json', results)}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line: 0 for a result, 1 where systems disagree, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(description="A fine-tuning step, jaxid beside PyTorch, on CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for training.json")
    parser.add_argument("--quick", action="store_true", help="the shipped tiny-llava, no memory")
    parser.add_argument("--pictures", type=int, default=PICTURES, choices=range(2, 5), help="of a step")
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
        print(f"error: the systems do not agree, so their times mean nothing. {error}", file=sys.stderr)
        return 1
    except JaxidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
