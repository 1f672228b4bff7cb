"""The attention kernels compile for an H100 and for TPUs, at published sizes, and no scores are in memory.

No device is needed, but the compilers are: `pip install jaxid-vlm[gpu-compile,tpu-compile]`. By default a few sizes are
compiled; `JAXID_ALL_KERNELS=1` compiles all of them, which takes ten minutes.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import pytest

ALL = os.environ.get("JAXID_ALL_KERNELS") == "1"

PROGRAM = """
    import json, re, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from jaxid.kernels import attention
    from jaxid.kernels.masks import Reads, causal, everything, within_spans, with_spans

    H100 = '''gpu_device_info {threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
    l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
    cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536}
    platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"'''
    platform, cases = sys.argv[1], json.loads(sys.argv[2])
    if platform == "cuda":
        topology = topologies.get_topology_desc("h100", "cuda", topology="1x1x8", target_config=H100)
    else:
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")

    def loss(query, key, value, reads, prefix):
        if prefix:
            found = attention.prefix_part(query, key, value, reads)
        else:
            found = attention.part(query, key, value, reads)
        return (found.mixed.astype(jnp.float32) ** 2).sum() + found.lse.sum()

    for name, kind, dtype, prefix, batch, heads, kv_heads, queries, keys, width, split in cases:
        shape = (len(topology.devices) // 2, 2) if split else (1, 1)
        mesh = Mesh(np.array(topology.devices[: shape[0] * shape[1]]).reshape(shape), ("data", "model"))

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
        compiled = run.lower(query, key, key, reads, prefix).compile()
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


@pytest.mark.parametrize(("platform", "package"), [("cuda", "jax_plugins.xla_cuda12"), ("tpu", "libtpu")])
def test_forward_and_backward(platform: str, package: str) -> None:
    try:
        missing = importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        pytest.skip(f"the compiler for {platform} is not installed")
    flags = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    cases = CASES + MORE if ALL else CASES
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), platform, json.dumps(cases)],
        env={**os.environ, **settings, "XLA_FLAGS": flags if platform == "cuda" else ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = {}
    for line in ran.stdout.splitlines():
        if line.startswith("FOUND"):
            one = json.loads(line[6:])
            found[one.pop("name")] = one
    assert set(found) == {case[0] for case in cases}
    for name, _, dtype, rows, batch, heads, kv_heads, queries, keys, width, split in cases:
        one, times = found[name], max(1, rows)
        if platform == "tpu" or queries * times > 1:
            assert one["kernels"] == ["attention_forward", "attention_key_gradient", "attention_query_gradient"], name
        assert one["collectives"] == [] or not split, name
        scores = times * batch * heads * queries * keys
        padded = max(width, 128)
        elements = batch * padded * (heads * queries * times + 2 * kv_heads * keys)
        assert one["largest"] <= max(times * batch * heads * queries, batch * kv_heads * keys) * padded, name
        assert one["largest"] < scores or queries < 3 * width, name
        # Beside copies of arrays in another order: less than one more of each of them, in float32.
        assert one["temporary"] < 3 * 4 * elements + 2**24, (name, dtype, one)
