"""Dense similarity maps: scores of pictures x captions, and the evaluation, beside the published procedure.

Scoring of pairs consists of functional rows, maps, standardisation over the call, and the CNN. Both systems start from
the same tokens (197 x 512 of ViT-B/16, and 30 x 512) and use the same scorer, in float32, in turn, on the same two
CPUs. Peak memory is measured in a separate process for each system and size. The bound is the time of the two matrix
products alone, at the rate that JAX reaches on a large product. The published evaluation is a loop over questions with
one picture each, on a random CLIP ViT-B/16; dense maps and pooled cosine each encode the picture. It is compared with
`jaxid.dcsm.evaluate.answer` on all questions. At 256 x 256, the published procedure's CNN gets 4,096 pairs at a time,
as all pairs together would need about 16 GB.

    python benchmarks/dcsm.py --out DIR
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from timing import Disturbance, describe_machine, peak_memory_mb, side_by_side, use_cpus

IMAGE_TOKENS, TEXT_TOKENS, WIDTH = 197, 30, 512
SIZES = (16, 64, 256)
WORDS = ("star", "fish", "a", "of", "red", "above", "no", "left", "the", "tree")


def captions(count: int) -> list[str]:
    """Random sentences, some of whose words are functional."""
    rng = np.random.default_rng(3)
    return [" ".join(rng.choice(WORDS, 9)) for _ in range(count)]


def tokens(size: int, count: int) -> list[np.ndarray]:
    """Random unit vectors: the tokens of pictures, and of captions."""
    rng = np.random.default_rng(size)
    made = [rng.standard_normal((size, length, WIDTH)).astype(np.float32) for length in (IMAGE_TOKENS, count)]
    return [array / np.linalg.norm(array, axis=-1, keepdims=True) for array in made]


def systems(size: int) -> dict[str, Callable[[], np.ndarray]]:
    """Both systems' calls on the same tokens; each returns the scores."""
    import jax
    import published_dcsm as published
    import torch

    from jaxid.dcsm.scoring import Scorer, score_tokens

    images, texts = tokens(size, TEXT_TOKENS)
    own = captions(size)
    scorer = Scorer.init(jax.random.key(0), IMAGE_TOKENS, TEXT_TOKENS, placement="replace")
    network = published.ScorerCNN(IMAGE_TOKENS, TEXT_TOKENS).eval()
    published.set_weights(network, scorer.network._asdict())
    theirs = published.Scorer(network=network, vectors=torch.from_numpy(np.array(scorer.vectors)), placement="replace")
    words = np.full((size, TEXT_TOKENS), -1, np.int32)
    for row, caption in enumerate(own):
        for index, place in published.functional_places(caption):
            words[row, place] = index
    left, right = torch.from_numpy(images), torch.from_numpy(texts)

    def published_call() -> np.ndarray:
        with torch.inference_mode():
            if size <= 64:
                return published.score_pairs(theirs, left, right, own).numpy()
            maps = published.place_functional(published.maps(left, right), own, theirs.vectors, "replace")
            flat = published.standardise(maps).reshape(size * size, 1, IMAGE_TOKENS, TEXT_TOKENS)
            return torch.cat([network(part) for part in flat.split(4096)]).reshape(size, size).numpy()

    def jaxid_call() -> np.ndarray:
        return np.asarray(score_tokens(scorer, images, texts, words, "call"))

    return {"published": published_call, "jaxid": jaxid_call}


def product_speed() -> float:
    """Floating-point operations per second of a large float32 matrix product."""
    import jax
    import jax.numpy as jnp

    side = 4096
    product = jax.jit(lambda a, b: a @ b)
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - started)
    return 2 * side**3 / sorted(times[1:])[len(times[1:]) // 2]


def operations() -> int:
    """Floating-point operations of one pair's map and of the scorer's first linear layer."""
    return 2 * IMAGE_TOKENS * TEXT_TOKENS * WIDTH + 2 * 128 * 4 * IMAGE_TOKENS * TEXT_TOKENS


def measure_pairs(size: int, peak: float) -> dict[str, float]:
    """Speeds of both systems at one size, and the largest difference of their scores."""
    found = side_by_side(systems(size), rounds=3)
    scores = [found[name].result for name in ("published", "jaxid")]
    error = float(np.abs(scores[0] - scores[1]).max() / np.abs(scores[0]).max())
    assert error <= 1e-4, f"scores differ by {error}"
    speed = {name: size * size / timed.median for name, timed in found.items()}
    return {
        "published_per_s": speed["published"],
        "jaxid_per_s": speed["jaxid"],
        "ratio": speed["jaxid"] / speed["published"],
        "peak_fraction": speed["jaxid"] * operations() / peak,
        "compile_s": found["jaxid"].warm_up,
        "error": error,
    }


def measure_memory(size: int, system: str) -> None:
    """Prints the peak memory of one call beyond what the process held before; run in a separate process."""
    call = systems(size)[system]
    before = peak_memory_mb()
    call()
    print(max(0.0, peak_memory_mb() - before))


def measure_evaluation(questions: int) -> dict[str, float]:
    """Questions per second of both systems, on the same random CLIP ViT-B/16."""
    import tempfile

    import jax
    import published_dcsm as published
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    from jaxid.checkpoints.encoders import load_encoder
    from jaxid.dcsm.evaluate import answer
    from jaxid.dcsm.scoring import Scorer
    from jaxid.zoo import folder
    from jaxid.zoo.export import write_image_processor

    torch.manual_seed(0)
    config = CLIPConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 69})
    network = CLIPModel(config).eval()
    rng = np.random.default_rng(5)
    pictures = [Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)) for _ in range(questions)]
    asked = [tuple(captions(4 * questions)[4 * row : 4 * row + 4]) for row in range(questions)]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        network.save_pretrained(place)
        words = AutoTokenizer.from_pretrained(folder("tiny-clip"))
        words.save_pretrained(place)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        write_image_processor(place, 224, mean=mean, std=std)
        encoder = load_encoder(place)
    processor = _Processor(words, encoder.processor.image_processor)
    scorer = Scorer.init(jax.random.key(0), IMAGE_TOKENS, TEXT_TOKENS, placement="replace")
    theirs_network = published.ScorerCNN(IMAGE_TOKENS, TEXT_TOKENS).eval()
    theirs = published.Scorer(
        network=theirs_network, vectors=torch.from_numpy(np.array(scorer.vectors)), placement="replace"
    )
    theirs_questions = [published.Question(picture=p, captions=c) for p, c in zip(pictures, asked, strict=True)]

    def published_call() -> object:
        return published.evaluate(network, processor, theirs, theirs_questions)

    def jaxid_call() -> object:
        return answer(encoder, pictures, asked, scorer)

    found = side_by_side({"published": published_call, "jaxid": jaxid_call}, rounds=3)
    speed = {name: questions / timed.median for name, timed in found.items()}
    return {
        "questions": questions,
        "published_per_s": speed["published"],
        "jaxid_per_s": speed["jaxid"],
        "ratio": speed["jaxid"] / speed["published"],
        "compile_s": found["jaxid"].warm_up,
    }


class _Processor:
    """A tokenizer and an image processor with the interface of Hugging Face's CLIPProcessor."""

    def __init__(self, tokenizer: Callable[..., Mapping[str, object]], image_processor: Callable[..., Any]):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(self, text: object = None, images: object = None, **options: object) -> dict[str, object]:
        import torch

        found: dict[str, object] = {}
        if text is not None:
            found |= dict(self.tokenizer(text, **options))
        if images is not None:
            pixels = self.image_processor(images, return_tensors="np")["pixel_values"]
            found["pixel_values"] = torch.from_numpy(pixels)
        return found


def main() -> None:
    """Prints a table, and writes `dcsm.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for dcsm.json")
    parser.add_argument("--size", type=int, action="append", help="number of pictures and of captions; may be repeated")
    parser.add_argument("--questions", type=int, default=64, help="number of questions of the evaluation")
    parser.add_argument("--memory", choices=("published", "jaxid"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cpus = use_cpus()
    import torch

    torch.set_num_threads(len(cpus) or 2)
    sizes = arguments.size or list(SIZES)
    if arguments.memory:
        measure_memory(sizes[0], arguments.memory)
        return
    lines = describe_machine(cpus)
    results: dict[str, float] = {}
    with Disturbance(cpus) as disturbance:
        peak = product_speed()
        for size in sizes:
            found = measure_pairs(size, peak)
            for system in ("published", "jaxid"):
                command = [sys.executable, __file__, "--out", str(arguments.out), "--size", str(size)]
                run = subprocess.run([*command, "--memory", system], capture_output=True, text=True)
                name = "peak_mb" if system == "jaxid" else "published_peak_mb"
                # A process that was killed for lack of memory prints nothing.
                found[name] = float(run.stdout.split()[-1]) if run.returncode == 0 else float("nan")
            results |= {f"pairs/{size}/{name}": value for name, value in found.items()}
        evaluation = measure_evaluation(arguments.questions)
    results |= {f"evaluation/{name}": value for name, value in evaluation.items()}
    results["product_gflops"] = peak / 1e9
    if disturbance.share is not None:
        results["foreign_load"] = disturbance.share
    lines.append(
        f"product   {peak / 1e9:.0f} GFLOP/s; other processes took {100 * (disturbance.share or 0):.1f} % of the CPUs"
    )
    lines += [
        "",
        "| pictures x captions | published, pairs/s | jaxid, pairs/s | ratio | share of the bound | "
        "published, MB | jaxid, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in sizes:
        own = {name: results[f"pairs/{size}/{name}"] for name in found}
        lines.append(
            f"| {size} x {size} | {own['published_per_s']:,.0f} | {own['jaxid_per_s']:,.0f} | {own['ratio']:.1f} | "
            f"{100 * own['peak_fraction']:.0f} % | {own['published_peak_mb']:,.0f} | {own['peak_mb']:,.0f} |"
        )
    lines += [
        "",
        f"evaluation, {arguments.questions} questions of 4 captions: published "
        f"{evaluation['published_per_s']:.2f}/s, jaxid {evaluation['jaxid_per_s']:.2f}/s, "
        f"{evaluation['ratio']:.1f} times",
    ]
    print("\n".join(lines))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "dcsm.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
