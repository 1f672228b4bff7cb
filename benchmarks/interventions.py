"""jaxid beside the published PyTorch procedure on the same weights, prompts, vectors and CPUs.

    pip install -e ".[bench]"
    python benchmarks/interventions.py --out results/ [--model tiny-llava] [--quick]

The second prints one table and writes `interventions.json`, a flat map "{work}/{model}/{figure}" -> number. Times are
seconds per prompt; `ratio_published` and `ratio_batched` say how many times longer PyTorch took, `compile_s` what
jaxid's first call took beyond a later one. All systems have to find the same log-probabilities, or there is no result:
the exit code is then 1.

Three systems: `published` (one prompt at a time, a control pass and a patched pass for every edit), `batched` (the
same hooks, one control pass a batch, one patched pass of the batch for every edit) and `jaxid` (its experiments).
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timing
from jaxtyping import Float

from jaxid.errors import JaxidError
from jaxid.results import ensure_output_folder, write_json

ITEMS, QUICK_ITEMS = 16, 2
"""Prompts of a run."""

TOLERANCE = 1e-4
"""Largest difference of two systems' log-probabilities, in nats, that counts as agreement."""

MAX_DISTURBANCE = 0.05
"""Share of the CPUs that other processes may take before the times are called unreliable."""

REFERENCE = "jaxid"
SYSTEMS = ("published", "batched", REFERENCE)
SEED = 0

LogProbs = Mapping[str, Float[np.ndarray, "..."]]
"""What a system finds: name of the quantity -> log-probabilities."""


class Disagreement(RuntimeError):
    """Systems that are meant to compute the same thing do not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A task that every system does on the same prompts."""

    name: str
    edits: int  # per prompt
    systems: Mapping[str, Callable[[], LogProbs]]


def check_agreement(
    work: str, results: Mapping[str, LogProbs], *, reference: str = REFERENCE, tolerance: float = TOLERANCE
) -> float:
    """Compares every system's log-probabilities with the reference's.

    Args:
        work: what was computed, for the message.
        results: by system.
        reference: the system that the others are compared with.
        tolerance: largest difference allowed, in nats.

    Returns:
        The largest difference found.

    Raises:
        Disagreement: naming the system, the quantity and the place, if a value is further off than the tolerance or
            not finite, or if systems give other quantities or shapes.
    """
    largest = 0.0
    for system, found in results.items():
        expected = results[reference]
        if set(found) != set(expected):
            raise Disagreement(f"{work}: {system} gives {sorted(found)}, {reference} {sorted(expected)}.")
        for name, values in found.items():
            if values.shape != expected[name].shape:
                raise Disagreement(
                    f"{work}: {name} of {system} has shape {values.shape}, of {reference} {expected[name].shape}."
                )
            difference = np.abs(values.astype(np.float64) - expected[name].astype(np.float64))
            place = np.unravel_index(int(np.argmax(difference)), difference.shape)  # a NaN counts as the largest
            if not difference[place] <= tolerance:
                raise Disagreement(
                    f"{work}: {name} of {system} is {values[place]:.7g} at {tuple(map(int, place))}, "
                    f"{reference} has {expected[name][place]:.7g}; they may differ by {tolerance:g} at most."
                )
            largest = max(largest, float(difference[place]))
    return largest


def make_works(model: Any, folder: Path, count: int) -> tuple[list[Work], list[str]]:
    """The tasks on random pictures and random IDs, whose content costs no time, and lines that describe the model."""
    import published
    import torch

    from jaxid.engine import forward
    from jaxid.experiments import belief_swap, steering

    torch.set_num_threads(timing.THREADS)
    network = published.load(folder)
    batch = _relation_batch(model, count)
    prompts = _torch_batch(model, batch)
    ids = _random_ids(model, batch)
    layers, swap_layers = _steering_layers(model), list(range(model.num_layers))

    pushes = np.asarray(steering.cell_vectors(ids, "horizontal", layers))
    at = torch.from_numpy(batch.words.astype(np.int64))
    steering_edits = [
        published.Edit(
            layer=layer,
            at=at[:, :1],
            vectors=torch.from_numpy(np.tile(pushes[number, x, y], (count, 1, 1))),
        )
        for number, layer in enumerate(layers)
        for x in range(4)
        for y in range(4)
    ]
    swap_edits = [
        published.Edit(layer=layer, at=at, vectors=torch.from_numpy(vectors[layer].copy()), factor=1.0)
        for vectors in _swap_vectors(ids, batch)
        for layer in swap_layers
    ]

    def jaxid_control() -> LogProbs:
        return {"control": np.asarray(forward(model, batch.prompts).logprobs(batch.answers))}

    def jaxid_steering() -> LogProbs:
        change = steering.run(model, batch, ids, layers=layers, multiplier=1.0)
        return {"change": change.reshape(-1, count, 2)}

    def jaxid_belief_swap() -> LogProbs:
        found = belief_swap.run(model, batch, ids, layers=swap_layers, factors=(1.0,), seed=SEED)
        return {"control": found.control, "steered": found.steered.reshape(-1, count, 2)}

    def hooks_steering(run: Callable[..., tuple[np.ndarray, np.ndarray]]) -> LogProbs:
        control, steered = run(network, prompts, steering_edits)
        return {"change": steered - control}

    def hooks_belief_swap(run: Callable[..., tuple[np.ndarray, np.ndarray]]) -> LogProbs:
        control, steered = run(network, prompts, swap_edits)
        return {"control": control, "steered": steered}

    works = [
        Work(
            name="control",
            edits=0,
            systems={
                "published": lambda: {"control": published.control_one_by_one(network, prompts)},
                "batched": lambda: {"control": published.control_batched(network, prompts)},
                "jaxid": jaxid_control,
            },
        ),
        Work(
            name="steering",
            edits=len(steering_edits),
            systems={
                "published": lambda: hooks_steering(published.one_by_one),
                "batched": lambda: hooks_steering(published.batched),
                "jaxid": jaxid_steering,
            },
        ),
        Work(
            name="belief_swap",
            edits=len(swap_edits),
            systems={
                "published": lambda: hooks_belief_swap(published.one_by_one),
                "batched": lambda: hooks_belief_swap(published.batched),
                "jaxid": jaxid_belief_swap,
            },
        ),
    ]
    size = sum(parameter.numel() for parameter in network.parameters())
    lengths = prompts.last + 1
    return works, [
        f"model     {model.name}: {size:,} parameters, {model.num_layers} blocks, float32",
        f"prompts   {count} of {int(lengths.min())} to {int(lengths.max())} tokens, which jaxid pads to "
        f"{batch.prompts.inputs.token_ids.shape[1]}",
        f"one pass  {published.flops(network, prompts):,} floating-point operations a prompt (without padding)",
    ]


def _relation_batch(model: Any, count: int) -> Any:
    from jaxid.data.coco_spatial import SpatialItem
    from jaxid.data.objects import OBJECTS
    from jaxid.experiments.relations import prepare

    rng = np.random.default_rng(SEED)
    side = model.config.vision_config.image_size
    pairs = [rng.permutation(len(OBJECTS))[:2] for _ in range(count)]
    items = [
        SpatialItem(
            image_id=number,
            picture=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
            subject=OBJECTS[subject],
            object=OBJECTS[other],
            relation=("left", "right")[number % 2],
        )
        for number, (subject, other) in enumerate(pairs)
    ]
    return prepare(model, items)


def _torch_batch(model: Any, batch: Any) -> Any:
    """The same arrays for PyTorch, cut to the longest prompt: padding to a multiple is jaxid's choice."""
    import published
    import torch

    inputs = batch.prompts.inputs
    length = int(inputs.last.max()) + 1
    return published.Batch(
        token_ids=torch.from_numpy(inputs.token_ids[:, :length].astype(np.int64)),
        valid=torch.from_numpy(inputs.valid[:, :length].astype(np.int64)),
        pixels=torch.from_numpy(inputs.pixels),
        last=torch.from_numpy(inputs.last.astype(np.int64)),
        answers=torch.from_numpy(model.processor.answer_ids(batch.answers).astype(np.int64)),
    )


def _random_ids(model: Any, batch: Any) -> Any:
    """IDs in random directions, as long as the words' activations at each layer."""
    from jaxid.experiments.relations import control
    from jaxid.ids import FULL_SIZE, GRID, SpatialIDs

    lengths = np.linalg.norm(control(model, batch)[1], axis=-1).mean(axis=(1, 2))
    shape = (model.num_layers, 1, 1, GRID, GRID, model.width)
    values = np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)
    values *= lengths.reshape(-1, 1, 1, 1, 1, 1) / np.linalg.norm(values, axis=-1, keepdims=True)
    return SpatialIDs(
        values=values,
        counts=np.ones(shape[1:-1], np.int32),
        objects=("random",),
        sizes=(FULL_SIZE,),
        layer_names=tuple(f"resid_post[{layer}]" for layer in range(model.num_layers)),
        model=model.name,
    )


def _steering_layers(model: Any) -> list[int]:
    """Three layers as deep as the published ones, 12 to 14 of 32."""
    first = max(0, min(12 * model.num_layers // 32, model.num_layers - 3))
    return list(range(model.num_layers))[first : first + 3]


def _swap_vectors(ids: Any, batch: Any) -> list[Float[np.ndarray, "L B 2 D"]]:
    """Directions of the belief swap at every layer, written out here once more, and the experiment's own noise."""
    import jax

    universal = np.asarray(ids.universal)
    toward_left = universal[:, 0, 0] - universal[:, 3, 0]
    sign = np.where(batch.truth == 1, 1, -1).astype(np.float32)
    subject = toward_left[:, None] * sign[None, :, None]
    pushes = np.stack([subject, -subject], axis=2)
    return [pushes, np.asarray(jax.random.normal(jax.random.key(SEED), pushes.shape, np.float32))]


def measure(work: Work, prompts: int, rounds: int = timing.MIN_ROUNDS) -> tuple[dict[str, float], float]:
    """Times one task on all systems, side by side.

    Returns:
        Figures by name, and the largest difference of the systems' log-probabilities.

    Raises:
        Disagreement: if the systems do not agree.
    """
    import jax

    jax.clear_caches()  # so that jaxid's first call compiles all that the task needs, whatever ran before
    timed = timing.side_by_side(work.systems, rounds)
    largest = check_agreement(work.name, {system: times.result for system, times in timed.items()})
    figures = {f"{system}_s": timed[system].median / prompts for system in SYSTEMS}
    figures |= {
        f"ratio_{system}": timed[system].median / timed[REFERENCE].median for system in SYSTEMS if system != REFERENCE
    }
    return figures | {"compile_s": timed[REFERENCE].warm_up}, largest


HEADER = ("work", "edits", "published ms", "batched ms", "jaxid ms", "pub/jaxid", "bat/jaxid", "compile s", "max diff")


def table_row(work: Work, figures: Mapping[str, float], largest: float) -> list[str]:
    """One task's line of the table; times in milliseconds per prompt."""
    times = [f"{1e3 * figures[f'{system}_s']:.2f}" for system in SYSTEMS]
    ratios = [f"{figures[f'ratio_{system}']:.2f}" for system in SYSTEMS if system != REFERENCE]
    return [work.name, str(work.edits), *times, *ratios, f"{figures['compile_s']:.2f}", f"{largest:.1e}"]


def _print_row(cells: Sequence[str]) -> None:
    print(f"{cells[0]:<12}" + "".join(f"{cell:>13}" for cell in cells[1:]), flush=True)


def run(model_name: str, out: Path, *, quick: bool) -> dict[str, float]:
    """Measures every task, prints the table and writes `interventions.json`.

    Raises:
        JaxidError: if the model cannot be loaded or the results not be written.
        Disagreement: if the systems do not agree; nothing is written then.
    """
    cpus = timing.use_cpus()
    from jaxid.checkpoints.loading import find_folder, load

    ensure_output_folder(out)
    folder = find_folder(model_name)
    for line in timing.describe_machine(cpus):
        print(line)
    count = QUICK_ITEMS if quick else ITEMS
    works, lines = make_works(load(model_name), folder, count)
    for line in lines:
        print(line)
    print(f"times     milliseconds a prompt, medians of {timing.MIN_ROUNDS} rounds, systems in turn\n")
    _print_row(HEADER)
    name = Path(model_name).name
    results: dict[str, float] = {}
    with timing.Disturbance(cpus) as disturbance:
        for work in works:
            figures, largest = measure(work, count)
            _print_row(table_row(work, figures, largest))
            results |= {f"{work.name}/{name}/{figure}": value for figure, value in figures.items()}
    print()
    if disturbance.share is not None:
        verdict = "" if disturbance.share < MAX_DISTURBANCE else ": too busy a machine, do not quote these numbers"
        print(f"other processes took {disturbance.share:.1%} of these CPUs{verdict}")
    path = write_json(out / "interventions.json", results)
    print(f"all systems agree to {TOLERANCE:g}; wrote {path}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line: 0 for a result, 1 where systems disagree, 2 for a wrong argument or model."""
    parser = argparse.ArgumentParser(description="jaxid beside the published PyTorch procedure, on CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for interventions.json")
    parser.add_argument("--model", default="tiny-llava", help="a shipped model, or a folder in Hugging Face layout")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ITEMS} prompts instead of {ITEMS}")
    options = parser.parse_args(arguments)
    try:
        run(options.model, options.out, quick=options.quick)
    except Disagreement as error:
        print(f"error: the systems do not agree, so their times mean nothing. {error}", file=sys.stderr)
        return 1
    except JaxidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
