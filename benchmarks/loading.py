"""Time and memory for loading a checkpoint of Qwen2-VL-2B's size, beside Hugging Face's loader.

Writes a folder of random bfloat16 weights in the published layout (4.4 GB, removed afterwards), loads it in fresh
processes by jaxid and by transformers, and traces and steers a prompt with jaxid's model. Both systems read every
weight once before the clock stops, have the files in the page cache, and run on the same two CPUs.

    python benchmarks/loading.py --out DIR
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from published_configs import CONFIGS, Json
from timing import THREADS, use_cpus

SEED = 0
SHARD_BYTES = 2 * 10**9
SYSTEMS = ("jaxid", "transformers")
ROUNDS = 3

SPECIAL = {
    151643: "<|endoftext|>",
    151644: "<|im_start|>",
    151645: "<|im_end|>",
    151652: "<|vision_start|>",
    151653: "<|vision_end|>",
    151654: "<|vision_pad|>",
    151655: "<|image_pad|>",
    151656: "<|video_pad|>",
}
"""Special tokens of Qwen2's tokenizer, by id."""

WORDS = """system You are a helpful assistant user . ? , Is the star to left or right of fish""".split()

TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}<|im_start|>"
    "{{ message['role'] }}\n{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folder(folder: Path, fields: Json) -> int:
    """Writes a checkpoint of random weights whose shapes follow from its config.

    Args:
        folder: a new folder.
        fields: the parsed config.json.

    Returns:
        Size of all parameters in bytes.
    """
    import ml_dtypes
    from safetensors.numpy import save_file

    from jaxid.checkpoints.loading import abstract_parameters
    from jaxid.families.registry import family

    kind = family(fields["model_type"], "the benchmark")
    config = kind.config(fields)
    _, abstract = abstract_parameters(kind, config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    # Every tensor is a slice of one block of noise from a different offset: drawing 2 billion numbers takes a minute.
    noise = np.random.default_rng(SEED).standard_normal(1 << 25, np.float32)
    shards: list[dict[str, np.ndarray]] = [{}]
    weight_map, total, held = {}, 0, 0
    parts: dict[str, list[np.ndarray]] = {}

    def draw(shape: tuple[int, ...], name: str) -> np.ndarray:
        size, first = int(np.prod(shape)), len(weight_map) * 7919
        scale = size**-0.5 * shape[0] ** 0.5 if len(shape) > 1 else 0.02
        offset = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")) else 0.0
        values = np.resize(np.roll(noise, -first), size).reshape(shape)
        return (values * np.float32(scale) + np.float32(offset)).astype(ml_dtypes.bfloat16)

    def flush(number: int) -> None:
        save_file(shards[-1], folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
        shards[-1] = {}

    number = 1
    for key in kind.keys(config):
        if key.copy:
            continue
        shape = tuple(abstract[key.target].shape)
        for name, row in key.tensors(shape):
            example = key.to_checkpoint(np.broadcast_to(np.zeros((), np.int8), shape if row is None else shape[1:]))
            values = draw(example.shape, name)
            if key.part is not None:
                parts.setdefault(name, []).append(values)
                if len(parts[name]) < key.part[1]:
                    continue
                values = np.concatenate(parts.pop(name))
            shards[-1][name] = values
            weight_map[name] = number
            total, held = total + values.nbytes, held + values.nbytes
            if held > SHARD_BYTES:
                flush(number)
                number, held = number + 1, 0
    flush(number)
    names = {name: f"model-{shard:05d}.safetensors" for name, shard in weight_map.items()}
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_processor(folder, fields["vocab_size"])
    return total


def _write_processor(folder: Path, vocabulary_size: int) -> None:
    """Writes a word-level tokenizer with Qwen2's special tokens at their ids, and Qwen2-VL's image processor."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = ["<unk>", *WORDS]
    plain = [*words, *(f"word{number}" for number in range(len(words), vocabulary_size))]
    ids = {SPECIAL.get(number, word): number for number, word in enumerate(plain)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))


def status(name: str) -> int:
    """A value of this process's status in bytes, such as peak memory "VmHWM" or current memory "VmRSS".

    Both include pages of memory-mapped files.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {name}.")


def measure_jaxid(folder: Path, *, use: bool) -> dict[str, float]:
    """Loads the folder by jaxid in this process; `use` also traces a prompt and steers every fourth layer."""
    import jax
    import jax.numpy as jnp

    # Imports are not part of loading.
    from transformers import AutoImageProcessor, AutoTokenizer  # noqa: F401

    import jaxid
    import jaxid.checkpoints.loading

    jax.block_until_ready(jnp.ones(8) + 1)
    before, start = status("VmRSS"), time.perf_counter()
    model = jaxid.load(folder, dtype="bfloat16")
    # Reads every number as bits: a sum of random bfloat16 numbers would take longer than loading.
    for leaf in jax.tree.leaves(model.parameters):
        np.bitwise_or.reduce(np.asarray(leaf).view(np.uint16), axis=None)
    seconds = time.perf_counter() - start
    found = {"s": seconds, "peak": status("VmHWM") - before, "before": before}
    if use:
        picture = (np.arange(224 * 336 * 3).reshape(224, 336, 3) % 251).astype(np.uint8)
        start = time.perf_counter()
        prompts = model.prepare(picture, "Is the star to the left or right of the fish?")
        trace = jaxid.trace(model, prompts)
        clean = np.asarray(trace.logprobs(["left", "right"]))
        found["trace_s"] = time.perf_counter() - start
        layers = np.arange(0, model.num_layers, 4)
        push = np.random.default_rng(SEED).standard_normal((len(layers), model.width)).astype(jnp.bfloat16)
        start = time.perf_counter()
        steered = jaxid.rerun(model, trace, jaxid.add(layers, prompts.word("star"), push, 10.0))
        answers = np.asarray(steered.logprobs(["left", "right"]))
        found["rerun_s"] = time.perf_counter() - start
        if not (np.isfinite(answers).all() and (answers != clean).any(axis=(1, 2)).all()):
            raise SystemExit(f"steering had no effect, or its results are not finite: {clean} {answers}")
        found |= {"tokens": float(prompts.last()[0] + 1), "peak_used": status("VmHWM")}
    return found


def measure_transformers(folder: Path) -> dict[str, float]:
    """Loads the folder by Hugging Face's loader in this process."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl import modeling_qwen2_vl  # noqa: F401 - imports are not part of loading

    torch.set_num_threads(THREADS)
    before, start = status("VmRSS"), time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.view(torch.int16).max()
    seconds = time.perf_counter() - start
    return {"s": seconds, "peak": status("VmHWM") - before, "before": before}


def in_fresh_process(system: str, folder: Path, *, use: bool = False) -> dict[str, float]:
    """Measures a system in a fresh process."""
    command = [sys.executable, __file__, "--system", system, "--folder", str(folder), *(["--use"] if use else [])]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """Writes the folder, measures both systems in turn, prints and saves the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for loading.json")
    parser.add_argument("--scratch", type=Path, help="folder for the temporary 4.4 GB; --out by default")
    parser.add_argument("--layers", type=int, help="number of decoder layers, for a quick run")
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--use", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_cpus()
    if arguments.system == "jaxid":
        print(json.dumps(measure_jaxid(arguments.folder, use=arguments.use)))
        return
    if arguments.system == "transformers":
        print(json.dumps(measure_transformers(arguments.folder)))
        return
    if arguments.out is None:
        parser.error("--out is required")

    fields = dict(CONFIGS["qwen2-2b"])
    if arguments.layers is not None:
        fields["num_hidden_layers"] = arguments.layers
    arguments.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=arguments.scratch or arguments.out, prefix="checkpoint-"))
    try:
        size = write_folder(scratch / "qwen2-vl", fields)
        print(f"{size / 1e9:.2f} GB of parameters written")
        runs: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
        for _ in range(ROUNDS):
            for system in SYSTEMS:
                runs[system].append(in_fresh_process(system, scratch / "qwen2-vl"))
                print(f"{system}: {runs[system][-1]['s']:.2f} s")
        used = in_fresh_process("jaxid", scratch / "qwen2-vl", use=True)
    finally:
        shutil.rmtree(scratch)
    found: dict[str, float] = {"parameter_bytes": size, "rounds": ROUNDS}
    for system in SYSTEMS:
        ordered = sorted(runs[system], key=lambda run: run["s"])
        seconds, peak = ordered[len(ordered) // 2]["s"], max(run["peak"] for run in ordered)
        found |= {
            f"{system}_s": round(seconds, 2),
            f"{system}_gb_per_s": round(size / seconds / 1e9, 2),
            f"{system}_peak_over_parameters": round(peak / size, 3),
            f"{system}_process_peak_mb": round(max(run["peak"] + run["before"] for run in ordered) / 2**20),
        }
    found["peak_over_parameters"] = found["jaxid_peak_over_parameters"]
    found |= {name: round(used[name], 2) for name in ("trace_s", "rerun_s", "tokens")}
    found["process_peak_after_use_mb"] = round(used["peak_used"] / 2**20)
    (arguments.out / "loading.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
