"""How much of the reading is hidden behind the computation: a profiled belief swap on the shipped model.

    python benchmarks/overlap.py --out DIR [--items 256] [--side 400]

runs the same belief swap twice under `jax.profiler`: one step after the other, as a plain loop does it, and
overlapped, as jaxid does it. The traces in `DIR/*/trace` can be opened in Perfetto or XProf; what is printed is read
from them. Both runs must write the same table.

"Busy" is the time in which a batch is computed, or its results are awaited, fetched and stored; reading is hidden while
the machine is busy. "Of the shorter" is the share of the shorter of the two that goes on beside the longer. Here the
same cores do both, so steps take longer beside each other, and the total work remains the same. With a GPU or TPU,
reading and computing have processors of their own.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.profiler import ProfileData, TraceAnnotation

from jaxid import pipeline
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.data.coco_spatial import write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.ids.accumulate import layer_names
from jaxid.ids.spatial import SpatialIDs
from jaxid.io import read_table, write_json

Spans = list[tuple[float, float]]
"""Times of beginnings and ends in seconds, ascending, without overlaps."""


@contextlib.contextmanager
def in_turn(
    inputs: Iterable[Any],
    read: Callable[[Any], Any],
    compute: Callable[[Any], Any],
    fetch: Callable[[Any, Any], Any],
    *,
    ahead: int = 0,
) -> Iterator[Iterator[tuple[Any, "Future[Any]"]]]:
    """`pipeline.overlapped` without any overlap."""

    def results() -> Iterator[tuple[Any, "Future[Any]"]]:
        for one in inputs:
            result: Future[Any] = Future()
            with TraceAnnotation("read"):
                opened = read(one)
            with TraceAnnotation("compute"):
                begun = compute(opened)
            with TraceAnnotation("fetch"):
                result.set_result(fetch(one, begun))
            yield one, result

    yield results()


def spans(trace: Path) -> dict[str, Spans]:
    """When anything was read, computed and fetched, from the files of a trace."""
    (file,) = trace.rglob("*.xplane.pb")
    found: dict[str, Spans] = {"read": [], "compute": [], "fetch": []}
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in found:
                    found[event.name].append((event.start_ns / 1e9, event.end_ns / 1e9))
    return {name: union(own) for name, own in found.items()}


def union(times: Spans) -> Spans:
    """Spans that together cover the same time, without overlaps."""
    found: Spans = []
    for start, end in sorted(times):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def length(times: Spans) -> float:
    """Seconds that spans cover."""
    return sum(end - start for start, end in times)


def common(some: Spans, others: Spans) -> float:
    """Seconds that both cover."""
    return length(some) + length(others) - length(union(some + others))


def profiled(swap: BeliefSwap, trace: Path) -> dict[str, float]:
    """Runs an experiment under the profiler, and measures what was hidden."""
    started = time.perf_counter()
    with jax.profiler.trace(str(trace)):
        swap.run()
    seconds = time.perf_counter() - started
    found = spans(trace)
    busy = union(found["compute"] + found["fetch"])
    read, computed, both = length(found["read"]), length(busy), common(found["read"], busy)
    return {
        "seconds": seconds,
        "read": read,
        "busy": computed,
        "steps": length(union(found["read"] + busy)),
        "hidden": max(0.0, both / read),
        "of_shorter": max(0.0, both / min(read, computed)),
    }


def main() -> None:
    """Writes the data, runs both, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--side", type=int, default=400, help="of the pictures, in pixels")
    options = parser.parse_args()
    scenes = sample_free(np.random.default_rng(0), options.items, num_objects=(2, 2))
    write_coco_spatial(options.out / "data", scenes, options.side)
    model = open_checkpoint("tiny-llava").load()
    values = np.random.default_rng(1).standard_normal((model.num_layers, 1, 1, 4, 4, model.width)).astype(np.float32)
    ids = SpatialIDs(
        values=values,
        counts=np.ones(values.shape[1:5], np.int32),
        objects=("star",),
        sizes=(1.0,),
        layer_names=layer_names(model.num_layers),
        model=model.name,
        fingerprint=model.fingerprint,
    )
    ids.save(options.out / "ids.safetensors")

    def swap(name: str) -> BeliefSwap:
        return BeliefSwap(
            data=options.out / "data",
            ids=options.out / "ids.safetensors",
            out=options.out / name,
            max_new_tokens=0,
            batch_size=16,
            restart=True,
            progress=False,
        )

    swap("warm").run()  # compiles
    found = {}
    for name, loop in (("in turn", in_turn), ("overlapped", pipeline.overlapped)):
        with mock.patch.object(pipeline, "overlapped", loop):
            found[name] = profiled(swap(name), options.out / name / "trace")
    tables = [read_table(options.out / name / "table.parquet") for name in found]
    if not tables[0].equals(tables[1]):
        raise SystemExit("the two runs did not write the same table.")
    write_json(options.out / "overlap.json", found)
    print(f"{options.items} items, pictures of {options.side} x {options.side} pixels, jax {jax.__version__}")
    print("| | reading, s | busy, s | reading hidden | of the shorter | all steps, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, own in found.items():
        shares = f"{own['hidden']:.0%} | {own['of_shorter']:.0%}"
        print(f"| {name} | {own['read']:.2f} | {own['busy']:.2f} | {shares} | {own['steps']:.2f} |")


if __name__ == "__main__":
    main()
