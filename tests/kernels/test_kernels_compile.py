"""The kernels compile for an H100 and for TPUs, at published sizes: no scores in memory, no matrices sliced out.

No device is needed, but the compilers are: `pip install -e ".[gpu-compile,tpu-compile]" && pytest -m compilers`. By
default a few sizes are compiled; `JAXID_ALL_KERNELS=1` compiles all of them, which takes ten minutes.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ALL = os.environ.get("JAXID_ALL_KERNELS") == "1"

PROGRAM = """
    import json, re, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jaxid.kernels import attention
    from jaxid.kernels.masks import Reads
    import accelerator_targets

    device, cases = sys.argv[1], json.loads(sys.argv[2])
    target = accelerator_targets.Target(accelerator_targets.DEVICES[device])
    devices = accelerator_targets.devices(device, 8 if device == "h100" else 4)

    def loss(query, key, value, reads, prefix):
        if prefix:
            found = attention.prefix_part(query, key, value, reads)
        else:
            found = attention.part(query, key, value, reads)
        return (found.mixed.astype(jnp.float32) ** 2).sum() + found.lse.sum()

    for name, kind, dtype, prefix, batch, heads, kv_heads, queries, keys, width, split in cases:
        shape = (len(devices) // 2, 2) if split else (1, 1)
        mesh = Mesh(np.array(devices[: shape[0] * shape[1]]).reshape(shape), ("data", "model"))

        def given(shape, dtype, *spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

        def ints(*shape):
            return given(shape, jnp.int32, "data")

        query = given((batch, heads, queries, width), dtype, "data", "model")
        if prefix:
            query = given((prefix, batch, queries, heads, width), dtype, None, "data", None, "model")
        key = given((batch, kv_heads, keys, width), dtype, "data", "model")
        reads = None
        if kind == "prefix":
            reads = Reads(ints(batch, 1), ints(batch, keys))
        elif kind != "none":
            reads = Reads(ints(batch, queries), ints(batch, keys))
            if kind == "window":
                reads = reads._replace(low=ints(batch, queries))
            if kind in ("spans", "pictures"):
                reads = reads._replace(span=ints(batch, queries), spans=ints(batch, keys))
        run = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=4)
        compiled = target.compile(run, query, key, key, reads, prefix)
        text = compiled.as_text()
        shapes = re.findall(r"(?:f32|bf16|f16|pred|s32)\\[([0-9,]+)\\]", text)
        most = max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)
        kernels = re.findall(r"attention_(?:forward|query_gradient|key_gradient)", text)
        print("FOUND", json.dumps({
            "name": name, "kernels": sorted(set(kernels)),
            "temporary": compiled.memory_analysis().temp_size_in_bytes, "largest": most,
            "collectives": [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text],
        }), flush=True)
"""

CASES = [
    # name, mask, dtype, rows of a prefix, prompts, heads, key heads, queries, keys, width, over several devices
    ("llava-7b", "causal", "bfloat16", 0, 8, 32, 32, 640, 640, 128, False),
    ("prefix", "prefix", "bfloat16", 8, 8, 32, 32, 24, 640, 128, False),
    ("mesh", "window", "bfloat16", 0, 8, 32, 8, 640, 640, 128, True),
]
MORE = [
    ("llava-7b float32", "causal", "float32", 0, 8, 32, 32, 640, 640, 128, False),
    ("gemma tower", "none", "bfloat16", 0, 8, 16, 16, 4096, 4096, 72, False),
    ("gemma-12b", "pictures", "bfloat16", 0, 8, 16, 8, 640, 640, 256, False),
    ("gemma-12b float32", "pictures", "float32", 0, 8, 16, 8, 640, 640, 256, False),
    ("mllama tower", "none", "bfloat16", 0, 32, 16, 16, 1601, 1601, 80, False),
    ("mllama pictures", "prefix", "bfloat16", 8, 8, 32, 8, 24, 6404, 128, False),
    ("qwen windows", "spans", "bfloat16", 0, 8, 28, 4, 2000, 2000, 128, False),
    ("decoding", "prefix", "bfloat16", 4, 8, 28, 4, 1, 3000, 128, False),
    ("prefix float32", "prefix", "float32", 8, 8, 28, 4, 24, 640, 128, False),
    ("prefix on a mesh", "prefix", "bfloat16", 8, 8, 32, 8, 24, 640, 128, True),
    *((f"width {width}", "window", "bfloat16", 0, 2, 4, 2, 700, 700, width, False) for width in (64, 88, 96, 112)),
]


def compiled(program: str, *arguments: str) -> list[str]:
    """What a program prints in a process of its own, which uses no device."""
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [line.removeprefix("FOUND ") for line in ran.stdout.splitlines() if line.startswith("FOUND ")]


pytestmark = pytest.mark.compilers


@pytest.mark.parametrize("device", ["h100", "v5e"])
def test_attention_forward_and_backward(device: str) -> None:
    cases = CASES + MORE if ALL else CASES
    found = {}
    for line in compiled(PROGRAM, device, json.dumps(cases)):
        one = json.loads(line)
        found[one.pop("name")] = one
    assert set(found) == {case[0] for case in cases}
    for name, _, dtype, rows, batch, heads, kv_heads, queries, keys, width, split in cases:
        one, times = found[name], max(1, rows)
        if device == "v5e" or queries * times > 1:
            assert one["kernels"] == ["attention_forward", "attention_key_gradient", "attention_query_gradient"], name
        assert one["collectives"] == [] or not split, name
        scores = times * batch * heads * queries * keys
        padded = max(width, 128)
        elements = batch * padded * (heads * queries * times + 2 * kv_heads * keys)
        assert one["largest"] <= max(times * batch * heads * queries, batch * kv_heads * keys) * padded, name
        assert one["largest"] < scores or queries < 3 * width, name
        # Beside copies of arrays in another order: less than one more of each of them, in float32.
        assert one["temporary"] < 3 * 4 * elements + 2**24, (name, dtype, one)


PRODUCTS = """
    import json, sys
    import jax, jax.numpy as jnp
    import accelerator_targets
    from jaxid.kernels.product import gated_product, product
    from jaxid.kernels.stacks import LayerSlice
    from jaxid.nn.layers import _IN_KERNELS, ACTIVATIONS

    target = accelerator_targets.Target(accelerator_targets.DEVICES[sys.argv[1]])

    def gated(name):
        def layers(x, wide, narrow):
            def step(x, own):
                index, up, down = own
                up = LayerSlice(wide, index, up)
                return product(gated_product(x, up, up, ACTIVATIONS[name]), LayerSlice(narrow, index, down)), None

            return jax.lax.scan(step, x, (jnp.arange(len(wide)), wide, narrow))[0]

        layers.__name__ = name
        return layers

    def layers(x, wide, narrow):
        def step(x, own):
            index, up, down = own
            inner = jax.nn.silu(product(x, LayerSlice(wide, index, up)))
            return product(inner, LayerSlice(narrow, index, down)), None

        return jax.lax.scan(step, x, (jnp.arange(len(wide)), wide, narrow))[0]

    def slope(x, wide, narrow):
        return jax.grad(lambda x: layers(x, wide, narrow).astype(jnp.float32).sum())(x)

    for tokens, inputs, outputs in json.loads(sys.argv[2]):
        given = [
            target.array(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
            for shape in ((tokens, inputs), (8, inputs, outputs), (8, outputs, inputs))
        ]
        for function in (layers, slope, *(gated(name) for name in sorted(_IN_KERNELS))):
            compiled = target.compile(jax.jit(function), *given)
            print("FOUND", json.dumps({
                "shape": [tokens, inputs, outputs], "function": function.__name__,
                "kernels": compiled.as_text().count("layer_product"),
                "gated": compiled.as_text().count("gated_product/pallas_call"),
                "temporary": compiled.memory_analysis().temp_size_in_bytes,
            }), flush=True)
"""


@pytest.mark.parametrize("device", ["h100", "v5e"])
def test_products_read_matrices_in_their_stacks(device: str) -> None:
    """Temporaries are activations: without the kernel, a matrix of every kind would be among them."""
    shapes = [(24, 4096, 11008), (512, 1152, 4304), (1536, 3584, 512)]
    for line in compiled(PRODUCTS, device, json.dumps(shapes)):
        found = json.loads(line)
        tokens, inputs, outputs = found["shape"]
        assert (found["kernels"] > 0) == (device == "h100")
        assert (found["gated"] > 0) == (device == "h100" and found["function"] not in ("layers", "slope"))
        layers = 8 if found["function"] == "slope" else 1  # what the gradient needs of every layer
        # An input, what is inside a layer, its gradients, and float32 parts of a split product.
        activations = tokens * (inputs + 2 * outputs) * 2 * layers + 8 * tokens * max(inputs, outputs) * 4
        assert found["temporary"] < 2 * activations + 2**20, found


DIVIDED = """
    import json
    import jax, jax.numpy as jnp
    import accelerator_targets
    from jaxid.kernels.product import product
    from jaxid.kernels.stacks import LayerSlice

    target = accelerator_targets.Target(accelerator_targets.DEVICES["v5e"], 4)

    def layers(x, wide, narrow):
        def step(x, index):
            up, down = (
                LayerSlice(stack, index, jax.lax.dynamic_index_in_dim(stack, index, keepdims=False))
                for stack in (wide, narrow)
            )
            add = lambda x: jax.lax.map(lambda rows: product(jax.nn.silu(product(rows, up)), down), x)
            return jax.lax.cond(index % 2 == 0, add, lambda x: x, x), None

        return jax.lax.scan(step, x, jnp.arange(len(wide)))[0]

    shapes = ((4, 576, 4096), None), ((8, 4096, 11008), 2), ((8, 11008, 4096), 1)
    given = [target.array(jax.ShapeDtypeStruct(shape, jnp.bfloat16), axis) for shape, axis in shapes]
    text = target.compile(jax.jit(layers), *given).as_text()
    print("FOUND", json.dumps([text.count(f" {name}") for name in ("all-reduce", "all-gather")]))
"""


def test_products_stay_divided() -> None:
    """What an MLP computes inside is nowhere gathered, only summed at its end."""
    summed, gathered = json.loads(compiled(DIVIDED)[0])
    assert summed > 0 == gathered


STACKS = """
    import json, sys
    import jax, jax.numpy as jnp
    import accelerator_targets
    from jaxid.kernels import attention
    from jaxid.kernels.masks import causal
    from jaxid.kernels.stacks import LayerSlice

    target = accelerator_targets.Target(accelerator_targets.DEVICES[sys.argv[1]])

    def decode(query, keys, values):
        before = causal(jnp.full((8, 1), 600), jnp.arange(640)[None])

        def step(query, layer):
            own = [
                LayerSlice(stack, layer, jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)[:, :, :640])
                for stack in (keys, values)
            ]
            return attention.prefix_part(query, *own, before).mixed.astype(query.dtype), None

        return jax.lax.scan(step, query, jnp.arange(8))[0]

    for rows in (1, 8):
        shapes = (rows, 8, 1, 32, 128), (8, 8, 8, 704, 128), (8, 8, 8, 704, 128)
        given = [target.array(jax.ShapeDtypeStruct(shape, jnp.bfloat16)) for shape in shapes]
        print("FOUND", target.compile(jax.jit(decode), *given).memory_analysis().temp_size_in_bytes, flush=True)
"""


@pytest.mark.parametrize("device", ["h100", "v5e"])
def test_attention_reads_keys_in_their_stacks(device: str) -> None:
    """Temporaries are activations: neither keys nor values of a layer are among them."""
    of_layer = 8 * 8 * 640 * 128 * 2
    for rows, line in zip((1, 8), compiled(STACKS, device), strict=True):
        assert int(line) < of_layer // 2, (rows, line)
