"""What crosses devices in the passes as they are compiled for eight H100 and for eight chips of v5e.

No device is needed, but the compilers are: `pip install -e ".[gpu-compile,tpu-compile]" && pytest -m compilers`.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

PROGRAM = """
    import copy, json, sys
    import accelerator_programs, accelerator_targets, hlo_collectives, hlo_text
    from published_configs import CONFIGS

    target = accelerator_targets.Target(accelerator_targets.DEVICES[sys.argv[1]], model=4, data=2)
    fields = copy.deepcopy(dict(CONFIGS["llava-7b"]))
    fields["text_config"] |= {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": int(sys.argv[2])}
    fields["vision_config"] |= {"num_hidden_layers": 4}
    sizes = {"data": 2, "model": 4}
    for work in ("trace", "rerun", "generate", "extract"):
        for part in accelerator_programs._OF_MODELS[work](accelerator_programs.geometry("llava-7b", fields), target):
            parsed = hlo_text.parse(target.compile(part.function, *part.args, **part.options).as_text())
            across = [one.size for one in hlo_collectives.of_program(parsed, sizes) if "data" in one.axes]
            block = hlo_collectives.in_one_step(parsed, sizes, axis="model")
            print(json.dumps([part.name, block, across]), flush=True)
"""


@pytest.mark.compilers
@pytest.mark.parametrize(("device", "kv_heads"), [("h100", 8), ("h100", 2), ("v5e", 8)])
def test_little_crosses_accelerators(device: str, kv_heads: int) -> None:
    """Two sums over "model" in every block, of the tower too, and over "data" only whether all rows have ended."""
    code = textwrap.dedent(PROGRAM)
    run = subprocess.run(
        [sys.executable, "-c", code, device, str(kv_heads)], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = {name: (block, across) for name, block, across in map(json.loads, run.stdout.splitlines())}
    assert set(found) == {"trace", "rerun", "prefill", "decode", "extract"}
    assert all(max(across) <= 4 for _, across in found.values() if across)  # one truth value, of 4 bytes on TPU
    assert {name: across for name, (_, across) in found.items() if across}.keys() <= {"decode"}
    # A step of decoding also embeds the token and chooses the next one.
    assert {name: block for name, (block, _) in found.items() if name != "decode"} == dict.fromkeys(
        ("trace", "rerun", "prefill", "extract"), 2
    )
