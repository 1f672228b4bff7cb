"""Rounding errors of bfloat16 and float16 relative to float32, for each family, beside the same model in PyTorch.

Runs the tiny random models of the tests. Norms, softmax, rotary angles and the last logits are computed in float32
whatever the dtype; parameters and activations are rounded.

    python benchmarks/precision.py --out DIR
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from timing import use_cpus

if TYPE_CHECKING:  # JAX and PyTorch may only be imported after `use_cpus`
    import torch

    from jaxid.prompts.processor import Prompts

TESTS = Path(__file__).parents[1] / "tests"
DTYPES = ("bfloat16", "float16")


class Case(Protocol):
    """A tiny random model of the tests."""

    name: str

    def arguments(self, batch: Prompts) -> dict[str, object]:
        """The prompts as arguments of PyTorch's model."""
        ...

    def reference(self, folder: Path) -> torch.nn.Module:
        """PyTorch's model of a checkpoint folder."""
        ...


def distances(case: Case, dtype: str) -> dict[str, float]:
    """Largest error of the last logits, relative to the largest float32 logit, by system."""
    import numpy as np
    import torch

    from jaxid.interp.forward import forward

    fixtures = importlib.import_module("fixtures")
    prompts = fixtures.prompts(case)
    rows = np.arange(len(prompts))

    def theirs(network: torch.nn.Module, kind: torch.dtype) -> np.ndarray:
        arguments = {
            name: value.to(kind) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in case.arguments(prompts).items()
        }
        with torch.no_grad():
            logits = network.to(kind)(**arguments, use_cache=False).logits.float().numpy()
        network.float()
        return logits[rows, prompts.last()]

    exact = np.asarray(forward(fixtures.model(case), prompts).logits)
    ours = np.asarray(forward(fixtures.model(case, dtype), prompts).logits)
    network = case.reference(fixtures.folder(case))
    plain, rounded = theirs(network, torch.float32), theirs(network, getattr(torch, dtype))
    return {
        "jaxid": float(np.abs(ours - exact).max() / np.abs(exact).max()),
        "pytorch": float(np.abs(rounded - plain).max() / np.abs(plain).max()),
    }


def main() -> None:
    """Prints a table, and writes `precision.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for precision.json")
    parser.add_argument("--only", action="append", help="name of a model, may be repeated; all by default")
    arguments = parser.parse_args()
    use_cpus()
    sys.path.insert(0, str(TESTS))
    EVERY = importlib.import_module("families").EVERY
    known = [case.name for case in EVERY]
    unknown = set(arguments.only or ()) - set(known)
    if unknown:
        parser.error(f"no model is called {', '.join(sorted(unknown))}; the models are {', '.join(known)}")

    found: dict[str, float] = {}
    print("| model | " + " | ".join(f"jaxid {dtype} | PyTorch {dtype}" for dtype in DTYPES) + " |")
    print("|---|" + "---|" * 2 * len(DTYPES))
    for case in EVERY:
        if arguments.only and case.name not in arguments.only:
            continue
        cells = []
        for dtype in DTYPES:
            for system, value in distances(case, dtype).items():
                found[f"{case.name}/{dtype}/{system}"] = value
                cells.append(f"{value:.4f}")
        print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "precision.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
