"""The scorer of dense maps compiles for an H100 and for a TPU, at published sizes, in its kernels.

No device is needed, but the compilers are: `pip install -e ".[gpu-compile,tpu-compile]" && pytest -m compilers`.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from benchmark_files import BENCHMARKS

PROGRAM = """
    import json, sys
    import jax, jax.numpy as jnp
    import accelerator_targets
    from jaxid.kernels import scorer, similarity

    target = accelerator_targets.Target(accelerator_targets.DEVICES[sys.argv[1]])

    def every(network, images, texts):
        return scorer.score(network, images, texts, similarity.moments(images, texts))

    def own(network, images, texts):
        count = len(images)
        moments = similarity.Moments(jnp.zeros((count, 1)), jnp.ones((count, 1)), jnp.zeros((count, 1)))
        return scorer.score_rows(network, images, texts, moments)

    def slope(network, images, texts):
        return jax.value_and_grad(lambda network: every(network, images, texts).sum())(network)

    for function, (rows, columns), images, texts in (
        (every, (257, 36), (32,), (24,)),
        (own, (197, 30), (512,), (512, 4)),
        (slope, (50, 30), (16,), (256,)),
    ):
        network = jax.eval_shape(lambda key: scorer.init_cnn(key, rows, columns), jax.random.key(0))
        given = network, *(
            jax.ShapeDtypeStruct((*count, tokens, 523), jnp.float32)
            for count, tokens in ((images, rows), (texts, columns))
        )
        compiled = target.compile(jax.jit(function), *jax.tree.map(target.array, given))
        print("FOUND", json.dumps({
            "function": function.__name__, "rows": rows,
            "kernels": "dense_map_scores" in compiled.as_text(),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }), flush=True)
"""


@pytest.mark.compilers
@pytest.mark.parametrize("device", ["h100", "v5e"])
def test_maps_are_scored_in_a_kernel(device: str) -> None:
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), device],
        env={**os.environ, "PYTHONPATH": path, "JAX_DEFAULT_MATMUL_PRECISION": "default"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line.removeprefix("FOUND ")) for line in ran.stdout.splitlines() if line.startswith("FOUND ")]
    assert [one["function"] for one in found] == ["every", "own", "slope"]
    for one in found:
        assert one["kernels"], one
        # Products and maps of a tile of 16,384 pairs are 0.4 GB in 16 bits; tokens are copied, too.
        assert one["temporary"] < 1.2e9, one
