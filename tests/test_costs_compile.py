"""Estimated temporaries beside those of XLA's compiler, at full size, for an H100 that need not be here.

`pip install -e ".[gpu-compile]"`, then `pytest -m compilers tests/test_costs_compile.py -n 0 -s`, prints the table of
docs/devices.md.
"""

import jax
import pytest
from benchmark_files import Modules

from jaxid.costs import cost_of

pytestmark = pytest.mark.compilers

RATIOS = {"trace": 1.05, "extract": 1.4, "rerun": 1.05, "prefill": 0.2, "decode": 1.0, "finetune": 1.0}
"""What is estimated of what XLA allots; of the pass before generation, too little."""

MARGIN = 0.15


@pytest.mark.parametrize("work", ["trace", "extract", "rerun", "generate", "finetune"])
@jax.numpy_dtype_promotion("standard")  # optax is not written for strict promotion
def test_temporaries_at_full_size(work: str, modules: Modules) -> None:
    programs = modules("accelerator_programs")
    target = programs.target_of("h100", "llava-7b")
    for part in programs.parts("llava-7b", work, target):
        estimated = cost_of(part.function.trace(*part.args, **part.options).jaxpr, target.device).temporary
        memory = target.compile(part.function, *part.args, **part.options).memory_analysis()
        told = memory.temp_size_in_bytes
        whole = told + memory.argument_size_in_bytes + memory.output_size_in_bytes
        print(f"\n| {part.name} | {estimated / 1e9:.2f} GB | {told / 1e9:.2f} GB | {whole / 1e9:.1f} GB |")
        assert estimated / told == pytest.approx(RATIOS[part.name], abs=MARGIN)
